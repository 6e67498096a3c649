"""Old name of :mod:`nbody_pyg.compiled`."""

from __future__ import annotations

import warnings
from typing import Any

from nbody_pyg import compiled


def __getattr__(name: str) -> Any:
    if name not in ("CompiledPotential", "compile_potential"):
        raise AttributeError(name)
    text = "nbody_pyg.accelerate is now called nbody_pyg.compiled; it will go in 0.4"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return getattr(compiled, name)
