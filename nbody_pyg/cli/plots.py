"""Parity plots: prediction against label, with the errors in the legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.datasets.frames import has_label
from nbody_pyg.properties import Property
from nbody_pyg.training.evaluation import Evaluation
from nbody_pyg.training.property_task import PropertyEvaluation

_COLOURS = ("#1f5fa8", "#c4501b", "#2e8b57", "#7a4fa3", "#8c6d1f")


def parity_plot(results: Mapping[str, tuple[Sequence[Data], Evaluation]], path: str | Path, title: str = "") -> None:
    """Energies (mean subtracted, eV per molecule) and force components of every set, in one PNG.

    Raises: ValueError: no set has labels.
    """
    energy, forces = {}, {}
    for name, (frames, found) in results.items():
        known = [i for i, frame in enumerate(frames) if has_label(frame, "energy")]
        if known:
            energy[name] = _pairs([frames[i].energy for i in known], [found.energy[i] for i in known])
        known = [i for i, frame in enumerate(frames) if found.forces and has_label(frame, "forces")]
        if known:
            forces[name] = _pairs([frames[i].forces for i in known], [found.forces[i] for i in known])
    panels = [("energy", "eV", "meV", energy), ("force component", "eV/Å", "meV/Å", forces)]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        raise ValueError("no set has labels to compare with; nothing to plot")
    figure = Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, *panel)
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, Path(path), dpi=160)


def property_plot(
    results: Mapping[str, tuple[Sequence[Data], PropertyEvaluation]], properties: Sequence[Property], path: str | Path
) -> None:
    """Predictions against labels of every property, by component, in one PNG."""
    figure = Figure(figsize=(5.2 * len(properties), 5.4), layout="constrained")
    for axes, p in zip(figure.subplots(1, len(properties), squeeze=False)[0], properties, strict=True):
        sets = {}
        for name, (frames, found) in results.items():
            known = [i for i, frame in enumerate(frames) if has_label(frame, p.name)]
            if known:
                sets[name] = _pairs([frames[i][p.name] for i in known], [found.values[p.name][i] for i in known])
        if not sets:
            raise ValueError(f"no set has the label {p.name!r} to compare with; nothing to plot")
        _panel(axes, p.name + (" component" if p.shape else ""), p.unit, p.unit, sets, milli_factor=1.0)
    save_figure(figure, Path(path), dpi=160)


def _panel(
    axes: Axes,
    name: str,
    unit: str,
    milli: str,
    sets: Mapping[str, tuple[np.ndarray, np.ndarray]],
    milli_factor: float = 1000.0,
) -> None:
    """``milli`` is the unit of the errors; one ``unit`` is ``milli_factor`` times ``milli``."""
    centre = np.concatenate([label for label, _ in sets.values()]).mean() if name == "energy" else 0.0
    # The widest set is drawn first, so that it does not hide the others.
    order = sorted(sets, key=lambda key: -np.ptp(sets[key][0]))
    colours = dict(zip(sets, _COLOURS * len(sets), strict=False))
    for key in order:
        label, found = sets[key]
        error = milli_factor * np.abs(found - label).mean()
        text = f"{key}: MAE {f'{error:.1f}' if milli_factor > 1 else f'{error:.3g}'} {milli}".rstrip()
        axes.plot(
            label - centre, found - centre, ".", ms=2.5 if len(label) > 3000 else 5, alpha=0.5, mew=0,
            color=colours[key], label=text, rasterized=True,
        )  # fmt: skip
    values = np.concatenate([np.concatenate(pair) for pair in sets.values()]) - centre
    low, high = values.min(), values.max()
    pad = 0.04 * (high - low) or 1.0
    ends = (low - pad, high + pad)
    axes.plot(ends, ends, color="0.25", lw=0.9, zorder=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    suffix = " − mean" if name == "energy" else ""
    suffix += f" ({unit})" if unit else ""
    axes.set_xlabel(f"reference {name}{suffix}")
    axes.set_ylabel(f"predicted {name}{suffix}")
    axes.legend(loc="upper left", frameon=False, markerscale=3, fontsize=9)


def _pairs(labels: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Known components of the labels, and their predictions."""
    label = np.concatenate([value.detach().double().cpu().numpy().reshape(-1) for value in labels])
    other = np.concatenate([value.detach().double().cpu().numpy().reshape(-1) for value in found])
    known = ~np.isnan(label)
    return label[known], other[known]
