"""What happens when two atoms are pushed into each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from ase.data import covalent_radii
from torch import Tensor

from nbody_pyg.nn.repulsion import pair_name
from nbody_pyg.system import System
from nbody_pyg.testing.subject import Subject

#: Distance (angstrom) to which pairs are pushed.
NEAREST = 0.3
#: No bond is shorter than this part of the sum of covalent radii, so that below it every pair must repel.
WALL = 0.7
#: A pair in a structure starts from where it stands, if that is nearer than this (angstrom).
_START_WITHIN = 3.0
_SPACING = 0.02
#: A structure may be caught while a bond is stretched by a tenth: its push starts at the minimum on the way.
_SETTLE = 0.9


class Push(NamedTuple):
    """A pair that was pushed together.

    ========================  =====================================================================================
    field                     meaning, unit
    ========================  =====================================================================================
    ``pair``                  name, "H-O"
    ``start``                 distance at which the push starts, angstrom
    ``height``                energy at 0.3 angstrom over that at the start, eV
    ``weakest``               smallest repulsive force (-dE/dr) on the way, eV/angstrom; negative where it attracts
    ``place``                 distance of it
    ``hole``                  how far the energy falls below that at the start of the push, eV, >= 0
    ========================  =====================================================================================
    """

    pair: str
    start: float
    height: float
    weakest: float
    place: float
    hole: float


def push_dimers(subject: Subject, species: Sequence[int]) -> list[Push]:
    """Each pair of elements on its own, from 0.7 times the sum of the covalent radii down to 0.3 angstrom."""
    found = []
    for first, second in itertools.combinations_with_replacement(sorted(species), 2):
        start = max(WALL * float(covalent_radii[first] + covalent_radii[second]), NEAREST + 0.1)
        axis = torch.tensor([[0.0, 0.0, 0.0], [2.0, -1.0, 2.0]], dtype=torch.float64) / 3.0
        distances = _grid(start)
        systems = [System.from_tensors(torch.tensor([first, second]), r * axis) for r in distances.tolist()]
        found.append(_read(pair_name(first, second), distances, subject.many(systems, forces=False)[0]))
    return found


def push_in_structures(subject: Subject, systems: Sequence[System]) -> list[Push]:
    """The nearest pair of each kind in some open structures, down to 0.3 angstrom while all others stay."""
    found = []
    for name, (system, i, j, start) in sorted(_nearest_pairs(systems).items()):
        distances = _grid(start)
        direction = (system.pos[j] - system.pos[i]) / start
        moved = []
        for r in distances.tolist():
            pos = system.pos.clone()
            pos[i] += 0.5 * (start - r) * direction
            pos[j] -= 0.5 * (start - r) * direction
            moved.append(system.replace(pos=pos))
        found.append(_read(name, distances, subject.many(moved, forces=False)[0], _SETTLE))
    return found


def _grid(start: float) -> Tensor:
    return torch.linspace(NEAREST, start, max(6, round((start - NEAREST) / _SPACING)), dtype=torch.float64)


def _read(name: str, distances: Tensor, energy: Tensor, settle: float = 1.0) -> Push:
    """The wall inside the equilibrium: the lowest point between ``settle`` times the first distance and the first."""
    energy = energy.double()
    outer = int((distances < settle * float(distances[-1])).sum())
    outer = min(max(outer, 2), len(distances) - 1)
    rest = outer + int(energy[outer:].argmin())
    wall = energy[: rest + 1]
    force = -torch.diff(wall) / torch.diff(distances[: rest + 1])
    weakest = int(force.argmin())
    place = float(distances[weakest : weakest + 2].mean())
    hole = max(0.0, float(wall[-1] - wall.min()))
    return Push(name, float(distances[rest]), float(wall[0] - wall[-1]), float(force[weakest]), place, hole)


def _nearest_pairs(systems: Sequence[System]) -> dict[str, tuple[System, int, int, float]]:
    nearest: dict[str, tuple[System, int, int, float]] = {}
    for system in systems:
        distance = torch.cdist(system.pos, system.pos)
        for i, j in itertools.combinations(range(len(system.z)), 2):
            name, r = pair_name(int(system.z[i]), int(system.z[j])), float(distance[i, j])
            if r < min(_START_WITHIN, nearest[name][3] if name in nearest else _START_WITHIN):
                nearest[name] = (system, i, j, r)
    return nearest
