"""Structures named on the command line: a file, or an embedded set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from ase import Atoms
from ase.io import read, write

from nbody_pyg.data import AtomicData, electronic_state_of
from nbody_pyg.datasets import embedded


def read_structures(name: str) -> list[AtomicData]:
    """All structures of a file that ASE reads, or of an embedded set: ``ethanol`` or ``ethanol:test_300K``.

    Charges and spins come along from where the calculator reads them.

    Raises: FileNotFoundError: neither a file nor an embedded set.
    """
    if Path(name).is_file():
        return [_structure(atoms, f"frame {number} of {name}") for number, atoms in enumerate(read(name, index=":"))]
    if "." in name or "/" in name:
        raise FileNotFoundError(f"no structures at {name}; give a file that ASE reads, or an embedded set as ethanol")
    return list(embedded(*name.split(":", 1)))


def _structure(atoms: Atoms, where: str) -> AtomicData:
    electronic_state_of(atoms, where)  # whose message would not know the place
    return AtomicData.from_ase(atoms)


def sample_of(frame: AtomicData) -> dict[str, list]:
    """A structure in plain lists, for the model file."""
    out = {"z": frame.z.tolist(), "pos": frame.pos.double().tolist()}
    if frame.get("pbc") is not None and bool(torch.as_tensor(frame.pbc).any()):
        out["cell"], out["pbc"] = frame.cell.reshape(3, 3).tolist(), frame.pbc.reshape(3).tolist()
    out |= {k: torch.as_tensor(frame[k]).tolist() for k in ("charge", "charges", "spin") if frame.get(k) is not None}
    return out


def write_structures(path: str | Path, frames: Sequence[AtomicData]) -> None:
    """Extended xyz with the energies and forces of the frames as results of a calculator, and with their charges."""
    write(path, [frame.to_ase() for frame in frames], format="extxyz")
