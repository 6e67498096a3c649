"""fit: one call from frames and a model to a trained potential."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, Trainer
from torch_geometric.data import Data

from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.callbacks import CallbackGroup, Checkpoints, GracefulStop, MetricsCSV, RunProgress
from nbody_pyg.training.ema import WeightEMA
from nbody_pyg.training.labels import deciding_metric, force_variance, targets
from nbody_pyg.training.loader import FrameLoader, FrameStream
from nbody_pyg.training.property_task import PropertyTask
from nbody_pyg.training.settings import TrainingConfig
from nbody_pyg.training.steady import steady_process
from nbody_pyg.training.task import PotentialTask


@dataclass(frozen=True)
class FitResult:
    """What a run left behind: the potential holds the averaged weights at the end of the run.

    ``interrupted`` is the number of the signal that ended the run, or None. ``best_score`` and ``best_step``
    describe ``best.ckpt``; infinite and -1 without validation frames. The score is the mean absolute error
    ``monitor``: of the forces (meV/angstrom), of the energy (meV) where none are trained on, or of the first
    property, in its unit.
    """

    potential: Potential | PropertyModel
    steps: int
    epochs: int
    cpu_seconds: float
    best_score: float
    best_step: int
    interrupted: int | None
    monitor: str = "forces_mae"

    @property
    def best_forces_mae(self) -> float:
        """``best_score``, under the name that it has for potentials trained on forces."""
        return self.best_score


def steps_per_epoch(settings: TrainingConfig, num_frames: int) -> int:
    """Steps of one pass over the training frames, shared out over the processes."""
    return math.ceil(math.ceil(num_frames / settings.processes) / settings.batch_size)


def make_trainer(settings: TrainingConfig, callbacks: list, epoch: int, validate: bool, folder: str | Path) -> Trainer:
    """A Lightning Trainer stripped of everything that costs time per step; ``epoch`` counts steps.

    It sees one endless epoch (a :class:`FrameStream`), so that all limits and intervals are in steps.
    """
    limits = [settings.max_steps, None if settings.max_epochs is None else settings.max_epochs * epoch]
    multiple = settings.processes > 1
    return Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu", "auto": "auto"}[settings.device],
        devices=settings.processes if multiple or settings.device != "auto" else "auto",
        strategy="ddp_find_unused_parameters_true" if multiple else "auto",
        max_epochs=-1,
        max_steps=min((limit for limit in limits if limit is not None), default=-1),
        # Validation by steps: an epoch may be 10 of them or 100,000.
        val_check_interval=settings.validate_every if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        use_distributed_sampler=False,
    )


def fit(
    potential: Potential | PropertyModel,
    train: Sequence[Data],
    val: Sequence[Data] = (),
    settings: TrainingConfig | None = None,
    folder: str | Path = "run",
    resume: str | Path | None = None,
    show_progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train a potential, or a model of properties, in place.

    Writes ``metrics.csv``, ``last.ckpt`` and (with validation frames) ``best.ckpt`` into ``folder``; ``last.ckpt``
    every ``validate_every`` steps, with or without validation.

    Args:
        train, val: frames with labels; where the model has a scheme, with its topology stored (apply the
            scheme to every frame once), or else it is searched for anew at every step.
        resume: a checkpoint from which to go on; the run continues as if it had never stopped.
        callbacks: further ones, called after ours and before the checkpoint is written.

    Frames need not have every label: what is missing, or NaN, is left out of the loss and of the errors. Periodic and
    open frames may be mixed.

    Raises: ValueError: no frames, or a label with a positive weight that none of them has; FloatingPointError: see
        the task.
    """
    settings = settings or TrainingConfig(max_epochs=100)
    folder = Path(folder)
    with _threads(settings.threads):
        kind = PropertyTask if isinstance(potential, PropertyModel) else PotentialTask
        found = targets(potential, train, val, settings)
        train, val = found.train, found.val
        task = kind(potential, settings, force_variance(train))
        task.shares = found.shares
        task.monitor = deciding_metric(potential, val, settings, task.monitor)
        epoch = steps_per_epoch(settings, len(train))
        log = MetricsCSV(folder / "metrics.csv", settings.log_every, epoch)
        log.columns = (*log.columns, *(metric for _, metric, _ in task.shown if metric not in log.columns))
        stop = GracefulStop()
        checkpoints = Checkpoints(folder, task.monitor, None if val else settings.validate_every)
        group: list[Callback] = [WeightEMA(settings.ema_decay)] if settings.ema_decay else []
        progress = [RunProgress(log, settings.log_every)] if show_progress else []
        group += [log, *progress, *callbacks, stop, checkpoints]
        with _quiet(), steady_process():
            trainer = make_trainer(settings, [CallbackGroup(group)], epoch, bool(val), folder)
            stream = FrameStream(FrameLoader(train, settings.batch_size, shuffle=True, seed=settings.seed))
            evaluation = FrameLoader(val, 4 * settings.batch_size) if val else None
            trainer.fit(task, stream, evaluation, ckpt_path=resume, weights_only=True if resume else None)
    potential.eval()
    return FitResult(
        potential,
        steps=trainer.global_step,
        epochs=trainer.global_step // epoch,
        cpu_seconds=task.clock.elapsed,
        best_score=checkpoints.best_score,
        best_step=checkpoints.best_step,
        interrupted=stop.received,
        monitor=task.monitor.removeprefix("val_"),
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice on workers, loggers and unset limits does not apply to this loop."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            # Notices about Lightning's own calls into torch and PyTorch's into itself.
            warnings.filterwarnings("ignore", module=r"(lightning|torch)\..*")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
