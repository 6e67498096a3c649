"""Covariant hierarchical N-body networks for atoms, as a PyTorch Geometric library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbody_pyg.data import AtomicData
    from nbody_pyg.energy import AtomicReference, EnergyTerm
    from nbody_pyg.hierarchy import (
        BondTree,
        FromAssignment,
        Hierarchy,
        NestedShells,
        Scheme,
        ShellsAndPieces,
        SmoothSurvivors,
        Topology,
        share_topology,
    )
    from nbody_pyg.models import NBodyNet
    from nbody_pyg.potential import Potential

__all__ = [
    "AtomicData",
    "AtomicReference",
    "BondTree",
    "EnergyTerm",
    "FromAssignment",
    "Hierarchy",
    "NBodyNet",
    "NestedShells",
    "Potential",
    "Scheme",
    "ShellsAndPieces",
    "SmoothSurvivors",
    "Topology",
    "__version__",
    "share_topology",
]

__version__ = "0.2.0"

_HOMES = {
    "AtomicData": "data",
    "NBodyNet": "models",
    "AtomicReference": "energy",
    "EnergyTerm": "energy",
    "Potential": "potential",
}


def __getattr__(name: str) -> object:
    """Public names and modules are imported when first asked for: torch takes seconds, which ``nbody --help`` has not.

    All at once, so that what one of them brings along (``nbody_pyg.nn``) is there as well.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    for public in __all__:
        if public != "__version__":
            module = importlib.import_module(f"{__name__}.{_HOMES.get(public, 'hierarchy')}")
            globals()[public] = getattr(module, public)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
