"""FromAssignment: parts given by the user: residues, fragments, clusters, a PyG SelectOutput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform

from nbody_pyg.geometry import neighbour_list
from nbody_pyg.hierarchy.bondgraph import components, follow_images
from nbody_pyg.hierarchy.positions import lattice_vectors, member_positions
from nbody_pyg.hierarchy.scheme import LevelSpec, Scheme, check_radius, widen_pairs
from nbody_pyg.hierarchy.topology import Topology, sort_edges
from nbody_pyg.required import required
from nbody_pyg.system import System

#: First length (angstrom) at which atoms of a part are linked in a cell, and the factor to the next length.
_FIRST_LINK, _LADDER = 1.0, 1.25


@functional_transform("nbody_from_assignment")
class FromAssignment(Scheme):
    r"""A hierarchy from labels: atoms with the same label form a part.

    Labels come from one of three places: from each data under ``labels_key``, of shape [N] for one level of
    parts or [N, L] for L nested levels, finest first; fixed ``labels`` of one molecule, used for every graph
    with that number of atoms; or fixed ``parts``, lists of atoms that may overlap. Labels are numbers without
    meaning: 0 or larger, gaps allowed, equal labels in different graphs are different parts.
    :meth:`from_select` takes what PyG's pooling operators return.

    **Smooth only while the labels are frozen.** Compute them once for each molecule and keep them for all of
    its frames. Labels recomputed from positions in each frame (k-means, METIS, nearest centre) make the
    energy jump when an atom changes its label, by tens of meV, and most such algorithms also break ties by
    the order of atoms.

    In a periodic system the images of the members are chosen so that the part is connected: its atoms are linked at
    increasing lengths until they are. A part that is then also linked to its own images around the cell is rejected.
    The result does not depend on the given images or the choice of lattice vectors.

    Args:
        labels_key: key of the labels on the data, read when neither ``labels`` nor ``parts`` is given.
        labels: [N] or [N, L] integers of one molecule.
        parts: one list of atoms for each part of one molecule; every atom in at least one.
        cutoff: radius of pairs of atoms, angstrom; None for no pairs.
        part_cutoffs: radius of pairs of parts at each level of labels, angstrom; None for no pairs. Its
            length is the number of levels between atoms and root.

    Symmetry: that of the labels. Continuity: C2 while the labels are frozen.
    Raises:
        ValueError: labels missing, negative, of the wrong length, or not nested; an atom in no part; a part that is not
        connected in one place of the cell.

    Example:
        >>> scheme = FromAssignment(labels=[0, 0, 1, 1])
        >>> scheme.topology(torch.tensor([6, 1, 6, 1]), torch.eye(4, 3))
        Topology(4 -> 2 -> 1, graphs=1)
    """

    symmetry = "E(3); permutations as far as the labels follow them"
    continuity = "C2 while the labels are frozen; jumps when they change"

    def __init__(
        self,
        labels_key: str = "labels",
        labels: Sequence[int] | Sequence[Sequence[int]] | None = None,
        parts: Sequence[Sequence[int]] | None = None,
        cutoff: float | None = 5.0,
        part_cutoffs: Sequence[float | None] = (10.0,),
    ) -> None:
        if labels is not None and parts is not None:
            raise ValueError("labels and parts must not both be given; parts alone may overlap")
        if isinstance(part_cutoffs, (int, float)) or len(part_cutoffs) == 0:
            raise ValueError(f"part_cutoffs must list one radius per level of parts, got {part_cutoffs!r}")
        if parts is not None and len(part_cutoffs) != 1:
            raise ValueError(f"parts make one level, so part_cutoffs must have length 1, got {part_cutoffs!r}")
        self.labels_key = labels_key
        self.labels = None if labels is None else _as_tuples(labels)
        self.parts = None if parts is None else _as_tuples(parts)
        self.cutoff = check_radius("cutoff", cutoff, optional=True)
        self.part_cutoffs = tuple(
            check_radius(f"part_cutoffs[{k}]", radius, optional=True) for k, radius in enumerate(part_cutoffs)
        )
        # Typical size of a part; it grows with each level, like the cutoffs of its pairs.
        extents = [4.0 * 2.0**k if r is None else 0.5 * r for k, r in enumerate(self.part_cutoffs)]
        names = ["parts"] if len(extents) == 1 else [f"parts {k + 1}" for k in range(len(extents))]
        specs = map(LevelSpec, names, extents, self.part_cutoffs)
        root = LevelSpec("root", 2.0 * extents[-1])
        self.levels = (LevelSpec("atoms", None, self.cutoff), *specs, root)

    @classmethod
    def from_select(cls, select: Any, cutoff: float | None = 5.0, part_cutoff: float | None = 10.0) -> FromAssignment:
        """The clusters of a PyG `SelectOutput` of one molecule as parts; they may overlap.

        Args:
            select: node and cluster indices; every node in at least one cluster.
            cutoff: radius of pairs of atoms, angstrom.
            part_cutoff: radius of pairs of parts, angstrom.

        Raises:
            ValueError: nodes were dropped, or memberships have weights other than 1 (positions and windows
                would need a scheme of their own).
        """
        weight = select.weight
        if weight is not None and not bool(torch.all(weight == 1)):
            raise ValueError(
                "select must have no weight: FromAssignment knows full membership only; drop the weight, or "
                "derive a Scheme that overrides child_weight"
            )
        parts: list[list[int]] = [[] for _ in range(select.num_clusters)]
        for node, cluster in zip(select.node_index.tolist(), select.cluster_index.tolist(), strict=True):
            parts[cluster].append(node)
        dropped = sorted(set(range(select.num_nodes)) - {node for part in parts for node in part})
        if dropped:
            raise ValueError(
                f"select must keep every node, but dropped atom {dropped[0]} ({len(dropped)} in all); "
                "parts must cover the molecule"
            )
        return cls(parts=[part for part in parts if part], cutoff=cutoff, part_cutoffs=(part_cutoff,))

    @property
    def atom_key(self) -> str | None:
        return self.labels_key if self.labels is None and self.parts is None else None

    def inputs(self, data: Data) -> dict[str, Tensor]:
        if self.atom_key is None:
            return {}
        if data.get(self.labels_key) is None:
            raise ValueError(
                f"data must have labels under {self.labels_key!r}, but has only {sorted(data.to_dict())}; "
                "store them there, or pass labels= or labels_key="
            )
        return {"labels": data[self.labels_key]}

    def build(self, system: System, *, labels: Tensor | None = None) -> Topology:
        """The hierarchy of the labels; ``labels`` is needed unless they were given at construction."""
        atoms = system
        if self.parts is not None:
            counts, children = self._from_parts(atoms, self.parts)
        else:
            counts, children = self._from_labels(atoms, self._labels(atoms, labels))
        tree = Topology((atoms.num_atoms, *counts), (None, *children), periodic=atoms.periodic)
        return self._placed(tree.validate(), atoms)

    def rebuild(self, topology: Topology, system: System) -> Topology:
        """Keep the parts, recompute pairs (and, in a cell, the images of the children)."""
        return self._placed(topology, system)

    def positions(self, topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
        return super().positions(topology, system) if self.parts is None else member_positions(topology, system)

    def widened(self, skin: float) -> FromAssignment:
        return widen_pairs(self, skin)

    def _labels(self, atoms: System, labels: Tensor | None) -> Tensor:
        """Labels [N, L] of all atoms, checked."""
        device, num_atoms = atoms.z.device, atoms.z.shape[0]
        if self.labels is not None:
            labels = self._tile(torch.tensor(self.labels, device=device), atoms)
        if labels is None:
            raise ValueError(
                "labels must be given: this scheme reads them from the data. Apply it as a transform and "
                "read the topology from the data, or construct it with labels= or parts="
            )
        labels = labels.reshape(labels.shape[0], -1)
        depth = len(self.part_cutoffs)
        if labels.is_floating_point() or tuple(labels.shape) != (num_atoms, depth):
            raise ValueError(
                f"labels must be integers of shape [{num_atoms}, {depth}] (atoms, one column per entry of "
                f"part_cutoffs), got {labels.dtype} {list(labels.shape)}"
            )
        if bool((labels < 0).any()):
            atom = int((labels < 0).any(dim=1).nonzero()[0])
            raise ValueError(f"labels must not be negative, but atom {atom} has {labels[atom].tolist()}")
        return labels.long()

    def _tile(self, labels: Tensor, atoms: System) -> Tensor:
        """Fixed labels of one molecule, repeated for every graph."""
        wrong = (atoms.num_atoms != labels.shape[0]).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"labels are for {labels.shape[0]} atoms, but graph {wrong[0]} has "
                f"{int(atoms.num_atoms[wrong[0]])}; store labels on the data for sets of different molecules"
            )
        return labels.repeat(atoms.num_graphs, *[1] * (labels.dim() - 1))

    def _from_labels(self, atoms: System, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        counts, children = [], []
        below = torch.arange(atoms.z.shape[0], device=atoms.z.device)
        for label in (*labels.unbind(1), torch.zeros_like(below)):
            keys, part = torch.unique(torch.stack([atoms.batch, label]), dim=1, return_inverse=True)
            counts.append(torch.bincount(keys[0], minlength=atoms.num_graphs))
            index = torch.unique(torch.stack([part, below]), dim=1).flip(0)
            split = (torch.bincount(index[0]) > 1).nonzero().flatten().tolist()
            if split:
                atom = int((below == split[0]).nonzero()[0])
                raise ValueError(
                    f"labels must be nested, finest first, but the part of atom {atom} in column "
                    f"{len(counts) - 2} is split over several labels in column {len(counts) - 1}"
                )
            children.append(index)
            below = part
        return counts, children

    def _from_parts(self, atoms: System, parts: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
        device = atoms.z.device
        members = [(atom, number) for number, part in enumerate(parts) for atom in sorted(set(part))]
        index = torch.tensor(members, device=device).t()
        num_atoms, num_parts = int(index[0].max()) + 1, len(parts)
        self._tile(torch.zeros(num_atoms, device=device), atoms)
        graphs = torch.arange(atoms.num_graphs, device=device).reshape(-1, 1)
        index = torch.stack([(index[0] + graphs * num_atoms).flatten(), (index[1] + graphs * num_parts).flatten()])
        everything = torch.arange(num_parts * atoms.num_graphs, device=device)
        root = torch.stack([everything, torch.div(everything, num_parts, rounding_mode="floor")])
        ones = torch.ones_like(atoms.num_atoms)
        return [ones * num_parts, ones], [sort_edges(index, None, atoms.z.shape[0])[0], root]

    def _placed(self, tree: Topology, atoms: System) -> Topology:
        """The same parts at the positions of ``atoms``: images of the members, then pairs."""
        if atoms.pbc is not None:
            tree = Topology(tree.num_parts, tree.child_index, (), _linked_images(tree, atoms), (), None, atoms.periodic)
        return self.with_pairs(tree, atoms)


def _as_tuples(values: Sequence[Any] | Tensor) -> tuple[Any, ...]:
    values = values.tolist() if isinstance(values, Tensor) else values
    return tuple(tuple(map(int, v)) if isinstance(v, (Sequence, Tensor)) else int(v) for v in values)


def _linked_images(tree: Topology, atoms: System) -> tuple[Tensor | None, ...]:
    """For each child the image in which its parent is connected.

    The atoms of a part are linked up to the first of a series of lengths at which it is connected. If these links also
    lead around the cell, the images are ambiguous, and the part is rejected. Only distances are used, so the given
    images, the choice of lattice vectors and the order of atoms do not matter.
    """
    shifts: list[Tensor | None] = [None]
    pos, cell, label = atoms.pos.double(), required(atoms.cell).double(), atoms.batch
    for k in range(1, tree.num_levels - 1):
        child, parent = required(tree.child_index[k])
        edge = torch.arange(len(child), device=child.device)
        if k == 1:
            atom = child
        else:  # labels are nested: a child has one parent, an atom one part
            atom, edge = torch.arange(len(pos), device=child.device), torch.empty_like(edge).scatter_(0, child, edge)
            edge = edge[label]
        image = _link(pos[atom], atom, edge, parent, tree.batch(k), atoms, k)
        shifts.append(image.to(atoms.pos.dtype))
        if k < tree.num_levels - 2:
            pos = pos.index_add(0, atom, lattice_vectors(image[edge], cell, atoms.batch[atom]))
            label = torch.empty_like(label).scatter_(0, atom, parent[edge])
    last = required(tree.child_index[-1])
    return (*shifts, atoms.pos.new_zeros(last.shape[1], 3))


def _link(pos: Tensor, atom: Tensor, edge: Tensor, parent: Tensor, graph: Tensor, atoms: System, level: int) -> Tensor:
    """Image of each child (edge), given the atoms of the children and where they are."""
    image, cell, pbc = pos.new_zeros(len(parent), 3), required(atoms.cell), required(atoms.pbc)
    size = torch.bincount(parent, minlength=len(graph))
    waiting = (size > 1) & pbc[graph].any(dim=1)
    length = _FIRST_LINK
    while bool(waiting.any()):
        number = torch.cumsum(waiting, 0) - 1
        rows = waiting[parent[edge]].nonzero().flatten()
        rows = rows[torch.argsort(parent[edge[rows]], stable=True)]
        own = graph[waiting]
        index, step = neighbour_list(
            pos[rows], length, number[parent[edge[rows]]], cell[own], pbc[own], allow_coincident=True
        )
        source, target = edge[rows[index]]
        kept = (source != target) | (step != 0).any(dim=1)
        source, target, step = source[kept], target[kept], step[kept]
        component = torch.from_numpy(components(len(parent), source.cpu().numpy(), target.cpu().numpy()))
        lowest, highest = (
            torch.zeros_like(graph).scatter_reduce(0, parent, component.to(graph.device), way, include_self=False)
            for way in ("amin", "amax")
        )
        done = waiting & (lowest == highest)
        linked = done[parent[target]]
        source, target, step = source[linked], target[linked], step[linked]
        found, broken = follow_images(len(parent), source, target, step)
        if len(broken):
            part = int(parent[target[broken[0]]])
            members = sorted(set(atom[parent[edge] == part].tolist()))
            raise ValueError(
                f"part {part} of level {level} (atoms {_some(members)}) must hold together in one place of the "
                f"periodic cell, but links of up to {length:.1f} angstrom among its atoms also lead around the cell; "
                "take smaller parts or a larger cell, or use NestedShells"
            )
        image = torch.where(done[parent].unsqueeze(1), found, image)
        waiting = waiting & ~done
        length *= _LADDER
    return image


def _some(atoms: list[int]) -> str:
    return ", ".join(map(str, atoms[:6])) + (", ..." if len(atoms) > 6 else "")
