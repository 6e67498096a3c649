"""Splits into training, validation and test: by seed, by index list, by file; never overlapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from nbody_pyg.atomic_write import write_text
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.arrays import load_arrays
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.messages import short


class FrameSplit(NamedTuple):
    """The frames of a split."""

    train: Frames
    val: Frames
    test: Frames


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Split:
    """Three lists of row indices.

    Args:
        train: rows for training: any sequence of integers, kept as int64 in its order.
        val: rows for validation.
        test: rows for the test.

    Raises:
        TypeError: an index is no integer.
        ValueError: a negative index, one that stands twice in a list, or one in two lists.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def __init__(
        self,
        train: Sequence[Any] | np.ndarray | Tensor,
        val: Sequence[Any] | np.ndarray | Tensor = (),
        test: Sequence[Any] | np.ndarray | Tensor = (),
    ) -> None:
        for name, rows in (("train", train), ("val", val), ("test", test)):
            object.__setattr__(self, name, _indices(rows, name))
        for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
            common = np.intersect1d(getattr(self, one), getattr(self, two))
            if common.size:
                raise ValueError(
                    f"{one} and {two} share {common.size} indices, for example {common[:5].tolist()}; "
                    f"a frame may stand in one list only"
                )

    def check(self, count: int) -> None:
        """Raise ValueError unless every index is a row of a data set of ``count`` frames."""
        for name in ("train", "val", "test"):
            rows = getattr(self, name)
            if rows.size and rows.max() >= count:
                raise ValueError(
                    f"{name} holds index {int(rows.max())}, but there are only {count} frames "
                    f"(0..{count - 1}); check that the split belongs to this data set"
                )

    def apply(self, frames: Sequence[AtomicData]) -> FrameSplit:
        """The frames of each list."""
        self.check(len(frames))
        source = frames if isinstance(frames, Frames) else Frames(frames)
        return FrameSplit(*(source.select(rows) for rows in (self.train, self.val, self.test)))

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that two runs on the same split share, whatever the order in a list."""
        digest = hashlib.sha256()
        for rows in (self.train, self.val, self.test):
            digest.update(len(rows).to_bytes(8, "little") + np.sort(rows).astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Write a JSON file that :func:`read_split` reads, whole or not at all."""
        lists = {name: getattr(self, name).tolist() for name in ("train", "val", "test")}
        write_text(path, json.dumps({"fingerprint": self.fingerprint, **lists}) + "\n")

    def __repr__(self) -> str:
        return f"Split({len(self.train)}/{len(self.val)}/{len(self.test)}, {self.fingerprint})"


def split_indices(
    n: int, train: int | float, val: int | float = 0, test: int | float | None = None, seed: int = 0
) -> Split:
    """A random split of ``n`` frames by seed: the same on every machine.

    Args:
        n: number of frames.
        train: how many (an integer) or which fraction (a float below 1) for training.
        val: the same for validation.
        test: the same for the test; ``None`` takes all that is left.
        seed: of numpy's PCG64 generator.

    Raises:
        ValueError: a negative number, no frame for training, or more than ``n`` frames in all.
    """
    sizes = [
        _size(value, n, name) for name, value in (("train", train), ("val", val), ("test", test)) if value is not None
    ]
    if sizes[0] == 0:
        raise ValueError(f"train must take at least one of the {n} frames, got {train!r}")
    if sum(sizes) > n:
        raise ValueError(f"train + val + test take {sum(sizes)} frames, but there are only {n}; ask for fewer")
    order = np.random.default_rng(seed).permutation(n)
    rest = n if test is None else sum(sizes)
    return Split(order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]], order[sizes[0] + sizes[1] : rest])


def read_split(path: str | Path, prefix: str = "") -> Split:
    """A split from a file.

    ``.json`` (as :meth:`Split.save` writes it) or ``.npz``, with the lists ``train``, ``val`` (or
    ``valid``) and ``test``; ``prefix`` is put before them, as in ``dimenet_train``, and ``idx_train``
    works too. A list that is not there is empty, except ``train``.

    Args:
        path: the file.
        prefix: what stands before the name of each list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, no list ``train``, or what :class:`Split` raises.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"split file {str(path)!r} does not exist")
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"split file must end in .json or .npz, got {path.name!r}; read plain lists by read_indices")
    lists = _lists(path)
    chosen = {}
    for name, words in (("train", ("train",)), ("val", ("val", "valid", "validation")), ("test", ("test",))):
        keys = [start + word for word in words for start in (prefix, "idx_" + prefix)]
        key = next((k for k in keys if k in lists), None)
        if key is None and name == "train":
            raise ValueError(f"{path.name} has no list {keys[0]!r}; there are: {', '.join(sorted(lists))}")
        chosen[name] = lists[key] if key is not None else []
    return Split(**chosen)


def _lists(path: Path) -> dict[str, Any]:
    """What a split file holds, by name."""
    try:
        if path.suffix == ".json":
            lists = json.loads(path.read_text(encoding="utf-8"))
        else:
            lists = load_arrays(path)
    except (ValueError, RecursionError) as error:  # also text that is no UTF-8
        raise ValueError(f"split file {path.name!r} is no {path.suffix[1:]} that can be read: {error}") from None
    if not isinstance(lists, dict):
        raise ValueError(
            f"split file {path.name!r} must hold the lists train, val and test by name, got {short(lists)}"
        )
    return lists


def read_indices(path: str | Path) -> np.ndarray:
    """A list of indices from a text file (one a line, as rMD17's own ``index_train_01.csv``) or a ``.npy``
    file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"index file {str(path)!r} does not exist")
    if path.suffix == ".npy":
        try:
            with path.open("rb") as file:
                rows = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"index file {path.name!r} is no npy that can be read: {error}") from None
        return _indices(rows, path.name)
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
        return _indices([int(word) for word in words], path.name)
    except ValueError as error:
        raise ValueError(f"index file {path.name!r} must hold one whole number a line: {error}") from None


def _indices(rows: Sequence[Any] | np.ndarray | Tensor, name: str) -> np.ndarray:
    try:
        array = np.asarray(rows)
    except ValueError:  # lists in it have several lengths
        raise TypeError(f"{name} must be a flat list of integers, got {short(rows)}") from None
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a flat list of integers, got {array.dtype} of shape {list(array.shape)}")
    array = array.astype(np.int64)
    if array.min() < 0:
        raise ValueError(f"{name} holds the negative index {int(array.min())}; indices count from 0")
    values, counts = np.unique(array, return_counts=True)
    if counts.max() > 1:
        twice = values[counts > 1]
        raise ValueError(f"{name} holds {twice.size} indices more than once, for example {twice[:5].tolist()}")
    return array


def _size(value: int | float, n: int, name: str) -> int:
    if isinstance(value, float) and 0 < value < 1:
        return round(value * n)
    if value < 0 or value != int(value):
        raise ValueError(f"{name} must be a number of frames, or a fraction below 1, got {value!r}")
    return int(value)
