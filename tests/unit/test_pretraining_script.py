"""The script that makes the data of pretraining: its pieces, and one small unit."""

from __future__ import annotations

import numpy as np
import pytest

from loading import load_script

REASON = "making data of pretraining needs rdkit, h5py and tblite"
h5py = pytest.importorskip("h5py", reason=REASON)
Chem = pytest.importorskip("rdkit.Chem", reason=REASON)
pytest.importorskip("tblite.ase", reason=REASON)

LISTS = {"qm9": ["CCO", "CC=O", "OCCO", "C1CC1", "CC(N)=O"], "moses": ["CC(=O)Nc1ccc(O)cc1", "CCOC(=O)c1ccccc1N"]}


@pytest.fixture
def script(request):
    return load_script(request.config.rootpath / "datasets" / "make_pretraining.py")


def test_the_mixture_is_kept_by_every_hundred_units(script):
    kinds = [script.kind_of(number) for number in range(100, 200)]
    assert {kind: kinds.count(kind) for kind in script.MIXTURE} == script.MIXTURE


def test_molecules_of_one_scaffold_have_one_split(script):
    same = [script.split_of(Chem.MolFromSmiles(s)) for s in ("Cc1ccccc1", "OCc1ccccc1", "Clc1ccccc1Br")]
    assert len(set(same)) == 1
    splits = [script.split_of(Chem.MolFromSmiles("C" * n + "O" * m)) for n in range(1, 40) for m in range(1, 6)]
    assert 0 < splits.count("test") < 20 and 0 < splits.count("val") < 20


@pytest.mark.parametrize(("kind", "smiles", "charge"), [("ion", "CC(=O)O", -1), ("ion", "CN", 1), ("hetero", "CO", 0)])
def test_reactions_keep_whole_molecules(script, kind, smiles, charge):
    reactions = script.IONISATIONS if kind == "ion" else script.REPLACEMENTS
    found = script.react(smiles, reactions, np.random.default_rng(0))
    molecule, atoms = script.build(found, np.random.default_rng(0))
    assert found != smiles and Chem.GetFormalCharge(molecule) == charge and len(atoms) == molecule.GetNumAtoms()


def test_radicals_and_foreign_elements_are_left_out(script):
    assert script.build("[CH3]", np.random.default_rng(0)) is None
    assert script.build("[Na+]", np.random.default_rng(0)) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 5])  # qm9, bond, cluster
def test_a_unit_is_whole_and_the_same_again(script, tmp_path, number):
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        done = script.make_unit(number, tmp_path / name, LISTS, count=2)
        with h5py.File(tmp_path / name / f"unit_{number:05d}.h5") as file:
            arrays = {key: file[key][:] for key in file}
            assert all(file[key].fletcher32 for key in file if key != "smiles")
        texts.append(arrays)
        atoms, frames = len(arrays["z"]), len(arrays["natoms"])
        assert done["frames"] == frames > 4 and done["kind"] == script.kind_of(number)
        assert arrays["pos"].shape == arrays["forces"].shape == (atoms, 3) and arrays["natoms"].sum() == atoms
        starts = np.concatenate([[0], np.cumsum(arrays["natoms"])[:-1]])
        net = np.add.reduceat(arrays["forces"], starts)
        assert np.abs(net).max() < 1e-3 < np.abs(arrays["forces"]).max()
        charges = np.add.reduceat(arrays["charges"], starts)
        np.testing.assert_allclose(charges, arrays["total_charge"], atol=1e-3)
    for key, value in texts[0].items():
        if value.dtype.kind != "O":
            np.testing.assert_allclose(value, texts[1][key], atol=1e-6, err_msg=key)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_dynamics_of_a_model_have_the_labels_of_the_reference(script):
    structure, _ = next(script.structures("qm9", LISTS, np.random.default_rng(0)))
    frames, temperature = script.sample("qm9", structure, None, np.random.default_rng(1), "organic")
    assert len(frames) == script.FRAMES_OF_MODEL and temperature >= 100.0
    for frame in frames:
        atoms = structure.atoms.copy()
        atoms.positions = frame["pos"]
        atoms.calc = script.calculator(0)
        assert frame["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
        np.testing.assert_allclose(frame["forces"], atoms.get_forces(), atol=1e-4)


@pytest.mark.slow
def test_a_set_of_one_split_at_one_temperature(script, tmp_path):
    chains = ["C" * n + "O" * m for n in range(1, 14) for m in range(1, 6)]
    wanted = {smiles for smiles in chains if script.split_of(Chem.MolFromSmiles(smiles)) == "test"}
    script.make_unit(1, tmp_path, {"qm9": chains, "moses": []}, count=2, split="test", temperature=300.0)
    with h5py.File(tmp_path / "unit_00001.h5") as file:
        assert file.attrs["kind"] == "qm9" and set(file["temperature"][:]) == {300.0}
        assert {name.decode() for name in file["smiles"][:]} <= wanted
        assert set(file["split"][:]) == {script.SPLITS.index("test")}


def test_unsound_frames_are_left_out(script):
    frame = {"energy": np.float64(1.0), "forces": np.zeros((4, 3))}
    assert script.sound(frame)
    assert not script.sound(frame | {"energy": np.float64("nan")})
    assert not script.sound(frame | {"forces": np.full((4, 3), 50.0) * [[1], [-1], [1], [-1]]})
    assert not script.sound(frame | {"forces": np.full((4, 3), 0.1)})
