"""nbody compare for real, on ten frames: two models, a search, tables, curves, resuming, plots."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from nbody_pyg.cli import main
from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point, run_point
from nbody_pyg.compare.report import load_records
from nbody_pyg.compare.runner import Runner, Stopped
from nbody_pyg.datasets import embedded

SMALL = (
    "--models nbody schnet --model.channels 4 --model.lmax 1 --batch_size 2 --points 3 "
    "--training.warmup_steps 2 --data.num_val 3"
)
SCHNET = "{hidden_channels: 8, num_filters: 8, num_interactions: 1, num_gaussians: 8}"


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """Files of thirteen and four frames of ethanol."""
    folder = tmp_path_factory.mktemp("frames")
    for name, split, count in (("train", "train", 13), ("test", "test_300K", 4)):
        atoms = []
        for frame in embedded("ethanol", split)[:count]:
            each = frame.to_ase()
            each.calc = SinglePointCalculator(each, energy=float(frame.energy), forces=frame.forces.numpy())
            atoms.append(each)
        ase.io.write(folder / f"{name}.xyz", atoms)
    return folder


def _words(frames: Path, out: Path, extra: str = "") -> list[str]:
    words = f"compare {SMALL} --data.train {frames}/train.xyz --data.test {frames}/test.xyz --out {out} {extra}"
    return [*words.split(), "--arguments.schnet", SCHNET]


@pytest.fixture(scope="module")
def folder(frames, tmp_path_factory) -> Path:
    """A finished comparison."""
    out = tmp_path_factory.mktemp("compare")
    extra = "--isolate false --steps 8 --search 1e-3 1e-2 --search_steps 4 --extend 0 --optimizers soap"
    assert main(_words(frames, out, extra)) == 0
    return out


def test_a_comparison_leaves_records_tables_and_plots(folder):
    records = load_records(folder)
    searches = [r for r in records if r["point"]["purpose"] == "search"]
    finals = [r for r in records if r["point"]["purpose"] == "final"]
    assert len(searches) == 2 * 2
    assert {r["point"]["model"] for r in finals} == {"nbody", "schnet"}
    for record in searches:
        assert record["test"] == {}
        assert "test" not in record["frames"]
        assert record["val"]["forces_mae"] > 0
    for record in finals:
        assert (record["status"], record["steps"]) == ("done", 8)
        assert record["frames"] == {"train": 10, "val": 3, "test": 4}
        assert record["test"]["test"]["forces_mae"] > 0
        assert record["cpu_seconds"] > 0
        assert record["latency"]["median_s"] >= record["latency"]["minimum_s"] > 0
        steps = [row["step"] for row in record["curve"]]
        assert steps == sorted(set(steps))
        assert steps[-1] == 8
        # The last point of the curve is the result: the same weights, the same frames.
        assert record["curve"][-1]["test"]["forces_mae"] == pytest.approx(record["test"]["test"]["forces_mae"])
    page = (folder / "table.md").read_text()
    for words in ("SchNet (PyG)", "NBodyNet", "F MAE meV/A", "10 train, 3 val, 4 test", "parameters", "against"):
        assert words in page
    assert len(json.loads((folder / "results.json").read_text())["finals"]) == 2
    assert len(list(folder.glob("*.png"))) == 2
    assert not list(folder.rglob("*.ckpt"))


def test_what_was_chosen_is_best_on_the_validation_frames(folder):
    records = load_records(folder)
    for model in ("nbody", "schnet"):
        mine = [r for r in records if r["point"]["model"] == model]
        best = min((r for r in mine if r["point"]["purpose"] == "search"), key=lambda r: r["val"]["forces_mae"])
        (final,) = [r for r in mine if r["point"]["purpose"] == "final"]
        for key in ("optimizer", "lr"):
            assert final["point"]["training"][key] == best["point"]["training"][key]


def test_finished_runs_are_not_run_again(frames, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}
    extra = "--isolate false --steps 8 --search 1e-3 1e-2 --search_steps 4 --extend 0 --optimizers soap"
    assert main(_words(frames, folder, extra)) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")} == before
    assert capsys.readouterr().out.count("there already") == len(before) == 6
    assert main(["compare", "--report", "--out", str(folder)]) == 0
    assert "F MAE meV/A" in capsys.readouterr().out


def test_report_of_nothing_is_an_error(tmp_path, capsys):
    assert main(["compare", "--report", "--out", str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err


def test_help_names_models_and_sections(capsys):
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    assert "tensornet" in text
    assert "--data.rmd17" in text


def _point(frames: Path, **training) -> Point:
    settings = {"optimizer": "adam", "lr": 1e-3, "batch_size": 2, "seed": 0, "warmup_steps": 2, **training}
    data = {"train": str(frames / "train.xyz"), "test": str(frames / "test.xyz"), "num_val": 3}
    arguments = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 8}
    return Point("schnet", "SchNet (PyG)", "schnet", arguments, data, settings, points=3)


@pytest.mark.slow
def test_a_budget_of_time_is_kept_and_the_curve_costs_nothing(frames, tmp_path):
    record = run_point(_point(frames, budget_seconds=0.4), tmp_path, note=lambda _: None)
    assert 0.4 <= record["cpu_seconds"] < 0.6
    assert [row["cpu_seconds"] for row in record["curve"]][-1] == pytest.approx(record["cpu_seconds"], abs=0.05)
    assert record["steps"] > 5


@pytest.mark.slow
def test_the_same_point_gives_the_same_result(frames, tmp_path):
    one, other = (run_point(_point(frames, max_steps=4), tmp_path / n, note=lambda _: None) for n in ("a", "b"))
    assert one["test"] == other["test"]


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_as_failed(frames, tmp_path):
    record = run_point(_point(frames, max_steps=40, lr=1e9, clip_norm=None), tmp_path, note=lambda _: None)
    assert record["status"] == "failed"
    assert "learning rate" in record["reason"] or "finite" in record["reason"]


@pytest.mark.slow
def test_a_process_of_its_own_and_a_missing_package(frames, tmp_path):
    notes: list[str] = []
    runner = Runner(tmp_path, note=notes.append)
    record = runner(_point(frames, max_steps=3))
    assert (record["status"], record["steps"]) == ("done", 3)
    assert any("CPU s" in line for line in notes)
    before = len(notes)
    assert runner(_point(frames, max_steps=3))["test"] == record["test"]
    assert notes[before:] == [f"{_point(frames, max_steps=3)}: there already"]
    with pytest.raises(ValueError, match="cannot run '/nowhere/python' for schnet"):
        Runner(tmp_path, {"schnet": "/nowhere/python"})(_point(frames, max_steps=5))


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [
        ("kill -TERM $$", Stopped, "stopped by signal 15; the same command goes on"),
        ("echo 'missing: pip install it'; exit 3", MissingPeer, "^pip install it$"),
        ("echo 'no such thing' >&2; exit 1", RuntimeError, "status 1:\nno such thing"),
    ],
)
def test_how_a_process_ends_is_told(frames, tmp_path, does, error, message):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    with pytest.raises(error, match=message):
        Runner(tmp_path, {"schnet": str(script)}, note=lambda _: None)(_point(frames, max_steps=3))
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.slow
def test_a_stopped_comparison_goes_on(frames, tmp_path):
    code = "import sys; from nbody_pyg.cli import main; sys.exit(main())"
    words = [w for w in _words(frames, tmp_path, "--budget 6 --optimizers adam") if w != "nbody"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, text=True, stdout=-1)
    for line in process.stdout:
        if "CPU s" in line:  # the first point of a curve: the training runs
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 143, rest
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert 0 < state["cpu_seconds"] < 6
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stdout
    (record,) = load_records(tmp_path)
    assert record["steps"] > state["global_step"]
    assert 6 <= record["cpu_seconds"] < 6.5
    assert len(record["curve"]) == 3
