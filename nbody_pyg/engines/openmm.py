"""OpenMM: a model as a ``PythonForce`` (OpenMM 8.4 or newer), for all atoms or some of them, and for OpenMM-ML.

A System with this force can be serialized. The XML holds the path and the SHA-256 of the model file and no weights.
The file is read, and compared, at the first evaluation. (OpenMM reads the XML of any ``PythonForce`` by pickle, so open
only XML files whose origin you trust.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from ase import Atoms

from nbody_pyg.engines.host import HostAtoms
from nbody_pyg.engines.installed import require_engine
from nbody_pyg.io.model_file import find_model, read_metadata
from nbody_pyg.units import KJ_PER_MOL, LENGTH_UNITS

#: First version of OpenMM with PythonForce.
LEAST_OPENMM = "8.4"
_NM = LENGTH_UNITS["nm"]


class ModelFunction:
    """Energy (kJ/mol) and forces (kJ/mol/nm) of a model at the positions of a ``State``; can be pickled.

    Args:
        model: a model file, or the name of a shipped model.
        numbers: atomic numbers of the particles, in their order.
        periodic: use the box of the State, periodic in all directions.
        info: charge and spin, as in ``atoms.info`` (docs/conventions.md).
        options: arguments of :class:`~nbody_pyg.deploy.NBodyCalculator` (device, dtype, skin, ...).
    Raises:
        TypeError: ``model`` is not the path of a file: a potential in memory could not be serialized.
        ValueError, FileNotFoundError: no readable model file; at the first evaluation, a file with another content than
        at construction.
    """

    def __init__(
        self,
        model: str | Path,
        numbers: Iterable[SupportsIndex],
        periodic: bool = False,
        info: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, (str, Path)):
            raise TypeError(
                f"model must be the path of a model file, got {type(model).__name__}: a serialized System names the "
                "file; write one with save_model"
            )
        self.path, self.fingerprint = str(find_model(model).resolve()), str(read_metadata(model)["sha256"])
        self.numbers, self.periodic = [int(n) for n in numbers], bool(periodic)
        self.info, self.options = dict(info or {}), options
        self._host: HostAtoms | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Path, fingerprint and settings, without the model."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._host, self._lock = None, threading.Lock()

    def __call__(self, state: Any) -> tuple[float, np.ndarray]:
        """Energy and forces [N, 3]."""
        positions = state.getPositions(asNumpy=True)._value * _NM
        cell = state.getPeriodicBoxVectors(asNumpy=True)._value * _NM if self.periodic else None
        with self._lock:
            if self._host is None:
                self._host = self._loaded()
            energy, forces, _ = self._host.evaluate(positions, cell)
        return energy / KJ_PER_MOL, forces * (_NM / KJ_PER_MOL)

    def _loaded(self) -> HostAtoms:
        found = str(read_metadata(self.path)["sha256"])
        if found != self.fingerprint:
            raise ValueError(
                f"{self.path} is not the model of this System: its SHA-256 is {found[:12]}..., expected "
                f"{self.fingerprint[:12]}...; put the model file of the System there, or make the force again"
            )
        atoms = Atoms(numbers=self.numbers, positions=np.zeros((len(self.numbers), 3)), info=self.info)
        atoms.pbc = self.periodic
        return HostAtoms(atoms, self.path, **self.options)


def model_force(
    model: str | Path,
    numbers: Iterable[SupportsIndex],
    *,
    particles: Iterable[int] | None = None,
    periodic: bool = False,
    info: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An ``openmm.PythonForce`` with the energy and forces of a model.

    Args:
        model: a model file, or the name of a shipped model.
        numbers: atomic numbers of the particles that the force acts on, in their order.
        particles: indices of these particles; None: all particles of the System.
        periodic: use the periodic box of the System.
        info: charge and spin, as in ``atoms.info`` (docs/conventions.md).
        options: arguments of :class:`~nbody_pyg.deploy.NBodyCalculator` (device, dtype, skin, ...).
    Raises: ImportError: OpenMM is missing, or older than 8.4. ValueError: numbers and particles differ in length.
        TypeError: as for :class:`ModelFunction`.
    """
    openmm = require_engine("openmm", "openmm", LEAST_OPENMM)
    function = ModelFunction(model, numbers, periodic, info, **options)
    force = openmm.PythonForce(function)
    force.setName("nbody_pyg")
    force.setUsesPeriodicBoundaryConditions(function.periodic)
    if particles is not None:
        chosen = [int(i) for i in particles]
        if len(chosen) != len(function.numbers):
            raise ValueError(
                f"numbers must have one entry for each particle, got {len(function.numbers)} for {len(chosen)}"
            )
        force.setParticles(chosen)
    return force


def register_openmm_ml(name: str = "nbody") -> None:
    """Make ``openmmml.MLPotential(name, model="model.nbody")`` known, for ML/MM by its ``createMixedSystem``.

    Its ``createSystem`` and ``createMixedSystem`` then take ``info`` and the arguments of
    :class:`~nbody_pyg.deploy.NBodyCalculator`.

    Raises: ImportError: OpenMM-ML is missing.
    """
    ml = require_engine("openmmml.mlpotential", "openmm")

    class Implementation(ml.MLPotentialImpl):  # type: ignore[misc,name-defined]  # an optional package
        """Adds the force of one model file."""

        def __init__(self, model: str | Path) -> None:
            self.model = model

        def addForces(
            self, topology: Any, system: Any, atoms: Iterable[int] | None, forceGroup: int, **args: Any
        ) -> None:
            members, chosen = list(topology.atoms()), None
            if atoms is not None:
                chosen = [int(i) for i in atoms]
                members = [members[i] for i in chosen]
            if any(atom.element is None for atom in members):
                raise ValueError("atoms of the model must have elements, got a site without one; leave it out of them")
            numbers = [atom.element.atomic_number for atom in members]
            periodic = topology.getPeriodicBoxVectors() is not None
            force = model_force(self.model, numbers, **({"particles": chosen, "periodic": periodic} | args))
            force.setForceGroup(forceGroup)
            system.addForce(force)

        def getMLLongRange(self) -> bool:
            """Whether the model has interactions beyond its cutoffs."""
            return bool((read_metadata(self.model)["model"]["config"] or {}).get("long_range"))

    class Factory(ml.MLPotentialImplFactory):  # type: ignore[misc,name-defined]  # an optional package
        """Makes them."""

        def createImpl(self, name: str, *, model: str | Path, **args: Any) -> Implementation:
            return Implementation(model)

    ml.MLPotential.registerImplFactory(name, Factory())
