"""Old names of arguments, functions and modules are accepted with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


#: Old name of an argument of a network: its name, and its values by the old ones.
FORMER_ARGUMENTS: Mapping[str, str | tuple[str, Mapping[Any, Any]]] = {
    "body_order": "correlation",
    "degrees": "avg_num_neighbors",
    "target": ("readout", {"extensive": "sum", "intensive": "root"}),
    "symmetry": ("parity", {"o3": "natural", "o3-full": "both", "so3": "ignored"}),
}


#: The same for modules below a network.
FORMER_PARITY = {"symmetry": FORMER_ARGUMENTS["symmetry"]}


def renamed(**names: str | tuple[str, Mapping[Any, Any]]) -> Callable[[Function], Function]:
    """Accept arguments by their old names too, as in ``@renamed(degree="avg_num_neighbors")``.

    With a pair of a name and a mapping, values that have another name now are accepted too.

    Raises: TypeError: both names in one call.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not names.keys().isdisjoint(keywords):
                keywords = present_names(keywords, names)
            return function(*arguments, **keywords)

        return call  # type: ignore[return-value]  # of the same signature

    return decorate


def present_names(
    given: Mapping[str, Any], names: Mapping[str, str | tuple[str, Mapping[Any, Any]]], stacklevel: int = 2
) -> dict[str, Any]:
    """Arguments by their present names, in their order. ``names`` as for :func:`renamed`; ``stacklevel`` 0: no warning.

    Raises: TypeError: an argument has both names.
    """
    out: dict[str, Any] = {}
    for old, value in given.items():
        found = names.get(old, old)
        new, values = (found, {}) if isinstance(found, str) else found
        if new != old:
            if new in given:
                raise TypeError(f"{old} is the old name of {new}; give {new} only")
            if stacklevel:
                text = f"{old} is now called {new}; it will go in 0.4"
                warnings.warn(text, DeprecationWarning, stacklevel=stacklevel + 1)
        out[new] = values.get(value, value) if isinstance(value, str) else value
    return out


def former(name: str, function: Function) -> Function:
    """A function under its old name, with a warning."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        warnings.warn(f"{name} is now called {function.__name__}; it will go in 0.4", DeprecationWarning, stacklevel=2)
        return function(*arguments, **keywords)

    return call  # type: ignore[return-value]  # of the same signature


def former_module(name: str, module: ModuleType, names: Collection[str]) -> Callable[[str], Any]:
    """``__getattr__`` of a module that has another name now: it hands these public names on, with a warning."""

    def find(wanted: str) -> Any:
        if wanted not in names:
            raise AttributeError(f"module {name!r} has no attribute {wanted!r}")
        warnings.warn(f"{name} is now called {module.__name__}; it will go in 0.4", DeprecationWarning, stacklevel=2)
        return getattr(module, wanted)

    return find
