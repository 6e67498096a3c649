"""The end of the chain of derivatives: a third one is an error, not a wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: Results of a backward pass, one for each argument of the forward pass.
Gradients = tuple[torch.Tensor | None, ...]


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, which is without annotations."""
    return function.apply(*arguments)


def last_derivative(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the ``backward`` of a function that has no further derivative.

    torch's ``once_differentiable`` raises only where ``.backward()`` reaches its outputs; ``autograd.grad``
    with named inputs passes it by and returns a number without that part (seen with torch 2.13). Here the
    outputs stay joined to all that they depend on.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *cotangents: torch.Tensor | None) -> Gradients:
        if not torch.is_grad_enabled():
            return backward(ctx, *cotangents)
        inputs = [t for t in (*ctx.saved_tensors, *cotangents) if t is not None]
        found: Gradients = run(_Last, lambda: backward(ctx, *cotangents), *inputs)
        return found

    # For tracers; not `__wrapped__`, which other decorators (jaxtyping's hook) set too
    vars(wrapper)["undecorated"] = backward
    return wrapper


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Gradients], *inputs: torch.Tensor) -> Gradients:
        return compute()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Gradients:
        raise RuntimeError(
            "the compiled products have two derivatives, but a third was asked for; "
            "call nbody_pyg.kernels.set_backend('torch') before the forward pass"
        )
