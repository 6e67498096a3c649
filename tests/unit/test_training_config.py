"""The configuration: YAML, dotted overrides, and errors that name the nearest key."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from nbody_pyg.training.config import config_parser, load_config, model_arguments, parse_config, parse_value, parse_yaml
from nbody_pyg.training.prepare import build_potential, load_data

BASE = ["--data.embedded", "ethanol", "--training.max_steps", "3"]


def test_overrides_alone_are_enough():
    config = load_config(overrides=[*BASE, "--model.channels=4", "--training.lr", "1e-3"])
    assert config.data.embedded == "ethanol" and config.training.max_steps == 3
    assert config.model.arguments == {"channels": 4} and config.training.lr == 1e-3
    assert config.model.scheme == {"name": "NestedShells"} and config.output.folder == "runs/nbody"


def test_file_overrides_and_round_trip(tmp_path):
    text = {
        "data": {"train": "a.xyz", "test": {"hot": "b.xyz"}, "e0": {"H": -13.6}},
        "model": {"preset": "strict", "scheme": {"name": "BondTree", "cutoff": 4.0}, "lmax": 1, "scale": 2},
        "training": {"max_epochs": 2, "clip_norm": None},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(text))
    config = load_config(tmp_path / "c.yaml", ["--model.scheme.cutoff", "3.5", "--data.units", "kcal/mol"])
    assert config.model.scheme == {"name": "BondTree", "cutoff": 3.5}
    assert config.model.preset == "strict" and config.model.scale == 2.0
    assert config.data.test == {"hot": "b.xyz"} and config.data.e0 == {"H": -13.6}
    assert config.training.clip_norm is None and config.data.units == "kcal/mol"
    config.save(tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.lr = 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.learning_rat", "1"], r"unknown key training\.learning_rat"),
        (
            ["--training.batchsize", "1"],
            r"unknown key training\.batchsize; did you mean training\.batch_size\?",
        ),
        (["--trainin.lr", "1"], r"unknown section 'trainin'; did you mean training\?"),
        (["--model.chanels", "4"], r"unknown key model\.chanels; did you mean model\.channels\?"),
        (["--model.scheme.name", "BondTee"], r"unknown scheme 'BondTee'.*did you mean BondTree\?"),
        (
            ["--model.scheme.radius", "4"],
            r"unknown key model\.scheme\.radius; did you mean model\.scheme\.radii\?",
        ),
        (["--training.lr", "fast"], "training.lr"),
        (["--training.max_steps", "2.5"], "training.max_steps"),
        (["--data.rmd17", "aspirin"], "exactly one of embedded, rmd17, qm9 and train, got .'embedded', 'rmd17'"),
        (["--training.max_steps", "null"], "training needs a limit"),
        (["--output.weights", "first"], "output.weights must be 'best' or 'last', got 'first'"),
        (["training.lr", "1"], "cannot read 'training.lr'; overrides look like"),
        (["--training.lr"], "--training.lr needs a value"),
        (["--data.val", "v.xyz"], r"data\.val goes with data\.train; data\.embedded brings its own frames"),
        (["--data.test", "t.xyz"], r"data\.test goes with data\.train; data\.embedded"),
        (
            ["--data.embedded", "null", "--data.train", "a.xyz", "--data.val", "v.xyz", "--data.num_val", "5"],
            r"data\.val names the validation frames, so that data\.num_val must not be given, got 5",
        ),
    ],
)
def test_errors(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(overrides=[*BASE, *words])


def test_missing_or_shapeless_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must hold sections"):
        load_config(tmp_path / "list.yaml")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1, max_steps: 3, lr: 2}", r"holds the key 'lr' twice, the second time in line 1; keep one"),
        ("data: {}\ntraining: {}\ndata: {}\n", r"holds the key 'data' twice, the second time in line 3"),
        ("data:\n- {a: 1, b: {c: 1, c: 2}}\n", "holds the key 'c' twice"),
        (BOMB, "holds more than 100000 values, its aliases written out"),
        ("a: &a {<<: *a}", "has an alias that refers to itself"),
        ("a: &a [1, *a]", "has an alias that refers to itself"),
        ("[" * 3000, "is nested too deeply for a configuration"),
        ("a: [1, 2", "is no YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_yaml_that_means_no_configuration(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match=message):
        parse_value(text, "--model.scheme")


def test_yaml_with_aliases_of_use():
    text = "one: &one {a: 1, b: [2, 3]}\ntwo: {<<: *one, a: 4}\nthree: *one\n"
    one = {"a": 1, "b": [2, 3]}
    assert parse_yaml(text, "c.yaml") == {"one": one, "two": one | {"a": 4}, "three": one}
    assert parse_yaml("", "c.yaml") is None and parse_yaml("# nothing", "c.yaml") is None


def test_help_lists_every_key():
    text = config_parser().format_help()
    for key in ("data.embedded", "training.budget_seconds", "output.resume", "model.scheme"):
        assert f"--{key}" in text
    for name in model_arguments():
        assert f"--model.{name}" in text


@pytest.mark.slow
def test_data_and_potential_from_a_configuration():
    words = ["--data.num_train", "20", "--data.num_val", "4", "--model.channels", "4", "--model.lmax", "1"]
    config = load_config(overrides=[*BASE, *words, "--training.dtype", "float64"])
    data = load_data(config.data)
    assert [len(frames) for frames in data.named().values()][:2] == [20, 4] and set(data.tests) == {
        "300K",
        "600K",
    }
    one, two = build_potential(config, data), build_potential(config, data)
    assert one.model.species == (1, 6, 8) and one.model.channels == 4
    frame = data.train[0]
    assert float(one(frame)["energy"]) == float(two(frame)["energy"])
    assert abs(float(one(frame)["energy"] - frame.energy)) < 50
    stored = data.with_topology(one.model.scheme).train[0]
    assert "num_parts_1" in stored and float(one(stored)["energy"]) == pytest.approx(float(one(frame)["energy"]))


def test_unknown_preset_names_the_known_ones():
    config = load_config(overrides=[*BASE, "--model.preset", "fast"])
    with pytest.raises(ValueError, match=r"model.preset must be one of practical, strict, got 'fast'; try 'practical'"):
        build_potential(config, load_data(config.data))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"scheme": []}, r"model.scheme must be keys and values, got \[\]"),
        ({"preset": [1]}, r"model.preset must be text, got \[1\]"),
        ({"scale": [1]}, r"model.scale must be a number or text, got \[1\]"),
    ],
)
def test_a_wrong_type_in_the_model_section_is_told_in_our_words(model, message):
    with pytest.raises(ValueError, match=message):
        parse_config({"data": {"embedded": "ethanol"}, "model": model})


def test_keys_of_labels_are_one_mapping_with_short_forms():
    config = load_config(None, ["--data.train", "a.xyz", "--data.keys", "{energy: dft_energy, virial: w}"])
    assert config.data.keys == {"energy": "dft_energy", "virial": "w"}
    assert parse_config(yaml.safe_load(config.text())).data == config.data
    for words, message in (
        (["--data.keys", "{enrgy: x}"], "keys must name labels .* got 'enrgy'; did you mean energy"),
        (["--data.keys", "{energy: x}", "--data.energy_key", "y"], "energy_key 'y' and .* 'x' contradict each other"),
        (["--data.keys", "x"], "data.keys must be keys and values, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, ["--data.train", "a.xyz", *words])
