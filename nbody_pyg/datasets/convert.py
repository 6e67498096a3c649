"""Write the frames of any files as units: HDF5 files that training reads a few at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from nbody_pyg.atomic_write import write_json
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.audit import LabelTable, fingerprint, label_audit, merged_audit, repeated
from nbody_pyg.datasets.convergence import is_converged
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.datasets.keys import KeySurvey, levels_apart, named_keys, stores_of
from nbody_pyg.datasets.readers import DEFAULT_KEYS, ChosenKeys, find_files, join_frames, read_frames, unconverged_note
from nbody_pyg.datasets.reference import is_isolated_atom
from nbody_pyg.datasets.splits import split_indices
from nbody_pyg.datasets.systems import iter_systems, named_units, read_metadata, title_of
from nbody_pyg.datasets.units import SPLITS, SUFFIXES, UnitFiles, write_unit
from nbody_pyg.units import Units

#: What is known of the files, and with which options they are converted.
MANIFEST = "convert.json"
_CHUNK = 500  # frames of a file in memory
_SAVE_EVERY = 10.0  # s
_VAL = 500  # frames for validation, at most a tenth


@dataclass(frozen=True)
class ConvertConfig:
    """How files are converted.

    Args:
        keys, units, file_format, drop_unconverged: see :func:`~nbody_pyg.datasets.read_frames`.
        num_val: frames of the training files that are drawn for validation; isolated atoms are not. None: 500, at most
            a tenth, or none where validation files are given.
        num_test: the same for tests.
        seed: of this draw.
        frames_per_file: frames of an HDF5 file.

    Raises: ValueError: an unknown label in ``keys``, an unknown unit, a negative number of frames.
    """

    keys: Mapping[str, str] | None = None
    units: str | None = None
    file_format: str | None = None
    drop_unconverged: bool = False
    num_val: int | None = None
    num_test: int = 0
    seed: int = 0
    frames_per_file: int = 1000

    def __post_init__(self) -> None:
        named_keys(self.keys)
        if self.units is not None:
            Units.parse(self.units)
        for name, least in (("num_val", 0), ("num_test", 0), ("frames_per_file", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass
class _Source:
    """One file after its survey; ``keys`` is None for files of arrays, which are read as a whole."""

    path: str
    size: int
    modified: int
    split: str
    frames: int = 0
    keys: dict[str, list[str]] | None = None
    found: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    single: list[int] = dataclasses.field(default_factory=list)
    unconverged: list[int] = dataclasses.field(default_factory=list)
    surveyed: bool = False


def convert(
    train: str | Path | Sequence[str | Path],
    folder: str | Path,
    config: ConvertConfig | None = None,
    *,
    val: str | Path | Sequence[str | Path] = (),
    test: str | Path | Sequence[str | Path] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> LabelTable:
    """Write the frames of files as units into a folder; returns the audit of their labels.

    The files are read twice, a part at a time: once to choose the keys of their labels, as
    :func:`~nbody_pyg.datasets.read_frames` does, and once to write. Files of arrays (npz) are held as a whole.
    Nothing is replaced: a conversion that was stopped goes on where it was, if files and options are the same.

    Args:
        train, val, test: files, folders and patterns, as ``data.train`` takes them.
        folder: of the units; new, empty, or of the same conversion.
        tell: takes lines about the progress.

    Raises: as :func:`~nbody_pyg.datasets.read_frames`; ValueError: a folder with other files, or of another conversion,
        more frames for validation and test than there are.
    """
    sets = {"train": train, "val": val, "test": test}
    conversion = _Conversion(Path(folder), config or ConvertConfig(), sets, tell)
    conversion.survey()
    conversion.write()
    return conversion.audit()


class _Conversion:
    def __init__(
        self, folder: Path, config: ConvertConfig, sets: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        self.folder, self.config, self.tell = folder, config, tell
        self.sources = [
            _Source(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, split)
            for split, paths in sets.items()
            for path in _files(paths)
        ]
        self.given = named_keys(config.keys)
        self.cursor: tuple[int, int, Iterator[Atoms]] | None = None  # file, its next frame, and the frames from there
        self.last_word = time.monotonic()
        self.finished = False
        self._open()

    def _open(self) -> None:
        """Take in what an earlier conversion knew, or refuse the folder."""
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(f"{self.folder} is there and not empty, nothing is replaced; name another with --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save()
            return
        try:
            stored = json.loads(manifest.read_text())
            sources = [_Source(**values) for values in stored["files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged ({error}); remove the folder and convert anew") from None
        same = [(s.path, s.size, s.modified, s.split) for s in sources] == [
            (s.path, s.size, s.modified, s.split) for s in self.sources
        ]
        changed = stored.get("options") != dataclasses.asdict(self.config) or not same
        if changed and not any(self.folder.glob("*.h5")):  # nothing was written, for example after an error
            self._save()
            return
        if changed:
            raise ValueError(
                f"{self.folder} holds a conversion of other files or with other options; name another folder with --out"
            )
        self.sources = sources
        for left in self.folder.glob(".*.tmp*"):  # of a process that was killed
            left.unlink(missing_ok=True)

    def _save(self) -> None:
        files = [dataclasses.asdict(source) for source in self.sources]
        options = dataclasses.asdict(self.config)
        write_json(self.folder / MANIFEST, {"finished": self.finished, "options": options, "files": files})

    # -- first reading ---------------------------------------------------------------------------------------------
    def survey(self) -> None:
        """Find out of each file its number of frames, the keys of its labels, and its isolated atoms."""
        saved = time.monotonic()
        for source in self.sources:
            if source.surveyed:
                continue
            arrays = source.path.endswith(".npz") and self.config.file_format is None
            self._survey_arrays(source) if arrays else self._survey_file(source)
            source.surveyed = True
            if time.monotonic() - saved > _SAVE_EVERY:
                self._save()
                saved = time.monotonic()
        if wrong := levels_apart({s.path: s.found for s in self.sources}):
            raise ValueError(wrong)
        self.ends = np.cumsum([source.frames for source in self.sources])
        self._save()

    def _survey_file(self, source: _Source) -> None:
        path = Path(source.path)
        units = self._units(path)
        survey = KeySurvey(DEFAULT_KEYS, self.given, units, title_of(path))
        systems = iter_systems(path, file_format=self.config.file_format)
        while chunk := list(itertools.islice(systems, _CHUNK)):
            for number, atoms in enumerate(chunk, source.frames):
                if not is_converged(atoms):
                    source.unconverged.append(number)
                if len(atoms) == 1:
                    one = AtomicData.from_ase(atoms, labels=False, where=f"frame {number} of {path.name}")
                    if "cell" in one:
                        one.cell = one.cell * units.length_factor
                    if is_isolated_atom(one):
                        source.single.append(number)
            survey.add(chunk, [stores_of(atoms) for atoms in chunk])
            source.frames += len(chunk)
            self._progress(f"{path.name}: {source.frames} frames looked at")
        if not source.frames:
            raise ValueError(f"path {source.path!r} holds no frame; give a file with at least one")
        keys, source.notes = survey.choose()
        source.keys = {label: list(names) for label, names in keys.items()}
        counted = {label: [key for key in names if survey.count(label, key)] for label, names in keys.items()}
        source.found = {label: names[:1] for label, names in counted.items() if names}

    def _survey_arrays(self, source: _Source) -> None:
        frames = self._arrays(source)
        source.frames = len(frames)
        source.found = {label: list(keys) for label, keys in frames.sources.items()}
        source.single = [number for number, frame in enumerate(frames) if is_isolated_atom(frame)]

    def _units(self, path: Path) -> Units:
        metadata = read_metadata(path, self.config.file_format)
        return Units.parse(self.config.units) if self.config.units else named_units(metadata, path.name)

    def _arrays(self, source: _Source) -> Frames:
        return read_frames(source.path, keys=self.given, units=self.config.units)

    # -- second reading --------------------------------------------------------------------------------------------
    def write(self) -> None:
        """Write the units that are not there."""
        splits, size, total = self._splits(), self.config.frames_per_file, int(self.ends[-1])
        for number, first in enumerate(range(0, total, size)):
            path = self.folder / f"unit_{number:05d}.h5"
            if path.exists():
                continue
            frames = self._part(first, min(first + size, total))
            write_unit(path, frames, splits[list(frames.numbers)].tolist())
            self._progress(f"{min(first + size, total)} of {total} frames written")
        self.finished = True
        self._save()

    def _splits(self) -> np.ndarray:
        """The split of every frame, by its number in :data:`SPLITS`."""
        config = self.config
        of_file = [SPLITS.index(source.split) for source in self.sources]
        splits = np.repeat(np.array(of_file, dtype=np.uint8), [source.frames for source in self.sources])
        free = splits == 0
        for source, end in zip(self.sources, self.ends, strict=True):
            left_out = source.single + (source.unconverged if config.drop_unconverged else [])
            free[end - source.frames + np.array(left_out, dtype=int)] = False
        rows = np.flatnonzero(free)
        num_val = config.num_val
        if num_val is None:
            num_val = 0 if 1 in of_file else min(_VAL, len(rows) // 10)
        if num_val + config.num_test > len(rows):
            raise ValueError(
                f"num_val and num_test must be at most the {len(rows)} training frames, got {num_val} and "
                f"{config.num_test}; draw fewer"
            )
        split = split_indices(len(rows), len(rows) - num_val - config.num_test, num_val, seed=config.seed)
        splits[rows[split.val]], splits[rows[split.test]] = 1, 2
        return splits

    def _part(self, first: int, end: int) -> Frames:
        """The frames from number ``first`` to ``end`` of all files together, with these numbers."""
        parts = []
        for place, (source, stop) in enumerate(zip(self.sources, self.ends.tolist(), strict=True)):
            start = stop - source.frames
            if start < end and first < stop:
                part = self._of_file(place, max(first, start) - start, min(end, stop) - start)
                parts.append(part.replaced(part, numbers=[start + number for number in part.numbers]))
        joined = join_frames(parts)
        return joined.replaced(joined, numbers=[number for part in parts for number in part.numbers])

    def _of_file(self, place: int, first: int, end: int) -> Frames:
        """Frames of one file."""
        source = self.sources[place]
        if source.keys is None:
            return self._arrays(source)[first:end]
        path = Path(source.path)
        if self.cursor is None or self.cursor[:2] != (place, first):
            chosen = slice(first or None, None)
            self.cursor = (place, first, iter_systems(path, chosen, self.config.file_format))
        systems = list(itertools.islice(self.cursor[2], end - first))
        self.cursor = (place, end, self.cursor[2])
        if len(systems) < end - first:
            raise ValueError(f"{source.path} must not change while it is converted: {end - first} frames are missing")
        keys = {label: tuple(names) for label, names in source.keys.items()}
        chosen_keys = ChosenKeys(keys, source.notes, self.given, self._units(path))
        stores = [stores_of(atoms) for atoms in systems]
        frames, odd = chosen_keys.frames(systems, path, stores, first, self.config.drop_unconverged)
        if odd:
            raise ValueError(odd[min(odd)])
        return frames

    # -- audit -----------------------------------------------------------------------------------------------------
    def audit(self) -> LabelTable:
        """The labels of all units, read back one by one."""
        units = UnitFiles(sorted(self.folder.glob("*.h5")))
        tables, marks = [], {split: list[tuple[int, int]]() for split in SPLITS}
        for number in range(len(units.files)):
            groups = {}
            for split in SPLITS:
                if len(rows := units.rows(number, split)):
                    groups[split] = units.read(number, rows)
                    groups[split].name = str(self.folder)
                    pairs = zip(groups[split], groups[split].numbers, strict=True)
                    marks[split] += [(fingerprint(frame), n) for frame, n in pairs if len(frame.z) > 1]
            tables.append(label_audit(groups, repeats=False))
            self._progress(f"{number + 1} of {len(units.files)} files checked")
        told = [
            unconverged_note(title_of(s.path), s.unconverged, self.config.drop_unconverged)
            for s in self.sources if s.unconverged
        ]  # fmt: skip
        return merged_audit(tables, [*told, *repeated(marks)])

    def _progress(self, text: str) -> None:
        """A line every few seconds."""
        if time.monotonic() - self.last_word > _SAVE_EVERY:
            self.tell(text)
            self.last_word = time.monotonic()


def require_finished(files: Sequence[Path]) -> None:
    """Raise ValueError if a conversion into the folder of one of these units was stopped."""
    for folder in dict.fromkeys(path.parent for path in files):
        manifest = folder / MANIFEST
        if manifest.is_file() and not json.loads(manifest.read_text()).get("finished"):
            raise ValueError(
                f"the conversion into {folder} was not finished; run nbody convert with the same arguments"
            )


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files to read."""
    found = find_files(paths) if paths else []
    for path in found:
        if not path.exists():
            raise FileNotFoundError(f"path {str(path)!r} does not exist; give the file with the frames")
        if path.suffix in SUFFIXES:
            raise ValueError(f"files to convert must not be HDF5, which training reads as they are, got {str(path)!r}")
    return found
