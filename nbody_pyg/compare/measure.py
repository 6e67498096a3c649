"""What a model costs: time of energy and forces, or of a property, of one molecule, memory, and on what machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Data

from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.loader import FrameLoader


def latency(
    potential: Potential | PropertyModel, frame: Data, seconds: float = 2.0, device: str = "cpu"
) -> dict[str, float]:
    """Time of energy and forces, or of a property, of one frame with its edges given: median and minimum, seconds.

    On the CPU it is the CPU time of this process, which other processes do not add to.
    """
    batch = FrameLoader([frame], device=device).batch([0])
    potential = potential.to(device).eval()
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    samples: list[float] = []
    with torch.set_grad_enabled(not isinstance(potential, PropertyModel)):
        for _ in range(3):
            potential(batch)
        end = clock() + seconds
        while len(samples) < 5 or (clock() < end and len(samples) < 300):
            start = clock()
            potential(batch)
            if on_gpu:
                torch.cuda.synchronize()
            samples.append(clock() - start)
    return {"median_s": statistics.median(samples), "minimum_s": min(samples), "samples": len(samples)}


def peak_memory(function: Callable[[], object]) -> float | None:
    """Bytes by which the resident memory of the process grows at most while the function runs.

    Linux with glibc: free memory is given back first, then the high-water mark is reset. None elsewhere.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    function()
    return float(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def machine() -> dict[str, Any]:
    """Processor, its load now, versions of Python and torch, threads."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Name of the processor, with the vector units that matter."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    vectors = [name for name in ("avx2", "avx512f") if f" {name} " in text]
    return " ".join([model or platform.machine(), *vectors])
