"""InteractionGraph: our complete neighbour list for PyG models that take an interaction graph."""

from __future__ import annotations

from torch import Tensor

from nbody_pyg.geometry import edge_vectors, neighbour_list, safe_norm
from nbody_pyg.nn.irreps import Resettable


class InteractionGraph(Resettable):
    r"""Neighbours within a cutoff and their distances, for ``SchNet(interaction_graph=...)`` and the like.

    PyG's own graphs need pyg-lib and silently keep at most 32 neighbours. This one needs no extra package and is
    complete.

    ==============  ===============  ================================================
    symbol          code             shape, unit
    ==============  ===============  ================================================
    r               ``pos``          (atoms, 3), angstrom
    (j, i)          result, first    (2, edges): row 0 the source, row 1 the target
    |r_j - r_i|     result, second   (edges,), angstrom, with gradients
    ==============  ===============  ================================================

    Args:
        cutoff: angstrom.

    Smoothness: edges appear and vanish at the cutoff; the model needs a smooth cutoff function, as SchNet has.
    Raises: ValueError: a cutoff that is not positive, coincident atoms, a batch that is not sorted.

    Example:
        >>> from torch_geometric.nn import SchNet
        >>> model = SchNet(hidden_channels=16, num_filters=16, interaction_graph=InteractionGraph(5.0))
    """

    def __init__(self, cutoff: float = 5.0) -> None:
        super().__init__()
        if not cutoff > 0:
            raise ValueError(f"cutoff must be a positive length in angstrom, got {cutoff!r}; use e.g. 5.0")
        self.cutoff = float(cutoff)

    def forward(self, pos: Tensor, batch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        index, _ = neighbour_list(pos, self.cutoff, batch)
        return index, safe_norm(edge_vectors(pos, index))

    def extra_repr(self) -> str:
        return f"cutoff={self.cutoff}"
