"""Inner cutoffs: below the distances of the training data a network no longer follows the distance of two atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import has_values
from nbody_pyg.nn.exact_buffers import Float64Buffers
from nbody_pyg.nn.repulsion import SEEN_FACTOR, ZBLRepulsion, pair_lengths, pair_table

#: Where the length of an edge becomes constant, in units of the inner cutoff.
FLAT_FROM = 0.93
#: Inner cutoff of a pair in units of the shortest distance in the training frames.
INNER_FACTOR = 0.95


class InnerCutoff(Float64Buffers):
    r"""Edge vectors whose length does not fall below a limit that depends on the two elements.

    .. math:: \mathbf r \to \frac{s(r)}{r}\, \mathbf r, \qquad
        s(r) = a - (a - b) \big(\tfrac12 - u^3 + \tfrac12 u^4\big), \quad
        u = \min\Big(\max\Big(\frac{r - b}{a - b}, 0\Big), 1\Big), \quad b = 0.93\, a

    for r < a, where a is the inner cutoff of the pair, and s(r) = r above. Below b the length is constant.
    There are no training data at such distances, and a network, in which sums over neighbours are multiplied with each
    other, can extrapolate to attractions of many eV. With constant features its forces on the pair vanish, and the
    repulsion of nuclei (:class:`~nbody_pyg.nn.repulsion.ZBLRepulsion`) is what remains.

    Args:
        species: atomic numbers, ascending.
        lengths: inner cutoffs (angstrom) by symbols, such as ``{"C-H": 0.95}``. Other pairs have 0.75 times the sum of
            their covalent radii; lengths for pairs of other elements have no effect.

    Equivariance: vectors stay vectors. Smoothness: C2 for r > 0. Cost: a comparison per edge; more only if an edge is
    shorter than its limit.
    Raises: ValueError: a name that is no pair of elements, or a length that is not positive.

    Example:
        >>> InnerCutoff([1, 8], {"H-O": 0.9})
        InnerCutoff(H-H 0.46, H-O 0.90, O-O 0.99 angstrom)
    """

    start: Tensor
    _float64 = ("start",)

    def __init__(self, species: Sequence[int], lengths: Mapping[str, float]) -> None:
        super().__init__()
        self.lengths = pair_lengths("inner_cutoff", species, lengths, strict=False)
        self.register_buffer("start", pair_table(species, self.lengths), persistent=False)

    def forward(
        self,
        index: Int[Tensor, "2 edges"],
        vec: Float[Tensor, "edges 3"],
        species: Int[Tensor, " atoms"],
    ) -> Float[Tensor, "edges 3"]:
        """The vectors with limited lengths; the same tensor if none is shorter than its limit.

        Edges from an atom to itself have the vector zero, which stays zero.
        """
        source, target = species[index]
        start = self.start.to(vec.dtype).flatten().index_select(0, source * len(self.start) + target)
        square = vec.square().sum(-1)
        near = (square < start.square()) & (square > 0)
        if has_values(near) and not bool(near.any()):
            return vec
        r = torch.where(near, square, start.square()).sqrt()
        u = ((r / start - FLAT_FROM) / (1.0 - FLAT_FROM)).clamp(0.0, 1.0)
        length = start * (1.0 - (1.0 - FLAT_FROM) * (0.5 - u**3 + 0.5 * u**4))
        return vec * torch.where(near, length / r, torch.ones_like(r)).unsqueeze(-1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {length:.2f}" for name, length in self.lengths.items()) + " angstrom"


def inner_cutoffs(repulsion: ZBLRepulsion) -> dict[str, float]:
    """Inner cutoffs that belong to a repulsion from data: 0.95 times the shortest distances, of which its reach is 0.9
    times."""
    return {name: round(INNER_FACTOR / SEEN_FACTOR * reach, 4) for name, reach in repulsion.reach.items()}
