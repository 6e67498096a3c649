"""Assertions on conservation and extensivity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbody_pyg.required import required
from nbody_pyg.system import System
from nbody_pyg.testing.subject import Subject, prepare
from nbody_pyg.testing.systems import join, state_of

# Coordinates that are displaced in one system; more are sampled.
_MAX_COORDINATES = 36


def assert_extensive(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    distance: float = 1000.0,
    tolerance: float = 1e-9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Assert that systems ``distance`` angstrom apart, as one graph, have the sum of their energies.

    Each system is put beside itself and beside the next one; forces must not change. A periodic system is
    compared with its own repetition along each periodic direction instead. For short-ranged models: a Coulomb
    term between charged systems is not zero at this distance. A system with a charge or unpaired electrons is put
    beside itself only: what each of two unlike systems has of their total is a convention of the model.

    Returns the largest error; raises AssertionError with the error and the systems.
    """
    drawn, subject = prepare(model, systems, "assert_extensive", seed, dtype)
    away = torch.tensor([1.0, 2.0, -2.0], dtype=dtype) / 3.0 * distance
    worst = 0.0
    for number, system in enumerate(drawn):
        joined = []
        if system.cell is not None:
            axes = (
                range(3) if system.pbc is None else torch.as_tensor(system.pbc).reshape(3).nonzero().flatten().tolist()
            )
            joined += [(f"system {number} repeated along axis {k}", system, _repeat(system, k)) for k in axes]
        else:
            following = (number + 1) % len(drawn)
            neutral = state_of(system) == state_of(drawn[following]) == (0.0, 0.0)
            for other in {number, following} if neutral else {number}:
                beside = drawn[other]
                both = join(system, beside.replace(pos=beside.pos + away.to(beside.pos)))
                joined.append((f"systems {number} and {other}, {distance:g} angstrom apart", beside, both))
        energy, forces = subject([system])
        for name, beside, both in joined:
            second, second_forces = subject([beside])
            expected = None if forces is None else torch.cat([forces, required(second_forces)])
            where = f"assert_extensive: {name}"
            worst = max(worst, subject.compare([both], energy + second, expected, tolerance, where))
    return worst


def _repeat(system: System, axis: int) -> System:
    cell = required(system.cell).reshape(1, 3, 3).clone()
    both = join(system, system.replace(pos=system.pos + cell[0, axis]))
    cell[0, axis] *= 2.0
    return both.replace(cell=cell)


def assert_conservative(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    step: float = 1e-3,
    tolerance: float = 1e-6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""Assert that the forces are minus the gradient of the energy, and that their Jacobian is symmetric.

    .. math:: F_a = -\frac{E_{a,-2} - 8 E_{a,-1} + 8 E_{a,+1} - E_{a,+2}}{12 h} + O(h^4), \qquad
              \frac{\partial F_a}{\partial r_b} = \frac{\partial F_b}{\partial r_a}

    The first finds gradients that were cut (``detach``); the second also tests forces that come without an
    energy. Both are relative to the largest force, and to the largest entry of the Jacobian. In large systems
    36 coordinates are sampled. Where the energy is not smooth within ``2 step`` of a geometry the test fails.

    Args:
        step: displacement h, angstrom.
        tolerance: relative; differences of fourth order reach about 1e-9 for a smooth energy of a few eV.

    Returns:
        The largest relative error.
    """
    drawn, subject = prepare(model, systems, "assert_conservative", seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for number, system in enumerate(drawn):
        _, forces = subject([system])
        if forces is None:
            raise ValueError("model returns no forces; return them, or only an energy from tensors with a graph")
        found = finite_differences(subject, system, forces, step, generator)
        where = f"assert_conservative: system {number}"
        atoms = found.names
        if found.numeric is not None:
            worst = max(worst, _compare_forces(found.forces, found.numeric, found.scale, tolerance, atoms, where))
        jacobian, skew = found.jacobian, found.skew
        worst = max(worst, float(skew.max()))
        if not worst <= tolerance:
            a, b = divmod(int(skew.argmax()), len(atoms))
            raise AssertionError(
                f"{where}: the Jacobian of the forces is not symmetric, "
                f"dF[{atoms[b]}]/dr[{atoms[a]}] = {float(jacobian[a, b]):.10g} but "
                f"dF[{atoms[a]}]/dr[{atoms[b]}] = {float(jacobian[b, a]):.10g}; "
                f"relative error {float(skew.max()):.3e} exceeds {tolerance:.1e}"
            )
    return worst


class Differences(NamedTuple):
    """Differences of energies and forces by some coordinates of one system.

    ``forces`` and ``numeric`` (None without energies) [c] in eV/A, ``jacobian`` [c, c] in eV/A^2, ``skew`` [c, c]
    its antisymmetric part relative to the largest entry, ``scale`` the largest force, ``names`` of the coordinates.
    """

    forces: Tensor
    numeric: Tensor | None
    jacobian: Tensor
    skew: Tensor
    scale: float
    names: list[str]


def finite_differences(
    subject: Subject, system: System, forces: Tensor, step: float, generator: torch.Generator
) -> Differences:
    """Central differences of fourth order by at most 36 coordinates, drawn at random."""
    chosen = torch.randperm(forces.numel(), generator=generator)[:_MAX_COORDINATES].sort().values
    weights = torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=forces.dtype) / (12.0 * step)
    moved = []
    for coordinate in chosen.tolist():
        for factor in (-2.0, -1.0, 1.0, 2.0):
            pos = system.pos.clone()
            pos[coordinate // 3, coordinate % 3] += factor * step
            moved.append(system.replace(pos=pos))
    energies, slopes = subject.many(moved)
    # Where nothing acts on the system the energy must be flat (others carry the signal).
    scale = float(forces.abs().max()) if float(forces.abs().max()) > 1e-8 else 1.0
    numeric = -(energies.reshape(-1, 4) * weights.to(energies)).sum(dim=1) if energies.numel() else None
    rows = torch.stack([s.flatten()[chosen] for s in slopes]).reshape(len(chosen), 4, -1)
    jacobian = (rows * weights.to(rows)[None, :, None]).sum(dim=1)
    skew = (jacobian - jacobian.T).abs() / max(float(jacobian.abs().max()), scale)
    names = [f"{int(c) // 3}{'xyz'[int(c) % 3]}" for c in chosen]
    return Differences(forces.flatten()[chosen], numeric, jacobian, skew, scale, names)


def _compare_forces(
    forces: Tensor, numeric: Tensor, scale: float, tolerance: float, atoms: Sequence[str], where: str
) -> float:
    error = (forces - numeric).abs() / scale
    k = int(error.argmax())
    if not float(error[k]) <= tolerance:
        raise AssertionError(
            f"{where}, atom {atoms[k]}: force {float(forces[k]):.10g} but -dE/dr = {float(numeric[k]):.10g} "
            f"eV/A; relative error {float(error[k]):.3e} exceeds {tolerance:.1e}"
        )
    return float(error[k])
