"""NBodyConv: the one-body gate as a message passing layer for any PyG network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import is_sparse, to_edge_index

from nbody_pyg.geometry import check_positions, check_shift
from nbody_pyg.hierarchy.positions import lattice_vectors
from nbody_pyg.kernels.autograd_flags import in_own_precision, is_tracing, opaque_to_compile
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.gates import OneBodyGate, ProductGate
from nbody_pyg.nn.interaction import SoftNorm
from nbody_pyg.nn.irreps import Resettable, from_mul_ir, harmonic_irreps, require_reachable, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.radial import SOFT_LENGTH, BesselBasis, vector_window
from nbody_pyg.renamed import FORMER_PARITY, renamed

#: Attributes in which PyG keeps the hooks of message passing.
_HOOKS = tuple(f"_{step}_forward{pre}_hooks" for step in ("propagate", "message", "aggregate") for pre in ("", "_pre"))


class NBodyConv(Resettable, MessagePassing):  # type: ignore[misc]  # PyG has no py.typed
    r"""One-body gate and products on any graph with positions: a PyG layer from and to irreps in e3nn's order.

    .. math:: A_i = \bar n^{-1/2} \sum_{j \to i} f(r_{ij})\, R(r_{ij})\, CG\big(W x_j \otimes Y(\mathbf r_{ij})\big),
              \qquad x'_i = W' \big[\hat A_i + \hat A_i^2 + \dots\big] + W'' x_i

    Where there are products (``correlation`` > 1), :math:`\hat A` is A bounded by
    :class:`~nbody_pyg.nn.interaction.SoftNorm`, so that states keep their size in a stack of layers; otherwise it is A.

    ==============  =================  ==================================================================
    symbol          code               shape, unit
    ==============  =================  ==================================================================
    :math:`x`       ``x``              (nodes, irreps_in.dim), e3nn's mul_ir order; or (sources, targets)
    j, i            ``edge_index``     (2, edges): row 0 the source j, row 1 the target i
    r               ``pos``            (nodes, 3), angstrom; or (sources, targets)
    :math:`x'`      result             (targets, irreps_out.dim), mul_ir
    ==============  =================  ==================================================================

    Each step of an :class:`~nbody_pyg.models.NBodyNet` is such a layer on one set of edges: with a pair
    ``(x_children, None)`` and ``(pos_children, pos_parts)`` it takes children to their parents.

    Args:
        irreps_in: type of the nodes; of the sources if there are two kinds.
        irreps_out: type of the result.
        cutoff: radius at which the window f ends, angstrom; longer edges have no effect.
        channels: multiplicity inside; by default the largest of ``irreps_out``.
        order: highest degree of the harmonics.
        num_basis: number of Bessel functions.
        correlation: highest power of the sum A, >= 1.
        avg_num_neighbors: typical number of sources per target, a constant.
        parity: "natural" or "ignored".
        softening: length below which distances are softened, in the unit of ``pos``
            (:func:`~nbody_pyg.radial.soften`).

    Equivariance: O(3) (or SO(3)), translation, permutation. Smoothness: C2 where an edge passes the cutoff.
    Cost: O(edges paths channels). Messages are computed edge by edge in plain torch if they must be visible
    (``torch_geometric.explain``, hooks on propagate, message or aggregate, a subclass that overrides ``message``).
    Otherwise the compiled kernels run, in the precision of the weights, also inside ``torch.autocast``.
    Raises: ValueError: a fragment of ``irreps_out`` that no path reaches. In forward, ValueError and TypeError: states,
        positions or edges of another type, shape, dtype or device. NotImplementedError: other hooks.

    Example:
        >>> NBodyConv("8x0e", "4x0e + 4x1o", cutoff=4.0)
        NBodyConv(8x0e -> 4x0e+4x1o, cutoff=4.0, order=2, correlation=1)
    """

    propagate: Callable[..., Tensor]

    @renamed(degree="avg_num_neighbors", body_order="correlation", **FORMER_PARITY)
    def __init__(
        self,
        irreps_in: o3.Irreps | str,
        irreps_out: o3.Irreps | str,
        cutoff: float = 5.0,
        channels: int | None = None,
        order: int = 2,
        num_basis: int = 8,
        correlation: int = 1,
        avg_num_neighbors: float = 12.0,
        parity: str = "natural",
        softening: float = SOFT_LENGTH,
    ) -> None:
        super().__init__(aggr="sum", node_dim=0)
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        self.cutoff, self.order, self.correlation = float(cutoff), order, correlation
        channels = channels or max((mul for mul, _ in self.irreps_out), default=1)
        hidden_in = o3.Irreps([(channels, ir) for ir in sorted({ir for _, ir in self.irreps_in})])
        wanted = {ir for _, ir in self.irreps_out}
        reached = _reachable(hidden_in, order, parity)
        if correlation == 1:
            require_reachable(self.irreps_out, reached, f"a convolution of order {order} on {self.irreps_in}")
        lmax = max((ir.l for ir in wanted), default=0)
        summed = reached if correlation > 1 else wanted
        hidden = o3.Irreps([(channels, ir) for ir in sorted(summed) if ir.l <= max(lmax, order)])
        self._rows, self._channels = sum(ir.dim for _, ir in hidden_in), channels
        self.embedding = EdgeEmbedding(order, BesselBasis(num_basis, self.cutoff), parity, softening)
        self.lin_in = IrrepsLinear(self.irreps_in, hidden_in)
        self.gate = OneBodyGate(hidden_in, hidden, order, num_basis, avg_num_neighbors, parity)
        kept = o3.Irreps([(channels, ir) for ir in sorted(wanted)])
        self.norm = SoftNorm() if correlation > 1 else nn.Identity()
        self.products = ProductGate(hidden, kept, correlation)
        self.lin_out = IrrepsLinear(kept, self.irreps_out, bias=True)
        shared = {ir for _, ir in self.irreps_in} & wanted
        self._own = o3.Irreps([(mul, ir) for mul, ir in self.irreps_out if ir in shared])
        self.lin_self = IrrepsLinear(self.irreps_in, self._own) if shared else None

    @opaque_to_compile
    @in_own_precision
    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Tensor,
        pos: Tensor | tuple[Tensor, Tensor],
        shift: Tensor | None = None,
        cell: Tensor | None = None,
        batch: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """States of the targets.

        Args:
            x: states of the nodes, or of (sources, targets); None for targets without a state.
            edge_index: sources and targets; or a sparse matrix with a row for each target, PyG's ``adj_t``.
            pos: positions of the nodes, or of (sources, targets), in any floating dtype.
            shift: lattice shifts of the edges, as :func:`~nbody_pyg.geometry.neighbour_list` gives them.
            cell: lattice vectors (graphs, 3, 3), with ``shift``; without them every shift must be zero.
            batch: graph of each target, with ``cell`` of several graphs.
            size: numbers of sources and targets; if given, they must match ``pos``.
        """
        states, places = _both("x", x), _both("pos", pos)
        self._check_nodes(states, places, size)
        source, target = states
        edge_index = _edges(edge_index, shift, places)
        check_shift(shift, cell)
        num_targets = places[1].shape[0]
        vec = places[0].index_select(0, edge_index[0]) - places[1].index_select(0, edge_index[1])
        if cell is not None:
            vec = vec + self._lattice(shift, cell, batch, edge_index[1], places[1]).to(vec.dtype)
        vec = vec.to(source.dtype)
        edges = self.embedding(edge_index, vec, vector_window(vec, self.cutoff), num_targets)
        state = self.lin_in(from_mul_ir(source, self.irreps_in)).view(-1, self._rows, self._channels)
        if self._shows_messages():
            total = self.propagate(
                edge_index, x=(state, None), harmonics=edges.harmonics, radial=edges.radial,
                size=(state.shape[0], num_targets),
            )  # fmt: skip
            total = self.gate.mix(total)
        else:
            total = self.gate(state, edges)
        out = to_mul_ir(self.lin_out(self.products(self.norm(total)).flatten(1)), self.irreps_out)
        if self.lin_self is not None and target is not None:
            out = self._add_own(out, to_mul_ir(self.lin_self(from_mul_ir(target, self.irreps_in)), self._own))
        return out

    def _shows_messages(self) -> bool:
        """Whether messages must be visible: to an explainer, a hook, or a subclass that overrides ``message``."""
        own = any(
            getattr(type(self), name) is not getattr(NBodyConv, name) for name in ("message", "aggregate", "update")
        )
        return bool(self.explain) or own or any(getattr(self, name) for name in _HOOKS)

    def _refuse_hook(self, hook: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no edge_update and no message_and_aggregate, so a hook on them would not "
            "fire; register it on propagate, message or aggregate"
        )

    register_edge_update_forward_pre_hook = register_edge_update_forward_hook = _refuse_hook
    register_message_and_aggregate_forward_pre_hook = register_message_and_aggregate_forward_hook = _refuse_hook

    def _check_nodes(
        self, states: tuple[Tensor, Tensor | None], places: tuple[Tensor, ...], size: tuple[int, int] | None
    ) -> None:
        """Raise unless states and positions match each other and the weights."""
        weight = self.gate.radial_weight
        for pos in places[: 1 if places[0] is places[1] else 2]:
            if not isinstance(pos, Tensor):
                raise TypeError(f"pos must be a tensor or a pair of tensors, got a {type(pos).__name__}")
            if pos.dim() != 2 or pos.shape[1] != 3:
                raise ValueError(
                    f"pos must have shape [num_nodes, 3], got {list(pos.shape)}; "
                    "put a column of zeros beside planar positions"
                )
            check_positions(pos, values=pos.device == weight.device and not is_tracing())
        for kind, x, pos in zip(("source", "target"), states, places, strict=True):
            if x is None and kind == "target":
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"x must hold a tensor for the {kind} nodes, got a {type(x).__name__}")
            if x.dim() != 2 or x.shape[1] != self.irreps_in.dim:
                raise ValueError(
                    f"x must have {self.irreps_in.dim} components ({self.irreps_in}) for each node, shape "
                    f"[{pos.shape[0]}, {self.irreps_in.dim}], got {list(x.shape)}; several graphs go into one Batch"
                )
            if x.shape[0] != pos.shape[0]:
                raise ValueError(f"x and pos must have a row for each {kind} node, got {x.shape[0]} and {pos.shape[0]}")
            if x.dtype != weight.dtype:
                raise TypeError(
                    f"x must have the dtype of the weights, {weight.dtype}, got {x.dtype}; cast it, or the layer with "
                    f"conv.to({x.dtype})"
                )
            if not x.device == pos.device == weight.device:
                raise ValueError(
                    f"x, pos and the weights must be on one device, got {x.device}, {pos.device} and {weight.device}; "
                    "use .to(device)"
                )
        found = tuple(pos.shape[0] for pos in places)
        if size is not None and tuple(size) != found:
            raise ValueError(
                f"size must be {found}, the numbers of positions of sources and targets, got {tuple(size)}"
            )

    @staticmethod
    def _lattice(shift: Tensor | None, cell: Tensor, batch: Tensor | None, target: Tensor, pos: Tensor) -> Tensor:
        """Translation of the source of each edge."""
        if shift is None:
            raise ValueError("shift must be given with cell: neighbour_list returns it beside the edges")
        cell = cell.reshape(-1, 3, 3).to(pos.dtype)
        if cell.shape[0] > 1 and batch is None:
            raise ValueError(f"batch must be given with {cell.shape[0]} cells; pass the graph number of each target")
        return lattice_vectors(shift, cell, target if batch is None else batch.index_select(0, target))

    def message(self, x_j: Tensor, harmonics: Tensor, radial: Tensor) -> Tensor:
        return self.gate.messages(x_j, harmonics, radial)

    def _add_own(self, out: Tensor, own: Tensor) -> Tensor:
        """Add to the blocks of the result that the input has as well."""
        if self._own == self.irreps_out:
            return out + own
        start, blocks = 0, []
        for part, (mul, ir) in zip(self.irreps_out.slices(), self.irreps_out, strict=True):
            block = out[:, part]
            if ir in {shared for _, shared in self._own}:
                block = block + own[:, start : start + mul * ir.dim]
                start += mul * ir.dim
            blocks.append(block)
        return torch.cat(blocks, dim=-1)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.irreps_in} -> {self.irreps_out}, cutoff={self.cutoff}, "
            f"order={self.order}, correlation={self.correlation})"
        )


def _both(name: str, value: Any) -> tuple[Any, Any]:
    """The values of sources and of targets."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise TypeError(f"{name} must be a tensor or the pair (sources, targets), got {len(value)} entries")
    return value[0], value[1]


def _edges(edge_index: Any, shift: Tensor | None, places: tuple[Tensor, ...]) -> Tensor:
    """Sources and targets [2, edges] as int64, in the range of the nodes."""
    if is_sparse(edge_index):  # PyG's adj_t: a row for each target
        if shift is not None:
            raise ValueError(
                "edge_index must be a tensor [2, edges] where shift is given: a matrix has an order of its own"
            )
        edge_index = to_edge_index(edge_index)[0].flip(0)
    if not isinstance(edge_index, Tensor):
        raise TypeError(f"edge_index must be a tensor [2, edges], got a {type(edge_index).__name__}")
    if edge_index.is_floating_point() or edge_index.dtype == torch.bool:
        raise TypeError(f"edge_index must hold integers, got {edge_index.dtype}; the order is conv(x, edge_index, pos)")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, edges], got {list(edge_index.shape)}; transpose it")
    edge_index = (edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index).long()
    if edge_index.device != places[0].device:
        raise ValueError(
            f"edge_index must be on the device of pos, {places[0].device}, got {edge_index.device}; use .to(device)"
        )
    if shift is not None and tuple(shift.shape) != (edge_index.shape[1], 3):
        raise ValueError(
            f"shift must have shape [{edge_index.shape[1]}, 3], one for each edge, got {list(shift.shape)}"
        )
    if not is_tracing():
        inside = [(row >= 0) & (row < pos.shape[0]) for row, pos in zip(edge_index, places, strict=True)]
        if not bool((inside[0] & inside[1]).all()):
            row = int(bool(inside[0].all()))
            low, high = (int(value) for value in edge_index[row].aminmax())
            raise ValueError(
                f"edge_index must name {('source', 'target')[row]} nodes 0 to {places[row].shape[0] - 1} in row {row}, "
                f"got {low} to {high}; the rows are (source, target)"
            )
    index: Tensor = edge_index
    return index


def _reachable(irreps: o3.Irreps, order: int, parity: str) -> set[o3.Irrep]:
    """Every irrep up to the larger degree of the factors that one coupling with the harmonics gives."""
    lmax = max([order, *(ir.l for _, ir in irreps)])
    harmonics = harmonic_irreps(order, parity)
    return {ir for _, first in irreps for _, second in harmonics for ir in first * second if ir.l <= lmax}
