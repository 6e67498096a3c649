"""Damaged and made-up files: readers, configurations and model files answer with an error that names the cure."""

from __future__ import annotations

import io
import json
import re
import warnings

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.datasets import load_embedded, read_frames, read_indices, read_npz, read_split
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


#: Words that state a rule, or how what was found breaks it
RULE = re.compile(
    r"\b(must|needs?|unknown|is no|is not|are no|holds|has no|could not be read|does not|do not|differs?|belongs?"
    r"|share|damaged|more than|only|did you mean)\b"
)
#: What a message on a configuration is about: a section, one of its keys, or the file
SECTION = re.compile(r"\b(data|model|training|output|target)\b|\b(section|key)s? ['\"\w-]")
#: How Python, and the parsers below ours, speak to programmers
LEAKED = re.compile(
    r"^(list|tuple|string) index out of range|object is not (iterable|subscriptable|callable)|has no attribute"
    r"|unsupported operand|unhashable type|unexpected keyword|not supported between|^invalid literal for"
    r"|^Expecting |^Extra data|codec can't decode|^'[^']*'$|not enough values to unpack"
)


def _unclear(said: str, about: re.Pattern) -> str | None:
    """What a message lacks: what it is about, or the rule; None where it has both."""
    start = said.split("(")[0]  # what a parser below ours said may stand in brackets, behind what we say
    if LEAKED.search(start) and not about.search(start):
        return "the words of Python or a parser, with nothing of ours"
    if not about.search(said):
        return f"nothing that matches {about.pattern!r}"
    return None if RULE.search(said) else "no rule"


def refuses_clearly(function, path, about: str = "(?!)") -> None:
    """It works, or says by ValueError, TypeError or FileNotFoundError which file or argument breaks which rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(path)
        except (ValueError, TypeError, FileNotFoundError) as error:
            said = str(error)
        else:
            return
    problem = _unclear(said, re.compile(f"{re.escape(path.name)}|{about}"))
    assert problem is None, f"the message has {problem}: {said!r}"


@pytest.mark.parametrize(
    "said",
    [
        "",
        "12345678",
        "no idea what this is",
        "Expecting value: line 1 column 1 (char 0)",
        "'utf-8' codec can't decode byte 0xd1 in position 0: unexpected end of data",
        "list index out of range",
        "'NoneType' object is not iterable",
        "'train'",
        "c.yaml",
        "c.yaml: list index out of range",
        "it must be an integer",
    ],
)
def test_unclear_messages_are_noticed(said):
    assert _unclear(said, re.compile(f"c[.]yaml|{SECTION.pattern}"))


@pytest.mark.parametrize(
    "said",
    ["c.yaml must hold sections, got 3", "unknown key model.404; there are lmax", "section data must hold keys, got 3"],
)
def test_clear_messages_pass(said):
    assert _unclear(said, re.compile(f"c[.]yaml|{SECTION.pattern}")) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    frames = load_embedded("ethanol")[:3]
    for frame in frames:
        frame.to_ase().write(folder / "frames.xyz", append=True)
    z, pos = frames[0].z.numpy(), np.stack([f.pos.numpy() for f in frames])
    np.savez(folder / "frames.npz", z=z, R=pos, E=np.array([1.0, 2.0, 3.0]), energy_unit="eV", length_unit="angstrom")
    save_model(Potential(NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=2, lmax=1)), folder / "m.nbody")
    (folder / "split.json").write_text('{"train": [0, 1], "val": [2], "test": []}')
    return folder


#: Lists and arrays inside a file may be named in place of it
ABOUT = {"split.json": r"\b(train|val|test)\b"}
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
    refuses_clearly(reader, tmp_path / name, ABOUT.get(name, "(?!)"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reader"), READERS, ids=[name for name, _ in READERS])
@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_files_of_something_else(name, reader, tmp_path, content):
    (tmp_path / name).write_bytes(content)
    refuses_clearly(reader, tmp_path / name, ABOUT.get(name, "(?!)"))


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
@given(tree=WORDS | st.dictionaries(st.sampled_from(["train", "val", "test", "valid"]), WORDS, max_size=3))
def test_splits_of_odd_lists(tree, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(tree))
    refuses_clearly(read_split, tmp_path / "split.json", ABOUT["split.json"])


@FUZZ
@given(
    content=st.binary(max_size=60) | st.text(max_size=30).map(str.encode), suffix=st.sampled_from(["npz", "npy", "csv"])
)
def test_indices_of_something_else(content, suffix, tmp_path):
    (tmp_path / f"rows.{suffix}").write_bytes(content)
    refuses_clearly(read_split if suffix == "npz" else read_indices, tmp_path / f"rows.{suffix}")


@FUZZ
@given(tree=SECTIONS | WORDS)
def test_configurations(tree, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    refuses_clearly(load_config, tmp_path / "c.yaml", SECTION.pattern)


@FUZZ
@given(content=st.text(max_size=60))
def test_configurations_that_are_no_yaml(content, tmp_path):
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    refuses_clearly(load_config, tmp_path / "c.yaml", SECTION.pattern)


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
