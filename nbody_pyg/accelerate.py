"""Old name of :mod:`nbody_pyg.compiled`."""

from __future__ import annotations

import warnings

from nbody_pyg.compiled import *  # noqa: F403

warnings.warn(
    "nbody_pyg.accelerate is now called nbody_pyg.compiled; it will go in 0.4", DeprecationWarning, stacklevel=2
)
