"""Structures named on the command line: a file, or an embedded set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from ase import Atoms
from ase.io import read, write

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import embedded
from nbody_pyg.deploy.calculator import charges_of


def read_structures(name: str) -> list[AtomicData]:
    """All structures of a file that ASE reads, or of an embedded set: ``ethanol`` or ``ethanol:test_300K``.

    Charges come along from where the calculator reads them; a neutral structure has none.

    Raises: FileNotFoundError: neither a file nor an embedded set.
    """
    if Path(name).is_file():
        return [_structure(atoms) for atoms in read(name, index=":")]
    if "." in name or "/" in name:
        raise FileNotFoundError(f"no structures at {name}; give a file that ASE reads, or an embedded set as ethanol")
    return list(embedded(*name.split(":", 1)))


def _structure(atoms: Atoms) -> AtomicData:
    frame = AtomicData.from_ase(atoms)
    for key, value in charges_of(atoms).items():
        if bool(value.any()):
            frame[key] = value
    return frame


def sample_of(frame: AtomicData) -> dict[str, list]:
    """A structure in plain lists, for the model file."""
    out = {"z": frame.z.tolist(), "pos": frame.pos.double().tolist()}
    if frame.get("pbc") is not None and bool(torch.as_tensor(frame.pbc).any()):
        out["cell"], out["pbc"] = frame.cell.reshape(3, 3).tolist(), frame.pbc.reshape(3).tolist()
    return out


def write_structures(path: str | Path, frames: Sequence[AtomicData]) -> None:
    """Extended xyz with the energies and forces of the frames as results of a calculator, and with their charges."""
    write(path, [_atoms(frame) for frame in frames], format="extxyz")


def _atoms(frame: AtomicData) -> Atoms:
    atoms = frame.to_ase()
    if frame.get("charge") is not None:
        atoms.info["charge"] = float(frame.charge)
    if frame.get("charges") is not None:
        atoms.set_initial_charges(frame.charges.cpu().numpy())
    return atoms
