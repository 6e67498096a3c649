"""Help comes at once: no torch for it. The text of the two commands whose options are keys is stored, and true.

Options have changed: write the texts anew with ``python tests/contract/test_cli_help.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nbody_pyg

FOLDER = Path(nbody_pyg.__file__).parent / "cli"
COMMANDS = (
    "train",
    "compare",
    "evaluate",
    "info",
    "check",
    "md",
    "relax",
    "solid",
    "infrared",
    "energies",
    "hierarchy",
)


def texts() -> dict[str, str]:
    """What the parsers say, by the name of the stored file."""
    from nbody_pyg.compare.config import compare_parser
    from nbody_pyg.training.config import config_parser

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        return {"train_help.txt": config_parser().format_help(), "compare_help.txt": compare_parser().format_help()}
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def test_the_stored_texts_are_those_of_the_parsers():
    for name, text in texts().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"run python {Path(__file__).name}"


@pytest.mark.parametrize("words", [["--help"], [], ["trian"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_torch(words):
    code = "import sys\nfrom nbody_pyg.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'jsonargparse', 'ase', 'numpy', 'matplotlib'} & set(sys.modules)"
    root = str(FOLDER.parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nbody" in done.stdout + done.stderr


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
