"""The edge product on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nbody_pyg.kernels.codegen import EdgeProduct
from nbody_pyg.kernels.gpu.build import Program
from nbody_pyg.kernels.gpu.edge_source import apart, groups_of, one_body_source
from nbody_pyg.kernels.gpu.grid import channel_block, parts_of_a_node, warps
from nbody_pyg.kernels.gpu.order import EdgeOrder, edge_order
from nbody_pyg.kernels.operation import Operands, Tensors, filled
from nbody_pyg.kernels.ops import OneBodyOperation

#: More coefficients than this (lmax 3 in both parities has 1,400) would take minutes to compile.
MAX_TERMS = 2000
#: Edges that one program sums up for the gradient of the weights; fewer if the result would not fill the GPU.
_CHUNKS, _SHORTEST = 512, 32


class OneBodyProgram(OneBodyOperation):
    """The edge product in Triton, with the arguments of :class:`nbody_pyg.kernels.ops.OneBodyKernel`."""

    recordable = False

    def __init__(self, product: EdgeProduct, channels: int) -> None:
        super().__init__(product, channels)
        self.groups, self.too_long = len(groups_of(product.terms, product.basis)), len(product.terms) > MAX_TERMS
        self.together = 1 if apart(self.groups) else self.groups
        self.program = Program(one_body_source, product)

    def __call__(
        self, x: Tensor, harmonics: Tensor, radial: Tensor, weight: Tensor, index: Tensor, num_targets: int
    ) -> Tensor:
        """Sum over edges, radial weights ``radial @ weight``: (targets, rows_out, channels)."""
        self.check(x, harmonics, radial, weight, index)
        order = edge_order(index, x.shape[0], num_targets)
        total: Tensor = self.run(*[t.contiguous() for t in (x, harmonics, radial, weight)], sizes=order)
        return total

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        x = operands.inputs[0]  # the forward pass has no g; x is passed instead
        return (self._targets(operands.sizes, (x, *operands.inputs)),), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        return self._by_input(operands.sizes, (*g, *operands.inputs), (), wanted)

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        of_weight = None if c[3] is None else c[3].contiguous()
        order, factors = operands.sizes, (*g, *operands.inputs)
        cotangents = (*filled(c[:3], operands.inputs[:3]), of_weight)
        gg = self._targets(order, factors, cotangents) if wanted[0] else None
        return gg, *self._by_input(order, factors, cotangents, wanted[1:])

    def _by_input(
        self, order: EdgeOrder, factors: Sequence[Tensor], cotangents: Tensors, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        gx = self._sources(order, factors, cotangents) if wanted[0] else None
        gy, gb = self._edges(order, factors, cotangents) if wanted[1] or wanted[2] else (None, None)
        return gx, gy, gb, self._weights(order, factors, cotangents) if wanted[3] else None

    # ------------------------------------------------------------------ launches
    def _constants(self, x: Tensor, u: Tensor | None) -> dict[str, int]:
        block = channel_block(self.channels, x.element_size())
        return {"C": self.channels, "CB": block, "HAS_U": int(u is not None), "num_warps": warps(block)}

    def _launch(self, name: str, grid: tuple[int, int, int], given: tuple[Any, ...], constants: dict[str, int]) -> None:
        """All groups: in one launch, or in one each."""
        if not apart(self.groups):
            self.program.launch(name, grid, *given, **constants, GROUP=0)
            return
        for group in range(self.groups):
            self.program.launch(name, (*grid[:2], 1), *given, **constants, GROUP=group)

    def _sum(
        self,
        name: str,
        order: EdgeOrder,
        end: int,
        out_rows: int,
        groups: int,
        factors: Sequence[Tensor],
        cotangents: Tensors = (),
    ) -> Tensor:
        """A function that sums over edges at one of their ends: (nodes, out_rows, channels)."""
        x, rows, nodes = factors[1], order.by(end), order.sizes[end]
        constants = self._constants(x, cotangents[3] if cotangents else None)
        blocks = -(-self.channels // constants["CB"])
        split = parts_of_a_node(nodes, blocks * (1 if end == 0 else self.together), len(rows.edge))
        # The sum over the edges of a source includes all groups: kernels of one group write separate sums
        planes = split * (self.groups if end == 0 and apart(self.groups) else 1)
        out = x.new_empty(planes, nodes, out_rows, self.channels)
        given = (out, *factors, *cotangents, *rows, nodes, split)
        self._launch(name, (nodes * split, blocks, groups), given, constants)
        return out[0] if planes == 1 else out.sum(0)

    def _targets(self, order: EdgeOrder, factors: Sequence[Tensor], cotangents: Tensors = ()) -> Tensor:
        name = "one_body_targets" + "_double" * bool(cotangents)
        return self._sum(name, order, 1, self.product.rows_out, self.groups, factors, cotangents)

    def _sources(self, order: EdgeOrder, factors: Sequence[Tensor], cotangents: Tensors = ()) -> Tensor:
        name = "one_body_sources" + "_double" * bool(cotangents)
        return self._sum(name, order, 0, self.product.rows_in, 1, factors, cotangents)

    def _edges(self, order: EdgeOrder, factors: Sequence[Tensor], cotangents: Tensors = ()) -> tuple[Tensor, Tensor]:
        """Gradients of the harmonics and of the radial functions."""
        x, rows, nodes = factors[1], order.by(1), order.sizes[1]
        constants = self._constants(x, cotangents[3] if cotangents else None)
        blocks, count = -(-self.channels // constants["CB"]), len(rows.edge)
        split = parts_of_a_node(nodes, blocks * self.together, count)
        planes = x.new_empty(blocks * self.groups, count, self.product.harmonics + self.product.basis)
        given = (planes, count, *factors, *cotangents, *rows, nodes, split)
        name = "one_body_edges" + "_double" * bool(cotangents)
        self._launch(name, (nodes * split, blocks, self.groups), given, constants)
        total = planes[0] if len(planes) == 1 else planes.sum(0)
        return total[:, : self.product.harmonics].contiguous(), total[:, self.product.harmonics :].contiguous()

    def _weights(self, order: EdgeOrder, factors: Sequence[Tensor], cotangents: Tensors = ()) -> Tensor:
        """Gradient of the radial weights."""
        x, rows = factors[1], order.by(1)
        constants, count = self._constants(x, None), len(rows.edge)
        length = max(_SHORTEST, -(-count // _CHUNKS))
        chunks, blocks = -(-count // length), -(-self.channels // constants["CB"])
        out = x.new_empty(chunks, self.product.basis, self.product.paths * self.channels)
        # The weights themselves do not occur in their own gradient
        given = (out, *factors[:4], *cotangents[:3], rows.edge, rows.source, rows.target, count, length)
        name = "one_body_weights" + "_double" * bool(cotangents)
        self._launch(name, (chunks, blocks, self.groups), given, constants)
        return out[0] if chunks == 1 else out.sum(0)
