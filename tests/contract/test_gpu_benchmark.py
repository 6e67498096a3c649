"""benchmarks/gpu.py at tiny sizes on the CPU: tables, bounds, checks and failures; figures are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nbody_pyg.kernels.gpu import build

needs_interpreter = pytest.mark.skipif(
    not build.available() or not build.interpreted(), reason="Triton is not installed, or a GPU runs it for real"
)


@pytest.fixture
def gpu(root, monkeypatch):
    """The script as a module; its neighbours are forgotten again afterwards."""
    folder = root / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    names = {path.stem for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    import gpu

    yield gpu
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def _run(gpu, tmp_path, *words: str) -> tuple[int, dict]:
    out = tmp_path / "gpu.json"
    status = gpu.main(["--device", "cpu", "--repeats", "1", "--out", str(out), *words])
    return status, json.loads(out.read_text())


@pytest.mark.slow
@needs_interpreter
def test_products_are_checked_then_timed(gpu, tmp_path, capsys):
    sizes = ("--lmax", "0", "--channels", "2", "--edges", "3")
    status, found = _run(gpu, tmp_path, *sizes, "--sections", "check", "edge", "node")
    assert status == 0 and not found["failed"]
    for record in found["results"]["check"]:
        assert 0 <= record["errors"]["nbody_pyg triton"] < 1e-10
    paths = {record["path"] for record in found["results"]["edge"]}
    assert {"e3nn", "nbody_pyg torch", "nbody_pyg triton"} <= paths
    first = found["results"]["edge"][0]
    assert first["bound_s"] > 0 and all(first[stage] > 0 for stage in gpu.STAGES)
    text = capsys.readouterr().out
    assert "fwd+bwd+dbl ms" in text and "x bound" in text and "float32 TFLOP/s" in text


def test_the_bound_is_the_larger_of_bytes_and_operations(gpu):
    peak = {"bytes_per_s": 4.0, "flop_per_s": 10.0}
    assert gpu.bound(gpu.Problem({}, flop=100.0, bytes=8.0), peak) == (10.0, "flop")
    assert gpu.bound(gpu.Problem({}, flop=10.0, bytes=8.0), peak) == (2.0, "bytes")


@pytest.mark.slow
@needs_interpreter
def test_a_wrong_kernel_fails_the_check_and_other_sections_go_on(gpu, tmp_path, monkeypatch, capsys):
    from nbody_pyg.kernels.gpu.product import ProductProgram

    right = ProductProgram.__call__
    monkeypatch.setattr(ProductProgram, "__call__", lambda self, x, y: right(self, x, y) * (1 + 1e-6))
    status, found = _run(gpu, tmp_path, "--lmax", "0", "--sections", "check", "hardware")
    assert status == 1 and found["failed"] == ["check"]
    assert "the kernels deviate from e3nn" in found["results"]["check"][0]["traceback"]
    assert found["hardware"]["bytes_per_s"] > 0
    assert "failed sections: check" in capsys.readouterr().out


@pytest.mark.slow
def test_models_on_a_device_and_missing_peers(gpu, tmp_path, capsys):
    words = ("--waters", "1", "--batches", "1", "--backends", "torch", "--models", "NBodyNet", "PaiNN")
    status, found = _run(gpu, tmp_path, *words, "--sections", "model", "training")
    assert status == 0
    ours = [record for record in found["results"]["model"] if record["model"] == "NBodyNet"]
    assert [record["atoms"] for record in ours] == [22, 3] and all(record["seconds"] > 0 for record in ours)
    assert found["results"]["training"][0]["seconds"] > 0
    assert "eager us/atom" in capsys.readouterr().out


@pytest.mark.slow
def test_graphs_of_the_library_are_compared_then_timed(gpu, tmp_path, monkeypatch, capsys):
    """With a stand-in that runs again what it recorded; the mutant gives forces of before."""
    from nbody_pyg.runtime import cuda_graphs

    words = ("--waters", "4", "--batches", "2", "--sections", "graphs")
    status, found = _run(gpu, tmp_path, *words)
    assert status == 0 and found["results"]["graphs"] == [] and "CUDA graphs need a GPU" in capsys.readouterr().out

    class Again:
        device_type = "cpu"

        def capture(self, run, device):
            return run

    monkeypatch.setattr(cuda_graphs, "CudaRecorder", Again)
    status, found = _run(gpu, tmp_path, *words)
    assert status == 0
    records = found["results"]["graphs"]
    assert [(r["task"], r["atoms"]) for r in records] == [("md", 22), ("md", 12), ("step", 44)]
    for record in records:
        assert record["captures"] == 1 and record["replays"] > 6
        assert record["error"] < 2e-4 and record["eager_s"] > 0 < record["graph_s"]
    assert "times faster" in capsys.readouterr().out

    def old(self, run, device):
        held = run()
        return lambda: held

    monkeypatch.setattr(Again, "capture", old)
    with pytest.warns(RuntimeWarning, match="results differ from eager mode"):
        status, found = _run(gpu, tmp_path, *words)
    assert status == 1 and found["failed"] == ["graphs"]


def test_no_section_starts_after_the_limit(gpu, tmp_path, capsys):
    status, found = _run(gpu, tmp_path, "--limit", "-1", "--sections", "hardware")
    assert status == 0 and found["results"] == {} and "out of time before hardware" in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs_without_the_parser(root, tmp_path):
    code = "import sys\nsys.modules['jsonargparse'] = None\n"
    code += f"import gpu\ngpu.main(['--device', 'cpu', '--sections', 'hardware', '--out', {str(tmp_path / 'o')!r}])"
    folders = os.pathsep.join([str(root), str(root / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "copy TB/s" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="Triton is not installed")
def test_all_kernels_compile_for_a_gpu_without_one_and_spill_nothing(root, tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--compile-only", "--lmax", "1", "--channels", "64"]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "0"}
    out = tmp_path / "r.json"
    done = subprocess.run([*command, "--out", str(out)], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())["resources"]
    assert len(records) == 16 and all(0 < record["registers"] <= 255 for record in records)
    # The sine of the radial functions reduces large angles in local memory; nothing else may use any
    assert all(record["spills"] == 0 for record in records if not record["kernel"].startswith("features"))
