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
        drawn = set(arrays["temperature"].tolist())
        assert drawn == {0.0} if script.kind_of(number) == "bond" else len(drawn) == 2  # one for each structure
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
    source = script.structures("qm9", LISTS, np.random.default_rng(0))
    structures = [next(source)[0] for _ in range(3)]
    _, ion = script.build("CC(=O)[O-]", np.random.default_rng(0))
    structures.insert(1, script.Structure("CC(=O)[O-]", ion, -1, "train"))
    found = script.sample_by_model(
        "qm9", structures, [100.0, 300.0, 500.0, 1000.0], np.random.default_rng(1), "organic"
    )
    for structure, frames in zip(structures, found, strict=True):
        assert len(frames) == script.FRAMES_OF_MODEL
        for frame in frames:
            atoms = structure.atoms.copy()
            atoms.positions = frame["pos"]
            atoms.calc = script.calculator(structure.charge)
            assert frame["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
            np.testing.assert_allclose(frame["forces"], atoms.get_forces(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("charged", [False, True])
def test_structures_in_one_system_move_as_alone(script, monkeypatch, charged):
    """Without random numbers: the same positions."""

    class Still:
        standard_normal = staticmethod(lambda size=None: np.full(size, 0.1))

    if charged:
        _, ion = script.build("CC(=O)[O-]", np.random.default_rng(0))
        structures = [script.Structure("CC(=O)[O-]", ion, charge, "train") for charge in (-1, 1, 0)]
    else:
        source = script.structures("qm9", LISTS, np.random.default_rng(0))
        structures = [next(source)[0] for _ in range(3)]
    temperatures = [100.0, 300.0, 1000.0]
    monkeypatch.setattr(script, "EQUILIBRATION", 5)
    together = script.dynamics_of_model(structures, temperatures, Still(), "organic")
    for structure, temperature, frames in zip(structures, temperatures, together, strict=True):
        (alone,) = script.dynamics_of_model([structure], [temperature], Still(), "organic")
        assert np.ptp(alone[-1] - structure.atoms.positions, axis=0).max() > 0.01
        for moved, expected in zip(frames, alone, strict=True):
            np.testing.assert_allclose(moved - moved[0], expected - expected[0], atol=1e-5)


def test_labels_of_an_ion_do_not_depend_on_its_place(script):
    _, atoms = script.build("CC(=O)[O-]", np.random.default_rng(0))
    here = script.labelled(atoms, -1)
    atoms.positions += [100.0, -30.0, 7.0]
    there = script.labelled(atoms, -1)
    assert np.linalg.norm(here["dipole"]) > 0.1
    for key, value in here.items():
        np.testing.assert_allclose(there[key], value, atol=1e-4, err_msg=key)


def test_each_structure_has_its_own_temperature(script):
    rng = np.random.default_rng(0)
    drawn = [script.temperature_of("qm9", rng, None) for _ in range(20)]
    assert len(set(drawn)) == 20 and min(drawn) >= 100.0 and max(drawn) <= 1000.0
    assert script.temperature_of("qm9", rng, 300.0) == 300.0 and script.temperature_of("bond", rng, None) == 0.0


def test_protons_stand_between_donor_and_acceptor(script):
    rng = np.random.default_rng(0)
    source = script.structures("proton", LISTS, rng)
    for _ in range(5):
        structure, _ = next(source)
        bonds = script.hydrogen_bonds(structure.atoms)
        assert bonds
        moved = structure.atoms.copy()
        script.shift_proton(moved, rng)
        (hydrogen,) = np.flatnonzero((moved.positions != structure.atoms.positions).any(1))
        assert any(
            min(moved.get_distance(hydrogen, donor), moved.get_distance(hydrogen, acceptor)) > 0.6
            and moved.get_angle(donor, hydrogen, acceptor) > 110.0
            for donor, of_bond, acceptor in bonds
            if of_bond == hydrogen
        )
    assert script.hydrogen_bonds(script.build("CCC", rng)[1]) == []


def test_tested_enols_are_left_out(script):
    tested = {Chem.CanonSmiles(smiles) for smiles in ("O=CC=CO", "CC(=O)C=C(C)O")}
    rng = np.random.default_rng(0)
    source = script.molecules("proton", {"qm9": ["OCCO"], "moses": LISTS["moses"]}, rng)
    found = {Chem.CanonSmiles(next(source)) for _ in range(2000)}
    assert len(found) > 300 and not found & tested


def test_one_failed_structure_leaves_the_others(script, monkeypatch):
    def fails(structures, *arguments):
        if any(structure.name == "bad" for structure in structures):
            raise RuntimeError("positions that are not finite")
        return [[structure.atoms.positions] for structure in structures]

    monkeypatch.setattr(script, "dynamics_of_model", fails)
    monkeypatch.setattr(script, "labelled", lambda atoms, charge: atoms.info["name"])
    monkeypatch.setattr(script, "sound", lambda frame: True)
    structures = []
    for name in ("a", "bad", "b"):
        _, atoms = script.build("CO", np.random.default_rng(0))
        atoms.info["name"] = name
        structures.append(script.Structure(name, atoms, 0, "train"))
    assert script.sample_by_model("qm9", structures, [300.0] * 3, np.random.default_rng(0), "organic") == [
        ["a"],
        [],
        ["b"],
    ]


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
