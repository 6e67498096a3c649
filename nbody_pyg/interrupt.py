"""Stop a long run on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from typing import Any


class GracefulStop:
    """Context in which SIGTERM or Ctrl-C is recorded, so that a long run ends after its step and keeps its results. A
    second signal kills at once.

    ``received`` holds the number of the signal afterwards.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        # Only the main thread can handle signals; a run in another thread ends when its limits are reached.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    @property
    def reason(self) -> str | None:
        """The signal in words."""
        if self.received is None:
            return None
        return "by Ctrl-C" if self.received == signal.SIGINT else f"by signal {self.received}"

    @property
    def status(self) -> int | None:
        """Exit status for the signal, as a shell gives it: 143 for SIGTERM, 130 for Ctrl-C."""
        return None if self.received is None else 128 + self.received
