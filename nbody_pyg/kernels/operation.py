r"""One operation with two derivatives, each one call of compiled code, and the autograd code shared by all operations.

With inputs x, results y and cotangents g of y, an operation has three functions:

=====================  =========================================================================================
function               result
=====================  =========================================================================================
``value``              :math:`y(x)`
``gradients``          :math:`\bar x = g\, \partial y / \partial x`
``twice``              derivatives by g and x of :math:`\sum c \cdot \bar x`, where c are cotangents of the gradients
=====================  =========================================================================================

A third derivative raises an error; plain torch can compute it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbody_pyg.kernels import autograd_flags

#: Tensors in a fixed order; some may be None.
Tensors = Sequence[Tensor | None]


class Operands(NamedTuple):
    """The arguments of an operation.

    ==========  ========================================================================
    field       meaning
    ==========  ========================================================================
    inputs      floating-point tensors with respect to which the results are differentiated
    constants   indices
    sizes       integers that do not follow from the tensors; only ``value`` needs them
    kept        tensors that ``value`` saved for the derivatives
    ==========  ========================================================================
    """

    # Tensors, or None for optional ones
    inputs: Sequence[Any]
    constants: Sequence[Any]
    sizes: Any = ()
    kept: Sequence[Any] = ()


class Operation(ABC):
    """One operation of compiled code, see the module docstring.

    Attributes:
        num_inputs: number of its tensor arguments that are differentiated.
        num_results: number of its results.
        weights: which of the inputs are weights; their gradients are computed only in passes that need them.
        too_long: whether compiling would take minutes, so that plain torch runs instead.
        recordable: whether a tracer may see it as one operator (:mod:`nbody_pyg.kernels.opaque`).
    """

    num_inputs: int
    num_results: int = 1
    weights: range = range(0)
    recordable: bool = True
    too_long: bool = False

    @abstractmethod
    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        """The results, and the tensors to save for the derivatives."""

    @abstractmethod
    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        """One gradient per input; None for one that is not needed and would cost time."""

    @abstractmethod
    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        """Derivatives with respect to each g and each input, as selected by ``wanted``. Cotangents c may be None, for
        zero."""

    def run(self, *tensors: Tensor | None, sizes: Any = ()) -> Any:
        """The results for these inputs and constants. All tensors must be contiguous.

        A copy made and saved inside the autograd function would have no graph, and second derivatives would silently
        lose their part through it.
        """
        recorder = autograd_flags.recorder() if self.recordable else None
        if recorder is None:
            results = _Value.apply(self, sizes, *tensors)  # type: ignore[no-untyped-call]  # torch's
        else:
            results = recorder(self, sizes, tensors)
        return results[0] if self.num_results == 1 else results

    def split(self, tensors: Tensors, sizes: Any = ()) -> Operands:
        """Operands out of one list: inputs, constants."""
        return Operands(tensors[: self.num_inputs], tensors[self.num_inputs :], sizes)

    def weighed(self, wanted: Sequence[bool], inputs: Tensors, edges: Sequence[Any]) -> tuple[bool, ...]:
        """``wanted``, but False for all weights in a backward pass that uses none of their gradients.

        Args:
            wanted: ``ctx.needs_input_grad`` of the inputs.
            inputs: the inputs.
            edges: ``ctx.next_functions``, one for each tensor among the operands, inputs first.
        """
        if not self.weights:
            return tuple(wanted)
        first = sum(x is not None for x in inputs[: self.weights.start])
        last = first + sum(x is not None for x in inputs[self.weights.start : self.weights.stop])
        asked = autograd_flags.gradients_wanted(edges[first:last])
        return tuple(want and (asked or n not in self.weights) for n, want in enumerate(wanted))


def filled(cotangents: Tensors, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous cotangents, zeros for None."""
    return [torch.zeros_like(x) if c is None else c.contiguous() for c, x in zip(cotangents, inputs, strict=True)]


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, sizes: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        operands = operation.split(tensors, sizes)
        results, kept = operation.value(operands)
        ctx.operation, ctx.sizes, ctx.counts = operation, sizes, (operation.num_inputs, len(tensors))
        ctx.save_for_backward(*tensors, *kept)
        return results

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        operation, (inputs, given) = ctx.operation, ctx.counts
        saved = ctx.saved_tensors
        wanted = operation.weighed(ctx.needs_input_grad[2 : 2 + inputs], saved[:inputs], ctx.next_functions)
        cotangents = [t.contiguous() for t in g]
        found = _Gradients.apply(operation, ctx.sizes, given, wanted, *cotangents, *saved)  # type: ignore[no-untyped-call]  # torch's
        return None, None, *found, *[None] * (given - inputs)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operation: Operation, sizes: Any, given: int, wanted: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.operation, ctx.sizes, ctx.given = operation, sizes, given
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(operation.gradients(*parted(operation, tensors, given, sizes), wanted))

    @staticmethod
    def backward(ctx: Any, *c: Tensor | None) -> tuple[Tensor | None, ...]:
        operation, saved, given, needs = ctx.operation, ctx.saved_tensors, ctx.given, ctx.needs_input_grad[4:]

        def compute() -> tuple[Tensor | None, ...]:
            return tuple(operation.twice(c, *parted(operation, saved, given, ctx.sizes), needs))

        rest = [None] * (len(saved) - operation.num_results - operation.num_inputs)
        if not torch.is_grad_enabled():
            return None, None, None, None, *compute(), *rest
        # torch's ``once_differentiable`` raises only if ``.backward()`` reaches its outputs; ``autograd.grad`` with
        # given inputs ignores it and returns a number without that part (torch 2.13). Here the outputs stay connected
        # to everything that they depend on.
        found = _Last.apply(compute, *[t for t in (*saved, *c) if t is not None])  # type: ignore[no-untyped-call]  # torch's
        return None, None, None, None, *found, *rest


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], tuple[Tensor | None, ...]], *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return compute()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the compiled products have two derivatives, but a third was asked for; "
            "call nbody_pyg.kernels.set_backend('torch') before the forward pass"
        )


def parted(operation: Operation, tensors: Tensors, given: int, sizes: Any = ()) -> tuple[Sequence[Any], Operands]:
    """Cotangents and operands out of one list: cotangents, ``given`` inputs and constants, what was kept."""
    results, inputs = operation.num_results, operation.num_inputs
    g, rest = tensors[:results], tensors[results:]
    return g, Operands(rest[:inputs], rest[inputs:given], sizes, rest[given:])
