r"""The blockwise linear map W^l of node states, compiled.

A state (nodes, rows, channels) is cut into one block of rows per degree; block l, read as a matrix with one row per
node and component, is multiplied by its own matrix. The map is bilinear, so all derivatives consist of three
contractions:

.. math:: Z = X W, \qquad X' = Z' W^T, \qquad W' = X^T Z'
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import Several, check_matrices, check_operands
from nbody_pyg.kernels.operation import Operands, Operation, Tensors
from nbody_pyg.kernels.panels import LINKED, LINKS
from nbody_pyg.kernels.update_source import Block, Map

#: Nodes processed together, so that their rows of one degree stay in the L1 cache.
_SOURCE = """
enum { TILE = 32 };
typedef struct { int64_t start_in, start_out, dim, K, D; } Block;  /* starts and sizes in numbers of reals */
#define ROWS(p, x, stride, size) const real* p[TILE * q.dim]; rows_of(p, (x) + n * (stride), stride, size, q.dim, nodes);
#define TILES for (int64_t n = 0; n < N; n += TILE) { const int64_t nodes = N - n < TILE ? N - n : TILE;
/* tiles write to rows of their own */
#define SHARED_TILES _Pragma("omp parallel for schedule(static) num_threads(team(threads, N / TILE)) if(threads > 1 && N >= 2 * TILE)") TILES
void linear_apply(int64_t threads, int64_t blocks, int64_t N, const Block* block, int64_t xs, int64_t zs,
    const real* x, const real* const* W, real* z) {
  for (int64_t b = 0; b < blocks; b++) {
    const Block q = block[b];
    SHARED_TILES
      ROWS(in, x + q.start_in, xs, q.K) ROWS(out, z + q.start_out, zs, q.D)
      rows_apply(nodes * q.dim, q.K, q.D, in, W[b], (real* const*)out);
    }
  }
}
void linear_transposed(int64_t threads, int64_t blocks, int64_t N, const Block* block, int64_t xs, int64_t zs,
    const real* z, const real* const* W, real* scratch, real* x) {
  for (int64_t b = 0; b < blocks; b++) {
    const Block q = block[b];
    transpose(q.K, q.D, W[b], scratch);
    SHARED_TILES
      ROWS(in, x + q.start_in, xs, q.K) ROWS(out, z + q.start_out, zs, q.D)
      rows_apply(nodes * q.dim, q.D, q.K, out, scratch, (real* const*)in);
    }
  }
}
void linear_outer(int64_t threads, int64_t blocks, int64_t N, const Block* block, int64_t xs, int64_t zs,
    const real* x, const real* z, real* const* W) {
  for (int64_t b = 0; b < blocks; b++) {
    const Block q = block[b];
    TILES
      ROWS(in, x + q.start_in, xs, q.K) ROWS(out, z + q.start_out, zs, q.D)
      rows_outer(nodes * q.dim, q.K, q.D, in, out, W[b]);
    }
  }
}
"""


class LinearKernel(Operation):
    """Blockwise linear map: x (nodes, rows_in, channels_in) and one matrix per block to (nodes, rows_out, channels_out)."""

    def __init__(self, blocks: list[Block], rows_in: int, channels_in: int, rows_out: int, channels_out: int) -> None:
        self.blocks, self.shape_in, self.shape_out = blocks, (rows_in, channels_in), (rows_out, channels_out)
        numbers = [
            number
            for b in blocks
            for number in (b.row_in * channels_in, b.row_out * channels_out, b.dim, b.size_in, b.size_out)
        ]
        self._table = torch.tensor(numbers, dtype=torch.int64)
        self._strides = (rows_in * channels_in, rows_out * channels_out)
        self._sizes = [b.size_in * b.size_out for b in blocks]
        self._scratch = max(self._sizes, default=0)
        self.num_inputs = 1 + len(blocks)
        self.weights = range(1, self.num_inputs)

    @property
    def library(self) -> Library:
        """The compiled functions, shared by all maps."""
        return _library

    @property
    def map(self) -> Map:
        """The same map, as a part of a larger kernel."""
        (rows_in, channels_in), (rows_out, channels_out) = self.shape_in, self.shape_out
        return Map(tuple(self.blocks), rows_in * channels_in, channels_in, rows_out * channels_out, channels_out)

    def __call__(self, x: Tensor, *weights: Tensor) -> Tensor:
        check_operands(x.dtype, x.device, x=(x, (x.shape[0], *self.shape_in)))
        check_matrices(x.dtype, x.device, weights, [(b.size_in, b.size_out) for b in self.blocks])
        out: Tensor = self.run(*[t.contiguous() for t in (x, *weights)])
        return out

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        x, *weights = operands.inputs
        out = x.new_zeros(x.shape[0], *self.shape_out)
        self._apply(x, weights, out)
        return (out,), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        x, *weights = operands.inputs
        gx = self._transposed(g[0], weights) if wanted[0] else None
        gw = self._outer(x, g[0]) if any(wanted[1:]) else [None] * len(weights)
        return gx, *gw

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        x, *weights = operands.inputs
        of_x = None if c[0] is None else c[0].contiguous()
        of_weights = None
        if any(t is not None for t in c[1:]):
            of_weights = [
                torch.zeros_like(w) if t is None else t.contiguous() for t, w in zip(c[1:], weights, strict=True)
            ]
        gg, gx = torch.zeros_like(g[0]), None
        gw: Sequence[Tensor | None] = [None] * len(weights)
        if of_x is not None:
            self._apply(of_x, weights, gg)
            gw = self._outer(of_x, g[0]) if any(wanted[2:]) else gw
        if of_weights is not None:
            self._apply(x, of_weights, gg)
            gx = self._transposed(g[0], of_weights) if wanted[1] else None
        return gg, gx, *gw

    def _call(self, name: str, dtype: torch.dtype, nodes: int, *arguments: Tensor | Several) -> None:
        sizes = (len(self.blocks), nodes)
        _library.call(name, dtype, *sizes, self._table, *self._strides, self._scratch, *arguments)

    def _several(self, weights: Sequence[Tensor]) -> Several:
        return Several(weights, self._sizes)

    def _apply(self, x: Tensor, weights: Sequence[Tensor], out: Tensor) -> None:
        """Add X W to a result."""
        self._call("linear_apply", x.dtype, x.shape[0], x, self._several(weights), out)

    def _transposed(self, g: Tensor, weights: Sequence[Tensor]) -> Tensor:
        out, scratch = g.new_zeros(g.shape[0], *self.shape_in), g.new_empty(self._scratch)
        self._call("linear_transposed", g.dtype, g.shape[0], g, self._several(weights), scratch, out)
        return out

    def _outer(self, x: Tensor, g: Tensor) -> list[Tensor]:
        out = [x.new_zeros(b.size_in, b.size_out) for b in self.blocks]
        self._call("linear_outer", x.dtype, x.shape[0], x, g, self._several(out))
        return out


#: Blocks, nodes, table of the blocks, numbers of a node before and after, and of the largest matrix.
_GIVEN = "B N longs:5*B X Z (W)"
_library = Library(
    "enum { LINKS = 2 };" + LINKED + _SOURCE,
    {
        "linear_apply": f"{_GIVEN} reals:N*X several reals:N*Z",
        "linear_transposed": f"{_GIVEN} reals:N*Z several reals:W reals:N*X",
        "linear_outer": f"{_GIVEN} reals:N*X reals:N*Z several",
    },
    LINKS,
)
