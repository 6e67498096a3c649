"""Callbacks of a training run: checkpoints, CSV log, progress, and stopping on a signal."""

from __future__ import annotations

import csv
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from nbody_pyg.durable import written_whole
from nbody_pyg.training.checkpoint import read_checkpoint, seal


class Checkpoints(Callback):
    """Writes ``last.ckpt`` after every validation and at the end, ``best.ckpt`` when the score improves.

    Every write goes to a temporary file that is renamed, so that a killed run leaves a readable file. The
    files load with ``weights_only=True``: tensors and plain values only, random states included; a checksum over
    every byte stands at their end. Weights that are not finite are not written: what was there before is of more use.

    Args:
        folder: where the files go.
        monitor: a logged metric, lower is better; ``best`` needs validation. None: no ``best.ckpt``.
        every: steps between two writes of ``last.ckpt`` without validation; None: not before the end.
        run: what every checkpoint keeps of the run that it belongs to.
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str | None = "val_forces_mae",
        every: int | None = None,
        run: dict[str, Any] | None = None,
    ):
        self.folder, self.monitor, self.every, self.run = Path(folder), monitor, every, dict(run or {})
        self.best_score, self.best_step = float("inf"), -1

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.run

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        if score is not None and float(score) < self.best_score:
            self.best_score, self.best_step = float(score), trainer.global_step
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.should_stop:  # asked to stop: first make sure of the work done
            self._save(trainer, "last.ckpt")
        elif self.every is not None and trainer.global_step % self.every == 0:
            module.clock.pause()  # as for validation; the next step starts it again
            self._save(trainer, "last.ckpt")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: Trainer, name: str) -> None:
        # On a GPU the loss is looked at now and then only, so the weights may be lost by now.
        if not all(bool(p.isfinite().all()) for p in trainer.lightning_module.parameters()):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.tmp"
        if not trainer.is_global_zero:
            trainer.save_checkpoint(temporary, weights_only=False)  # every process takes part
            return
        with written_whole(self.folder / name, temporary):
            trainer.save_checkpoint(temporary, weights_only=False)
            seal(temporary)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step, **_random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score, self.best_step = state["best_score"], state["best_step"]
        if self.best_step >= 0 and not self._has_best():
            self.best_score, self.best_step = float("inf"), -1  # chosen anew from here on
        _set_random_state(state)

    def _has_best(self) -> bool:
        """Whether best.ckpt is that of this run and of the step that is known: it may be lost, or a step ahead."""
        try:
            found = read_checkpoint(self.folder / "best.ckpt")
        except (OSError, ValueError):
            return False
        return found.get("run", {}).get("id") == self.run.get("id") and found["global_step"] == self.best_step


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global one is meant)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


class MetricsCSV(Callback):
    """One row per ``log_every`` steps and per validation in ``metrics.csv``; a resumed run goes on.

    Columns: kind (train or val), step, epoch, cpu_seconds (of training), wall_seconds, lr, loss, grad_norm,
    energy_mae (meV), energy_rmse, forces_mae (meV/angstrom), forces_rmse.
    """

    columns = ("kind", "step", "epoch", "cpu_seconds", "wall_seconds", "lr", "loss", "grad_norm",
               "energy_mae", "energy_rmse", "forces_mae", "forces_rmse")  # fmt: skip

    def __init__(self, path: str | Path, every: int = 50, steps_per_epoch: int = 1):
        self.path, self.every, self._began = Path(path), every, 0.0
        self.steps_per_epoch = steps_per_epoch
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._began = time.perf_counter()
        if not trainer.is_global_zero:
            return
        rows = []
        if trainer.global_step and self.path.exists():
            with self.path.open(newline="") as file:
                # A run that was killed may have left half a row.
                whole = [
                    row for row in csv.DictReader(file) if set(row) == set(self.columns) and None not in row.values()
                ]
            rows = [row for row in whole if row["step"].isdecimal() and int(row["step"]) <= trainer.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def _write(self, trainer: Trainer, module: Any, kind: str, values: dict[str, float]) -> None:
        row = {
            "kind": kind,
            "step": trainer.global_step,
            "epoch": trainer.global_step // self.steps_per_epoch,
            "cpu_seconds": f"{module.clock.elapsed:.3f}",
            "wall_seconds": f"{time.perf_counter() - self._began:.3f}",
            "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.6g}",
        }
        row |= {key: f"{value:.6g}" for key, value in values.items() if key in self.columns}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            self.latest = module.running.take()
            if trainer.is_global_zero:
                self._write(trainer, module, "train", self.latest)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            scores = {k.removeprefix("val_"): float(v) for k, v in trainer.callback_metrics.items()}
            self._write(trainer, module, "val", scores)


def _rounded(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.4g}"


class RunProgress(Callback):
    """One bar over the whole run, with MAE in meV and meV/angstrom; plain lines without a terminal."""

    def __init__(self, log: MetricsCSV, every: int = 50):
        self.log, self.every = log, every
        self._bar: tqdm | None = None
        self._scores = ""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            layout = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=100.0, desc="training", bar_format=layout, dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is not None and trainer.global_step % self.every == 0:
            now = self.log.latest
            text = f"step {trainer.global_step}"
            parts = [f"{name} {_rounded(now[key])} {unit}" for name, key, unit in module.shown if key in now]
            text += f", train {' '.join(parts)}" if parts else ""
            self._bar.set_postfix_str(text + self._scores, refresh=False)
            self._bar.update(100.0 * module.progress - self._bar.n)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        scores = trainer.callback_metrics
        parts = [
            f"{name} {_rounded(float(scores[f'val_{key}']))} {unit}".rstrip()
            for name, key, unit in module.shown
            if f"val_{key}" in scores
        ]
        self._scores = f" | val {' '.join(parts)}" if parts else ""
        if self._bar is None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            print(
                f"step {trainer.global_step:7d}  {100 * module.current_progress():5.1f} %  "
                f"{module.clock.elapsed:7.1f} CPU s  lr {rate:.1e} {self._scores}",
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self._bar is not None:
            self._bar.update(100.0 * module.progress - self._bar.n)
            self._bar.close()
            self._bar = None


class GracefulStop(Callback):
    """SIGTERM or Ctrl-C: finish the step, write ``last.ckpt``, leave the loop. A second signal kills at once.

    ``received`` holds the number of the signal afterwards; the command line exits with 128 + that number
    (143 for SIGTERM, 130 for Ctrl-C), as a shell reports a process that the signal ended.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # After Lightning has installed its own handler, which would leave before the checkpoint is written. Python
        # lets the main thread alone handle signals: a run in another thread ends when its limits are reached.
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._handle) for number in self.signals}

    def _handle(self, number: int, frame: Any) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        stop = self.received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)


class CallbackGroup(Callback):
    """Several callbacks as one: Lightning takes time for every callback at every hook, wanted or not.

    Only the hooks listed in ``hooks`` are handed on, to the members that define them, in their order.
    """

    hooks = (
        "on_train_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_end",
        "on_train_end",
        "on_fit_end",
        "on_exception",
        "on_save_checkpoint",
        "on_load_checkpoint",
    )

    def __init__(self, members: Sequence[Callback]):
        self.members = tuple(members)
        for hook in self.hooks:
            calls = [
                getattr(member, hook)
                for member in self.members
                if getattr(type(member), hook) is not getattr(Callback, hook)
            ]
            setattr(self, hook, _in_turn(calls))

    def state_dict(self) -> dict[str, Any]:
        return {type(member).__name__: member.state_dict() for member in self.members}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for member in self.members:
            if found := state.get(type(member).__name__):
                member.load_state_dict(found)


def _in_turn(calls: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def call_all(*args: Any, **kwargs: Any) -> None:
        for call in calls:
            call(*args, **kwargs)

    return call_all
