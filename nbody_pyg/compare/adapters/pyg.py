"""SchNet, DimeNet++ and ViSNet of torch_geometric, which here need neither pyg-lib nor torch-sparse."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch_geometric.nn.models import DimeNetPlusPlus, dimenet
from torch_geometric.nn.models import SchNet as SchNetModel
from torch_geometric.nn.models import ViSNet as ViSNetModel

from nbody_pyg.compare.peer import Edges, Facts, Peer, loop_vectors, with_loops
from nbody_pyg.geometry import ragged
from nbody_pyg.properties import centre_of_mass


class SchNet(Peer):
    r"""PyG's SchNet.

    A dipole is :math:`|\sum_i q_i (r_i - r_0)|`, the spatial extent :math:`\sum_i q_i |r_i - r_0|^2`, about the centre
    of mass.

    Args:
        facts: see :class:`Peer`.
        arguments: of PyG's class.
    """

    readouts = (*Peer.readouts, "dipole_norm", "r2")

    def __init__(self, facts: Facts, **arguments: Any) -> None:
        super().__init__(facts)
        given = {"cutoff": facts.cutoff, "dipole": facts.readout == "dipole_norm", **arguments}
        self.model = SchNetModel(interaction_graph=self._graph, **given).to(facts.dtype)
        if facts.readout == "r2":  # PyG's class has no readout for it: its last layer gives the charges
            self.model.lin2.register_forward_hook(self._spread)

    def _spread(self, module: nn.Module, inputs: Any, charges: Tensor) -> Tensor:
        return charges * self._square

    def _graph(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self._edges.index, self._edges.vec.norm(dim=-1)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        self._edges = edges
        if self.property_readout == "r2":
            arm = pos - centre_of_mass(z, pos, batch, num_atoms.shape[0]).index_select(0, batch)
            self._square = arm.square().sum(-1, keepdim=True)
        energy: Tensor = self.model(z, pos, batch)
        return energy


class DimeNet(Peer):
    """PyG's DimeNet++, whose triplets are counted off the sorted edges.

    Every property that is no mean is a sum over the atoms, as with its authors.

    Args:
        facts: see :class:`Peer`.
        arguments: of PyG's class.
    """

    readouts = (*Peer.readouts, "dipole_norm", "r2")
    periodic = False  # it takes angles from positions

    def __init__(self, facts: Facts, **arguments: Any) -> None:
        super().__init__(facts)
        self.model = DimeNetPlusPlus(cutoff=facts.cutoff, **arguments).to(facts.dtype)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        # The module looks both functions up by name when it is called.
        with (
            mock.patch.object(dimenet, "radius_graph", return_value=edges.index),
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

    periodic = False  # it takes an edge to an atom's own image for a loop

    def __init__(self, facts: Facts, **arguments: Any) -> None:
        super().__init__(facts)
        self.model = ViSNetModel(cutoff=facts.cutoff, **arguments).to(facts.dtype)
        self.model.representation_model.distance.forward = self._distance

    def _distance(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = with_loops(self._edges.index, pos.shape[0])
        length, vec = loop_vectors(self._edges.vec, pos.shape[0])
        return index, length, vec.clone()  # the model normalizes it in place

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        self._edges = edges
        energy: Tensor = self.model(z, pos, batch)[0]
        return energy
