"""Learning-rate factor as a function of steps taken and of progress, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    r"""Linear warm-up over steps, then constant, then half a cosine to zero.

    .. math:: f(n, p) = \min(1, \tfrac{n+1}{n_w}) \cdot
              \begin{cases} 1 & p \le c \\ \tfrac12 (1 + \cos \pi \tfrac{p - c}{1 - c}) & p > c \end{cases}

    ============  ====================  ===========================================================
    symbol        code                  meaning
    ============  ====================  ===========================================================
    :math:`n`     ``step``              optimizer steps taken so far
    :math:`p`     ``progress``          share of the run that is over, in [0, 1]: steps or CPU time
    :math:`n_w`   ``warmup_steps``      length of the warm-up
    :math:`c`     ``constant``          share of the run before the cosine begins
    ============  ====================  ===========================================================

    Raises: ValueError: ``warmup_steps < 0`` or ``constant`` outside [0, 1].
    """

    warmup_steps: int = 50
    constant: float = 0.3

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0.0 <= self.constant <= 1.0:
            raise ValueError(f"constant must be a fraction of the run in [0, 1], got {self.constant}")

    def __call__(self, step: int, progress: float) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if progress <= self.constant or self.constant == 1.0:
            return warm
        angle = math.pi * min(1.0, (progress - self.constant) / (1.0 - self.constant))
        return warm * 0.5 * (1.0 + math.cos(angle))
