"""The site of the documentation: every page is in its navigation, every entry has a page, and it builds."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from loading import load_script

#: What mkdocs.yml names but scripts/docs/pages.py brings in from elsewhere: page -> file of the repository.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "results.md": "benchmarks/RESULTS.md",
    "details.md": "benchmarks/details.md",
}


@pytest.fixture(scope="module")
def nav(root) -> list[str]:
    """All pages of the navigation, in order."""
    return list(_pages(yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(part)


def test_the_navigation_names_every_page_once(root, nav):
    assert len(nav) == len(set(nav)), "a page stands twice in the nav of mkdocs.yml"
    docs = {path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (root / "notebooks").glob("*.ipynb")}
    missing = sorted((docs | notebooks | set(ELSEWHERE)) - set(nav))
    assert not missing, f"add a line for each of these to the nav of mkdocs.yml: {missing}"


def test_every_entry_has_a_page(root, nav):
    lost = []
    for page in nav:
        file = root / ELSEWHERE.get(page, f"docs/{page}")
        if page.startswith("notebooks/"):
            file = (root / page).with_suffix(".ipynb")
        if not file.is_file():
            lost.append(page)
    assert not lost, f"the nav of mkdocs.yml names pages that do not exist: {lost}"


def test_api_pages_name_what_exists(root):
    names = [
        name
        for page in sorted((root / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(names) == len(set(names)) and len(names) >= 10
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), f"no such thing: {name}"


def test_docstrings_become_markdown(root):
    pytest.importorskip("griffe", reason="needs the extra [docs]")
    module = load_script(root / "scripts" / "docs" / "docstrings.py")
    assert doctest.testmod(module).failed == 0
    table = "=====  ====\nname   what\n=====  ====\n``x``  |r| of\n       :math:`|a|`\n=====  ===="
    found = module.to_markdown(table).split("\n")
    assert found == ["| name | what |", "| --- | --- |", r"| ``x`` | \|r\| of $\vert a\vert $ |"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra [docs]")
def test_the_site_builds_without_a_warning(root, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "nn.html").read_text(encoding="utf-8")
    assert "NBodyConv" in page and "<math" in page and "<table>" in page
    assert ".. math::" not in page and ":class:" not in page and "====" not in page
