"""The command line, from training to dynamics, in one process."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import read, write
from matplotlib import image

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.cli import main
from nbody_pyg.cli.evaluate import distinct_names
from nbody_pyg.cli.frames import read_atoms
from nbody_pyg.cli.main import build_parser
from nbody_pyg.cli.outputs import output_file, output_folder
from nbody_pyg.cli.reserved import unused_removed
from nbody_pyg.cli.tables import error_table, table
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import FORMAT_VERSION, NBodyCalculator, load_model, read_metadata, save_model
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
    assert written.model.arguments["correlation"] == kept["correlation"] > 0
    assert written.model.arguments["num_basis"] == kept["num_basis"]
    record = read_metadata(folder / "model.nbody")["metadata"]
    assert record["steps"] == 6 and set(record["errors"]) == {"val", "300K", "600K"}
    assert image.imread(folder / "parity.png").std() > 0.05


@pytest.mark.slow
def test_train_prints_audit_and_table(tmp_path, capsys):
    words = ["--training.max_steps", "2", "--output.folder", str(tmp_path), "--output.plot", "false"]
    assert main(["train", *TINY, *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +forces +forces +12/12", out) and "F MAE meV/A" in out
    assert "2 steps" in out and "600K" in out
    assert not (tmp_path / "parity.png").exists()


def test_train_from_a_file_and_resume(tmp_path, capsys):
    frames = [frame.to_ase() for frame in load_embedded("ethanol")[:14]]
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
    label = load_embedded("ethanol", "test_300K")[0]
    assert atoms.info["REF_energy"] == pytest.approx(float(label.energy))
    potential = load_model(model)
    assert atoms.get_potential_energy() == pytest.approx(float(potential(label)["energy"]), abs=1e-4)
    assert (tmp_path / "parity.png").stat().st_size > 10_000


@pytest.mark.slow
def test_evaluate_two_models_and_frames_without_labels(folder, tmp_path, capsys):
    model = str(folder / "model.nbody")
    atoms = load_embedded("ethanol")[0].to_ase()
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


def test_info_folds_long_values(capsys):
    assert main(["info", "organic"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 119 and "I-I " in out


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
    assert "entries in a form that this version does not know; see --json" in capsys.readouterr().err
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
    assert "every process compiles again" in json.loads(capsys.readouterr().out)["cache"]


def test_md(folder, tmp_path, capsys):
    write(tmp_path / "start.xyz", load_embedded("ethanol")[0].to_ase())
    words = ["--steps", "20", "--every", "5", "--out", str(tmp_path / "md"), "--dtype", "float64"]
    assert main(["md", str(folder / "model.nbody"), str(tmp_path / "start.xyz"), *words]) == 0
    assert "drift" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "md").iterdir()} == {"md.log", "trajectory.xyz", "checkpoint.npz", "energy.png"}
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


@pytest.mark.parametrize(
    "words", [["energies", "ethanol"], ["check"], ["relax", "ethanol"], ["infrared", "ethanol"], ["md", "ethanol.xyz"]]
)
def test_models_of_properties_are_no_potentials(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    properties = [Property("gap", "intensive", "eV")]
    net = NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=4, irreps_out=str(property_irreps(properties)))
    save_model(PropertyModel(net, properties), "gap.nbody")
    write("ethanol.xyz", load_embedded("ethanol")[0].to_ase())
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
    assert process.returncode == 143 and "stopped by SIGTERM after step" in out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] > 2


# -- nothing is overwritten unasked -------------------------------------------------------------------------
def test_a_trajectory_that_is_continued_is_not_erased(folder, tmp_path, monkeypatch, capsys):
    """The folder by default is a fresh one; one that is named must be free, or its fate be said."""
    monkeypatch.chdir(tmp_path)
    write("m.xyz", load_embedded("ethanol")[0].to_ase())
    model = str(folder / "model.nbody")
    assert main(["md", model, "m.xyz", "--steps", "20"]) == 0
    before = Path("md/trajectory.xyz").read_bytes()
    assert len(read("md/trajectory.xyz", ":")) == 3
    assert main(["md", model, "md/trajectory.xyz", "--steps", "5"]) == 0
    assert Path("md/trajectory.xyz").read_bytes() == before
    assert [frame.info["step"] for frame in read("md-1/trajectory.xyz", ":")] == [0, 5]
    assert np.allclose(read("md-1/trajectory.xyz", 0).get_momenta(), read("md/trajectory.xyz", -1).get_momenta())
    assert "those of the first structure" in capsys.readouterr().out
    assert main(["md", model, "m.xyz", "--steps", "5", "--out", "md"]) == 1
    assert "md/md.log exists; continue it with --restart" in capsys.readouterr().err
    assert main(["md", model, "md/trajectory.xyz", "--out", "md", "--overwrite"]) == 1
    assert "an input that would be replaced" in capsys.readouterr().err
    assert Path("md/trajectory.xyz").read_bytes() == before
    assert main(["md", model, "--steps", "5", "--out", "md", "--restart"]) == 0
    assert Path("md/trajectory.xyz").read_bytes().startswith(before)
    assert [frame.info["step"] for frame in read("md/trajectory.xyz", ":")] == [0, 10, 20, 25]
    assert len(Path("md/md.log").read_text().splitlines()) == 1 + 4
    assert Path("md/energy.png").exists() and Path("md/energy-20.png").exists()
    assert main(["md", model, "m.xyz", "--steps", "2", "--out", "md", "--overwrite"]) == 0
    assert len(read("md/trajectory.xyz", ":")) == 2 and not Path("md/energy-20.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "path", "option"),
    [
        (["hierarchy", "m.xyz", "--plot", "h"], "h.png", "--plot"),
        (["energies", "MODEL", "m.xyz", "--plot", "e.png"], "e.png", "--plot"),
        (["check", "MODEL", "--only", "symmetry", "--json", "c.json"], "c.json", "--json"),
        (["evaluate", "MODEL", "m.xyz", "--no-plot", "--out", "e"], "e/errors.json", "--out"),
    ],
)
def test_what_exists_is_replaced_only_when_that_is_said(folder, tmp_path, monkeypatch, capsys, words, path, option):
    monkeypatch.chdir(tmp_path)
    write("m.xyz", load_embedded("ethanol")[0].to_ase())
    words = [str(folder / "model.nbody") if word == "MODEL" else word for word in words]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("mine")
    assert main(words) == 1
    assert f"{path} exists; replace it with --overwrite" in capsys.readouterr().err
    assert Path(path).read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert Path(path).read_bytes()[:4] != b"mine"
    if option != "--out":
        own = ["m.xyz" if word in (path, "h") else word for word in words]
        if option == "--plot":
            own, source = [w.replace("m.xyz", "m.png") for w in own], Path("m.xyz").rename("m.png")
        before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
        assert main([*own, "--overwrite"]) in (0, 1)
        if option == "--plot":
            assert "--plot must not be an input of this command, got m.png" in capsys.readouterr().err
            assert source.read_bytes() == before[tmp_path / "m.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "START is missing: give a file with the start structure, or continue a run with --restart"),
        (["m.xyz", "--friction", "0.1"], "--friction needs --ensemble langevin"),
        (["--restart"], "nothing to continue: there is no md/trajectory.xyz"),
        (["--restart", "--overwrite"], "--restart and --overwrite exclude each other"),
        (["--restart", "--velocities", "drawn"], "--restart takes the velocities of the trajectory"),
        (["m.xyz"], "m.xyz was written without its constraints (FixBondLengths)"),
    ],
)
def test_options_of_dynamics_that_contradict_each_other(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    atoms = load_embedded("ethanol")[0].to_ase()
    atoms.info["constraints_left_out"] = "FixBondLengths"
    write("m.xyz", atoms)
    assert main(["md", str(folder / "model.nbody"), *words]) == 1
    assert message in capsys.readouterr().err and not Path("md").exists()


def test_commands_that_begin_together_take_other_names(tmp_path):
    """Names are taken before anything is written, and given back where nothing was."""
    default, file = str(tmp_path / "a"), str(tmp_path / "b.xyz")
    with unused_removed():
        folders = [output_folder(None, default, False, [], ["x*"]).name for _ in range(3)]
        assert folders == ["a", "a-1", "a-2"]
        assert [output_file(None, file, False, []).name for _ in range(3)] == ["b.xyz", "b-1.xyz", "b-2.xyz"]
        assert output_folder(None, default, True, [], ["x*"]).name == "a"
        assert output_file(None, file, True, []).name == "b.xyz"
        output_file(str(tmp_path / "c.xyz"), None, False, [])
        with pytest.raises(ValueError, match=r"c.xyz exists; replace it with --overwrite, or choose another file"):
            output_file(str(tmp_path / "c.xyz"), None, False, [])
        (tmp_path / "a-1/x").write_text("result")
        (tmp_path / "b-1.xyz").write_text("result")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1", "b-1.xyz"]


@pytest.mark.parametrize("command", ["relax", "solid", "infrared", "evaluate", "export"])
def test_a_failed_command_leaves_no_empty_result(folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "model.nbody", "m.nbody")
    Path("empty.xyz").write_text("")
    words = ["--to", "c", "--dtype", "float64"] if command == "export" else ["empty.xyz"]
    model = "none.nbody" if command == "export" else "m.nbody"
    assert main([command, model, *words]) == 1 and "error" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.xyz", "m.nbody"]


def test_a_place_where_nothing_can_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError) as error:
        output_file(str(tmp_path / "a.xyz"), None, True, [])
    assert error.value.filename == str(tmp_path / "a.xyz")


def test_a_comparison_without_its_device_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["compare", "--training.device", "cuda"]) == 2
    assert "device must be one of cpu on this machine, got 'cuda'; torch finds no GPU" in capsys.readouterr().err


# -- what is typed ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:7", "mps", "nonsense", "CUDA", "meta", ""])
@pytest.mark.parametrize("command", ["md", "evaluate"])
def test_a_device_that_is_not_there_is_one_line(device, command, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([command, "nothing.nbody", "nothing.xyz", f"--device={device}"]) == 2
    error = capsys.readouterr().err
    assert f"device must be one of cpu on this machine, got {device!r}" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nbody: error: name a command: train, compare"),
        (["trian"], "no command 'trian'; did you mean train?"),
        (["frobnicate"], "no command 'frobnicate'; there are train, compare"),
        (["\x1b[31mred"], r"no command '\x1b[31mred'"),
    ],
)
def test_no_command_or_a_wrong_one(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["md", "a", "b", "--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps?"),
        (["info", "a", "--jsn"], "did you mean --json?"),
        (["md", "a", "b", "--steps", "2.5"], "argument --steps: must be a whole number, got '2.5'"),
        (["md", "a", "b", "--steps", "-3"], "argument --steps: must be zero or positive, got -3"),
        (["md", "a", "b", "--every", "0"], "argument --every: must be positive, got 0"),
        (["md", "a", "b", "--timestep", "nan"], "argument --timestep: must be a finite number, got 'nan'"),
        (["md", "a", "b", "--temperature", "-1"], "argument --temperature: must be zero or positive, got -1"),
        (["relax", "a", "b", "--fmax", "inf"], "argument --fmax: must be a finite number, got 'inf'"),
        (["energies", "a", "b", "--index", "last"], "argument --index: must be a whole number, got 'last'"),
    ],
)
def test_wrong_options_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_numbers_may_be_written_with_an_exponent():
    args = build_parser().parse_args(
        ["md", "a", "b", "--steps", "1e4", "--every", "1E2", "--seed", "12345678901234567"]
    )
    assert (args.steps, args.every, args.seed) == (10_000, 100, 12345678901234567)


def test_paths_may_have_a_tilde_or_a_variable(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(folder))
    assert main(["info", "~/model.nbody"]) == 0 and main(["info", "$HOME/model.nbody"]) == 0
    write(folder / "h.xyz", load_embedded("ethanol")[0].to_ase())
    assert main(["hierarchy", "~/h.xyz", "--plot", "$HOME/h.png"]) == 0 and (folder / "h.png").exists()
    Path("~").mkdir()
    Path("~/h.xyz").write_bytes((folder / "h.xyz").read_bytes())
    assert main(["hierarchy", "~/h.xyz", "--index", "3"]) == 1, "a folder that is called so goes first"
    assert "holds no frame of index 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", b"", "'a.xyz' holds no frame"),
        ("a.xyz", b"2\n\nH 0 0 0\n", "'a.xyz' could not be read by ASE"),
        ("a.xyz", b"\x00\xff\xfe\x80", "'a.xyz' could not be read by ASE"),
        ("a.strange", b"what is this", "'a.strange' could not be read by ASE .UnknownFileTypeError"),
        ("a.json", b"{", "'a.json' could not be read by ASE"),
        ("a", None, "a is a folder"),
    ],
)
@pytest.mark.parametrize("command", ["md", "relax", "infrared", "hierarchy"])
def test_structures_that_cannot_be_read(folder, tmp_path, monkeypatch, capsys, command, name, content, message):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir() if content is None else Path(name).write_bytes(content)
    model = [] if command == "hierarchy" else [str(folder / "model.nbody")]
    assert main([command, *model, name]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.db", "a.json", "a@1.xyz", "mark.xyz", "a.xyz.gz", "a.traj", "a.npz"])
@pytest.mark.parametrize(("index", "atoms"), [(None, [9, 9, 9]), (0, [9]), (-1, [9]), (3, []), (-4, [])])
def test_every_command_reads_the_files_that_training_reads(tmp_path, name, index, atoms):
    """Also with a byte order mark and with @ in the name."""
    path, frames = tmp_path / name, [frame.to_ase() for frame in load_embedded("ethanol")[:3]]
    if name == "a.npz":
        pos = np.stack([a.positions for a in frames])
        np.savez(path, z=frames[0].numbers, R=pos, E=np.zeros(3), F=0 * pos, energy_unit="eV", length_unit="angstrom")
    else:
        write(path, frames)
    if name == "mark.xyz":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    if not atoms:
        with pytest.raises(ValueError, match=f"holds no frame of index {index}; choose another"):
            read_atoms(str(path), index)
        return
    found = read_atoms(str(path), index)
    assert [len(a) for a in found] == atoms
    assert np.allclose(found[-1].positions, frames[-1 if index is None else index].positions, atol=1e-8)


def test_labels_of_other_positions_do_not_stay(folder, tmp_path, monkeypatch):
    """A database has them in its rows, where they neither stop the writing nor pass for those of what is computed."""
    monkeypatch.chdir(tmp_path)
    frame = load_embedded("ethanol")[0].to_ase()
    energy, forces, frame.calc = frame.get_potential_energy(), frame.get_forces(), None
    with connect("a.db") as rows:
        rows.write(frame, REF_energy=energy, config_type="a", data={"energy": [energy], "forces": forces})
    assert main(["relax", str(folder / "model.nbody"), "a.db", "--steps", "2"]) in (0, 3)
    assert main(["md", str(folder / "model.nbody"), "a.db", "--steps", "2", "--every", "1"]) == 0
    for path in ("relaxed.xyz", "md/trajectory.xyz"):
        last = read(path)
        assert "REF_energy" not in last.info and last.info["config_type"] == "a"
        assert abs(last.get_potential_energy() - energy) > 1e-4 and np.abs(last.get_forces() - forces).max() > 1e-4


def test_an_error_is_one_printable_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "\x1b[2J\nnothing.nbody"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and r"\x1b[2J" in error


@pytest.mark.parametrize(
    "command",
    ["info", "md", "relax", "solid", "infrared", "energies", "hierarchy", "check", "evaluate", "compare", "train"],
)
def test_ctrl_c_is_one_line(command, capsys, monkeypatch):
    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"nbody_pyg.cli.{command}.{command}", stop)
    words = {"info": ["m"], "check": ["m"], "hierarchy": ["m"], "compare": [], "train": []}.get(command, ["m", "f"])
    assert main([command, *words]) == 130
    assert capsys.readouterr().err == f"\nnbody {command}: stopped by Ctrl-C\n"


def test_ctrl_c_keeps_the_run_so_far(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("m.xyz", load_embedded("ethanol")[0].to_ase())
    timer = threading.Timer(0.0, lambda: None)
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell has put the tests into the background

    def step(self, atoms=None, properties=("energy",), changes=(), real=NBodyCalculator.calculate):
        real(self, atoms, properties, changes)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 8:
            os.kill(os.getpid(), signal.SIGINT)
            timer.start()

    monkeypatch.setattr(NBodyCalculator, "calculate", step)
    assert main(["md", str(folder / "model.nbody"), "m.xyz", "--steps", "1e6", "--every", "5"]) == 130
    out = capsys.readouterr().out
    assert re.search(r"stopped after step [78] .*: by Ctrl-C", out) and "written to md" in out
    steps = [frame.info["step"] for frame in read("md/trajectory.xyz", ":")]
    assert steps[:2] == [0, 5] and steps[2] in (7, 8)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_who_has_gone_is_no_error(capsys, monkeypatch):
    def gone(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("nbody_pyg.cli.info.info", gone)
    assert main(["info", "m"]) == 141 and capsys.readouterr().err == ""


def test_unknown_errors_show_where_they_come_from(monkeypatch):
    monkeypatch.setattr("nbody_pyg.cli.info.info", lambda args: {}["a bug"])
    with pytest.raises(KeyError):
        main(["info", "m"])


def test_debug_may_stand_anywhere():
    for words in (["--debug", "info", "nothing.nbody"], ["info", "nothing.nbody", "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.preset", "practcal"],
            "model.preset must be one of practical, strict, got 'practcal'; did you mean practical?",
        ),
        (["--training.optimizer", "sopa"], "got 'sopa'; did you mean soap?"),
        (["--training.penalty", "hubr"], "did you mean huber?"),
        (["--model.scheme.name", "BondTee"], "did you mean BondTree?"),
        (["--model.sweeps", "down"], "sweeps"),
        (["--training.lr", "inf"], "lr must be positive, got inf"),
        (["--training.lr", "nan"], "lr must be positive, got nan"),
        (["--training.weight_decay", "-1"], "weight_decay must be zero or positive, got -1"),
        (["--training.ema_decay", "1"], "ema_decay must lie between 0 and 1, got 1"),
        (["--training.max_steps", "2.5"], "training.max_steps must be a whole number, got 2.5"),
        (["--training.compile", "perhaps"], "training.compile must be true or false, got 'perhaps'"),
        (["--data.root", "[a, b]"], "data.root must be one file, got the list ['a', 'b']"),
    ],
)
def test_wrong_values_are_found_before_the_data_are_read(words, message, capsys):
    base = ["train", "--data.train", "nothing.xyz", "--training.max_steps", "3"]
    assert main([*base, *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_overridden_scheme_takes_the_place_of_that_of_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {embedded: ethanol}\ntraining: {max_steps: 1e3}\n"
                    "model: {scheme: {name: NestedShells, radii: [3.5]}}\noutput: {folder: 2024}\n")  # fmt: skip
    config = load_config(path, ["--model.scheme.name", "BondTree", "--output.folder", "null"])
    assert config.model.scheme == {"name": "BondTree"} and config.output.folder == "null"
    assert config.training.max_steps == 1000
    kept = load_config(path, ["--model.scheme.name", "NestedShells"])
    assert kept.model.scheme == {"name": "NestedShells", "radii": [3.5]} and kept.output.folder == "2024"


@pytest.mark.parametrize("name", ["2024", "null", "1e3", "no", "007", "1.50", "2024-01-02", "[a]"])
def test_names_stay_names(name):
    words = ["--data.embedded", "ethanol", "--training.max_steps", "3", "--output.folder", name]
    if name == "[a]":
        with pytest.raises(ValueError, match=r"output\.folder must be one name, got the list"):
            load_config(None, words)
    else:
        assert load_config(None, words).output.folder == name


def test_test_sets_may_be_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--data.train", "~/a.xyz", "--training.max_steps", "3", "--data.test"]
    assert load_config(None, [*words, "[b.xyz, $HOME/c.xyz]"]).data.test == {"b": "b.xyz", "c": f"{tmp_path}/c.xyz"}
    assert load_config(None, [*words, "2024"]).data.test == "2024"
    with pytest.raises(ValueError, match=r"data\.test must list files of different names"):
        load_config(None, [*words, "[b.xyz, c/b.xyz]"])


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


# -- labels and frames of every kind ------------------------------------------------------------------------
SHORT = ["--model.channels", "4", "--model.lmax", "1", "--model.scheme.radii", "[4.0]", "--training.max_steps", "4",
         "--training.validate_every", "2", "--output.plot", "false"]  # fmt: skip


def ethanol(count: int) -> list[Atoms]:
    return [frame.to_ase() for frame in load_embedded("ethanol")[:count]]


def test_evaluate_files_and_models_of_the_same_name(folder, tmp_path, capsys):
    model, atoms = (folder / "model.nbody").read_bytes(), ethanol(5)
    paths = []
    for name, part in (("300K/test.xyz", atoms[:2]), ("600K/test.xyz", atoms[2:]), ("300K_test.xyz", atoms[:1])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, part)
        paths.append(str(tmp_path / name))
    models = [tmp_path / "a/run/model.nbody", tmp_path / "b/run/model.nbody"]
    for path in models:
        path.parent.mkdir(parents=True)
        path.write_bytes(model)
    words = ["evaluate", *map(str, models), *paths, "--no-plot", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    record = json.loads((tmp_path / "out/errors.json").read_text())
    assert [(r["model"], r["set"], r["frames"]) for r in record] == [
        (f"{x}/run/model", name, count)
        for x in "ab" for name, count in (("300K/test", 2), ("600K/test", 3), ("300K_test", 1))
    ]  # fmt: skip
    files = [r["predictions"] for r in record]
    assert len({name.lower() for name in files}) == 6 and not any("/" in name for name in files)
    for r in record:
        assert len(read(tmp_path / "out" / r["predictions"], ":")) == r["frames"]
    assert "300K/test" in capsys.readouterr().out
    assert main(["evaluate", str(models[0]), paths[0], paths[0], "--out", str(tmp_path / "twice")]) == 1
    assert "is given twice" in capsys.readouterr().err


def test_evaluate_names_an_odd_charge_by_the_number_of_its_frame(folder, tmp_path, capsys):
    frames = [frame.to_ase() for frame in load_embedded("ethanol")[:4]]
    frames[2].info["charge"] = 1
    write(tmp_path / "a.xyz", frames)
    words = [
        "evaluate",
        str(folder / "model.nbody"),
        str(tmp_path / "a.xyz"),
        "--no-plot",
        "--out",
        str(tmp_path / "e"),
    ]
    assert main(words) == 3
    assert "left out: frame 2 of a.xyz: charge is 1" in capsys.readouterr().err


def test_names_of_files_that_differ_in_case_only():
    paths = ["x/a.xyz", "x/A.xyz", "y/a.xyz", "y/A.xyz", "a.xyz", "a"]
    assert len(set(distinct_names(paths).values())) == 6


def test_evaluate_writes_over_none_of_its_inputs(folder, tmp_path, capsys):
    for name in ("t.xyz", "t_predictions.xyz"):
        write(tmp_path / name, ethanol(2))
    before = (tmp_path / "t_predictions.xyz").read_bytes()
    words = [str(tmp_path / "t.xyz"), str(tmp_path / "t_predictions.xyz"), "--no-plot", "--out", str(tmp_path)]
    assert main(["evaluate", str(folder / "model.nbody"), *words]) == 1
    assert "t_predictions.xyz" in capsys.readouterr().err
    assert (tmp_path / "t_predictions.xyz").read_bytes() == before


def test_predictions_keep_what_the_frames_held_and_odd_frames_are_named(folder, tmp_path, capsys):
    atoms = ethanol(6)
    for n, each in enumerate(atoms):
        each.info |= {"config_type": f"set{n}", "note": "a b"}
        each.arrays["site"] = np.arange(9)
        each.set_tags(range(9))
        each.set_constraint(FixAtoms([0, 3]))
    atoms[2].numbers[4] = 7  # unknown to the model
    atoms[3].positions[1] = np.nan
    atoms[4].calc = None
    path = tmp_path / "run@300K.xyz"
    write(path, atoms, format="extxyz")
    out = tmp_path / "out"
    assert main(["evaluate", str(folder / "model.nbody"), str(path), "--out", str(out)]) == 3
    told = capsys.readouterr().err
    assert re.search(r"left out: frame 2 of run@300K.xyz: z must hold elements of this model", told)
    assert re.search(r"left out: frame 3 of run@300K.xyz: pos of atom 1 is nan", told)
    assert "errors over 4 of 6 frames" in told
    (record,) = json.loads((out / "errors.json").read_text())
    assert record["left_out"] == [2, 3] and record["frames"] == 4 and record["forces_mae"] > 0
    found = read(out / record["predictions"], ":", do_not_split_by_at_sign=True)
    potential = load_model(folder / "model.nbody")
    for n, (ours, given) in enumerate(zip(found, atoms, strict=True)):
        assert ours.info["config_type"] == f"set{n}" and ours.info["note"] == "a b"
        assert ours.arrays["site"].tolist() == ours.get_tags().tolist() == list(range(9))
        assert ours.constraints[0].index.tolist() == [0, 3]
        assert ("REF_energy" in ours.info) is (n not in (3, 4))
        if n in (2, 3):
            assert ours.calc is None and ours.info["left_out"]
            continue
        energy = float(potential(AtomicData.from_ase(given, labels=False))["energy"])
        assert ours.get_potential_energy() == pytest.approx(energy, abs=1e-4) and energy < -1


def test_a_file_in_which_no_frame_can_be_read_is_an_error(folder, tmp_path, capsys):
    atoms = ethanol(2)
    for each in atoms:
        each.positions[0] = np.nan
    write(tmp_path / "t.xyz", atoms)
    assert main(["evaluate", str(folder / "model.nbody"), str(tmp_path / "t.xyz"), "--out", str(tmp_path / "o")]) == 1
    assert "frame 0 of t.xyz: pos of atom 0 is nan" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nan", "absent"])
def test_train_on_partly_labelled_frames(tmp_path, capsys, form):
    atoms = ethanol(16)
    for each in atoms[:5]:
        del each.calc.results["forces"]
        if form == "nan":
            each.calc.results["forces"] = np.full((9, 3), np.nan)
    write(tmp_path / "p.xyz", atoms)
    words = ["--data.train", str(tmp_path / "p.xyz"), "--data.num_val", "4", "--output.folder", str(tmp_path / "run")]
    assert main(["train", *words, *SHORT]) == 0
    out = capsys.readouterr().out
    counts = {tuple(line.split()[:2]): line.split()[3] for line in out.splitlines() if "results[" in line}
    assert counts["train", "energy"] == "12/12"
    known = [int(counts[title, "forces"].split("/")[0]) for title in ("train", "val")]
    assert sum(known) == 11 and known[0] > 0
    errors = json.loads((tmp_path / "run/errors.json").read_text())["val"]
    assert errors["energy_mae"] > 0 and errors["forces_mae"] > 0


def test_train_names_keys_that_look_like_labels(tmp_path, capsys):
    atoms = ethanol(8)
    for each in atoms:
        each.arrays["forces_dft"] = each.get_forces()
        energy = each.get_potential_energy()
        each.calc = None
        each.info["REF_energy"] = energy
    write(tmp_path / "p.xyz", atoms)
    words = ["train", "--data.train", str(tmp_path / "p.xyz"), *SHORT, "--output.folder", str(tmp_path / "run")]
    assert main(words) == 1
    told = capsys.readouterr()
    assert "but the file holds 'forces_dft'; name one with forces_key" in told.out
    assert "did you mean forces_dft" in told.err
    assert main([*words, "--data.forces_key", "forces_dft"]) == 0


@pytest.mark.parametrize("name", ["val", "train"])
def test_a_test_set_may_not_take_the_name_of_another_set(tmp_path, capsys, name):
    write(tmp_path / "p.xyz", ethanol(8))
    path = str(tmp_path / "p.xyz")
    assert main(["train", "--data.train", path, "--data.test", f"{{{name}: {path}}}", *SHORT]) == 1
    assert f"data.test must not name a set '{name}'" in capsys.readouterr().err


def test_train_does_not_mix_levels_of_theory_across_files(tmp_path, capsys):
    atoms = ethanol(12)
    write(tmp_path / "train.xyz", atoms)
    for each in atoms:
        each.info["REF_energy"], each.arrays["REF_forces"] = each.get_potential_energy() - 3.0, each.get_forces()
        each.calc = None
    write(tmp_path / "val.xyz", atoms[:4])
    words = ["--data.train", str(tmp_path / "train.xyz"), "--data.val", str(tmp_path / "val.xyz")]
    assert main(["train", *words, *SHORT, "--output.folder", str(tmp_path / "run")]) == 1
    assert "energy is read from results['energy'] in train, info['REF_energy'] in val" in capsys.readouterr().err


def kinds() -> list[Atoms]:
    """Crystals, slabs, a wire, molecules in and out of a box, single atoms; with all, some and no labels."""
    generator = np.random.default_rng(0)
    slab = fcc111("Cu", (1, 1, 3))
    slab.cell[2], slab.pbc, slab.info = 0.0, (True, True, False), {}
    vacuum = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    vacuum.pbc, vacuum.info = (True, True, False), {}
    places = [[0, 0, 0], [1.8, 0.1, 0], [2.5, 1.1, 0.3], [3.3, 1.2, 1.0]]
    systems = [
        bulk("Cu", cubic=True), slab, vacuum, Atoms("CuOCH", places), Atoms("CuOCH", places, cell=[9, 9, 9]),
        Atoms("CuOC", places[:3], cell=[4.5, 0, 0], pbc=(True, False, False)),
        Atoms("Cu", info={"config_type": "IsolatedAtom"}), Atoms("O"), Atoms("H", cell=[8, 8, 8], pbc=True),
    ]  # fmt: skip
    out = []
    for labels in (("energy", "forces", "stress"), ("energy", "forces"), ("energy",), ("forces",), ()):
        for system in systems:
            atoms = system.copy()
            atoms.positions += generator.normal(scale=0.05, size=atoms.positions.shape)
            results = {"energy": -3.0 * len(atoms), "forces": generator.normal(size=(len(atoms), 3))}
            if atoms.pbc.all():
                results["stress"] = generator.normal(scale=0.01, size=6)
            results = {label: results[label] for label in labels if label in results}
            atoms.calc = SinglePointCalculator(atoms, **results) if results else None
            out.append(atoms)
    return out


@pytest.mark.slow
def test_every_kind_of_frame_in_one_file(tmp_path, capsys):
    path, systems = tmp_path / "kinds.xyz", kinds()
    write(path, systems)
    words = [
        "--data.train",
        str(path),
        "--data.num_val",
        "9",
        "--data.num_train",
        "36",
        "--training.stress_weight",
        "1",
    ]
    assert main(["train", *words, *SHORT, "--output.folder", str(tmp_path / "run")]) == 0
    assert re.search(r"note: train: no label in frames .*of kinds.xyz", capsys.readouterr().out)
    model = str(tmp_path / "run/model.nbody")
    assert main(["evaluate", model, str(path), "--out", str(tmp_path / "out")]) == 0
    (record,) = json.loads((tmp_path / "out/errors.json").read_text())
    assert record["frames"] == 45 and min(record[f"{x}_mae"] for x in ("energy", "forces", "stress")) > 0
    found = read(tmp_path / "out/kinds_predictions.xyz", ":")
    assert (tmp_path / "out/parity.png").stat().st_size > 10_000
    for ours, given in zip(found, systems, strict=True):
        assert np.isfinite(ours.get_potential_energy()) and np.isfinite(ours.get_forces()).all()
        assert ("stress" in ours.calc.results) is bool(given.pbc.any() and given.cell.volume)
        labels = {} if given.calc is None else given.calc.results
        assert ("REF_energy" in ours.info) is ("energy" in labels) and ("REF_stress" in ours.info) is (
            "stress" in labels
        )
        assert ("REF_forces" in ours.arrays) is ("forces" in labels)


@pytest.mark.parametrize("command", sorted(build_parser().commands))
def test_every_command_explains_itself(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as stop:  # argparse leaves so
        code = stop.code
    out = capsys.readouterr().out
    assert not code and command in out and len(out.splitlines()) > 5
