"""Model files of every released format load, and give the energies and forces that they gave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loading import load_script
from nbody_pyg.deploy import FORMAT_VERSION, read_metadata

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("model_format_*.nbody"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_gives_what_it_gave(path):
    assert read_metadata(path)["format_version"] == int(path.stem.split("_")[-1])
    expected, found = json.loads(path.with_suffix(".json").read_text()), load_script(FOLDER / "models.py").values(path)
    np.testing.assert_allclose(found["energy"], expected["energy"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["forces"], expected["forces"], rtol=0, atol=1e-9)
    assert np.abs(expected["forces"]).min() > 1e-6


def test_every_format_has_a_file():
    assert [int(path.stem.split("_")[-1]) for path in FILES] == list(range(1, FORMAT_VERSION + 1))
