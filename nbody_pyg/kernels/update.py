"""Autograd around the compiled update of a part: one call forward, one backward, one for the derivative of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nbody_pyg.kernels.derivatives import last_derivative
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import Several, check_index, check_matrices, check_operands, check_range
from nbody_pyg.kernels.ops import ProductKernel
from nbody_pyg.kernels.panels import LINKS
from nbody_pyg.kernels.scope import apply, gradients_wanted
from nbody_pyg.kernels.update_source import PRODUCT_FUNCTIONS, Update, update_source, workspace_size

#: Result of the same update in plain torch, for derivatives that are not compiled.
Reference = Callable[..., Tensor]


class UpdateKernel:
    """Compiled form of one :class:`~nbody_pyg.kernels.update_source.Update`.

    Args:
        update: what is computed.
        products: the compiled products of ``update.products``.
        num_species: rows of the tables of factors and constants.
        reference: ``reference(inputs, species, matrices, scale, bias)`` in plain torch. Used only where something
            depends on the gradient of a weight (as in learning to learn), which the compiled code does not follow.
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
            f"N longs{'?' * (not degrees and not update.bias)}:N several several "
            f"reals{optional[0]}:{scale} reals{optional[1]}:{bias} reals:{workspace_size(update)} reals:{state} reals:{kept}"
        )
        signatures = {
            "update_forward": f"{leading} {out}",
            "update_backward": f"{leading} {out} several several? reals?:{scale} reals?:{bias}",
            "update_double": f"{leading} {out} several {out} several several reals:{scale}",
        }
        links = [(p.library, f"product_{what}") for p in products for what in PRODUCT_FUNCTIONS]
        self.library = Library(update_source(update), signatures, [*LINKS, *links])
        self.shapes = update.shapes
        self.degrees = degrees
        self._sizes = [rows * columns for rows, columns in self.shapes]
        self._workspace = workspace_size(update)
        self._kept = max(len(update.products) - 1, 0)

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
            species = species.contiguous()
        tensors = [t.contiguous() for t in (*inputs, *matrices)]
        extra = [None if t is None else t.contiguous() for t in (scale, bias)]
        return apply(_Update, self, species, *extra, *tensors)

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Inputs and matrices out of one list."""
        count = len(self.update.inputs)
        return tensors[:count], tensors[count:]

    def leading(self, species, scale, bias, tensors) -> list:
        """The arguments that all three functions begin with, but for the number of nodes."""
        inputs, matrices = self.split(tensors)
        work = inputs[0].new_empty(self._workspace)
        return [species, self.states(inputs), self.matrices(matrices), scale, bias, work]

    def states(self, tensors: Sequence[Tensor | None]) -> Several:
        """One tensor per input, of its shape."""
        nodes = next((t.shape[0] for t in tensors if t is not None), 0)
        return Several(tensors, [nodes * size for size in self.update.inputs])

    def matrices(self, tensors: Sequence[Tensor]) -> Several:
        """One tensor per matrix, of its shape."""
        return Several(tensors, self._sizes)

    def fresh_gradients(self, like: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Zeros for the gradients of factors, constants and matrices, in one piece of memory."""
        u = self.update
        shapes = [(self.num_species, self.degrees, u.channels), (self.num_species, u.channels), *self.shapes]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        pieces = like.new_zeros(sum(sizes)).split(sizes)
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return views[0], views[1], views[2:]

    def fresh_states(self, like: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Room for the sums a and the products q_k."""
        u = self.update
        return like.new_empty(nodes, u.rows, u.channels), like.new_empty(self._kept, nodes, u.rows, u.channels)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: UpdateKernel, species, scale, bias, *tensors: Tensor) -> Tensor:
        first = tensors[0]
        sums, kept = kernel.fresh_states(first, first.shape[0])
        out = first.new_empty(first.shape[0], kernel.update.rows_out, kernel.update.channels)
        leading = kernel.leading(species, scale, bias, tensors)
        kernel.library.call("update_forward", first.dtype, first.shape[0], *leading, sums, kept, out)
        ctx.kernel = kernel
        ctx.save_for_backward(species, scale, bias, sums, kept, *tensors)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        edges, count = ctx.next_functions, len(ctx.kernel.shapes)
        # Not of the inputs, which stand between factors and constants and the matrices
        weigh = gradients_wanted((*edges[: -count - len(ctx.kernel.update.inputs)], *edges[-count:]))
        return None, None, *apply(_UpdateBackward, ctx.kernel, weigh, g.contiguous(), *ctx.saved_tensors)


class _UpdateBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: UpdateKernel, weigh: bool, g: Tensor, species, scale, bias, sums, kept, *tensors: Tensor):
        ctx.kernel = kernel
        ctx.save_for_backward(g, species, scale, bias, sums, kept, *tensors)
        ctx.set_materialize_grads(False)
        inputs, matrices = kernel.split(tensors)
        gradients = [torch.empty_like(x) for x in inputs]
        gs, gb, gw = kernel.fresh_gradients(g) if weigh else (None, None, None)
        leading = kernel.leading(species, scale, bias, tensors)
        rest = (sums, kept, g, kernel.states(gradients), kernel.matrices(gw) if weigh else None, gs, gb)
        kernel.library.call("update_backward", g.dtype, g.shape[0], *leading, *rest)
        if not weigh:
            return None, None, *gradients, *[None] * len(matrices)
        return None if scale is None else gs, None if bias is None else gb, *gradients, *gw

    @staticmethod
    @last_derivative
    def backward(ctx, *cotangents: Tensor | None):
        g, species, scale, bias, sums, kept, *tensors = ctx.saved_tensors
        kernel, count = ctx.kernel, len(ctx.kernel.update.inputs)
        of_inputs = [None if c is None else c.contiguous() for c in cotangents[2 : 2 + count]]
        if any(c is not None for c in (*cotangents[:2], *cotangents[2 + count :])):
            gg, *rest = _in_torch(kernel, g, species, scale, bias, tensors, cotangents)
            return None, None, gg, None, *rest[:2], None, None, *rest[2:]
        gg, gradients = torch.empty_like(g), [torch.empty_like(x) for x in tensors[:count]]
        gs, _, gw = kernel.fresh_gradients(g)
        leading = kernel.leading(species, scale, bias, tensors)
        rest = (sums, kept, g, kernel.states(of_inputs), gg, kernel.states(gradients), kernel.matrices(gw), gs)
        kernel.library.call("update_double", g.dtype, g.shape[0], *leading, *rest)
        return None, None, gg, None, None if scale is None else gs, None, None, None, *gradients, *gw


def _in_torch(kernel, g, species, scale, bias, tensors, cotangents) -> list[Tensor | None]:
    """The derivative of the backward pass by g, scale, bias, inputs and matrices, by differentiating plain torch."""
    with torch.enable_grad():
        g, scale, bias, *tensors = (
            None if t is None else t.detach().requires_grad_(True) for t in (g, scale, bias, *tensors)
        )
        inputs, matrices = kernel.split(tensors)
        out = kernel.reference(inputs, species, matrices, scale, bias)
        given = [(t, c) for t, c in zip((scale, bias, *tensors), cotangents, strict=True) if c is not None]
        first = torch.autograd.grad(out, [t for t, _ in given], g, create_graph=True, materialize_grads=True)
        leaves = [t for t in (g, scale, bias, *tensors) if t is not None]
        found = torch.autograd.grad(first, leaves, [c for _, c in given], allow_unused=True, materialize_grads=True)
    results = iter(found)
    return [None if t is None else next(results) for t in (g, scale, bias, *tensors)]
