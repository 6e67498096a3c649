"""Active learning beside labels drawn from dynamics with the reference method.

python benchmarks/active.py START.xyz --label gfn2 --minutes 12

A test set is drawn from a trajectory of the reference calculator that nothing is trained on. ``nbody_pyg.active.learn``
makes a potential; then networks are trained on as many, and on twice as many, frames of another trajectory of the
reference calculator, each for the CPU time that one member of the committee had; with ``--init`` also from the trained
model that the committee starts from. Needs the package of the calculator.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from report import arguments, show, write

from nbody_pyg.active import LearnConfig, calculator, from_smiles, learn, rounds_table
from nbody_pyg.active.loop import trained, tuned
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.deploy import load_model
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets
from nbody_pyg.training.settings import NO_INIT


def trajectory(start: Atoms, label: str, temperature: float, count: int, every: int, seed: int) -> Frames:
    """Frames of Langevin dynamics of the reference calculator, after 500 steps."""
    atoms, out = start.copy(), []
    atoms.calc = calculator(label, float(start.info.get("charge", 0)), float(start.info.get("spin", 1)))
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    dynamics = Langevin(
        atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, fixcm=False, rng=rng
    )
    dynamics.run(500)
    for _ in range(count):
        dynamics.run(every)
        frame = Atoms(atoms.numbers, atoms.positions)
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        frame.calc = SinglePointCalculator(frame, **results)
        out.append(AtomicData.from_ase(frame))
    return Frames(out)


def main() -> None:
    """Read the command line, run, print a table and write JSON."""
    parser = arguments(__doc__, "active.json")
    parser.add_argument("start", help="a file of a structure, or a SMILES string")
    parser.add_argument("--label", default="gfn2")
    parser.add_argument("--temperature", type=float, default=500.0, help="K")
    parser.add_argument("--init", default="organic", help="model that learning starts from; none: random weights")
    parser.add_argument("--first", type=int, help="first labels")
    parser.add_argument("--limit", type=float, help="uncertainty that asks for a label, eV/angstrom")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--train-seconds", type=float, default=45.0)
    parser.add_argument("--final-seconds", type=float, default=120.0)
    parser.add_argument("--test", type=int, default=200, help="test frames")
    parser.add_argument("--every", type=int, default=20, help="steps between two frames of a trajectory")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = read(args.start) if Path(args.start).exists() else from_smiles(args.start, seed=args.seed)[0]
    test = trajectory(start, args.label, args.temperature, args.test, args.every, args.seed + 100)
    config = LearnConfig(
        label=args.label, init=args.init, first=args.first, limit=args.limit, temperature=args.temperature,
        minutes=args.minutes, rounds=args.rounds, seed=args.seed,
        train_seconds=args.train_seconds, final_seconds=args.final_seconds, processes=args.processes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        rounds = learn([start], Path(place) / "learned", config)
        if not rounds:
            raise SystemExit(
                f"no round began within --minutes {args.minutes:g}, the time of the first labels counts; give more "
                "minutes, or take fewer labels with --first"
            )
        labels = rounds[-1].labels + rounds[-1].new_labels
        seconds = len(rounds) * args.train_seconds + args.final_seconds
        rows = [
            [f"active, {args.init}", labels, seconds, *_errors(load_model(Path(place) / "learned/model-0.nbody"), test)]
        ]
        drawn = trajectory(start, args.label, args.temperature, 2 * labels, args.every, args.seed + 200)
        for times in (1, 2):
            # Spread over the whole trajectory
            data = DataSets(drawn.select(range(0, 2 * labels, 2 // times)), ())
            for init in dict.fromkeys((NO_INIT, args.init)):
                folder = Path(place) / f"random-{times}-{len(rows)}"
                make = trained if init == NO_INIT else functools.partial(tuned, init=init)
                potential = make(data, seconds, args.seed, folder)
                rows.append([f"dynamics of {args.label}, {init}", len(data.train), seconds, *_errors(potential, test)])
    head = ["labels from", "labels", "CPU s of training", "F MAE meV/A", "F RMSE meV/A", "E MAE meV"]
    print(f"\n{rounds_table(rounds)}\n")
    show(f"{len(test)} test frames", head, rows)
    records = [dict(zip(head, r, strict=True)) for r in rows]
    write(args.out, {"rounds": [dataclasses.asdict(one) for one in rounds], "rows": records})


def _errors(potential, test: Frames) -> list[float]:
    found = evaluate(potential, test).errors
    return [found["forces_mae"], found["forces_rmse"], found["energy_mae"]]


if __name__ == "__main__":
    main()
