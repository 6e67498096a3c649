"""Sockets of ASE: a server runs the dynamics, a client has the model: python run_sockets.py model.nbody start.xyz 10"""

import subprocess
import sys

from ase import units
from ase.calculators.socketio import SocketIOCalculator
from ase.io import read
from ase.md.verlet import VelocityVerlet

# The client may be on another machine: SocketClient(host="name", port=31415), and port=31415 for the server
CLIENT = """
import sys
from ase.calculators.socketio import SocketClient
from ase.io import read
from nbody_pyg.deploy import NBodyCalculator
atoms = read(sys.argv[2])
atoms.calc = NBodyCalculator(sys.argv[1])
SocketClient(unixsocket="nbody").run(atoms, use_stress=bool(atoms.pbc.any()))
"""

model, structure, steps = sys.argv[1:]
atoms = read(structure)
with SocketIOCalculator(unixsocket="nbody") as server:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, model, structure])
    atoms.calc = server
    VelocityVerlet(atoms, 0.5 * units.fs).run(int(steps))
    print(f"potential energy {atoms.get_potential_energy():.6f} eV")
client.wait()
