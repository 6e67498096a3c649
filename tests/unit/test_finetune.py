"""Fine-tuning: what is taken over of a trained model, what is trained of it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

import factories
from nbody_pyg import AtomicReference, BondTree, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import find_model, load_model, read_metadata, save_model, shipped_models
from nbody_pyg.io import model_file
from nbody_pyg.io.checkpoint import read_checkpoint
from nbody_pyg.nn.linear import RowLinear
from nbody_pyg.properties import Property, PropertyModel, Statistics
from nbody_pyg.training import TrainingConfig, defaults, fit
from nbody_pyg.training.adapters import Adapters
from nbody_pyg.training.finetune import inherit, nearest_element, replayed, tuned_model
from nbody_pyg.training.settings import FineTuneConfig

OLD = (1, 6, 7, 8)
E0 = {1: -13.6, 6: -1030.0, 7: -1480.0, 8: -2040.0}
SETTINGS = TrainingConfig(max_steps=4, batch_size=2, dtype="float64", validate_every=2, log_every=1, warmup_steps=0)


def awake(model):
    """Every weight different, so that a lost or exchanged row is seen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def trained(scheme=None, species=OLD, **options) -> Potential:
    torch.manual_seed(3)
    return awake(factories.potential(scheme, {z: E0[z] for z in species}, 0.7, species=species, **options)).eval()


def frames(count: int = 4, replace: dict[int, int] | None = None, shift: dict[int, float] | None = None) -> list:
    """Ethanol and its fragments without a hydrogen, so that compositions differ; energies of ``trained()``."""
    out = []
    for number, frame in enumerate(load_embedded("ethanol")[:count]):
        kept = torch.arange(len(frame.z))[: len(frame.z) - number % 3]
        kept = kept[kept != 2] if number % 4 == 3 else kept
        z = frame.z[kept]
        for a, b in (replace or {}).items():
            z = torch.where(z == a, b, z)
        energy = sum((shift or {}).get(n, 0.0) for n in z.tolist())
        forces = frame.forces[kept]
        out.append(AtomicData(z=z, pos=frame.pos[kept], energy=torch.tensor([float(energy)]).double(), forces=forces))
    return out


def labelled(potential, given) -> list:
    """The same frames with the energies of a potential added to theirs, and with its forces."""
    out = []
    for frame in given:
        found = potential(frame)
        out.append(AtomicData(z=frame.z, pos=frame.pos, energy=frame.energy + found["energy"], forces=found["forces"]))
    return out


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -- elements ------------------------------------------------------------------------------------------------
KINDS = {
    "shells": {},
    "bonds": {"scheme": BondTree(), "num_layers": 3},
    "types": {"channels": None, "lmax": None, "irreps": "4x0e + 2x1o", "scheme": NestedShells((3.0, 4.0))},
    "charges": {"inputs": ["charge"], "long_range": {"method": "direct", "elements": False}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_old_elements_keep_their_energies_and_forces(kind):
    init = trained(**KINDS[kind])
    given = frames(3)  # no nitrogen
    extra = frames(2, {8: 16})  # oxygen replaced by sulfur
    model, heirs = tuned_model(init, [*given, *extra])
    assert model.species == (1, 6, 8, 16) and heirs.copied == {16: 8} and heirs.dropped == (7,)
    for frame in given:
        old, new = init(frame), model(frame)
        assert float(old["interaction_energy"].abs()) > 1e-3 and float(old["forces"].abs().max()) > 1e-3
        torch.testing.assert_close(new["interaction_energy"], old["interaction_energy"], rtol=0, atol=1e-12)
        torch.testing.assert_close(new["forces"], old["forces"], rtol=0, atol=1e-11)
        change = new["energy"] - old["energy"]
        e0 = sum(model.reference.energies[z] - E0[z] for z in frame.z.tolist())
        assert float(change) == pytest.approx(e0, abs=1e-8)
    inner = float(model.scale) * model.model(extra[0].z, extra[0].pos)
    same = float(init.scale) * init.model(frames(2)[0].z, extra[0].pos)
    if kind != "bonds":  # a bond of sulfur is longer
        torch.testing.assert_close(inner, same, rtol=0, atol=1e-12, msg="sulfur starts as oxygen")


def test_an_exchanged_row_is_seen():
    """The comparison above fails where a row of another element is taken."""
    init, given = trained(), frames(3)
    model, _ = tuned_model(init, given)
    with torch.no_grad():
        model.model.shift.copy_(model.model.shift.flip(0))
    gap = model(given[0])["interaction_energy"] - init(given[0])["interaction_energy"]
    assert float(gap.abs()) > 1e-3


def test_elements_can_be_kept_with_their_old_e0():
    model, heirs = tuned_model(trained(), labelled(trained(), frames(4)), keep_elements=True)
    assert model.species == OLD and heirs.dropped == ()
    assert model.reference.energies[7] == E0[7]
    assert nearest_element(7, [6, 15]) == 15 and nearest_element(1, [3, 9]) == 3


# -- latent charges that are added ---------------------------------------------------------------------------
CHARGES = {"method": "direct", "states": True, "transfers": False}


def test_latent_charges_are_added_with_an_energy_near_zero():
    init, given = trained(), frames(3)
    model, heirs = tuned_model(init, given, long_range=CHARGES)
    plain, _ = tuned_model(init, given)
    assert heirs.charges and "added   latent charges, which" in "\n".join(heirs.lines())
    assert model.model.long_range.config.states and plain.model.long_range is None
    old, new = plain.model.state_dict(), model.model.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items()) and len(new) > len(old)
    for frame in given:
        added = model(frame)["forces"] - plain(frame)["forces"]
        assert 1e-6 < float(added.abs().max()) < 0.1
    again, heirs = tuned_model(model, given, long_range="direct")  # those that it has are kept
    assert not heirs.charges and again.model.long_range.config == model.model.long_range.config
    torch.testing.assert_close(again(given[0])["forces"], model(given[0])["forces"], rtol=0, atol=1e-12)


def test_fit_adds_latent_charges_to_a_model_without(tmp_path):
    init = trained(species=(1, 6, 8))
    given = labelled(init, frames(2))
    model = Potential(init.model.remade(long_range=CHARGES), None, float(init.scale))
    before = weights(model.model.long_range)
    fit(model, given, settings=SETTINGS, folder=tmp_path, init=init, show_progress=False)
    assert not torch.equal(weights(model.model.long_range), before)
    with pytest.raises(ValueError, match=r"long_range must be that of Potential|long_range must be that of NBodyNet"):
        inherit(init, model, given)


# -- E0 ------------------------------------------------------------------------------------------------------
def test_e0_is_refitted_to_what_the_network_leaves_over_and_said():
    init, shift = trained(), {1: 2.0, 6: -7.0, 8: 30.0}
    model, heirs = tuned_model(init, labelled(init, frames(8, shift=shift)))
    for z, change in shift.items():
        assert model.reference.energies[z] == pytest.approx(E0[z] + change, abs=1e-7)
    assert float(model.scale) == float(init.scale) == 0.7
    text = "\n".join(heirs.lines())
    assert "E0      refitted" in text and "O -2010.0000 (was -2040.0000)" in text and "dropped N" in text


def test_of_one_composition_e0_stays_where_it_was():
    """A level of theory that has not changed gives the E0 of before, although one molecule tells one sum only."""
    init = trained()
    model, _ = tuned_model(init, labelled(init, frames(1)))
    assert model.reference.energies == pytest.approx({z: E0[z] for z in (1, 6, 8)}, abs=1e-8)
    given, _ = tuned_model(init, frames(1), {1: 1.0, "C": 2.0, 8: 3.0})
    assert given.reference.energies == {1: 1.0, 6: 2.0, 8: 3.0}


def test_models_of_properties_are_tuned_with_refitted_statistics(tmp_path):
    properties = [Property("u", "extensive", "eV")]
    torch.manual_seed(0)
    init = PropertyModel(
        awake(factories.net(species=OLD)), properties, {"u": Statistics(0.0, 3.0, dict.fromkeys(OLD, 1.0))}
    )
    given = frames(6)
    for frame in given:
        frame.u = init(frame)["u"].detach() + float((frame.z == 8).sum()) * 5.0
    model, _ = tuned_model(init, given)
    assert isinstance(model, PropertyModel) and model.statistics["u"].scale == 3.0 and model.species == (1, 6, 8)
    assert model.statistics["u"].elements == pytest.approx({1: 1.0, 6: 1.0, 8: 6.0}, abs=1e-8)
    assert float(init(given[0])["u"].detach().abs()) > 1e-3
    before = weights(model)
    fit(model, given, given[:2], SETTINGS, tmp_path, init=init, finetune=FineTuneConfig(parts="adapters", rank=2))
    assert not torch.equal(weights(model), before) and model.ancestor is not None


# -- refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": NestedShells((4.5,))}, r"scheme\.radii must be that of Net.*, \[4.0\], got \[4.5\]; build the"),
        ({"scheme": NestedShells((4.0,), exponent=6)}, r"scheme\.exponent must be that of .*, 3, got 6;"),
        ({"scheme": BondTree()}, r"scheme\.name must be that of .*, 'NestedShells', got 'BondTree';"),
        ({"channels": 5}, r"channels must be that of .*, 4, got 5;"),
        ({"lmax": 2}, r"lmax must be that of .*, 1, got 2;"),
        ({"preset": "strict"}, r"preset must be that of .*, 'practical', got 'strict';"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused(tmp_path, options, message):
    init = trained()
    init.origin = {"name": "Net", "sha256": "0"}
    other = factories.potential(e0=None, **options)
    with pytest.raises(ValueError, match=message):
        fit(other, frames(), (), SETTINGS, tmp_path / "r", init=init)
    assert not (tmp_path / "r").exists()


def test_other_kinds_and_lonely_settings_are_refused(tmp_path):
    model = PropertyModel(factories.net(), [Property("u", "extensive")])
    with pytest.raises(ValueError, match="init must be of the same kind as the model, a Potential of a NBodyNet, got"):
        inherit(trained(), model, frames())
    with pytest.raises(ValueError, match="finetune needs the model to start from"):
        fit(trained(), frames(), (), SETTINGS, tmp_path, finetune=FineTuneConfig())
    with pytest.raises(ValueError, match=r"finetune\.parts must be all, readouts, adapters.*'readout'; did you mean"):
        fit(trained(), frames(), (), SETTINGS, tmp_path, init=trained(), finetune=FineTuneConfig(parts="readout"))
    settings = FineTuneConfig(parts="adapters", rank=99)
    with pytest.raises(ValueError, match="rank must be below the sides of the maps"):
        fit(trained(), frames(), (), SETTINGS, tmp_path, init=trained(), finetune=settings)
    cases = (({"rank": 0}, "rank must be 1"), ({"anchor": -1.0}, "anchor must be"), ({"parts": []}, "must name what"),
             ({"replay_frames": 3}, "must be positive and go with"))  # fmt: skip
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            FineTuneConfig(**wrong)


# -- what is trained -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_only_the_named_parts_change(tmp_path):
    for parts, changed in (
        ("readouts", {"readouts", "shift"}),
        (["readouts", "interactions.0.bias"], {"readouts", "shift", "interactions.0.bias"}),
    ):
        init = trained()
        model, _ = tuned_model(init, frames())
        before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
        fit(model, frames(), (), SETTINGS, tmp_path / "r", init=init, finetune=FineTuneConfig(parts=parts))
        for name, p in model.model.named_parameters():
            free = any(name == part or name.startswith(f"{part}.") for part in changed)
            assert torch.equal(p, before[name]) != free, name
            assert p.requires_grad


def test_a_map_with_an_adapter_is_the_sum_of_two_maps(generator):
    """W_0 + A B gives the values of x W_0 + (x A) B, and A and B get its gradients."""
    torch.manual_seed(0)
    linear = RowLinear("6x0e + 6x1o", "5x0e + 5x1o").double()
    given = {f"weights.{n}": w for n, w in enumerate(linear.weights)}
    first = [w.detach().clone() for w in linear.weights]
    adapters = Adapters(given, rank=2)
    with torch.no_grad():
        for b in adapters.b:
            b.normal_()
    adapters.fold()
    x = torch.randn(7, 4, 6, dtype=torch.float64, generator=generator)
    y = linear(x)
    rows, ab = [slice(0, 1), slice(1, 4)], list(zip(adapters.a, adapters.b, strict=True))
    unfolded = torch.cat([x[:, r] @ w + x[:, r] @ a @ b for r, w, (a, b) in zip(rows, first, ab, strict=True)], 1)
    without = torch.cat([x[:, r] @ w for r, w in zip(rows, first, strict=True)], 1)
    assert float((unfolded - without).detach().abs().max()) > 0.1
    torch.testing.assert_close(y, unfolded, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(unfolded.square().sum(), [*adapters.a, *adapters.b])
    y.square().sum().backward()
    adapters.pull()
    for p, gradient in zip([*adapters.a, *adapters.b], wanted, strict=True):
        assert float(gradient.abs().max()) > 0.1
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="rank must be below the smallest side of the maps, 5"):
        Adapters(given, rank=5)


def test_a_run_with_adapters_gives_an_ordinary_model(tmp_path):
    init = trained()
    model, _ = tuned_model(init, frames())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = FineTuneConfig(parts="adapters", rank=2)
    fit(model, frames(), frames(2), SETTINGS, tmp_path / "r", init=init, finetune=settings)
    assert {name for name, _ in model.named_parameters()} == set(before)
    ranks = []
    for name, p in model.named_parameters():
        change = p.detach() - before[name]
        if ".weights." in name and "interactions" in name and min(p.shape) > 2:
            ranks.append(int(torch.linalg.matrix_rank(change, atol=1e-12)))
    assert len(ranks) > 5 and set(ranks) == {2}
    state = read_checkpoint(tmp_path / "r" / "last.ckpt")["state_dict"]
    save_model(model, tmp_path / "m.nbody")
    read = load_model(tmp_path / "m.nbody")
    assert torch.equal(weights(read), weights(model)) and float(weights(model).abs().max()) > 0.1
    for name, p in read.named_parameters():
        assert torch.equal(state[f"potential.{name}"], p), "the checkpoint holds folded weights"


@pytest.mark.slow
def test_an_anchor_pulls_back_to_the_first_weights(tmp_path):
    gaps = []
    for anchor in (0.0, 5.0, 1 / SETTINGS.lr):
        model, _ = tuned_model(trained(), frames())
        first = weights(model)
        settings = dataclasses.replace(SETTINGS, constant_fraction=1.0, max_steps=6)
        fit(model, frames(), (), settings, tmp_path / "r", init=trained(), finetune=FineTuneConfig(anchor=anchor))
        gaps.append(float((weights(model) - first).norm()))
    assert gaps[0] > 1.05 * gaps[1] > 1e-3
    assert gaps[2] < 1e-12, "a pull of the whole way leaves the first weights"


# -- replay --------------------------------------------------------------------------------------------------
def test_replayed_frames_get_the_new_e0():
    init, shift = trained(), {1: 2.0, 6: -7.0, 8: 30.0}
    old = labelled(init, frames(6))
    model, _ = tuned_model(init, labelled(init, frames(8, shift=shift)))
    again = replayed(model, init, [*old, *frames(2, {8: 16})], 4)
    assert len(again) == 4
    for frame in again:
        match = next(f for f in old if torch.equal(f.pos, frame.pos))
        assert float(frame.energy - match.energy) == pytest.approx(sum(shift[z] for z in frame.z.tolist()), abs=1e-6)
        torch.testing.assert_close(frame.energy, model(frame)["energy"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"finetune\.replay must hold frames with the elements"):
        replayed(model, init, frames(2, {8: 16}))


# -- resume --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"parts": "adapters", "rank": 2, "anchor": 0.5}, {"parts": "readouts"}])
def test_a_resumed_run_gives_the_same_bits(tmp_path, settings):
    init, ends = trained(), []
    wanted = FineTuneConfig(**settings)
    for name, stops in (("one", (6,)), ("two", (3, 6))):
        for steps in stops:
            model, _ = tuned_model(init, frames())
            limits = dataclasses.replace(SETTINGS, max_steps=steps, constant_fraction=1.0)
            last = tmp_path / name / "last.ckpt" if steps == 6 and len(stops) == 2 else None
            fit(model, frames(), frames(2), limits, tmp_path / name, last, init=init, finetune=wanted)
        ends.append(weights(model))
    assert torch.equal(*ends) and not torch.equal(ends[0], weights(tuned_model(init, frames())[0]))
    if settings.get("rank"):
        changed = dataclasses.replace(wanted, rank=3)
        with pytest.raises(ValueError, match=r"finetune\.rank is 2 there, 3 here"):
            fit(model, frames(), frames(2), limits, tmp_path / "two", last, init=init, finetune=changed)
    other = awake(trained())
    with pytest.raises(ValueError, match="init must be the model that the run started from"):
        fit(model, frames(), frames(2), limits, tmp_path / "two", last, init=other, finetune=wanted)


# -- the command ---------------------------------------------------------------------------------------------
TINY = ["--training.batch_size", "2", "--training.validate_every", "2", "--training.max_steps", "4", "--output.plot",
        "false", "--data.num_val", "2", "--data.train", "m.xyz"]  # fmt: skip
OWN = ["--model.channels", "4", "--model.lmax", "1", "--model.scheme.radii", "[3.0]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with frames, and a model that the command has trained on them."""
    here = tmp_path_factory.mktemp("base")
    write(here / "m.xyz", [frame.to_ase() for frame in load_embedded("ethanol")[:8]])
    words = ["m.xyz" if w == "m.xyz" else w for w in TINY]
    words[words.index("m.xyz")] = str(here / "m.xyz")
    assert main(["train", *OWN, *words, "--output.folder", str(here / "base")]) == 0
    return here


@pytest.fixture
def here(base, monkeypatch):
    monkeypatch.chdir(base)
    return base


def test_the_command_starts_from_a_model_and_remembers_it(here, tmp_path, capsys):
    folder = str(tmp_path / "tuned")
    words = ["train", "--init", "base/model.nbody", *TINY, "--output.folder", folder]
    assert main([*words, "--finetune.parts", "adapters", "--finetune.rank", "2", "--finetune.replay", "m.xyz",
                 "--finetune.replay_frames", "3"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "init    weights and scale of model.nbody" in out and "E0      refitted" in out
    assert "replay  3 of 8 frames" in out
    header, start = read_metadata(f"{folder}/model.nbody"), read_metadata("base/model.nbody")
    assert header["metadata"]["ancestor"] == {"name": "model.nbody", "sha256": start["sha256"]}
    assert header["model"]["config"] == start["model"]["config"] and header["scale"] == start["scale"]
    run = read_checkpoint(f"{folder}/last.ckpt")["run"]
    assert run["frames"]["train"]["count"] == 9 and run["ancestor"]["sha256"] == start["sha256"]
    assert main(["info", f"{folder}/model.nbody"]) == 0
    assert f"model.nbody, checksum {start['sha256'][:16]}" in capsys.readouterr().out
    # As any other model: read, saved, and an ancestor itself
    model = load_model(f"{folder}/model.nbody")
    again, _ = tuned_model(model, load_embedded("ethanol")[:2])
    assert again.ancestor["ancestor"]["sha256"] == start["sha256"] and again.ancestor["sha256"] == header["sha256"]
    # Resumed to the same end
    before = read_checkpoint(f"{folder}/last.ckpt")["state_dict"]
    assert main([*words, "--output.resume", "true", "--finetune.parts", "readouts"]) == 1
    assert "finetune.parts" in capsys.readouterr().err
    more = ["--finetune.parts", "adapters", "--finetune.rank", "2", "--finetune.replay", "m.xyz",
            "--finetune.replay_frames", "3", "--output.resume", "true", "--training.max_steps", "6"]  # fmt: skip
    assert main([*words, *more]) == 0
    after = read_checkpoint(f"{folder}/last.ckpt")
    assert after["global_step"] == 6 and any(not torch.equal(after["state_dict"][k], v) for k, v in before.items())


@pytest.mark.slow
def test_the_command_tunes_a_model_of_properties(here, tmp_path):
    words = ["train", *TINY, "--output.folder"]
    target = ["--target.energy.readout", "extensive", "--target.energy.unit", "eV"]
    assert main([*words, str(tmp_path / "a"), *OWN, *target]) == 0
    start = load_model(tmp_path / "a" / "model.nbody")
    assert main([*words, str(tmp_path / "b"), "--init", str(tmp_path / "a" / "model.nbody")]) == 0
    model = load_model(tmp_path / "b" / "model.nbody")
    assert isinstance(model, PropertyModel) and model.ancestor["sha256"] == start.origin["sha256"]
    assert not torch.equal(weights(model), weights(start))
    assert model.statistics["energy"].scale == start.statistics["energy"].scale


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.lmax", "2"], "model.lmax must be that of model.nbody, 1, got 2; leave it out"),
        (["--model.scheme.radii", "[5.0]"], "model.scheme.radii must be that of model.nbody, [3.0], got [5.0]; leave"),
        (["--model.irreps", "4x0e"], "model.irreps must be that of model.nbody, None, got '4x0e'"),
        (["--model.scale", "9.0"], "model.scale must be that of model.nbody, "),
        (["--model.repulsion", "none"], "model.repulsion must be that of model.nbody, 'zbl', got 'none'"),
        (["--target.dipole.readout", "dipole"], "target must be that of model.nbody, energies, got dipole"),
        (["--finetune.part", "x"], "unknown key finetune.part; did you mean finetune.parts?"),
    ],
)  # fmt: skip
def test_the_command_refuses_another_architecture(here, tmp_path, capsys, words, message):
    folder = tmp_path / "r"
    assert main(["train", "--init", "base/model.nbody", *TINY, *words, "--output.folder", str(folder)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not folder.exists()


@pytest.mark.slow
def test_what_is_given_and_equal_is_taken(here, tmp_path):
    words = ["--model.irreps", "4x0e + 4x1o", "--model.scheme.radii", "[3.0]", "--model.repulsion", "zbl"]
    assert main(["train", "--init", "base/model.nbody", *TINY, *words, "--output.folder", str(tmp_path / "r")]) == 0
    Path(tmp_path / "config.yaml").write_text("finetune: {init: base/model.nbody, parts: readouts}\n")
    assert main(["train", str(tmp_path / "config.yaml"), *TINY, "--output.folder", str(tmp_path / "s")]) == 0
    assert "parts: readouts" in (tmp_path / "s" / "config.yaml").read_text()


@pytest.mark.slow
def test_the_command_adds_latent_charges(here, tmp_path, capsys):
    words = ["--model.long_range", "{method: direct, states: true}", "--output.folder", str(tmp_path / "r")]
    assert main(["train", "--init", "base/model.nbody", *TINY, *words]) == 0
    assert "added   latent charges" in capsys.readouterr().out
    assert load_model(tmp_path / "r" / "model.nbody").model.long_range.config.states
    assert main(["train", "--init", "base/model.nbody", *TINY, *words, "--output.resume", "true"]) == 0
    words = ["--model.long_range", "{method: direct, channels: 3}", "--output.folder", str(tmp_path / "s")]
    assert main(["train", "--init", str(tmp_path / "r" / "model.nbody"), *TINY, *words]) == 1
    assert "model.long_range.channels must be that of model.nbody, 2, got 3" in capsys.readouterr().err


def test_settings_of_fine_tuning_need_a_model(here, capsys):
    assert main(["train", *TINY, "--finetune.parts", "readouts", "--output.folder", "x"]) == 1
    assert "finetune.parts is for a run that starts from a model; give it by --init" in capsys.readouterr().err


# -- models by name ------------------------------------------------------------------------------------------
def test_a_shipped_model_is_found_by_its_name(here, tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "SHIPPED", tmp_path)
    assert shipped_models() == []
    with pytest.raises(FileNotFoundError, match="no model file at organic, and no shipped model of that name"):
        load_model("organic")
    (tmp_path / "organic.nbody").write_bytes(Path("base/model.nbody").read_bytes())
    assert find_model("organic") == tmp_path / "organic.nbody" and shipped_models() == ["organic"]
    model = load_model("organic")
    assert model.origin["name"] == "organic" and torch.equal(weights(model), weights(load_model("base/model.nbody")))
    with pytest.raises(FileNotFoundError, match=r"did you mean organic\?"):
        load_model("organics")
    assert json.dumps(read_metadata("organic")["sha256"])


def test_e0_that_no_frame_tells_is_kept():
    given = frames(3)
    for frame in given:
        del frame.energy
    init = trained()
    model, _ = tuned_model(init, given)
    assert model.reference.energies == {z: E0[z] for z in (1, 6, 8)} and isinstance(model.reference, AtomicReference)


@pytest.mark.parametrize("name", ["adapters", "readouts", "all"])
def test_a_list_of_one_name_is_that_name(name):
    """As `--finetune.parts [adapters]` gives it: adapters, and the learning rate of few weights."""
    assert FineTuneConfig(parts=[name]) == FineTuneConfig(parts=name)
    assert FineTuneConfig(parts=["readouts", "interactions.1"]).parts == ["readouts", "interactions.1"]


def test_neutral_frames_need_no_inputs(molecules):
    init = factories.potential(inputs=["charge"], seed=5)
    z, pos = molecules["ethanol"]
    frame = AtomicData(z=z, pos=pos, energy=torch.ones(1).double(), forces=torch.zeros_like(pos))
    charged = AtomicData(z=z, pos=pos, energy=torch.ones(1).double(), charge=torch.ones(1).double())
    for frames, keep, inputs in (
        ([frame], False, ()),
        ([frame], True, ("charge",)),
        ([frame, charged], False, ("charge",)),
    ):
        tuned, _ = tuned_model(init, frames, keep_inputs=keep)
        assert tuned.model.inputs == inputs
        assert tuned.model(z, pos).item() == pytest.approx(init.model(z, pos).item(), abs=1e-12)
    assert abs(init.model(z, pos).item()) > 1e-3


@pytest.mark.parametrize(
    ("charges", "long_range", "inputs"),
    [
        ([1.0, 1.0], CHARGES, ()),
        ([1.0, 0.0], CHARGES, ("charge",)),
        ([1.0, 1.0], "direct", ("charge",)),
        ([1.0, 1.0], None, ("charge",)),
    ],
    ids=["found", "two charges", "placed", "no latent charges"],
)
def test_a_common_charge_that_latent_charges_find_is_no_input(molecules, charges, long_range, inputs):
    z, pos = molecules["ethanol"]
    frames = [AtomicData(z=z, pos=pos, energy=torch.ones(1).double(), charge=torch.tensor([q])) for q in charges]
    tuned, _ = tuned_model(factories.potential(inputs=["charge"], seed=5), frames, long_range=long_range)
    assert tuned.model.inputs == inputs and tuned.model.assumed == ({} if inputs else {"charge": 1.0})
    assert torch.isfinite(tuned(frames[0])["energy"]).all()


@pytest.mark.slow
def test_fit_takes_the_neutral_form_of_a_model_with_inputs(tmp_path):
    init = trained(inputs=["charge"], inner_cutoff={"H-N": 0.8, "H-C": 0.9})
    model, _ = tuned_model(init, frames(6))
    start = weights(model)
    fit(model, frames(6), (), SETTINGS, tmp_path, init=init)
    assert model.model.inputs == () and not torch.equal(weights(model), start)


def test_a_tuned_model_repels_below_the_distances_of_its_frames():
    """What it knew of shorter distances is lost in training; pairs that no frame has keep theirs."""
    init = trained(inner_cutoff={"H-H": 0.5, "N-O": 1.1, "C-O": 1.6})
    given, apart = frames(6), {}
    for frame in given:
        far = torch.cdist(frame.pos, frame.pos) + 9 * torch.eye(len(frame.z))
        for a, b in ((1, 1), (6, 8), (1, 6)):
            nearest = far[frame.z == a][:, frame.z == b]
            apart[a, b] = min(apart.get((a, b), 9.0), float(nearest.min()) if nearest.numel() else 9.0)
    tuned, _ = tuned_model(init, given, keep_elements=True)
    lengths, reach = tuned.model.inner_cutoff.lengths, tuned.repulsion.reach
    assert lengths["H-H"] == pytest.approx(0.85 * 0.95 * apart[1, 1], abs=1e-3) and lengths["H-H"] > 1.0
    assert reach["H-H"] == pytest.approx(0.85 * 0.9 * apart[1, 1]) and reach["H-H"] > init.repulsion.reach["H-H"]
    # Frames within a length of the trained model replace it
    assert lengths["C-O"] == pytest.approx(0.85 * 0.95 * apart[6, 8], abs=1e-3) and lengths["C-O"] < apart[6, 8] < 1.6
    # No frame has nitrogen
    assert lengths["N-O"] == 1.1 and reach["N-O"] == init.repulsion.reach["N-O"]
    # Lengths below those of all frames change nothing on them
    safe = trained(inner_cutoff={"H-H": 0.5})
    model, _ = tuned_model(safe, given, keep_elements=True)
    for frame in given:
        before, after = safe(frame)["forces"], model(frame)["forces"]
        torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
        assert before.abs().max() > 0.1
    kept, _ = tuned_model(init, given, keep_elements=True, shortest={})
    assert kept.model.inner_cutoff.lengths == init.model.inner_cutoff.lengths
    assert kept.repulsion.reach == init.repulsion.reach


@pytest.mark.slow
def test_fit_takes_a_model_whose_inner_cutoffs_were_raised(tmp_path):
    init = trained(inner_cutoff={"H-H": 0.5})
    model, _ = tuned_model(init, frames(6))
    assert model.model.inner_cutoff.lengths["H-H"] > 1.0
    start = weights(model)
    fit(model, frames(6), (), SETTINGS, tmp_path, init=init)
    assert not torch.equal(weights(model), start) and model.model.inner_cutoff.lengths["H-H"] > 1.0


# -- the start of runs with few frames ------------------------------------------------------------------------
@pytest.fixture
def shipped(here, tmp_path, monkeypatch):
    """The trained model in the place of the shipped one."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "organic.nbody").write_bytes((here / "base" / "model.nbody").read_bytes())
    monkeypatch.setattr(model_file, "SHIPPED", folder)


def ancestor(folder: Path) -> dict | None:
    return read_metadata(folder / "model.nbody")["metadata"].get("ancestor")


@pytest.mark.slow
def test_few_frames_of_molecules_start_from_the_shipped_model(here, shipped, tmp_path, capsys):
    words = ["train", *TINY, "--output.folder"]
    assert main([*words, str(tmp_path / "few")]) == 0
    printed = capsys.readouterr().out
    assert "chosen  finetune.init organic: 6 frames of molecules of H, C, O; before training its forces are" in printed
    assert ancestor(tmp_path / "few")["name"] == "organic"
    # A resumed run starts from the same model, and a limit is all that changes
    assert main([*words, str(tmp_path / "few"), "--output.resume", "true", "--training.max_steps", "6"]) == 0
    assert read_checkpoint(tmp_path / "few" / "last.ckpt")["global_step"] == 6
    assert ancestor(tmp_path / "few")["name"] == "organic"


def test_the_start_is_the_shipped_model_with_the_nearest_forces(here, shipped, tmp_path, capsys):
    """Of three: one is spoiled, one lacks oxygen."""
    spoiled = load_model("organic")
    with torch.no_grad():
        for weight in spoiled.parameters():
            weight.mul_(1.3)
    save_model(spoiled, model_file.SHIPPED / "a_spoiled_one.nbody")
    few = factories.potential(species=(1, 6))
    save_model(few, model_file.SHIPPED / "a_hydrocarbon_one.nbody")
    assert main(["train", *TINY, "--output.folder", str(tmp_path / "few")]) == 0
    printed = capsys.readouterr().out
    assert "chosen  finetune.init organic: " in printed and "those of a_spoiled_one by" in printed
    assert "a_hydrocarbon_one" not in printed and ancestor(tmp_path / "few")["name"] == "organic"


def test_a_model_that_does_not_know_the_structures_is_no_start(here, shipped, tmp_path, capsys):
    """Its forces are farther off than none would be."""
    wrong = load_model("organic")
    wrong.scale.mul_(300.0)
    save_model(wrong, model_file.SHIPPED / "organic.nbody")
    assert main(["train", *TINY, "--output.folder", str(tmp_path / "few")]) == 0
    assert "finetune.init" not in capsys.readouterr().out and ancestor(tmp_path / "few") is None


def test_distances_that_the_model_does_not_know_do_not_spoil_the_reference_energies():
    """H2 lies inside the inner cutoffs of organic, where its energies mean nothing; ethanol alone tells E0."""
    ethanol = list(load_embedded("ethanol")[:6])
    hydrogen = []
    for length in (0.70, 0.74, 0.80):
        pos = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, length]], dtype=torch.float64)
        labels = {"energy": torch.tensor([-26.7], dtype=torch.float64), "forces": torch.zeros(2, 3).double()}
        hydrogen.append(AtomicData(z=torch.tensor([1, 1]), pos=pos, **labels))
    organic = load_model("organic")
    alone, _ = tuned_model(organic, ethanol)
    both, _ = tuned_model(organic, ethanol + hydrogen)
    assert both.model.inner_cutoff.lengths["H-H"] < alone.model.inner_cutoff.lengths["H-H"]
    assert both.reference.energies == pytest.approx(alone.reference.energies, abs=1e-6)
    assert abs(both.reference.energies[1] - organic.reference.energies[1]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "none",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("own network", "many", "wide ions", "periodic", "element", "energies only")
        ),
    ],
)
def test_other_runs_start_from_random_weights(here, shipped, tmp_path, capsys, monkeypatch, case):
    frames = [frame.to_ase() for frame in load_embedded("ethanol")[:8]]
    words = {"none": ["--init", "none"], "own network": OWN}.get(case, [])
    if case == "many":
        monkeypatch.setattr(defaults, "FEW_FRAMES", 5)
    for atoms in frames:
        if case == "wide ions":
            monkeypatch.setattr(defaults, "FEW_CHARGED", 5)
            atoms.positions *= 3.0
            atoms.info["charge"] = 1
        elif case == "periodic":
            atoms.set_cell([12.0] * 3), atoms.set_pbc(True)
        elif case == "element":
            atoms.numbers[atoms.numbers == 8] = 16
        elif case == "energies only":
            atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy())
    write(tmp_path / "frames.xyz", frames)
    more = ["--training.force_weight", "0"] if case == "energies only" else []
    tiny = ["--data.train", str(tmp_path / "frames.xyz"), "--output.folder", str(tmp_path / "run"), *words, *more]
    assert main(["train", *TINY[:-2], *tiny]) == 0
    assert "finetune.init" not in capsys.readouterr().out and ancestor(tmp_path / "run") is None
    # Resumed by the same command
    more_steps = ["--output.resume", "true", "--training.max_steps", "6"]
    assert main(["train", *TINY[:-2], *tiny, *more_steps]) == 0
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 6 and ancestor(tmp_path / "run") is None


def test_settings_of_a_start_need_a_start(here, capsys):
    assert main(["train", *TINY, "--init", "none", "--finetune.parts", "readouts"]) == 1
    assert "finetune.parts is for a run that starts from a model" in capsys.readouterr().err
