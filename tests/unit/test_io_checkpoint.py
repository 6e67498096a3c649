"""Checkpoints: sealed, so that a changed or cut file is never taken for the right one."""

from __future__ import annotations

import random
import re

import pytest
import torch

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.io.checkpoint import changes, read_checkpoint, seal
from nbody_pyg.training import PotentialTask, TrainingConfig, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with last.ckpt and best.ckpt, and the model that was trained."""
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = Potential(NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=2, lmax=1))
    frames = load_embedded("ethanol")[:6]
    settings = TrainingConfig(max_steps=4, batch_size=3, validate_every=2)
    fit(model, frames, frames[:2], settings, path, show_progress=False)
    save_model(model, path / "model.nbody")
    return path


def test_a_sealed_file_is_read_as_before(run):
    found = read_checkpoint(run / "last.ckpt")
    plain = torch.load(run / "last.ckpt", weights_only=True)
    assert found["global_step"] == plain["global_step"] == 4
    assert all(torch.equal(found["state_dict"][key], value) for key, value in plain["state_dict"].items())
    best = read_checkpoint(run / "best.ckpt")
    assert best["run"]["id"] == found["run"]["id"] and re.fullmatch("[0-9a-f]{32}", found["run"]["id"])


@pytest.mark.parametrize(("flips", "cuts"), [(100, 20), pytest.param(1000, 200, marks=pytest.mark.slow)])
def test_every_changed_byte_and_every_cut_is_found(run, tmp_path, flips, cuts):
    content, path, draw = (run / "last.ckpt").read_bytes(), tmp_path / "c.ckpt", random.Random(0)
    places = [draw.randrange(len(content)) for _ in range(flips)] + [len(content) - 1 - n for n in range(100)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"c\.ckpt is cut, damaged, or no checkpoint"):
            read_checkpoint(path)
    for length in [draw.randrange(1, len(content)) for _ in range(cuts)] + [len(content) - 1 - n for n in range(10)]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"c\.ckpt is cut, damaged, or no checkpoint"):
            read_checkpoint(path)
    path.write_bytes(content)
    assert read_checkpoint(path)["global_step"] == 4


def test_a_task_is_loaded_from_whole_files_only(run, tmp_path):
    content, path, draw = bytearray((run / "last.ckpt").read_bytes()), tmp_path / "c.ckpt", random.Random(1)
    path.write_bytes(content)
    right = PotentialTask.load_from_checkpoint(path).state_dict()
    trained = load_model(run / "model.nbody").state_dict()
    assert all(torch.equal(right[f"potential.{key}"], value) for key, value in trained.items()) and len(trained) > 5
    for _ in range(5):
        changed = bytearray(content)
        changed[draw.randrange(len(content) - 100)] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"c\.ckpt is cut, damaged"):
            PotentialTask.load_from_checkpoint(path)


def test_what_is_no_checkpoint_is_named_with_the_cure(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.ckpt"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match=r"model\.nbody is a model file; training goes on from a checkpoint"):
        read_checkpoint(run / "model.nbody")
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"last\.ckpt is empty; start anew"):
        read_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(ValueError, match=r"last\.ckpt is empty; copy best\.ckpt over it to go on from there, or"):
        read_checkpoint(tmp_path / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    seal(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="lacks callbacks, cpu_seconds, global_step"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_no_code_is_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "planted"), "w"))

    torch.save({"state_dict": Planted()}, tmp_path / "c.ckpt")
    seal(tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "c.ckpt")
    assert not (tmp_path / "planted").exists()


def test_a_checkpoint_is_no_model(run, capsys):
    with pytest.raises(
        ValueError, match=r"best\.ckpt is a checkpoint of a training .*, no model file; .* model\.nbody"
    ):
        load_model(run / "best.ckpt")
    for words in (["info"], ["evaluate", "ethanol:test_300K"], ["energies", "ethanol"], ["check"]):
        assert main([words[0], str(run / "last.ckpt"), *words[1:]]) == 1
        assert "last.ckpt is a checkpoint of a training" in capsys.readouterr().err


def test_changes_by_name():
    old = {"a": {"b": 1, "c": [1, 2], "d": 1.0}, "e": "x", "f": None}
    assert changes(old, {"a": {"b": 1, "c": (1, 2), "d": 1 + 1e-13}, "e": "x"}) == ""
    assert changes(old, {"a": {"b": 2, "c": [1], "d": 1}, "e": "x", "g": True}) == (
        "a.b is 1 there, 2 here; a.c is [1, 2] there, [1] here; g is null there, true here"
    )
    assert changes(old, old | {"e": "y"}, free=("e",)) == changes({"a": {"b": 1}}, {"a": {"b": 2}}, ("a.b",)) == ""
    assert changes({"a": {"7": 1.0}}, {"a": None}) == 'a is {"7": 1.0} there, null here'
