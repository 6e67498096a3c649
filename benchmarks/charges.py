"""What latent charges are worth: ions in pairs and in clusters, behind a cutoff of 5 angstrom.

    python benchmarks/charges.py --data FOLDER --seconds 150    (80 are enough for pairs)

Two networks per task: configs/longrange/ions.yaml, and the same one without the energy of latent charges and with
more channels, until it has at least as many parameters. ``two_atoms`` is an ion pair from 1 to 10 angstrom (10,000
frames: 1,000 for training, 200 for validation, 2,000 for the test; "far" are those beyond 5 angstrom); ``cluster`` is
32 ions of one kind (2,500 frames: 1,500, 100 and 900). Both potentials are sums over pairs with a tail 1/r.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from report import arguments, finish, num_parameters, start, training_arguments

from nbody_pyg.datasets import read_frames, split_indices
from nbody_pyg.training import fit
from nbody_pyg.training.config import Config, load_config
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets, build_potential

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "longrange" / "ions.yaml"
#: File, frames for training, for validation, and for the test; weight of the energy. Where energies are hundreds of eV,
#: they all err to one side together at every step, and a larger weight drowns what forces say of the charges.
TASKS = {
    "two_atoms": ("two_atoms.npz", 1000, 200, 2000, 1.0),
    "cluster": ("3D_cluster_32_atoms_radius_5.npz", 1500, 100, 900, 0.001),
}
HEAD = ["task", "network", "parameters", "steps", "energy MAE meV", "force MAE meV/A", "far: energy MAE meV"]


def load(task: str, folder: Path) -> DataSets:
    """Frames of one task, split at random with a fixed seed; pairs beyond the cutoff are a test of their own."""
    name, num_train, num_val, num_test, _ = TASKS[task]
    frames = read_frames(folder / name, units="eV, angstrom")
    part = split_indices(len(frames), num_train, num_val, num_test, seed=0).apply(frames)
    tests = {"test": part.test}
    if task == "two_atoms":
        tests["far"] = [frame for frame in part.test if float((frame.pos[1] - frame.pos[0]).norm()) > 5.0]
    return DataSets(part.train, part.val, tests)


def flat(config: Config, data: DataSets, size: int) -> Config:
    """The configuration without long-range energy, with the fewest channels that give ``size`` parameters."""
    arguments = dict(config.model.arguments) | {"long_range": None}
    while True:
        found = replace(config, model=replace(config.model, arguments=arguments))
        if num_parameters(build_potential(found, data)) >= size:
            return found
        arguments = arguments | {"channels": arguments["channels"] + 1}


def train(config: Config, data: DataSets, folder: Path) -> dict[str, Any]:
    """Fit one network and measure it on every test set."""
    potential = build_potential(config, data)
    ready = data.with_topology(potential.model.scheme)
    result = fit(potential, ready.train, ready.val, config.training, folder, show_progress=False)
    record = {"parameters": num_parameters(potential), "steps": result.steps, "cpu_seconds": result.cpu_seconds}
    record["tests"] = {name: evaluate(potential, frames).errors for name, frames in ready.tests.items()}
    if potential.model.long_range is not None:
        record["charges"] = {k: v.tolist() for k, v in potential.model.long_range.state_dict().items() if v.numel() < 9}
    return record


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "charges.json")
    training_arguments(parser, 150.0, "the files of the tasks")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--networks", nargs="+", choices=["charges", "flat"], default=["charges", "flat"])
    args = parser.parse_args(argv)
    records, rows = [], []
    with start():
        for task in args.tasks:
            data = load(task, args.data)
            config = load_config(CONFIG, ["--" + word for word in args.set])
            weight = TASKS[task][-1]
            settings = replace(config.training, budget_seconds=args.seconds, seed=args.seed, energy_weight=weight)
            config = replace(config, training=settings)
            networks = {"charges": config, "flat": flat(config, data, num_parameters(build_potential(config, data)))}
            for name in args.networks:
                record = train(networks[name], data, args.out.parent / "charges" / f"{task}_{name}")
                records.append({"task": task, "network": name} | record)
                errors, far = record["tests"]["test"], record["tests"].get("far")
                rows.append(
                    [task, name, record["parameters"], record["steps"], f"{errors['energy_mae']:.3g}",
                     f"{errors['forces_mae']:.3g}", "" if far is None else f"{far['energy_mae']:.3g}"]
                )  # fmt: skip
                print(records[-1], flush=True)
    return finish(args.out, "", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
