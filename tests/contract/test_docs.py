"""The pages of docs/ and benchmarks/ are true: code runs, links lead somewhere, cited files and tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for folder in ("docs", "benchmarks") for page in sorted((ROOT / folder).glob("*.md"))]
FENCE = re.compile(r"^```python\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
CITED = re.compile(r"`(?P<path>(?:nbody_pyg|tests|datasets|notebooks|configs)/[\w/.-]+)?(?:::(?P<name>\w+))?`")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request) -> Path:
    return request.param


@pytest.mark.slow
def test_python_blocks_run(page, run_blocks):
    run_blocks([match["body"] for match in FENCE.finditer(page.read_text(encoding="utf-8"))])


def test_links_lead_somewhere(page):
    text, broken = page.read_text(encoding="utf-8"), []
    for match in LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = page.parent / target if target else page
        found = file.exists()
        if found and anchor:
            titles = [m["title"] for m in HEADING.finditer(file.read_text(encoding="utf-8"))]
            found = anchor in {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}
        if not found:
            broken.append(match["target"])
    assert not broken, f"{page.name} links to nothing at {broken}"


def test_cited_files_and_tests_exist(page):
    """`` `tests/x.py::test_a`, `::test_b` `` cites two tests of one file."""
    missing, path = [], None
    for match in CITED.finditer(page.read_text(encoding="utf-8")):
        if not (match["path"] or match["name"]):  # the marks of a block of code
            continue
        path = ROOT / match["path"] if match["path"] else path
        found = path is not None and path.exists()
        if found and match["name"]:
            found = re.search(rf"\b(?:def|class) {match['name']}\b", path.read_text(encoding="utf-8"))
        if not found:
            missing.append(match[0])
    assert not missing, f"{page.name} cites what does not exist: {missing}"
