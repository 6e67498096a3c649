"""Sums of latent charges that the network finds itself are trained towards the charge of the system."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import factories
from nbody_pyg import Potential
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import load_embedded
from nbody_pyg.longrange.charges import charge_errors, recorded_charges
from nbody_pyg.training import TrainingConfig, fit
from nbody_pyg.training.task import PotentialTask

OWN = {"method": "direct", "states": True}
SETTINGS = TrainingConfig(max_steps=60, batch_size=2, dtype="float64", warmup_steps=0, ema_decay=0.0, lr=0.02)


def _frames(*charges: float) -> list[AtomicData]:
    """Frames of ethanol with a charge; without an oxygen where it is odd, so that the geometry tells it."""
    out = []
    for frame, charge in zip(load_embedded("ethanol"), charges, strict=False):
        kept = frame.z != 8 if charge % 2 else frame.z > 0
        total = torch.tensor([charge], dtype=torch.float64)
        out.append(AtomicData(z=frame.z[kept], pos=frame.pos[kept], energy=frame.energy * 0.0 - 1.0,
                              forces=frame.forces[kept], charge=total))  # fmt: skip
    return out


def _potential(**options) -> Potential:
    return Potential(factories.net(species=[1, 6, 8], long_range=OWN, **options))


def _sums(potential: Potential, frame: AtomicData, **given) -> torch.Tensor:
    with recorded_charges(potential.model.long_range.charges) as found:
        potential(frame.z, frame.pos, **given)
    return found[0].detach().sum(0)


def test_errors_by_hand():
    charges = torch.tensor([[0.5, 0.1], [0.25, -0.3], [-1.0, 0.0]])
    error = charge_errors(charges, torch.tensor([0, 0, 1]), torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(error, torch.tensor([[-0.25, -0.2], [0.0, 0.0]]))


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "met"), [(1.0, True), (0.0, False)])
def test_sums_become_the_charge_that_all_frames_have(tmp_path, weight, met):
    frames, potential = _frames(2.0, 2.0), _potential()
    assert (_sums(potential, frames[0]) - torch.tensor([2.0, 0.0])).abs().max() > 0.3
    settings = dataclasses.replace(SETTINGS, charge_weight=weight)
    fit(potential, frames, settings=settings, folder=tmp_path, show_progress=False)
    assert potential.model.assumed == {"charge": 2.0}
    gap = (_sums(potential, frames[0]) - torch.tensor([2.0, 0.0])).abs().max()
    assert (float(gap) < 0.1) is met, gap
    assert not potential.model.long_range.charges._forward_hooks


@pytest.mark.slow
def test_frames_of_several_charges(tmp_path):
    frames, potential = _frames(2.0, 1.0, 2.0, 1.0), _potential(inputs=["charge"])
    fit(
        potential,
        frames,
        settings=dataclasses.replace(SETTINGS, charge_weight=1.0, max_steps=150),
        folder=tmp_path,
        show_progress=False,
    )
    for frame in frames[:2]:
        found = _sums(potential, frame, charge=frame.charge)
        torch.testing.assert_close(found, torch.tensor([float(frame.charge), 0.0]).double(), rtol=0, atol=0.15)


def test_other_networks_have_no_such_term():
    settings = dataclasses.replace(SETTINGS, charge_weight=1.0)
    assert PotentialTask(_potential(), settings)._summed is not None
    assert PotentialTask(Potential(factories.net(long_range="direct")), settings)._summed is None
    assert PotentialTask(Potential(factories.net()), settings)._summed is None


def test_no_compiled_training():
    with pytest.raises(ValueError, match=r"compile must be false while the sums of latent charges are trained"):
        PotentialTask(_potential(), dataclasses.replace(SETTINGS, compile=True))
    with pytest.raises(ValueError, match="charge_weight must be zero or positive, got -1"):
        dataclasses.replace(SETTINGS, charge_weight=-1.0)
