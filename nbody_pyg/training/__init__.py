"""Training: data in batches, loss, schedule, averaging and the loop."""

from nbody_pyg.training.ema import WeightEMA
from nbody_pyg.training.finetune import tuned_model
from nbody_pyg.training.labels import force_variance
from nbody_pyg.training.loader import EpochSampler, FrameLoader
from nbody_pyg.training.loss import EnergyForceLoss
from nbody_pyg.training.metrics import ErrorMeter
from nbody_pyg.training.optim import build_optimizer
from nbody_pyg.training.run import FitResult, fit
from nbody_pyg.training.schedule import WarmupCosine
from nbody_pyg.training.settings import FineTuneConfig, TrainingConfig
from nbody_pyg.training.task import PotentialTask
from nbody_pyg.training.trainer import Callback, Trainer

__all__ = [
    "Callback",
    "EnergyForceLoss",
    "EpochSampler",
    "ErrorMeter",
    "FineTuneConfig",
    "FitResult",
    "FrameLoader",
    "PotentialTask",
    "Trainer",
    "TrainingConfig",
    "WarmupCosine",
    "WeightEMA",
    "build_optimizer",
    "fit",
    "force_variance",
    "tuned_model",
]
