"""Regular and irregular solid harmonics in Racah's normalisation, e3nn's basis."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import constant_table
from nbody_pyg.multipoles.coefficients import MAX_LMAX, raising_table
from nbody_pyg.multipoles.damping import gaussian_factors


@constant_table
def _raising(l: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return raising_table(l).flatten(0, 1).to(device=device, dtype=dtype)


def regular_harmonics(vec: Float[Tensor, "edges 3"], lmax: int) -> Float[Tensor, "edges rows"]:
    r"""Regular solid harmonics :math:`R_{lm}(\mathbf r) = r^l C_{lm}(\hat{\mathbf r})` of the degrees 0 .. lmax.

    .. math:: R_0 = 1, \quad R_1 = \mathbf r, \quad \textstyle\sum_m R_{lm}(\mathbf r)^2 = r^{2l}, \qquad
              R_l(\mathbf a + \mathbf b) = \sum_{l_1 + l_2 = l} \alpha(l_1, l_2)\,
              [R_{l_1}(\mathbf a) \otimes R_{l_2}(\mathbf b)]_l

    C are spherical harmonics in Racah's normalisation, which is e3nn's ``"norm"``; order and axes are e3nn's too
    (degree 1 is x, y, z). Polynomials: smooth everywhere, also at 0.

    Args:
        vec: vectors.
        lmax: highest degree, 0 to 16.

    Example:
        >>> regular_harmonics(torch.tensor([[0.0, 2.0, 0.0]]), 2)
        tensor([[1., 0., 2., 0., 0., 0., 4., 0., 0.]])
    """
    _check_degree(lmax)
    blocks = [vec.new_ones(vec.shape[0], 1)]
    if lmax >= 1:
        blocks.append(vec)
    for l in range(2, lmax + 1):
        product = (blocks[-1].unsqueeze(2) * vec.unsqueeze(1)).flatten(1)
        blocks.append(product @ _raising(l, vec.dtype, vec.device))
    return torch.cat(blocks, dim=1)


def irregular_harmonics(
    vec: Float[Tensor, "edges 3"], lmax: int, width: float | None = None
) -> Float[Tensor, "edges rows"]:
    r"""Irregular solid harmonics :math:`I_{lm}(\mathbf r) = r^{-(l+1)} C_{lm}(\hat{\mathbf r})`, or smeared ones.

    .. math:: \frac1{|\mathbf b - \mathbf a|} = \sum_{lm} R_{lm}(\mathbf a)\, I_{lm}(\mathbf b), \quad a < b, \qquad
              I_L(\mathbf R + \mathbf s) = \sum_l \kappa(L, l)\,[R_l(\mathbf s) \otimes I_{L+l}(\mathbf R)]_L

    With a width, :math:`I_l = \lambda_l(r) R_l(\mathbf r)` with the factors of
    :func:`~nbody_pyg.multipoles.damping.gaussian_factors`: finite and smooth at 0, and equal beyond 12 widths.

    Args:
        vec: vectors, not 0 without a width.
        lmax: highest degree, 0 to 16.
        width: standard deviation of the Gaussian charges, angstrom; None for points.
    """
    _check_degree(lmax)
    square = vec.square().sum(1, keepdim=True)
    if width is None:
        # Kelvin's inversion: powers of 1/r, which neither overflow nor underflow in float32
        return regular_harmonics(vec / square, lmax) * square.rsqrt()
    factors = gaussian_factors(square.squeeze(1), lmax, width)
    degrees = torch.arange(lmax + 1, device=vec.device)
    spread = factors.repeat_interleave(2 * degrees + 1, dim=1, output_size=(lmax + 1) ** 2)
    return regular_harmonics(vec, lmax) * spread


def _check_degree(lmax: int) -> None:
    if not 0 <= lmax <= 2 * MAX_LMAX:
        raise ValueError(f"lmax must lie in 0 .. {2 * MAX_LMAX}, got {lmax!r}")
