"""Table and plot of the rounds of active learning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nbody_pyg.active.loop import Round
from nbody_pyg.atomic_write import save_figure
from nbody_pyg.messages import aligned

_COLUMNS = (
    ("round", "number", "d"), ("labels", "labels", "d"), ("F error eV/A", "error", ".4f"),
    ("E/atom meV", "energy_per_atom", "milli"), ("uncertainty", "uncertainty", ".4f"), ("factor", "factor", ".2f"),
    ("Spearman", "spearman", ".2f"), ("held", "held", ".0%"), ("new", "new_labels", "d"),
    ("F error of new", "new_error", ".4f"), ("min", "minutes", ".1f"),
)  # fmt: skip


def rounds_table(rounds: Sequence[Round]) -> str:
    """A row per round; errors are those of :class:`Round`."""
    rows = []
    for one in rounds:
        cells = []
        for _, name, form in _COLUMNS:
            value = getattr(one, name)
            if value is None:
                cells.append("-")
            else:
                cells.append(f"{1000 * value:.2f}" if form == "milli" else f"{value:{form}}")
        rows.append(cells)
    return aligned([title for title, _, _ in _COLUMNS], rows, range(len(_COLUMNS)))


def plot_rounds(rounds: Sequence[Round], path: str | Path) -> None:
    """Errors and uncertainty against the number of labels, and how far the dynamics went, in one PNG."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [one.labels for one in rounds]
    left.plot(labels, [one.error for one in rounds], "o-", color="#1f5fa8", label="error on validation structures")
    new = [one for one in rounds if one.new_error is not None]
    left.plot([one.labels for one in new], [one.new_error for one in new], "s", color="#c4501b",
              label="error on new structures, before learning them")  # fmt: skip
    left.plot(labels, [one.limit for one in rounds], "--", color="0.5", label="limit of the uncertainty")
    left.set(xlabel="labels", ylabel="force error (eV/Å)", yscale="log")
    left.legend(frameon=False, fontsize=8)
    right.plot(labels, [100 * one.held for one in rounds], "o-", color="#2e8b57")
    right.set(xlabel="labels", ylabel="dynamics without a structure beyond the limit (%)", ylim=(0, 103))
    save_figure(figure, Path(path), dpi=160)
