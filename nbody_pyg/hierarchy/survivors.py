"""SmoothSurvivors: coarse centres that appear and vanish smoothly, for systems of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch_geometric.data.datapipes import functional_transform

from nbody_pyg.geometry import edge_vectors, safe_norm
from nbody_pyg.hierarchy.levels import EdgeSet, Hierarchy, Level
from nbody_pyg.hierarchy.positions import atomic_masses, lattice_vectors
from nbody_pyg.hierarchy.scheme import LevelSpec, Scheme, check_radius
from nbody_pyg.hierarchy.thinning import REACH, Share, membership, share_out, thin
from nbody_pyg.hierarchy.topology import Topology, sort_edges
from nbody_pyg.radial import plateau_window, vector_window
from nbody_pyg.required import required
from nbody_pyg.system import System

#: Weights of element and crowd in the priority; ``width`` says which difference decides.
_ELEMENT, _DENSITY = 100.0, 5.0
_CENTRES = ("atom", "mean")
#: Low-discrepancy sequence for the noise: neighbours in the list of atoms get distant values.
_GOLDEN = 0.6180339887498949


@functional_transform("nbody_smooth_survivors")
class SmoothSurvivors(Scheme):
    r"""Coarse centres thinned out level by level, with weights that vanish smoothly.

    Level k holds those nodes of level k - 1 that survive a thinning by ``radii[k - 1]``: nearly every two of them are
    further apart, and every other node lies within that radius of one. A survivor is centred on an atom and has an
    existence weight :math:`g_A \in [0, 1]`; nodes are divided among the survivors near them,

    .. math:: \sum_A p_{jA} = 1, \qquad H_A = \sum_j p_{jA} H_j, \qquad H_A = g_A \psi_A, \qquad
              E = \sum_k \sum_A g_A\, \epsilon_k(\psi_A)

    so pooling conserves charges and multipoles exactly, and a centre appears and vanishes smoothly: its state
    :math:`\psi_A` stays finite, while its messages, pooled values and energy have the factor :math:`g_A`. Formulas of
    the weights: :mod:`nbody_pyg.hierarchy.thinning`.

    Survivors are selected by a **priority** of each atom. It is lowest for hydrogens; among the others it is highest
    for heavy elements in dense environments,

    .. math:: \pi_i = 100\, (1 - Z_i^{-1}) + 5 \sum_j (1 - 0.7\, Z_j^{-1})\, w(r_{ij}) + \eta\, \{\varphi\, n_i\}

    with the window w of atoms that ends at ``cutoffs[0]``. Neither of two equal atoms wins: symmetry-equivalent atoms,
    as in benzene or a perfect crystal, survive all together or not at all. Such systems are then not coarsened (no
    scheme with exact symmetry can do that), which is correct but slow. ``noise`` :math:`\eta` breaks the degeneracy by
    the index :math:`n_i` of the atom in its graph; permutation symmetry and extensivity are then no longer exact.
    Derive a class and override :meth:`priority` for another order.

    ===========  ===========================================  =============================================
    level        nodes                                        pairs
    ===========  ===========================================  =============================================
    0            atoms                                        within ``cutoffs[0]``
    k = 1 .. K   survivors of ``radii[k - 1]``                within ``cutoffs[k]``
    K + 1        root                                         none
    ===========  ===========================================  =============================================

    The lists of :meth:`build` have all nodes and edges with nonzero weight at these positions, which is sufficient for
    energies, forces and second derivatives. They are searched again at other positions: indices have no gradient,
    weights do.

    Args:
        radii: one radius of thinning per level of survivors, angstrom, growing (factors of 2 are typical).
        cutoffs: radius of pairs of atoms, then of the survivors of each level, angstrom; one more than ``radii``.
            ``cutoffs[k]`` is also the list in which the next level is thinned, so it must be 1.35 ``radii[k]`` or more.
        centre: position of a part: on its "atom", or at the mass-weighted "mean" of its members.
        rounds: rounds of the thinning. More rounds give evenly spaced survivors, but a near tie affects longer chains
            of atoms.
        noise: :math:`\eta`, 0 for exact symmetry; 100 orders nearly all pairs of atoms.
        width: difference of priorities that decides completely; a larger one is smoother near ties and gives more
            parts.
        lengths: length of the radial functions between the members of a part and its centre, angstrom, for each entry
            of ``radii``. By default half the cutoff of the pairs of the parts, and at least the reach of a part (1.35
            radii, with means 1.5 times that): parts that act on each other from afar should not change much with the
            place of a member in them. Members end with their weights, not with these functions.

    Symmetry: E(3) and permutations, exact (without noise).
    Continuity: C2. The scale is that of the windows, 0.3 and 0.35 of each radius (radii below 2.5 give stiff forces),
    and where two priorities cross, one centre replaces the other within about 0.2 angstrom.
    Range: an atom acts on the weights of level k within about ``rounds`` + 2 times ``radii[k - 1]``.
    Separability: exact; parts that are further apart than that and than the cutoffs do not affect each other.
    Periodic systems: images compete and pool like other atoms, exactly as in the infinite system, for any cell. Only
    interactions beyond the last cutoff are missing, as for every scheme with cutoffs.
    Cost: O(N) for disordered systems, about 1.4 N nodes; crystals keep all equivalent atoms at every level.
    Raises:
        ValueError: radii not growing, a cutoff too short for the thinning of the next level, unknown ``centre``, not
            one length per radius.

    Source: ours; the partition of unity follows Shepard (1968), the thinning Luby (1986).

    Example:
        >>> SmoothSurvivors((3.0,), cutoffs=(5.0, 9.0))
        SmoothSurvivors(radii=[3.0], cutoffs=[5.0, 9.0], centre='atom', rounds=2, noise=0.0, width=2.0, lengths=[4.5])
    """

    symmetry = "E(3) and permutations of the atoms (permutations only without noise)"
    continuity = "C2 (parts appear, vanish and exchange members through smooth weights)"

    def __init__(
        self,
        radii: Sequence[float] = (3.0, 6.0),
        cutoffs: Sequence[float | None] = (5.0, 9.0, 18.0),
        centre: str = "atom",
        rounds: int = 2,
        noise: float = 0.0,
        width: float = 2.0,
        lengths: Sequence[float] | None = None,
    ) -> None:
        if isinstance(radii, (int, float)) or len(radii) == 0:
            raise ValueError(f"radii must list at least one radius in angstrom, got {radii!r}; try (3.0, 6.0)")
        self.radii = tuple(check_radius(f"radii[{k}]", radius) for k, radius in enumerate(radii))
        if any(low >= high for low, high in zip(self.radii, self.radii[1:], strict=False)):
            raise ValueError(f"radii must grow from level to level, got {list(self.radii)}; double each, for example")
        if isinstance(cutoffs, (int, float)) or len(cutoffs) != len(self.radii) + 1:
            raise ValueError(
                f"cutoffs must list one radius for atoms and one per entry of radii ({len(self.radii) + 1} in all), "
                f"got {cutoffs!r}"
            )
        self.cutoffs = tuple(
            check_radius(f"cutoffs[{k}]", value, optional=k == len(self.radii)) for k, value in enumerate(cutoffs)
        )
        for k, radius in enumerate(self.radii):
            if required(self.cutoffs[k]) < REACH * radius:
                raise ValueError(
                    f"cutoffs[{k}] must be at least {REACH} radii[{k}] = {REACH * radius:.4g} angstrom, because its "
                    f"pairs are thinned for the next level, got {self.cutoffs[k]}; raise it or lower radii[{k}]"
                )
        if centre not in _CENTRES:
            raise ValueError(f"centre must be one of {', '.join(_CENTRES)}, got {centre!r}; try 'atom'")
        if rounds < 1 or noise < 0:
            raise ValueError(f"rounds must be 1 or more and noise 0 or more, got {rounds!r} and {noise!r}")
        if isinstance(width, bool) or not 0 < width < float("inf"):
            raise ValueError(f"width must be a positive finite difference of priorities, got {width!r}; try 2.0")
        self.centre, self.rounds, self.noise, self.width = centre, int(rounds), float(noise), float(width)
        reach = [REACH * radius * (1.0 if centre == "atom" else 1.5) for radius in self.radii]
        usual = [
            round(max(least, 0.5 * (pairs or 0.0)), 9) for least, pairs in zip(reach, self.cutoffs[1:], strict=True)
        ]
        given = usual if lengths is None else lengths
        if isinstance(given, (int, float)) or len(given) != len(usual):
            raise ValueError(
                f"lengths must list one length in angstrom per entry of radii ({len(usual)}), got {lengths!r}; leave "
                f"it out for {usual}"
            )
        self.lengths = tuple(check_radius(f"lengths[{k}]", length) for k, length in enumerate(given))
        names = ["survivors"] if len(reach) == 1 else [f"survivors {k + 1}" for k in range(len(reach))]
        specs = map(LevelSpec, names, reach, self.cutoffs[1:])
        self.levels = (LevelSpec("atoms", None, self.cutoffs[0]), *specs, LevelSpec("root", 2.0 * reach[-1]))

    @property
    def edge_sets(self) -> dict[EdgeSet, float]:
        return super().edge_sets | {EdgeSet("child", k): length for k, length in enumerate(self.lengths, start=1)}

    # ------------------------------------------------------------------ integers
    def build(self, system: System, *, every: bool = False) -> Topology:
        """Nodes and edges with nonzero weight at these positions.

        Args:
            every: keep all candidates, also those of weight zero: every node at every level, every node within reach as
                a child. The energy is the same at a higher cost.
        """
        with torch.no_grad():
            return self._topology(system, every)

    def _without_atoms(self, num_graphs: int, like: Tensor, periodic: Tensor | None) -> Topology:
        nothing = super()._without_atoms(num_graphs, like, periodic)
        return replace(nothing, centre=(None, *[nothing.num_parts[0][:0]] * len(self.radii), None))

    def _topology(self, atoms: System, every: bool) -> Topology:
        graph, cell, counts = atoms.batch, atoms.cell, [atoms.num_atoms]
        nodes: _Nodes | None = None
        children, shifts, centres, pairs, pair_shifts = (list[Tensor | None]() for _ in range(5))
        for k, radius in enumerate(self.radii, start=1):
            where = atoms.pos if nodes is None else nodes.pos
            index, shift = atoms.pairs(where, graph, required(self.cutoffs[k - 1]), parts=k > 1)
            pairs.append(index)
            pair_shifts.append(shift)
            vec = edge_vectors(where.double(), index, shift, None if cell is None else cell.double(), graph)
            if nodes is None:
                nodes = self._atoms(atoms.z, atoms.pos.double(), graph, index, vec)
            contest = self._contest(nodes, index, vec, radius)
            kept = every | (contest.share.existence > 0)
            centre = kept.nonzero().squeeze(1)
            number = torch.cumsum(kept, 0) - 1
            near = kept[index[1]] & (safe_norm(vec) < REACH * radius)
            child = torch.cat(
                [torch.stack([index[0], number[index[1]]])[:, near], torch.stack([centre, number[centre]])], 1
            )
            if shift is not None:
                shift = torch.cat([shift[near], shift.new_zeros(len(centre), 3)])
            child, shift = sort_edges(child, shift, len(graph))
            edges = self._edges(nodes, contest, child, shift, centre, cell, graph, radius)
            if not every:
                held = edges.weight > 0
                child, shift = child[:, held], None if shift is None else shift[held]
                edges = _Edges(*(value[held] for value in edges))
            children.append(child)
            shifts.append(shift)
            centres.append(centre)
            nodes = self._parts(nodes, contest, edges, child, centre)
            graph = graph[centre]
            counts.append(torch.bincount(graph, minlength=atoms.num_graphs))
        last: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.cutoffs[-1] is not None:
            last = atoms.pairs(required(nodes).pos, graph, self.cutoffs[-1], parts=True)
        root = torch.stack([torch.arange(len(graph), device=graph.device), graph])
        return Topology(
            num_parts=(*counts, torch.ones_like(counts[0])),
            child_index=(None, *children, root),
            pair_index=(*pairs, last[0], None),
            child_shift=(None, *shifts, None if atoms.pbc is None else atoms.pos.new_zeros(len(graph), 3)),
            pair_shift=(*pair_shifts, last[1], None),
            periodic=atoms.periodic,
            centre=(None, *centres, None),
        )

    # ------------------------------------------------------------------ tensors with gradients
    def place(self, topology: Topology, system: System, dtype: torch.dtype | None = None) -> Hierarchy:
        """Positions, vectors and weights of every level, differentiable in positions and cell.

        Everything is computed in float64 and then rounded to ``dtype`` (None: that of the positions): weights are
        ratios of small numbers where a part vanishes. At the root of a periodic graph vectors are zero, as in
        :meth:`Scheme.place`.
        """
        self._check_levels(topology, system)
        z, pos, cell = system.z, system.pos, system.cell
        dtype = pos.dtype if dtype is None else dtype
        cell = None if cell is None or topology.child_shift[1] is None else cell.double()
        nodes: _Nodes | None = None
        edges: _Edges | None = None
        levels: list[Level] = []
        for k in range(topology.num_levels - 1):
            index = topology.pair_index[k]
            vec = None
            where = pos.double() if nodes is None else nodes.pos
            if index is not None:
                vec = edge_vectors(where, index, topology.pair_shift[k], cell, topology.batch(k))
            if nodes is None:
                nodes = self._atoms(z, where, topology.batch(0), required(index), required(vec))
            levels.append(self._level(topology, k, nodes, edges, vec, pos, dtype))
            if k < len(self.radii):
                contest = self._contest(nodes, required(index), required(vec), self.radii[k])
                child, shift, centre = (
                    getattr(topology, name)[k + 1] for name in ("child_index", "child_shift", "centre")
                )
                edges = self._edges(nodes, contest, child, shift, centre, cell, topology.batch(k), self.radii[k])
                nodes = self._parts(nodes, contest, edges, child, centre)
                edges = edges._replace(
                    vec=edges.vec - (nodes.pos - where.index_select(0, centre)).index_select(0, child[1])
                )
        levels.append(self._root(topology, z, pos, required(nodes), dtype))
        return Hierarchy(tuple(levels), system)

    def _level(
        self,
        topology: Topology,
        k: int,
        nodes: _Nodes,
        edges: _Edges | None,
        vec: Tensor | None,
        given: Tensor,
        dtype: torch.dtype,
    ) -> Level:
        pair_weight = None
        if vec is not None:
            pair_weight = vector_window(vec, required(self.cutoffs[k]))
            if k > 0:  # messages are weighted by the existence of the source
                pair_weight = pair_weight * nodes.existence.index_select(0, required(topology.pair_index[k])[0])
        child = () if edges is None else (edges.vec, edges.weight, edges.pooled)
        child_vec, weight, pooled = (value.to(dtype) for value in child) if child else (None, None, None)
        return Level(
            pos=given if k == 0 else nodes.pos.to(given.dtype),
            weight=nodes.existence.to(dtype),
            batch=topology.batch(k),
            child_index=topology.child_index[k],
            child_vec=child_vec,
            child_weight=weight,
            pair_index=topology.pair_index[k],
            pair_vec=None if vec is None else vec.to(dtype),
            pair_weight=None if pair_weight is None else pair_weight.to(dtype),
            pool_weight=pooled,
        )

    def _root(self, topology: Topology, z: Tensor, pos: Tensor, nodes: _Nodes, dtype: torch.dtype) -> Level:
        """The mass-weighted mean of the atoms; every survivor of the last level is a child."""
        mass, batch, k = atomic_masses(z, torch.float64), topology.batch(0), topology.num_levels - 1
        total = pos.new_zeros(topology.num_graphs, 3, dtype=torch.float64)
        total = total.index_add(0, batch, mass.unsqueeze(-1) * pos.double())
        here = total / total.new_zeros(topology.num_graphs).index_add(0, batch, mass).unsqueeze(-1)
        child, graph = required(topology.child_index[k]), topology.batch(k)
        here = here.index_select(0, graph)  # a graph without atoms has no root
        vec = nodes.pos.index_select(0, child[0]) - here.index_select(0, child[1])
        if topology.periodic is not None:
            vec = vec * (~topology.periodic.index_select(0, graph.index_select(0, child[1]))).unsqueeze(-1).to(
                vec.dtype
            )
        weight = vec.new_ones(child.shape[1])
        pooled = nodes.existence.index_select(0, child[0])
        one, vec, weight, pooled = (value.to(dtype) for value in (here.new_ones(here.shape[0]), vec, weight, pooled))
        return Level(here.to(pos.dtype), one, graph, child, vec, weight, pool_weight=pooled)

    # ------------------------------------------------------------------ steps shared by both
    def priority(
        self,
        z: Integer[Tensor, " atoms"],
        batch: Int[Tensor, " atoms"],
        index: Int[Tensor, "2 pairs"],
        vec: Float[Tensor, "pairs 3"],
    ) -> Float[Tensor, " atoms"]:
        """Priority of each atom, in float64, invariant and C2 in ``vec``; a difference of ``width`` decides.

        Args:
            index, vec: pairs of atoms within ``cutoffs[0]``.
        """
        inverse = 1.0 / z.clamp(min=1).to(vec.dtype)
        window = plateau_window(safe_norm(vec), 0.0, required(self.cutoffs[0]))
        crowd = torch.zeros_like(inverse).index_add(0, index[1], (1.0 - 0.7 * inverse)[index[0]] * window)
        value = _ELEMENT * (1.0 - inverse) + _DENSITY * crowd
        if self.noise == 0:
            return value
        first = torch.searchsorted(batch, torch.arange(int(batch[-1]) + 1, device=batch.device))
        number = torch.arange(len(batch), device=batch.device) - first[batch]
        return value + self.noise * torch.frac(_GOLDEN * (number + 1).to(vec.dtype))

    def _atoms(self, z: Tensor, pos: Tensor, batch: Tensor, index: Tensor, vec: Tensor) -> _Nodes:
        return _Nodes(pos, pos.new_ones(len(z)), self.priority(z, batch, index, vec), atomic_masses(z, pos.dtype))

    def _contest(self, nodes: _Nodes, index: Tensor, vec: Tensor, radius: float) -> _Contest:
        r = safe_norm(vec)
        survival = thin(nodes.priority, nodes.existence, index, r, radius, self.rounds, self.width)
        return _Contest(survival, share_out(survival, nodes.existence, index, r, radius))

    def _edges(
        self,
        nodes: _Nodes,
        contest: _Contest,
        child: Tensor,
        shift: Tensor | None,
        centre: Tensor,
        cell: Tensor | None,
        graph: Tensor,
        radius: float,
    ) -> _Edges:
        """Weights of child edges, and the vectors from the centres of the parents."""
        heart = centre.index_select(0, child[1])
        vec = nodes.pos.index_select(0, child[0]) - nodes.pos.index_select(0, heart)
        itself = child[0] == heart
        if shift is not None and cell is not None:
            vec = vec + lattice_vectors(shift, cell.to(vec.dtype), graph.index_select(0, heart))
            itself = itself & (shift == 0).all(dim=1)
        weights = membership(
            contest.share, contest.survival, nodes.existence, child[0], heart, safe_norm(vec), itself, radius
        )
        return _Edges(vec, *weights)

    def _parts(self, nodes: _Nodes, contest: _Contest, edges: _Edges, child: Tensor, centre: Tensor) -> _Nodes:
        """The nodes of the next level."""
        pos = nodes.pos.index_select(0, centre)
        existence = contest.share.existence.index_select(0, centre)
        share = edges.pooled * nodes.mass.index_select(0, child[0])
        mass = torch.zeros_like(existence).index_add(0, child[1], share)
        if self.centre == "mean":
            # A part of weight zero has no mean; any position is valid.
            whole = torch.where(mass > 0, mass, torch.ones_like(mass)).unsqueeze(-1)
            pos = pos + torch.zeros_like(pos).index_add(0, child[1], share.unsqueeze(-1) * edges.vec) / whole
        return _Nodes(pos, existence, nodes.priority.index_select(0, centre), mass)


@dataclass(frozen=True)
class _Nodes:
    """The nodes of one level: positions, existence, priority and mass, in float64."""

    pos: Tensor
    existence: Tensor
    priority: Tensor
    mass: Tensor


@dataclass(frozen=True)
class _Contest:
    """Survivors of the nodes of a level, and the division of the others among them."""

    survival: Tensor
    share: Share


class _Edges(NamedTuple):
    """Child edges of a level: vectors, memberships p and pooling weights."""

    vec: Tensor
    weight: Tensor
    pooled: Tensor
