"""Import an optional program, or say how to install it."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from typing import Any


def require_engine(module: str, extra: str, least: str | None = None) -> Any:
    """The module of an optional program.

    Args:
        module: name to import, such as "openmm".
        extra: the extra of nbody_pyg that installs it, for the message.
        least: lowest version, of the package of the same name.
    Raises: ImportError: it is missing or older; the message names the extra.
    """
    cure = f"pip install 'nbody_pyg[{extra}]'"
    try:
        found = importlib.import_module(module)
        if getattr(found, "__file__", "") is None:
            raise ImportError(f"{module} is a folder on the path, no package")
    except ImportError as error:
        raise ImportError(f"nbody_pyg.engines.{extra} needs {module}, which cannot be imported: {cure}") from error
    if least is not None and _numbers(version := metadata.version(module)) < _numbers(least):
        raise ImportError(f"nbody_pyg.engines.{extra} needs {module} {least} or newer, got {version}: {cure}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Leading whole numbers of a version: "8.4.1rc1" gives (8, 4, 1)."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[a-z+-]", version.lower(), maxsplit=1)[0]))
