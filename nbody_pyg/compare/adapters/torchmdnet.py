"""TensorNet of torchmd-net, with its scalar readout; on its compiled operators where warp-lang is installed."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from nbody_pyg.compare.peer import Edges, Facts, Peer, loop_vectors, with_loops


class TensorNet(Peer):
    """torchmd-net's TensorNet, which wants a loop on every atom among its edges.

    Args:
        facts: see :class:`Peer`.
        features: width.
        arguments: further ones of torchmd-net's class.
    """

    periodic = False  # it takes an edge to an atom's own image for a loop

    def __init__(self, facts: Facts, features: int = 128, **arguments: Any) -> None:
        with contextlib.suppress(ImportError):
            import warp

            warp.config.log_level = 30  # warnings; before it starts, or it prints a line for every kernel
        from torchmdnet.models.output_modules import Scalar
        from torchmdnet.models.tensornet import TensorNet as TensorNetModel

        super().__init__(facts)
        body = TensorNetModel(
            hidden_channels=features, cutoff_upper=facts.cutoff, static_shapes=False, dtype=facts.dtype, **arguments
        )
        body.distance.forward = self._distance
        self.model = nn.ModuleDict({"body": body, "readout": Scalar(features, dtype=facts.dtype)})
        self.model.to(facts.dtype)

    def _distance(self, pos: Tensor, batch: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        index = with_loops(self._edges.index, pos.shape[0])
        length, vec = loop_vectors(self._edges.vec, pos.shape[0])
        return index, length, vec

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        self._edges = edges
        states = self.model["body"](z, pos, batch)[0]
        readout: Any = self.model["readout"]
        atoms: Tensor = readout.pre_reduce(states, None, z, pos, batch)
        return atoms.new_zeros(num_atoms.shape[0], 1).index_add(0, batch, atoms)
