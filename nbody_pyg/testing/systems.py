"""Geometries to test with: random ones, and the user's brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.hierarchy.bondgraph import covalent_bonds
from nbody_pyg.network import Network, network_of
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.system import System


def state_of(system: System) -> tuple[float, float]:
    """Total charge of one geometry, and its number of unpaired electrons 2S."""
    charge = 0.0 if system.total_charge is None else float(system.total_charge)
    return charge, 0.0 if system.spin is None else float(system.spin) - 1.0


def reordered(system: System, order: Tensor) -> System:
    """The same system with its atoms in another order."""
    charges, given = system.formal_charges, dict(system.given)
    if "bonds" in given:
        given["bonds"] = torch.argsort(order)[given["bonds"]]
    charges = None if charges is None else charges[order]
    return system.replace(z=system.z[order], pos=system.pos[order], formal_charges=charges, given=given)


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
    return System.from_tensors(z[torch.randperm(num_atoms, generator=generator)], pos)


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
    return System.from_tensors(z[torch.randperm(num_atoms, generator=generator)], pos)


def network_behind(subject: Any) -> Network | None:
    """What is known of a potential or a model; None of a plain function."""
    if isinstance(subject, Potential):
        return subject.network
    return network_of(subject) if isinstance(subject, nn.Module) else None


def _species_of(subject: Any) -> tuple[int, ...]:
    """Elements that the model knows; hydrogen, carbon and oxygen when it does not say."""
    network = network_behind(subject)
    known = subject.species if isinstance(subject, Potential) else network and network.species
    if known and isinstance(subject, Potential) and subject.reference is not None:
        known = tuple(n for n in known if n in subject.reference.species)
    return (known or (1, 6, 8))[:4]


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

    return [in_precision(s.detached(), dtype) for s in drawn]


def in_precision(system: System, dtype: torch.dtype) -> System:
    """The system with all its numbers in ``dtype``."""
    names = ("pos", "cell", "total_charge", "formal_charges", "spin")
    found = {name: getattr(system, name) for name in names}
    return system.replace(**{name: value.to(dtype) for name, value in found.items() if value is not None})


def _as_system(item: Any) -> System:
    if isinstance(item, System):
        return item
    if isinstance(item, Data):
        # A stored hierarchy belongs to one geometry; the helpers move atoms, so models build their own.
        return System.from_data(item)
    if isinstance(item, (tuple, list)) and len(item) in (2, 4):
        z, pos, *lattice = item
        return System.from_tensors(z, pos, None, *lattice)
    raise TypeError(f"systems must hold System, Data, (z, pos) or (z, pos, cell, pbc), got {type(item).__name__}")


def join(first: System, second: System) -> System:
    """Both as one system, in the cell of the first, with the sums of their charges and of their unpaired electrons."""
    z, pos = torch.cat([first.z, second.z]), torch.cat([first.pos, second.pos])
    charge, unpaired = (sum(pair) for pair in zip(state_of(first), state_of(second), strict=True))
    found: dict[str, Any] = {}
    states = _states([first, second])
    if "charge" in states:
        found["total_charge"] = pos.new_tensor([charge])
    if "charges" in states:
        found["formal_charges"] = states["charges"]
    if "spin" in states:
        found["spin"] = pos.new_tensor([unpaired + 1.0])
    if (bonds := _bonds([first, second])) is not None:
        found["given"] = {"bonds": bonds}
    return System(z, pos, torch.zeros_like(z), 1, first.cell, first.pbc, **found)


def turn(system: System, rotation: Tensor) -> System:
    """The system after a rotation or reflection [3, 3] about the origin, its cell with it."""
    rotation = rotation.to(system.pos)
    cell = None if system.cell is None else system.cell @ rotation.T
    return system.replace(pos=system.pos @ rotation.T, cell=cell)


def open_cluster(system: System, num_atoms: int = 24) -> System:
    """The atoms around the first one of a periodic system, nearest images, as an open and neutral system.

    Molecules at its surface may be cut: it is for tests that pull atoms apart, not for physics.
    """
    cell = required(system.cell).reshape(3, 3)
    axes = [torch.arange(-1, 2) if axis else torch.zeros(1, dtype=torch.long) for axis in required(system.pbc)[0]]
    shifts = torch.cartesian_prod(*axes)
    # Enough images for a cell that is smaller than the cluster only by half.
    images = system.pos[None] + (shifts.to(cell) @ cell)[:, None]
    flat, z = images.reshape(-1, 3), system.z.repeat(len(shifts))
    nearest = (flat - system.pos[0]).norm(dim=1).argsort()[: min(num_atoms, len(flat))]
    return System.from_tensors(z[nearest], flat[nearest])


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
    keywords["cell"] = torch.cat([required(s.cell) for s in systems])
    keywords["pbc"] = torch.cat([required(s.pbc) for s in systems])
    return arguments, keywords


def _bonds(systems: Sequence[System]) -> Tensor | None:
    """Bonds of a batch, where some system has its own; those of the others are found."""
    if not any("bonds" in s.given for s in systems):
        return None
    out, first = [], 0
    for s in systems:
        out.append((s.given["bonds"] if "bonds" in s.given else covalent_bonds(s)) + first)
        first += len(s.z)
    return torch.cat(out, dim=1)


def _states(systems: Sequence[System]) -> dict[str, Tensor]:
    """Charges and spins of a batch, if some system has them."""
    like, keywords = systems[0].pos, {}
    if any(s.total_charge is not None for s in systems):
        keywords["charge"] = like.new_tensor([state_of(s)[0] for s in systems])
    if any(s.formal_charges is not None for s in systems):
        even = [like.new_full((len(s.z),), state_of(s)[0] / len(s.z)) for s in systems]
        own = [e if s.formal_charges is None else s.formal_charges for s, e in zip(systems, even, strict=True)]
        keywords["charges"] = torch.cat([value.to(like) for value in own])
    if any(s.spin is not None for s in systems):
        keywords["spin"] = like.new_tensor([state_of(s)[1] + 1.0 for s in systems])
    return keywords


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal random numbers in the shape, dtype and device of a tensor; drawn in float64 on the CPU."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
