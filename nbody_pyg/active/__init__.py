"""Active learning: potentials from few labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nbody_pyg.active.settings import LearnConfig

if TYPE_CHECKING:
    from nbody_pyg.active.labels import calculator, from_smiles
    from nbody_pyg.active.loop import Round, learn
    from nbody_pyg.active.report import plot_rounds, rounds_table

__all__ = ["LearnConfig", "Round", "calculator", "from_smiles", "learn", "plot_rounds", "rounds_table"]

_LATER = {
    "calculator": "labels", "from_smiles": "labels", "Round": "loop", "learn": "loop", "plot_rounds": "report",
    "rounds_table": "report",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Imported at their first use, because the settings alone need no torch."""
    module = _LATER.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
