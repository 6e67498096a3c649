"""NestedShells: atom-centred, overlapping neighbourhoods of growing size. No bonds, a DAG, smooth."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch_geometric.data.datapipes import functional_transform

from nbody_pyg.hierarchy.levels import EdgeSet
from nbody_pyg.hierarchy.positions import atomic_masses
from nbody_pyg.hierarchy.scheme import LevelSpec, Scheme, check_radius
from nbody_pyg.hierarchy.topology import Topology, sort_edges
from nbody_pyg.radial import check_exponent, vector_window
from nbody_pyg.system import System


@functional_transform("nbody_nested_shells")
class NestedShells(Scheme):
    r"""Each part is the neighbourhood of one atom, made of the neighbourhoods one level below.

    .. math:: \mathrm{children}(i, k) = \{(j, k - 1) : |r_j - r_i| < R_k\}, \qquad p_{ji} = f(|r_j - r_i|)

    with the window f of :func:`~nbody_pyg.radial.smooth_cutoff`, which is 1 for j = i. Windows that decay early
    (exponent 3) need fewer training frames than windows near 1 up to the radius (exponent 6).
    Level k >= 1 has as many parts as there are atoms, the last level is the root with all parts of the level
    below. With one radius per layer this is message passing: the composition scheme of flat networks is the
    special case.

    The position of a part is that of its **central atom**, not the mean of its members: otherwise the energy would jump
    when members enter or leave. The root is at the mass-weighted mean of all atoms (under periodic
    boundaries: of the atoms as given, and the vectors from it are zero). There are no pairs: neighbours are
    children.

    Source: neighbourhoods of growing radius, arXiv:1803.01588; departure: smooth membership.

    Args:
        radii: one radius per level, angstrom. A narrow first shell needs few training frames; a wide one above it adds
            the rest of the environment.
        exponent: of the windows, from 3 (decay from the start) to 12 (near 1 almost up to the radius).

    Symmetry: E(3) and permutations, exact. Continuity: C2 where an atom crosses a radius, else C-infinity.
    Cost: O(N) edges per level at fixed density. Periodic systems: mixed, any cell size.
    Raises:
        ValueError: no radius, or one that is not positive; an unknown exponent.

    Example:
        >>> NestedShells()
        NestedShells(radii=[3.5, 5.0], exponent=3)
    """

    symmetry = "E(3) and permutations of the atoms"
    centred = True
    continuity = "C2 (members enter and leave through a smooth window)"

    def __init__(self, radii: Sequence[float] = (3.5, 5.0), exponent: int = 3) -> None:
        if isinstance(radii, (int, float)) or len(radii) == 0:
            raise ValueError(f"radii must list at least one radius in angstrom, got {radii!r}; try (3.5, 5.0)")
        self.radii = tuple(check_radius(f"radii[{k}]", radius) for k, radius in enumerate(radii))
        self.exponent = check_exponent(exponent)
        shells = tuple(LevelSpec(f"shell {k + 1}", radius) for k, radius in enumerate(self.radii))
        self.levels = (LevelSpec("atoms"), *shells, LevelSpec("root", 2.0 * max(self.radii)))

    def build(self, system: System) -> Topology:
        atoms, pos = system, system.pos
        num_atoms, device = pos.shape[0], pos.device
        count = torch.bincount(atoms.batch, minlength=atoms.num_graphs)
        itself = torch.arange(num_atoms, device=device)
        found: dict[float, tuple[Tensor, Tensor | None]] = {}
        for radius in set(self.radii):
            index, shift = atoms.pairs(atoms.pos, atoms.batch, radius, parts=False)
            index = torch.cat([index, itself.expand(2, -1)], dim=1)
            shift = None if shift is None else torch.cat([shift, shift.new_zeros(num_atoms, 3)])
            found[radius] = sort_edges(index, shift, num_atoms)
        shells = [found[radius] for radius in self.radii]
        root_index = torch.stack([itself, atoms.batch])
        root_shift = None if atoms.pbc is None else pos.new_zeros(num_atoms, 3)
        return Topology(
            num_parts=(*[count] * (len(self.radii) + 1), torch.ones_like(count)),
            child_index=(None, *(index for index, _ in shells), root_index),
            child_shift=(None, *(shift for _, shift in shells), root_shift),
            periodic=atoms.periodic,
        )

    def list_radii(self) -> tuple[tuple[float | None, float | None], ...]:
        return ((None, None), *((radius, None) for radius in self.radii), (None, None))

    def widened(self, skin: float) -> NestedShells:
        wide = copy.copy(self)
        wide.radii = tuple(radius + skin for radius in self.radii)
        return wide

    @property
    def same_edges(self) -> Mapping[EdgeSet, EdgeSet]:
        """Shells of one radius have the same edges, unless a subclass has windows or positions of its own."""
        if (type(self).child_weight, type(self).positions) != (NestedShells.child_weight, NestedShells.positions):
            return {}
        first = [self.radii.index(radius) for radius in self.radii]
        return {EdgeSet("child", k + 1): EdgeSet("child", j + 1) for k, j in enumerate(first) if j < k}

    def positions(self, topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
        pos = system.pos
        mass, batch = atomic_masses(system.z, pos.dtype), topology.batch(0)
        total = pos.new_zeros(topology.num_graphs, 3).index_add(0, batch, mass.unsqueeze(-1) * pos)
        norm = pos.new_zeros(topology.num_graphs).index_add(0, batch, mass)
        root = (total / norm.unsqueeze(-1)).index_select(0, topology.batch(-1))  # a graph without atoms has none
        return [pos] * (topology.num_levels - 1) + [root]

    def child_weight(self, level: int, vec: Float[Tensor, "edges 3"]) -> Float[Tensor, " edges"]:
        if level > len(self.radii):
            return vec.new_ones(vec.shape[0])
        return vector_window(vec, self.radii[level - 1], self.exponent)
