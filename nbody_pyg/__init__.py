"""Covariant hierarchical N-body networks for atoms, as a PyTorch Geometric library."""

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import (
    BondTree,
    FromAssignment,
    Hierarchy,
    NestedShells,
    Scheme,
    SmoothSurvivors,
    Topology,
    share_topology,
)
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import AtomicReference, Potential

__all__ = [
    "AtomicData",
    "AtomicReference",
    "BondTree",
    "FromAssignment",
    "Hierarchy",
    "NBodyNet",
    "NestedShells",
    "Potential",
    "Scheme",
    "SmoothSurvivors",
    "Topology",
    "__version__",
    "share_topology",
]

__version__ = "0.1.0"
