"""ML/MM: one water molecule of a box has the model, the others TIP3P: python run_openmm_mm.py model.nbody 50"""

import sys

from openmm import LangevinMiddleIntegrator, unit
from openmm.app import PME, ForceField, Modeller, Simulation, Topology
from openmmml import MLPotential

from nbody_pyg.engines.openmm import register_openmm_ml

model, steps = sys.argv[1:]
field = ForceField("tip3p.xml")
box = Modeller(Topology(), [])
box.addSolvent(field, model="tip3p", boxSize=(2.0, 2.0, 2.0) * unit.nanometer)
water = field.createSystem(box.topology, nonbondedMethod=PME, nonbondedCutoff=0.9 * unit.nanometer)

register_openmm_ml()  # makes "nbody" known
chosen = [atom.index for atom in next(box.topology.residues()).atoms()]
mixed = MLPotential("nbody", model=model).createMixedSystem(box.topology, water, chosen)

integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
simulation = Simulation(box.topology, mixed, integrator)
simulation.context.setPositions(box.positions)
simulation.step(int(steps))
print(simulation.context.getState(energy=True).getPotentialEnergy())
