"""Every notebook runs from top to bottom, is stored without outputs, and ends by asserting a fact.

They run in a short setting: the notebooks read ``NBODY_SHORT`` and train for seconds instead of minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra [dev]")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra [dev]")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def _code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_stored_without_outputs(notebook):
    dirty = [i for i, cell in enumerate(_code(notebook)) if cell.outputs or cell.execution_count]
    assert not dirty, f"code cells {dirty} hold outputs; clear them before the commit"


def test_ends_with_an_assertion(notebook):
    assert "assert " in _code(notebook)[-1].source, "the last cell asserts a physical fact"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("NBODY_SHORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The kernel starts in an empty folder, so what the notebook writes stays out of the project
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in _code(notebook))
