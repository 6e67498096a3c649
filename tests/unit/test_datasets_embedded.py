"""The embedded sets are whole, what their card says, and physically sound; errors by message."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from ase.data import covalent_radii

from nbody_pyg.datasets import embedded_folder, embedded_manifest, fit_atomic_energies, label_audit, load_embedded
from nbody_pyg.datasets import load_embedded as function
from nbody_pyg.datasets.splits import Split

MOLECULES = {"ethanol": 9, "alanine_dipeptide": 22}
SPLITS = ("train", "test_300K", "test_600K")


@pytest.mark.parametrize("molecule", MOLECULES)
def test_counts_and_labels(molecule):
    groups = {split: load_embedded(molecule, split) for split in SPLITS}
    assert [len(frames) for frames in groups.values()] == [1000, 250, 250]
    table = label_audit(groups)
    assert table.count("energy") == table.count("forces") == (1500, 1500)
    spread = {row.source: row.std for row in table.rows if row.label == "forces"}
    assert 0.5 < spread["train"] < 1.2
    assert spread["test_600K"] > 1.25 * spread["test_300K"]  # sqrt(2) for harmonic forces
    for frames in groups.values():
        assert frames[0].num_nodes == MOLECULES[molecule]
        assert frames[0].pos.dtype == frames[0].energy.dtype == frames[0].forces.dtype == torch.float64


@pytest.mark.parametrize("molecule", MOLECULES)
def test_no_frame_stands_twice(molecule):
    energies = [f.energy.item() for split in SPLITS for f in load_embedded(molecule, split)]
    assert len(set(energies)) == len(energies)
    Split(range(1000), range(1000, 1250), range(1250, 1500))


@pytest.mark.parametrize("molecule", MOLECULES)
@pytest.mark.parametrize("split", SPLITS)
def test_bonds_and_balance_of_forces(molecule, split):
    frames = load_embedded(molecule, split)
    radii = covalent_radii[frames[0].z.numpy()]
    graphs = set()
    for frame in frames:
        distance = torch.cdist(frame.pos, frame.pos).numpy()
        graphs.add((distance < 1.3 * (radii[:, None] + radii[None, :])).tobytes())
        assert float(frame.forces.sum(0).abs().max()) < 1e-5
        torque = torch.linalg.cross(frame.pos, frame.forces).sum(0)
        assert float(torque.abs().max()) < 1e-4
    assert len(graphs) == 1  # the same bonds in every frame


@pytest.mark.parametrize("molecule", MOLECULES)
def test_the_labels_are_those_of_the_method(molecule):
    """A new calculation gives the stored labels, and central differences of its energy the stored forces."""
    calculator = pytest.importorskip("tblite.ase", reason="needs tblite, from the extra [data]").TBLite
    frame = load_embedded(molecule, "test_600K")[17]
    atoms = frame.to_ase()
    atoms.calc = calculator(method="GFN2-xTB", accuracy=0.01, verbosity=0)
    assert atoms.get_potential_energy() == pytest.approx(frame.energy.item(), abs=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), frame.forces.numpy(), atol=1e-4)
    direction = np.random.default_rng(0).normal(size=frame.pos.shape)
    energies = []
    for step in (1e-3, -1e-3):
        atoms.positions = frame.pos.numpy() + step * direction
        energies.append(atoms.get_potential_energy())
    slope = (energies[0] - energies[1]) / 2e-3
    assert slope == pytest.approx(-float((frame.forces.numpy() * direction).sum()), abs=2e-3)
    assert abs(slope) > 0.1


def test_the_card_is_true():
    folder, manifest = embedded_folder(), embedded_manifest()
    assert manifest["licence"] == "CC0-1.0"
    assert set(manifest["files"]) == {f"{m}_{s}.npz" for m in MOLECULES for s in SPLITS}
    assert sum((folder / name).stat().st_size for name in manifest["files"]) < 5_000_000
    for name, entry in manifest["files"].items():
        frames = load_embedded(entry["molecule"], entry["split"])
        assert (folder / name).stat().st_size == entry["bytes"]
        assert (len(frames), frames[0].num_nodes) == (entry["frames"], entry["atoms"])
        energies = torch.cat([f.energy for f in frames])
        assert float(energies.std(correction=0)) == pytest.approx(entry["statistics"]["energy_std_eV"], abs=1e-5)
        rms = torch.stack([f.forces for f in frames]).square().mean().sqrt()
        assert float(rms) == pytest.approx(entry["statistics"]["force_rms_eV_per_A"], abs=1e-5)
    readme = (folder / "README.md").read_text()
    for word in ("GFN2-xTB", "CC0", "make_embedded.py", str(manifest["seed"])):
        assert word in readme


def test_references_of_free_atoms():
    e0 = {int(z): e for z, e in embedded_manifest()["isolated_atoms_eV"].items()}
    frames = load_embedded("ethanol", "test_300K")
    assert fit_atomic_energies(frames, e0) == {z: e0[z] for z in (1, 6, 8)}
    atomization = frames[0].energy.item() - sum(e0[z] for z in frames[0].z.tolist())
    assert -50 < atomization < -25  # ethanol is bound by some 33 eV; GFN2-xTB overbinds


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"molecule 'ethanole' is not embedded; did you mean ethanol\?"):
        load_embedded("ethanole")
    with pytest.raises(ValueError, match=r"split 'test' does not exist; did you mean test_.00K\?"):
        load_embedded("ethanol", "test")
    import sys

    module = sys.modules[function.__module__]
    folder = tmp_path / "embedded"
    shutil.copytree(embedded_folder(), folder)
    monkeypatch.setattr(module, "embedded_folder", lambda: folder)
    path = folder / "ethanol_train.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_embedded("ethanol")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"reinstall the package.*make_embedded.py"):
        load_embedded("ethanol")
    json.loads((folder / "manifest.json").read_text())


def test_missing_folder(tmp_path, monkeypatch):
    import sys

    module = sys.modules[function.__module__]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "embedded.py"))
    with pytest.raises(FileNotFoundError, match="the embedded data sets are missing"):
        embedded_folder()
