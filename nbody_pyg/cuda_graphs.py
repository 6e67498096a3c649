"""Public path of :mod:`nbody_pyg.runtime.cuda_graphs`."""

from nbody_pyg.runtime.cuda_graphs import CapturedPotential, CapturedStep

__all__ = ["CapturedPotential", "CapturedStep"]
