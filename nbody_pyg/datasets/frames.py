"""Frames: the list of systems that every reader returns, with a record of where its labels came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import VOIGT, AtomicData

# Labels that a reader looks for, with the shape of one system of N atoms ("N" stands for the number of
# atoms).
LABEL_SHAPES: Mapping[str, tuple[int | str, ...]] = {
    "energy": (1,),
    "forces": ("N", 3),
    "stress": (1, 3, 3),
    "dipole": (1, 3),
    "polarizability": (1, 3, 3),
    "charge": (1,),
    "charges": ("N",),
    "spin": (1,),
}
_FLOATS = (torch.float32, torch.float64)


class Frames(list[AtomicData]):
    """A list of AtomicData that remembers its file, the keys its labels were read from, and the keys it saw.

    Args:
        frames: the systems.
        name: file or data set they came from; used in tables and errors.
        sources: for each label the keys it was read from, such as ``{"energy": ("results['energy']",)}``.
        available: every key that stood in the file, for the hint in "label not found".
        notes: sentences about the labels that :func:`~nbody_pyg.datasets.label_audit` prints below its table.
        numbers: of the frames in their file; 0, 1, 2, ... by default.
        kinds: what sort of structure each frame is, by its entry ``config_type``; "" where it has none.

    A slice and :meth:`select` keep the record; other list operations give plain lists.
    """

    def __init__(
        self,
        frames: Iterable[AtomicData] = (),
        *,
        name: str = "",
        sources: Mapping[str, Sequence[str]] | None = None,
        available: Iterable[str] = (),
        notes: Iterable[str] = (),
        numbers: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        super().__init__(frames)
        self.name = name
        self.sources = {label: tuple(keys) for label, keys in (sources or {}).items()}
        self.available = tuple(sorted(set(available)))
        self.notes = tuple(notes)
        self.numbers = tuple(range(len(self)) if numbers is None else numbers)
        self.kinds = ("",) * len(self) if kinds is None else tuple(kinds)

    @overload
    def __getitem__(self, item: SupportsIndex) -> AtomicData: ...
    @overload
    def __getitem__(self, item: slice) -> Frames: ...
    def __getitem__(self, item: SupportsIndex | slice) -> AtomicData | Frames:
        if isinstance(item, slice):
            return self.replaced(super().__getitem__(item), self.numbers[item], self.kinds[item])
        return super().__getitem__(item)

    def select(self, indices: Iterable[SupportsIndex]) -> Frames:
        """The frames at ``indices``, in that order; negative or too large indices are an error."""
        chosen = chosen_rows(indices, len(self), self.name or "frames", "indices")
        return self.replaced(
            [list.__getitem__(self, i) for i in chosen],
            [self.numbers[i] for i in chosen],
            [self.kinds[i] for i in chosen],
        )

    def replaced(
        self, frames: Iterable[AtomicData], numbers: Sequence[int] | None = None, kinds: Sequence[str] | None = None
    ) -> Frames:
        """Other frames with this record, such as these after a transform."""
        return Frames(
            frames, name=self.name, sources=self.sources, available=self.available, notes=self.notes,
            numbers=self.numbers if numbers is None else numbers, kinds=self.kinds if kinds is None else kinds,
        )  # fmt: skip

    def __repr__(self) -> str:
        labels = ", ".join(sorted(self.sources)) or "no labels"
        return f"Frames({len(self)} from {self.name or 'memory'}; {labels})"


def chosen_rows(
    rows: Iterable[SupportsIndex] | slice | None, count: int, name: str, argument: str = "rows"
) -> list[int]:
    """Numbers of rows as a list; all ``count`` where none are named. Raises: ValueError: a row that is not there."""
    if rows is None or isinstance(rows, slice):
        return list(range(count))[rows or slice(None)]
    chosen = [int(row) for row in rows]
    if bad := [row for row in chosen if not 0 <= row < count]:
        raise ValueError(
            f"{argument} must lie in 0..{count - 1} ({name} holds {count} frames), got {bad[:5]}; check that they "
            "belong to this file"
        )
    return chosen


def numbers_of(frames: Sequence[Any]) -> Sequence[int]:
    """The number of each frame in its file; 0, 1, 2, ... for other lists."""
    if isinstance(frames, Frames) and len(frames.numbers) == len(frames):
        return frames.numbers
    return range(len(frames))


def kinds_of(frames: Sequence[Any]) -> Sequence[str]:
    """The ``config_type`` of each frame, "" where a file does not say it."""
    if isinstance(frames, Frames) and len(frames.kinds) == len(frames):
        return frames.kinds
    return ("",) * len(frames)


def listed(frames: Sequence[Any], places: Sequence[int], most: int = 20) -> str:
    """Frames in words: "frames 3, 5 and 9 of a.xyz" by their numbers in the file, the first ``most`` of them."""
    numbers = numbers_of(frames)
    words = [str(numbers[place]) for place in places]
    text = f"{', '.join(words[:most])}, ..." if len(words) > most else " and ".join([", ".join(words[:-1]), words[-1]])
    file = Path(frames.name).name if isinstance(frames, Frames) and frames.name else ""
    return f"frame{'s' if len(words) > 1 else ''} {text.removeprefix(' and ')}{f' of {file}' if file else ''}"


def has_label(frame: Data, label: str) -> bool:
    """Whether a frame knows a label: a tensor of which not all is NaN."""
    value = frame.get(label)
    return isinstance(value, Tensor) and not bool(value.isnan().all())


def shaped_label(
    value: Any, label: str, num_atoms: int, where: str, shape: Sequence[int | str] | None = None
) -> Tensor:
    """A label in the one shape that AtomicData gives it.

    Flat and squeezed forms of the same numbers are taken: an energy of shape [], [1] or [1, 1], forces of shape [3N]
    or [N, 3, 1], a stress of shape [3, 3], [9] or six numbers in Voigt order. A transposed or cut array is not.

    Raises: ValueError: another shape, or no numbers.
    """
    wanted = tuple(num_atoms if size == "N" else int(size) for size in shape or LABEL_SHAPES[label])
    if isinstance(value, Tensor) and tuple(value.shape) == wanted and value.dtype in _FLOATS:
        return value
    try:
        # A float32 or float64 label keeps its type; whole numbers and half precision are too coarse to subtract.
        value = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{where} must hold numbers for {label}, got {value!r}") from None
    value = value if value.dtype in _FLOATS else value.double()
    found = value
    if wanted[-2:] == (3, 3) and label != "forces" and value.numel() == 6 and value.squeeze().dim() == 1:
        value = value.reshape(6)[VOIGT]
    flat = value.squeeze().dim() <= 1
    squeezed = tuple(size for size in wanted if size != 1)
    if value.numel() != math.prod(wanted) or not (flat or tuple(value.squeeze().shape) == squeezed):
        raise ValueError(
            f"{where}: {label} must have shape {list(wanted)} for {num_atoms} atoms, got {list(found.shape)}; "
            f"check the key it was read from"
        )
    labels: Tensor = value.reshape(wanted)
    return labels


def check_frame(frame: AtomicData, where: str) -> None:
    """Raise ValueError unless the frame has atoms, finite positions and finite labels.

    A label that was not computed may be NaN as a whole, forces also atom by atom.
    """
    num_atoms = int(frame.z.shape[0])
    if num_atoms == 0:
        raise ValueError(f"{where} has no atoms; remove the frame from the file")
    if frame.pos.shape != (num_atoms, 3):
        raise ValueError(f"{where}: pos must have shape [{num_atoms}, 3], got {list(frame.pos.shape)}")
    if int(frame.z.min()) < 1 or int(frame.z.max()) > 118:
        raise ValueError(f"{where}: atomic numbers must lie in 1..118, got {sorted(set(frame.z.tolist()))}")
    _check_finite(frame.pos, "pos", where)
    for label in LABEL_SHAPES:
        if isinstance(value := frame.get(label), Tensor):
            _check_finite(value, label, where)


def _check_finite(value: Tensor, name: str, where: str) -> None:
    bad = ~torch.isfinite(value)
    if name == "forces":
        bad &= ~value.isnan().all(dim=1, keepdim=True)
    elif name != "pos":
        bad &= ~value.isnan().all()
    if not bool(bad.any()):
        return
    first = bad.nonzero()[0].tolist()
    place = f" of atom {first[0]}" if name in ("pos", "forces", "charges") else ""
    raise ValueError(
        f"{where}: {name}{place} is {float(value[tuple(first)])}; labels and positions must be finite: "
        f"remove the frame, or set the whole label to NaN where it was not computed"
    )
