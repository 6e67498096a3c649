"""Readouts: from the states of the parts to one covariant value per part, summed into one per system."""

from __future__ import annotations

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn

from nbody_pyg.nn.irreps import Resettable, has_two_orders, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear

#: Initial size of a value, relative to unit variance: dozens of parts add up to one energy.
_START = 0.1


def _small_linear(irreps_in: o3.Irreps, irreps_out: o3.Irreps) -> IrrepsLinear:
    linear = IrrepsLinear(irreps_in, irreps_out)
    with torch.no_grad():
        for weight in linear.weights:
            weight.mul_(_START)
    return linear


class LinearReadout(Resettable):
    """W^l alone: polynomial, any target type. The readout of the strict preset.

    Args:
        irreps_in: type of the states.
        irreps_out: type of the target, e.g. "0e", "1o" (dipole), "0e + 2e" (polarizability).

    Shapes: (nodes, rows, channels) -> (nodes, irreps_out.dim), e3nn's mul_ir order.
    Raises: ValueError: a fragment of the target that the states do not have.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps) -> None:
        super().__init__()
        self.linear = _small_linear(irreps_in, irreps_out)
        self._two_orders = has_two_orders(self.linear.irreps_out)

    def forward(self, x: Float[Tensor, "nodes rows channels"]) -> Float[Tensor, "nodes dim"]:
        y = self.linear(x.flatten(1))
        return to_mul_ir(y, self.linear.irreps_out) if self._two_orders else y


class MLPReadout(LinearReadout):
    r"""W^l plus, for the scalars of the target, a small network of the scalar channels.

    .. math:: y^0 = W^0 \psi^0 + V\, \mathrm{silu}(U \psi^0 + b), \qquad y^\ell = W^\ell \psi^\ell

    Fragments of higher degree pass through no activation (P9).

    Args: as for :class:`LinearReadout`, with 0e first; ``hidden`` is the width of the network.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, hidden: int = 32) -> None:
        super().__init__(irreps_in, irreps_out)
        irreps_out = self.linear.irreps_out
        scalars = [part for part, (_, ir) in zip(irreps_out.slices(), irreps_out, strict=True) if ir == o3.Irrep("0e")]
        self.channels, num_scalars = o3.Irreps(irreps_in)[0].mul, irreps_out.count(o3.Irrep("0e"))
        self.num_scalars = num_scalars
        # Positions of the scalars among the components; leading ones, the usual case, are padded
        columns = [column for part in scalars for column in range(part.start, part.stop)]
        self._columns = None if columns == list(range(num_scalars)) else columns
        self.network = None
        if num_scalars and irreps_out[0].ir == o3.Irrep("0e"):
            self.network = nn.Sequential(
                nn.Linear(self.channels, hidden), nn.SiLU(), nn.Linear(hidden, num_scalars, bias=False)
            )

    def forward(self, x: Float[Tensor, "nodes rows channels"]) -> Float[Tensor, "nodes dim"]:
        y: Tensor = super().forward(x)
        if self.network is None:
            return y
        scalars: Tensor = self.network(x.flatten(1)[:, : self.channels])
        if self._columns is not None:
            return y.index_add(1, torch.tensor(self._columns, device=y.device), scalars)
        if y.shape[1] == self.num_scalars:
            return y + scalars
        return nn.functional.pad(scalars, (0, y.shape[1] - self.num_scalars)) + y
