"""ShellsAndPieces: neighbourhoods of the atoms, and rigid pieces of the molecules above them that see each other far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch_geometric.data.datapipes import functional_transform

from nbody_pyg.hierarchy.bondgraph import BOND_FACTOR, covalent_bonds, fragment_labels
from nbody_pyg.hierarchy.bonds import BondTree, _both_directions, child_shifts
from nbody_pyg.hierarchy.levels import EdgeSet
from nbody_pyg.hierarchy.positions import tree_positions
from nbody_pyg.hierarchy.scheme import LevelSpec, check_radius, widen_pairs
from nbody_pyg.hierarchy.shells import NestedShells
from nbody_pyg.hierarchy.topology import Topology, sort_edges
from nbody_pyg.radial import vector_window
from nbody_pyg.required import required
from nbody_pyg.system import System


@functional_transform("nbody_shells_and_pieces")
class ShellsAndPieces(BondTree):
    r"""The shells of :class:`NestedShells`, and above them the pieces of :class:`BondTree`.

    ===========  ==============  ==============================================================================
    level        name            parts
    ===========  ==============  ==============================================================================
    0            atoms
    1 .. K       shell 1 .. K    the neighbourhood of each atom, as in :class:`NestedShells`
    K + 1        pieces          rigid pieces between rotatable bonds; pairs within ``piece_cutoff``
    K + 2        root            the whole system
    ===========  ==============  ==============================================================================

    The shells learn the near field. A piece is a sum over the shells of its atoms; pieces are a fifth of the atoms, so
    they reach far at little cost, above all with a narrow type: ``NBodyNet(irreps={"atoms": ..., "pieces": "8x0e +
    8x1o + 8x2e"})``.

    Args:
        radii, exponent: of the shells.
        piece_cutoff: radius of pairs of pieces, angstrom.
        bonds_key: key of given bonds on the data.

    Symmetry, bonds and what keeps them: :class:`BondTree`. Cost: O(N).
    Raises: ValueError: as :class:`NestedShells` and :class:`BondTree`.
    """

    def __init__(
        self,
        radii: Sequence[float] = (3.5, 5.0),
        piece_cutoff: float = 12.0,
        exponent: int = 3,
        bonds_key: str = "bonds",
    ) -> None:
        shells = NestedShells(radii, exponent)
        self.radii, self.exponent = shells.radii, shells.exponent
        self.piece_cutoff = check_radius("piece_cutoff", piece_cutoff)
        self.bonds_key = bonds_key
        self.levels = (
            *shells.levels[:-1],
            LevelSpec("pieces", 8.0, self.piece_cutoff),
            LevelSpec("root", 16.0),
        )

    @property
    def centred_levels(self) -> int:
        return 1 + len(self.radii)

    def build(self, system: System, *, bonds: Int[Tensor, "2 bonds"] | None = None) -> Topology:
        bonds = covalent_bonds(system, BOND_FACTOR) if bonds is None else _both_directions(bonds, system)
        _, labels, _ = fragment_labels(system.z.cpu().numpy(), bonds.cpu().numpy())
        piece = torch.from_numpy(labels).to(bonds.device)
        num_atoms, num_pieces = len(piece), int(piece.max()) + 1
        graph = system.batch.new_zeros(num_pieces).scatter(0, piece, system.batch)
        itself = torch.arange(num_atoms, device=bonds.device)
        counts = [torch.bincount(owner, minlength=system.num_graphs) for owner in (system.batch, graph)]
        index = [
            sort_edges(torch.stack([torch.arange(len(parent), device=bonds.device), parent]), None, len(parent))[0]
            for parent in (piece, graph)
        ]
        assert len(itself) == num_atoms
        tree = Topology(
            num_parts=(*counts, torch.ones_like(counts[0])), child_index=(None, *index), bonds=bonds,
            periodic=system.periodic,
        )  # fmt: skip
        return self._placed(tree, system)

    def rebuild(self, topology: Topology, system: System) -> Topology:
        return self._placed(self._pieces(topology), system)

    def _pieces(self, topology: Topology) -> Topology:
        """Atoms, pieces and root."""
        kept = (0, -2, -1)
        return Topology(
            tuple(topology.num_parts[k] for k in kept), (None, *(topology.child_index[k] for k in kept[1:])), (),
            tuple(topology.child_shift[k] for k in kept), (), topology.bonds, topology.periodic,
        )  # fmt: skip

    def _placed(self, tree: Topology, atoms: System) -> Topology:
        shells, shifts = NestedShells.build(self, atoms), child_shifts(tree, atoms)  # type: ignore[arg-type]
        whole = Topology(
            (*shells.num_parts[:-1], *tree.num_parts[1:]), (*shells.child_index[:-1], *tree.child_index[1:]), (),
            (*shells.child_shift[:-1], *shifts[1:]), (), tree.bonds, atoms.periodic,
        )  # fmt: skip
        return self.with_pairs(whole, atoms)

    def widened(self, skin: float) -> ShellsAndPieces:
        wide = widen_pairs(self, skin)
        wide.radii = tuple(radius + skin for radius in self.radii)
        return wide

    def list_radii(self) -> tuple[tuple[float | None, float | None], ...]:
        return ((None, None), *((radius, None) for radius in self.radii), (None, self.levels[-2].pair_radius), (None, None))

    @property
    def same_edges(self) -> Mapping[EdgeSet, EdgeSet]:
        first = [self.radii.index(radius) for radius in self.radii]
        return {EdgeSet("child", k + 1): EdgeSet("child", j + 1) for k, j in enumerate(first) if j < k}

    def positions(self, topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
        return [system.pos] * (1 + len(self.radii)) + tree_positions(self._pieces(topology), system)[1:]

    def child_weight(self, level: int, vec: Float[Tensor, "edges 3"]) -> Float[Tensor, " edges"]:
        if level > len(self.radii):
            return vec.new_ones(vec.shape[0])
        return vector_window(vec, required(self.radii[level - 1]), self.exponent)
