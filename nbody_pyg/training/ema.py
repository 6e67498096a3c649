"""Exponential moving average of the weights, which are validated, tested and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from nbody_pyg.training.flat import FlatParameters


class WeightEMA:
    r"""Average the weights over the last steps; validation and the final model use the average.

    .. math:: \bar w \leftarrow \bar w + (1 - \beta_n)(w - \bar w), \qquad
              \beta_n = \min(\beta, \tfrac{1 + n}{10 + n})

    The growing decay keeps the random initial weights out of short runs.

    Args:
        flat: the weights; the average starts with them.
        decay: :math:`\beta` in [0, 1); with 0 the average is the weights themselves.
    Raises: ValueError: decay outside [0, 1).
    """

    def __init__(self, flat: FlatParameters, decay: float = 0.99):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.flat, self.decay, self.steps = flat, decay, 0
        self.average: Tensor = flat.values.clone()

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        self.average.lerp_(self.flat.values, 1.0 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the module has the averaged weights."""
        kept = self.flat.values.clone()
        self.flat.values.copy_(self.average)
        try:
            yield
        finally:
            self.flat.values.copy_(kept)
