"""Molecular dynamics by ASE, with a report on how well the energy was conserved."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io.trajectory import Trajectory
from ase.md import MDLogger
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

ENSEMBLES = ("nve", "langevin")


@dataclass(frozen=True)
class MDReport:
    """Samples of a run, and what they say about it.

    ========================  ==========================================================================
    field                     unit
    ========================  ==========================================================================
    ``time``                  ps
    ``total``, ``potential``  eV
    ``temperature``           K
    ``drift``                 meV per atom per 10 ps: slope of the straight line through ``total``
    ``fluctuation``           meV per atom: standard deviation about that line
    ``largest_jump``          meV per atom between two samples that follow each other
    ``stopped``               why the run ended before its time; None when it did not
    ``bonds_from``            where the bonds that the energy uses come from; None where it uses none
    ``bond_changes``          step and atoms of the first sample at which the bonds found are others than those
                              in use; None where they never were
    ========================  ==========================================================================

    Drift and jumps tell about the potential only where the total energy is conserved (nve).
    """

    time: np.ndarray
    total: np.ndarray
    potential: np.ndarray
    temperature: np.ndarray
    num_atoms: int
    stopped: str | None = None
    bonds_from: str | None = None
    bond_changes: str | None = None

    @property
    def drift(self) -> float:
        return 1e3 * 10.0 * self._line()[0] / self.num_atoms

    @property
    def fluctuation(self) -> float:
        slope, start = self._line()
        return 1e3 * float(np.std(self.total - slope * self.time - start)) / self.num_atoms

    @property
    def largest_jump(self) -> float:
        steps = np.abs(np.diff(self.total))
        return 1e3 * float(steps.max()) / self.num_atoms if len(steps) else 0.0

    def _line(self) -> tuple[float, float]:
        if len(self.time) < 2:
            return 0.0, float(self.total[0])
        slope, start = np.polyfit(self.time, self.total, 1)
        return float(slope), float(start)

    def __str__(self) -> str:
        return (
            f"{len(self.time)} samples, {self.time[-1]:.3f} ps, "
            f"mean temperature {self.temperature.mean():.1f} K\n"
            f"total energy: drift {self.drift:+.4f} meV/atom per 10 ps, fluctuation {self.fluctuation:.4f} "
            f"meV/atom, largest jump {self.largest_jump:.4f} meV/atom"
        )


def run_md(
    atoms: Atoms,
    steps: int,
    *,
    ensemble: str = "nve",
    timestep: float = 0.5,
    temperature: float = 300.0,
    friction: float = 0.01,
    seed: int = 0,
    sample_every: int = 10,
    log: str | Path | None = None,
    trajectory: str | Path | None = None,
    report: Callable[[int], None] | None = None,
    stop: Callable[[Atoms], str | None] | None = None,
    stop_on_bond_change: bool = False,
) -> MDReport:
    """Move ``atoms`` (in place) with the calculator they carry.

    Velocities are drawn from the Maxwell-Boltzmann distribution unless the atoms bring some; total momentum
    is removed, for isolated molecules also the angular momentum.

    Bonds that the energy of an :class:`NBodyCalculator` uses are part of that energy, and are kept from the start to
    the end of the run. At every sample they are compared with those that would be found then; the first difference is
    told by a warning, in the log and in the report.

    Args:
        ensemble: "nve" (velocity Verlet) or "langevin".
        timestep: fs.
        temperature: K, of the first velocities and of the thermostat.
        friction: 1/fs, of the Langevin thermostat.
        sample_every: steps between samples, log lines and frames.
        log: text file in ASE's MDLogger form.
        trajectory: frames with energies, forces and velocities: ASE's ``.traj``, or extxyz by any other name.
        report: called with the number of steps done at every sample.
        stop: called with the atoms after every step; a text ends the run, and is kept in the report. The last structure
            is written too. See :func:`~nbody_pyg.deploy.stop_on_uncertainty`.
        stop_on_bond_change: end the run at the first sample whose bonds are others than those in use.
    Raises: ValueError: no calculator, unknown ensemble, steps or timestep not positive.
    """
    if atoms.calc is None:
        raise ValueError("atoms carry no calculator; set atoms.calc = NBodyCalculator(...)")
    if ensemble not in ENSEMBLES:
        raise ValueError(f"ensemble must be one of {', '.join(ENSEMBLES)}, got {ensemble!r}")
    for name, value in (("steps", steps), ("timestep", timestep), ("sample_every", sample_every)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    rng = np.random.default_rng(seed)
    if not np.any(atoms.get_momenta()):
        width = np.sqrt(units.kB * temperature * atoms.get_masses())
        atoms.set_momenta(width[:, None] * rng.standard_normal((len(atoms), 3)))
        Stationary(atoms)
        if not atoms.pbc.any() and len(atoms) > 2:
            ZeroRotation(atoms)
    dyn: MolecularDynamics
    if ensemble == "nve":
        dyn = VelocityVerlet(atoms, timestep * units.fs)
    else:
        # fixcm=True samples a wrong distribution for small systems, so the centre of mass moves here.
        dyn = Langevin(
            atoms, timestep * units.fs, temperature_K=temperature, friction=friction / units.fs, rng=rng,
            fixcm=False,
        )  # fmt: skip
    samples: list[tuple[float, float, float, float]] = []

    def sample() -> None:
        potential = atoms.get_potential_energy()
        total = potential + atoms.get_kinetic_energy()
        samples.append((dyn.get_time() / (1000 * units.fs), total, potential, atoms.get_temperature()))
        if report is not None:
            report(dyn.nsteps)

    dyn.attach(sample, interval=sample_every)
    closing, writers, logger, kept = [], [], None, contextlib.ExitStack()
    if log is not None:
        logger = MDLogger(dyn, atoms, str(log), peratom=False, mode="w")
        dyn.attach(logger, interval=sample_every)
        closing.append(logger)
    if trajectory is not None:
        writer = _frame_writer(Path(trajectory), atoms)
        dyn.attach(writer.write, interval=sample_every)
        closing.append(writer)
        writers.append(writer)
    stopped = changes = None
    bonded = hasattr(atoms.calc, "fixed_bonds")
    try:
        kept.enter_context(atoms.calc.fixed_bonds(atoms) if bonded else contextlib.nullcontext())
        bonds_from = atoms.calc.bonds_from if bonded else None
        last = dyn.nsteps + steps
        for _ in dyn.irun(steps):
            if bonded and changes is None and (dyn.nsteps % sample_every == 0 or dyn.nsteps == last):
                changes = _told(atoms, f"step {dyn.nsteps} ({dyn.get_time() / units.fs:.2f} fs)", logger)
                if changes is not None and stop_on_bond_change:
                    stopped = f"stopped, because bonds have changed at {changes}"
                    break
            if stop is not None and (reason := stop(atoms)):
                stopped = f"stopped after step {dyn.nsteps} ({dyn.get_time() / units.fs:.2f} fs): {reason}"
                if dyn.nsteps % sample_every:
                    sample()
                    for writer in writers:
                        writer.write()
                break
    finally:
        for item in closing:
            item.close()
        kept.close()
        if changes is not None:
            atoms.calc.reset()  # energies of bonds that were kept are not those of this structure on its own
    time, total, potential, kelvin = np.array(samples).T
    return MDReport(time, total, potential, kelvin, len(atoms), stopped, bonds_from, changes)


def _told(atoms: Atoms, when: str, logger: MDLogger | None) -> str | None:
    """When and how the bonds found now differ from those in use; says so in a warning and in the log."""
    found = atoms.calc.bond_changes(atoms)
    if found is None:
        return None
    warnings.warn(
        f"bonds as found at {when} differ from those that the energy uses, which are those of the start ({found})",
        stacklevel=3,
    )
    if logger is not None:
        logger.logfile.write(f"# {when}: bonds as found now differ from those in use: {found}\n")
    return f"{when}: {found}"


class _ExtxyzWriter:
    """Appends the atoms to an extxyz file."""

    def __init__(self, path: Path, atoms: Atoms):
        self.path, self.atoms, self._first = path, atoms, True

    def write(self) -> None:
        self.atoms.write(self.path, format="extxyz", append=not self._first)
        self._first = False

    def close(self) -> None:
        pass


def _frame_writer(path: Path, atoms: Atoms) -> Trajectory | _ExtxyzWriter:
    return Trajectory(str(path), "w", atoms) if path.suffix == ".traj" else _ExtxyzWriter(path, atoms)
