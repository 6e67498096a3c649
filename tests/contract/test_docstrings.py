"""Docstrings tell the truth about signatures: every argument named exists, every default is the real one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import nbody_pyg
from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.compare.runner import _patience
from nbody_pyg.deploy import NBodyCalculator
from nbody_pyg.deploy.dynamics import _HOTTEST
from nbody_pyg.kernels.backend import _BACKENDS

SECTION = re.compile(r"^(Args|Arguments|Attributes|Parameters):\s*$")
ENTRY = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?: |$)")
STATED = re.compile(r"\b(?:by default|defaults? (?:to|is|are|of))\b|\(default\b|\bdefault:", re.IGNORECASE)
_VALUE = r"(?P<value>``[^`]+``|\"[^\"]*\"|-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?|\b(?:True|False|None)\b)"
#: A default stated as a value: before the word, or after it
VALUES = [
    re.compile(_VALUE + r",? (?:by default|\(?(?:the )?default\b)", re.IGNORECASE),
    re.compile(r"(?:by default|\bdefaults? (?:to|is|are|of)|\(?\bdefault:?):? " + _VALUE, re.IGNORECASE),
]
#: The form of tables: ``name=value`` (default)
IN_TABLE = re.compile(r"``(?P<name>\w+)=(?P<value>[^`]+)`` \((?:the )?default\)")


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


def _false_default(text: str, real: object) -> str | None:
    """What is wrong with the default that the text on an argument states; None where nothing is, or it states none.

    ``None`` as a default stands for what only words can say, so there words are enough; any other is to be named.
    """
    if not STATED.search(text):
        return None
    if real is inspect.Parameter.empty:
        return "documented with a default, but has none"
    written = next((match["value"] for match in (form.search(text) for form in VALUES) if match), None)
    found = None if written is None else written.strip("`\"'")
    number = found is not None and found[:1] in "-0123456789"
    if found is None or (real is None and written[:1] in "-0123456789"):  # a number that None stands for: see DERIVED
        return None if real is None else f"is {real!r}, documented in words only"
    if number and isinstance(real, (int, float)) and not isinstance(real, bool):
        return None if float(found.replace(",", "")) == real else f"is {real!r}, documented as {found}"
    return None if found in (repr(real), str(real)) else f"is {real!r}, documented as {found}"


def _false_defaults(name: str, value: object) -> tuple[list[str], int]:
    """Each false statement on a default in the docstring of a class or function, and how many statements it has."""
    parameters, wrong, stated = _parameters(value), [], 0
    for argument, text in _arguments(value).items():
        if argument in parameters and STATED.search(text):
            stated += 1
            if problem := _false_default(text, parameters[argument].default):
                wrong.append(f"{name}: {argument} {problem}")
    for match in IN_TABLE.finditer(inspect.getdoc(value) or ""):
        stated += 1
        if match["name"] not in parameters:
            wrong.append(f"{name}: {match['name']} is no argument")
        elif match["value"].strip("\"'") != str(real := parameters[match["name"]].default):
            wrong.append(f"{name}: {match['name']} is {real!r}, documented as {match['value']}")
    return wrong, stated


def test_documented_defaults_are_the_real_ones(modules):
    wrong, stated = [], 0
    for name, value in _public(modules):
        found, count = _false_defaults(name, value)
        wrong += found
        stated += count
    assert not wrong, "\n".join(wrong)
    assert stated >= 15, f"only {stated} statements: the patterns no longer match how defaults are written"


@pytest.mark.parametrize(
    ("text", "real"),
    [
        ("size: of the box; 3 by default.", 4),
        ("size: of the box, by default ``3``.", 4),
        ("size: of the box. Defaults to 3.5.", 3.0),
        ('size: of the box; "small" by default.', "large"),
        ("size: of the box (default: ``True``).", False),
        ("size: of the box (default 3).", 4),
        ("size: ``None`` by default, all of it.", 3),
        ("size: ``3`` by default.", None),
        ("size: the default is 1e-3.", 1e-4),
        ("size: the whole box by default.", 3),
        ("size: 3 by default.", inspect.Parameter.empty),
    ],
)
def test_a_false_default_is_noticed(text, real):
    assert _false_default(text, real)


@pytest.mark.parametrize(
    ("text", "real"),
    [
        ("size: of the box; 3 by default.", 3),
        ("size: by default ``3``.", 3),
        ("size: the default is 1e-3.", 1e-3),
        ('size: "small" by default.', "small"),
        ("size: the whole box by default.", None),
        ("size: of the default box.", 3),
    ],
)
def test_a_true_default_passes(text, real):
    assert _false_default(text, real) is None


def test_a_false_default_in_a_table_is_noticed():
    def function(kind: str = "first") -> None:
        """==================  ====
        ``kind="each"`` (default)  each
        ==================  ====
        """

    assert _false_defaults("function", function) == (["function: kind is 'first', documented as \"each\""], 1)


def _default(function: object, name: str) -> str:
    return str(inspect.signature(function).parameters[name].default)


#: Defaults on pages and in sentences: where, the sentence with the value as its groups, and what it is in the code
DERIVED = [
    (
        "docs/conventions.md",
        r"`([\w+ ]+)` \(default\) \| \d+, \d+",
        lambda: [" + ".join(f"{mul}x{ir}" for mul, ir in NBodyNet([1]).irreps)],
    ),
    ("docs/conventions.md", r'`"([\w-]+)"` \(default\) \| 0e', lambda: [NBodyNet([1]).parity]),
    (
        "docs/conventions.md",
        r"`([\w +]+)` \(default\) \| 7685",
        lambda: [str(NBodyNet([1]).irreps).replace("+", " + ")],
    ),
    (
        "docs/conventions.md",
        r"exponent p as an argument, (\d+) by default",
        lambda: [_default(NestedShells, "exponent")],
    ),
    ("docs/simulation.md", r'`"(\w+)"` \(default\) \| found in this', lambda: [_default(NBodyCalculator, "bonds")]),
    ("docs/native.md", r"`(\w+)` \(default\) \| the native program", lambda: [_default(NBodyCalculator, "engine")]),
    ("docs/simulation.md", r"`NBODY_BACKEND` \| `(\w+)` \(default\)", lambda: [_BACKENDS[0]]),
    (
        "nbody_pyg/models.py",
        r"nested shells, of ([\d.]+) and ([\d.]+) angstrom",
        lambda: _texts(NestedShells().radii),
    ),
    ("nbody_pyg/deploy/dynamics.py", r"max_temperature: K; by default ([\d,]+)", lambda: [f"{_HOTTEST:,.0f}"]),
    ("nbody_pyg/cli/main.py", r"inf: never \(default: (\d+)", lambda: [f"{_HOTTEST:.0f}"]),
    ("nbody_pyg/compare/runner.py", r"by default (\d+) and (\d+) times the budget", lambda: _patience_in_words()),
]


def _texts(numbers) -> list[str]:
    return [f"{number:g}" for number in numbers]


def _patience_in_words() -> list[str]:
    """The constant and the factor of the time that a run is given."""
    at_0, at_1 = (_patience(SimpleNamespace(training={"budget_seconds": seconds})) for seconds in (0.0, 1.0))
    return _texts([at_0, at_1 - at_0])


@pytest.mark.parametrize(("path", "sentence", "real"), DERIVED, ids=[f"{p}-{i}" for i, (p, _, _) in enumerate(DERIVED)])
def test_defaults_on_pages_are_the_real_ones(root, path, sentence, real):
    text = re.sub(r"\s+", " ", (root / path).read_text(encoding="utf-8"))
    found = re.findall(sentence, text)
    assert len(found) == 1, f"{path} no longer says {sentence!r} once; tell this test how it says it now"
    assert list(found[0] if isinstance(found[0], tuple) else found) == real()


def test_every_default_in_a_table_of_the_pages_is_compared(root):
    known = [(path, re.compile(sentence)) for path, sentence, _ in DERIVED]
    missed = [
        f"{path.name}: {line}"
        for path in sorted((root / "docs").glob("*.md"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "` (default)" in line and not any(root / page == path and form.search(line) for page, form in known)
    ]
    assert not missed, "add to DERIVED:\n" + "\n".join(missed)
