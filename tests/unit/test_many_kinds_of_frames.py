"""One training file with every kind of frame: periodic, slab, wire, molecule, atom; with and without each label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from nbody_pyg.cli import main
from nbody_pyg.datasets import label_audit, read_frames
from nbody_pyg.datasets.readers import find_files, join_frames
from nbody_pyg.deploy import load_model, read_metadata
from nbody_pyg.hierarchy import NestedShells
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import Potential
from nbody_pyg.training import FrameLoader, PotentialTask, TrainingConfig, evaluation
from nbody_pyg.training.labels import targets

EVERY = ("energy", "forces", "stress")
TINY = ["--model.channels", "2", "--model.lmax", "1", "--training.max_steps", "6", "--training.log_every", "1",
        "--output.plot", "false", "--output.folder", "r"]  # fmt: skip


def labelled(atoms: Atoms, labels: tuple[str, ...] = EVERY, virial: bool = False, seed: int = 0) -> Atoms:
    """With EMT's labels of these names, as a result of a calculation; the stress as a virial where that is wanted."""
    atoms = atoms.copy()
    atoms.rattle(0.05, seed=seed)
    work = atoms.copy()
    work.calc = EMT()
    found = {"energy": work.get_potential_energy(), "forces": work.get_forces()}
    if "stress" in labels:
        # EMT gives none of slabs and wires
        found["stress"] = work.get_stress() if work.pbc.all() else 0.01 * np.array([1.0, 2.0, 0.0, 0.0, 0.0, 0.5])
    if virial:
        stress = found.pop("stress")
        atoms.info["virial"] = -work.get_volume() * stress[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
    if kept := {name: value for name, value in found.items() if name in labels}:
        atoms.calc = SinglePointCalculator(atoms, **kept)
    return atoms


def cell() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Al"
    return atoms


def slab(flat: bool = False) -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=4.0)
    atoms.info.clear()
    atoms.pbc = (True, True, False)
    if flat:
        atoms.cell[2] = 0.0
    return atoms


def wire(flat: bool = False) -> Atoms:
    atoms = Atoms("CuAl", [[0.0, 0.0, 0.0], [2.6, 0.2, 0.1]], cell=[5.2, 9.0, 9.0], pbc=(True, False, False))
    if flat:
        atoms.cell[1:] = 0.0
    return atoms


def molecule() -> Atoms:
    return Atoms("CuAl2", [[0.0, 0.0, 0.0], [2.4, 0.0, 0.1], [1.1, 2.2, -0.2]])


def boxed() -> Atoms:
    atoms = molecule()
    atoms.center(vacuum=5.0)
    return atoms


def missing() -> Atoms:
    atoms = labelled(molecule(), ("energy", "forces"), seed=5)
    atoms.calc.results["energy"] = float("nan")
    return atoms


ATOMS = {"Cu": 0.3, "Al": -0.2}


def lone(symbol: str, box: float | None = None) -> Atoms:
    atoms = Atoms(symbol, cell=None if box is None else [box] * 3, pbc=box is not None)
    atoms.calc = SinglePointCalculator(atoms, energy=ATOMS[symbol], forces=np.zeros((1, 3)))
    return atoms


KINDS = {
    "bulk": labelled(cell()),
    "bulk, energy": labelled(cell(), ("energy",), seed=1),
    "bulk, forces": labelled(cell(), ("forces",), seed=2),
    "bulk, stress": labelled(cell(), ("stress",), seed=3),
    "bulk, energy and forces": labelled(cell(), ("energy", "forces"), seed=4),
    "bulk, no label": labelled(cell(), (), seed=5),
    "bulk, virial": labelled(cell(), virial=True, seed=6),
    "another cell": labelled(bulk("Cu") * (2, 1, 1), seed=7),
    "slab": labelled(slab()),
    "slab, energy and forces": labelled(slab(), ("energy", "forces"), seed=1),
    "slab, cell without a volume": labelled(slab(flat=True), ("energy", "forces"), seed=2),
    "slab, no label": labelled(slab(), (), seed=3),
    "wire": labelled(wire()),
    "wire, cell without a volume": labelled(wire(flat=True), ("energy", "forces"), seed=1),
    "molecule": labelled(molecule(), ("energy", "forces")),
    "molecule, energy": labelled(molecule(), ("energy",), seed=1),
    "molecule, forces": labelled(molecule(), ("forces",), seed=2),
    "molecule, no label": labelled(molecule(), (), seed=3),
    "molecule in a box": labelled(boxed(), ("energy", "forces"), seed=4),
    "molecule, energy is NaN": missing(),
    "atom of Cu": lone("Cu"),
    "atom of Al": lone("Al"),
    "atom of Cu in a periodic box": lone("Cu", 9.0),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("all.xyz", list(KINDS.values()))
    return tmp_path


def test_every_kind_is_read_and_the_audit_counts_the_labels(here):
    frames = read_frames("all.xyz")
    table = label_audit({"train": frames})
    counts = {label: table.count(label)[0] for label in EVERY}
    names = list(KINDS)
    without = {"energy": ["bulk, forces", "bulk, stress", "molecule, forces", "molecule, energy is NaN"],
               "forces": ["bulk, energy", "bulk, stress", "molecule, energy"]}  # fmt: skip
    bare = [name for name in names if "no label" in name]
    assert len(names) >= 20 and len(bare) == 3
    assert {label: len(names) - counts[label] for label in without} == {k: 3 + len(v) for k, v in without.items()}
    assert counts["stress"] == 6, "bulk, its stress and virial, another cell, slab and wire"
    assert f"({len(bare)} of {len(names)})" in str(table)
    as_stress = frames[names.index("bulk, virial")].stress.reshape(3, 3).numpy()
    work = KINDS["bulk, virial"].copy()
    work.calc = EMT()
    np.testing.assert_allclose(as_stress, work.get_stress(voigt=False), atol=1e-8)
    assert np.abs(as_stress).max() > 1e-3


@pytest.mark.slow
def test_the_file_trains_evaluates_and_predicts(here, capsys):
    assert main(["train", "--data.train", "all.xyz", "--data.val", "all.xyz", *TINY]) == 0
    out = capsys.readouterr().out
    assert "chosen  training.stress_weight" in out and "chosen  training.energy_per atom" in out
    assert "chosen  data.e0 isolated" in out
    errors = json.loads(Path("r/errors.json").read_text())["val"]
    assert all(np.isfinite(value) and value > 0 for key, value in errors.items() if key.endswith("_rmse"))
    assert {"energy_rmse", "forces_rmse", "stress_rmse"} <= set(errors)
    assert main(["evaluate", "r/model.nbody", "all.xyz", "--out", "e"]) == 0
    predicted = next(Path("e").glob("*.xyz"))
    back = read(predicted, ":")
    assert len(back) == len(KINDS)
    potential = load_model("r/model.nbody")
    direct = evaluation.evaluate(potential, read_frames("all.xyz")).energy.numpy()
    np.testing.assert_allclose([atoms.get_potential_energy() for atoms in back], direct, atol=1e-4)


@pytest.mark.slow
def test_isolated_atoms_give_e0_wherever_the_split_puts_them(here):
    for seed in ("0", "1"):
        words = ["--data.num_val", "8", "--data.split_seed", seed]
        assert main(["train", "--data.train", "all.xyz", *words, *TINY]) == 0
        e0 = {int(z): e for z, e in read_metadata("r/model.nbody")["e0"].items()}
        assert e0 == pytest.approx({29: ATOMS["Cu"], 13: ATOMS["Al"]}, abs=1e-6)


def test_frames_without_a_label_change_nothing_that_is_learned(here):
    """The loss of a batch with them is that of the batch without: what is missing is masked."""
    frames = [read_frames("all.xyz")[i] for i, name in enumerate(KINDS) if name in ("bulk", "slab, no label", "slab")]
    potential = Potential(NBodyNet([13, 29], NestedShells([4.0]), channels=2, lmax=1)).double()
    settings = TrainingConfig(max_steps=1, energy_per="atom", stress_weight=1.0, dtype="float64")

    def loss(frames: list) -> float:
        found = targets(potential, frames, (), settings)
        task = PotentialTask(potential, settings)
        task.shares = found.shares
        return float(task.training_step(next(iter(FrameLoader(found.train, len(frames))))).detach())

    whole = loss(frames[:2])
    assert whole > 0 and loss(frames) == pytest.approx(whole, rel=1e-10)


def test_stress_and_virial_that_contradict_each_other_are_refused(here):
    atoms = KINDS["bulk"].copy()
    stress = KINDS["bulk"].calc.results["stress"]
    atoms.calc = SinglePointCalculator(atoms, **KINDS["bulk"].calc.results)
    atoms.info["virial"] = atoms.get_volume() * stress[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]  # the sign of the stress
    write("wrong.xyz", [*list(KINDS.values())[1:], atoms])
    with pytest.raises(ValueError, match=r"contradict each other.*minus the virial over the volume"):
        read_frames("wrong.xyz")


@pytest.mark.parametrize(("unit", "per_unit"), [("kbar", 6.241509074460763e-4), ("GPa", 6.241509074460763e-3)])
def test_stress_in_kbar_and_gpa(here, unit, per_unit):
    frames = []
    for atoms in KINDS.values():
        copy = atoms.copy()
        if atoms.calc is not None:
            results = dict(atoms.calc.results)
            if "stress" in results:
                results["stress"] = results["stress"] / per_unit
            copy.calc = SinglePointCalculator(copy, **results)
        frames.append(copy)
    write("other.xyz", [f for f in frames if "virial" not in f.info])
    there = read_frames("other.xyz", units=f"eV, angstrom, {unit}")
    here_ = read_frames("all.xyz")
    one, other = here_[0].stress, there[0].stress
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert float(one.abs().max()) > 1e-3


@pytest.mark.slow
def test_several_files_folders_and_patterns_are_one_set(here, capsys):
    frames, whole = list(KINDS.values()), read_frames("all.xyz")
    Path("parts").mkdir()
    for place, name in ((0, "a"), (8, "b"), (16, "c")):
        write(f"parts/{name}.xyz", frames[place : place + 8])
    for names in ("parts", "parts/*.xyz", ["parts/a.xyz", "parts/b.xyz", "parts/c.xyz"], ["parts/[ab].xyz", "parts"]):
        joined = join_frames([read_frames(path) for path in find_files(names)])
        assert len(joined) == len(whole) and set(joined.sources) == set(whole.sources)
        assert all(torch.equal(a.pos, b.pos) for a, b in zip(joined, whole, strict=True))
    assert len(find_files(["parts/a.xyz", Path("parts/a.xyz").resolve(), "./parts/*.xyz"])) == 3
    with pytest.warns(UserWarning, match=r"the set 'val' holds frames of parts/b.xyz, parts/c.xyz, which data"):
        assert main(["train", "--data.train", "[parts/a.xyz, 'parts/[bc].xyz']", "--data.val", "parts", *TINY]) == 0
    assert read_metadata("r/model.nbody")["metadata"]["num_frames"] == {"train": 23, "val": 23}
    capsys.readouterr()
    assert main(["train", "--data.train", "parts/*.traj", *TINY]) == 1
    assert "no file under 'parts/*.traj'; name a file, or a folder or pattern with files" in capsys.readouterr().err
    write("parts/d.xyz", frames[:4])
    text = Path("parts/d.xyz").read_text().replace("energy=", "REF_energy=").replace(":forces:", ":REF_forces:")
    Path("parts/d.xyz").write_text(text)
    assert main(["train", "--data.train", "parts", *TINY]) == 1
    assert "which may be several levels of theory" in capsys.readouterr().err


def test_the_format_of_a_file_whose_name_does_not_tell_it(here):
    Path("all.xyz").rename("frames.dat")
    assert (
        main(["train", "--data.train", "frames.dat", "--data.file_format", "extxyz", "--data.num_val", "3", *TINY]) == 0
    )
    assert read_metadata("r/model.nbody")["metadata"]["num_frames"] == {"train": 20, "val": 3}


def test_a_misshapen_label_that_nobody_asked_for_is_left_out_and_told(here):
    frames = [atoms.copy() for atoms in KINDS.values()]
    for atoms, old in zip(frames, KINDS.values(), strict=True):
        atoms.calc = old.calc
    frames[0].info["dipole"] = np.array([1.0, 2.0])
    frames[1].info["dipole"] = np.array([1.0, 2.0, 3.0])
    write("odd.xyz", frames)
    found = read_frames("odd.xyz")
    assert "dipole" not in found[0] and found[1].dipole.tolist() == [[1.0, 2.0, 3.0]] and len(found) == len(KINDS)
    assert "frame 0 of odd.xyz, results['dipole']: dipole must have shape [1, 3]" in str(label_audit(found))
    with pytest.raises(ValueError, match=r"dipole must have shape"):
        read_frames("odd.xyz", dipole_key="dipole")
