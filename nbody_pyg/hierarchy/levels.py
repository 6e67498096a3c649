"""Hierarchy: the parts of each level with positions, weights and edge vectors, all differentiable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from nbody_pyg.hierarchy.topology import Topology, check_topology
from nbody_pyg.system import System


class EdgeSet(NamedTuple):
    """One set of edges of a hierarchy: from the children of a level to its parts, or between the pairs of a level.

    Its text is the name used for stored topologies and in settings, e.g. "child_2".
    """

    kind: str
    level: int

    def __str__(self) -> str:
        return f"{self.kind}_{self.level}"


@dataclass(frozen=True, eq=False)
class Level:
    r"""One level of a hierarchy.

    ================  ======================  ===========  ===============================================
    symbol            code                    shape        meaning
    ================  ======================  ===========  ===============================================
    :math:`r_i`       ``pos``                 [n, 3]       positions, angstrom
    :math:`g_i`       ``weight``              [n]          existence of the part, in [0, 1]
                      ``batch``               [n]          graph of each part
                      ``child_index``         [2, E]       child (level below), parent (this level)
    :math:`r_{cP}`    ``child_vec``           [E, 3]       :math:`r_c - r_P`, angstrom
    :math:`p_{cP}`    ``child_weight``        [E]          membership, in [0, 1]: it holds the window
                      ``pair_index``          [2, P]       source, target (both on this level)
    :math:`r_{ji}`    ``pair_vec``            [P, 3]       :math:`r_j - r_i`, angstrom
    :math:`w_{ji}`    ``pair_weight``         [P]          window of the pair, in [0, 1]
    ================  ======================  ===========  ===============================================

    Entries that a level does not have are None. Gates multiply each message by a weight and have no other cutoff. On
    the way up the weight is ``pool_weight``, if a level has one: :math:`g_c\, p_{cP} / g_P`, finite where the parent
    vanishes. On the way down it is ``child_weight``, for pairs ``pair_weight`` (which includes the existence of the
    source). If all parts exist fully, ``pool_weight`` is None and ``child_weight`` is used in both directions.
    """

    pos: Float[Tensor, "parts 3"]
    weight: Float[Tensor, " parts"]
    batch: Int[Tensor, " parts"]
    child_index: Int[Tensor, "2 edges"] | None = None
    child_vec: Float[Tensor, "edges 3"] | None = None
    child_weight: Float[Tensor, " edges"] | None = None
    pair_index: Int[Tensor, "2 pairs"] | None = None
    pair_vec: Float[Tensor, "pairs 3"] | None = None
    pair_weight: Float[Tensor, " pairs"] | None = None
    pool_weight: Float[Tensor, " edges"] | None = None

    @property
    def num_parts(self) -> int:
        return self.pos.shape[0]

    def edges(self, kind: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Index, vectors and weights of the edge set of this kind, "child" or "pair"."""
        if kind == "pair":
            return self.pair_index, self.pair_vec, self.pair_weight
        return self.child_index, self.child_vec, self.child_weight

    def __repr__(self) -> str:
        edges = 0 if self.child_index is None else self.child_index.shape[1]
        pairs = 0 if self.pair_index is None else self.pair_index.shape[1]
        return f"Level(parts={self.num_parts}, children={edges}, pairs={pairs})"


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """The levels of a graph or batch, from atoms (``[0]``) to root (``[-1]``, one part per graph).

    Args:
        levels: one :class:`Level` each.
        system: the atoms, with cell, charge and spin.
        same: edge sets that equal an earlier one in indices, vectors and weights; see
            :attr:`~nbody_pyg.hierarchy.Scheme.same_edges`.
        masks: [edges] factors in the weights of edge sets, by which weights that are computed again are multiplied as
            well; empty where there are none.
    """

    levels: tuple[Level, ...]
    system: System
    same: Mapping[EdgeSet, EdgeSet] = field(default_factory=dict)
    masks: Mapping[EdgeSet, Float[Tensor, " edges"]] = field(default_factory=dict)

    @property
    def z(self) -> Integer[Tensor, " atoms"]:
        """Atomic numbers of the atoms."""
        return self.system.z

    @property
    def num_graphs(self) -> int:
        """Number of graphs, and of parts in the last level."""
        return self.system.num_graphs

    @property
    def root(self) -> Level:
        return self.levels[-1]

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, level: int) -> Level:
        return self.levels[level]

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)

    def __repr__(self) -> str:
        sizes = " -> ".join(str(level.num_parts) for level in self.levels)
        return f"Hierarchy({sizes}, graphs={self.num_graphs})"

    def topology(self) -> Topology:
        """The integers of this hierarchy (without lattice shifts)."""
        return Topology(
            num_parts=tuple(torch.bincount(level.batch, minlength=self.num_graphs) for level in self.levels),
            child_index=tuple(level.child_index for level in self.levels),
            pair_index=tuple(level.pair_index for level in self.levels),
        )

    def validate(self) -> Hierarchy:
        """Check the definition of a composition scheme, shapes, and that all weights lie in [0, 1].

        Raises:
            ValueError: the message names the level, the node or edge, and the rule.
        """
        if self.levels[0].num_parts != self.z.shape[0]:
            raise ValueError(f"level 0 must hold one node per atom ({self.z.shape[0]}), got {self.levels[0].num_parts}")
        check_topology(self.topology(), images=True)
        for k, level in enumerate(self.levels):
            _check_tensors(k, level)
        return self


def _check_tensors(k: int, level: Level) -> None:
    """Raise unless the tensors of a level match its indices, are finite and in range."""
    num_children = None if level.child_index is None else level.child_index.shape[1]
    num_pairs = None if level.pair_index is None else level.pair_index.shape[1]
    wanted = {
        "pos": (level.num_parts, 3),
        "weight": (level.num_parts,),
        "batch": (level.num_parts,),
        "child_vec": None if num_children is None else (num_children, 3),
        "child_weight": None if num_children is None else (num_children,),
        "pair_vec": None if num_pairs is None else (num_pairs, 3),
        "pair_weight": None if num_pairs is None else (num_pairs,),
        "pool_weight": None if level.pool_weight is None or num_children is None else (num_children,),
    }
    for name, shape in wanted.items():
        value = getattr(level, name)
        got = None if value is None else tuple(value.shape)
        if got != shape:
            raise ValueError(f"{name} of level {k} must have shape {shape}, got {got}")
        if value is None or not value.is_floating_point():
            continue
        low, high = (
            (-torch.inf, torch.inf)
            if name.endswith(("pos", "vec"))
            else (0.0, torch.inf if name == "pool_weight" else 1.0)
        )
        # Weights are sums and products of steps, which end at 1 up to rounding.
        most = high * (1.0 + 32.0 * torch.finfo(value.dtype).eps)
        bad = ~(torch.isfinite(value) & (value >= low) & (value <= most))
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"{name} of level {k} must be finite and in [{low}, {high}], row {row} is {value[row]}")
