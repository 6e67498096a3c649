"""Errors of a potential against labels, summed over batches and processes in float64."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from ase.data import chemical_symbols
from torch import Tensor

from nbody_pyg.training.labels import aligned

_MILLI = 1000.0  # eV -> meV


class RunningMeans:
    """Loss, errors and gradient norm since the last row of the log.

    Sums stay on the device, so nothing waits for a value until a row is written. Errors are computed in every fifth
    step only, which is enough for a log and saves a tenth of a millisecond in the others.
    """

    every = 5

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.loss: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0
        self.forces: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0
        self.count = self.energies_seen = self.forces_seen = 0

    def add(self, loss: Tensor, energy_error: Tensor | None, force_error: Tensor | None) -> None:
        self.loss += loss.detach()
        self.count += 1
        if self.count % self.every != 1:
            return
        if energy_error is not None and energy_error.numel():
            self.energies_seen += energy_error.numel()
            self.energy += energy_error.detach().abs().sum()
        if force_error is not None and force_error.numel():
            self.forces_seen += force_error.numel()
            self.forces += force_error.detach().abs().sum()

    def take(self) -> dict[str, float]:
        """Means over known labels (MAE in meV per graph and meV/angstrom); resets the sums."""
        count = max(self.count, 1)
        means = {"loss": float(self.loss) / count, "grad_norm": float(self.norm) / count}
        if self.energies_seen:
            means["energy_mae"] = _MILLI * float(self.energy) / self.energies_seen
        if self.forces_seen:
            means["forces_mae"] = _MILLI * float(self.forces) / self.forces_seen
        self.clear()
        return means


class Meter(Protocol):
    """Base class of meters, which sum errors over batches and processes."""

    def update(self, result: dict[str, Tensor], batch: Any) -> None: ...
    def reduce(self) -> None: ...
    def compute(self) -> dict[str, float]: ...


class ErrorMeter:
    r"""Mean absolute and root mean square errors of energy, forces (also by element) and stress.

    ===================================  ==========================================================
    key of :meth:`compute`               unit
    ===================================  ==========================================================
    ``energy_mae``, ``energy_rmse``      meV per graph
    ``energy_per_atom_mae``, ``_rmse``   meV per atom
    ``forces_mae``, ``forces_rmse``      meV/angstrom, over components
    ``forces_percent``                   RMSE over the root mean square of the labels, percent
    ``stress_mae``, ``stress_rmse``      meV/angstrom^3, over components
    ``forces_mae_X``, ``forces_rmse_X``  meV/angstrom, on atoms of element X
    ===================================  ==========================================================

    A label that is NaN counts as missing. Targets without any label are left out of the result.
    """

    _ROWS = ("energy", "energy_per_atom", "forces", "stress")

    def __init__(self, device: torch.device | str = "cpu"):
        # Per row: sum of |error|, sum of error^2, number of values, sum of label^2.
        self.sums = torch.zeros(len(self._ROWS), 4, dtype=torch.float64, device=device)
        self.by_element = torch.zeros(len(chemical_symbols), 3, dtype=torch.float64, device=device)

    def _add(self, row: str, error: Tensor, label: Tensor) -> None:
        known = ~label.isnan()  # selected by label, so that a NaN prediction shows in the result
        error, label = error[known], label[known].double()
        count = error.new_tensor(float(error.numel()))
        self.sums[self._ROWS.index(row)] += torch.stack(
            [error.abs().sum(), error.square().sum(), count, label.square().sum()]
        )

    @torch.no_grad()
    def update(self, result: dict[str, Tensor], batch: Any) -> None:
        """Add a batch: ``result`` of a Potential, and the labels of the same graphs."""
        if "energy" in batch and "energy" in result:
            label = aligned(batch.energy, result["energy"], "energy")
            error = (result["energy"] - label).double()
            self._add("energy", error, label)
            num_atoms = torch.bincount(batch.batch, minlength=len(error))
            self._add("energy_per_atom", error / num_atoms, label)
        if "forces" in batch and "forces" in result:
            label = aligned(batch.forces, result["forces"], "forces")
            error = result["forces"].double() - label
            self._add("forces", error, label)
            known = ~label.isnan().any(dim=1)
            counts = torch.full_like(error[:, 0], 3.0)
            values = torch.stack([error.abs().sum(dim=1), error.square().sum(dim=1), counts], dim=1)
            self.by_element.index_add_(0, batch.z[known], values[known])
        if "stress" in batch and "stress" in result:
            label = aligned(batch.stress, result["stress"], "stress")
            self._add("stress", result["stress"].double() - label, label)

    def reduce(self) -> None:
        """Sum over the processes of torch.distributed, where it runs."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.by_element)

    def compute(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for row, (absolute, square, count, labels) in zip(self._ROWS, self.sums.tolist(), strict=True):
            if count:
                out[f"{row}_mae"] = _MILLI * absolute / count
                out[f"{row}_rmse"] = _MILLI * (square / count) ** 0.5
            if row == "forces" and labels:
                out["forces_percent"] = 100.0 * (square / labels) ** 0.5
        for number, (absolute, square, count) in enumerate(self.by_element.tolist()):
            if count:
                out[f"forces_mae_{chemical_symbols[number]}"] = _MILLI * absolute / count
                out[f"forces_rmse_{chemical_symbols[number]}"] = _MILLI * (square / count) ** 0.5
        return out
