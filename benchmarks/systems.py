"""The systems that are timed: molecules of the embedded set, and droplets and boxes of water."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import ase.io
import torch
from ase import Atoms
from torch import Tensor

from nbody_pyg.datasets import load_embedded

CUTOFF = 5.0
#: Edge of the cube that holds one molecule of water at 1 g/cm^3, angstrom.
_SPACING = 3.107


class System(NamedTuple):
    """Atoms of one or several molecules; forces and energies are random labels, as good as any for a clock."""

    z: Tensor
    pos: Tensor
    batch: Tensor
    num_graphs: int

    @property
    def num_atoms(self) -> int:
        return len(self.z)


def molecules(count: int, name: str = "alanine_dipeptide") -> System:
    """The first frames of an embedded data set (alanine dipeptide: 22 atoms)."""
    frames = load_embedded(name, "test_300K")[:count]
    batch = torch.arange(count).repeat_interleave(torch.tensor([len(frame.z) for frame in frames]))
    return System(torch.cat([frame.z for frame in frames]), torch.cat([frame.pos for frame in frames]), batch, count)


def molecule(name: str) -> Atoms:
    """A molecule of molecules.xyz: geometries of RDKit (ETKDG, MMFF)."""
    return next(a for a in ase.io.read(Path(__file__).with_name("molecules.xyz"), ":") if a.info["name"] == name)


def copies(atoms: Atoms, count: int, seed: int = 0) -> System:
    """A molecule so many times, each time with all atoms moved at random by about 0.1 angstrom."""
    noise = torch.randn(count, len(atoms), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pos = (torch.from_numpy(atoms.positions) + 0.05 * noise).reshape(-1, 3)
    batch = torch.arange(count).repeat_interleave(len(atoms))
    return System(torch.from_numpy(atoms.numbers).long().repeat(count), pos, batch, count)


def water(count: int, seed: int = 0) -> System:
    """A droplet of ``count`` molecules: those lattice points of liquid density that are nearest to the centre,
    each with a molecule turned at random. Not equilibrated, but with the neighbours of the liquid."""
    reach = int((count * 0.75 / torch.pi) ** (1 / 3)) + 2
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis) + torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    centres = grid[grid.norm(dim=1).argsort()[:count]] * _SPACING
    pos = _turned(centres, torch.Generator().manual_seed(seed))
    z = torch.tensor([8, 1, 1]).repeat(count)
    return System(z, pos, torch.zeros_like(z), 1)


def box(count: int, seed: int = 0) -> Atoms:
    """A periodic cube of ``count`` molecules of water at the density of the liquid, turned at random, on a simple cubic
    lattice. Where ``count`` is no cube the next cube has random vacancies, so it should be little larger."""
    generator = torch.Generator().manual_seed(seed)
    edge, side = count ** (1 / 3) * _SPACING, math.ceil(round(count ** (1 / 3), 9))
    axis = torch.arange(side, dtype=torch.float64) * edge / side
    grid = torch.cartesian_prod(axis, axis, axis)
    centres = grid[torch.randperm(len(grid), generator=generator)[:count]]
    return Atoms("OHH" * count, _turned(centres, generator).numpy(), cell=[edge] * 3, pbc=True)


def _turned(centres: Tensor, generator: torch.Generator) -> Tensor:
    """Positions of molecules of water (O, H, H), each turned at random, with the oxygen atoms at ``centres``."""
    angle = torch.tensor(104.5).deg2rad().double()
    hydrogens = 0.9572 * torch.stack(
        [torch.stack([(angle / 2).cos(), s * (angle / 2).sin(), torch.zeros(()).double()]) for s in (1, -1)]
    )
    molecule = torch.cat([torch.zeros(1, 3, dtype=torch.float64), hydrogens])
    turns = torch.linalg.qr(torch.randn(len(centres), 3, 3, dtype=torch.float64, generator=generator))[0]
    turns = turns * torch.linalg.det(turns).reshape(-1, 1, 1)
    return (centres.unsqueeze(1) + molecule @ turns.mT).reshape(-1, 3)
