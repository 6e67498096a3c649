"""What the caller of a derivative wants: autograd cannot tell a custom function, so the caller says it here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_skipped = False


@contextlib.contextmanager
def skip_weight_gradients() -> Iterator[None]:
    """Inside, backward passes give no gradients of weights: for forces, which need those of positions only."""
    global _skipped
    before, _skipped = _skipped, True
    try:
        yield
    finally:
        _skipped = before


def weight_gradients_skipped() -> bool:
    """Whether a caller has said that no gradients of weights are wanted now."""
    return _skipped
