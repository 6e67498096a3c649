"""required: a value that the caller knows is not None."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def required(value: T | None) -> T:
    """The value itself. Its type may be None, but no caller passes None."""
    assert value is not None
    return value
