"""Where the bonds of a deployed model come from: no energy depends on what was evaluated before."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.mixing import SumCalculator
from ase.io import read, write

import factories
from nbody_pyg import BondTree, FromAssignment, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.cli.md import STOPPED
from nbody_pyg.cli.relax import NOT_CONVERGED
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import (
    Committee,
    NBodyCalculator,
    reference_record,
    reference_topology,
    relax,
    run_md,
    save_model,
    with_reference,
)
from nbody_pyg.training.prepare import DataSets


def potential(scheme=None, seed: int = 0) -> Potential:
    return factories.potential(scheme or BondTree(4.0), seed=seed)


@pytest.fixture
def hot() -> list[Atoms]:
    """Frames of ethanol in which bonds are stretched, broken and formed."""
    rng = np.random.default_rng(0)
    frames = [molecule("CH3CH2OH") for _ in range(6)]
    for atoms in frames:
        atoms.positions += rng.normal(0, 0.18, atoms.positions.shape)
    return frames


def stretched(by: float) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.set_distance(2, 3, by, fix=0)
    return atoms


def energies(calculator, frames, order) -> np.ndarray:
    out = {}
    for k in order:
        atoms = frames[k].copy()
        atoms.calc = calculator
        out[k] = atoms.get_potential_energy()
    return np.array([out[k] for k in range(len(frames))])


@pytest.mark.slow
@pytest.mark.parametrize("skin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("make", ["single", "committee"])
def test_the_order_of_evaluation_changes_nothing(hot, skin, make):
    def calculator():
        if make == "single":
            return NBodyCalculator(potential(), skin=skin)
        return Committee([potential(), potential(seed=1)], skin=skin)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forwards = energies(calculator(), hot, range(6))
        backwards = energies(calculator(), hot, range(5, -1, -1))
        alone = np.array([energies(calculator(), hot[k : k + 1], [0])[0] for k in range(6)])
    assert np.ptp(alone) > 0.1
    assert np.abs(forwards - backwards).max() < 1e-10 and np.abs(forwards - alone).max() < 1e-10
    kinds = {str(BondTree().topology(*map(torch.as_tensor, (a.numbers, a.positions))).bonds.tolist()) for a in hot}
    assert len(kinds) > 1, "the frames differ in their bonds"


def test_other_bonds_than_before_are_told_once(hot):
    calculator = NBodyCalculator(potential())
    with pytest.warns(UserWarning, match=r"bonds found in this structure differ .*(broken|formed): [CO]\d-H\d") as told:
        energies(calculator, hot, range(6))
    assert len(told) == 1 and calculator.bonds_from == "found in each structure"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["first", "atoms", "data", "file"])
def test_bonds_of_a_reference(source, tmp_path):
    """Stretched O-H: beyond its covalent radii the bond is kept, from whatever reference."""
    start, model = molecule("CH3CH2OH"), potential()
    frame = AtomicData.from_ase(start)
    save_model(model, tmp_path / "m.nbody", {"reference": reference_record(frame)})
    given = {
        "first": lambda: NBodyCalculator(model, bonds="first"),
        "atoms": lambda: NBodyCalculator(model, bonds=start),
        "data": lambda: NBodyCalculator(model, bonds=frame),
        "file": lambda: NBodyCalculator(tmp_path / "m.nbody"),
    }
    calculator = given[source]()
    with pytest.warns(UserWarning, match=r"bonds found .* differ from those that its energy uses, .*: O2-H3") as told:
        found = energies(calculator, [start, stretched(1.2), stretched(1.4), stretched(2.0)], range(4))
    assert len(told) == 1 and calculator.bonds_from in str(told[0].message)
    tree = model.model.scheme.topology(frame.z, frame.pos)
    for energy, length in zip(found[1:], (1.2, 1.4, 2.0), strict=True):
        data = AtomicData.from_ase(stretched(length))
        topology = model.model.scheme.update(tree, data.z, data.pos)
        assert energy == pytest.approx(float(model(data, topology=topology)["energy"]), abs=1e-10)
    assert abs(found[3] - energies(NBodyCalculator(model), [stretched(2.0)], [0])[0]) > 1e-3
    words = {"first": "found in the first structure", "file": "the reference molecule of the model file"}
    assert calculator.bonds_from == words.get(source, "the structure given as bonds")


@pytest.mark.slow
def test_periodic_models_bring_their_bonds(tmp_path):
    """A water that lies across the faces of its cell in the reference."""
    atoms = molecule("H2O", cell=[8, 8, 8], pbc=True)
    atoms.positions += [0, 4, 4]
    atoms.positions[1] -= [8, 0, 0]
    frame, model = AtomicData.from_ase(atoms), potential()
    record = {"reference": reference_record(frame)}
    tree = reference_topology(record, model.model.scheme, [8, 1, 1])
    assert tree.bonds.tolist() == [[1, 2, 0, 0], [0, 0, 1, 2]] and tree.size(3) == 1
    save_model(model, tmp_path / "m.nbody", record)
    found = []
    for shift in ([0, 0, 0], [8, 0, 0], [0, -16, 8]):
        hot = atoms.copy()
        hot.set_distance(0, 1, 1.5, fix=0, mic=True)
        hot.positions[1] += shift
        hot.calc = NBodyCalculator(tmp_path / "m.nbody")
        with pytest.warns(UserWarning, match="the reference molecule of the model file .*broken: O0-H1"):
            hot.get_potential_energy()
        data = with_reference([AtomicData.from_ase(hot)], tmp_path / "m.nbody", model.model.scheme)[0]
        assert float(model(data)["energy"]) == pytest.approx(hot.get_potential_energy(), abs=1e-10)
        found.append(hot.get_potential_energy())
    assert np.ptp(found) < 1e-10 and abs(found[0]) > 1e-2
    alone = energies(NBodyCalculator(model), [hot], [0])[0]
    assert abs(found[0] - alone) > 1e-3
    # A molecule without a cell serves in a cell as well; files of earlier versions do not say whether it had one
    record = {"reference": reference_record(AtomicData.from_ase(molecule("H2O")))}
    for reference, wanted in (
        (record["reference"], found[0]),
        ({k: record["reference"][k] for k in ("z", "pos")}, alone),
    ):
        save_model(model, tmp_path / "m.nbody", {"reference": reference})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            energy = energies(NBodyCalculator(tmp_path / "m.nbody"), [hot], [0])[0]
        assert energy == pytest.approx(wanted, abs=1e-10)


def test_parts_of_labels_that_stand_on_the_reference():
    model, atoms = potential(FromAssignment(part_cutoffs=(4.0,))), molecule("CH3CH2OH")
    frame = AtomicData.from_ase(atoms)
    frame.labels = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 0])
    found = energies(NBodyCalculator(model, bonds=frame), [atoms, stretched(1.5)], [0, 1])
    frame.pos = torch.as_tensor(stretched(1.5).positions)
    assert found[1] == pytest.approx(float(model(model.model.scheme(frame))["energy"]), abs=1e-10) != found[0]


def test_errors():
    with pytest.raises(ValueError, match="bonds must be one of each, first or a structure, got 'last'; try 'each'"):
        NBodyCalculator(potential(), bonds="last")
    methane = molecule("CH4")
    methane.calc = NBodyCalculator(potential(), bonds=molecule("CH3CH2OH"))
    with pytest.raises(
        ValueError, match=r"atoms must be those of the structure given as bonds.*got 5 atoms where it has 9"
    ):
        methane.get_potential_energy()
    with pytest.warns(DeprecationWarning, match="carry_on has no effect"):
        NBodyCalculator(potential(), carry_on=1.0)


# -- runs --------------------------------------------------------------------------------------------------
def departing() -> Atoms:
    """Ethanol that a hydrogen leaves."""
    atoms, momenta = molecule("CH3CH2OH"), np.zeros((9, 3))
    momenta[8] = [0, 0, -6.0]
    atoms.set_momenta(momenta)
    return atoms


@pytest.mark.slow
@pytest.mark.parametrize("make", ["single", "committee"])
def test_a_broken_bond_is_told_once(make, tmp_path):
    atoms = departing()
    members = [potential(), potential(seed=1)]
    atoms.calc = NBodyCalculator(members[0]) if make == "single" else Committee(members)
    with pytest.warns(UserWarning, match=r"bonds as found at step \d+ .* differ .* \(broken: C0-H8\)") as told:
        report = run_md(atoms, 120, timestep=0.125, sample_every=8, log=tmp_path / "md.log")
    assert len(told) == 1 and report.stopped is None and len(report.time) == 16
    assert report.bonds_from == "found in the first structure"
    when, what = report.bond_changes.split(": ", 1)
    assert what == "broken: C0-H8" and 0 < int(when.split()[1]) < 100
    assert [line for line in (tmp_path / "md.log").read_text().splitlines() if line.startswith(f"# {when}")]
    # Without a step: the bonds are those of the start
    assert np.ptp(report.total) < 0.02 * np.ptp(report.potential)
    # What the calculator says of the structure afterwards is what any other says of it
    fresh = energies(NBodyCalculator(members[0]) if make == "single" else Committee(members), [atoms], [0])[0]
    assert atoms.get_potential_energy() == pytest.approx(fresh, abs=1e-10)
    assert abs(report.potential[-1] - fresh) > 1e-2


def test_a_run_stops_where_bonds_change():
    atoms = departing()
    atoms.calc = NBodyCalculator(potential())
    with pytest.warns(UserWarning, match="bonds as found"):
        report = run_md(atoms, 40, stop_on_bond_change=True)
    assert report.stopped == "stopped after step 10 (5.00 fs): bonds have changed, broken: C0-H8"
    assert len(report.time) == 2


def test_a_quiet_run_says_nothing():
    for scheme, source in ((BondTree(4.0), "found in the first structure"), (NestedShells((4.0,)), None)):
        atoms = molecule("CH3CH2OH")
        atoms.calc = NBodyCalculator(potential(scheme))
        report = run_md(atoms, 4, timestep=0.1, sample_every=2)
        assert report.bonds_from == source and report.bond_changes is None
        last = atoms.get_potential_energy()
        assert last == report.potential[-1]


@pytest.mark.slow
@pytest.mark.parametrize("make", ["single", "committee", "sum"])
def test_a_run_keeps_its_bonds_for_itself(make):
    """Whoever else asks the same calculator in between, or after an end that was not planned, gets bonds as found."""
    members = [potential(), potential(seed=1)]
    made = {
        "single": lambda: NBodyCalculator(members[0]),
        "committee": lambda: Committee(members),
        "sum": lambda: SumCalculator([NBodyCalculator(p) for p in members]),
    }
    others = [stretched(1.5), molecule("CH4")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = energies(made[make](), others, [0, 1])
        atoms, found = departing(), []
        atoms.calc = calculator = made[make]()

        def ask(done: int) -> None:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(energies, calculator, others, [0, 1]).result())
            found[-1][0] = wanted[0] if done else found[-1][0]
            other = others[1].copy()
            other.calc = calculator
            assert other.get_potential_energy() == pytest.approx(wanted[1], abs=1e-10)
            if done == 40:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_md(atoms, 60, timestep=0.25, sample_every=8, report=ask)
        assert len(found) == 6 and np.abs(np.array(found) - wanted).max() < 1e-10
        after = atoms.get_potential_energy()
        assert after == pytest.approx(energies(made[make](), [atoms], [0])[0], abs=1e-10)
        alone = departing()
        alone.calc = made[make]()
        report = run_md(alone, 40, timestep=0.25, sample_every=40)
    assert report.bond_changes is not None and report.bonds_from == "found in the first structure"
    assert abs(report.potential[-1] - after) > 1e-2, "the run used other bonds"
    assert np.ptp(report.total) < 0.02 * np.ptp(report.potential)
    assert np.abs(alone.positions - atoms.positions).max() < 1e-10


def test_what_was_cached_in_a_run_is_forgotten_at_any_end():
    """Also where the last structure was no sample."""
    atoms = departing()
    atoms.calc = NBodyCalculator(potential())
    with pytest.warns(UserWarning, match="bonds as found at step 11 "):
        report = run_md(atoms, 40, sample_every=40, stop=lambda a: "enough" if a.positions[8, 2] < -4.0 else None)
    assert report.stopped == "stopped after step 11 (5.50 fs): enough" and "broken: C0-H8" in report.bond_changes
    assert atoms.get_potential_energy() == pytest.approx(
        energies(NBodyCalculator(potential()), [atoms], [0])[0], abs=1e-10
    )


@pytest.mark.slow
def test_a_continued_run_keeps_the_bonds_of_its_first_frame(tmp_path):
    """And says so where its energy is another than it was."""
    files = {"trajectory": tmp_path / "t.traj", "timestep": 0.25, "sample_every": 8}
    whole, cut = departing(), departing()
    whole.calc, cut.calc = NBodyCalculator(potential()), NBodyCalculator(potential())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = run_md(whole, 60, timestep=0.25, sample_every=60)
        run_md(cut, 32, **files)
        again = departing()
        again.calc = NBodyCalculator(potential())
        report = run_md(again, 28, restart=True, **files)
        assert report.bond_changes is not None
    assert np.abs(again.positions - whole.positions).max() < 1e-10
    assert report.potential[-1] == pytest.approx(wanted.potential[-1], abs=1e-10)
    other = departing()
    other.calc = NBodyCalculator(potential(seed=1))
    with (
        pytest.warns(UserWarning, match="bonds as found"),
        pytest.warns(UserWarning, match=r"has an energy of .* eV there, and .* eV now: .* Was it another model\?"),
    ):
        run_md(other, 0, restart=True, **files)


@pytest.mark.slow
def test_commands_take_the_bonds_of_the_model_file(tmp_path, capsys):
    """md, relax, evaluate and energies on a structure whose O-H is too long to be found."""
    model = potential()
    reference = reference_record(AtomicData.from_ase(molecule("CH3CH2OH")))
    save_model(model, tmp_path / "m.nbody", {"reference": reference})
    atoms = stretched(1.35)
    write(tmp_path / "start.xyz", atoms)
    atoms = read(tmp_path / "start.xyz")
    atoms.calc = NBodyCalculator(tmp_path / "m.nbody")
    with pytest.warns(UserWarning, match="broken: O2-H3"):
        wanted = atoms.get_potential_energy()
    assert abs(wanted - energies(NBodyCalculator(model), [atoms], [0])[0]) > 1e-3
    names = [str(tmp_path / name) for name in ("m.nbody", "start.xyz")]
    with pytest.warns(UserWarning, match=r"bonds as found at step 0 .* the reference molecule of .*broken: O2-H3"):
        status = main(["md", *names, "--steps", "4", "--out", str(tmp_path / "md"), "--stop-on-bond-change"])
    said = capsys.readouterr().out
    assert status == STOPPED and "bonds: the reference molecule of the model file" in said
    assert "first at step 0 (0.00 fs): broken: O2-H3" in said
    assert read(tmp_path / "md" / "trajectory.xyz", 0).get_potential_energy() == pytest.approx(wanted, abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the bond is found at the end is not the question
        assert main(["relax", *names, "--steps", "1", "--out", str(tmp_path / "r.xyz")]) == NOT_CONVERGED
        assert main(["evaluate", *names, "--out", str(tmp_path / "e"), "--no-plot"]) == 0
        assert main(["energies", *names]) == 0
    said = capsys.readouterr().out
    frames = with_reference([AtomicData.from_ase(atoms)], names[0], model.model.scheme)
    with pytest.warns(UserWarning, match="bonds found after the relaxation of structure 0 .*broken: O2-H3"):
        found = relax(model, frames, max_steps=1)
    assert float(found.start_energy) == pytest.approx(wanted, abs=1e-9)
    assert float(read(tmp_path / "r.xyz").get_potential_energy()) == pytest.approx(float(found.energy), abs=1e-6)
    assert f"{wanted:.6f} eV" in said
    assert "bonds found in frame 0 differ from those that its energy uses: broken: O2-H3" in said
    predicted = read(tmp_path / "e" / "start_predictions.xyz")
    values = {**predicted.info, **getattr(predicted.calc, "results", {})}
    assert any(abs(v - wanted) < 1e-6 for v in values.values() if isinstance(v, float))


# -- training ----------------------------------------------------------------------------------------------
def test_training_says_where_bonds_differ():
    """Shared with a frame that is unlike the others, or found in each frame of one molecule."""
    quiet = [AtomicData.from_ase(molecule("CH3CH2OH")) for _ in range(4)]
    odd = AtomicData.from_ase(stretched(1.6))
    scheme = BondTree(4.0)
    sets = DataSets([odd, *quiet], [])
    with pytest.warns(UserWarning, match="bonds of the first training frame, .* are not those found in 4 of 5 frames"):
        shared = sets.with_topology(scheme, shared=True)
    assert all(int(frame.num_parts_3) == 2 for frame in shared.train)
    with pytest.warns(UserWarning, match="bonds found in 4 of 5 differ from those of the first: .* data.one_molecule"):
        sets.with_topology(scheme)
    # Nothing to say of: one odd frame among others, equal bonds, several molecules, no bonds
    DataSets([*quiet, odd], []).with_topology(scheme, shared=True)
    DataSets(quiet, [odd]).with_topology(scheme)
    DataSets([*quiet, AtomicData.from_ase(molecule("CH4")), odd], []).with_topology(scheme)
    sets.with_topology(NestedShells((3.0,)))
