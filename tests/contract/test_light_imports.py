"""Importing the package takes hardly longer than importing torch and PyG: what is heavy waits until it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Packages that take from a tenth of a second to seconds to import, and that no energy or force needs
HEAVY = ["lightning", "pytorch_lightning", "matplotlib", "torchmetrics", "pandas", "scipy", "jsonargparse", "IPython"]

# What torch and PyG load on their own account is not ours
SCRIPT = """
import importlib, json, sys
import torch, torch_geometric
before = set(sys.modules)
found = {}
for line in sys.argv[2:]:
    exec(line)
    found[line] = sorted(set(json.loads(sys.argv[1])) & (set(sys.modules) - before))
print(json.dumps(found))
"""


def _heavy(root, *lines: str) -> dict[str, list[str]]:
    """The heavy packages that a fresh interpreter has loaded after each of some lines of Python."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), *lines],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


LIGHT = [
    "from nbody_pyg import *",
    "from nbody_pyg.deploy import NBodyCalculator, load_model, save_model, relax",
    "from nbody_pyg.testing import *",
    "from nbody_pyg.datasets import *",
]


@pytest.mark.slow
def test_importing_loads_nothing_heavy(root):
    """The last two lines, which do, show that it would be seen."""
    dynamics, pictures = "from nbody_pyg.deploy import run_md", "import nbody_pyg, matplotlib.figure"
    found = _heavy(root, *LIGHT, dynamics, pictures)
    assert not any(found[line] for line in LIGHT), found
    assert "scipy" in found[dynamics] and "matplotlib" in found[pictures]


@pytest.mark.parametrize("name", ["nbody_pyg", "nbody_pyg.deploy", "nbody_pyg.training"])
def test_names_that_wait_are_all_there(name, modules):
    module = modules[name]
    assert set(module.__all__) <= set(dir(module))
    for public in module.__all__:
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018
