"""Interactions: a gate along edges, then products at the receiving part, then what becomes of its old state."""

from __future__ import annotations

from e3nn import o3
from jaxtyping import Float, Int
import torch
from torch import Tensor, nn

from nbody_pyg.nn.gates import DensityGate, EdgeFeatures, OneBodyGate, ProductGate, RowLinear
from nbody_pyg.nn.irreps import num_rows


class SpeciesScale(nn.Module):
    """A learned factor per element, degree and channel, on parts that have an element at their centre.

    Starts at one. Shapes: (nodes, rows, channels) and species (nodes,) -> (nodes, rows, channels).
    """

    def __init__(self, num_species: int, irreps: o3.Irreps) -> None:
        super().__init__()
        dims = torch.tensor([ir.dim for _, ir in irreps])
        self.register_buffer("block_of_row", torch.arange(len(dims)).repeat_interleave(dims), persistent=False)
        self.weight = nn.Parameter(torch.ones(num_species, len(dims), irreps[0].mul))

    def forward(self, x: Tensor, species: Int[Tensor, "nodes"]) -> Tensor:
        return x * self.weight.index_select(1, self.block_of_row).index_select(0, species)


class SoftNorm(nn.Module):
    r"""Bound the size of a state without touching its direction or small values.

    .. math:: x' = x \,/ \sqrt{1 + \mathrm{mean}(x^2)}

    Products of products grow as a tower of powers; this keeps ten of them in range. Local to one part (so the
    energy stays extensive), smooth everywhere, identity at zero. An extension of the paper (practical preset only).
    """

    def forward(self, x: Float[Tensor, "nodes rows channels"]) -> Float[Tensor, "nodes rows channels"]:
        return x * (1.0 + x.square().mean((1, 2), keepdim=True)).rsqrt()


class Interaction(nn.Module):
    r"""New states of the parts that edges point to.

    .. math:: A_i = \mathrm{gate}(\{\psi_j\}) + W \psi_i, \qquad
              \psi'_i = W' \psi_i + \mathrm{ProductGate}(g_{z_i} A_i)

    The first term of A is one-body; the products make it many-body, the old state of i being one more child.

    Args:
        irreps_source: type of the sources, or None where they are bare atoms.
        irreps_target: type of the receiving parts before, or None where they have no state yet.
        irreps: type of the result; with ``irreps_out`` only some of its fragments.
        num_basis: number of radial functions on the edges.
        degree: typical number of sources per target.
        num_species: number of elements; 0 where neither sources nor targets have one.
        centred: the receiving parts have an element at their centre.
        body_order: highest degree in A.
        residual: keep the old state beside the new one, and bound A (:class:`SoftNorm`).
        irreps_out: fragments of ``irreps`` to return; None for all.
        symmetry: "o3", "o3-full" or "so3".

    Equivariance: O(3) or SO(3), permutation. Smoothness: that of the windows on the edges.
    """

    def __init__(
        self,
        irreps_source: o3.Irreps | None,
        irreps_target: o3.Irreps | None,
        irreps: o3.Irreps,
        num_basis: int,
        degree: float,
        num_species: int,
        centred: bool,
        body_order: int = 3,
        residual: bool = True,
        irreps_out: o3.Irreps | None = None,
        symmetry: str = "o3",
        bare: bool = False,
    ) -> None:
        super().__init__()
        self.irreps, self.irreps_out = irreps, irreps if irreps_out is None else irreps_out
        lmax = max(ir.l for _, ir in irreps)
        self.density = self.gate = self.keep = self.carry = self.scale = self.bias = None
        if irreps_source is None or bare:
            natural = o3.Irreps([(mul, ir) for mul, ir in irreps if symmetry != "o3-full" or ir.p == (-1) ** ir.l])
            self.density = DensityGate(num_species, num_basis, natural, degree, symmetry)
            # Bare atoms give natural parity only; a full type gets its other fragments from the products.
            self.spread = None if natural == irreps else [k for k, (_, ir) in enumerate(irreps) if ir.p == (-1) ** ir.l]
        if irreps_source is not None:
            self.gate = OneBodyGate(irreps_source, irreps, lmax, num_basis, degree, symmetry)
        if irreps_target is not None:
            self.keep = RowLinear(irreps_target, irreps)
            self.carry = RowLinear(irreps_target, self.irreps_out) if residual else None
        if centred:
            self.scale = SpeciesScale(num_species, irreps)
            self.bias = nn.Parameter(torch.zeros(num_species, irreps[0].mul))
        self.norm = SoftNorm() if residual else nn.Identity()
        self.products = ProductGate(irreps, self.irreps_out, body_order, gain=1.0 if residual else 0.1)

    def forward(
        self,
        source: Float[Tensor, "sources rows channels"] | None,
        target: Float[Tensor, "targets rows channels"] | None,
        edges: EdgeFeatures,
        source_species: Int[Tensor, "sources"] | None,
        target_species: Int[Tensor, "targets"] | None,
    ) -> Float[Tensor, "targets rows_out channels"]:
        a = None
        if self.density is not None:
            a = self._spread(self.density(source_species, edges))
        if self.gate is not None:
            sent = self.gate(source, edges)
            a = sent if a is None else a + sent
        if self.keep is not None:
            a = a + self.keep(target)
        if self.scale is not None:
            a = self.scale(a, target_species)
        new = self.products(self.norm(a))
        if self.carry is not None:
            new = new + self.carry(target)
        if self.bias is not None:
            new = add_to_scalars(new, self.bias.index_select(0, target_species))
        return new

    def _spread(self, density: Tensor) -> Tensor:
        if self.spread is None:
            return density
        full = density.new_zeros(density.shape[0], num_rows(self.irreps), density.shape[2])
        start_in, start_out = 0, 0
        pieces = []
        for k, (_, ir) in enumerate(self.irreps):
            if k in self.spread:
                pieces.append(density[:, start_in : start_in + ir.dim])
                start_in += ir.dim
            else:
                pieces.append(full[:, start_out : start_out + ir.dim])
            start_out += ir.dim
        return torch.cat(pieces, dim=1)


def add_to_scalars(x: Float[Tensor, "nodes rows channels"], scalars: Float[Tensor, "nodes channels"]) -> Tensor:
    """Add to the first row, which is 0e in every type that the network uses."""
    if x.shape[1] == 1:
        return x + scalars.unsqueeze(1)
    return torch.cat([x[:, :1] + scalars.unsqueeze(1), x[:, 1:]], dim=1)
