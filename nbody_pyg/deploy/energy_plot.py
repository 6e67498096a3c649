"""Plot of the energy by parts: the molecule coloured by its parts, and one bar per level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nbody_pyg.deploy.energies import EnergyExplanation
from nbody_pyg.hierarchy.outline import outlines
from nbody_pyg.hierarchy.plot import Drawing, scale_bar
from nbody_pyg.required import required

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_INK, _BAR = "#2B2F36", "#1f5fa8"
_MOST_PARTS = 12


def plot_energy_parts(explanation: EnergyExplanation, level: int | None = None, title: str | None = None) -> Figure:
    """Draw interaction energies: red parts raise the energy, blue ones lower it.

    Args:
        explanation: from :func:`explain_energy`, or the difference of two.
        level: level whose parts are outlined, each including its descendants; None uses the finest level of a tree with
            2 to 12 parts above the atoms, and colours atoms where parts overlap.
        title: title of the figure.

    Returns: a matplotlib Figure that is not attached to a backend.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    level = _choose(explanation) if level is None else level
    values = (explanation.within(level) if level else explanation.on_atoms()).numpy()
    drawing = Drawing(explanation.frame, explanation.topology, list(explanation.names), None)
    limit = float(np.abs(values).max()) or 1.0
    colours = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    figure = Figure(figsize=(12.0, 5.0), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1.0))
    _draw_molecule(left, drawing, explanation, level, values, colours)
    name = explanation.names[level] if level else "atoms"
    figure.colorbar(colours, ax=left, shrink=0.7, label=f"interaction energy within {name} (eV)")
    _draw_levels(right, explanation)
    figure.suptitle(title or f"{drawing.formula(-1, 0)}: energy by {name}", fontsize=14, color=_INK)
    return figure


def _choose(explanation: EnergyExplanation) -> int:
    topology = explanation.topology
    for k in range(1, topology.num_levels - 1):
        child = required(topology.child_index[k])[0]
        if len(child.unique()) != len(child):
            return 0
        if 2 <= topology.size(k) <= _MOST_PARTS:
            return k
    return 0


def _draw_molecule(
    ax: Axes, drawing: Drawing, explanation: EnergyExplanation, level: int, values: np.ndarray, colours: ScalarMappable
) -> None:
    from matplotlib.patches import Polygon

    xy = drawing.xy
    taken = list(xy)
    for part, atoms in enumerate(drawing.members[level] if level else []):
        shapes = outlines(xy, atoms, drawing.bonds, 0.55)
        for outline in shapes:
            colour = colours.to_rgba(values[part])
            ax.add_patch(Polygon(outline, facecolor=colour, edgecolor=_INK, linewidth=0.8, alpha=0.9, zorder=1))
        at = x, y = _free_place(np.concatenate(shapes), xy[atoms].mean(axis=0), np.array(taken))
        taken.append(at)
        ax.text(x, y, f"{values[part]:+.2f}", ha="center", va="center", fontsize=10, color=_INK, zorder=20)
    for source, target in drawing.bonds.T:
        if source < target:
            ax.plot(*xy[[source, target]].T, color="#5B616B", linewidth=2.4, zorder=10, solid_capstyle="round")
    size = np.where(drawing.z == 1, 110.0, 240.0) * min(1.0, 14.0 / (4.0 + float(np.ptp(xy, axis=0).max()))) ** 2
    near = np.argsort(drawing.depth)
    fill = [drawing.element_colors[a] if level else colours.to_rgba(values[a]) for a in near]
    for place, atom in enumerate(near):  # one by one, so that atoms in front hide those behind
        order = 12 + drawing.depth[atom] - 1e-3
        x, y = xy[atom]
        ax.scatter(x, y, s=size[atom], color=[fill[place]], edgecolors=_INK, linewidths=0.9, zorder=order)
    if len(xy) <= 40:
        for atom, symbol in enumerate(drawing.symbols):
            x, y = xy[atom]
            ax.text(x, y, symbol, ha="center", va="center", fontsize=7, color=_INK, zorder=12 + drawing.depth[atom])
    scale_bar(ax, xy)


def _free_place(outline: np.ndarray, centre: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """A point just outside an outline, as far as can be from atoms and from other labels."""
    away = outline - centre
    points = outline + 0.45 * away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-6)
    room = np.linalg.norm(points[:, None] - taken[None], axis=-1).min(axis=1)
    # Among points with enough room, one nearby.
    best: np.ndarray = points[int(np.argmax(np.minimum(room, 1.3) - 0.05 * np.linalg.norm(away, axis=1)))]
    return best


def _draw_levels(ax: Axes, explanation: EnergyExplanation) -> None:
    """One bar per level, its parts as segments: those that raise the energy to the right, the others to the left."""
    rows = [(explanation.names[k], values.numpy()) for k, values in sorted(explanation.own.items())]
    rows.append(("repulsion", explanation.repulsion.numpy()))
    rows += [("own terms", explanation.terms.numpy())] if bool(explanation.terms.any()) else []
    for number, (_, values) in enumerate(rows):
        for sign in (1.0, -1.0):
            edge = 0.0
            for value in sorted(values[np.sign(values) == sign], key=abs, reverse=True)[:200]:
                ax.barh(number, value, left=edge, height=0.62, color=_BAR if sign < 0 else "#c4501b",
                        edgecolor="white", linewidth=0.5)  # fmt: skip
                edge += value
        ax.plot([values.sum()] * 2, [number - 0.42, number + 0.42], color=_INK, linewidth=2.2, zorder=5)
    low, high = ax.get_xlim()
    for number, (_, values) in enumerate(rows):
        ax.text(high + 0.03 * (high - low), number, f"{values.sum():+.3f} eV", va="center", fontsize=10, color=_INK)
    ax.set_yticks(range(len(rows)), [f"{name} ({len(values)})" for name, values in rows])
    ax.axvline(0.0, color=_INK, linewidth=0.8)
    ax.set_xlabel("energy of the parts of each level (eV); black: their sum")
    ax.spines[["top", "right"]].set_visible(False)
