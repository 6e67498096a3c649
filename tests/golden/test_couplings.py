"""Pinned values and signs of the coupling coefficients: weights mean nothing under another convention."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from e3nn import o3

from nbody_pyg.deploy import cg_fingerprint
from nbody_pyg.nn.irreps import clebsch_gordan

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "wigner_3j.json").read_text())


@pytest.mark.parametrize("key", sorted(TABLE))
def test_couplings_have_the_pinned_values_and_signs(key):
    degrees = [int(l) for l in key.split(",")]
    expected = torch.tensor(TABLE[key], dtype=torch.float64)
    torch.testing.assert_close(o3.wigner_3j(*degrees, dtype=torch.float64), expected, rtol=0, atol=1e-12)
    scaled = expected * math.sqrt(2 * degrees[2] + 1)
    torch.testing.assert_close(clebsch_gordan(*degrees), scaled, rtol=0, atol=1e-12)
    assert expected.square().sum() == pytest.approx(1.0, abs=1e-12)


def test_the_fingerprint_of_model_files_is_the_pinned_one():
    """Frozen with e3nn 0.6.0, where the couplings up to degree 2 are those of the table. When this fails, old
    model files no longer load: find out what changed before changing the number."""
    assert cg_fingerprint() == "969b842bec3b5e88e506b9938ec12719fc39c4bbf6ad035993e42040d2794cb3"


def test_the_table_is_what_its_script_makes():
    made = runpy.run_path(str(HERE / "regenerate.py"))["table"]()
    assert sorted(made) == sorted(TABLE)
    for key, value in made.items():
        assert torch.allclose(torch.tensor(value), torch.tensor(TABLE[key]), rtol=0, atol=1e-15)


def test_no_golden_file_without_a_script():
    assert {p.name for p in HERE.iterdir() if p.is_file()} == {
        "model_format_1.json",
        "model_format_1.nbody",
        "model_format_2.json",
        "model_format_2.nbody",
        "model_format_3.json",
        "model_format_3.nbody",
        "model_format_4.json",
        "model_format_4.nbody",
        "model_format_5.json",
        "model_format_5.nbody",
        "model_format_6.json",
        "model_format_6.nbody",
        "models.py",
        "regenerate.py",
        "test_couplings.py",
        "test_model_files.py",
        "wigner_3j.json",
    }
