"""Frames in many HDF5 files (units), of which a few are in memory at a time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbody_pyg.data import AtomicData, elements_of
from nbody_pyg.datasets.frames import Frames, check_frame
from nbody_pyg.messages import symbols

#: Endings of such files.
SUFFIXES = (".h5", ".hdf5")
#: Splits by their number in the files; files without the dataset ``split`` are for training.
SPLITS = ("train", "val", "test")
#: Datasets of a unit with their number of axes; per atom those of "atoms", per frame the others.
_NEEDED: Mapping[str, int] = {"natoms": 1, "z": 1, "pos": 2, "energy": 1, "forces": 2}
_ATOMS = frozenset({"z", "pos", "forces"})
#: Training frames of a sample, from which E0, scale, labels and charges are taken.
SAMPLE = 2000
#: Frames that a sample gets more for an element that it lacks.
_MORE = 20


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An HDF5 file, for reading.

    Raises: ValueError: whatever the library raises about a damaged file; FileNotFoundError; ImportError: no h5py.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path} needs h5py: pip install 'nbody_pyg[hdf5]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is no readable HDF5 file, it is truncated or damaged; get a fresh copy") from error


class UnitFiles:
    r"""Frames in HDF5 files, read file by file.

    A file holds the frames one after the other, as ``datasets/make_pretraining.py`` writes them:

    ================  ==================  ====================================================================
    dataset           shape               meaning, unit
    ================  ==================  ====================================================================
    ``natoms``        (frames,)           number of atoms
    ``z``             (atoms,)            atomic numbers of all frames
    ``pos``           (atoms, 3)          angstrom
    ``energy``        (frames,)           eV, float64
    ``forces``        (atoms, 3)          eV/angstrom
    ``total_charge``  (frames,)           e (optional; neutral)
    ``dipole``        (frames, 3)         e angstrom (optional)
    ``split``         (frames,)           0 train, 1 val, 2 test (optional; all for training)
    ================  ==================  ====================================================================

    The attribute ``kind`` of a file (optional) is the ``config_type`` of its frames, by which errors are reported.

    Only the numbers of atoms, the splits and the elements of all files stay in memory: five bytes for each frame.

    Args:
        paths: the files, in this order; files without a frame are left out.
        num_train: number of training frames to use, the first ones; None: all.
        in_memory: files that training holds at once.

    Raises: ValueError: no files or no training frames, a file that is damaged or lacks a dataset, fewer training frames
        than ``num_train``; FileNotFoundError; ImportError: h5py is not installed.
    """

    def __init__(self, paths: Iterable[str | Path], num_train: int | None = None, in_memory: int = 8) -> None:
        if in_memory < 1:
            raise ValueError(f"in_memory must be at least 1, got {in_memory}; try 8")
        self.in_memory = in_memory
        self.files: list[Path] = []
        self.num_atoms: list[np.ndarray] = []
        self.splits: list[np.ndarray] = []
        self.elements: list[frozenset[int]] = []
        self._marks: list[bytes] = []
        self._drawn: tuple[Any, Frames] = None, Frames()
        for path in map(Path, paths):
            self._index(path)
        if not self.files:
            raise ValueError("paths must name at least one HDF5 file with frames, got none; name a folder of units")
        found = self.count("train")
        if found == 0 or (num_train is not None and found < num_train):
            raise ValueError(
                f"{len(self.files)} files from {self.files[0]} on must hold {num_train or 'some'} training frames, got "
                f"{found}; name more files"
            )
        if num_train is not None:
            self._keep(num_train)

    def _index(self, path: Path) -> None:
        with _open(path) as file:
            missing = [name for name, axes in _NEEDED.items() if name not in file or file[name].ndim != axes]
            if not missing:
                atoms = file["natoms"][:].astype(np.int32)
                split = file["split"][:].astype(np.uint8) if "split" in file else np.zeros(len(atoms), np.uint8)
                z, energy = file["z"][:], file["energy"][:]
                wrong = [n for n in ("z", "pos", "forces") if len(file[n]) != atoms.sum() or (atoms < 1).any()]
        if missing:
            raise ValueError(f"{path} must hold {missing[0]} with {_NEEDED[missing[0]]} axes; make it anew")
        if wrong or len(split) != len(atoms) or len(energy) != len(atoms) or (len(split) and split.max() > 2):
            raise ValueError(f"{path} is damaged: lengths of its datasets differ, or a split is above 2; make it anew")
        if len(atoms) == 0:
            return
        self.files.append(path)
        self.num_atoms.append(atoms)
        self.splits.append(split)
        self.elements.append(frozenset(np.unique(z).tolist()))
        self._marks.append(hashlib.sha256(atoms.tobytes() + split.tobytes() + energy.tobytes()).digest())

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
        if missing := sorted(set(names) - set(self.names)):
            raise ValueError(
                f"{len(missing)} files must be there for the run that goes on, from {missing[0]} on, but are not in "
                f"{self.files[0].parent}; bring them back, or start anew"
            )
        kept = [n for n, path in enumerate(self.files) if path.name in set(names)]
        out = object.__new__(UnitFiles)
        for name, values in vars(self).items():
            setattr(out, name, [values[n] for n in kept] if isinstance(values, list) else values)
        return out

    @property
    def names(self) -> list[str]:
        """Names of the files, without their folders."""
        return [path.name for path in self.files]

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

    def read(self, number: int, rows: Sequence[int] | np.ndarray | None = None) -> Frames:
        """Frames of a file in float64 positions, in the order of ``rows``; all of them by default.

        Raises: ValueError: NaN or infinite values; the message names file and frame.
        """
        path, atoms = self.files[number], self.num_atoms[number]
        chosen = np.arange(len(atoms)) if rows is None else np.asarray(rows)
        ends = np.cumsum(atoms)
        with _open(path) as file:
            names = [n for n in (*_NEEDED, "total_charge", "dipole") if n in file and n != "natoms"]
            data = {name: file[name][:] for name in names}
            kind = str(file.attrs.get("kind", ""))
        frames = []
        for row in chosen.tolist():
            part = slice(int(ends[row] - atoms[row]), int(ends[row]))
            one = {name: torch.from_numpy(data[name][part].copy()) for name in _ATOMS}
            one["z"], one["pos"] = one["z"].long(), one["pos"].double()
            one["energy"] = torch.tensor([float(data["energy"][row])], dtype=torch.float64)
            if "total_charge" in data:
                one["charge"] = torch.tensor([float(data["total_charge"][row])], dtype=torch.float64)
            if "dipole" in data:
                one["dipole"] = torch.from_numpy(data["dipole"][row : row + 1].astype(np.float64))
            frame = AtomicData(**one)
            check_frame(frame, f"frame {row} of {path.name}")
            frames.append(frame)
        labels = {"energy": ("energy",), "forces": ("forces",), **({"dipole": ("dipole",)} if "dipole" in data else {})}
        return Frames(
            frames, name=str(path), sources=labels, available=data, numbers=chosen.tolist(), kinds=[kind] * len(frames)
        )

    def sample(self, split: str = "train", count: int | None = None, seed: int = 0) -> Frames:
        """Frames of a split, drawn at random from all files; of training frames also some of every element.

        The last sample of training frames is kept: the start of a run asks for it several times.

        Args:
            count: number of frames; None or more than there are: all.
        """
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
        frames: list[AtomicData] = []
        kinds: list[str] = []
        for number in np.unique(owner[chosen]).tolist():
            found = self.read(number, place[chosen[owner[chosen] == number]])
            frames += found
            kinds += found.kinds
        if split == "train" and len(chosen) < len(place):
            more = self._missing(frames)
            frames += more
            kinds += [""] * len(more)
        named = f"{len(self.files)} files in {self.files[0].parent}, {split}"
        return Frames(frames, name=named, sources={"energy": ("energy",), "forces": ("forces",)}, kinds=kinds)

    def _missing(self, frames: Sequence[AtomicData]) -> list[AtomicData]:
        """Training frames with elements that a sample lacks."""
        seen, found = set(elements_of(frames)), list[AtomicData]()
        for number, elements in enumerate(self.elements):
            if elements <= seen:
                continue
            more = [f for f in self.read(number, self.rows(number)) if not seen.issuperset(f.z.tolist())][:_MORE]
            found += more
            seen.update(elements_of(more))
        return found

    def __repr__(self) -> str:
        known = symbols(sorted(frozenset().union(*self.elements)))
        return f"UnitFiles({len(self.files)} files, {len(self)} training frames; {known})"


def are_units(files: Sequence[Path]) -> bool:
    """Whether files are read as units: whether one of them is an HDF5 file."""
    return any(path.suffix in SUFFIXES for path in files)


def unit_files(files: Sequence[Path]) -> list[Path]:
    """The HDF5 files among those of a folder, which also holds a manifest and unfinished files."""
    return [path for path in files if path.suffix in SUFFIXES]
