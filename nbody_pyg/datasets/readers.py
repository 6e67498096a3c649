"""Read frames from any file: npz arrays, or whatever ASE reads (extxyz, traj, db, OUTCAR, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.io import iread

from nbody_pyg.data import AtomicData, complete_states, electronic_state_of
from nbody_pyg.datasets.arrays import read_npz
from nbody_pyg.datasets.frames import LABEL_SHAPES, Frames, check_frame, nearest
from nbody_pyg.units import Units

# Tried in this order. The REF_ names come first because ASE (>= 3.23) claims the plain ones for its
# calculator, so that whoever cares for a second label in the same file writes REF_.
DEFAULT_KEYS: Mapping[str, tuple[str, ...]] = {
    "energy": ("REF_energy", "energy", "free_energy"),
    "forces": ("REF_forces", "forces", "force"),
    "stress": ("REF_stress", "stress", "REF_virial", "REF_virials", "virial", "virials"),
    "dipole": ("REF_dipole", "dipole"),
    "polarizability": ("REF_polarizability", "polarizability"),
}
_VOIGT = [0, 5, 4, 5, 1, 3, 4, 3, 2]  # xx, yy, zz, yz, xz, xy to a full matrix


def read_frames(
    path: str | Path,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    dipole_key: str | None = None,
    units: Units | str | Mapping[str, str] | None = None,
    index: str | slice = ":",
    file_format: str | None = None,
) -> Frames:
    """Every frame of a file as float64 AtomicData in eV, angstrom, eV/angstrom.

    Labels are looked for in ``atoms.info``, ``atoms.arrays`` and the results of the calculator that ASE
    attaches, under these names in this order (a key given by the caller replaces the whole list, nothing
    is then guessed):

    ==============  ======================================================================================
    label           keys
    ==============  ======================================================================================
    energy          REF_energy, energy, free_energy
    forces          REF_forces, forces, force
    stress          REF_stress, stress; or minus (REF_)virial(s) over the volume. Voigt, 9 or 3x3 numbers
    dipole          REF_dipole, dipole
    polarizability  REF_polarizability, polarizability
    charge, spin    in ``info`` only: charge, total_charge; spin, multiplicity, spin_multiplicity, total_spin
    charges         formal charges of the atoms, in ``arrays``: formal_charges, initial_charges
    ==============  ======================================================================================

    Charge and spin multiplicity follow the rules of docs/conventions.md. Where some frames of a file say one of them,
    those that do not are neutral, or singlets.

    The key that was used stands in ``frames.sources`` and in the table of :func:`label_audit`.

    Args:
        path: a ``.npz`` (see :func:`nbody_pyg.datasets.read_npz` for its keys) or a file that ASE reads.
        energy_key, forces_key, stress_key, dipole_key: the one key to read this label from.
        units: units of the file, such as ``"kcal/mol"`` or ``Units("Ha", "bohr")``. Default for ASE files:
            ASE's own, which are ours; an npz must say it (inside, or here), except in the form of rMD17.
        index: which frames, in ASE's notation (``"::10"``) or as a slice.
        file_format: ASE's name of the format, when the suffix does not tell.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no frame, a frame without atoms, a key in no frame, one key with two values, a label of
            the wrong shape, NaN in positions or labels, charges that contradict each other, unknown unit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path {str(path)!r} does not exist; give the file with the frames")
    given = {"energy": energy_key, "forces": forces_key, "stress": stress_key, "dipole": dipole_key}
    if path.suffix == ".npz":
        frames = read_npz(path, energy_key=energy_key, forces_key=forces_key, dipole_key=dipole_key, units=units)
        return frames[_as_slice(index)]
    return _read_ase(path, {k: v for k, v in given.items() if v}, Units.parse(units or Units()), index, file_format)


def _as_slice(index: str | slice) -> slice:
    if isinstance(index, slice):
        return index
    try:
        numbers = [int(part) if part else None for part in index.split(":")]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 3:
        raise ValueError(f"index must be a slice such as ':', '::10' or '100:200', got {index!r}")
    return slice(*numbers)


def _read_ase(
    path: Path, given: Mapping[str, str], units: Units, index: str | slice, file_format: str | None
) -> Frames:
    try:
        systems = list(iread(path, index=_as_slice(index), format=file_format)) if path.stat().st_size else []
    except Exception as error:  # ASE's parsers raise whatever they meet
        raise ValueError(
            f"path {str(path)!r} could not be read by ASE{f' as {file_format}' if file_format else ''} "
            f"({type(error).__name__}: {error}); check the file, or name its format with file_format"
        ) from error
    if not systems:
        raise ValueError(f"path {str(path)!r} holds no frame (index {index!r}); give a file with at least one")
    available = set().union(*(_stores(atoms)[1] for atoms in systems))
    keys = {label: (given[label],) if label in given else names for label, names in DEFAULT_KEYS.items()}
    for label, key in given.items():
        if key not in available:
            raise ValueError(f"{label}_key {key!r} is in no frame of {str(path)!r}; {nearest(key, available)}")
    frames, sources = [], {}
    for number, atoms in enumerate(systems):
        where = f"frame {number} of {path.name}"
        if len(atoms) == 0:
            raise ValueError(f"{where} has no atoms; remove the frame from the file")
        frame, used = _frame(atoms, keys, units, where)
        frames.append(frame)
        for label, key in used.items():
            sources.setdefault(label, {})[key] = None
    frames = complete_states(frames)
    return Frames(frames, name=str(path), sources={k: tuple(v) for k, v in sources.items()}, available=available)


def _stores(atoms: Atoms) -> tuple[dict[str, Mapping[str, Any]], set[str]]:
    """The three places of ASE where a label can be, and all keys in them."""
    results = atoms.calc.results if atoms.calc is not None else {}
    arrays = {key: value for key, value in atoms.arrays.items() if key not in ("numbers", "positions")}
    stores = {
        "info": atoms.info,
        "arrays": arrays,
        "results": {k: v for k, v in results.items() if v is not None},
    }
    return stores, {str(key) for store in stores.values() for key in store}


def _frame(
    atoms: Atoms, keys: Mapping[str, tuple[str, ...]], units: Units, where: str
) -> tuple[AtomicData, dict[str, str]]:
    used: dict[str, str] = {}
    electronic_state_of(atoms, where, used)
    frame = AtomicData.from_ase(atoms, labels=False)
    frame.pos = frame.pos * units.length_factor
    volume = None
    if frame.get("cell") is not None:
        frame.cell = frame.cell * units.length_factor
        volume = float(torch.linalg.det(frame.cell[0]).abs())
    stores, _ = _stores(atoms)
    factors = {
        "energy": units.energy_factor,
        "forces": units.forces_factor,
        "stress": units.stress_factor,
        "dipole": units.dipole_factor,
    }
    for label, names in keys.items():
        for key in names:
            found = {store: values[key] for store, values in stores.items() if key in values}
            if not found:
                continue
            shaped = {s: _shaped(value, label, key, len(atoms), f"{where}, {s}") for s, value in found.items()}
            store, value = next(iter(shaped.items()))
            for other, second in shaped.items():
                if not np.allclose(value, second, rtol=1e-12, atol=1e-9, equal_nan=True):
                    raise ValueError(
                        f"{where}: {key!r} has one value in {store} and another in {other} (they differ by "
                        f"{np.abs(value - second).max():.3g}); remove one, or rename it and give {label}_key"
                    )
            if "virial" in key.lower():
                if not volume:
                    continue  # a molecule: a virial without a volume is no stress
                value, factor = -value / volume, units.energy_factor
            else:
                factor = factors.get(label, 1.0)
            frame[label] = torch.from_numpy(value * factor)
            used[label] = f"{store}[{key!r}]"
            break
    check_frame(frame, where)
    return frame, used


def _shaped(value: Any, label: str, key: str, num_atoms: int, where: str) -> np.ndarray:
    """The label as a float64 array of AtomicData's shape."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {key!r} must hold numbers for {label}, got {value!r}") from None
    shape = tuple(num_atoms if size == "N" else int(size) for size in LABEL_SHAPES[label])
    if label in ("stress", "polarizability") and array.size == 6:
        array = array.reshape(6)[_VOIGT]
    # Flat and squeezed forms of the same numbers are accepted; a transposed or cut array is not.
    if array.size != int(np.prod(shape)) or (
        array.ndim > 1 and array.squeeze().shape != np.zeros(shape).squeeze().shape
    ):
        raise ValueError(
            f"{where}: {label} under {key!r} must have shape {list(shape)} for {num_atoms} atoms, "
            f"got {list(array.shape)}; check the key, or give {label}_key"
        )
    return array.reshape(shape)
