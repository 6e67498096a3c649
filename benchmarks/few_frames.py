"""What 50 frames are enough for: rMD17 from the first 50 frames of split 01, one network and committees of several.

    python benchmarks/few_frames.py --data FOLDER --members 3

Every member has the settings of configs/rmd17_50.yaml and a seed of its own. A committee predicts the mean of its
members: their errors on frames far from all training frames differ, and partly cancel. Its cost is that of all members
together, in training and in use. MACE's figures are the published ones (arXiv:2206.07697, 50 configurations).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import arguments, finish, start
from torch_geometric.data import Batch

from nbody_pyg.hierarchy import Scheme
from nbody_pyg.training import fit
from nbody_pyg.training.config import load_config
from nbody_pyg.training.evaluation import Evaluation, evaluate
from nbody_pyg.training.metrics import ErrorMeter
from nbody_pyg.training.prepare import build_potential, load_data

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "rmd17_50.yaml"
#: Published errors of MACE from 50 frames: energy meV, forces meV/A.
MACE = {"aspirin": (17.0, 43.9), "ethanol": (6.7, 32.6), "malonaldehyde": (10.0, 43.3), "naphthalene": (2.1, 9.2)}
HEAD = ["molecule", "members", "CPU s of training", "E MAE meV", "F MAE meV/A", "MACE's E", "MACE's F"]


def errors(labels: Batch, members: list[Evaluation]) -> dict[str, float]:
    """Errors of the mean of some predictions."""
    meter = ErrorMeter()
    energy = torch.stack([member.energy.double() for member in members]).mean(0)
    forces = torch.stack([torch.cat(member.forces) for member in members]).mean(0)
    meter.update({"energy": energy, "forces": forces}, labels)
    return meter.compute()


def learn(molecule: str, args: Any) -> list[dict[str, Any]]:
    """Records of one molecule: the first member, then committees of the first two, three, ..."""
    words = [f"--data.rmd17={molecule}", f"--data.root={args.data}", *("--" + word for word in args.set)]
    config = load_config(CONFIG, words)
    scheme = Scheme.from_config(dict(config.model.scheme))
    data = load_data(config.data).with_topology(scheme, config.data.shares_hierarchy)
    (frames,) = data.tests.values()
    labels = Batch.from_data_list(list(frames))
    records, members, seconds = [], [], 0.0
    for seed in range(args.members):
        settings = replace(config.training, seed=seed)
        potential = build_potential(replace(config, training=settings), data)
        folder = args.out.parent / "few_frames" / f"{molecule}_{seed}"
        seconds += fit(potential, data.train, (), settings, folder, show_progress=False).cpu_seconds
        members.append(evaluate(potential, frames))
        record = {"molecule": molecule, "members": seed + 1, "cpu_seconds": seconds} | errors(labels, members)
        records.append(record | {"last_member": errors(labels, members[-1:])})
        print(records[-1], flush=True)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "few_frames.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of rMD17")
    parser.add_argument("--molecules", nargs="+", choices=sorted(MACE), default=sorted(MACE))
    parser.add_argument("--members", type=int, default=3, help="networks of a committee")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the configuration")
    args = parser.parse_args(argv)
    with start():
        records = [record for molecule in args.molecules for record in learn(molecule, args)]
    rows = [
        [r["molecule"], r["members"], f"{r['cpu_seconds']:.0f}", f"{r['energy_mae']:.1f}", f"{r['forces_mae']:.2f}",
         *MACE[r["molecule"]]]
        for r in records
    ]  # fmt: skip
    return finish(args.out, "", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
