"""What a trained model is worth as a start: rMD17 from few frames, from scratch and fine-tuned in three ways.

    python benchmarks/finetune.py --init MODEL --data FOLDER --frames 10 50 200 950

From scratch the settings are those of configs/rmd17_50.yaml up to 200 frames, and of configs/rmd17.yaml above.
Fine-tuned models have the defaults of ``nbody train --init``. All runs have one limit of CPU seconds, no validation
frames, and the averaged weights of their end. Frames are the first ones of split 01, errors those of its test frames.
``--val 50`` gives errors on frames 950 to 999 instead, on which settings are chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import arguments, finish, start, training_arguments

from nbody_pyg.datasets import load_rmd17
from nbody_pyg.deploy import load_model
from nbody_pyg.training import fit
from nbody_pyg.training.config import load_config
from nbody_pyg.training.defaults import choose_defaults
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.finetune import tuned_model
from nbody_pyg.training.inherited import with_architecture
from nbody_pyg.training.prepare import build_potential, load_data
from nbody_pyg.training.settings import PARTS

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MOLECULES = ("aspirin", "ethanol", "malonaldehyde", "naphthalene")
WAYS = ("scratch", *PARTS)
#: Largest number of frames for which the settings from scratch are those for few frames.
FEW = 200
HEAD = ["molecule", "frames", "way", "CPU s of training", "steps", "E MAE meV", "F MAE meV/A"]


def words_of(molecule: str, count: int, args: Any) -> list[str]:
    """Overrides of the configuration that all runs share."""
    limits = [f"--training.budget_seconds={args.seconds}"]
    limits += [] if args.steps is None else [f"--training.max_steps={args.steps}"]
    data = [f"--data.rmd17={molecule}", f"--data.root={args.data}", f"--data.num_train={count}", "--data.num_val=0"]
    return [*data, *limits, f"--training.seed={args.seed}", *("--" + word for word in args.set)]


def learn(molecule: str, count: int, way: str, args: Any) -> dict[str, Any]:
    """The record of one run."""
    words = words_of(molecule, count, args)
    folder = args.out.parent / "finetune" / f"{molecule}_{count}_{way}"
    if way == "scratch":
        config = load_config(CONFIGS / ("rmd17_50.yaml" if count <= FEW else "rmd17.yaml"), words)
        data = load_data(config.data)
        model, settings, extra = build_potential(config, data), config.training, {}
    else:
        init = load_model(args.init)
        config = load_config(None, [*words, f"--init={args.init}", f"--finetune.parts={way}"])
        data = load_data(config.data)
        config, _ = choose_defaults(with_architecture(config, init), data)
        model, _ = tuned_model(init, data.train, config.data.e0)
        settings, extra = config.training, {"init": init, "finetune": config.finetune}
    data = data.with_topology(model.network.scheme, config.data.shares_hierarchy)
    (frames,) = data.tests.values() if args.val is None else (held_back(molecule, args),)
    before = evaluate(model, frames[: args.test]).errors["forces_mae"] if args.start else None
    result = fit(model, data.train, (), settings, folder, show_progress=False, **extra)
    errors = evaluate(model, frames[: args.test]).errors
    record = {"molecule": molecule, "frames": count, "way": way, "cpu_seconds": result.cpu_seconds,
              "steps": result.steps, "lr": settings.lr, "start_forces_mae": before} | errors  # fmt: skip
    print(record, flush=True)
    return record


def held_back(molecule: str, args: Any) -> Any:
    """The last frames of the first 1,000, which no run trains on."""
    return load_rmd17(args.data, molecule, num_train=1000 - args.val, num_val=args.val).val


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "finetune.json")
    parser.add_argument("--init", required=True, help="model file, or name of a shipped model, to start from")
    training_arguments(parser, 60.0, "the files of rMD17")
    parser.add_argument("--molecules", nargs="+", choices=MOLECULES, default=MOLECULES)
    parser.add_argument("--frames", nargs="+", type=int, default=[10, 50, 200, 950], help="numbers of training frames")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, help="largest number of steps of every run")
    parser.add_argument("--test", type=int, default=1000, help="number of test frames")
    parser.add_argument("--val", type=int, help="number of validation frames for the errors, instead of test frames")
    parser.add_argument("--start", action="store_true", help="also report the errors before training")
    args = parser.parse_args(argv)
    with start():
        records = [learn(m, n, way, args) for m in args.molecules for n in args.frames for way in args.ways]
    rows = [
        [r["molecule"], r["frames"], r["way"], f"{r['cpu_seconds']:.0f}", r["steps"], f"{r['energy_mae']:.2f}",
         f"{r['forces_mae']:.2f}"]
        for r in records
    ]  # fmt: skip
    return finish(args.out, "", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
