"""Public names of a package that are imported at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def imported_later(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """``__getattr__`` of a package for names that would load what most of its users do not need.

    Args:
        package: ``__name__`` of the package.
        homes: the module of each name, within the package.
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
