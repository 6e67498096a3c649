"""The learning curve of a run: errors of the averaged weights at shares of the budget, in time that does not count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch_geometric.data import Data

from nbody_pyg.compare.errors import errors_on, listed
from nbody_pyg.training.trainer import Callback, Trainer


class LearningCurve(Callback):
    """Tests the averaged weights on fixed frames at shares of the run that are equally spaced in logarithm.

    The clock of the training stands still meanwhile. The learning rate falls to zero only at the end, so that
    an early point lies above what a run of that length would reach.

    Args:
        sets: name to frames, the same in every run that is compared.
        points: number of points, the last at the end of the run; 0 for none but that.
        first: share of the run of the first point.
        note: called with one line for each point.

    ``rows`` holds one dictionary for each point: step, cpu_seconds, and {set: errors} in the units of training.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[Data]], points: int = 12, first: float = 0.02,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.sets, self.note = dict(sets), note
        self.marks = [float(mark) for mark in np.geomspace(first, 1.0, points)[:-1]] if points > 1 else []
        self.rows: list[dict[str, Any]] = []

    def on_step(self, trainer: Trainer) -> None:
        passed = len(self.rows)
        if passed < len(self.marks) and trainer.progress >= self.marks[passed]:
            self._look(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.progress >= 1.0 and (not self.rows or self.rows[-1]["step"] < trainer.step):
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        with trainer.averaged():
            row: dict[str, Any] = {"step": trainer.step, "cpu_seconds": trainer.clock.elapsed, **self._errors(trainer)}
        self.rows.append(row)
        parts = [f"{name} {listed(row[name])}" for name in self.sets]
        self.note(f"{row['cpu_seconds']:8.1f} CPU s  step {row['step']:6d}  {'  '.join(parts)}")

    def _errors(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        found = {name: errors_on(trainer.task.potential, frames, trainer.device) for name, frames in self.sets.items()}
        return {name: {k: v for k, v in e.items() if k.endswith(("_mae", "_rmse"))} for name, e in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])
