"""Functions of one generated source, by dtype, compiled at first use and called with tensors and numbers."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.autograd_flags import is_dry
from nbody_pyg.kernels.codegen import prelude
from nbody_pyg.kernels.operands import Several, addresses
from nbody_pyg.kernels.threads import num_threads
from nbody_pyg.required import required

_C_NAMES = {torch.float32: "float", torch.float64: "double"}


class _Signature:
    """The arguments of one function for one dtype, see :class:`Library`."""

    def __init__(self, text: str, dtype: torch.dtype) -> None:
        words = text.split()
        self.c_types = [_c_type(word) for word in words if not word.startswith("(")]
        # Positions of tensors, of arrays of tensors, of arguments that must not be None, and (from the end) of
        # arguments that are not passed on
        self.tensors = [n for n, word in enumerate(words) if ":" in word]
        self.dtypes = [torch.int64 if words[n].startswith("longs") else dtype for n in self.tensors]
        self.arrays = [n for n, word in enumerate(words) if word.startswith("several")]
        self.required = [n for n in (*self.tensors, *self.arrays) if "?" not in words[n]]
        self.unpassed = [n for n, word in enumerate(words) if word.startswith("(")][::-1]
        names = {word.strip("()"): place for place, word in enumerate(words)}
        self._products: list[tuple[int, tuple[int, ...]]] = []
        for n in self.tensors:
            parts = words[n].partition(":")[2].split("*")
            factor = math.prod(int(part) for part in parts if part.isdigit())
            self._products.append((factor, tuple(names[part] for part in parts if not part.isdigit())))
        self._places = tuple(sorted({place for _, places in self._products for place in places}))
        self._known: dict[tuple[int, ...], list[int]] = {}

    def sizes(self, arguments: Sequence[Any]) -> list[int]:
        """Number of elements of each tensor."""
        integers = tuple([arguments[place] for place in self._places])
        sizes = self._known.get(integers)
        if sizes is None:
            sizes = [factor * math.prod(arguments[place] for place in places) for factor, places in self._products]
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[integers] = sizes
        return sizes


def _c_type(word: str) -> Any:
    if word.startswith("double"):
        return ctypes.c_double
    return ctypes.c_void_p if ":" in word or word.startswith("several") else ctypes.c_int64


#: Number of sets of sizes that a function caches.
_REMEMBERED = 256
#: Longest source (characters) that is worth compiling.
MAX_SOURCE = 800_000


class Library:
    """Compiled functions.

    Args:
        source: C code that uses the type ``real``.
        signatures: for each function its arguments, in order: integers by name ("N"), "double", "reals:SIZE" and
            "longs:SIZE" for tensors with so many numbers, such as "reals:9*N*C", and "several" for arrays of addresses;
            with a question mark, as "reals?:9*N", None is a null pointer. Integers in brackets, "(T)", occur in sizes
            only: the function does not take them. Functions that are called take the number of threads before these.
        links: functions of other libraries that this one calls, as (library, name). Their addresses are passed to
            ``link_functions(void* const*)`` of the source after loading, so that shared code is compiled once.
    """

    def __init__(self, source: str, signatures: dict[str, str], links: Sequence[tuple[Library, str]] = ()) -> None:
        self._source, self._signatures, self._links = source, signatures, tuple(links)
        self._loaded: dict[torch.dtype, dict[str, tuple[Any, _Signature]]] = {}
        self._together = self._with_links()

    @property
    def source(self) -> str:
        """The C code."""
        return self._source

    @property
    def too_long(self) -> bool:
        """Whether compiling would take minutes, as for high degrees in both parities. Such products run in plain
        torch."""
        return len(self._source) > MAX_SOURCE or any(library.too_long for library, _ in self._links)

    def _with_links(self) -> tuple[Library, ...]:
        """This library and all that it calls."""
        return self, *(one for library, _ in self._links for one in library._with_links())

    def _text(self, dtype: torch.dtype) -> str:
        return prelude(_C_NAMES[dtype], self._source) + self._source

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | Several | float | int | None) -> None:
        """Call one function; every tensor is checked against the signature, see :func:`~operands.addresses`."""
        if is_dry():
            return
        functions = self._loaded.get(dtype) or self._load(dtype)
        function, signature = functions[name]
        given: list[Any] = list(arguments)
        for place in signature.required:
            if given[place] is None:
                raise TypeError(f"{name} needs a tensor, got None; pass every tensor that the products take")
        pointers = addresses([given[n] for n in signature.tensors], signature.sizes(given), signature.dtypes)
        for place, pointer in zip(signature.tensors, pointers, strict=True):
            given[place] = pointer
        for place in signature.arrays:
            if given[place] is not None:
                tensors, sizes = given[place]
                pointers = addresses(tensors, sizes, itertools.repeat(dtype))
                given[place] = (ctypes.c_void_p * len(pointers))(*pointers)
        for place in signature.unpassed:
            del given[place]
        function(num_threads(), *given)

    def address(self, name: str, dtype: torch.dtype) -> int:
        """Address of one of the functions."""
        functions = self._loaded.get(dtype) or self._load(dtype)
        return required(ctypes.cast(functions[name][0], ctypes.c_void_p).value)

    @build.one_at_a_time  # a function must not be called before it is linked
    def _load(self, dtype: torch.dtype) -> dict[str, tuple[Any, _Signature]]:
        needed = [one for one in self._together if dtype not in one._loaded and not one.too_long]
        build.load_all(one._text(dtype) for one in needed)
        library = build.load(self._text(dtype))
        functions = {}
        for name, signature in self._signatures.items():
            function = getattr(library, name)
            found = _Signature(signature, dtype)
            function.argtypes, function.restype = [ctypes.c_int64, *found.c_types], None
            functions[name] = function, found
        if self._links:
            addresses = [library.address(name, dtype) for library, name in self._links]
            library.link_functions((ctypes.c_void_p * len(addresses))(*addresses))
        self._loaded[dtype] = functions
        return functions

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the functions can be called; they are compiled now if needed.

        If that fails, one warning per process gives the reason, and it is not tried again.
        """
        if dtype not in self._loaded and not self.too_long:
            try:
                self._load(dtype)
            except RuntimeError as error:
                self._loaded[dtype] = {}
                text = f"plain torch runs instead of compiled products, several times slower: {error}"
                build.warn_once("torch", text)
        return bool(self._loaded.get(dtype))

    def __deepcopy__(self, memo: Any) -> Library:
        return self  # compiled code is shared; ctypes objects cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Library, (self._source, self._signatures, self._links), {"_together": self._together}


def compile_together(libraries: Iterable[Library]) -> None:
    """Compile all of these and those that they call, several at once, when one of them is first needed.

    Pass only libraries of one network: one that other networks use too is found by its links.
    """
    libraries = list(libraries)
    group = tuple(dict.fromkeys(one for library in libraries for one in library._with_links()))
    for library in libraries:
        library._together = group
