"""FastMultipole: the fast multipole method over a user's boxes, the yardstick of the learned one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbody_pyg.geometry import ragged
from nbody_pyg.multipoles.coefficients import check_lmax
from nbody_pyg.multipoles.translations import l2l, l2p, m2l, m2m, p2m
from nbody_pyg.required import required


class Boxes(NamedTuple):
    """One level of boxes: ``parent_of`` maps what lies below (points or boxes) to them.

    ==============  =======================================
    field           shape
    ==============  =======================================
    parent_of       (below,): box of each point or box below
    centre          (boxes, 3): mean of its points, angstrom
    radius          (boxes,): distance to its farthest point
    ==============  =======================================
    """

    parent_of: Tensor
    centre: Tensor
    radius: Tensor


class FastMultipole:
    r"""Potential of charges by P2M, M2M, M2L, L2L and L2P over boxes that the user gives.

    .. math:: \phi_i = \sum_{j \ne i} \frac{q_j}{|\mathbf r_i - \mathbf r_j|}

    Two boxes are well separated when the distance of their centres exceeds ``separation`` times the sum of their radii.
    Every pair of charges is counted once: at the coarsest level where their boxes are well separated, or else directly.
    The error falls as :math:`(1/\text{separation})^{l_\max + 1}`.

    A reference, not the scheme of a potential: hard boxes make the energy jump when a charge changes its box. All pairs
    of boxes are looked at on the coarsest level only, below it those whose parents are near: the cost is linear in the
    points where boxes hold a bounded number of points or boxes each, and the coarsest level a bounded number of them.

    Args:
        lmax: highest degree of moments and fields, 0 to 8.
        separation: how far apart boxes must be, in units of the sum of their radii; above 1.

    Raises: ValueError: ``lmax`` out of range, ``separation`` not above 1, labels of the wrong shape or not nested.

    Example:
        >>> pos, charges = torch.rand(200, 3).double(), torch.randn(200).double()
        >>> labels = (pos * 4).long() @ torch.tensor([16, 4, 1])
        >>> fast, exact = FastMultipole(4, 2.0).potential(charges, pos, labels), direct_potential(charges, pos)
        >>> bool((fast - exact).norm() < 1e-2 * exact.norm())
        True
    """

    def __init__(self, lmax: int = 4, separation: float = 1.5) -> None:
        self.lmax = check_lmax("lmax", lmax)
        if not (math.isfinite(separation) and separation > 1):
            raise ValueError(f"separation must be above 1, got {separation!r}; 1.5 is usual")
        self.separation = float(separation)

    def potential(
        self, charges: Float[Tensor, " points *channels"], pos: Float[Tensor, "points 3"], labels: Int[Tensor, "*shape"]
    ) -> Float[Tensor, " points *channels"]:
        """Potential at every point, e/angstrom, differentiable.

        Args:
            charges: one value for each point, or several channels, e.
            pos: positions, angstrom.
            labels: box of each point, [points], or nested boxes, [points, levels], finest first.
        """
        values = charges.reshape(charges.shape[0], -1)
        levels = self._boxes(pos, labels)
        moments, centre = [], pos
        for k, boxes in enumerate(levels):
            index = torch.stack([torch.arange(centre.shape[0], device=pos.device), boxes.parent_of])
            vec = centre - boxes.centre[boxes.parent_of]
            size = boxes.centre.shape[0]
            if k == 0:
                moments.append(p2m(values, vec, index, size, self.lmax))
            else:
                moments.append(m2m(moments[-1], vec, index, size))
            centre = boxes.centre
        near, field = None, None
        for k in reversed(range(len(levels))):
            boxes = levels[k]
            index, near = self._split(boxes, None if near is None else _inherit(near, levels[k + 1]))
            vec = boxes.centre[index[0]] - boxes.centre[index[1]]
            here = m2l(moments[k], vec, index, boxes.centre.shape[0])
            if field is not None:
                above = levels[k + 1]
                down = torch.stack([above.parent_of, torch.arange(above.parent_of.shape[0], device=pos.device)])
                here = here + l2l(field, above.centre[down[0]] - boxes.centre, down, boxes.centre.shape[0])
            field = here
        finest = levels[0]
        down = torch.stack([finest.parent_of, torch.arange(pos.shape[0], device=pos.device)])
        result = l2p(required(field), finest.centre[down[0]] - pos, down, pos.shape[0])
        close = _inherit(required(near), finest)
        close = close[:, close[0] != close[1]]
        result = result + m2l(values.unsqueeze(1), pos[close[0]] - pos[close[1]], close, pos.shape[0]).squeeze(1)
        return result.reshape(charges.shape)

    def energy(
        self, charges: Float[Tensor, " points *channels"], pos: Float[Tensor, "points 3"], labels: Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*channels"]:
        r"""Energy :math:`\frac12 \sum_i q_i \phi_i` of each channel, e^2/angstrom."""
        return 0.5 * (charges * self.potential(charges, pos, labels)).sum(0)

    def _boxes(self, pos: Tensor, labels: Tensor) -> list[Boxes]:
        if labels.is_floating_point() or labels.dim() not in (1, 2) or labels.shape[0] != pos.shape[0]:
            raise ValueError(
                f"labels must be integers of shape [{pos.shape[0]}] or [{pos.shape[0]}, levels], got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        found, below = [], torch.arange(pos.shape[0], device=pos.device)
        for number, label in enumerate(labels.reshape(pos.shape[0], -1).unbind(1)):
            box = torch.unique(label, return_inverse=True)[1]
            size = int(box.max()) + 1
            count = torch.bincount(box, minlength=size).to(pos.dtype)
            centre = pos.new_zeros(size, 3).index_add(0, box, pos) / count.unsqueeze(1)
            reach = (pos.detach() - centre.detach()[box]).norm(dim=1)
            radius = pos.new_zeros(size).scatter_reduce(0, box, reach, "amax")
            parent_of = box.new_zeros(int(below.max()) + 1).scatter(0, below, box)
            if bool((parent_of[below] != box).any()):
                raise ValueError(f"labels must be nested, finest first, but column {number} splits a box of the last")
            found.append(Boxes(parent_of, centre, radius))
            below = box
        return found

    def _split(self, boxes: Boxes, pairs: Int[Tensor, "2 pairs"] | None) -> tuple[Tensor, Tensor]:
        """Of the pairs that no coarser level has settled, those to settle here and those to leave to finer levels."""
        if pairs is None:
            here = torch.arange(boxes.centre.shape[0], device=boxes.centre.device)
            pairs = torch.cartesian_prod(here, here).t()
        one, other = pairs
        centre = boxes.centre.detach()
        apart = (centre[one] - centre[other]).norm(dim=1) > self.separation * (boxes.radius[one] + boxes.radius[other])
        return pairs[:, apart], pairs[:, ~apart]

    def __repr__(self) -> str:
        return f"FastMultipole(lmax={self.lmax}, separation={self.separation})"


def _inherit(near: Int[Tensor, "2 pairs"], boxes: Boxes) -> Int[Tensor, "2 _"]:
    """Pairs below whose parents are near each other: all children of the one with all of the other."""
    order = torch.argsort(boxes.parent_of, stable=True)
    count = torch.bincount(boxes.parent_of, minlength=boxes.centre.shape[0])
    first = torch.cumsum(count, 0) - count
    pair, place = ragged(count[near[0]] * count[near[1]])
    one, other = near[:, pair]
    rows = torch.div(place, count[other], rounding_mode="floor")
    return torch.stack([order[first[one] + rows], order[first[other] + place % count[other]]])


def all_pairs(batch: Int[Tensor, " points"] | int, device: torch.device | str | None = None) -> Int[Tensor, "2 pairs"]:
    """All ordered pairs of points of one graph, without a point and itself, sorted by target, then source.

    Args:
        batch: graph of each point, ascending; or the number of points of one graph.
        device: where the pairs live, for a number of points.

    >>> all_pairs(2)
    tensor([[1, 0],
            [0, 1]])
    """
    if isinstance(batch, int):
        batch = torch.zeros(batch, dtype=torch.long, device=device)
    count = torch.bincount(batch)
    first = torch.cumsum(count, 0) - count
    target, place = ragged(count[batch])
    source = first[batch[target]] + place
    keep = source != target
    return torch.stack([source[keep], target[keep]])


def direct_potential(
    charges: Float[Tensor, " points *channels"],
    pos: Float[Tensor, "points 3"],
    batch: Int[Tensor, " points"] | None = None,
    width: float | None = None,
) -> Float[Tensor, " points *channels"]:
    r"""Potential of all other charges by summing over all pairs: exact, O(N^2).

    Args:
        charges: one value for each point, or several channels, e.
        pos: positions, angstrom.
        batch: graph of each point; points of different graphs do not see each other.
        width: smear the charges (:func:`~nbody_pyg.multipoles.irregular_harmonics`); None for points.
    """
    index = all_pairs(pos.shape[0] if batch is None else batch, pos.device)
    values = charges.reshape(charges.shape[0], 1, -1)
    result = m2l(values, pos[index[0]] - pos[index[1]], index, pos.shape[0], width=width)
    return result.reshape(charges.shape)
