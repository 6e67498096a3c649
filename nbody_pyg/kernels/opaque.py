"""The compiled products as opaque operators of torch, for tracing: one node of a graph each, with derivatives.

In eager mode every product is an ``autograd.Function`` around one call into C, which costs least. A tracer cannot look
into that call, so inside :func:`opaque_products` each of these functions becomes one call of an operator that tracers
know by its schema, by shapes (its ``forward`` with the C call left out), and by its derivative (its own ``backward``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.kernels import edges, linear, ops, update
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.scope import dry_run, recording

_FUNCTIONS = {
    function.__name__: function
    for function in (
        *(ops._Product, ops._ProductBackward, ops._OneBody, ops._OneBodyBackward, ops._Density, ops._DensityBackward),
        *(edges._Features, edges._FeaturesBackward, edges._Window, edges._WindowBackward),
        *(linear._Apply, linear._Transposed, linear._Outer, update._Update, update._UpdateBackward),
    )
}
#: Kernels that a graph refers to, by what they compute: a graph kept on disk must find the same one again.
_kernels: dict[str, Any] = {}
_CONSTANTS = {"None": None, "True": True, "False": False}


class _Context:
    """Stands in for the context of an autograd function."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.materialize = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


def _key(kernel: Any) -> str:
    """Name of a kernel: the same for the same code and shapes in every process."""
    state = {
        name: value.source if isinstance(value, Library) else value.tolist() if isinstance(value, Tensor) else value
        for name, value in sorted(vars(kernel).items())
        if not callable(value)
    }
    name = hashlib.sha256(repr((type(kernel).__name__, state)).encode()).hexdigest()[:20]
    _kernels[name] = kernel
    return name


def _pack(arguments: Sequence[Any]) -> tuple[str, list[Tensor], list[int]]:
    """Arguments as (how to put them together again, tensors, integers)."""
    words, tensors, integers = [], [], []
    for value in arguments:
        if isinstance(value, Tensor):
            words.append("t")
            tensors.append(value)
        elif value is None or isinstance(value, (bool, float)):
            # None is a word: a list that begins with None counts to torch as one without gradients
            words.append(repr(value))
        elif isinstance(value, (int, torch.SymInt)):
            words.append("i")
            integers.append(value)
        else:
            words.append("k" + _key(value))
    return " ".join(words), tensors, integers


@functools.lru_cache(maxsize=4096)
def _parts(spec: str) -> tuple[str, tuple[str, ...]]:
    name, *words = spec.split()
    return name, tuple(words)


def _unpack(words: Sequence[str], tensors: Sequence[Tensor], integers: Sequence[int]) -> list[Any]:
    tensor, integer = iter(tensors), iter(integers)
    values: list[Any] = []
    for word in words:
        if word == "t":
            values.append(next(tensor))
        elif word == "i":
            values.append(next(integer))
        elif word[0] == "k":
            values.append(_kernels[word[1:]])
        else:
            values.append(_CONSTANTS[word] if word in _CONSTANTS else float(word))
    return values


def _listed(result: Any) -> list[Tensor]:
    """Results of a function as a list; those that it leaves out as empty tensors."""
    values = result if isinstance(result, (tuple, list)) else (result,)
    like = next(value for value in values if value is not None)
    return [like.new_empty(0) if value is None else value for value in values]


# -- the operators ---------------------------------------------------------------------------------------
def _run(spec: str, tensors: list[Tensor], integers: list[int]) -> list[Tensor]:
    """``forward`` of the function that ``spec`` names: its results, then what it saves beside arguments and results."""
    name, words = _parts(spec)
    tensors, ctx = [t.contiguous() for t in tensors], _Context()
    results = _listed(_FUNCTIONS[name].forward(ctx, *_unpack(words, tensors, integers)))
    known = {id(t) for t in (None, *tensors, *results)}
    return results + [t for t in ctx.saved_tensors if id(t) not in known]


def _run_last(spec: str, saved: list[Tensor], cotangents: list[Tensor | None], integers: list[int]) -> list[Tensor]:
    """``backward`` of the function that ``spec`` names, where it has no further derivative."""
    name, attributes, words, present = spec.split("|")
    ctx, given = _Context(), iter(saved)
    ctx.saved_tensors = tuple(next(given) if flag == "1" else None for flag in present)
    vars(ctx).update(zip(attributes.split(), _unpack(tuple(words.split()), [], integers), strict=True))
    return [t for t in _FUNCTIONS[name].backward.undecorated(ctx, *cotangents) if t is not None]


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    spec, tensors, integers = inputs
    name, words = _parts(spec)
    tensors, recorder = [t.contiguous() for t in tensors], _Context()
    with dry_run():
        results = _listed(_FUNCTIONS[name].forward(recorder, *_unpack(words, tensors, integers)))
    # What the dry run saved, in terms of the real arguments and results
    real = {id(None): None} | {id(t): t for t in tensors} | dict(zip(map(id, results), output, strict=False))
    more = iter(output[len(results) :])
    attributes = vars(recorder)
    ctx.save_for_backward(*[real[id(t)] if id(t) in real else next(more) for t in attributes.pop("saved_tensors")])
    ctx.spec, ctx.integers, ctx.materialize = spec, bool(integers), attributes.pop("materialize")
    ctx.attributes, ctx.shapes = attributes, [value.shape for value in results]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple:
    name, words = _parts(ctx.spec)
    inner = _Context()
    inner.saved_tensors = ctx.saved_tensors
    vars(inner).update(ctx.attributes)
    wanted = iter(ctx.needs_input_grad[1])
    inner.needs_input_grad = [word == "t" and next(wanted) for word in words]
    inner.next_functions = ctx.next_functions
    # What a function leaves out has no cotangent either, whatever autograd says
    cotangents = [None if shape == (0,) else c for c, shape in zip(cotangents, ctx.shapes, strict=False)]
    if ctx.materialize:
        like = ctx.saved_tensors[0]
        cotangents = [
            like.new_zeros(shape) if given is None else given
            for given, shape in zip(cotangents, ctx.shapes, strict=True)
        ]
    backward = _FUNCTIONS[name].backward
    if hasattr(backward, "undecorated"):
        gradients = _last(name, inner, ctx.attributes, list(cotangents))
    else:
        with opaque_products():  # tracers differentiate later, outside of the caller's context
            gradients = backward(inner, *cotangents)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    given = [gradient for word, gradient in zip(words, gradients, strict=True) if word == "t"]
    # torch takes a list of integers for a leaf, but an empty one for a tree
    return None, given, None if ctx.integers else []


def _last(name: str, ctx: _Context, attributes: dict[str, Any], cotangents: list[Tensor | None]) -> tuple:
    with dry_run():
        shape = _FUNCTIONS[name].backward.undecorated(ctx, *cotangents)
    words, _, integers = _pack(list(attributes.values()))
    present = "".join("0" if t is None else "1" for t in ctx.saved_tensors)
    spec = f"{name}|{' '.join(attributes)}|{words}|{present}"
    saved = [t for t in ctx.saved_tensors if t is not None]
    found = iter(torch.ops.nbody_pyg.run_last(spec, saved, cotangents, integers))
    return tuple(None if like is None else next(found) for like in shape)


def _call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What ``function.apply`` is while tracing."""
    with dry_run():
        shape = function.forward(_Context(), *arguments)
    words, tensors, integers = _pack(arguments)
    found = torch.ops.nbody_pyg.run(f"{function.__name__} {words}", tensors, integers)
    if isinstance(shape, Tensor):
        return found[0]
    return tuple(None if like is None else value for like, value in zip(shape, found, strict=False))


def _dry(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The same with the calls into C left out: shapes and types only."""

    def shapes(*arguments: Any) -> list[Tensor]:
        with dry_run():
            return function(*arguments)

    return shapes


# Not `torch.library.custom_op`, whose checks cost several microseconds of every call.
_library = torch.library.Library("nbody_pyg", "DEF")
for _name, _schema, _function in (
    ("run", "(str spec, Tensor[] tensors, SymInt[] integers) -> Tensor[]", _run),
    ("run_last", "(str spec, Tensor[] saved, Tensor?[] cotangents, SymInt[] integers) -> Tensor[]", _run_last),
):
    _library.define(_name + _schema)
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"nbody_pyg::{_name}", _dry(_function), lib=_library)
torch.library.register_autograd("nbody_pyg::run", _backward, setup_context=_save, lib=_library)


def opaque_products() -> contextlib.AbstractContextManager[None]:
    """Inside, products are operators that a tracer can record; outside, they cost less as they are."""
    return recording(_call)
