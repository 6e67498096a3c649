"""Docstrings tell the truth about signatures: every argument named exists, every default is the real one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import nbody_pyg

SECTION = re.compile(r"^(Args|Arguments|Attributes|Parameters):\s*$")
ENTRY = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?: |$)")
DEFAULT = re.compile(r"[Dd]efaults?(?: to|:| is)? ``(?P<value>[^`]+)``")


def _public(modules) -> Iterator[tuple[str, object]]:
    """Public classes, functions and methods that the package defines."""
    for module_name, module in modules.items():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module_name:
                continue
            if inspect.isfunction(value):
                yield f"{module_name}.{name}", value
            elif inspect.isclass(value):
                yield f"{module_name}.{name}", value
                for attribute, method in vars(value).items():
                    function = getattr(method, "__func__", method)
                    if inspect.isfunction(function) and not attribute.startswith("_"):
                        yield f"{module_name}.{name}.{attribute}", function


def _arguments(value: object) -> dict[str, str]:
    """Name -> text of each entry under ``Args:`` (for a class also ``Attributes:``)."""
    entries: dict[str, str] = {}
    inside, current = False, []
    for line in inspect.cleandoc(getattr(value, "__doc__", None) or "").splitlines():
        if SECTION.match(line):
            inside = line.startswith(("Args", "Arguments", "Parameters")) or inspect.isclass(value)
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (match := ENTRY.match(line)):
            current = [name.lstrip("*") for name in match["names"].split(", ")]
            entries |= dict.fromkeys(current, line)
        elif inside:
            for name in current:
                entries[name] += " " + line.strip()
    return entries


def _parameters(value: object) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return {}
    for name in ("self", "cls"):
        parameters.pop(name, None)
    return parameters


def test_public_classes_and_functions_have_docstrings(modules):
    missing = [name for name, value in _public(modules) if name.count(".") == _depth(value) and not value.__doc__]
    assert not missing, "without a docstring: " + ", ".join(missing)


def _depth(value: object) -> int:
    """Dots in the full name of a class or function that stands at the top of its module."""
    return value.__module__.count(".") + 1


def test_methods_of_exported_classes_have_docstrings():
    missing = []
    for name in nbody_pyg.__all__:
        cls = getattr(nbody_pyg, name)
        for attribute, value in vars(cls).items() if inspect.isclass(cls) else ():
            function = getattr(value, "__func__", value)
            # What overrides a documented method inherits its docstring; reset_parameters is PyG's word
            if attribute.startswith("_") or attribute == "reset_parameters" or not inspect.isfunction(function):
                continue
            if not any(inspect.getdoc(getattr(base, attribute, None)) for base in cls.__mro__):
                missing.append(f"{name}.{attribute}")
    assert not missing, "without a docstring: " + ", ".join(missing)


def test_documented_arguments_exist(modules):
    wrong = []
    for name, value in _public(modules):
        parameters = _parameters(value)
        known = set(parameters)
        if inspect.isclass(value):
            known |= set(dir(value)) | set(getattr(value, "__annotations__", {}))
        wrong += [f"{name}: {argument}" for argument in _arguments(value) if parameters and argument not in known]
    assert not wrong, "documented, but in no signature:\n" + "\n".join(wrong)


def test_exported_classes_and_functions_document_their_arguments():
    wrong = []
    for name in nbody_pyg.__all__:
        value = getattr(nbody_pyg, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        text = inspect.getdoc(value) or ""
        documented = set(_arguments(value))
        wrong += [
            f"{name}: {argument}"
            for argument, parameter in _parameters(value).items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and argument not in documented
            and f"``{argument}``" not in text
        ]
    assert not wrong, "public, but the docstring is silent on:\n" + "\n".join(wrong)


def test_documented_defaults_are_the_real_ones(modules):
    wrong = []
    for name, value in _public(modules):
        parameters = _parameters(value)
        for argument, text in _arguments(value).items():
            if not (match := DEFAULT.search(text)) or argument not in parameters:
                continue
            real = parameters[argument].default
            if match["value"].strip("\"'") not in (repr(real), str(real)):
                wrong.append(f"{name}: {argument} is {real!r}, documented as {match['value']}")
    assert not wrong, "\n".join(wrong)
