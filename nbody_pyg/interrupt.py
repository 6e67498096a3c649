"""Stop a long run on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from typing import Any


def signal_name(number: int) -> str:
    """The name of a signal in messages, such as "SIGTERM", or "Ctrl-C"."""
    if number == signal.SIGINT:
        return "Ctrl-C"
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


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
        return None if self.received is None else f"by {signal_name(self.received)}"

    @property
    def status(self) -> int | None:
        """Exit status for the signal, as a shell gives it: 143 for SIGTERM, 130 for Ctrl-C."""
        return None if self.received is None else 128 + self.received
