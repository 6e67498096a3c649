"""Frames in many HDF5 files (units), of which a few are in memory at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.data import AtomicData, complete_states, implied_pbc
from nbody_pyg.datasets.frames import LABEL_SHAPES, Frames, check_frame, has_label
from nbody_pyg.datasets.reference import is_isolated_atom
from nbody_pyg.messages import symbols

#: Endings of such files.
SUFFIXES = (".h5", ".hdf5")
#: Splits by their number in the files; files without the dataset ``split`` are for training.
SPLITS = ("train", "val", "test")
#: Datasets that a unit must hold, with their number of axes.
_NEEDED: Mapping[str, int] = {"natoms": 1, "z": 1, "pos": 2, "energy": 1, "forces": 2}
#: Key of AtomicData -> dataset, and shape of one row; rows are atoms or frames.
_ATOMS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "z": ("z", ()), "pos": ("pos", (3,)), "forces": ("forces", (3,)), "charges": ("formal_charges", ()),
}  # fmt: skip
_FRAMES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "energy": ("energy", ()), "stress": ("stress", (3, 3)), "dipole": ("dipole", (3,)),
    "polarizability": ("polarizability", (3, 3)), "charge": ("total_charge", ()), "spin": ("spin", ()),
    "cell": ("cell", (3, 3)), "pbc": ("pbc", (3,)),
}  # fmt: skip
_GEOMETRY = ("z", "pos", "cell", "pbc")
_INTEGERS = {"z": np.uint8, "pbc": np.uint8}
#: Training frames of a sample, from which E0, scale, labels and charges are taken.
SAMPLE = 2000
#: Frames that a sample gets more for a trait that it lacks.
_MORE = 20


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading or writing {path} needs h5py: pip install 'nbody_pyg[hdf5]'") from error
    return h5py


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An HDF5 file, for reading.

    Raises: ValueError: whatever the library raises about a damaged file; FileNotFoundError; ImportError: no h5py.
    """
    h5py = _h5py(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is no readable HDF5 file, it is truncated or damaged; get a fresh copy") from error


def write_unit(path: Path, frames: Frames, splits: Sequence[int]) -> None:
    """Write frames as a unit, atomically; what a frame does not have is NaN.

    Args:
        splits: of each frame: 0 train, 1 val, 2 test.
    """
    h5py = _h5py(path)

    # With checksums of the data (fletcher32) and of what describes them (format 1.10), so that damage is noticed
    with atomic_write(path) as unfinished, h5py.File(unfinished, "w", libver="v110") as file:
        columns: dict[str, np.ndarray] = {
            "natoms": np.array([len(frame.z) for frame in frames], dtype=np.int32),
            "split": np.array(splits, dtype=np.uint8),
            "number": np.array(frames.numbers, dtype=np.int64),
        }
        file.create_dataset("config_type", data=list(frames.kinds), dtype=h5py.string_dtype())
        for key, (name, shape) in {**_ATOMS, **_FRAMES}.items():
            if name not in _NEEDED and all(frame.get(key) is None for frame in frames):
                continue
            rows = [_rows(frame, key, (len(frame.z) if key in _ATOMS else 1, *shape)) for frame in frames]
            kind = _INTEGERS.get(key, np.float64)
            columns[name] = np.concatenate([*rows, np.zeros((0, *shape))]).astype(kind)
        for name, values in columns.items():
            file.create_dataset(name, data=values, fletcher32=len(values) > 0)
        file.attrs["labels"] = [label for label in LABEL_SHAPES if any(has_label(f, label) for f in frames)]
        file.attrs["sources"] = json.dumps(frames.sources)
        file.attrs["notes"] = json.dumps(frames.notes)


def _rows(frame: AtomicData, key: str, shape: tuple[int, ...]) -> np.ndarray:
    value = frame.get(key)
    if value is None and key == "pbc" and frame.get("cell") is not None:
        value = implied_pbc(frame.cell)
    if value is None:
        return np.zeros(shape) if key in ("cell", "pbc") else np.full(shape, np.nan)
    return value.detach().cpu().numpy().reshape(shape)  # type: ignore[no-any-return]  # PyG has no py.typed


def _traits(frame: AtomicData) -> set[Hashable]:
    """What a sample of frames must not lack: elements, labels, a periodic cell, charges and spins, isolated atoms."""
    found: set[Hashable] = {*frame.z.tolist(), *(label for label in LABEL_SHAPES if has_label(frame, label))}
    if frame.get("pbc") is not None:
        found.add("pbc")
    found |= {(key, float(frame[key])) for key in ("charge", "spin") if frame.get(key) is not None}
    if len(frame.z) == 1 and is_isolated_atom(frame):
        found.add(("atom", int(frame.z)))
    return found


class UnitFiles:
    r"""Frames in HDF5 files, read file by file.

    A file holds the frames one after the other, as ``nbody convert`` and ``datasets/make_pretraining.py`` write them.
    The first five datasets are needed; those of numbers of atoms and frames are integers, the others floats.

    ==================  ==================  =================================================================
    dataset             shape               meaning, unit
    ==================  ==================  =================================================================
    ``natoms``          (frames,)           number of atoms
    ``z``               (atoms,)            atomic numbers of all frames
    ``pos``             (atoms, 3)          angstrom
    ``energy``          (frames,)           eV, float64; NaN: missing
    ``forces``          (atoms, 3)          eV/angstrom; NaN: missing, for single atoms too
    ``stress``          (frames, 3, 3)      eV/angstrom^3, ASE's sign; NaN: missing
    ``dipole``          (frames, 3)         e angstrom; NaN: missing
    ``polarizability``  (frames, 3, 3)      as in the file that was read; NaN: missing
    ``cell``            (frames, 3, 3)      rows are lattice vectors, angstrom; with ``pbc``
    ``pbc``             (frames, 3)         1 along periodic vectors; a frame with three zeros has no cell
    ``total_charge``    (frames,)           e (neutral without it)
    ``formal_charges``  (atoms,)            e
    ``spin``            (frames,)           multiplicity 2S + 1 (singlets without it)
    ``config_type``     (frames,)           text, by which errors are reported
    ``number``          (frames,)           of the frame in the files that were converted, for messages
    ``split``           (frames,)           0 train, 1 val, 2 test (all for training without it)
    ==================  ==================  =================================================================

    The attribute ``kind`` of a file is the ``config_type`` of its frames where there is no such dataset. The attributes
    ``labels`` (which labels some frame of the file has; by default all that it holds), ``sources`` (JSON: label ->
    where it was read from) and ``notes`` (JSON: sentences for the table of labels) are optional.

    Only numbers of atoms, splits and traits (elements, labels, charges) of the files stay in memory: five bytes for
    each frame.

    Args:
        paths: the files, in this order; files without a frame are left out.
        num_train: number of training frames to use, the first ones; None: all.
        in_memory: files that training holds at once.

    Raises: ValueError: no files or no frames, a file that is damaged or lacks a dataset, fewer training frames than
        ``num_train``; FileNotFoundError; ImportError: h5py is not installed.
    """

    def __init__(self, paths: Iterable[str | Path], num_train: int | None = None, in_memory: int = 8) -> None:
        if in_memory < 1:
            raise ValueError(f"in_memory must be at least 1, got {in_memory}; try 8")
        self.in_memory = in_memory
        self.files: list[Path] = []
        self.num_atoms: list[np.ndarray] = []
        self.splits: list[np.ndarray] = []
        self.traits: list[frozenset[Hashable]] = []
        self._marks: list[bytes] = []
        self._drawn: tuple[Any, Frames] = None, Frames()
        for path in map(Path, paths):
            self._index(path)
        if not self.files:
            raise ValueError("paths must name at least one HDF5 file with frames, got none; name a folder of units")
        self._num_train = num_train
        if num_train is not None:
            self.require(num_train)
            self._keep(num_train)

    def _index(self, path: Path) -> None:
        with _open(path) as file:
            missing = [name for name, axes in _NEEDED.items() if name not in file or file[name].ndim != axes]
            if not missing:
                atoms = file["natoms"][:].astype(np.int32)
                split = file["split"][:].astype(np.uint8) if "split" in file else np.zeros(len(atoms), np.uint8)
                z, energy = file["z"][:], file["energy"][:]
                wrong = [name for name, _ in _ATOMS.values() if name in file and len(file[name]) != atoms.sum()]
                wrong += [name for name, _ in _FRAMES.values() if name in file and len(file[name]) != len(atoms)]
                wrong += ["natoms"] if (atoms < 1).any() else []
                held = {key for key, (name, _) in {**_ATOMS, **_FRAMES}.items() if name in file}
                labels = held.intersection(file.attrs.get("labels", held))
                states = {(key, float(v)) for key in ("charge", "spin") if key in held
                          for v in np.unique(file[_FRAMES[key][0]][:])}  # fmt: skip
                periodic = "pbc" in held and bool(file["pbc"][:].any())
        if missing:
            raise ValueError(f"{path} must hold {missing[0]} with {_NEEDED[missing[0]]} axes; make it anew")
        if wrong or len(split) != len(atoms) or (len(split) and split.max() > 2):
            raise ValueError(f"{path} is damaged: lengths of its datasets differ, or a split is above 2; make it anew")
        if len(atoms) == 0:
            return
        self.files.append(path)
        self.num_atoms.append(atoms)
        self.splits.append(split)
        traits = {*np.unique(z).tolist(), *labels.intersection(LABEL_SHAPES), *states, *(["pbc"] if periodic else [])}
        self.traits.append(frozenset(traits))
        self._marks.append(hashlib.sha256(atoms.tobytes() + split.tobytes() + energy.tobytes()).digest())
        if len(single := np.flatnonzero((atoms == 1) & (split == 0))):
            last = len(self.files) - 1
            self.traits[last] = self.traits[last].union(*map(_traits, self.read(last, single)))

    def require(self, num_train: int = 1) -> None:
        """Raise unless there are so many training frames.

        Raises: ValueError.
        """
        if len(self) < num_train:
            raise ValueError(
                f"{len(self.files)} files from {self.files[0]} on must hold {num_train} training frames, got "
                f"{len(self)}; name more files"
            )

    def _keep(self, num_train: int) -> None:
        """Leave out the training frames after the first ``num_train``, by a split number of their own."""
        for split in self.splits:
            rows = np.flatnonzero(split == 0)
            split[rows[num_train:]] = len(SPLITS)
            num_train -= min(num_train, len(rows))

    def only(self, names: Sequence[str]) -> UnitFiles:
        """The same without files of other names, such as those that were added to the folder later.

        Raises: ValueError: a file of these names is missing.
        """
        wanted, own = set(names), self.names
        if missing := sorted(wanted.difference(own)):
            raise ValueError(
                f"{len(missing)} files must be there for the run that goes on, from {missing[0]} on, but are not in "
                f"{self.files[0].parent}; bring them back, or start anew"
            )
        kept = [n for n, name in enumerate(own) if name in wanted]
        out = object.__new__(UnitFiles)
        for name, values in vars(self).items():
            setattr(out, name, [values[n] for n in kept] if isinstance(values, list) else values)
        if out._num_train is not None:  # counted over these files alone
            out.splits = [np.where(split == len(SPLITS), 0, split).astype(np.uint8) for split in out.splits]
            out.require(out._num_train)
            out._keep(out._num_train)
        return out

    @property
    def names(self) -> list[str]:
        """Names of the files, with their folders where there are several."""
        folders = [path.resolve().parent for path in self.files]
        common = os.path.commonpath(folders)
        return [
            (folder / path.name).relative_to(common).as_posix()
            for folder, path in zip(folders, self.files, strict=True)
        ]

    def count(self, split: str = "train") -> int:
        """Number of frames of a split."""
        return sum(int((found == SPLITS.index(split)).sum()) for found in self.splits)

    def __len__(self) -> int:
        """Number of training frames."""
        return self.count("train")

    def rows(self, number: int, split: str = "train") -> np.ndarray:
        """Rows of the frames of a split in a file."""
        return np.flatnonzero(self.splits[number] == SPLITS.index(split))

    def digest(self) -> str:
        """SHA-256 over sizes, splits and energies of all frames, in the order of the files."""
        return hashlib.sha256(b"".join(self._marks) + b"".join(s.tobytes() for s in self.splits)).hexdigest()

    def content(self) -> str:
        """SHA-256 over all numbers in the files, positions and every label included; it reads them once."""
        found = hashlib.sha256()
        for path in self.files:
            with _open(path) as file:
                for name in sorted(file):
                    if file[name].dtype.kind in "biuf":  # no text
                        values = file[name][:]
                        found.update(f"{name} {values.dtype} {values.shape}".encode())
                        found.update(np.ascontiguousarray(values).data)
        return found.hexdigest()

    def read(self, number: int, rows: Sequence[int] | np.ndarray | None = None) -> Frames:
        """Frames of a file in float64 positions, in the order of ``rows``; all of them by default.

        Raises: ValueError: NaN or infinite values; the message names file and frame.
        """
        path, atoms = self.files[number], self.num_atoms[number]
        chosen = np.arange(len(atoms)) if rows is None else np.asarray(rows)
        ends = np.cumsum(atoms)
        with _open(path) as file:
            atomic = {key: file[name][:] for key, (name, _) in _ATOMS.items() if name in file}
            single = {key: file[name][:] for key, (name, _) in _FRAMES.items() if name in file}
            kinds = file["config_type"].asstr()[:] if "config_type" in file else [str(file.attrs.get("kind", ""))]
            numbers = file["number"][:] if "number" in file else np.arange(len(atoms))
            sources, notes = (json.loads(file.attrs.get(name, "null")) for name in ("sources", "notes"))
        frames = []
        for row in chosen.tolist():
            part = slice(int(ends[row] - atoms[row]), int(ends[row]))
            one = {key: torch.from_numpy(values[part].copy()) for key, values in atomic.items()}
            one["z"], one["pos"] = one["z"].long(), one["pos"].double()
            for key, values in single.items():
                value = torch.from_numpy(values[row : row + 1].astype(np.float64))
                one[key] = value.bool() if key == "pbc" else value
            if not bool(one.get("pbc", torch.ones(1)).any()):
                del one["cell"], one["pbc"]
            missing = [key for key in LABEL_SHAPES if key in one and len(one["z"]) and bool(one[key].isnan().all())]
            frame = AtomicData(**{key: value for key, value in one.items() if key not in missing})
            check_frame(frame, f"frame {row} of {path.name}")
            frames.append(frame)
        if sources is None:
            sources = {key: (name,) for key, (name, _) in {**_ATOMS, **_FRAMES}.items()
                       if key in LABEL_SHAPES and (key in atomic or key in single)}  # fmt: skip
        states = {"charge", "charges", "spin"} & frozenset().union(*self.traits)
        return Frames(
            complete_states(frames, states), name=str(path), sources=sources, available={*atomic, *single},
            notes=notes or (), numbers=numbers[chosen].tolist(),
            kinds=[str(kinds[row if len(kinds) > 1 else 0]) for row in chosen],
        )  # fmt: skip

    def geometry(self, number: int, split: str = "train") -> AtomicData:
        """Elements, positions and cells of the frames of a split in a file as one batch, without checks and labels:
        ``z``, ``pos``, ``batch``, and ``cell`` and ``pbc`` if the file has them."""
        with _open(self.files[number]) as file:
            held = {name: file[name][:] for name in _GEOMETRY if name in file}
        frames = self.splits[number] == SPLITS.index(split)
        atoms = np.repeat(frames, self.num_atoms[number])
        found = AtomicData(
            z=torch.from_numpy(held["z"][atoms]).long(),
            pos=torch.from_numpy(held["pos"][atoms]).double(),
            batch=torch.from_numpy(np.repeat(np.arange(frames.sum()), self.num_atoms[number][frames])),
        )
        if "cell" in held and "pbc" in held:
            found.cell = torch.from_numpy(held["cell"][frames]).double()
            found.pbc = torch.from_numpy(held["pbc"][frames]).bool()
        return found

    def sample(self, split: str = "train", count: int | None = None, seed: int = 0) -> Frames:
        """Frames of a split, drawn at random from all files; of training frames also some of every element, label,
        charge and spin, isolated atoms, and periodic ones.

        The last sample of training frames is kept: the start of a run asks for it several times.

        Args:
            count: number of frames; None or more than there are: all.

        Raises: ValueError: no training frames, if they are asked for.
        """
        if split == "train":
            self.require()
        asked = split, count, seed, len(self)
        if self._drawn[0] != asked:
            drawn = self._draw(split, count, seed)
            if split != "train":
                return drawn
            self._drawn = asked, drawn
        return self._drawn[1][:]

    def _draw(self, split: str, count: int | None, seed: int) -> Frames:
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        rows = [self.rows(n, split) for n in range(len(self.files))]
        owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        place = np.concatenate(rows)
        chosen = np.arange(len(place))
        if count is not None and count < len(place):
            chosen = np.sort(rng.choice(len(place), count, replace=False))
        parts = [
            self._numbered(number, place[chosen[owner[chosen] == number]])
            for number in np.unique(owner[chosen]).tolist()
        ]
        if split == "train" and len(chosen) < len(place):
            parts += self._missing(parts)
        sources: dict[str, tuple[str, ...]] = {}
        for part in parts:
            for label, keys in part.sources.items():
                sources[label] = tuple(dict.fromkeys((*sources.get(label, ()), *keys)))
        return Frames(
            [frame for part in parts for frame in part], sources=sources,
            name=f"{len(self.files)} files in {self.files[0].parent}, {split}",
            notes=dict.fromkeys(note for part in parts for note in part.notes),
            numbers=[number for part in parts for number in part.numbers],
            kinds=[kind for part in parts for kind in part.kinds],
        )  # fmt: skip

    def _numbered(self, number: int, rows: Sequence[int] | np.ndarray) -> Frames:
        """Frames of a file, with numbers that no other file has."""
        found = self.read(number, rows)
        with _open(self.files[number]) as file:
            if "number" in file:
                return found
        before = sum(map(len, self.num_atoms[:number]))
        return found.replaced(found, numbers=[before + row for row in found.numbers])

    def _missing(self, parts: Sequence[Frames]) -> list[Frames]:
        """Training frames with traits that a sample lacks."""
        seen = set[Hashable]().union(*(_traits(frame) for part in parts for frame in part))
        found = []
        for number, traits in enumerate(self.traits):
            if traits <= seen:
                continue
            every = self._numbered(number, self.rows(number))
            more = every.select([place for place, f in enumerate(every) if not _traits(f) <= seen][:_MORE])
            found.append(more)
            seen.update(*map(_traits, more))
        return found

    def __repr__(self) -> str:
        known = symbols(sorted(trait for trait in frozenset().union(*self.traits) if isinstance(trait, int)))
        return f"UnitFiles({len(self.files)} files, {len(self)} training frames; {known})"


def are_units(files: Sequence[Path]) -> bool:
    """Whether files are read as units: whether one of them is an HDF5 file."""
    return any(path.suffix in SUFFIXES for path in files)


def unit_files(files: Sequence[Path]) -> list[Path]:
    """The HDF5 files among those of a folder, which also holds a manifest and unfinished files."""
    return [path for path in files if path.suffix in SUFFIXES]
