"""NativeEvaluator: a potential as a generated C program, for one structure at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbody_pyg.hierarchy import Topology
from nbody_pyg.kernels.autograd_flags import Lock
from nbody_pyg.native.binding import CompiledModel, Edges, Result
from nbody_pyg.native.program import write_program
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.system import System


class NativeEvaluator:
    r"""Energies of the atoms, forces and virial of a potential, by one compiled C program without torch.

    .. math:: E = \sum_i e_i, \qquad F_i = -\frac{\partial E}{\partial r_i}, \qquad
              W = \sum_{(i, j)} r_{ij} \otimes \frac{\partial E}{\partial r_{ij}}, \qquad \sigma = W / V

    The numbers are those of :meth:`~nbody_pyg.potential.Potential.evaluate` up to rounding (1e-10 in float64). Memory is
    linear in the number of edges. Threads are those of torch, with the same bits for any number of threads. The program
    is written and compiled at the first call, and kept in the cache of compiled code; models of one architecture share
    it. Weights are read again when they change. Threads may share an evaluator; they take turns.

    Args:
        potential: what :func:`~nbody_pyg.native.why_not` has no objection to.
        dtype: of the arithmetic; by default that of the weights.
    Raises: ValueError: a potential that it cannot compute, or an input that :meth:`CompiledModel.compute` refuses.
        RuntimeError: the program cannot be compiled.
    Smoothness, equivariance: those of the potential.
    """

    def __init__(self, potential: Potential, dtype: torch.dtype | None = None) -> None:
        self.potential, self.dtype = potential, dtype
        self._lock = Lock()
        self._model: CompiledModel | None = None
        self._seen: tuple[Any, ...] = ()

    def model(self) -> CompiledModel:
        """The compiled program with the present weights."""
        tensors = [*self.potential.parameters(), *self.potential.buffers()]
        seen = (id(self.potential.repulsion), *[(t.data_ptr(), t._version, t.dtype) for t in tensors])
        if self._model is None or seen != self._seen:
            dtype = self.dtype or required(self.potential.dtype)
            self._model, self._seen = CompiledModel(write_program(self.potential, dtype), dtype), seen
        return self._model

    def __call__(self, system: System, topology: Topology, forces: bool = True) -> Result:
        """Evaluate one checked system.

        Args:
            system: one graph, in float64 on the CPU.
            topology: that of the scheme of the network; it may have edges beyond the radii.
            forces: compute forces and virial.
        """
        with self._lock:
            model, edges = self.model(), []
            pos = np.ascontiguousarray(system.pos.detach().numpy(), dtype=np.float64)
            cell = None if system.cell is None else np.ascontiguousarray(system.cell[0].detach().numpy(), np.float64)
            known: dict[int, Edges] = {}
            for index, shift in zip(topology.child_index[1:-1], topology.child_shift[1:-1], strict=True):
                key = id(index)  # shells of one radius share their edges
                if key not in known:
                    known[key] = _edges(model, required(index), shift, pos, cell)
                edges.append(known[key])
            return model.compute(system.z.numpy(), edges, forces=forces)

    def __deepcopy__(self, memo: Any) -> NativeEvaluator:
        from copy import deepcopy

        return NativeEvaluator(deepcopy(self.potential, memo), self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeEvaluator, (self.potential, self.dtype)


def _edges(
    model: CompiledModel, index: Tensor, shift: Tensor | None, pos: np.ndarray, cell: np.ndarray | None
) -> Edges:
    source, receiver = index.contiguous().numpy()
    shifts = None if shift is None else np.ascontiguousarray(shift.numpy(), dtype=np.float64)
    return Edges(receiver, source, model.vectors(receiver, source, pos, shifts, cell))
