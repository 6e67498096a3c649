"""Damaged and made-up files: readers, configurations and model files answer with an error that names the cure."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.datasets import embedded, read_frames, read_npz, read_split
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.training.config import load_config

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
WORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.dictionaries(
    st.sampled_from(["data", "model", "training", "output", "target", "modle"]),
    WORDS | st.dictionaries(
        st.sampled_from(["embedded", "num_train", "test", "e0", "scheme", "channels", "preset", "scale", "lr",
                         "max_steps", "batch_size", "dtype", "penalty", "folder", "weights", "dipole", "readout"]),
        WORDS, max_size=4,
    ),
    max_size=4,
)  # fmt: skip


def refuses_clearly(function, *arguments) -> None:
    """It works, or says what is wrong by ValueError, TypeError or FileNotFoundError, in words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = "it works"
        try:
            function(*arguments)
        except (ValueError, TypeError, FileNotFoundError) as error:
            said = str(error)
    assert len(said) >= 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    frames = embedded("ethanol")[:3]
    for frame in frames:
        frame.to_ase().write(folder / "frames.xyz", append=True)
    z, pos = frames[0].z.numpy(), np.stack([f.pos.numpy() for f in frames])
    np.savez(folder / "frames.npz", z=z, R=pos, E=np.array([1.0, 2.0, 3.0]), energy_unit="eV", length_unit="angstrom")
    save_model(Potential(NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=2, lmax=1)), folder / "m.nbody")
    (folder / "split.json").write_text('{"train": [0, 1], "val": [2], "test": []}')
    return folder


READERS = [("frames.xyz", read_frames), ("frames.npz", read_npz), ("m.nbody", load_model), ("split.json", read_split)]


@pytest.mark.parametrize(("name", "reader"), READERS, ids=[name for name, _ in READERS])
@FUZZ
@given(data=st.data())
def test_damaged_files(name, reader, files, tmp_path, data):
    good = (files / name).read_bytes()
    reader(files / name)
    cut = data.draw(st.integers(0, len(good)))
    change = data.draw(st.binary(max_size=12))
    place = data.draw(st.integers(0, len(good)))
    damaged = (good[:place] + change + good[place + len(change) :])[: max(cut, place)]
    (tmp_path / name).write_bytes(damaged)
    refuses_clearly(reader, tmp_path / name)


@pytest.mark.parametrize(("name", "reader"), READERS, ids=[name for name, _ in READERS])
@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_files_of_something_else(name, reader, tmp_path, content):
    (tmp_path / name).write_bytes(content)
    refuses_clearly(reader, tmp_path / name)


@FUZZ
@given(arrays=st.dictionaries(
    st.sampled_from(["z", "R", "E", "F", "cell", "pbc", "energy_unit", "length_unit", "nuclear_charges"]),
    st.sampled_from([np.zeros((2, 3, 3)), np.array([6, 1, 1]), np.array([1.0, np.nan]), np.zeros(0), np.array("eV"),
                     np.array("parsec"), np.array([1 + 2j]), np.ones((2, 2)), np.full((2, 3, 3), np.inf),
                     np.array([-6, 200, 1]), np.array(b"eV"), np.zeros((0, 3, 3)), np.zeros(()), np.eye(3)]),
    max_size=6,
))  # fmt: skip
def test_npz_of_odd_arrays(arrays, tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (tmp_path / "odd.npz").write_bytes(buffer.getvalue())
    refuses_clearly(read_npz, tmp_path / "odd.npz")


@FUZZ
@given(tree=SECTIONS | WORDS)
def test_configurations(tree, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    refuses_clearly(load_config, tmp_path / "c.yaml")


@FUZZ
@given(content=st.text(max_size=60))
def test_configurations_that_are_no_yaml(content, tmp_path):
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    refuses_clearly(load_config, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "content", [b"training: [", b"\xff\xfe\x00", b"data: {embedded: 3}", b"- 1", b"data:\n\ttrain: x"]
)
def test_the_command_line_answers_in_one_line(content, tmp_path, capsys):
    (tmp_path / "c.yaml").write_bytes(content)
    (tmp_path / "m.nbody").write_bytes(content)
    for words in (["train", str(tmp_path / "c.yaml")], ["info", str(tmp_path / "m.nbody")]):
        assert main(words) in (1, 2)
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and printed.startswith(f"nbody {words[0]}: error: ")
