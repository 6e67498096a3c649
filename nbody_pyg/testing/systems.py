"""Geometries to test with: random ones, and the user's brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg import system as checked
from nbody_pyg.hierarchy.bondgraph import covalent_bonds
from nbody_pyg.potential import Potential

_STATE = ("charge", "charges", "spin")


@dataclass(frozen=True)
class System:
    """One geometry: z [N], pos [N, 3]; cell [1, 3, 3] and pbc [1, 3] when it is periodic.

    ``charge`` [1], ``charges`` [N] and ``spin`` [1] where it has some, as in :class:`~nbody_pyg.data.AtomicData`.
    ``bonds`` [2, M], both directions, where a BondTree is not to find them.
    """

    z: Tensor
    pos: Tensor
    cell: Tensor | None = None
    pbc: Tensor | None = None
    charge: Tensor | None = None
    charges: Tensor | None = None
    spin: Tensor | None = None
    bonds: Tensor | None = None

    @property
    def state(self) -> tuple[float, float]:
        """Total charge, and number of unpaired electrons 2S."""
        total = self.charge if self.charges is None else self.charges.sum()
        charge = 0.0 if total is None else float(total)
        return charge, 0.0 if self.spin is None else float(self.spin) - 1.0

    def checked(self) -> checked.System:
        """The system that models take, without charges."""
        return checked.System.from_tensors(self.z, self.pos, None, self.cell, self.pbc)

    def reordered(self, order: Tensor) -> System:
        """The same system with its atoms in another order."""
        charges = None if self.charges is None else self.charges[order]
        bonds = None if self.bonds is None else torch.argsort(order)[self.bonds]
        return replace(self, z=self.z[order], pos=self.pos[order], charges=charges, bonds=bonds)


def random_molecule(num_atoms: int, species: Sequence[int] = (1, 6, 8), seed: int = 0) -> System:
    """Atoms grown one after another at 1.0-1.5 angstrom from an earlier one and at least 0.95 from all.

    Holds every element of ``species`` when there are atoms enough, and four atoms or more are not near a
    plane; float64.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        pos = _grow(num_atoms, generator)
        if num_atoms < 4 or torch.linalg.svdvals(pos - pos.mean(dim=0))[-1] > 0.5:
            break
    z = torch.tensor([species[i % len(species)] for i in range(num_atoms)])
    return System(z[torch.randperm(num_atoms, generator=generator)], pos)


def _grow(num_atoms: int, generator: torch.Generator) -> Tensor:
    pos = torch.zeros(1, 3, dtype=torch.float64)
    while pos.shape[0] < num_atoms:
        step = torch.randn(3, generator=generator, dtype=torch.float64)
        step = step / step.norm() * (1.0 + 0.5 * torch.rand((), generator=generator, dtype=torch.float64))
        new = pos[torch.randint(pos.shape[0], (1,), generator=generator)] + step
        if (pos - new).norm(dim=1).min() > 0.95:
            pos = torch.cat([pos, new])
    return pos


def _dense_cluster(species: Sequence[int], seed: int, num_atoms: int = 48) -> System:
    """Every atom has more than 32 others within 5 angstrom, as in a solid."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(*[torch.arange(4.0, dtype=torch.float64)] * 3)
    grid = grid[grid.sub(1.4).norm(dim=1).argsort()[:num_atoms]] * 1.35
    pos = grid + 0.12 * torch.randn(grid.shape, generator=generator, dtype=torch.float64)
    z = torch.tensor([species[i % len(species)] for i in range(num_atoms)])
    return System(z[torch.randperm(num_atoms, generator=generator)], pos)


def _species_of(subject: Any) -> tuple[int, ...]:
    """Elements that the model knows; hydrogen, carbon and oxygen when it does not say."""
    known = getattr(subject, "species", None)
    if isinstance(subject, Potential):
        known = getattr(subject.model, "species", None)
        if subject.reference is not None:
            reference = subject.reference.species
            known = reference if known is None else [n for n in known if int(n) in reference]
    return tuple(int(n) for n in known)[:4] if known is not None and len(known) else (1, 6, 8)


def prepare_systems(
    subject: Any,
    systems: Sequence[Any] | None,
    seed: int,
    dtype: torch.dtype,
    dense: bool = False,
    sizes: Sequence[int] = (5, 7, 9),
) -> list[System]:
    """The user's systems, or random ones of elements that the model knows, in ``dtype``.

    Raises:
        ValueError: ``systems`` is empty.
        TypeError: an entry is neither System, Data nor tuple.
    """
    if systems is None:
        species = _species_of(subject)
        drawn = [random_molecule(size, species, seed + i) for i, size in enumerate(sizes)]
        if dense:
            drawn.append(_dense_cluster(species, seed))
    else:
        drawn = [_as_system(item) for item in systems]
        if not drawn:
            raise ValueError("systems is empty; pass at least one geometry, or None for random ones")

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype)

    return [replace(s, pos=cast(s.pos), cell=cast(s.cell)) for s in drawn]


def _as_system(item: Any) -> System:
    if isinstance(item, System):
        return item
    if isinstance(item, Data):
        # A stored hierarchy belongs to one geometry; the helpers move atoms, so models build their own.
        cell, pbc = item.get("cell"), item.get("pbc")
        if pbc is not None and not bool(pbc.any()):
            cell = pbc = None
        state = (item.get(key) for key in _STATE)
        state = {key: torch.as_tensor(value) for key, value in zip(_STATE, state, strict=True) if value is not None}
        return System(item.z, item.pos, cell, pbc, **state)
    if isinstance(item, (tuple, list)) and len(item) in (2, 4):
        return System(*item)
    raise TypeError(f"systems must hold System, Data, (z, pos) or (z, pos, cell, pbc), got {type(item).__name__}")


def join(first: System, second: System) -> System:
    """Both as one system, in the cell of the first, with the sums of their charges and of their unpaired electrons."""
    given = {key for key in _STATE for s in (first, second) if getattr(s, key) is not None}
    (charge, unpaired), like = (sum(pair) for pair in zip(first.state, second.state, strict=True)), first.pos
    state = {"charge": like.new_tensor([charge])} if given & {"charge", "charges"} else {}
    if "charges" in given:
        state = {"charges": _states([first, second])["charges"]}
    if "spin" in given:
        state["spin"] = like.new_tensor([unpaired + 1.0])
    z, pos = torch.cat([first.z, second.z]), torch.cat([first.pos, second.pos])
    return System(z, pos, first.cell, first.pbc, bonds=_bonds([first, second]), **state)


def turn(system: System, rotation: Tensor) -> System:
    """The system after a rotation or reflection [3, 3] about the origin, its cell with it."""
    rotation = rotation.to(system.pos)
    cell = None if system.cell is None else system.cell @ rotation.T
    return replace(system, pos=system.pos @ rotation.T, cell=cell)


def open_cluster(system: System, num_atoms: int = 24) -> System:
    """The atoms around the first one of a periodic system, nearest images, as an open and neutral system.

    Molecules at its surface may be cut: it is for tests that pull atoms apart, not for physics.
    """
    cell = system.cell.reshape(3, 3)
    pbc = torch.ones(3, dtype=torch.bool) if system.pbc is None else torch.as_tensor(system.pbc).reshape(3)
    shifts = torch.cartesian_prod(*[torch.arange(-1, 2) if axis else torch.zeros(1, dtype=torch.long) for axis in pbc])
    # Enough images for a cell that is smaller than the cluster only by half.
    images = system.pos[None] + (shifts.to(cell) @ cell)[:, None]
    flat, z = images.reshape(-1, 3), system.z.repeat(len(shifts))
    nearest = (flat - system.pos[0]).norm(dim=1).argsort()[: min(num_atoms, len(flat))]
    return System(z[nearest], flat[nearest])


def require_volume(systems: Sequence[System]) -> None:
    """A planar or linear geometry hides a broken parity; some geometry must span space."""
    for system in systems:
        if system.cell is not None:
            return
        spread = torch.linalg.svdvals((system.pos - system.pos.mean(dim=0)).double())
        if system.pos.shape[0] >= 4 and spread[-1] > 1e-2 * spread[0]:
            return
    raise ValueError(
        "systems must hold a geometry of at least four atoms that do not lie in a plane, else broken "
        "symmetry stays hidden; add one, or pass systems=None for random geometries"
    )


def collate(systems: Sequence[System]) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Arguments (z, pos, batch) and keywords (cell, pbc, charges, spins, bonds where there are any) for systems."""
    sizes = torch.tensor([s.pos.shape[0] for s in systems])
    batch = torch.repeat_interleave(torch.arange(len(systems)), sizes).to(systems[0].pos.device)
    arguments = (torch.cat([s.z for s in systems]), torch.cat([s.pos for s in systems]), batch)
    keywords = _states(systems)
    if (bonds := _bonds(systems)) is not None:
        keywords["bonds"] = bonds
    periodic = [s.cell is not None for s in systems]
    if not any(periodic):
        return arguments, keywords
    if not all(periodic):
        raise ValueError("systems must be all periodic or all open; test them in two calls")
    keywords["cell"] = torch.cat([s.cell.reshape(1, 3, 3) for s in systems])
    if all(s.pbc is not None for s in systems):
        keywords["pbc"] = torch.cat([torch.as_tensor(s.pbc).reshape(1, 3) for s in systems])
    return arguments, keywords


def _bonds(systems: Sequence[System]) -> Tensor | None:
    """Bonds of a batch, where some system has its own; those of the others are found."""
    if all(s.bonds is None for s in systems):
        return None
    out, first = [], 0
    for s in systems:
        bonds = covalent_bonds(s.checked()) if s.bonds is None else s.bonds
        out.append(bonds + first)
        first += len(s.z)
    return torch.cat(out, dim=1)


def _states(systems: Sequence[System]) -> dict[str, Tensor]:
    """Charges and spins of a batch, as far as some system says something."""
    given = {key for key in _STATE for s in systems if getattr(s, key) is not None}
    like, keywords = systems[0].pos, {}
    if given & {"charge", "charges"}:
        keywords["charge"] = like.new_tensor([s.state[0] for s in systems])
    if "charges" in given:
        even = [like.new_full((len(s.z),), s.state[0] / len(s.z)) for s in systems]
        own = [e if s.charges is None else s.charges.to(like) for s, e in zip(systems, even, strict=True)]
        keywords["charges"] = torch.cat(own)
    if "spin" in given:
        keywords["spin"] = like.new_tensor([s.state[1] + 1.0 for s in systems])
    return keywords


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal random numbers in the shape, dtype and device of a tensor; drawn in float64 on the CPU."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
