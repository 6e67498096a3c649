"""Interactions: a gate along edges, then products at the receiving part, then what becomes of its old state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.gates import DensityGate, OneBodyGate, ProductGate
from nbody_pyg.nn.linear import RowLinear


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


class Recipe(NamedTuple):
    """What all interactions of a network share.

    ============  ======================================================================================
    field         meaning
    ============  ======================================================================================
    num_species   number of elements
    num_basis     number of radial functions on the edges
    body_order    highest power of a summed state
    symmetry      "o3", "o3-full" or "so3"
    practical     keep the old state beside the new one and bound sums (:class:`SoftNorm`)
    ============  ======================================================================================
    """

    num_species: int
    num_basis: int
    body_order: int
    symmetry: str
    practical: bool


class Interaction(nn.Module):
    r"""New states of the parts that edges point to.

    .. math:: A_i = g_{z_i} \big(\mathrm{gate}(\{\psi_j\}) + W \psi_i\big), \qquad
              \psi'_i = W' \psi_i + \mathrm{ProductGate}(A_i) + b_{z_i}

    The gate is one-body; the products make it many-body, the old state of i being one more child. Factors g and
    constants b (of the scalars) exist where the parts have an element at their centre. The strict recipe has
    no :math:`W' \psi_i`: the old state enters through A alone.

    Args:
        recipe: what all interactions of a network share.
        irreps: type of the result; with ``irreps_out`` only some of its fragments.
        irreps_source: type of the sources, or None where they have no state.
        irreps_target: type of the receiving parts before, or None where they have no state yet.
        irreps_out: fragments of ``irreps`` to return; None for all.
        bare: the sources are (centred on) atoms, whose elements act as well: adds a :class:`DensityGate`.
        centred: the receiving parts have an element at their centre.
        degree: typical number of sources per target.

    Equivariance: O(3) or SO(3), permutation. Smoothness: that of the windows on the edges.
    Raises: ValueError: sources with neither a state nor an element.
    """

    def __init__(
        self,
        recipe: Recipe,
        irreps: o3.Irreps,
        irreps_source: o3.Irreps | None,
        irreps_target: o3.Irreps | None,
        irreps_out: o3.Irreps | None = None,
        *,
        bare: bool = False,
        centred: bool = False,
        degree: float = 1.0,
    ) -> None:
        super().__init__()
        if irreps_source is None and not bare:
            raise ValueError("irreps_source must be given unless bare is set: sources need a state or an element")
        self.irreps, self.irreps_out = irreps, irreps if irreps_out is None else irreps_out
        self.density = self.gate = self.keep = self.carry = self.scale = self.bias = None
        if bare:
            self.density = DensityGate(recipe.num_species, recipe.num_basis, irreps, degree, recipe.symmetry)
        if irreps_source is not None:
            lmax = max(ir.l for _, ir in irreps)
            self.gate = OneBodyGate(irreps_source, irreps, lmax, recipe.num_basis, degree, recipe.symmetry)
        if irreps_target is not None:
            self.keep = RowLinear(irreps_target, irreps)
            self.carry = RowLinear(irreps_target, self.irreps_out) if recipe.practical else None
        if centred:
            self.scale = SpeciesScale(recipe.num_species, irreps)
            self.bias = nn.Parameter(torch.zeros(recipe.num_species, irreps[0].mul))
        self.norm = SoftNorm() if recipe.practical else nn.Identity()
        # Without the norm, a tower of products has to start very small to stay in range.
        self.products = ProductGate(irreps, self.irreps_out, recipe.body_order, gain=1.0 if recipe.practical else 0.01)

    def forward(
        self,
        source: Float[Tensor, "sources rows channels"] | None,
        target: Float[Tensor, "targets rows channels"] | None,
        edges: EdgeFeatures,
        source_species: Int[Tensor, " sources"] | None,
        target_species: Int[Tensor, " targets"] | None,
    ) -> Float[Tensor, "targets rows_out channels"]:
        terms = []
        if self.density is not None:
            terms.append(self.density(source_species, edges))
        if self.gate is not None:
            terms.append(self.gate(source, edges))
        if self.keep is not None:
            terms.append(self.keep(target))
        a = sum(terms[1:], terms[0])
        if self.scale is not None:
            a = self.scale(a, target_species)
        new = self.products(self.norm(a))
        if self.carry is not None:
            new = new + self.carry(target)
        if self.bias is not None:
            new = add_to_scalars(new, self.bias.index_select(0, target_species))
        return new


def add_to_scalars(
    x: Float[Tensor, "nodes rows channels"], scalars: Float[Tensor, "nodes channels"]
) -> Float[Tensor, "nodes rows channels"]:
    """Add to the first row, which is 0e in every type that the network uses."""
    return x + nn.functional.pad(scalars.unsqueeze(1), (0, 0, 0, x.shape[1] - 1))
