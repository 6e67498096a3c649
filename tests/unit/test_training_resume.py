"""A resumed run: what it may change is used, what it must not is refused by name, a finished one stays as it is."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import threading

import pytest
import torch
from torch import Tensor, nn

from nbody_pyg.data import AtomicData
from nbody_pyg.io.checkpoint import read_checkpoint, seal, write_checkpoint
from nbody_pyg.potential import Potential
from nbody_pyg.training import TrainingConfig, fit, force_variance
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.run import require_device
from nbody_pyg.training.settings import RESUMABLE
from nbody_pyg.training.task import PotentialTask
from nbody_pyg.training.trainer import Trainer


class Net(nn.Module):
    """Energy from distances to the centre; invariant, quick."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        count = torch.bincount(batch)
        centre = pos.new_zeros(len(count), 3).index_add(0, batch, pos) / count[:, None]
        radius = (pos - centre[batch]).square().sum(1, keepdim=True)
        energy = self.out(torch.tanh(self.hidden(self.embed(z) * radius))).squeeze(-1)
        return pos.new_zeros(len(count)).index_add(0, batch, energy)


E0 = {1: 1.0, 6: 2.0, 8: 3.0}


def potential(e0=None, scale: float = 1.0) -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Potential(Net(), e0, scale)


def frames(count: int, seed: int = 0) -> list[AtomicData]:
    generator, out = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        pos = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        vec = pos - pos.mean(0)
        out.append(
            AtomicData(
                z=torch.tensor([6, 8, 1, 1]), pos=pos, energy=vec.square().sum().reshape(1) / 9, forces=-2 * vec / 9
            )
        )
    return out


TRAIN, VAL = frames(8), frames(3, seed=1)
SETTINGS = TrainingConfig(max_steps=4, batch_size=2, dtype="float64", validate_every=2, log_every=1, warmup_steps=0)


def run(folder, train=TRAIN, val=VAL, model=None, resume=False, **changed):
    model = potential(E0) if model is None else model
    last = folder / "last.ckpt" if resume else None
    return fit(model, train, val, dataclasses.replace(SETTINGS, **changed), folder, last)


def weights(model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder, kind="train"):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its model and its result."""
    path, model = tmp_path_factory.mktemp("finished"), potential(E0)
    return path, model, run(path, model=model)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
def test_a_new_rate_and_decay_are_used_and_recorded(tmp_path, optimizer, capsys):
    same = {"optimizer": optimizer, "constant_fraction": 1.0}
    run(tmp_path, **same)
    result = run(tmp_path, resume=True, max_steps=7, lr=1e-5, weight_decay=0.5, **same)
    assert [float(row["lr"]) for row in rows(tmp_path)] == [1e-2] * 4 + [1e-5] * 3
    state = read_checkpoint(tmp_path / "last.ckpt")
    assert all(g["weight_decay"] == 0.5 for g in state["optimizer_states"][0]["param_groups"])
    assert state["hyper_parameters"]["settings"]["lr"] == 1e-5
    words = "max_steps is 4 there, 7 here; lr is 0.01 there, 1e-05 here; weight_decay is 0.0 there, 0.5 here"
    assert result.resumed == ({"step": 4, "changes": words},)
    assert f"going on from step 4: {words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 3), ("optimizer", "adam"), ("ema_decay", 0.5), ("force_weight", 2.0), ("energy_weight", 1.0),
     ("stress_weight", 1.0), ("energy_per", "atom"), ("charge_weight", 1.0), ("penalty", "huber"), ("seed", 1),
     ("dtype", "float32")],
)  # fmt: skip
def test_other_settings_are_refused_by_name(folder, name, value):
    before = contents(folder)
    old = getattr(SETTINGS, name)
    quoted = f'"{old}" there, "{value}" here' if isinstance(old, str) else f"{old} there, {value} here"
    with pytest.raises(ValueError, match=f"must not change these settings: {name} is {quoted}; resume with the old"):
        run(folder, resume=True, max_steps=9, **{name: value})
    assert contents(folder) == before


def test_a_run_of_a_version_without_a_setting_is_resumed(folder):
    checkpoint = read_checkpoint(folder / "last.ckpt")
    del checkpoint["hyper_parameters"]["settings"]["charge_weight"]
    write_checkpoint(folder / "last.ckpt", checkpoint)
    with pytest.raises(ValueError, match=r"charge_weight is 0\.05 there, 1\.0 here"):
        run(folder, resume=True, max_steps=9, charge_weight=1.0)
    assert run(folder, resume=True, max_steps=9).steps == 9


def test_every_setting_is_either_free_or_refused():
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    refused = {"batch_size", "batch_atoms", "optimizer", "ema_decay", "force_weight", "energy_weight", "stress_weight",
               "energy_per", "charge_weight", "penalty", "seed", "dtype", "processes"}  # fmt: skip
    assert names == refused | RESUMABLE and not refused & RESUMABLE


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (potential({1: 1.0, 6: 2.0, 8: 3.5}), "e0.8 is 3.0 there, 3.5 here"),
        (potential(), r"e0 is \{.*\} there, null here"),
        (potential(E0, 2.0), "scale is 1.0 there, 2.0 here"),
    ],
)
def test_another_e0_or_scale_is_refused(folder, model, message):
    with pytest.raises(ValueError, match=f"of the same network: {message}"):
        run(folder, model=model, resume=True, max_steps=9)


def changed_frames():
    """Name, frames, validation frames and what is said."""
    moved = [frame.clone() for frame in TRAIN]
    moved[3].forces[1, 2] += 1e-9
    extra = [frame.clone() for frame in TRAIN]
    for frame in extra:
        frame.charge = torch.ones(1)
    yield "a label", moved, VAL, "training frames must be .* 8 there, 8 here, or changed"
    yield "fewer", TRAIN[:7], VAL, "training frames must be .* 8 there, 7 here"
    yield "another order", TRAIN[1:] + TRAIN[:1], VAL, "training frames must be"
    yield "new ones in front", frames(1, seed=5) + TRAIN, VAL, "new ones stand behind them: 8 there, 9 here"
    yield (
        "another charge",
        extra,
        [frame.clone().update({"charge": torch.ones(1)}) for frame in VAL],
        "of the same network: .*assumed",
    )
    yield "validation", TRAIN, VAL[:2], "validation frames must be .* 3 there, 2 here"
    yield "no validation", TRAIN, [], "validation frames must be .* 3 there, 0 here"


@pytest.mark.parametrize(("train", "val", "message"), [pytest.param(*c[1:], id=c[0]) for c in changed_frames()])
def test_changed_frames_are_refused(folder, train, val, message):
    with pytest.raises(ValueError, match=message):
        run(folder, train, val, resume=True, max_steps=9)


def test_new_frames_behind_the_old_ones_are_trained_on(folder, capsys):
    result = run(folder, TRAIN + frames(4, seed=7), resume=True, max_steps=9)
    assert result.steps == 9 and result.epochs == 1
    assert "4 new training frames behind those of before" in capsys.readouterr().out
    state = read_checkpoint(folder / "last.ckpt")
    assert state["run"]["frames"]["train"]["count"] == 12
    assert state["hyper_parameters"]["force_variance"] == force_variance(TRAIN) > 0


@pytest.mark.parametrize("limit", [{}, {"max_epochs": 1, "max_steps": None}, {"budget_seconds": 1e-9}])
def test_a_finished_run_stays_as_it_is(folder, finished, capsys, limit):
    before, again = contents(folder), potential(E0)
    result = run(folder, model=again, resume=True, **limit)
    assert torch.equal(weights(again), weights(finished[1])) and weights(again).abs().max() > 0
    assert not torch.equal(weights(again), weights(potential(E0).double()))
    assert contents(folder) == before
    assert result == dataclasses.replace(finished[2], potential=again, already_finished=True) and result.steps == 4
    assert "the run is finished: 4 steps" in capsys.readouterr().out


def test_a_trainer_with_no_step_left_leaves_the_average_too(folder, finished):
    """The same below fit: what was loaded are the weights of the optimizer."""
    task = PotentialTask(potential(E0), SETTINGS)
    trainer = Trainer(task, FrameLoader(TRAIN, 2, shuffle=True), FrameLoader(VAL, 8), folder, last_step=4)
    trainer.load(read_checkpoint(folder / "last.ckpt"))
    trainer.fit()
    assert trainer.step == 4
    assert torch.equal(weights(task.potential), weights(finished[1]))


@pytest.mark.slow
def test_a_new_run_moves_the_old_one_away(tmp_path, capsys):
    first, second = run(tmp_path), run(tmp_path, seed=3)
    assert first.run != second.run
    assert {p.name for p in tmp_path.iterdir()} == {"before-1", "best.ckpt", "last.ckpt", "metrics.csv"}
    assert read_checkpoint(tmp_path / "before-1/last.ckpt")["run"]["id"] == first.run
    assert read_checkpoint(tmp_path / "best.ckpt")["run"]["id"] == second.run
    assert f"the earlier run in {tmp_path} is now in {tmp_path}/before-1" in capsys.readouterr().out
    third = fit(
        potential(E0), TRAIN, VAL, dataclasses.replace(SETTINGS, max_steps=5), tmp_path, tmp_path / "before-1/last.ckpt"
    )
    assert third.run == first.run and (tmp_path / "before-2/last.ckpt").is_file()


def test_half_a_row_of_the_log_is_left_out(folder):
    before = rows(folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write("train,1")
    run(folder, resume=True, max_steps=6)
    assert [row["step"] for row in rows(folder)] == ["1", "2", "3", "4", "5", "6"] and rows(folder)[:4] == before


@pytest.mark.slow
@pytest.mark.parametrize("lost", [True, False], ids=["no best.ckpt", "best.ckpt of another run"])
def test_the_best_weights_of_another_run_do_not_count(folder, lost):
    state = read_checkpoint(folder / "last.ckpt")
    members = state["callbacks"]
    assert members["Checkpoints"]["best_step"] > 0
    members["Checkpoints"]["best_score"] = 1e-9  # better than whatever comes
    torch.save(state, folder / "last.ckpt")
    seal(folder / "last.ckpt")
    if lost:
        (folder / "best.ckpt").unlink()
    else:
        other = read_checkpoint(folder / "best.ckpt")
        torch.save(other | {"run": other["run"] | {"id": "0"}}, folder / "best.ckpt")
        seal(folder / "best.ckpt")
    result = run(folder, resume=True, max_steps=8)
    assert 4 < result.best_step <= 8 and result.best_score > 1e-9
    assert read_checkpoint(folder / "best.ckpt")["run"]["id"] == result.run


def test_fit_works_outside_the_main_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert found and found[0].steps == 4 and found[0].interrupted is None


def labelled(**missing):
    """Validation frames without the labels ``missing``: None for no key, NaN for a value that is missing."""
    out = [frame.clone() for frame in VAL]
    for frame in out:
        for key, how in missing.items():
            if how is None:
                del frame[key]
            else:
                frame[key][:] = how
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", [None, float("nan")])
def test_the_best_weights_are_chosen_by_the_labels_there_are(tmp_path, caplog, how):
    result = run(tmp_path / "a", val=labelled(forces=how))
    assert result.monitor == "energy_mae" and result.best_step > 0 and (tmp_path / "a/best.ckpt").is_file()
    assert "validation frames have no forces: the best weights are chosen by energy" in caplog.text
    assert result.best_score == pytest.approx(
        min(float(r["energy_mae"]) for r in rows(tmp_path / "a", "val")), rel=1e-5
    )
    result = run(tmp_path / "b", val=labelled(forces=how, energy=how))
    assert (result.monitor, result.best_step) == ("", -1) and not (tmp_path / "b/best.ckpt").exists()
    assert "no label that is learned: no best weights, the last ones are kept" in caplog.text
    result = run(tmp_path / "c", val=labelled(forces=how), energy_weight=0.0)
    assert result.best_step == -1, "an error that is not trained on says nothing"


def test_elements_of_the_validation_are_compared_before_training(tmp_path):
    other = [frame.clone() for frame in VAL]
    other[1].z[0] = 7
    with pytest.raises(ValueError, match=r"frame 1 of val holds N, which the model does not know \(it knows H, C, O\)"):
        run(tmp_path, val=other, model=potential(E0))
    assert not list(tmp_path.iterdir())


def test_zero_forces(tmp_path):
    """Ideal crystals and isolated atoms: symmetry leaves forces of rounding errors."""
    still = [frame.clone() for frame in TRAIN]
    for number, frame in enumerate(still):
        frame.forces = torch.full_like(frame.forces, 1e-17 * number)
    with pytest.raises(ValueError, match=r"forces of all training frames are zero.*set training.force_weight to 0"):
        run(tmp_path, still, ())
    model = potential(E0, 0.5)
    assert run(tmp_path, still, (), model=model, force_weight=0.0).steps == 4
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert all(0 < loss < 100 for loss in losses)


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"training\.device is cuda, but torch finds no GPU here"):
        run(tmp_path, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"training\.processes is 2, but there are 1 GPUs"):
        require_device(dataclasses.replace(SETTINGS, device="cuda", processes=2))


@pytest.mark.parametrize("world", [1, 2, 3, 8, 11])
def test_errors_count_every_frame_once(world):
    """Batches in order, for validation, over several processes; fewer frames than processes: all, the same often."""
    loaders = [FrameLoader(TRAIN, 2, rank=rank, world=world) for rank in range(world)]
    seen = [batch.energy for loader in loaders for batch in loader]
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]
    times = 1 if world <= 8 else world
    expected = torch.cat([frame.energy for frame in TRAIN]).repeat(times).sort().values
    assert torch.equal(torch.cat(seen).sort().values, expected)
