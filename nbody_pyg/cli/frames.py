"""Read structures given on the command line: a file or an embedded set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.io import write

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import load_embedded, read_frames
from nbody_pyg.datasets.systems import as_slice, read_systems


def read_atoms(name: str, index: int | None = None) -> list[Atoms]:
    """All structures, or the one of this index, of an npz file, a file that ASE reads, or an embedded set.

    An embedded set is ``ethanol`` or ``ethanol:test_300K``.

    Raises: FileNotFoundError: neither a file nor an embedded set. ValueError: a file that cannot be read, a structure
        without atoms, or no structure of this index.
    """
    if Path(name).is_dir():
        raise IsADirectoryError(f"{name} is a folder; name a file with structures")
    if Path(name).exists() and not name.endswith(".npz"):
        found = read_systems(name, ":" if index is None else index)[0]
    else:
        if not Path(name).exists() and ("." in name or "/" in name):
            what = "structures" if index is None else "structure"
            raise FileNotFoundError(f"no {what} at {name}; give a file that ASE reads, or an embedded set like ethanol")
        frames = read_frames(name) if Path(name).exists() else load_embedded(*name.split(":", 1))
        found = [frame.to_ase() for frame in (frames if index is None else frames[as_slice(index)])]
        if not found:
            raise ValueError(f"{name!r} holds no frame of index {index}; choose another index")
    if not all(len(atoms) for atoms in found):
        raise ValueError(f"{name} holds a structure without atoms")
    return found


def read_structures(name: str) -> list[AtomicData]:
    """All structures of a file that ASE reads, or of an embedded set: ``ethanol`` or ``ethanol:test_300K``.

    Charges and spins are read from the same places as by the calculator.

    Raises: see :func:`read_atoms`.
    """
    return [
        AtomicData.from_ase(atoms, where=f"frame {number} of {name}") for number, atoms in enumerate(read_atoms(name))
    ]


def sample_of(frame: AtomicData) -> dict[str, list[Any]]:
    """A structure as plain lists, for the model file."""
    out = {"z": frame.z.tolist(), "pos": frame.pos.double().tolist()}
    if frame.get("pbc") is not None and bool(torch.as_tensor(frame.pbc).any()):
        out["cell"], out["pbc"] = frame.cell.reshape(3, 3).tolist(), frame.pbc.reshape(3).tolist()
    out |= {k: torch.as_tensor(frame[k]).tolist() for k in ("charge", "charges", "spin") if frame.get(k) is not None}
    return out


def write_atoms(path: str | Path, structures: Sequence[Atoms]) -> None:
    """Write extended xyz atomically, with the results of the calculators."""
    with atomic_write(path) as temporary:
        write(temporary, list(structures), format="extxyz")
