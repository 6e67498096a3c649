"""Select, reduce, connect: one level of a hierarchy as a pooling layer for any PyG network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn.pool.connect import Connect, ConnectOutput
from torch_geometric.nn.pool.select import Select, SelectOutput
from torch_geometric.utils import coalesce, remove_self_loops

from nbody_pyg.data import no_elements, points
from nbody_pyg.geometry import ragged
from nbody_pyg.hierarchy import Scheme, Topology
from nbody_pyg.nn.edges import sum_into
from nbody_pyg.nn.harmonics import SolidHarmonics
from nbody_pyg.nn.irreps import Resettable, from_mul_ir, harmonic_irreps, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.nn.products import FullProduct
from nbody_pyg.renamed import FORMER_PARITY, renamed
from nbody_pyg.required import required
from nbody_pyg.system import System


class NBodySelect(Select):  # type: ignore[misc]  # PyG has no py.typed
    r"""Which nodes of one level belong to which part of the next, as PyG's ``SelectOutput``.

    Parts may overlap: a node of two parts occurs twice in ``node_index``. The weight is the membership of the scheme,
    as smooth as the scheme, with gradients with respect to ``pos``.

    ==================  ===========================  ========================================
    symbol              code                         shape
    ==================  ===========================  ========================================
    c                   ``node_index``               (members,) child, at level - 1
    P                   ``cluster_index``            (members,) part, at level
    :math:`p_{cP}`      ``weight``                   (members,) in [0, 1]
    ==================  ===========================  ========================================

    Args:
        scheme: composition scheme.
        level: level of the parts, 1 (made of atoms) to that of the root.

    Raises: ValueError: a level that the scheme does not have.

    Example:
        >>> from nbody_pyg import BondTree
        >>> NBodySelect(BondTree(), level=1)
        NBodySelect(BondTree, level=1)
    """

    def __init__(self, scheme: Scheme, level: int = 1) -> None:
        super().__init__()
        if not 1 <= level < len(scheme.levels):
            raise ValueError(f"level must lie in 1..{len(scheme.levels) - 1} for {scheme!r}, got {level!r}")
        self.scheme, self.level = scheme, level

    def forward(
        self, z: Tensor | Data | System | None, pos: Tensor | None = None, batch: Tensor | None = None, **given: Any
    ) -> SelectOutput:
        """Memberships for some atoms, or for a ``Data`` or ``Batch`` (whose stored hierarchy is used).

        Points that are no atoms need no atomic numbers: ``z`` may be None, or missing in the data.

        Args:
            given: cell, pbc and topology, as for networks.
        """
        return self.place(self.system(z, pos, batch, **given)).select

    def system(
        self, z: Tensor | Data | System | None, pos: Tensor | None = None, batch: Tensor | None = None, **given: Any
    ) -> System:
        """The checked system of some atoms or points; arguments as for :meth:`forward`."""
        if not self.scheme.reads_elements:
            if z is None and isinstance(pos, Tensor):
                z = no_elements(pos)
            z = points(z)
        return System.of(z, pos, batch, read=self.scheme.system, **given)

    def place(self, system: System) -> PlacedSelect:
        """Memberships together with the positions of children and parts, and the graph of each part."""
        topology = self.scheme.compose(system) if system.topology is None else system.topology
        hierarchy = self.scheme.place(topology, system)
        here, below = hierarchy[self.level], hierarchy[self.level - 1]
        child, parent = required(here.child_index)
        select = SelectOutput(child, below.num_parts, parent, here.num_parts, here.child_weight)
        return PlacedSelect(select, required(here.child_vec), here.pos, here.batch)

    def __repr__(self) -> str:
        return f"NBodySelect({type(self.scheme).__name__}, level={self.level})"


class PlacedSelect(NamedTuple):
    """Memberships with their geometry: vectors from part to child (angstrom), positions and graphs of the parts."""

    select: SelectOutput
    vec: Tensor
    pos: Tensor
    batch: Tensor


class NBodyReduce(Resettable):
    r"""States of the parts from those of their members: multipoles of the states of the members, then W^l.

    .. math:: M_P^{\ell} = \sum_{c} p_{cP} \bigoplus_{k \le K} CG\Big(x_c \otimes
              Y_k\big(\tfrac{\mathbf r_c - \mathbf r_P}{a}\big)\Big)^{\ell}, \qquad x_P^\ell = W^\ell M_P^\ell

    Y are solid harmonics, polynomials in the relative position: with scalars on the members, M are their
    multipole moments about the part, up to order K.

    ==============  ============  ==================================================================
    symbol          code          shape, unit
    ==============  ============  ==================================================================
    :math:`x_c`     ``x``         (nodes, irreps_in.dim), e3nn's mul_ir order
    r_c - r_P       ``vec``       (members, 3), angstrom
    :math:`x_P`     result        (clusters, irreps_out.dim), mul_ir
    ==============  ============  ==================================================================

    Args:
        irreps_in: type of the members.
        irreps_out: type of the parts.
        order: K, the highest degree of the harmonics.
        length: a, angstrom.
        parity: "natural" or "ignored".

    Equivariance: O(3), permutation. Smoothness: that of the weights. Differentiable to any order.
    Raises: ValueError: a fragment of ``irreps_out`` that no product reaches.
    """

    @renamed(**FORMER_PARITY)
    def __init__(
        self,
        irreps_in: o3.Irreps | str,
        irreps_out: o3.Irreps | str,
        order: int = 2,
        length: float = 2.0,
        parity: str = "natural",
    ) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        self.order, self.length = order, float(length)
        self.harmonics = SolidHarmonics(order, parity)
        lmax = max((ir.l for _, ir in self.irreps_out), default=0)
        self.product = FullProduct(self.irreps_in, harmonic_irreps(order, parity), lmax)
        self.linear = IrrepsLinear(self.product.irreps_out, self.irreps_out)

    def moments(self, x: Tensor, select: SelectOutput, vec: Tensor) -> Tensor:
        """M before W^l, of type ``product.irreps_out``, channels last in each block."""
        members = from_mul_ir(x, self.irreps_in).index_select(0, select.node_index)
        messages = self.product(members, self.harmonics(vec.to(x.dtype) / self.length))
        if select.weight is not None:
            messages = messages * select.weight.unsqueeze(-1).to(x.dtype)
        return sum_into(messages, select.cluster_index, select.num_clusters)

    def forward(self, x: Tensor, select: SelectOutput, vec: Tensor) -> Tensor:
        return to_mul_ir(self.linear(self.moments(x, select, vec)), self.irreps_out)

    def __repr__(self) -> str:
        return f"NBodyReduce({self.irreps_in} -> {self.irreps_out}, order={self.order})"


class NBodyConnect(Connect):  # type: ignore[misc]  # PyG has no py.typed
    r"""Edges between parts whose members are joined, or that share a member; parts may overlap.

    .. math:: A_{PQ} = [\, S A S^T + S S^T \,]_{PQ} > 0, \quad P \ne Q, \qquad
              e_{PQ} = \sum_{(c, d) \in A} p_{cP}\, p_{dQ}\, e_{cd} \Big/ \sum_{(c, d) \in A} p_{cP}\, p_{dQ}

    Edges that exist only because of a shared member have features zero.

    Args:
        shared: also join parts that share a member.

    Cost: O(edges times the parts of their two ends).
    """

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.shared = shared

    def forward(
        self,
        select_output: SelectOutput,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> ConnectOutput:
        """The graph of the parts; ``batch`` is that of the nodes; the result has that of the parts."""
        pairs, weight, rows = _joined(select_output, edge_index)
        if self.shared:
            itself = torch.arange(select_output.num_nodes, device=edge_index.device).expand(2, -1)
            touching, _, _ = _joined(select_output, itself)
        if edge_attr is None:
            pairs = torch.cat([pairs, touching], dim=1) if self.shared else pairs
            index, _ = remove_self_loops(pairs)
            return ConnectOutput(
                coalesce(index, num_nodes=select_output.num_clusters), None, self.get_pooled_batch(select_output, batch)
            )
        if edge_attr.dim() == 0 or edge_attr.shape[0] != edge_index.shape[1]:
            raise ValueError(
                f"edge_attr must have a row for each of the {edge_index.shape[1]} edges, got {list(edge_attr.shape)}"
            )
        flat = edge_attr.unsqueeze(-1).flatten(1).index_select(0, rows) * weight.unsqueeze(-1)
        values = torch.cat([flat, weight.unsqueeze(-1)], dim=1)
        if self.shared:
            pairs = torch.cat([pairs, touching], dim=1)
            values = torch.cat([values, values.new_zeros(touching.shape[1], values.shape[1])])
        index, values = remove_self_loops(pairs, values)
        index, values = coalesce(index, values, num_nodes=select_output.num_clusters, reduce="sum")
        total = values[:, -1:]
        pooled = values[:, :-1] / torch.where(total > 0, total, torch.ones_like(total))
        pooled = pooled.reshape(-1, *edge_attr.shape[1:])
        return ConnectOutput(index, pooled, self.get_pooled_batch(select_output, batch))

    def __repr__(self) -> str:
        return f"NBodyConnect(shared={self.shared})"


def _joined(select: SelectOutput, edge_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every edge all pairs (part of its source, part of its target), their weight, and the edge's number."""
    order = torch.argsort(select.node_index, stable=True)
    part = select.cluster_index[order]
    count = torch.bincount(select.node_index, minlength=select.num_nodes)
    first = count.cumsum(0) - count
    source, target = edge_index
    rows, number = ragged(count[source] * count[target])
    inner = count[target][rows]
    left = first[source][rows] + torch.div(number, inner, rounding_mode="floor")
    right = first[target][rows] + number % inner
    pairs = torch.stack([part[left], part[right]])
    if select.weight is None:
        return pairs, torch.ones(rows.shape[0], device=source.device), rows
    weight = select.weight[order]
    return pairs, weight[left] * weight[right], rows


class PooledGraph(NamedTuple):
    """The graph of the parts, the input of the next layer; ``select`` maps back to the nodes."""

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None
    batch: Tensor
    pos: Tensor
    select: SelectOutput


class NBodyPooling(Resettable):
    r"""One step up a hierarchy: :class:`NBodySelect`, :class:`NBodyReduce` and :class:`NBodyConnect` in one.

    Args:
        scheme: composition scheme.
        irreps_in: type of the nodes of level - 1.
        irreps_out: type of the parts.
        level: level of the parts.
        order: highest degree of the multipoles.

    Shapes: x (nodes, irreps_in.dim) in mul_ir order -> ``PooledGraph`` with x (parts, irreps_out.dim).
    Equivariance: O(3), permutation as far as the scheme's. Smoothness: that of the scheme.

    Example:
        >>> from nbody_pyg import BondTree
        >>> NBodyPooling(BondTree(), "8x0e", "8x0e + 4x1o")
        NBodyPooling(BondTree, level=1, 8x0e -> 8x0e+4x1o, order=2)
    """

    def __init__(
        self, scheme: Scheme, irreps_in: o3.Irreps | str, irreps_out: o3.Irreps | str, level: int = 1, order: int = 2
    ) -> None:
        super().__init__()
        self.select, self.connect = NBodySelect(scheme, level), NBodyConnect()
        length = scheme.levels[level].child_radius or 2.0
        self.reduce = NBodyReduce(irreps_in, irreps_out, order, length)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        *,
        z: Tensor | Data | None = None,
        pos: Tensor | None = None,
        topology: Topology | None = None,
    ) -> PooledGraph:
        """The graph of the parts, with the first arguments of every pooling layer of PyG.

        Args:
            x: states of the nodes of level - 1.
            edge_index: edges between these nodes.
            edge_attr: features of these edges.
            batch: graph of each atom.
            z: atomic numbers, None for points that are no atoms; or a ``Data`` or ``Batch``, in place of ``z``, ``pos``
                and ``batch``.
            pos: positions of the atoms.
            topology: hierarchy of the atoms, if known.
        """
        if z is None and pos is None:
            raise TypeError(
                "pos must be given by name: pool(x, edge_index, edge_attr, batch, z=z, pos=pos), or z=data; points "
                "that are no atoms need no z"
            )
        system = self.select.system(z, pos, batch, topology=topology)
        select, vec, place, graph = self.select.place(system)
        if x.dim() != 2 or x.shape[0] != select.num_nodes:
            raise ValueError(
                f"x must have one row for each of the {select.num_nodes} nodes of level {self.select.level - 1}, "
                f"got {list(x.shape)}"
            )
        coarse = self.connect(select, edge_index, edge_attr)
        return PooledGraph(self.reduce(x, select, vec), coarse.edge_index, coarse.edge_attr, graph, place, select)

    def __repr__(self) -> str:
        reduce = self.reduce
        return (
            f"NBodyPooling({type(self.select.scheme).__name__}, level={self.select.level}, "
            f"{reduce.irreps_in} -> {reduce.irreps_out}, order={reduce.order})"
        )
