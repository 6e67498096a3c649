"""The one place that decides which implementation of the products runs.

"c": generated C (CPU, float32 and float64, where a C compiler exists). "triton": generated Triton (CUDA tensors in
float32 and float64, where Triton is installed, as it is with torch for CUDA on Linux). "torch": plain torch, any device,
any order of derivative. Automatic is triton for CUDA tensors, c for CPU tensors, torch where that one cannot run, unless the
environment's NBODY_BACKEND or :func:`set_backend` says otherwise; a forced backend that cannot take a tensor leaves it
to plain torch. All three read the same coupling tables and have the same numbers up to rounding.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.gpu.build import available, interpreted
from nbody_pyg.kernels.scope import is_recording, is_transformed

_BACKENDS = ("auto", "c", "triton", "torch")
_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_forced = os.environ.get("NBODY_BACKEND", "auto")


def available_backends() -> list[str]:
    """Backends that can run on this machine: c for the CPU, triton for the GPU, torch for both."""
    triton = available() and torch.cuda.is_available()
    return (["c"] if build.compiler() else []) + (["triton"] if triton else []) + ["torch"]


def set_backend(name: str) -> None:
    """Force a backend ("c", "triton", "torch") or let the library choose ("auto"), in all threads of this process.

    Every product reads the choice when it is called; its derivatives run on the backend that its value came from.

    Raises: ValueError: unknown name, "c" without a C compiler, or "triton" without Triton.
    """
    global _forced
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {name!r}; try 'auto'")
    if name == "c" and build.compiler() is None:
        raise ValueError("backend 'c' needs a C compiler and none was found; install gcc or set CC, or use 'torch'")
    if name == "triton" and not available():
        raise ValueError("backend 'triton' needs Triton and it is not installed; pip install triton, or use 'torch'")
    _forced = name


def backend(tensor: Tensor | None = None) -> str:
    """The backend that runs for this tensor (by default one in float32 on the CPU)."""
    if _forced == "torch" or (tensor is not None and tensor.dtype not in _DTYPES):
        return "torch"
    # What others trace, batch or count must be made of operations that they see
    if is_transformed() or (tensor is not None and type(tensor) not in _PLAIN and not is_recording()):
        return "torch"
    device = "cpu" if tensor is None else tensor.device.type
    if _forced == "triton":
        return "triton" if available() and (device == "cuda" or (device == "cpu" and interpreted())) else "torch"
    if device == "cuda":
        return "triton" if _forced == "auto" and available() else "torch"
    return "c" if device == "cpu" and build.compiler() else "torch"
