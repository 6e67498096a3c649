"""The end of the chain of derivatives: a third one is an error, not a wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def last_derivative(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate the ``backward`` of a function that has no further derivative.

    torch's ``once_differentiable`` raises only where ``.backward()`` reaches its outputs; ``autograd.grad``
    with named inputs passes it by and returns a number without that part (seen with torch 2.13). Here the
    outputs stay joined to all that they depend on.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
        if not torch.is_grad_enabled():
            return backward(ctx, *cotangents)
        inputs = [t for t in (*ctx.saved_tensors, *cotangents) if t is not None]
        return _Last.apply(lambda: backward(ctx, *cotangents), *inputs)

    # For tracers; not `__wrapped__`, which other decorators (jaxtyping's hook) set too
    wrapper.undecorated = backward
    return wrapper


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Callable[[], tuple], *inputs: torch.Tensor) -> tuple:
        return compute()

    @staticmethod
    def backward(ctx, *cotangents: torch.Tensor | None):
        raise RuntimeError(
            "the compiled products have two derivatives, but a third was asked for; "
            "call nbody_pyg.kernels.set_backend('torch') before the forward pass"
        )
