"""First momenta of dynamics, and the degrees of freedom that share the kinetic energy."""

from __future__ import annotations

import numpy as np
from ase import Atoms, units

# A motion that has less than this part of its thermal share of the kinetic energy is not there.
_NOTHING = 1e-3
# A linear structure has no rotation about its axis: smallest singular value, relative to the largest.
_LINEAR = 1e-6


def draw_momenta(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    r"""Give atoms momenta of the Maxwell-Boltzmann distribution, without the motion of the whole structure.

    .. math:: p_i = m_i (v_i - V - \omega \times (r_i - R)), \qquad v_i \sim N(0, kT / m_i)

    :math:`V` and :math:`\omega` are the velocity of the centre of mass :math:`R` and the angular velocity of the
    :math:`v_i`. Their energy is taken away, not given to other motions, so that each remaining degree of freedom has
    :math:`kT / 2` on average. Rotation stays in a periodic structure; both stay in a single atom, and where constraints
    take up momentum.

    Args:
        temperature: K.
    """
    width = np.sqrt(units.kB * temperature * atoms.get_masses())[:, None]
    atoms.set_momenta(width * rng.standard_normal((len(atoms), 3)))
    if not atoms.constraints and len(atoms) > 1:
        scaled = _scaled_momenta(atoms)
        for motions in _rigid_motions(atoms):
            scaled -= motions @ (motions.T @ scaled)
        atoms.set_momenta(scaled.reshape(-1, 3) * np.sqrt(atoms.get_masses())[:, None])


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """Degrees of freedom that share the kinetic energy in a run.

    Constraints take some away. So do total and angular momentum (of an open structure) where nothing changes them and
    they are zero at the start: 3 N - 3 remain of a periodic structure, 3 N - 6 of a molecule, 3 N - 5 of a linear one.
    A Langevin thermostat changes them, and so may constraints.
    """
    count: int = atoms.get_number_of_degrees_of_freedom()
    if ensemble == "langevin" or atoms.constraints or len(atoms) < 2:
        return count
    scaled = _scaled_momenta(atoms)
    for motions in _rigid_motions(atoms):
        own = float(((motions.T @ scaled) ** 2).sum())
        if own <= _NOTHING * motions.shape[1] / len(scaled) * float(scaled @ scaled):
            count -= motions.shape[1]
    return count


def kelvin(atoms: Atoms, freedom: int) -> float:
    """The temperature 2 K / (f k) of atoms with ``freedom`` degrees of freedom, K."""
    return float(2.0 * atoms.get_kinetic_energy() / (freedom * units.kB))


def _scaled_momenta(atoms: Atoms) -> np.ndarray:
    """Momenta over the square roots of the masses, flat: half their square is the kinetic energy."""
    scaled: np.ndarray = atoms.get_momenta() / np.sqrt(atoms.get_masses())[:, None]
    return scaled.ravel()


def _rigid_motions(atoms: Atoms) -> list[np.ndarray]:
    """Translations, and rotations of an open structure, as orthonormal columns in the space of scaled momenta."""
    weights = np.sqrt(atoms.get_masses())[:, None, None]
    axes = np.eye(3)
    found = [np.broadcast_to(axes, (len(atoms), 3, 3))]
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        found.append(np.cross(axes[None], arms[:, None]).swapaxes(1, 2))  # e x r, one column for each axis e
    out = []
    for motions in found:
        left, values, _ = np.linalg.svd((weights * motions).reshape(-1, 3), full_matrices=False)
        out.append(left[:, values > _LINEAR * values.max()])
    return out
