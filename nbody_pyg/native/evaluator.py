"""NativeEvaluator: a potential as a generated C program, for one structure at a time."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nbody_pyg.hierarchy import Topology
from nbody_pyg.kernels.autograd_flags import Lock
from nbody_pyg.longrange.coulomb import LongRange
from nbody_pyg.models import NBodyNet
from nbody_pyg.native.binding import CompiledModel, Edges, Result
from nbody_pyg.native.changes import UnchangedTensors
from nbody_pyg.native.program import write_program
from nbody_pyg.native.support import KNOWN, why_no_longer, why_not
from nbody_pyg.nn.as_written import AsWritten
from nbody_pyg.potential import Potential, volumes
from nbody_pyg.required import required
from nbody_pyg.system import System


class NativeEvaluator:
    r"""A potential evaluated by one compiled C program, without torch.

    .. math:: E = \sum_i e_i, \qquad F_i = -\frac{\partial E}{\partial r_i}, \qquad
              \sigma = \frac{1}{V} \sum_{(i, j)} r_{ij} \otimes \frac{\partial E}{\partial r_{ij}}

    It is called like the potential, with one structure at a time, and its numbers are those of
    :meth:`~nbody_pyg.potential.Potential.evaluate` up to rounding (1e-10 in float64). Memory is
    linear in the number of edges. Threads are those of torch, with the same bits for any number of threads. The program
    is written and compiled at the first call, and kept in the cache of compiled code; models of one architecture share
    it. Weights are read again when they change, in whatever way. Threads may share an evaluator; they take turns.

    =================  =====================  ====================================================
    key of the result  shape, unit            meaning
    =================  =====================  ====================================================
    ``energy``         [1], eV                with the energies of the isolated atoms
    ``energies``       [num_atoms], eV        that of each atom; they sum to ``energy``
    ``forces``         [num_atoms, 3], eV/A   unless ``compute_forces=False``
    ``stress``         [1, 3, 3], eV/A^3      only with ``compute_stress``
    =================  =====================  ====================================================

    All results are float64.

    Args:
        potential: one that the native evaluator can compute, see :func:`~nbody_pyg.native.why_not`.
        dtype: of the arithmetic; by default that of the weights.
    Raises: ValueError: a potential that it cannot compute, a batch of several structures, charge or unpaired electrons,
        stress without a cell, or an input that the potential refuses. RuntimeError: the program cannot be compiled.
    Smoothness, equivariance: those of the potential. Cost: linear in the number of edges; with
        latent charges quadratic in that of atoms.
    """

    def __init__(self, potential: Potential, dtype: torch.dtype | None = None) -> None:
        if reason := why_not(potential):
            raise ValueError(f"potential cannot be evaluated by a native program: {reason}; evaluate it with torch")
        self.potential, self.dtype = potential, dtype
        self._lock = Lock()
        self._model: CompiledModel | None = None
        self._unchanged = AsWritten(potential, KNOWN)
        self._numbers: UnchangedTensors | None = None

    def changed(self) -> str | None:
        """Reason why the potential can no longer be evaluated here, such as a new hook, or None."""
        if self._unchanged():
            return why_no_longer(self.potential)
        return why_not(self.potential) or "a module was replaced"

    def model(self) -> CompiledModel:
        """The compiled program with the present weights."""
        if self._model is None or self._numbers is None or not self._numbers():
            dtype = self.dtype or required(self.potential.dtype)
            numbers = UnchangedTensors(self.potential)  # before they are read
            self._model, self._numbers = CompiledModel(write_program(self.potential, dtype), dtype), numbers
        return self._model

    def takes(self, system: System) -> bool:
        """Whether the program computes a system: without charge and unpaired electrons, where the model uses these."""
        known, long_range = self.potential.network.known(system), self._long_range
        charges = [known.total_charge]
        if long_range is not None and long_range.config.takes_charge:
            charges.append(known.formal_charges)
        charged = any(charge is not None and bool((charge != 0).any()) for charge in charges)
        return not charged and (known.spin is None or bool((known.spin == 1).all()))

    @property
    def _long_range(self) -> LongRange | None:
        return cast(NBodyNet, self.potential.model).long_range

    def __call__(
        self, *atoms: Any, compute_forces: bool = True, compute_stress: bool = False, **given: Any
    ) -> dict[str, Tensor]:
        """Evaluate one structure.

        Args:
            atoms, given: as for the potential: a System, a Data, or tensors with cell, pbc and topology. A topology may
                have edges beyond the radii.
        """
        system = self.potential.system(*atoms, **given)
        with self._lock:
            if reason := self.changed():
                raise ValueError(f"potential can no longer be a native program: {reason}; make another evaluator")
            return self.evaluate(self.model(), system, compute_forces, compute_stress)

    def evaluate(
        self, model: CompiledModel, system: System, compute_forces: bool = True, compute_stress: bool = False
    ) -> dict[str, Tensor]:
        """As a call, with the program that :meth:`model` returned just before."""
        system = self.potential.system(system)
        if system.num_graphs != 1:
            raise ValueError(f"atoms must be one structure, got a batch of {system.num_graphs}; loop over them")
        if not self.takes(system):
            raise ValueError(
                "atoms must be a neutral singlet without formal charges for a native program; evaluate others with "
                "torch"
            )
        if self._long_range is not None:
            self._long_range.refuse_images(system)
        topology = system.topology or required(self.potential.scheme).compose(system)
        found = _computed(model, system, topology, compute_forces or compute_stress)
        results = {"energy": torch.tensor([found.energies.sum()]), "energies": torch.from_numpy(found.energies)}
        if compute_forces:
            results["forces"] = torch.from_numpy(required(found.forces))
        if compute_stress:
            results["stress"] = torch.from_numpy(found.virial / float(volumes(system))).unsqueeze(0)
        return results

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeEvaluator, (self.potential, self.dtype)


def _computed(model: CompiledModel, system: System, topology: Topology, forces: bool) -> Result:
    edges = []
    pos = np.ascontiguousarray(system.pos.detach().numpy(), dtype=np.float64)
    cell = None if system.cell is None else np.ascontiguousarray(system.cell[0].detach().numpy(), dtype=np.float64)
    known: dict[int, Edges] = {}  # shells of one radius share their edges
    for index, shift in zip(topology.child_index[1:-1], topology.child_shift[1:-1], strict=True):
        if id(index) not in known:
            known[id(index)] = _edges(model, required(index), shift, pos, cell)
        edges.append(known[id(index)])
    return model.compute(system.z.numpy(), edges, forces=forces, positions=pos)


def _edges(
    model: CompiledModel, index: Tensor, shift: Tensor | None, pos: np.ndarray, cell: np.ndarray | None
) -> Edges:
    source, receiver = index.contiguous().numpy()
    shifts = None if shift is None else np.ascontiguousarray(shift.numpy(), dtype=np.float64)
    return Edges(receiver, source, model.vectors(receiver, source, pos, shifts, cell))
