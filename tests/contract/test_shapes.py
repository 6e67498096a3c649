"""Shapes in signatures are true: the unit tests pass with every annotation checked at run time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_unit_tests_under_the_import_hook(root):
    if importlib.util.find_spec("beartype") is None:
        pytest.skip("checking shapes needs beartype, from the extra [dev]")
    command = [
        sys.executable, "-m", "pytest", "tests/unit", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
        "--jaxtyping-packages=nbody_pyg,beartype.beartype",
    ]  # fmt: skip
    run = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:]


def test_the_hook_rejects_a_wrong_type(root):
    """The check bites: where the hook is on, a tensor of integers is no vector."""
    script = """
import torch
from jaxtyping import install_import_hook
with install_import_hook("nbody_pyg", "beartype.beartype"):
    from nbody_pyg.geometry import safe_norm
try:
    safe_norm(torch.zeros(4, 3, dtype=torch.int64))
except Exception as error:
    print(type(error).__name__)
"""
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "TypeCheckError" in run.stdout
