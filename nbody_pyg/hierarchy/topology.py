"""Topology: parts and their children, level by level, as indices only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import implied_pbc, is_topology_key
from nbody_pyg.hierarchy.dag import levels_of_dag
from nbody_pyg.hierarchy.validation import validate_parts
from nbody_pyg.kernels.autograd_flags import has_values, is_transformed
from nbody_pyg.required import required


@dataclass(frozen=True, eq=False)
class Topology:
    r"""The composition scheme of one graph or of a batch: a DAG of parts in levels.

    Level 0 holds the atoms, the last level one root per graph. Child edges join neighbouring levels, so a
    node's set of atoms is

    .. math:: P_i = \bigcup_{c \in \mathrm{children}(i)} P_c, \qquad P_\mathrm{atom} = \{\mathrm{atom}\}.

    ===============  ===================  ===========================================================
    field            shape at level k     meaning
    ===============  ===================  ===========================================================
    ``num_parts``    [B] long             parts of each graph (level 0: atoms)
    ``child_index``  [2, E] long or None  child at level k - 1, parent at level k; None at level 0
    ``pair_index``   [2, P] long or None  ordered neighbours at this level (source, target)
    ``child_shift``  [E, 3] or None       lattice shifts: r_child - r_parent + shift @ cell
    ``pair_shift``   [P, 3] or None       the same for pairs
    ===============  ===================  ===========================================================

    These are tuples with one entry per level. If parts are centred on one of their children, it is stored in
    ``centre``: [n_k] long or None, a node of level k - 1 for each part of level k. Two fields belong to the whole
    topology:
    ``bonds``, [2, M] or None, the covalent bonds in both directions where the scheme uses them; ``periodic``, [B] bool
    or None, the graphs with a periodic direction (None when there are none).

    Edges are sorted by parent (target), then child (source). Parts may overlap, and a node may have several
    parents. Nothing is checked at construction, see :meth:`validate`.

    Source: composition schemes of arXiv:1803.01588 and covariant compositional networks.
    """

    num_parts: tuple[Int[Tensor, " graphs"], ...]
    child_index: tuple[Int[Tensor, "2 _"] | None, ...]
    pair_index: tuple[Int[Tensor, "2 _"] | None, ...] = ()
    child_shift: tuple[Float[Tensor, "_ 3"] | None, ...] = ()
    pair_shift: tuple[Float[Tensor, "_ 3"] | None, ...] = ()
    bonds: Int[Tensor, "2 _"] | None = None
    periodic: Bool[Tensor, " graphs"] | None = None
    centre: tuple[Int[Tensor, " _"] | None, ...] = ()
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("child_index", "pair_index", "child_shift", "pair_shift", "centre"):
            value = tuple(getattr(self, name))
            if name != "child_index" and not value:
                value = (None,) * len(self.num_parts)
            if len(value) != len(self.num_parts):
                raise ValueError(
                    f"{name} must have one entry per level ({len(self.num_parts)}), got {len(value)}; "
                    "use None for a level that has none"
                )
            object.__setattr__(self, name, value)

    @property
    def num_levels(self) -> int:
        return len(self.num_parts)

    @property
    def num_graphs(self) -> int:
        return self.num_parts[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.num_parts[0].device

    def edges(self, kind: str, level: int) -> tuple[Tensor | None, Tensor | None]:
        """Index and lattice shifts of the edge set of this kind, "child" or "pair", of a level."""
        if kind == "pair":
            return self.pair_index[level], self.pair_shift[level]
        return self.child_index[level], self.child_shift[level]

    def size(self, level: int) -> int:
        """Number of parts at a level, over all graphs."""
        if "sizes" not in self._cache:
            # One transfer for all levels, the only synchronisation of a GPU batch. No tolist: torch.func of torch 2.8
            # does not know it.
            self._cache["sizes"] = [int(size) for size in torch.stack(self.num_parts).sum(dim=1).cpu()]
        size: int = self._cache["sizes"][level]
        return size

    def batch(self, level: int) -> Int[Tensor, " parts"]:
        """Graph of each part at a level."""
        level = range(self.num_levels)[level]
        value: Tensor | None = self._cache.get(("batch", level))
        if value is None:
            graphs = torch.arange(self.num_graphs, device=self.device)
            value = torch.repeat_interleave(graphs, self.num_parts[level], output_size=self.size(level))
            if not is_transformed():  # tensors of a tracer are not cached
                self._cache["batch", level] = value
        return value

    def parts(self, level: int) -> Int[Tensor, "2 members"]:
        """Atoms of each part: unique columns (atom, part), sorted by part, then atom."""
        return self._members(level)[0]

    def part_shift(self, level: int) -> Float[Tensor, "members 3"] | None:
        """Lattice shift of each column of :meth:`parts`; None for open systems.

        If several paths lead from an atom to a part, the first in the order of the edges is used.
        """
        return self._members(level)[1]

    def _members(self, level: int) -> tuple[Tensor, Tensor | None]:
        level = range(self.num_levels)[level]
        result: tuple[Tensor, Tensor | None] | None = self._cache.get(("members", level))
        if result is not None:
            return result
        if level == 0:
            atoms = torch.arange(self.size(0), device=self.device)
            shift = None
            if self.child_shift[1:] and self.child_shift[1] is not None:
                shift = torch.zeros_like(self.child_shift[1][:1]).expand(self.size(0), 3)
            result = torch.stack([atoms, atoms]), shift
        else:
            result = self._join_members(*self._members(level - 1), level)
        if not is_transformed():
            self._cache["members", level] = result
        return result

    def _join_members(self, below: Tensor, shift: Tensor | None, level: int) -> tuple[Tensor, Tensor | None]:
        """Members of the children, passed on to the parents along the child edges."""
        child, parent = required(self.child_index[level])
        count = torch.bincount(below[1], minlength=self.size(level - 1))
        first = torch.cumsum(count, 0) - count
        width = count[child]
        edge = torch.repeat_interleave(torch.arange(child.shape[0], device=self.device), width)
        start = torch.cumsum(width, 0) - width
        row = torch.arange(edge.shape[0], device=self.device) + (first[child] - start)[edge]
        num_atoms = self.size(0)
        key, inverse = torch.unique(parent[edge] * num_atoms + below[0, row], return_inverse=True)
        members = torch.stack([key % num_atoms, torch.div(key, num_atoms, rounding_mode="floor")])
        own = self.child_shift[level]
        if shift is None or own is None:
            return members, None
        order = torch.arange(edge.shape[0], device=self.device)
        seen = torch.full_like(key, edge.shape[0]).scatter_reduce(0, inverse, order, "amin")
        return members, (shift[row] + own.to(shift.dtype)[edge])[seen]

    def with_edges(
        self,
        child_index: tuple[Int[Tensor, "2 _"] | None, ...],
        pair_index: tuple[Int[Tensor, "2 _"] | None, ...],
        child_shift: tuple[Float[Tensor, "_ 3"] | None, ...],
        pair_shift: tuple[Float[Tensor, "_ 3"] | None, ...],
    ) -> Topology:
        """The same parts with other edges; quantities that depend only on the parts are not computed again."""
        columns = (child_index, pair_index, child_shift, pair_shift)
        other = Topology(self.num_parts, *columns, self.bonds, self.periodic, self.centre)
        self.size(0)
        for level in range(self.num_levels):
            self.batch(level)
        other._cache.update({k: v for k, v in self._cache.items() if k == "sizes" or k[0] == "batch"})
        return other

    def assume(self, batches: Sequence[Int[Tensor, " parts"]]) -> Topology:
        """Use the given graph of each part of every level, and the sizes from it, instead of computing them."""
        self._cache["sizes"] = [batch.shape[0] for batch in batches]
        self._cache.update({("batch", level): batch for level, batch in enumerate(batches)})
        return self

    def among(self, present: Bool[Tensor, " all_graphs"]) -> Topology:
        """The same parts, with further graphs without parts; ``present`` marks the graphs of this topology."""

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(len(present)).masked_scatter(present, values)

        periodic = None if self.periodic is None else spread(self.periodic)
        columns = (self.child_index, self.pair_index, self.child_shift, self.pair_shift)
        return Topology(tuple(map(spread, self.num_parts)), *columns, self.bonds, periodic, self.centre)

    def to(self, device: torch.device | str) -> Topology:
        """The same topology on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return None if value is None else value.to(device)

        return Topology(**{f.name: move(getattr(self, f.name)) for f in fields(self) if f.init})

    def store(self, data: Data) -> Data:
        """Write the topology on ``data`` in place, as the keys of :class:`~nbody_pyg.data.AtomicData`.

        Data with a cell get shifts, which are zero where nothing repeats: PyG takes the keys of the first graph of a
        batch, and a later one may be periodic.
        """
        for key in filter(is_topology_key, list(data.to_dict())):
            del data[key]
        for level in range(self.num_levels):
            if level > 0:
                data[f"num_parts_{level}"] = self.num_parts[level]
            if (centre := self.centre[level]) is not None:
                data[f"centre_{level}"] = centre
            for name in ("child", "pair"):
                index, shift = self.edges(name, level)
                if index is not None:
                    data[f"{name}_{level}"] = index
                    if shift is None and data.get("cell") is not None:
                        shift = data["pos"].new_zeros(index.shape[1], 3)
                if shift is not None:
                    data[f"{name}_shift_{level}"] = shift
        if self.bonds is not None:
            data["bonds"] = self.bonds
        return data

    @classmethod
    def from_data(cls, data: Data) -> Topology:
        """Read what :meth:`store` wrote, from one graph or from a batch; cheap, it runs in every step.

        Raises:
            ValueError: ``data`` holds no hierarchy.
        """
        stored = data.to_dict()
        num_levels = stored_levels(stored)
        ptr, batch = stored.get("ptr"), stored.get("batch")
        if ptr is not None:
            num_atoms = ptr[1:] - ptr[:-1]
        elif batch is not None:
            num_atoms = torch.bincount(batch, minlength=stored["num_parts_1"].shape[0])
        else:
            num_atoms = torch.full_like(stored["num_parts_1"], stored["pos"].shape[0])
        levels = range(num_levels)
        pbc, cell = stored.get("pbc"), stored.get("cell")
        if pbc is None and cell is not None:
            pbc = implied_pbc(cell)
        shifts = {key: stored.get(key) for k in levels for key in (f"child_shift_{k}", f"pair_shift_{k}")}
        if pbc is not None and has_values(pbc) and not bool(pbc.any()):
            shifts = dict.fromkeys(shifts)  # all zero
        repeats = any(shift is not None for shift in shifts.values())
        topology = cls(
            num_parts=(num_atoms, *(stored[f"num_parts_{k}"] for k in levels[1:])),
            child_index=tuple(stored.get(f"child_{k}") for k in levels),
            pair_index=tuple(stored.get(f"pair_{k}") for k in levels),
            child_shift=tuple(shifts[f"child_shift_{k}"] for k in levels),
            pair_shift=tuple(shifts[f"pair_shift_{k}"] for k in levels),
            bonds=stored.get("bonds"),
            periodic=pbc.reshape(-1, 3).any(dim=1) if repeats and pbc is not None else None,
            centre=tuple(stored.get(f"centre_{k}") for k in levels),
        )
        if batch is not None:
            topology._cache["batch", 0] = batch
        return topology

    def validate(self) -> Topology:
        """Check the definition of a composition scheme; returns itself.

        Raises:
            ValueError: the message names the node and the rule, see :mod:`nbody_pyg.hierarchy.validation`.
        """
        check_topology(self)
        return self

    @classmethod
    def from_dag(cls, edges: Int[Tensor, "2 edges"], num_atoms: int) -> Topology:
        """Build a topology without pairs from a user's DAG of parts; see
        :func:`nbody_pyg.hierarchy.dag.levels_of_dag`."""
        return cls(*levels_of_dag(edges, num_atoms)).validate()

    def __repr__(self) -> str:
        sizes = " -> ".join(str(self.size(k)) for k in range(self.num_levels))
        return f"Topology({sizes}, graphs={self.num_graphs})"


def check_topology(topology: Topology, images: bool = False) -> None:
    """Raise unless it is a composition scheme; see :func:`nbody_pyg.hierarchy.validation.validate_parts`."""
    children = list(zip(topology.child_index, topology.child_shift, strict=True))
    pairs = list(zip(topology.pair_index, topology.pair_shift, strict=True))
    validate_parts(topology.num_parts, topology.batch, children, pairs, images)


def sort_edges(
    index: Int[Tensor, "2 edges"], shift: Float[Tensor, "edges 3"] | None, num_sources: int
) -> tuple[Int[Tensor, "2 edges"], Float[Tensor, "edges 3"] | None]:
    """Order edges by target, then source (stable in the rest), the order of every edge list here."""
    order = torch.argsort(index[1] * max(num_sources, 1) + index[0], stable=True)
    return index[:, order], None if shift is None else shift[order]


def stored_levels(stored: Mapping[str, Any]) -> int:
    """Number of levels of the hierarchy among the keys of a Data or Batch.

    Raises: ValueError: there is none, or not all of it, or it was not batched as :class:`AtomicData`.
    """
    if "num_parts_1" not in stored:
        raise ValueError(
            f"data must hold a hierarchy, but has no key 'num_parts_1' (keys: {sorted(stored)}); apply a "
            "scheme to it first, e.g. transform=BondTree() on the dataset"
        )
    num_levels = 1
    while f"num_parts_{num_levels}" in stored:
        num_levels += 1
    for level in range(1, num_levels):
        if (child := stored.get(f"child_{level}")) is None or child.dim() != 2 or child.shape[0] != 2:
            found = "not at all" if child is None else f"in the shape {list(child.shape)}"
            raise ValueError(
                f"data must hold 'child_{level}' as [2, edges], but has it {found}: keys of a hierarchy belong "
                "together, and only AtomicData are batched rightly; exclude none, and turn a Data that holds "
                "them into one with AtomicData.from_data before it goes into a batch"
            )
    return num_levels
