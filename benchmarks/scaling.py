"""How time and memory of energy and forces grow with atoms, neighbours, lmax and channels.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --training    # a training step with one thread and with several

NBodyNet with the settings of configs/rmd17.yaml, but shells of 5 angstrom as the peers have, on droplets of water, one
thread, float32. The topology is handed in; building it (neighbour search included) is timed in a column of its own.
Exponents are slopes of log-log fits to the minima; time per atom is nearly constant where the exponent of the atoms
is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import yaml
from models import Runner
from peers import CONFIG, Timed
from report import arguments, show, start, write
from systems import System, copies, molecule, water
from timing import exponent, interleave, on_the_clock, peak_memory
from torch import Tensor

from nbody_pyg import NBodyNet
from nbody_pyg.potential import Potential

#: Atoms from which on the exponent is quoted: below, the fixed cost of a call shows.
_LARGE = 300
#: Steps in a sample of training: SOAP refreshes its bases in one of ten.
_STEPS = 10
TRAINING = ["molecules", "atoms", "threads", "ms with one thread", "ms with several", "times faster"]
HEAD = ["atoms", "neighbours", "E+F ms", "min", "us per atom", "memory MB", "topology ms"]


def build(cutoff: float | None = 5.0, **settings: Any) -> Potential:
    """The network of the configuration, with some settings changed; without a cutoff it keeps its shells."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
    scheme = config["scheme"]
    if cutoff is not None:
        scheme = scheme | {"radii": [cutoff] * len(scheme["radii"])}
    torch.manual_seed(0)
    return Potential(NBodyNet.from_config({"species": [1, 8], **config, "scheme": scheme, **settings}))


def functions(potential: Potential, system: System) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """E+F, the search for the topology, and the mean number of neighbours."""
    scheme = potential.model.scheme
    topology = scheme.topology(system.z, system.pos)
    neighbours = topology.child_index[1].shape[1] / system.num_atoms - 1  # every part is its own child

    def evaluate() -> dict[str, Tensor]:
        return potential(system.z, system.pos, system.batch, topology=topology)

    return evaluate, lambda: scheme.topology(system.z, system.pos), neighbours


def sweep(name: str, values: list, cases: list[tuple[Potential, System]], seconds: float) -> dict[str, Any]:
    """Time and memory of every case, the fitted exponents, and a table."""
    records, rows = [], []
    for value, (potential, system) in zip(values, cases, strict=True):
        evaluate, search, neighbours = functions(potential, system)
        evaluate()
        memory = peak_memory(evaluate)
        times = interleave({"evaluate": evaluate, "search": search}, seconds)
        best = times["evaluate"].minimum
        records.append(
            {
                name: value, "atoms": system.num_atoms, "neighbours": neighbours, "memory_bytes": memory,
                "evaluate": times["evaluate"].as_dict(), "topology": times["search"].as_dict(),
            }
        )  # fmt: skip
        row = [
            system.num_atoms, neighbours, 1e3 * times["evaluate"].median, 1e3 * best, 1e6 * best / system.num_atoms,
            None if memory is None else memory / 1e6, 1e3 * times["search"].minimum,
        ]  # fmt: skip
        rows.append(row if name in HEAD else [value, *row])
    show(f"against {name}", HEAD if name in HEAD else [name, *HEAD], rows)
    found = exponents(name, records)
    for quantity, slope in found.items():
        print(f"{quantity} ~ ({name})^{slope:.2f}")
    print()
    return {"results": records, "exponents": found}


def exponents(name: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """Fits over all cases, and for atoms over the large ones."""
    found: dict[str, float] = {}
    groups = {"": records}
    if name == "atoms":
        groups[f" from {_LARGE} atoms"] = [r for r in records if r["atoms"] >= _LARGE]
    for words, group in groups.items():
        if len(group) < 2:
            continue
        x = [r[name] for r in group]
        found[f"E+F time{words}"] = exponent(x, [r["evaluate"]["minimum_s"] for r in group])
        if all(r["memory_bytes"] for r in group):
            found[f"memory{words}"] = exponent(x, [r["memory_bytes"] for r in group])
        if name in ("atoms", "neighbours"):
            found[f"topology time{words}"] = exponent(x, [r["topology"]["minimum_s"] for r in group])
    return found


def run(args) -> dict[str, Any]:
    model, results = build(), {}
    if "atoms" in args.sweeps:
        droplets = [water(count) for count in args.waters]
        atoms = [system.num_atoms for system in droplets]
        results["atoms"] = sweep("atoms", atoms, [(model, system) for system in droplets], args.seconds)
    system = water(args.fixed)
    if "neighbours" in args.sweeps:
        models = [build(cutoff) for cutoff in args.cutoffs]
        counts = [functions(m, system)[2] for m in models]
        results["neighbours"] = sweep("neighbours", counts, [(m, system) for m in models], args.seconds)
    if "lmax" in args.sweeps:
        cases = [(build(lmax=lmax), system) for lmax in args.lmax]
        # the number of components (lmax + 1)^2 is what grows
        results["lmax + 1"] = sweep("lmax + 1", [lmax + 1 for lmax in args.lmax], cases, args.seconds)
    if "channels" in args.sweeps:
        cases = [(build(channels=channels), system) for channels in args.channels]
        results["channels"] = sweep("channels", args.channels, cases, args.seconds)
    return results


def training(molecules: int, threads: int, rounds: int) -> dict[str, Any]:
    """Wall-clock time of a training step of a batch of aspirin, with the shells of the configuration, SOAP."""
    system = copies(molecule("aspirin"), molecules)
    model = Timed(build(cutoff=None, species=[1, 6, 8]).model, system)
    step = Runner(model, system).step("soap")

    def steps() -> None:
        for _ in range(_STEPS):
            step()

    steps()
    one, several = on_the_clock(steps, threads, rounds)
    row = [molecules, system.num_atoms, threads, 1e3 * one / _STEPS, 1e3 * several / _STEPS, one / several]
    show("training step, wall-clock time; the other cores must be idle", TRAINING, [row])
    return dict(zip(TRAINING, row, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "scaling.json")
    every = ["atoms", "neighbours", "lmax", "channels"]
    parser.add_argument("--sweeps", nargs="+", choices=every, default=every)
    parser.add_argument(
        "--waters", type=int, nargs="+", default=[7, 14, 33, 100, 200, 334, 667, 1000, 1667], help="molecules"
    )
    parser.add_argument("--fixed", type=int, default=100, help="molecules of water in the other sweeps")
    parser.add_argument("--cutoffs", type=float, nargs="+", default=[3.0, 4.0, 5.0, 6.0, 7.0], help="angstrom")
    parser.add_argument("--lmax", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU time for each case")
    parser.add_argument("--training", action="store_true", help="only the training step, with one and more threads")
    parser.add_argument("--batch", type=int, default=32, help="molecules in a training step")
    parser.add_argument("--threads", type=int, default=2, help="threads of the training step")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of training steps")
    args = parser.parse_args(argv)
    with start():
        if args.training:
            results = {"training": training(args.batch, args.threads, args.rounds)}
        else:
            results = {"sweeps": run(args)}
    write(args.out, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
