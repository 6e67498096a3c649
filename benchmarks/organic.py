"""The shipped model of organic molecules beside GFN2-xTB, with which its training frames were labelled.

python benchmarks/organic.py errors MODEL --data FOLDER     errors on test frames: molecules of other scaffolds
python benchmarks/organic.py speed MODEL --data FOLDER      E+F beside tblite, one thread, in turn
python benchmarks/organic.py nve MODEL --data FOLDER        NVE of ten molecules of 20 to 80 atoms

FOLDER has the files of datasets/make_pretraining.py. ``speed`` needs tblite, all need h5py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.optimize import LBFGS

from nbody_pyg.cli.tables import element_table, error_table, report, table
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import UnitFiles
from nbody_pyg.deploy import NBodyCalculator, load_model, run_md
from nbody_pyg.training.evaluation import evaluate


def errors(model: str, data: str, count: int) -> None:
    """Errors on test frames, by kind of molecule and by element."""
    frames = UnitFiles(sorted(Path(data).glob("*.h5"))).sample("test", count)
    found = evaluate(load_model(model), frames)
    totals = {("", "test"): found.errors}
    parts = [error_table(totals), element_table(totals), report({"test": (frames, found)})]
    print("\n\n".join([f"{len(frames)} frames", *parts]))


def speed(model: str, data: str, rounds: int) -> None:
    """Milliseconds of energy and forces for molecules of several sizes, medians, and the ratio."""
    from tblite.ase import TBLite

    torch.set_num_threads(1)
    ours, rows = NBodyCalculator(model), []
    for atoms in molecules(data, (10, 20, 40, 60, 80)):
        charge = float(atoms.info.get("charge", 0.0))
        theirs = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
        spent: dict[str, list[float]] = {"ours": [], "tblite": []}
        for number in range(rounds + 1):
            moved = atoms.copy()
            moved.rattle(0.01, seed=number)
            for name, calculator in (("ours", ours), ("tblite", theirs)):
                start = time.perf_counter()
                calculator.get_forces(moved)
                if number:  # the first one compiles
                    spent[name].append(1000 * (time.perf_counter() - start))
        mine, xtb = (statistics.median(spent[name]) for name in ("ours", "tblite"))
        rows.append([len(atoms), mine, xtb, xtb / mine])
    print(f"engine {ours.engine}\n\n" + table(["atoms", "model ms", "GFN2-xTB ms", "ratio"], rows))


def nve(model: str, data: str, picoseconds: float, temperature: float) -> None:
    """Drift of the total energy after relaxation and heating, for ten molecules."""
    torch.set_num_threads(1)
    calculator, rows = NBodyCalculator(model), []
    for atoms in molecules(data, np.linspace(20, 80, 10)):
        atoms.calc = calculator
        LBFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
        run_md(atoms, 1000, ensemble="langevin", temperature=temperature, friction=0.02, velocities="drawn")
        found = run_md(atoms, round(2000 * picoseconds), velocities="given")
        rows.append([
            atoms.get_chemical_formula(), len(atoms), float(found.temperature.mean()), found.drift, found.fluctuation,
            "-" if found.stopped is None else found.stopped[:60],
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["molecule", "atoms", "mean K", "drift meV/atom per 10 ps", "fluctuation meV/atom", "stopped"]
    print(table(head, rows))


def molecules(data: str, sizes: Sequence[float] | np.ndarray) -> list[Atoms]:
    """Neutral molecules of the test frames, the nearest to each size, no two alike."""
    frames: list[AtomicData] = list(UnitFiles(sorted(Path(data).glob("*.h5"))).sample("test"))
    frames = [frame for frame in frames if float(frame.get("charge", torch.zeros(1))) == 0]
    chosen: list[Atoms] = []
    for size in sizes:
        frames.sort(key=lambda frame: abs(len(frame.z) - size))
        taken = {atoms.get_chemical_formula() for atoms in chosen}
        atoms = next(a for a in (f.to_ase() for f in frames) if a.get_chemical_formula() not in taken)
        atoms.calc = None
        chosen.append(atoms)
    return chosen


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "speed", "nve"))
    parser.add_argument("model", help="model file or name")
    parser.add_argument("--data", required=True, help="folder of units")
    parser.add_argument("--frames", type=int, default=2000, help="test frames for the errors")
    parser.add_argument("--rounds", type=int, default=20, help="evaluations of each size for the speed")
    parser.add_argument("--picoseconds", type=float, default=20.0, help="of NVE")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    args = parser.parse_args()
    if args.what == "errors":
        errors(args.model, args.data, args.frames)
    elif args.what == "speed":
        speed(args.model, args.data, args.rounds)
    else:
        nve(args.model, args.data, args.picoseconds, args.temperature)


if __name__ == "__main__":
    main()
