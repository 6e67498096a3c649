"""The command line, from training to dynamics, in one process."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ase.io import read, write
from matplotlib import image

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.cli import main
from nbody_pyg.cli.tables import error_table, table
from nbody_pyg.datasets import embedded
from nbody_pyg.deploy import FORMAT_VERSION, load_model, read_metadata, save_model
from nbody_pyg.kernels import backend
from nbody_pyg.properties import Property, PropertyModel, property_irreps
from nbody_pyg.training.config import load_config

TINY = [
    "--data.embedded",
    "ethanol",
    "--data.num_train",
    "12",
    "--data.num_val",
    "4",
    "--model.channels",
    "4",
    "--model.lmax",
    "1",
    "--model.scheme.radii",
    "[4.0]",
    "--training.batch_size",
    "4",
    "--training.validate_every",
    "3",
    "--training.log_every",
    "1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of six steps."""
    path = tmp_path_factory.mktemp("run")
    assert main(["train", *TINY, "--training.max_steps", "6", "--output.folder", str(path)]) == 0
    return path


def test_train_leaves_model_log_and_plot(folder):
    names = {p.name for p in folder.iterdir()}
    assert names >= {"model.nbody", "config.yaml", "metrics.csv", "errors.json", "parity.png", "last.ckpt"}
    with (folder / "metrics.csv").open() as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    assert kinds.count("train") == 6 and kinds.count("val") == 2
    written = load_config(folder / "config.yaml")
    assert written.model.scheme == read_metadata(folder / "model.nbody")["model"]["config"]["scheme"]
    assert {"radii", "exponent"} <= set(written.model.scheme), "defaults are written down"
    kept = read_metadata(folder / "model.nbody")["model"]["config"]
    assert written.model.arguments["body_order"] == kept["body_order"] > 0
    assert written.model.arguments["num_basis"] == kept["num_basis"]
    record = read_metadata(folder / "model.nbody")["metadata"]
    assert record["steps"] == 6 and set(record["errors"]) == {"val", "300K", "600K"}
    assert image.imread(folder / "parity.png").std() > 0.05


def test_train_prints_audit_and_table(tmp_path, capsys):
    words = ["--training.max_steps", "2", "--output.folder", str(tmp_path), "--output.plot", "false"]
    assert main(["train", *TINY, *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +forces +forces +12/12", out) and "F MAE meV/A" in out
    assert "2 steps" in out and "600K" in out
    assert not (tmp_path / "parity.png").exists()


def test_train_from_a_file_and_resume(tmp_path, capsys):
    frames = [frame.to_ase() for frame in embedded("ethanol")[:14]]
    write(tmp_path / "frames.xyz", frames)
    (tmp_path / "c.yaml").write_text(
        f"data: {{train: {tmp_path}/frames.xyz, num_val: 4}}\n"
        "model: {scheme: {name: NestedShells, radii: [4.0]}, channels: 4, lmax: 1}\n"
        f"training: {{max_steps: 3, batch_size: 5, validate_every: 2}}\noutput: {{folder: {tmp_path}/run}}\n"
    )
    assert main(["train", f"{tmp_path}/c.yaml"]) == 0
    more = ["--training.max_steps", "5", "--output.resume", "true", "--output.weights", "last"]
    assert main(["train", f"{tmp_path}/c.yaml", *more]) == 0
    assert "5 steps" in capsys.readouterr().out
    assert read_metadata(tmp_path / "run/model.nbody")["metadata"]["weights"] == "last (step 5)"
    before = (tmp_path / "run/config.yaml").read_bytes()
    assert b"max_steps: 5" in before
    wider = ["--model.scheme.radii", "[4.5]", "--training.max_steps", "9", "--output.resume", "true"]
    assert main(["train", f"{tmp_path}/c.yaml", *wider]) == 1
    assert "model.scheme.radii is [4.0] there, [4.5] here" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_evaluate_agrees_with_training_and_writes_predictions(folder, tmp_path, capsys):
    model = str(folder / "model.nbody")
    assert main(["evaluate", model, "ethanol:test_300K", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "errors.json").read_text())[0]
    expected = read_metadata(model)["metadata"]["errors"]["300K"]
    assert found["forces_mae"] == pytest.approx(expected["forces_mae"], rel=1e-5) and found["forces_mae"] > 0
    assert "E/atom MAE meV" in capsys.readouterr().out
    atoms = read(tmp_path / "ethanol_test_300K_predictions.xyz", 0)
    label = embedded("ethanol", "test_300K")[0]
    assert atoms.info["REF_energy"] == pytest.approx(float(label.energy))
    potential = load_model(model)
    assert atoms.get_potential_energy() == pytest.approx(float(potential(label)["energy"]), abs=1e-4)
    assert (tmp_path / "parity.png").stat().st_size > 10_000


def test_evaluate_two_models_and_frames_without_labels(folder, tmp_path, capsys):
    model = str(folder / "model.nbody")
    atoms = embedded("ethanol")[0].to_ase()
    atoms.calc = None
    write(tmp_path / "bare.xyz", atoms)
    assert main(["evaluate", model, str(tmp_path / "bare.xyz"), "--out", str(tmp_path / "a")]) == 0
    assert "predictions only" in capsys.readouterr().out
    other = tmp_path / "other.nbody"
    other.write_bytes((folder / "model.nbody").read_bytes())
    words = [model, str(other), "ethanol:test_600K", "--out", str(tmp_path / "b"), "--no-plot"]
    assert main(["evaluate", *words]) == 0
    out = capsys.readouterr().out
    assert "model " in out and "other " in out and not list((tmp_path / "b").glob("*.png"))


def test_info(folder, capsys):
    assert main(["info", str(folder / "model.nbody")]) == 0
    out = capsys.readouterr().out
    assert "H C O" in out and "NestedShells" in out and "same here" in out and "600K" in out
    assert re.search(rf"products here +{backend()}", out)
    assert main(["info", str(folder / "model.nbody"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == FORMAT_VERSION


def test_info_verifies_and_controls_no_terminal(folder, tmp_path, capsys):
    assert main(["info", str(folder / "model.nbody")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"checksum +[0-9a-f]{16} \(matches; it covers all of it\)", out) and "all finite" in out
    metadata = {"steps": "\x1b[2J", "errors": {"\x1b]0;title\x07": {"forces_mae": 1.5, "energy_mae": None}}}
    save_model(load_model(folder / "model.nbody"), tmp_path / "m.nbody", metadata)
    assert main(["info", str(tmp_path / "m.nbody")]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and "\\x1b]0;title\\x07" in out and "1.50" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    save_model(load_model(folder / "model.nbody"), tmp_path / "m.nbody", {"errors": [1, 2]})
    assert main(["info", str(tmp_path / "m.nbody")]) == 1
    assert "entries of another form than this version writes; see --json" in capsys.readouterr().err
    data = (tmp_path / "m.nbody").read_bytes()
    (tmp_path / "m.nbody").write_bytes(data.replace(b"forces", b"forceS", 1))
    assert main(["info", str(tmp_path / "m.nbody")]) == 1
    assert "its content does not match the checksum" in capsys.readouterr().err


def test_info_about_this_machine(capsys, monkeypatch, tmp_path):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"products +{backend()}", out) and re.search(r"backends +.*torch", out)
    assert re.search(r"cache +/.*kernels \(used\)", out) or "not used" in out
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path / "file"))
    assert main(["info", "--json"]) == 0
    assert "every process compiles anew" in json.loads(capsys.readouterr().out)["cache"]


def test_md(folder, tmp_path, capsys):
    write(tmp_path / "start.xyz", embedded("ethanol")[0].to_ase())
    words = ["--steps", "20", "--every", "5", "--out", str(tmp_path / "md"), "--dtype", "float64"]
    assert main(["md", str(folder / "model.nbody"), str(tmp_path / "start.xyz"), *words]) == 0
    assert "drift" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "md").iterdir()} == {"md.log", "trajectory.xyz", "energy.png"}
    assert len(read(tmp_path / "md/trajectory.xyz", ":")) == 5
    words += ["--overwrite"]
    assert main(["md", str(folder / "model.nbody"), str(tmp_path / "start.xyz"), "--ensemble", "langevin", *words]) == 0


def test_hierarchy(folder, tmp_path, capsys):
    assert main(["hierarchy", "ethanol", "--set", "cutoff=4", "--plot", str(tmp_path / "h.png")]) == 0
    out = capsys.readouterr().out
    assert "BondTree" in out and "root" in out and "valid" in out
    assert (tmp_path / "h.png").stat().st_size > 10_000
    assert main(["hierarchy", "ethanol", "--model", str(folder / "model.nbody")]) == 0
    assert "NestedShells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--training.lrr", "1"], "unknown key training.lrr; did you mean training.lr?"),
        (["train", "a.yaml", "b.yaml"], "train takes one configuration file, got a.yaml and b.yaml"),
        (["train", "nothing.yaml"], "no configuration file at nothing.yaml"),
        (["train", *TINY, "--output.resume", "true", "--training.max_steps", "1"], "there is no"),
        (["info", "nothing.nbody"], "no model file at nothing.nbody"),
        (["md", "nothing.nbody", "nothing.xyz"], "no structure at nothing.xyz"),
        (["hierarchy", "ethanol", "--set", "cut=4"], "--set takes KEY=VALUE with KEY among"),
        (["hierarchy", "ethanol", "--set", "cutoff=[4"], "--set cutoff=[4 is no YAML: while parsing a flow sequence"),
        (["hierarchy", "nothing.xyz"], "no structure at nothing.xyz"),
        (["hierarchy", "ethanol", "--scheme", "Bondtree"], "did you mean BondTree?"),
    ],
)
def test_errors_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nbody {words[0]}: error: ") and message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [["energies", "ethanol"], ["check"], ["relax", "ethanol"], ["md", "ethanol.xyz"]])
def test_models_of_properties_are_no_potentials(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    properties = [Property("gap", "intensive", "eV")]
    net = NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=4, irreps_out=str(property_irreps(properties)))
    save_model(PropertyModel(net, properties), "gap.nbody")
    write("ethanol.xyz", embedded("ethanol")[0].to_ase())
    assert main([words[0], "gap.nbody", *words[1:]]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nbody {words[0]}: error: potential must give energies and forces, got a PropertyModel")
    assert "(gap.nbody)" in error and error.count("\n") == 1


@pytest.mark.slow
def test_sigterm_ends_with_its_status_and_a_checkpoint_to_go_on_from(tmp_path):
    words = [*TINY, "--training.max_steps", "1000000", "--output.folder", str(tmp_path)]
    code = "import sys; from nbody_pyg.cli import main; sys.exit(main())"
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *words],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "last.ckpt").exists():  # written by the first validation
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by signal 15 after step" in out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] > 2


def test_help(capsys):
    assert main(["train", "--help"]) == 0
    assert "--training.budget_seconds" in capsys.readouterr().out
    for words in (["--help"], ["evaluate", "--help"], ["md", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["info", "a.nbody", "--wrong"])
    assert stop.value.code == 2


def test_table_is_aligned():
    text = table(["name", "value"], [("a", 1.0), ("long", 123.456), ("none", None)]).splitlines()
    assert text == ["name   value", "----  ------", "a       1.00", "long  123.46", "none       -"]
    assert error_table({("m", "s"): {"energy_mae": 1.0}}).splitlines()[0].startswith("set  E MAE meV")
