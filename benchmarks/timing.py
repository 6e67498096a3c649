"""Time functions side by side, in CPU seconds of this process, and measure the memory that one of them takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nbody_pyg.compare.measure import peak_memory

__all__ = ["Timing", "exponent", "interleave", "on_the_clock", "peak_memory"]

#: A sample lasts at least this long (seconds); short functions are called several times for one.
_SAMPLE = 2e-3


@dataclass(frozen=True)
class Timing:
    """CPU seconds per call, one number per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    def over(self, other: Timing) -> float:
        """How many times longer than ``other``: the median over rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))

    def as_dict(self) -> dict[str, float | int]:
        return {"median_s": self.median, "minimum_s": self.minimum, "rounds": len(self.samples)}


def interleave(
    functions: Mapping[str, Callable[[], object]], seconds: float = 10.0, rounds: tuple[int, int] = (5, 101)
) -> dict[str, Timing]:
    """Call the functions in turn, round after round, so that a busy machine slows all of them alike.

    Other processes take wall time, not CPU time, away from this one; what they take of caches and memory
    bandwidth remains, so compare ratios and minima.

    Args:
        seconds: CPU time to spend, after two calls of each to warm up.
        rounds: at least and at most so many, whatever the time.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, math.ceil(_SAMPLE / max(_once(function, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names, start = list(functions), time.process_time()
    for k in range(rounds[1]):
        if k >= rounds[0] and time.process_time() - start > seconds:
            break
        for name in names[k % len(names) :] + names[: k % len(names)]:  # nobody is always first
            samples[name].append(_once(functions[name], calls[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _once(function: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def on_the_clock(run: Callable[[], object], threads: int, rounds: int) -> tuple[float, float]:
    """Median wall-clock seconds with one thread and with several, in turn."""
    samples: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(rounds):
        for count, spent in samples.items():
            torch.set_num_threads(count)
            begin = time.perf_counter()
            run()
            spent.append(time.perf_counter() - begin)
    torch.set_num_threads(1)
    return statistics.median(samples[1]), statistics.median(samples[threads])


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x: the power with which y grows."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
