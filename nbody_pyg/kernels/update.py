"""The compiled update of a part: one call each for the value, its gradients, and their derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.kernels.backend import backend
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import Several, check_index, check_matrices, check_operands, check_range
from nbody_pyg.kernels.operation import Operands, Operation, Tensors
from nbody_pyg.kernels.ops import ProductKernel
from nbody_pyg.kernels.panels import LINKS
from nbody_pyg.kernels.threads import num_threads
from nbody_pyg.kernels.update_source import PRODUCT_FUNCTIONS, Update, threads_of, update_source, workspace_size

#: Result of the same update in plain torch, for derivatives that are not compiled.
Reference = Callable[..., Tensor]


class UpdateKernel(Operation):
    """Compiled form of one :class:`~nbody_pyg.kernels.update_source.Update`.

    Args:
        update: what is computed.
        products: the compiled products of ``update.products``.
        num_species: rows of the tables of factors and constants.
        reference: ``reference(inputs, species, matrices, scale, bias)`` in plain torch. Used only if something depends
            on the gradient of a weight (as in meta-learning), for which there is no compiled code.
    """

    def __init__(
        self, update: Update, products: Sequence[ProductKernel], num_species: int, reference: Reference
    ) -> None:
        self.update, self.num_species, self.reference = update, num_species, reference
        degrees = max(update.degree_of_row, default=-1) + 1
        scale, bias = num_species * degrees * update.channels, num_species * update.channels
        state = f"{update.rows * update.channels}*N"
        kept, out = f"{max(len(update.products) - 1, 0)}*{state}", f"reals:{update.rows_out * update.channels}*N"
        optional = "?" * (not degrees), "?" * (not update.bias)
        leading = (
            f"N T longs{'?' * (not degrees and not update.bias)}:N several several "
            f"reals{optional[0]}:{scale} reals{optional[1]}:{bias} reals:{workspace_size(update, num_species)}*T reals:{state} reals:{kept}"
        )
        signatures = {
            "update_forward": f"{leading} {out}",
            "update_backward": f"{leading} {out} several several? reals?:{scale} reals?:{bias}",
            "update_double": f"{leading} {out} several {out} several several reals:{scale}",
        }
        links = [(p.library, f"product_{what}_rows") for p in products for what in PRODUCT_FUNCTIONS]
        self.library = Library(update_source(update, num_species), signatures, [*LINKS, *links])
        self.shapes = update.shapes
        self.degrees = degrees
        self._sizes = [rows * columns for rows, columns in self.shapes]
        self._workspace = workspace_size(update, num_species)
        self._kept = max(len(update.products) - 1, 0)
        #: Operands: inputs, then factors and constants (or None), then the matrices
        count = len(update.inputs)
        self.num_inputs = count + 2 + len(self.shapes)
        self.weights = range(count, self.num_inputs)

    def __call__(
        self,
        inputs: Sequence[Tensor],
        species: Tensor | None,
        matrices: Sequence[Tensor],
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """New states (nodes, rows_out, channels) from the inputs (nodes, rows, channels) of the nodes."""
        u, dtype, device, nodes = self.update, inputs[0].dtype, inputs[0].device, inputs[0].shape[0]
        for x, size in zip(inputs, u.inputs, strict=True):
            check_operands(dtype, device, input=(x.flatten(1), (nodes, size)))
        check_matrices(dtype, device, matrices, self.shapes)
        if scale is not None:
            check_operands(dtype, device, scale=(scale, (self.num_species, self.degrees, u.channels)))
        if bias is not None:
            check_operands(dtype, device, bias=(bias, (self.num_species, u.channels)))
        if species is not None:
            check_index(device, species=(species, (nodes,)))
            check_range("species", species, self.num_species)
        tensors = (*inputs, scale, bias, *matrices, species)
        states: Tensor = self.run(*[None if t is None else t.contiguous() for t in tensors])
        return states

    def runs(self, like: Tensor) -> bool:
        """Whether it can be called with tensors like this one."""
        return backend(like, self.library) == "c"

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        u, first = self.update, operands.inputs[0]
        nodes = first.shape[0]
        sums, kept = first.new_empty(nodes, u.rows, u.channels), first.new_empty(self._kept, nodes, u.rows, u.channels)
        out = first.new_empty(nodes, u.rows_out, u.channels)
        self._call("update_forward", operands, sums, kept, out)
        return (out,), (sums, kept)

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        inputs, scale, bias, matrices = self._parts(operands.inputs)
        gradients, weigh = [torch.empty_like(x) for x in inputs], any(wanted[self.weights.start :])
        gs, gb, gw = self._fresh_gradients(g[0]) if weigh else (None, None, [None] * len(matrices))
        rest = (self._states(gradients), self._matrices(gw) if weigh else None, gs, gb)
        self._call("update_backward", operands, *operands.kept, *g, *rest)
        return *gradients, None if scale is None else gs, None if bias is None else gb, *gw

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        inputs, scale, _, _ = self._parts(operands.inputs)
        if any(t is not None for t in c[self.weights.start :]):
            return self._in_torch(c, g[0], operands)
        of_inputs = [None if t is None else t.contiguous() for t in c[: len(inputs)]]
        gg, gradients = torch.empty_like(g[0]), [torch.empty_like(x) for x in inputs]
        gs, _, gw = self._fresh_gradients(g[0])
        rest = (self._states(of_inputs), gg, self._states(gradients), self._matrices(gw), gs)
        self._call("update_double", operands, *operands.kept, *g, *rest)
        return gg, *gradients, None if scale is None else gs, None, *gw

    def _call(self, name: str, operands: Operands, *rest: Tensor | Several | None) -> None:
        inputs, scale, bias, matrices = self._parts(operands.inputs)
        nodes = inputs[0].shape[0]
        threads = threads_of(num_threads(), nodes)
        work = inputs[0].new_empty(threads * self._workspace)
        leading = (operands.constants[0], self._states(inputs), self._matrices(matrices), scale, bias, work)
        self.library.call(name, inputs[0].dtype, nodes, threads, *leading, *rest)

    def _parts(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Any, Any, Sequence[Any]]:
        """Inputs, factors, constants and matrices out of one list."""
        count = len(self.update.inputs)
        return tensors[:count], tensors[count], tensors[count + 1], tensors[count + 2 :]

    def _states(self, tensors: Sequence[Tensor | None]) -> Several:
        """One tensor per input, of its shape."""
        nodes = next((t.shape[0] for t in tensors if t is not None), 0)
        return Several(tensors, [nodes * size for size in self.update.inputs])

    def _matrices(self, tensors: Sequence[Tensor | None]) -> Several:
        """One tensor per matrix, of its shape."""
        return Several(tensors, self._sizes)

    def _fresh_gradients(self, like: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Zeros for the gradients of factors, constants and matrices, in one allocation."""
        u = self.update
        shapes = [(self.num_species, self.degrees, u.channels), (self.num_species, u.channels), *self.shapes]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        pieces = like.new_zeros(sum(sizes)).split(sizes)
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return views[0], views[1], views[2:]

    def _in_torch(self, c: Tensors, g: Tensor, operands: Operands) -> Tensors:
        """The derivative of the backward pass, by differentiating plain torch."""
        (species,) = operands.constants
        with torch.enable_grad():
            g = g.detach().requires_grad_(True)
            tensors: list[Any] = [None if t is None else t.detach().requires_grad_(True) for t in operands.inputs]
            inputs, scale, bias, matrices = self._parts(tensors)
            out = self.reference(inputs, species, matrices, scale, bias)
            given = [(t, cotangent) for t, cotangent in zip(tensors, c, strict=True) if cotangent is not None]
            first = torch.autograd.grad(out, [t for t, _ in given], g, create_graph=True, materialize_grads=True)
            leaves = [t for t in (g, *tensors) if t is not None]
            cotangents = [cotangent for _, cotangent in given]
            found = torch.autograd.grad(first, leaves, cotangents, allow_unused=True, materialize_grads=True)
        results = iter(found)
        return [None if t is None else next(results) for t in (g, *tensors)]
