"""BondTree: atoms, groups, pieces, molecules, root; a tree from the bond graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform

from nbody_pyg.hierarchy.bondgraph import BOND_FACTOR, check_lengths, covalent_bonds, fragment_labels, unwrap
from nbody_pyg.hierarchy.mark import found_bonds
from nbody_pyg.hierarchy.scheme import LevelSpec, Scheme, check_radius, widen_pairs
from nbody_pyg.hierarchy.topology import Topology, sort_edges
from nbody_pyg.required import required
from nbody_pyg.system import System


@functional_transform("nbody_bond_tree")
class BondTree(Scheme):
    r"""A tree of chemical groups: every part is a set of bonded atoms.

    =====  =============  ====================================================================================
    level  name           parts
    =====  =============  ====================================================================================
    0      atoms          pairs within ``cutoff``
    1      groups         a heavy atom with its hydrogens; pairs within ``group_cutoff``
    2      pieces         ring systems and rigid pieces: what remains when rotatable bonds are cut;
                          pairs within ``piece_cutoff``
    3      molecules      connected components; no pairs (their pieces have pairs)
    4      root           the whole system, at its mass-weighted mean
    =====  =============  ====================================================================================

    A bond between groups is *rotatable* if it lies in no ring and each of its groups has another bond; bond
    orders are not used. Every rule uses only the bond graph and treats equal atoms equally, so the tree of a relabelled
    molecule is the relabelled tree, also for symmetric molecules.

    Bonds: those given on the data under the key ``bonds_key`` ([2, M], any direction), otherwise pairs nearer
    than 1.3 times the sum of their covalent radii (Cordero et al. 2008). A hydrogen bonded to several heavy
    atoms keeps the relatively shortest bond; if two are equal (a bridge as in diborane) it keeps both and is a separate
    group. Ionic contacts within that distance count as bonds. If positions change after the transform, given bonds and
    those of a shared tree are kept; other bonds are searched again.

    The tree is part of the definition of the energy: with another tree the same network gives another energy. A bond
    that stretches past 1.3 radii in a hot frame would change it, so **give all frames of one trajectory
    the tree of one reference frame**: :func:`~nbody_pyg.hierarchy.share_topology`. :meth:`update` keeps the children
    and recomputes the pairs; molecular dynamics uses it.

    In a periodic system parts are unwrapped along their bonds, each between nearest images. The result does not depend
    on the given images or the choice of lattice vectors, and a molecule may be longer than the cell. Bonds with two
    images of about equal length are rejected, and so are infinite networks (diamond, polymers through the cell).

    Args:
        cutoff: radius of pairs of atoms, angstrom.
        group_cutoff: radius of pairs of groups, angstrom; None for no pairs.
        piece_cutoff: radius of pairs of pieces, angstrom; None for no pairs.
        bonds_key: key of given bonds on the data.

    Symmetry: E(3), permutations (automorphisms of the bond graph included).
    Continuity: C-infinity along child edges and C2 along pairs while the bonds are the same; a tree
    recomputed in every frame jumps when a bond forms or breaks.
    Cost: O(N) besides the neighbour lists. Distant molecules do not change each other's parts below the root.
    Raises:
        ValueError: cutoff not positive, bonds out of range, an endless periodic network.
    """

    reads_elements = True
    symmetry = "E(3), permutations, automorphisms of the bond graph"
    continuity = "C2 while the bonds are the same; share_topology keeps them the same along a trajectory"

    def __init__(
        self,
        cutoff: float = 5.0,
        group_cutoff: float | None = 6.0,
        piece_cutoff: float | None = 10.0,
        bonds_key: str = "bonds",
    ) -> None:
        self.cutoff = check_radius("cutoff", cutoff)
        self.group_cutoff = check_radius("group_cutoff", group_cutoff, optional=True)
        self.piece_cutoff = check_radius("piece_cutoff", piece_cutoff, optional=True)
        self.bonds_key = bonds_key
        self.levels = (
            LevelSpec("atoms", None, self.cutoff),
            LevelSpec("groups", 2.0, self.group_cutoff),
            LevelSpec("pieces", 4.0, self.piece_cutoff),
            LevelSpec("molecules", 8.0),
            LevelSpec("root", 16.0),
        )

    def inputs(self, data: Data) -> dict[str, Any]:
        bonds = data.get(self.bonds_key)
        if bonds is not None and self.bonds_key == "bonds":
            # Bonds that a scheme found and stored belong to earlier positions
            found = found_bonds(data)
            if bool(found.all()):
                return {}
            if bool(found.any()):
                raise ValueError("bonds of a batch must be all given or all found; apply the scheme before batching")
        return {} if bonds is None else {"bonds": bonds}

    def build(self, system: System, *, bonds: Int[Tensor, "2 bonds"] | None = None) -> Topology:
        """The tree; ``bonds`` overrules the covalent radii (both directions are made from either)."""
        z, atoms = system.z, system
        bonds = bonds_of(atoms, bonds)
        labels = fragment_labels(z.cpu().numpy(), bonds.cpu().numpy())
        children: list[Tensor] = []
        below = np.arange(len(labels[0]))
        graph = atoms.batch.cpu().numpy()
        counts, owner = [np.bincount(graph, minlength=atoms.num_graphs)], graph
        for label in (*labels, graph):
            # `label` is the part of each atom; the level below gives the part of each child.
            first = np.unique(below, return_index=True)[1]
            parent = label[first]
            children.append(torch.from_numpy(np.stack([np.arange(len(parent)), parent])))
            owner = graph[np.unique(label, return_index=True)[1]]
            counts.append(np.bincount(owner, minlength=atoms.num_graphs))
            below = label
        tree = Topology(
            num_parts=tuple(torch.from_numpy(count).to(z.device) for count in counts),
            child_index=(None, *(sort_edges(c.to(z.device), None, c.shape[1])[0] for c in children)),
            bonds=bonds,
            periodic=atoms.periodic,
        )
        return self._placed(tree, atoms)

    def rebuild(self, topology: Topology, system: System) -> Topology:
        """Keep the bonds and the children, recompute pairs (and, in a cell, the images of the children)."""
        return self._placed(topology, system)

    def _without_atoms(self, num_graphs: int, like: Tensor, periodic: Tensor | None) -> Topology:
        nothing = super()._without_atoms(num_graphs, like, periodic)
        return replace(nothing, bonds=nothing.child_index[1])

    def holds(self, topology: Topology, system: System) -> bool:
        """Whether the bonds found at these positions equal those of the topology; given ones do not change."""
        return "bonds" in system.given or torch.equal(covalent_bonds(system), required(topology.bonds))

    def bond_changes(self, topology: Topology, system: System) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Bonds of a topology that the covalent radii do not give at these positions, and bonds that they give in
        addition.

        Each bond once, as the numbers of its atoms.
        """
        found = covalent_bonds(system)
        kept, now = ({(i, j) for i, j in bonds.t().tolist() if i < j} for bonds in (required(topology.bonds), found))
        return sorted(kept - now), sorted(now - kept)

    def check_kept(self, topology: Topology, system: System) -> None:
        if topology.bonds is None:
            raise ValueError(
                "data whose atoms have moved must hold 'bonds', along which their given or shared parts are kept, but "
                "have none; do not exclude that key"
            )
        check_lengths(system, topology.bonds)

    def widened(self, skin: float) -> BondTree:
        return widen_pairs(self, skin)

    def _placed(self, tree: Topology, atoms: System) -> Topology:
        """The same tree at the positions of ``atoms``: lattice images of the children, then pairs."""
        shifts = child_shifts(tree, atoms)
        tree = Topology(tree.num_parts, tree.child_index, (), shifts, (), tree.bonds, atoms.periodic)
        return self.with_pairs(tree, atoms)


def child_shifts(tree: Topology, atoms: System) -> tuple[Tensor | None, ...]:
    """Images that unwrap each part of a tree along its bonds; all None for open systems.

    A part is placed at the image of its first atom. Atoms have their image relative to it; parts above have the
    difference between the images of their own and their parent's first atom.
    """
    if atoms.pbc is None:
        return (None,) * tree.num_levels
    image = unwrap(atoms, required(tree.bonds))
    shifts: list[Tensor | None] = [None]
    below = image
    for k in range(1, tree.num_levels):
        child, parent = required(tree.child_index[k])
        if k == tree.num_levels - 1:
            shifts.append(torch.zeros_like(below)[child])  # the root does not move the molecules
            break
        # Children are sorted within each parent, so the first edge of a parent is its first child.
        first = torch.searchsorted(parent, torch.arange(tree.size(k), device=parent.device))
        reference = below[child[first]]
        shifts.append(below[child] - reference[parent])
        below = reference
    return tuple(shifts)


def bonds_of(system: System, given: Int[Tensor, "2 bonds"] | None) -> Int[Tensor, "2 directed"]:
    """The given bonds, or those within 1.3 times the sums of covalent radii, in both directions."""
    return covalent_bonds(system, BOND_FACTOR) if given is None else _both_directions(given, system)


def _both_directions(bonds: Tensor, atoms: System) -> Tensor:
    """Given bonds, checked, without duplicates, in both directions and sorted."""
    num_atoms = atoms.z.shape[0]
    if not isinstance(bonds, Tensor) or bonds.dim() != 2 or bonds.shape[0] != 2 or bonds.is_floating_point():
        found = f"{bonds.dtype} {list(bonds.shape)}" if isinstance(bonds, Tensor) else repr(bonds)
        raise ValueError(
            f"bonds must be integers of shape [2, num_bonds], got {found}; where the key means something else, name "
            "another one: BondTree(bonds_key=...)"
        )
    if bonds.numel() == 0:
        return bonds.new_zeros(2, 0, dtype=torch.long)
    if int(bonds.min()) < 0 or int(bonds.max()) >= num_atoms:
        raise ValueError(
            f"bonds must join atoms 0 to {num_atoms - 1}, but hold {int(bonds.min())} to {int(bonds.max())}; "
            "check that they start at 0 and belong to this molecule"
        )
    crossing = (atoms.batch[bonds[0]] != atoms.batch[bonds[1]]).nonzero().flatten().tolist()
    if crossing:
        raise ValueError(f"bonds must stay within a graph, but atoms {bonds[:, crossing[0]].tolist()} do not")
    itself = bonds[0] == bonds[1]
    if atoms.pbc is not None and bool((itself & atoms.pbc.any(dim=1)[atoms.batch[bonds[0]]]).any()):
        atom = int(bonds[0, itself][0])
        raise ValueError(f"bonds must join two atoms, but atom {atom} is bonded to an image of itself: a chain without "
                         "end; use NestedShells for crystals and polymers")  # fmt: skip
    bonds = bonds.long()[:, ~itself]
    both = torch.cat([bonds, bonds.flip(0)], dim=1)
    key = torch.unique(both[1] * num_atoms + both[0])
    return torch.stack([key % num_atoms, torch.div(key, num_atoms, rounding_mode="floor")])
