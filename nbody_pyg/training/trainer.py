"""Trainer: the loop of a run, from its first step to its last checkpoint; Callback: what it calls meanwhile."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch_geometric.data import Batch

from nbody_pyg.interrupt import GracefulStop
from nbody_pyg.io.checkpoint import random_state, read_checkpoint, set_random_state, write_checkpoint
from nbody_pyg.training.clock import ProcessClock
from nbody_pyg.training.ema import WeightEMA
from nbody_pyg.training.flat import FlatParameters
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.optim import build_optimizer
from nbody_pyg.training.schedule import WarmupCosine
from nbody_pyg.training.stream import StreamLoader
from nbody_pyg.training.task import PotentialTask


class Callback:
    """Base class with hooks of a run, which do nothing by default. Its state is stored in every checkpoint."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, also of a resumed run."""

    def on_step(self, trainer: Trainer) -> None:
        """After every step."""

    def on_validation(self, trainer: Trainer, scores: Mapping[str, float]) -> None:
        """After a validation, with its errors (see :class:`ErrorMeter`)."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, before the last checkpoint."""

    def on_save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written, by the process that writes it."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, if it is not empty."""


class Trainer:
    r"""Trains a task, and writes ``last.ckpt`` and ``best.ckpt``; in every process of torch.distributed, if it is used.

    The learning rate follows :class:`WarmupCosine` over the *progress* of the run: the larger of its shares of steps
    and CPU time (whichever limits are set). When the budget is spent, training stops after the current step.

    ``last.ckpt`` is written after every validation, or as often without, and at the end; ``best.ckpt`` when the error
    ``task.monitor`` improves. Weights that are not finite are not written; the previous checkpoint is kept.

    Args:
        task: the task to train.
        train, val: its batches, and those of validation, if any.
        folder: folder of the checkpoints.
        last_step: the step at which the run ends; -1 where only its time is limited.
        run: record of the run, stored in every checkpoint.
        callbacks: called in this order.
        anchor: share of the way back to the first weights in every step, in units of the learning rate:
            :math:`w \leftarrow w - \eta a (w - w_0)` after the step of the optimizer (L2-SP, decoupled).

    For callbacks: ``step`` (steps taken), ``progress`` in [0, 1], ``clock``, ``learning_rate``, ``first`` (whether this
    process writes), ``should_stop``, which they may set on all processes alike, and :meth:`averaged`.
    Raises: FloatingPointError: the loss is not finite; the message has the step and a remedy.
    """

    def __init__(
        self,
        task: PotentialTask,
        train: FrameLoader | StreamLoader,
        val: FrameLoader | None,
        folder: str | Path,
        last_step: int = -1,
        run: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        device: torch.device | str = "cpu",
        anchor: float = 0.0,
    ):
        s = task.settings
        self.task, self.train, self.val, self.settings = task.to(device), train, val, s
        self.folder, self.last_step, self.run, self.callbacks = Path(folder), last_step, dict(run or {}), callbacks
        self.device = torch.device(device)
        self.world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.first = self.world == 1 or dist.get_rank() == 0
        self.flat = FlatParameters(task)
        self.names = [name for name, p in task.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(s.optimizer, task, s.lr, s.weight_decay, self.flat)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.schedule, self.clock = WarmupCosine(s.warmup_steps, s.constant_fraction), ProcessClock()
        self.ema, self.stop = WeightEMA(self.flat, s.ema_decay), GracefulStop()
        self.step, self.progress, self.should_stop = 0, 0.0, False
        self.best_score, self.best_step = math.inf, -1
        self.anchor, self.first_weights = anchor, self.flat.values.clone() if anchor else None
        self._wall_before, self._began = 0.0, time.monotonic()
        self._saved = self._began
        task.settle()

    @property
    def wall_seconds(self) -> float:
        """Wall-clock seconds of training, also those before it was resumed."""
        return self._wall_before + time.monotonic() - self._began

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def _finished(self) -> bool:
        return self.should_stop or 0 <= self.last_step <= self.step

    def fit(self) -> None:
        """Take all remaining steps; afterwards the task has the averaged weights, on the CPU."""
        self.task.running.clear()
        if self.world > 1:
            for value in self.task.state_dict().values():
                shared = value.contiguous()
                dist.broadcast(shared, src=0)
                value.copy_(shared)
        self._began = self._saved = time.monotonic()
        self._tell("on_start")
        self._agree()
        every, batches = self.settings.validate_every, self.train.endless(self.step)
        with self.stop:
            while not self._finished:
                self._update(next(batches))
                self._agree()
                self._tell("on_step")
                if self.should_stop:
                    self.save("last.ckpt")  # save the finished steps first
                if self.should_stop or self.step % every == 0:
                    self._validate()
                elif time.monotonic() - self._saved >= self.settings.checkpoint_seconds:
                    self.save("last.ckpt")
        self._tell("on_end")
        self.save("last.ckpt")
        self.flat.values.copy_(self.ema.average)
        self.task.settle()
        self.task.cpu()

    def _update(self, batch: Batch) -> None:
        """One step: loss, gradient, weights, average."""
        s = self.settings
        self.clock.start()
        factor = self.schedule(self.step, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.flat.zero_grad()
        loss = self.task.training_step(batch if batch.pos.device == self.device else batch.to(self.device))
        # On the CPU reading the value is free; on a GPU it would synchronise every step.
        if self.device.type == "cpu" or self.step % s.log_every == 0:
            self._check_finite(loss.item())
        loss.backward()
        self.task.pull()
        if self.world > 1:
            dist.all_reduce(self.flat.gradient)
            self.flat.gradient /= self.world
        if s.clip_norm is not None:
            self.task.running.norm += self.flat.clip_grad_norm(s.clip_norm)
        self.optimizer.step()
        if self.first_weights is not None:
            self.flat.values.lerp_(self.first_weights, min(1.0, self.learning_rate * self.anchor))
        self.task.settle()
        self.step += 1
        self.ema.update()

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss became {loss} at step {self.step} (learning rate {self.learning_rate:.3g}); the last "
                "checkpoint, if there is one, is still good. Try a smaller lr, a longer warmup_steps, a smaller "
                "clip_norm, or dtype float64; check the labels"
            )

    def _agree(self) -> None:
        """Progress, and whether a signal or the budget ends the run: the same on every process.

        With unequal learning rates the processes would diverge.
        """
        s, stop = self.settings, self.stop.received is not None
        spent = ((self.clock.elapsed, s.budget_seconds), (self.wall_seconds, s.wall_seconds))
        times = [seconds / limit for seconds, limit in spent if limit is not None]
        progress = max([self.step / self.last_step if self.last_step > 0 else 0.0, *times])
        if self.world > 1:
            shared = torch.tensor([stop, progress * self.first], dtype=torch.float64, device=self.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            stop, progress = shared.tolist()
        self.progress = min(1.0, progress)
        self.should_stop |= bool(stop) or (bool(times) and progress >= 1.0)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the task has the averaged weights and is in evaluation mode, and the clock is paused."""
        self.clock.pause()  # it starts again with the next step
        training = [module for module in self.task.modules() if module.training]
        self.task.eval()
        try:
            with self.ema.averaged():
                self.task.settle()
                yield
        finally:
            self.task.settle()
            for module in training:
                module.training = True

    def _validate(self) -> None:
        if self.val is not None:
            with self.averaged():
                meter = self.task.meter(self.device)
                for batch in self.val:
                    self.task.validation_step(batch.to(self.device), meter)
            meter.reduce()
            scores = meter.compute()
            self._tell("on_validation", scores)
            score = scores.get(self.task.monitor or "", math.inf)
            if score < self.best_score:
                self.best_score, self.best_step = score, self.step
                self.save("best.ckpt")
        self.save("last.ckpt")

    def _tell(self, moment: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *arguments)

    # -- checkpoints ---------------------------------------------------------------------------------------
    def save(self, name: str) -> None:
        """Write a checkpoint: the average as ``state_dict``, so that loading it gives the model that was validated, and
        the weights of the optimizer as ``training_state``, for resuming."""
        self.clock.pause()
        self._saved = time.monotonic()
        # On a GPU the loss is checked only now and then, so the weights may already be invalid.
        if not self.first or not bool(self.flat.values.isfinite().all()):
            return
        state = self.task.state_dict()
        own = {"best_score": self.best_score, "best_step": self.best_step, **random_state()}
        averages = self.task.settled(dict(zip(self.names, self.flat.views(self.ema.average), strict=True)))
        checkpoint = {
            "state_dict": state | averages,
            "optimizer_states": [self.optimizer.state_dict()],
            "global_step": self.step,
            "cpu_seconds": self.clock.elapsed,
            "wall_seconds": self.wall_seconds,
            "hyper_parameters": self.task.hparams,
            "callbacks": {
                **{name: callback.state_dict() for name, callback in self._named_callbacks()},
                "WeightEMA": {"steps": self.ema.steps},
                "Checkpoints": own,
            },
            "run": self.run,
        }
        if self.settings.ema_decay:
            checkpoint["training_state"] = state
        if self.first_weights is not None:
            checkpoint["first_weights"] = dict(zip(self.names, self.flat.views(self.first_weights), strict=True))
        self._tell("on_save", checkpoint)
        write_checkpoint(self.folder / name, checkpoint)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Resume from a checkpoint. Raises: ValueError: it belongs to another network; matching weights are not
        sufficient."""
        self.task.require_same_network(checkpoint)
        average, states = checkpoint["state_dict"], checkpoint["callbacks"]
        self.task.load_state_dict(checkpoint.get("training_state", average))
        self.ema.average = self.flat.pack([average[name] for name in self.names])
        if self.first_weights is not None:
            self.first_weights = self.flat.pack([checkpoint["first_weights"][name] for name in self.names])
        self.task.settle()
        self.ema.steps = states.get("WeightEMA", {"steps": 0})["steps"]
        # Rates and decays are those of the settings: a resumed run may change them.
        kept = ("initial_lr", "weight_decay")
        chosen = [{key: group[key] for key in kept if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(values)
        self.step, self.clock = checkpoint["global_step"], ProcessClock(checkpoint["cpu_seconds"])
        self._wall_before = checkpoint.get("wall_seconds", 0.0)
        for name, callback in self._named_callbacks():
            if found := states.get(name):
                callback.load_state_dict(found)
        own = states["Checkpoints"]
        if own["best_step"] >= 0 and self._has_best(own["best_step"]):  # otherwise it is chosen again from here on
            self.best_score, self.best_step = own["best_score"], own["best_step"]
        set_random_state(own)

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        """Callbacks by the names of their classes, further ones of a class with a number: "Name", "Name 2", ..."""
        found: list[tuple[str, Callback]] = []
        for callback in self.callbacks:
            name = type(callback).__name__
            count = sum(type(other) is type(callback) for _, other in found)
            found.append((f"{name} {count + 1}" if count else name, callback))
        return found

    def _has_best(self, step: int) -> bool:
        """Whether best.ckpt belongs to this run and to the recorded step; it may be missing, or later."""
        try:
            found = read_checkpoint(self.folder / "best.ckpt")
        except (OSError, ValueError):
            return False
        return bool(found["run"].get("id") == self.run.get("id") and found["global_step"] == step)
