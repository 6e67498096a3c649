"""Comparisons of potentials: adapters for other packages, one protocol for all models, tables and plots."""

from nbody_pyg.compare.config import CompareConfig, load_compare
from nbody_pyg.compare.graph import CutoffGraph
from nbody_pyg.compare.peer import Facts, MissingPeer, Peer
from nbody_pyg.compare.point import Point, run_point
from nbody_pyg.compare.protocol import Outcome, compare
from nbody_pyg.compare.registry import MODELS, build_peer
from nbody_pyg.compare.runner import Runner

__all__ = [
    "MODELS",
    "CompareConfig",
    "CutoffGraph",
    "Facts",
    "MissingPeer",
    "Outcome",
    "Peer",
    "Point",
    "Runner",
    "build_peer",
    "compare",
    "load_compare",
    "run_point",
]
