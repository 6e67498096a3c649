"""Time calls on a GPU by events, and replay them from CUDA graphs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

#: Larger than the cache of any GPU of today: written before each call, so that inputs come from memory.
_FLUSH = 2**28


@functools.lru_cache(maxsize=2)
def flush_buffer(device: torch.device) -> Tensor | None:
    return torch.empty(_FLUSH, dtype=torch.int8, device=device) if device.type == "cuda" else None


def median_time(call: Callable[[], object], device: torch.device, repeats: int, flush: Tensor | None = None) -> float:
    """Median seconds: three calls to warm up (and compile), then each call between two events."""
    if device.type != "cuda":
        call()
        samples = []
        for _ in range(min(repeats, 3)):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)
    for _ in range(3):
        call()
    events = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e-3 for start, end in events)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph; what it allocates stays with the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
