"""The covariant linear map of Proposition 1, for any type and for the states of one multiplicity inside the network."""

from __future__ import annotations

from functools import partial

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn

from nbody_pyg.kernels.autograd_flags import opaque_to_compile
from nbody_pyg.kernels.backend import dispatch
from nbody_pyg.kernels.linear import LinearKernel
from nbody_pyg.kernels.update_source import Block
from nbody_pyg.nn.irreps import Resettable, equal_multiplicity, require_reachable, state_shape


class IrrepsLinear(Resettable):
    r"""Mix fragments of equal degree and parity, the only covariant linear map.

    .. math:: F'_\ell = F_\ell W^\ell, \qquad \#\text{weights} = \sum_\ell \tau_\ell \tau'_\ell

    Source: arXiv:1803.01588, the proposition on covariant linear maps (P5); departures: the parity of a fragment
    counts as part of its degree; weights start with variance 1/tau, which keeps the variance of the state.

    ===============  ==========  =================================
    symbol           code        shape
    ===============  ==========  =================================
    F                ``x``       (nodes, irreps_in.dim), ir_mul
    F'               result      (nodes, irreps_out.dim), ir_mul
    ===============  ==========  =================================

    Args:
        irreps_in: type of the input; fragments of one irrep may be in several blocks.
        irreps_out: type of the result.
        bias: add a learned constant to the 0e fragments of the result (the only ones that may have one).

    Equivariance: O(3), SO(3). Cost: O(nodes * sum (2l+1) tau tau').
    Raises: ValueError: a fragment of ``irreps_out`` does not occur in ``irreps_in``.
    """

    def __init__(self, irreps_in: o3.Irreps | str, irreps_out: o3.Irreps | str, bias: bool = False) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        require_reachable(self.irreps_out, {ir for _, ir in self.irreps_in}, "the linear map of " + str(self.irreps_in))
        self._slices, self._width = self.irreps_in.slices(), self.irreps_in.dim
        sources = [[i for i, (_, ir_in) in enumerate(self.irreps_in) if ir_in == ir] for _, ir in self.irreps_out]
        self._sources = sources
        self._fan_in = [sum(self.irreps_in[i].mul for i in source) for source in sources]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(fan_in, mul) * max(fan_in, 1) ** -0.5)
            for fan_in, (mul, _) in zip(self._fan_in, self.irreps_out, strict=True)
        )
        num_bias = sum(mul for mul, ir in self.irreps_out if ir == o3.Irrep("0e"))
        self.bias = nn.Parameter(torch.zeros(num_bias)) if bias and num_bias else None

    @opaque_to_compile
    def forward(self, x: Float[Tensor, "nodes irreps_in"]) -> Float[Tensor, "nodes irreps_out"]:
        nodes = x.shape[0]
        if x.dim() != 2 or x.shape[1] != self._width:
            raise ValueError(
                f"x must have shape [nodes, {self._width}] ({self.irreps_in}), got {list(x.shape)}; check the irreps"
            )
        blocks, used = [], 0
        for (mul, ir), source, weight in zip(self.irreps_out, self._sources, self.weights, strict=True):
            parts = [x[:, self._slices[i]].reshape(nodes, ir.dim, self.irreps_in[i].mul) for i in source]
            block = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)) @ weight
            if self.bias is not None and ir == o3.Irrep("0e"):
                block = block + self.bias[used : used + mul]
                used += mul
            blocks.append(block.reshape(nodes, ir.dim * mul))
        return torch.cat(blocks, dim=-1) if blocks else x.new_zeros(nodes, 0)

    def extra_repr(self) -> str:
        return f"{self.irreps_in} -> {self.irreps_out}"


class RowLinear(Resettable):
    """W^l on states inside the network, (nodes, rows_in, channels) to (nodes, rows_out, channels_out).

    The same map as :class:`~nbody_pyg.nn.linear.IrrepsLinear`, on the three-dimensional view that the gates use
    (:func:`~nbody_pyg.nn.irreps.state_shape`). ``irreps_out`` has one multiplicity, ``irreps_in`` may have several.
    With ``partial``, fragments of ``irreps_out`` that ``irreps_in`` lacks are zero.
    """

    def __init__(self, irreps_in: o3.Irreps | str, irreps_out: o3.Irreps | str, partial: bool = False) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        if not partial:
            require_reachable(self.irreps_out, {ir for _, ir in self.irreps_in}, f"the linear map of {irreps_in}")
        (rows, channels), channels_out = state_shape(self.irreps_in), equal_multiplicity(self.irreps_out)
        starts, start = {}, 0
        for mul, ir in self.irreps_in:
            if ir in starts:
                raise ValueError(
                    f"irreps_in must hold each fragment in one block, got {self.irreps_in}; use IrrepsLinear"
                )
            starts[ir] = (start, mul)
            start += ir.dim * mul // channels
        blocks, row_out = [], 0
        for _, ir in self.irreps_out:
            if ir in starts:
                row_in, mul = starts[ir]
                blocks.append(Block(row_in, row_out, ir.dim, mul, channels_out))
            row_out += ir.dim
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(b.size_in, channels_out) * b.size_in**-0.5) for b in blocks
        )
        self.kernel = LinearKernel(blocks, rows, channels, row_out, channels_out)

    def forward(self, x: Float[Tensor, "nodes rows_in channels"]) -> Float[Tensor, "nodes rows_out channels_out"]:
        return blockwise_linear(self.kernel, x, *self.weights)

    def extra_repr(self) -> str:
        return f"{self.irreps_in} -> {self.irreps_out}"


def blockwise_linear(
    kernel: LinearKernel, x: Float[Tensor, "nodes rows_in channels"], *weights: Tensor
) -> Float[Tensor, "nodes rows_out channels_out"]:
    """Multiply each block of rows by its own matrix; rows of no block become zero."""
    mixed: Tensor = dispatch((x, *weights), kernel, None, partial(_plain, kernel))
    return mixed


def _plain(kernel: LinearKernel, x: Tensor, *weights: Tensor) -> Tensor:
    nodes, channels = x.shape[0], x.shape[2]
    pieces, row = [], 0
    for block, weight in zip(kernel.blocks, weights, strict=True):
        if block.row_out > row:
            pieces.append(x.new_zeros(nodes, block.row_out - row, kernel.shape_out[1]))
        rows = x[:, block.row_in : block.row_in + block.dim * (block.size_in // channels)]
        pieces.append(rows.reshape(nodes, block.dim, block.size_in) @ weight)
        row = block.row_out + block.dim
    if row < kernel.shape_out[0]:
        pieces.append(x.new_zeros(nodes, kernel.shape_out[0] - row, kernel.shape_out[1]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
