"""A type checker for jaxtyping's import hook that records what it finds and never stops a test.

Tests pass wrong arguments on purpose and expect the package's own errors, so a call counts only once it has
returned: an annotation is wrong if the function accepts what its annotation forbids, or returns what it does
not promise. The findings are written, one JSON string a line, to the file named by ``SHAPE_REPORT``.

    SHAPE_REPORT=report.txt PYTHONPATH=tests/contract \
        python -m pytest tests/unit --jaxtyping-packages=nbody_pyg,shape_recorder.record
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Callable
from typing import Any

import beartype
from beartype.roar import BeartypeCallHintViolation, BeartypeException

# An int is welcome where a float is annotated (PEP 484).
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_findings: dict[str, str] = {}


def record(function: Callable) -> Callable:
    """Check a call of ``function`` by its annotations, and note a violation instead of raising it."""
    # jaxtyping checks the arguments before the call (then the return type is Any) and everything after it
    if inspect.signature(function).return_annotation is Any:
        return lambda *args, **kwargs: None
    try:
        checked = _check(function)
    except BeartypeException:
        # Not an annotation that can be checked outside its class (Self, a type known to checkers only)
        return lambda *args, **kwargs: None
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def noting(*args: object, **kwargs: object) -> object:
        # The fields of a dataclass say what is stored; what is accepted is converted in __post_init__
        if name.endswith(".__init__") and args and dataclasses.is_dataclass(args[0]):
            return None
        try:
            return checked(*args, **kwargs)
        except BeartypeCallHintViolation as error:
            text = re.sub(r"\s+", " ", re.sub(r"\x1b\[[\d;]*m", "", str(error)))
            if "torch.SymInt" in text:  # while a graph is recorded, a symbol stands for an integer
                return None
            found = re.search(r"violates type hint (?P<hint>.+?), as ", text)
            part = re.search(r"(parameter \w+|return)", text)
            key = f"{name}: {part[0] if part else ''} against {found['hint'] if found else text[:200]}"
            _findings.setdefault(key, text[:600])
            return None

    return noting


@atexit.register
def _report() -> None:
    if path := os.environ.get("SHAPE_REPORT"):
        lines = [json.dumps(f"{key}\n    {text}") + "\n" for key, text in sorted(_findings.items())]
        with open(path, "a", encoding="utf-8") as file:  # each process of the run adds its own
            file.write("".join(lines))
