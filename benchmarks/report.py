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
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks") / default_out, help="JSON file")
    return parser


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
