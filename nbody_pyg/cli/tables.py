"""Aligned tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch_geometric.data import Data

from nbody_pyg.messages import aligned
from nbody_pyg.properties import Property
from nbody_pyg.training.evaluation import Evaluation
from nbody_pyg.training.report import FrameError, errors_by_kind, frame_errors, shear_order


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text aligned left, of numbers right; two spaces between columns."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = {i for i in range(len(head)) if rows and all(_is_number(row[i]) for row in rows)}
    return aligned(head, cells, right)


def error_table(
    errors: Mapping[tuple[str, str], Mapping[str, float]],
    properties: Sequence[Property] = (),
    names: tuple[str, str] = ("model", "set"),
) -> str:
    """Errors of energy, forces and stress (if any), or of properties; a row per (model, set) or pair of ``names``."""
    if properties:
        columns = [(f"{p.name} {kind.upper()}", f"{p.name}_{kind}", "" if kind == "r2" else p.unit)
                   for p in properties for kind in ("mae", "rmse", "r2")]  # fmt: skip
    else:
        labels = [("E", "energy", "meV"), ("E/atom", "energy_per_atom", "meV"), ("F", "forces", "meV/A")]
        if any("stress_mae" in found for found in errors.values()):
            labels.append(("S", "stress", "meV/A^3"))
        columns = [(f"{word} {kind.upper()}", f"{label}_{kind}", unit)
                   for word, label, unit in labels for kind in ("mae", "rmse")]  # fmt: skip
        if any("forces_percent" in found for found in errors.values()):
            columns.insert(6, ("F RMSE", "forces_percent", "%"))
    head = [*names, *(f"{title} {unit}".strip() for title, _, unit in columns)]
    rows = [[*name, *(found.get(key) for _, key, _ in columns)] for name, found in errors.items()]
    if properties:  # values may have any magnitude: five digits
        rows = [[value if isinstance(value, str) else _cell(value, ".5g") for value in row] for row in rows]
    if len({name for name, _ in errors}) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return table(head, rows)


def element_table(errors: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """Errors of the forces on the atoms of each element, a row per (model, set, element); "" with one element only."""
    start = "forces_mae_"
    elements = sorted({key.removeprefix(start) for found in errors.values() for key in found if key.startswith(start)})
    if len(elements) < 2:
        return ""
    head = ["model", "set", "element", "F MAE meV/A", "F RMSE meV/A"]
    rows = [
        [*name, symbol, found[f"{start}{symbol}"], found.get(f"forces_rmse_{symbol}")]
        for name, found in errors.items()
        for symbol in elements
        if f"{start}{symbol}" in found
    ]
    if len({name for name, _ in errors}) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return table(head, rows)


def largest_table(worst: Mapping[str, Sequence[FrameError]]) -> str:
    """The frames with the largest errors, a row each, by set."""
    head = ["set", "frame", "config_type", "F RMSE meV/A", "F largest", "on atom", "E/atom meV"]
    rows = [
        [name, one.number, one.kind or "-", one.forces_rmse, one.forces_max, one.atom, one.energy_per_atom]
        for name, found in worst.items()
        for one in found
    ]
    if not any(one.kind for found in worst.values() for one in found):
        head, rows = [*head[:2], *head[3:]], [[*row[:2], *row[3:]] for row in rows]
    return table(head, rows)


def report(results: Mapping[str, tuple[Sequence[Data], Evaluation]], most: int = 5) -> str:
    """Errors by ``config_type`` and the frames with the largest errors, for the labelled sets of one model."""
    parts = []
    kinds = {name: errors_by_kind(frames, found) for name, (frames, found) in results.items()}
    if any(kinds.values()):
        rows = {(name, kind or "-"): errors for name, found in kinds.items() for kind, errors in found.items()}
        parts.append(error_table(rows, names=("set", "config_type")))
    worst = {name: frame_errors(frames, found)[:most] for name, (frames, found) in results.items()}
    if any(worst.values()):
        parts.append(f"largest errors\n{largest_table(worst)}")
    orders = {name: shear_order(frames, found) for name, (frames, found) in results.items()}
    parts += [f"note: {name}: {text}" for name, text in orders.items() if text]
    return "\n\n".join(parts)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any, form: str = ".2f") -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if isinstance(value, float) else str(value)
