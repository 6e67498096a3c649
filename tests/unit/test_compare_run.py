"""nbody compare for real, on ten frames: two models, a search, tables, curves, resuming, plots."""

from __future__ import annotations

import dataclasses
import json
import os
import re
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
from nbody_pyg.compare import runner as runner_module
from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point, WrongData, _own_checkpoint, failed_record, run_point
from nbody_pyg.compare.report import comparison_rows, groups, load_records
from nbody_pyg.compare.runner import Runner, Stopped
from nbody_pyg.datasets import load_embedded
from nbody_pyg.datasets.convert import ConvertConfig, convert

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
        for frame in load_embedded("ethanol", split)[:count]:
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


@pytest.mark.slow
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
        # The network as it was built for these frames
        assert record.get("network", {}).get("channels") == (4 if record["point"]["model"] == "nbody" else None)
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


@pytest.mark.slow
def test_what_was_chosen_is_best_on_the_validation_frames(folder):
    records = load_records(folder)
    for model in ("nbody", "schnet"):
        mine = [r for r in records if r["point"]["model"] == model]
        best = min((r for r in mine if r["point"]["purpose"] == "search"), key=lambda r: r["val"]["forces_mae"])
        (final,) = [r for r in mine if r["point"]["purpose"] == "final"]
        for key in ("optimizer", "lr"):
            assert final["point"]["training"][key] == best["point"]["training"][key]


@pytest.mark.slow
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


def _interpreter(folder: Path, does: str) -> str:
    """What stands in for the Python of a peer."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [
        ("echo 'missing: pip install it'; exit 3", MissingPeer, "^pip install it$"),
        ("echo 'data: no such file'; exit 4", WrongData, "^no such file$"),
        ("sleep 1; kill -TERM $PPID; sleep 0.5; exit 143", Stopped, "stopped by SIGTERM; the same command goes on"),
    ],
)
def test_what_ends_more_than_one_run(frames, tmp_path, does, error, message):
    runner = Runner(tmp_path, {"schnet": _interpreter(tmp_path, does)}, note=lambda _: None)
    with pytest.raises(error, match=message):
        runner(_point(frames, max_steps=3))
    assert not list(tmp_path.rglob("record.json")) and not list(tmp_path.rglob("failed.json"))


def test_a_signal_that_takes_long_to_hand_on_does_not_stop_the_watch(frames, tmp_path, monkeypatch):
    """A queue.SimpleQueue waits for ever where a handler outlasts the time that it was to wait for."""
    send = subprocess.Popen.send_signal

    def slowly(process, number):
        time.sleep(0.5)
        send(process, number)

    monkeypatch.setattr(subprocess.Popen, "send_signal", slowly)
    does = "sleep 1; kill -TERM $PPID; sleep 30"
    runner = Runner(tmp_path, {"schnet": _interpreter(tmp_path, does)}, note=lambda _: None)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        runner(_point(frames, max_steps=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("echo 'KeyError: no such thing' >&2; exit 1", r"KeyError: no such thing \(status 1\) \(more in .*errors.txt"),
        ("exit 3", r"an error \(status 3\)"),
        ("kill -TERM $$", "the process was ended by SIGTERM"),
        ("kill -KILL $$", "ended by SIGKILL; is there memory enough"),
        ("exit 0", "the process left no record"),
        ("echo alive; exec sleep 60", "not ready after 1 s, and ended; --timeout allows more"),
    ],
)
def test_a_run_that_dies_or_hangs_is_recorded_as_failed(frames, tmp_path, does, reason):
    """Its process may leave another behind that holds the pipe, and is no reason to wait."""
    does = f"sleep 30 &\necho $! > {tmp_path}/pid\n{does}"
    runner = Runner(tmp_path, {"schnet": _interpreter(tmp_path, does)}, note=lambda _: None, timeout=1)
    began = time.monotonic()
    record = runner(_point(frames, max_steps=3))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert time.monotonic() - began < 25  # the child that holds the pipe would take 30
    assert record["status"] == "failed" and re.search(reason, record["reason"])
    assert not list(tmp_path.rglob("record.json"))
    (kept,) = load_records(tmp_path, note=lambda _: None)
    assert kept["reason"] == record["reason"]  # and --report shows it
    (group,) = groups([kept])
    head, rows = comparison_rows(group)
    assert rows[0][head.index("F MAE meV/A")] == "failed"


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


@pytest.mark.slow
def test_one_model_that_dies_does_not_end_the_others(frames, tmp_path, capsys):
    """The row says so, the others go on, the table is written, the exit status tells."""
    words = [*_words(frames, tmp_path / "out", "--steps 3 --optimizers adam --seeds 0"), "--isolate", "false"]
    words += ["--python", f"schnet={_interpreter(tmp_path, 'echo OSError: broken >&2; exit 1')}"]
    assert main(words) == 3
    out = capsys.readouterr().out
    assert "failed: train, schnet, adam, lr 0.001, seed 0, 3 steps: OSError: broken (status 1)" in out
    page = (tmp_path / "out/table.md").read_text()
    (ours,) = (line for line in page.splitlines() if "NBodyNet" in line)
    (theirs,) = (line for line in page.splitlines() if line.startswith("| SchNet"))
    assert theirs.endswith("| failed | failed |") and "failed" not in ours
    assert main(["compare", "--report", "--out", str(tmp_path / "out")]) == 3  # what is there tells the same
    assert "OSError: broken" in capsys.readouterr().out
    assert main(words[: words.index("--python")]) == 0, "what failed is done again, and works"
    assert not list((tmp_path / "out").rglob("failed.json"))


@pytest.mark.slow
@pytest.mark.parametrize("content", ['{"point": {"na', "", "[]", '{"point": {}}', "\x00\xff"])
def test_a_damaged_record_is_named_and_done_again(frames, tmp_path, content):
    point, notes = _point(frames, max_steps=2), []
    path = tmp_path / "points" / point.folder / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    told: list[str] = []
    assert load_records(tmp_path, note=told.append) == []
    assert len(told) == 1 and f"left out: {path} is damaged" in told[0]
    record = Runner(tmp_path, isolate=False, note=notes.append)(point)
    assert record["status"] == "done" and f"{path} is damaged" in notes[0]
    assert path.with_name("damaged.json").read_text() == content
    assert len(load_records(tmp_path)) == 1


@pytest.mark.slow
def test_results_of_other_files_are_not_taken(frames, tmp_path):
    """A file that has changed under its name is another run."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.xyz").write_bytes((frames / f"{name}.xyz").read_bytes())
    point, notes = _point(tmp_path, max_steps=2), []
    runner = Runner(tmp_path / "out", isolate=False, note=notes.append)
    first = runner(point)
    assert runner(point)["val"] == first["val"] and "there already" in notes[-1]
    lines = (tmp_path / "train.xyz").read_text().splitlines(keepends=True)
    (tmp_path / "train.xyz").write_text("".join(lines[11:] + lines[:11]))  # the first frame is the last now
    second = runner(point)
    assert any("train.xyz has changed since; its record is kept as outdated.json" in note for note in notes)
    assert second["val"] != first["val"]


@pytest.mark.slow
def test_a_file_of_the_folder_is_not_run_in_place_of_a_package(frames, tmp_path, monkeypatch):
    for name in ("tqdm", "torch", "json", "ase"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'planted')!r}, 'w'); raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")]))
    record = Runner(tmp_path / "out", note=lambda _: None)(_point(frames, max_steps=2))
    assert record["status"] == "done" and not (tmp_path / "planted").exists()


def test_failed_seeds_stand_beside_others(frames):
    good = failed_record(_point(frames, max_steps=2), "") | {"status": "done", "steps": 2, "cpu_seconds": 1.0}
    good |= {"val": {"forces_mae": 2.0}, "test": {"test": {"forces_mae": 3.0, "energy_mae": 1.0}}}
    bad = failed_record(_point(frames, max_steps=2, seed=1), "out of memory")
    (group,) = groups([bad, good])  # the failed one first
    head, rows = comparison_rows(group)
    assert rows[0][head.index("F MAE meV/A")] == "3.00"


def test_runs_that_differ_in_more_than_the_seed_are_other_rows(frames):
    """Of one folder, by `--report`: they used to be averaged as seeds of one another."""
    points = [
        _point(frames, max_steps=2),
        _point(frames, max_steps=2, force_weight=2.0),
        _point(frames, max_steps=2, seed=1),
    ]
    few = dataclasses.replace(points[0], data={**points[0].data, "num_val": 4})
    first, second = groups(failed_record(point, "") for point in (*points, few))
    assert [len(row.records) for row in first.rows] == [2, 1] and len(second.rows) == 1
    assert {row.note for row in first.rows} == {"training.force_weight None", "training.force_weight 2.0"}
    assert "num_val 3" in first.title and "num_val 4" in second.title


@pytest.mark.slow
def test_tables_of_another_comparison_are_kept(tmp_path, frames, capsys):
    words = [*_words(frames, tmp_path, "--steps 2 --optimizers adam --isolate false")]
    one, other = [w for w in words if w != "nbody"], [w for w in words if w != "schnet"]
    assert main(one) == 0
    before = (tmp_path / "table.md").read_text()
    assert main(one) == 0 and not (tmp_path / "table-1.md").exists()
    assert main(other[: other.index("--arguments.schnet")]) == 0
    assert (tmp_path / "table-1.md").read_text() == before
    assert "it is kept as table-1.md" in capsys.readouterr().out


def test_a_record_that_holds_no_longer_is_not_reported(frames, tmp_path, monkeypatch):
    """The data have changed, and the new run fails: a report must not show the errors of the old one."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.xyz").write_bytes((frames / f"{name}.xyz").read_bytes())
    point = _point(tmp_path, max_steps=2)
    path = tmp_path / "out" / "points" / point.folder / "record.json"
    path.parent.mkdir(parents=True)
    done = failed_record(point, "") | {"status": "done", "files": {str(tmp_path / "train.xyz"): "other"}}
    path.write_text(json.dumps(done))

    def fails(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(runner_module, "run_point", fails)
    runner = Runner(tmp_path / "out", isolate=False, note=lambda line: None)
    assert runner(point)["status"] == "failed"
    assert [record["status"] for record in load_records(tmp_path / "out")] == ["failed"]
    assert json.loads(path.with_name("outdated.json").read_text())["status"] == "done"


def test_a_checkpoint_of_other_data_is_not_resumed(frames, tmp_path):
    point, notes, files = _point(frames, max_steps=2), [], {"train.xyz": "a"}
    assert _own_checkpoint(point, tmp_path, files, notes.append) is None
    (tmp_path / "last.ckpt").touch()
    assert _own_checkpoint(point, tmp_path, files, notes.append) == tmp_path / "last.ckpt" and not notes
    assert _own_checkpoint(point, tmp_path, {"train.xyz": "b"}, notes.append) is None
    assert not (tmp_path / "last.ckpt").exists() and "is of other data or settings" in notes[0]


def test_frames_in_hdf5_files_are_refused(frames, tmp_path):
    """data.train is a sample of them, on which alone the models would be trained."""
    pytest.importorskip("h5py")
    convert(frames / "train.xyz", tmp_path / "units", ConvertConfig(num_val=1))
    point = _point(frames, max_steps=2)
    point = dataclasses.replace(point, data={**point.data, "train": str(tmp_path / "units"), "val": None})
    with pytest.raises(WrongData, match="HDF5 files"):
        run_point(point, tmp_path / "run")
