r"""Interaction gates: the state of a part from the states of others.

The order (P, Q, S) of a gate bounds its degree in relative vectors, in states and in inverse distances. "k-th order"
has two meanings in use: the degree k of the solid harmonics of a direction, and the number k of states that interact.
:class:`OneBodyGate` has the first as its argument ``order``; :class:`ProductGate` the second as ``correlation``.
Aggregate first, multiply after: the sum over children is linear in each child, so products of sums hold every
product of children that share weights, at the cost of a node instead of a pair.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.kernels.autograd_flags import is_tracing
from nbody_pyg.kernels.backend import dispatch
from nbody_pyg.kernels.codegen import EdgeProduct
from nbody_pyg.kernels.gpu.density import DensityProgram
from nbody_pyg.kernels.gpu.one_body import OneBodyProgram
from nbody_pyg.kernels.linear import LinearKernel
from nbody_pyg.kernels.ops import DensityKernel, OneBodyKernel
from nbody_pyg.kernels.update_source import Block
from nbody_pyg.nn.custom import checked_state
from nbody_pyg.nn.edges import EdgeFeatures, sum_into
from nbody_pyg.nn.irreps import (
    ConstantTables,
    Resettable,
    coupling_paths,
    equal_multiplicity,
    harmonic_irreps,
    num_rows,
    require_reachable,
    row_slices,
)
from nbody_pyg.nn.linear import IrrepsLinear, RowLinear, blockwise_linear
from nbody_pyg.nn.products import (
    ChannelwiseProduct,
    FullProduct,
    PathLinear,
    coupling_table,
    path_row_order,
    table_terms,
)
from nbody_pyg.renamed import FORMER_PARITY, renamed

#: Number of edges that plain torch processes together on a CPU, so that messages stay in the cache.
_EDGES_AT_ONCE = 256


class DensityGate(Resettable):
    r"""One-body gate whose sources are bare atoms: the atomic density of every element.

    .. math:: A^{\ell}_{i c} = \bar n^{-1/2} \sum_{s, b} W^{\ell}_{s b, c}
              \sum_{j: z_j = s} w_{ij} B_b(r_{ij})\, Y_\ell(\mathbf r_{ij})

    The inner sum has no channels, so an edge costs only basis x harmonics; W^l acts once per atom. It equals
    :class:`OneBodyGate` on an embedding of the element (P7, P8 with 0e states).

    Args:
        num_species: number of elements.
        num_basis: number of radial functions on the edges.
        irreps_out: type of the result, one multiplicity, no degree above that of the harmonics. With parity "both"
            fragments of the other parity are allowed; they are zero, because bare atoms cannot produce them.
        avg_num_neighbors: typical number of neighbours, a constant: a count taken from the input would break
            extensivity.

    Shapes: species (sources,) in 0 .. num_species - 1, edges -> (targets, rows, channels).
    Equivariance: O(3), permutation. Cost: O(edges basis rows + nodes species basis rows channels).
    Smoothness: that of the window. Raises: ValueError: a fragment of ``irreps_out`` that no harmonic provides.
    """

    @renamed(degree="avg_num_neighbors", **FORMER_PARITY)
    def __init__(
        self,
        num_species: int,
        num_basis: int,
        irreps_out: o3.Irreps,
        avg_num_neighbors: float = 1.0,
        parity: str = "natural",
    ) -> None:
        super().__init__()
        self.irreps_out = o3.Irreps(irreps_out)
        self.num_species, self.scale = num_species, avg_num_neighbors**-0.5
        natural = {ir for _, ir in harmonic_irreps(max(ir.l for _, ir in self.irreps_out), parity)}
        if parity != "both":
            require_reachable(self.irreps_out, natural, "a density of bare atoms")
        channels, fan_in = equal_multiplicity(self.irreps_out), num_species * num_basis
        slices = row_slices(self.irreps_out)
        blocks = [
            Block(ir.l**2, part.start, ir.dim, fan_in, channels)
            for part, (_, ir) in zip(slices, self.irreps_out, strict=True)
            if ir in natural
        ]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(fan_in, channels) * num_basis**-0.5) for _ in blocks)
        rows = (max(ir.l for _, ir in self.irreps_out) + 1) ** 2
        self.linear = LinearKernel(blocks, rows, fan_in, num_rows(self.irreps_out), channels)
        self.kernel = DensityKernel(rows, num_basis, num_species)
        self.gpu = DensityProgram(rows, num_basis, num_species)

    def forward(self, species: Int[Tensor, " sources"], edges: EdgeFeatures) -> Float[Tensor, "targets rows channels"]:
        return self.mixed(self.collect(species, edges))

    def mixed(self, x: Float[Tensor, "targets rows fan_in"]) -> Float[Tensor, "targets rows_out channels"]:
        """W^l."""
        return blockwise_linear(self.linear, x, *self.weights)

    def collect(self, species: Int[Tensor, " sources"], edges: EdgeFeatures) -> Float[Tensor, "targets rows fan_in"]:
        """The inner sum, before W^l."""
        harmonics = edges.harmonics[:, : self.kernel.shape[0]] * self.scale
        arguments = (harmonics, edges.radial, species, edges.index, edges.num_targets)
        collected: Tensor = dispatch(arguments, self.kernel, self.gpu, self._plain)
        return collected

    def _plain(self, harmonics: Tensor, radial: Tensor, species: Tensor, index: Tensor, num_targets: int) -> Tensor:
        (source, target), (rows, basis) = index, self.kernel.shape
        outer = (harmonics.unsqueeze(2) * radial.unsqueeze(1)).flatten(1)
        density = sum_into(outer, target * self.num_species + species[source], num_targets * self.num_species)
        return density.view(num_targets, self.num_species, rows, basis).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"{self.num_species} species -> {self.irreps_out}"


class OneBodyGate(ConstantTables):
    r"""One-body gate of order P: every source acts on its target through one direction.

    .. math:: A^{\ell}_{i} = W^{\ell} \Big[ \bar n^{-1/2} \sum_{j} w_{ij}\, R^{(\ell_1 \ell_2 \ell)}_c(r_{ij})\,
              CG(\psi_{j c}^{\ell_1} \otimes Y_{\ell_2}(\mathbf r_{ij}))^{\ell} \Big], \qquad \ell_2 \le P

    Zeroth order (P = 0) uses distances only, first order (P = 1) one factor of the direction, k-th order solid
    harmonics up to degree k. Source: our reading of the gates of arXiv:1803.01588 (P7, P8); departure: the
    radial functions R are learned combinations of a basis (inverse powers in the strict preset).

    ===============  ===================  ====================================
    symbol           code                 shape
    ===============  ===================  ====================================
    :math:`\psi`     ``x``                (sources, rows_in, channels)
    w R basis, Y     ``edges``            see :class:`EdgeFeatures`
    A                result               (targets, rows_out, channels_out)
    ===============  ===================  ====================================

    Args:
        irreps_in: type of the sources, one multiplicity.
        irreps_out: type of the result, one multiplicity.
        order: P, highest degree of the harmonics used.
        num_basis: number of radial functions on the edges.
        avg_num_neighbors: typical number of sources per target, a constant.
        parity: "natural", "both" or "ignored".
        partial: fragments of ``irreps_out`` that no path reaches are zero instead of an error.

    Equivariance: O(3) or SO(3), permutation of the sources. Smoothness: that of the window.
    Cost: O(edges paths (2l+1)^2 channels).
    Raises: ValueError: a fragment of ``irreps_out`` that no path of this order leads to.
    """

    coupling: Tensor
    path_of_row: Tensor

    @renamed(degree="avg_num_neighbors", **FORMER_PARITY)
    def __init__(
        self,
        irreps_in: o3.Irreps | str,
        irreps_out: o3.Irreps | str,
        order: int,
        num_basis: int,
        avg_num_neighbors: float = 1.0,
        parity: str = "natural",
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out, self.order = o3.Irreps(irreps_in), o3.Irreps(irreps_out), order
        self.channels, self.scale = equal_multiplicity(self.irreps_in), avg_num_neighbors**-0.5
        harmonics = harmonic_irreps(order, parity)
        self.paths = coupling_paths(self.irreps_in, harmonics, self.irreps_out)
        if not partial:
            reached = {path.ir for path in self.paths}
            require_reachable(self.irreps_out, reached, f"a gate of order {order} on {irreps_in}")
        table = coupling_table(self.irreps_in, harmonics, self.paths)
        self.num_harmonics, self.rows_in = num_rows(harmonics), num_rows(self.irreps_in)
        terms = table_terms(table, self.paths, self.num_harmonics)
        product = EdgeProduct(terms, self.rows_in, self.num_harmonics, table.shape[0], len(self.paths), num_basis)
        self.kernel, self.gpu = OneBodyKernel(product, self.channels), OneBodyProgram(product, self.channels)
        table = table.view(-1, self.rows_in, self.num_harmonics).permute(2, 0, 1).flatten(1)
        self.add_table("coupling", table)
        self.add_table("path_of_row", torch.tensor([n for n, _ in path_row_order(self.paths)]))
        self.radial_weight = nn.Parameter(torch.randn(num_basis, len(self.paths) * self.channels) * num_basis**-0.5)
        self.mix = PathLinear(self.paths, self.channels, self.irreps_out)

    def forward(
        self, x: Float[Tensor, "sources rows_in channels"], edges: EdgeFeatures
    ) -> Float[Tensor, "targets rows_out channels_out"]:
        mixed: Tensor = self.mix(self.collect(x, edges))
        return mixed

    def collect(
        self, x: Float[Tensor, "sources rows_in channels"], edges: EdgeFeatures
    ) -> Float[Tensor, "targets path_rows channels"]:
        """The sum over sources, path by path, before W^l."""
        harmonics, weight = edges.harmonics[:, : self.num_harmonics], self.radial_weight * self.scale
        arguments = (x, harmonics, edges.radial, weight, edges.index, edges.num_targets)
        collected: Tensor = dispatch(arguments, self.kernel, self.gpu, self._plain)
        return collected

    def _plain(
        self, x: Tensor, harmonics: Tensor, radial: Tensor, _: Tensor, index: Tensor, num_targets: int
    ) -> Tensor:
        source, target = index
        if x.device.type != "cpu" or is_tracing():  # a loop over pieces would become part of a traced graph
            return sum_into(self.messages(x.index_select(0, source), harmonics, radial), target, num_targets)
        total = x.new_zeros(num_targets, self.path_of_row.shape[0], self.channels)
        for one in zip(*(t.split(_EDGES_AT_ONCE) for t in (source, target, harmonics, radial)), strict=True):
            total.index_add_(0, one[1], self.messages(x.index_select(0, one[0]), *one[2:]))
        return total

    def messages(
        self, x: Float[Tensor, "edges rows_in channels"], harmonics: Tensor, radial: Tensor
    ) -> Float[Tensor, "edges path_rows channels"]:
        """Message of each edge from the state of its source; W^l (``mix``) follows after the sum."""
        num_edges = x.shape[0]
        radial = (radial @ (self.radial_weight * self.scale)).view(num_edges, len(self.paths), self.channels)
        matrices = harmonics[:, : self.num_harmonics] @ self.coupling
        matrices = matrices.view(num_edges, self.path_of_row.shape[0], self.rows_in)
        return torch.bmm(matrices, x) * radial.index_select(1, self.path_of_row)

    def extra_repr(self) -> str:
        return f"{self.irreps_in} -> {self.irreps_out}, order={self.order}, {len(self.paths)} paths"


class EnteredGate(Resettable):
    r"""A linear map to the input type of a gate, then the gate, so that sources may have any type.

    .. math:: A_i = \mathrm{gate}(\{W \psi_j\})

    Args:
        irreps_in: type of the sources, any multiplicities.
        irreps_gate: input type of the gate, one multiplicity.
        irreps_out: its output type.
        gate: the gate.

    Shapes: x (sources, rows_in, channels), see :func:`~nbody_pyg.nn.irreps.state_shape`, edges ->
    (targets, rows_out, channels_out). Equivariance, smoothness: those of the gate.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_gate: o3.Irreps, irreps_out: o3.Irreps, gate: nn.Module) -> None:
        super().__init__()
        self.irreps_out = irreps_out
        self.enter = RowLinear(irreps_in, irreps_gate, partial=True)
        self.gate: Any = gate

    def forward(
        self, x: Float[Tensor, "sources rows_in channels"], edges: EdgeFeatures
    ) -> Float[Tensor, "targets rows_out channels_out"]:
        return checked_state(self.gate(self.enter(x), edges), self.gate, edges.num_targets, self.irreps_out)

    def collect(
        self, x: Float[Tensor, "sources rows_in channels"], edges: EdgeFeatures
    ) -> Float[Tensor, "targets path_rows channels_out"]:
        """The sum over sources before W^l, if the gate has one."""
        total: Tensor = self.gate.collect(self.enter(x), edges)
        return total

    @property
    def mix(self) -> PathLinear:
        """W^l of the gate."""
        mix: PathLinear = self.gate.mix
        return mix


class ProductGate(Resettable):
    r"""Products of a summed state with itself: interactions of several children at once.

    .. math:: B = W_1 A + W_2\,CG(A \otimes A) + W_3\,CG\big(W_2\,CG(A \otimes A) \otimes A\big) + \dots

    With A a sum over children, the term of degree k contains every k-fold product of children (P8, the second meaning
    of "k-th order"), each reduced by W^l before the next product (P11).

    Args:
        irreps_in: type of ``A``, one multiplicity.
        irreps_out: type of the result with the same multiplicity, a subset of the fragments of ``irreps_in``.
        correlation: highest degree in A, >= 1.
        gain: initial size of each product, relative to unit variance.

    Shapes: (nodes, rows_in, channels) -> (nodes, rows_out, channels).
    Equivariance: O(3), SO(3). Smoothness: polynomial.
    Raises: ValueError: ``correlation`` < 1, or ``irreps_out`` is not a subset of ``irreps_in``.
    """

    @renamed(body_order="correlation")
    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, correlation: int = 3, gain: float = 1.0) -> None:
        super().__init__()
        if correlation < 1:
            raise ValueError(f"correlation must be at least 1, got {correlation!r}; 2 or 3 is usual")
        self.irreps_in, self.irreps_out, self.correlation = (
            o3.Irreps(irreps_in),
            o3.Irreps(irreps_out),
            correlation,
        )
        if not set(self.irreps_out) <= set(self.irreps_in):
            raise ValueError(
                f"irreps_out must be some of the fragments of irreps_in, got {self.irreps_out} of {self.irreps_in}; "
                "map the result with RowLinear"
            )
        self.linear = RowLinear(self.irreps_in, self.irreps_out)
        self.products = nn.ModuleList()
        for k in range(2, correlation + 1):
            last = k == correlation
            irreps = self.irreps_out if last else self.irreps_in
            product = ChannelwiseProduct(self.irreps_in, self.irreps_in, irreps, symmetric=k == 2)
            with torch.no_grad():
                for weight in product.mix.weights:
                    weight.mul_(gain)
            self.products.append(product)
        rows = dict(zip((ir for _, ir in self.irreps_in), row_slices(self.irreps_in), strict=True))
        self.kept_rows = [row for _, ir in self.irreps_out for row in range(rows[ir].start, rows[ir].stop)]

    def forward(self, a: Float[Tensor, "nodes rows_in channels"]) -> Float[Tensor, "nodes rows_out channels"]:
        result: Tensor = self.linear(a)
        power = a
        for product in self.products:
            power = product(power, a)
            result = result + (power if product is self.products[-1] else self.kept(power))
        return result

    def kept(self, x: Float[Tensor, "nodes rows_in channels"]) -> Float[Tensor, "nodes rows_out channels"]:
        """The fragments that the result has."""
        count = len(self.kept_rows)
        # The leading fragments, the usual case, are a plain slice
        return x[:, :count] if self.kept_rows == list(range(count)) else x[:, self.kept_rows]


class PairGate(Resettable):
    r"""Bilinear gate of pairs of parts on one level.

    .. math:: \psi'^{\,\ell}_i = W^\ell\, CG\Big(\psi_i \otimes \sum_j w_{ij} R(r_{ij})\,
              CG(\psi_j \otimes Y(\mathbf r_{ij}))\Big)^\ell

    The state of i does not depend on j, so it is outside the sum: the pairwise products of the paper at the cost
    of one product per part. Order (P, 2, S) (P7 for order 0, P8 for order 1).

    Args: as for :class:`OneBodyGate`.
    Equivariance: O(3) or SO(3), permutation. Smoothness: that of the window.
    """

    @renamed(degree="avg_num_neighbors", **FORMER_PARITY)
    def __init__(
        self,
        irreps_in: o3.Irreps | str,
        irreps_out: o3.Irreps | str,
        order: int,
        num_basis: int,
        avg_num_neighbors: float = 1.0,
        parity: str = "natural",
    ) -> None:
        super().__init__()
        self.gather = OneBodyGate(irreps_in, irreps_in, order, num_basis, avg_num_neighbors, parity)
        self.product = ChannelwiseProduct(o3.Irreps(irreps_in), o3.Irreps(irreps_in), irreps_out)
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)

    def forward(
        self, x: Float[Tensor, "parts rows_in channels"], edges: EdgeFeatures
    ) -> Float[Tensor, "parts rows_out channels"]:
        product: Tensor = self.product(x, self.gather(x, edges))
        return product


class FullGate(Resettable):
    r"""The uncompressed one-body gate: full product, all radial functions, one W^l.

    .. math:: \psi^{\ell}_i = W^\ell \sum_j w_{ij} \bigoplus_{b} B_b(r_{ij})\, CG(\psi_j \otimes Y(\mathbf r_{ij}))^\ell

    The literal form of P8 for any types (multiplicities may differ). For small types, and as a reference for
    :class:`OneBodyGate`.

    Args: as for :class:`OneBodyGate`; multiplicities are free.
    Shapes: x (sources, irreps_in.dim) -> (targets, irreps_out.dim), ir_mul.
    """

    @renamed(degree="avg_num_neighbors", **FORMER_PARITY)
    def __init__(
        self,
        irreps_in: o3.Irreps | str,
        irreps_out: o3.Irreps | str,
        order: int,
        num_basis: int,
        avg_num_neighbors: float = 1.0,
        parity: str = "natural",
    ) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        self.order, self.scale = order, avg_num_neighbors**-0.5
        self.product = FullProduct(
            self.irreps_in, harmonic_irreps(order, parity), max(ir.l for _, ir in self.irreps_out)
        )
        self.linears = nn.ModuleList(IrrepsLinear(self.product.irreps_out, self.irreps_out) for _ in range(num_basis))

    def forward(
        self, x: Float[Tensor, "sources irreps_in"], edges: EdgeFeatures
    ) -> Float[Tensor, "targets irreps_out"]:
        source, target = edges.index
        messages = self.product(x[source], edges.harmonics[:, : (self.order + 1) ** 2]) * self.scale
        sums = (
            linear(sum_into(messages * edges.radial[:, b : b + 1], target, edges.num_targets))
            for b, linear in enumerate(self.linears)
        )
        total: Tensor = reduce(torch.add, sums)
        return total
