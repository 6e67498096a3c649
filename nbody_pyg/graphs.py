"""Old name of :mod:`nbody_pyg.cuda_graphs`."""

from __future__ import annotations

import warnings

from nbody_pyg.cuda_graphs import *  # noqa: F403

warnings.warn(
    "nbody_pyg.graphs is now called nbody_pyg.cuda_graphs; it will go in 0.4", DeprecationWarning, stacklevel=2
)
