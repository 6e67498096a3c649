r"""Parts of the fast multipole method of latent charges: translations with factors, and pairs of children."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.geometry import ragged
from nbody_pyg.nn.irreps import Resettable


class Translation(NamedTuple):
    """Edges of a translation with their vectors; those in the features of gates are softened.

    ==============  =======================================================================
    field           shape
    ==============  =======================================================================
    index           (2, edges): source, target
    vec             (edges, 3): source minus target, angstrom
    window          (edges,): weight of the hierarchy (membership, window)
    num_targets     number of receiving parts
    ==============  =======================================================================
    """

    index: Tensor  # type: ignore[assignment]  # takes the place of tuple.index
    vec: Tensor
    window: Tensor | None
    num_targets: int

    def reversed(self, num_targets: int) -> Translation:
        """The same edges the other way."""
        return Translation(self.index.flip(0), -self.vec, self.window, num_targets)


class TranslationGate(Resettable):
    r"""M2M, M2L or L2L of :mod:`nbody_pyg.multipoles` with a factor for each pair of degrees.

    .. math:: M'_{l i} = \sum_j w_{ij} \sum_{l_1 l_2} f_{l l_2}\, a_{l_1 l_2 l}\,
              [H_{l_1}(\mathbf r_{ij}) \otimes M_{l_2 j}]_l

    Args:
        function: :func:`~nbody_pyg.multipoles.m2m`, ``m2l`` or ``l2l``, which has the coefficients a.
        lmax_in: highest degree of the input.
        lmax: highest degree of the result.
        trained: make the factors f parameters, which start at 1; else they are 1.

    Equivariance: O(3), permutation of the sources. Smoothness: that of the windows; M2L needs vectors that are not 0.

    Example:
        >>> from nbody_pyg.multipoles import m2m
        >>> TranslationGate(m2m, lmax_in=0, lmax=4)
        TranslationGate(m2m, lmax=0 -> 4)
    """

    def __init__(self, function: Callable[..., Tensor], lmax_in: int, lmax: int, trained: bool = False) -> None:
        super().__init__()
        self.function, self.lmax_in, self.lmax = function, lmax_in, lmax
        self.factors = nn.Parameter(torch.ones(lmax + 1, lmax_in + 1)) if trained else None

    def forward(
        self, values: Float[Tensor, "sources rows_in channels"], t: Translation
    ) -> Float[Tensor, "targets rows channels"]:
        """Moments or fields about the targets."""
        return self.function(values, t.vec, t.index, t.num_targets, self.lmax, t.window, factors=self.factors)

    def extra_repr(self) -> str:
        trained = ", trained" if self.factors is not None else ""
        return f"{self.function.__name__}, lmax={self.lmax_in} -> {self.lmax}{trained}"


def join_pairs(
    pairs: Int[Tensor, "2 pairs"],
    weight: Float[Tensor, " pairs"],
    child_index: Int[Tensor, "2 edges"],
    child_weight: Float[Tensor, " edges"],
    sizes: tuple[int, int],
) -> tuple[Int[Tensor, "2 _"], Float[Tensor, " _"]]:
    r"""Pairs of children of pairs of parents: :math:`n_{ij} = \sum_{AB} p_{iA}\, p_{jB}\, w_{AB}`, each pair once.

    The two sides are summed one after the other; otherwise children that share several parents would give a term for
    each pair of parents.

    Args:
        pairs: parents, source and target; with (A, A) if children of one parent interact.
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
        pair, place = ragged(count[pairs[row]])
        slot = first[pairs[row, pair]] + place
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
