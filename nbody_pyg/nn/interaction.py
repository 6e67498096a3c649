"""Interactions: a gate along edges, products at the receiving part, and a residual update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from nbody_pyg.kernels.update import UpdateKernel
from nbody_pyg.kernels.update_source import Map, Product, Update
from nbody_pyg.nn.as_written import AsWritten, written
from nbody_pyg.nn.custom import GateFactory, checked_state
from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.gates import DensityGate, EnteredGate, OneBodyGate, ProductGate
from nbody_pyg.nn.irreps import ConstantTables, Resettable, num_rows, state_shape
from nbody_pyg.nn.linear import RowLinear
from nbody_pyg.nn.products import ChannelwiseProduct, PathLinear
from nbody_pyg.required import required


class SpeciesScale(Resettable):
    """A learned factor per element, degree and channel, on parts that have an element at their centre.

    Starts at one. Shapes: (nodes, rows, channels) and species (nodes,) -> (nodes, rows, channels).
    """

    block_of_row: Tensor

    def __init__(self, num_species: int, irreps: o3.Irreps) -> None:
        super().__init__()
        dims = torch.tensor([ir.dim for _, ir in irreps])
        self.register_buffer("block_of_row", torch.arange(len(dims)).repeat_interleave(dims), persistent=False)
        self.weight = nn.Parameter(torch.ones(num_species, len(dims), irreps[0].mul))

    def forward(self, x: Tensor, species: Int[Tensor, " nodes"]) -> Tensor:
        return x * self.weight.index_select(1, self.block_of_row).index_select(0, species)


class SoftNorm(nn.Module):
    r"""Bound the size of a state; its direction and small values do not change.

    .. math:: x' = x \,/ \sqrt{1 + \mathrm{mean}(x^2)}

    Repeated products grow very fast; this keeps ten of them in range. Local to one part (so the
    energy stays extensive), smooth everywhere, identity at zero. An extension of the paper (practical preset only).

    Shapes: (nodes, *components) -> the same, the mean being over all components of a node. Equivariance: O(3), in every
    layout. In a network of your own it stands before products, or between layers.
    """

    def forward(self, x: Float[Tensor, " nodes *shape"]) -> Float[Tensor, " nodes *shape"]:
        return x * (1.0 + x.square().mean(tuple(range(1, x.dim())), keepdim=True)).rsqrt()


class InteractionConfig(NamedTuple):
    """What all interactions of a network share.

    ============  ======================================================================================
    field         meaning
    ============  ======================================================================================
    num_species   number of elements
    num_basis     number of radial functions on the edges
    correlation   highest power of a summed state
    parity        "natural", "both" or "ignored"
    practical     add the old state to the new one and bound sums (:class:`SoftNorm`)
    gain          initial size of products
    ============  ======================================================================================
    """

    num_species: int
    num_basis: int
    correlation: int
    parity: str
    practical: bool
    gain: float = 1.0


class Interaction(Resettable):
    r"""New states of the parts that edges point to.

    .. math:: A_i = g_{z_i} \big(\mathrm{gate}(\{\psi_j\}) + W \psi_i\big), \qquad
              \psi'_i = W' \psi_i + \mathrm{ProductGate}(A_i) + b_{z_i}

    The gate is one-body; the products make it many-body. The old state of i counts as one more child. Factors g and
    constants b (of the scalars) exist where the parts have an element at their centre. The strict preset has
    no :math:`W' \psi_i`: the old state enters through A alone.

    Args:
        config: what all interactions of a network share.
        irreps: type of the result, one multiplicity; with ``irreps_out`` only some of its fragments.
        irreps_source: type of the sources, or None if they have no state.
        irreps_target: type of the receiving parts before, or None if they have no state yet.
        irreps_out: fragments of ``irreps`` to return; None for all.
        entered: type of one multiplicity to which a linear map brings the states of the sources before the gate
            (:class:`~nbody_pyg.nn.gates.EnteredGate`); None: they have one multiplicity and enter unchanged.
        source_has_species: the sources are (centred on) atoms, so their elements are used too: adds a
            :class:`DensityGate`.
        gate: factory of the gate, instead of the two of the library.
        target_has_species: the receiving parts have an element at their centre.
        avg_num_neighbors: typical number of sources per target.

    Equivariance: O(3) or SO(3), permutation. Smoothness: that of the windows on the edges.
    Raises: ValueError: sources with neither a state nor an element.
    """

    def __init__(
        self,
        config: InteractionConfig,
        irreps: o3.Irreps,
        irreps_source: o3.Irreps | None,
        irreps_target: o3.Irreps | None,
        irreps_out: o3.Irreps | None = None,
        *,
        entered: o3.Irreps | None = None,
        source_has_species: bool = False,
        target_has_species: bool = False,
        avg_num_neighbors: float = 1.0,
        gate: GateFactory | None = None,
    ) -> None:
        super().__init__()
        if irreps_source is None and (gate is not None or not source_has_species):
            raise ValueError(
                "irreps_source must be given unless source_has_species is set: sources need a state or an element"
            )
        self.irreps, self.irreps_out = irreps, irreps if irreps_out is None else irreps_out
        self.density = self.self_linear = self.residual_linear = self.scale = self.bias = None
        self.gate: Any = None
        if source_has_species and gate is None:
            self.density = DensityGate(config.num_species, config.num_basis, irreps, avg_num_neighbors, config.parity)
        if irreps_source is not None:
            self.gate = one_gate(config, irreps_source, irreps, avg_num_neighbors, gate, entered)
        if irreps_target is not None:
            self.self_linear = RowLinear(irreps_target, irreps, partial=True)
            self.residual_linear = RowLinear(irreps_target, self.irreps_out, partial=True) if config.practical else None
        if target_has_species:
            self.scale = SpeciesScale(config.num_species, irreps)
            self.bias = nn.Parameter(torch.zeros(config.num_species, irreps[0].mul))
        self.norm = SoftNorm() if config.practical else nn.Identity()
        self.products = ProductGate(irreps, self.irreps_out, config.correlation, config.gain)
        self._as_written = AsWritten(self, _KNOWN)
        self.kernel = self._kernel(config.num_species) if self._as_written() else None

    def forward(
        self,
        source: Float[Tensor, "sources rows_source channels_source"] | None,
        target: Float[Tensor, "targets rows_target channels_target"] | None,
        edges: EdgeFeatures,
        source_species: Int[Tensor, " sources"] | None,
        target_species: Int[Tensor, " targets"] | None,
    ) -> Float[Tensor, "targets rows_out channels"]:
        if self._is_fused(edges.radial):
            return self._fused(source, target, edges, source_species, target_species)
        terms = []
        if self.density is not None:
            terms.append(self.density(source_species, edges))
        if self.gate is not None:
            terms.append(checked_state(self.gate(source, edges), self.gate, edges.num_targets, self.irreps))
        if self.self_linear is not None:
            terms.append(self.self_linear(target))
        return self._update(sum(terms[1:], terms[0]), target, target_species)

    def _update(
        self, a: Float[Tensor, "targets rows channels"], target: Tensor | None, species: Tensor | None
    ) -> Float[Tensor, "targets rows_out channels"]:
        """New states from the summed messages."""
        if self.scale is not None:
            a = self.scale(a, species)
        new = self.products(self.norm(a))
        if self.residual_linear is not None:
            new = self.residual_linear(target) + new
        return new if self.bias is None else add_to_scalars(new, self.bias.index_select(0, required(species)))

    # ------------------------------------------------------------------ the same in one compiled call
    def _is_fused(self, like: Tensor) -> bool:
        """Whether the compiled update replaces :meth:`forward`; only this property decides it."""
        return self.kernel is not None and self.kernel.runs(like) and self._as_written()

    def _fused(
        self,
        source: Tensor | None,
        target: Tensor | None,
        edges: EdgeFeatures,
        source_species: Tensor | None,
        target_species: Tensor | None,
    ) -> Tensor:
        """What :meth:`forward` does: sums over edges by the kernels of the gates, everything after them in one call."""
        inputs = []
        if self.density is not None:
            inputs.append(self.density.collect(required(source_species), edges))
        if self.gate is not None:
            inputs.append(self.gate.collect(source, edges))
        if self.self_linear is not None:
            inputs.append(required(target))
        scale = None if self.scale is None else self.scale.weight
        return required(self.kernel)(inputs, target_species, self._matrices(), scale, self.bias)

    def _matrices(self) -> list[Tensor]:
        """The weights of all linear maps, in the order in which the compiled update uses them."""
        gate = None if self.gate is None else self.gate.mix
        maps: list[Any] = [self.density, gate, self.self_linear, self.residual_linear, self.products.linear]
        maps += [product.mix for product in self.products.products]
        return [weight for m in maps if m is not None for weight in m.weights]

    def _reference(
        self,
        inputs: Sequence[Tensor],
        species: Tensor | None,
        matrices: Sequence[Tensor],
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The modules of :meth:`forward` with other weights, for derivatives that the compiled update does not have."""
        names = {id(weight): name for name, weight in self.named_parameters()}
        weights = {names[id(own)]: given for own, given in zip(self._matrices(), matrices, strict=True)}
        if scale is not None:
            weights["scale.weight"] = scale
        if bias is not None:
            weights["bias"] = bias

        class AfterTheEdges(nn.Module):
            def __init__(self, layer: Interaction) -> None:
                super().__init__()
                self.layer = layer

            def forward(self) -> Tensor:
                layer = self.layer
                maps: list[Any] = [] if layer.density is None else [layer.density.mixed]
                maps += [] if layer.gate is None else [layer.gate.mix]
                maps += [] if layer.self_linear is None else [layer.self_linear]
                terms = [m(x) for m, x in zip(maps, inputs, strict=True)]
                return layer._update(sum(terms[1:], terms[0]), inputs[-1], species)

        given = {f"layer.{name}": weight for name, weight in weights.items()}
        states: Tensor = functional_call(AfterTheEdges(self), given, ())
        return states

    def _kernel(self, num_species: int) -> UpdateKernel:
        """The compiled update."""
        gather = [] if self.density is None else [self.density.linear.map]
        gather += [] if self.gate is None else [self.gate.mix.kernel.map]
        gather += [] if self.self_linear is None else [self.self_linear.kernel.map]
        carry: list[Map | None] = [None] * len(gather)
        if self.residual_linear is not None:
            carry[-1] = self.residual_linear.kernel.map
        products: list[Any] = list(self.products.products)
        update = Update(
            rows=num_rows(self.irreps),
            channels=self.irreps[0].mul,
            rows_out=num_rows(self.irreps_out),
            inputs=tuple(m.size_in for m in gather),
            gather=tuple(gather),
            carry=tuple(carry),
            linear=self.products.linear.kernel.map,
            products=tuple(Product(p.mix.kernel.map.rows_in, p.mix.kernel.map) for p in products),
            keep=tuple(self.products.kept_rows),
            degree_of_row=() if self.scale is None else tuple(self.scale.block_of_row.tolist()),
            norm=isinstance(self.norm, SoftNorm),
            bias=self.bias is not None,
        )
        return UpdateKernel(update, [product.kernel for product in products], num_species, self._reference)


def one_gate(
    config: InteractionConfig,
    irreps_source: o3.Irreps,
    irreps: o3.Irreps,
    avg_num_neighbors: float,
    gate: GateFactory | None = None,
    entered: o3.Irreps | None = None,
) -> nn.Module:
    """A gate of the library or of the user; arguments as for :class:`Interaction`."""
    taken = irreps_source if entered is None else entered
    if gate is not None:
        made = gate(taken, irreps, num_basis=config.num_basis, avg_num_neighbors=avg_num_neighbors)
    else:
        lmax = max(ir.l for _, ir in irreps)
        # Partial, because initial states may be scalars only and then do not reach every fragment
        made = OneBodyGate(taken, irreps, lmax, config.num_basis, avg_num_neighbors, config.parity, partial=True)
    return made if entered is None else EnteredGate(irreps_source, entered, irreps, made)


class ChannelGroups(ConstantTables):
    """States of several multiplicities, made group by group: each layer gives the channels of one multiplicity.

    A product of equal channels needs fragments that both factors have. So channels with the same fragments form a group
    (:func:`~nbody_pyg.nn.irreps.channel_groups`) with its own layer, gate and products. The linear maps at the start of
    every layer act on the whole states, and so mix the channels of all groups.

    Args:
        layers: one for each group, of one signature.
        groups: type of the result of each, from :func:`~nbody_pyg.nn.irreps.channel_groups`.

    Shapes: the results (nodes, rows, channels) of the layers -> (nodes, rows_out, channels_out), see
    :func:`~nbody_pyg.nn.irreps.state_shape`.
    """

    order: Tensor

    def __init__(self, layers: nn.ModuleList, groups: Sequence[o3.Irreps]) -> None:
        super().__init__()
        self.layers = layers
        places: dict[o3.Irrep, list[Tensor]] = {}
        start = 0
        for group in groups:
            for (mul, ir), part in zip(group, group.slices(), strict=True):
                places.setdefault(ir, []).append(torch.arange(part.start, part.stop).view(ir.dim, mul) + start)
            start += group.dim
        ordered = [torch.cat(found, dim=1) for found in places.values()]
        self.irreps_out = o3.Irreps([(place.shape[1], ir) for place, ir in zip(ordered, places, strict=True)])
        self.add_table("order", torch.cat([place.flatten() for place in ordered]))
        self._in_order = torch.equal(self.order, torch.arange(start))

    def forward(self, *inputs: Any) -> Float[Tensor, "nodes rows_out channels_out"]:
        x = torch.cat([layer(*inputs).flatten(1) for layer in self.layers], dim=1)
        x = x if self._in_order else x.index_select(1, self.order)
        return x.view(x.shape[0], *state_shape(self.irreps_out))


def add_to_scalars(
    x: Float[Tensor, "nodes rows channels"], scalars: Float[Tensor, "nodes channels"]
) -> Float[Tensor, "nodes rows channels"]:
    """Add to the first row, which is 0e in every type that the network uses."""
    return x + nn.functional.pad(scalars.unsqueeze(1), (0, 0, 0, x.shape[1] - 1))


# Classes that the compiled update replaces
_KNOWN = written(
    Interaction, DensityGate, EnteredGate, OneBodyGate, PathLinear, RowLinear, SpeciesScale, SoftNorm, nn.Identity,
    ProductGate, ChannelwiseProduct,
)  # fmt: skip
