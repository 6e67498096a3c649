"""Cost of smooth survivors against the number of atoms, beside a network that looks at all pairs.

    python benchmarks/hierarchy.py

E+F of droplets of water, one thread, float32, with the search for the topology included (a part of every step here:
the hierarchy follows the positions). ``all pairs`` has one level of neighbourhoods that hold the whole droplet, with
the same channels and degrees. The crossing point is where the measured curves of both meet.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from report import arguments, show, start, write
from systems import water
from timing import exponent, interleave, peak_memory

from nbody_pyg import NBodyNet, NestedShells, SmoothSurvivors
from nbody_pyg.hierarchy import Scheme
from nbody_pyg.potential import Potential

#: Atoms from which on exponents are fitted.
_LARGE = 450
HEAD = ["network", "atoms", "nodes", "E+F and topology ms", "of it topology ms", "us per atom", "memory MB"]


def _diameter(waters: int) -> float:
    """A radius that no pair of the droplet exceeds, angstrom."""
    return 2.0 * float(water(waters).pos.norm(dim=1).max()) + 1.0


def measure(name: str, scheme: Scheme, waters: int, channels: int, seconds: float) -> dict[str, Any]:
    """Time and memory of one droplet."""
    system = water(waters)
    torch.manual_seed(0)
    potential = Potential(NBodyNet([1, 8], scheme, channels=channels, lmax=2, correlation=3))

    def search() -> Any:
        return scheme.topology(system.z, system.pos)

    def evaluate() -> Any:
        return potential(system.z, system.pos, system.batch, topology=search())

    topology = search()
    nodes = sum(topology.size(k) for k in range(topology.num_levels - 1))
    evaluate()
    memory = peak_memory(evaluate)
    times = interleave({"evaluate": evaluate, "search": search}, seconds, rounds=(2, 21))
    best = times["evaluate"].minimum
    return {
        "network": name, "atoms": system.num_atoms, "nodes": nodes, "evaluate_s": best,
        "topology_s": times["search"].minimum, "memory_bytes": memory,
    }  # fmt: skip


def fits(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Exponents of time and memory of each network, over the large systems."""
    found = {}
    for name in dict.fromkeys(r["network"] for r in records):
        large = [r for r in records if r["network"] == name and (r["atoms"] >= _LARGE or name != "survivors")]
        if len(large) < 2:  # a small run: all there is
            large = [r for r in records if r["network"] == name]
        atoms = [r["atoms"] for r in large]
        found[name] = {"time": exponent(atoms, [r["evaluate_s"] for r in large])}
        if all(r["memory_bytes"] for r in large):
            found[name]["memory"] = exponent(atoms, [r["memory_bytes"] for r in large])
    return found


def crossing(records: list[dict[str, Any]]) -> float | None:
    """Atoms from which on all pairs take longer, by straight lines between the points of a log-log plot."""

    def line(name: str) -> tuple[list[float], list[float]]:
        own = sorted((r["atoms"], r["evaluate_s"]) for r in records if r["network"] == name)
        return [math.log(atoms) for atoms, _ in own], [math.log(seconds) for _, seconds in own]

    (x, y), (u, v) = line("all pairs"), line("survivors")
    grid = np.linspace(max(x[0], u[0]), min(x[-1], u[-1]), 1000)
    longer = np.nonzero(np.interp(grid, x, y) > np.interp(grid, u, v))[0]
    return None if len(longer) == 0 else float(np.exp(grid[longer[0]]))


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "hierarchy.json")
    parser.add_argument("--waters", type=int, nargs="+", default=[50, 167, 500, 1667, 6667], help="molecules")
    parser.add_argument(
        "--all-pairs", type=int, nargs="+", default=[33, 67, 133, 200, 267], help="molecules, all pairs"
    )
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time for each case, at least two rounds")
    args = parser.parse_args(argv)
    records = []
    with start():
        survivors = SmoothSurvivors((3.0, 6.0), (5.0, 9.0, 12.0))
        cases = [("all pairs", NestedShells((_diameter(n),)), n) for n in args.all_pairs]
        for name, scheme, waters in cases + [("survivors", survivors, n) for n in args.waters]:
            records.append(measure(name, scheme, waters, args.channels, args.seconds))
            print(records[-1], flush=True)
    rows = [
        [r["network"], r["atoms"], r["nodes"], 1e3 * r["evaluate_s"], 1e3 * r["topology_s"],
         1e6 * r["evaluate_s"] / r["atoms"], None if r["memory_bytes"] is None else r["memory_bytes"] / 1e6]
        for r in records
    ]  # fmt: skip
    show("droplets of water", HEAD, rows)
    found = fits(records)
    meet = crossing(records)
    for name, values in found.items():
        memory = f", memory ~ N^{values['memory']:.2f}" if "memory" in values else ""
        print(f"{name}: time ~ N^{values['time']:.2f}{memory}")
    if meet is not None:
        print(f"crossing point: {meet:.0f} atoms")
    write(args.out, {"results": records, "exponents": found, "crossing_atoms": meet})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
