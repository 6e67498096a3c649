r"""Coefficients of the multipole algebra: couplings of highest (stretched) degree, and two square roots.

All translations of multipoles are Clebsch-Gordan products of degrees l1, l2 and l1 + l2. In the basis of e3nn (real,
order x, y, z for degree 1) the coupling coefficients are e3nn's 3j symbols up to a sign for each triple, which is
fixed here by what it must do: the coupled product of the harmonics of one vector is a positive multiple of the
harmonics of that vector, as in the standard convention.
"""

from __future__ import annotations

import math

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import constant_table

#: Highest degree of multipoles and local fields.
MAX_LMAX = 8
#: e3nn tabulates harmonics up to this degree; beyond it the sign of a degree is free.
_E3NN_HARMONICS = 11


def alpha(l1: int, l2: int) -> float:
    r"""Weight of regular translations, :math:`\alpha = \sqrt{\binom{2 l_1 + 2 l_2}{2 l_1}}`.

    >>> alpha(0, 3), round(alpha(1, 1) ** 2, 12)
    (1.0, 6.0)
    """
    return math.sqrt(math.comb(2 * l1 + 2 * l2, 2 * l1))


def kappa(upper: int, l: int) -> float:
    r"""Weight of irregular translations, :math:`\kappa(L, l) = \sqrt{\binom{2 L + 2 l + 1}{2 l}}`.

    >>> kappa(2, 0), round(kappa(0, 1) ** 2, 12)
    (1.0, 3.0)
    """
    return math.sqrt(math.comb(2 * upper + 2 * l + 1, 2 * l))


@constant_table
def raising_table(l: int) -> Float[Tensor, "rows_below 3 rows"]:
    r"""Table (2l-1, 3, 2l+1), float64, that takes :math:`R_{l-1} \otimes \mathbf r` to :math:`R_l`, for l >= 1."""
    # <l-1 0 1 0 | l 0> = sqrt(l / (2l - 1)) makes the product one of Racah's harmonics again
    table: Tensor = o3.wigner_3j(l - 1, 1, l, dtype=torch.float64) * math.sqrt((2 * l + 1) * (2 * l - 1) / l)
    if l > _E3NN_HARMONICS:
        return table
    probe = torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64)
    below, here = (_e3nn_harmonics(probe, k) for k in (l - 1, l))
    return table * torch.einsum("a,b,abc,c->", below, probe, table, here).sign()


def _e3nn_harmonics(vec: Tensor, l: int) -> Tensor:
    harmonics: Tensor = o3.spherical_harmonics(l, vec, normalize=False, normalization="norm")
    return harmonics


@constant_table
def _probe_harmonics(l: int) -> Tensor:
    """Harmonics of one generic direction, by the recursion that defines their signs."""
    probe = torch.tensor([0.48, -0.60, 0.64], dtype=torch.float64)
    if l == 0:
        return torch.ones(1, dtype=torch.float64)
    return torch.einsum("a,b,abc->c", _probe_harmonics(l - 1), probe, raising_table(l))


@constant_table
def stretched_coupling(l1: int, l2: int) -> Float[Tensor, "rows1 rows2 rows"]:
    r"""Clebsch-Gordan coefficients :math:`\langle l_1 m_1\, l_2 m_2 | l_1 + l_2, m \rangle` in e3nn's real basis.

    Shape (2 l1 + 1, 2 l2 + 1, 2 (l1 + l2) + 1), float64. The sign is that of the standard convention:

    .. math:: [R_{l_1}(\mathbf r) \otimes R_{l_2}(\mathbf r)]_{l_1 + l_2} = c\, R_{l_1 + l_2}(\mathbf r), \quad c > 0

    >>> tuple(stretched_coupling(1, 2).shape)
    (3, 5, 7)
    """
    l = l1 + l2
    table: Tensor = o3.wigner_3j(l1, l2, l, dtype=torch.float64) * math.sqrt(2 * l + 1)
    harmonics = (_probe_harmonics(k) for k in (l1, l2, l))
    return table * torch.einsum("a,b,c,abc->", *harmonics, table).sign()


def rows(lmax: int) -> int:
    """Number of components of the degrees 0 .. lmax."""
    return (lmax + 1) ** 2


def block(l: int) -> slice:
    """Where the components of degree l stand."""
    return slice(l * l, (l + 1) ** 2)


@constant_table
def shift_table(lmax_in: int, lmax_out: int) -> Float[Tensor, "rows_h rows_out rows_in"]:
    r"""M2M: :math:`\alpha(l_1, l_2) \langle l_1 m_1 l_2 m_2 | l m \rangle` at [l1 m1, l m, l2 m2], l = l1 + l2."""
    table = torch.zeros(rows(lmax_out), rows(lmax_out), rows(lmax_in), dtype=torch.float64)
    for l2 in range(lmax_in + 1):
        for l1 in range(lmax_out - l2 + 1):
            coupling = alpha(l1, l2) * stretched_coupling(l1, l2)
            table[block(l1), block(l1 + l2), block(l2)] = coupling.permute(0, 2, 1)
    return table


@constant_table
def descend_table(lmax_in: int, lmax_out: int) -> Float[Tensor, "rows_h rows_out rows_in"]:
    """L2L: the transpose of M2M, with (-1)^l2 for a vector that points from the target to the source."""
    signs = torch.cat([torch.full((2 * l + 1,), (-1.0) ** l, dtype=torch.float64) for l in range(lmax_in + 1)])
    return signs[:, None, None] * shift_table(lmax_out, lmax_in).transpose(1, 2)


@constant_table
def interaction_table(lmax_in: int, lmax_out: int) -> Float[Tensor, "rows_h rows_out rows_in"]:
    r"""M2L: :math:`\kappa(L, l) \langle l m\, L{+}l\, m' | L M \rangle` at [L+l m', L M, l m].

    The coupling to the lower degree is the stretched one with its factors exchanged.
    """
    table = torch.zeros(rows(lmax_in + lmax_out), rows(lmax_out), rows(lmax_in), dtype=torch.float64)
    for upper in range(lmax_out + 1):
        for l in range(lmax_in + 1):
            factor = (-1) ** l * kappa(upper, l) * math.sqrt((2 * upper + 1) / (2 * (upper + l) + 1))
            table[block(upper + l), block(upper), block(l)] = factor * stretched_coupling(l, upper).permute(2, 1, 0)
    return table


def check_lmax(name: str, lmax: int) -> int:
    """Raise ValueError unless 0 <= lmax <= :data:`MAX_LMAX`."""
    if isinstance(lmax, bool) or not isinstance(lmax, int) or not 0 <= lmax <= MAX_LMAX:
        raise ValueError(f"{name} must be an integer from 0 to {MAX_LMAX}, got {lmax!r}; 4 is accurate to about 1e-4")
    return lmax
