"""The parts of the training loop: schedule, clock, loss, flat weights, optimizers, error meter."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from factories import Springs
from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import NestedShells
from nbody_pyg.io.description import potential_config, potential_from_config
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import AtomicReference, Potential
from nbody_pyg.training import EnergyForceLoss, ErrorMeter, FrameLoader, WarmupCosine, build_optimizer, optim
from nbody_pyg.training.clock import ProcessClock
from nbody_pyg.training.ema import WeightEMA
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.flat import FlatParameters
from nbody_pyg.training.metrics import RunningMeans


# -- schedule and clock ------------------------------------------------------------------------------------
def test_schedule_by_its_formula():
    schedule = WarmupCosine(warmup_steps=4, constant=0.3)
    assert [schedule(step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(100, 0.3) == 1.0
    assert schedule(100, 0.65) == pytest.approx(0.5)
    assert schedule(100, 0.9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.6 / 0.7)))
    assert schedule(100, 1.0) == pytest.approx(0.0)
    assert WarmupCosine(0, 1.0)(0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 0.3), "warmup_steps must not be negative"), ((5, 1.5), "constant must be")],
)
def test_schedule_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosine(*arguments)


def test_clock_counts_work_and_neither_sleep_nor_pauses():
    clock = ProcessClock(10.0)

    def work():
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    work()
    assert clock.elapsed == 10.0
    clock.start()
    work()
    time.sleep(0.1)
    clock.pause()
    work()
    assert 10.05 <= clock.elapsed < 10.09


# -- loss --------------------------------------------------------------------------------------------------
def test_loss_by_hand():
    energy, forces = torch.tensor([0.3, -0.1]), torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 3.0]])
    loss = EnergyForceLoss(force_variance=4.0, force_weight=2.0, energy_weight=0.5)
    expected = (2.0 * 18 / 6 + 0.5 * (0.09 + 0.01) / 2) / 4
    assert loss(energy, forces).item() == pytest.approx(expected)
    per_atom = EnergyForceLoss(energy_weight=1.0, force_weight=0.0, energy_per="atom")
    found = per_atom(energy, None, num_atoms=torch.tensor([3, 2]))
    assert found.item() == pytest.approx((0.1**2 + 0.05**2) / 2)
    virial = EnergyForceLoss(stress_weight=0.1)(None, forces, torch.ones(1, 3, 3))
    assert virial.item() == pytest.approx(3.0 + 0.1)
    charges = EnergyForceLoss(force_variance=4.0, charge_weight=0.05)
    error = torch.tensor([[0.5, -0.1], [1.0, 0.2]])
    with_charges = charges(None, forces, charge_error=error)
    assert with_charges.item() == pytest.approx(3.0 / 4.0 + 0.05 * (0.25 + 0.01 + 1.0 + 0.04) / 4)


def test_penalties_agree_where_they_should():
    small = 1e-3 * torch.randn(5, 3, dtype=torch.float64)
    mse, huber = (EnergyForceLoss(1.0, penalty=name)(None, small) for name in ("mse", "huber"))
    assert huber.item() == pytest.approx(mse.item(), rel=1e-12) and mse.item() > 0
    large = torch.tensor([[30.0, 0.0, 0.0], [0.0, 0.0, 40.0]], dtype=torch.float64)
    assert EnergyForceLoss(1.0, penalty="huber")(None, large) < EnergyForceLoss(1.0)(None, large)
    norm = EnergyForceLoss(1.0, penalty="norm")(None, large).item()
    assert norm == pytest.approx((30 + 40) / 2 / 3**0.5, rel=1e-4)
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    EnergyForceLoss(1.0, penalty="norm")(None, zero).backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"force_variance": 0.0}, r"force_variance must be positive, got 0\.0"),
        ({"penalty": "mae"}, "penalty must be one of .*huber.*got 'mae'"),
        ({"energy_per": "mole"}, "energy_per must be 'molecule' or 'atom', got 'mole'"),
        ({"energy_weight": -1.0}, "weights must not be negative"),
        ({"energy_weight": 0.0, "force_weight": 0.0}, "one must be positive"),
    ],
)
def test_loss_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnergyForceLoss(**arguments)


def test_loss_without_any_label():
    with pytest.raises(ValueError, match="no term of the loss has both a label and a positive weight"):
        EnergyForceLoss()(None, None)


@pytest.mark.parametrize("penalty", ["mse", "huber", "norm"])
def test_a_term_without_labels_counts_nothing(penalty):
    forces = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    loss = EnergyForceLoss(2.0, penalty=penalty, stress_weight=1.0)
    found = loss(forces[:0, 0], forces, forces.new_zeros(0, 3, 3))
    assert found.item() == loss(None, forces).item() > 0
    nothing = loss(forces[:0, 0], forces[:0])
    nothing.backward()
    assert nothing.item() == 0 and forces.grad.abs().max() == 0


# -- flat weights and optimizers ---------------------------------------------------------------------------
def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_flat_weights_train_like_separate_ones(name):
    x, results = torch.randn(7, 3, dtype=torch.float64), []
    for use_flat in (False, True):
        model = network()
        flat = FlatParameters(model) if use_flat else None
        optimizer = build_optimizer(name, model, 0.01, 0.1, flat)
        for _ in range(5):
            optimizer.zero_grad() if flat is None else flat.zero_grad()
            model(x).square().sum().backward()
            if flat is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                flat.clip_grad_norm(0.5)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, rtol=0, atol=1e-12)
    assert (results[0] - torch.cat([p.detach().flatten() for p in network().parameters()])).abs().max() > 1e-3


def test_flat_weights_are_views_and_come_back_after_none():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    flat = FlatParameters(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    flat.values.add_(1.0)
    assert all(torch.equal(p, b + 1) for p, b in zip(model.parameters(), before, strict=True))
    for p in model.parameters():
        p.grad = None
    flat.zero_grad()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert flat.gradient.abs().sum() > 0
    assert torch.equal(flat.pack(before)[:15].view(5, 3), before[0])


def test_flat_weights_errors():
    with pytest.raises(ValueError, match="no trainable parameters"):
        FlatParameters(nn.Tanh())
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="must share one dtype and device"):
        FlatParameters(mixed)


def test_optimizer_by_the_name_of_a_class(monkeypatch):
    class Plain(torch.optim.SGD):
        @classmethod
        def from_module(cls, module, lr, weight_decay):
            return cls(module.parameters(), lr=lr)

    monkeypatch.setattr(optim, "Plain", Plain, raising=False)
    assert isinstance(build_optimizer("Plain", network(), 0.1), Plain)
    with pytest.raises(ValueError, match=r"optimizer must be one of .*Plain.*adamw.*got 'sgdx'"):
        build_optimizer("sgdx", network(), 0.1)
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer("adam", nn.Tanh(), 0.1)


def test_the_average_is_lent_to_the_module():
    module = network()
    flat = FlatParameters(module)
    ema = WeightEMA(flat, 0.5)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    ema.update()  # (1 + 0) / (10 + 0) of the old weights are kept
    with ema.averaged():
        assert all(torch.allclose(p, w + 0.9) for p, w in zip(module.parameters(), before, strict=True))
    assert all(torch.equal(p, w + 1.0) for p, w in zip(module.parameters(), before, strict=True))


def test_ema_refuses_a_decay_outside_its_range():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1\.0"):
        WeightEMA(FlatParameters(network()), 1.0)


# -- errors ------------------------------------------------------------------------------------------------
def springs_frames(count=5):
    out = []
    for number in range(count):
        pos = torch.randn(4 + number % 2, 3, dtype=torch.float64)
        z = torch.tensor([6, 8, 1, 1, 1][: len(pos)])
        vec = pos - pos.mean(0)
        out.append(AtomicData(z=z, pos=pos, energy=vec.square().sum().reshape(1), forces=-2.0 * vec))
    return out


def test_errors_and_predictions_by_hand():
    frames, potential = springs_frames(), Potential(Springs(0.7))
    found = evaluate(potential, frames, batch_size=2)
    energy = torch.cat([0.35 / 1.0 * f.energy for f in frames])
    labels = torch.cat([f.energy for f in frames])
    error = energy - labels
    atoms = torch.tensor([len(f.z) for f in frames])
    forces = torch.cat([1.3 * (f.pos - f.pos.mean(0)) for f in frames])
    z = torch.cat([f.z for f in frames])
    expected = {
        "energy_mae": error.abs().mean(),
        "energy_rmse": error.square().mean().sqrt(),
        "energy_per_atom_mae": (error / atoms).abs().mean(),
        "forces_mae": forces.abs().mean(),
        "forces_rmse": forces.square().mean().sqrt(),
        "forces_mae_H": forces[z == 1].abs().mean(),
        "forces_mae_O": forces[z == 8].abs().mean(),
    }
    for key, value in expected.items():
        assert found.errors[key] == pytest.approx(1000 * value.item(), rel=1e-10) and value > 0
    relative = (forces.square().mean() / torch.cat([f.forces for f in frames]).square().mean()).sqrt()
    assert found.errors["forces_percent"] == pytest.approx(100 * relative.item(), rel=1e-10) and relative > 0
    assert torch.allclose(found.energy, energy) and len(found.forces) == 5
    assert torch.allclose(torch.cat(found.forces), forces - 2.0 / 1.3 * forces)


def test_missing_labels_do_not_count_but_missing_predictions_show():
    frames = springs_frames(2)
    frames[0].energy[:] = float("nan")
    meter, batch = ErrorMeter(), FrameLoader(frames, 2).batch([0, 1])
    result = Potential(Springs(0.7))(batch)
    meter.update(result, batch)
    assert math.isfinite(meter.compute()["energy_mae"])
    result["forces"][3] = float("nan")
    meter.update(result, batch)
    assert math.isnan(meter.compute()["forces_mae"])


def test_running_means_leave_out_what_has_no_label():
    means, loss = RunningMeans(), torch.tensor(2.0)
    means.every = 2
    for energy in (torch.tensor([0.2, -0.4]), None, torch.zeros(0), None, torch.tensor([0.5])):
        means.add(loss, energy, torch.zeros(0, 3))
    assert means.take() == pytest.approx({"loss": 2.0, "grad_norm": 0.0, "energy_mae": pytest.approx(1100.0 / 3)})
    assert set(means.take()) == {"loss", "grad_norm"}


def test_frames_without_labels_are_predicted():
    frames = springs_frames(3)
    del frames[1].energy, frames[1].forces
    frames[2].energy = frames[2].energy.new_full((1,), float("nan"))
    found = evaluate(Potential(Springs(0.7)), frames)
    assert found.energy.abs().min() > 0 and len(found.forces) == 3
    first, third = (evaluate(Potential(Springs(0.7)), [frames[i]]) for i in (0, 2))
    assert found.errors["energy_mae"] == pytest.approx(first.errors["energy_mae"], rel=1e-12) != 0
    both = (first.errors["forces_mae"] + third.errors["forces_mae"]) / 2
    assert found.errors["forces_mae"] == pytest.approx(both, rel=1e-12) != 0
    assert "energy_mae" not in third.errors
    assert evaluate(Potential(Springs(0.7)), [frames[1]]).errors == {}


def test_periodic_and_open_frames_are_evaluated_as_each_by_itself():
    def frame(z, pos, **more):
        pos = torch.tensor(pos, dtype=torch.float64)
        energy = torch.tensor([float(len(z))], dtype=torch.float64)
        return scheme(AtomicData(z=torch.tensor(z), pos=pos, energy=energy, **more))

    scheme, pbc = NestedShells((3.0,)), torch.ones(1, 3, dtype=torch.bool)
    cell = torch.tensor([[[3.1, 0.0, 0.2], [0.3, 3.4, 0.0], [0.0, 0.4, 3.3]]], dtype=torch.float64)
    bulk = {"z": [6, 8, 1, 1], "pos": [[0.0, 0, 0], [1.2, 0.1, 0], [0.2, 1.1, 0.4], [0.3, 0.2, 1.3]]}
    first, second = frame(**bulk, cell=cell, pbc=pbc), frame(**bulk, cell=1.1 * cell, pbc=pbc)
    frames = [first, frame([6], [[0.0, 0, 0]]), second, frame([8, 1, 1], [[0.0, 0, 0], [0.9, 0.3, 0], [0, 0.2, 0.9]])]
    frames[1].comment = [1]  # an extra that no loader takes
    torch.manual_seed(0)
    potential = Potential(NBodyNet([1, 6, 8], scheme, channels=4), {1: -13.6, 6: -1030.5, 8: -2041.8}).double()
    found = evaluate(potential, frames, batch_size=4)
    alone = [potential(f, compute_forces=True) for f in frames]
    assert torch.allclose(found.energy, torch.cat([r["energy"] for r in alone]).detach(), rtol=0, atol=1e-9)
    for ours, theirs in zip(found.forces, alone, strict=True):
        assert torch.allclose(ours, theirs["forces"], rtol=0, atol=1e-10)
    assert min(f.abs().max() for i, f in enumerate(found.forces) if i != 1) > 1e-3
    # The cell matters, so that the equalities above say something
    opened = scheme(AtomicData(z=first.z, pos=first.pos))
    assert (potential(opened)["energy"] - found.energy[0]).abs() > 1e-3
    errors = torch.tensor([float(r["energy"]) - len(f.z) for r, f in zip(alone, frames, strict=True)])
    assert found.errors["energy_mae"] == pytest.approx(1000 * float(errors.abs().mean()), rel=1e-6)
    # A loader by itself does not fill in what is missing
    with pytest.raises(ValueError, match=r"every frame needs the same keys: .*'cell'.*'pbc'"):
        FrameLoader([frames[0], frames[3]], 2)


# -- description of a potential ----------------------------------------------------------------------------
def test_description_and_rebuilding():
    potential = Potential(Springs(0.7), AtomicReference({1: -13.6, 8: -2041.8}), 0.5)
    config = potential_config(potential)
    assert config["e0"] == {"1": -13.6, "8": -2041.8} and config["scale"] == 0.5
    again = potential_from_config(config, Springs(0.7))
    assert again.reference.energies == potential.reference.energies
    with pytest.raises(ValueError, match="the file holds a Springs, but model is a Tanh"):
        potential_from_config(config, nn.Tanh())
    with pytest.raises(ValueError, match="holds a Springs, which nbody_pyg cannot build by itself"):
        potential_from_config(config)
    with pytest.raises(ValueError, match="dtype must be one of"):
        potential_from_config(config | {"dtype": "float16"}, Springs(0.7))
