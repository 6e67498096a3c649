"""SchNet, DimeNet++ and ViSNet of torch_geometric, which here need neither pyg-lib nor torch-sparse."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.nn.models import DimeNetPlusPlus, dimenet
from torch_geometric.nn.models import SchNet as SchNetModel
from torch_geometric.nn.models import ViSNet as ViSNetModel

from nbody_pyg.compare.peer import Facts, Peer, loop_vectors, with_loops
from nbody_pyg.geometry import ragged


class SchNet(Peer):
    """PyG's SchNet.

    Args:
        facts: see :class:`Peer`.
        arguments: of PyG's class.
    """

    def __init__(self, facts: Facts, **arguments: Any) -> None:
        super().__init__(facts)
        self.model = SchNetModel(cutoff=facts.cutoff, interaction_graph=self._graph, **arguments).to(facts.dtype)

    def _graph(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        source, target = self._index
        return self._index, (pos.index_select(0, source) - pos.index_select(0, target)).norm(dim=-1)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, index: Tensor, num_atoms: Tensor) -> Tensor:
        self._index = index
        energy: Tensor = self.model(z, pos, batch)
        return energy


class DimeNet(Peer):
    """PyG's DimeNet++, whose triplets are counted off the sorted edges.

    Args:
        facts: see :class:`Peer`.
        arguments: of PyG's class.
    """

    def __init__(self, facts: Facts, **arguments: Any) -> None:
        super().__init__(facts)
        self.model = DimeNetPlusPlus(cutoff=facts.cutoff, **arguments).to(facts.dtype)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, index: Tensor, num_atoms: Tensor) -> Tensor:
        # The module looks both functions up by name when it is called.
        with (
            mock.patch.object(dimenet, "radius_graph", return_value=index),
            mock.patch.object(dimenet, "triplets", triplets),
        ):
            energy: Tensor = self.model(z, pos, batch)
        return energy


def triplets(index: Int[Tensor, "2 edges"], num_nodes: int) -> tuple[Tensor, ...]:
    """All k -> j -> i with k != i, in the form of PyG's function of this name; edges sorted by target.

    Returns: target i and source j of every edge; i, j, k of every triplet; the edges kj and ji of every triplet.
    """
    source, target = index
    count = torch.bincount(target, minlength=num_nodes)
    start = count.cumsum(0) - count  # first edge into each node
    ji, place = ragged(count[source])
    kj = start[source[ji]] + place
    kept = source[kj] != target[ji]
    kj, ji = kj[kept], ji[kept]
    return target, source, target[ji], source[ji], source[kj], kj, ji


class ViSNet(Peer):
    """PyG's ViSNet, which wants a loop on every atom among its edges.

    Args:
        facts: see :class:`Peer`.
        arguments: of PyG's class.
    """

    def __init__(self, facts: Facts, **arguments: Any) -> None:
        super().__init__(facts)
        self.model = ViSNetModel(cutoff=facts.cutoff, **arguments).to(facts.dtype)
        self.model.representation_model.distance.forward = self._distance

    def _distance(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = with_loops(self._index, pos.shape[0])
        length, vec = loop_vectors(pos, index)
        return index, length, vec.clone()  # the model normalizes it in place

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, index: Tensor, num_atoms: Tensor) -> Tensor:
        self._index = index
        energy: Tensor = self.model(z, pos, batch)[0]
        return energy
