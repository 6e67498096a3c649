"""The one place that decides which implementation of the products runs.

"c": generated C (CPU, float32 and float64, where a C compiler exists). "torch": plain torch, any device, any order of
derivative. The choice is automatic unless the environment's NBODY_BACKEND or :func:`set_backend` says otherwise.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nbody_pyg.kernels import build

_BACKENDS = ("auto", "c", "torch")
_forced = os.environ.get("NBODY_BACKEND", "auto")


def available_backends() -> list[str]:
    """Backends that can run on this machine, fastest first."""
    return (["c"] if build.compiler() else []) + ["torch"]


def set_backend(name: str) -> None:
    """Force a backend ("c", "torch") or let the library choose ("auto").

    Raises: ValueError: unknown name, or "c" without a C compiler.
    """
    global _forced
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {name!r}; try 'auto'")
    if name == "c" and build.compiler() is None:
        raise ValueError("backend 'c' needs a C compiler and none was found; install gcc or set CC, or use 'torch'")
    _forced = name


def backend(tensor: Tensor | None = None) -> str:
    """The backend that runs for this tensor (by default one in float32 on the CPU)."""
    if _forced == "torch" or build.compiler() is None or torch.compiler.is_compiling():
        return "torch"
    if tensor is None or (tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)):
        return "c"
    return "torch"
