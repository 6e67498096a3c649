"""NBodyCalculator: a potential as an ASE calculator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from nbody_pyg.deploy.model_file import load_model, read_metadata
from nbody_pyg.deploy.reference import reference_topology
from nbody_pyg.hierarchy import Topology
from nbody_pyg.potential import Potential

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class NBodyCalculator(Calculator):
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

    Along a trajectory the hierarchy is carried on with ``scheme.update``, which keeps groups of atoms
    together for schemes with fixed parts (BondTree), so that the energy stays smooth. It is built anew for
    other elements or periodicity, or when an atom has moved further than ``carry_on`` since the last call:
    that is another structure, not the next step. :meth:`forget` does so too. A model file that was
    trained on one molecule brings the hierarchy for it.

    Args:
        potential: a Potential, or the path of a model file.
        device: where to compute.
        dtype: "float32" or "float64"; by default that of the model.
        carry_on: displacement (angstrom) up to which a structure counts as the next step of the last one.
    Raises:
        ValueError: an element that the model does not know, or an unknown dtype.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress", "energies"]

    def __init__(
        self,
        potential: Potential | str | Path,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        carry_on: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)} or None, got {dtype!r}")
        self.metadata: dict[str, Any] = {}
        if isinstance(potential, Potential):
            potential = copy.deepcopy(potential)  # the caller's keeps its device and precision
        else:
            self.metadata = read_metadata(potential)["metadata"]
            potential = load_model(potential)
        self.potential = potential.to(device).eval()
        if dtype is not None:
            self.potential.to(_DTYPES[dtype])
        self.device, self.carry_on = torch.device(device), carry_on
        self.scheme = getattr(self.potential.model, "scheme", None)
        self._topology: Topology | None = None
        self._key: Any = None
        self._last: torch.Tensor | None = None

    def forget(self) -> None:
        """Build the hierarchy anew at the next call. (ASE's own ``reset`` may be called at every step.)"""
        self._topology = self._key = self._last = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        self._check_species(atoms)
        z = torch.as_tensor(atoms.numbers, dtype=torch.long, device=self.device)
        pos = torch.as_tensor(atoms.positions, dtype=torch.float64, device=self.device)
        periodic = bool(atoms.pbc.any())
        if "stress" in properties and not periodic:
            raise PropertyNotImplementedError("stress needs a periodic cell; this system has none")
        cell = pbc = None
        if periodic:
            cell = torch.as_tensor(atoms.cell.array, dtype=torch.float64, device=self.device).reshape(1, 3, 3)
            pbc = torch.as_tensor(atoms.pbc, device=self.device).reshape(1, 3)
        topology = None if self.scheme is None else self._carry_on(z, pos, cell, pbc)
        batch = torch.zeros_like(z)
        result = self.potential(
            z, pos, batch, cell=cell, pbc=pbc, topology=topology, compute_stress="stress" in properties
        )
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
            self.results["energies"] = self._energies(z, pos, batch, cell, topology)

    def _check_species(self, atoms: Atoms) -> None:
        species = getattr(self.potential.model, "species", None)
        unknown = sorted(set(atoms.numbers.tolist()) - set(species)) if species is not None else []
        if unknown:
            raise ValueError(
                f"atoms hold {[chemical_symbols[n] for n in unknown]}, but the model was trained on "
                f"{[chemical_symbols[n] for n in species]} only; train one with these elements"
            )

    def _carry_on(self, z: torch.Tensor, pos: torch.Tensor, cell: Any, pbc: Any) -> Topology:
        """The topology at these positions: the last one updated, or a new one."""
        key = (z.tolist(), None if pbc is None else pbc.tolist())
        follows = (
            self._topology is not None
            and key == self._key
            and float((pos - self._last).norm(dim=1).max()) <= self.carry_on
        )
        if follows:
            self._topology = self.scheme.update(self._topology, z, pos, None, cell, pbc)
        else:
            known = None if pbc is not None else reference_topology(self.metadata, self.scheme, z.tolist())
            if known is None:
                self._topology = self.scheme.topology(z, pos, None, cell, pbc)
            else:
                self._topology = self.scheme.update(known.to(self.device), z, pos)
        self._key, self._last = key, pos
        return self._topology

    def _energies(self, z: Any, pos: Any, batch: Any, cell: Any, topology: Topology | None) -> Any:
        """Contribution of each atom with its E0; they sum to the energy."""
        if self.scheme is None or not getattr(self.scheme, "centred", False):
            raise PropertyNotImplementedError("energies need a hierarchy in which every part is centred on an atom")
        model = self.potential.model
        with torch.no_grad():
            hierarchy = model.hierarchy(z, pos, batch, cell=cell, topology=topology)
            parts = [value for value in model.energies(hierarchy).values() if len(value) == len(z)]
            total = torch.stack(parts).sum(0) * self.potential.scale
        total = total.double()
        if self.potential.reference is not None:
            total = total + self.potential.reference.energy(z, torch.arange(len(z), device=z.device), len(z))
        return total.cpu().numpy()
