"""Charged particles that move freely: a benchmark of predicted positions, simulated here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from nbody_pyg.data import AtomicData

#: Length of a time step, and steps before the input and between the input and the target.
TIME_STEP, STEPS_BEFORE, STEPS_BETWEEN = 0.001, 3_000, 1_000
#: Largest component of the force on a particle: without it, two that meet would leave each other arbitrarily fast.
_MAX_FORCE = 0.1 / TIME_STEP
#: Samples simulated together; few enough that all arrays of a step stay in the cache.
_TOGETHER = 200


def charged_particles(
    num_samples: int,
    seed: int,
    num_particles: int = 5,
    *,
    num_clusters: int = 1,
    steps_before: int = STEPS_BEFORE,
    steps_between: int = STEPS_BETWEEN,
) -> list[AtomicData]:
    r"""Positions, velocities and charges of particles, and their positions some steps later.

    .. math:: \ddot{\mathbf r}_i = \sum_{j \ne i} q_i q_j\, \mathbf r_{ij}\, |\mathbf r_{ij}|^{-3}, \qquad
              \mathbf r_{ij} = \mathbf r_i - \mathbf r_j, \quad q_i = \pm 1

    Without units, in free space, by the leapfrog method with steps of 0.001. Positions start normally distributed, with
    standard deviation (particles / 5)^(1/3), velocities with length 0.5 in random directions. Components of forces are
    limited to 100. The first ``steps_before`` steps are not used. Source: the charged particles of Kipf et al.
    (arXiv:1802.04687) in three dimensions, as in the benchmark of EGNN (arXiv:2102.09844), with our own random numbers.

    ===========  =================  ==================================================
    key          shape              meaning
    ===========  =================  ==================================================
    ``pos``      [particles, 3]     positions, float64
    ``x``        [particles, 4]     charge and velocity, of type "0e + 1o", float64
    ``y``        [particles, 3]     positions ``steps_between`` steps later, float64
    ===========  =================  ==================================================

    Args:
        num_samples: number of systems.
        seed: of the random numbers. A system does not depend on ``num_samples``.
        num_particles: in every system.
        num_clusters: start around this many centres, which are 6 apart or more on average, instead of one.
        steps_before: steps before the input.
        steps_between: steps from the input to the target.

    Raises: ValueError: a number below 1, or a negative ``steps_before``.
    """
    counts = {"num_samples": num_samples, "num_particles": num_particles, "num_clusters": num_clusters}
    require_numbers(counts | {"steps_between": steps_between}, steps_before)
    drawn = [_start(np.random.default_rng([seed, n]), num_particles, num_clusters) for n in range(num_samples)]
    frames = []
    for first in range(0, num_samples, _TOGETHER):
        q, r, v = (np.stack(part, axis=-1) for part in zip(*drawn[first : first + _TOGETHER], strict=True))
        system = _Simulation(q, r, v)
        system.run(steps_before)
        given = system.r.copy(), system.v.copy()
        system.run(steps_between)
        for n in range(q.shape[-1]):
            pos, vel, later = (torch.from_numpy(a[..., n].copy()) for a in (*given, system.r))
            charge = torch.from_numpy(q[:, n].copy()).unsqueeze(1)
            frames.append(AtomicData(pos=pos, x=torch.cat([charge, vel], dim=1), y=later))
    return frames


def require_numbers(counts: Mapping[str, int], steps_before: int) -> None:
    """Check the sizes of a simulation.

    Raises: ValueError: a count below 1, or a negative ``steps_before``.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if steps_before < 0:
        raise ValueError(
            f"steps_before must not be negative, got {steps_before}; 0 takes the first positions as inputs"
        )


def _start(rng: np.random.Generator, particles: int, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Charges [particles], positions and velocities [particles, 3] of one system."""
    charge = rng.choice([-1.0, 1.0], size=particles)
    spread = (particles / clusters / 5.0) ** (1.0 / 3.0)
    pos, vel = rng.normal(size=(particles, 3)) * spread, rng.normal(size=(particles, 3))
    if clusters > 1:
        centres = rng.normal(size=(clusters, 3)) * 6.0 * clusters ** (1.0 / 3.0)
        pos = pos + centres[np.arange(particles) % clusters]
    return charge, pos, 0.5 * vel / np.linalg.norm(vel, axis=1, keepdims=True)


class _Simulation:
    """Systems side by side: charges q [particles, systems], positions r and velocities v [particles, 3, systems].

    Velocities are half a step behind positions.
    """

    def __init__(self, q: np.ndarray, r: np.ndarray, v: np.ndarray) -> None:
        first, second = np.triu_indices(len(q), 1)
        # A row for each pair, +1 at its first and -1 at its second particle: differences, and sums of forces
        self.pairs = np.zeros((len(first), len(q)))
        self.pairs[np.arange(len(first)), first], self.pairs[np.arange(len(first)), second] = 1.0, -1.0
        self.q, self.r, self.v = q[first] * q[second], r, v

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.v = self.v + TIME_STEP * self.forces()
            self.r = self.r + TIME_STEP * self.v

    def forces(self) -> np.ndarray:
        """Force on each particle, [particles, 3, systems]."""
        vec = (self.pairs @ self.r.reshape(len(self.r), -1)).reshape(len(self.pairs), *self.r.shape[1:])
        square = np.einsum("pxs,pxs->ps", vec, vec)
        pull = (self.q / (square * np.sqrt(square)))[:, None] * vec
        total = (self.pairs.T @ pull.reshape(len(pull), -1)).reshape(self.r.shape)
        limited: np.ndarray = np.clip(total, -_MAX_FORCE, _MAX_FORCE)
        return limited
