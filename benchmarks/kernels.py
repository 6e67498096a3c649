"""Our products (generated C, plain torch) beside e3nn's TensorProduct and a dense einsum, and beside the hardware.

    python benchmarks/kernels.py --lmax 2 3

Every path is first compared with e3nn in float64 (outputs, first and second derivatives, 1e-10), then timed in
float32. Three figures for each: forward without a graph; forward and all first derivatives; forward, derivatives
with a graph, and the derivatives of those: what a loss on forces asks of a product.
"""

from __future__ import annotations

import itertools

import torch
from gpu_peers import cuequivariance_path
from products import PROBLEMS, Problem
from report import arguments, show, start, write
from timing import Timing, interleave

from nbody_pyg.kernels import backend, set_backend

STAGES = {"forward": "forward", "first": "+ backward", "second": "+ double backward"}
#: Share of the time that each stage gets.
_SHARE = {"forward": 0.15, "first": 0.3, "second": 0.55}
TOLERANCE = 1e-10


def hardware(seconds: float) -> dict[str, float]:
    """What one thread reaches here and now: flop/s of a large sgemm, bytes/s of a copy (read and written)."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, copy = torch.randn(2**24), torch.empty(2**24)
    times = interleave({"sgemm": lambda: torch.mm(a, b), "copy": lambda: copy.copy_(source)}, seconds, (5, 101))
    return {"flop_per_s": 2 * 1024**3 / times["sgemm"].minimum, "bytes_per_s": 8 * 2**24 / times["copy"].minimum}


def measure(problem: Problem, seconds: float) -> dict[str, dict[str, Timing]]:
    """Stage -> path -> times."""
    times = {}
    for stage in STAGES:
        calls = {name: getattr(path, stage) for name, path in problem.paths.items()}
        times[stage] = interleave(calls, seconds * _SHARE[stage])
    return times


def rows_of(times: dict[str, dict[str, Timing]], bound: float) -> list[list]:
    rows = []
    for name in times["forward"]:
        row = [name]
        for stage in STAGES:
            found, reference = times[stage][name], times[stage]["e3nn"]
            row += [1e3 * found.median, 1e3 * found.minimum, reference.over(found)]
        rows.append([*row, times["forward"][name].minimum / bound])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "kernels.json")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--lmax", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--edges", type=int, default=10_000)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time for each problem and lmax")
    args = parser.parse_args(argv)
    chosen = backend()
    with start():
        try:
            results = run(args)
        finally:
            set_backend("auto")
    results["backend"] = chosen
    write(args.out, results)
    return 0


def run(args) -> dict:
    peak = hardware(min(2.0, args.seconds / 4))
    print(f"one thread: sgemm {peak['flop_per_s'] / 1e9:.1f} GFLOP/s, copy {peak['bytes_per_s'] / 1e9:.1f} GB/s\n")
    records = [compare(name, lmax, args, peak) for name, lmax in itertools.product(args.problems, args.lmax)]
    sizes = {key: getattr(args, key) for key in ("nodes", "edges", "channels")}
    return {"hardware": peak, "sizes": sizes, "results": records}


def compare(name: str, lmax: int, args, peak: dict[str, float]) -> dict:
    """Check one problem in float64, time it in float32, print the table; the record for the file."""
    errors = PROBLEMS[name](20, 100, args.channels, lmax, torch.float64).errors()
    worst = max(errors, key=errors.get)
    if errors[worst] > TOLERANCE:
        raise AssertionError(f"{name}, lmax {lmax}: {worst} deviates from e3nn by {errors[worst]:.1e}")
    problem = PROBLEMS[name](args.nodes, args.edges, args.channels, lmax, torch.float32)
    if name == "edge product":
        problem.paths.update(cuequivariance_path(problem, args.channels, lmax))
    times = measure(problem, args.seconds)
    bounds = {"flop": problem.flop / peak["flop_per_s"], "bytes": problem.bytes / peak["bytes_per_s"]}
    limit = max(bounds, key=bounds.get)
    head = ["path"]
    for words in STAGES.values():
        head += [f"{words} ms", "min", "x e3nn"]
    edges = "" if name == "node product" else f", {args.edges} edges"
    title = (
        f"{name}, lmax {lmax}, {args.channels} channels, {args.nodes} nodes{edges}; all paths agree to "
        f"{errors[worst]:.0e}\nforward bound {1e3 * bounds[limit]:.3f} ms by {limit}: {problem.flop / 1e6:.1f} MFLOP, "
        f"{problem.bytes / 1e6:.2f} MB"
    )
    show(title, [*head, "x bound"], rows_of(times, bounds[limit]))
    return {
        "problem": name, "lmax": lmax, "errors": errors, "flop": problem.flop, "bytes": problem.bytes,
        "bound_s": bounds[limit], "bound_by": limit,
        "times": {s: {p: t.as_dict() for p, t in found.items()} for s, found in times.items()},
        "times_faster_than_e3nn": {
            s: {p: found["e3nn"].over(t) for p, t in found.items()} for s, found in times.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
