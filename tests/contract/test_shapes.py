"""Annotations are true: no call in the unit tests takes or returns what its signature forbids.

Shapes are annotated in jaxtyping's notation and cost nothing at run time; here they are checked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("beartype", reason="checking shapes needs beartype, from the extra [dev]")


@pytest.mark.slow
def test_annotations_hold_in_every_unit_test(root, tmp_path):
    report = tmp_path / "violations.txt"
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-n", "2"]
    hook = "--jaxtyping-packages=nbody_pyg,shape_recorder.record"
    command = [sys.executable, "-m", "pytest", "tests/unit", *options, hook]
    run = subprocess.run(command, cwd=root, env=_environment(root, report), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    violations = _violations(report)
    assert not violations, "\n".join(violations)


def test_a_false_annotation_is_noticed(root, tmp_path):
    """The check bites: a norm of integers works, although its signature says floats."""
    script = """
import torch
from jaxtyping import install_import_hook
with install_import_hook("nbody_pyg", "shape_recorder.record"):
    from nbody_pyg.geometry import safe_norm
safe_norm(torch.ones(4, 3))
safe_norm(torch.ones(4, 3, dtype=torch.int64))
"""
    report = tmp_path / "violations.txt"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=_environment(root, report),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (violation,) = _violations(report)
    assert violation.startswith("nbody_pyg.geometry.safe_norm: parameter vec")


def _environment(root, report) -> dict[str, str]:
    paths = os.pathsep.join([str(root), str(root / "tests" / "contract")])
    return os.environ | {"SHAPE_REPORT": str(report), "PYTHONPATH": paths}


def _violations(report) -> list[str]:
    return sorted({json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()})
