"""Helpers for messages: choices, the nearest known word, elements, and text from files."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Sequence


def closest(word: object, known: Iterable[str]) -> str | None:
    """The known word nearest to ``word``, ignoring case; None if none is near."""
    plain = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), plain, n=1, cutoff=0.5)
    return plain[near[0]] if near else None


def nearest(word: object, known: Iterable[str], prefix: str = "") -> str:
    """A hint that names the known word nearest to ``word``, or lists all of them; ``prefix`` is put before the word."""
    known = list(known)
    near = closest(word, known)
    return f"did you mean {prefix}{near}?" if near else f"there are {', '.join(known) or 'no others'}"


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """The value. Raises: ValueError: it is not one of the choices; the message suggests the nearest one, or the
    first."""
    choices = list(choices)
    if value not in choices:
        near = closest(value, choices)
        hint = f"did you mean {near}?" if near else f"try {choices[0]!r}"
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {hint}")
    return value


def symbols(numbers: Iterable[int]) -> str:
    """Elements by their symbols: "H, C, O"; numbers that are not elements are kept."""
    from ase.data import chemical_symbols  # imports numpy, which --help must not

    return ", ".join(chemical_symbols[n] if 0 < n < len(chemical_symbols) else f"element {n}" for n in numbers)


def printable(text: object) -> str:
    """Text with control characters escaped, because files and their names are not trusted."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int], rule: bool = True) -> str:
    """A table: columns two spaces apart, those of the numbers ``right`` to the right; ``rule`` underlines the head."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    if rule:
        lines.insert(1, ["-" * width for width in widths])
    cells = [[w.rjust(n) if i in right else w.ljust(n) for i, (w, n) in enumerate(zip(line, widths, strict=True))]
             for line in lines]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in cells)


def short(value: object) -> str:
    """A value as Python writes it, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
