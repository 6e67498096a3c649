"""The script that makes the embedded sets: geometry, checks, resuming, and a set in small."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from loading import load_script
from nbody_pyg.datasets import read_frames

pytest.importorskip("tblite.ase", reason="making the embedded sets needs tblite, from the extra [data]")


@pytest.fixture
def script(request):
    return load_script(request.config.rootpath / "datasets" / "make_embedded.py")


@pytest.mark.parametrize(("phi", "psi"), [(-83.0, 73.0), (60.0, 40.0), (-150.0, 160.0)])
def test_the_dipeptide_has_its_bonds_dihedrals_and_hand(script, phi, psi):
    atoms = script.alanine_dipeptide(phi, psi)
    assert atoms.get_chemical_formula() == "C6H12N2O2"
    assert script.bonds(atoms) == script.expected_bonds("alanine_dipeptide")
    assert atoms.get_dihedral(1, 3, 5, 6) == pytest.approx(phi % 360, abs=1e-6)
    assert atoms.get_dihedral(3, 5, 6, 10) == pytest.approx(psi % 360, abs=1e-6)
    # Seen from the hydrogen at C-alpha, CO, R and N run clockwise in the L form
    centre, hydrogen = atoms.positions[5], atoms.positions[8]
    carbonyl, side, nitrogen = (atoms.positions[i] - centre for i in (6, 7, 3))
    turn = np.cross(carbonyl, side) + np.cross(side, nitrogen) + np.cross(nitrogen, carbonyl)
    assert float(turn @ (hydrogen - centre)) < 0
    assert script.chirality(atoms) > 1


@pytest.fixture
def small(script, monkeypatch):
    """Two walkers of three frames, briefly equilibrated."""
    monkeypatch.setattr(script, "SPLITS", (script.Split("train", 300.0, 6, 2),))
    settings = script.Sampling(timestep=1.0, friction=0.05, equilibration=20.0, stride=5.0)
    monkeypatch.setattr(script, "SAMPLING", {"ethanol": settings})
    return script


@pytest.mark.filterwarnings("ignore:Use thermalize_momenta:DeprecationWarning")
def test_a_small_set_is_made_resumed_and_read(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(small, "statistics", lambda *args: {})  # six frames have no temperature to speak of
    monkeypatch.setattr(sys, "argv", ["make_embedded.py", "--out", str(tmp_path), "--molecules", "ethanol"])
    (tmp_path / ".partial").mkdir()
    walker = small.walk("ethanol", small.SPLITS[0], 0, small.relax("ethanol")[0])
    np.savez(tmp_path / ".partial" / "ethanol_train_0.npz", **walker)
    small.main()
    printed = capsys.readouterr().out
    assert "walker 0" not in printed  # resumed
    assert "walker 1" in printed
    frames = read_frames(tmp_path / "ethanol_train.npz")
    assert len(frames) == 6
    assert frames[1].energy.item() == pytest.approx(walker["energies"][1], abs=1e-8)
    np.testing.assert_array_equal(frames[1].pos.numpy(), walker["coords"][1])
    np.testing.assert_allclose(frames[1].forces.numpy(), walker["forces"][1], atol=1e-6)
    assert len({frame.energy.item() for frame in frames}) == 6
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"]["ethanol_train.npz"]["frames"] == 6
    assert not (tmp_path / ".partial").exists()


@pytest.mark.filterwarnings("ignore:Use thermalize_momenta:DeprecationWarning")
def test_broken_bonds_and_wrong_labels_stop_the_script(small, monkeypatch):
    start = small.starts("ethanol")[0]
    monkeypatch.setattr(small, "expected_bonds", lambda name: frozenset({(0, 1)}))
    with pytest.raises(RuntimeError, match="bonds changed at frame 0"):
        small.walk("ethanol", small.SPLITS[0], 0, start)
    with pytest.raises(RuntimeError, match="relaxed bonds"):
        small.relax("ethanol")
    data = {"coords": start.positions[None], "forces": np.ones((1, 9, 3)), "energies": np.zeros(1)}
    with pytest.raises(RuntimeError, match="forces differ from finite differences"):
        small.statistics(start.numbers, {**data, "temperature": np.array([300.0])}, "ethanol", 300.0)
    data["forces"] = small.label(start.numbers, start.positions)[1][None]
    with pytest.raises(RuntimeError, match="mean temperature 900 K, wanted 300 K"):
        small.statistics(start.numbers, {**data, "temperature": np.array([900.0])}, "ethanol", 300.0)
