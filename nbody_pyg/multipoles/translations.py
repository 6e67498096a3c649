r"""Translations of multipole moments and local fields: P2M, M2M, M2L, L2L, L2P.

Each is a Clebsch-Gordan product with solid harmonics of one vector for each edge, followed by a sum over the edges of
a target. All have the interface of a gate: values of the sources, vectors *source minus target*, ``index`` with the
sources in row 0 and the targets in row 1, the number of targets, and a weight for each edge (a membership, a window).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import constant_table
from nbody_pyg.multipoles import coefficients
from nbody_pyg.multipoles.coefficients import check_lmax
from nbody_pyg.multipoles.harmonics import irregular_harmonics, regular_harmonics


@constant_table
def _table(name: str, lmax_in: int, lmax_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of :mod:`~nbody_pyg.multipoles.coefficients` as a matrix (harmonics, rows_out * rows_in)."""
    exact: Tensor = getattr(coefficients, name)(lmax_in, lmax_out)
    return exact.flatten(1).to(device=device, dtype=dtype)


def degree_of(values: Float[Tensor, "nodes rows channels"]) -> int:
    """Highest degree of values with (lmax + 1)^2 rows. Raises ValueError for any other number of rows."""
    lmax = math.isqrt(values.shape[1]) - 1 if values.dim() == 3 else -1
    if lmax < 0 or (lmax + 1) ** 2 != values.shape[1]:
        raise ValueError(
            f"values must have shape [nodes, (lmax + 1)^2, channels], got {list(values.shape)}; charges alone are "
            "values of lmax 0: charges.view(-1, 1, 1)"
        )
    return check_lmax("the degree of values", lmax)


def _translate(
    name: str,
    values: Tensor,
    harmonics: Tensor,
    index: Tensor,
    num_targets: int,
    lmax_out: int,
    weight: Tensor | None,
    factors: Tensor | None,
) -> Tensor:
    source, target = index
    table = _table(name, degree_of(values), lmax_out, values.dtype, values.device)
    if factors is not None:
        table = table * _by_rows(factors, lmax_out, degree_of(values)).flatten()
    matrices = (harmonics @ table).view(source.shape[0], coefficients.rows(lmax_out), values.shape[1])
    if weight is not None:
        matrices = matrices * weight.view(-1, 1, 1)
    messages = torch.bmm(matrices, values.index_select(0, source))
    return messages.new_zeros(num_targets, *messages.shape[1:]).index_add(0, target, messages)


def _by_rows(factors: Tensor, lmax_out: int, lmax_in: int) -> Tensor:
    """A number for each pair of degrees (result, source), repeated for their components."""
    if factors.shape != (lmax_out + 1, lmax_in + 1):
        raise ValueError(
            f"factors must have shape [{lmax_out + 1}, {lmax_in + 1}], degrees of the result and of the values, got "
            f"{list(factors.shape)}"
        )
    out, inner = (
        torch.arange(lmax + 1, device=factors.device).repeat_interleave(
            2 * torch.arange(lmax + 1, device=factors.device) + 1, output_size=coefficients.rows(lmax)
        )
        for lmax in (lmax_out, lmax_in)
    )
    return factors.index_select(0, out).index_select(1, inner)


def m2m(
    values: Float[Tensor, "sources rows_in channels"],
    vec: Float[Tensor, "edges 3"],
    index: Int[Tensor, "2 edges"],
    num_targets: int,
    lmax: int | None = None,
    weight: Float[Tensor, " edges"] | None = None,
    factors: Float[Tensor, "degrees_out degrees_in"] | None = None,
) -> Float[Tensor, "targets rows channels"]:
    r"""Multipole moments about the centres of the parents, from those about the centres of the children.

    .. math:: M_l(\mathbf c') = \sum_{l_1 + l_2 = l} \alpha(l_1, l_2)\,
              [R_{l_1}(\mathbf c - \mathbf c') \otimes M_{l_2}(\mathbf c)]_l

    Exact for the degrees that the children have. With children of degree 0 (charges) or 1 (charges and dipoles, in
    the order x, y, z) this is P2M.

    Args:
        values: moments of the sources.
        vec: centre of the source minus centre of the target, angstrom.
        index: sources in row 0, targets in row 1.
        num_targets: number of targets.
        lmax: highest degree of the result; None for that of ``values``.
        weight: factor of each edge.
        factors: a number for each degree of the result and of the values, times its coefficient; None for 1.

    Smoothness: polynomial in ``vec``. Equivariance: O(3). Cost: O(edges lmax^4 (lmax^2 + channels)).
    """
    lmax = degree_of(values) if lmax is None else check_lmax("lmax", lmax)
    if lmax < degree_of(values):
        values = values[:, : coefficients.rows(lmax)]
    return _translate("shift_table", values, regular_harmonics(vec, lmax), index, num_targets, lmax, weight, factors)


def p2m(
    charges: Float[Tensor, "sources channels"],
    vec: Float[Tensor, "edges 3"],
    index: Int[Tensor, "2 edges"],
    num_targets: int,
    lmax: int,
    weight: Float[Tensor, " edges"] | None = None,
) -> Float[Tensor, "targets rows channels"]:
    r"""Moments of point charges, :math:`M_{lm}(\mathbf c) = \sum_j q_j R_{lm}(\mathbf r_j - \mathbf c)`.

    Args: ``charges`` in e; the others as for :func:`m2m`. Smoothness: polynomial, also for a charge at the centre.

    Example:
        >>> index, vec = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
        >>> p2m(torch.tensor([[0.5], [-0.5]]), vec, index, 1, lmax=1).flatten()
        tensor([0., 0., 0., 1.])
    """
    return m2m(charges.unsqueeze(1), vec, index, num_targets, lmax, weight)


def m2l(
    values: Float[Tensor, "sources rows_in channels"],
    vec: Float[Tensor, "edges 3"],
    index: Int[Tensor, "2 edges"],
    num_targets: int,
    lmax: int | None = None,
    weight: Float[Tensor, " edges"] | None = None,
    width: float | None = None,
    factors: Float[Tensor, "degrees_out degrees_in"] | None = None,
) -> Float[Tensor, "targets rows channels"]:
    r"""Local field of distant multipoles, :math:`\phi(\mathbf x) = \sum_{lm} L_{lm} R_{lm}(\mathbf x - \mathbf d)`.

    .. math:: L_L(\mathbf d) = \sum_l \kappa(L, l)\, [M_l(\mathbf c) \otimes I_{L+l}(\mathbf c - \mathbf d)]_L

    The potential is that of 1/r, in e/angstrom. Exact as it stands: what is lost is the degrees above ``lmax``.
    With ``lmax=0`` it is the potential of multipoles at a point.

    Args:
        values: moments of the sources.
        vec: centre of the source minus that of the target, angstrom; must not be 0 without a width.
        index: sources in row 0, targets in row 1.
        num_targets: number of targets.
        lmax: highest degree of the field; None for that of ``values``.
        weight: factor of each edge.
        width: smear the charges, see :func:`~nbody_pyg.multipoles.irregular_harmonics`.
        factors: as for :func:`m2m`.

    Smoothness: C-infinity for vec != 0, with a width everywhere. Equivariance: O(3).
    """
    upper = degree_of(values)
    lmax = upper if lmax is None else check_lmax("lmax", lmax)
    harmonics = irregular_harmonics(vec, upper + lmax, width)
    return _translate("interaction_table", values, harmonics, index, num_targets, lmax, weight, factors)


def l2l(
    values: Float[Tensor, "sources rows_in channels"],
    vec: Float[Tensor, "edges 3"],
    index: Int[Tensor, "2 edges"],
    num_targets: int,
    lmax: int | None = None,
    weight: Float[Tensor, " edges"] | None = None,
    factors: Float[Tensor, "degrees_out degrees_in"] | None = None,
) -> Float[Tensor, "targets rows channels"]:
    r"""Local fields about other centres: from the parents (sources) down to the children (targets).

    .. math:: L_{l_1}(\mathbf d') = \sum_{l_2} (-1)^{l_2} \sqrt{\tfrac{2l+1}{2l_1+1}}\, \alpha(l_1, l_2)\,
              [L_{l_1 + l_2}(\mathbf d) \otimes R_{l_2}(\mathbf d' - \mathbf d)]_{l_1}

    Exact. The way up reversed: ``index.flip(0)`` and ``-vec``.

    Args: as for :func:`m2m`; vec is the centre of the source (parent) minus that of the target (child).
    """
    upper = degree_of(values)
    lmax = upper if lmax is None else check_lmax("lmax", lmax)
    return _translate("descend_table", values, regular_harmonics(vec, upper), index, num_targets, lmax, weight, factors)


def l2p(
    values: Float[Tensor, "sources rows_in channels"],
    vec: Float[Tensor, "edges 3"],
    index: Int[Tensor, "2 edges"],
    num_targets: int,
    weight: Float[Tensor, " edges"] | None = None,
) -> Float[Tensor, "targets channels"]:
    r"""Potential at points, :math:`\phi(\mathbf x) = \sum_{lm} L_{lm} R_{lm}(\mathbf x - \mathbf d)`, e/angstrom.

    Args: as for :func:`l2l`.
    """
    return l2l(values, vec, index, num_targets, 0, weight).squeeze(1)
