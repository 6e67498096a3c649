"""The protocol without any training: what is run, what is chosen, and what is read from the command line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from nbody_pyg import NBodyNet, Scheme
from nbody_pyg.compare.config import CompareConfig, compare_parser, load_compare
from nbody_pyg.compare.contestants import contestants
from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point
from nbody_pyg.compare.protocol import beyond, compare, describe
from nbody_pyg.compare.registry import MODELS
from nbody_pyg.datasets.qm9 import REGRESSION_TARGETS
from nbody_pyg.models import PRESETS
from nbody_pyg.training.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"optimizer": "adam", "lr": 1e-3, "batch_size": 4, "seed": 0, "budget_seconds": 5.0}
DATA = {"rmd17": ["aspirin", "ethanol"], "root": "somewhere"}


class Fake:
    """Runs nothing: the first of the errors depends on how far the learning rate lies from the best one.

    Any other error is the smaller, the smaller the learning rate.
    """

    def __init__(
        self, best: dict[str, float], worst: float = math.inf, errors: tuple[str, ...] = ("forces_mae", "energy_mae")
    ) -> None:
        self.best, self.worst, self.errors, self.points = best, worst, errors, []

    def __call__(self, point: Point) -> dict:
        if point.model == "painn":
            raise MissingPeer("PaiNN is not installed: pip install schnetpack")
        self.points.append(point)
        lr, optimizer = point.training["lr"], point.training["optimizer"]
        error = 10.0 + abs(math.log(lr / self.best[optimizer]))
        if lr > self.worst:
            return {"point": vars(point), "status": "failed", "reason": "loss became nan", "val": {}, "test": {}}
        values = dict.fromkeys(self.errors, 100.0 * lr) | {self.errors[0]: error}
        return {"point": vars(point), "status": "done", "val": values, "test": {}}


def quiet(_: str) -> None:
    """Nobody reads it."""


def test_a_search_chooses_on_the_first_molecule_and_trains_all_with_it():
    config = CompareConfig(
        models=["schnet"], data=DATA, search=[1e-3, 3e-3, 1e-2], search_seconds=7.0, budget=30.0, seeds=[4, 5]
    )
    run = Fake({"soap": 3e-3, "adam": 1.5e-3})
    outcome = compare(config, run, quiet)
    searches = [p for p in run.points if p.purpose == "search"]
    assert [(p.training["optimizer"], p.training["lr"]) for p in searches] == [
        (o, lr) for o in ("soap", "adam") for lr in (1e-3, 3e-3, 1e-2, *([3e-4] if o == "adam" else []))
    ]
    assert {p.dataset for p in searches} == {"aspirin"}
    assert {p.training["budget_seconds"] for p in searches} == {7.0}
    assert {p.training["seed"] for p in searches} == {4}
    finals = [p for p in run.points if p.purpose == "final"]
    assert [(p.dataset, p.training["seed"]) for p in finals] == [
        ("aspirin", 4), ("aspirin", 5), ("ethanol", 4), ("ethanol", 5),
    ]  # fmt: skip
    assert {(p.training["optimizer"], p.training["lr"]) for p in finals} == {("soap", 3e-3)}
    assert {p.training["budget_seconds"] for p in finals} == {30.0}
    assert [c.optimizer for c in outcome.choices["schnet"]] == ["soap", "adam"]
    assert not outcome.choices["schnet"][0].edge


def test_every_optimizer_gets_a_final_run_where_asked_for_and_every_molecule_a_search():
    config = CompareConfig(
        models=["schnet"], data=DATA, search=[1e-3, 1e-2], extend=0, finals="each", search_on="each", steps=10
    )
    run = Fake({"soap": 1e-2, "adam": 1e-3})
    compare(config, run, quiet)
    finals = [(p.dataset, p.training["optimizer"], p.training["lr"]) for p in run.points if p.purpose == "final"]
    rates = {"soap": 1e-2, "adam": 1e-3}
    assert sorted(finals) == sorted((m, o, rates[o]) for m in ("aspirin", "ethanol") for o in ("soap", "adam"))
    assert {p.dataset for p in run.points if p.purpose == "search"} == {"aspirin", "ethanol"}


def test_the_search_goes_on_at_an_edge_and_says_so_when_it_ends_there():
    config = CompareConfig(models=["schnet"], search=[1e-3, 3e-3], optimizers=["adam"], extend=2, finals="none")
    run = Fake({"adam": 1.0})
    outcome = compare(config, run, quiet)
    assert [p.training["lr"] for p in run.points] == [1e-3, 3e-3, 9e-3, 0.03]
    assert outcome.choices["schnet"][0].edge
    assert not outcome.finals


def test_runs_that_fail_are_no_choice():
    config = CompareConfig(models=["schnet"], search=[1e-3, 1e-2], optimizers=["adam"], extend=1, finals="none")
    run = Fake({"adam": 1.0}, worst=5e-3)
    outcome = compare(config, run, quiet)
    assert outcome.choices["schnet"][0].lr == 1e-3
    assert beyond({1e-2: math.inf, 3e-2: math.inf}) == pytest.approx(3e-3)
    assert beyond({1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0}) is None


@pytest.mark.parametrize(
    ("training", "errors"),
    [({"force_weight": 0.0}, ("energy_mae",)), ({"force_weight": 0.0}, ("energy_mae", "forces_mae")),
     ({}, ("energy_mae",))],
    ids=["QM9", "forces that are not learned", "no labels of forces"],
)  # fmt: skip
def test_energies_decide_where_no_forces_are_learned(training, errors):
    rates = [1e-3, 3e-3, 1e-2]
    config = CompareConfig(models=["schnet"], training=training, search=rates, optimizers=["adam"], finals="none")
    run = Fake({"adam": 3e-3}, errors=errors)
    (choice,) = compare(config, run, quiet).choices["schnet"]
    assert [point.training["lr"] for point in run.points] == rates  # the best lies within: nothing further is tried
    assert (choice.lr, choice.score, choice.edge) == (3e-3, 10.0, False)
    assert describe(choice) == "adam: learning rate 0.003, validation energies 10.0 meV"


def test_forces_decide_where_they_are_learned():
    config = CompareConfig(models=["schnet"], search=[1e-3, 3e-3, 1e-2], optimizers=["adam"], finals="none")
    (choice,) = compare(config, Fake({"adam": 3e-3}), quiet).choices["schnet"]
    assert describe(choice) == "adam: learning rate 0.003, validation forces 10.0 meV/A"
    run = Fake({"adam": 1.0}, worst=0.0)  # nothing is known of a run that has failed
    (choice,) = compare(config, run, quiet).choices["schnet"]
    assert choice.score == math.inf and choice.error == "forces_mae"


def test_without_a_search_the_registry_decides_and_the_missing_are_named():
    config = CompareConfig(models=["painn", "schnet", "nbody"], budget=5.0, model={"channels": 8})
    run = Fake({"soap": 1e-2, "adam": 1e-2})
    outcome = compare(config, run, quiet)
    assert outcome.missing == {"painn": "PaiNN is not installed: pip install schnetpack"}
    for point in run.points:
        found = MODELS[point.model]
        assert point.training["optimizer"] == found.optimizer
        assert point.training["lr"] == found.lr[found.optimizer]
    assert run.points[-1].arguments == {"channels": 8}
    assert run.points[0].arguments == {}
    # Apart from the model, its optimizer and learning rate, nothing differs.
    settings = [{k: v for k, v in p.training.items() if k not in ("optimizer", "lr")} for p in run.points]
    assert settings[0] == settings[1]


def test_points_with_other_settings_lie_in_other_folders():
    one = Point("painn", "PaiNN", "painn", data={"rmd17": "aspirin", "root": "a"}, training=TRAINING)
    moved = Point("painn", "PaiNN", "painn", data={"rmd17": "aspirin", "root": "b"}, training=TRAINING)
    other = Point("painn", "PaiNN", "painn", data={"rmd17": "aspirin", "root": "a"}, training=TRAINING, cutoff=4.0)
    few = Point("painn", "PaiNN", "painn", data={"rmd17": "aspirin", "num_train": 50}, training=TRAINING)
    assert one.folder == moved.folder != other.folder
    assert few.dataset == "aspirin-50"
    assert str(one.folder).startswith("aspirin/painn/final-adam-lr0.001-b4-seed0-5s-")


def test_a_run_with_other_defaults_is_another_run(monkeypatch):
    """What was finished before the default network changed must not stand for the network of now."""
    plain = Point("nbody", "NBodyNet", "nbody", data={"embedded": "ethanol"}, training=TRAINING)
    before = plain.folder
    assert plain.folder == before
    monkeypatch.setitem(PRESETS, "practical", 5)
    assert plain.folder != before


def test_targets_and_sizes_of_qm9_are_other_data():
    def name(**data: object) -> str:
        return Point("painn", "PaiNN", "painn", data={"root": "a", **data}).dataset

    assert name(qm9="U0_atomization", num_train=10_000) == "U0_atomization-dimenet-10000"
    assert name(qm9="U0_atomization", family="dimenet", num_train=1000) == "U0_atomization-dimenet-1000"
    assert name(qm9="G", family="cormorant") == "G-cormorant"
    assert name(rmd17="aspirin", family="dimenet", num_train=950) == "aspirin-950"
    assert (name(train="x/water.xyz"), name(embedded="ethanol"), name()) == ("water", "ethanol", "data")


def test_several_targets_of_qm9_are_several_data_sets():
    """`nbody train` makes one model of them; a comparison trains each alone."""
    config = load_compare(ROOT / "configs" / "compare_qm9.yaml", ["--data.qm9", "homo", "mu", "U0", "--budget", "5"])
    assert [data["qm9"] for data in config.datasets()] == ["homo", "mu", "U0"]
    assert load_compare(None, ["--data.qm9", "[r2]"]).datasets() == [{"qm9": "r2"}]
    every = load_compare(ROOT / "configs" / "compare_qm9.yaml", ["--data.qm9", "all"]).datasets()
    assert [data["qm9"] for data in every] == list(REGRESSION_TARGETS) and len(every) == 12
    assert {data["num_train"] for data in every} == {10_000}
    run = Fake({"soap": 1e-2, "adam": 1e-2}, errors=("homo_mae",))
    compare(dataclasses.replace(config, models=["nbody", "schnet"]), run, quiet)
    found = [(p.model, p.data["qm9"], p.dataset) for p in run.points]
    assert found == [
        (model, name, f"{name}-dimenet-10000") for model in ("nbody", "schnet") for name in ("homo", "mu", "U0")
    ]
    assert len({p.folder for p in run.points}) == 6


@pytest.mark.parametrize(
    ("target", "words"),
    [("homo", "homo 10000.0 meV"), ("mu", "mu 10.000 D"), ("alpha", "alpha 10.000 a0^3"), ("r2", "r2 10.000 a0^2"),
     ("Cv", "Cv 10.000 cal/mol/K"), ("zpve", "zpve 10000.0 meV"), ("U0", "energies 10.0 meV")],
)  # fmt: skip
def test_the_target_decides_in_its_usual_unit(target, words):
    """The records hold eV, as `nbody train` does; R2 of the fit is no error."""
    name = "energy" if target == "U0" else target
    config = CompareConfig(
        models=["schnet"], data={"qm9": target}, search=[1e-3, 3e-3, 1e-2], optimizers=["adam"], finals="none"
    )
    run = Fake({"adam": 3e-3}, errors=(f"{name}_mae", f"{name}_rmse", f"{name}_r2"))
    (choice,) = compare(config, run, quiet).choices["schnet"]
    assert (choice.lr, choice.score, choice.error) == (3e-3, 10.0, f"{name}_mae")
    assert describe(choice) == f"adam: learning rate 0.003, validation {words}"


def test_command_line_lies_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("models: [nbody, painn]\nbudget: 100\ndata: {rmd17: aspirin, root: a}\n")
    words = "--budget 20 --models nbody mace --search 1e-3 3e-3 --search-seconds 5 --seeds 0 1 --data.root b"
    words += " --data.rmd17 ethanol aspirin --training.energy_weight 0.1 --model.channels 16 --python mace=/x/python"
    config = load_compare(path, words.split())
    assert config.models == ["nbody", "mace"]
    assert config.limit == {"budget_seconds": 20.0}
    assert config.search == [1e-3, 3e-3]
    assert (config.search_seconds, config.seeds) == (5.0, [0, 1])
    assert [d["rmd17"] for d in config.datasets()] == ["ethanol", "aspirin"]
    assert config.datasets()[0]["root"] == "b"
    assert config.training == {"energy_weight": 0.1}
    assert config.model == {"channels": 16}
    assert config.python == {"mace": "/x/python"}
    assert load_compare(None, ["--report"]).report
    assert load_compare().datasets() == [{"embedded": "ethanol", "num_val": 50}]
    assert "--search_seconds" in compare_parser().format_help()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models nbody paynn", "did you mean painn"),
        ("--modles nbody", "did you mean models"),
        ("--budget 10 --steps 5", "budget or steps, not both"),
        ("--budget -1", "budget must be positive"),
        ("--finals some", "finals must be one of best, each, none"),
        ("--lr 1e-3 --search 1e-3 3e-3", "not both"),
        ("--training.lr 0.1", "training.lr is set by the comparison"),
        ("--training.learning_rate 0.1", "unknown key training.learning_rate"),
        ("--data.rmd17 aspirin", "needs data.root"),
        ("--data.qm9 muu", "target 'muu' is not in QM9; did you mean mu"),
        ("--data.qm9 mu muu", "target 'muu' is not in QM9; did you mean mu"),
        ("--data.qm9 mu mu", "target must list different targets of QM9"),
        ("--data.qm9 mu mulliken_charges", "must name targets of .* to learn, got 'mulliken_charges'"),
        ("--model.chanels 8", "did you mean model.channels"),
        ("--python mace", "MODEL=PATH"),
        ("--budget", "--budget needs a value"),
        ("--seeds some", "seeds"),
        ("--ablation nowhere.yaml", "no file of variants"),
        ("nbody", "cannot read 'nbody'"),
        ("--models [nbody", r"^--models \[nbody is no YAML: while parsing .*; indent by spaces"),
        ("--models=[nbody", r"^--models \[nbody is no YAML: while parsing .*; indent by spaces"),
        ("--lr inf", "lr must be positive, got inf"),
        ("--search 1e-3 nan", "search must be positive, got nan"),
        ("--timeout -1", "timeout must be positive, got -1"),
        ("--optimizers sopa", "did you mean soap"),
        ("--timeout 5 --isolate false", "timeout needs isolate"),
        ("--steps 2.5", "steps"),
    ],
)
def test_wrong_words_are_answered(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        contestants(load_compare(None, words.split()))


@pytest.mark.parametrize(
    ("text", "config", "variants"),
    [
        ("a: [1,\n", "is no YAML: while parsing", "is no YAML: while parsing"),
        ("- a\n- b\n", "must hold keys of a comparison", "must hold groups of variants"),
    ],
)
def test_broken_files_are_answered_in_one_line(tmp_path, text, config, variants):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    for read, message in (
        (lambda: load_compare(path), config),
        (lambda: contestants(CompareConfig(ablation=str(path))), variants),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_names_stay_names_and_numbers_numbers(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["--out", "2024", "--steps", "1e4", "--variants", "1e3", "no", "--ablation", "~/a.yaml"]
    found = load_compare(None, words)
    assert (found.out, found.steps, found.variants) == ("2024", 10_000, ["1e3", "no"])
    assert found.ablation == "/home/somebody/a.yaml"
    assert load_compare(None, ["--out", "$HOME/runs"]).out == "/home/somebody/runs"


def test_a_scheme_of_the_command_line_takes_the_place_of_that_of_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {lmax: 1, scheme: {name: NestedShells, radii: [3.0]}}\nsteps: 2\n")
    switched = load_compare(path, ["--model.scheme.name", "BondTree", "--model.scheme.cutoff", "4"])
    assert switched.model == {"lmax": 1, "scheme": {"name": "BondTree", "cutoff": 4}}
    assert load_compare(path, ["--model.scheme.name", "NestedShells"]).model["scheme"]["radii"] == [3.0]


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "a\nb", "\x1b[31m", "", " ", "c" * 81, "a\\b"])
def test_names_of_variants_that_lead_elsewhere_are_refused(tmp_path, name):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"groups": {"one": {name: {}}}}))
    with pytest.raises(ValueError, match="names of variants must be words"):
        contestants(CompareConfig(ablation=str(path)))


@pytest.mark.parametrize("tree", [{"one": 4}, {"one": {"base": 4}}, {"one": ["base"]}])
def test_shapeless_variants_are_answered(tmp_path, tree):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"groups": tree}))
    with pytest.raises(ValueError, match=r"a.yaml: .* must hold"):
        contestants(CompareConfig(ablation=str(path)))


def test_a_model_that_dies_is_searched_no_further():
    run, calls = Fake({"soap": 1e-2, "adam": 1e-2}), []

    def die(point: Point) -> dict:
        calls.append(point)
        nothing = {"val": {}, "test": {}, "status": "failed", "reason": "out of memory"}
        return {"point": vars(point), "died": True, **nothing} if point.model == "schnet" else run(point)

    config = CompareConfig(models=["schnet", "nbody"], search=[1e-3, 1e-2], optimizers=["adam"], steps=3, extend=2)
    outcome = compare(config, die, quiet)
    assert [p.purpose for p in calls if p.model == "schnet"] == ["search", "search", "final"]
    assert {r["status"] for r in outcome.finals} == {"failed", "done"}


def test_variants_are_overrides_of_model_and_training(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("groups: {one: {base: {}, small: {model.channels: 4}}, two: {slow: {training.lr: 0.001}}}\n")
    config = CompareConfig(ablation=str(path), model={"channels": 8, "lmax": 1}, steps=3)
    found = {c.name: c for c in contestants(config)}
    assert found["base"].arguments == {"channels": 8, "lmax": 1}
    assert found["small"].arguments == {"channels": 4, "lmax": 1}
    assert (found["small"].title, found["small"].group) == ("channels 4", "one")
    run = Fake({"soap": 1e-2, "adam": 1e-2})
    compare(config, run, quiet)
    assert [p.training["lr"] for p in run.points] == [MODELS["nbody"].lr["soap"]] * 2 + [0.001]
    assert [c.name for c in contestants(CompareConfig(ablation=str(path), variants=["slow"]))] == ["slow"]
    with pytest.raises(ValueError, match="has no variant 'slwo'"):
        contestants(CompareConfig(ablation=str(path), variants=["slwo"]))
    path.write_text("groups: {one: {base: {data.rmd17: aspirin}}}\n")
    with pytest.raises(ValueError, match=r"overrides 'data\.rmd17'; keys are model\.KEY and training\.KEY"):
        contestants(CompareConfig(ablation=str(path)))
    path.write_text("groups: {one: {base: {}}, two: {base: {}}}\n")
    with pytest.raises(ValueError, match="twice"):
        contestants(CompareConfig(ablation=str(path)))


@pytest.mark.slow
def test_every_variant_that_we_ship_can_be_built():
    found = contestants(CompareConfig(ablation=str(ROOT / "configs" / "ablations.yaml")))
    assert len(found) > 30
    described = set()
    for variant in found:
        tree = {"data": {"embedded": "ethanol"}, "training": {"max_steps": 1, **variant.training}}
        config = parse_config({**tree, "model": dict(variant.arguments)})
        preset = {"practical": NBodyNet.practical, "strict": NBodyNet.strict}[config.model.preset]
        model = preset([1, 6, 8], scheme=Scheme.from_config(dict(config.model.scheme)), **config.model.arguments)
        described.add(f"{model.config()} {config.training}")
    assert len(described) == len(found), "two variants are the same"


def test_the_configuration_that_we_ship_is_read():
    config = load_compare(ROOT / "configs" / "compare_rmd17.yaml", ["--data.root", "x"])
    assert len(config.datasets()) == 4
    assert {"nbody", "painn", "tensornet", "nequip", "mace"} <= set(config.models)
