"""Harmonic vibrations of a molecule and its infrared spectrum."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from matplotlib.figure import Figure
from torch_geometric.data import Data

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy.reference import with_reference
from nbody_pyg.deploy.relax import relax
from nbody_pyg.hierarchy import Scheme
from nbody_pyg.io.model_file import load_model, load_potential
from nbody_pyg.potential import Potential
from nbody_pyg.properties import Property, PropertyModel
from nbody_pyg.required import required
from nbody_pyg.units import ABSORPTION, ENERGY_UNITS, WAVENUMBER, dipole_factor

#: A molecule is linear if its width is less than this times its length (roots of its moments of inertia).
_LINEAR = 0.01


@dataclass(frozen=True)
class InfraredSpectrum:
    r"""Normal modes of a molecule at its minimum.

    ===================  =======================  ==============================================================
    field                shape, unit              meaning
    ===================  =======================  ==============================================================
    ``atoms``                                     the relaxed molecule, with energy and forces
    ``frequencies``      [modes], cm^-1           harmonic, in ascending order; negative: imaginary
    ``modes``            [modes, atoms, 3],       :math:`\partial r_i / \partial Q_k`, of unit length when multiplied
                         amu^-1/2                 by the root of the masses
    ``intensities``      [modes], km/mol          integrated absorption; None without a dipole
    ===================  =======================  ==============================================================

    There are 3N - 6 modes, 3N - 5 of a linear molecule. Modes of equal frequencies may be mixed; the sum of their
    intensities is defined, the single ones are not.
    """

    atoms: Atoms
    frequencies: np.ndarray
    modes: np.ndarray
    intensities: np.ndarray | None

    @property
    def is_minimum(self) -> bool:
        """Whether no frequency is imaginary."""
        return bool((self.frequencies > 0).all())

    @property
    def zero_point_energy(self) -> float:
        """Half the sum of the real frequencies, eV."""
        return float(0.5 * self.frequencies.clip(min=0.0).sum() * ENERGY_UNITS["cm^-1"])

    def spectrum(self, wavenumbers: np.ndarray, width: float = 10.0) -> np.ndarray:
        """Absorption at some wavenumbers, km/mol per cm^-1, with a Lorentzian for each real mode.

        Args:
            wavenumbers: [points], cm^-1.
            width: full width at half maximum, cm^-1.
        Raises: ValueError: no intensities, or a width that is not positive.
        """
        if self.intensities is None:
            raise ValueError("spectrum needs intensities, which were not computed; give infrared_spectrum a dipole")
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        real = self.frequencies > 0
        away = np.asarray(wavenumbers)[:, None] - self.frequencies[real]
        shape = (0.5 * width / np.pi) / (away**2 + (0.5 * width) ** 2)
        return np.asarray(shape @ self.intensities[real])

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {
            "numbers": self.atoms.numbers.tolist(), "positions": self.atoms.positions.tolist(),
            "energy": self.atoms.get_potential_energy(), "frequencies": self.frequencies.tolist(),
            "intensities": None if self.intensities is None else self.intensities.tolist(),
            "zero_point_energy": self.zero_point_energy, "minimum": self.is_minimum, "modes": self.modes.tolist(),
        }  # fmt: skip


def infrared_spectrum(
    potential: Potential | str | Path,
    atoms: Atoms,
    dipole: PropertyModel | BaseCalculator | str | Path | None = None,
    *,
    fmax: float = 1e-4,
    max_steps: int = 1000,
    step: float = 0.005,
) -> InfraredSpectrum:
    r"""Relax a molecule; then harmonic frequencies and infrared intensities.

    .. math:: M^{-1/2} H M^{-1/2} L_k = \omega_k^2 L_k, \qquad
        I_k = \frac{N_A}{12 \epsilon_0 c^2} \Big| \sum_i \frac{\partial \mu}{\partial r_i} \frac{L_{ik}}{\sqrt{m_i}}
        \Big|^2

    H is the Hessian of the potential, by automatic differentiation, in the space without translations and rotations.
    Masses are those of the atoms, so isotopes may be set with ``atoms.set_masses``.

    Args:
        potential: in float64, for forces as small as ``fmax``; or a model file, which is read in float64.
        atoms: a molecule near its minimum.
        dipole: a model with a property of readout "dipole", differentiated automatically; its file; or a calculator of
            ASE with dipoles (e angstrom), differentiated by central differences. None: frequencies alone.
        fmax: as for :func:`relax`, eV/angstrom.
        max_steps: largest number of steps of the relaxation.
        step: displacement of the central differences, angstrom.
    Raises: ValueError: fewer than two atoms, a periodic structure, constraints, a model without a dipole, a step that
        is not positive, or a molecule that does not relax.
    Equivariance: frequencies and intensities do not change under rotations and reflections.
    """
    if len(atoms) < 2:
        raise ValueError(f"atoms must be two or more, got {len(atoms)}; a single atom does not vibrate")
    if atoms.pbc.any():
        raise ValueError(f"atoms must not be periodic, got pbc {atoms.pbc.tolist()}; for crystals use phonopy")
    if atoms.constraints:
        raise ValueError(
            f"atoms must have no constraints, got {len(atoms.constraints)}; remove them: del atoms.constraints"
        )
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    source = load_model(dipole) if isinstance(dipole, (str, Path)) else dipole
    if not (source is None or isinstance(source, BaseCalculator)) and dipole_of(source) is None:
        raise ValueError(
            f"dipole must be a calculator, or a model with one property of readout 'dipole', got "
            f"{type(source).__name__} without; leave it out for frequencies alone"
        )
    file = None if isinstance(potential, Potential) else potential
    if not isinstance(potential, Potential):
        potential = load_potential(potential).double()
    found = relax(potential, [atoms], fmax=fmax, max_steps=max_steps, reference=file)
    if not bool(found.converged.all()):
        raise ValueError(
            f"the molecule did not relax within max_steps {max_steps}: a force of {float(found.largest):.2g} eV/A is "
            f"left, fmax is {fmax:g}; start nearer to its minimum, raise max_steps, or take the model in float64"
        )
    (rest,) = found.frames
    assert isinstance(rest, Atoms)  # as the input
    frequencies, modes = normal_modes(potential.hessian(_frame(rest, potential.scheme, file)).cpu().numpy(), rest)
    if isinstance(source, PropertyModel):
        place = dipole if isinstance(dipole, (str, Path)) else None
        slopes = _slopes(source, _frame(rest, source.scheme, place))
    elif isinstance(source, BaseCalculator):
        slopes = _differences(source, rest, step)
    else:
        return InfraredSpectrum(rest, frequencies, modes, None)
    intensities = ABSORPTION * np.square(np.einsum("aid,kid->ka", slopes, modes)).sum(1)
    return InfraredSpectrum(rest, frequencies, modes, intensities)


def normal_modes(hessian: np.ndarray, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and modes of :class:`InfraredSpectrum` from second derivatives of the energy.

    Args:
        hessian: [3 atoms, 3 atoms], eV/angstrom^2.
        atoms: positions and masses.
    """
    root = np.sqrt(atoms.get_masses())
    arms = atoms.positions - atoms.get_center_of_mass()
    spread = (root**2 * arms.T) @ arms
    moments, axes = np.linalg.eigh(np.trace(spread) * np.eye(3) - spread)
    turns = [axis for moment, axis in zip(moments, axes.T, strict=True) if moment > _LINEAR**2 * moments[2]]
    rigid = [np.outer(root, axis).ravel() for axis in np.eye(3)]
    rigid += [(root[:, None] * np.cross(axis, arms)).ravel() for axis in turns]
    # The rest of a complete orthonormal basis spans the vibrations
    basis = np.linalg.qr(np.transpose(rigid), mode="complete")[0][:, len(rigid) :]
    weights = np.repeat(1.0 / root, 3)
    values, vectors = np.linalg.eigh(basis.T @ (weights[:, None] * 0.5 * (hessian + hessian.T) * weights) @ basis)
    modes = (basis @ vectors).T * weights
    return WAVENUMBER * np.sign(values) * np.sqrt(np.abs(values)), modes.reshape(len(values), -1, 3)


def dipole_of(model: Any) -> Property | None:
    """The property of a model that is a dipole moment, if there is exactly one."""
    found = [p for p in model.properties if p.readout == "dipole"] if isinstance(model, PropertyModel) else []
    return found[0] if len(found) == 1 else None


def _frame(atoms: Atoms, scheme: Scheme | None, file: str | Path | None) -> Data:
    """The molecule, with the bonds of the reference molecule if the file of the model has them."""
    frame = AtomicData.from_ase(atoms, labels=False)
    return frame if file is None else with_reference([frame], file, scheme)[0]


def _slopes(model: PropertyModel, frame: Data) -> np.ndarray:
    """Derivatives of the dipole by automatic differentiation, [3, atoms, 3], e."""
    wanted = dipole_of(model)
    assert wanted is not None  # checked by the caller
    found = copy.deepcopy(model).double().jacobian(frame, wanted.name)[0].cpu().numpy()
    return np.asarray(found * (dipole_factor(wanted.unit) if wanted.unit else 1.0))


def _differences(calculator: BaseCalculator, atoms: Atoms, step: float) -> np.ndarray:
    """Derivatives of the dipole by central differences, [3, atoms, 3], e."""
    moved, columns = atoms.copy(), []
    moved.calc = calculator
    for place in np.ndindex(len(atoms), 3):
        values = []
        for sign in (1, -1):
            moved.positions[:] = atoms.positions
            moved.positions[place] += sign * step
            values.append(np.array(moved.get_dipole_moment()))
        columns.append((values[0] - values[1]) / (2 * step))
    return np.stack(columns, axis=1).reshape(3, len(atoms), 3)


def plot_infrared(found: InfraredSpectrum, path: str | Path, width: float = 10.0) -> None:
    """Intensities as sticks, with the broadened spectrum, in one PNG; wavenumbers fall from left to right."""
    grid = np.arange(0.0, 1.08 * max(found.frequencies.max(), 500.0), 1.0)
    broad = found.spectrum(grid, width)
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(grid, broad, color="#1f5fa8", alpha=0.4, lw=0)
    axes.set(xlabel="wavenumber (cm⁻¹)", ylabel=f"absorption (km/mol per cm⁻¹), lines of {width:g} cm⁻¹")
    axes.set(xlim=(grid[-1], 0), ylim=(0, None))
    sticks = axes.twinx()
    sticks.vlines(found.frequencies, 0, required(found.intensities), color="#c4501b", lw=0.9)
    sticks.set(ylabel="intensity (km/mol)", ylim=(0, None), title=found.atoms.get_chemical_formula())
    sticks.yaxis.label.set_color("#c4501b")
    axes.yaxis.label.set_color("#1f5fa8")
    save_figure(figure, Path(path), dpi=160)
