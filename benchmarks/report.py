"""What the benchmarks print and write: the machine, aligned tables, JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nbody_pyg.cli.tables import table
from nbody_pyg.compare.measure import processor
from nbody_pyg.kernels import available_backends
from nbody_pyg.training.malloc_tuning import tuned_malloc

_PACKAGES = ("nbody_pyg", "torch", "torch_geometric", "e3nn", "schnetpack", "nequip", "mace-torch")


def arguments(description: str | None, default_out: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; its description is the first line of the docstring given."""
    first = (description or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=first, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks") / default_out, help="JSON file")
    return parser


def training_arguments(parser: argparse.ArgumentParser, seconds: float, data: str) -> None:
    """What every benchmark that trains networks takes; ``data`` says what the folder holds."""
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {data}")
    parser.add_argument("--seconds", type=float, default=seconds, help="CPU time of training for each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the configuration")


def start() -> Any:
    """One thread and a process that takes no new pages at every step: enter it around all that is timed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n", end="\n\n", flush=True)
    return tuned_malloc()


def machine() -> dict[str, Any]:
    """Processor, load, versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load at the start": load,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "backends": ", ".join(available_backends()),
    }


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(f"{title}\n{table(head, rows)}\n", flush=True)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine()} | results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def finish(path: Path, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], records: Sequence[Any]) -> int:
    """Print the table and write the records; returns the exit status."""
    show(title, head, rows)
    write(path, {"results": records})
    return 0


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
