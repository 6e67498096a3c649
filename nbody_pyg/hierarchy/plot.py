"""A picture of a hierarchy: the molecule with its clusters, and the DAG with levels as rows."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy.bondgraph import covalent_bonds
from nbody_pyg.hierarchy.outline import outlines
from nbody_pyg.hierarchy.positions import atomic_masses
from nbody_pyg.hierarchy.scheme import Scheme
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.required import required
from nbody_pyg.system import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct also for colour-blind readers; in the order in which parts take them.
_PALETTE = ["#0077BB", "#EE7733", "#009988", "#AA3377", "#CCAA22", "#33BBEE", "#CC3311", "#66AA55", "#775599"]
_NEUTRAL = "#8A8F98"
_INK = "#2B2F36"


class Drawing:
    """Data of both panels: projected atoms, parts, and one colour for each part of each level."""

    def __init__(self, data: AtomicData, topology: Topology, names: list[str], focus: int | None) -> None:
        from ase.data import chemical_symbols
        from ase.data.colors import jmol_colors

        self.topology, self.names, self.num_levels = topology, names, topology.num_levels
        self.z = data.z.cpu().numpy()
        self.symbols = [chemical_symbols[z] for z in self.z]
        self.element_colors = [tuple(jmol_colors[z]) for z in self.z]
        self.xy, self.depth = _project(_whole(data, topology), atomic_masses(data.z).cpu())
        self.members = [self._atoms_of_parts(k) for k in range(self.num_levels)]
        bonds = topology.bonds
        if bonds is None:
            bonds = covalent_bonds(System.from_data(data).detached())
        # Bonds that leave through a face of the cell would cross the whole picture
        ends = self.xy[bonds.cpu().numpy()]
        self.bonds = bonds.cpu().numpy()[:, np.linalg.norm(ends[0] - ends[1], axis=-1) < 3.0]
        self.overlapping = any(sum(map(len, self.members[k])) > len(self.z) for k in range(1, self.num_levels))
        # Many overlapping parts together would be unreadable, so one is drawn as an example
        inner = [topology.size(k) for k in range(1, self.num_levels - 1)]
        self.dense = self.overlapping and max(inner, default=0) > len(_PALETTE)
        self.focus = self._choose_focus() if focus is None else focus
        if not 0 <= self.focus < max(inner, default=1):
            raise ValueError(f"focus must be a part from 0 to {max(inner) - 1}, got {focus}")
        self.colors = self._color_parts()

    def _atoms_of_parts(self, level: int) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(self.topology.size(level))]
        for atom, part in self.topology.parts(level).t().tolist():
            parts[part].append(atom)
        return parts

    def _choose_focus(self) -> int:
        """The part below the root that is nearest to the centre of the picture."""
        centres = np.array([self.xy[atoms].mean(axis=0) for atoms in self.members[-2]])
        if len(centres) == len(self.xy):
            centres = self.xy
        return int(np.argmin(np.linalg.norm(centres, axis=1)))

    def _color_parts(self) -> list[list[str]]:
        """Parts below the chosen level take the hue of their parent, parts above are neutral."""
        sizes = [self.topology.size(k) for k in range(self.num_levels)]
        colors = [[_NEUTRAL] * size for size in sizes]
        if self.dense:
            for k in range(1, self.num_levels - 1):
                colors[k] = [_PALETTE[(k - 1) % len(_PALETTE)]] * sizes[k]
            return colors
        fits = [k for k in range(1, self.num_levels - 1) if 1 < sizes[k] <= len(_PALETTE)]
        base = max(fits, key=lambda k: sizes[k]) if fits else 1
        colors[base] = [_PALETTE[i % len(_PALETTE)] for i in range(sizes[base])]
        for k in range(base, 1, -1):
            child, parent = required(self.topology.child_index[k]).tolist()
            seen: dict[int, int] = {}
            for c, p in zip(child, parent, strict=True):
                seen[p] = seen.get(p, -1) + 1
                colors[k - 1][c] = _shade(colors[k][p], seen[p])
        return colors

    def formula(self, level: int, part: int) -> str:
        """Formula with subscripts, as mathtext: carbon and hydrogen first; OH, NH2 without carbon."""
        symbols = [self.symbols[a] for a in self.members[level][part]]
        counts = {symbol: symbols.count(symbol) for symbol in sorted(symbols)}
        first = ["C", "H"] if "C" in counts or counts == {"H": 2, "O": 1} else []
        order = sorted(counts, key=lambda s: (first.index(s) if s in first else 2 + (s == "H"), s))
        return "".join(s if counts[s] == 1 else f"{s}$_{{{counts[s]}}}$" for s in order)


def _whole(data: AtomicData, topology: Topology) -> Tensor:
    """Positions with the parts of a cell unwrapped."""
    pos: Tensor = data.pos.detach().cpu().double()
    shift, atom = topology.part_shift(-2), topology.parts(-2)[0]
    if shift is None or atom.shape[0] != pos.shape[0]:
        return pos
    return pos.index_add(0, atom, shift.double() @ data.cell[0].detach().cpu().double())


def _project(pos: Tensor, mass: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the two longest principal axes, and the depth along the third."""
    centred = (pos - (mass[:, None] * pos).sum(0) / mass.sum()).numpy()
    axes = np.linalg.svd(centred, full_matrices=True)[2] if len(centred) > 1 else np.eye(3)
    turned = centred @ axes.T
    return turned[:, :2], turned[:, 2]


def _shade(color: str, step: int) -> str:
    """The same hue, a little lighter or darker from one child to the next."""
    from matplotlib.colors import to_hex, to_rgb

    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    return to_hex(colorsys.hls_to_rgb(hue, min(0.82, light * (1.0 + 0.22 * (step % 3))), saturation))


def plot_hierarchy(
    data: Data | tuple[Tensor, Tensor],
    scheme: Scheme | None = None,
    *,
    focus: int | None = None,
    title: str | None = None,
    figsize: tuple[float, float] = (13.0, 5.6),
) -> Figure:
    """Draw one molecule with its clusters (left) and its DAG, levels as rows (right).

    A part has the same colour in both panels. If many parts overlap (NestedShells), one of them is drawn with its
    descendants, on top of the whole DAG in grey, because all together would be unreadable.

    Args:
        data: one graph with ``z`` and ``pos``, or the pair (z, pos).
        scheme: the composition scheme; None reads the hierarchy stored on ``data``.
        focus: the part to draw where many overlap; None takes one near the middle.
        title: title of the figure; None writes the formula and the scheme.
        figsize: width and height, inches.

    Returns:
        A matplotlib Figure that is not attached to a backend: ``figure.savefig("hierarchy.png", dpi=200)``.

    Raises:
        ValueError: more than one graph, neither a scheme nor a stored hierarchy, or no such part to focus on.
    """
    from matplotlib.figure import Figure

    frame = data if isinstance(data, Data) else AtomicData(z=data[0], pos=data[1])
    if frame.get("batch") is not None and int(frame.batch.max()) > 0:
        raise ValueError("data must be a single graph, got a batch; pass batch.get_example(i)")
    frame = AtomicData.from_data(frame) if scheme is None else scheme(frame)
    topology = Topology.from_data(frame).to("cpu")
    names = [f"level {k}" for k in range(topology.num_levels)]
    if scheme is not None:
        names = [spec.name for spec in scheme.levels]
    drawing = Drawing(frame, topology, names, focus)
    figure = Figure(figsize=figsize, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    _draw_molecule(left, drawing)
    _draw_dag(right, drawing)
    name = "" if scheme is None else f"  ·  {type(scheme).__name__}"
    figure.suptitle(title or drawing.formula(-1, 0) + name, fontsize=15, color=_INK)
    return figure


def _clusters(drawing: Drawing) -> list[tuple[int, int]]:
    """The parts to outline (level, part), largest first."""
    inner = range(drawing.num_levels - 2, 0, -1)
    if drawing.dense:
        return [(k, drawing.focus) for k in inner if drawing.focus < drawing.topology.size(k)]
    shown, seen = [], set()
    for k in reversed(inner):
        for part, atoms in enumerate(drawing.members[k]):
            # Parts that repeat a smaller one (a piece that is the whole molecule) are outlined once
            if (key := frozenset(atoms)) not in seen:
                seen.add(key)
                shown.append((k, part))
    return shown[::-1]


def _draw_molecule(ax: Axes, drawing: Drawing) -> None:
    from matplotlib.patches import Polygon

    xy, top = drawing.xy, drawing.num_levels - 2
    for level, part in _clusters(drawing):
        margin = 0.42 + 0.34 * (level - 1)
        neutral = drawing.colors[level][part] == _NEUTRAL
        for outline in outlines(xy, drawing.members[level][part], drawing.bonds, margin):
            color = drawing.colors[level][part]
            if drawing.dense:  # nested parts of different colours would mix to grey
                ax.add_patch(Polygon(outline, facecolor="white", linewidth=0, zorder=top - level))
            fill = Polygon(outline, facecolor=color, alpha=0.10 if neutral else 0.20, linewidth=0, zorder=top - level)
            edge = Polygon(
                outline, fill=False, edgecolor=color, linewidth=1.3, alpha=0.75, zorder=top - level,
                linestyle=(0, (4, 3)) if neutral else "-",
            )  # fmt: skip
            ax.add_patch(fill)
            ax.add_patch(edge)
    # Atoms keep their size on paper for molecules, and shrink in a large box
    scale = min(1.0, 14.0 / (4.0 + float(np.ptp(xy, axis=0).max())))
    for source, target in drawing.bonds.T:
        if source < target:
            ax.plot(
                *xy[[source, target]].T,
                color="#5B616B",
                linewidth=2.6 * scale,
                zorder=10,
                solid_capstyle="round",
            )
    size = np.where(drawing.z == 1, 70.0, 190.0) * scale**2
    near = np.argsort(drawing.depth)
    ax.scatter(
        xy[near, 0], xy[near, 1], s=size[near], c=[drawing.element_colors[a] for a in near],
        edgecolors=_INK, linewidths=scale, zorder=11,
    )  # fmt: skip
    if drawing.dense and drawing.topology.size(1) == len(xy):
        x, y = xy[drawing.focus]
        ax.scatter(x, y, s=420, facecolors="none", edgecolors=_INK, linewidths=1.6, zorder=12)
    for z in sorted(set(drawing.z.tolist()), key=lambda z: (z != 6, -z)):
        atom = int(np.argmax(drawing.z == z))
        ax.scatter([], [], s=90, c=[drawing.element_colors[atom]], edgecolors=_INK, label=drawing.symbols[atom])
    ax.legend(loc="lower left", ncols=6, frameon=False, handletextpad=0.1, columnspacing=0.9, fontsize=11)
    scale_bar(ax, xy)


def scale_bar(ax: Axes, xy: np.ndarray) -> None:
    """Two angstrom as a line in the corner; sets the limits of the axes around the atoms."""
    low, high = xy.min(axis=0) - 2.0, xy.max(axis=0) + 2.0
    ax.plot([high[0] - 2.2, high[0] - 0.2], [low[1] + 0.35] * 2, color=_INK, linewidth=2.2, solid_capstyle="butt")
    ax.text(high[0] - 1.2, low[1] + 0.5, "2 Å", ha="center", va="bottom", fontsize=10, color=_INK)
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    ax.set_aspect("equal")
    ax.axis("off")


def _rows(drawing: Drawing) -> list[np.ndarray]:
    """Horizontal place of every node: parents over the middle of their children, no crossings in a tree."""
    topology = drawing.topology
    if drawing.overlapping:
        order = np.argsort(np.argsort(drawing.xy[:, 0]))
        width = max(len(order) - 1, 1)
        rows = [order / width if len(order) > 1 else np.array([0.5])]
        for k in range(1, drawing.num_levels):
            centred = topology.size(k) == len(order)
            mean = rows[0] if centred else np.array([rows[0][atoms].mean() for atoms in drawing.members[k]])
            rows.append(mean if centred else (np.argsort(np.argsort(mean)) + 0.5) / len(mean))
        return rows
    # Sort the children of each node along the first principal axis, from the root down.
    leaves = [0]
    for k in range(drawing.num_levels - 1, 0, -1):
        child, parent = required(topology.child_index[k]).numpy()
        place = np.array([drawing.xy[atoms, 0].mean() for atoms in drawing.members[k - 1]])
        leaves = [c for p in leaves for c in sorted(child[parent == p], key=lambda c: place[c])]
    leaf = np.empty(len(leaves))
    leaf[leaves] = np.linspace(0, 1, len(leaves)) if len(leaves) > 1 else 0.5
    rows = [leaf]
    for k in range(1, drawing.num_levels):
        child, parent = required(topology.child_index[k]).numpy()
        total = np.bincount(parent, rows[-1][child], topology.size(k))
        rows.append(total / np.bincount(parent, minlength=topology.size(k)))
    return rows


def _draw_dag(ax: Axes, drawing: Drawing) -> None:
    from matplotlib.collections import LineCollection

    rows = _rows(drawing)
    for k in range(1, drawing.num_levels):
        child, parent = required(drawing.topology.child_index[k]).numpy()
        lines = [_curve(rows[k - 1][c], k - 1, rows[k][p], k) for c, p in zip(child, parent, strict=True)]
        colors = [drawing.colors[k][p] for p in parent]
        if not drawing.dense:
            ax.add_collection(LineCollection(lines, colors=colors, linewidths=1.6, alpha=0.85, zorder=1))
            continue
        ax.add_collection(LineCollection(lines, colors="#C9CDD3", linewidths=0.5, alpha=0.5, zorder=1))
        ours = [e for e, p in enumerate(parent) if k < drawing.num_levels - 1 and p == drawing.focus]
        picked = [lines[e] for e in ours]
        ax.add_collection(LineCollection(picked, colors=[colors[e] for e in ours], linewidths=1.8, zorder=2))
    for k, row in enumerate(rows):
        inner = drawing.dense and 0 < k < drawing.num_levels - 1
        color = drawing.colors[k][0] if inner else _INK
        ax.text(-0.035, k, drawing.names[k], ha="right", va="center", fontsize=12, color=color)
        ax.annotate(
            f"{len(row)}", (-0.035, k), (0, -9), textcoords="offset points", ha="right", va="top",
            fontsize=10, color=_NEUTRAL,
        )  # fmt: skip
        _draw_row(ax, drawing, k, row)
    ax.set_xlim(-0.16, 1.05)
    ax.set_ylim(-0.45, drawing.num_levels - 0.55)
    ax.axis("off")


def _curve(x0: float, y0: int, x1: float, y1: int) -> np.ndarray:
    """A line with vertical ends."""
    t = np.linspace(0, 1, 24)
    s = t * t * (3 - 2 * t)
    return np.stack([x0 + (x1 - x0) * s, y0 + (y1 - y0) * t], axis=1)


def _draw_row(ax: Axes, drawing: Drawing, level: int, row: np.ndarray) -> None:
    """Nodes of one level: atoms as discs, parts as boxes with their formula where there is room."""
    focused = drawing.dense and 0 < level < drawing.num_levels - 1
    if level == 0 or len(row) > 16 or focused:
        fill: Any = drawing.element_colors if level == 0 else drawing.colors[level]
        size = np.full(len(row), min(150.0, 4200.0 / len(row)))
        if focused:
            fill = [c if p == drawing.focus else "#E4E7EB" for p, c in enumerate(fill)]
            size[drawing.focus] *= 1.6
        ax.scatter(row, np.full(len(row), level), s=size, c=fill, edgecolors=_INK, linewidths=0.8, zorder=3)
        return
    for part, x in enumerate(row):
        color = _INK if level == drawing.num_levels - 1 else drawing.colors[level][part]
        ax.text(
            x, level, drawing.formula(level, part), ha="center", va="center", color="white", zorder=3,
            fontsize=11 if len(row) < 9 else 8.5,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "white", "linewidth": 1.0},
        )  # fmt: skip
