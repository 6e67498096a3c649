r"""Exact hand-off of pair energies from level to level of a hierarchy with a partition of unity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbody_pyg.geometry import neighbour_list, safe_norm
from nbody_pyg.hierarchy.levels import Hierarchy, Level
from nbody_pyg.multipoles.coefficients import check_lmax
from nbody_pyg.multipoles.translations import m2l, m2m, p2m
from nbody_pyg.radial import quintic_step

#: Products of memberships that are formed at once (memory).
_CHUNK = 2_000_000
#: Entries up to which the pairs of parents are looked up in a table.
_TABLE = 20_000_000


class Exchange(NamedTuple):
    """Distances at which a level takes over from the one below: 0 up to ``start``, all from ``stop`` on (angstrom)."""

    start: float
    stop: float

    def __call__(self, r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The switch :math:`\chi(R)`, C2."""
        return quintic_step((r - self.start) / (self.stop - self.start))


def coulomb_energy(
    charges: Float[Tensor, " atoms"],
    hierarchy: Hierarchy,
    exchanges: Sequence[tuple[float, float]],
    lmax: int = 2,
) -> Float[Tensor, " graphs"]:
    r"""Coulomb energy of charges through the levels of a hierarchy, every pair counted exactly once.

    .. math:: E = \sum_{i<j} (1 - c^0_{ij}) V_{ij} + \sum_{k=1}^{K} \sum_{A<B}
              \big(\chi_k(R_{AB}) - c^k_{AB}\big) V^k_{AB}, \qquad
              c^k_{ij} = \sum_{AB} p_{iA}\, p_{jB}\, \chi_{k+1}(R_{AB}), \qquad c^K = 0

    With the partition of unity :math:`\sum_A p_{iA} = 1` this is an identity for the exact V: what level k + 1 takes of
    a pair is what level k leaves out. On the levels of parts V is the energy of two multipole expansions, truncated at
    ``lmax``; so the energy converges to the direct sum with ``lmax``, and it is as smooth as the weights. Parts without
    existence have no moments, so that they add nothing.

    ================  =================  ==============================================
    symbol            code               shape, unit
    ================  =================  ==============================================
    q                 ``charges``        (atoms,) e
    chi               ``exchanges``      (start, stop) per level of parts, angstrom
    E                 result             (graphs,) e^2/angstrom; 14.3996 eV each
    ================  =================  ==============================================

    Args:
        hierarchy: levels whose ``child_weight`` is a partition of unity (SmoothSurvivors, or any tree), root excluded.
        exchanges: at which distances each level of parts takes over. For the identity a level must have taken over
            completely where the next one begins: stop_k <= start_{k+1} - 2 reach_{k+1}, with the largest distance of a
            child from its parent as reach.
        lmax: degree of the moments.

    Open systems. Smoothness: that of the weights, C2. Equivariance: O(3), permutation.
    Cost: O(N) for the levels below the last, whose pairs end where the next level has taken over; all pairs on the
    last one, which holds a few parts only.
    Raises: ValueError: wrong number of exchanges; exchanges that overlap; charges of another length.

    Source: exact hand-off of this library (docs/hierarchies.md); multipoles as in :mod:`nbody_pyg.multipoles`.
    """
    lmax = check_lmax("lmax", lmax)
    levels = hierarchy.levels[:-1]
    if charges.shape != (levels[0].num_parts,):
        raise ValueError(f"charges must have shape [{levels[0].num_parts}], one per atom, got {list(charges.shape)}")
    steps = _check_exchanges(exchanges, levels)
    moments, energy = charges.reshape(-1, 1, 1), charges.new_zeros(hierarchy.num_graphs)
    for k, level in enumerate(levels):
        if k > 0:
            lift = p2m if k == 1 else m2m
            values = moments.squeeze(1) if k == 1 else moments
            moments = lift(values, level.child_vec, level.child_index, level.num_parts, lmax, level.child_weight)
        above = levels[k + 1] if k + 1 < len(levels) else None
        index, vec = _pairs(level, above, None if above is None else steps[k])
        # chi_k - c_k = (1 - c_k) - (1 - chi_k); both brackets vanish for all but near pairs
        weight = vec.new_ones(len(vec)) if above is None else left_over(index, level.num_parts, above, steps[k])
        if k > 0:
            weight = weight - (1.0 - steps[k - 1](safe_norm(vec)))
        field = m2l(moments, vec, index, level.num_parts, weight=weight)
        own = (field * moments).sum((1, 2))
        energy = energy.index_add(0, level.batch, own)
    return energy


def left_over(
    index: Int[Tensor, "2 pairs"], num_nodes: int, above: Level, exchange: Exchange
) -> Float[Tensor, " pairs"]:
    r"""What the level above leaves of a pair, :math:`1 - c_{ij} = \sum_{AB} p_{iA}\, p_{jB}\, (1 - \chi(R_{AB}))`."""
    child, parent = above.child_index
    order = torch.argsort(child, stable=True)
    parent, weight = parent[order], above.child_weight.index_select(0, order)
    count = torch.bincount(child, minlength=num_nodes)
    first = torch.cumsum(count, 0) - count
    near = _NearParents(above, exchange)
    found = []
    for part in torch.split(torch.arange(index.shape[1], device=index.device), _rows(count, index)):
        i, j = index[:, part]
        columns = count[j]
        width = count[i] * columns
        pair = torch.repeat_interleave(torch.arange(len(part), device=index.device), width)
        local = torch.arange(len(pair), device=index.device) - (torch.cumsum(width, 0) - width)[pair]
        columns = columns[pair]
        row = torch.div(local, columns, rounding_mode="floor")
        a, b = first[i][pair] + row, first[j][pair] + local - row * columns
        share = weight.index_select(0, a) * weight.index_select(0, b) * near(parent[a], parent[b])
        found.append(share.new_zeros(len(part)).index_add(0, pair, share))
    return torch.cat(found) if found else above.child_weight.new_zeros(0)


class _NearParents:
    """Looks up 1 - chi of pairs of parents; zero for those that are not near."""

    def __init__(self, level: Level, exchange: Exchange) -> None:
        self.size = level.num_parts
        index, _ = neighbour_list(level.pos.detach(), exchange.stop, level.batch, allow_coincident=True)
        vec = level.pos.index_select(0, index[0]) - level.pos.index_select(0, index[1])
        itself = torch.arange(self.size, device=index.device)
        key = torch.cat([index[0] * self.size + index[1], itself * (self.size + 1)])
        value = torch.cat([1.0 - exchange(safe_norm(vec)), vec.new_ones(self.size)])
        self.table = self.key = None
        if self.size**2 <= _TABLE:
            self.table = value.new_zeros(self.size**2).index_add(0, key, value)
        else:
            order = torch.argsort(key)
            self.key, self.value = key[order], torch.cat([value.index_select(0, order), value.new_zeros(1)])

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        wanted = a * self.size + b
        if self.table is not None:
            return self.table.index_select(0, wanted)
        place = torch.searchsorted(self.key, wanted).clamp(max=len(self.key) - 1)
        return self.value.index_select(0, torch.where(self.key[place] == wanted, place, len(self.key)))


def _rows(count: Tensor, index: Tensor) -> int:
    """Pairs per chunk, so that a chunk holds a few million products."""
    size = float((count[index[0]] * count[index[1]]).double().mean()) if index.numel() else 1.0
    return max(1, int(_CHUNK / max(1.0, size)))


def _reach(level: Level) -> float:
    """Largest distance of a child that gives anything to its parent."""
    held = level.child_weight.detach() > 0
    return float(safe_norm(level.child_vec.detach()[held]).max()) if bool(held.any()) else 0.0


def _pairs(level: Level, above: Level | None, exchange: Exchange | None) -> tuple[Tensor, Tensor]:
    """Pairs of one level, each once, that the level above does not take over completely, and their vectors."""
    if above is None:
        cutoff = float((level.pos.detach().amax(0) - level.pos.detach().amin(0)).norm()) + 1.0
    else:
        cutoff = exchange.stop + 2.0 * _reach(above)
    index, _ = neighbour_list(level.pos.detach(), cutoff, level.batch, allow_coincident=level.child_index is not None)
    index = index[:, index[0] < index[1]]
    vec = level.pos.index_select(0, index[0]) - level.pos.index_select(0, index[1])
    return index, vec


def _check_exchanges(exchanges: Sequence[tuple[float, float]], levels: Sequence[Level]) -> list[Exchange]:
    if len(exchanges) != len(levels) - 1:
        raise ValueError(
            f"exchanges must hold one (start, stop) per level of parts ({len(levels) - 1}), got {list(exchanges)!r}"
        )
    steps = [Exchange(float(start), float(stop)) for start, stop in exchanges]
    for k, step in enumerate(steps):
        if not 0 < step.start < step.stop:
            raise ValueError(f"exchanges[{k}] must be 0 < start < stop in angstrom, got {tuple(step)}")
        if k + 1 < len(steps):
            reach = _reach(levels[k + 2])
            if steps[k + 1].start - 2.0 * reach < step.stop:
                raise ValueError(
                    f"exchanges[{k + 1}] must start {2 * reach:.2f} angstrom (twice the reach of its parts) beyond "
                    f"the stop of exchanges[{k}] at {step.stop:g}, so that no pair is lost between the levels, got "
                    f"{steps[k + 1].start:g}; raise it"
                )
    return steps
