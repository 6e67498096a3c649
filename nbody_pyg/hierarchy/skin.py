"""TopologyCache: neighbour lists with a skin, kept from step to step of a trajectory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.geometry import complete_cell
from nbody_pyg.hierarchy.levels import EdgeSet
from nbody_pyg.hierarchy.positions import child_vectors
from nbody_pyg.hierarchy.scheme import Scheme
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.required import required
from nbody_pyg.system import System


class TopologyCache:
    r"""The topology of a moving system, searched again only when necessary.

    Lists are searched by :math:`R + s` with a skin s. They hold every pair nearer than R for as long as

    .. math:: 2 \max_i |u_i| \le \sigma (R + s) - R, \qquad u_i = r_i - r^0_i F, \quad F = C_0^{-1} C,
              \quad \sigma = \min(1, \sigma_\mathrm{min}(F))

    where :math:`r^0, C_0` are positions and cell of the search and R the largest radius: without a change of the
    cell, until an atom has moved by s/2. Centres of parts are means of atoms, so they do not move further. From a kept
    list each call selects the edges within R by one comparison of lengths, in the order of a new search: results equal
    those of a search at every step, to round-off.

    ======================  ==================================================================================
    since the last call     what happens
    ======================  ==================================================================================
    atoms within the skin   the kept lists are used
    further, other parts    new search (:meth:`Scheme.compose`), or for the parts of ``start``
                            (:meth:`Scheme.rebuild`)
    other atoms or inputs   likewise, and ``start`` is called again; inputs are pbc, given bonds and labels, and the
                            number of graphs
    ======================  ==================================================================================

    Results do not depend on earlier calls. Without ``start`` the parts are those found at the current positions
    (:meth:`Scheme.holds` tests whether they equal the kept ones); with it they are always those of ``start``. Schemes
    that cannot widen their lists (:meth:`Scheme.widened` returns None) search at every call.

    Args:
        scheme: the scheme of the topology.
        skin: s, angstrom; 0 searches at every call.
        carry_on: without effect, as parts no longer depend on earlier calls; will be removed.
        start: called with ``z`` and ``pbc`` for new atoms: a topology whose parts are kept, or None for those that the
            scheme finds at each position.
        trim: return only the edges within R. Otherwise the kept lists are returned unchanged: the same tensors until
            the next search, with edges beyond R, whose windows are zero.

    The attributes ``calls`` and ``rebuilds`` count calls and searches; ``topology`` is the result of the last call,
    ``parts`` that of ``start`` for its atoms.

    Smoothness: that of the scheme. Cost: O(edges) for a kept list.
    Raises: ValueError: ``skin`` is negative or not finite.
    """

    def __init__(
        self,
        scheme: Scheme,
        skin: float = 0.5,
        carry_on: float | None = None,
        start: Callable[[Tensor, Tensor | None], Topology | None] | None = None,
        trim: bool = True,
    ) -> None:
        if not 0 <= skin < float("inf"):
            raise ValueError(f"skin must be a length in angstrom, 0 or above, got {skin!r}; try 0.5")
        refuse_carry_on(carry_on)
        self.scheme, self.skin, self.trim, self._start = scheme, float(skin), trim, start
        self._wide = scheme.widened(self.skin) if self.skin > 0 else None
        radii = [radius for pair in scheme.list_radii() for radius in pair if radius is not None]
        self._reach = max(radii, default=0.0)
        self.rebuilds = self.calls = 0
        self.forget()

    def forget(self) -> None:
        """Build everything again at the next call."""
        self.topology: Topology | None = None
        self._kept: Topology | None = None
        self.parts: Topology | None = None
        self._identity: dict[str, Any] = {}
        self._origin: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, *atoms: Any) -> Topology:
        """The topology of a :class:`~nbody_pyg.system.System`, or of tensors as for :meth:`Scheme.topology`.

        Bonds and labels are read from ``given`` of the system; a topology that it holds is not used.
        """
        system = (atoms[0] if isinstance(atoms[0], System) else System.from_tensors(*atoms)).detached()
        self.calls += 1
        identity = {"z": system.z, "batch": system.batch, "pbc": system.pbc, "graphs": system.num_graphs}
        identity |= {f"given {key}": value for key, value in system.given.items()}
        known = self._kept is not None and identity.keys() == self._identity.keys()
        known = known and all(_same(value, self._identity[key]) for key, value in identity.items())
        if not (known and self._wide is not None and self._holds(system)):
            if not known:
                self.parts = None if self._start is None else self._start(system.z, system.pbc)
            self._search(system)
            # Copies, because the caller may change its tensors in place
            self._identity = {key: copy.deepcopy(value) for key, value in identity.items()}
            self._origin = (system.pos.clone(), None if system.cell is None else system.cell.clone())
        whole = self._wide is None or not self.trim
        kept = required(self._kept)
        self.topology = kept if whole else narrow(kept, self.scheme, system)
        return self.topology

    def _search(self, system: System) -> None:
        self.rebuilds += 1
        scheme = self._wide or self.scheme
        self._kept = scheme.compose(system) if self.parts is None else scheme.rebuild(self.parts, system)

    def _holds(self, system: System) -> bool:
        """Whether the kept parts are still valid and the kept lists still have every edge."""
        if not self._within(system):
            return False
        return self.parts is not None or self.scheme.holds(required(self._kept), system)

    def _within(self, system: System) -> bool:
        (pos, cell, pbc), (before, old_cell) = (system.pos, system.cell, system.pbc), required(self._origin)
        if pbc is None or cell is None or old_cell is None or torch.equal(cell, old_cell):
            return 2.0 * _longest(pos - before) <= self.skin
        new, old = complete_cell(cell, pbc), complete_cell(old_cell, pbc)
        deformation = torch.linalg.solve(old, new)
        moved = torch.bmm(before.double().unsqueeze(1), deformation[required(self._kept).batch(0)]).squeeze(1)
        shrunk = min(1.0, float(torch.linalg.svdvals(deformation).min()))
        return 2.0 * _longest(pos - moved) <= shrunk * (self._reach + self.skin) - self._reach


def narrow(wide: Topology, scheme: Scheme, system: System) -> Topology:
    """``wide``, made by a widened copy of ``scheme``, without the edges beyond the radii of ``scheme``."""
    with torch.no_grad():
        cell = None if system.cell is None else system.cell.double()
        centres = scheme.positions(wide, system.replace(pos=system.pos.double(), cell=cell))
        lists: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {"child": [], "pair": []}
        done: dict[EdgeSet, tuple[Tensor, Tensor | None]] = {}
        for k, radii in enumerate(scheme.list_radii()):
            for kind, radius in zip(lists, radii, strict=True):
                index, shift = wide.edges(kind, k)
                if radius is None or index is None:
                    lists[kind].append((index, shift))
                    continue
                ends = centres[k - 1 if kind == "child" else k], centres[k]
                key = scheme.same_edges.get(EdgeSet(kind, k), EdgeSet(kind, k))
                if key not in done:
                    vec = child_vectors(*ends, index, shift, cell, wide.batch(k))
                    near = ((vec * vec).sum(dim=1) < radius * radius).nonzero().squeeze(1)
                    done[key] = (index.index_select(1, near), None if shift is None else shift.index_select(0, near))
                lists[kind].append(done[key])
    (child, child_shift), (pair, pair_shift) = (zip(*lists[kind], strict=True) for kind in ("child", "pair"))
    return wide.with_edges(child, pair, child_shift, pair_shift)


def refuse_carry_on(carry_on: float | None) -> None:
    """Warn that an argument of earlier versions has no effect."""
    if carry_on is not None:
        warnings.warn(
            "carry_on has no effect, since parts no longer depend on earlier calls, and will be removed in version "
            "0.3; leave it out",
            DeprecationWarning,
            stacklevel=3,
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


def _longest(vec: Tensor) -> float:
    """Length of the longest row; 0 where there is none."""
    return float((vec * vec).sum(dim=1).max()) ** 0.5 if len(vec) else 0.0
