"""Interactions: a gate along edges, then products at the receiving part, then what becomes of its old state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.kernels.backend import backend
from nbody_pyg.kernels.linear import LinearKernel
from nbody_pyg.kernels.update import UpdateKernel
from nbody_pyg.kernels.update_source import Product, Update
from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.gates import DensityGate, OneBodyGate, ProductGate
from nbody_pyg.nn.irreps import Resettable, num_rows
from nbody_pyg.nn.linear import RowLinear, blockwise_linear


class SpeciesScale(Resettable):
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
    gain          size of products at the start
    ============  ======================================================================================
    """

    num_species: int
    num_basis: int
    body_order: int
    symmetry: str
    practical: bool
    gain: float = 1.0


class Interaction(Resettable):
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
            # Partial: states that are scalars only, from which atoms may start, do not reach every fragment
            self.gate = OneBodyGate(
                irreps_source, irreps, lmax, recipe.num_basis, degree, recipe.symmetry, partial=True
            )
        if irreps_target is not None:
            self.keep = RowLinear(irreps_target, irreps, partial=True)
            self.carry = RowLinear(irreps_target, self.irreps_out, partial=True) if recipe.practical else None
        if centred:
            self.scale = SpeciesScale(recipe.num_species, irreps)
            self.bias = nn.Parameter(torch.zeros(recipe.num_species, irreps[0].mul))
        self.norm = SoftNorm() if recipe.practical else nn.Identity()
        self.products = ProductGate(irreps, self.irreps_out, recipe.body_order, recipe.gain)
        chain = [product.kernel for product in self.products.products]
        self.kernel = UpdateKernel(self._update(), chain, recipe.num_species, self.update)

    def forward(
        self,
        source: Float[Tensor, "sources rows channels"] | None,
        target: Float[Tensor, "targets rows channels"] | None,
        edges: EdgeFeatures,
        source_species: Int[Tensor, " sources"] | None,
        target_species: Int[Tensor, " targets"] | None,
    ) -> Float[Tensor, "targets rows_out channels"]:
        inputs = []
        if self.density is not None:
            inputs.append(self.density.collect(source_species, edges))
        if self.gate is not None:
            inputs.append(self.gate.collect(source, edges))
        if self.keep is not None:
            inputs.append(target)
        update = self.kernel if backend(inputs[0], self.kernel.library) == "c" else self.update
        scale = None if self.scale is None else self.scale.weight
        return update(inputs, target_species, self._matrices(), scale, self.bias)

    def update(
        self,
        inputs: Sequence[Tensor],
        species: Int[Tensor, " targets"] | None,
        matrices: Sequence[Tensor],
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Float[Tensor, "targets rows_out channels"]:
        """From what the edges brought to the new states, step by step (``kernel`` does the same in one)."""
        weights = iter(matrices)

        def mapped(kernel: LinearKernel, x: Tensor) -> Tensor:
            return blockwise_linear(kernel, x, *itertools.islice(weights, len(kernel.blocks)))

        terms = [mapped(kernel, x) for kernel, x in zip(self._gather(), inputs, strict=True)]
        a = sum(terms[1:], terms[0])
        carried = [mapped(self.carry.kernel, inputs[-1])] if self.carry is not None else []
        if scale is not None:
            a = a * scale.index_select(1, self.scale.block_of_row).index_select(0, species)
        a = power = self.norm(a)
        new = sum(carried, mapped(self.products.linear.kernel, a))
        for product in self.products.products:
            power = mapped(product.mix.kernel, product.couple(power, a))
            new = new + (power if product is self.products.products[-1] else self.products.kept(power))
        return new if bias is None else add_to_scalars(new, bias.index_select(0, species))

    def _gather(self) -> list[LinearKernel]:
        """The maps into the sum, one for each input."""
        kernels = [] if self.density is None else [self.density.linear]
        kernels += [] if self.gate is None else [self.gate.mix.kernel]
        return kernels + ([] if self.keep is None else [self.keep.kernel])

    def _matrices(self) -> list[Tensor]:
        """All matrices, in the order in which an update uses them."""
        chain = [product.mix.weights for product in self.products.products]
        mix = None if self.gate is None else self.gate.mix
        given = [m.weights for m in (self.density, mix, self.keep, self.carry) if m is not None]
        return [weight for weights in (*given, self.products.linear.weights, *chain) for weight in weights]

    def _update(self) -> Update:
        """What the compiled form is made of."""
        gather = [kernel.map for kernel in self._gather()]
        carry = [None] * len(gather)
        if self.carry is not None:
            carry[-1] = self.carry.kernel.map
        chain = [Product(p.mix.kernel.map.rows_in, p.mix.kernel.map) for p in self.products.products]
        return Update(
            rows=num_rows(self.irreps),
            channels=self.irreps[0].mul,
            rows_out=num_rows(self.irreps_out),
            inputs=tuple(m.size_in for m in gather),
            gather=tuple(gather),
            carry=tuple(carry),
            linear=self.products.linear.kernel.map,
            products=tuple(chain),
            keep=tuple(self.products.kept_rows),
            degree_of_row=() if self.scale is None else tuple(self.scale.block_of_row.tolist()),
            norm=isinstance(self.norm, SoftNorm),
            bias=self.bias is not None,
        )


def add_to_scalars(
    x: Float[Tensor, "nodes rows channels"], scalars: Float[Tensor, "nodes channels"]
) -> Float[Tensor, "nodes rows channels"]:
    """Add to the first row, which is 0e in every type that the network uses."""
    return x + nn.functional.pad(scalars.unsqueeze(1), (0, 0, 0, x.shape[1] - 1))
