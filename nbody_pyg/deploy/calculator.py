"""NBodyCalculator: a potential as an ASE calculator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from nbody_pyg.accelerate import compile_potential
from nbody_pyg.deploy.model_file import load_potential, read_metadata, require_potential
from nbody_pyg.deploy.reference import reference_topology
from nbody_pyg.graphs import CapturedPotential
from nbody_pyg.hierarchy import Topology, TopologyCache
from nbody_pyg.kernels.scope import Lock, locked
from nbody_pyg.potential import Potential

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class SharedCalculator(Calculator):
    """A calculator that threads may share: they take turns, and each gets the results of its own structure."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._lock = Lock()

    @locked
    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """As ASE's; threads take turns."""
        return super().get_property(name, atoms, allow_calculation)

    @locked
    def reset(self) -> None:
        """As ASE's; threads take turns."""
        super().reset()

    @locked
    def calculate_properties(self, atoms: Atoms, properties: list[str]) -> Any:
        """As ASE's; threads take turns."""
        return super().calculate_properties(atoms, properties)


class NBodyCalculator(SharedCalculator):
    """Energy (eV), forces (eV/angstrom) and stress (eV/angstrom^3, ASE's sign) of a potential.

    ===============  ===============================================================================
    property         note
    ===============  ===============================================================================
    ``energy``       total, with the energies of the isolated atoms
    ``free_energy``  the same number: there is no electronic temperature
    ``forces``       minus the gradient of ``energy``
    ``stress``       Voigt order; periodic systems only
    ``energies``     per atom, where every part of the hierarchy belongs to one atom (NestedShells)
    ===============  ===============================================================================

    Along a trajectory the hierarchy is carried on by a :class:`~nbody_pyg.hierarchy.TopologyCache`: neighbour lists
    with a skin serve many steps, and schemes with fixed parts (BondTree) keep their groups of atoms together,
    so that the energy stays smooth. The hierarchy is built anew for other elements or periodicity, or when an atom has
    moved further than ``carry_on`` since the last call: that is another structure, not the next step.
    :meth:`forget` does so too. A model file that was trained on one molecule brings the hierarchy for it.

    Threads may share a calculator: they take turns. Read results with ``atoms.get_forces()`` and the like, not from
    ``results``, which is that of the last structure of any thread.

    The attribute ``topologies`` is that cache, with counts of its ``calls`` and ``rebuilds``; None for models without a
    scheme.

    Args:
        potential: a Potential, or the path of a model file.
        device: where to compute.
        dtype: "float32" or "float64"; by default that of the model.
        carry_on: displacement (angstrom) up to which a structure counts as the next step of the last one.
        skin: how much further than needed neighbours are searched (angstrom), to search again only when an atom has
            moved by half of it. Energies and forces do not depend on it; 0 searches at every step.
        compile: run the model as one compiled program (:func:`~nbody_pyg.accelerate.compile_potential`): faster by far
            for small systems, after some seconds at the first step. NBodyNet only, and needs a C++ compiler.
        cuda_graphs: replay steps on a GPU from CUDA graphs (:class:`~nbody_pyg.graphs.CapturedPotential`), for NBodyNet
            only. Graphs last from one search for neighbours to the next, so take a larger ``skin``, such as 1.
    Raises:
        ValueError: an element that the model does not know, an unknown dtype, ``cuda_graphs`` without a GPU or beside
            ``compile``.
        TypeError: ``compile`` or ``cuda_graphs`` with another model than NBodyNet.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress", "energies"]

    def __init__(
        self,
        potential: Potential | str | Path,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        carry_on: float = 1.0,
        skin: float = 0.5,
        compile: bool = False,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)} or None, got {dtype!r}")
        if compile and cuda_graphs:
            raise ValueError("compile and cuda_graphs must not both be True: a graph replays no compiled program")
        self.metadata: dict[str, Any] = {}
        if isinstance(potential, torch.nn.Module):
            potential = copy.deepcopy(require_potential(potential))  # the caller's keeps its device and precision
        else:
            self.metadata = read_metadata(potential)["metadata"]
            potential = load_potential(potential)
        self.potential = potential.to(device).eval()
        if dtype is not None:
            self.potential.to(_DTYPES[dtype])
        self.device = torch.device(device)
        self.scheme = getattr(self.potential.model, "scheme", None)
        self.topologies = None
        if self.scheme is not None:
            self.topologies = TopologyCache(self.scheme, skin, carry_on, self._reference, trim=not cuda_graphs)
        self._evaluate = compile_potential(self.potential) if compile else self.potential
        if cuda_graphs:
            self._evaluate = _captured(self.potential, self.device)
        self._numbers: np.ndarray | None = None

    def forget(self) -> None:
        """Build the hierarchy anew at the next call. (ASE's own ``reset`` may be called at every step.)"""
        if self.topologies is not None:
            self.topologies.forget()

    @locked
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if self._numbers is None or not np.array_equal(atoms.numbers, self._numbers):
            self._check_species(atoms)
            self._numbers = atoms.numbers.copy()
            # The same tensors at every step: graphs need not copy them
            self._z = torch.as_tensor(self._numbers, dtype=torch.long, device=self.device)
            self._batch = torch.zeros_like(self._z)
        z, batch = self._z, self._batch
        pos = torch.as_tensor(atoms.positions, dtype=torch.float64, device=self.device)
        periodic = bool(atoms.pbc.any())
        if "stress" in properties and not periodic:
            raise PropertyNotImplementedError("stress needs a periodic cell; this system has none")
        cell = pbc = None
        if periodic:
            cell = torch.as_tensor(atoms.cell.array, dtype=torch.float64, device=self.device).reshape(1, 3, 3)
            pbc = torch.as_tensor(atoms.pbc, device=self.device).reshape(1, 3)
        topology = None if self.topologies is None else self.topologies(z, pos, None, cell, pbc)
        charges = {key: value.to(self.device) for key, value in charges_of(atoms).items()}
        given = {"cell": cell, "pbc": pbc, "topology": topology, **charges}
        result = self._evaluate(z, pos, batch, **given, compute_stress="stress" in properties)
        energy = float(result["energy"])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": result["forces"].double().cpu().numpy(),
        }
        if "stress" in properties:
            stress = result["stress"][0].double().cpu().numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
        if "energies" in properties:
            self.results["energies"] = self._energies(z, pos, batch, **given)

    def _check_species(self, atoms: Atoms) -> None:
        species = getattr(self.potential.model, "species", None)
        unknown = sorted(set(atoms.numbers.tolist()) - set(species)) if species is not None else []
        if unknown:
            raise ValueError(
                f"atoms hold {[chemical_symbols[n] for n in unknown]}, but the model was trained on "
                f"{[chemical_symbols[n] for n in species]} only; train one with these elements"
            )

    def _reference(self, z: torch.Tensor, pbc: torch.Tensor | None) -> Topology | None:
        """The topology that the model was trained with, where these are the atoms of its one molecule."""
        found = None if pbc is not None else reference_topology(self.metadata, self.scheme, z.tolist())
        return None if found is None else found.to(self.device)

    def _energies(
        self, z: Any, pos: Any, batch: Any, cell: Any, pbc: Any, topology: Topology | None, **charges: torch.Tensor
    ) -> Any:
        """Contribution of each atom with its E0; they sum to the energy."""
        if self.scheme is None or not getattr(self.scheme, "centred", False):
            raise PropertyNotImplementedError("energies need a hierarchy in which every part is centred on an atom")
        parts = self.potential.energies(z, pos, batch, cell=cell, pbc=pbc, topology=topology, **charges)
        own = [values for k, values in parts.levels.items() if len(values) == len(z)]
        return (torch.stack(own).sum(0) + parts.repulsion + parts.reference).cpu().numpy()


def charges_of(atoms: Atoms) -> dict[str, torch.Tensor]:
    """Formal charges of the atoms where ASE has some, else the total charge; models without charges ignore both."""
    if atoms.has("initial_charges"):
        return {"charges": torch.as_tensor(atoms.get_initial_charges(), dtype=torch.float64)}
    if "charge" in atoms.info:
        return {"charge": torch.tensor([float(atoms.info["charge"])], dtype=torch.float64)}
    return {}


def _captured(potential: Potential, device: torch.device) -> CapturedPotential:
    captured = CapturedPotential(potential)
    wanted = captured.recorder.device_type
    if device.type != wanted:
        raise ValueError(
            f"cuda_graphs needs a GPU, got device {str(device)!r}; pass device={wanted!r}, or leave cuda_graphs out"
        )
    return captured
