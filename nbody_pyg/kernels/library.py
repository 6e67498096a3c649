"""Functions of one generated source, by dtype, compiled at first use and called with tensors and numbers."""

from __future__ import annotations

import ctypes
import re

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.codegen import prelude

_C_NAMES = {torch.float32: "float", torch.float64: "double"}
_C_TYPES = {"i": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}

#: Longest source (characters) that is worth compiling.
MAX_SOURCE = 800_000


class Library:
    """Compiled functions.

    Args:
        source: C code that uses the type ``real``.
        signatures: for each function its arguments, e.g. "2i3p": two integers and three pointers ("d": a double).
    """

    def __init__(self, source: str, signatures: dict[str, str]) -> None:
        self._source, self._signatures = source, signatures
        self._loaded: dict[torch.dtype, dict] = {}

    @property
    def too_long(self) -> bool:
        """Whether compiling would take minutes: high degrees in both parities. Such products run on plain torch."""
        return len(self._source) > MAX_SOURCE

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | ctypes.Array | float | int | None) -> None:
        """Call one function; tensors are passed by address and must be contiguous, None as a null pointer."""
        functions = self._loaded.get(dtype) or self._load(dtype)
        functions[name](*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])

    def _load(self, dtype: torch.dtype) -> dict:
        library = build.load(prelude(_C_NAMES[dtype]) + self._source)
        functions = {}
        for name, signature in self._signatures.items():
            function = getattr(library, name)
            function.argtypes = [
                _C_TYPES[kind] for count, kind in re.findall(r"(\d*)([idp])", signature) for _ in range(int(count or 1))
            ]
            function.restype = None
            functions[name] = function
        self._loaded[dtype] = functions
        return functions

    def __deepcopy__(self, memo) -> Library:
        return self  # compiled code is shared; ctypes objects cannot be copied

    def __reduce__(self):
        return Library, (self._source, self._signatures)
