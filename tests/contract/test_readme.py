"""What the README says can be done: its code runs, its commands exist, its links lead somewhere.

A block of Python that must not run (it needs a download, say) is preceded by a line
``<!-- not run: reason -->``.
"""

from __future__ import annotations

import re

import pytest

from nbody_pyg.cli import main

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- (not run: .+|run by tests/\S+, .+) -->\s*\Z")
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)")


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def _commands(readme: str) -> list[str]:
    """Lines of shell in fenced or indented blocks, without prompt and comment."""
    shell = [m["body"] for m in FENCE.finditer(readme) if m["language"] in {"", "bash", "sh", "shell", "console"}]
    shell += [line[4:] for line in FENCE.sub("", readme).splitlines() if line.startswith("    ")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split("#")[0].strip() for line in lines if line.strip()]


def test_the_make_commands_exist(root, readme):
    targets = set(re.findall(r"^([\w-]+):(?!=)", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {line.split()[1] for line in _commands(readme) if line.startswith("make ")}
    assert {"train", "test"} <= used, "the README shows the two commands"
    assert used <= targets, f"no such target in the Makefile: {sorted(used - targets)}"


def test_the_nbody_commands_exist(readme, capsys):
    used = {line.split()[1] for line in _commands(readme) if line.startswith("nbody ")}
    assert {"train", "evaluate", "info", "md", "hierarchy"} <= used, "the README shows every command"
    for name in sorted(used - {"--help"}):
        try:
            code = main([name, "--help"])
        except SystemExit as stop:  # argparse leaves so
            code = stop.code
        printed = capsys.readouterr()
        assert not code, f"nbody {name}: {printed.err}"
        assert name in printed.out


def test_relative_links_lead_somewhere(root, readme):
    targets = {m["target"] for m in LINK.finditer(readme)}
    broken = [t for t in targets if not t.startswith(("http:", "https:", "mailto:")) and not (root / t).exists()]
    assert not broken, f"the README links to nothing at {broken}"


@pytest.mark.slow
def test_python_blocks_run(readme, run_blocks):
    run_blocks(
        [
            m["body"]
            for m in FENCE.finditer(readme)
            if m["language"] == "python" and not NOT_RUN.search(readme[: m.start()])
        ]
    )
