"""Functions of one generated source, by dtype, compiled at first use and called with tensors and numbers."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.codegen import prelude
from nbody_pyg.kernels.scope import is_dry

_C_NAMES = {torch.float32: "float", torch.float64: "double"}
_C_TYPES = {"i": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}

#: Longest source (characters) that is worth compiling.
MAX_SOURCE = 800_000


class Library:
    """Compiled functions.

    Args:
        source: C code that uses the type ``real``.
        signatures: for each function its arguments, e.g. "2i3p": two integers and three pointers ("d": a double).
        links: functions of other libraries that this one calls, as (library, name). Their addresses are handed to the
            source's own ``link_functions(void* const*)`` after loading: what is shared is compiled once.
    """

    def __init__(self, source: str, signatures: dict[str, str], links: Sequence[tuple[Library, str]] = ()) -> None:
        self._source, self._signatures, self._links = source, signatures, tuple(links)
        self._loaded: dict[torch.dtype, dict] = {}

    @property
    def source(self) -> str:
        """The C code."""
        return self._source

    @property
    def too_long(self) -> bool:
        """Whether compiling would take minutes: high degrees in both parities. Such products run on plain torch."""
        return len(self._source) > MAX_SOURCE or any(library.too_long for library, _ in self._links)

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | ctypes.Array | float | int | None) -> None:
        """Call one function; tensors are passed by address and must be contiguous, None as a null pointer."""
        if is_dry():
            return
        functions = self._loaded.get(dtype) or self._load(dtype)
        functions[name](*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])

    def address(self, name: str, dtype: torch.dtype) -> int:
        """Where one of the functions lies."""
        functions = self._loaded.get(dtype) or self._load(dtype)
        return ctypes.cast(functions[name], ctypes.c_void_p).value

    @build.one_at_a_time  # nobody may call a function before it is linked
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
        if self._links:
            addresses = [library.address(name, dtype) for library, name in self._links]
            library.link_functions((ctypes.c_void_p * len(addresses))(*addresses))
        self._loaded[dtype] = functions
        return functions

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the functions can be called; they are compiled now where they are not yet.

        Where that fails a warning says why, once per process, and it is not tried again.
        """
        if dtype not in self._loaded and not self.too_long:
            try:
                self._load(dtype)
            except RuntimeError as error:
                self._loaded[dtype] = {}
                text = f"plain torch runs instead of compiled products, several times slower: {error}"
                build.warn_once("torch", text)
        return bool(self._loaded.get(dtype))

    def __deepcopy__(self, memo) -> Library:
        return self  # compiled code is shared; ctypes objects cannot be copied

    def __reduce__(self):
        return Library, (self._source, self._signatures, self._links)
