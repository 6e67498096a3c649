"""Positions of charged particles: NBodyNet beside the published figures of other equivariant networks.

    python datasets/make_particles.py
    python benchmarks/particles.py --data datasets/particles --seconds 20 --seeds 0 1 2

Five particles of charge +-1; inputs are positions, velocities and charges, targets the positions 1,000 steps later.
3,000 systems for training, 2,000 for validation, 2,000 for the test. ``train`` is all that a user has to write. It has
every pair of particles as a part of a hierarchy (``--scheme shells``: a flat network instead), and uses three facts of
the equations: they do not depend on a common velocity, the total momentum is conserved, and charges of the other sign
give the same motion. ``--plain`` leaves these out. The rate falls to zero over the budget; nothing is chosen on the
test systems, and the weights of the last step are tested. The last row averages the predictions of all seeds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import arguments, finish, num_parameters, start
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch_geometric.nn import global_mean_pool

from nbody_pyg import AtomicData, FromAssignment, NBodyNet, NestedShells, Scheme
from nbody_pyg.training import FrameLoader, WarmupCosine, build_optimizer

#: Mean squared errors of the positions, from the papers; their 3,000 training systems have other random numbers.
PUBLISHED = {"linear": 0.0819, "SE(3)-Transformer": 0.0244, "TFN": 0.0155, "EGNN": 0.0071, "SEGNN": 0.0043,
             "CGENN": 0.0039}  # fmt: skip
HEAD = ["model", "seed", "parameters", "epochs", "CPU s", "MSE of validation", "MSE of the test"]


def load(folder: Path, name: str) -> list[AtomicData]:
    """The systems of one split."""
    with np.load(folder / f"{name}.npz") as arrays:
        rows = zip(*(torch.from_numpy(arrays[key]) for key in ("pos", "x", "y")), strict=True)
        return [AtomicData(pos=pos, x=x, y=y) for pos, x, y in rows]


def prepared(frames: Iterable[AtomicData], scheme: Scheme, plain: bool = False) -> list[AtomicData]:
    """The hierarchy of each system, the target as the displacement beyond uniform motion, and relative velocities."""
    found = []
    for frame in map(scheme, frames):
        charge, vel = frame.x[:, :1], frame.x[:, 1:]
        frame.y = (frame.y - frame.pos - vel).float()
        frame.x = torch.cat([charge, vel if plain else vel - vel.mean(0)], dim=1)
        found.append(frame)
    return found


def displacement(net: torch.nn.Module, batch: Any, plain: bool) -> torch.Tensor:
    """Of each particle beyond uniform motion; without ``plain`` it sums to zero, since momentum is conserved."""
    out: torch.Tensor = net(batch)
    return out if plain else out - global_mean_pool(out, batch.batch)[batch.batch]


def network(scheme: Scheme, seed: int, **size: Any) -> NBodyNet:
    """A network from charges and velocities to a vector for each particle."""
    torch.manual_seed(seed)
    return NBodyNet(None, scheme, **size, softening=0.1, node_inputs="0e + 1o", irreps_out="1o", readout="nodes")


def train(
    net: torch.nn.Module, frames: list[AtomicData], seconds: float, seed: int, plain: bool = False, systems: int = 100
) -> tuple[Any, int]:
    """The network fitted for some CPU seconds with batches of some systems, and the number of steps."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = build_optimizer("soap", net, lr=0.01, weight_decay=0.3)
    loader, rate = FrameLoader(frames, systems, shuffle=True, seed=seed, drop_last=True), WarmupCosine(50, 0.2)
    net(next(iter(loader))).sum().backward()  # compiles kernels
    begin, step, epoch, used = time.process_time(), 0, 0, 0.0
    while used < seconds:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.param_groups[0]["lr"] = 0.01 * rate(step, min(used / seconds, 1.0))
            if not plain:
                sign = torch.randint(2, (batch.num_graphs, 1)).double() * 2 - 1
                batch.x = torch.cat([batch.x[:, :1] * sign[batch.batch], batch.x[:, 1:]], dim=1)
            loss = ((displacement(net, batch, plain) - batch.y).square().sum(1) + 1e-4).sqrt().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(net)
            step, used = step + 1, time.process_time() - begin
            if used >= seconds:
                break
        epoch += 1
    return average.module, step


@torch.no_grad()
def predicted(net: torch.nn.Module, frames: list[AtomicData], plain: bool = False, systems: int = 500) -> torch.Tensor:
    """Displacements of all particles, beyond uniform motion."""
    return torch.cat([displacement(net, batch, plain) for batch in FrameLoader(frames, systems)])


def parsed(
    parser: argparse.ArgumentParser, argv: list[str] | None, seconds: float, correlation: int
) -> tuple[argparse.Namespace, dict[str, int]]:
    """The arguments, with those of training and of the size of the networks, and the latter by their names."""
    parser.add_argument("--seconds", type=float, default=seconds, help="CPU time of training for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    sizes = {"channels": 8, "lmax": 2, "correlation": correlation}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    return args, {name: getattr(args, name) for name in sizes}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "particles.json")
    parser.add_argument("--data", type=Path, required=True, help="folder that datasets/make_particles.py wrote")
    parser.add_argument("--scheme", choices=["pairs", "shells"], default="pairs", help="hierarchy of the network")
    parser.add_argument("--plain", action="store_true", help="use none of the three facts of the equations")
    args, size = parsed(parser, argv, seconds=20.0, correlation=4)
    sets = {name: load(args.data, name) for name in ("train", "val", "test")}
    pairs = list(itertools.combinations(range(len(sets["train"][0].pos)), 2))
    scheme = NestedShells((10.0, 10.0, 10.0), exponent=6)
    if args.scheme == "pairs":
        scheme = FromAssignment(parts=pairs, cutoff=10.0, part_cutoffs=(None,))
    frames = {name: prepared(rows, scheme, args.plain) for name, rows in sets.items()}
    truth = {part: torch.cat([frame.y for frame in frames[part]]) for part in ("val", "test")}
    found: dict[str, list[torch.Tensor]] = {part: [] for part in truth}
    records, rows = [], [[name, "", "", "", "", "", f"{value:.4f}"] for name, value in PUBLISHED.items()]
    name = f"NBodyNet, {args.scheme}{', plain' if args.plain else ''}"
    with start():
        for seed in args.seeds:
            begin = time.process_time()
            net, steps = train(network(scheme, seed, **size), frames["train"], args.seconds, seed, args.plain)
            epochs = max(1, steps // (len(frames["train"]) // 100))
            record = {"model": name, "seed": seed, "parameters": num_parameters(net),
                      "epochs": epochs, "cpu_seconds": time.process_time() - begin}  # fmt: skip
            for part, values in found.items():
                values.append(predicted(net, frames[part], args.plain))
                record[part] = float((values[-1] - truth[part]).square().mean())
            records.append(record)
            print(record, flush=True)
    if len(args.seeds) > 1:
        total = {key: sum(record[key] for record in records) for key in ("parameters", "epochs", "cpu_seconds")}
        mean = {part: torch.stack(values).mean(0) for part, values in found.items()}
        errors = {part: float((values - truth[part]).square().mean()) for part, values in mean.items()}
        records.append({"model": name, "seed": "mean of all"} | total | errors)
    for r in records:
        numbers = [f"{r['cpu_seconds']:.0f}", f"{r['val']:.5f}", f"{r['test']:.5f}"]
        rows.append([r["model"], r["seed"], r["parameters"], r["epochs"], *numbers])
    return finish(args.out, "Charged particles, 3,000 systems for training", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
