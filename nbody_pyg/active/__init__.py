"""Active learning: potentials from few labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbody_pyg.active.settings import LearnConfig
from nbody_pyg.lazy_imports import imported_later

if TYPE_CHECKING:
    from nbody_pyg.active.labels import calculator, from_smiles
    from nbody_pyg.active.loop import Round, learn
    from nbody_pyg.active.report import plot_rounds, rounds_table

__all__ = ["LearnConfig", "Round", "calculator", "from_smiles", "learn", "plot_rounds", "rounds_table"]

# The settings alone, which the command line reads, need no torch
__getattr__ = imported_later(__name__, {
    "calculator": "labels", "from_smiles": "labels", "Round": "loop", "learn": "loop", "plot_rounds": "report",
    "rounds_table": "report",
})  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
