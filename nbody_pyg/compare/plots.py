"""Learning curves and the trade of accuracy against speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.compare.errors import Quantity
from nbody_pyg.compare.report import Group, Row

_OURS = "#c4301b"
_COLOURS = (
    "#1f5fa8",
    "#2e8b57",
    "#7a4fa3",
    "#b8860b",
    "#4a9fb5",
    "#5b5b5b",
    "#d17fb0",
    "#7f9a2f",
    "#a0522d",
    "#20306e",
)
_MARKERS = "osD^vP*Xh<>"


def learning_curves(group: Group, path: str | Path) -> Figure:
    """Errors on the fixed frames of every run against CPU seconds, log-log.

    They are those of forces and energies (where there are any), or of the property.
    Where runs were limited by steps, the axis is still time. Of several seeds the curves are drawn thin.
    """
    name = group.tests[0] if group.tests else "val"
    found = {key for row in group.rows for r in row.records for point in r["curve"] for key in point.get(name, {})}
    every = group.quantities[::-1]
    shown = [q for q in every if q.key in found] or [q for q in every if q.key == group.error]
    figure = Figure(figsize=(1.0 + 5.25 * len(shown), 5.0), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, q in zip(panels, shown, strict=True):
        for row, (colour, marker, zorder) in styles(group).items():
            for number, record in enumerate(row.records):
                rows = [r for r in record["curve"] if q.key in r.get(name, {})]
                points = [(r["cpu_seconds"], q.factor * r[name][q.key]) for r in rows]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                axes.plot(
                    x, y, color=colour, marker=marker, ms=4, lw=2.4 if row.ours else 1.4, zorder=zorder,
                    label=row.label if number == 0 else None, alpha=1.0 if number == 0 else 0.5,
                )  # fmt: skip
        _logarithmic(axes, "training, CPU seconds", _words(q, f" on {name} frames"))
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(group.title, fontsize=11)
    save_figure(figure, Path(path), dpi=150)
    return figure


def pareto(group: Group, path: str | Path) -> Figure:
    """Error that orders the group against the time of one molecule; better is down and left."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    name = group.tests[0] if group.tests else None
    (q,) = (q for q in group.quantities if q.key == group.error)
    points: list[tuple[float, float]] = []
    for row, (colour, marker, zorder) in styles(group).items():
        time = row.mean("latency", "median_s")
        error = row.mean("test", name, group.error) if name else row.mean("val", group.error)
        if time is None or error is None:
            continue
        error *= q.factor
        points.append((1e3 * time, error))
        axes.plot(1e3 * time, error, marker, color=colour, ms=12 if row.ours else 8, zorder=zorder, label=row.label)
    if points:
        # The Pareto front: no other model is both faster and more accurate.
        best, front = np.inf, []
        for time, error in sorted(points):
            if error < best:
                best = error
                front.append((time, error))
        axes.step(*zip(*front, strict=True), where="post", color="0.6", lw=1.0, ls="--", zorder=0)
        axes.legend(frameon=False, fontsize=8.5)
    what = {"E+F": "energy and forces"}.get(group.timed, group.timed)
    _logarithmic(axes, f"{what} of one molecule, CPU ms", _words(q))
    axes.set_title(group.title, fontsize=10)
    save_figure(figure, Path(path), dpi=150)
    return figure


def _words(q: Quantity, where: str = "") -> str:
    return f"{q.word} MAE{where}, {q.unit.replace('meV/A', 'meV/Å')}".removesuffix(", ")


def styles(group: Group) -> dict[Row, tuple[str, str, int]]:
    """Colour, marker and depth of every row: ours red and in front; the same for both plots."""
    found, number = {}, 0
    alone = sum(row.ours for row in group.rows) == 1
    for row in group.rows:
        if row.ours and alone:
            found[row] = (_OURS, "o", 10)
            continue
        found[row] = (_COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], 3)
        number += 1
    return found


def _logarithmic(axes: Axes, x: str, y: str, span: float = 4.0) -> None:
    """Log-log with enough named ticks; each axis shows at least a factor of ``span``."""
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(True, which="both", color="0.92", lw=0.6)
    for axis, limit in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        low, high = axis.get_view_interval()
        if high / low < span:
            middle = np.sqrt(low * high)
            low, high = middle / np.sqrt(span), middle * np.sqrt(span)
            limit(low, high)
        # The closer the ends, the more numbers between the powers of ten are named.
        named = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 12 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axis.set_major_locator(FixedLocator([s * 10.0**k for k in range(-6, 9) for s in named]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
