"""Parity plots: prediction against label, with the errors in the legend."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
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
    """Energies, force components and stress components (where labelled) of every set, in one PNG.

    Energies are those of molecules less their mean (eV), or per atom (eV) where frames differ in their atoms: then less
    the energies of the elements that fit the labels best, because these hide everything else.

    Raises: ValueError: no set has labels.
    """
    energy, forces, stress = {}, {}, {}
    shift = _ElementEnergies([frame for frames, _ in results.values() for frame in frames])
    for name, (frames, found) in results.items():
        known = [i for i, frame in enumerate(frames) if has_label(frame, "energy")]
        if known:
            less = [shift(frames[i]) for i in known]
            energy[name] = _pairs(
                [(frames[i].energy - a) / n for i, (a, n) in zip(known, less, strict=True)],
                [(found.energy[i] - a) / n for i, (a, n) in zip(known, less, strict=True)],
            )
        known = [i for i, frame in enumerate(frames) if found.forces and has_label(frame, "forces")]
        if known:
            forces[name] = _pairs([frames[i].forces for i in known], [found.forces[i] for i in known])
        known = [i for i, frame in enumerate(frames) if has_label(frame, "stress")]
        if known and found.stress is not None:
            stress[name] = _pairs([frames[i].stress for i in known], [found.stress[i] for i in known])
    panels = [
        (shift.title, "eV", "meV", energy),
        ("force component", "eV/Å", "meV/Å", forces),
        ("stress component", "eV/Å³", "meV/Å³", stress),
    ]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        raise ValueError("no set has labels to compare with; nothing to plot")
    figure = Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, *panel)
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, Path(path), dpi=160)


def error_plot(results: Mapping[str, tuple[Sequence[Data], Evaluation]], path: str | Path, title: str = "") -> None:
    """Histograms of the errors of energies per atom (meV) and of force components (meV/angstrom)."""
    energy, forces = {}, {}
    for name, (frames, found) in results.items():
        known = [i for i, frame in enumerate(frames) if has_label(frame, "energy")]
        if known:
            given, other = _pairs([frames[i].energy for i in known], [found.energy[i] for i in known])
            atoms = np.array([len(frames[i].z) for i in known])
            energy[name] = 1000.0 * (other - given) / atoms
        known = [i for i, frame in enumerate(frames) if found.forces and has_label(frame, "forces")]
        if known:
            given, other = _pairs([frames[i].forces for i in known], [found.forces[i] for i in known])
            forces[name] = 1000.0 * (other - given)
    panels = [("error of the energy per atom (meV)", energy), ("error of a force component (meV/Å)", forces)]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(5.2 * len(panels), 4.0), layout="constrained")
    for axes, (label, sets) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        edge = max(float(np.abs(errors).max()) for errors in sets.values()) or 1.0
        for (name, errors), colour in zip(sets.items(), _COLOURS * len(sets), strict=False):
            text = f"{name}: RMSE {np.sqrt(np.square(errors).mean()):.1f}"
            axes.hist(errors, np.linspace(-edge, edge, 61), histtype="step", color=colour, label=text)
        axes.set(xlabel=label, ylabel="count", yscale="log")
        axes.legend(loc="upper right", frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, Path(path), dpi=160)


def learning_curve(log: str | Path, path: str | Path) -> None:
    """Errors of training and validation, and the learning rate, against the step, from ``metrics.csv``."""
    with Path(log).open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [("forces_mae", "F MAE (meV/Å)"), ("energy_mae", "E MAE (meV)"), ("loss", "loss")]
    panels = [(key, label) for key, label in shown if any(row.get(key) for row in rows)] + [("lr", "learning rate")]
    figure = Figure(figsize=(5.0 * len(panels), 3.8), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        kinds = (("train", "0.6", ""), ("val", _COLOURS[0], "o"))
        for kind, colour, marker in kinds[: 1 if key == "lr" else 2]:
            points = [(int(row["step"]), float(row[key])) for row in rows if row["kind"] == kind and row.get(key)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=3, lw=1.2, label=kind)
        axes.set(
            xlabel="step", ylabel=label, yscale="log" if any(float(row.get(key) or 0) > 0 for row in rows) else "linear"
        )
        axes.locator_params(axis="x", nbins=5)  # numbers of long runs would overlap
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    save_figure(figure, Path(path), dpi=160)


class _ElementEnergies:
    """What is taken off the energies of a frame before they are drawn, and the number of atoms to divide by.

    ``title`` is the name of the axis. Nothing is taken off where all frames have the same atoms: their mean is.
    """

    def __init__(self, frames: Sequence[Data]) -> None:
        known = [frame for frame in frames if has_label(frame, "energy")]
        counts = (
            torch.stack([torch.bincount(frame.z.cpu(), minlength=120) for frame in known]).double() if known else None
        )
        self.energies: Tensor | None = None
        self.title = "energy"
        if counts is not None and bool((counts != counts[0]).any()):
            energy = torch.stack([frame.energy.detach().cpu().double().reshape(()) for frame in known])
            self.energies = torch.linalg.lstsq(counts, energy.unsqueeze(1), driver="gelsd").solution.squeeze(1)
            self.title = "energy per atom"

    def __call__(self, frame: Data) -> tuple[float, int]:
        if self.energies is None:
            return 0.0, 1
        return float(self.energies[frame.z.cpu()].sum()), len(frame.z)


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
    suffix = {"energy": " − mean", "energy per atom": " − that of its elements"}.get(name, "")
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
