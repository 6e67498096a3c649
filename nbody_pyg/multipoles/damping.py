r"""Kernels :math:`g(r)` in place of 1/r: bare, or of charges that are smeared out, finite at r = 0."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import is_tracing


def boys(t: Float[Tensor, "*shape"], order: int) -> Float[Tensor, "*shape orders"]:
    r"""Boys functions :math:`F_n(t) = \int_0^1 u^{2n} e^{-t u^2} du` for n = 0 .. order and t >= 0.

    The highest by its series, the others by downward recursion; for large t upward from the error function.
    Each branch is used where it is accurate to rounding. Smooth at t = 0, with derivatives of every order.

    >>> boys(torch.zeros(1, dtype=torch.float64), 2)
    tensor([[1.0000, 0.3333, 0.2000]], dtype=torch.float64)
    """
    switch = 1.0 + 2.0 * order
    low = t <= switch
    large = torch.where(low, torch.full_like(t, switch), t)
    root, decay = large.sqrt(), torch.exp(-large)
    up = [torch.erf(root) * (0.5 * math.sqrt(math.pi)) / root]
    for n in range(order):
        up.append(((2 * n + 1) * up[-1] - decay) / (2.0 * large))
    result = torch.stack(up, dim=-1)
    if is_tracing():
        return torch.where(low.unsqueeze(-1), _boys_of_small(torch.where(low, t, torch.zeros_like(t)), order), result)
    where = low.nonzero(as_tuple=True)
    return result.index_put(where, _boys_of_small(t[where], order))


def _boys_of_small(t: Tensor, order: int) -> Tensor:
    r"""The highest order by :math:`e^{-t} \sum_k (2t)^k / ((2n+1)(2n+3) \dots (2n+2k+1))`, the others downward."""
    one = torch.ones_like(t)
    total = one
    for k in range(_num_terms(order, 1.0 + 2.0 * order), 0, -1):
        total = torch.addcmul(one, t, total, value=2.0 / (2 * order + 2 * k + 1))
    decay = torch.exp(-t)
    down = [decay * total / (2 * order + 1)]
    for n in range(order - 1, -1, -1):
        down.append((2.0 * t * down[-1] + decay) / (2 * n + 1))
    return torch.stack(down[::-1], dim=-1)


def _num_terms(order: int, largest: float) -> int:
    """Terms of the series of F_order after which nothing changes, at the largest argument."""
    term, total, count = 1.0, 1.0, 0
    while term > 1e-18 * total:
        count += 1
        term *= 2.0 * largest / (2 * order + 2 * count + 1)
        total += term
    return count


def gaussian_factors(square: Float[Tensor, "*shape"], lmax: int, width: float) -> Float[Tensor, "*shape degrees"]:
    r"""Radial factors of the kernel between two Gaussian charges of one width.

    .. math:: g(r) = \frac{\operatorname{erf}(r / 2\sigma)}{r}, \qquad
              \lambda_l = \frac{1}{(2l-1)!!} \Big(-\frac1r \frac{d}{dr}\Big)^l g(r)
              \;\to\; r^{-(2l+1)} \quad (r \gg \sigma)

    They take the place of :math:`r^{-(2l+1)}` in the irregular harmonics. Beyond 12 widths the difference is below
    1e-15.

    Args:
        square: squared distances, angstrom^2.
        lmax: highest degree.
        width: standard deviation of each Gaussian, angstrom.

    Smoothness: C-infinity, also at r = 0, where :math:`g = 1 / (\sqrt\pi\, \sigma)`.
    Raises: ValueError: ``width`` is not a positive number.
    """
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive length in angstrom, got {width!r}; try 0.5, or None for bare 1/r")
    beta2 = 1.0 / (4.0 * width * width)
    values = boys(square * beta2, lmax)
    factors = [2.0 * math.sqrt(beta2 / math.pi)]
    for l in range(1, lmax + 1):
        factors.append(factors[-1] * 2.0 * beta2 / (2 * l - 1))
    return values * values.new_tensor(factors)
