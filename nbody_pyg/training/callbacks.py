"""Callbacks of a training run: CSV log and progress."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.training.trainer import Callback, Trainer


class MetricsCSV(Callback):
    """One row per ``log_every`` steps and per validation in ``metrics.csv``; a resumed run appends to it.

    Columns: kind (train or val), step, epoch, cpu_seconds (of training), wall_seconds, lr, loss, grad_norm,
    energy_mae (meV), energy_rmse, forces_mae (meV/angstrom), forces_rmse.
    """

    columns: tuple[str, ...] = ("kind", "step", "epoch", "cpu_seconds", "wall_seconds", "lr", "loss", "grad_norm",
               "energy_mae", "energy_rmse", "forces_mae", "forces_rmse")  # fmt: skip

    def __init__(self, path: str | Path, every: int = 50, steps_per_epoch: int = 1):
        self.path, self.every = Path(path), every
        self.steps_per_epoch = steps_per_epoch
        self.latest: dict[str, float] = {}

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.first:
            return
        rows = []
        if trainer.step and self.path.exists():
            with self.path.open(newline="") as file:
                # A killed run may have left an incomplete row.
                whole = [
                    row for row in csv.DictReader(file) if set(row) == set(self.columns) and None not in row.values()
                ]
            rows = [row for row in whole if row["step"].isdecimal() and int(row["step"]) <= trainer.step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def _write(self, trainer: Trainer, kind: str, values: Mapping[str, float]) -> None:
        row = {
            "kind": kind,
            "step": trainer.step,
            "epoch": trainer.step // self.steps_per_epoch,
            "cpu_seconds": f"{trainer.clock.elapsed:.3f}",
            "wall_seconds": f"{trainer.wall_seconds:.3f}",
            "lr": f"{trainer.learning_rate:.6g}",
        }
        row |= {key: f"{value:.6g}" for key, value in values.items() if key in self.columns}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0:
            self.latest = trainer.task.running.take()
            if trainer.first:
                self._write(trainer, "train", self.latest)

    def on_validation(self, trainer: Trainer, scores: Mapping[str, float]) -> None:
        if trainer.first:
            self._write(trainer, "val", scores)


def _duration(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _rounded(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.4g}"


class RunProgress(Callback):
    """One bar over the whole run, with MAE in meV and meV/angstrom.

    Without a terminal: a line at every validation, and after every ``seconds`` without one.
    """

    def __init__(self, log: MetricsCSV, every: int = 50, seconds: float = 30.0):
        self.log, self.every, self.seconds = log, every, seconds
        self._bar: tqdm | None = None
        self._scores = ""
        self._began = self._spoke = 0.0
        self._done: float | None = None  # progress after the first step of this process

    def on_start(self, trainer: Trainer) -> None:
        self._began = self._spoke = time.monotonic()
        if trainer.first and sys.stderr.isatty():
            layout = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=100.0, desc="training", bar_format=layout, dynamic_ncols=True)

    def on_step(self, trainer: Trainer) -> None:
        if self._done is None:
            self._began, self._done = time.monotonic(), trainer.progress
        if self._bar is not None and trainer.step % self.every == 0:
            self._bar.set_postfix_str(f"step {trainer.step}{self._errors(trainer)}{self._scores}", refresh=False)
            self._bar.update(100.0 * trainer.progress - self._bar.n)
        elif self._bar is None and trainer.first and time.monotonic() - self._spoke >= self.seconds:
            validated = trainer.val is not None and trainer.step % trainer.settings.validate_every == 0
            if not validated:  # a validation has a line of its own
                self._speak(trainer, self._errors(trainer).removeprefix(", "))

    def _errors(self, trainer: Trainer) -> str:
        """Errors of the last row of the log."""
        now = self.log.latest
        parts = [f"{name} {_rounded(now[key])} {unit}".rstrip() for name, key, unit in trainer.task.shown if key in now]
        return f", train {' '.join(parts)}" if parts else ""

    def _speak(self, trainer: Trainer, text: str) -> None:
        """A line with the errors and the time that is left."""
        self._spoke = time.monotonic()
        gained = trainer.progress - (self._done or 0.0)
        left = (1.0 - trainer.progress) / gained * (self._spoke - self._began) if gained > 0 else None
        end = f"  {_duration(left)} left" if left is not None and trainer.progress < 1 else ""
        print(
            f"step {trainer.step:7d}  {100 * trainer.progress:5.1f} %  "
            f"{trainer.clock.elapsed:7.1f} CPU s  lr {trainer.learning_rate:.1e}  {text}{end}",
            flush=True,
        )

    def on_validation(self, trainer: Trainer, scores: Mapping[str, float]) -> None:
        if not trainer.first:
            return
        shown = [(name, scores[key], unit) for name, key, unit in trainer.task.shown if key in scores]
        parts = [f"{name} {_rounded(value)} {unit}".rstrip() for name, value, unit in shown]
        self._scores = f" | val {' '.join(parts)}" if parts else ""
        if self._bar is None:
            self._speak(trainer, self._scores.strip())

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.update(100.0 * trainer.progress - self._bar.n)
            self._bar.close()
            self._bar = None
