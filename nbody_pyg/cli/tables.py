"""Aligned tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbody_pyg.messages import aligned
from nbody_pyg.properties import Property


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text aligned left, of numbers right; two spaces between columns."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = {i for i in range(len(head)) if rows and all(_is_number(row[i]) for row in rows)}
    return aligned(head, cells, right)


def error_table(errors: Mapping[tuple[str, str], Mapping[str, float]], properties: Sequence[Property] = ()) -> str:
    """One row per (model, set): errors of energy, forces and stress (if any), or of properties."""
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
        start = "forces_mae_"
        elements = sorted({key for found in errors.values() for key in found if key.startswith(start)})
        columns += [(f"F MAE {key.removeprefix(start)}", key, "meV/A") for key in elements]
    head = ["model", "set", *(f"{title} {unit}".strip() for title, _, unit in columns)]
    rows = [[*name, *(found.get(key) for _, key, _ in columns)] for name, found in errors.items()]
    if properties:  # values may have any magnitude: five digits
        rows = [[value if isinstance(value, str) else _cell(value, ".5g") for value in row] for row in rows]
    if len({name for name, _ in errors}) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return table(head, rows)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any, form: str = ".2f") -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if isinstance(value, float) else str(value)
