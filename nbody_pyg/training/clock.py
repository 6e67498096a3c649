"""CPU time of the training process, with pauses: the unit of budgets."""

from __future__ import annotations

import time


class ProcessClock:
    """Seconds of CPU time (all threads) that this process spent while the clock ran.

    Waiting, other processes and paused stretches (validation, writing checkpoints) do not count. On a GPU the process
    spins while it waits for kernels, so this is close to the wall time.
    """

    def __init__(self, elapsed: float = 0.0):
        self._before = elapsed
        self._since: float | None = None

    @property
    def elapsed(self) -> float:
        return self._before + (0.0 if self._since is None else time.process_time() - self._since)

    def start(self) -> None:
        if self._since is None:
            self._since = time.process_time()

    def pause(self) -> None:
        self._before, self._since = self.elapsed, None

    def __repr__(self) -> str:
        return f"ProcessClock({self.elapsed:.2f} s, {'paused' if self._since is None else 'running'})"
