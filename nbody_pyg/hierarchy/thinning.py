"""Smooth thinning of points, and the partition of unity that divides every point among the survivors near it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbody_pyg.radial import plateau_window, quintic_step

#: Fraction of the radius within which a survivor excludes others completely.
PLATEAU = 0.7
#: Sum of windows from which on a node is excluded. With values below 1 each step is steeper, and fewer parts have a
#: tiny weight.
DECIDED = 0.8
#: Points belong to a survivor up to this multiple of the radius within which it suppresses others.
REACH = 1.35
#: Sum of windows from which on a point belongs to survivors completely.
FILLED = 0.5


def thin(
    priority: Float[Tensor, " nodes"],
    existence: Float[Tensor, " nodes"],
    index: Int[Tensor, "2 edges"],
    r: Float[Tensor, " edges"],
    radius: float,
    rounds: int,
    width: float,
) -> Float[Tensor, " nodes"]:
    r"""Survival :math:`s_i \in [0, 1]`: a smooth form of Luby's maximal independent set.

    .. math:: d_i = \sum_{j} u_j\, S\Big(\frac{\pi_j - \pi_i}{\Delta}\Big)\, w(r_{ij}), \qquad
              s_i \leftarrow s_i + (1 - s_i)\, u_i\, S\Big(1 - \frac{d_i}{D}\Big), \qquad
              u_i = g_i\, S\Big(1 - \frac1D \big(s_i + \textstyle\sum_k s_k w(r_{ik})\big)\Big), \qquad D = 0.8

    In each round a node survives unless an undecided neighbour has the higher priority, and then excludes the nodes
    near it. The window w is 1 up to 0.7 ``radius`` and 0 beyond ``radius``. A priority that is higher by
    ``width`` wins completely; at equal priorities neither does, so equivalent atoms have equal weights: all of them
    survive, or none does.

    Every step multiplies slopes by up to 15/8, and rounds and levels are composed, so the steps are chosen as flat as
    possible. Steps that decide more (flat up to 0.1 and from 0.9 on, and once more for
    :math:`s_i`) leave a third fewer parts, whose weights change five to ten times as fast.

    Args:
        priority: :math:`\pi`; differences below ``width`` are partial.
        existence: g, 1 for atoms; an upper bound of the survival.
        index: pairs in both directions, those beyond ``radius`` may be left out.
        r: their distances, angstrom.
        radius: angstrom.
        rounds: number of rounds; long chains of decreasing priorities stay undecided after them, see :func:`share_out`.
        width: :math:`\Delta`.

    Smoothness: C2. Cost: O(rounds x edges).
    Source: after M. Luby, "A simple parallel algorithm for the maximal independent set problem" (1986); the smooth
    steps and the treatment of ties are ours.
    """
    near = (r.detach() < radius).nonzero().squeeze(1)
    source, target = index.index_select(1, near)
    window = plateau_window(r.index_select(0, near), PLATEAU * radius, radius)
    lead = priority.index_select(0, source) - priority.index_select(0, target)
    wins = quintic_step(lead / width) * window
    undecided, survival = existence, torch.zeros_like(existence)
    for turn in range(rounds):
        stronger = _sum(undecided.index_select(0, source) * wins, target, survival)
        survival = survival + (1.0 - survival) * undecided * quintic_step(1.0 - stronger / DECIDED)
        if turn + 1 < rounds:
            taken = _sum(survival.index_select(0, source) * window, target, survival)
            undecided = existence * quintic_step(1.0 - (survival + taken) / DECIDED)
    return survival


class Share(NamedTuple):
    """Division of nodes among survivors.

    =============  ========  ===========================================================================
    field          shape     meaning
    =============  ========  ===========================================================================
    existence      [nodes]   g of the part that would be centred on each node
    fill           [nodes]   factor of the windows, :math:`S(Z_j / Z_0) / Z_j`
    alone          [nodes]   share without survivor, :math:`1 - S(Z_j / Z_0)`: it stays a separate part
    =============  ========  ===========================================================================
    """

    existence: Tensor
    fill: Tensor
    alone: Tensor


def share_out(
    survival: Float[Tensor, " nodes"],
    existence: Float[Tensor, " nodes"],
    index: Int[Tensor, "2 edges"],
    r: Float[Tensor, " edges"],
    radius: float,
) -> Share:
    r"""Divide every node among the survivors around it; see :func:`membership` for the weights on edges.

    .. math:: Z_j = s_j + \sum_A s_A\, W(r_{jA}), \qquad
              g'_A = s_A + (1 - s_A)\, g_A\, \big(1 - S(Z_A / Z_0)\big), \qquad Z_0 = 1/2

    with a window W that is 1 up to ``radius`` and 0 beyond 1.35 ``radius``.

    Smoothness: C2. Cost: O(edges).
    """
    near = (r.detach() < REACH * radius).nonzero().squeeze(1)
    source, target = index.index_select(1, near)
    window = plateau_window(r.index_select(0, near), radius, REACH * radius)
    total = survival + _sum(survival.index_select(0, source) * window, target, survival)
    t = (total / FILLED).clamp(max=1.0)
    # S(t) / t is a polynomial, so nothing is divided by a small sum.
    fill = torch.where(total < FILLED, t * t * (10.0 + t * (6.0 * t - 15.0)) / FILLED, 1.0 / total.clamp(min=FILLED))
    alone = quintic_step(1.0 - t)
    return Share(survival + (1.0 - survival) * existence * alone, fill, alone)


def membership(
    share: Share,
    survival: Float[Tensor, " nodes"],
    existence: Float[Tensor, " nodes"],
    child: Int[Tensor, " edges"],
    centre: Int[Tensor, " edges"],
    r: Float[Tensor, " edges"],
    itself: Tensor,
    radius: float,
) -> tuple[Float[Tensor, " edges"], Float[Tensor, " edges"]]:
    r"""Weights of edges from nodes to the nodes on which parts are centred: (p, pooling weight).

    .. math:: p_{jA} = s_A W(r_{jA}) \frac{S(Z_j / Z_0)}{Z_j} + \delta_{jA} \big(1 - S(Z_j / Z_0)\big), \qquad
              \sum_A p_{jA} = 1, \qquad \hat p_{jA} = g_j\, p_{jA} / g'_A

    p is the fraction of the child in each parent; :math:`\hat p` is its share of a parent with partial existence. It
    stays finite where the parent vanishes, because :math:`s_A` cancels.
    """
    window = plateau_window(r, radius, REACH * radius) * share.fill.index_select(0, child)
    alone = share.alone.index_select(0, child) * itself.to(r.dtype)
    g, s = share.existence.index_select(0, centre), survival.index_select(0, centre)
    exists = g > 0
    whole = torch.where(exists, g, torch.ones_like(g))
    survived = torch.where(exists, s / whole, torch.ones_like(g))
    pooled = existence.index_select(0, child) * (survived * window + alone / whole)
    return s * window + alone, pooled


def _sum(values: Tensor, target: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add(0, target, values)
