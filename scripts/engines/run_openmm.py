"""Langevin dynamics in OpenMM: python run_openmm.py model.nbody start.xyz 50"""

import sys

import openmm
from ase.io import read
from openmm import unit

from nbody_pyg.engines.openmm import model_force

model, structure, steps = sys.argv[1:]
atoms = read(structure)
periodic = bool(atoms.pbc.all())

system = openmm.System()
for mass in atoms.get_masses():
    system.addParticle(mass)
if periodic:  # OpenMM wants lower triangular cells
    system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
system.addForce(model_force(model, atoms.numbers, periodic=periodic))
with open("system.xml", "w") as file:  # names the model file, and holds no weights
    file.write(openmm.XmlSerializer.serialize(system))

integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
context = openmm.Context(system, integrator)
context.setPositions(atoms.positions * unit.angstrom)
context.setVelocitiesToTemperature(300 * unit.kelvin)
integrator.step(int(steps))
state = context.getState(energy=True)
print(f"potential energy {state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole):.6f} kJ/mol")
