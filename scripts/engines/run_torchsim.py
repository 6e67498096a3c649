"""Two replicas in one batch of TorchSim: python run_torchsim.py model.nbody start.xyz 20"""

import sys

import torch_sim
from ase.io import read

from nbody_pyg.engines.torchsim import torchsim_model

model, structure, steps = sys.argv[1:]
state = torch_sim.integrate(
    [read(structure)] * 2,
    torchsim_model(model),
    integrator=torch_sim.Integrator.nvt_langevin,
    n_steps=int(steps),
    temperature=300,
    timestep=0.0005,  # ps
)
print(state.energy.tolist(), "eV")
