"""Further logs of a run: TensorBoard and Weights & Biases, with the values of ``metrics.csv``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nbody_pyg.training.callbacks import MetricsCSV
from nbody_pyg.training.trainer import Callback, Trainer


class RunLog(Callback):
    """Hands rows of training and validation to :meth:`write`; only the first process does.

    Args:
        folder: of the run.
        config: settings of the run, to be stored with the log.
        every: steps between two rows of training.
    """

    #: Module that it needs.
    needs: ClassVar[str]

    def __init__(self, folder: Path, config: Mapping[str, Any], every: int = 50) -> None:
        self.folder, self.config, self.every = folder, config, every
        self.open = False

    def start(self, trainer: Trainer) -> None:
        """Begin the log."""
        raise NotImplementedError

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by their names, such as ``val/forces_mae`` (units as in ``metrics.csv``)."""
        raise NotImplementedError

    def close(self) -> None:
        """End the log."""

    def on_start(self, trainer: Trainer) -> None:
        if trainer.first:
            self.start(trainer)
            self.open = True

    def on_step(self, trainer: Trainer) -> None:
        if self.open and trainer.step % self.every == 0:
            now = next((one.latest for one in trainer.callbacks if isinstance(one, MetricsCSV)), {})
            own = {"lr": trainer.learning_rate, "cpu_seconds": trainer.clock.elapsed}
            self.write(trainer.step, {f"train/{key}": value for key, value in (now | own).items()})

    def on_validation(self, trainer: Trainer, scores: Mapping[str, float]) -> None:
        if self.open:
            self.write(trainer.step, {f"val/{key}": value for key, value in scores.items()})

    def on_end(self, trainer: Trainer) -> None:
        if self.open:
            self.close()
            self.open = False


class TensorBoardLog(RunLog):
    """Event files in ``tensorboard/`` in the folder of the run: ``tensorboard --logdir FOLDER``."""

    needs = "torch.utils.tensorboard"

    def start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint of a resumed run are written again
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.step or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLog(RunLog):
    """A run of Weights & Biases in ``wandb/`` in the folder; project and mode come from its environment variables."""

    needs = "wandb"

    def start(self, trainer: Trainer) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]  # optional

        run = str(trainer.run["id"])
        self.session = wandb.init(dir=str(self.folder), id=run, resume="allow", config=dict(self.config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.session.log(dict(values), step=step)

    def close(self) -> None:
        self.session.finish()


#: The logs by their names in ``output.logger``.
LOGGERS: Mapping[str, type[RunLog]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog}


def run_log(name: str, folder: Path, config: Mapping[str, Any], every: int) -> RunLog:
    """The log of a name of :data:`LOGGERS`. Raises: ImportError: its package is not installed."""
    kind = LOGGERS[name]
    try:
        importlib.import_module(kind.needs)
    except ImportError as error:
        raise ImportError(
            f"output.logger {name!r} needs the package {name}; pip install {name}, or nbody_pyg[log]"
        ) from error
    return kind(folder, config, every)
