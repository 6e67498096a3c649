r"""Tensor products followed by the Clebsch-Gordan decomposition: the only nonlinearity of an N-body network.

Two products: :class:`FullProduct` couples every fragment of one state with every fragment of the other, as the
paper does; :class:`ChannelwiseProduct` couples equal channels only. With linear maps before and after it, it represents
the full product, with its weights decomposed into rank-one terms.
"""

from __future__ import annotations

from collections import Counter

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn

from nbody_pyg.kernels.autograd_flags import opaque_to_compile
from nbody_pyg.kernels.backend import dispatch
from nbody_pyg.kernels.codegen import Term
from nbody_pyg.kernels.gpu.product import ProductProgram
from nbody_pyg.kernels.linear import LinearKernel
from nbody_pyg.kernels.ops import ProductKernel
from nbody_pyg.kernels.update_source import Block
from nbody_pyg.nn.irreps import (
    ConstantTables,
    Path,
    Resettable,
    clebsch_gordan,
    coupling_paths,
    equal_multiplicity,
    num_rows,
    row_slices,
)
from nbody_pyg.nn.linear import blockwise_linear


class ChannelwiseProduct(ConstantTables):
    r"""Products of equal channels of two states, decomposed, then mixed by W^l.

    .. math:: F'^{\,\ell}_{c'} = \sum_{(\ell_1 \ell_2) \to \ell} \sum_c
              CG(x^{\ell_1}_c \otimes y^{\ell_2}_c)^\ell \; W^{\ell}_{(\ell_1 \ell_2) c,\, c'}

    Source: arXiv:1803.01588 (P6, P9, P11); departure: equal channels only, a rank-C form of the full product.

    ============  ===========  ======================================================
    symbol        code         shape
    ============  ===========  ======================================================
    x, y          ``x, y``     (nodes, rows, channels): states of one multiplicity
    F'            result       (nodes, rows_out, channels_out)
    ============  ===========  ======================================================

    Args:
        irreps1: type of ``x``, one multiplicity for all fragments.
        irreps2: type of ``y``, the same multiplicity.
        irreps_out: type of the result, one multiplicity; fragments that no path reaches are filled with zeros.
        symmetric: both factors will be the same tensor; leaves out couplings that repeat or vanish.

    Equivariance: O(3), SO(3). Cost: O(nodes rows^2 rows_out channels) for the dense coupling table.
    Raises: ValueError: unequal multiplicities.
    """

    coupling: Tensor

    def __init__(self, irreps1: o3.Irreps, irreps2: o3.Irreps, irreps_out: o3.Irreps, symmetric: bool = False) -> None:
        super().__init__()
        self.irreps1, self.irreps2, self.irreps_out = (
            o3.Irreps(irreps1),
            o3.Irreps(irreps2),
            o3.Irreps(irreps_out),
        )
        channels = equal_multiplicity(self.irreps1)
        if equal_multiplicity(self.irreps2) != channels:
            raise ValueError(
                f"irreps2 must have the multiplicity of irreps1, got {irreps1} and {irreps2}; use IrrepsLinear"
            )
        self.paths = coupling_paths(self.irreps1, self.irreps2, self.irreps_out, symmetric)
        table = coupling_table(self.irreps1, self.irreps2, self.paths)
        self.add_table("coupling", table)
        rows1, rows2 = num_rows(self.irreps1), num_rows(self.irreps2)
        sizes = (table_terms(table, self.paths, rows2), rows1, rows2, table.shape[0], channels)
        self.kernel, self.gpu = ProductKernel(*sizes), ProductProgram(*sizes)
        self.mix = PathLinear(self.paths, channels, self.irreps_out)

    def forward(
        self, x: Float[Tensor, "nodes rows1 channels"], y: Float[Tensor, "nodes rows2 channels"]
    ) -> Float[Tensor, "nodes rows_out channels_out"]:
        mixed: Tensor = self.mix(self.couple(x, y))
        return mixed

    def couple(
        self, x: Float[Tensor, "nodes rows1 channels"], y: Float[Tensor, "nodes rows2 channels"]
    ) -> Float[Tensor, "nodes path_rows channels"]:
        """The product path by path, before W^l."""
        coupled: Tensor = dispatch((x, y), self.kernel, self.gpu, self._plain)
        return coupled

    def _plain(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(self.coupling, (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1, 2))

    def extra_repr(self) -> str:
        return f"{self.irreps1} x {self.irreps2} -> {self.irreps_out}, {len(self.paths)} paths"


class PathLinear(Resettable):
    """W^l after a product: per degree, mixes all channels of all paths that give that degree.

    Rows come ordered by (result, component, path), so that each degree's block is a plain matrix.
    """

    def __init__(self, paths: list[Path], channels: int, irreps_out: o3.Irreps) -> None:
        super().__init__()
        self.irreps_out = o3.Irreps(irreps_out)
        self.channels_out = equal_multiplicity(self.irreps_out)
        counts = Counter(path.ir for path in paths)
        starts, start = {}, 0
        for ir in dict.fromkeys(path.ir for path in paths):
            starts[ir] = start
            start += ir.dim * counts[ir]
        self._blocks, self.weights, row_out = [], nn.ParameterList(), 0
        for _, ir in self.irreps_out:
            if counts[ir]:
                fan_in = counts[ir] * channels
                self._blocks.append(Block(starts[ir], row_out, ir.dim, fan_in, self.channels_out))
                self.weights.append(nn.Parameter(torch.randn(fan_in, self.channels_out) * fan_in**-0.5))
            row_out += ir.dim
        self.kernel = LinearKernel(self._blocks, start, channels, row_out, self.channels_out)

    def forward(self, x: Float[Tensor, "nodes path_rows channels"]) -> Float[Tensor, "nodes rows channels_out"]:
        return blockwise_linear(self.kernel, x, *self.weights)


def path_row_order(paths: list[Path]) -> list[tuple[int, int]]:
    """(path number, component) of every row of a product, ordered by (result, component, path)."""
    order = []
    for ir in dict.fromkeys(path.ir for path in paths):
        numbers = [n for n, path in enumerate(paths) if path.ir == ir]
        order += [(n, m) for m in range(ir.dim) for n in numbers]
    return order


def coupling_table(irreps1: o3.Irreps, irreps2: o3.Irreps, paths: list[Path]) -> Tensor:
    """All coefficients of a product as one matrix (path rows, rows1 * rows2), float64."""
    slices1, slices2 = row_slices(irreps1), row_slices(irreps2)
    order = path_row_order(paths)
    table = torch.zeros(len(order), num_rows(irreps1), num_rows(irreps2), dtype=torch.float64)
    for row, (n, m) in enumerate(order):
        first, second, ir = paths[n]
        table[row, slices1[first], slices2[second]] = clebsch_gordan(irreps1[first].ir.l, irreps2[second].ir.l, ir.l)[
            ..., m
        ]
    return table.flatten(1)


def table_terms(table: Tensor, paths: list[Path], rows2: int) -> list[Term]:
    """The non-zero coefficients of a coupling table, for the generated kernels."""
    order = path_row_order(paths)
    return [
        Term(row, column // rows2, column % rows2, order[row][0], float(table[row, column]))
        for row, column in table.abs().gt(1e-14).nonzero().tolist()
    ]


class FullProduct(ConstantTables):
    r"""Every fragment of one state with every fragment of the other, decomposed; no weights.

    .. math:: F'^{\,\ell}_{(\ell_1 c_1)(\ell_2 c_2)} = CG(x^{\ell_1}_{c_1} \otimes y^{\ell_2}_{c_2})^\ell

    The literal product of the paper: its type grows as tau_1 tau_2 per path. For small types and for tests.

    Args:
        irreps1: type of ``x``, any multiplicities.
        irreps2: type of ``y``, any multiplicities.
        lmax: results of higher degree are left out (P11); None keeps all.

    Shapes: x (nodes, irreps1.dim), y (nodes, irreps2.dim) -> (nodes, irreps_out.dim), ir_mul throughout.
    Equivariance: O(3), SO(3). Cost: O(nodes tau_1 tau_2 paths (2l+1)^3).
    Raises: ValueError: states of another shape.
    """

    def __init__(self, irreps1: o3.Irreps | str, irreps2: o3.Irreps | str, lmax: int | None = None) -> None:
        super().__init__()
        self.irreps1, self.irreps2 = o3.Irreps(irreps1), o3.Irreps(irreps2)
        blocks = []
        for i, (mul1, ir1) in enumerate(self.irreps1):
            for j, (mul2, ir2) in enumerate(self.irreps2):
                blocks += [(mul1 * mul2, ir, i, j) for ir in ir1 * ir2 if lmax is None or ir.l <= lmax]
        blocks.sort(key=lambda block: (block[1].l, -block[1].p, block[2], block[3]))
        self.irreps_out = o3.Irreps([(mul, ir) for mul, ir, _, _ in blocks])
        self._pairs = [(i, j) for _, _, i, j in blocks]
        for n, (_, ir, i, j) in enumerate(blocks):
            self.add_table(f"cg_{n}", clebsch_gordan(self.irreps1[i].ir.l, self.irreps2[j].ir.l, ir.l))

    @opaque_to_compile
    def forward(
        self, x: Float[Tensor, "nodes irreps1"], y: Float[Tensor, "nodes irreps2"]
    ) -> Float[Tensor, "nodes irreps_out"]:
        nodes = x.shape[0]
        for name, state, irreps in (("x", x, self.irreps1), ("y", y, self.irreps2)):
            if state.dim() != 2 or state.shape != (nodes, irreps.dim):
                raise ValueError(
                    f"{name} must have shape [{nodes}, {irreps.dim}] ({irreps}), got {list(state.shape)}; "
                    "check the irreps"
                )
        xs = [
            x[:, s].reshape(nodes, ir.dim, mul)
            for s, (mul, ir) in zip(self.irreps1.slices(), self.irreps1, strict=True)
        ]
        ys = [
            y[:, s].reshape(nodes, ir.dim, mul)
            for s, (mul, ir) in zip(self.irreps2.slices(), self.irreps2, strict=True)
        ]
        blocks = [
            torch.einsum("nac,nbd,abm->nmcd", xs[i], ys[j], getattr(self, f"cg_{n}")).flatten(1)
            for n, (i, j) in enumerate(self._pairs)
        ]
        return torch.cat(blocks, dim=-1) if blocks else x.new_zeros(nodes, 0)

    def extra_repr(self) -> str:
        return f"{self.irreps1} x {self.irreps2} -> {self.irreps_out}"
