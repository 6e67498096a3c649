"""Check and time every GPU path in one call: products, edge features, the model, CUDA graphs.

    python benchmarks/gpu.py --quick --limit 240        a few sizes, about four minutes
    python benchmarks/gpu.py --sections check edge      some sections only
    python benchmarks/gpu.py --compile-only             no GPU needed: registers and spills of every kernel

Products are compared with e3nn in float64 first (result, first and second derivatives, 1e-10), then timed in float32
without tf32. A section that fails prints its traceback, is noted in the JSON, and the next one runs.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback
from collections.abc import Callable
from typing import Any

import bare  # noqa: F401  (before all that imports nbody_pyg)
import gpu_models
import products
import torch
from cuda_timing import captured, flush_buffer, median_time
from gpu_peers import cuequivariance_path
from products import PROBLEMS, Problem
from report import arguments, machine, show, write
from resources import resource_table

from nbody_pyg.kernels import set_backend

STAGES = {"forward": "fwd", "first": "fwd+bwd", "second": "fwd+bwd+dbl"}
TOLERANCE = 1e-10
#: Arrays of the size of a message that e3nn keeps at once, roughly: what does not fit is not tried.
_E3NN_COPIES = 12


class Run:
    """What all sections share: device, sizes, time left, results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.peak: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.end = time.monotonic() + args.limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def time(self, call: Callable[[], object]) -> float:
        """Median seconds of a call; caches are emptied before each on a GPU."""
        return median_time(call, self.device, self.args.repeats, flush_buffer(self.device))


# ------------------------------------------------------------------------------------- hardware
def hardware(run: Run) -> list[dict]:
    """What the device reaches: bytes/s of a large copy (read and written), flop/s of float32 products without tf32."""
    size = 2**28 if run.cuda else 2**20
    side = 8192 if run.cuda else 128
    source, copy = torch.randn(size, device=run.device), torch.empty(size, device=run.device)
    a, b = torch.randn(side, side, device=run.device), torch.randn(side, side, device=run.device)
    moved = 8 * size / run.time(lambda: copy.copy_(source))
    flop = 2 * side**3 / run.time(lambda: torch.mm(a, b))
    run.peak = {"bytes_per_s": moved, "flop_per_s": flop}
    name = torch.cuda.get_device_name() if run.cuda else "cpu"
    show("hardware", ["device", "copy TB/s", "float32 TFLOP/s"], [[name, moved / 1e12, flop / 1e12]])
    return [{"device": name, **run.peak}]


def bound(problem: Problem, peak: dict[str, float]) -> tuple[float, str]:
    """Least seconds of the forward pass, and what sets them."""
    limits = {"bytes": problem.bytes / peak["bytes_per_s"], "flop": problem.flop / peak["flop_per_s"]}
    worst = max(limits, key=limits.get)
    return limits[worst], worst


# ------------------------------------------------------------------------------------- products
def build(run: Run, name: str, nodes: int, edges: int, channels: int, lmax: int, dtype: torch.dtype) -> Problem:
    products.chosen = ["torch", "triton"]
    with torch.device(run.device):
        return PROBLEMS[name](nodes, edges, channels, lmax, dtype)


def check(run: Run) -> list[dict]:
    """Every product against e3nn in float64."""
    records, rows = [], []
    for name, lmax in itertools.product(PROBLEMS, run.args.lmax):
        sizes = (20, 100, 48) if run.cuda else (3, 4, 3)
        errors = build(run, name, *sizes, lmax, torch.float64).errors()
        records.append({"problem": name, "lmax": lmax, "errors": errors})
        rows.append([name, lmax, *(f"{errors[f'nbody_pyg {backend}']:.1e}" for backend in ("triton", "torch"))])
    show("largest deviation from e3nn, float64: result, first and second derivatives",
         ["problem", "lmax", "triton", "torch"], rows)  # fmt: skip
    wrong = [r for r in records if not r["errors"]["nbody_pyg triton"] <= TOLERANCE]
    if wrong:
        raise AssertionError(f"the kernels deviate from e3nn: {wrong}")
    return records


def cases(run: Run, name: str) -> list[tuple[int, int, int]]:
    """(lmax, channels, edges) to time, small ones first."""
    edges = run.args.edges if name != "node product" else [max(run.args.edges)]
    found = itertools.product(run.args.lmax, run.args.channels, edges)
    return sorted(found, key=lambda case: case[2] * case[1] * (case[0] + 1) ** 3)


def timings(run: Run, name: str) -> list[dict]:
    """Times of one product at all sizes, beside e3nn and the bound of the hardware."""
    if not run.peak:
        hardware(run)
    records: list[dict] = []
    for lmax, channels, edges in cases(run, name):
        if run.left < 0:
            print(f"{name}: out of time before lmax {lmax}, {channels} channels, {edges} edges\n")
            break
        nodes = max(edges // 20, 1)
        problem = build(run, name, nodes, edges, channels, lmax, torch.float32)
        limit, by = bound(problem, run.peak)
        paths = dict(problem.paths)
        paths.pop("e3nn TorchScript", None)
        if run.cuda and not fits(name, nodes, edges, channels, lmax):
            for other in ("e3nn", "dense einsum", "einsum per edge", "nbody_pyg torch"):
                paths.pop(other, None)
        if name == "edge product":
            paths |= cuequivariance_path(problem, channels, lmax)
        count = nodes if name == "node product" else edges
        for path_name, path in paths.items():
            record = {"problem": name, "lmax": lmax, "channels": channels, "edges": edges, "nodes": nodes,
                      "path": path_name, "bound_s": limit, "bound_by": by, **time_path(run, path)}  # fmt: skip
            records.append(record | {"count": count})
        del problem, paths
    print_timings(name, records)
    return records


def fits(name: str, nodes: int, edges: int, channels: int, lmax: int) -> bool:
    """Whether e3nn's messages of these edges have room in the memory of the GPU."""
    rows = {1: 8, 2: 35, 3: 99}.get(lmax, 99)
    count = nodes if name == "node product" else edges
    return 4 * _E3NN_COPIES * count * channels * rows < torch.cuda.mem_get_info()[0]


def time_path(run: Run, path: products.Path) -> dict[str, Any]:
    """Seconds of each stage, eager; of the forward pass also replayed from a CUDA graph."""
    found: dict[str, Any] = {}
    try:
        for stage in STAGES:
            found[stage] = run.time(getattr(path, stage))
        if run.cuda:
            replay = captured(path.forward)
            found["replay"] = run.time(replay)
    except Exception as error:  # one path out of memory, or one that cannot be captured, stops no other
        found["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        if run.cuda:
            torch.cuda.empty_cache()
    return found


def print_timings(name: str, records: list[dict]) -> None:
    keys = ("lmax", "channels", "edges")
    head = [
        *keys,
        "path",
        *(f"{words} ms" for words in STAGES.values()),
        "graph fwd ms",
        "fwd ns each",
        "x bound",
        "x e3nn",
    ]
    rows = []
    for record in records:
        same = [r for r in records if all(r[k] == record[k] for k in keys) and r["path"] == "e3nn"]
        forward = record.get("replay") or record.get("forward")
        e3nn = same[0].get("second") if same else None
        rows.append([
            *(record[k] for k in keys), record["path"],
            *(1e3 * record[s] if s in record else None for s in STAGES),
            1e3 * record["replay"] if "replay" in record else None,
            1e9 * forward / record["count"] if forward else None,
            forward / record["bound_s"] if forward else None,
            e3nn / record["second"] if e3nn and "second" in record else None,
        ])  # fmt: skip
    show(f"{name}, float32 (x e3nn: of the last stage; x bound: forward, replayed where possible)", head, rows)
    for record in records:
        if "error" in record:
            print(f"  {record['path']}, lmax {record['lmax']}, {record['edges']} edges: {record['error']}")


# ------------------------------------------------------------------------------------- sections
SECTIONS: dict[str, Callable[[Run], list[dict]]] = {
    "hardware": hardware,
    "check": check,
    "edge": lambda run: timings(run, "edge product"),
    "model": gpu_models.models,
    "training": gpu_models.training,
    "graphs": gpu_models.graphs,
    "density": lambda run: timings(run, "density"),
    "node": lambda run: timings(run, "node product"),
    "features": gpu_models.features,
}
QUICK = {"lmax": [2], "channels": [64], "edges": [10_000, 200_000], "repeats": 11, "waters": [334]}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "gpu.json")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", default="cuda", help="cpu runs in Triton's interpreter, for tests")
    parser.add_argument("--lmax", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--edges", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--waters", type=int, nargs="+", default=[334, 6667], help="molecules in the droplets")
    parser.add_argument("--batches", type=int, nargs="+", default=[5, 64], help="molecules in a training step")
    parser.add_argument("--models", nargs="+", default=["NBodyNet", "SchNet", "NequIP", "MACE 128x0e+128x1o"])
    parser.add_argument("--backends", nargs="+", default=["triton", "torch"], help="of NBodyNet")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds after which nothing new is started")
    parser.add_argument("--quick", action="store_true", help=f"set {QUICK}")
    parser.add_argument("--compile-only", action="store_true", help="print the resources of every kernel and stop")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    if args.compile_only:
        write(args.out, {"resources": resource_table(args.lmax, args.channels)})
        return 0
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n", end="\n\n", flush=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    run, failed = Run(args), []
    try:
        for name in args.sections:
            if run.left < 0:
                print(f"out of time before {name}")
                continue
            try:
                run.results[name] = SECTIONS[name](run)
            except Exception:  # a section that fails must not take the others with it
                failed.append(name)
                run.results[name] = [{"traceback": traceback.format_exc()}]
                print(f"section {name} failed:\n{traceback.format_exc()}", flush=True)
    finally:
        set_backend("auto")
        products.chosen = None
    write(args.out, {"hardware": run.peak, "failed": failed, "results": run.results})
    print(f"failed sections: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
