"""Low-rank changes of the covariant maps: few numbers to train, and an ordinary model at every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Adapters(nn.Module):
    r"""Low-rank changes of matrices of a module, written into them.

    .. math:: W^\ell = W^\ell_0 + A^\ell B^\ell

    A change of :math:`W^\ell` by a matrix mixes fragments of one degree only, so it is covariant as the map itself
    (P5). The sum is written into the weight after every step, so the module is an ordinary one with folded adapters at
    any time, on every backend, and costs no more than without them.

    =================  =============================================
    symbol             shape
    =================  =============================================
    :math:`W_0`        (rows, columns), the weight at the start; it stays
    :math:`A`          (rows, rank); random at the start
    :math:`B`          (rank, columns); zero at the start
    =================  =============================================

    Gradients of A and B follow from that of W: :math:`\partial_A = \partial_W B^T`, :math:`\partial_B = A^T
    \partial_W`.

    Args:
        weights: the matrices by name. They no longer count as trainable parameters of their module.
        rank: columns of A; smaller than the sides of every matrix.
        seed: of A.

    Raises: ValueError: no matrices, or a rank that is not below the sides of one.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], rank: int, seed: int = 0) -> None:
        super().__init__()
        if not weights:
            raise ValueError("weights must name at least one matrix, got none; a model without maps has no adapters")
        least = min(min(w.shape) for w in weights.values())
        if not 0 < rank < least:
            raise ValueError(f"rank must be below the smallest side of the maps, {least}, and positive, got {rank}")
        self.names, self._weights = tuple(weights), list(weights.values())  # a list: they belong to the model
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for number, w in enumerate(self._weights):
            drawn = torch.randn(w.shape[0], rank, generator=generator, dtype=torch.float64) * w.shape[0] ** -0.5
            self.a.append(nn.Parameter(drawn.to(w)))
            self.b.append(nn.Parameter(w.new_zeros(rank, w.shape[1])))
            self.register_buffer(f"first_{number}", w.detach().clone())
            w.requires_grad_(False)

    def _firsts(self) -> list[Tensor]:
        return [self.get_buffer(f"first_{number}") for number in range(len(self.names))]

    @torch.no_grad()
    def fold(self) -> None:
        """Write W_0 + A B into the weights, and let them collect gradients in the next backward pass."""
        for w, first, a, b in zip(self._weights, self._firsts(), self.a, self.b, strict=True):
            w.copy_(first + a @ b)
            w.requires_grad_(True)
            w.grad = None

    @torch.no_grad()
    def pull(self) -> None:
        """Add the gradients of A and B that follow from those of the weights."""
        for w, a, b in zip(self._weights, self.a, self.b, strict=True):
            if w.grad is None:
                continue
            for p, gradient in ((a, w.grad @ b.mT), (b, a.mT @ w.grad)):
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
            w.grad = None

    def folded(self, given: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """The weights by name, for other values of A and B, named as in ``state_dict`` after ``prefix``."""
        return {
            name: first + given[f"{prefix}a.{n}"] @ given[f"{prefix}b.{n}"]
            for n, (name, first) in enumerate(zip(self.names, self._firsts(), strict=True))
        }

    def extra_repr(self) -> str:
        return f"{len(self.names)} maps, rank {self.a[0].shape[1]}"
