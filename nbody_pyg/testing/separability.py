"""Assertions that distant systems do not affect each other, for any number and size."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.required import required
from nbody_pyg.testing.subject import compare, prepare
from nbody_pyg.testing.systems import join


def assert_separable(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    distances: Sequence[float] = (125.0, 250.0, 500.0, 1000.0),
    decay: float | None = None,
    tolerance: float = 1e-9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""Assert that what a system B does to a system A dies with their distance D.

    .. math:: \Delta(D) = E(A + B) - E(A) - E(B), \qquad |\Delta(D)| \le |\Delta(D_0)|\, (D_0 / D)^{n}

    and likewise for the forces on A, with one power more. Without ``decay`` nothing may be left at all from the
    smallest distance on, as in models with cutoffs. With ``decay`` n it may fall off as :math:`D^{-n}`: 1 for charged
    systems, 3 for neutral ones. It finds what a sum over the system hides: normalisation over all atoms (attention,
    means), gates that know the number of atoms, charges that equilibrate at any distance.

    Args:
        systems: two or more open geometries; each is A to the next one.
        distances: between the centres, angstrom, growing.
        decay: n, or None where the interaction must be zero.
        tolerance: eV and eV/angstrom, relative to the largest value above 1; differences below it pass.

    Returns:
        The largest interaction energy at the last distance.

    Raises:
        AssertionError: with the systems, the distance, and what is left there.
    """
    drawn, subject = prepare(model, systems, "assert_separable", seed, dtype)
    if len(drawn) < 2 or any(s.cell is not None for s in drawn):
        raise ValueError("systems must hold at least two open geometries; periodic ones have no distance")
    if list(distances) != sorted(distances) or not distances[0] > 0:
        raise ValueError(f"distances must grow from a positive length, got {list(distances)}")
    direction = torch.tensor([1.0, 2.0, -2.0], dtype=dtype) / 3.0
    largest = 0.0
    for number, a in enumerate(drawn):
        b = drawn[(number + 1) % len(drawn)]
        alone, pushes = zip(*(subject([s]) for s in (a, b)), strict=True)
        scale = max(1.0, *(float(value.abs().max()) for value in alone if value.numel()))
        first: tuple[float, float] | None = None
        for distance in distances:
            both, push = subject([join(a, b.replace(pos=b.pos + distance * direction.to(b.pos)))])
            energy = float((both - alone[0] - alone[1]).abs().max()) if both.numel() else 0.0
            force = 0.0 if push is None else float((push[: len(a.z)] - pushes[0]).abs().max())
            where = f"assert_separable: systems {number} and {(number + 1) % len(drawn)}, {distance:g} angstrom apart"
            if not (math.isfinite(energy) and math.isfinite(force)):
                raise AssertionError(f"{where}: the result is not finite")
            first = first or (energy, force)
            for what, left, start, power in (
                ("energy", energy, first[0], decay),
                ("force on the first", force, first[1], decay),
            ):
                allowed = tolerance * scale
                if power is not None:
                    # 5 % for the terms of higher order that the first distance still holds
                    more = power + (what != "energy")
                    allowed += 1.05 * start * (distances[0] / distance) ** more
                if left > allowed:
                    raise AssertionError(
                        f"{where}: {what} differs by {left:.3e} from that of the systems alone, allowed {allowed:.1e}"
                        + ("" if decay is None else f" (decay D^-{decay:g})")
                    )
        largest = max(largest, energy)
    return largest


def assert_size_transfer(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    counts: Sequence[int] = (2, 8, 27),
    spacing: float = 1000.0,
    tolerance: float = 1e-9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""Assert that n copies of a system, far apart in one graph, have n times its energy and its forces, for growing n.

    .. math:: E(n A) = n E(A), \qquad F_{i,\,\text{copy}} = F_i

    Two systems side by side (:func:`assert_extensive`) may still fit into a fixed number of slots, or lie within the
    range of sizes that a normalisation has seen: this helper goes on to many. Copies stand on a cubic grid that is
    disturbed at random, so that no symmetry helps.

    Args:
        counts: numbers of copies.
        spacing: of the grid, angstrom.
        tolerance: eV per copy and eV/angstrom, relative to the largest value above 1.

    Returns:
        The largest error.

    Raises:
        AssertionError: with the system and the number of copies.
    """
    drawn, subject = prepare(model, systems, "assert_size_transfer", seed, dtype)
    if any(s.cell is not None for s in drawn):
        raise ValueError("systems must be open; repeat a cell with assert_extensive")
    if min(counts) < 2:
        raise ValueError(f"counts must be 2 or more, got {list(counts)}")
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for number, system in enumerate(drawn):
        energy, forces = subject([system])
        for count in counts:
            offsets = _grid(count, spacing, generator).to(system.pos)
            copies = [system.replace(pos=system.pos + offset) for offset in offsets]
            got, got_forces = subject([functools.reduce(join, copies)])
            where = f"assert_size_transfer: {count} copies of system {number}"
            worst = max(worst, compare(got / count, energy, tolerance, f"{where}: energy per copy"))
            if got_forces is not None:
                worst = max(
                    worst, compare(got_forces, required(forces).repeat(count, 1), tolerance, f"{where}: forces")
                )
    return worst


def _grid(count: int, spacing: float, generator: torch.Generator) -> Tensor:
    side = math.ceil(count ** (1 / 3) - 1e-9)
    points = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 3)[:count] * spacing
    return points + 0.1 * spacing * torch.rand(points.shape, generator=generator, dtype=torch.float64)
