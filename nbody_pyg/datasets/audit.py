"""Which labels are there: a table before every training, and an error when a target is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import LABEL_SHAPES, Frames, has_label, listed
from nbody_pyg.messages import aligned, nearest

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
# Notes of one kind that are printed.
_MOST_NOTES = 10
_LARGE, _UNUSUAL = {"forces": 50.0, "stress": 1.0}, 50.0
# What a model may take as input besides the structure.
_STATES = ("charge", "charges", "spin")
# Parts of names under which packages store a label.
_STEMS = {"energy": ("energ",), "forces": ("forc", "grad"), "stress": ("stress", "virial")}
# What a system has besides labels; other one-number entries of a frame count as labels of the user's own.
_NO_LABELS = {"z", "pos", "cell", "pbc", "ptr", "batch", "num_nodes", "idx", "y", "x", "bonds"}


@dataclass(frozen=True)
class LabelRow:
    """One label of one source of frames; ``minimum``, ``maximum``, ``mean`` and ``std`` run over all components, of
    which there are ``count``."""

    source: str
    label: str
    keys: tuple[str, ...]
    found: int
    total: int
    minimum: float
    maximum: float
    mean: float
    std: float
    count: int = 0


@dataclass(frozen=True)
class LabelTable:
    """The result of :func:`label_audit`; ``print`` it.

    ``uses`` says of some labels what they are used for; ``notes`` are printed below the rows.
    """

    rows: tuple[LabelRow, ...]
    uses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        table = aligned(head, body, range(3, 8), rule=False)
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])


def label_audit(
    frames: Sequence[AtomicData] | Mapping[str, Sequence[AtomicData]],
    uses: Mapping[str, str] | None = None,
    *,
    repeats: bool = True,
) -> LabelTable:
    """Count the labels of frames, and give their range.

    Energy and forces are always listed, found or not; other labels where at least one frame has them. A label that is
    NaN is not there. Notes below the table name frames without any label, keys that look like a label that was not
    found, keys whose values were not taken, energies that are all equal, and structures that stand in ``"train"`` and
    in another group as well.

    Args:
        frames: frames, or a mapping from a title (such as ``"train"``) to frames.
        uses: what labels are used for, for a column of their own.
        repeats: look for structures of ``"train"`` in other groups.

    Example:
        >>> from nbody_pyg.datasets import load_embedded, label_audit
        >>> label_audit({"train": load_embedded("ethanol")}).count("forces")
        (1000, 1000)
    """
    groups = frames if isinstance(frames, Mapping) else {_title(frames): frames}
    rows, notes = [], []
    for title, group in groups.items():
        labels = ["energy", "forces"]
        labels += [label for label in LABEL_SHAPES if label not in labels and any(label in f for f in group)]
        labels += _own_labels(group, labels)
        rows += [_row(title, label, group) for label in labels]
        bare = [
            i
            for i, frame in enumerate(group)
            if not any(has_label(frame, label) for label in labels if label not in _STATES)
        ]
        if bare and len(bare) < len(group):
            notes.append(f"{title}: no label in {listed(group, bare)} ({len(bare)} of {len(group)})")
        notes += _of_the_file(title, group)
    if repeats:
        # Atoms on their own are no structures to be tested on
        marks = {title: [(fingerprint(frame), place) for place, frame in enumerate(group) if len(frame.z) > 1]
                 for title, group in groups.items()}  # fmt: skip
        notes += repeated(marks, groups)
    return LabelTable(tuple(rows), dict(uses or {}), _shortened(notes))


def _shortened(notes: Sequence[str]) -> tuple[str, ...]:
    """Each note once, and of notes that say the same of many files the first ones."""
    kinds: dict[str, list[str]] = {}
    for note in dict.fromkeys(notes):
        kinds.setdefault(note.partition(": ")[2][:30] or note, []).append(note)
    out = []
    for found in kinds.values():
        out += found[:_MOST_NOTES]
        if len(found) > _MOST_NOTES:
            out.append(f"{len(found) - _MOST_NOTES} more notes like the last one")
    return tuple(out)


def merged_audit(tables: Sequence[LabelTable], notes: Sequence[str] = ()) -> LabelTable:
    """One table of the same groups, each of which was looked at part by part; ``notes`` stand before theirs."""
    totals: dict[str, int] = {}
    for table in tables:
        for source, total in {row.source: row.total for row in table.rows}.items():
            totals[source] = totals.get(source, 0) + total
    parts: dict[tuple[str, str], list[LabelRow]] = {}
    for row in sorted((row for table in tables for row in table.rows), key=lambda row: list(totals).index(row.source)):
        parts.setdefault((row.source, row.label), []).append(row)
    rows = []
    for (source, label), found in parts.items():
        keys = tuple(dict.fromkeys(key for row in found for key in row.keys))
        known, nan = [row for row in found if row.found], float("nan")
        count = sum(row.count for row in known)
        mean = sum(row.mean * row.count for row in known) / count if count else nan
        square = sum(row.count * (row.std**2 + (row.mean - mean) ** 2) for row in known)
        rows.append(LabelRow(
            source, label, keys, sum(row.found for row in known), totals[source],
            min((row.minimum for row in known), default=nan), max((row.maximum for row in known), default=nan),
            mean, (square / count) ** 0.5 if count else nan, count,
        ))  # fmt: skip
    return LabelTable(tuple(rows), {}, _shortened([*notes, *(note for table in tables for note in table.notes)]))


def outliers(frames: Sequence[AtomicData], label: str) -> list[int]:
    """Places of the frames whose largest component of the forces or the stress is far beyond the usual size.

    That is 50 eV/angstrom (1 eV/angstrom^3) and 50 times the median over the frames of their root mean square. Where
    all frames are so large there is no outlier.
    """
    known = {i: frame[label].detach().double() for i, frame in enumerate(frames) if has_label(frame, label)}
    if not known:
        return []
    values = [value[~value.isnan()] for value in known.values()]
    largest = torch.stack([value.abs().max() for value in values])
    sizes = torch.stack([value.square().mean().sqrt() for value in values])
    usual = sizes[sizes > 0].median() if bool((sizes > 0).any()) else sizes.new_zeros(())
    far = largest > torch.clamp(_UNUSUAL * usual, min=_LARGE[label])
    return [] if bool(far.all()) else [place for place, one in zip(known, far.tolist(), strict=True) if one]


def _of_the_file(title: str, group: Sequence[AtomicData]) -> list[str]:
    """Outliers, energies that are all equal, notes of the reader, and keys that look like labels not found."""
    found = {label: outliers(group, label) for label in _LARGE}
    notes = []
    for label, odd in found.items():
        if odd:
            largest = max(float(group[i][label].abs().nan_to_num(nan=0.0).max()) for i in odd)
            notes.append(
                f"{title}: {label} up to {largest:.4g} {_UNITS[label]} in {listed(group, odd)} ({len(odd)} of "
                f"{len(group)}), far beyond the others"
            )
    if (constant := _constant_energy(group)) is not None:
        notes.append(
            f"{title}: every energy is {constant:.6g} eV while the forces differ, so they may be placeholders; name "
            "others with energy_key, or remove them from the file"
        )
    if not isinstance(group, Frames):
        return notes
    notes += group.notes
    for label in ("energy", "forces"):
        if not any(has_label(frame, label) for frame in group):
            keys = [key for key in group.available if any(stem in key.lower() for stem in _STEMS[label])]
            if keys:
                words = ", ".join(map(repr, keys))
                notes.append(f"{title}: no {label}, but the file holds {words}; name one with {label}_key")
    return notes


def _constant_energy(group: Sequence[AtomicData]) -> float | None:
    """The one energy of all frames that have it, where their forces are not those of one structure, turned or not."""
    both = [frame for frame in group if has_label(frame, "energy") and has_label(frame, "forces")]
    energies = {float(frame.energy) for frame in group if has_label(frame, "energy")}
    if len(both) < 2 or len(energies) > 1:
        return None
    sizes = torch.tensor([float(frame.forces.norm()) for frame in both], dtype=torch.float64)
    return None if torch.allclose(sizes, sizes[:1], rtol=1e-6, atol=1e-6) else energies.pop()


def repeated(
    marks: Mapping[str, Sequence[tuple[int, int]]], groups: Mapping[str, Sequence[AtomicData]] | None = None
) -> list[str]:
    """Notes about structures of the training set that stand in another group.

    Args:
        marks: title of each group -> :func:`fingerprint` and number of its structures.
        groups: the frames, which name the files of the example; the numbers are then places in them.
    """
    known: dict[int, int] = {}
    for mark, number in marks.get("train", ()):
        known.setdefault(mark, number)
    notes = []
    for title, found in marks.items():
        both = [(i, known[mark]) for mark, i in found if mark in known] if title != "train" else []
        if both:
            one, other = both[0]
            if groups is None:
                example, total = f"frame {one} as frame {other}", len(found)
            else:
                total = len(groups[title])
                example = f"{listed(groups[title], [one])} as {listed(groups['train'], [other])}"
            notes.append(
                f"{len(both)} of the {total} structures of {title} stand in train too, for example {example}; errors "
                "on them are errors of training"
            )
    return notes


def fingerprint(frame: AtomicData) -> int:
    """A number that equal structures share: elements, positions to 1e-4 angstrom, and the cell."""
    cell = frame.get("cell")
    parts = [frame.pos] if cell is None else [frame.pos, cell]
    whole = [(part.detach().double() * 1e4).round().long().cpu().numpy().tobytes() for part in parts]
    return hash((frame.z.cpu().numpy().astype("int64").tobytes(), *whole))


def require_labels(
    frames: Sequence[AtomicData] | Mapping[str, Sequence[AtomicData]],
    labels: Sequence[str],
    *,
    partial: bool = False,
) -> None:
    """Raise unless every frame has every label in ``labels``; one that is NaN is not there.

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
            missing = [i for i, frame in enumerate(group) if not has_label(frame, label)]
            if len(missing) == len(group):
                keys = group.available if isinstance(group, Frames) and group.available else set(group[0].keys())
                hint = nearest(label, sorted(set(keys) - {"numbers", "positions", "z", "pos", label}))
                if any(label in frame for frame in group):
                    hint = f"where it stands, it is NaN; {hint}"
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
    values = [frame[label] for frame in group if has_label(frame, label)]
    keys = group.sources.get(label, ()) if isinstance(group, Frames) else ()
    if not values:
        nan = float("nan")
        return LabelRow(title, label, keys, 0, len(group), nan, nan, nan, nan)
    flat = torch.cat([value.detach().reshape(-1).double().cpu() for value in values])
    flat = flat[~flat.isnan()]
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
        len(flat),
    )
