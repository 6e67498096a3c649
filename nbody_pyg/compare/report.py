"""Tables, and in plain words where our network wins and where it loses."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbody_pyg.compare.point import Point, deciding_error, validation_scores

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one contestant with one optimizer, learning rate and batch size, over seeds."""

    name: str
    title: str
    records: tuple[Record, ...]

    @property
    def training(self) -> Mapping[str, Any]:
        return self.records[0]["point"]["training"]

    @property
    def label(self) -> str:
        """The model in words; a variant of ours also by its name."""
        return f"{self.name}: {self.title}" if self.ours and self.name != "nbody" else self.title

    @property
    def ours(self) -> bool:
        return self.records[0]["point"]["model"] == "nbody"

    def values(self, *path: str) -> list[float]:
        """A figure of every run that has it, e.g. ``values("test", "test", "forces_mae")``."""
        found = []
        for record in self.records:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None and math.isfinite(value):
                found.append(float(value))
        return found

    def mean(self, *path: str) -> float | None:
        """Mean over the seeds; None where no run has the figure."""
        found = self.values(*path)
        return statistics.mean(found) if found else None


@dataclass(frozen=True)
class Group:
    """What may be compared: runs on the same frames with the same limit."""

    dataset: str
    limit: str
    rows: tuple[Row, ...]
    error: str  # by which rows are ordered

    @property
    def tests(self) -> list[str]:
        """Names of the test sets."""
        return list(dict.fromkeys(name for row in self.rows for record in row.records for name in record["test"]))

    @property
    def title(self) -> str:
        frames = self.rows[0].records[0].get("frames", {})
        counts = ", ".join(f"{count} {name}" for name, count in frames.items())
        return f"{self.dataset}, {self.limit} of training{' CPU time' if self.limit.endswith('s') else ''} ({counts})"


def load_records(folder: str | Path) -> list[dict[str, Any]]:
    """Every record in the folder of a comparison."""
    paths = sorted((Path(folder) / "points").rglob("record.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def groups(records: Iterable[Record]) -> list[Group]:
    """Final records by frames and limit; rows in the order of their error of the forces, best first.

    Where no forces are learned, in that of the energies.
    """
    found: dict[tuple[str, str], dict[tuple, list[Record]]] = {}
    for record in records:
        point = Point(**record["point"])
        if point.purpose != "final":
            continue
        t = point.training
        key = (point.name, t["optimizer"], t["lr"], t["batch_size"], json.dumps(point.arguments, sort_keys=True))
        limit = point.limit if "steps" in point.limit else f"{t['budget_seconds']:g} s"
        found.setdefault((point.dataset, limit), {}).setdefault(key, []).append(record)
    out = []
    for (dataset, limit), rows in found.items():
        made = [Row(key[0], members[0]["title"], tuple(members)) for key, members in rows.items()]
        error = deciding_error(record for row in made for record in row.records)
        out.append(Group(dataset, limit, tuple(sorted(made, key=lambda row: _order(row, error))), error))
    return out


def _order(row: Row, error: str) -> float:
    tests = list(row.records[0]["test"])
    value = row.mean("test", tests[0], error) if tests else None
    return math.inf if value is None else value


def comparison_rows(group: Group) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of a group."""
    sets = group.tests
    head = ["model", "optimizer", "lr", "batch", "parameters", "steps", "ms/step", "E+F ms", "memory MB"]
    for name in sets:
        suffix = "" if len(sets) == 1 else f" {name}"
        head += [f"E MAE{suffix} meV", f"F MAE{suffix} meV/A"]
    rows = []
    for row in group.rows:
        t = row.training
        cells = [row.label, t["optimizer"], f"{t['lr']:g}", str(t["batch_size"])]
        cells += [_number(row.mean("parameters"), 0), _number(row.mean("steps"), 0), _number(_step(row), 1)]
        cells += [_number(_times(row.mean("latency", "median_s"), 1e3), 1)]
        cells += [_number(_times(row.mean("memory_bytes"), 1e-6), 0)]
        for name in sets:
            cells += [_spread(row.values("test", name, key), 2) for key in ("energy_mae", "forces_mae")]
        if all(record["status"] == "failed" for record in row.records):
            cells[-2:] = ["failed", "failed"]
        rows.append(cells)
    return head, rows


def _step(row: Row) -> float | None:
    steps, seconds = row.mean("steps"), row.mean("cpu_seconds")
    return None if not steps or seconds is None else 1000 * seconds / steps


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean, with the standard deviation over seeds where there are several."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def verdicts(group: Group) -> list[str]:
    """For every figure: our network beside the best peer, and which of them is better. Losses come first."""
    ours = [row for row in group.rows if row.ours]
    peers = [row for row in group.rows if not row.ours]
    if not ours or not peers:
        return []
    # Chosen as a user would, who has no test frames; of the peers, the best on the test counts.
    mine = min(ours, key=lambda row: row.mean("val", group.error) or math.inf)
    lines = []
    for title, unit, path, factor in _figures(group):
        my = _times(mine.mean(*path), factor)
        others = {row: value for row in peers if (value := _times(row.mean(*path), factor)) is not None}
        if my is None or not others:
            continue
        best = min(others, key=lambda row: others[row])
        ratio = my / others[best] if others[best] else math.inf
        word = "WINS" if ratio < 0.995 else "LOSES" if ratio > 1.005 else "equal"
        lines.append(
            (word, f"{word:5}  {title}: {my:.2f} {unit} against {others[best]:.2f} of {best.title}, {ratio:.2f} x")
        )
    order = {"LOSES": 0, "equal": 1, "WINS": 2}
    return [line for _, line in sorted(lines, key=lambda pair: order[pair[0]])]


def _figures(group: Group) -> list[tuple[str, str, tuple[str, ...], float]]:
    found = []
    for name in group.tests:
        suffix = "" if len(group.tests) == 1 else f" ({name})"
        found += [
            (f"force MAE{suffix}", "meV/A", ("test", name, "forces_mae"), 1.0),
            (f"energy MAE{suffix}", "meV", ("test", name, "energy_mae"), 1.0),
        ]
    return [
        *found,
        ("E+F of one molecule", "ms", ("latency", "median_s"), 1e3),
        ("memory of a step", "MB", ("memory_bytes",), 1e-6),
        ("parameters", "k", ("parameters",), 1e-3),
    ]


def search_rows(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """The searches: one line for each molecule, model and optimizer, with the error at every learning rate.

    It is that of the forces; where none are learned that of the energies, in meV, which the line says.
    """
    found: dict[tuple[str, ...], dict[float, Record]] = {}
    for record in records:
        point = Point(**record["point"])
        if point.purpose == "search":
            key = (point.dataset, point.title, point.training["optimizer"], point.limit)
            found.setdefault(key, {})[float(point.training["lr"])] = record
    rates = sorted({lr for tried in found.values() for lr in tried})
    rows = []
    for (dataset, *words), tried in sorted(found.items(), key=lambda pair: pair[0]):
        error, scores = validation_scores(tried)
        best = min(scores, key=lambda lr: scores[lr])
        dataset = f"{dataset} (energies, meV)" if error == "energy_mae" else dataset
        rows.append([dataset, *words, *(_score(scores, lr) for lr in rates), f"{best:g}"])
    return ["frames", "model", "optimizer", "limit", *(f"{lr:g}" for lr in rates), "chosen"], rows


def _score(scores: Mapping[float, float], lr: float) -> str:
    if lr not in scores:
        return "-"
    return f"{scores[lr]:.1f}" if math.isfinite(scores[lr]) else "failed"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first two columns to the left, figures to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(words: Sequence[str]) -> str:
        cells = [w.ljust(n) if i < 2 else w.rjust(n) for i, (w, n) in enumerate(zip(words, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), line(["-" * n for n in widths]), *(line(row) for row in rows)])
