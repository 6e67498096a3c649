"""Record Ctrl-C and SIGTERM, so that a long command can stop and keep its results."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """The signal received; ``number`` is None if there was none."""

    number: int | None = None

    @property
    def reason(self) -> str | None:
        """The signal in words."""
        if self.number is None:
            return None
        return "by Ctrl-C" if self.number == signal.SIGINT else f"by signal {self.number}"

    @property
    def status(self) -> int | None:
        """Exit status for this signal."""
        return None if self.number is None else 128 + self.number


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Record the first Ctrl-C or SIGTERM; a second one ends the command."""
    found = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if found.number is not None:
            raise KeyboardInterrupt
        found.number = int(number)

    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread signals cannot be handled
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
