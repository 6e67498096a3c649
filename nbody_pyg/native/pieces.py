"""Generated C functions of several layers in one program: every name of a piece gets the number of the piece."""

from __future__ import annotations

import re
from collections.abc import Iterator

_FUNCTION = re.compile(r"^(?:static )?(?:inline )?(?:void|int64_t|real|double)\*? (\w+)\(", re.MULTILINE)
_MACRO = re.compile(r"^#define (\w+)", re.MULTILINE)
_TYPE = re.compile(r"^typedef [^\n]*\b(\w+);", re.MULTILINE)
_ENUM = re.compile(r"enum \{([^}]*)\}")
_TABLE = re.compile(r"(\w+)\[\] = \{")


class Pieces:
    """Pieces of C source that may define the same names; equal pieces are kept once.

    A piece is renamed word by word, also its local variables, so it means the same. All its functions become static.

    Example:
        >>> pieces = Pieces()
        >>> pieces.add("void twice(double* x) { *x *= 2; }"), pieces.add("void twice(double* x) { *x *= 2; }")
        (1, 1)
        >>> pieces.source()
        'static void twice_1(double* x) { *x *= 2; }'
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, source: str) -> int:
        """The number of a piece: its function ``f`` is called ``f_NUMBER``."""
        return self._numbers.setdefault(source, len(self._numbers) + 1)

    def source(self) -> str:
        """All pieces in the order in which they were added."""
        return "\n".join(_numbered(source, number) for source, number in self._numbers.items())


def _numbered(source: str, number: int) -> str:
    own = set(_defined(source))
    static = re.sub(r"^void ", "static void ", source, flags=re.MULTILINE)
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: f"{m[0]}_{number}" if m[0] in own else m[0], static)


def _defined(source: str) -> Iterator[str]:
    """Names that a source defines outside of functions."""
    for pattern in (_FUNCTION, _MACRO, _TYPE):
        yield from pattern.findall(source)
    for body in _ENUM.findall(source):
        yield from (entry.partition("=")[0].strip() for entry in body.split(","))
    for line in source.splitlines():
        if line.startswith("static const"):
            yield from _TABLE.findall(line)
