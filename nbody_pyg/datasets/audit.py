"""Which labels are there: a table before every training, and an error when a target is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import LABEL_SHAPES, Frames, nearest

_UNITS = {
    "energy": "eV",
    "forces": "eV/A",
    "stress": "eV/A^3",
    "dipole": "e A",
    "polarizability": "",
    "charge": "e",
    "charges": "e",
    "spin": "2S+1",
}
# What a system has besides labels; other one-number entries of a frame count as labels of the user's own.
_NO_LABELS = {"z", "pos", "cell", "pbc", "ptr", "batch", "num_nodes", "idx", "y", "x", "bonds"}


@dataclass(frozen=True)
class LabelRow:
    """One label of one source of frames; ``minimum``, ``maximum``, ``mean`` and ``std`` run over all
    components."""

    source: str
    label: str
    keys: tuple[str, ...]
    found: int
    total: int
    minimum: float
    maximum: float
    mean: float
    std: float


@dataclass(frozen=True)
class LabelTable:
    """The result of :func:`label_audit`; ``print`` it. ``uses`` says of some labels what they are used for."""

    rows: tuple[LabelRow, ...]
    uses: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def count(self, label: str) -> tuple[int, int]:
        """Frames with this label, and all frames."""
        sources = {row.source: row.total for row in self.rows}
        return sum(row.found for row in self.rows if row.label == label), sum(sources.values())

    def __str__(self) -> str:
        head: tuple[str, ...] = ("source", "label", "read from", "frames", "min", "max", "mean", "std", "unit")
        body: list[tuple[str, ...]] = [
            (
                row.source,
                row.label,
                ", ".join(row.keys) or "-",
                f"{row.found}/{row.total}",
                *(f"{x:.4f}" if row.found else "-" for x in (row.minimum, row.maximum, row.mean, row.std)),
                _UNITS.get(row.label, ""),
            )
            for row in self.rows
        ]
        if self.uses:
            head = (*head, "use")
            body = [(*line, self.uses.get(row.label, "")) for line, row in zip(body, self.rows, strict=True)]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        right = range(3, 8)
        lines = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *body)
        ]
        return "\n".join(line.rstrip() for line in lines)


def label_audit(
    frames: Sequence[AtomicData] | Mapping[str, Sequence[AtomicData]], uses: Mapping[str, str] | None = None
) -> LabelTable:
    """Count the labels of frames, and give their range.

    Energy and forces are always listed, found or not; other labels where at least one frame has them.

    Args:
        frames: frames, or a mapping from a title (such as ``"train"``) to frames.
        uses: what labels are used for, for a column of their own.

    Example:
        >>> from nbody_pyg.datasets import embedded, label_audit
        >>> label_audit({"train": embedded("ethanol")}).count("forces")
        (1000, 1000)
    """
    groups = frames if isinstance(frames, Mapping) else {_title(frames): frames}
    rows = []
    for title, group in groups.items():
        labels = ["energy", "forces"]
        labels += [label for label in LABEL_SHAPES if label not in labels and any(label in f for f in group)]
        labels += _own_labels(group, labels)
        rows += [_row(title, label, group) for label in labels]
    return LabelTable(tuple(rows), dict(uses or {}))


def require_labels(
    frames: Sequence[AtomicData] | Mapping[str, Sequence[AtomicData]],
    labels: Sequence[str],
    *,
    partial: bool = False,
) -> None:
    """Raise unless every frame has every label in ``labels``.

    Args:
        frames: frames, or a mapping from a title to frames; each group is checked by itself.
        labels: names such as ``"energy"`` and ``"forces"``.
        partial: accept labels that only some of the frames have (a loss must then mask the others).

    Raises:
        ValueError: a label is in no frame (the message names the nearest key of the file), or in only
            some; or there is no frame.
    """
    groups = frames if isinstance(frames, Mapping) else {_title(frames): frames}
    for title, group in groups.items():
        if len(group) == 0:
            raise ValueError(f"{title} holds no frame; labels {list(labels)} cannot be there")
        for label in labels:
            missing = [i for i, frame in enumerate(group) if not isinstance(frame.get(label), Tensor)]
            if len(missing) == len(group):
                keys = group.available if isinstance(group, Frames) and group.available else set(group[0].keys())
                hint = nearest(label, set(keys) - {"numbers", "positions"})
                option = f"{label}_key" if label in LABEL_SHAPES else "the key"
                raise ValueError(
                    f"label {label!r} is in none of the {len(group)} frames of {title}; {hint}. "
                    f"Name its key with {option} when reading the file"
                )
            if missing and not partial:
                raise ValueError(
                    f"label {label!r} is in only {len(group) - len(missing)} of the {len(group)} frames of "
                    f"{title} (missing first in frame {missing[0]}); remove the others, or allow it with "
                    f"partial=True"
                )


def _title(frames: Sequence[AtomicData]) -> str:
    return (frames.name if isinstance(frames, Frames) else "") or "frames"


def _own_labels(group: Sequence[AtomicData], known: Sequence[str]) -> list[str]:
    names: dict[str, None] = {}
    for frame in group:
        for key, value in frame.to_dict().items():
            one = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
            if one and key not in known and key not in _NO_LABELS:
                names[key] = None
    return list(names)


def _row(title: str, label: str, group: Sequence[AtomicData]) -> LabelRow:
    values = [frame[label] for frame in group if isinstance(frame.get(label), Tensor)]
    keys = group.sources.get(label, ()) if isinstance(group, Frames) else ()
    if not values:
        nan = float("nan")
        return LabelRow(title, label, keys, 0, len(group), nan, nan, nan, nan)
    flat = torch.cat([value.reshape(-1).double() for value in values])
    return LabelRow(
        title,
        label,
        keys,
        len(values),
        len(group),
        float(flat.min()),
        float(flat.max()),
        float(flat.mean()),
        float(flat.std(correction=0)),
    )
