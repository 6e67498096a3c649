"""Extension of griffe: our docstrings (Google sections, reStructuredText for formulae and tables) as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

LABEL = re.compile(
    r"^(?P<label>Shapes?|Equivariance|Symmetry|Smoothness|Continuity|Cost|Raises|Sources?|Example|Returns|Units): "
    r"(?P<text>\S.*)$"
)
RULE = re.compile(r"^=+(  +=+)+$")


class Markdown(griffe.Extension):
    """Rewrites every docstring before its sections are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """The docstring with formulae between dollars, tables with bars, and one-line sections as paragraphs.

    >>> print(to_markdown("Energy.\\n\\n.. math:: E = mc^2\\n\\nCost: O(N). See :class:`~a.B` of ``c``."))
    Energy.
    <BLANKLINE>
    $$
    E = mc^2
    $$
    <BLANKLINE>
    **Cost**: O(N). See <autoref identifier="a.B" optional><code>B</code></autoref> of ``c``.
    """
    lines, out, i = text.split("\n"), [], 0
    while i < len(lines):
        line, stripped = lines[i], lines[i].strip()
        indent = line[: len(line) - len(line.lstrip())]
        if stripped.startswith(".. math::"):
            body, i = _block(lines, i, len(indent))
            first = stripped.removeprefix(".. math::").strip()
            out += ["", f"{indent}$$", *(indent + part for part in [first, *body] if part), f"{indent}$$", ""]
        elif RULE.match(stripped):
            table, i = _table(lines, i, indent)
            out += ["", *table, ""]
        elif label := LABEL.match(line):
            out += ["", f"**{label['label']}**: {_roles(label['text'])}"]
            i += 1
            while i < len(lines) and lines[i].startswith(" "):  # what goes on below it
                out.append(_roles(lines[i].strip()))
                i += 1
        else:
            out.append(_roles(line))
            i += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def _block(lines: list[str], start: int, indent: int) -> tuple[list[str], int]:
    """Lines that belong to a directive, without their indentation, and where the text goes on."""
    i, body = start + 1, []
    while i < len(lines) and (not lines[i].strip() or len(lines[i]) - len(lines[i].lstrip()) > indent):
        body.append(lines[i].strip())
        i += 1
    return body, i


def _table(lines: list[str], start: int, indent: str) -> tuple[list[str], int]:
    """A simple table; columns begin where the strokes of its rule begin."""
    rule = lines[start]
    begins = [match.start() for match in re.finditer("=+", rule)]
    rules = [i for i in range(start, len(lines)) if RULE.match(lines[i].strip())][:3]
    rows: list[list[str]] = []
    for line in lines[start + 1 : rules[-1]]:
        if RULE.match(line.strip()) or not line.strip():
            continue
        ends = [*begins[1:], None]
        cells = [_cell(line[a:b]) for a, b in zip(begins, ends, strict=True)]
        if rows and not any(cells[:-1]):  # goes on from the line above
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    head = [rows[0], ["---"] * len(begins)]
    return [f"{indent}| {' | '.join(row)} |" for row in head + rows[1:]], rules[-1] + 1


def _cell(text: str) -> str:
    """Bars would end the cell, in formulae as elsewhere."""
    parts = re.split(r"(\$[^$]+\$)", _roles(text.strip()))
    return "".join(p.replace("|", "\\vert " if p.startswith("$") else "\\|") for p in parts)


def _roles(line: str) -> str:
    line = re.sub(r":math:`([^`]+)`", r"$\1$", line)

    def link(match: re.Match) -> str:
        target = match["target"].lstrip("~")
        label = target.rsplit(".", 1)[-1] if match["target"].startswith("~") else target
        return f'<autoref identifier="{target}" optional><code>{label}</code></autoref>'

    return re.sub(r":(?:class|func|meth|mod|attr|exc|data|obj):`(?P<target>[^`]+)`", link, line)
