"""MDState: all that a molecular dynamics run needs to go on as if it had not been interrupted."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.datasets.arrays import load_arrays

_FORMAT = 1


@dataclass(frozen=True)
class MDState:
    """State of a run after a step, with all digits.

    ===================  ===============  ====================================================================
    field                shape, unit      meaning
    ===================  ===============  ====================================================================
    ``step``                              number of the step
    ``ensemble``                          name and settings of the integrator
    ``timestep``         fs
    ``numbers``          [N]              atomic numbers
    ``masses``           [N], amu
    ``positions``        [N, 3], A
    ``momenta``          [N, 3]           in ASE's units
    ``cell``             [3, 3], A        rows are lattice vectors
    ``pbc``              [3]
    ``first_positions``  [N, 3], A        of the first structure of the run, whose bonds are kept
    ``first_cell``       [3, 3], A
    ``random``                            state of the random numbers
    ``variables``                         of thermostat and barostat
    ``energy``           eV               potential energy; None in a file of an earlier version
    ===================  ===============  ====================================================================
    """

    step: int
    ensemble: str
    timestep: float
    numbers: np.ndarray
    masses: np.ndarray
    positions: np.ndarray
    momenta: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    first_positions: np.ndarray
    first_cell: np.ndarray
    random: dict[str, Any]
    variables: dict[str, np.ndarray]
    energy: float | None = None

    def save(self, path: str | Path) -> None:
        """Write it atomically, as NumPy's ``.npz``."""
        plain: dict[str, Any] = {"format": _FORMAT}
        arrays = {f"variables/{name}": value for name, value in self.variables.items()}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = value
            elif field.name != "variables":
                plain[field.name] = value
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, header=np.array(json.dumps(plain)), **arrays)  # type: ignore[arg-type]  # names are data

    @classmethod
    def load(cls, path: str | Path) -> MDState:
        """Read it.

        Raises: ValueError: no checkpoint of a run, or a damaged one, or one of a newer version.
        """
        try:
            arrays: dict[str, Any] = {**load_arrays(Path(path))}
            plain = json.loads(str(arrays.pop("header")))
            version = plain.pop("format")
            extra = {k.partition("/")[2]: arrays.pop(k) for k in list(arrays) if k.startswith("variables/")}
            if version == _FORMAT:
                return cls(**plain, **arrays, variables=extra)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no readable checkpoint of nbody md ({error}); remove it to go on from the last frame"
            ) from error
        raise ValueError(f"{path} has format {version}, known is {_FORMAT}; update nbody_pyg, or remove the checkpoint")

    def check(self, atoms: Atoms, timestep: float, path: str | Path) -> None:
        """Raises: ValueError: it belongs to other atoms, masses, or another time step."""
        if not np.array_equal(self.numbers, atoms.numbers):
            raise ValueError(
                f"atoms must be those of the checkpoint {path}, got {atoms.get_chemical_formula()} and "
                f"{Atoms(numbers=self.numbers).get_chemical_formula()} there"
            )
        if not np.allclose(self.masses, atoms.get_masses(), rtol=0, atol=1e-5):
            raise ValueError(f"atoms must have the masses of the checkpoint {path}; correct them, or begin a new run")
        if self.timestep != timestep:
            raise ValueError(
                f"timestep must be that of the checkpoint, {self.timestep:g} fs, got {timestep:g}; begin a new run for "
                "another one"
            )

    def apply(self, atoms: Atoms) -> None:
        """Give atoms cell, positions and momenta, whatever their constraints."""
        move_to(atoms, self.cell, self.pbc, self.positions, self.momenta, atoms.constraints)

    def first(self, atoms: Atoms) -> Atoms:
        """The first structure of the run."""
        other: Atoms = atoms.copy()
        other.set_constraint()
        other.set_cell(self.first_cell)
        other.set_pbc(self.pbc)
        other.set_positions(self.first_positions)
        return other


def move_to(atoms: Atoms, cell: Any, pbc: Any, positions: np.ndarray, momenta: np.ndarray, constraints: Any) -> None:
    """Give atoms this state, whatever their constraints; afterwards they have ``constraints``."""
    atoms.set_constraint()
    atoms.set_cell(cell)
    atoms.set_pbc(pbc)
    atoms.set_positions(positions)
    atoms.set_momenta(momenta)
    atoms.set_constraint(constraints)
