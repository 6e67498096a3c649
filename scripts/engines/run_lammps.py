"""Constant temperature and pressure in LAMMPS: python run_lammps.py model.nbody start.xyz 50"""

import sys

from ase.io import read, write

from nbody_pyg.engines.lammps import ExternalForces, start

model, structure, steps = sys.argv[1:]
atoms = read(structure)
elements = sorted(set(atoms.symbols))
write("start.data", atoms, format="lammps-data", specorder=elements, masses=True)

lmp = start("-log", "lammps.log")
for line in ("units metal", "atom_style atomic", "read_data start.data", "pair_style zero 1.0", "pair_coeff * *"):
    lmp.command(line)
forces = ExternalForces(lmp, model, elements)  # defines "fix nbody", with energy and virial
lmp.command("velocity all create 300 1")
lmp.command("timestep 0.0005")
lmp.command("fix move all npt temp 300 300 0.05 iso 1 1 0.5")
lmp.command("thermo_style custom step temp pe etotal press vol")
lmp.command("thermo 10")
lmp.command("dump frames all custom 10 lammps.dump id type x y z")
forces.run(int(steps))
