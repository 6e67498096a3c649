"""Does the hierarchy help? Cumulenes: twisting one end of the chain against the other, beyond every local cutoff.

    python benchmarks/longrange.py --data FOLDER --tasks cumulene gnl --models survivors flat --seconds 300

Both networks see atoms within 4 angstrom, have about the same number of parameters and get the same CPU time, loss and
optimizer. ``cumulene``: C9H4, 500 frames of the dihedral profile for training, 100 for validation, 400 for the test;
``gnl``: the published training, validation and test frames, C3H4 to C16H4. The median predictor shows what a network
gets that has learned nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from report import arguments, finish, num_parameters, start, training_arguments

from nbody_pyg.datasets import fit_atomic_energies, read_frames, split_indices
from nbody_pyg.training import fit
from nbody_pyg.training.config import Config, load_config
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets, build_potential

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "longrange"
FILES = {"cumulene": "cumulene_profile.npz", "gnl": "gnl-v0.2-train.xyz"}
HEAD = [
    "task",
    "model",
    "parameters",
    "steps",
    "test set",
    "frames",
    "energy MAE eV",
    "force MAE eV/A",
    "median MAE eV",
]


def load(task: str, folder: Path) -> DataSets:
    """Frames of one task; the tests of gnl by the kind of extrapolation."""
    if task == "cumulene":
        frames = read_frames(folder / FILES[task], units="eV, angstrom")
        part = split_indices(len(frames), 500, 100, seed=0).apply(frames)
        return DataSets(part.train, part.val, {"test": part.test})
    train, val, test = (list(read_frames(folder / f"gnl-v0.2-{name}.xyz")) for name in ("train", "val", "test"))
    groups = {"in-domain": [], "C11, C12": [], "C15, C16": []}
    for frame in test:
        carbons = int((frame.z == 6).sum())
        name = "C11, C12" if carbons in (11, 12) else "C15, C16" if carbons in (15, 16) else "in-domain"
        groups[name].append(frame)
    return DataSets(train, val, groups)


def median_error(train: list, test: list) -> float:
    """MAE of the best constant per formula of the training set; per-composition energies where there is none."""
    reference = fit_atomic_energies(train, "lstsq")

    def rest(frames: list) -> np.ndarray:
        return np.array([float(f.energy) - sum(reference[z] for z in f.z.tolist()) for f in frames])

    return float(np.abs(rest(test) - np.median(rest(train))).mean())


def train(config: Config, data: DataSets, folder: Path) -> list[dict[str, Any]]:
    """Fit one network and measure it on every test set."""
    potential = build_potential(config, data)
    scheme = potential.model.scheme
    ready = data.with_topology(scheme)
    result = fit(potential, ready.train, ready.val, config.training, folder, show_progress=False)
    found = []
    for name, frames in ready.tests.items():
        errors = evaluate(potential, frames).errors
        found.append(
            {
                "model": repr(scheme),
                "parameters": num_parameters(potential.model),
                "steps": result.steps,
                "cpu_seconds": result.cpu_seconds,
                "set": name,
                "frames": len(frames),
                "median_mae_ev": median_error(list(data.train), list(data.tests[name])),
                "errors": errors,
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "longrange.json")
    training_arguments(parser, 300.0, "the files of the tasks")
    parser.add_argument("--tasks", nargs="+", choices=sorted(FILES), default=sorted(FILES))
    parser.add_argument("--models", nargs="+", default=["survivors", "flat"], help="configs/longrange/NAME.yaml")
    args = parser.parse_args(argv)
    records, rows = [], []
    with start():
        for task in args.tasks:
            data = load(task, args.data)
            for name in args.models:
                config = load_config(CONFIGS / f"{name}.yaml", ["--" + word for word in args.set])
                settings = replace(config.training, budget_seconds=args.seconds, seed=args.seed)
                folder = args.out.parent / "longrange" / f"{task}_{name}"
                for record in train(replace(config, training=settings), data, folder):
                    records.append({"task": task, "name": name} | record)
                    errors = record["errors"]
                    figures = errors["energy_mae"] / 1e3, errors["forces_mae"] / 1e3, record["median_mae_ev"]
                    rows.append(
                        [task, name, record["parameters"], record["steps"], record["set"], record["frames"]]
                        + [f"{figure:.4f}" for figure in figures]
                    )
                    print(rows[-1], flush=True)
    return finish(args.out, "", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
