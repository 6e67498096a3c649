"""fit: it learns, goes on bit by bit where it stopped, keeps its budget and its files."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import signal

import pytest
import torch
from torch import Tensor, nn

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.data import AtomicData
from nbody_pyg.potential import Potential
from nbody_pyg.training import Callback, FrameLoader, PotentialTask, TrainingConfig, fit, force_variance

E0 = {1: -13.6, 6: -1030.5, 8: -2041.8}


class PairNetwork(nn.Module):
    """Energy from all distances within each graph; smooth, invariant, quick."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.hidden = nn.Linear(width + 1, width)
        self.out = nn.Linear(width, 1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        row, col = (batch[:, None] == batch[None, :]).fill_diagonal_(False).nonzero().T
        gauss = torch.exp(-0.3 * (pos[row] - pos[col]).square().sum(-1, keepdim=True))
        x = torch.tanh(self.hidden(torch.cat([self.embed(z[row]) * self.embed(z[col]), gauss], dim=-1)))
        num_graphs = int(batch[-1]) + 1
        return pos.new_zeros(num_graphs).index_add(0, batch[row], (self.out(x) * gauss).squeeze(-1))


def potential(seed: int = 0, e0: dict[int, float] | None = E0) -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Potential(PairNetwork(), e0)


def frames(count: int = 12, seed: int = 0) -> list[AtomicData]:
    """Distorted molecules of 4 and 5 atoms, not coplanar, labelled by another network of the same kind."""
    generator, teacher = torch.Generator().manual_seed(seed), potential(seed=3).double()
    out = []
    for number in range(count):
        z = torch.tensor([6, 8, 1, 1, 1][: 4 + number % 2])
        pos = torch.randn(len(z), 3, generator=generator, dtype=torch.float64)
        labels = teacher(z, pos, torch.zeros_like(z))
        out.append(AtomicData(z=z, pos=pos, energy=labels["energy"], forces=labels["forces"]))
    return out


# float64 and one thread: what is compared bit by bit below.
COMMON = {"batch_size": 3, "dtype": "float64", "log_every": 2, "validate_every": 6, "warmup_steps": 3}


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rows(folder, kind):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


@pytest.mark.slow
def test_it_learns_and_leaves_its_files(tmp_path):
    model = potential()
    settings = TrainingConfig(max_epochs=40, lr=0.02, **COMMON)
    result = fit(model, frames(), frames(4, seed=1), settings, tmp_path)
    assert result.steps == 160 and result.epochs == 40 and result.cpu_seconds > 0
    scores = [float(row["forces_mae"]) for row in rows(tmp_path, "val")]
    assert len(scores) == 160 // 6
    assert 0 < scores[-1] < 0.7 * scores[0]
    assert result.best_forces_mae == result.best_score == pytest.approx(min(scores), rel=1e-4)
    with pytest.raises(AttributeError, match="monitors energy_mae; use best_score"):
        _ = dataclasses.replace(result, monitor="energy_mae").best_forces_mae
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "metrics.csv"]
    train = rows(tmp_path, "train")
    assert [int(row["step"]) for row in train] == list(range(2, 161, 2))
    assert float(train[-1]["lr"]) < 1e-4 < float(train[2]["lr"])


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer):
        if trainer.step == self.step:
            trainer.should_stop = True


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    """Windows have no weights, so that weights alone would load, and give other energies."""
    settings = TrainingConfig(max_epochs=1, **COMMON)
    ours, other = (
        Potential(NBodyNet([1, 6, 8], NestedShells((4.0,), p), channels=4, lmax=1, correlation=2)) for p in (3, 5)
    )
    data = [ours.model.scheme(frame) for frame in frames(3)]
    fit(ours, data, (), settings, tmp_path)
    with pytest.raises(ValueError, match=r"same network: scheme\.exponent is 3 there, 5 here"):
        fit(other, data, (), settings, tmp_path, resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize("stop", [8, 6, 5], ids=["end of an epoch", "at a validation", "inside an epoch"])
def test_resumed_run_equals_uninterrupted_run_bit_by_bit(tmp_path, stop):
    settings = TrainingConfig(max_epochs=4, **COMMON)
    whole = potential()
    fit(whole, frames(), frames(4, seed=1), settings, tmp_path / "whole")
    fit(potential(), frames(), frames(4, seed=1), settings, tmp_path / "parts", callbacks=[StopAt(stop)])
    resumed = potential(seed=7)
    result = fit(
        resumed,
        frames(),
        frames(4, seed=1),
        settings,
        tmp_path / "parts",
        resume=tmp_path / "parts/last.ckpt",
    )
    assert result.steps == 16
    assert torch.equal(weights(resumed), weights(whole))
    states = [
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["training_state"] for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for kind in ("train", "val"):
        a, b = (
            {r["step"]: (r["lr"], r["loss"], r["forces_mae"]) for r in rows(tmp_path / name, kind)}
            for name in ("whole", "parts")
        )
        # The stop adds a validation and cuts one row of means in two; all else is the same log.
        assert set(a) <= set(b) and len(b) <= len(a) + 1
        assert all(a[step] == b[step] for step in a if not stop <= int(step) <= stop + 1)


class RaiseAt(StopAt):
    def on_step(self, trainer):
        if trainer.step == self.step:
            raise RuntimeError("crash")


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_crash_without_validation_loses_little_and_goes_on_bit_by_bit(tmp_path, decay):
    settings = TrainingConfig(max_epochs=4, ema_decay=decay, **COMMON)
    whole = potential()
    fit(whole, frames(), (), settings, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        fit(potential(), frames(), (), settings, tmp_path / "parts", callbacks=[RaiseAt(11)])
    assert [p.name for p in (tmp_path / "parts").glob("*.ckpt")] == ["last.ckpt"]
    state = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    assert state["global_step"] == 6 and state["cpu_seconds"] > 0
    resumed = potential(seed=7)
    fit(resumed, frames(), (), settings, tmp_path / "parts", resume=tmp_path / "parts/last.ckpt")
    assert torch.equal(weights(resumed), weights(whole)) and weights(whole).abs().max() > 0
    a, b = ([(r["step"], r["lr"], r["loss"]) for r in rows(tmp_path / n, "train")] for n in ("whole", "parts"))
    assert a == b


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    class Lose(Callback):
        # As on a GPU, where the loss is not looked at in every step
        def on_step(self, trainer):
            trainer._check_finite = lambda loss: None
            if trainer.step == 8:
                trainer.task.potential.model.out.weight.data[0, 0] = float("nan")

    fit(potential(), frames(), (), TrainingConfig(max_steps=14, **COMMON), tmp_path, callbacks=[Lose()])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.slow
@pytest.mark.parametrize("fails", [True, False])
def test_threads_are_as_before(tmp_path, fails):
    threads, during = torch.get_num_threads(), []

    class Look(Callback):
        def on_step(self, trainer):
            during.append(torch.get_num_threads())
            if fails:
                raise RuntimeError("crash")

    settings = TrainingConfig(max_steps=2, threads=threads + 1, **COMMON)
    with pytest.raises(RuntimeError, match="crash") if fails else contextlib.nullcontext():
        fit(potential(), frames(), (), settings, tmp_path, callbacks=[Look()])
    assert during[0] == threads + 1 and torch.get_num_threads() == threads


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    class Terminate(Callback):
        def on_step(self, trainer):
            if trainer.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    settings = TrainingConfig(max_epochs=9, **COMMON)
    result = fit(potential(), frames(), (), settings, tmp_path, callbacks=[Terminate()])
    assert result.interrupted == signal.SIGTERM and result.steps == 5
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_ctrl_c_before_the_first_step_stays_one(tmp_path):
    class Early(Callback):
        def on_start(self, trainer):
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(potential(), frames(), settings=TrainingConfig(max_steps=5), folder=tmp_path, callbacks=[Early()])
    assert signal.getsignal(signal.SIGINT) is before


def test_budget_of_cpu_time_ends_the_run_and_drives_the_schedule(tmp_path):
    settings = TrainingConfig(budget_seconds=0.5, **COMMON | {"validate_every": 10})
    result = fit(potential(), frames(), frames(4, seed=1), settings, tmp_path)
    assert 0.5 <= result.cpu_seconds < 2.5  # the step at hand is finished, however slow the machine
    assert result.steps > 10
    rates = [float(row["lr"]) for row in rows(tmp_path, "train")]
    assert max(rates) == pytest.approx(TrainingConfig.lr) and rates[-1] < 5e-4


def test_average_is_what_is_validated_saved_and_returned(tmp_path):
    model = potential()
    fit(model, frames(), frames(4, seed=1), TrainingConfig(max_steps=12, **COMMON), tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state["state_dict"][f"potential.{name}"], value)
    raw = state["training_state"]["potential.model.out.weight"]
    assert not torch.equal(raw, state["state_dict"]["potential.model.out.weight"])


def test_averaging_follows_its_definition(tmp_path):
    class Record(Callback):
        def on_start(self, trainer):
            self.average = weights(trainer.task).clone()

        def on_step(self, trainer):
            n = trainer.step - 1
            decay = min(0.9, (1 + n) / (10 + n))
            self.average = decay * self.average + (1 - decay) * weights(trainer.task)

    record, model = Record(), potential()
    settings = TrainingConfig(max_steps=15, ema_decay=0.9, **COMMON)
    fit(model, frames(), (), settings, tmp_path, callbacks=[record])
    assert torch.allclose(weights(model), record.average, rtol=0, atol=1e-12)
    assert weights(model).abs().max() > 0


def test_without_averaging_and_clipping(tmp_path):
    settings = TrainingConfig(max_steps=4, ema_decay=0.0, clip_norm=None, **COMMON)
    fit(potential(), frames(), frames(2), settings, tmp_path)
    assert "training_state" not in torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_checkpoint_loads_as_a_task_with_the_network_given(tmp_path):
    model = potential()
    fit(model, frames(), (), TrainingConfig(max_steps=3, **COMMON), tmp_path)
    task = PotentialTask.load_from_checkpoint(tmp_path / "last.ckpt", potential=potential(seed=5))
    assert torch.equal(weights(task), weights(model))
    assert task.settings == TrainingConfig(max_steps=3, **COMMON)
    with pytest.raises(ValueError, match="PairNetwork, which nbody_pyg cannot build by itself"):
        PotentialTask.load_from_checkpoint(tmp_path / "last.ckpt")


def test_loss_that_is_not_finite_stops_with_advice(tmp_path):
    data = frames()
    data[3].energy[:] = 1e200
    with pytest.raises(FloatingPointError, match=r"loss became inf at step \d .*, if there is one, .*smaller lr"):
        fit(potential(), data, (), TrainingConfig(max_epochs=2, **COMMON), tmp_path)


def test_infinite_forces_are_refused(tmp_path):
    data = frames()
    data[3].forces[0, 0] = float("inf")
    with pytest.raises(ValueError, match="forces must be finite, but"):
        fit(potential(), data, (), TrainingConfig(max_epochs=2, **COMMON), tmp_path)


def test_network_that_returns_nan_is_not_taken_for_a_missing_label(tmp_path):
    class Broken(PairNetwork):
        def forward(self, z, pos, batch):
            return super().forward(z, pos, batch) * float("nan")

    with pytest.raises(FloatingPointError, match="loss became nan at step 0"):
        fit(Potential(Broken()), frames(), (), TrainingConfig(max_steps=2, **COMMON), tmp_path)


def test_missing_labels_are_left_out():
    data = frames(6)
    data[1].forces[2] = float("nan")
    data[2].energy[:] = float("nan")
    model = potential().double()
    task = PotentialTask(model, TrainingConfig(max_steps=1, dtype="float64"), force_variance(data))
    batch = FrameLoader(data, 6).batch(range(6))
    loss = task.training_step(batch)
    result = model(batch)
    force_error = (result["forces"] - batch.forces)[~batch.forces.isnan().any(1)]
    energy_error = (result["energy"] - batch.energy)[~batch.energy.isnan()]
    expected = (force_error.square().mean() + 0.05 * energy_error.square().mean()) / force_variance(data)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and loss.item() > 0


@pytest.mark.slow
@pytest.mark.parametrize("missing", [("energy",), ("forces",), ("energy", "forces")])
@pytest.mark.parametrize("energy_per", ["molecule", "atom"])
def test_batches_without_any_label_are_stepped_through(tmp_path, missing, energy_per):
    data = frames(6)
    for frame in data[:3]:
        for key in missing:
            frame[key][:] = float("nan")
    model = potential()
    settings = TrainingConfig(max_steps=12, energy_per=energy_per, **COMMON | {"batch_size": 1, "log_every": 6})
    before = weights(model).double()
    result = fit(model, data, (), settings, tmp_path)
    assert result.steps == 12 and weights(model).isfinite().all() and (weights(model) - before).abs().max() > 0
    for row in rows(tmp_path, "train"):
        assert all(math.isfinite(float(row[key])) for key in ("loss", "energy_mae", "forces_mae") if row[key])
        assert float(row["loss"]) > 0


def test_targets_without_labels_stay_out_of_the_log(tmp_path, capsys):
    data = frames()
    for number, frame in enumerate(data):
        del frame.forces
        frame.energy = frame.energy + number
    fit(potential(), data[:8], data[8:], TrainingConfig(max_steps=6, force_weight=0.0, **COMMON), tmp_path)
    for kind in ("train", "val"):
        found = rows(tmp_path, kind)
        assert found and all(row["forces_mae"] == "" and float(row["energy_mae"]) > 0 for row in found)
    shown = capsys.readouterr().out
    assert "val E" in shown and "meV/A" not in shown
    every = frames(2)
    for frame in every:
        frame.forces[:] = float("nan")
    assert force_variance(every) == 1.0


def test_total_energies_are_subtracted_in_double_precision():
    """A float32 total energy of -1e5 eV is off by meV; the interaction energy must not notice."""
    data = frames(4)
    for frame in data:
        frame.energy += 1e5 * len(frame.z)
    model = potential(e0={z: e + 1e5 for z, e in {1: -13.6, 6: -1030.5, 8: -2041.8}.items()}).float()
    task = PotentialTask(model, TrainingConfig(max_steps=1), 1.0)
    batch = FrameLoader(data, 4).batch(range(4))
    _, errors = task._errors(batch, training=True)
    shifted = potential().double()(FrameLoader(frames(4), 4).batch(range(4)))["energy"]
    exact = shifted - FrameLoader(frames(4), 4).batch(range(4)).energy
    assert torch.allclose(errors["energy_error"].double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "training needs a limit"),
        ({"max_steps": 0}, "max_steps must be positive, got 0"),
        ({"max_steps": 1, "lr": -1.0}, r"lr must be positive, got -1\.0"),
        ({"max_steps": 1, "dtype": "half"}, "dtype must be 'float32' or 'float64', got 'half'"),
        ({"max_steps": 1, "device": "tpu"}, "device must be"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


class Slowly(Callback):
    """A step takes this many seconds of wall-clock time, by a clock of its own."""

    def __init__(self, monkeypatch, seconds: float):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def on_step(self, trainer):
        self.now += self.seconds


def test_wall_clock_time_ends_the_run_and_goes_on_counting(tmp_path, monkeypatch):
    settings = TrainingConfig(wall_seconds=40.0, **COMMON)
    result = fit(potential(), frames(), (), settings, tmp_path, callbacks=[Slowly(monkeypatch, 10.0)])
    assert result.steps == 5, "the limit is seen at the step that follows"
    last = tmp_path / "last.ckpt"
    again = fit(potential(), frames(), (), settings, tmp_path, resume=last, callbacks=[Slowly(monkeypatch, 10.0)])
    assert again.already_finished and again.steps == 5
    longer = TrainingConfig(wall_seconds=80.0, **COMMON)
    more = fit(potential(), frames(), (), longer, tmp_path, resume=last, callbacks=[Slowly(monkeypatch, 10.0)])
    assert more.steps == 9, "50 seconds were over"
    with pytest.raises(ValueError, match="wall_seconds must be positive, got 0"):
        TrainingConfig(wall_seconds=0.0)


class Written(Callback):
    def __init__(self):
        self.steps = []

    def on_save(self, trainer, checkpoint):
        self.steps.append(trainer.step)


def test_checkpoints_are_written_by_time_as_well_as_by_steps(tmp_path, monkeypatch):
    settings = TrainingConfig(max_steps=10, **COMMON | {"validate_every": 8}, checkpoint_seconds=30.0)
    written = Written()
    fit(potential(), frames(), (), settings, tmp_path, callbacks=[Slowly(monkeypatch, 10.0), written])
    assert written.steps == [3, 6, 8, 10], "after three steps each, after a validation, and at the end"


def test_without_a_terminal_it_speaks_every_half_minute(tmp_path, monkeypatch, capsys):
    settings = TrainingConfig(max_steps=20, **COMMON | {"validate_every": 13})
    fit(potential(), frames(), frames(2, seed=1), settings, tmp_path, callbacks=[Slowly(monkeypatch, 10.0)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == [4, 7, 10, 13, 17, 20]
    assert "train E" in lines[1] and "meV/A" in lines[1] and "100 s left" not in lines[1]
    assert lines[1].endswith("2 min left") and "| val E" in lines[3], "13 of 20 steps are left, of 10 seconds"


class Count(Callback):
    """Counts by ones of its own."""

    def __init__(self, by: int) -> None:
        self.by = by
        self.count = 0

    def on_step(self, trainer):
        self.count += self.by

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_callbacks_of_one_class_have_states_of_their_own(tmp_path):
    settings = TrainingConfig(max_epochs=2, **COMMON)
    fit(potential(), frames(), (), settings, tmp_path, callbacks=[Count(1), Count(100), StopAt(5)])
    counts = [Count(1), Count(100)]
    result = fit(potential(), frames(), (), settings, tmp_path, resume=tmp_path / "last.ckpt", callbacks=counts)
    assert [c.count for c in counts] == [result.steps, 100 * result.steps] and result.steps > 5


def test_wall_seconds_of_the_metrics_go_on(tmp_path):
    settings = TrainingConfig(max_epochs=3, **(COMMON | {"log_every": 1}))
    fit(potential(), frames(), (), settings, tmp_path, callbacks=[StopAt(6)])
    fit(potential(), frames(), (), settings, tmp_path, resume=tmp_path / "last.ckpt")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        seconds = [float(row["wall_seconds"]) for row in csv.DictReader(file) if row["kind"] == "train"]
    assert len(seconds) > 6 and seconds == sorted(seconds)
