"""A path integral of 8 beads in i-PI, all beads in one evaluation: python run_ipi.py model.nbody start.xyz 10"""

import subprocess
import sys
from pathlib import Path

from ase.io import read, write

from nbody_pyg.engines.ipi import ffdirect

model, structure, steps = sys.argv[1:]
atoms, beads = read(structure), 8
if atoms.cell.rank < 3:
    atoms.center(vacuum=20.0)  # i-PI needs a cell; it is ignored unless the structure is periodic
write("template.xyz", atoms)
cell, turn = atoms.cell.standard_form()  # i-PI wants a triangular cell
with open("init.xyz", "w") as file:
    sizes = " ".join(map(str, cell.cellpar()))
    print(f"{len(atoms)}\n# CELL(abcABC): {sizes} cell{{angstrom}} positions{{angstrom}}", file=file)
    for symbol, position in zip(atoms.symbols, atoms.positions @ turn.T, strict=True):
        print(symbol, *position, file=file)
Path("input.xml").write_text(f"""
<simulation verbosity="low">
  <output prefix="ipi">
    <properties filename="out"> [step, time{{picosecond}}, conserved, temperature{{kelvin}}, potential] </properties>
    <trajectory filename="pos" stride="10"> positions{{angstrom}} </trajectory>
  </output>
  <total_steps>{steps}</total_steps>
  {ffdirect(model, "template.xyz", beads)}
  <system>
    <initialize nbeads="{beads}">
      <file mode="xyz"> init.xyz </file>
      <velocities mode="thermal" units="kelvin"> 300 </velocities>
    </initialize>
    <forces> <force forcefield="nbody"/> </forces>
    <ensemble> <temperature units="kelvin"> 300 </temperature> </ensemble>
    <motion mode="dynamics">
      <dynamics mode="nvt">
        <timestep units="femtosecond"> 0.25 </timestep>
        <thermostat mode="pile_g"> <tau units="femtosecond"> 100 </tau> </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
""")
subprocess.run(["i-pi", "input.xml"], check=True)
