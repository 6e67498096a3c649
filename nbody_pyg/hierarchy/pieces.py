"""ShellsAndPieces: neighbourhoods of the atoms, and above them rigid pieces of the molecules that reach far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch_geometric.data.datapipes import functional_transform

from nbody_pyg.hierarchy.bondgraph import fragment_labels
from nbody_pyg.hierarchy.bonds import BondTree, bonds_of, child_shifts
from nbody_pyg.hierarchy.levels import EdgeSet
from nbody_pyg.hierarchy.positions import tree_positions
from nbody_pyg.hierarchy.scheme import LevelSpec, check_radius, widen_pairs
from nbody_pyg.hierarchy.shells import NestedShells
from nbody_pyg.hierarchy.topology import Topology, sort_edges
from nbody_pyg.system import System


@functional_transform("nbody_shells_and_pieces")
class ShellsAndPieces(BondTree):
    r"""The shells of :class:`NestedShells`, and above them the pieces of :class:`BondTree`.

    ===========  ==============  ==============================================================================
    level        name            parts
    ===========  ==============  ==============================================================================
    0            atoms
    1 .. K       shell 1 .. K    the neighbourhood of each atom, as in :class:`NestedShells`
    K + 1        pieces          ring systems and rigid pieces between rotatable bonds, as in :class:`BondTree`;
                                 pairs within ``piece_cutoff``
    K + 2        root            the whole system
    ===========  ==============  ==============================================================================

    The shells learn the near field with full width. A piece starts from the sum over the last shells around its atoms,
    and pieces interact in pairs. There are about five times fewer of them than atoms, so they reach far at little cost,
    above all with a narrow type: ``NBodyNet(irreps={"shell 1": wide, "shell 2": wide, "pieces": "8x0e+8x1o+8x2e"})``.

    The position of a piece is the mass-weighted mean of its atoms. Through the shells it also holds the atoms around
    it, so pieces overlap: ``Topology.parts`` lists these atoms too.

    Args:
        radii, exponent: of the shells.
        piece_cutoff: radius of pairs of pieces, angstrom.
        bonds_key: key of given bonds on the data.

    Symmetry, bonds and what keeps them: as :class:`BondTree`. Continuity: C2 while the bonds are the same.
    Cost: O(N) edges at fixed density. Raises: ValueError: as :class:`NestedShells` and :class:`BondTree`.

    Example:
        >>> ShellsAndPieces()
        ShellsAndPieces(radii=[3.5, 5.0], piece_cutoff=12.0, exponent=3, bonds_key='bonds')
    """

    def __init__(
        self,
        radii: Sequence[float] = (3.5, 5.0),
        piece_cutoff: float = 12.0,
        exponent: int = 3,
        bonds_key: str = "bonds",
    ) -> None:
        self._shells = NestedShells(radii, exponent)
        self.radii, self.exponent = self._shells.radii, self._shells.exponent
        self.piece_cutoff = check_radius("piece_cutoff", piece_cutoff)
        self.bonds_key = bonds_key
        self.levels = (
            *self._shells.levels[:-1],
            LevelSpec("pieces", 8.0, self.piece_cutoff),
            LevelSpec("root", 16.0),
        )

    @property
    def centred_levels(self) -> int:
        return 1 + len(self.radii)

    def build(self, system: System, *, bonds: Int[Tensor, "2 bonds"] | None = None) -> Topology:
        """Shells and pieces; ``bonds`` overrules the covalent radii."""
        bonds = bonds_of(system, bonds)
        piece = torch.from_numpy(fragment_labels(system.z.cpu().numpy(), bonds.cpu().numpy())[1]).to(bonds.device)
        num_pieces = int(piece.max()) + 1
        graph = system.batch.new_zeros(num_pieces).scatter(0, piece, system.batch)
        index = []
        for parent in (piece, graph):
            child = torch.stack([torch.arange(len(parent), device=parent.device), parent])
            index.append(sort_edges(child, None, len(parent))[0])
        counts = [torch.bincount(owner, minlength=system.num_graphs) for owner in (system.batch, graph)]
        parts = (*counts, torch.ones_like(counts[0]))
        return self._placed(Topology(parts, (None, *index), bonds=bonds, periodic=system.periodic), system)

    def rebuild(self, topology: Topology, system: System) -> Topology:
        """Keep the bonds and the pieces, recompute shells and pairs (and, in a cell, the images of the children)."""
        return self._placed(self._pieces(topology), system)

    def _pieces(self, topology: Topology) -> Topology:
        """The tree of atoms, pieces and root."""
        kept = (0, -2, -1)
        tree = Topology(
            num_parts=tuple(topology.num_parts[k] for k in kept),
            child_index=(None, *(topology.child_index[k] for k in kept[1:])),
            child_shift=tuple(topology.child_shift[k] for k in kept),
            bonds=topology.bonds,
            periodic=topology.periodic,
        )
        return tree.assume([topology.batch(k) for k in kept])

    def _placed(self, tree: Topology, atoms: System) -> Topology:
        shells, shifts = self._shells.build(atoms), child_shifts(tree, atoms)
        whole = Topology(
            num_parts=(*shells.num_parts[:-1], *tree.num_parts[1:]),
            child_index=(*shells.child_index[:-1], *tree.child_index[1:]),
            child_shift=(*shells.child_shift[:-1], *shifts[1:]),
            bonds=tree.bonds,
            periodic=atoms.periodic,
        )
        return self.with_pairs(whole, atoms)

    def widened(self, skin: float) -> ShellsAndPieces:
        wide = widen_pairs(self, skin)
        wide._shells = self._shells.widened(skin)
        wide.radii = wide._shells.radii
        return wide

    def list_radii(self) -> tuple[tuple[float | None, float | None], ...]:
        return (*self._shells.list_radii()[:-1], (None, self.levels[-2].pair_radius), (None, None))

    @property
    def same_edges(self) -> Mapping[EdgeSet, EdgeSet]:
        """Shells of one radius have the same edges, unless a subclass has windows or positions of its own."""
        if (type(self).child_weight, type(self).positions) != (ShellsAndPieces.child_weight, ShellsAndPieces.positions):
            return {}
        return self._shells.same_edges

    def positions(self, topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
        return [system.pos] * self.centred_levels + tree_positions(self._pieces(topology), system)[1:]

    def child_weight(self, level: int, vec: Float[Tensor, "edges 3"]) -> Float[Tensor, " edges"]:
        return self._shells.child_weight(level, vec)  # 1 above the shells
