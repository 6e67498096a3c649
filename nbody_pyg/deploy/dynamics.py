"""Molecular dynamics with ASE, with a report on the conservation of energy."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import time as clock
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms, FixCartesian
from ase.io import read, write
from ase.io.trajectory import Trajectory
from ase.md import MDLogger
from ase.md.md import MolecularDynamics

from nbody_pyg.data import electronic_state_of
from nbody_pyg.datasets.readers import without_labels
from nbody_pyg.deploy.ensembles import ENSEMBLES, has_pressure, integrator, restore, variables
from nbody_pyg.deploy.md_checkpoint import MDState, move_to
from nbody_pyg.deploy.momenta import degrees_of_freedom, draw_momenta, kelvin
from nbody_pyg.deploy.trajectory_files import LIBRARY_FORMATS, LibraryWriter
from nbody_pyg.messages import check_choice

VELOCITIES = ("auto", "given", "drawn")

# A run above this temperature has failed, K: 3/2 kT is then 3.9 eV, the energy of a bond for every atom.
_HOTTEST = 30_000.0
# Largest kinetic energy of one atom, in units of the mean at that temperature.
_FASTEST = 10.0
# Largest plausible displacement of an atom in one step, angstrom.
_LONGEST_MOVE = 1.0
# An atom of an open system that is further from every other atom has left it, angstrom.
_LOST = 10.0
# A checkpoint is written at a sample if the last one is older than this, and at the end, s.
_CHECKPOINT_SECONDS = 10.0
# Smallest number of samples for a linear fit.
_LEAST_SAMPLES = 3


@dataclass(frozen=True)
class MDReport:
    """Samples of a run, and quantities computed from them.

    ========================  ==========================================================================
    field                     unit
    ========================  ==========================================================================
    ``time``                  ps
    ``total``, ``potential``  eV
    ``temperature``           K
    ``drift``                 meV per atom per 10 ps: slope of the straight line through ``total``
    ``fluctuation``           meV per atom: standard deviation about that line
    ``largest_jump``          meV per atom between two consecutive samples
    ``stopped``               why the run ended early; None if it did not
    ``first_step``            number of its first step, not 0 if a trajectory is continued
    ``velocities``            description of the source of the first velocities
    ``bonds_from``            source of the bonds that the energy uses; None if it uses none
    ``bond_changes``          step and atoms of the first sample at which the bonds found are others than those
                              in use; None where they never were
    ``volume``                angstrom^3, of the cell; empty unless all three directions are periodic
    ========================  ==========================================================================

    Drift and jumps are a measure of the potential only if the total energy is conserved (nve). With fewer than two
    samples the drift is NaN.
    """

    time: np.ndarray
    total: np.ndarray
    potential: np.ndarray
    temperature: np.ndarray
    num_atoms: int
    stopped: str | None = None
    first_step: int = 0
    velocities: str = ""
    bonds_from: str | None = None
    bond_changes: str | None = None
    volume: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

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
            return math.nan, math.nan
        slope, start = np.polyfit(self.time, self.total, 1)
        return float(slope), float(start)

    def __str__(self) -> str:
        count = len(self.time)
        if count == 0:
            return "no sample: the run ended before the first"
        words = f"{count} sample{'s' * (count > 1)}, to {self.time[-1]:.3f} ps, "
        words += f"mean temperature {self.temperature.mean():.1f} K\n"
        if count < _LEAST_SAMPLES:
            return words + f"total energy {self.total[-1]:.6f} eV (a drift needs {_LEAST_SAMPLES} samples)"
        return words + (
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
    velocities: str = "auto",
    max_temperature: float | None = None,
    restart: bool = False,
    stop_on_bond_change: bool = False,
    pressure: float = 1.0,
    thermostat_time: float | None = None,
    barostat_time: float | None = None,
    checkpoint: str | Path | None = None,
) -> MDReport:
    """Run molecular dynamics of ``atoms`` (in place) with their calculator.

    If velocities are drawn from the Maxwell-Boltzmann distribution, the total momentum is removed, for isolated
    molecules also the angular momentum; but not if constraints hold some atoms, which absorb both. ASE applies the
    constraints of the atoms. Temperatures and thermostats count the degrees of freedom that share the kinetic energy
    (:func:`~nbody_pyg.deploy.momenta.degrees_of_freedom`), for a molecule of N atoms 3 N - 6, with "langevin" 3 N.

    A run that fails ends with the reason in ``stopped``: energy, forces or positions that are not finite, a temperature
    above ``max_temperature``, an atom with ten times the mean kinetic energy at that temperature, an atom that would
    move by more than 1 angstrom in a step, or one that has left an open system (10 angstrom from every other). A
    structure with numbers that are not finite is not written. The first structure, every ``sample_every``-th one and
    the last one are sampled and written.

    Bonds are part of the definition of the energy of an :class:`NBodyCalculator`, and are kept during the whole run,
    also in ASE's sums and averages of calculators. At every sample they are compared with those that would be found
    then; the first difference is reported by a warning, in the log and in the report.

    Args:
        steps: number of steps; 0 evaluates the first structure.
        ensemble: "nve" (velocity Verlet), "langevin", "bussi" (stochastic velocity rescaling), "nose-hoover" (a
            chain of three), "npt" (isotropic) or "npt-full" (all lengths and angles; both Martyna-Tobias-Klein).
        timestep: fs.
        temperature: K, of the first velocities and of the thermostat.
        friction: 1/fs, of the Langevin thermostat.
        seed: of the velocities and of the thermostat.
        sample_every: steps between samples, log lines and frames.
        log: text file in ASE's MDLogger form, with the stress (GPa) of "npt" and "npt-full".
        trajectory: ``.dcd`` or ``.xtc`` (positions and cells only; by mdtraj), ASE's ``.traj``, or extxyz by any other
            name. The last two have energies, forces and velocities, and step and time in ``atoms.info``.
        report: called with the number of steps done at every sample.
        stop: called with the atoms after every step; a returned text ends the run, and is kept in the report. The last
            structure is written too. See :func:`~nbody_pyg.deploy.stop_on_uncertainty`.
        velocities: "given" uses those of the atoms, "drawn" draws them, "auto" uses those of the atoms if any is not
            zero.
        max_temperature: K; by default 30,000 (3/2 kT is then 3.9 eV, a bond for every atom), at least ten times
            ``temperature``. ``math.inf`` goes on at any speed, with lost atoms too, as long as numbers are finite.
        restart: continue from the last complete frame of ``trajectory`` with its positions, momenta and step number,
            and append to ``trajectory`` and ``log``. Positions and momenta are as exact as in the file: all digits in
            ``.traj``, 8 decimals in extxyz. The random numbers of a thermostat start again, from the seed and the step.
            With ``checkpoint`` the run goes on from there instead, as if it had not been interrupted.
        stop_on_bond_change: end the run at the first sample whose bonds differ from those in use.
        pressure: bar, of "npt" and "npt-full".
        thermostat_time: relaxation time of "bussi", "nose-hoover", "npt" and "npt-full", fs; by default 100 time steps.
        barostat_time: relaxation time of the cell, fs; by default 1000 time steps.
        checkpoint: file for the state of the run (:class:`~nbody_pyg.deploy.md_checkpoint.MDState`), replaced at
            samples, at most every 10 s, and at the end. A restart from it repeats all numbers of an uninterrupted
            run on the same machine: positions, velocities, random numbers, thermostat and barostat.
            It needs the same ensemble and settings; with others they begin anew, with a warning. Frames of a killed run
            that are later than the checkpoint are computed again, not written twice, and not counted as ``steps``. A
            warning says if that leads to another last frame, or if the energy differs.
    Raises: ValueError: no calculator, an unknown ensemble or choice of velocities, numbers out of range, atoms that
        cannot move, a trajectory that cannot be continued, or that of atoms with other charges or masses.
    """
    if atoms.calc is None:
        raise ValueError("atoms carry no calculator; set atoms.calc = NBodyCalculator(...)")
    check_choice("ensemble", ensemble, ENSEMBLES)
    check_choice("velocities", velocities, VELOCITIES)
    _check_numbers(steps, sample_every, timestep, temperature, friction, max_temperature)
    if len(atoms.constraints) and atoms.get_number_of_degrees_of_freedom() <= 0:
        raise ValueError("atoms must be free to move, but their constraints hold all of them; take some away")
    resumed = _resumed(atoms, trajectory, timestep, checkpoint) if restart else _Resumed()
    written, state = resumed.written, resumed.state
    first = max(written, 0) if state is None else state.step
    repeated = max(written - first, 0)  # steps of a killed run that are later than its checkpoint
    steps += repeated
    rng = np.random.default_rng([seed, first] if first else seed)
    drawn = _set_velocities(atoms, "given" if restart else velocities, temperature, rng)
    if state is not None:
        state.apply(atoms)  # momenta once more: constraints have changed their last digits
    freedom = degrees_of_freedom(atoms, ensemble)
    if restart:
        origin = f"those of step {first} of the {'trajectory' if state is None else 'checkpoint'}"
    elif drawn:
        origin = f"drawn at {temperature:g} K, seed {seed}"
    else:
        origin = f"those of the first structure ({kelvin(atoms, freedom):.1f} K)"
    options: dict[str, Any] = {
        "timestep": timestep, "temperature": temperature, "friction": friction, "pressure": pressure,
        "thermostat_time": thermostat_time, "barostat_time": barostat_time,
    }  # fmt: skip
    dyn = integrator(ensemble, atoms, freedom=freedom, rng=rng, **options)
    kind = f"{ensemble} {sorted(options.items())}"
    if state is not None and state.ensemble == kind:
        rng.bit_generator.state = state.random
        restore(dyn, state.variables)
    elif state is not None and not ensemble == state.ensemble.split()[0] == "nve":
        warnings.warn(
            f"{checkpoint} was written with the settings {state.ensemble}, and the run goes on with {kind}: random "
            "numbers, thermostat and barostat begin anew",
            stacklevel=2,
        )
    dyn.nsteps = first
    hottest = max(_HOTTEST, 10.0 * temperature) if max_temperature is None else max_temperature
    failed = _Failure(atoms, timestep * units.fs, hottest, freedom)
    bonded = _with_bonds(atoms.calc)
    stopped = changes = None
    with contextlib.ExitStack() as kept:
        begun = atoms.copy()
        if restart and (state is not None or bonded):  # a continued run keeps its bonds
            begun = _frame(str(trajectory), 0) if state is None else state.first(atoms)
        if bonded:
            if atoms.calc not in bonded:  # one of ASE's calculators, whose cache ignores bonds
                kept.callback(atoms.calc.__dict__.update, atoms=None, results={})
            for calculator in bonded:
                kept.enter_context(calculator.fixed_bonds(begun))
        bonds_from = next((c.bonds_from for c in bonded if c.bonds_from), None)
        stress = has_pressure(ensemble)
        if stress:
            atoms.get_stress()  # our calculators then compute it with the forces
        atoms.get_forces()  # dyn computes none before the first step of a continued run
        if resumed.energy is not None:
            place = f"the last frame of {trajectory}" if state is None else f"step {first} of {checkpoint}"
            _check_energy(atoms, resumed.energy, place)
        # Last, because it replaces files
        record = _Record(atoms, dyn, log, trajectory, written if restart else None, stress, freedom)
        kept.callback(record.close)
        saved = -math.inf
        for _ in dyn.irun(steps):
            done = dyn.nsteps - first
            due = done == steps or done % sample_every == 0
            reason = failed(due) or (None if stop is None else stop(atoms))
            if not failed.broken and (due or reason):
                if changes is None and bonded:
                    when = f"step {dyn.nsteps} ({dyn.get_time() / units.fs:.2f} fs)"
                    changes = _told(atoms, bonded, bonds_from, when, record.logger)
                    if changes is not None and stop_on_bond_change:
                        reason = reason or "bonds have changed, " + changes.partition(": ")[2]
                if repeated and dyn.nsteps == written:
                    _check_repeated(atoms, resumed.last, str(trajectory))
                record(write=dyn.nsteps > written)  # the first frames of a continued run exist already
                if report is not None and done >= repeated:
                    report(done - repeated)
                now = clock.monotonic()
                if checkpoint is not None and (done == steps or reason or now - saved >= _CHECKPOINT_SECONDS):
                    saved = now
                    _state_of_run(atoms, dyn, kind, timestep, begun, rng).save(checkpoint)
            if reason:
                stopped = f"stopped after step {dyn.nsteps} ({dyn.get_time() / units.fs:.2f} fs): {reason}"
                break
    time, total, potential, temperatures = np.array(record.samples).reshape(-1, 4).T
    volume = np.array(record.volumes)
    return MDReport(
        time, total, potential, temperatures, len(atoms), stopped, first, origin, bonds_from, changes, volume
    )


class _Resumed(NamedTuple):
    """Last step that is written already and its positions; the checkpoint, if it is used; the energy from which the run
    goes on, if it is known."""

    written: int = -1
    last: np.ndarray = np.zeros((0, 3))
    state: MDState | None = None
    energy: float | None = None


def _resumed(atoms: Atoms, trajectory: str | Path | None, timestep: float, checkpoint: str | Path | None) -> _Resumed:
    """Give the atoms the state to go on from.

    Raises: ValueError: no trajectory or checkpoint, or those of another run.
    """
    state = None if checkpoint is None or not Path(checkpoint).is_file() else MDState.load(checkpoint)
    if state is not None:
        state.check(atoms, timestep, str(checkpoint))
    if trajectory is not None and Path(trajectory).suffix in LIBRARY_FORMATS:
        if state is None:
            raise ValueError(f"restart needs a checkpoint to go on from, because {trajectory} has no momenta")
        written, before = state.step, None
    else:
        written, before = _continued(atoms, trajectory, timestep)
        near = state is not None and (
            state.step < written or (state.step == written and np.abs(atoms.positions - state.positions).max() < 1e-4)
        )
        if state is not None and not near:
            warnings.warn(
                f"{checkpoint} is not the state of the last frame of {trajectory} (step {state.step}, step {written}); "
                "the run goes on from the frame",
                stacklevel=3,
            )
            state = None
    last = atoms.get_positions()
    if state is not None:
        state.apply(atoms)
        before = state.energy if state.energy is not None or state.step < written else before
    return _Resumed(written, last, state, before)


def _state_of_run(
    atoms: Atoms, dyn: MolecularDynamics, kind: str, timestep: float, begun: Atoms, rng: np.random.Generator
) -> MDState:
    return MDState(
        step=int(dyn.nsteps),
        ensemble=kind,
        timestep=float(timestep),
        numbers=atoms.numbers,
        masses=atoms.get_masses(),
        positions=atoms.get_positions(),
        momenta=atoms.get_momenta(),
        cell=atoms.cell.array.copy(),
        pbc=atoms.pbc.copy(),
        first_positions=begun.get_positions(),
        first_cell=begun.cell.array.copy(),
        random=dict(rng.bit_generator.state),
        variables=variables(dyn),
        energy=float(atoms.get_potential_energy()),
    )


def _with_bonds(calculator: Any) -> list[Any]:
    """The calculators that keep bonds: this one, or the members of one of ASE's combined calculators."""
    if hasattr(calculator, "fixed_bonds"):
        return [calculator]
    mixed = getattr(getattr(calculator, "mixer", None), "calcs", ())
    return [found for member in mixed for found in _with_bonds(member)]


def _check_numbers(
    steps: int, sample_every: int, timestep: float, temperature: float, friction: float, max_temperature: float | None
) -> None:
    for name, count, least in (("steps", steps, 0), ("sample_every", sample_every, 1)):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ValueError(f"{name} must be a whole number, got {count!r}")
        if count < least:
            raise ValueError(f"{name} must be {'positive' if least else 'zero or positive'}, got {count}")
    for name, value in (("timestep", timestep), ("max_temperature", max_temperature)):
        if value is not None and not (value > 0 and (name == "max_temperature" or math.isfinite(value))):
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in (("temperature", temperature), ("friction", friction)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be zero or positive, got {value}")


def _set_velocities(atoms: Atoms, which: str, temperature: float, rng: np.random.Generator) -> bool:
    """Give the atoms their first velocities; returns whether they were drawn."""
    momenta = atoms.get_momenta()
    if not np.isfinite(momenta).all():
        raise ValueError("momenta of the atoms must be finite; draw new ones with velocities='drawn'")
    if which == "given" or (which == "auto" and momenta.any()):
        atoms.set_momenta(momenta)  # set again, so that constraints apply to them
        return False
    draw_momenta(atoms, temperature, rng)
    return True


def _not_kept(atoms: Atoms) -> list[str]:
    """Names of the constraints that extended xyz cannot store."""
    return [type(c).__name__ for c in atoms.constraints if not isinstance(c, (FixAtoms, FixCartesian))]


def _continued(atoms: Atoms, trajectory: str | Path | None, timestep: float) -> tuple[int, float | None]:
    """Give the atoms the state of the last whole frame of a trajectory; returns its step, and its energy if it has one.

    Raises: ValueError: no trajectory, other atoms, another time step, or a frame without its step number.
    """
    if trajectory is None or not Path(trajectory).is_file():
        raise ValueError(f"restart needs the trajectory to go on from, got {trajectory}")
    path = Path(trajectory)
    if path.suffix != ".traj":
        cut_to_whole_frames(path)
    last = _frame(path, -1)
    if not np.array_equal(last.numbers, atoms.numbers):
        raise ValueError(
            f"atoms must be those of the trajectory, got {atoms.get_chemical_formula()} "
            f"and {last.get_chemical_formula()} in {path}"
        )
    step, time = last.info.get("step"), last.info.get("time_fs")
    if step is None or time is None or not last.has("momenta"):
        raise ValueError(
            f"{path} cannot be continued: its last frame does not tell step, time and momenta; "
            "begin a new run with it as the first structure"
        )
    if abs(float(time) - int(step) * timestep) > 1e-6 * max(1.0, abs(float(time))):
        raise ValueError(
            f"timestep must be that of the trajectory, {float(time) / max(int(step), 1):g} fs, got {timestep:g}; "
            "begin a new run for another one"
        )
    if path.suffix != ".traj" and _not_kept(atoms) != last.info.get("constraints_left_out", "").split():
        raise ValueError(
            f"atoms must have the constraints of the trajectory, {last.info.get('constraints_left_out') or 'none'}, "
            f"got {' '.join(_not_kept(atoms)) or 'none'}: extended xyz does not hold them; give them to the atoms"
        )
    for name, own, other in (
        ("charges and spin", _state(atoms), _state(last)),
        ("masses", atoms.get_masses(), last.get_masses()),
    ):
        if not np.allclose(own, other, rtol=0, atol=1e-5):
            raise ValueError(f"atoms must have the {name} of the trajectory {path}; correct them, or begin a new run")
    constraints = atoms.constraints if _not_kept(atoms) else last.constraints
    move_to(atoms, last.cell, last.pbc, last.positions, last.get_momenta(), constraints)
    return int(step), getattr(last.calc, "results", {}).get("energy")


def _frame(path: str | Path, index: int) -> Atoms:
    found = read(path, index=index, do_not_split_by_at_sign=True)
    assert isinstance(found, Atoms)  # of one index
    return found


def _state(atoms: Atoms) -> np.ndarray:
    """Total charge, multiplicity, and charges of the atoms, if the atoms have them; otherwise 0, 1 and 0."""
    found = {key: value.numpy() for key, value in electronic_state_of(atoms).items()}
    charges = found.get("charges", np.zeros(len(atoms)))
    return np.concatenate([found.get("charge", charges.sum(keepdims=True)), found.get("spin", np.ones(1)), charges])


def _check_energy(atoms: Atoms, before: float, place: str) -> None:
    """Warn if the energy from which a run goes on differs now, because of another model or other bonds."""
    now = atoms.get_potential_energy()
    if abs(now - before) > 1e-3 * len(atoms) + 1e-6 * abs(before):
        warnings.warn(
            f"{place} has an energy of {before:.6f} eV there, and {now:.6f} eV now: the energy has a step where the "
            "run goes on. Was it another model?",
            stacklevel=3,
        )


def _check_repeated(atoms: Atoms, last: np.ndarray, trajectory: str) -> None:
    """Warn if steps that were computed again do not lead to the last frame that is written."""
    if (apart := float(np.abs(atoms.positions - last).max())) > 1e-3:
        warnings.warn(
            f"the steps from the checkpoint to the last frame of {trajectory} were computed again, and led to "
            f"positions up to {apart:.3f} angstrom from that frame: the trajectory has a step there. Was it another "
            "model, machine or setting, or the checkpoint of another run?",
            stacklevel=3,
        )


class _Failure:
    """Says why a run has no meaning any more; ``broken`` where its numbers are not finite."""

    def __init__(self, atoms: Atoms, timestep: float, hottest: float, freedom: int):
        self.atoms, self.timestep, self.hottest, self.broken = atoms, timestep, hottest, False
        self.masses, self.freedom = atoms.get_masses()[:, None], freedom
        self.apart = max(_LOST, 3.0 * self._outermost()[1]) if self._open else math.inf

    @property
    def _open(self) -> bool:
        return math.isfinite(self.hottest) and len(self.atoms) > 1 and not self.atoms.pbc.any()

    def _outermost(self) -> tuple[int, float]:
        """The atom furthest from the centre, and the distance to its nearest neighbour."""
        pos = self.atoms.positions
        atom = int(np.linalg.norm(pos - pos.mean(axis=0), axis=1).argmax())
        return atom, float(np.partition(np.linalg.norm(pos - pos[atom], axis=1), 1)[1])

    def __call__(self, at_sample: bool) -> str | None:
        atoms, momenta = self.atoms, self.atoms.get_momenta()
        # What the step has computed: asking the calculator again compares all atoms, at every step. Not where another
        # thread, or the caller in between, has asked it about another structure
        found, of = getattr(atoms.calc, "results", {}), getattr(atoms.calc, "atoms", None)
        if of is None or not np.array_equal(of.positions, atoms.positions):
            found = {}
        energy = found["energy"] if "energy" in found else atoms.get_potential_energy()
        constrained = bool(atoms.constraints) or "forces" not in found
        forces = atoms.get_forces(md=True) if constrained else found["forces"]
        numbers = {"energy": energy, "force": forces, "position": atoms.positions, "momentum": momenta}
        for name, value in numbers.items():
            if not np.isfinite(value).all():
                self.broken = True
                where = np.argwhere(~np.isfinite(np.atleast_1d(value)))[0][0]
                what = "the energy is" if name == "energy" else f"the {name} of {self._name(where)} is"
                return f"{what} not finite; {_CURE}"
        if math.isinf(self.hottest):
            return None
        kinetic = 0.5 * (momenta**2 / self.masses).sum(axis=1)
        if (hot := 2.0 * float(kinetic.sum()) / (self.freedom * units.kB)) > self.hottest:
            return f"the temperature is {hot:.3g} K, more than {self.hottest:g} K; {_CURE}"
        limit, fastest = _FASTEST * 1.5 * units.kB * self.hottest, int(kinetic.argmax())
        if kinetic[fastest] > limit:
            return f"{self._name(fastest)} has a kinetic energy of {kinetic[fastest]:.3g} eV; {_CURE}"
        move = np.linalg.norm((momenta + 0.5 * self.timestep * forces) / self.masses, axis=1) * self.timestep
        furthest = int(move.argmax())
        if move[furthest] > _LONGEST_MOVE:
            return f"{self._name(furthest)} would move by {move[furthest]:.3g} angstrom in one step; {_CURE}"
        if at_sample and self._open:
            lost, distance = self._outermost()
            if distance > self.apart:
                return f"{self._name(lost)} has left: its nearest neighbour is {distance:.1f} angstrom away"
        return None

    def _name(self, atom: int) -> str:
        return f"atom {atom} ({self.atoms.symbols[atom]})"


_CURE = "try a shorter time step, or a structure that is nearer to the training data"


class _Thermometer:
    """Atoms whose temperature counts the degrees of freedom of the run."""

    def __init__(self, atoms: Atoms, freedom: int):
        self._atoms, self._freedom = atoms, freedom

    def __getattr__(self, name: str) -> Any:
        return getattr(self._atoms, name)

    def get_temperature(self) -> float:
        return kelvin(self._atoms, self._freedom)


class _Record:
    """Writes samples, log and frames of a run, each structure once."""

    def __init__(
        self,
        atoms: Atoms,
        dyn: MolecularDynamics,
        log: str | Path | None,
        trajectory: str | Path | None,
        continued: int | None,
        stress: bool,
        freedom: int,
    ):
        self.atoms, self.dyn, append = atoms, dyn, continued is not None
        self.freedom = freedom
        self.samples: list[tuple[float, float, float, float]] = []
        self.volumes: list[float] = []
        self.frames: Any = None
        if trajectory is not None and Path(trajectory).suffix in LIBRARY_FORMATS:
            self.frames = LibraryWriter(Path(trajectory), atoms, continued)
        elif trajectory is not None and Path(trajectory).suffix == ".traj":
            self.frames = Trajectory(str(trajectory), "a" if append else "w", atoms)
        elif trajectory is not None:
            self.frames = _ExtxyzWriter(Path(trajectory), atoms, append)
        self.logger = None
        if log is not None:
            append = append and Path(log).is_file()
            mode = "a" if append else "w"
            seen: Any = _Thermometer(atoms, freedom)
            header = not append
            self.logger = MDLogger(dyn, seen, str(log), header=header, stress=stress, peratom=False, mode=mode)

    def __call__(self, write: bool) -> None:
        atoms, fs = self.atoms, self.dyn.get_time() / units.fs
        potential = atoms.get_potential_energy()
        self.samples.append((fs / 1000, potential + atoms.get_kinetic_energy(), potential, kelvin(atoms, self.freedom)))
        if atoms.pbc.all():
            self.volumes.append(atoms.get_volume())
        atoms.info |= {"step": self.dyn.nsteps, "time_fs": round(fs, 9)}
        # The frame first: a log line without its frame could not be continued.
        if write and self.frames is not None:
            self.frames.write()
        if write and self.logger is not None:
            self.logger()

    def close(self) -> None:
        for item in (self.frames, self.logger):
            if item is not None:
                item.close()


def _told(atoms: Atoms, bonded: list[Any], source: str | None, when: str, logger: MDLogger | None) -> str | None:
    """When and how the bonds found now differ from those in use; reported by a warning and in the log."""
    found = next((text for calculator in bonded if (text := calculator.bond_changes(atoms))), None)
    if found is None:
        return None
    warnings.warn(f"bonds as found at {when} differ from those that the energy uses, {source} ({found})", stacklevel=3)
    if logger is not None:
        logger.logfile.write(f"# {when}: bonds as found now differ from those in use: {found}\n")
    return f"{when}: {found}"


class _ExtxyzWriter:
    """Appends the atoms to an extxyz file; each frame is one system call, complete or not written."""

    def __init__(self, path: Path, atoms: Atoms, append: bool):
        self.atoms, self.path = atoms, path
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC), 0o666)
        self.left_out = " ".join(_not_kept(atoms))

    def write(self) -> None:
        text, atoms = io.StringIO(), without_labels(self.atoms)  # those of the first structure
        atoms.calc = self.atoms.calc
        atoms.info.pop("constraints_left_out", None)  # of the file that the atoms come from
        if self.left_out:
            atoms.info["constraints_left_out"] = self.left_out
        write(text, atoms, format="extxyz")
        data, end = text.getvalue().encode(), os.lseek(self.handle, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self.handle, data) :]
        except OSError as error:  # no space left
            os.ftruncate(self.handle, end)
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        os.close(self.handle)


def cut_to_whole_frames(path: str | Path) -> int:
    """Remove an incomplete last frame, left by a killed process, from an (ext)xyz file; returns the complete frames.

    Raises: ValueError: no complete frame.
    """
    frames, end = 0, 0
    with open(path, "rb+") as file:
        while (count := file.readline()).strip().isdigit():
            lines = [file.readline() for _ in range(int(count) + 1)]
            if not all(line.endswith(b"\n") for line in lines):
                break
            frames, end = frames + 1, file.tell()
        if not frames:
            raise ValueError(f"{path} holds no whole frame to go on from")
        rest = file.seek(0, os.SEEK_END) - end
        if rest:
            file.seek(end)
            if count.strip() and not count.strip().isdigit():
                raise ValueError(f"{path} is no trajectory of {frames} frames: what follows them is {count[:40]!r}")
            file.truncate(end)
    return frames
