"""Composition schemes: parts and their children, level by level."""

from nbody_pyg.hierarchy.assignment import FromAssignment
from nbody_pyg.hierarchy.bonds import BondTree
from nbody_pyg.hierarchy.levels import EdgeSet, Hierarchy, Level
from nbody_pyg.hierarchy.pieces import ShellsAndPieces
from nbody_pyg.hierarchy.plot import plot_hierarchy
from nbody_pyg.hierarchy.scheme import LevelSpec, Scheme
from nbody_pyg.hierarchy.sharing import share_topology
from nbody_pyg.hierarchy.shells import NestedShells
from nbody_pyg.hierarchy.skin import TopologyCache
from nbody_pyg.hierarchy.survivors import SmoothSurvivors
from nbody_pyg.hierarchy.topology import Topology

__all__ = [
    "BondTree",
    "EdgeSet",
    "FromAssignment",
    "Hierarchy",
    "Level",
    "LevelSpec",
    "NestedShells",
    "Scheme",
    "ShellsAndPieces",
    "SmoothSurvivors",
    "Topology",
    "TopologyCache",
    "plot_hierarchy",
    "share_topology",
]
