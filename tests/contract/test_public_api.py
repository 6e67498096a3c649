"""The public names and their signatures are those of api.txt.

A change on purpose: write the file anew with ``python tests/contract/test_public_api.py``, and say in
CHANGELOG.md what changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import nbody_pyg

SNAPSHOT = Path(__file__).with_name("api.txt")


def _signature(function) -> str:
    try:
        text = str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"
    return text.replace("nbody_pyg.", "")


def _members(name: str, cls: type) -> Iterator[str]:
    """Public methods and properties that the package itself defines, inherited ones included."""
    for attribute in sorted({a for c in cls.__mro__ if c.__module__.startswith("nbody_pyg") for a in vars(c)}):
        if attribute.startswith("_"):
            continue
        value = inspect.getattr_static(cls, attribute)
        if isinstance(value, property):
            yield f"property {name}.{attribute}"
        elif isinstance(value, (staticmethod, classmethod)):
            yield f"{type(value).__name__} {name}.{attribute}{_signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"method {name}.{attribute}{_signature(value)}"


def public_api() -> list[str]:
    """One line for each public name, method and property."""
    lines = []
    for name in sorted(nbody_pyg.__all__):
        value = getattr(nbody_pyg, name)
        if inspect.isclass(value):
            lines += [f"class {name}{_signature(value)}", *_members(name, value)]
        elif inspect.isfunction(value):
            lines.append(f"function {name}{_signature(value)}")
        elif inspect.ismodule(value):
            lines.append(f"module {name}")
        else:
            lines.append(f"value {name}: {type(value).__name__}")
    return lines


def test_public_api_is_the_recorded_one():
    recorded = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    found = public_api()
    lost = sorted(set(recorded) - set(found))
    new = sorted(set(found) - set(recorded))
    assert found == recorded, "the public interface changed:\n" + "\n".join(
        [f"- {line}" for line in lost] + [f"+ {line}" for line in new] + ["", __doc__ or ""]
    )


def test_defaults_have_a_lasting_text():
    # The repr of an object as a default would change with every run
    assert not [line for line in public_api() if " at 0x" in line]


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(public_api()) + "\n", encoding="utf-8")
