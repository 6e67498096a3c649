"""The command line: nbody train, evaluate, info, md, hierarchy, compare."""

from nbody_pyg.cli.main import main

__all__ = ["main"]
