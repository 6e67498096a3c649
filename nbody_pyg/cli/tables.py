"""Plain, aligned tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbody_pyg.messages import aligned
from nbody_pyg.properties import Property


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of words to the left, of numbers to the right; two spaces between."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = {i for i in range(len(head)) if rows and all(_is_number(row[i]) for row in rows)}
    return aligned(head, cells, right)


def error_table(errors: Mapping[tuple[str, str], Mapping[str, float]], properties: Sequence[Property] = ()) -> str:
    """One row per (model, set): errors of energy, forces and, where there is one, stress; or of properties."""
    if properties:
        return _property_table(errors, properties)
    head = ["model", "set", "E MAE", "E RMSE", "E/atom MAE", "E/atom RMSE", "F MAE", "F RMSE"]
    keys = [
        "energy_mae",
        "energy_rmse",
        "energy_per_atom_mae",
        "energy_per_atom_rmse",
        "forces_mae",
        "forces_rmse",
    ]
    units = ["", "", "meV", "meV", "meV", "meV", "meV/A", "meV/A"]
    if any("stress_mae" in found for found in errors.values()):
        head, keys = [*head, "S MAE", "S RMSE"], [*keys, "stress_mae", "stress_rmse"]
        units += ["meV/A^3", "meV/A^3"]
    elements = sorted({key for found in errors.values() for key in found if key.startswith("forces_mae_")})
    head += [f"F MAE {key.removeprefix('forces_mae_')}" for key in elements]
    units += ["meV/A"] * len(elements)
    head = [f"{name} {unit}".strip() for name, unit in zip(head, units, strict=True)]
    rows = [[*name, *(found.get(key) for key in [*keys, *elements])] for name, found in errors.items()]
    if len({name for name, _ in errors}) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return table(head, rows)


def _property_table(errors: Mapping[tuple[str, str], Mapping[str, float]], properties: Sequence[Property]) -> str:
    columns = [(p, kind) for p in properties for kind in ("mae", "rmse", "r2")]
    head = [
        "model",
        "set",
        *(f"{p.name} {kind.upper()} {'' if kind == 'r2' else p.unit}".strip() for p, kind in columns),
    ]
    rows = []
    for name, found in errors.items():
        values = [found.get(f"{p.name}_{kind}") for p, kind in columns]
        rows.append([*name, *("-" if value is None else f"{value:.5g}" for value in values)])
    if len({name for name, _ in errors}) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return table(head, rows)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
