"""nbody train: runs that go on, folders that are used again, and mistakes that are found before training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from nbody_pyg.cli import main
from nbody_pyg.cli import train as train_module
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import load_model, read_metadata
from nbody_pyg.io.checkpoint import read_checkpoint, write_checkpoint
from nbody_pyg.training.config import load_config

TINY = ["--model.channels", "2", "--model.lmax", "1", "--model.scheme.radii", "[3.0]", "--training.batch_size", "2",
        "--training.validate_every", "2", "--training.log_every", "1", "--output.plot", "false"]  # fmt: skip


def structures(count: int, first: int = 0) -> list:
    return [frame.to_ase() for frame in load_embedded("ethanol")[first : first + count]]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("m.xyz", structures(8))
    return tmp_path


def train(*words: str, steps: int = 4) -> int:
    return main(["train", *TINY, "--training.max_steps", str(steps), "--output.folder", "r", *words])


OWN = ("--data.train", "m.xyz", "--data.num_val", "2")
RESUME = ("--output.resume", "true")


def contents(folder: str = "r") -> dict:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(here, capsys):
    assert train(*OWN) == 0
    before = contents()
    assert train(*OWN, *RESUME) == 0
    assert contents() == before and "the run is finished: 4 steps" in capsys.readouterr().out
    errors, weights = read_metadata("r/model.nbody")["metadata"]["errors"], load_model("r/model.nbody").state_dict()
    assert train(*OWN, *RESUME, "--output.weights", "last", "--data.test", "m.xyz") == 0, "asked for something else"
    assert set(read_metadata("r/model.nbody")["metadata"]["errors"]) == {"val", "test"}
    os.unlink("r/model.nbody")
    assert train(*OWN, *RESUME) == 0, "killed before the model was written"
    again = read_metadata("r/model.nbody")
    same = all(torch.equal(value, weights[key]) for key, value in load_model("r/model.nbody").state_dict().items())
    assert same and again["metadata"]["errors"] == errors and errors["val"]["forces_mae"] > 0


@pytest.mark.slow
def test_what_a_resumed_run_may_change_is_used_and_recorded(here):
    assert train(*OWN) == 0
    os.rename("m.xyz", "moved.xyz")  # what is in it counts, not its name
    words = ["--data.train", "moved.xyz", "--data.num_val", "2", *RESUME, "--training.lr", "1e-4"]
    assert train(*words, "--output.weights", "last", steps=6) == 0
    metadata = read_metadata("r/model.nbody")["metadata"]
    assert metadata["config"]["training"]["lr"] == load_config("r/config.yaml").training.lr == 1e-4
    assert metadata["resumed"] == [
        {"step": 4, "changes": "max_steps is 4 there, 6 here; lr is 0.01 there, 0.0001 here"}
    ]
    assert metadata["run"] == read_checkpoint("r/last.ckpt")["run"]["id"] and metadata["weights"] == "last (step 6)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.e0", "mean"], 'data.e0 is "lstsq" there, "mean" here'),
        (["--data.split_seed", "1"], "data.split_seed is 0 there, 1 here"),
        (["--data.num_val", "3"], "data.num_val is 2 there, 3 here"),
        (["--model.scale", "2.0"], 'model.scale is "forces" there, 2.0 here'),
        (["--model.channels", "4"], "model.channels is 2 there, 4 here"),
        (["--model.avg_num_neighbors", "{child_1: 3.0}"], "model.avg_num_neighbors."),
        (["--training.energy_weight", "1", "--training.seed", "4"],
         "training.energy_weight is 0.05 there, 1.0 here; training.seed is 0 there, 4 here"),
        (["--target.dipole.readout", "dipole"], "target is null there, "),
    ],
)  # fmt: skip
def test_other_changes_are_refused_by_name_before_data_are_read(finished, monkeypatch, capsys, words, message):
    monkeypatch.chdir(finished)
    monkeypatch.setattr(train_module, "load_data", None)
    before = contents()
    assert train(*OWN, *RESUME, *words, steps=9) == 1
    error = capsys.readouterr().err
    assert "a resumed run must not change these settings: " in error and message in error and error.count("\n") == 1
    assert contents() == before


@pytest.mark.slow
def test_a_run_of_a_version_without_a_setting_goes_on(here, capsys):
    assert train(*OWN) == 0
    checkpoint = read_checkpoint("r/last.ckpt")
    for section in (checkpoint["config"]["training"], checkpoint["hyper_parameters"]["settings"]):
        del section["charge_weight"]
    write_checkpoint(Path("r/last.ckpt"), checkpoint)
    assert train(*OWN, *RESUME, "--training.charge_weight", "1.0", steps=6) == 1
    assert "training.charge_weight is 0.05 there, 1.0 here" in capsys.readouterr().err
    assert train(*OWN, *RESUME, steps=6) == 0
    assert "going on from step 4: max_steps is 4 there, 6 here\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    write(path / "m.xyz", structures(8))
    words = ["--data.train", str(path / "m.xyz"), "--data.num_val", "2", "--output.folder", str(path / "r")]
    assert main(["train", *TINY, "--training.max_steps", "4", *words]) == 0
    return path


@pytest.mark.slow
def test_more_frames_go_to_training_under_the_old_split_and_scale(here, capsys):
    """Active learning: frames are appended to the file; mean degrees, E0 and scale are those of the first run."""
    assert train("--data.train", "m.xyz", "--data.num_val", "2") == 0
    first = read_metadata("r/model.nbody")
    split = json.loads(Path("r/split.json").read_text())
    degrees = load_config("r/config.yaml").model.arguments["avg_num_neighbors"]
    assert degrees == first["model"]["config"]["avg_num_neighbors"] and min(degrees.values()) > 0
    wide = structures(4, first=8)
    for atoms in wide:
        atoms.positions *= 1.1  # fewer neighbours
    write("m.xyz", wide, append=True)
    assert main(["train", "r/config.yaml", "--training.max_steps", "6", *RESUME]) == 0
    out = capsys.readouterr().out
    assert "going on from step 4: max_steps is 4 there, 6 here; 4 new training frames behind those of before" in out
    last = read_metadata("r/model.nbody")
    assert last["metadata"]["num_frames"] == {"train": 10, "val": 2}
    assert all(last[key] == first[key] for key in ("model", "e0", "scale", "repulsion"))
    grown = json.loads(Path("r/split.json").read_text())
    assert grown["train"] == [*split["train"], 8, 9, 10, 11] and grown["val"] == split["val"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a label", "order", "fewer"])
def test_a_changed_file_is_refused(here, capsys, how):
    assert train(*OWN) == 0
    frames = structures(8)
    if how == "a label":
        frames[3].calc.results["energy"] += 1e-6
        frames[4].calc.results["energy"] += 1e-6
        frames[5].calc.results["energy"] += 1e-6
    write("m.xyz", {"a label": frames, "order": frames[::-1], "fewer": frames[:7]}[how])
    assert train(*OWN, *RESUME, steps=9) == 1
    error = capsys.readouterr().err
    assert "frames must be those of the run that is resumed" in error or "check that the split belongs" in error


@pytest.mark.slow
def test_the_same_command_again_keeps_the_earlier_run(here, capsys):
    assert train(*OWN) == 0
    before = contents()
    assert train(*OWN, "--training.seed", "5") == 0
    assert "the earlier run in r is now in r/before-1" in capsys.readouterr().out
    kept = {name.replace("before-1/", ""): data for name, data in contents("r/before-1").items()}
    assert kept == before and {Path(name).name for name in kept} >= {"model.nbody", "config.yaml", "errors.json"}
    assert train(*OWN, *RESUME, steps=6) == 1, "the settings are those of the new run"
    assert "training.seed is 5 there, 0 here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("edited", [True, False], ids=["edited", "written by a person"])
def test_a_configuration_of_a_person_is_left_alone(here, edited):
    if edited:
        assert train(*OWN) == 0
        text = Path("r/config.yaml").read_text().replace("seed: 0", "seed: 1  # better")
    else:
        text = "data: {train: m.xyz, num_val: 2}\noutput: {folder: r, plot: false}\ntraining: {max_steps: 2}\n"
        Path("r").mkdir()
    Path("r/config.yaml").write_text(text)
    assert main(["train", "r/config.yaml", "--training.max_steps", "2", *TINY[:6]]) == 0
    assert Path("r/config.yaml").read_text() == text
    assert load_config("r/config.used.yaml").training.max_steps == 2
    assert Path("r/before-1/model.nbody").is_file() == edited and not Path("r/before-1/config.yaml").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_run_and_a_damaged_split_are_refused(here, capsys):
    assert train(*OWN) == 0
    os.rename("r", "first")
    assert train(*OWN) == 0
    assert Path("r/config.yaml").read_text().startswith(f"# Written by nbody train, run {run_of('r/last.ckpt')};")
    Path("r/last.ckpt").write_bytes(Path("first/last.ckpt").read_bytes())
    before = contents()
    assert train(*OWN, *RESUME, steps=6) == 1
    assert "r/last.ckpt belongs to another run than the other files of r" in capsys.readouterr().err
    assert contents() == before
    Path("first/split.json").write_text('{"train": [0, 1')
    assert train(*OWN, *RESUME, "--output.folder", "first", steps=6) == 1
    assert "first/split.json is damaged" in capsys.readouterr().err


def run_of(path: str) -> str:
    return read_checkpoint(path)["run"]["id"]


def test_a_folder_in_use_is_refused_before_data_are_read(here, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "load_data", None)
    with train_module.RunFolder("r"):
        assert train(*OWN) == 1
    assert f"another run (process {os.getpid()} on " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["val", "test"])
def test_unknown_elements_are_found_before_training(here, capsys, name):
    frames = structures(3)
    frames[1].numbers[2] = 7
    write("n.xyz", frames)
    assert train("--data.train", "m.xyz", f"--data.{name}", "n.xyz") == 1
    assert f"frame 1 of {name} holds N, which the model does not know" in capsys.readouterr().err
    assert not Path("r").exists()


@pytest.mark.slow
def test_the_model_is_saved_before_it_is_tested(here, capsys, monkeypatch):
    def fails(*_, **__):
        raise ValueError("a frame that cannot be evaluated")

    monkeypatch.setattr(train_module, "evaluate", fails)
    assert train("--data.train", "m.xyz", "--data.num_val", "0") == 1
    error = capsys.readouterr().err
    assert "the tests failed; the trained model is in r/model.nbody" in error and "cannot be evaluated" in error
    monkeypatch.undo()
    os.chdir(here)
    assert read_metadata("r/model.nbody")["metadata"]["steps"] == 4
    assert train("--data.train", "m.xyz", "--data.num_val", "0", *RESUME) == 0, "finished, but not tested yet"
    assert read_metadata("r/model.nbody")["metadata"]["errors"]["train"]["forces_mae"] > 0


@pytest.mark.slow
def test_a_damaged_best_checkpoint_costs_no_model(here, capsys, monkeypatch):
    done = train_module.fit_in

    def damages(*args, **keywords):
        result = done(*args, **keywords)
        Path("r/best.ckpt").write_bytes(Path("r/best.ckpt").read_bytes()[:-7])
        object.__setattr__(result, "best_score", 0.0)  # better than the last weights
        return result

    monkeypatch.setattr(train_module, "fit_in", damages)
    assert train(*OWN) == 0
    assert "best.ckpt is cut, damaged" in capsys.readouterr().out
    assert read_metadata("r/model.nbody")["metadata"]["weights"] == "last (step 4); best.ckpt cannot be read"


def test_a_gpu_that_is_not_there_is_said_before_data_are_read(here, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "load_data", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(*OWN, "--training.device", "cuda") == 1
    assert "training.device is cuda, but torch finds no GPU here" in capsys.readouterr().err
    assert train(*OWN, "--training.device", "gpu") == 1
    assert "device must be 'cpu', 'cuda' or 'auto', got 'gpu'" in capsys.readouterr().err


def test_one_process_in_a_job_of_several_tasks(here, capsys, monkeypatch):
    slurm = {"JOB_ID": "1", "JOB_NAME": "job", "NTASKS": "4", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert train(*OWN) == 0
    assert "note: SLURM has 4 tasks for this job, this run is one process" in capsys.readouterr().out


@pytest.mark.slow
def test_sets_with_zero_forces_are_trained_on_energies(here, capsys):
    """An equation of state: forces vanish by symmetry, the energy changes."""
    frames = structures(8)
    for number, atoms in enumerate(frames):
        atoms.calc.results["forces"] = 0 * atoms.positions
        atoms.calc.results["energy"] = -300.0 + 0.1 * number
    write("m.xyz", frames)
    assert train(*OWN) == 1
    assert "set training.force_weight to 0" in capsys.readouterr().err
    assert train(*OWN, "--training.force_weight", "0") == 0
    energies = torch.tensor([0.1 / 9 * n for n in json.loads(Path("r/split.json").read_text())["train"]]).double()
    low, high = torch.quantile(energies, torch.tensor([0.16, 0.84]).double()).tolist()
    assert read_metadata("r/model.nbody")["scale"] == pytest.approx((high - low) / 2, rel=1e-5)


def nbody(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which can start others."""
    root = str(Path(__file__).resolve().parents[2])
    launcher = Path("nbody_command.py")
    launcher.write_text("import sys\nfrom nbody_pyg.cli import main\nsys.exit(main())\n")
    return subprocess.run(
        [sys.executable, str(launcher), *words], env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


PROPERTY = ("--target.dipole.readout", "dipole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "words"),
    [
        pytest.param(7, (), id="odd"),
        pytest.param(6, (), id="even", marks=pytest.mark.slow),
        pytest.param(1, (), id="fewer frames than processes", marks=pytest.mark.slow),
        pytest.param(5, PROPERTY, id="property, odd", marks=pytest.mark.slow),
        pytest.param(6, PROPERTY, id="property, even", marks=pytest.mark.slow),
    ],
)
def test_two_processes_report_the_errors_of_the_model_over_all_frames(here, count, words):
    frames = structures(count)
    for number, atoms in enumerate(frames):
        atoms.calc.results["dipole"] = [0.0, 0.1, 0.2 * number]
    write("m.xyz", frames)
    options = [
        "--data.train",
        "m.xyz",
        "--data.val",
        "m.xyz",
        "--training.max_steps",
        "4",
        "--training.dtype",
        "float64",
    ]
    done = nbody("train", *TINY, *options, *words, "--training.processes", "2", "--output.folder", "r")
    assert done.returncode == 0, done.stderr
    assert "2 x 2 processes = 4 frames per step" in done.stdout and done.stdout.count("weights:") == 1
    assert {p.name for p in Path("r").iterdir()} == {
        "best.ckpt", "config.yaml", "errors.json", "last.ckpt", "metrics.csv", "model.nbody", "split.json",
    }  # fmt: skip
    assert main(["evaluate", "r/model.nbody", "m.xyz", "--no-plot", "--out", "e"]) == 0
    found, trained = json.loads(Path("e/errors.json").read_text())[0], json.loads(Path("r/errors.json").read_text())
    key = "dipole_mae" if words else "forces_mae"
    assert trained["val"][key] == pytest.approx(found[key], rel=1e-9) and found[key] > 0
    assert read_metadata("r/model.nbody")["metadata"]["errors"] == trained
    state = read_checkpoint("r/best.ckpt")["callbacks"]["Checkpoints"]
    if state["best_step"] == 4:  # the validation during training, shared out over the processes
        assert state["best_score"] == pytest.approx(found[key], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), PROPERTY], ids=["potential", "property"])
def test_two_processes_without_validation_go_on(here, words):
    frames = structures(5)
    for number, atoms in enumerate(frames):
        atoms.calc.results["dipole"] = [0.0, 0.1, 0.2 * number]
    write("m.xyz", frames)
    options = [*TINY, "--data.train", "m.xyz", "--data.num_val", "0", *words, "--training.processes", "2"]
    assert nbody("train", *options, "--training.max_steps", "3", "--output.folder", "r").returncode == 0
    done = nbody("train", *options, "--training.max_steps", "5", "--output.folder", "r", *RESUME)
    assert done.returncode == 0 and "going on from step 3" in done.stdout, done.stderr
    assert read_metadata("r/model.nbody")["metadata"]["steps"] == 5


@pytest.mark.slow
def test_a_mistake_ends_two_processes_with_one_message(here):
    wild = ["--training.lr", "1e30", "--training.clip_norm", "null", "--training.warmup_steps", "0"]
    words = [*OWN, *wild, "--training.max_steps", "50", "--training.processes", "2", "--output.folder", "r"]
    done = nbody("train", *TINY, *words)
    assert done.returncode == 1
    assert done.stderr.count("nbody train: error: loss became") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_isolated_atoms_are_for_training(here, seed):
    """So that E0 does not depend on the seed of the split."""
    atoms = [Atoms(symbol) for symbol in "HCO"]
    for number, one in enumerate(atoms):
        one.calc = SinglePointCalculator(one, energy=-10.0 * (number + 1), forces=np.zeros((1, 3)))
    write("m.xyz", [atoms[0], *structures(6), atoms[1], *structures(6), atoms[2]])
    assert train(*OWN, "--data.split_seed", str(seed), "--data.num_val", "6") == 0
    rows = json.loads(Path("r/split.json").read_text())
    assert {0, 7, 14} <= set(rows["train"]) and len(rows["val"]) == 6 and not {0, 7, 14} & set(rows["val"])
