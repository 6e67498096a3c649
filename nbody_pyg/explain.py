"""Explanations with ``torch_geometric.explain``: which atoms, parts and memberships determine a value."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing

from nbody_pyg.hierarchy import EdgeSet, Hierarchy, Level
from nbody_pyg.models import NBodyNet


class Membership(MessagePassing):  # type: ignore[misc]  # PyG has no py.typed
    """Factors of the weights of one edge set of a hierarchy, in a form that an explainer can mask."""

    def __init__(self) -> None:
        super().__init__(aggr="sum", node_dim=0)

    def forward(self, factor: Tensor, part: slice) -> Tensor:
        """The factors of the edges, ``part`` of all that the explainer knows."""
        mask: Tensor | None = self._edge_mask
        if not self.explain or mask is None:
            return factor
        mask = mask[part]
        return factor * (mask.sigmoid() if self._apply_sigmoid else mask)


class ExplainableNet(nn.Module):
    r"""An :class:`~nbody_pyg.models.NBodyNet` in the form that ``torch_geometric.explain.Explainer`` takes.

    The whole hierarchy is one graph: its nodes are the parts of all levels, atoms first, its edges all child
    and pair edges. A node has one feature, its existence weight g, an edge its membership or window:

    .. math:: g_i \leftarrow x_i\, g_i, \qquad p_{cP} \leftarrow m_{cP}\, x_c\, p_{cP}, \qquad
              w_{ji} \leftarrow m_{ji}\, x_j\, w_{ji}

    A node mask is the importance of a part, an edge mask the importance of a part *for another*. Weights of the way up
    (``pool_weight``), if a level has them, are multiplied by the same factor as p. With x = 1 and no mask the value is
    that of the network.

    Args:
        model: the network; a Potential's is ``potential.model``.

    Raises: TypeError: another model; ValueError: in forward, ``x`` or ``edge_index`` of another hierarchy.

    Example: see ``docs/pyg.md``.
    """

    def __init__(self, model: NBodyNet) -> None:
        super().__init__()
        if not isinstance(model, NBodyNet):
            raise TypeError(
                f"model must be an NBodyNet, got {type(model).__name__}; give Explainer other models as such"
            )
        self.model = model
        self.memberships = nn.ModuleDict({str(edges): Membership() for edges in model.scheme.edge_sets})

    def reset_parameters(self) -> None:
        """Initialise the weights of the network again."""
        self.model.reset_parameters()

    def graph(self, data: Data) -> tuple[Tensor, Tensor]:
        """Node features (all one) and edges of the whole hierarchy of ``data``, for ``Explainer.__call__``."""
        hierarchy = self.model.hierarchy(data)
        edges = [index for _, index in _edge_sets(hierarchy)]
        return hierarchy[0].weight.new_ones(sum(level.num_parts for level in hierarchy), 1), torch.cat(edges, dim=1)

    def parts(self, data: Data) -> Tensor:
        """Level of each node of :meth:`graph`."""
        sizes = torch.tensor([level.num_parts for level in self.model.hierarchy(data)])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    def forward(self, x: Tensor, edge_index: Tensor, data: Data) -> Tensor:
        """Value of each graph, (graphs, dim)."""
        hierarchy = self.model.hierarchy(data)
        num_nodes, num_edges = sum(level.num_parts for level in hierarchy), 0
        offsets = _offsets(hierarchy)
        changed: list[dict[str, Tensor]] = [
            {"weight": level.weight * x[offsets[k] : offsets[k] + level.num_parts, 0]}
            for k, level in enumerate(hierarchy)
        ]
        masks: dict[EdgeSet, Tensor] = {}
        for edges, index in _edge_sets(hierarchy):
            k = edges.level
            part = slice(num_edges, num_edges + index.shape[1])
            num_edges = part.stop
            masks[edges] = self.memberships[str(edges)](x[index[0], 0], part)
            for weight in ("child_weight", "pool_weight") if edges.kind == "child" else ("pair_weight",):
                if (value := getattr(hierarchy[k], weight)) is not None:
                    changed[k][weight] = value * masks[edges]
        if x.shape[0] != num_nodes or edge_index.shape[1] != num_edges:
            raise ValueError(
                f"x and edge_index must be those of graph(data): {num_nodes} nodes and {num_edges} edges, "
                f"got {x.shape[0]} and {edge_index.shape[1]}"
            )
        levels: tuple[Level, ...] = tuple(
            dataclasses.replace(level, **new) for level, new in zip(hierarchy, changed, strict=True)
        )
        # No edge sets are shared: shells of equal radius have separate masks.
        total: Tensor = self.model.total(Hierarchy(levels, hierarchy.system, masks=masks))
        return total.unsqueeze(-1).flatten(1)


def _offsets(hierarchy: Hierarchy) -> list[int]:
    """Number of the first node of each level."""
    starts = [0]
    for level in hierarchy:
        starts.append(starts[-1] + level.num_parts)
    return starts


def _edge_sets(hierarchy: Hierarchy) -> list[tuple[EdgeSet, Tensor]]:
    """Every set of edges, with its edges between nodes of the whole graph, in one order."""
    start, sets = _offsets(hierarchy), []
    for k, level in enumerate(hierarchy):
        if level.child_index is not None:
            shift = level.child_index.new_tensor([[start[k - 1]], [start[k]]])
            sets.append((EdgeSet("child", k), level.child_index + shift))
        if level.pair_index is not None:
            sets.append((EdgeSet("pair", k), level.pair_index + start[k]))
    return sets
