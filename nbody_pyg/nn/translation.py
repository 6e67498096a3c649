r"""Gates of the fast multipole method: up (M2M), across (M2L), down (L2L), beside a learned gate.

The state of a part has two blocks of channels. The learned block passes a :class:`~nbody_pyg.nn.gates.OneBodyGate`; the
reserved block holds multipole moments (on the way up) or local fields (across and down) and passes the same kind of
product with analytic W^l. So a network that has learned nothing moves charges to potentials as a fast multipole method.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.multipoles import l2l, m2l, m2m
from nbody_pyg.multipoles.coefficients import check_lmax
from nbody_pyg.multipoles.translations import degree_of
from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.gates import OneBodyGate
from nbody_pyg.nn.irreps import Resettable


class BlockState(NamedTuple):
    """State of the parts of a level in two blocks.

    ==============  =======================================================================
    field           shape
    ==============  =======================================================================
    learned         (parts, rows, channels), or None where there is no learned block
    reserved        (parts, (lmax+1)^2, charges): moments or local fields, e3nn's order
    ==============  =======================================================================
    """

    learned: Tensor | None
    reserved: Tensor


class Translation(NamedTuple):
    """Edges of a translation with their bare vectors, which the features of gates have softened.

    ==============  =======================================================================
    field           shape
    ==============  =======================================================================
    index           (2, edges): source, target
    vec             (edges, 3): source minus target, angstrom
    window          (edges,): weight of the hierarchy (membership, window)
    num_targets     number of receiving parts
    ==============  =======================================================================
    """

    index: Tensor
    vec: Tensor
    window: Tensor | None
    num_targets: int

    def reversed(self, num_targets: int) -> Translation:
        """The same edges the other way."""
        return Translation(self.index.flip(0), -self.vec, self.window, num_targets)


class TranslationGate(Resettable):
    r"""A learned gate and an analytic translation, side by side.

    .. math:: \psi'_i = \mathrm{OneBodyGate}(\{\psi_j\}), \qquad
              M'_{l i} = \sum_j w_{ij} \sum_{l_1 l_2} f_{l l_2}\, a_{l_1 l_2 l}\,
              [H_{l_1}(\mathbf r_{ij}) \otimes M_{l_2 j}]_l

    with the analytic coefficients a of :mod:`nbody_pyg.multipoles` and factors f that are 1, and constant unless they
    are trained. Only :class:`UpGate`, :class:`AcrossGate` and :class:`DownGate` are to be used.

    Args:
        lmax: highest degree of the reserved block that the gate makes.
        irreps: type of the learned block, or None for a gate that only translates.
        num_basis: number of radial functions on the edges of the learned block.
        degree: typical number of sources per target of the learned block.
        symmetry: "o3", "o3-full" or "so3".
        lmax_in: highest degree that it receives; None for ``lmax``.
        trained: make the factors f parameters, which start at 1.

    Equivariance: O(3), permutation of the sources. Smoothness: that of the windows; ``AcrossGate`` needs vectors that
    are not 0, or a width.
    Raises: ValueError: ``lmax`` out of range; a state whose blocks are not those of the gate.
    """

    def __init__(
        self,
        lmax: int,
        irreps: o3.Irreps | None = None,
        num_basis: int = 8,
        degree: float = 1.0,
        symmetry: str = "o3",
        lmax_in: int | None = None,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.lmax, self.lmax_in = check_lmax("lmax", lmax), check_lmax("lmax_in", lmax if lmax_in is None else lmax_in)
        self.gate = None
        if irreps is not None:
            irreps = o3.Irreps(irreps)
            self.gate = OneBodyGate(irreps, irreps, max(ir.l for _, ir in irreps), num_basis, degree, symmetry)
        self.factors = nn.Parameter(torch.ones(self.lmax + 1, self.lmax_in + 1)) if trained else None

    def forward(self, state: BlockState, translation: Translation, edges: EdgeFeatures | None = None) -> BlockState:
        """New state of the targets; ``edges`` are the features of the same edges for the learned block."""
        if (self.gate is None) != (state.learned is None):
            here, there = (("no", "one"), ("a", "none"))[self.gate is not None]
            raise ValueError(f"state must fit the gate, which has {here} learned block, but the state has {there}")
        if degree_of(state.reserved) != self.lmax_in:
            found = degree_of(state.reserved)
            raise ValueError(f"state must have a reserved block of degree {self.lmax_in}, got {found}; set lmax_in")
        learned = None if self.gate is None else self.gate(state.learned, edges)
        return BlockState(learned, self.translate(state.reserved, translation))

    def translate(
        self, reserved: Float[Tensor, "sources rows_in channels"], t: Translation
    ) -> Float[Tensor, "targets rows channels"]:
        """The reserved block alone."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        trained = ", trained" if self.factors is not None else ""
        return f"lmax={self.lmax_in} -> {self.lmax}{trained}"


class UpGate(TranslationGate):
    """Children to parents: M2M (P2M where the children are atoms) beside the learned gate.

    Arguments: :class:`TranslationGate`.

    Example:
        >>> UpGate(lmax=4, lmax_in=0)
        UpGate(lmax=0 -> 4)
    """

    def translate(
        self, reserved: Float[Tensor, "sources rows_in channels"], t: Translation
    ) -> Float[Tensor, "targets rows channels"]:
        """Moments about the parents."""
        return m2m(reserved, t.vec, t.index, t.num_targets, self.lmax, t.window, self.factors)


class AcrossGate(TranslationGate):
    """Neighbours on one level: M2L beside the learned gate. Moments come in, local fields come out.

    Arguments: :class:`TranslationGate`; ``width`` smears the charges.
    """

    def __init__(self, lmax: int, *args, width: float | None = None, **options) -> None:
        super().__init__(lmax, *args, **options)
        self.width = width

    def translate(
        self, reserved: Float[Tensor, "sources rows_in channels"], t: Translation
    ) -> Float[Tensor, "targets rows channels"]:
        """Fields about the targets."""
        return m2l(reserved, t.vec, t.index, t.num_targets, self.lmax, t.window, self.width, self.factors)


class DownGate(TranslationGate):
    """Parents to children: L2L (L2P where the children are atoms) beside the learned gate.

    Arguments: :class:`TranslationGate`.
    """

    def translate(
        self, reserved: Float[Tensor, "sources rows_in channels"], t: Translation
    ) -> Float[Tensor, "targets rows channels"]:
        """Fields about the children."""
        return l2l(reserved, t.vec, t.index, t.num_targets, self.lmax, t.window, self.factors)


def join_pairs(
    pairs: Int[Tensor, "2 pairs"],
    weight: Float[Tensor, " pairs"],
    child_index: Int[Tensor, "2 edges"],
    child_weight: Float[Tensor, " edges"],
    sizes: tuple[int, int],
) -> tuple[Int[Tensor, "2 _"], Float[Tensor, " _"]]:
    r"""Pairs of children of pairs of parents: :math:`n_{ij} = \sum_{AB} p_{iA}\, p_{jB}\, w_{AB}`, each pair once.

    One side after the other, with sums in between: children that share several parents would otherwise make a term
    for each pair of them.

    Args:
        pairs: parents, source and target; with (A, A) if children of one parent shall meet.
        weight: w of each pair.
        child_index: child in row 0, parent in row 1.
        child_weight: memberships p.
        sizes: number of children and of parents.
    """
    order = torch.argsort(child_index[1], stable=True)
    child, member = child_index[0, order], child_weight.index_select(0, order)
    count = torch.bincount(child_index[1], minlength=sizes[1])
    first = torch.cumsum(count, 0) - count
    for row in (0, 1):
        width = count[pairs[row]]
        pair = torch.repeat_interleave(torch.arange(pairs.shape[1], device=pairs.device), width)
        number = torch.arange(pair.shape[0], device=pairs.device) - (torch.cumsum(width, 0) - width)[pair]
        slot = first[pairs[row, pair]] + number
        weight = weight.index_select(0, pair) * member.index_select(0, slot)
        pairs = torch.stack([child[slot], pairs[1, pair]] if row == 0 else [pairs[0, pair], child[slot]])
        pairs, weight = _add_up(pairs, weight, sizes[0])
    return _without_selves(pairs, weight)


def merge_pairs(
    pairs: Int[Tensor, "2 pairs"], weight: Float[Tensor, " pairs"], size: int
) -> tuple[Int[Tensor, "2 _"], Float[Tensor, " _"]]:
    """Add up the weights of pairs that occur more than once, and drop pairs of a node with itself."""
    return _without_selves(*_add_up(pairs, weight, size))


def _add_up(pairs: Tensor, weight: Tensor, num_sources: int) -> tuple[Tensor, Tensor]:
    key, slot = torch.unique(pairs[1] * num_sources + pairs[0], return_inverse=True)
    total = weight.new_zeros(key.shape[0]).index_add(0, slot, weight)
    return torch.stack([key % num_sources, torch.div(key, num_sources, rounding_mode="floor")]), total


def _without_selves(pairs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    keep = pairs[0] != pairs[1]
    return pairs[:, keep], weight[keep]
