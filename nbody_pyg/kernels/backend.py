"""Choice of the implementation of the products; nothing else decides it.

"c": generated C (CPU, float32 and float64, where a C compiler exists). "triton": generated Triton (CUDA tensors in
float32 and float64, where Triton is installed, as it is with torch for CUDA on Linux). "torch": plain torch, any device,
any order of derivative. By default triton runs for CUDA tensors and c for CPU tensors; torch runs if that backend
cannot (a warning gives the reason). The environment variable NBODY_BACKEND forces a backend in a process,
:func:`use_backend` and :func:`set_backend` in a thread; if it cannot process a tensor, plain torch does. All three use
the same coupling tables and give the same numbers up to rounding.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.autograd_flags import is_recording, is_transformed
from nbody_pyg.kernels.gpu.build import available, interpreted

if TYPE_CHECKING:
    from nbody_pyg.kernels.library import Library

_BACKENDS = ("auto", "c", "triton", "torch")
_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
#: None: that of the environment.
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def available_backends() -> list[str]:
    """Backends that can run on this machine: c for the CPU, triton for the GPU, torch for both."""
    triton = available() and torch.cuda.is_available()
    return (["c"] if build.broken() is None else []) + (["triton"] if triton else []) + ["torch"]


def set_backend(name: str) -> None:
    """Force a backend ("c", "triton", "torch") or let the library choose ("auto"), in this thread.

    Other threads are not affected. A product uses the backend selected when it is called; its derivatives run on the
    same backend.

    Raises: ValueError: unknown name, "c" if no C can be compiled and loaded, or "triton" without Triton.
    """
    _forced.set(_checked(name, "backend"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """:func:`set_backend` for the statements below ``with``, in this thread.

    >>> with use_backend("torch"):
    ...     backend()
    'torch'
    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _from_environment() -> str:
    return _checked(os.environ.get("NBODY_BACKEND") or "auto", "NBODY_BACKEND")


def _checked(name: str, where: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(_BACKENDS)}, got {name!r}; try 'auto'")
    if name == "c" and (problem := build.broken()):
        raise ValueError(f"{where} 'c' cannot run here: {problem}")
    if name == "triton" and not available():
        raise ValueError(f"{where} 'triton' needs Triton and it is not installed; pip install triton, or use 'torch'")
    return name


def backend(tensor: Tensor | None = None, library: Library | None = None) -> str:
    """The backend that runs for this tensor (by default one in float32 on the CPU).

    Args:
        library: compiled functions that would be called with it. They are compiled now if needed; if that fails, plain
            torch runs.
    Raises: ValueError: NBODY_BACKEND is not a backend, or one that cannot run here.
    """
    forced = _forced.get() or _from_environment()
    if forced == "torch" or (tensor is not None and tensor.dtype not in _DTYPES):
        return "torch"
    # Tracers and modes must see every operation
    if is_transformed() or (tensor is not None and type(tensor) not in _PLAIN and not is_recording()):
        return "torch"
    device = "cpu" if tensor is None else tensor.device.type
    if forced == "triton":
        return "triton" if available() and (device == "cuda" or (device == "cpu" and interpreted())) else "torch"
    if device == "cuda":
        return "triton" if forced == "auto" and available() else "torch"
    if device != "cpu":
        return "torch"
    runs = build.broken() is None if library is None or tensor is None else library.ready(tensor.dtype)
    return "c" if runs else "torch"


def dispatch(arguments: tuple[Any, ...], c: Any, triton: Any, plain: Callable[..., Any]) -> Any:
    """The result of an operation for these arguments, on the backend for the first of them.

    Args:
        arguments: arguments of each implementation.
        c: compiled operation with a ``library``, or None.
        triton: its counterpart on a GPU, or None; one that is ``too_long`` is not used.
        plain: the same in plain torch.
    """
    which = "torch" if c is None else backend(arguments[0], c.library)
    if which == "c":
        return c(*arguments)
    if which == "triton" and triton is not None and not triton.too_long:
        return triton(*arguments)
    return plain(*arguments)
