"""PotentialTask: a potential, its loss and its errors, for the trainer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbody_pyg.io.checkpoint import changes, read_checkpoint
from nbody_pyg.io.description import potential_config, potential_from_config
from nbody_pyg.io.upgrades import up_to_date
from nbody_pyg.longrange.charges import LatentCharges, charge_errors, recorded_charges
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.required import required
from nbody_pyg.runtime import compile_potential
from nbody_pyg.system import DEFAULT_STATE
from nbody_pyg.training.adapters import Adapters
from nbody_pyg.training.labels import aligned, has_stress
from nbody_pyg.training.loss import EnergyForceLoss
from nbody_pyg.training.metrics import ErrorMeter, Meter, RunningMeans
from nbody_pyg.training.parts import adapted_maps, choose_parts
from nbody_pyg.training.settings import FineTuneConfig, TrainingConfig


class PotentialTask(nn.Module):
    """Trains a potential on energies, forces and stress; works for any model in a Potential.

    Args:
        potential: the potential to train; or its dictionary from a checkpoint.
        settings: a TrainingConfig, or its dictionary.
        force_variance: mean square of the components of the training forces, (eV/angstrom)^2.
        finetune: which parts are trained, or its dictionary; None: all.
    Raises:
        ValueError: a batch without any label that the loss uses; ``compile`` where sums of latent charges are trained.
    """

    def __init__(
        self,
        potential: Potential | PropertyModel | dict[str, Any],
        settings: TrainingConfig | dict[str, Any],
        force_variance: float = 1.0,
        finetune: FineTuneConfig | dict[str, Any] | None = None,
    ):
        super().__init__()
        self.potential = potential_from_config(up_to_date(potential)) if isinstance(potential, dict) else potential
        self.settings = s = TrainingConfig(**settings) if isinstance(settings, dict) else settings
        self.potential.to(getattr(torch, s.dtype))
        self.loss = EnergyForceLoss(
            float(force_variance), s.force_weight, s.energy_weight, s.stress_weight, s.energy_per, s.penalty,
            s.charge_weight,
        )  # fmt: skip
        self.hparams: dict[str, Any] = {
            "potential": potential_config(self.potential),
            "settings": dataclasses.asdict(s),
            "force_variance": float(force_variance),
        }
        self.adapters: Adapters | None = None
        if finetune is not None:
            chosen = FineTuneConfig(**finetune) if isinstance(finetune, dict) else finetune
            self.hparams["finetune"] = dataclasses.asdict(chosen)
            choose_parts(self.potential, chosen.parts)
            if chosen.parts == "adapters":
                self.adapters = Adapters(adapted_maps(self.potential, chosen.rank), chosen.rank, s.seed)
        known = self.potential
        if s.compile and self._summed is not None:
            raise ValueError(
                "training.compile must be false while the sums of latent charges are trained, got true; "
                "set training.charge_weight to 0, or train without compile"
            )
        self._compiled = compile_potential(known, "training") if s.compile and isinstance(known, Potential) else None
        # Metrics shown during a run, (title, metric, unit), and the metric by which the best weights are chosen.
        self.shown: tuple[tuple[str, str, str], ...] = (("E", "energy_mae", "meV"), ("F", "forces_mae", "meV/A"))
        self.monitor: str | None = "forces_mae" if s.force_weight > 0 else "energy_mae"
        self.running = RunningMeans()
        # Fraction of known training labels, by label; `fit` sets those below 1.
        self.shares: dict[str, float] = {}

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, potential: Potential | None = None) -> PotentialTask:
        """The task of a checkpoint, with the averaged weights.

        Args:
            potential: a potential with the same network, if that is not one of ours.
        Raises: ValueError: as :func:`read_checkpoint`, or a network that is neither ours nor given.
        """
        checkpoint = read_checkpoint(path)
        stored = checkpoint["hyper_parameters"]
        task = cls(**(stored if potential is None else stored | {"potential": potential}))
        task.load_state_dict(checkpoint["state_dict"])
        return task

    # -- adapters ------------------------------------------------------------------------------------------
    def settle(self) -> None:
        """Write what follows from the trained parameters into the potential; after every change of them."""
        if self.adapters is not None:
            self.adapters.fold()

    def pull(self) -> None:
        """Complete the gradients after a backward pass."""
        if self.adapters is not None:
            self.adapters.pull()

    def settled(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries of ``state_dict`` with other values of the trained parameters, and what follows from them."""
        if self.adapters is None:
            return dict(trained)
        maps = self.adapters.folded(trained, "adapters.")
        return dict(trained) | {f"potential.{name}": value for name, value in maps.items()}

    # -- loss ----------------------------------------------------------------------------------------------
    @property
    def _summed(self) -> LatentCharges | None:
        """The latent charges whose sums are trained: those that the network finds itself."""
        model = self.potential.model
        layer = model.long_range if isinstance(model, NBodyNet) and self.settings.charge_weight > 0 else None
        return None if layer is None or layer.config.takes_charge else layer.charges

    def _errors(self, batch: Any, training: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        s = self.settings
        forces = "forces" in batch and (s.force_weight > 0 or not training)
        stress = s.stress_weight > 0 and has_stress(batch)
        evaluate = self._compiled if training and self._compiled is not None else self.potential
        result = evaluate(batch, compute_forces=forces, compute_stress=stress, create_graph=training)
        errors = {}
        if "energy" in batch:
            # Total energies, with E0, differ in float64; only their small difference is cast.
            label = aligned(batch.energy, result["energy"], "energy")
            difference = (result["energy"] - label).to(result["interaction_energy"].dtype)
            errors["energy_error"] = _known(difference, label)
        if forces:
            label = aligned(batch.forces, result["forces"], "forces")
            errors["force_error"] = _known(result["forces"] - label.to(result["forces"].dtype), label)
        if stress:
            volume = torch.linalg.det(batch.cell).abs() / torch.bincount(batch.batch)
            label = aligned(batch.stress, result["stress"], "stress")
            error = result["stress"] - label.to(result["stress"].dtype)
            errors["virial_error"] = _known(error * volume.to(error.dtype).view(-1, 1, 1), label)
        elif s.stress_weight > 0 and "stress" in batch:  # open systems only: nothing, but a term of the loss
            errors["virial_error"] = result["interaction_energy"][:0].reshape(0, 1, 1).expand(0, 3, 3)
        return result, errors

    def _factors(self, errors: dict[str, Tensor], batch: Any) -> dict[str, float]:
        """Number of known labels of this batch over their average number in a batch; 1 if none is missing.

        With this factor, the mean over the known labels of a batch averages over all batches and processes to the mean
        over all labels: a frame does not count more because others in its batch have no label.
        """
        if all(share == 1.0 for share in self.shares.values()):
            return {}
        rows = {"energy": ("energy_error", batch.num_graphs), "forces": ("force_error", len(batch.z)),
                "stress": ("virial_error", batch.num_graphs)}  # fmt: skip
        return {
            label: len(errors[key]) / (count * self.shares[label])
            for label, (key, count) in rows.items()
            if key in errors and self.shares.get(label, 1.0) < 1.0
        }

    def training_step(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        layer = self._summed
        with contextlib.nullcontext() if layer is None else recorded_charges(layer) as charges:
            _, errors = self._errors(batch, training=True)
        if layer is not None:
            errors["charge_error"] = charge_errors(required(charges)[-1], batch.batch, self._charge(batch), layer.gain)
        if self.settings.energy_per == "atom" and "energy_error" in errors:
            errors["num_atoms"] = torch.bincount(batch.batch)[~batch.energy.reshape(-1).isnan()]
        loss = self.loss(errors.get("energy_error"), errors.get("force_error"), errors.get("virial_error"),
                         errors.get("num_atoms"), self._factors(errors, batch), errors.get("charge_error"))  # fmt: skip
        self.running.add(loss, errors.get("energy_error"), errors.get("force_error"))
        return loss

    def _charge(self, batch: Any) -> Tensor:
        """Charge of each system; batches have none where it is the same in all training frames."""
        total: Tensor | None = batch.get("charge")
        if total is None:
            known = self.potential.network.assumed.get("charge", DEFAULT_STATE["charge"])
            total = torch.full((batch.num_graphs,), known, device=batch.pos.device)
        return total.reshape(-1)

    def meter(self, device: torch.device | str = "cpu") -> Meter:
        """The meter of a validation."""
        return ErrorMeter(device)

    def validation_step(self, batch: Any, meter: Meter) -> None:
        """Add the errors of a batch."""
        meter.update(self._errors(batch, training=False)[0], batch)

    def require_same_network(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError if a checkpoint has another network, E0, scale, repulsion or precision."""
        stored = checkpoint.get("hyper_parameters", {}).get("potential")
        if not isinstance(stored, Mapping):
            return
        mine, theirs = self.hparams["potential"], dict(stored)
        if mine["model"]["config"] is not None:
            theirs = up_to_date(theirs)
        if words := changes(theirs, mine):
            words = words.replace("model.config.", "")
            raise ValueError(f"the checkpoint must be of the same network: {words}; resume with its settings")


def _known(error: Tensor, label: Tensor) -> Tensor:
    """Rows whose label is not missing (NaN). NaN predictions are kept, so that they are noticed."""
    missing = label.isnan()
    if not bool(missing.any()):
        return error
    return error[~missing.flatten(1).any(dim=1)] if error.dim() > 1 else error[~missing]
