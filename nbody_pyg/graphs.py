"""Old name of :mod:`nbody_pyg.cuda_graphs`."""

from __future__ import annotations

import warnings
from typing import Any

from nbody_pyg import cuda_graphs


def __getattr__(name: str) -> Any:
    if name not in ("CapturedPotential", "CapturedStep"):
        raise AttributeError(name)
    text = "nbody_pyg.graphs is now called nbody_pyg.cuda_graphs; it will go in 0.4"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return getattr(cuda_graphs, name)
