"""Structures named on the command line: a file, or an embedded set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from ase import Atoms
from ase.io import read, write

from nbody_pyg.data import AtomicData, electronic_state_of
from nbody_pyg.datasets import embedded
from nbody_pyg.durable import written_whole


def read_atoms(name: str, index: int | str = ":") -> list[Atoms]:
    """Structures of a file that ASE reads, or of an embedded set: ``ethanol`` or ``ethanol:test_300K``.

    Raises: FileNotFoundError: neither a file nor an embedded set; ValueError: no structures that ASE reads, or none of
        this index.
    """
    if not Path(name).exists():
        if "." in name or "/" in name:
            what = "structures" if isinstance(index, str) else "structure"
            raise FileNotFoundError(f"no {what} at {name}; give a file that ASE reads, or an embedded set as ethanol")
        frames = [frame.to_ase() for frame in embedded(*name.split(":", 1))]
        if isinstance(index, str):
            return frames
        if not -len(frames) <= index < len(frames):
            raise ValueError(f"index must lie in 0..{len(frames) - 1} ({name}), got {index}")
        return [frames[index]]
    if Path(name).is_dir():
        raise IsADirectoryError(f"{name} is a folder; name a file with structures")
    try:
        found = read(name, index=index, do_not_split_by_at_sign=True)
    except MemoryError:
        raise
    except (IndexError, StopIteration) as error:
        raise ValueError(f"index must be that of a frame of {name}, got {index}") from error
    except Exception as error:  # what the readers of ASE raise is of every kind, OSError without a number too
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"cannot read {name}: {type(error).__name__}: {error}") from error
    found = found if isinstance(found, list) else [found]
    if not found or not all(len(atoms) for atoms in found):
        raise ValueError(f"{name} holds no structure, or one without atoms")
    return found


def read_structures(name: str) -> list[AtomicData]:
    """All structures of a file that ASE reads, or of an embedded set: ``ethanol`` or ``ethanol:test_300K``.

    Charges and spins come along from where the calculator reads them.

    Raises: see :func:`read_atoms`.
    """
    return [_structure(atoms, f"frame {number} of {name}") for number, atoms in enumerate(read_atoms(name))]


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


def write_atoms(path: str | Path, structures: Sequence[Atoms]) -> None:
    """Extended xyz, whole or not at all, with the results of their calculators."""
    with written_whole(path) as temporary:
        write(temporary, list(structures), format="extxyz")
