"""Charged particles in bound clusters: the equations, what they conserve, and what a network has to predict."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nbody_pyg import FromAssignment
from nbody_pyg.datasets import charged_clusters, clusters


def _energy(q, r, v, label, between=True):
    """Energy of one system, pair by pair; without ``between``, of the pairs within clusters."""
    size = np.bincount(label)[0]
    energy = 0.5 * (v**2).sum()
    for i, j in itertools.combinations(range(len(q)), 2):
        square, same = ((r[i] - r[j]) ** 2).sum(), label[i] == label[j]
        energy += same * 0.5 * 9.0 / size * square
        if same or between:
            energy += q[i] * q[j] / np.sqrt(square + 1.0)
    return energy


def _arrays(frames):
    """Charges, positions, velocities, positions later, and alone, [systems, particles, ...]."""
    x = np.stack([frame.x.numpy() for frame in frames])
    return x[:, :, 0], x[:, :, 1:], *(np.stack([f[key].numpy() for f in frames]) for key in ("pos", "y", "alone"))


@pytest.fixture(scope="module")
def frames():
    """Whole systems, as in the benchmark."""
    return charged_clusters(3, seed=3)


def test_particles_follow_the_gradient_of_their_energy():
    """Against a plain loop over pairs, by differences of the energy."""
    (frame,) = charged_clusters(1, seed=2, num_clusters=2, cluster_size=3, steps_before=5, steps_between=4)
    q, v, r, later, alone = (a[0] for a in _arrays([frame]))
    label, h = frame.labels.numpy(), 1e-4

    def forces(at, between):
        force = np.zeros_like(at)
        for i, k in np.ndindex(*at.shape):
            step = np.zeros_like(at)
            step[i, k] = h
            up, down = (_energy(q, at + sign * step, 0.0 * v, label, between) for sign in (1.0, -1.0))
            force[i, k] = (down - up) / (2 * h)
        return force

    for between, wanted in ((True, later), (False, alone)):
        at, speed = r, v
        for _ in range(4):
            speed = speed + 0.01 * forces(at, between)
            at = at + 0.02 * speed
            speed = speed + 0.01 * forces(at, between)
        np.testing.assert_allclose(at, wanted, rtol=0, atol=1e-8)
    assert np.abs(later - alone).max() > 1e-5


def test_energy_and_momentum_are_conserved(frames):
    q, v, r, later, _ = _arrays(frames)
    system = clusters._Clusters(q, frames[0].labels.numpy())
    at, speed = system.run(r, v, clusters.CLUSTER_STEPS_BETWEEN)
    np.testing.assert_allclose(at, later, rtol=0, atol=1e-10)
    before = [_energy(*one, frames[0].labels.numpy()) for one in zip(q, r, v, strict=True)]
    after = [_energy(*one, frames[0].labels.numpy()) for one in zip(q, at, speed, strict=True)]
    kinetic = 0.5 * (v**2).sum((1, 2))
    drift = np.abs(np.subtract(after, before)) / kinetic
    assert drift.max() < 3e-4 and np.abs(0.5 * (speed**2).sum((1, 2)) - kinetic).min() > 1.0
    np.testing.assert_allclose(speed.sum(1), v.sum(1), rtol=0, atol=1e-11)


def test_trajectories_turn_with_their_start(frames, rotation):
    q, v, r, later, _ = _arrays(frames)
    turn = rotation.numpy()
    system = clusters._Clusters(q, frames[0].labels.numpy())
    at, _ = system.run(r @ turn.T + 3.0, v @ turn.T, clusters.CLUSTER_STEPS_BETWEEN)
    np.testing.assert_allclose(at, later @ turn.T + 3.0, rtol=0, atol=1e-9)


def test_trajectories_are_resolved_and_predictable(frames, monkeypatch):
    """Half the time step changes nothing that a network could learn, and a small error at the start stays small."""
    q, v, r, later, _ = _arrays(frames)
    system = clusters._Clusters(q, frames[0].labels.numpy())
    moved = r + 1e-6 * np.random.default_rng(0).normal(size=r.shape)
    at, _ = system.run(moved, v, clusters.CLUSTER_STEPS_BETWEEN)
    assert 1e-7 < np.sqrt(((at - later) ** 2).mean()) < 1e-5
    monkeypatch.setattr(clusters, "CLUSTER_TIME_STEP", clusters.CLUSTER_TIME_STEP / 2)
    at, _ = system.run(r, v, 2 * clusters.CLUSTER_STEPS_BETWEEN)
    assert 0 < ((at - later) ** 2).mean() < 1e-5


def test_clusters_stay_bound_and_move_each_other(frames):
    q, v, r, later, alone = _arrays(frames)
    label = frames[0].labels
    assert label.tolist() == [n // 10 for n in range(100)] and set(np.abs(q).ravel()) == {1.0}

    def centre(x):
        return np.repeat(x.reshape(3, 10, 10, 3).mean(2), 10, axis=1)

    for at in (r, later, alone):
        assert np.linalg.norm(at - centre(at), axis=2).max() < 4.0
    gaps = np.linalg.norm(centre(r)[:, :, None] - centre(r)[:, None], axis=3)
    assert gaps[:, label[:, None] != label[None]].min() > 3.0
    inside = ((later - r) - centre(later - r)).std()
    assert inside > 0.5  # more than a period of the springs
    forced = later - alone
    assert (centre(forced) ** 2).mean() > 0.03 > 0.005 > ((forced - centre(forced)) ** 2).mean()
    # Uniform motion of particles is no prediction
    assert ((later - r - 5.0 * v) ** 2).mean() > 10 * ((later - r) ** 2).mean()


def test_a_system_does_not_depend_on_the_others_and_its_labels_are_parts():
    given = {"num_clusters": 2, "cluster_size": 3, "steps_before": 2, "steps_between": 3}
    many, few = charged_clusters(10, seed=4, **given), charged_clusters(2, seed=4, **given)
    for key in ("pos", "x", "y", "alone"):
        torch.testing.assert_close(many[1][key], few[1][key], rtol=0, atol=1e-12)
    assert not torch.equal(few[0].pos, few[1].pos)
    assert not torch.equal(charged_clusters(1, seed=5, **given)[0].pos, few[0].pos)
    found = FromAssignment()(few[0])
    assert found.num_parts_1.tolist() == [2] and found.child_1[1].tolist() == few[0].labels.tolist()
    with pytest.raises(ValueError, match="cluster_size must be at least 1, got 0"):
        charged_clusters(1, seed=0, cluster_size=0)
    with pytest.raises(ValueError, match="steps_before must not be negative, got -1"):
        charged_clusters(1, seed=0, steps_before=-1)
