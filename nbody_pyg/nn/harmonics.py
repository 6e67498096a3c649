"""Real solid harmonics as repeated Clebsch-Gordan products of a vector with itself."""

from __future__ import annotations

import math

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import constant_table
from nbody_pyg.kernels.edges import Polynomial
from nbody_pyg.nn.irreps import ConstantTables, harmonic_irreps


class SolidHarmonics(ConstantTables):
    r"""Solid harmonics :math:`r^\ell Y_\ell(\hat r)` of degree 0 .. lmax, e3nn's basis and "component" scale.

    .. math:: Y_0 = 1, \quad Y_1 = \sqrt 3\, \mathbf r, \quad
              Y_{\ell+1} \propto CG(Y_\ell \otimes Y_1)^{\ell+1}, \quad
              \textstyle\sum_m Y_{\ell m}^2 = (2\ell+1)\, r^{2\ell}

    Only polynomials: smooth to any order everywhere, including the origin, which normalised harmonics are not.

    ==========  ===========  ======================
    symbol      code         shape
    ==========  ===========  ======================
    r           ``vec``      (edges, 3), any unit
    Y           result       (edges, (lmax+1)^2)
    ==========  ===========  ======================

    Args:
        lmax: highest degree.
        parity: "natural" or "ignored"; it only decides the parity written on ``irreps_out``.

    Equivariance: O(3). Smoothness: C-infinity.
    """

    def __init__(self, lmax: int, parity: str = "natural") -> None:
        super().__init__()
        self.lmax = lmax
        self.irreps_out = harmonic_irreps(lmax, parity)
        for l in range(2, lmax + 1):
            self.add_table(f"raise_{l}", _raising_table(l))

    def polynomials(self) -> list[Polynomial]:
        """Every component as a polynomial in x, y, z: exponents to coefficient, in float64."""
        blocks: list[list[Polynomial]] = [[{(0, 0, 0): 1.0}]]
        axes = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
        if self.lmax >= 1:
            blocks.append([{axis: math.sqrt(3.0)} for axis in axes])
        for l in range(2, self.lmax + 1):
            table = _raising_table(l).view(2 * l - 1, 3, 2 * l + 1).tolist()
            block: list[Polynomial] = [{} for _ in range(2 * l + 1)]
            for i, lower in enumerate(blocks[-1]):
                for j, axis in enumerate(axes):
                    for m, polynomial in enumerate(block):
                        for powers, value in lower.items():
                            x, y, z = (p + q for p, q in zip(powers, axis, strict=True))
                            added = value * math.sqrt(3.0) * table[i][j][m]
                            polynomial[x, y, z] = polynomial.get((x, y, z), 0.0) + added
            blocks.append([{p: v for p, v in poly.items() if abs(v) > 1e-12} for poly in block])
        return [polynomial for block in blocks for polynomial in block]

    def forward(self, vec: Float[Tensor, "edges 3"]) -> Float[Tensor, "edges rows"]:
        blocks = [vec.new_ones(vec.shape[0], 1)]
        if self.lmax >= 1:
            blocks.append(vec * math.sqrt(3.0))
        for l in range(2, self.lmax + 1):
            product = (blocks[-1].unsqueeze(2) * blocks[1].unsqueeze(1)).flatten(1)
            blocks.append(product @ getattr(self, f"raise_{l}"))
        return torch.cat(blocks, dim=-1)

    def extra_repr(self) -> str:
        return f"lmax={self.lmax}"


@constant_table
def _raising_table(l: int) -> Tensor:
    """Table ((2l-1) * 3, 2l+1) that takes Y_(l-1) x Y_1 to Y_l with the sign and scale of e3nn's harmonics."""
    table: Tensor = o3.wigner_3j(l - 1, 1, l, dtype=torch.float64).flatten(0, 1)
    probe = torch.tensor([[0.3, -0.5, 0.7]], dtype=torch.float64)
    lower, one, upper = (
        o3.spherical_harmonics(k, probe, normalize=False, normalization="component") for k in (l - 1, 1, l)
    )
    raised = (lower.unsqueeze(2) * one.unsqueeze(1)).flatten(1) @ table
    scaled: Tensor = table * (upper.norm() / raised.norm() * (upper * raised).sum().sign())
    return scaled
