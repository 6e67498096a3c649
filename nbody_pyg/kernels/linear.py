r"""The blockwise linear map W^l of node states, compiled.

A state (nodes, rows, channels) is cut into one block of rows per degree; block l, read as a matrix with one row per
node and component, is multiplied by its own matrix. The map is bilinear, so its three contractions are each other's
derivatives and the chain closes at every order:

.. math:: Z = X W, \qquad X' = Z' W^T, \qquad W' = X^T Z'
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import check_operands
from nbody_pyg.kernels.scope import weight_gradients_skipped

#: Register tile: TILE rows times PANEL vectors of accumulators, which fills the registers of AVX-512.
_SOURCE = """
enum { TILE = 6, PANEL = 4 };
static const real* row_of(const real* x, int64_t stride, int64_t start, int64_t dim, int64_t size, int64_t r) {
  return x + (r / dim) * stride + start + (r % dim) * size;
}
static void panel(int64_t rows, int64_t vecs, int64_t K, const real** in, const real* W, int64_t D, real** out) {
  vec acc[TILE][PANEL];
  for (int64_t r = 0; r < rows; r++) for (int64_t v = 0; v < vecs; v++) acc[r][v] = (vec){0};
  for (int64_t k = 0; k < K; k++) for (int64_t v = 0; v < vecs; v++) {
    const vec w = *(const vec*)(W + k * D + v * WIDTH);
    for (int64_t r = 0; r < rows; r++) acc[r][v] += in[r][k] * w;
  }
  for (int64_t r = 0; r < rows; r++) for (int64_t v = 0; v < vecs; v++) *(vec*)(out[r] + v * WIDTH) = acc[r][v];
}
#define FIXED(R, V) __attribute__((noinline)) static void panel_##R##_##V(int64_t K, const real** in, const real* W, int64_t D, real** out) { \\
  vec acc[R][V]; \\
  for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) acc[r][v] = (vec){0}; \\
  for (int64_t k = 0; k < K; k++) { \\
    vec w[V]; \\
    for (int v = 0; v < V; v++) w[v] = *(const vec*)(W + k * D + v * WIDTH); \\
    for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) acc[r][v] += in[r][k] * w[v]; } \\
  for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) *(vec*)(out[r] + v * WIDTH) = acc[r][v]; }
FIXED(6, 1) FIXED(6, 2) FIXED(6, 4)
/* out = in W for one block */
static void multiply(int64_t R, int64_t K, int64_t D, const real* x, int64_t xs, int64_t x0, const real* W,
    real* out, int64_t os, int64_t o0, int64_t dim) {
  for (int64_t r0 = 0; r0 < R; r0 += TILE) {
    const int64_t rows = R - r0 < TILE ? R - r0 : TILE;
    const real* in[TILE]; real* to[TILE]; real* at[TILE];
    for (int64_t r = 0; r < rows; r++) {
      in[r] = row_of(x, xs, x0, dim, K, r0 + r);
      to[r] = (real*)row_of(out, os, o0, dim, D, r0 + r);
    }
    int64_t d = 0;
    while (d + WIDTH <= D) {
      int64_t vecs = (D - d) / WIDTH; vecs = vecs >= 4 ? 4 : vecs >= 2 ? 2 : 1;
      for (int64_t r = 0; r < rows; r++) at[r] = to[r] + d;
      if (rows == TILE && vecs == 4) panel_6_4(K, in, W + d, D, at);
      else if (rows == TILE && vecs == 2) panel_6_2(K, in, W + d, D, at);
      else if (rows == TILE && vecs == 1) panel_6_1(K, in, W + d, D, at);
      else panel(rows, vecs, K, in, W + d, D, at);
      d += vecs * WIDTH;
    }
    for (; d < D; d++) for (int64_t r = 0; r < rows; r++) {
      real s = 0;
      for (int64_t k = 0; k < K; k++) s += in[r][k] * W[k * D + d];
      to[r][d] = s;
    }
  }
}
/* blocks: start_in, start_out, dim, K, D for each; starts and strides in numbers of reals */
void linear_apply(int64_t nblocks, int64_t N, const int64_t* blocks, int64_t xs, int64_t os,
    const real* x, const real* const* W, real* out) {
  for (int64_t b = 0; b < nblocks; b++) {
    const int64_t *q = blocks + 5 * b;
    multiply(N * q[2], q[3], q[4], x, xs, q[0], W[b], out, os, q[1], q[2]);
  }
}
void linear_transposed(int64_t nblocks, int64_t N, const int64_t* blocks, int64_t xs, int64_t os,
    const real* g, const real* const* W, real* scratch, real* out) {
  for (int64_t b = 0; b < nblocks; b++) {
    const int64_t *q = blocks + 5 * b, K = q[3], D = q[4];
    for (int64_t k = 0; k < K; k++) for (int64_t d = 0; d < D; d++) scratch[d * K + k] = W[b][k * D + d];
    multiply(N * q[2], D, K, g, os, q[1], scratch, out, xs, q[0], q[2]);
  }
}
static void outer(int64_t R, int64_t K, int64_t D, const real* x, int64_t xs, int64_t x0,
    const real* g, int64_t gs, int64_t g0, int64_t dim, real* W) {
  for (int64_t k0 = 0; k0 < K; k0 += TILE) {
    const int64_t ks = K - k0 < TILE ? K - k0 : TILE;
    int64_t d = 0;
    for (; d + 2 * WIDTH <= D && ks == TILE; d += 2 * WIDTH) {
      vec acc[TILE][2];
      for (int k = 0; k < TILE; k++) acc[k][0] = acc[k][1] = (vec){0};
      for (int64_t r = 0; r < R; r++) {
        const real *xr = row_of(x, xs, x0, dim, K, r) + k0, *gr = row_of(g, gs, g0, dim, D, r) + d;
        const vec h0 = *(const vec*)gr, h1 = *(const vec*)(gr + WIDTH);
        for (int k = 0; k < TILE; k++) { acc[k][0] += xr[k] * h0; acc[k][1] += xr[k] * h1; }
      }
      for (int k = 0; k < TILE; k++) {
        *(vec*)(W + (k0 + k) * D + d) = acc[k][0]; *(vec*)(W + (k0 + k) * D + d + WIDTH) = acc[k][1];
      }
    }
    for (int64_t k = 0; k < ks; k++) for (int64_t c = d; c < D; c++) W[(k0 + k) * D + c] = 0;
    for (int64_t r = 0; r < R && d < D; r++) {
      const real *xr = row_of(x, xs, x0, dim, K, r) + k0, *gr = row_of(g, gs, g0, dim, D, r);
      for (int64_t k = 0; k < ks; k++) for (int64_t c = d; c < D; c++) W[(k0 + k) * D + c] += xr[k] * gr[c];
    }
  }
}
void linear_outer(int64_t nblocks, int64_t N, const int64_t* blocks, int64_t xs, int64_t os,
    const real* x, const real* g, real* const* W) {
  for (int64_t b = 0; b < nblocks; b++) {
    const int64_t *q = blocks + 5 * b;
    outer(N * q[2], q[3], q[4], x, xs, q[0], g, os, q[1], q[2], W[b]);
  }
}
"""


class Block(NamedTuple):
    """One degree: ``dim`` components per node, ``size_in`` numbers each at row ``row_in`` give ``size_out`` at ``row_out``.

    Rows are counted in channels of the input and of the result.
    """

    row_in: int
    row_out: int
    dim: int
    size_in: int
    size_out: int


class LinearKernel:
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
        self._scratch = max((b.size_in * b.size_out for b in blocks), default=0)
        covers_in = sum(b.dim * b.size_in for b in blocks) == rows_in * channels_in
        covers_out = sum(b.dim * b.size_out for b in blocks) == rows_out * channels_out
        self._fresh_in = torch.Tensor.new_empty if covers_in else torch.Tensor.new_zeros
        self._fresh_out = torch.Tensor.new_empty if covers_out else torch.Tensor.new_zeros

    def __call__(self, x: Tensor, *weights: Tensor) -> Tensor:
        check_operands(x.dtype, x=(x, (x.shape[0], *self.shape_in)))
        for block, weight in zip(self.blocks, weights, strict=True):
            check_operands(x.dtype, weight=(weight, (block.size_in, block.size_out)))
        return _Apply.apply(self, x.contiguous(), *[w.contiguous() for w in weights])

    def _call(self, name: str, dtype: torch.dtype, nodes: int, *arguments) -> None:
        _library.call(name, dtype, len(self.blocks), nodes, self._table, *self._strides, *arguments)

    def apply(self, x: Tensor, weights) -> Tensor:
        out = self._fresh_out(x, (x.shape[0], *self.shape_out))
        self._call("linear_apply", x.dtype, x.shape[0], x, _pointers(weights), out)
        return out

    def transposed(self, g: Tensor, weights) -> Tensor:
        out, scratch = self._fresh_in(g, (g.shape[0], *self.shape_in)), g.new_empty(self._scratch)
        pointers = (g, _pointers(weights), scratch, out)
        self._call("linear_transposed", g.dtype, g.shape[0], *pointers)
        return out

    def outer(self, x: Tensor, g: Tensor) -> list[Tensor]:
        out = [x.new_empty(b.size_in, b.size_out) for b in self.blocks]
        self._call("linear_outer", x.dtype, x.shape[0], x, g, _pointers(out))
        return out


def _pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


_library = Library(_SOURCE, {"linear_apply": "2ip2i3p", "linear_transposed": "2ip2i4p", "linear_outer": "2ip2i3p"})


# Operands are made contiguous before ``apply``: a copy made inside ``forward`` and saved there has no graph, and
# second derivatives would silently lose their part through it.
class _Apply(torch.autograd.Function):
    """Z = X W."""

    @staticmethod
    def forward(ctx, kernel: LinearKernel, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, *weights)
        return kernel.apply(x, weights)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, *weights = ctx.saved_tensors
        g = g.contiguous()
        gx = _Transposed.apply(ctx.kernel, g, *weights) if ctx.needs_input_grad[1] else None
        gw = (
            _Outer.apply(ctx.kernel, x, g)
            if any(ctx.needs_input_grad[2:]) and not weight_gradients_skipped()
            else [None] * len(weights)
        )
        return None, gx, *gw


class _Transposed(torch.autograd.Function):
    """X = Z W^T."""

    @staticmethod
    def forward(ctx, kernel: LinearKernel, z: Tensor, *weights: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(z, *weights)
        return kernel.transposed(z, weights)

    @staticmethod
    def backward(ctx, g: Tensor):
        z, *weights = ctx.saved_tensors
        g = g.contiguous()
        gz = _Apply.apply(ctx.kernel, g, *weights) if ctx.needs_input_grad[1] else None
        gw = (
            _Outer.apply(ctx.kernel, g, z)
            if any(ctx.needs_input_grad[2:]) and not weight_gradients_skipped()
            else [None] * len(weights)
        )
        return None, gz, *gw


class _Outer(torch.autograd.Function):
    """W = X^T Z, one matrix per block."""

    @staticmethod
    def forward(ctx, kernel: LinearKernel, x: Tensor, z: Tensor):
        ctx.kernel = kernel
        ctx.save_for_backward(x, z)
        return tuple(kernel.outer(x, z))

    @staticmethod
    def backward(ctx, *g: Tensor):
        x, z = ctx.saved_tensors
        g = [t.contiguous() for t in g]
        gx = _Transposed.apply(ctx.kernel, z, *g) if ctx.needs_input_grad[1] else None
        gz = _Apply.apply(ctx.kernel, x, *g) if ctx.needs_input_grad[2] else None
        return None, gx, gz
