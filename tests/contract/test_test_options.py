"""Options of our tests: ``--annotations`` notices a false annotation, and nothing else; parts are the whole."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("beartype", reason="checking shapes needs beartype, from the extra [dev]")

# A norm of integers works, although its signature says floats
TEST = """
import torch

def test_norm():
    from nbody_pyg.geometry import safe_norm
    assert safe_norm(torch.ones(4, 3, dtype=torch.{dtype})).shape == (4,)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_a_false_annotation_is_noticed(root, tmp_path, dtype, processes):
    (tmp_path / "test_norm.py").write_text(TEST.format(dtype=dtype))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", processes, "-p", "annotations"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in run.stdout, run.stdout + run.stderr
    assert run.returncode == (dtype == "int64")
    assert ("nbody_pyg.geometry.safe_norm: parameter vec" in run.stdout) == (dtype == "int64")


@pytest.mark.slow
def test_parts_of_the_tests_are_the_whole(root):
    """``--part K/N``, by which CI runs a part of the slow tests."""

    def collect(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/unit/test_geometry.py", *options]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    def names(*options: str) -> list[str]:
        return [line for line in collect(*options).stdout.splitlines() if "::" in line]

    parts = [names("--part", f"{part}/2") for part in (0, 1)]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(names())
    functions = [{name.partition("[")[0] for name in part} for part in parts]
    assert not functions[0] & functions[1]
    wrong = collect("--part", "2/2")
    assert wrong.returncode == 4
    assert "--part must be K/N with 0 <= K < N, got '2/2'" in wrong.stderr
