"""NBodyCalculator: a potential as an ASE calculator."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from torch_geometric.data import Data

from nbody_pyg.data import electronic_state_of
from nbody_pyg.deploy.reference import bond_changes, describe_bonds, parts_of_reference, reference_topology
from nbody_pyg.geometry import has_volume
from nbody_pyg.hierarchy import BondTree, Topology, TopologyCache
from nbody_pyg.hierarchy.skin import refuse_carry_on
from nbody_pyg.io.model_file import load_potential, read_metadata, require_potential
from nbody_pyg.kernels import build
from nbody_pyg.kernels.autograd_flags import Lock, locked
from nbody_pyg.messages import check_choice
from nbody_pyg.native import NativeEvaluator, why_not, why_not_here
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.runtime import CapturedPotential, compile_potential
from nbody_pyg.system import PRECISIONS, System

#: Descriptions of the source of the bonds.
_BONDS = ("each", "first")
#: What evaluates a potential.
ENGINES = ("auto", "native", "torch")

_log = logging.getLogger("nbody_pyg")


class SharedCalculator(Calculator):
    """Base class of our calculators: threads may share it, and its results depend on charge and spin.

    Threads take turns, and each gets the results of its own structure. ASE's cache ignores charge and spin in
    ``atoms.info``, so they are compared here.
    """

    _state: dict[str, torch.Tensor] | None = None

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

    @locked
    def evaluate(self, atoms: Atoms, stress: bool = False) -> tuple[float, np.ndarray, np.ndarray | None]:
        """Energy (eV), forces [N, 3] (eV/angstrom) and stress [6] (eV/angstrom^3; None if not wanted).

        One evaluation, without ASE's comparison with the structure before: for hosts that move all atoms at every step.
        """
        self.calculate(atoms, ["energy", "forces", *(["stress"] if stress else [])], all_changes)
        found = self.results
        return float(found["energy"]), found["forces"], found["stress"] if stress else None

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Changes since the last calculation."""
        changes = list(super().check_state(atoms, tol=tol))
        if not changes and not _same_state(self._state, electronic_state_of(atoms)):
            changes.append("initial_charges")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        if any(name.startswith("stress") for name in properties) and not required(self.atoms).pbc.any():
            raise PropertyNotImplementedError("stress needs a periodic cell; this system has none")
        self._state = electronic_state_of(self.atoms)


def _same_state(before: dict[str, torch.Tensor] | None, now: dict[str, torch.Tensor]) -> bool:
    return before is not None and before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in now)


class NBodyCalculator(SharedCalculator):
    """Energy (eV), forces (eV/angstrom) and stress (eV/angstrom^3, ASE's sign) of a potential.

    ===============  ===============================================================================
    property         note
    ===============  ===============================================================================
    ``energy``       total, with the energies of the isolated atoms
    ``free_energy``  the same number: there is no electronic temperature
    ``forces``       minus the gradient of ``energy``
    ``stress``       Voigt order; periodic systems only
    ``energies``     per atom, if every part of the hierarchy belongs to one atom (NestedShells)
    ===============  ===============================================================================

    Along a trajectory neighbour lists with a skin are used for many steps
    (:class:`~nbody_pyg.hierarchy.TopologyCache`). The energy of a structure does not depend on earlier evaluations. If
    the scheme keeps parts, such as groups of bonded atoms (BondTree), they are part of the definition of the energy.
    They come from the first of these sources that applies:

    ==============================================  ===============================================================
    source                                          what it means
    ==============================================  ===============================================================
    ``bonds`` is a structure                        its bonds are used for all structures, which must have its atoms
    the model file holds a reference molecule of    the bonds with which the model was trained
    these atoms (trained on one molecule)
    ``bonds="first"``                               those of the first structure with these atoms
    ``bonds="each"`` (default)                      those found in each structure: where a bond forms or breaks the
                                                    energy has a step, of which one warning tells
    ==============================================  ===============================================================

    :func:`run_md` and :func:`relax` keep the bonds of their first structure for any ``bonds``; :meth:`fixed_bonds` does
    so for other runs. The attribute ``bonds_from`` is the source of the last bonds. One warning is given for the first
    structure whose bonds, as found, differ from those in use.

    Charges and spin are read from the atoms (docs/conventions.md), and changing them changes the system.

    Threads may share a calculator; they take turns. Read results with ``atoms.get_forces()`` and the like, not from
    ``results``, which belongs to the last structure of any thread.

    The attribute ``topologies`` is this cache, which counts its ``calls`` and ``rebuilds``; None for models without a
    scheme.

    Args:
        potential: a Potential, or the path of a model file.
        device: device of the computation.
        dtype: "float32" or "float64"; by default that of the model.
        carry_on: without effect, as parts no longer depend on earlier calls; will be removed.
        skin: extra radius of the neighbour search (angstrom); a new search is needed only when an atom has moved by
            half of it. Energies and forces do not depend on it; 0 searches at every step.
        compile: run the model as one compiled program (:func:`~nbody_pyg.runtime.compiled.compile_potential`): much
            faster for small systems; the first step takes some seconds. Only for NBodyNet; needs a C++ compiler.
        cuda_graphs: replay steps on a GPU from CUDA graphs (:class:`~nbody_pyg.runtime.cuda_graphs.CapturedPotential`),
            for NBodyNet only. Graphs are valid from one neighbour search to the next, so use a larger ``skin``, such
            as 1.
        bonds: "each", "first", or a structure (ASE's Atoms, or Data with what the scheme reads), see above.
        engine: "native": a generated C program (:class:`~nbody_pyg.native.NativeEvaluator`), compiled at the first
            step; "torch"; "auto": native where it can compute this potential on the CPU and a C compiler exists. The
            attribute ``engine`` is that of the last evaluation (before the first one: of neutral singlets),
            ``engine_reason`` the reason why it is not native.
    Raises:
        ValueError: an element that the model does not know, an unknown dtype, ``cuda_graphs`` without a GPU or together
        with ``compile``, an unknown value of ``bonds`` or ``engine``, a structure with other atoms than that of
        ``bonds``, ``engine="native"`` for a potential that it cannot compute.
        TypeError: ``compile`` or ``cuda_graphs`` with another model than NBodyNet.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc]  # ASE has no ClassVar there
        "energy", "free_energy", "forces", "stress", "energies",
    ]  # fmt: skip

    def __init__(
        self,
        potential: Potential | str | Path,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        carry_on: float | None = None,
        skin: float = 0.5,
        compile: bool = False,
        cuda_graphs: bool = False,
        bonds: str | Atoms | Data = "each",
        engine: str = "auto",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if dtype is not None and dtype not in PRECISIONS:
            raise ValueError(f"dtype must be one of {sorted(PRECISIONS)} or None, got {dtype!r}")
        if isinstance(bonds, str) and bonds not in _BONDS:
            raise ValueError(f"bonds must be one of {', '.join(_BONDS)} or a structure, got {bonds!r}; try 'each'")
        refuse_carry_on(carry_on)
        if compile and cuda_graphs:
            raise ValueError("compile and cuda_graphs must not both be True: a graph replays no compiled program")
        self.metadata: dict[str, Any] = {}
        if isinstance(potential, torch.nn.Module):
            potential = copy.deepcopy(require_potential(potential))  # do not change that of the caller
        else:
            self.metadata = read_metadata(potential)["metadata"]
            potential = load_potential(potential)
        self.potential = potential.to(device).eval()
        if dtype is not None:
            self.potential.to(PRECISIONS[dtype])
        self.device = torch.device(device)
        self.scheme = self.potential.scheme
        self.topologies = None
        if self.scheme is not None:
            self.topologies = TopologyCache(self.scheme, skin, start=self._parts, trim=not cuda_graphs)
        self._evaluate: Callable[..., Any] = compile_potential(self.potential) if compile else self.potential
        if cuda_graphs:
            self._evaluate = _captured(self.potential, self.device)
        self._trims = not cuda_graphs
        self._asked = check_choice("engine", engine, ENGINES)
        self._native: NativeEvaluator | None = None
        self.engine, self.engine_reason = "native", self._why_torch(compile, cuda_graphs)
        if self.engine_reason is None:
            self._native = NativeEvaluator(self.potential)
        else:
            self._use_torch(self.engine_reason)
        self._numbers: np.ndarray | None = None
        self.bonds = bonds
        self.bonds_from: str | None = None
        # Atoms and parts of the run of each thread, those of the first structure, and the bonds of the last structure
        self._fixed: dict[int, tuple[torch.Tensor, Topology]] = {}
        self._first: tuple[torch.Tensor, Topology] | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._run: int | None = None  # whose parts the lists were made for
        self._warned = self._stressed = False

    def forget(self) -> None:
        """Build the hierarchy again at the next call. (ASE's own ``reset`` may be called at every step.)"""
        self._first = self._last = None
        if self.topologies is not None:
            self.topologies.forget()

    @contextlib.contextmanager
    def fixed_bonds(self, atoms: Atoms) -> Iterator[None]:
        """Context in which parts (bonds) are fixed to those that a structure has now, for a run of many steps.

        It applies to structures of the same atoms, in the calling thread.
        """
        if self.scheme is None or not self.scheme.keeps_parts:
            yield
            return
        thread = threading.get_ident()
        with self._lock:
            before = self._fixed.get(thread)
            self._fixed[thread] = self._parts_of(atoms)
            required(self.topologies).forget()
        try:
            yield
        finally:
            with self._lock:
                # Energies with kept parts are not those of the structure by itself
                stale = self.atoms is None or self.bond_changes(self.atoms) is not None
                self._last = None
                del self._fixed[thread]
                if before is not None:
                    self._fixed[thread] = before
                required(self.topologies).forget()
                if stale:
                    self.reset()

    def _parts_of(self, atoms: Atoms) -> tuple[torch.Tensor, Topology]:
        """Atoms and parts of a structure as it is now."""
        system = self._system(atoms)
        if self.bonds == "first":
            self._note_first(system)
        parts = self._parts(system.z, system.pbc)
        if parts is None:
            parts, self.bonds_from = required(self.scheme).compose(system), "found in the first structure"
        return system.z, parts

    @locked
    def bond_changes(self, atoms: Atoms) -> str | None:
        """How the bonds found in a structure differ from those that its energy uses; None if they do not."""
        if not isinstance(self.scheme, BondTree):
            return None
        system = self._system(atoms)
        return bond_changes(self.scheme, self._parts(system.z, system.pbc), system)

    def _elements(self, atoms: Atoms) -> torch.Tensor:
        """Atomic numbers, checked; the same tensor while they do not change, so that graphs need not copy it."""
        if self._numbers is None or not np.array_equal(atoms.numbers, self._numbers):
            self._check_species(atoms)
            self._numbers = atoms.numbers.copy()
            self._z = torch.as_tensor(self._numbers, dtype=torch.long, device=self.device)
            self._batch = torch.zeros_like(self._z)
        return self._z

    def _system(self, atoms: Atoms, **state: Any) -> System:
        """The checked system, in float64; with the same tensors for the same elements."""
        z, cell, pbc = self._elements(atoms), None, None
        if atoms.pbc.any():
            cell = torch.as_tensor(atoms.cell.array, dtype=torch.float64, device=self.device).reshape(1, 3, 3)
            pbc = torch.as_tensor(atoms.pbc, device=self.device).reshape(1, 3)
        pos = torch.as_tensor(atoms.positions, dtype=torch.float64, device=self.device)
        return System.from_tensors(z, pos, self._batch, cell, pbc, **state)

    @locked
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = required(self.atoms)
        system = self._system(atoms, **{key: value.to(self.device) for key, value in required(self._state).items()})
        native = self._ready(system)
        if self.topologies is not None:
            self.topologies.trim = self._trims and native is None  # the program leaves longer edges out itself
            system = system.replace(topology=self._topology(system))
        # Who asked for a stress asks for it again: an evaluation of its own would cost another one at every step
        self._stressed |= "stress" in properties
        stressed = "stress" in properties or (self._stressed and _has_volume(atoms))
        evaluate = self._evaluate if native is None else native
        result = evaluate(system, compute_stress=stressed)
        energy = float(result["energy"])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": result["forces"].double().cpu().numpy(),
        }
        if stressed:
            stress = result["stress"][0].double().cpu().numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
        if "energies" in properties:
            self.results["energies"] = result["energies"].numpy() if native is not None else self._energies(system)

    def _why_torch(self, compile: bool, cuda_graphs: bool) -> str | None:
        """Reason why torch evaluates the potential, or None."""
        if compile or cuda_graphs:
            return "compile=True" if compile else "cuda_graphs=True"
        if self._asked == "torch":
            return "engine='torch'"
        if self.device.type != "cpu":
            return f"the device is {self.device}"
        return why_not(self.potential) or why_not_here()

    def _use_torch(self, reason: str) -> None:
        """Evaluate with torch from now on.

        Raises: ValueError: the engine must be native.
        """
        if self._asked == "native":
            raise ValueError(f"engine 'native' cannot evaluate this potential: {reason}; use engine='auto' or 'torch'")
        self._native = None
        self.engine, self.engine_reason = "torch", reason
        if self._asked == "auto":
            _log.info("engine torch: %s", reason)

    def _ready(self, system: System) -> Callable[..., dict[str, torch.Tensor]] | None:
        """The native program for a system, compiled now if needed; None if torch evaluates it.

        Raises: ValueError: a system that the native program does not know, and the engine must be native.
        """
        native = self._native
        if native is None:
            return None
        if not native.takes(system):
            if self._asked == "native":
                raise ValueError(
                    "engine 'native' computes neutral singlets only, without formal charges; use engine='auto' for "
                    "other systems"
                )
            self.engine, self.engine_reason = "torch", "the native program computes neutral singlets only"
            return None
        if reason := native.changed():
            self._use_torch(reason)
            return None
        try:
            program = functools.partial(native.evaluate, native.model())
        except RuntimeError as error:
            self._use_torch(str(error))
            build.warn_once("native", f"torch runs instead of the native program, which failed to compile: {error}")
            return None
        self.engine, self.engine_reason = "native", None
        return program

    def _check_species(self, atoms: Atoms) -> None:
        species = self.potential.species
        if species is not None and (unknown := sorted(set(atoms.numbers.tolist()) - set(species))):
            raise ValueError(
                f"atoms hold {[chemical_symbols[n] for n in unknown]}, but the model was trained on "
                f"{[chemical_symbols[n] for n in species]} only; train one with these elements"
            )

    def _topology(self, system: System) -> Topology:
        scheme, lists = required(self.scheme), required(self.topologies)
        if self.bonds == "first" and scheme.keeps_parts:
            self._note_first(system)
        thread = threading.get_ident()
        run = thread if thread in self._fixed else None
        if run != self._run:
            self._run = run
            lists.forget()
        searches = lists.rebuilds
        topology = lists(system)
        if topology.bonds is not None and not self._warned and run is None:
            if lists.parts is None:
                self._watch(system.z, topology.bonds)
            elif lists.rebuilds > searches:
                self._tell(bond_changes(scheme, lists.parts, system))
        return topology

    def _parts(self, z: torch.Tensor, pbc: torch.Tensor | None) -> Topology | None:
        """Parts that these atoms have at all positions; None if they are found in each structure."""
        fixed = self._fixed.get(threading.get_ident())
        if fixed is not None and torch.equal(fixed[0], z):
            return fixed[1]
        found, self.bonds_from = None, None
        if self.scheme is None or not self.scheme.keeps_parts:
            return None
        if not isinstance(self.bonds, str):
            numbers, found = parts_of_reference(self.bonds, self.scheme)
            if numbers != z.tolist():
                raise ValueError(
                    f"atoms must be those of the structure given as bonds, in its order, got {len(z)} atoms where it "
                    f"has {len(numbers)} (or other elements); pass bonds='each' for structures of any kind"
                )
            self.bonds_from = "the structure given as bonds"
        elif (found := reference_topology(self.metadata, self.scheme, z.tolist(), pbc is not None)) is not None:
            self.bonds_from = "the reference molecule of the model file"
        elif self.bonds == "first" and self._first is not None:
            found, self.bonds_from = self._first[1], "found in the first structure"
        else:
            self.bonds_from = "found in each structure"
        return None if found is None else found.to(self.device)

    def _note_first(self, system: System) -> None:
        """Keep the parts of the first structure with these atoms."""
        if self._first is None or not torch.equal(self._first[0], system.z):
            self._first = system.z, required(self.scheme).compose(system)

    def _watch(self, z: torch.Tensor, bonds: torch.Tensor) -> None:
        """Warn if bonds that are found in each structure differ from those of the previous one."""
        last, self._last = self._last, (z, bonds)
        if last is None or last[0] is not z or last[1] is bonds or torch.equal(last[1], bonds):
            return
        before, now = ({(i, j) for i, j in b.t().tolist() if i < j} for b in (last[1], bonds))
        self._warned = True
        changes = describe_bonds(z, sorted(before - now), sorted(now - before))
        warnings.warn(
            f"bonds found in this structure differ from those of the previous one ({changes}): between "
            "them the energy has a step. Pass bonds='first', or a structure whose bonds are to be used for all; this "
            "is said once",
            stacklevel=5,
        )

    def _tell(self, changes: str | None) -> None:
        """Warn if bonds of a reference are in use that would not be found."""
        if changes is None:
            return
        self._warned = True
        warnings.warn(
            f"bonds found in this structure differ from those that its energy uses, {self.bonds_from} ({changes}). "
            "For another molecule of the same atoms pass its structure as bonds; this is said once",
            stacklevel=5,
        )

    def _energies(self, system: System) -> np.ndarray:
        """Contribution of each atom with its E0; they sum to the energy."""
        if self.scheme is None or not self.scheme.centred:
            raise PropertyNotImplementedError("energies need a hierarchy in which every part is centred on an atom")
        parts = self.potential.energies(system)
        own = [values for k, values in parts.levels.items() if len(values) == len(system.z)]
        return (torch.stack(own).sum(0) + parts.atoms).cpu().numpy()


def _has_volume(atoms: Atoms) -> bool:
    """Whether a stress is defined, unlike for some slabs and wires."""
    return bool(atoms.pbc.any()) and has_volume(torch.from_numpy(atoms.cell.array))


def _captured(potential: Potential, device: torch.device) -> CapturedPotential:
    captured = CapturedPotential(potential)
    wanted = captured.recorder.device_type
    if device.type != wanted:
        raise ValueError(
            f"cuda_graphs needs a GPU, got device {str(device)!r}; pass device={wanted!r}, or leave cuda_graphs out"
        )
    return captured
