"""The package as source, for the tests that read code rather than run it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, ast.Module]:
    """Dotted module name -> syntax tree, for every module of the package."""
    trees = {}
    for path in sorted((ROOT / "nbody_pyg").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


@pytest.fixture(scope="session")
def modules() -> dict[str, ModuleType]:
    """Dotted module name -> the imported module, for every module of the package."""
    package = importlib.import_module("nbody_pyg")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, "nbody_pyg.")]
    names = [name for name in names if not name.endswith("__main__")]
    return {"nbody_pyg": package} | {name: importlib.import_module(name) for name in names}
