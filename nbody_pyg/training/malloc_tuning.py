"""A process in which every step takes the same time: less garbage collection, fewer page faults."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

# glibc's mallopt: give no memory back to the system between steps, and take none by mmap, whose pages are
# zeroed anew every time. The graph of a force loss is allocated and freed in every step.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _LARGE = -1, -4, 2**31 - 1


@contextlib.contextmanager
def tuned_malloc() -> Iterator[None]:
    """Inside, what exists already is left out of garbage collection, and memory is kept for the next step.

    A full collection walks through everything that torch has loaded, which takes longer than a
    step of a small network; autograd graphs hold no cycles and do not need it. The memory setting stays for the
    rest of the process; it is ignored where the C library is not glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, _LARGE)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
