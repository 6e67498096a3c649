"""What the caller of a derivative wants: autograd cannot tell a custom function, so the caller says it here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_skipped = _tracing = _dry = False


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


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Inside, a graph is recorded: values of tensors must not be asked for."""
    global _tracing
    before, _tracing = _tracing, True
    try:
        yield
    finally:
        _tracing = before


def is_tracing() -> bool:
    """Whether tensors have no values now, because a graph is recorded by us or by torch."""
    return _tracing or torch.compiler.is_compiling()


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Inside, compiled functions are not called: what remains of a product is the shapes of its results."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def is_dry() -> bool:
    """Whether compiled functions are left out now."""
    return _dry
