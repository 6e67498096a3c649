"""The package as source, for the tests that read code rather than run it."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture
def run_blocks(tmp_path) -> Callable[[list[str]], None]:
    """Runs the blocks of a page in one namespace, in order, as a reader would type them; skips a page without any."""

    def run(blocks: list[str]) -> None:
        if not blocks:
            pytest.skip("no Python on this page")
        script = tmp_path / "page.py"
        seeded = '__import__("torch").manual_seed(0)  # the same weights in every run, and no name for the page\n'
        script.write_text(seeded + "\n".join(blocks), encoding="utf-8")
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NBODY_SHORT": "1", "MPLBACKEND": "Agg"}
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


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
