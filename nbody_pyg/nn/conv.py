"""NBodyConv: the one-body gate as a message passing layer for anybody's network."""

from __future__ import annotations

import torch
from e3nn import o3
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing

from nbody_pyg.geometry import edge_vectors
from nbody_pyg.kernels.scope import in_own_precision, opaque_to_compile
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.gates import OneBodyGate, ProductGate
from nbody_pyg.nn.irreps import from_mul_ir, harmonic_irreps, require_reachable, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.radial import BesselBasis, vector_window


class NBodyConv(MessagePassing):
    r"""One-body gate and products on any graph with positions: a PyG layer from and to irreps in e3nn's order.

    .. math:: A_i = \bar n^{-1/2} \sum_{j \to i} f(r_{ij})\, R(r_{ij})\, CG\big(W x_j \otimes Y(\mathbf r_{ij})\big),
              \qquad x'_i = W' \big[A_i + A_i^2 + \dots\big] + W'' x_i

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
        irreps_in: type of the nodes; the sources' where there are two kinds.
        irreps_out: type of the result.
        cutoff: radius at which the window f ends, angstrom; longer edges carry nothing.
        channels: multiplicity inside; by default the largest of ``irreps_out``.
        order: highest degree of the harmonics.
        num_basis: number of Bessel functions.
        body_order: highest power of the sum A, >= 1.
        degree: typical number of sources per target, a constant.
        symmetry: "o3" or "so3".

    Equivariance: O(3) (or SO(3)), translation, permutation. Smoothness: C2 where an edge passes the cutoff.
    Cost: O(edges paths channels). ``torch_geometric.explain`` masks its messages, one by one in plain torch;
    otherwise the compiled kernels run, in the precision of the weights, also inside ``torch.autocast``.
    Raises: ValueError: a fragment of ``irreps_out`` that no path reaches; in forward: ``x`` of another type.

    Example:
        >>> NBodyConv("8x0e", "4x0e + 4x1o", cutoff=4.0)
        NBodyConv(8x0e -> 4x0e+4x1o, cutoff=4.0, order=2, body_order=1)
    """

    def __init__(
        self,
        irreps_in: o3.Irreps | str,
        irreps_out: o3.Irreps | str,
        cutoff: float = 5.0,
        channels: int | None = None,
        order: int = 2,
        num_basis: int = 8,
        body_order: int = 1,
        degree: float = 12.0,
        symmetry: str = "o3",
    ) -> None:
        super().__init__(aggr="sum", node_dim=0)
        self.irreps_in, self.irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        self.cutoff, self.order, self.body_order = float(cutoff), order, body_order
        channels = channels or max((mul for mul, _ in self.irreps_out), default=1)
        hidden_in = o3.Irreps([(channels, ir) for ir in sorted({ir for _, ir in self.irreps_in})])
        wanted = {ir for _, ir in self.irreps_out}
        reached = _reachable(hidden_in, order, symmetry)
        if body_order == 1:
            require_reachable(self.irreps_out, reached, f"a convolution of order {order} on {self.irreps_in}")
        lmax = max((ir.l for ir in wanted), default=0)
        summed = reached if body_order > 1 else wanted
        hidden = o3.Irreps([(channels, ir) for ir in sorted(summed) if ir.l <= max(lmax, order)])
        self._rows, self._channels = sum(ir.dim for _, ir in hidden_in), channels
        self.embedding = EdgeEmbedding(order, BesselBasis(num_basis, self.cutoff), symmetry)
        self.lin_in = IrrepsLinear(self.irreps_in, hidden_in)
        self.gate = OneBodyGate(hidden_in, hidden, order, num_basis, degree, symmetry)
        kept = o3.Irreps([(channels, ir) for ir in sorted(wanted)])
        self.products = ProductGate(hidden, kept, body_order)
        self.lin_out = IrrepsLinear(kept, self.irreps_out, bias=True)
        shared = {ir for _, ir in self.irreps_in} & wanted
        self._own = o3.Irreps([(mul, ir) for mul, ir in self.irreps_out if ir in shared])
        self.lin_self = IrrepsLinear(self.irreps_in, self._own) if shared else None

    def reset_parameters(self) -> None:
        """Draw the linear maps at the border anew."""
        super().reset_parameters()
        for linear in (self.lin_in, self.lin_out, self.lin_self):
            if linear is not None:
                linear.reset_parameters()

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
    ) -> Tensor:
        """States of the targets.

        Args:
            x: states of the nodes, or of (sources, targets); None for targets without a state.
            edge_index: sources and targets.
            pos: positions of the nodes, or of (sources, targets).
            shift: lattice shifts of the edges, as :func:`~nbody_pyg.geometry.neighbour_list` gives them.
            cell: lattice vectors (graphs, 3, 3), with ``shift``.
            batch: graph of each target, with ``cell`` of several graphs.
        """
        for positions in pos if isinstance(pos, (tuple, list)) else (pos,):
            if positions.dim() != 2 or positions.shape[1] != 3:
                raise ValueError(
                    f"pos must have shape [num_nodes, 3], got {list(positions.shape)}; "
                    "put a column of zeros beside planar positions"
                )
        if isinstance(edge_index, EdgeIndex):
            edge_index = edge_index.as_tensor()
        source, target = x if isinstance(x, (tuple, list)) else (x, x)
        if source.shape[-1] != self.irreps_in.dim:
            raise ValueError(f"x must have {self.irreps_in.dim} components ({self.irreps_in}), got {source.shape[-1]}")
        if isinstance(pos, (tuple, list)):
            vec, num_targets = pos[0][edge_index[0]] - pos[1][edge_index[1]], pos[1].shape[0]
        else:
            vec, num_targets = edge_vectors(pos, edge_index, shift, cell, batch), pos.shape[0]
        edges = self.embedding(edge_index, vec, vector_window(vec, self.cutoff), num_targets)
        state = self.lin_in(from_mul_ir(source, self.irreps_in)).view(-1, self._rows, self._channels)
        if self.explain:  # messages have to be seen one by one
            total = self.propagate(
                edge_index, x=(state, None), harmonics=edges.harmonics, radial=edges.radial,
                size=(state.shape[0], num_targets),
            )  # fmt: skip
            total = self.gate.mix(total)
        else:
            total = self.gate(state, edges)
        out = to_mul_ir(self.lin_out(self.products(total).flatten(1)), self.irreps_out)
        if self.lin_self is not None and target is not None:
            out = self._add_own(out, to_mul_ir(self.lin_self(from_mul_ir(target, self.irreps_in)), self._own))
        return out

    def message(self, x_j: Tensor, harmonics: Tensor, radial: Tensor) -> Tensor:
        return self.gate.messages(x_j, harmonics, radial)

    def _add_own(self, out: Tensor, own: Tensor) -> Tensor:
        """Add to the blocks of the result that the input has, too."""
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
            f"order={self.order}, body_order={self.body_order})"
        )


def _reachable(irreps: o3.Irreps, order: int, symmetry: str) -> set[o3.Irrep]:
    """Every irrep up to the larger degree of the factors that one coupling with the harmonics gives."""
    lmax = max([order, *(ir.l for _, ir in irreps)])
    harmonics = harmonic_irreps(order, symmetry)
    return {ir for _, first in irreps for _, second in harmonics for ir in first * second if ir.l <= lmax}
