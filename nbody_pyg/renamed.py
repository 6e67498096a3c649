"""Old names of arguments, functions and modules are accepted with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Function], Function]:
    """Accept arguments by their old names too, as in ``@renamed(degree="avg_num_neighbors")``.

    Raises: TypeError: both names in one call.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            for old, new in names.items():
                if old in keywords:
                    if new in keywords:
                        raise TypeError(f"{old} is the old name of {new}; give {new} only")
                    warnings.warn(f"{old} is now called {new}; it will go in 0.4", DeprecationWarning, stacklevel=2)
                    keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return call  # type: ignore[return-value]  # of the same signature

    return decorate


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
