"""Active learning: labels, the loop in one process with a quick calculator, its files, and its refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed
from ase.calculators.emt import EMT
from ase.io import read, write

from nbody_pyg import active
from nbody_pyg.active import LearnConfig, Round, calculator, from_smiles, learn, plot_rounds, rounds_table
from nbody_pyg.active import loop as loop_module
from nbody_pyg.active.loop import _compare, _spearman
from nbody_pyg.cli import main
from nbody_pyg.deploy import Committee, NBodyCalculator, load_model
from nbody_pyg.training.folder import RunFolder

QUICK = LearnConfig(
    label="emt", temperature=300.0, first=15, per_round=4, rounds=2, walkers=2, steps=20, train_seconds=0.6,
    final_seconds=0.6, processes=0, limit=0.005,
)  # fmt: skip


def cluster() -> Atoms:
    return Atoms("Cu4O", [[0, 0, 0], [2.5, 0, 0], [1.2, 2.2, 0], [1.3, 0.8, 2.1], [1.2, 0.7, -1.4]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("learned"), []
    return SimpleNamespace(folder=folder, lines=lines, rounds=learn([cluster()], folder, QUICK, note=lines.append))


@pytest.mark.slow
def test_the_loop_labels_what_it_met_and_leaves_its_files(run):
    labelled = read(run.folder / "labelled.xyz", ":")
    assert [one.number for one in run.rounds] == [0, 1] and run.rounds[0].labels == 15
    assert len(labelled) == run.rounds[-1].labels + run.rounds[-1].new_labels
    met = [atoms for atoms in labelled if "round" in atoms.info]
    assert len(met) == sum(one.new_labels for one in run.rounds)
    assert {int(atoms.info["round"]) for atoms in met} <= {1, 2}
    for atoms in (labelled[0], labelled[-1]):  # labels are those of the calculator
        again = atoms.copy()
        again.calc = EMT()
        assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), rtol=0, atol=1e-6)
    for one in run.rounds:
        assert min(one.error, one.uncertainty, one.factor, one.limit) > 0 and -1 <= one.spearman <= 1
        assert one.uncertainty == pytest.approx(one.error, rel=1e-6), "calibrated on the same structures"
        assert 0 <= one.held <= 1
    record = json.loads((run.folder / "rounds.json").read_text())
    assert record["finished"] and len(record["rounds"]) == 2
    models = [load_model(run.folder / f"model-{k}.nbody").double() for k in range(2)]
    frame = labelled[3]
    z, pos = frame.numbers, frame.positions
    energies = [float(m(torch.as_tensor(z), torch.as_tensor(pos))["energy"]) for m in models]
    assert energies[0] != energies[1] and abs(energies[0] - frame.get_potential_energy()) < 5
    assert any(line.startswith("round 1: ") for line in run.lines)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_rounds_and_never_labels_twice(run, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(run.folder, folder)
    before = read(folder / "labelled.xyz", ":")
    lines = []
    rounds = learn([cluster()], folder, dataclasses.replace(QUICK, rounds=3), note=lines.append)
    after = read(folder / "labelled.xyz", ":")
    assert [one.number for one in rounds] == [0, 1, 2] and rounds[:2] == run.rounds
    assert not any("near the start" in line for line in lines)
    for old, new in zip(before, after, strict=False):
        np.testing.assert_array_equal(old.positions, new.positions)
    with pytest.raises(ValueError, match=r"other settings .temperature is 300\.0 there, 400\.0 here"):
        learn([cluster()], folder, dataclasses.replace(QUICK, temperature=400.0))
    with pytest.raises(ValueError, match=r"holds a run with other settings .atoms is"):
        learn([molecule("CH3OH")], folder, QUICK)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "labelled.xyz").write_text("mine")
    with pytest.raises(ValueError, match="holds files of another command; choose another folder"):
        learn([cluster()], foreign, QUICK)
    assert (foreign / "labelled.xyz").read_text() == "mine"


@pytest.mark.slow
def test_members_start_from_a_shipped_model_and_its_dynamics(tmp_path):
    start, lines = molecule("CH3OH"), []
    config = dataclasses.replace(QUICK, first=None, rounds=1, steps=40)
    learn([start], tmp_path / "l", config, note=lines.append)
    assert lines[0] == "labelling 15 structures from dynamics of organic with emt"
    labelled = read(tmp_path / "l" / "labelled.xyz", ":")
    first = [atoms for atoms in labelled if "round" not in atoms.info]
    moved = [np.abs(atoms.positions - start.positions).max() for atoms in first]
    assert len(first) == 15 and 0 < min(moved) < max(moved) < 1.0
    assert len({atoms.get_potential_energy() for atoms in first}) == 15
    models = [load_model(tmp_path / "l" / f"model-{k}.nbody") for k in range(2)]
    assert [model.ancestor["name"] for model in models] == ["organic"] * 2
    forces = [NBodyCalculator(model).get_forces(labelled[3].copy()) for model in models]
    assert np.abs(forces[0] - forces[1]).max() > 1e-4, "the second has fewer labels"
    # The same seed gives the same structures
    again = learn([start], tmp_path / "again", dataclasses.replace(config, minutes=1e-9, final_seconds=0.1), note=str)
    assert again == []
    for one, other in zip(first, read(tmp_path / "again" / "labelled.xyz", ":"), strict=True):
        np.testing.assert_allclose(other.positions, one.positions, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"other settings .*init is 'organic' there, 'none' here"):
        learn([start], tmp_path / "l", dataclasses.replace(config, init="none"))


def test_the_model_to_start_from_may_be_chosen(tmp_path):
    short = {"minutes": 1e-9, "final_seconds": 0.1}
    lines = []
    learn([molecule("CH3OH")], tmp_path / "a", dataclasses.replace(QUICK, init="none", **short), note=lines.append)
    assert lines[0] == "labelling 15 structures near the start with emt"
    assert load_model(tmp_path / "a" / "model-0.nbody").ancestor is None
    message = "init must know the atoms, but organic lacks Cu; choose another model, or none for random weights"
    with pytest.raises(ValueError, match=message):
        learn([cluster()], tmp_path / "b", dataclasses.replace(QUICK, init="organic"))
    with pytest.raises(FileNotFoundError):
        learn([cluster()], tmp_path / "c", dataclasses.replace(QUICK, init="absent.nbody"))
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_without_a_trained_model(tmp_path):
    """Its record holds no model, and 30 first labels where they were not given."""
    config = LearnConfig(label="emt", rounds=1, minutes=1e-9, final_seconds=0.1, processes=0, init="none")
    learn([molecule("CH3OH")], tmp_path, config, note=str)
    record = json.loads((tmp_path / "learn.json").read_text())
    assert record["first"] == 30 and record.pop("init") == "none"
    (tmp_path / "learn.json").write_text(json.dumps(record))
    lines = []
    learn([molecule("CH3OH")], tmp_path, config, note=lines.append)
    assert lines == ["training the last models on 30 labels"]
    with pytest.raises(ValueError, match=r"init is 'none' there, 'organic' here"):
        learn([molecule("CH3OH")], tmp_path, dataclasses.replace(config, init="auto"))


def test_a_model_that_cannot_be_tuned_is_refused_before_anything_is_labelled(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("not this one")

    monkeypatch.setattr(loop_module, "with_architecture", refuse)
    with pytest.raises(ValueError, match="not this one"):
        learn([molecule("CH3OH")], tmp_path / "l", dataclasses.replace(QUICK, init="organic"))
    assert not (tmp_path / "l").exists()


def test_what_the_calculator_cannot_do_is_left_out(tmp_path, monkeypatch):
    count = iter(range(1000))

    class Failing(EMT):
        def calculate(self, *arguments, **keywords):
            if next(count) % 2:
                raise CalculationFailed("no convergence")
            super().calculate(*arguments, **keywords)

    monkeypatch.setattr(loop_module, "calculator", lambda *_: Failing())
    lines = []
    with pytest.raises(RuntimeError, match=r"emt labelled \d of 10 structures near the start"):
        learn([cluster()], tmp_path, dataclasses.replace(QUICK, first=10), note=lines.append)
    assert sum("no label: CalculationFailed: no convergence" in line for line in lines) >= 4


def test_labels_are_kept_when_the_run_is_stopped_between_them(tmp_path, monkeypatch):
    """Each label is in the file before the next is computed, and the first structures are not labelled again."""
    count = 0

    class Stopping(EMT):
        def calculate(self, *arguments, **keywords):
            nonlocal count
            count += 1
            if count == 5:
                raise KeyboardInterrupt
            super().calculate(*arguments, **keywords)

    monkeypatch.setattr(loop_module, "calculator", lambda *_: Stopping())
    monkeypatch.setattr(loop_module._Run, "round", lambda self, work: setattr(self, "_settled", True))
    monkeypatch.setattr(loop_module._Run, "train", lambda *_: None)
    settings, lines = dataclasses.replace(QUICK, init="none", first=15), []
    with pytest.raises(KeyboardInterrupt):
        learn([cluster()], tmp_path, settings)
    kept = read(tmp_path / "labelled.xyz", ":")
    assert len(kept) == 4
    learn([cluster()], tmp_path, settings, note=lines.append)
    found = read(tmp_path / "labelled.xyz", ":")
    assert any("labelling 11 structures" in line for line in lines) and count == 5 + 11
    np.testing.assert_allclose([a.positions for a in found[:4]], [a.positions for a in kept], rtol=0, atol=1e-12)
    assert len({round(a.get_potential_energy(), 8) for a in found}) == 15


@pytest.mark.slow
def test_dynamics_give_structures_beyond_the_limit_that_lie_apart(run, monkeypatch):
    start = read(run.folder / "labelled.xyz", "0")
    models = [str(run.folder / f"model-{k}.nbody") for k in range(2)]
    config = dataclasses.replace(QUICK, steps=48)

    def explored(limit, most=3):
        return loop_module._explore((models, start.copy(), config, limit, most, [0, 0, 0]))

    assert explored(1e9) == ([], 1.0)
    far, held = explored(1e-9)
    assert len(far) == 1 and held == 0, "far beyond the limit the run ends"
    monkeypatch.setattr(loop_module, "_FAR", 1e12)
    met, held = explored(1e-9)
    assert len(met) == 3 and held == 0
    np.testing.assert_allclose(met[0].positions, far[0].positions, rtol=0, atol=1e-12)
    monkeypatch.setattr(loop_module, "_GAPS", 48)  # every step
    near, _ = explored(1e-9, 6)
    # One of three lies four steps after the one before: of six at every step the fifth is the second of them
    np.testing.assert_allclose(near[4].positions, met[1].positions, rtol=0, atol=1e-12)
    assert np.abs(near[1].positions - near[0].positions).max() < np.abs(met[1].positions - met[0].positions).max()


@pytest.mark.slow
def test_errors_and_uncertainties_are_those_of_the_committee(run):
    labelled = read(run.folder / "labelled.xyz", ":")[:3]
    paths = [str(run.folder / f"model-{k}.nbody") for k in range(2)]
    spread, error, _ = _compare(Committee(paths), labelled)
    both = np.stack([[NBodyCalculator(path).get_forces(a.copy()) for a in labelled] for path in paths])
    expected = np.sqrt(((both.mean(0) - [a.get_forces() for a in labelled]) ** 2).sum(-1)).ravel()
    np.testing.assert_allclose(error, expected, rtol=1e-4)
    np.testing.assert_allclose(spread, np.sqrt(both.var(0, ddof=1).sum(-1)).ravel(), rtol=1e-4)
    assert spread.shape == error.shape == (15,) and min(spread.min(), error.min()) > 0
    assert _spearman(np.array([1.0, 2, 3]), np.array([2.0, 5, 9])) == pytest.approx(1)


def test_labels_by_name(tmp_path, monkeypatch):
    assert isinstance(calculator("emt"), EMT)
    (tmp_path / "mine.py").write_text("from ase.calculators.emt import EMT\n\n\ndef make():\n    return EMT()\n")
    assert isinstance(calculator(f"{tmp_path / 'mine.py'}:make"), EMT)
    assert isinstance(calculator("ase.calculators.emt:EMT"), EMT)
    for name, message in {
        "dft": "label must be one of gfn2, gfn1, emt, or 'module:name' or 'file.py:name', got 'dft'",
        "no_such_module_1:f": "label must name a module that can be imported, got 'no_such_module_1'",
        "math:nothing": "must name a function or class of math, which has no 'nothing'",
    }.items():
        with pytest.raises(ValueError, match=message):
            calculator(name)
    with pytest.raises(FileNotFoundError, match=r"no file absent\.py with a calculator"):
        calculator("absent.py:f")
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(ImportError, match="label 'gfn2' needs the package tblite; pip install tblite"):
        calculator("gfn2")


def test_labels_have_charge_and_spin():
    pytest.importorskip("tblite.ase", reason="tblite is not installed")
    water = molecule("H2O")
    water.calc = calculator("gfn2", 1.0, 2.0)
    neutral = molecule("H2O")
    neutral.calc = calculator("gfn2")
    assert water.get_potential_energy() - neutral.get_potential_energy() > 5


def test_smiles_need_rdkit(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match="a SMILES string needs the package rdkit; pip install rdkit"):
        from_smiles("CCO")


def test_smiles():
    pytest.importorskip("rdkit", reason="rdkit is not installed")
    found = from_smiles("CCO", 3)
    assert len(found) == 3 and found[0].get_chemical_formula() == "C2H6O"
    assert from_smiles("[NH4+]")[0].info["charge"] == 1
    with pytest.raises(ValueError, match="start must be a file of structures or a SMILES string, got 'no molecule'"):
        from_smiles("no molecule")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"members": 1}, "members must be 2 or more, got 1"),
        ({"first": 4}, "first must be 10 or more, got 4"),
        ({"limit": -0.1}, "limit must be positive, got -0.1"),
        ({"processes": -1}, "processes must be 0 or more, got -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnConfig(**settings)


def test_starts_must_be_of_one_molecule(tmp_path):
    with pytest.raises(ValueError, match="starts must hold a structure, got none"):
        learn([], tmp_path, QUICK)
    with pytest.raises(ValueError, match="starts must hold structures of the same atoms in one order"):
        learn([molecule("CH3OH"), bulk("Cu")], tmp_path, QUICK)


@pytest.mark.slow
def test_table_and_plot(run, tmp_path):
    table = rounds_table(run.rounds)
    assert len(table.splitlines()) == 4 and "Spearman" in table.splitlines()[0]
    bare = dataclasses.replace(run.rounds[0], new_error=None)
    assert "  -  " in rounds_table([bare])
    plot_rounds([*run.rounds, bare], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert isinstance(bare, Round) and set(active.__all__) <= set(dir(active))


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    write("cu.xyz", cluster())
    words = ["learn", "cu.xyz", "--label", "emt", "--first", "10", "--rounds", "1", "--walkers", "1", "--steps", "5",
             "--train-seconds", "0.3", "--final-seconds", "0.3", "--processes", "0"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "round 0: 10 labels" in out and "learned/model.nbody" in out
    assert out.count("reference energies: ") == 1 and "those of O, Cu one by one" in out
    assert not [record for record in caplog.records if "reference energies" in record.getMessage()]
    for name in ("model.nbody", "model-1.nbody", "learning.png", "rounds.txt", "labelled.xyz", "learn.json"):
        assert (tmp_path / "learned" / name).is_file()
    assert load_model("learned/model.nbody").species == (8, 29)
    assert main(words) == 1
    assert "learned holds files; continue its run with --resume, or choose another folder" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert "near the start" not in capsys.readouterr().out


def test_a_folder_of_another_command_that_runs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("cu.xyz", cluster())
    with RunFolder("learned"):
        assert main(["learn", "cu.xyz", "--label", "emt", "--resume"]) == 1
    assert "another run (process " in capsys.readouterr().err and not (tmp_path / "learned").exists()


@pytest.mark.slow
def test_processes_give_the_same_rounds(tmp_path):
    """Work in processes of its own, as by default."""
    settings = dataclasses.replace(QUICK, first=10, rounds=1, walkers=2, steps=5, processes=2, train_seconds=0.2)
    found = learn([cluster()], tmp_path, settings, note=lambda _: None)
    assert len(found) == 1 and found[0].error > 0


class Charged(EMT):
    """A calculator that notes the charge and spin for which it was made."""

    made: list[tuple[float, float]]

    def __init__(self, name: str, charge: float = 0.0, spin: float = 1.0) -> None:
        super().__init__()
        self.made.append((charge, spin))


@pytest.fixture
def made(monkeypatch):
    Charged.made = []
    monkeypatch.setattr(loop_module, "calculator", Charged)
    return Charged.made


@pytest.mark.slow
@pytest.mark.parametrize(
    "state", [{"charge": 1}, {"total_charge": 1.0}, {"initial_charges": [1, 0, 0, 0, 0]}, {"charge": -1, "spin": 2}]
)
def test_labels_are_those_of_charge_and_spin_of_the_start(made, tmp_path, state):
    """Under all keys from which the calculator reads them."""
    start = cluster()
    if "initial_charges" in state:
        start.set_initial_charges(state["initial_charges"])
    else:
        start.info.update(state)
    config = dataclasses.replace(QUICK, first=10, minutes=1e-9, final_seconds=0.1)
    learn([start], tmp_path / "l", config, note=lambda _: None)
    wanted = float(state.get("charge", 1.0)), float(state.get("spin", 1.0))
    assert made and set(made) == {wanted}
    labelled = read(tmp_path / "l" / "labelled.xyz", ":")
    assert len(labelled) == 10 and {atoms.info["charge"] for atoms in labelled} == {wanted[0]}
    with pytest.raises(ValueError, match=rf"other settings \(charge is {wanted[0]} there, 0.0 here"):
        learn([cluster()], tmp_path / "l", config, note=lambda _: None)


def test_starts_of_two_charges_are_refused(made, tmp_path):
    starts = [cluster(), cluster()]
    starts[1].info["charge"] = 1
    with pytest.raises(ValueError, match=r"starts must hold structures of one charge, got \[0.0, 1.0\]"):
        learn(starts, tmp_path / "l", QUICK)
    assert not made and not (tmp_path / "l").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learn.json", "rounds.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_record_is_named(run, tmp_path, name, content):
    shutil.copytree(run.folder, tmp_path / "l")
    (tmp_path / "l" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is no record of nbody learn"):
        learn([cluster()], tmp_path / "l", QUICK)
