"""Let the benchmarks run where jsonargparse is not installed, as on a machine that only has torch, Triton and PyG.

Importing ``nbody_pyg.cli`` or ``compare`` imports the parser of configurations. The benchmarks want a few of their
modules that do not need it: without it, these packages are entered as bare folders before anything imports them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nbody_pyg


def enter_bare_packages(names: tuple[str, ...] = ("cli", "compare")) -> None:
    """Enter the packages without running their ``__init__``."""
    for name in names:
        full = f"nbody_pyg.{name}"
        if full not in sys.modules:
            module = ModuleType(full)
            module.__path__ = [str(Path(nbody_pyg.__file__).parent / name)]
            sys.modules[full] = module


def parser_is_missing() -> bool:
    try:
        return importlib.util.find_spec("jsonargparse") is None
    except ValueError:  # entered as None: to be treated as missing
        return True


if parser_is_missing():
    enter_bare_packages()
