"""Structures named on the command line: a file, or an embedded set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from ase.io import read, write

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import embedded


def read_structures(name: str) -> list[AtomicData]:
    """All structures of a file that ASE reads, or of an embedded set: ``ethanol`` or ``ethanol:test_300K``.

    Raises: FileNotFoundError: neither a file nor an embedded set.
    """
    if Path(name).is_file():
        return [AtomicData.from_ase(atoms) for atoms in read(name, index=":")]
    if "." in name or "/" in name:
        raise FileNotFoundError(f"no structures at {name}; give a file that ASE reads, or an embedded set as ethanol")
    return list(embedded(*name.split(":", 1)))


def sample_of(frame: AtomicData) -> dict[str, list]:
    """A structure in plain lists, for the model file."""
    out = {"z": frame.z.tolist(), "pos": frame.pos.double().tolist()}
    if frame.get("pbc") is not None and bool(torch.as_tensor(frame.pbc).any()):
        out["cell"], out["pbc"] = frame.cell.reshape(3, 3).tolist(), frame.pbc.reshape(3).tolist()
    return out


def write_structures(path: str | Path, frames: Sequence[AtomicData]) -> None:
    """Extended xyz with the energies and forces of the frames as results of a calculator."""
    write(path, [frame.to_ase() for frame in frames], format="extxyz")
