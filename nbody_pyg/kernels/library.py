"""Functions of one generated source, by dtype, compiled at first use and called with tensors and numbers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.codegen import prelude
from nbody_pyg.kernels.operands import Several, address, addresses
from nbody_pyg.kernels.scope import is_dry

_C_NAMES = {torch.float32: "float", torch.float64: "double"}


class _Kind(NamedTuple):
    """What a signature says of one argument; a tensor has ``factor`` times the arguments at ``places`` as its size."""

    word: str
    c_type: Any
    factor: int | None = None
    places: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.word.startswith("(")

    @property
    def optional(self) -> bool:
        return "?" in self.word


def _kinds(signature: str) -> list[_Kind]:
    kinds: list[_Kind] = []
    names: dict[str, int] = {}
    for place, word in enumerate(signature.split()):
        kind, _, size = word.partition(":")
        if size:
            parts = size.split("*")
            factor = math.prod(int(part) for part in parts if part.isdigit())
            places = tuple(names[part] for part in parts if not part.isdigit())
            kinds.append(_Kind(word, ctypes.c_void_p, factor, places))
        elif kind.strip("?") in ("double", "several"):
            kinds.append(_Kind(word, ctypes.c_double if kind == "double" else ctypes.c_void_p))
        else:
            names[word.strip("()")] = place
            kinds.append(_Kind(word, ctypes.c_int64))
    return kinds


#: Longest source (characters) that is worth compiling.
MAX_SOURCE = 800_000


class Library:
    """Compiled functions.

    Args:
        source: C code that uses the type ``real``.
        signatures: for each function its arguments, in order: integers by name ("N"), "double", "reals:SIZE" and
            "longs:SIZE" for tensors with so many numbers, such as "reals:9*N*C", and "several" for arrays of addresses;
            with a question mark, as "reals?:9*N", None is a null pointer. Integers in brackets, "(T)", occur in sizes
            only: the function does not take them.
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

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the functions can be called; they are compiled now where they are not yet.

        Where that fails a warning says why, once per process, and it is not tried again.
        """
        if dtype not in self._loaded and not self.too_long:
            try:
                self._load(dtype)
            except RuntimeError as error:
                self._loaded[dtype] = {}
                build.warn_once(
                    "torch", f"plain torch runs instead of compiled products, several times slower: {error}"
                )
        return bool(self._loaded.get(dtype))

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | Several | float | int | None) -> None:
        """Call one function; every tensor is checked against the signature, see :func:`~operands.address`."""
        if is_dry():
            return
        functions = self._loaded.get(dtype) or self._load(dtype)
        function, kinds = functions[name]
        given: list[Any] = []
        for (wanted, factor, places, passed, optional), value in zip(kinds, arguments, strict=True):
            if value is None:
                if not optional:
                    raise TypeError(f"{name} needs a tensor, got None; pass every tensor that the products take")
                given.append(None)
            elif factor is not None:
                for place in places:
                    factor *= arguments[place]
                given.append(address(value, wanted, factor))
            elif passed:
                given.append(addresses(value, dtype) if isinstance(value, Several) else value)
        function(*given)

    def address(self, name: str, dtype: torch.dtype) -> int:
        """Where one of the functions lies."""
        functions = self._loaded.get(dtype) or self._load(dtype)
        return ctypes.cast(functions[name][0], ctypes.c_void_p).value

    def _load(self, dtype: torch.dtype) -> dict:
        with build.lock:  # nobody may call a function before it is linked
            library = build.load(prelude(_C_NAMES[dtype]) + self._source)
            functions = {}
            for name, signature in self._signatures.items():
                function = getattr(library, name)
                kinds = _kinds(signature)
                function.argtypes = [kind.c_type for kind in kinds if kind.passed]
                function.restype = None
                # Looked up at every call: plain tuples
                functions[name] = (
                    function,
                    [
                        (torch.int64 if k.word.startswith("longs") else dtype, k.factor, k.places, k.passed, k.optional)
                        for k in kinds
                    ],
                )
            if self._links:
                addresses = [library.address(name, dtype) for library, name in self._links]
                library.link_functions((ctypes.c_void_p * len(addresses))(*addresses))
            self._loaded[dtype] = functions
            return functions

    def __deepcopy__(self, memo) -> Library:
        return self  # compiled code is shared; ctypes objects cannot be copied

    def __reduce__(self):
        return Library, (self._source, self._signatures, self._links)
