"""What is tested: energies and forces of anything callable, and how results are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.system import System
from nbody_pyg.testing.systems import collate, prepare_systems, random_like

# Geometries evaluated at once hold about this many atoms (memory).
_CHUNK_ATOMS = 1500
# Displacement (angstrom) that an output must notice.
_NUDGE = 0.05


class _Function(nn.Module):
    """A plain function in the clothes of a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor, **keywords: Tensor) -> Any:
        return self.function(z, pos, batch, **keywords)


class Subject:
    """Energies [B] and forces [N, 3] of the user's model or function."""

    def __init__(self, subject: Any, dtype: torch.dtype) -> None:
        if isinstance(subject, nn.Module):
            # A copy: the user's model keeps its dtype and its mode.
            subject = copy.deepcopy(subject).to(dtype).eval()
        elif not callable(subject):
            raise TypeError(f"model must be callable as energy(z, pos, batch), got {type(subject).__name__}")
        self.raw = subject
        self.potential: Potential | None = subject if isinstance(subject, Potential) else None
        self.gives_forces = False
        # With a geometry here, all systems are displacements of it and keep its topology.
        self.start: tuple[Tensor, Tensor] | None = None

    def arguments(self, systems: Sequence[System]) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """What a model is called with, with the topology where its parts are given."""
        (z, pos, batch), found = collate(systems)
        keywords: dict[str, Any] = dict(found)
        bonds = keywords.pop("bonds", None)
        if self.start is not None or bonds is not None:
            scheme = None if self.potential is None else self.potential.scheme
            if scheme is None:
                raise ValueError("frozen_topology needs a model with a scheme; set it to False for others")
            start = pos if self.start is None else self.start[1].repeat(len(z) // len(self.start[0]), 1)
            given, lattice = {} if bonds is None else {"bonds": bonds}, (keywords.get("cell"), keywords.get("pbc"))
            tree = scheme.topology(z, start, batch, *lattice, **given)
            keywords["topology"] = scheme.update(tree, z, pos, batch, *lattice)
        return (z, pos, batch), keywords

    def _prepare(self, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        if self.potential is not None or self.gives_forces:
            return
        with torch.no_grad():
            self.gives_forces = isinstance(self.raw(*arguments, **keywords), dict)
        if not self.gives_forces:
            self.potential = Potential(self.raw if isinstance(self.raw, nn.Module) else _Function(self.raw))

    def __call__(self, systems: Sequence[System], forces: bool = True) -> tuple[Tensor, Tensor | None]:
        """All systems as one batch. Energies come without the reference, whose size would cost digits."""
        arguments, keywords = self.arguments(systems)
        self._prepare(arguments, keywords)
        if self.potential is None and self.start is None:
            out = self.raw(*arguments, **keywords)
            energy, force = out.get("energy"), out.get("forces")
            if energy is None and force is None:
                raise ValueError(f"model must return 'energy' or 'forces', got a dict with {sorted(out)}")
            # Without an energy its tensor has no entries, [num_graphs, 0], and compares as equal.
            energy = arguments[1].new_zeros(len(systems), 0) if energy is None else energy.detach().reshape(-1)
            return energy, None if force is None else force.detach()
        out = required(self.potential)(*arguments, **keywords, compute_forces=forces)
        return out["interaction_energy"], out.get("forces")

    def compare(
        self, systems: Sequence[System], energy: Tensor, forces: Tensor | None, tolerance: float, where: str
    ) -> float:
        """Largest error of the systems as one batch; raises as :func:`compare`."""
        got, got_forces = self(systems)
        worst = compare(got, energy, tolerance, f"{where}: energy")
        if forces is None:
            return worst
        return max(worst, compare(required(got_forces), forces, tolerance, f"{where}: forces"))

    def many(self, systems: Sequence[System], forces: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The same for a long list, in chunks; forces as one tensor per system."""
        per = max(1, _CHUNK_ATOMS // max(s.pos.shape[0] for s in systems))
        energies, slopes = [], []
        for start in range(0, len(systems), per):
            part = systems[start : start + per]
            energy, force = self(part, forces)
            energies.append(energy)
            if force is not None:
                slopes.extend(force.split([s.pos.shape[0] for s in part]))
        return torch.cat(energies), slopes


def compare(got: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Raise when the largest deviation exceeds tolerance x max(1, largest expected value)."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}")
    if got.numel() == 0:
        return 0.0
    error = (got - expected).abs()
    if not bool(torch.isfinite(error).all()):
        bad = (~torch.isfinite(error)).nonzero()[0].tolist()
        raise AssertionError(f"{what}: value at index {bad} is not finite")
    worst, limit = float(error.max()), tolerance * max(1.0, float(expected.abs().max()))
    if worst > limit:
        index = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise AssertionError(
            f"{what}: error {worst:.3e} at index {index} exceeds {limit:.1e} "
            f"(got {float(got[tuple(index)]):.10g}, expected {float(expected[tuple(index)]):.10g})"
        )
    return worst


def prepare(
    model: Any, systems: Sequence[Any] | None, name: str, seed: int, dtype: torch.dtype, dense: bool = False
) -> tuple[list[System], Subject]:
    """The systems and the subject of an assertion, which must depend on the geometry."""
    drawn, subject = prepare_systems(model, systems, seed, dtype, dense=dense), Subject(model, dtype)
    require_signal(subject, drawn, name, seed)
    return drawn, subject


def require_signal(subject: Subject, systems: Sequence[System], name: str, seed: int) -> None:
    """Fail when energies are the same for every geometry, or forces are zero in all: nothing is tested."""
    generator = torch.Generator().manual_seed(seed + 1)
    moved = [s.replace(pos=s.pos + _NUDGE * random_like(s.pos, generator)) for s in systems]
    before, after = [subject([s]) for s in systems], [subject([s]) for s in moved]
    change = 0.0
    for (energy, force), (moved_energy, moved_force) in zip(before, after, strict=True):
        moved_by = moved_energy - energy if energy.numel() else required(moved_force) - required(force)
        change = max(change, float(moved_by.abs().max()))
    if math.isfinite(change) and not change > 1e-8:
        raise AssertionError(
            f"{name}: the output changes by {change:.1e} when atoms move by {_NUDGE} angstrom, so it does "
            "not depend on the geometry and the test is vacuous; initialise the model, or check its cutoff"
        )
    largest = max((float(force.abs().max()) for _, force in before if force is not None), default=math.inf)
    if math.isfinite(largest) and not largest > 1e-8:
        raise AssertionError(
            f"{name}: the energy depends on the geometry but the largest force is {largest:.1e}; "
            "look for a detach() between the positions and the energy"
        )
