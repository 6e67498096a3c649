"""Training: data in batches, loss, schedule, averaging and the Lightning task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbody_pyg.training.ema import WeightEMA
    from nbody_pyg.training.loader import EpochSampler, FrameLoader, FrameStream
    from nbody_pyg.training.loss import EnergyForceLoss
    from nbody_pyg.training.metrics import ErrorMeter
    from nbody_pyg.training.optim import build_optimizer
    from nbody_pyg.training.run import FitResult, fit, force_variance
    from nbody_pyg.training.schedule import WarmupCosine
    from nbody_pyg.training.settings import TrainingConfig
    from nbody_pyg.training.task import PotentialTask

__all__ = [
    "EnergyForceLoss",
    "EpochSampler",
    "ErrorMeter",
    "FitResult",
    "FrameLoader",
    "FrameStream",
    "PotentialTask",
    "TrainingConfig",
    "WarmupCosine",
    "WeightEMA",
    "build_optimizer",
    "fit",
    "force_variance",
]

_HOMES = {
    "EnergyForceLoss": "loss",
    "EpochSampler": "loader",
    "ErrorMeter": "metrics",
    "FitResult": "run",
    "FrameLoader": "loader",
    "FrameStream": "loader",
    "PotentialTask": "task",
    "TrainingConfig": "settings",
    "WarmupCosine": "schedule",
    "WeightEMA": "ema",
    "build_optimizer": "optim",
    "fit": "run",
    "force_variance": "run",
}


def __getattr__(name: str) -> object:
    """Public names are imported when first asked for: a model file is read, and a force computed, without Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
