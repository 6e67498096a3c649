"""Ensembles of molecular dynamics, checkpoints that continue a run exactly, and binary trajectories."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms
from ase.io import read
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

import factories
from damage import assert_error_or_right
from nbody_pyg.deploy import Committee, NBodyCalculator, dynamics, run_md
from nbody_pyg.deploy.ensembles import ENSEMBLES, has_pressure
from nbody_pyg.deploy.md_checkpoint import MDState
from nbody_pyg.hierarchy import NestedShells

with_mdtraj = pytest.mark.skipif(
    importlib.util.find_spec("mdtraj") is None,
    reason="mdtraj is not installed: pip install 'nbody_pyg[trajectories]'",
)


@pytest.fixture(scope="module")
def potential():
    return factories.potential(NestedShells((3.0,)))


def structure(potential, periodic: bool = True) -> Atoms:
    """Eight atoms of carbon and oxygen in a cell, or ethanol; neighbour lists are made anew every few steps."""
    atoms = bulk("C", "diamond", a=3.7, cubic=True) if periodic else molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    if periodic:
        atoms.numbers[::3] = 8
    atoms.calc = NBodyCalculator(potential, skin=0.1)
    return atoms


#: Pressures of a network without training are those inside planets.
OPTIONS = {"temperature": 600.0, "timestep": 0.5, "sample_every": 5, "pressure": 3e6, "friction": 0.05, "seed": 3}


def same(one: Atoms, other: Atoms) -> bool:
    """Bit for bit."""
    return all(
        np.array_equal(a, b)
        for a, b in (
            (one.positions, other.positions),
            (one.get_momenta(), other.get_momenta()),
            (one.cell.array, other.cell.array),
            (one.get_forces(), other.get_forces()),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", list(ENSEMBLES))
def test_a_run_goes_on_bit_for_bit(potential, tmp_path, ensemble):
    """Interrupted after 13 of 40 steps, in a new process: another calculator without lists."""
    options = OPTIONS | {"ensemble": ensemble}
    whole, cut, again = (structure(potential, has_pressure(ensemble)) for _ in range(3))
    run_md(whole, 40, **options)
    assert whole.calc.topologies.rebuilds > 2, "lists must have been made anew on the way"
    files = {"trajectory": tmp_path / "t.xyz", "log": tmp_path / "l", "checkpoint": tmp_path / "c.npz"}
    run_md(cut, 13, **options, **files)
    report = run_md(again, 27, restart=True, **options, **files)
    assert same(whole, again) and not same(whole, cut)
    assert report.first_step == 13 and report.velocities == "those of step 13 of the checkpoint"
    assert [f.info["step"] for f in read(tmp_path / "t.xyz", ":")] == [0, 5, 10, 13, 18, 23, 28, 33, 38, 40]
    state = MDState.load(tmp_path / "c.npz")
    assert state.step == 40 and np.array_equal(state.positions, whole.positions)
    if ensemble != "nve":
        assert state.variables or state.random["state"] != np.random.default_rng(3).bit_generator.state["state"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ensemble", "lost"),
    [("langevin", "random"), ("bussi", "random"), ("nose-hoover", "variables"), ("npt", "variables"),
     ("npt-full", "variables"), ("nve", "momenta")],
)  # fmt: skip
def test_a_checkpoint_without_one_part_does_not_go_on_bit_for_bit(potential, tmp_path, ensemble, lost):
    """Each part of a checkpoint is needed: the test above sees it where one is missing."""
    import dataclasses

    options = OPTIONS | {"ensemble": ensemble}
    whole, cut, again = (structure(potential, has_pressure(ensemble)) for _ in range(3))
    run_md(whole, 40, **options)
    files = {"trajectory": tmp_path / "t.xyz", "checkpoint": tmp_path / "c.npz"}
    run_md(cut, 13, **options, **files)
    state = MDState.load(files["checkpoint"])
    parts = {
        "random": {"random": np.random.default_rng(4).bit_generator.state},
        "variables": {"variables": {}},
        "momenta": {"momenta": state.momenta.round(8)},
    }
    dataclasses.replace(state, **parts[lost]).save(files["checkpoint"])
    run_md(again, 27, restart=True, **options, **files)
    assert not same(whole, again)
    assert np.abs(whole.positions - again.positions).max() < 1.0


@pytest.mark.filterwarnings("ignore:.*is not the state of the last frame")
def test_a_killed_run_writes_no_frame_twice(potential, tmp_path, monkeypatch):
    """Its last checkpoint is older than its last frame; the steps between are computed again."""
    options = OPTIONS | {"ensemble": "langevin"}
    files = {"trajectory": tmp_path / "t.xyz", "log": tmp_path / "l", "checkpoint": tmp_path / "c.npz"}
    whole, cut, again = (structure(potential, False) for _ in range(3))
    run_md(whole, 30, **options)

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 20:
            raise Killed

    with pytest.raises(Killed):
        run_md(cut, 30, report=kill, **options, **files)
    assert MDState.load(files["checkpoint"]).step == 0
    before = files["trajectory"].read_bytes()
    assert len(read(files["trajectory"], ":")) == 5
    told = []
    report = run_md(again, 10, restart=True, report=told.append, **options, **files)
    assert report.first_step == 0 and same(whole, again) and told == [0, 5, 10]
    assert files["trajectory"].read_bytes().startswith(before)
    frames = read(files["trajectory"], ":")
    assert [f.info["step"] for f in frames] == [0, 5, 10, 15, 20, 25, 30]
    assert len(files["log"].read_text().splitlines()) == 1 + 7
    # A checkpoint of a later step than the trajectory has is not used
    files["trajectory"].write_bytes(before)
    report = run_md(structure(potential, False), 5, restart=True, **options, **files)
    assert report.first_step == 20 and report.velocities == "those of step 20 of the trajectory"


@pytest.fixture
def killed(potential, tmp_path):
    """Files of a run of 20 steps whose checkpoint is that of step 5."""
    files = {"trajectory": tmp_path / "t.xyz", "checkpoint": tmp_path / "c.npz"}
    run_md(structure(potential, False), 20, **OPTIONS, **files)
    run_md(structure(potential, False), 5, **OPTIONS, checkpoint=files["checkpoint"])
    return files


@pytest.mark.filterwarnings("ignore:the steps from the checkpoint")
def test_a_killed_run_that_goes_on_with_another_model_is_told(killed):
    other = factories.potential(NestedShells((3.0,)), seed=7)
    with pytest.warns(UserWarning, match=r"step 5 of .*c\.npz has an energy of .* Was it another model\?"):
        run_md(structure(other, False), 5, restart=True, **OPTIONS, **killed)


def test_a_killed_run_does_not_go_on_from_the_checkpoint_of_another(potential, killed):
    """It has the same atoms, masses and model; only its first velocities are others."""
    assert run_md(structure(potential, False), 5, restart=True, **OPTIONS, **killed).first_step == 5
    run_md(structure(potential, False), 5, **(OPTIONS | {"seed": 8}), checkpoint=killed["checkpoint"])
    with pytest.warns(UserWarning, match=r"led to positions up to .* from that frame: the trajectory has a step there"):
        run_md(structure(potential, False), 5, restart=True, **OPTIONS, **killed)


def test_a_committee_goes_on_bit_for_bit(potential, tmp_path):
    def committee() -> Atoms:
        atoms = structure(potential, False)
        atoms.calc = Committee([potential, factories.potential(NestedShells((3.0,)), seed=1)], skin=0.1)
        return atoms

    whole, cut, again = (committee() for _ in range(3))
    files = {"trajectory": tmp_path / "t.xyz", "checkpoint": tmp_path / "c.npz"}
    run_md(whole, 30, **OPTIONS)
    run_md(cut, 13, **OPTIONS, **files)
    run_md(again, 17, restart=True, **OPTIONS, **files)
    assert same(whole, again)


def test_checkpoints_of_other_runs_are_refused(potential, tmp_path):
    files = {"trajectory": tmp_path / "t.traj", "checkpoint": tmp_path / "c.npz"}
    run_md(structure(potential, False), 3, **files)
    with pytest.raises(ValueError, match=r"timestep must be that of the checkpoint, 0\.5 fs, got 1;"):
        run_md(structure(potential, False), 3, restart=True, timestep=1.0, **files)
    heavy, other = structure(potential, False), structure(potential, False)
    heavy.set_masses([2.0 if n == 1 else None for n in heavy.numbers])
    with pytest.raises(ValueError, match=r"atoms must have the masses of the checkpoint .*c\.npz"):
        run_md(heavy, 3, restart=True, **files)
    with pytest.raises(ValueError, match=r"atoms must be those of the checkpoint .*, got C2H5O and C2H6O there"):
        run_md(_without_last(other), 3, restart=True, **files)
    content = files["checkpoint"].read_bytes()
    files["checkpoint"].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is no readable checkpoint of nbody md .* remove it to go on from the last"):
        run_md(structure(potential, False), 3, restart=True, **files)
    files["checkpoint"].unlink()
    assert run_md(structure(potential, False), 3, restart=True, **files).first_step == 3


@pytest.mark.parametrize(("flips", "cuts"), [(100, 20), pytest.param(1000, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ensemble", ["nose-hoover", "npt-full"])
def test_a_damaged_checkpoint_is_refused_or_right(potential, tmp_path, ensemble, flips, cuts):
    path = tmp_path / "c.npz"
    run_md(structure(potential, has_pressure(ensemble)), 2, ensemble=ensemble, checkpoint=path)

    def content(path):
        return [(k, v.tolist() if isinstance(v, np.ndarray) else repr(v)) for k, v in vars(MDState.load(path)).items()]

    assert_error_or_right(path, content, flips, cuts)


def _without_last(atoms: Atoms) -> Atoms:
    calculator = atoms.calc
    del atoms[-1]
    atoms.calc = calculator
    return atoms


def test_other_settings_of_the_thermostat_begin_anew(potential, tmp_path):
    """Positions and velocities go on; the new temperature is that of the new settings."""
    files = {"trajectory": tmp_path / "t.xyz", "checkpoint": tmp_path / "c.npz"}
    options = OPTIONS | {"ensemble": "nose-hoover"}
    run_md(structure(potential, False), 10, **options, **files)
    again = structure(potential, False)
    with pytest.warns(UserWarning, match=r"with the settings nose-hoover .*600.* goes on with .*20.* begin anew"):
        run_md(again, 0, restart=True, **(options | {"temperature": 20.0}), **files)
    state = MDState.load(files["checkpoint"])
    assert np.abs(state.variables["_thermostat._p_eta"]).max() == 0 and "20.0" in state.ensemble
    assert state.step == 10 and np.abs(state.momenta).max() > 0.1


# ---------------------------------------------------------------------- the ensembles
class Springs(Calculator):
    """Springs between the nearest neighbours of a crystal."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, atoms: Atoms, stiffness: float = 1.0):
        super().__init__()
        i, j, shift, length = neighbor_list("ijSd", atoms, 1.1 * atoms.cell[0, 0] / 2 / np.sqrt(2))
        self.pairs, self.length, self.stiffness = (i, j, shift), length, stiffness

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        i, j, shift = self.pairs
        vec = self.atoms.positions[j] + shift @ self.atoms.cell.array - self.atoms.positions[i]
        length = np.linalg.norm(vec, axis=1)
        pull = (self.stiffness * (length - self.length) / length)[:, None] * vec
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, pull)
        self.results = {
            "energy": 0.25 * self.stiffness * ((length - self.length) ** 2).sum(),
            "forces": forces,
            "stress": full_3x3_to_voigt_6_stress(0.5 * vec.T @ pull / self.atoms.get_volume()),
        }


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["langevin", "bussi", "nose-hoover", "npt", "npt-full"])
def test_thermostats_reach_their_temperature(ensemble):
    """Mean and standard deviation are those of the degrees of freedom; the cell fluctuates."""
    atoms = bulk("Ar", "fcc", a=5.0, cubic=True) * (2, 2, 2)
    atoms.calc = Springs(atoms)
    settings = {"thermostat_time": 100.0, "barostat_time": 300.0, "friction": 0.01, "timestep": 5.0, "pressure": 100.0}
    run_md(atoms, 300, ensemble="langevin", temperature=200.0, seed=1, timestep=5.0, friction=0.02)
    report = run_md(atoms, 600, ensemble=ensemble, temperature=200.0, seed=2, sample_every=2, **settings)
    spread = 200.0 * np.sqrt(2 / 96)  # of one sample
    assert abs(report.temperature.mean() - 200.0) < spread
    assert 0.4 * spread < report.temperature.std() < 2.5 * spread
    if ensemble.startswith("npt"):
        assert len(report.volume) == 301
        assert 1.005 < report.volume.max() / report.volume.min() < 1.5
        assert (np.abs(atoms.cell.angles() - 90).max() > 1e-3) == (ensemble == "npt-full")


def test_bussi_and_nose_hoover_change_the_energy_of_nve(potential):
    ends = {}
    for ensemble in ENSEMBLES:
        atoms = structure(potential)
        run_md(atoms, 10, ensemble=ensemble, **OPTIONS)
        ends[ensemble] = atoms.get_total_energy()
    values = sorted(ends.values())
    assert min(np.diff(values)) > 1e-8, ends


def test_a_committee_evaluates_once_per_step(potential):
    atoms = structure(potential)
    atoms.calc = Committee([potential, factories.potential(NestedShells((3.0,)), seed=1)])
    run_md(atoms, 10, ensemble="npt", **OPTIONS)
    assert atoms.calc.members[0].topologies.calls <= 2 * 12  # of two members


def test_the_pressure_is_in_bar(potential, tmp_path):
    """At its own pressure the cell stays, at another it changes in that direction; half a step is one evaluation."""
    volumes = []
    for factor in (0.5, 2.0):
        atoms = structure(potential)
        own = -atoms.get_stress()[:3].mean() / (1e-4 * units.GPa)
        calls = atoms.calc.topologies.calls
        options = OPTIONS | {"pressure": factor * own, "temperature": 1.0, "barostat_time": 500.0}
        report = run_md(atoms, 20, ensemble="npt", log=tmp_path / "l", **options)
        volumes.append(report.volume[-1] / report.volume[0])
        assert atoms.calc.topologies.calls - calls <= 22
    assert "stress" in (tmp_path / "l").read_text().splitlines()[0]
    assert own > 0 and volumes[0] > 1.0001 and volumes[1] < 0.9999


def test_what_an_ensemble_cannot_do_is_said(potential):
    held = structure(potential)
    held.set_constraint(FixAtoms([0]))
    for ensemble in ("nose-hoover", "npt", "npt-full"):  # said before ASE is asked
        with pytest.raises(ValueError, match=f"ensemble '{ensemble}' must have no constraints.*'langevin' or 'bussi'"):
            run_md(held, 1, ensemble=ensemble)
    run_md(held, 2, ensemble="bussi")
    with pytest.raises(ValueError, match="ensemble 'npt' needs a cell that is periodic in three directions"):
        run_md(structure(potential, False), 1, ensemble="npt")
    with pytest.raises(ValueError, match=r"barostat_time must not be shorter than a time step \(0.5 fs\), got 0.1"):
        run_md(structure(potential), 1, ensemble="npt", barostat_time=0.1)
    with pytest.raises(ValueError, match="'bussi' rescales velocities, but all are zero"):
        run_md(structure(potential), 1, ensemble="bussi", temperature=0.0)
    with pytest.raises(ValueError, match="did you mean nose-hoover"):
        run_md(structure(potential), 1, ensemble="nosehoover")


# ---------------------------------------------------------------------- trajectories of mdtraj
@with_mdtraj
@pytest.mark.filterwarnings("ignore")  # those of mdtraj
@pytest.mark.parametrize("suffix", [".dcd", ".xtc"])
@pytest.mark.parametrize("ensemble", ["langevin", "npt-full"])
def test_binary_trajectories(potential, tmp_path, suffix, ensemble):
    """Positions and cells as far as the format has digits; a continued run writes a second file."""
    import mdtraj
    from mdtraj.formats import DCDTrajectoryFile, XTCTrajectoryFile

    periodic = has_pressure(ensemble)
    options = OPTIONS | {"ensemble": ensemble}
    whole, cut, again = (structure(potential, periodic) for _ in range(3))
    exact = tmp_path / "exact.traj"
    run_md(whole, 20, trajectory=exact, **options)
    files = {"trajectory": tmp_path / f"t{suffix}", "checkpoint": tmp_path / "c.npz"}
    run_md(cut, 10, **options, **files)
    with pytest.raises(ValueError, match=r"restart needs a checkpoint to go on from, because .* has no momenta"):
        run_md(structure(potential, periodic), 1, restart=True, trajectory=files["trajectory"])
    run_md(again, 10, restart=True, **options, **files)
    assert same(whole, again)
    frames = read(exact, ":")
    found = []
    for name in (f"t{suffix}", f"t-10{suffix}"):
        with (XTCTrajectoryFile if suffix == ".xtc" else DCDTrajectoryFile)(str(tmp_path / name)) as file:
            found.append(file.read())
    assert [len(part[0]) for part in found] == [3, 2]
    positions = np.concatenate([part[0] for part in found]) * (10 if suffix == ".xtc" else 1)
    for position, frame in zip(positions, frames, strict=True):
        expected = frame.positions
        if suffix == ".dcd" and periodic:
            expected = expected @ frame.cell.standard_form()[1].T
        assert np.abs(position - expected).max() < (0.0051 if suffix == ".xtc" else 1e-5)
    if periodic:
        box = found[1][3 if suffix == ".xtc" else 1][-1]
        expected = whole.cell.array / 10 if suffix == ".xtc" else whole.cell.lengths()
        assert np.abs(box - expected).max() < 1e-5
    if suffix == ".xtc":
        assert found[1][2].tolist() == [15, 20]
    assert mdtraj.__version__
    # A third run from the same step finds its name taken
    files["checkpoint"].unlink()
    run_md(structure(potential, periodic), 10, **options, checkpoint=files["checkpoint"])
    run_md(structure(potential, periodic), 5, restart=True, **options, **files)
    assert (tmp_path / f"t-10-1{suffix}").exists()


def test_a_missing_mdtraj_names_its_extra(potential, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mdtraj.formats", None)
    with pytest.raises(ImportError, match=r"\.dcd needs mdtraj: pip install 'nbody_pyg\[trajectories\]'"):
        run_md(structure(potential), 1, trajectory=tmp_path / "t.dcd")


def test_checkpoints_are_not_written_at_every_sample(potential, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(MDState, "save", lambda self, path: saved.append(self.step))
    run_md(structure(potential, False), 20, checkpoint=tmp_path / "c", **OPTIONS)
    assert saved == [0, 20]
    monkeypatch.setattr(dynamics, "_CHECKPOINT_SECONDS", 0.0)
    run_md(structure(potential, False), 20, checkpoint=tmp_path / "c", **OPTIONS)
    assert saved[2:] == [0, 5, 10, 15, 20]
