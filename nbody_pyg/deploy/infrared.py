"""Harmonic vibrations of a molecule, with its infrared and Raman spectra."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from matplotlib.axes import Axes
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
from nbody_pyg.units import ABSORPTION, ENERGY_UNITS, WAVENUMBER, dipole_factor, polarizability_factor

#: A molecule is linear if its width is less than this times its length (roots of its moments of inertia).
_LINEAR = 0.01
#: Smaller frequencies, real or imaginary, are free motions with round-off, cm^-1.
_ZERO = 1.0


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
    ``activities``       [modes], angstrom^4/amu  Raman activity; None without a polarizability
    ``depolarization``   [modes]                  of Raman scattering of plane polarized light, 0 to 0.75; round-off
                                                  where the activity is; None without a polarizability
    ===================  =======================  ==============================================================

    There are 3N - 6 modes, 3N - 5 of a linear molecule. Modes of equal frequencies may be mixed; the sums of their
    intensities and activities are defined, the single ones are not.
    """

    atoms: Atoms
    frequencies: np.ndarray
    modes: np.ndarray
    intensities: np.ndarray | None
    activities: np.ndarray | None = None
    depolarization: np.ndarray | None = None

    @property
    def is_minimum(self) -> bool:
        """Whether no frequency is imaginary, other than those of :attr:`free_motions`."""
        return bool((self.frequencies > -_ZERO).all())

    @property
    def free_motions(self) -> int:
        """Number of frequencies below 1 cm^-1 in absolute value, which count as zero: parts that do not interact."""
        return int((np.abs(self.frequencies) < _ZERO).sum())

    @property
    def zero_point_energy(self) -> float:
        """Half the sum of the real frequencies, eV."""
        return float(0.5 * self.frequencies[self.frequencies >= _ZERO].sum() * ENERGY_UNITS["cm^-1"])

    def spectrum(self, wavenumbers: np.ndarray, width: float = 10.0) -> np.ndarray:
        """Absorption at some wavenumbers, km/mol per cm^-1, with a Lorentzian for each real mode.

        Args:
            wavenumbers: [points], cm^-1.
            width: full width at half maximum, cm^-1.
        Raises: ValueError: no intensities, or a width that is not positive.
        """
        if self.intensities is None:
            raise ValueError("spectrum needs intensities, which were not computed; give infrared_spectrum a dipole")
        return self._broadened(self.intensities, wavenumbers, width)

    def raman_spectrum(self, wavenumbers: np.ndarray, width: float = 10.0) -> np.ndarray:
        """Raman activity at some shifts, angstrom^4/amu per cm^-1, with a Lorentzian for each real mode.

        The factors of wavelength of the light and temperature, which intensities of an experiment have, are left out.

        Args:
            wavenumbers: [points], shifts, cm^-1.
            width: full width at half maximum, cm^-1.
        Raises: ValueError: no activities, or a width that is not positive.
        """
        if self.activities is None:
            raise ValueError(
                "raman_spectrum needs activities, which were not computed; give infrared_spectrum a polarizability"
            )
        return self._broadened(self.activities, wavenumbers, width)

    def _broadened(self, heights: np.ndarray, wavenumbers: np.ndarray, width: float) -> np.ndarray:
        """Sum of the Lorentzians of the real modes, of areas ``heights``."""
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        real = self.frequencies >= _ZERO
        away = np.asarray(wavenumbers)[:, None] - self.frequencies[real]
        shape = (0.5 * width / np.pi) / (away**2 + (0.5 * width) ** 2)
        return np.asarray(shape @ heights[real])

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {
            "numbers": self.atoms.numbers.tolist(), "positions": self.atoms.positions.tolist(),
            "energy": self.atoms.get_potential_energy(), "frequencies": self.frequencies.tolist(),
            "intensities": None if self.intensities is None else self.intensities.tolist(),
            "activities": None if self.activities is None else self.activities.tolist(),
            "depolarization": None if self.depolarization is None else self.depolarization.tolist(),
            "zero_point_energy": self.zero_point_energy, "minimum": self.is_minimum,
            "free_motions": self.free_motions, "modes": self.modes.tolist(),
        }  # fmt: skip


def infrared_spectrum(
    potential: Potential | str | Path,
    atoms: Atoms,
    dipole: PropertyModel | BaseCalculator | str | Path | None = None,
    polarizability: PropertyModel | str | Path | None = None,
    *,
    fmax: float = 1e-4,
    max_steps: int = 1000,
    step: float = 0.005,
) -> InfraredSpectrum:
    r"""Relax a molecule; then harmonic frequencies, infrared intensities and Raman activities.

    .. math:: M^{-1/2} H M^{-1/2} L_k = \omega_k^2 L_k, \qquad
        I_k = \frac{N_A}{12 \epsilon_0 c^2} \Big| \sum_i \frac{\partial \mu}{\partial r_i} \frac{L_{ik}}{\sqrt{m_i}}
        \Big|^2, \qquad S_k = 45 a_k'^2 + 7 \gamma_k'^2

    H is the Hessian of the potential, by automatic differentiation, in the space without translations and rotations.
    Masses are those of the atoms, so isotopes may be set with ``atoms.set_masses``. For :math:`S_k` see
    :func:`raman_activities`.

    Args:
        potential: in float64, for forces as small as ``fmax``; or a model file, which is read in float64.
        atoms: a molecule near its minimum.
        dipole: a model with a property of readout "dipole", differentiated automatically; its file; or a calculator of
            ASE with dipoles (e angstrom), differentiated by central differences. None: no intensities.
        polarizability: a model with one property of readout "polarizability", or its file; it may be that of the
            dipole. The unit of the property is converted. None: no Raman activities.
        fmax: as for :func:`relax`, eV/angstrom.
        max_steps: largest number of steps of the relaxation.
        step: displacement of the central differences, angstrom.
    Raises: ValueError: fewer than two atoms, a periodic structure, constraints, a model without a dipole or a
        polarizability, an unknown unit of them, a step that is not positive, or a molecule that does not relax.
    Equivariance: frequencies, intensities, activities and depolarization do not change under rotations and reflections.
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
    if not (source is None or isinstance(source, BaseCalculator)) and property_of(source, "dipole") is None:
        raise ValueError(
            f"dipole must be a calculator, or a model with one property of readout 'dipole', got "
            f"{type(source).__name__} without; leave it out for frequencies alone"
        )
    tensors = None if polarizability is None else _tensors(polarizability)
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
    intensities = activities = depolarization = None
    if isinstance(source, PropertyModel):
        wanted = required(property_of(source, "dipole"))
        slopes = _slopes(source, wanted, rest, dipole) * (dipole_factor(wanted.unit) if wanted.unit else 1.0)
    elif isinstance(source, BaseCalculator):
        slopes = _differences(source, rest, step)
    if source is not None:
        intensities = ABSORPTION * np.square(np.einsum("aid,kid->ka", slopes, modes)).sum(1)
    if tensors is not None:
        model, wanted, factor = tensors
        slopes = _slopes(model, wanted, rest, polarizability) * factor
        activities, depolarization = raman_activities(np.einsum("abid,kid->kab", slopes, modes))
    return InfraredSpectrum(rest, frequencies, modes, intensities, activities, depolarization)


def raman_activities(slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Raman activities and depolarization ratios of modes; the light is plane polarized and far from absorption.

    .. math:: S = 45 a'^2 + 7 \gamma'^2, \qquad \rho = \frac{3 \gamma'^2}{45 a'^2 + 4 \gamma'^2}, \qquad
        a' = \tfrac13 \mathrm{tr}\, \alpha', \qquad \gamma'^2 = \tfrac32 |\alpha' - a' 1|^2

    with :math:`\alpha' = \partial \alpha / \partial Q`; :math:`\gamma'^2` is the same as
    :math:`\tfrac12 \sum_{i<j} (\alpha'_{ii} - \alpha'_{jj})^2 + 3 \sum_{i<j} \alpha'^2_{ij}`.

    Source: E. B. Wilson, J. C. Decius, P. C. Cross, Molecular Vibrations, McGraw-Hill, 1955.

    Args:
        slopes: [modes, 3, 3], :math:`\alpha'`, angstrom^2 amu^-1/2. The symmetric part counts.
    Returns: [modes], angstrom^4/amu; [modes], 0 where the activity is 0.
    """
    even = 0.5 * (slopes + slopes.swapaxes(1, 2))
    mean = np.trace(even, axis1=1, axis2=2) / 3
    square = 1.5 * np.square(even - mean[:, None, None] * np.eye(3)).sum((1, 2))
    parallel = 45 * mean**2 + 4 * square
    return 45 * mean**2 + 7 * square, 3 * square / np.where(parallel > 0, parallel, 1.0)


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


def property_of(model: Any, readout: str) -> Property | None:
    """The property of a model that has this readout, if there is exactly one."""
    found = [p for p in model.properties if p.readout == readout] if isinstance(model, PropertyModel) else []
    return found[0] if len(found) == 1 else None


def _tensors(given: PropertyModel | str | Path) -> tuple[PropertyModel, Property, float]:
    """A model of polarizabilities, which of its properties they are, and how many angstrom^3 their unit is."""
    model = load_model(given) if isinstance(given, (str, Path)) else given
    wanted = property_of(model, "polarizability")
    if wanted is None or not isinstance(model, PropertyModel):
        raise ValueError(
            f"polarizability must be a model with one property of readout 'polarizability', got "
            f"{type(model).__name__} without; leave it out for no Raman activities"
        )
    if not wanted.unit:  # not taken for angstrom^3, because labels in a0^3 are as usual
        raise ValueError(
            f"polarizability must be a property with a unit, {wanted.name!r} has none; train with "
            f"--target.{wanted.name}.unit, or set it in Python (model.properties)"
        )
    return model, wanted, polarizability_factor(wanted.unit)


def _frame(atoms: Atoms, scheme: Scheme | None, file: str | Path | None) -> Data:
    """The molecule, with the bonds of the reference molecule if the file of the model has them."""
    frame = AtomicData.from_ase(atoms, labels=False)
    return frame if file is None else with_reference([frame], file, scheme)[0]


def _slopes(model: PropertyModel, wanted: Property, atoms: Atoms, given: Any) -> np.ndarray:
    """Derivatives of a property by automatic differentiation, [*shape, atoms, 3], its unit per angstrom.

    ``given``: the model or its file, which may hold bonds.
    """
    frame = _frame(atoms, model.scheme, given if isinstance(given, (str, Path)) else None)
    return np.asarray(copy.deepcopy(model).double().jacobian(frame, wanted.name)[0].cpu().numpy())


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
    """Intensities as sticks, with the broadened spectrum, in one PNG; wavenumbers fall from left to right.

    Raman activities, if there are any, have a panel of their own, below that of the absorption.
    """
    grid = np.arange(0.0, 1.08 * max(found.frequencies.max(), 500.0), 1.0)
    panels = []
    if found.intensities is not None or found.activities is None:
        words = ("wavenumber", "absorption", "intensity", "km/mol")
        panels.append((found.spectrum(grid, width), required(found.intensities), words))
    if found.activities is not None:
        words = ("Raman shift", "Raman activity", "activity", "Å⁴/amu")
        panels.append((found.raman_spectrum(grid, width), found.activities, words))
    figure = Figure(figsize=(7.2, 0.4 + 3.6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _panel(axes, grid, found.frequencies, *panel)
    figure.axes[0].set(title=f"{found.atoms.get_chemical_formula()}, lines of {width:g} cm⁻¹")
    save_figure(figure, Path(path), dpi=160)


def _panel(
    axes: Axes, grid: np.ndarray, frequencies: np.ndarray, broad: np.ndarray, heights: np.ndarray,
    words: tuple[str, str, str, str],
) -> None:  # fmt: skip
    """One spectrum; ``words``: of the abscissa, the curve and the sticks, and the unit of the sticks."""
    abscissa, curve, stick, unit = words
    axes.fill_between(grid, broad, color="#1f5fa8", alpha=0.4, lw=0)
    axes.set(xlabel=f"{abscissa} (cm⁻¹)", ylabel=f"{curve} ({unit} per cm⁻¹)")
    axes.set(xlim=(grid[-1], 0), ylim=(0, None))
    sticks = axes.twinx()
    sticks.vlines(frequencies, 0, heights, color="#c4501b", lw=0.9)
    sticks.set(ylabel=f"{stick} ({unit})", ylim=(0, None))
    sticks.yaxis.label.set_color("#c4501b")
    axes.yaxis.label.set_color("#1f5fa8")
