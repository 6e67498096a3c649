"""The density of bare atoms on a GPU: source and launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbody_pyg.kernels.gpu.build import Program
from nbody_pyg.kernels.gpu.order import EdgeOrder, edge_order
from nbody_pyg.kernels.operands import check_index, check_operands, check_range
from nbody_pyg.kernels.operation import Operands, Operation, Tensors, filled

#: Sums that one program keeps in registers: harmonics times slots of the radial functions.
_TILE = 1024
#: Edges of one program of the backward pass.
_EDGES = 8

_SOURCE = '''
@triton.jit
def density_sum(out, Y, B, a, d, ptr, edge, source, target, species, M: tl.constexpr, K: tl.constexpr,
                Q: tl.constexpr, MP: tl.constexpr, QB: tl.constexpr, TWO: tl.constexpr):
    """out[t, m, s K + b] = sum over the edges of t from species s of Y_m B_b (TWO: a_m B_b + Y_m d_b)."""
    t = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, MP)
    q = tl.program_id(1) * QB + tl.arange(0, QB)
    total = tl.zeros([MP, QB], out.dtype.element_ty)
    for k in range(tl.load(ptr + t), tl.load(ptr + t + 1)):
        e = tl.load(edge + k).to(tl.int64)
        here = (q // K == tl.load(species + tl.load(source + k))) & (q < Q)
        y = tl.load(Y + e * M + m, mask=m < M, other=0.0)
        b = tl.load(B + e * K + q % K, mask=here, other=0.0)
        if TWO:
            ya = tl.load(a + e * M + m, mask=m < M, other=0.0)
            bd = tl.load(d + e * K + q % K, mask=here, other=0.0)
            total += ya[:, None] * b[None, :] + y[:, None] * bd[None, :]
        else:
            total += y[:, None] * b[None, :]
    at = out + t * (M * Q) + m[:, None] * Q + q[None, :]
    tl.store(at, total, mask=(m[:, None] < M) & (q[None, :] < Q))


@triton.jit
def density_edges(g, Y, B, gY, gB, source, target, species, edges, M: tl.constexpr, K: tl.constexpr,
                  Q: tl.constexpr, MP: tl.constexpr, KP: tl.constexpr, EB: tl.constexpr):
    """gY_m = sum over b of g[t, m, s K + b] B_b and gB_b = sum over m of g Y_m, edge by edge."""
    e = tl.program_id(0).to(tl.int64) * EB + tl.arange(0, EB)
    m = tl.arange(0, MP)
    b = tl.arange(0, KP)
    live = e < edges
    t = tl.load(target + e, mask=live, other=0).to(tl.int64)
    s = tl.load(species + tl.load(source + e, mask=live, other=0), mask=live, other=0)
    inside = live[:, None, None] & (m[None, :, None] < M) & (b[None, None, :] < K)
    at = t[:, None, None] * (M * Q) + m[None, :, None] * Q + s[:, None, None] * K + b[None, None, :]
    h = tl.load(g + at, mask=inside, other=0.0)
    ym = live[:, None] & (m[None, :] < M)
    bm = live[:, None] & (b[None, :] < K)
    y = tl.load(Y + e[:, None] * M + m[None, :], mask=ym, other=0.0)
    r = tl.load(B + e[:, None] * K + b[None, :], mask=bm, other=0.0)
    tl.store(gY + e[:, None] * M + m[None, :], tl.sum(h * r[:, None, :], axis=2), mask=ym)
    tl.store(gB + e[:, None] * K + b[None, :], tl.sum(h * y[:, :, None], axis=1), mask=bm)
'''


def _power(number: int) -> int:
    """The next power of two, as extents of tiles must be."""
    return 1 << (number - 1).bit_length()


program = Program(lambda: _SOURCE)


class DensityProgram(Operation):
    """Harmonics times radial functions, summed at each target for every species of the sources.

    Same result as :class:`nbody_pyg.kernels.ops.DensityKernel`; species and edges are separate instead of slots.
    """

    num_inputs, recordable = 2, False

    def __init__(self, harmonics: int, basis: int, num_species: int) -> None:
        self.rows, self.basis, self.num_species = harmonics, basis, num_species
        self.width = num_species * basis

    def __call__(self, harmonics: Tensor, radial: Tensor, species: Tensor, index: Tensor, num_targets: int) -> Tensor:
        """Sum over edges: (targets, harmonics, species * basis)."""
        edges = index.shape[1]
        check_operands(
            radial.dtype, radial.device, radial=(radial, (edges, self.basis)), harmonics=(harmonics, (edges, self.rows))
        )
        check_index(radial.device, index=(index, (2, edges)), species=(species, (species.shape[0],)))
        order = edge_order(index, species.shape[0], num_targets)
        if not species.is_cuda:  # on a GPU this would synchronise; the network looks up elements in a table
            check_range("species", species, self.num_species)
        density: Tensor = self.run(harmonics.contiguous(), radial.contiguous(), species.to(torch.int32), sizes=order)
        return density

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        return (self._sum(operands, *operands.inputs),), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        return self._edges(operands, *g, *operands.inputs)

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        c = filled(c, operands.inputs)
        return self._sum(operands, *operands.inputs, *c), *self._edges(operands, *g, *c)

    def sizes(self) -> dict[str, int]:
        """Extents for which its kernels are compiled."""
        return {"M": self.rows, "K": self.basis, "Q": self.width, "MP": _power(self.rows)}

    def _sum(self, operands: Operands, harmonics: Tensor, radial: Tensor, *two: Tensor) -> Tensor:
        order: EdgeOrder = operands.sizes
        sizes, targets = self.sizes(), order.sizes[1]
        block = min(_power(self.width), max(_TILE // sizes["MP"], 16))
        out = radial.new_empty(targets, self.rows, self.width)
        grid = (targets, -(-self.width // block))
        a, d = two or (harmonics, radial)
        given = (out, harmonics, radial, a, d, *order.by(1), *operands.constants)
        program.launch("density_sum", grid, *given, **sizes, QB=block, TWO=int(bool(two)), num_warps=1)
        return out

    def _edges(self, operands: Operands, g: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        order: EdgeOrder = operands.sizes
        count = y.shape[0]
        gy, gb = torch.empty_like(y), torch.empty_like(b)
        given = (g, y, b, gy, gb, *order.ends, *operands.constants, count)
        constants = {**self.sizes(), "KP": _power(self.basis), "EB": _EDGES, "num_warps": 4}
        program.launch("density_edges", (-(-count // _EDGES),), *given, **constants)
        return gy, gb
