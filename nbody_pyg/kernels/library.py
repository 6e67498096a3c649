"""Functions of one generated source, by dtype, compiled at first use and called with tensors and numbers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.kernels import build
from nbody_pyg.kernels.codegen import prelude
from nbody_pyg.kernels.operands import Several, address, addresses
from nbody_pyg.kernels.scope import is_dry

_C_NAMES = {torch.float32: "float", torch.float64: "double"}


class _Signature:
    """The arguments of one function for one dtype, see :class:`Library`."""

    def __init__(self, text: str, dtype: torch.dtype) -> None:
        words = text.split()
        self.c_types = [_c_type(word) for word in words if not word.startswith("(")]
        # Looked at for every tensor of every call: plain tuples of (dtype, whether passed on, whether None is allowed)
        self.kinds = [
            (torch.int64 if word.startswith("longs") else dtype, not word.startswith("("), "?" in word)
            for word in words
        ]
        names = {word.strip("()"): place for place, word in enumerate(words)}
        self._products: list[tuple[int, tuple[int, ...]] | None] = []
        for word in words:
            parts = word.partition(":")[2].split("*") if ":" in word else None
            factor = math.prod(int(part) for part in parts or () if part.isdigit())
            places = tuple(names[part] for part in parts or () if not part.isdigit())
            self._products.append(None if parts is None else (factor, places))
        self._places = tuple(sorted({place for _, places in filter(None, self._products) for place in places}))
        self._known: dict[tuple[int, ...], list[int | None]] = {}

    def sizes(self, arguments: Sequence[Any]) -> list[int | None]:
        """How many numbers each argument holds; None for what is no tensor."""
        integers = tuple([arguments[place] for place in self._places])
        sizes = self._known.get(integers)
        if sizes is None:
            sizes = [
                None if product is None else product[0] * math.prod(arguments[place] for place in product[1])
                for product in self._products
            ]
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[integers] = sizes
        return sizes


def _c_type(word: str) -> Any:
    if word.startswith("double"):
        return ctypes.c_double
    return ctypes.c_void_p if ":" in word or word.startswith("several") else ctypes.c_int64


#: Sets of sizes that a function remembers.
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

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | Several | float | int | None) -> None:
        """Call one function; every tensor is checked against the signature, see :func:`~operands.address`."""
        if is_dry():
            return
        functions = self._loaded.get(dtype) or self._load(dtype)
        function, signature = functions[name]
        given: list[Any] = []
        for (wanted, passed, optional), size, value in zip(
            signature.kinds, signature.sizes(arguments), arguments, strict=True
        ):
            if size is not None and value is not None:
                # `address` without a call of Python for each tensor of each call; it says what is wrong
                try:
                    fits = type(value) is Tensor and value.dtype is wanted and value.is_cpu
                    fits = fits and value.numel() == size and value.is_contiguous()
                    pointer = value.data_ptr() if fits else 0
                except RuntimeError:
                    pointer = 0
                given.append(pointer or address(value, wanted, size))
            elif value is None:
                if not optional:
                    raise TypeError(f"{name} needs a tensor, got None; pass every tensor that the products take")
                given.append(None)
            elif passed:
                given.append(addresses(value, dtype) if isinstance(value, Several) else value)
        function(*given)

    def address(self, name: str, dtype: torch.dtype) -> int:
        """Where one of the functions lies."""
        functions = self._loaded.get(dtype) or self._load(dtype)
        return ctypes.cast(functions[name][0], ctypes.c_void_p).value

    @build.one_at_a_time  # nobody may call a function before it is linked
    def _load(self, dtype: torch.dtype) -> dict:
        library = build.load(prelude(_C_NAMES[dtype]) + self._source)
        functions = {}
        for name, signature in self._signatures.items():
            function = getattr(library, name)
            found = _Signature(signature, dtype)
            function.argtypes, function.restype = found.c_types, None
            functions[name] = function, found
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
