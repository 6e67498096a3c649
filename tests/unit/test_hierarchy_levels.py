"""Hierarchies of more levels than one digit counts, from the scheme to a trained and saved model."""

from __future__ import annotations

import functools

import pytest
import torch
from torch_geometric.loader import DataLoader

import factories
from nbody_pyg import BondTree, FromAssignment, NestedShells, Potential, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.hierarchy import TopologyCache, plot_hierarchy
from nbody_pyg.nn.pool import NBodySelect
from nbody_pyg.training.loader import FrameLoader

LEVELS = 12
#: Each column joins two parts of the column before it: 13 atoms, then 12 parts, ..., 2 parts.
LABELS = [[max(atom - level - 1, 0) for level in range(LEVELS)] for atom in range(LEVELS + 2)]
RADII = tuple(1.5 + 0.25 * k for k in range(LEVELS))
SCHEMES = {
    "shells": NestedShells(RADII),
    "equal shells": NestedShells((2.5,) * LEVELS),
    "labels": FromAssignment(labels=LABELS, cutoff=2.0, part_cutoffs=tuple(2.0 + 0.25 * k for k in range(LEVELS))),
    "survivors": SmoothSurvivors(tuple(0.8 + 0.1 * k for k in range(LEVELS)), (1.6 + 0.0, *(r + 1.6 for r in RADII))),
}


net = functools.partial(factories.net, channels=2, correlation=2, num_basis=3)


@pytest.fixture
def frames(generator) -> list[AtomicData]:
    out = []
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)[: LEVELS + 2].double() * 1.3
    for _ in range(3):
        pos = grid + 0.15 * torch.randn(grid.shape, dtype=torch.float64, generator=generator)
        out.append(AtomicData(z=torch.tensor([6, 1, 8, 1, 6, 1, 1] * 2), pos=pos))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_every_level_has_a_say(name, frames):
    """The radial functions of each step are sized by the level of its edges, and each level changes the energy."""
    scheme = SCHEMES[name]
    model = net(scheme)
    assert len(scheme.levels) == LEVELS + 2
    assert scheme.read(scheme(frames[0])).validate().num_levels == LEVELS + 2
    for step in model.steps:
        spec = scheme.levels[step.level + (step.kind == "down")]
        radius = spec.pair_radius if step.kind == "pair" else spec.child_radius
        if name == "survivors" and step.kind != "pair" and step.edges.level <= len(scheme.lengths):
            radius = scheme.lengths[step.edges.level - 1]
        assert float(model.embeddings[str(step.edges)].radial.radius) == radius
    hierarchy = model.hierarchy(frames[0])
    values = model.values(hierarchy)
    assert model(frames[0]).abs() > 1e-8 and max(values) >= LEVELS
    slopes = torch.autograd.grad(model(frames[0]).sum(), list(model.interactions.parameters()), allow_unused=True)
    assert all(s is not None and bool(s.any()) for s in slopes[-4:])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_stored_batched_and_kept(name, frames):
    scheme, model = SCHEMES[name], net(SCHEMES[name])
    single = torch.cat([model(frame) for frame in frames])
    stored = [scheme(frame) for frame in frames]
    for batch in (*DataLoader(stored, batch_size=3), *FrameLoader(stored, batch_size=3)):
        torch.testing.assert_close(model(batch), single, rtol=0, atol=1e-10)
    cache = TopologyCache(scheme)
    for frame, energy in zip(frames, single, strict=True):
        cached = model(frame.z, frame.pos, topology=cache(frame.z, frame.pos))
        torch.testing.assert_close(cached, energy[None], rtol=0, atol=1e-10)
    assert (single[0] - single[1]).abs() > 1e-8
    select = NBodySelect(scheme, level=LEVELS)(stored[0])
    assert select.num_clusters == int(stored[0][f"num_parts_{LEVELS}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_trained_saved_and_loaded(name, frames, tmp_path):
    potential = Potential(net(SCHEMES[name]), {1: -1.0, 6: -2.0, 8: -3.0})
    batch = next(iter(DataLoader([SCHEMES[name](f) for f in frames], batch_size=3)))
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        found = potential(batch, create_graph=True)
        loss = (found["interaction_energy"] - 1.0).square().mean() + found["forces"].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_model(potential, tmp_path / "m.nbody")
    loaded = load_model(tmp_path / "m.nbody")
    for key, value in potential(batch).items():
        torch.testing.assert_close(loaded(batch)[key], value, rtol=0, atol=1e-12)
    assert loaded.model.scheme.signature == SCHEMES[name].signature


@pytest.mark.slow
def test_explained_and_drawn(frames):
    scheme = SCHEMES["labels"]
    model = net(scheme)
    explained = ExplainableNet(model)
    x, edges = explained.graph(frames[0])
    torch.testing.assert_close(explained(x, edges, frames[0]).flatten(), model(frames[0]), rtol=0, atol=1e-12)
    assert plot_hierarchy(frames[0], scheme) is not None


@pytest.mark.slow
def test_long_range_over_twelve_levels(frames):
    """The fast multipole method over every level follows the direct sum; parts as near as here keep an error."""
    near, far = (
        net(SCHEMES["labels"], long_range={"method": method, "elements": True, "lmax": 6})
        for method in ("direct", "hierarchy")
    )
    far.load_state_dict(near.state_dict(), strict=False)
    energies = [model(frames[0]) for model in (near, far)]
    without = net(SCHEMES["labels"])(frames[0])
    assert (energies[0] - without).abs() > 1e-3
    torch.testing.assert_close(energies[0], energies[1], rtol=2e-2, atol=0)


def test_few_levels_as_before():
    assert [str(step.edges) for step in net(BondTree()).steps][:4] == ["pair_0", "child_1", "pair_1", "child_2"]
