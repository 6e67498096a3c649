"""One step of molecular dynamics through the calculator: with and without skin, eager and compiled.

    python benchmarks/md.py

NBodyNet with the settings of configs/rmd17.yaml, but shells of 5 angstrom, float32, one thread, ASE's velocity Verlet
at 0.5 fs from 300 K. The network is not trained, so its forces are made small and all velocities are turned round every
20 steps: atoms fly to and fro by up to half an angstrom. Beside the steps stand energy and forces alone (topology
given).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from peers import SPECIES
from report import arguments, show, start, write
from scaling import build
from systems import System, molecules, water
from timing import interleave

from nbody_pyg.deploy import NBodyCalculator
from nbody_pyg.potential import Potential

HEAD = ["atoms", "way", "ms per step", "min", "x no skin", "searches per step"]


def verlet(atoms: Atoms) -> VelocityVerlet:
    """Dynamics at constant energy, 0.5 fs, from momenta of 300 K."""
    width = np.sqrt(units.kB * 300.0 * atoms.get_masses())
    atoms.set_momenta(width[:, None] * np.random.default_rng(0).standard_normal((len(atoms), 3)))
    return VelocityVerlet(atoms, 0.5 * units.fs)


def stepper(potential: Potential, system: System, **settings: Any) -> tuple[Callable[[], Any], NBodyCalculator]:
    """A function that makes one step of a trajectory of its own."""
    atoms = Atoms(system.z.numpy(), system.pos.double().numpy())
    atoms.calc = NBodyCalculator(potential, **settings)
    dynamics = verlet(atoms)

    def step() -> None:
        dynamics.run(1)
        if dynamics.nsteps % 20 == 0:
            atoms.set_momenta(-atoms.get_momenta())

    return step, atoms.calc


def case(potential: Potential, system: System, skins: list[float], compile: bool, seconds: float) -> dict[str, Any]:
    """Times of all ways to make a step of one system."""
    topology = potential.model.scheme.topology(system.z, system.pos.double())
    calls: dict[str, Callable[[], Any]] = {
        "E+F alone": lambda: potential(system.z, system.pos, system.batch, topology=topology)
    }
    calculators: dict[str, NBodyCalculator] = {}
    for skin in dict.fromkeys([0.0, *skins]):
        name = f"skin {skin:g}" if skin else "no skin"
        calls[name], calculators[name] = stepper(potential, system, skin=skin)
    if compile:
        name = f"skin {skins[0]:g}, compiled"
        calls[name], calculators[name] = stepper(potential, system, skin=skins[0], compile=True)
    times = interleave(calls, seconds, rounds=(3, 201))
    searches = {name: c.topologies.rebuilds / c.topologies.calls for name, c in calculators.items()}
    rows = [
        [system.num_atoms, name, 1e3 * t.median, 1e3 * t.minimum, t.over(times["no skin"]), searches.get(name)]
        for name, t in times.items()
    ]
    show(f"{system.num_atoms} atoms", HEAD, rows)
    return {
        "atoms": system.num_atoms, "searches_per_step": searches,
        "times": {name: t.as_dict() for name, t in times.items()},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "md.json")
    parser.add_argument("--waters", type=int, nargs="+", default=[0, 334, 1667], help="molecules; 0: one of 22 atoms")
    parser.add_argument("--skins", type=float, nargs="+", default=[0.5], help="angstrom")
    parser.add_argument("--compile", action="store_true", help="time the compiled model as well")
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU time for each system")
    args = parser.parse_args(argv)
    records = []
    with start():
        potential = build(species=list(SPECIES))
        potential.scale.fill_(1e-3)
        for count in args.waters:
            system = water(count) if count else molecules(1)
            records.append(case(potential, system, args.skins, args.compile, args.seconds))
    write(args.out, {"results": records})
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
