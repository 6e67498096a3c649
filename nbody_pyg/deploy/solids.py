"""Equation of state and elastic constants of a crystal, with relaxed atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.eos import EquationOfState
from ase.stress import voigt_6_to_full_3x3_strain
from matplotlib.figure import Figure

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.deploy.calculator import NBodyCalculator
from nbody_pyg.deploy.relax import relax
from nbody_pyg.potential import Potential
from nbody_pyg.units import GIGAPASCAL

#: The order of elastic constants.
COMPONENTS = ("xx", "yy", "zz", "yz", "xz", "xy")


@dataclass(frozen=True)
class SolidProperties:
    """A crystal at rest, and what it does under strain.

    ==================  ========================  ==========================================================
    field               shape, unit               meaning
    ==================  ========================  ==========================================================
    ``atoms``                                     the relaxed crystal, with energy, forces and stress
    ``volumes``         [points], A^3             of the cells of the equation of state
    ``energies``        [points], eV              their energies, with relaxed atoms
    ``volume``          A^3                       at the minimum of the fit (Birch and Murnaghan, third order)
    ``energy``          eV                        at this minimum
    ``bulk_modulus``    GPa                       of the fit
    ``elastic``         [6, 6], GPa               elastic constants, in the order xx yy zz yz xz xy
    ==================  ========================  ==========================================================
    """

    atoms: Atoms
    volumes: np.ndarray
    energies: np.ndarray
    volume: float
    energy: float
    bulk_modulus: float
    elastic: np.ndarray

    @property
    def moduli(self) -> dict[str, float]:
        """Bulk and shear moduli of a polycrystal, GPa: the means of the bounds of Voigt and of Reuss (Hill)."""
        c = self.elastic
        s = np.linalg.inv(c)
        bulk = (c[:3, :3].sum() / 9, 1.0 / s[:3, :3].sum())
        shear = (
            (np.trace(c[:3, :3]) - (c[0, 1] + c[0, 2] + c[1, 2]) + 3 * np.trace(c[3:, 3:])) / 15,
            15 / (4 * np.trace(s[:3, :3]) - 4 * (s[0, 1] + s[0, 2] + s[1, 2]) + 3 * np.trace(s[3:, 3:])),
        )
        return {"bulk": float(np.mean(bulk)), "shear": float(np.mean(shear))}

    @property
    def is_stable(self) -> bool:
        """Whether every small strain costs energy (Born)."""
        return bool(np.linalg.eigvalsh(self.elastic).min() > 0)

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {
            "num_atoms": len(self.atoms), "cell": self.atoms.cell.array.tolist(), "volume": self.volume,
            "energy": self.energy, "bulk_modulus": self.bulk_modulus, "elastic": self.elastic.tolist(),
            **{f"{name}_modulus_hill": value for name, value in self.moduli.items()}, "stable": self.is_stable,
            "volumes": self.volumes.tolist(), "energies": self.energies.tolist(),
        }  # fmt: skip


def solid_properties(
    potential: Potential,
    atoms: Atoms,
    *,
    fmax: float = 1e-3,
    max_steps: int = 500,
    volume_range: float = 0.06,
    points: int = 9,
    strain: float = 0.005,
) -> SolidProperties:
    r"""Relax a crystal with its cell, then strain it.

    .. math:: C_{ij} = \frac{\sigma_i(+\eta_j) - \sigma_i(-\eta_j)}{2 \eta}

    The atoms are relaxed in every strained cell.

    Args:
        potential: in float64, for forces as small as ``fmax``.
        atoms: a crystal, periodic in all directions.
        fmax: as for :func:`relax`, eV/angstrom.
        max_steps: largest number of steps of each relaxation.
        volume_range: volumes reach from 1 - this to 1 + this times that at rest.
        points: number of volumes, 5 or more.
        strain: :math:`\eta`; shears are engineering strains, twice the component of the strain tensor.
    Raises: ValueError: not periodic in all directions, arguments out of their range, or a crystal that does not relax.
    """
    if not atoms.pbc.all():
        raise ValueError(f"atoms must be periodic in all directions, got pbc {atoms.pbc.tolist()}; give a crystal")
    if points < 5:
        raise ValueError(f"points must be 5 or more, for a fit of four numbers, got {points}")
    for name, value in (("volume_range", volume_range), ("strain", strain)):
        if not 0 < value < 0.3:
            raise ValueError(f"{name} must lie between 0 and 0.3, got {value}")
    rest = _relaxed(potential, [atoms], fmax, max_steps, cell=True)[0]
    sizes = np.linspace(1 - volume_range, 1 + volume_range, points) ** (1 / 3)
    modes = [(column, sign * strain) for column in range(6) for sign in (1, -1)]
    strained = [_strained(rest, np.eye(3) * size) for size in sizes]
    strained += [_strained(rest, voigt_6_to_full_3x3_strain(eta * np.eye(6)[column])) for column, eta in modes]
    after = _relaxed(potential, strained, fmax, max_steps)
    volumes = np.array([a.get_volume() for a in after[:points]])
    energies = np.array([a.get_potential_energy() for a in after[:points]])
    volume, energy, bulk = EquationOfState(volumes, energies, eos="birchmurnaghan").fit(warn=False)
    calculator = NBodyCalculator(potential)
    stress = np.stack([calculator.get_property("stress", a) for a in after[points:]])
    elastic = (stress[0::2] - stress[1::2]).T / (2 * strain) / GIGAPASCAL
    return SolidProperties(
        rest, volumes, energies, float(volume), float(energy), float(bulk) / GIGAPASCAL, 0.5 * (elastic + elastic.T)
    )


def _strained(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    out: Atoms = atoms.copy()
    out.set_cell(atoms.cell.array @ deformation.T, scale_atoms=True)
    return out


def _relaxed(
    potential: Potential, structures: Sequence[Atoms], fmax: float, max_steps: int, cell: bool = False
) -> list[Atoms]:
    found = relax(potential, structures, fmax=fmax, max_steps=max_steps, cell=cell)
    if not bool(found.converged.all()):
        largest = float(found.largest[~found.converged].max())
        raise ValueError(
            f"the crystal did not relax within max_steps {max_steps}: a force of {largest:.2g} eV/A is left, fmax is "
            f"{fmax:g}; start nearer to its minimum, raise max_steps or fmax, or take the model in float64"
        )
    return [atoms for atoms in found.frames if isinstance(atoms, Atoms)]


def plot_equation_of_state(found: SolidProperties, path: str | Path) -> None:
    """Energy per atom against volume per atom, with the fit, in one PNG."""
    eos = EquationOfState(found.volumes, found.energies, eos="birchmurnaghan")
    eos.fit(warn=False)
    size = len(found.atoms)
    grid = np.linspace(found.volumes.min(), found.volumes.max(), 200)
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(grid / size, eos.func(grid, *eos.eos_parameters) / size, color="#1f5fa8", lw=1.4, label="Birch-Murnaghan")
    axes.plot(found.volumes / size, found.energies / size, "o", color="#c4501b", ms=5, label="model")
    axes.axvline(found.volume / size, color="0.6", lw=0.8)
    title = f"V = {found.volume / size:.3f} Å³ per atom, B = {found.bulk_modulus:.1f} GPa"
    axes.set(xlabel="volume per atom (Å³)", ylabel="energy per atom (eV)", title=title)
    axes.legend(frameon=False)
    save_figure(figure, Path(path), dpi=160)
