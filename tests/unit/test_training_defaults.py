"""Settings chosen from the data: the rule on a crystal, molecules and water; what is printed, stored and overridden."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from nbody_pyg.cli import main
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, load_embedded
from nbody_pyg.deploy import read_metadata
from nbody_pyg.training.config import load_config
from nbody_pyg.training.defaults import CHOSEN, FrameStatistics, choose_defaults, keep_choices
from nbody_pyg.training.prepare import DataSets

TINY = ["--model.channels", "2", "--model.lmax", "1", "--training.log_every", "1", "--output.plot", "false",
        "--output.folder", "r"]  # fmt: skip


def labelled(atoms: Atoms, seed: int, stress: bool = False) -> Atoms:
    """Made-up labels, which the rule does not look at."""
    atoms = atoms.copy()
    atoms.rattle(0.05, seed=seed)
    generator = np.random.default_rng(seed)
    labels = {"energy": float(generator.normal()), "forces": generator.normal(size=(len(atoms), 3))}
    atoms.calc = SinglePointCalculator(atoms, **labels, **({"stress": generator.normal(size=6)} if stress else {}))
    return atoms


def silicon(size: int = 2, stress: bool = True) -> list[Atoms]:
    return [labelled(bulk("Si", cubic=True) * (size, size, size), seed, stress) for seed in range(3)]


def water() -> list[Atoms]:
    one = molecule("H2O")
    frames = []
    for seed in range(2):
        box = Atoms(cell=[9.3] * 3, pbc=True)
        for place in np.ndindex(3, 3, 3):
            other = one.copy()
            other.rotate(37 * sum(place) + seed, (1, 2, 3))
            other.translate(3.1 * np.array(place))
            box += other
        frames.append(labelled(box, seed))
    return frames


def ethanol(count: int = 4) -> list[Atoms]:
    return [frame.to_ase() for frame in load_embedded("ethanol")[:count]]


def data(systems: list[Atoms]) -> DataSets:
    return DataSets([AtomicData.from_ase(atoms) for atoms in systems], ())


def chosen(systems: list[Atoms], *words: str) -> dict[str, object]:
    config = load_config(overrides=["--data.train", "a.xyz", *words])
    config, choices = choose_defaults(config, data(systems))
    values = {choice.key: choice.value for choice in choices}
    assert values.keys() <= set(CHOSEN) and all(choice.reason for choice in choices)
    scheme, training = config.model.scheme, dataclasses.asdict(config.training)
    for key, value in values.items():  # they are in the configuration too
        section, name = key.split(".")[-2:]
        where = {"scheme": scheme, "training": training, "data": dataclasses.asdict(config.data),
                 "model": config.model.arguments}[section]  # fmt: skip
        assert where[name] == value
    return values


def test_the_first_shell_is_that_of_the_element_with_the_longest_distance():
    found = FrameStatistics.of(data(silicon()).train)
    assert found.first_shell == pytest.approx(2.35, abs=0.1) and found.element == "Si"
    assert found.sizes == (64, 64) and found.periodic and found.labels == {"energy", "forces", "stress"}
    salt = [labelled(bulk("NaCl", "rocksalt", a=5.64, cubic=True), seed) for seed in range(3)]
    salt.append(labelled(molecule("H2O"), 0))  # a short bond does not hide the long ones
    found = FrameStatistics.of(data(salt).train)
    assert found.first_shell == pytest.approx(2.82, abs=0.15) and found.element in ("Na", "Cl")


def test_frames_without_neighbours_have_no_first_shell():
    found = FrameStatistics.of(data([Atoms("He"), Atoms("Ne")]).train)
    assert found.first_shell == 0.0 and found.sizes == (1, 1) and not found.periodic
    assert chosen([labelled(Atoms("He"), 0)])["model.scheme.radii"] == [3.5, 5.0]


@pytest.mark.slow
def test_crystals():
    found = chosen(silicon())
    shell = FrameStatistics.of(data(silicon()).train).first_shell
    assert found["model.scheme.radii"] == pytest.approx([1.9 * shell, 2.5 * shell], abs=0.01)
    assert found["training.energy_per"] == "atom" and found["training.energy_weight"] > 0
    assert found["training.stress_weight"] > 0 and found["model.lmax"] == 3
    assert not {"model.lmax", "model.channels"} & chosen(silicon(), "--model.channels", "32").keys()
    assert "training.stress_weight" not in chosen(silicon(stress=False))
    assert found["training.batch_size"] < chosen(silicon(1))["training.batch_size"], "small cells go together"


def test_molecules_of_one_size_keep_their_defaults():
    found = chosen(ethanol())
    assert found["model.scheme.radii"] == [3.5, 5.0] and found["model.scheme.exponent"] == 3
    assert (found["training.energy_per"], found["training.energy_weight"]) == ("molecule", 0.05)
    assert found["training.batch_size"] == 5 and "training.stress_weight" not in found
    assert not {"model.lmax", "model.channels"} & found.keys()
    mixed = [*ethanol(), labelled(molecule("CH4"), 0)]
    assert chosen(mixed)["training.energy_per"] == "atom" and chosen(mixed)["model.scheme.radii"] == [3.5, 5.0]
    # A weight does not change what energies are divided by, and the other way round
    weighted = chosen(mixed, "--training.energy_weight", "30")
    assert weighted["training.energy_per"] == "atom" and "training.energy_weight" not in weighted
    assert chosen(mixed, "--training.energy_per", "molecule")["training.energy_weight"] == 0.05
    assert chosen(ethanol(), "--training.energy_per", "atom")["training.energy_weight"] == 5.0


def test_water_is_periodic_with_the_radii_of_molecules():
    found = chosen(water())
    assert found["model.scheme.radii"] == [3.5, 5.0] and found["training.energy_per"] == "atom"
    assert "model.lmax" not in found


@pytest.mark.slow
def test_e0_of_single_atoms():
    lone = [labelled(Atoms(symbol), 1) for symbol in ("H", "C", "O")]
    assert chosen([*ethanol(), *lone])["data.e0"] == "isolated"
    assert "data.e0" not in chosen([*ethanol(), *lone[:2]]), "one element has none"
    ion = AtomicData.from_ase(lone[2])
    ion.charge = torch.tensor([-1.0])
    sets = DataSets([AtomicData.from_ase(a) for a in [*ethanol(), *lone[:2]]], (), {"test": [ion]})
    config = load_config(overrides=["--data.train", "a.xyz"])
    assert choose_defaults(config, sets)[0].data.e0 == "lstsq", "an ion is no atom"
    del ion.charge
    ion.charges = torch.tensor([-1.0])
    assert choose_defaults(config, sets)[0].data.e0 == "lstsq", "also where only its formal charge is known"
    del ion.charges
    assert choose_defaults(config, sets)[0].data.e0 == "isolated", "wherever the split has put it"


def test_a_crystal_of_one_atom_per_cell_is_no_isolated_atom():
    copper = [labelled(bulk("Cu"), seed) for seed in range(2)]
    assert "data.e0" not in chosen(copper)
    wide = labelled(Atoms("Cu", cell=[12.0] * 3, pbc=True), 2)
    assert chosen([*copper, wide])["data.e0"] == "isolated"


def test_isolated_atoms_do_not_count_among_the_sizes():
    lone = [labelled(Atoms(symbol), 1) for symbol in ("H", "C", "O")]
    found = FrameStatistics.of(data([*ethanol(), *lone]).train)
    assert found.sizes == (9, 9) and found.one_molecule_size
    assert chosen([*ethanol(), *lone])["training.energy_per"] == "molecule"
    assert FrameStatistics.of(data(lone).train).sizes == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--model.scheme.radii", "[3.0, 4.0]"], "model.scheme.radii"),
        (["--model.scheme.exponent", "6"], "model.scheme.exponent"),
        (["--training.energy_weight", "0.05"], "training.energy_weight"),
        (["--training.energy_per", "molecule"], "training.energy_per"),
        (["--training.stress_weight", "0"], "training.stress_weight"),
        (["--training.batch_size", "5"], "training.batch_size"),
        (["--training.max_steps", "5"], "training.budget_seconds"),
        (["--model.scheme.name", "SmoothSurvivors"], "model.scheme.radii"),
        (["--model.irreps", "8x0e + 4x1o"], "model.lmax"),
    ],
)
def test_what_the_user_names_stays(words, key):
    """Also where it is the default of the class."""
    assert key in chosen(silicon()) and key not in chosen(silicon(), *words)


@pytest.mark.slow
def test_a_run_says_stores_and_resumes_its_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("si.xyz", silicon(1) + silicon(1, stress=False))
    words = ["train", "--data.train", "si.xyz", *TINY]
    assert main([*words, "--training.max_steps", "2"]) == 0
    out = capsys.readouterr().out
    stored = load_config("r/config.yaml")
    for key, value in (("model.scheme.radii", stored.model.scheme["radii"]), ("training.energy_per", "atom"),
                       ("training.stress_weight", stored.training.stress_weight),
                       ("training.batch_size", stored.training.batch_size)):  # fmt: skip
        assert f"chosen  {key} {value}: " in out
    assert stored.model.scheme["radii"] != [3.5, 5.0] and stored.training.energy_per == "atom"
    assert read_metadata("r/model.nbody")["metadata"]["config"]["training"]["energy_per"] == "atom"
    # Other frames would be given other settings; the run keeps its own
    write("si.xyz", silicon(2)[:1], append=True)
    assert main([*words, "--training.max_steps", "4", "--output.resume", "true"]) == 0
    out = capsys.readouterr().out
    assert "chosen" not in out and load_config("r/config.yaml").model == stored.model
    assert dataclasses.replace(load_config("r/config.yaml").training, max_steps=2) == stored.training
    assert main(["train", "r/config.yaml", "--output.folder", "again", "--output.resume", "false"]) == 0
    assert "chosen" not in capsys.readouterr().out and load_config("again/config.yaml").training.max_steps == 4
    assert main([*words, "--training.max_steps", "6", "--training.energy_per", "molecule", "--output.resume", "true"])
    assert 'training.energy_per is "atom" there, "molecule" here' in capsys.readouterr().err


def test_limits_of_a_run_that_names_none():
    config = load_config(overrides=["--data.train", "a.xyz"])
    assert (config.training.budget_seconds, config.training.max_epochs) == (600.0, 250)
    kept = {"training": {"budget_seconds": None, "max_epochs": 7, "max_steps": None}}
    assert keep_choices(config, kept).training.max_epochs == 7, "a resumed run keeps its own"
    longer = load_config(overrides=["--data.train", "a.xyz", "--training.max_steps", "9"])
    assert keep_choices(longer, kept).training.max_epochs is None, "unless it is given another"


@pytest.mark.slow
def test_a_trained_model_is_tuned_in_few_passes():
    """Ten passes for each atom of a frame, also beside a limit of time; not beside limits of passes or steps."""
    frames = [AtomicData(z=torch.ones(n).long(), pos=torch.randn(n, 3).double()) for n in (1, 4, 8)]
    data = DataSets(Frames(frames), Frames())
    words = ["--data.train", "a.xyz", "--init", "m.nbody"]
    for more, passes in (
        ([], 60),
        (["--training.budget_seconds", "9"], 60),
        (["--training.max_steps", "9"], None),
        (["--training.max_epochs", "3"], 3),
        (["--finetune.parts", "readouts"], 250),
    ):
        config = load_config(overrides=[*words, *more])
        chosen, choices = choose_defaults(config, data)
        assert chosen.training.max_epochs == passes
        limited = more[:1] in (["--training.max_epochs"], ["--training.max_steps"])
        assert any(choice.key == "training.max_epochs" for choice in choices) != limited
        # The same words go on with the same passes
        assert keep_choices(config, chosen.to_dict()).training.max_epochs == passes
    many = DataSets(Frames(frames * 100), Frames())
    for more, passes in ([], 250), (["--training.budget_seconds", "9"], 360):
        assert choose_defaults(load_config(overrides=[*words, *more]), many)[0].training.max_epochs == passes
    scratch = load_config(overrides=[*words[:2], "--training.budget_seconds", "9"])
    assert choose_defaults(scratch, data)[0].training.max_epochs is None


# -- latent charges ------------------------------------------------------------------------------------------
def chains(charge: float, length: int = 5) -> list[Atoms]:
    """Chains of ethanol molecules, 4 angstrom apart, with a total charge."""
    frames = []
    for atoms in ethanol():
        chain = Atoms()
        for place in range(length):
            one = atoms.copy()
            one.translate([4.0 * place, 0.0, 0.0])
            chain += one
        chain = labelled(chain, len(frames))
        chain.info["charge"] = charge
        frames.append(chain)
    return frames


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frames", "words", "chosen"),
    [
        (chains(1.0), [], True),
        (chains(0.0), [], False),
        (chains(1.0, length=1), [], False),
        (chains(1.0), ["--model.long_range=null"], False),
        (chains(1.0), ["--training.compile=true"], False),
        (chains(1.0), ["--model.preset=strict"], False),
    ],
    ids=["charged", "neutral", "small", "given", "compiled", "strict"],
)
def test_wide_frames_with_a_charge_get_latent_charges(frames, words, chosen):
    config, choices = choose_defaults(load_config(None, ["--data.train=x.xyz", *words]), data(frames))
    found = [choice for choice in choices if choice.key == "model.long_range"]
    assert bool(found) is chosen
    if chosen:
        assert config.model.arguments["long_range"] == {"method": "direct", "states": True, "transfers": False}
        assert "frames have a charge and are 19 angstrom wide, more than 10" in str(found[0])


@pytest.mark.slow
def test_the_command_trains_latent_charges_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("chains.xyz", chains(1.0, length=3))
    words = ["train", "--data.train", "chains.xyz", "--init", "none", *TINY]
    assert main([*words, "--training.max_steps", "2"]) == 0
    assert "chosen  model.long_range" in capsys.readouterr().out
    assert read_metadata("r/model.nbody")["model"]["config"]["long_range"]["states"] is True
    assert main([*words, "--training.max_steps", "3", "--output.resume", "true"]) == 0
