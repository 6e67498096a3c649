"""Tables, and sentences that state where our network is better or worse."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbody_pyg.compare.errors import OF_POTENTIALS, Quantity, quantity
from nbody_pyg.compare.point import Point, deciding_error, validation_scores
from nbody_pyg.datasets.qm9 import TARGETS

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one contestant with the same settings, over seeds.

    ``note`` says what else is different where two rows would look the same.
    """

    name: str
    title: str
    records: tuple[Record, ...]
    note: str = ""

    @property
    def training(self) -> Mapping[str, Any]:
        training: Mapping[str, Any] = self.records[0]["point"]["training"]
        return training

    @property
    def label(self) -> str:
        """The model in words; a variant of ours also by its name."""
        words = f"{self.name}: {self.title}" if self.ours and self.name != "nbody" else self.title
        return f"{words} ({self.note})" if self.note else words

    @property
    def ours(self) -> bool:
        return bool(self.records[0]["point"]["model"] == "nbody")

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
    note: str = ""  # what is different from another group of this name

    @property
    def tests(self) -> list[str]:
        """Names of the test sets."""
        return list(dict.fromkeys(name for row in self.rows for record in row.records for name in record["test"]))

    @property
    def quantities(self) -> list[Quantity]:
        """What tables show errors of: energies and forces, or the property that is learned."""
        return [quantity(key) for key in (OF_POTENTIALS if self.error in OF_POTENTIALS else (self.error,))]

    @property
    def timed(self) -> str:
        """What the time of one molecule is the time of."""
        return "E+F" if self.error in OF_POTENTIALS else quantity(self.error).head

    @property
    def title(self) -> str:
        every = (record.get("frames") for row in self.rows for record in row.records)
        frames: Mapping[str, int] = next((found for found in every if found), {})
        counts = ", ".join([f"{count} {name}" for name, count in frames.items()] + ([self.note] if self.note else []))
        return f"{self.dataset}, {self.limit} of training{' CPU time' if self.limit.endswith(' s') else ''} ({counts})"


def load_records(folder: str | Path, note: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Every record in the folder of a comparison, failed runs included.

    Args:
        note: told of records that are damaged, which are left out.
    """
    found = []
    for path in sorted((Path(folder) / "points").rglob("*.json")):
        if path.name == "record.json" or (path.name == "failed.json" and not path.with_name("record.json").exists()):
            try:
                found.append(read_record(path))
            except ValueError as error:
                note(f"left out: {error}")
    return found


def read_record(path: Path) -> dict[str, Any]:
    """One record. Raises: ValueError: it is damaged."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Point(**record["point"])
        missing = {"status", "val", "test", "curve", "title"} - set(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if missing:
        raise ValueError(f"{path} is damaged (it lacks {', '.join(sorted(missing))})")
    return record


def groups(records: Iterable[Record]) -> list[Group]:
    """Final records by frames and limit; rows in the order of their error of the forces, best first.

    Where no forces are learned, in that of the energies or of the property. Runs that differ in anything but the seed
    are other rows.
    """
    found: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in records:
        point = Point(**record["point"])
        if point.purpose != "final":
            continue
        limit = point.limit if "steps" in point.limit else f"{point.training['budget_seconds']:g} s"
        frames = json.dumps(point.settings["data"], sort_keys=True, default=str)
        own = {"name": point.name, "model": point.model, **_settings(record)}
        key = json.dumps(own, sort_keys=True, default=str)
        found.setdefault((point.dataset, limit, frames), {}).setdefault(key, []).append(record)
    out = []
    for (dataset, limit, frames), rows in found.items():
        made = [Row(members[0]["point"]["name"], members[0]["title"], tuple(members)) for members in rows.values()]
        alike = [json.loads(key[2]) for key in found if key[:2] == (dataset, limit)]
        made = [
            dataclasses.replace(row, note=_difference(_settings(row.records[0]), [
                _settings(other.records[0]) for other in made if _looks(other) == _looks(row)
            ]))
            for row in made
        ]  # fmt: skip
        error = deciding_error(record for row in made for record in row.records)
        group = Group(dataset, limit, tuple(made), error, _difference(json.loads(frames), alike))
        ordered = sorted(made, key=lambda row: _order(row, group))
        out.append(dataclasses.replace(group, rows=tuple(ordered)))
    return out


def _settings(record: Record) -> dict[str, Any]:
    """What two runs of one row have in common, in one level."""
    point = record["point"]
    training = {f"training.{k}": v for k, v in point["training"].items() if k not in ("seed", "threads")}
    arguments = {f"model.{k}": v for k, v in (point.get("arguments") or {}).items()}
    return {**training, **arguments, "cutoff": point.get("cutoff")}


def _looks(row: Row) -> tuple[Any, ...]:
    t = row.training
    return row.name, row.title, t["optimizer"], t["lr"], t["batch_size"]


def _difference(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The settings that are not the same everywhere, in words."""
    keys = sorted({key for one in (own, *others) for key in one})
    varied = [key for key in keys if any(other.get(key) != own.get(key) for other in others)]
    return ", ".join(f"{key} {own.get(key)}" for key in varied)


def _order(row: Row, group: Group) -> float:
    value = row.mean("test", group.tests[0], group.error) if group.tests else None
    return math.inf if value is None else value


def failures(records: Iterable[Record]) -> list[str]:
    """One line for every run that failed, with the reason."""
    return [f"failed: {Point(**r['point'])}: {r['reason']}" for r in records if r["status"] == "failed"]


def comparison_rows(group: Group) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of a group."""
    sets = group.tests or [""]
    head = ["model", "optimizer", "lr", "batch", "parameters", "steps", "ms/step", f"{group.timed} ms", "memory MB"]
    for name in sets:
        suffix = "" if len(sets) == 1 else f" {name}"
        head += [f"{q.head} MAE{suffix} {q.unit}".rstrip() for q in group.quantities]
    rows = []
    for row in group.rows:
        t = row.training
        cells = [row.label, t["optimizer"], f"{t['lr']:g}", str(t["batch_size"])]
        cells += [_number(row.mean("parameters"), 0), _number(row.mean("steps"), 0), _number(_step(row), 1)]
        cells += [_number(_times(row.mean("latency", "median_s"), 1e3), 1)]
        cells += [_number(_times(row.mean("memory_bytes"), 1e-6), 0)]
        for name in sets:
            cells += [_error(row, name, q) for q in group.quantities]
        if all(record["status"] == "failed" for record in row.records):
            cells[9:] = ["failed"] * (len(group.quantities) * len(sets))
        rows.append(cells)
    return head, rows


def _error(row: Row, name: str, q: Quantity) -> str:
    return _spread([q.factor * value for value in row.values("test", name, q.key)], q.digits)


def target_rows(found: Sequence[Group]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and cells of one table over the targets of QM9 for the groups that differ in nothing else.

    A row is a model with its optimizer; a column is a target, with the mean absolute error on the first test set. There
    is no table where there is one target.
    """
    alike: dict[str, dict[str, Group]] = {}
    for group in found:
        settings = Point(**group.rows[0].records[0]["point"]).settings["data"]
        target = settings.get("qm9")
        if target in TARGETS and group.tests:
            rest = {"limit": group.limit, **{k: v for k, v in settings.items() if k != "qm9"}}
            alike.setdefault(json.dumps(rest, sort_keys=True, default=str), {})[target] = group
    out = []
    for members in alike.values():
        targets = [name for name in TARGETS if name in members]
        if len(targets) < 2:
            continue
        units = {name: quantity(members[name].error).unit for name in targets}
        lines: dict[tuple[str, str], list[str]] = {}
        for place, name in enumerate(targets):
            group = members[name]
            for row in group.rows:
                line = lines.setdefault((row.label, row.training["optimizer"]), ["-"] * len(targets))
                failed = all(record["status"] == "failed" for record in row.records)
                line[place] = "failed" if failed else _error(row, group.tests[0], quantity(group.error))
        head = ["model", "optimizer", *(f"{name} {units[name]}" for name in targets)]
        title = members[targets[0]].title.removeprefix(targets[0]).lstrip("-")
        out.append((f"QM9, MAE by target: {title}", head, [[*key, *line] for key, line in lines.items()]))
    return out


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
    for title, unit, path, factor, digits in _figures(group):
        my = _times(mine.mean(*path), factor)
        others = {row: value for row in peers if (value := _times(row.mean(*path), factor)) is not None}
        if my is None or not others:
            continue
        best = min(others, key=lambda row: others[row])
        ratio = my / others[best] if others[best] else math.inf
        word = "WINS" if ratio < 0.995 else "LOSES" if ratio > 1.005 else "equal"
        values = f"{my:.{digits}f} {unit} against {others[best]:.{digits}f} of {best.title}, {ratio:.2f} x"
        lines.append((word, f"{word:5}  {title}: {values}"))
    order = {"LOSES": 0, "equal": 1, "WINS": 2}
    return [line for _, line in sorted(lines, key=lambda pair: order[pair[0]])]


def _figures(group: Group) -> list[tuple[str, str, tuple[str, ...], float, int]]:
    """Title, unit, place in the records, factor into the unit, digits."""
    found = []
    for name in group.tests:
        suffix = "" if len(group.tests) == 1 else f" ({name})"
        found += [
            (f"{q.word} MAE{suffix}", q.unit, ("test", name, q.key), q.factor, q.digits)
            for q in reversed(group.quantities)
        ]
    return [
        *found,
        (f"{group.timed} of one molecule", "ms", ("latency", "median_s"), 1e3, 2),
        ("memory of a step", "MB", ("memory_bytes",), 1e-6, 2),
        ("parameters", "k", ("parameters",), 1e-3, 2),
    ]


def search_rows(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """The searches: one line for each molecule, model and optimizer, with the error at every learning rate.

    It is that of the forces; where none are learned that of the energies or of the property, which the line says.
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
        q = quantity(error)
        dataset = dataset if error == "forces_mae" else f"{dataset} ({', '.join(filter(None, (q.plural, q.unit)))})"
        rows.append([dataset, *words, *(_score(scores, lr, q) for lr in rates), f"{best:g}"])
    return ["frames", "model", "optimizer", "limit", *(f"{lr:g}" for lr in rates), "chosen"], rows


def _score(scores: Mapping[float, float], lr: float, q: Quantity) -> str:
    if lr not in scores:
        return "-"
    return q.text(scores[lr]) if math.isfinite(scores[lr]) else "failed"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
