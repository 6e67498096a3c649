"""Trajectories in the binary formats of mdtraj: ``.dcd`` and ``.xtc``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

#: Suffixes that mdtraj writes.
LIBRARY_FORMATS = (".dcd", ".xtc")


class LibraryWriter:
    """Writes positions and cells, in float32 (``.dcd``) or to 0.01 angstrom (``.xtc``).

    These formats have no energies, forces and momenta. ``.dcd`` has lengths and angles of the cell only, so structures
    are turned such that the first lattice vector is along x and the second in the xy plane.

    Args:
        path: the file; its suffix names the format.
        atoms: the atoms that :meth:`write` writes.
        first: step that a continued run begins with. These files cannot be appended to, so that a continued run writes
            another file next to it, ``run-500.xtc``.
    Raises: ImportError: mdtraj is missing.
    """

    def __init__(self, path: Path, atoms: Atoms, first: int | None = None) -> None:
        try:
            from mdtraj.formats import DCDTrajectoryFile, XTCTrajectoryFile
        except ImportError as error:
            raise ImportError(f"{path.suffix} needs mdtraj: pip install 'nbody_pyg[trajectories]'") from error
        if first is not None:
            stem = f"{path.stem}-{first}"
            names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(1)))
            path = next(p for p in (path.with_name(name + path.suffix) for name in names) if not p.exists())
        self.path, self.atoms = path, atoms
        self._file = (XTCTrajectoryFile if path.suffix == ".xtc" else DCDTrajectoryFile)(str(path), "w")

    def write(self) -> None:
        """Write the atoms as they are now; step and time are those of their ``info``."""
        atoms, options = self.atoms, dict[str, Any]()
        positions, periodic = atoms.positions, atoms.pbc.any()
        if self.path.suffix == ".xtc":
            options["time"] = np.array([atoms.info["time_fs"] / 1000], dtype=np.float32)
            options["step"] = np.array([atoms.info["step"]], dtype=np.int32)
            options["box"] = np.array([atoms.cell.array / 10 if periodic else np.zeros((3, 3))], dtype=np.float32)
            positions = positions / 10
        elif periodic:
            positions = positions @ atoms.cell.standard_form()[1].T
            sizes = np.array([atoms.cell.cellpar()], dtype=np.float32)
            options = {"cell_lengths": sizes[:, :3], "cell_angles": sizes[:, 3:]}
        self._file.write(np.array([positions], dtype=np.float32), **options)
        if hasattr(self._file, "flush"):
            self._file.flush()

    def close(self) -> None:
        self._file.close()
