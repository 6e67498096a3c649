"""The command line: nbody train, evaluate, info, md, hierarchy."""

from nbody_pyg.cli.main import main

__all__ = ["main"]
