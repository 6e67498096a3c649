"""Annotations are true: no call of a run of tests takes or returns what its signature forbids.

Shapes are annotated in jaxtyping's notation and cost nothing at run time. With ``pytest --annotations`` the hook below
checks them at every call. It records what it finds and never stops a test: tests pass wrong arguments on purpose and
expect the package's own errors, so a call counts only once it has returned. An annotation is wrong if the function
accepts what its annotation forbids, or returns what it does not promise. The run fails at its end if any is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping
import pytest
from beartype.roar import BeartypeCallHintViolation, BeartypeException

# An int is welcome where a float is annotated (PEP 484).
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_findings: dict[str, str] = {}
_of_processes: set[str] = set()


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


def findings() -> list[str]:
    """What was found in this process, a text for each annotation."""
    return [f"{key}\n    {text}" for key, text in sorted(_findings.items())]


# --- hooks of pytest, if this module is registered as a plugin


def pytest_configure(config: pytest.Config) -> None:
    # Before the first import of the package
    jaxtyping.install_import_hook("nbody_pyg", "annotations.record")


def pytest_testnodedown(node: Any) -> None:
    """What a process of pytest-xdist found."""
    _of_processes.update(getattr(node, "workeroutput", {}).get("annotations", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["annotations"] = findings()
    elif _of_processes or _findings:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if false := sorted({*_of_processes, *findings()}):
        terminalreporter.section("annotations that calls do not keep")
        terminalreporter.write_line("\n".join(false))
