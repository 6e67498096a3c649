"""Old name of :mod:`nbody_pyg.cuda_graphs`."""

from __future__ import annotations

from nbody_pyg import cuda_graphs
from nbody_pyg.renamed import former_module

__getattr__ = former_module(__name__, cuda_graphs, ("CapturedPotential", "CapturedStep"))
