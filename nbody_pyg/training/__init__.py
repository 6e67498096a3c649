"""Training: data in batches, loss, schedule, averaging and the Lightning task."""

from nbody_pyg.training.loader import EpochSampler, FrameLoader

__all__ = ["EpochSampler", "FrameLoader"]
