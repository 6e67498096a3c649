"""Bound clusters of charged particles: does a hierarchy of clusters pay? Flat networks, hierarchies and an EGNN.

    python datasets/make_particles.py --bound --out FOLDER
    python benchmarks/clusters.py --data FOLDER --seeds 0 1 2

Ten clusters of ten particles that springs bind; charges of +-1 act on all others. Inputs are positions, velocities and
charges, targets the positions 250 steps later. Every network gets the same CPU time, the same loop (that of
``particles.py``), batches, optimizer and facts of the equations: no common velocity, conserved momentum, charges of
the other sign give the same motion. The mean squared error is divided into that of the centres of the clusters and the
rest, the motion inside of them. Three rows have no network: the mean velocity of the system, the velocity of each
centre, and the exact motion without forces between clusters, which is the limit of a model that looks at one cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from particles import network, parsed, predicted, train
from report import arguments, finish, num_parameters, start
from torch import Tensor, nn
from torch_geometric.nn import MLP, MessagePassing
from torch_geometric.utils import scatter

from nbody_pyg import AtomicData, FromAssignment, NestedShells, Scheme, SmoothSurvivors
from nbody_pyg.datasets.clusters import CLUSTER_STEPS_BETWEEN, CLUSTER_TIME_STEP
from nbody_pyg.models import compute_avg_num_neighbors

#: Radius within which the particles of a cluster are neighbours, and one within which all particles of a system lie.
NEAR, ALL = 4.0, 40.0
#: Systems of a batch; an EGNN would make too few steps with as many.
SYSTEMS, SYSTEMS_EGNN = 10, 2


#: Settings of the parts that are found; their radial functions have the length that FromAssignment takes.
FOUND: dict[str, Any] = {"radii": (2.9,), "cutoffs": (NEAR, ALL), "centre": "mean", "width": 0.02}
SCHEMES: dict[str, Scheme] = {
    "near": NestedShells((NEAR, NEAR, NEAR)),
    "wide": NestedShells((NEAR, 10.0, 10.0)),
    "near and all": NestedShells((NEAR, NEAR, ALL)),
    "all pairs": NestedShells((ALL, ALL)),
    "clusters": FromAssignment(cutoff=NEAR, part_cutoffs=(ALL,)),
    "clusters without pairs": FromAssignment(cutoff=NEAR, part_cutoffs=(None,)),
    "survivors": SmoothSurvivors(**FOUND),
    "survivors, length 5.9": SmoothSurvivors(**FOUND, lengths=(5.8725,)),  # the reach of a part
}
HEAD = ["model", "seed", "parameters", "steps", "ms/step", "CPU s", "MSE of validation", "MSE of the test",
        "of centres", "inside"]  # fmt: skip


class EGNNLayer(MessagePassing):
    """A layer of EGNN with velocities (arXiv:2102.09844, equations 3 to 7), after which particles have moved."""

    def __init__(self, channels: int) -> None:
        super().__init__(aggr="mean")
        self.ends = nn.Linear(channels, 2 * channels)  # the first layer on h_i and h_j, computed at the nodes
        self.pair = nn.Linear(2, channels)
        self.edge = nn.Sequential(nn.SiLU(), nn.Linear(channels, channels), nn.SiLU())
        self.pull = MLP([channels, channels, 1], norm=None, act="silu")
        self.scale = MLP([channels, channels, 1], norm=None, act="silu")
        self.node = MLP([2 * channels, channels, channels], norm=None, act="silu")

    def forward(self, h: Tensor, pos: Tensor, vel: Tensor, charge: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        end, begin = self.ends(h).chunk(2, dim=1)
        out = self.propagate(edges, begin=begin, end=end, pos=pos, charge=charge)
        vel = self.scale(h) * vel + out[:, :3]
        return h + self.node(torch.cat([h, out[:, 3:]], dim=1)), pos + vel

    def message(
        self, begin_j: Tensor, end_i: Tensor, pos_i: Tensor, pos_j: Tensor, charge_i: Tensor, charge_j: Tensor
    ) -> Tensor:
        vec = pos_i - pos_j
        square = vec.square().sum(1, keepdim=True)
        sent = self.edge(begin_j + end_i + self.pair(torch.cat([square, charge_i * charge_j], dim=1)))
        return torch.cat([vec / (1.0 + square.sqrt()) * self.pull(sent), sent], dim=1)


class EGNN(nn.Module):
    """Four layers on all pairs of particles, as in the benchmark of its paper; graphs of one size.

    Vectors are divided by 1 + r, which keeps it stable on systems that are 20 wide.
    """

    def __init__(self, channels: int, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, channels)
        self.layers = nn.ModuleList(EGNNLayer(channels) for _ in range(layers))

    def forward(self, batch: Any) -> Tensor:
        size = batch.num_nodes // batch.num_graphs
        first, second = (~torch.eye(size, dtype=torch.bool)).nonzero().t()
        offset = torch.arange(batch.num_graphs).unsqueeze(1) * size
        edges = torch.stack([(first + offset).flatten(), (second + offset).flatten()])
        x = batch.x.to(self.embedding.weight.dtype)
        charge, vel = x[:, :1], x[:, 1:]
        begin = (batch.pos - scatter(batch.pos, batch.batch, reduce="mean")[batch.batch]).to(x.dtype)
        h, pos = self.embedding(vel.norm(dim=1, keepdim=True)), begin
        for layer in self.layers:
            h, pos = layer(h, pos, vel, charge, edges)
        return pos - begin


def load(folder: Path, name: str) -> list[AtomicData]:
    """The systems of one split, with targets and velocities relative to the motion of the whole system."""
    with np.load(folder / f"{name}.npz") as arrays:
        keys = ("pos", "x", "y", "alone", "labels")
        rows = zip(*(torch.from_numpy(arrays[key]) for key in keys), strict=True)
    frames = []
    for pos, x, y, alone, labels in rows:
        mean = x[:, 1:].mean(0)
        uniform = pos + mean * CLUSTER_TIME_STEP * CLUSTER_STEPS_BETWEEN
        x = torch.cat([x[:, :1], x[:, 1:] - mean], dim=1)
        y, alone = (y - uniform).float(), (alone - uniform).float()
        frames.append(AtomicData(pos=pos, x=x, y=y, alone=alone, labels=labels))
    return frames


def errors(value: Tensor, frames: list[AtomicData]) -> dict[str, float]:
    """Mean squared error per component, and its two parts: of the centres of clusters, and the rest."""
    off = value - torch.cat([frame.y for frame in frames])
    first = np.cumsum([0] + [int(frame.labels.max()) + 1 for frame in frames[:-1]]).tolist()
    number = torch.cat([frame.labels + offset for frame, offset in zip(frames, first, strict=True)])
    centre = scatter(off, number, reduce="mean")[number]
    return {"mse": float(off.square().mean()), "centres": float(centre.square().mean()),
            "inside": float((off - centre).square().mean())}  # fmt: skip


def drifting(frame: AtomicData) -> Tensor:
    """Displacements if every centre kept its velocity and no particle moved inside its cluster."""
    vel = scatter(frame.x[:, 1:], frame.labels, reduce="mean")[frame.labels]
    return (vel * CLUSTER_TIME_STEP * CLUSTER_STEPS_BETWEEN).float()


#: Predictions without a network.
SIMPLE: dict[str, Callable[[AtomicData], Tensor]] = {
    "the whole system moves uniformly": lambda frame: torch.zeros_like(frame.y),
    "every centre moves uniformly": drifting,
    "no forces between clusters, exact": lambda frame: frame.alone,
}


def build(name: str, frames: list[AtomicData], seed: int, size: dict[str, Any], channels: int) -> nn.Module:
    """A network by its name."""
    if name == "EGNN":
        torch.manual_seed(seed)
        return EGNN(channels)
    neighbours = compute_avg_num_neighbors(SCHEMES[name], frames[:20])
    return network(SCHEMES[name], seed, **size, avg_num_neighbors=neighbours)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "clusters.json")
    parser.add_argument("--data", type=Path, required=True, help="folder of datasets/make_particles.py --bound")
    parser.add_argument("--models", nargs="+", choices=[*SCHEMES, "EGNN"], default=[*SCHEMES, "EGNN"])
    parser.add_argument("--egnn-channels", type=int, default=20)
    args, size = parsed(parser, argv, seconds=45.0, correlation=3)
    sets = {name: load(args.data, name) for name in ("train", "val", "test")}
    records: list[dict[str, Any]] = []
    for name, predict in SIMPLE.items():
        found = {part: errors(torch.cat([predict(f) for f in sets[part]]), sets[part]) for part in ("val", "test")}
        records.append({"model": name} | found)
    with start():
        for name in args.models:
            scheme = SCHEMES.get(name)
            frames = {part: rows if scheme is None else list(map(scheme, rows)) for part, rows in sets.items()}
            for seed in args.seeds:
                net = build(name, frames["train"], seed, size, args.egnn_channels)
                begin = time.process_time()
                systems = SYSTEMS_EGNN if scheme is None else SYSTEMS
                fitted, steps = train(net, frames["train"], args.seconds, seed, systems=systems)
                spent = time.process_time() - begin
                found = {p: errors(predicted(fitted, frames[p], systems=systems), sets[p]) for p in ("val", "test")}
                records.append({"model": name, "seed": seed, "parameters": num_parameters(net), "steps": steps,
                                "ms_per_step": 1e3 * spent / steps, "cpu_seconds": spent} | found)  # fmt: skip
                print(records[-1], flush=True)
    rows = []
    for r in records:
        timing = [r.get(key) for key in ("seed", "parameters", "steps", "ms_per_step", "cpu_seconds")]
        values = [r["val"]["mse"], *(r["test"][key] for key in ("mse", "centres", "inside"))]
        rows.append([r["model"], *timing, *(f"{value:.4f}" for value in values)])
    return finish(args.out, "Bound clusters of charged particles", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
