"""HostAtoms: atoms whose positions a host program gives, evaluated by an ASE calculator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.stress import voigt_6_to_full_3x3_stress

from nbody_pyg.deploy.calculator import NBodyCalculator, SharedCalculator
from nbody_pyg.potential import Potential

#: What an engine takes as a model.
Model = BaseCalculator | Potential | str | Path


def as_calculator(model: Model, **options: Any) -> BaseCalculator:
    """The calculator of a model: itself, or an :class:`NBodyCalculator` of a potential or a model file.

    Args:
        options: arguments of :class:`NBodyCalculator` (device, dtype, skin, ...).
    Raises: TypeError: options for a calculator that exists already, or another object. ValueError, FileNotFoundError:
        as for :class:`NBodyCalculator`.
    """
    if isinstance(model, (str, Path, Potential)):
        return NBodyCalculator(model, **options)
    if not hasattr(model, "get_property"):
        raise TypeError(f"model must be an ASE calculator, a Potential or a model file, got {type(model).__name__}")
    if options:
        raise TypeError(f"options {sorted(options)} are for a model file; give them to the calculator itself")
    return model


class HostAtoms:
    """Energy, forces and stress at positions that a host program gives, in eV and angstrom.

    Results are those of the calculator: bonds, charges and spin follow its rules.

    Args:
        atoms: elements, periodic directions, charges and spin; its positions and cell are replaced at every call. The
            object is copied.
        model: an ASE calculator, a potential, or a model file.
        options: arguments of :class:`NBodyCalculator`, if ``model`` is not a calculator.
    """

    def __init__(self, atoms: Atoms, model: Model, **options: Any) -> None:
        self.atoms = atoms.copy()
        self.atoms.set_constraint()
        self.atoms.calc = as_calculator(model, **options)

    def evaluate(
        self, positions: np.ndarray, cell: np.ndarray | None = None, stress: bool = False
    ) -> tuple[float, np.ndarray, np.ndarray | None]:
        """Energy (eV), forces [N, 3] (eV/angstrom) and stress [3, 3] (eV/angstrom^3, ASE's sign; None if not wanted).

        Args:
            positions: [N, 3], angstrom.
            cell: [3, 3], angstrom, rows are lattice vectors; None keeps the last one.
            stress: whether the stress is wanted; needs a periodic cell.
        """
        atoms = self.atoms
        atoms.positions[:] = positions
        if cell is not None:
            atoms.cell[:] = cell
        if isinstance(atoms.calc, SharedCalculator):
            energy, forces, found = atoms.calc.evaluate(atoms, stress)
        else:
            # The stress first: many calculators then find energy and forces in the same evaluation
            found = atoms.get_stress() if stress else None
            energy, forces = float(atoms.get_potential_energy()), atoms.get_forces()
        return energy, forces, None if found is None else voigt_6_to_full_3x3_stress(found)
