"""The compiled operations as opaque operators of torch, for tracing: one node of a graph each, with derivatives.

In eager mode an operation is an ``autograd.Function`` around calls into C, which has the least overhead. A tracer
cannot see these calls, so inside :func:`opaque_products` each operation becomes one call of an operator that tracers
know by its
schema, by shapes (its own functions with the C call left out), and by its derivative.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import dry_run, recording
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operation import Operation, Tensors, parted
from nbody_pyg.required import required

#: Operations that a graph refers to, by a hash of what they compute, so that a graph from disk finds the same one.
_operations: dict[str, Operation] = {}


def _key(operation: Operation) -> str:
    """Name of an operation: the same for the same code and shapes in every process."""
    state = {
        name: value.source if isinstance(value, Library) else value.tolist() if isinstance(value, Tensor) else value
        for name, value in sorted(vars(operation).items())
        if not callable(value)
    }
    name = hashlib.sha256(repr((type(operation).__name__, state)).encode()).hexdigest()[:20]
    _operations[name] = operation
    return name


def _packed(tensors: Tensors) -> tuple[str, list[Tensor]]:
    """Optional tensors as (mask of those present, those present).

    torch treats a list of optional tensors that begins with None as one without gradients.
    """
    return "".join("-t"[t is not None] for t in tensors), [t for t in tensors if t is not None]


def _unpacked(present: str, tensors: Sequence[Tensor]) -> list[Any]:
    found = iter(tensors)
    # Tracers choose strides of their own
    return [next(found).contiguous() if there == "t" else None for there in present]


@functools.lru_cache(maxsize=4096)
def _words(spec: str) -> list[str]:
    return spec.split()


# -- the operators ---------------------------------------------------------------------------------------
def _value(spec: str, tensors: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Results of the operation named by ``spec``, then the tensors that it saves."""
    key, present = _words(spec)
    results, kept = _operations[key].value(_operations[key].split(_unpacked(present, tensors), tuple(sizes)))
    return [*results, *map(required, kept)]


def _gradients(spec: str, tensors: list[Tensor]) -> list[Tensor]:
    """Its required gradients; ``tensors`` are cotangents and operands."""
    return _packed(_gradients_in_place(spec, tensors))[1]


def _gradients_in_place(spec: str, tensors: Sequence[Tensor]) -> Tensors:
    key, present, given, wanted = _words(spec)
    g, operands = parted(_operations[key], _unpacked(present, tensors), int(given))
    return _operations[key].gradients(g, operands, [letter == "t" for letter in wanted])


def _twice(spec: str, tensors: list[Tensor]) -> list[Tensor]:
    """The derivatives of its gradients; tensors are those of :func:`_gradients`, then the cotangents of these."""
    return _packed(_twice_in_place(spec, tensors))[1]


def _twice_in_place(spec: str, tensors: Sequence[Tensor]) -> Tensors:
    key, present, given, wanted = _words(spec)
    count, every = _operations[key].num_inputs, _unpacked(present, tensors)
    g, operands = parted(_operations[key], every[:-count], int(given))
    return _operations[key].twice(every[-count:], g, operands, [letter == "t" for letter in wanted])


def _save_value(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.spec, tensors, sizes = inputs
    results = _operations[_words(ctx.spec)[0]].num_results
    ctx.save_for_backward(*tensors, *output[results:])
    ctx.sized, ctx.like = bool(sizes), [t.shape for t in output[:results]]


def _value_backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    key, present = _words(ctx.spec)
    operation, saved = _operations[key], ctx.saved_tensors
    count, dtype = present.count("t"), next(t for t in saved if t.is_floating_point())
    g = [dtype.new_zeros(shape) if c is None else c for c, shape in zip(cotangents, ctx.like, strict=False)]
    inputs = _unpacked(present, saved[:count])[: operation.num_inputs]
    asked = iter(ctx.needs_input_grad[1])
    wanted = operation.weighed([x is not None and next(asked) for x in inputs], inputs, ctx.next_functions)
    letters = "".join("-t"[want] for want in wanted)
    kept = "t" * (len(saved) - count)
    spec = f"{key} {'t' * len(g)}{present}{kept} {len(present)} {letters}"
    tensors = [*g, *saved]
    with dry_run():
        there = _packed(_gradients_in_place(spec, tensors))[0]
    found = iter(torch.ops.nbody_pyg.gradients(spec, tensors))
    by_input = [next(found) if letter == "t" else None for letter in there]
    constants = present[operation.num_inputs :].count("t")
    gradients = [gradient for gradient, x in zip(by_input, inputs, strict=True) if x is not None]
    # torch takes a list of integers for a leaf, but an empty one for a tree
    return None, [*gradients, *[None] * constants], None if ctx.sized else []


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.spec, tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients_backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    key, present, given, _ = _words(ctx.spec)
    saved = list(ctx.saved_tensors)
    with dry_run():
        there = _packed(_gradients_in_place(ctx.spec, saved))[0]
    by_gradient = iter(cotangents)
    c = [next(by_gradient) if letter == "t" else None for letter in there]
    more, tensors = _packed(c)
    asked = iter(ctx.needs_input_grad[1])
    letters = "".join("-t"[letter == "t" and next(asked)] for letter in present)
    spec, everything = f"{key} {present}{more} {given} {letters}", [*saved, *tensors]
    with dry_run():
        there = _packed(_twice_in_place(spec, everything))[0]
    found = iter(torch.ops.nbody_pyg.twice(spec, everything))
    by_tensor = [next(found) if letter == "t" else None for letter in there]
    by_tensor += [None] * (len(present) - len(by_tensor))
    return None, [gradient for gradient, letter in zip(by_tensor, present, strict=True) if letter == "t"]


def _call(operation: Operation, sizes: Sequence[int], tensors: Tensors) -> tuple[Tensor, ...]:
    """Called by :meth:`Operation.run` while tracing."""
    present, given = _packed(tensors)
    return tuple(torch.ops.nbody_pyg.value(f"{_key(operation)} {present}", given, list(sizes))[: operation.num_results])


def _dry(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The same with the calls into C left out: shapes and types only."""

    def shapes(*arguments: Any) -> list[Tensor]:
        with dry_run():
            return function(*arguments)

    return shapes


# Not `torch.library.custom_op`, whose checks cost several microseconds of every call.
_library = torch.library.Library("nbody_pyg", "DEF")
for _name, _schema, _function in (
    ("value", "(str spec, Tensor[] tensors, SymInt[] sizes) -> Tensor[]", _value),
    ("gradients", "(str spec, Tensor[] tensors) -> Tensor[]", _gradients),
    ("twice", "(str spec, Tensor[] tensors) -> Tensor[]", _twice),
):
    _library.define(_name + _schema)
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"nbody_pyg::{_name}", _dry(_function), lib=_library)
torch.library.register_autograd("nbody_pyg::value", _value_backward, setup_context=_save_value, lib=_library)
torch.library.register_autograd(
    "nbody_pyg::gradients", _gradients_backward, setup_context=_save_gradients, lib=_library
)


def opaque_products() -> contextlib.AbstractContextManager[None]:
    """Context in which products are operators that a tracer can record; without it they have less overhead."""
    return recording(_call)
