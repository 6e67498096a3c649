"""Edges in the order of their targets and of their sources, so that every sum over edges is one loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nbody_pyg.kernels.operands import check_range

#: Edge and node numbers have 32 bits, for half the memory traffic; kernels compute addresses in 64.
LARGEST = 2**31 - 1


class Rows(NamedTuple):
    """Edges grouped by one end: those of node n are ``edge[ptr[n]:ptr[n + 1]]``, all int32.

    ==========  ============================================
    field       shape
    ==========  ============================================
    ptr         (nodes + 1,)
    edge        (edges,): number of the edge
    source      (edges,): source of that edge
    target      (edges,): target of that edge
    ==========  ============================================
    """

    ptr: Tensor
    edge: Tensor
    source: Tensor
    target: Tensor


class EdgeOrder:
    """Both orders of one edge set, each computed at its first use.

    Args:
        index: (2, edges), int64: source, target.
        num_sources, num_targets: number of nodes at either end.

    Raises: ValueError: an edge that points outside the nodes, or too many edges.
    """

    def __init__(self, index: Tensor, num_sources: int, num_targets: int) -> None:
        if max(index.shape[1], num_sources, num_targets) > LARGEST:
            raise ValueError(f"index must hold at most {LARGEST} edges, got {index.shape[1]}; split the batch")
        check_range("index[0] (sources)", index[0], num_sources)
        check_range("index[1] (targets)", index[1], num_targets)
        self.ends = (index[0].to(torch.int32), index[1].to(torch.int32))
        self.sizes = (num_sources, num_targets)
        self._rows: list[Rows | None] = [None, None]

    def by(self, end: int) -> Rows:
        """Edges grouped by source (0) or target (1)."""
        found = self._rows[end]
        if found is None:
            found = self._rows[end] = self._sort(end)
        return found

    def renew(self, index: Tensor) -> None:
        """Write the orders of other edges, as many as before, into the present tensors, because a CUDA graph reads
        them."""
        for kept, new in zip(self.ends, index, strict=True):
            kept.copy_(new)
        for end, rows in enumerate(self._rows):
            if rows is not None:
                for kept, new in zip(rows, self._sort(end), strict=True):
                    kept.copy_(new)

    def _sort(self, end: int) -> Rows:
        key, edge = torch.sort(self.ends[end], stable=True)
        nodes = torch.arange(self.sizes[end] + 1, dtype=key.dtype, device=key.device)
        ptr = torch.searchsorted(key, nodes, out_int32=True)
        return Rows(ptr, edge.to(torch.int32), *(node.index_select(0, edge) for node in self.ends))


@dataclass
class _Orders:
    """Cached orders of one index by (num_sources, num_targets), valid for one version of its entries."""

    version: int
    by_size: dict[tuple[int, int], EdgeOrder] = field(default_factory=dict)


# A weak reference, not an address: the entry is removed with its tensor
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def edge_order(index: Tensor, num_sources: int, num_targets: int) -> EdgeOrder:
    """The order of these edges, computed once for each index tensor and cached as long as the tensor exists.

    The topology owns the index of its edges, so they are sorted and checked once for all steps on it.
    """
    held = _known.get(index)
    # An index changed in place counts as a new one
    if held is None or held.version != _version(index):
        held = _known[index] = _Orders(_version(index))
    order: EdgeOrder | None = held.by_size.get((num_sources, num_targets))
    if order is None:
        order = held.by_size[num_sources, num_targets] = EdgeOrder(index, num_sources, num_targets)
    return order


def renew_orders(index: Tensor) -> None:
    """Update the cached orders of an index in place, after it was changed in place."""
    held = _known.get(index)
    if held is not None:
        held.version = _version(index)
        for order in held.by_size.values():
            order.renew(index)


def _version(index: Tensor) -> int:
    return 0 if index.is_inference() else index._version  # inference tensors do not count their changes
