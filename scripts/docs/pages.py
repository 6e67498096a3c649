"""MkDocs hook: pages from outside docs/, and links that are right both in the repository and on the site."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/details.md": "details.md",
} | {f"notebooks/{p.name}": f"notebooks/{p.stem}.md" for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?P<image>!?)\[(?P<label>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_notebook(text) if source.endswith(".ipynb") else text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if found is not None:
            here = posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or ".")
            return f"{match['image']}[{match['label']}]({here}{'#' + anchor if anchor else ''})"
        if path.startswith("nbody_pyg/") and path.endswith(".py"):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            label = re.sub(r"`(.+?)`", r"<code>\1</code>", match["label"])
            return f'<autoref identifier="{module}" optional>{label}</autoref>'
        return match["label"]  # a file that is no page

    return LINK.sub(replace, markdown)


def _notebook(text: str) -> str:
    """Texts and code, in order; notebooks are stored without outputs."""
    blocks = []
    for cell in json.loads(text)["cells"]:
        body = "".join(cell["source"])
        blocks.append(body if cell["cell_type"] == "markdown" else f"```python\n{body}\n```")
    return "\n\n".join(blocks) + "\n"
