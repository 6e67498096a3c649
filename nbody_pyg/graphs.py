"""Old name of :mod:`nbody_pyg.runtime.cuda_graphs`."""

from __future__ import annotations

from nbody_pyg.renamed import former_module
from nbody_pyg.runtime import cuda_graphs

__getattr__ = former_module(__name__, cuda_graphs, ("CapturedPotential", "CapturedStep"))
