"""Neither importing nor calling the package changes the state of the process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from nbody_pyg import NBodyNet, Potential

SEEDS = {"torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed"}
DEFAULTS = {"set_default_dtype", "set_default_device", "set_default_tensor_type"}

IMPORT_ALL = """
import importlib, json, os, pkgutil, random, sys, warnings
import numpy, torch
# What third parties do to the process when they are imported is theirs, not ours
import ase.io, e3nn.o3, jsonargparse, matplotlib, torch_geometric.data, vesin

def state():
    return {
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's default device": str(torch.get_default_device()),
        "torch's threads": torch.get_num_threads(),
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": [str(x) for x in numpy.random.get_state()],
        "Python's random state": hash(random.getstate()),
        "anomaly detection": torch.is_anomaly_enabled(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "TF32": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ),
        "warning filters": [str(f) for f in warnings.filters],
        "matplotlib's backend": matplotlib.rcParams._get("backend").__class__.__name__,
        "matplotlib's fonts": str(matplotlib.rcParams["font.size"]),
    }

before = state()
import nbody_pyg
for info in pkgutil.walk_packages(nbody_pyg.__path__, "nbody_pyg."):
    if not info.name.endswith("__main__"):
        importlib.import_module(info.name)
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""


@pytest.mark.slow
def test_import_changes_nothing(root):
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    changed = json.loads(run.stdout.splitlines()[-1])
    assert not changed, f"importing the package changed: {changed}"


def calls(sources, *besides):
    """Module and line of every call, with what is called; not in modules whose names begin as those ``besides``."""
    for name, tree in sources.items():
        if not name.startswith(besides):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    yield f"{name}:{node.lineno}", ast.unparse(node.func)


def test_no_call_sets_a_global_default(sources):
    # The peer puts back what another package has set
    found = calls(sources, "nbody_pyg.compare.peer")
    wrong = [f"{place} {call}" for place, call in found if call.split(".")[-1] in DEFAULTS]
    assert not wrong, f"torch's global defaults belong to the user: {wrong}"


def test_only_programs_seed_the_global_generators(sources):
    found = calls(sources, "nbody_pyg.training", "nbody_pyg.compare", "nbody_pyg.cli")
    wrong = [place for place, call in found if call in SEEDS]
    assert not wrong, f"a library takes a torch.Generator instead of seeding for everybody: {wrong}"


@pytest.fixture
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def _energy_and_forces(molecules, dtype):
    torch.manual_seed(0)
    model = NBodyNet.practical([1, 6, 8]).to(dtype)
    z, pos = molecules["methanol"]
    result = Potential(model, None)(z, pos)
    return result["energy"].detach(), result["forces"].detach()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64], indirect=True, ids=str)
def test_a_forward_pass_neither_reads_nor_writes_the_default_dtype(molecules, default_dtype, dtype):
    energy, forces = _energy_and_forces(molecules, dtype)
    assert torch.get_default_dtype() == default_dtype
    assert energy.dtype == torch.float64, "total energies are in float64"
    # The model starts from the default dtype, as any torch module; its results must still be of its own
    assert forces.dtype in (dtype, torch.float64)
    assert torch.isfinite(energy).all()
    assert forces.abs().max() > 0


@pytest.mark.slow
def test_results_in_float64_do_not_depend_on_the_default_dtype(molecules):
    z, pos = molecules["methanol"]
    torch.manual_seed(0)
    reference = NBodyNet.practical([1, 6, 8]).to(torch.float64)
    expected = Potential(reference, None)(z, pos)
    torch.set_default_dtype(torch.float64)
    try:
        # Built under another default: coefficients must be as exact, once the weights are the same
        other = NBodyNet.practical([1, 6, 8]).to(torch.float64)
        other.load_state_dict(reference.state_dict())
        found = Potential(other, None)(z, pos)
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected["energy"].abs().max() > 0
    torch.testing.assert_close(found["energy"], expected["energy"], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=0, atol=1e-10)
