"""Electrostatic energies of dimers: trained where the monomers are near, tested on ions further apart.

    python benchmarks/sapt.py --data FOLDER --seconds 300

SAPT10k (FOLDER/sapt10k.zip): 9,948 dimers with energies of symmetry-adapted perturbation theory. The energy of
interaction is E(AB) - E(A) - E(B) of one network, so it is zero for monomers that do not see each other. Training and
a random test use dimers whose centres of mass are nearer than ``--split``; the other tests are those beyond it: ion
pairs, one ion, neither. ``charges`` has latent charges, and is told the total charge of each monomer, spread over its
atoms; in ``learned`` the strength of these charges is fitted as well; ``local`` is the same network without them, and
with more channels, until it has at least as many parameters.
``k q q / R`` is no network: point charges at the centres of mass. Then B of every ion pair is moved away: at large R
the energy must be k q q / R, and a table shows what share of it a network gives. Prints tables, writes JSON and a plot.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from ase.io import iread
from report import arguments, show, start, write
from torch import Tensor

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import split_indices
from nbody_pyg.training.clock import ProcessClock
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.optim import build_optimizer
from nbody_pyg.training.schedule import WarmupCosine
from nbody_pyg.units import COULOMB, ENERGY_UNITS

SCHEME = NestedShells((4.0, 4.0), exponent=6)
NETWORK = {"channels": 16, "lmax": 1, "correlation": 2}
LONG_RANGE = {"method": "direct", "channels": 2, "dipoles": True, "width": 0.5, "coulomb": True}
NETWORKS = {"charges": LONG_RANGE, "learned": LONG_RANGE | {"coulomb": False}, "local": None}
LABELS = ("Elst", "benchmark_Eint")
#: Distances of the centres of mass to which monomers are moved, angstrom.
TAIL = (8.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
HEAD = ["network", "parameters", "steps"]


class Dimer(NamedTuple):
    """Two monomers with formal total charges (e), centres of mass ``distance`` apart (angstrom), and a label (eV)."""

    first: AtomicData
    second: AtomicData
    charge: tuple[float, float]
    axis: Tensor
    distance: float
    energy: float

    @property
    def ions(self) -> int:
        return sum(q != 0 for q in self.charge)

    def coulomb(self, distance: float | None = None) -> float:
        """Energy of point charges at the centres of mass, eV."""
        return COULOMB * self.charge[0] * self.charge[1] / (self.distance if distance is None else distance)

    def joined(self, distance: float | None = None) -> AtomicData:
        """Both monomers, the second one moved along the axis to another distance."""
        shift = 0.0 if distance is None else (distance - self.distance) * self.axis
        keys = {key: torch.cat([self.first[key], self.second[key]]) for key in ("z", "charges")}
        return AtomicData(pos=torch.cat([self.first.pos, self.second.pos + shift]), **keys)


def load(path: Path, label: str) -> list[Dimer]:
    """All dimers of the archive; the copies with monomers far apart are left out."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".xyz") and not n.startswith("__"))
        text = io.StringIO(archive.read(name).decode())
    found = []
    for atoms in iread(text, index=":", format="extxyz"):
        info = atoms.info
        if info["structure_type"] != "dimer_original":
            continue
        size = int(info["num_a"])
        charge = float(info["charge_a"]), float(info["charge_b"])
        parts, centres = [], []
        for part, q in zip((atoms[:size], atoms[size:]), charge, strict=True):
            data = AtomicData.from_ase(part, labels=False)
            parts.append(AtomicData(z=data.z, pos=data.pos, charges=torch.full((len(part),), q / len(part)).double()))
            centres.append(part.get_center_of_mass())
        axis = torch.as_tensor(centres[1] - centres[0])
        distance = float(axis.norm())
        found.append(Dimer(*parts, charge, axis / distance, distance, info[label] * ENERGY_UNITS["kcal/mol"]))
    return found


def split(dimers: Sequence[Dimer], distance: float, seed: int) -> tuple[list[Dimer], dict[str, list[Dimer]]]:
    """Nine tenths of the near dimers for training; the others, and those beyond, for the tests."""
    near = [d for d in dimers if d.distance < distance]
    beyond = [d for d in dimers if d.distance >= distance]
    part = split_indices(len(near), math.ceil(0.9 * len(near)), 0, seed=seed).apply(near)
    tests = {"near": list(part.test)}
    for name, ions in (("ion pairs", 2), ("one ion", 1), ("neutral", 0)):
        tests[f"beyond, {name}"] = [d for d in beyond if d.ions == ions]
    return list(part.train), {name: test for name, test in tests.items() if test}


class Prepared:
    """Dimers and their monomers with topologies, in three loaders that keep step."""

    def __init__(
        self, dimers: Sequence[Dimer], batch_size: int, shuffle: bool, distance: float | None = None, seed: int = 0
    ) -> None:
        parts = ([d.joined(distance) for d in dimers], [d.first for d in dimers], [d.second for d in dimers])
        for frame, dimer in zip(parts[0], dimers, strict=True):
            frame.energy = torch.tensor([dimer.energy], dtype=torch.float64)
        self.loaders = [
            FrameLoader([SCHEME(frame) for frame in frames], batch_size, shuffle=shuffle, seed=seed) for frames in parts
        ]

    def __iter__(self):
        return zip(*self.loaders, strict=True)


def interaction(net: NBodyNet, batches: Sequence[Any]) -> Tensor:
    """E(AB) - E(A) - E(B), eV; a network without charges is not told them, on purpose, for it would refuse."""
    if "charge" not in net.used:
        for batch in batches:
            batch.charges = None
    whole, first, second = (net(batch) for batch in batches)
    return whole - first - second


@torch.no_grad()
def predict(net: NBodyNet, dimers: Sequence[Dimer], distance: float | None = None) -> np.ndarray:
    found = [interaction(net, batches) for batches in Prepared(dimers, 50, False, distance)]
    return torch.cat(found).double().numpy()


def network(kind: str, species: Sequence[int], channels: int, seed: int) -> NBodyNet:
    torch.manual_seed(seed)
    options = NETWORK | {"channels": channels, "long_range": NETWORKS[kind]}
    return NBodyNet(species, SCHEME, **options)


def size(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def train(net: NBodyNet, dimers: Sequence[Dimer], seconds: float, batch_size: int, seed: int) -> int:
    """Energies alone, by SOAP, for so much CPU time; the network ends with the average of its last weights."""
    data, clock = Prepared(dimers, batch_size, True, seed=seed), ProcessClock()
    optimizer, schedule, lr = build_optimizer("soap", net, lr=0.01), WarmupCosine(), 0.01
    weights = [p.detach() for p in net.parameters()]
    average, steps, epoch = [w.clone() for w in weights], 0, 0
    clock.start()
    while clock.elapsed < seconds:
        for loader in data.loaders:
            loader.set_epoch(epoch)
        epoch += 1
        for batches in data:
            progress = clock.elapsed / seconds
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(steps, progress)
            # Energies of ions are thirty times those of the others: not squared, or they are all that counts
            error = interaction(net, batches) - batches[0].energy.to(net.dtype)
            loss = torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            steps += 1
            torch._foreach_lerp_(average, weights, 1.0 - min(0.99, steps / (9.0 + steps)))
    torch._foreach_copy_(weights, average)
    return steps


def measure(net: NBodyNet, tests: dict[str, list[Dimer]], pairs: list[Dimer]) -> dict[str, Any]:
    """Errors of every test (meV), and what share of k q q / R ion pairs have at growing distances."""
    errors, values = {}, {}
    for name, dimers in tests.items():
        values[name] = predict(net, dimers)
        errors[name] = 1e3 * float(np.abs(values[name] - [d.energy for d in dimers]).mean())
    tail = {}
    for distance in TAIL if pairs else ():
        share = predict(net, pairs, distance) / np.array([d.coulomb(distance) for d in pairs])
        tail[distance] = {"median": float(np.median(share)), "low": float(share.min()), "high": float(share.max())}
    return {"mae_mev": errors, "tail": tail, "values": {name: v.tolist() for name, v in values.items()}}


def plot(records: list[dict[str, Any]], tests: dict[str, list[Dimer]], path: Path) -> None:
    name = "beyond, ion pairs" if "beyond, ion pairs" in tests else "near"
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    wanted = np.array([d.energy for d in tests[name]])
    distance = np.array([d.distance for d in tests[name]])
    for record, colour in zip(records, ("tab:blue", "tab:red", "tab:gray"), strict=False):
        values, label = np.array(record["values"][name]), record["network"]
        axes[0].plot(wanted, values, "o", color=colour, ms=4, alpha=0.7, mew=0, label=label)
        axes[1].plot(distance, 1e3 * np.abs(values - wanted), "o", color=colour, ms=4, alpha=0.7, mew=0, label=label)
        if record["tail"]:
            r, share = list(record["tail"]), [row["median"] for row in record["tail"].values()]
            low, high = ([row[key] for row in record["tail"].values()] for key in ("low", "high"))
            axes[2].fill_between(r, low, high, color=colour, alpha=0.15, lw=0)
            axes[2].semilogx(r, share, "o-", color=colour, ms=4, label=label)
    ends = [wanted.min() - 0.2, wanted.max() + 0.2]
    axes[0].plot(ends, ends, color="tab:gray", lw=0.8, zorder=0)
    axes[0].set(xlabel="reference (eV)", ylabel="prediction (eV)", title=f"{name}: energy", xlim=ends)
    axes[1].set(xlabel="distance of the centres (angstrom)", ylabel="|error| (meV)", title=f"{name}: error")
    axes[1].set_yscale("log")
    axes[2].set(
        xlabel="distance of the centres (angstrom)", ylabel="energy / (k q q / R)", title="ion pairs moved apart"
    )
    axes[2].axhline(1.0, color="tab:gray", lw=0.8, zorder=0)
    axes[2].set_xticks([10, 20, 50, 100], labels=["10", "20", "50", "100"])
    axes[2].minorticks_off()
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "sapt.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with sapt10k.zip")
    parser.add_argument("--label", choices=LABELS, default=LABELS[0], help="electrostatic or total interaction energy")
    parser.add_argument("--split", type=float, default=4.5, help="distance of the centres of mass, angstrom")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=["charges", "local"])
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU time of training for each network")
    parser.add_argument("--batch", type=int, default=20, help="dimers per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    path = args.data / "sapt10k.zip"
    if not path.is_file():
        print(f"skipped: there is no {path}; it is part of the repository general-molecular-simulations/so3lr")
        return 0
    with start():
        dimers = load(path, args.label)
        training, tests = split(dimers, args.split, args.seed)
        pairs = tests.get("beyond, ion pairs", [])
        species = sorted({int(z) for d in dimers for z in d.joined().z})
        # Both have at least so many parameters
        least = size(network("charges", species, NETWORK["channels"], args.seed))
        records = []
        for kind in args.networks:
            channels = NETWORK["channels"]
            while size(net := network(kind, species, channels, args.seed)) < least:
                channels += 1
            steps = train(net, training, args.seconds, args.batch, args.seed)
            record = {"network": kind, "parameters": size(net), "steps": steps} | measure(net, tests, pairs)
            records.append(record)
            print(kind, steps, record["mae_mev"], flush=True)
    formula = {name: [d.coulomb() for d in some] for name, some in tests.items()}
    errors = {n: 1e3 * float(np.abs(np.array(v) - [d.energy for d in tests[n]]).mean()) for n, v in formula.items()}
    records.append(
        {"network": "k q q / R", "parameters": 0, "steps": 0, "mae_mev": errors, "values": formula, "tail": {}}
    )
    counts = {name: len(some) for name, some in tests.items()}
    rows = [[r["network"], r["parameters"], r["steps"], *(f"{r['mae_mev'][n]:.3g}" for n in tests)] for r in records]
    print(f"\n{len(training)} dimers nearer than {args.split:g} angstrom for training; test dimers: {counts}")
    show(f"MAE of {args.label}, meV", [*HEAD, *tests], rows)
    if pairs:
        rows = [
            [r["network"], *(f"{t['median']:.3f} ({t['low']:.2f}..{t['high']:.2f})" for t in r["tail"].values())]
            for r in records
            if r["tail"]
        ]
        show("Share of k q q / R, median and range over ion pairs", ["network", *(f"{r:g} A" for r in TAIL)], rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture = args.out.with_suffix(".png")
    plot(records, tests, picture)
    write(args.out, {"training": len(training), "tests": counts, "label": args.label, "results": records})
    print(f"plot in {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
