"""Read frames from npz arrays: the forms of rMD17, of sGDML (MD17) and plain ones."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch

from nbody_pyg.data import STATE_KEYS, VOIGT, AtomicData
from nbody_pyg.datasets.frames import Frames, chosen_rows, has_label
from nbody_pyg.datasets.keys import SHORT_FORMS, named_keys
from nbody_pyg.messages import nearest
from nbody_pyg.units import Units

# The names under which packages store the same array.
ARRAY_KEYS: Mapping[str, tuple[str, ...]] = {
    "z": ("nuclear_charges", "z", "atomic_numbers", "numbers"),
    "pos": ("coords", "R", "positions", "pos"),
    "energy": ("energies", "E", "energy"),
    "forces": ("forces", "F"),
    "stress": ("stress", "stresses"),
    "dipole": ("dipoles", "dipole"),
    "cell": ("cell", "cells"),
    "pbc": ("pbc",),
    **STATE_KEYS,
}


def read_npz(
    path: str | Path,
    *,
    keys: Mapping[str, str] | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    dipole_key: str | None = None,
    units: Units | str | Mapping[str, str] | None = None,
    rows: Iterable[SupportsIndex] | slice | None = None,
) -> Frames:
    """Frames of one npz file, float64, in eV and angstrom.

    ==========  =============================================  =============================
    array       keys tried                                     shape for M frames, N atoms
    ==========  =============================================  =============================
    species     nuclear_charges, z, atomic_numbers, numbers    [N] or [M, N]; 0 is padding
    positions   coords, R, positions, pos                      [M, N, 3]
    energy      energies, E, energy                            [M] or [M, 1]
    forces      forces, F                                      [M, N, 3]
    stress      stress, stresses                               [M, 3, 3], [M, 9] or [M, 6]
    dipole      dipoles, dipole                                [M, 3]
    cell        cell, cells (rows are lattice vectors)         [3, 3] or [M, 3, 3]
    pbc         pbc (default: all, where there is a cell)      [3] or [M, 3]
    charge      charge, total_charge                           [] or [M] or [M, 1]
    spin        spin, multiplicity, ... (2S + 1)               [] or [M] or [M, 1]
    ==========  =============================================  =============================

    Units are, in this order: the argument ``units``; the file's own words (``energy_unit``,
    ``length_unit``, or sGDML's ``e_unit``, ``r_unit``); kcal/mol and angstrom for a file in the form of
    rMD17, which is recognised by ``nuclear_charges`` together with ``old_indices`` or ``old_energies``.
    Otherwise it is an error: nothing is guessed. A label that is NaN is missing.

    Args:
        path: the file. Object arrays (pickles) are refused.
        keys: a key that replaces the list of energy, forces, stress, dipole, charge or spin, such as
            ``{"energy": "old_energies"}``.
        energy_key, forces_key, stress_key, dipole_key: short forms of ``keys``.
        units: units of the file.
        rows: which frames; all by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty or damaged file, missing or misnamed array, two arrays of one label with other values,
            wrong shape, NaN in positions or in a part of a label, unknown unit.
    """
    path = Path(path)
    given = named_keys(keys, energy_key=energy_key, forces_key=forces_key, stress_key=stress_key, dipole_key=dipole_key)
    if unknown := sorted(set(given) - set(ARRAY_KEYS)):
        raise ValueError(f"keys must not name {unknown[0]} for {path.name}: an npz file is read without it")
    raw = load_arrays(path)
    arrays, sources = {}, {}
    for name, names in ARRAY_KEYS.items():
        wanted = given.get(name)
        if wanted and wanted not in raw:
            raise ValueError(f"{name}_key {wanted!r} is not in {path.name}; {nearest(wanted, raw)}")
        stored = [k for k in names if k in raw]
        key = wanted or next(iter(stored), None)
        unsure = not wanted and (name in SHORT_FORMS or name in STATE_KEYS)
        if unsure and key is not None and any(not _same(raw[key], raw[k]) for k in stored[1:]):
            cure = f"choose one with {name}_key" if name in SHORT_FORMS else "keep one of them, or name it in keys"
            raise ValueError(f"{path.name} holds {name} under {' and '.join(stored)} with other values; {cure}")
        if key is None and name in ("z", "pos"):
            raise ValueError(f"{path.name} has no {name} (tried {', '.join(names)}); {nearest(names[0], raw)}")
        if key is not None:
            arrays[name] = _numeric(raw[key], key, path.name)
            sources[name] = key
    converted = _checked(arrays, _units(raw, units, path.name), path.name)
    labels = {name: (key,) for name, key in sources.items() if name in SHORT_FORMS or name in STATE_KEYS}
    chosen = chosen_rows(rows, len(converted["pos"]), path.name)
    frames = [_frame(converted, row) for row in chosen]
    return Frames(frames, name=str(path), sources=labels, available=raw, numbers=chosen)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises: FileNotFoundError; ValueError: empty, damaged, or with pickled objects."""
    if not path.exists():
        raise FileNotFoundError(f"path {str(path)!r} does not exist; give the npz file with the frames")
    if path.stat().st_size == 0:
        raise ValueError(f"path {str(path)!r} holds no frame: the file is empty")
    try:
        # numpy leaves a file open that it opened itself and could not read
        with path.open("rb") as handle:
            # numpy alone does not compare the checksum of an array whose shape has become smaller
            if damaged := zipfile.ZipFile(handle).testzip():
                raise ValueError(f"{damaged} does not match its checksum")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise ValueError(
            f"path {str(path)!r} is no readable npz ({error}); it must hold plain arrays, no pickled objects"
        ) from error


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.size == other.size and np.allclose(one.reshape(-1), other.reshape(-1), rtol=1e-8, equal_nan=True)


def _numeric(array: np.ndarray, key: str, name: str) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: {key!r} must hold numbers, got an array of {array.dtype}")
    return array


def _unit(raw: Mapping[str, np.ndarray], key: str, name: str) -> str:
    """The unit that a file names under a key."""
    if raw[key].size != 1 or raw[key].dtype.kind not in "US":
        raise ValueError(f"{name}: {key!r} must hold the name of one unit, got an array of {raw[key].dtype}")
    value = raw[key].item()
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _units(raw: Mapping[str, np.ndarray], units: Units | str | Mapping[str, str] | None, name: str) -> Units:
    if units is not None:
        return Units.parse(units)
    for energy, length in (("energy_unit", "length_unit"), ("e_unit", "r_unit")):
        if energy in raw and length in raw:
            try:
                return Units(_unit(raw, energy, name), _unit(raw, length, name))
            except ValueError as error:
                said = str(error)
            raise ValueError(said if said.startswith(name) else f"{name}: {said}")
    if "nuclear_charges" in raw and ("old_indices" in raw or "old_energies" in raw):
        return Units("kcal/mol", "angstrom")
    raise ValueError(f"{name} does not say its units; give units, for example units='kcal/mol' or units='Ha, bohr'")


def _checked(arrays: Mapping[str, np.ndarray], units: Units, name: str) -> dict[str, np.ndarray]:
    """The arrays in our units, each with its frames in front; shapes and values checked."""
    pos = arrays["pos"].astype(np.float64)
    if pos.ndim != 3 or pos.shape[2] != 3:
        raise ValueError(f"{name}: positions must have shape [frames, atoms, 3], got {list(pos.shape)}")
    frames, atoms = pos.shape[:2]
    if frames == 0 or atoms == 0:
        raise ValueError(f"{name} holds no frame or frames without atoms: positions have shape {list(pos.shape)}")
    out = {"pos": pos * units.length_factor}
    species = arrays["z"]
    if species.dtype.kind == "f" and not np.array_equal(species, np.round(species)):
        raise ValueError(f"{name}: atomic numbers must be whole, got {species.reshape(-1)[:4]}")
    out["z"] = _per_frame(species.astype(np.int64), (atoms,), frames, "atomic numbers", name)
    if out["z"].min() < 0 or out["z"].max() > 118 or not out["z"].any(axis=1).all():
        raise ValueError(f"{name}: atomic numbers must lie in 1..118 (0 pads), with one atom at least per frame")
    if "energy" in arrays:
        energy = arrays["energy"].astype(np.float64)
        if energy.size != frames:
            raise ValueError(f"{name}: energy must have shape [{frames}], got {list(energy.shape)}")
        out["energy"] = energy.reshape(frames, 1) * units.energy_factor
    if "stress" in arrays and arrays["stress"].ndim == 2 and arrays["stress"].shape[1] in (6, 9):
        full = VOIGT if arrays["stress"].shape[1] == 6 else range(9)
        arrays = {**arrays, "stress": arrays["stress"][:, full].reshape(-1, 3, 3)}
    for key, shape in (("forces", (atoms, 3)), ("stress", (3, 3)), ("dipole", (3,))):
        if key in arrays:
            if arrays[key].shape != (frames, *shape):
                raise ValueError(f"{name}: {key} must have shape {[frames, *shape]}, got {list(arrays[key].shape)}")
            out[key] = arrays[key].astype(np.float64) * units.factor(key)
    if "cell" in arrays:
        out["cell"] = _per_frame(arrays["cell"].astype(np.float64), (3, 3), frames, "cell", name) * units.length_factor
        pbc = arrays.get("pbc", np.ones(3, dtype=bool))
        out["pbc"] = _per_frame(pbc.astype(bool), (3,), frames, "pbc", name)
    for key in STATE_KEYS:
        if key in arrays:
            values = arrays[key].astype(np.float64)
            if values.size not in (1, frames):
                raise ValueError(f"{name}: {key} must have shape [] or [{frames}], got {list(values.shape)}")
            out[key] = np.broadcast_to(values.reshape(-1, 1), (frames, 1))
    for key, value in out.items():
        wrong = ~np.isfinite(value)
        if key in ("energy", "stress", "dipole"):  # NaN as a whole: not computed
            wrong &= ~np.isnan(value).reshape(frames, -1).all(axis=1).reshape(-1, *[1] * (value.ndim - 1))
        elif key == "forces":
            wrong &= ~np.isnan(value).all(axis=2, keepdims=True)
        if wrong.any():
            bad = np.argwhere(wrong)[0]
            place = f"frame {bad[0]}" + (f", atom {bad[1]}" if key in ("pos", "forces") else "")
            raise ValueError(f"{name}: {key} of {place} is {value[tuple(bad)]}; remove the frame from the file")
    return out


def _per_frame(array: np.ndarray, shape: tuple[int, ...], frames: int, what: str, name: str) -> np.ndarray:
    if array.shape == shape:
        return np.broadcast_to(array, (frames, *shape))
    if array.shape != (frames, *shape):
        wanted = f"{list(shape)} or {[frames, *shape]}"
        raise ValueError(f"{name}: {what} must have shape {wanted}, got {list(array.shape)}")
    return array


def _frame(arrays: Mapping[str, np.ndarray], row: int) -> AtomicData:
    real = arrays["z"][row] > 0
    frame = AtomicData()
    for key, values in arrays.items():
        if key in ("z", "pos", "forces"):
            value = values[row][real]
        else:  # one value for each graph: numbers as [1], tensors with a leading 1
            value = values[row] if key == "energy" or key in STATE_KEYS else values[row : row + 1]
        frame[key] = torch.from_numpy(value.copy())
    for label in ("energy", "forces", "stress", "dipole"):
        if label in arrays and np.isnan(arrays[label][row]).any() and not has_label(frame, label):
            del frame[label]
    return frame
