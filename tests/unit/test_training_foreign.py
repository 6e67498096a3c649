"""Models from elsewhere in our trainer: PyG's SchNet on our neighbour list, with forces."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn import SchNet

from nbody_pyg import Potential
from nbody_pyg.datasets import fit_atomic_energies, load_embedded
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.nn import InteractionGraph
from nbody_pyg.testing import assert_conservative, assert_permutation_invariant
from nbody_pyg.training import TrainingConfig, fit, force_variance
from nbody_pyg.training.evaluation import evaluate


def schnet() -> SchNet:
    return SchNet(16, 16, 2, 10, cutoff=5.0, interaction_graph=InteractionGraph(5.0))


@pytest.mark.slow
def test_schnet_learns_forces_and_is_saved(tmp_path):
    frames = load_embedded("ethanol")[:24]
    potential = Potential(schnet(), fit_atomic_energies(frames), force_variance(frames) ** 0.5)
    before = evaluate(potential, frames[:16]).errors["forces_mae"]
    settings = TrainingConfig(max_steps=150, batch_size=4, optimizer="adam", lr=5e-3, validate_every=75)
    result = fit(potential, frames[:16], frames[16:], settings, tmp_path, show_progress=False)
    after = evaluate(potential, frames[:16]).errors
    assert result.best_step > 0 and after["forces_mae"] < 0.8 * before
    save_model(potential, tmp_path / "schnet.nbody")
    again = load_model(tmp_path / "schnet.nbody", model=schnet())
    torch.testing.assert_close(again(frames[0])["forces"], potential(frames[0])["forces"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds a SchNet, which nbody_pyg cannot build by itself"):
        load_model(tmp_path / "schnet.nbody")
    assert_conservative(potential.double())
    assert_permutation_invariant(potential)
