"""Read frames from any file: npz arrays, or whatever ASE reads (extxyz, traj, db, OUTCAR, ...)."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ase import Atoms

from nbody_pyg.data import STATE_KEYS, AtomicData, complete_states
from nbody_pyg.datasets.arrays import read_npz
from nbody_pyg.datasets.convergence import is_converged
from nbody_pyg.datasets.frames import Frames, check_frame, listed, shaped_label
from nbody_pyg.datasets.keys import (
    LEVELLED,
    KeySurvey,
    Stores,
    is_virial,
    levels_apart,
    named_keys,
    stores_of,
    volume_of,
)
from nbody_pyg.datasets.systems import as_slice, named_units, read_systems, title_of
from nbody_pyg.datasets.units import SUFFIXES, UnitFiles
from nbody_pyg.units import STRESS_UNITS, Units

# Tried in this order. The REF_ names come first because ASE (>= 3.23) claims the plain ones for its
# calculator, so that whoever cares for a second label in the same file writes REF_.
DEFAULT_KEYS: Mapping[str, tuple[str, ...]] = {
    "energy": ("REF_energy", "energy", "free_energy"),
    "forces": ("REF_forces", "forces", "force"),
    "stress": ("REF_stress", "stress", "REF_virial", "REF_virials", "virial", "virials"),
    "dipole": ("REF_dipole", "dipole"),
    "polarizability": ("REF_polarizability", "polarizability"),
}
# Folders that ASE reads as one file.
_FOLDERS = (".bundle",)
# Labels that are left out where nobody asked for them and their shape is wrong.
_OPTIONAL = ("dipole", "polarizability")
# Files of a set that its name lists.
_NAMED = 4
_LARGE_STRESS = 2.0  # eV/angstrom^3, 320 GPa


def read_frames(
    path: str | Path,
    *,
    keys: Mapping[str, str] | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    dipole_key: str | None = None,
    units: Units | str | Mapping[str, str] | None = None,
    index: str | slice = ":",
    file_format: str | None = None,
    drop_unconverged: bool = False,
) -> Frames:
    """Every frame of a file as float64 AtomicData in eV, angstrom, eV/angstrom.

    Labels are looked for in ``atoms.info``, ``atoms.arrays`` and the results of the calculator that ASE
    attaches, in an ASE database also among the key-value pairs and the data of a row, under these names in this
    order (a key given by the caller replaces the whole list, nothing is then guessed):

    ==============  ======================================================================================
    label           keys
    ==============  ======================================================================================
    energy          REF_energy, energy, free_energy
    forces          REF_forces, forces, force
    stress          REF_stress, stress; or minus (REF_)virial(s) over the volume. Voigt, 9 or 3x3 numbers
    dipole          REF_dipole, dipole
    polarizability  REF_polarizability, polarizability
    charge, spin    in ``info``: charge, total_charge; spin, multiplicity, spin_multiplicity, total_spin
    charges         formal charges of the atoms, in ``arrays``: formal_charges, initial_charges
    ==============  ======================================================================================

    One key is chosen for each label and the whole file: the first that stands in every frame with this label.
    Energy, forces and stress come from one family, all with ``REF_`` or all without. The key that was used
    stands in ``frames.sources`` and in the table of :func:`label_audit`, with a note where another key holds other
    values. A label that is NaN is missing.

    Charge and spin multiplicity follow the rules of docs/conventions.md. Where some frames of a file say one of them,
    those that do not are neutral, or singlets.

    Args:
        path: a ``.npz`` (see :func:`nbody_pyg.datasets.read_npz` for its keys), an HDF5 file as
            :class:`~nbody_pyg.datasets.units.UnitFiles` reads it, or a file that ASE reads.
        keys: the one key to read a label from, for any of energy, forces, stress, virial, dipole, polarizability,
            charge and spin, such as ``{"energy": "dft_energy"}``.
        energy_key, forces_key, stress_key, dipole_key: short forms of ``keys``.
        units: units of the file, such as ``"kcal/mol"``, ``"eV, angstrom, kbar"`` or ``Units("Ha", "bohr")``.
            Default for ASE files: ASE's own, which are ours, or those that a database of SchNetPack names; an npz
            must say it (inside, or here), except in the form of rMD17.
        index: which frames, in ASE's notation (``"::10"``) or as a slice.
        file_format: ASE's name of the format, when the suffix does not tell.
        drop_unconverged: leave out frames whose electronic structure did not converge; otherwise a note names them
            (see docs/conventions.md).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no frame, a frame without atoms, an unknown label in ``keys``,
            a key in no frame, one key with two values, frames with a label
            under one key and frames with it under another, a stress that is not minus the virial over the volume, a
            label of the wrong shape, NaN in positions or in a part of a label, charges that contradict each other,
            unknown unit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path {str(path)!r} does not exist; give the file with the frames")
    given = named_keys(keys, energy_key=energy_key, forces_key=forces_key, stress_key=stress_key, dipole_key=dipole_key)
    if path.suffix == ".npz" and file_format is None:
        return read_npz(path, keys=given, units=units)[as_slice(index)]
    if path.suffix in SUFFIXES and file_format is None:
        if wrong := [f"the key of {label}" for label in given] or (["units"] if units is not None else []):
            raise ValueError(f"{wrong[0]} must not be given for {str(path)!r}: units have fixed names and units")
        return UnitFiles([path]).read(0)[as_slice(index)]
    systems, metadata = read_systems(path, index, file_format)
    units = units or named_units(metadata, path.name)
    frames, odd = frames_of(systems, path, given, units, drop_unconverged=drop_unconverged)
    if odd:
        first, *more = sorted(odd)
        raise ValueError(odd[first] + (f" (also bad: {listed(systems, more)})" if more else ""))
    return frames


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that names, folders and patterns such as ``"run*/frames.xyz"`` stand for, each once, however named.

    Names keep their order; the files of a folder and of a pattern are sorted by name, those that begin with a dot left
    out. A name that exists is no pattern.

    Raises: FileNotFoundError: a name that does not exist, or a pattern or folder without a file.
    """
    found: dict[Path, Path] = {}
    for name in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(name)
        if path.is_dir() and path.suffix not in _FOLDERS:
            files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        elif path.exists() or not glob.has_magic(str(name)):
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(str(name), recursive=True) if os.path.isfile(p))
        if not files:
            raise FileNotFoundError(f"no file under {str(name)!r}; name a file, or a folder or pattern with files")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def join_frames(parts: Sequence[Frames]) -> Frames:
    """The frames of several files as one set, numbered through.

    Raises: ValueError: the files hold a label under keys of two families, which may be two levels of theory.
    """
    names = dict.fromkeys(Path(part.name).name for part in parts)
    name = " + ".join(names) if len(names) == len(parts) <= _NAMED else f"{len(parts)} files"
    if wrong := levels_apart({part.name: part.sources for part in parts}):
        raise ValueError(wrong)
    sources: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for label, keys in part.sources.items():
            sources[label] = tuple(dict.fromkeys((*sources.get(label, ()), *keys)))
    return Frames(
        complete_states([frame for part in parts for frame in part]), name=name, sources=sources,
        available=[key for part in parts for key in part.available],
        notes=dict.fromkeys(note for part in parts for note in part.notes),
        kinds=[kind for part in parts for kind in part.kinds],
    )  # fmt: skip


def frames_of(
    systems: Sequence[Atoms],
    path: str | Path,
    given: Mapping[str, str],
    units: Units | str | Mapping[str, str] | None = None,
    *,
    drop_unconverged: bool = False,
) -> tuple[Frames, dict[int, str]]:
    """The frames of systems that were read from ``path``, and by number what is wrong with those that are left out.

    Raises: ValueError: a key in no frame, or what concerns the file as a whole, such as mixed levels of theory.
    """
    units, stores = Units.parse(units or Units()), [stores_of(atoms) for atoms in systems]
    survey = KeySurvey(DEFAULT_KEYS, given, units, title_of(path))
    survey.add(systems, stores)
    chosen = ChosenKeys(*survey.choose(), given, units)
    frames, odd = chosen.frames(systems, path, stores, drop_unconverged=drop_unconverged)
    if unconverged := [number for number, atoms in enumerate(systems) if not is_converged(atoms)]:
        if drop_unconverged and len(unconverged) == len(systems):
            raise ValueError(f"no frame of {path} converged; leave drop_unconverged out to keep them")
        frames.notes += (unconverged_note(title_of(path), unconverged, drop_unconverged),)
    return frames, odd


@dataclass(frozen=True)
class ChosenKeys:
    """The keys to read each label of a file from, notes about what is not taken, keys of the user, and units."""

    keys: Mapping[str, tuple[str, ...]]
    notes: Sequence[str]
    given: Mapping[str, str]
    units: Units

    def frames(
        self, systems: Sequence[Atoms], path: str | Path, stores: Sequence[Stores], first: int = 0,
        drop_unconverged: bool = False,
    ) -> tuple[Frames, dict[int, str]]:  # fmt: skip
        """Frames of some systems of the file, from number ``first`` on; see :func:`frames_of`."""
        name = title_of(path)
        frames: list[AtomicData] = []
        numbers: list[int] = []
        used_keys: dict[str, dict[str, None]] = {}
        odd: dict[int, str] = {}
        misshapen: dict[str, str] = {}
        for place, atoms in enumerate(systems):
            if drop_unconverged and not is_converged(atoms):
                continue
            try:
                frame, used = self._frame(atoms, stores[place], f"frame {first + place} of {name}", misshapen)
            except ValueError as error:
                odd[first + place] = str(error)
                continue
            frames.append(frame)
            numbers.append(place)
            for label, key in used.items():
                used_keys.setdefault(label, {})[key] = None
        completed = complete_states(frames)
        notes = [*self.notes, *(f"{message}; it is left out" for message in misshapen.values())]
        if note := _implausible(completed):
            notes.append(f"{name}: {note}")
        kinds = [str(systems[place].info.get("config_type", "")) for place in numbers]
        sources = {label: tuple(keys) for label, keys in used_keys.items()}
        available = {key for places in stores for place in places.values() for key in place}
        found = Frames(
            completed, name=str(path), sources=sources, available=available, notes=notes,
            numbers=[first + place for place in numbers], kinds=kinds,
        )  # fmt: skip
        return found, odd

    def _frame(
        self, atoms: Atoms, stores: Stores, where: str, misshapen: dict[str, str]
    ) -> tuple[AtomicData, dict[str, str]]:
        """A frame, and where its labels stood. Labels that nobody asked for are left out where their shape is another
        one, and told once."""
        if len(atoms) == 0:
            raise ValueError(f"{where} has no atoms; remove the frame from the file")
        units, used = self.units, dict[str, str]()
        frame = AtomicData.from_ase(self._with_state(atoms, stores), labels=False, where=where, sources=used)
        used |= {label: f"info[{self.given[label]!r}]" for label in STATE_KEYS if label in used and label in self.given}
        frame.pos = frame.pos * units.length_factor
        if frame.get("cell") is not None:
            frame.cell = frame.cell * units.length_factor
        volume = volume_of(atoms) * units.length_factor**3
        for label, names in self.keys.items():
            for key in names:
                found = {store: values[key] for store, values in stores.items() if key in values}
                if not found:
                    continue
                try:
                    shaped = {
                        place: shaped_label(value, label, len(atoms), f"{where}, {place}[{key!r}]")
                        for place, value in found.items()
                    }
                except ValueError as error:
                    if label not in _OPTIONAL or label in self.given:
                        raise
                    misshapen.setdefault(label, str(error))
                    continue
                store, value = next(iter(shaped.items()))
                for other, second in shaped.items():
                    if not torch.allclose(value, second, rtol=1e-12, atol=1e-9, equal_nan=True):
                        raise ValueError(
                            f"{where}: {key!r} has one value in {store} and another in {other} (they differ by "
                            f"{float((value - second).abs().max()):.3g}); remove one, or rename it and give "
                            f"{label}_key"
                        )
                if bool(value.isnan().all()):
                    continue  # not computed for this frame
                if is_virial(key, self.given):
                    if not volume:
                        continue  # a molecule: a virial without a volume is no stress
                    value, factor = -value / volume, units.energy_factor
                else:
                    factor = units.factor(label)
                frame[label] = value * factor
                used[label] = f"{store}[{key!r}]"
                break
        check_frame(frame, where)
        return frame, used

    def _with_state(self, atoms: Atoms, stores: Stores) -> Atoms:
        """The system with charge and spin under our names where the user named their keys."""
        named = {label: self.given[label] for label in STATE_KEYS if label in self.given}
        if not named:
            return atoms
        atoms = atoms.copy()
        values = {
            label: next((place[key] for place in stores.values() if key in place), None)
            for label, key in named.items()
        }  # fmt: skip
        for key in {key for label in named for key in STATE_KEYS[label]}:
            atoms.info.pop(key, None)
        atoms.info |= values
        return atoms


def unconverged_note(name: str, numbers: Sequence[int], dropped: bool) -> str:
    """A word about the frames of a file whose electronic structure did not converge."""
    what = "left out" if dropped else "kept; drop_unconverged leaves them out"
    listing = listed(range(max(numbers) + 1), numbers)
    return f"{name}: electronic structure not converged in {listing} ({len(numbers)} in all), {what}"


def without_labels(atoms: Atoms) -> Atoms:
    """A copy without its calculator and without what would be read as a label: it holds for these positions only."""
    atoms = atoms.copy()
    for key in {key for label in LEVELLED for key in DEFAULT_KEYS[label]}:
        atoms.info.pop(key, None)
        atoms.arrays.pop(key, None)
    return atoms


def _implausible(frames: Sequence[AtomicData]) -> str | None:
    """A word about stresses that no solid has; kbar and GPa are taken for eV/angstrom^3 otherwise."""
    largest = max((float(frame.stress.abs().max()) for frame in frames if "stress" in frame), default=0.0)
    if largest < _LARGE_STRESS:
        return None
    return (
        f"the stress reaches {largest:.4g} eV/A^3, that is {largest / STRESS_UNITS['GPa']:.3g} GPa: if the file is in "
        "kbar or GPa, give units such as 'eV, angstrom, kbar' (and mind the sign: VASP's is minus ASE's)"
    )
