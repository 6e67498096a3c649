"""Integrators of molecular dynamics: those of ASE, by the name of their ensemble, and what a restart needs of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet

from nbody_pyg.messages import check_choice
from nbody_pyg.units import STRESS_UNITS

#: Name -> what is kept constant, and how.
ENSEMBLES = {
    "nve": "constant energy: velocity Verlet",
    "langevin": "constant temperature: Langevin thermostat",
    "bussi": "constant temperature: stochastic velocity rescaling of Bussi, Donadio and Parrinello",
    "nose-hoover": "constant temperature: Nose-Hoover chain",
    "npt": "constant temperature and pressure: isotropic changes of the cell, Martyna-Tobias-Klein",
    "npt-full": "constant temperature and pressure: changes of all lengths and angles, Martyna-Tobias-Klein",
}
#: Ensembles whose thermostat takes no constraints.
_ALL_FREE = ("nose-hoover", "npt", "npt-full")
#: Relaxation times where none is given, in time steps, as ASE advises.
_THERMOSTAT_STEPS, _BAROSTAT_STEPS = 100.0, 1000.0
# What integrators of ASE carry from step to step beside the atoms. Without one of these names (another version of ASE)
# a restart begins with its first value.
_VARIABLES = (
    "transferred_energy", "_q", "_p", "_h", "_eps", "_p_eps", "_p_g", "_cell0", "_volume0", "_eta", "_p_eta", "_xi",
    "_p_xi",
)  # fmt: skip
_PARTS = ("_thermostat", "_barostat")


def has_pressure(ensemble: str) -> bool:
    """Whether the cell changes."""
    return ensemble.startswith("npt")


def integrator(
    ensemble: str,
    atoms: Atoms,
    *,
    timestep: float,
    temperature: float,
    friction: float,
    pressure: float,
    thermostat_time: float | None,
    barostat_time: float | None,
    freedom: int,
    rng: np.random.Generator,
) -> MolecularDynamics:
    """An integrator of ASE.

    Args:
        ensemble: a name of :data:`ENSEMBLES`.
        timestep: fs.
        temperature: K.
        friction: 1/fs, of "langevin".
        pressure: bar, of "npt" and "npt-full".
        thermostat_time, barostat_time: relaxation times, fs; None: 100 and 1000 time steps.
        freedom: degrees of freedom that share the kinetic energy, for all thermostats but "langevin".
        rng: of "langevin" and "bussi".
    Raises: ValueError: an unknown ensemble; constraints, where ASE's thermostat counts all degrees of freedom; no
        periodic cell for a pressure; a relaxation time shorter than a time step.
    """
    check_choice("ensemble", ensemble, ENSEMBLES)
    if atoms.constraints and ensemble in _ALL_FREE:
        raise ValueError(
            f"ensemble {ensemble!r} must have no constraints: its thermostat counts the held degrees of freedom too; "
            "take the constraints away, or choose 'langevin' or 'bussi'"
        )
    if has_pressure(ensemble) and not atoms.pbc.all():
        raise ValueError(
            f"ensemble {ensemble!r} needs a cell that is periodic in three directions, got pbc={atoms.pbc.tolist()}; "
            "choose 'langevin', 'bussi' or 'nose-hoover'"
        )
    if ensemble == "bussi" and not atoms.get_kinetic_energy() > 0:
        raise ValueError("ensemble 'bussi' rescales velocities, but all are zero; draw them, at a temperature above 0")
    times = {}
    for name, value, steps in (
        ("thermostat_time", thermostat_time, _THERMOSTAT_STEPS),
        ("barostat_time", barostat_time, _BAROSTAT_STEPS),
    ):
        times[name] = (steps * timestep if value is None else value) * units.fs
        if not times[name] >= timestep * units.fs:
            raise ValueError(f"{name} must not be shorter than a time step ({timestep:g} fs), got {value}")
    dt = timestep * units.fs
    bath: dict[str, Any] = {"temperature_K": temperature}
    if ensemble == "nve":
        return VelocityVerlet(atoms, dt)
    if ensemble == "langevin":
        # fixcm=True samples a wrong distribution for small systems, so the centre of mass moves here.
        return Langevin(atoms, dt, friction=friction / units.fs, rng=rng, fixcm=False, **bath)
    if ensemble == "bussi":
        bussi = Bussi(atoms, dt, taut=times["thermostat_time"], rng=rng, **bath)
        bussi.ndof, bussi.target_kinetic_energy = freedom, 0.5 * freedom * units.kB * temperature
        return bussi
    bath["tdamp"] = times["thermostat_time"]
    if ensemble == "nose-hoover":
        return _counting(NoseHooverChainNVT(atoms, dt, **bath), freedom)
    bath |= {"pdamp": times["barostat_time"], "pressure_au": pressure * STRESS_UNITS["bar"]}
    return _counting((IsotropicMTKNPT if ensemble == "npt" else MTKNPT)(atoms, dt, **bath), freedom)


def _counting(dyn: MolecularDynamics, freedom: int) -> MolecularDynamics:
    """The integrator with another number of degrees of freedom than 3 N, for which ASE has no argument.

    Raises: RuntimeError: a version of ASE that counts in another way.
    """
    counted = [holder for _, holder in _holders(dyn) if "_num_atoms_global" in vars(holder)]
    if not counted:
        raise RuntimeError(f"{type(dyn).__name__} of this version of ASE counts atoms in an unknown way; report this")
    for holder in counted:
        holder._num_atoms_global = freedom / 3.0
    return dyn


def variables(dyn: MolecularDynamics) -> dict[str, np.ndarray]:
    """What an integrator carries from step to step, beside atoms and random numbers."""
    found: dict[str, np.ndarray] = {}
    for prefix, holder in _holders(dyn):
        own = vars(holder)
        found |= {prefix + name: np.array(own[name], dtype=float) for name in _VARIABLES if name in own}
    return found


def restore(dyn: MolecularDynamics, values: dict[str, np.ndarray]) -> None:
    """Give an integrator the values of :func:`variables`; those that it does not have are ignored."""
    for prefix, holder in _holders(dyn):
        for name in _VARIABLES:
            value, own = values.get(prefix + name), vars(holder).get(name)
            if value is not None and own is not None and np.shape(own) == value.shape:
                setattr(holder, name, value.copy() if value.ndim else float(value))


def _holders(dyn: MolecularDynamics) -> list[tuple[str, Any]]:
    """The integrator, its thermostat and its barostat (whose own thermostat has its variables too)."""
    return [("", dyn), *((f"{name}.", vars(dyn)[name]) for name in _PARTS if name in vars(dyn))]
