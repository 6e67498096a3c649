"""The models that come with the package: their files, and their errors on structures labelled with GFN2-xTB."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule

import factories
from nbody_pyg.cli import main
from nbody_pyg.datasets import UnitFiles, load_embedded
from nbody_pyg.deploy import NBodyCalculator, find_model, load_model, read_metadata, save_model, shipped_models
from nbody_pyg.nn.repulsion import shortest_distances
from nbody_pyg.training.stream import shortest_in_units

# Two rattled frames of ethanol: energies (eV), and the forces of the first (eV/angstrom), by tblite 0.4
ENERGIES = (-309.2513873709861, -309.42288088179964)
FORCES = [
    [-1.9531, 1.3498, -0.1634], [2.9009, -2.4422, 4.5718], [-3.7576, 2.7032, -0.8401], [2.1685, -2.7068, 0.3736],
    [-0.0371, -0.4027, -1.8568], [0.0097, 1.2551, -1.7329], [0.6421, 0.2217, -0.0185], [-0.0690, 0.1716, -0.3868],
    [0.0954, -0.1497, 0.0531],
]  # fmt: skip


def ethanol(seed: int):
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.04, seed=seed)
    return atoms


@pytest.mark.parametrize("name", ["organic"])
def test_files_are_small_and_say_what_they_are(name):
    assert name in shipped_models() and find_model(name).stat().st_size < 5e6
    header = read_metadata(name)["metadata"]
    assert header["errors"]["test"]["forces_mae"] > 0 and "GFN2-xTB" in header["level_of_theory"]
    assert "/" not in str(header.get("config", {}).get("data", {}).get("train"))  # no path of the machine that made it


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_organic_is_near_gfn2(engine):
    calculator = NBodyCalculator("organic", engine=engine)
    found = []
    for seed in (1, 2):
        atoms = ethanol(seed)
        atoms.calc = calculator
        found.append(atoms.get_potential_energy())
        if seed == 1:
            forces = atoms.get_forces()
    assert np.abs(forces - FORCES).mean() < 0.1 < np.abs(FORCES).mean() / 10
    assert abs((found[1] - found[0]) - (ENERGIES[1] - ENERGIES[0])) < 0.05
    assert abs(found[0] - ENERGIES[0]) < 0.3


def test_organic_takes_charges():
    calculator = NBodyCalculator("organic")
    energies = []
    for charge in (0, 1):
        atoms = ethanol(1)
        atoms.info["charge"] = charge
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
    assert energies[1] - energies[0] > 3.0  # an ionisation energy


def test_organic_knows_ten_elements():
    assert load_model("organic").species == (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)


def test_the_script_leaves_out_paths(tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "datasets")
    import ship_model

    training = {
        "steps": 1,
        "epochs": 1,
        "cpu_seconds": 1.0,
        "weights": "last",
        "num_frames": {"train": 1},
        "errors": {},
    }
    config = {"data": {"train": "my/frames", "num_val": 5}, "output": {"folder": "my/run"}, "training": {"lr": 0.01}}
    metadata = {**training, "errors_unit": "meV", "config": config, "run": "17", "sample": {"z": [1]}}
    save_model(factories.potential(), tmp_path / "model.nbody", metadata)
    assert ship_model.main([str(tmp_path / "model.nbody"), "organic", "--out", str(tmp_path / "out")]) == 0
    found = read_metadata(tmp_path / "out" / "organic.nbody")["metadata"]
    assert found["config"] == {"data": {"num_val": 5}, "output": {}, "finetune": {}, "training": {"lr": 0.01}}
    assert found["licence"] == "MIT" and found["steps"] == 1 and "run" not in found
    assert found["sample"] == {"z": [1]}  # the structure that ``nbody check`` takes
    monkeypatch.setattr(ship_model, "LARGEST", 100)
    with pytest.raises(SystemExit, match="more than 100 bytes"):
        ship_model.main([str(tmp_path / "model.nbody"), "organic", "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["organic.nbody"]  # the one before


def test_models_repel_below_the_distances_of_their_frames(tmp_path, monkeypatch, request):
    h5py = pytest.importorskip("h5py", reason="units of frames need h5py")
    monkeypatch.syspath_prepend(request.config.rootpath / "datasets")
    import ship_model

    frames = load_embedded("ethanol")[:25]
    columns = {
        key: np.concatenate([frame[key].numpy() for frame in frames]) for key in ("z", "pos", "forces", "energy")
    }
    with h5py.File(tmp_path / "unit_0.h5", "w") as file:
        for key, values in (columns | {"natoms": np.full(25, 9)}).items():
            file.create_dataset(key, data=values)
    lengths = [shortest_distances([frame]) for frame in frames]
    # Four in five of the frames, but not more than 19, are left out
    monkeypatch.setattr("nbody_pyg.training.stream._LEFT_OUT", 0.8)
    shortest = {name: sorted(found[name] for found in lengths)[19] for name in ("H-H", "H-C", "C-O")}
    found = shortest_in_units(UnitFiles([tmp_path / "unit_0.h5"]))
    assert {name: found[name] for name in shortest} == pytest.approx(shortest)

    potential = factories.potential(inner_cutoff={"H-H": 0.5, "C-O": 1.4})
    tame = ship_model.repelling(potential, found)
    inner, reach = tame.model.inner_cutoff.lengths, tame.repulsion.reach
    assert inner["H-H"] == pytest.approx(0.95 * shortest["H-H"], abs=1e-4) and inner["C-O"] == 1.4
    assert reach["H-H"] == pytest.approx(0.9 * shortest["H-H"], abs=1e-4)
    far = frames[next(n for n, one in enumerate(lengths) if all(one[k] > inner[k] for k in ("H-H", "H-C", "C-O")))]
    torch.testing.assert_close(tame(far)["forces"], potential(far)["forces"], rtol=0, atol=1e-10)
    assert potential(far)["forces"].abs().max() > 1e-3


@pytest.mark.slow
def test_organic_passes_the_check(capsys):
    assert main(["check", "organic"]) == 0, capsys.readouterr().out
