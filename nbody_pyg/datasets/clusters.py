"""Charged particles in bound clusters: fast motion inside clusters, slow motion between them, simulated here."""

from __future__ import annotations

import numpy as np
import torch

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.particles import require_numbers

#: Length of a time step, and steps before the input and between the input and the target.
CLUSTER_TIME_STEP, CLUSTER_STEPS_BEFORE, CLUSTER_STEPS_BETWEEN = 0.02, 50, 250
#: Length below which the Coulomb force is softened; frequency of a particle in its cluster without charges.
_SOFTENING, _FREQUENCY = 1.0, 3.0
#: Standard deviations, per component, of particles from their centre and of the velocities of centres.
_SPREAD, _DRIFT = 0.5, 0.1
#: Smallest distance of two centres at the start.
_GAP = 5.0
#: Samples simulated together; few enough that all arrays of a step stay in the cache.
_TOGETHER = 8


def charged_clusters(
    num_samples: int,
    seed: int,
    num_clusters: int = 10,
    cluster_size: int = 10,
    *,
    steps_before: int = CLUSTER_STEPS_BEFORE,
    steps_between: int = CLUSTER_STEPS_BETWEEN,
) -> list[AtomicData]:
    r"""Positions, velocities and charges of particles that are bound in clusters, and their positions some steps later.

    .. math:: \ddot{\mathbf r}_i = \sum_{j \ne i} q_i q_j\, \mathbf r_{ij}\, (r_{ij}^2 + \epsilon^2)^{-3/2}
              - \frac{\omega^2}{n} \sum_{j \in c(i)} \mathbf r_{ij}, \qquad
              \mathbf r_{ij} = \mathbf r_i - \mathbf r_j, \quad q_i = \pm 1

    Springs bind all n particles of a cluster c(i) to each other: without charges each would oscillate about the centre
    of its cluster with the frequency :math:`\omega = 3`. Charges of all particles act on each other, with the softening
    :math:`\epsilon = 1`. Charges are drawn one by one, so clusters have net charges of about :math:`\sqrt n`. Without
    units, in free space, by the velocity Verlet method with steps of 0.02, of which 105 are a period of the springs.

    Centres start uniformly distributed in a ball of radius :math:`10\, (\mathrm{clusters} / 10)^{1/3}`, at least 5
    apart, with velocities of standard deviation 0.1. Positions of particles relative to their centre are normally
    distributed with standard deviation 0.5, velocities with 1.5. The first ``steps_before`` steps are not used. Energy
    is conserved to 0.03 % of its kinetic part, momentum exactly.

    ===========  =================  ====================================================================
    key          shape              meaning
    ===========  =================  ====================================================================
    ``pos``      [particles, 3]     positions, float64
    ``x``        [particles, 4]     charge and velocity, of type "0e + 1o", float64
    ``y``        [particles, 3]     positions ``steps_between`` steps later, float64
    ``alone``    [particles, 3]     the same if from the input on no force acted between clusters, float64
    ``labels``   [particles]        number of the cluster, as :class:`~nbody_pyg.hierarchy.FromAssignment` reads it
    ===========  =================  ====================================================================

    Args:
        num_samples: number of systems.
        seed: of the random numbers. A system does not depend on ``num_samples``.
        num_clusters: in every system.
        cluster_size: particles in every cluster.
        steps_before: steps before the input.
        steps_between: steps from the input to the target.

    Raises: ValueError: a number below 1, or a negative ``steps_before``.
    """
    counts = {"num_samples": num_samples, "num_clusters": num_clusters, "cluster_size": cluster_size}
    require_numbers(counts | {"steps_between": steps_between}, steps_before)
    labels = np.repeat(np.arange(num_clusters), cluster_size)
    drawn = [_start(np.random.default_rng([seed, n]), labels) for n in range(num_samples)]
    frames = []
    for first in range(0, num_samples, _TOGETHER):
        q, r, v = map(np.stack, zip(*drawn[first : first + _TOGETHER], strict=True))
        r, v = _Clusters(q, labels).run(r, v, steps_before)
        later, _ = _Clusters(q, labels).run(r, v, steps_between)
        each = (-1, cluster_size, 3)  # a cluster as a system of its own
        alone, _ = _Clusters(q.reshape(each[:2]), labels[:cluster_size]).run(
            r.reshape(each), v.reshape(each), steps_between
        )
        alone = alone.reshape(r.shape)
        given = np.concatenate([q[:, :, None], v], axis=2)
        for pos, x, y, without in zip(*(map(torch.from_numpy, (r, given, later, alone))), strict=True):
            found = {"pos": pos.clone(), "x": x.clone(), "y": y.clone(), "alone": without.clone()}
            frames.append(AtomicData(**found, labels=torch.from_numpy(labels.copy())))
    return frames


def _start(rng: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Charges [particles], positions and velocities [particles, 3] of one system."""
    number = int(labels[-1]) + 1
    charge, radius = rng.choice([-1.0, 1.0], size=len(labels)), 10.0 * (number / 10.0) ** (1.0 / 3.0)
    centres: list[np.ndarray] = []
    while len(centres) < number:
        centre = rng.uniform(-radius, radius, size=3)
        if np.linalg.norm(centre) < radius and all(np.linalg.norm(centre - other) >= _GAP for other in centres):
            centres.append(centre)
    shape = (number, len(labels) // number, 3)
    pos, vel = _SPREAD * rng.normal(size=shape), _FREQUENCY * _SPREAD * rng.normal(size=shape)
    pos += np.stack(centres)[:, None] - pos.mean(1, keepdims=True)
    vel += _DRIFT * rng.normal(size=(number, 1, 3)) - vel.mean(1, keepdims=True)
    return charge, pos.reshape(-1, 3), vel.reshape(-1, 3)


class _Clusters:
    """The equations of motion of systems side by side, with charges [systems, particles]; positions and velocities are
    [systems, particles, 3].

    A force that is w_ij (r_i - r_j) is a matrix product: all pairs of a system take a hundred microseconds.
    """

    def __init__(self, charge: np.ndarray, labels: np.ndarray) -> None:
        self.product = charge[:, :, None] * charge[:, None]
        self.product[:, np.arange(len(labels)), np.arange(len(labels))] = 0.0
        self.spring = _FREQUENCY**2 / np.bincount(labels)[0] * (labels[:, None] == labels[None])

    def run(self, r: np.ndarray, v: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities some steps later."""
        force = self.forces(r)
        for _ in range(steps):
            v = v + 0.5 * CLUSTER_TIME_STEP * force
            r = r + CLUSTER_TIME_STEP * v
            force = self.forces(r)
            v = v + 0.5 * CLUSTER_TIME_STEP * force
        return r, v

    def forces(self, r: np.ndarray) -> np.ndarray:
        """Force on each particle."""
        square = self._square(r) + _SOFTENING**2
        weight = self.product / (square * np.sqrt(square)) - self.spring
        force: np.ndarray = r * weight.sum(2, keepdims=True) - weight @ r
        return force

    def energy(self, r: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Energy of each system."""
        square = self._square(r)
        pairs = self.product / np.sqrt(square + _SOFTENING**2) + 0.5 * self.spring * square
        energy: np.ndarray = 0.5 * (v**2).sum((1, 2)) + 0.5 * pairs.sum((1, 2))
        return energy

    def _square(self, r: np.ndarray) -> np.ndarray:
        """Squared distances [systems, particles, particles]."""
        own = (r * r).sum(2)
        square: np.ndarray = own[:, :, None] + own[:, None] - 2.0 * (r @ r.transpose(0, 2, 1))
        return square
