"""Molecular dynamics: what is written, how it goes on, when it stops, and what constraints and velocities do."""

from __future__ import annotations

import math
import os
import re

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian
from ase.io import read

from nbody_pyg import Potential
from nbody_pyg.cli.outputs import latest
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import NBodyCalculator, run_md
from nbody_pyg.deploy.dynamics import cut_to_whole_frames


class Springs(torch.nn.Module):
    """Every pair of atoms on a spring of its first length: smooth, bounded, and not the same for two atoms."""

    species = (1, 6, 8)

    def __init__(self, pos: torch.Tensor, stiffness: float = 1.0):
        super().__init__()
        self.length, self.stiffness = torch.cdist(pos, pos), stiffness

    def forward(self, z, pos, batch):
        pair = torch.triu_indices(len(pos), len(pos), 1)
        length = (pos[pair[0]] - pos[pair[1]]).norm(dim=1)
        return (0.5 * self.stiffness * (length - self.length[pair[0], pair[1]]).square().sum()).reshape(1)


def molecule(stiffness: float = 1.0) -> Atoms:
    atoms = load_embedded("ethanol")[0].to_ase()
    net = Springs(torch.as_tensor(atoms.positions), stiffness)
    atoms.calc = NBodyCalculator(Potential(net), dtype="float64")
    return atoms


# -- what is written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("steps", "every", "written"), [(7, 3, [0, 3, 6, 7]), (6, 3, [0, 3, 6]), (2, 10, [0, 2]), (0, 5, [0])]
)
def test_the_last_step_is_written(tmp_path, steps, every, written):
    atoms = molecule()
    report = run_md(atoms, steps, sample_every=every, log=tmp_path / "l", trajectory=tmp_path / "t.xyz")
    frames = read(tmp_path / "t.xyz", ":")
    assert [frame.info["step"] for frame in frames] == written
    assert np.allclose(report.time, 0.0005 * np.array(written), rtol=0, atol=1e-12)
    assert [frame.info["time_fs"] for frame in frames] == pytest.approx([0.5 * step for step in written])
    assert len((tmp_path / "l").read_text().splitlines()) == 1 + len(written)
    assert np.abs(frames[-1].positions - atoms.positions).max() < 1e-7
    assert ("drift" in str(report).replace("a drift needs", "")) == (len(written) >= 3)
    assert math.isnan(report.drift) == (len(written) < 2)


@pytest.mark.parametrize("name", ["t.xyz", "t.traj"])
def test_a_run_goes_on_from_its_trajectory(tmp_path, name):
    """Positions, momenta and the number of the step; as if it had not been cut."""
    whole, cut = molecule(), molecule()
    run_md(whole, 30, sample_every=10, temperature=300)
    files = {"log": tmp_path / "l", "trajectory": tmp_path / name, "sample_every": 10}
    run_md(cut, 12, **files)
    again = molecule()
    report = run_md(again, 18, restart=True, **files)
    frames = read(tmp_path / name, ":")
    assert [frame.info["step"] for frame in frames] == [0, 10, 12, 22, 30] and report.first_step == 12
    assert report.time[0] == pytest.approx(0.006) and report.time[-1] == pytest.approx(0.015)
    # .traj keeps every digit, extended xyz 8 decimals
    error = np.abs(again.positions - whole.positions).max()
    assert error == 0.0 if name == "t.traj" else error < 1e-6
    assert np.abs(whole.positions - cut.positions).max() > 1e-3
    assert [line.split()[0] for line in (tmp_path / "l").read_text().splitlines()[1:]] == [
        "0.0000", "0.0050", "0.0060", "0.0110", "0.0150"
    ]  # fmt: skip


def test_a_cut_frame_is_taken_away_before_a_run_goes_on(tmp_path):
    path = tmp_path / "t.xyz"
    run_md(molecule(), 4, sample_every=2, trajectory=path)
    whole = path.read_bytes()
    frame = len(whole) // 3
    for cut in (1, 2, 40, frame // 2, frame - 1):
        path.write_bytes(whole + whole[:cut])
        assert cut_to_whole_frames(path) == 3
        assert path.read_bytes() == whole
    path.write_bytes(whole + whole[: frame // 2])
    run_md(molecule(), 2, sample_every=2, trajectory=path, restart=True)
    assert [f.info["step"] for f in read(path, ":")] == [0, 2, 4, 6]
    path.write_bytes(whole[: frame // 2])
    with pytest.raises(ValueError, match="holds no whole frame"):
        cut_to_whole_frames(path)


@pytest.mark.slow
def test_what_cannot_be_continued_is_said(tmp_path):
    path, atoms = tmp_path / "t.xyz", molecule()
    with pytest.raises(ValueError, match="restart needs the trajectory to go on from, got"):
        run_md(atoms, 3, trajectory=path, restart=True)
    run_md(atoms, 3, trajectory=path)
    with pytest.raises(ValueError, match=r"timestep must be that of the trajectory, 0\.5 fs, got 1;"):
        run_md(molecule(), 3, trajectory=path, restart=True, timestep=1.0)
    other = molecule()[:-1]
    other.calc = molecule().calc
    with pytest.raises(ValueError, match="atoms must be those of the trajectory, got C2H5O and C2H6O"):
        run_md(other, 3, trajectory=path, restart=True)
    molecule().write(path)
    with pytest.raises(ValueError, match="its last frame does not tell step, time and momenta"):
        run_md(molecule(), 3, trajectory=path, restart=True)
    run_md(molecule(), 3, trajectory=path)
    heavy, charged = molecule(), molecule()
    heavy.set_masses([2.0 if n == 1 else None for n in heavy.numbers])
    charged.info["charge"] = 1
    for changed, what in ((heavy, "masses"), (charged, "charges and spin")):
        with pytest.raises(ValueError, match=f"atoms must have the {what} of the trajectory .*t.xyz; correct them"):
            run_md(changed, 3, trajectory=path, restart=True)
    before = path.read_bytes()
    unknown = molecule()
    unknown.numbers[0] = 7
    with pytest.raises(ValueError, match=r"atoms hold \['N'\]"):
        run_md(unknown, 3, trajectory=path, log=tmp_path / "l")
    assert path.read_bytes() == before and not (tmp_path / "l").exists(), "what fails replaces nothing"
    held = molecule()
    held.set_constraint(FixBondLengths([(0, 1)]))
    run_md(held, 3, trajectory=path, temperature=10)
    assert "constraints_left_out" not in held.info, "what the file lacks is no property of the atoms"
    with pytest.raises(ValueError, match="atoms must have the constraints of the trajectory, FixBondLengths, got none"):
        run_md(molecule(), 3, trajectory=path, restart=True)
    free = held.copy()
    free.calc = molecule().calc
    length = held.get_distance(0, 1)
    run_md(free, 3, trajectory=path, restart=True)
    assert free.get_distance(0, 1) == pytest.approx(length, abs=1e-7)


# -- constraints and velocities ----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["nve", "langevin"])
def test_constraints_hold_and_count_in_the_temperature(tmp_path, ensemble):
    atoms = molecule()
    atoms.set_constraint([FixAtoms([0, 3]), FixCartesian([5], mask=(True, False, True))])
    start = atoms.positions.copy()
    report = run_md(atoms, 40, ensemble=ensemble, trajectory=tmp_path / "t.xyz", sample_every=8)
    moved = np.abs(atoms.positions - start)
    assert moved[[0, 3]].max() == 0.0 and moved[5, [0, 2]].max() == 0.0 and moved[5, 1] > 1e-4
    assert moved[[1, 2, 4, 6, 7, 8]].min() > 1e-6
    freedom = 3 * 9 - 2 * 3 - 2
    assert atoms.get_number_of_degrees_of_freedom() == freedom
    kinetic = report.total - report.potential
    assert np.allclose(report.temperature, 2 * kinetic / (freedom * units.kB), rtol=1e-12)
    assert read(tmp_path / "t.xyz").constraints, "extended xyz keeps these two"
    if ensemble == "nve":
        assert np.ptp(report.total) < 0.02 * np.ptp(report.potential)


def test_drawn_velocities_have_no_momentum_unless_something_is_held():
    atoms = molecule()
    run_md(atoms, 0, temperature=300)
    assert np.abs(atoms.get_momenta().sum(axis=0)).max() < 1e-10 and atoms.get_temperature() > 100
    atoms = molecule()
    atoms.set_constraint(FixAtoms([0]))
    run_md(atoms, 0, temperature=300)
    assert np.abs(atoms.get_momenta().sum(axis=0)).max() > 0.1


def test_velocities_are_given_or_drawn_as_asked():
    given = np.linspace(-1.0, 1.0, 27).reshape(9, 3)
    seen = {}
    for which in ("auto", "given", "drawn"):
        atoms = molecule()
        atoms.set_momenta(given)
        report = run_md(atoms, 0, velocities=which)
        seen[which] = atoms.get_momenta()
        assert report.velocities.startswith("drawn at 300 K, seed 0" if which == "drawn" else "those of the first")
    assert np.array_equal(seen["auto"], given) and np.array_equal(seen["given"], given)
    assert np.abs(seen["drawn"] - given).max() > 0.1
    still = molecule()
    run_md(still, 0, velocities="given")
    assert not still.get_momenta().any(), "at rest, because that was asked for"


# -- runs that have failed ---------------------------------------------------------------------------------
class _Breaks(Springs):
    """Not a number from the third evaluation on."""

    calls = 0

    def forward(self, z, pos, batch):
        self.calls += 1
        return super().forward(z, pos, batch) * (math.nan if self.calls > 3 else 1.0)


def test_numbers_that_are_not_finite_end_a_run_and_are_not_written(tmp_path):
    atoms = molecule()
    atoms.calc = NBodyCalculator(Potential(_Breaks(torch.as_tensor(atoms.positions))), dtype="float64")
    report = run_md(atoms, 50, sample_every=1, trajectory=tmp_path / "t.xyz", log=tmp_path / "l")
    assert "stopped after step" in report.stopped and "not finite" in report.stopped
    frames = read(tmp_path / "t.xyz", ":")
    assert 0 < len(frames) == len(report.time) < 4
    assert all(np.isfinite(frame.get_forces()).all() for frame in frames) and np.isfinite(report.total).all()


def test_nothing_finite_at_all_is_reported_too(tmp_path):
    atoms = molecule()
    net = _Breaks(torch.as_tensor(atoms.positions))
    net.calls = 10
    atoms.calc = NBodyCalculator(Potential(net))
    report = run_md(atoms, 5, trajectory=tmp_path / "t.xyz")
    assert (
        report.stopped.startswith("stopped after step 0") and str(report) == "no sample: the run ended before the first"
    )


class _Nothing(torch.nn.Module):
    species = (1, 6, 8)

    def forward(self, z, pos, batch, *, cell=None, pbc=None):
        return (0.0 * pos).sum().reshape(1)


def flight(**speed) -> Atoms:
    """Atoms that feel nothing, each with its speed in angstrom per fs."""
    atoms = Atoms("H27", np.stack(np.meshgrid(*[2.0 * np.arange(3)] * 3), -1).reshape(-1, 3), cell=[9] * 3, pbc=True)
    atoms.calc = NBodyCalculator(Potential(_Nothing()), dtype="float64")
    velocities = np.zeros((27, 3))
    for atom, value in speed.items():
        velocities[int(atom[1:])] = np.array([value, 0.0, 0.0]) / units.fs
    atoms.set_velocities(velocities)
    return atoms


@pytest.mark.parametrize(
    ("atoms", "options", "message"),
    [
        (flight(**{f"a{n}": 0.4 for n in range(27)}), {}, "the temperature is"),
        (flight(a4=1.0), {}, r"atom 4 \(H\) has a kinetic energy of 52"),
        (flight(a4=0.1), {"timestep": 20.0}, r"atom 4 \(H\) would move by 2 angstrom in one step"),
        (flight(a4=0.1), {"temperature": 5000.0}, None),
        (flight(**{f"a{n}": 0.4 for n in range(27)}), {"temperature": 7000.0}, None),
    ],
)
def test_a_run_that_blows_up_ends_with_the_reason(tmp_path, atoms, options, message):
    report = run_md(atoms, 3, trajectory=tmp_path / "t.xyz", velocities="given", **options)
    if message is None:
        assert report.stopped is None
        return
    assert re.search(message, report.stopped) and report.stopped.startswith("stopped after step 0 (0.00 fs)")
    assert len(read(tmp_path / "t.xyz", ":")) == len(report.time) == 1, "what there is has been written"
    again = run_md(atoms, 3, velocities="given", max_temperature=math.inf, **options)
    assert again.stopped is None and again.time[-1] > 0


@pytest.mark.slow
def test_an_atom_that_leaves_ends_the_run():
    atoms = molecule()
    atoms.calc = NBodyCalculator(Potential(_Nothing()))
    speed = np.zeros((9, 3))
    speed[8] = 0.1 * atoms.get_masses()[8]
    atoms.set_momenta(speed)
    report = run_md(atoms, 2000, velocities="given", timestep=1.0)
    assert "atom 8 (" in report.stopped and "has left: its nearest neighbour is" in report.stopped
    atoms.set_cell([40.0] * 3)
    atoms.set_pbc(True)  # there is no outside
    assert run_md(atoms, 20, velocities="given", timestep=1.0).stopped is None


def test_a_usual_run_is_not_stopped():
    assert run_md(molecule(stiffness=20.0), 200, temperature=600).stopped is None


# -- errors ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be zero or positive, got -1"),
        ({"steps": 2.5}, r"steps must be a whole number, got 2\.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"sample_every": 0}, "sample_every must be positive, got 0"),
        ({"timestep": math.inf}, "timestep must be positive, got inf"),
        ({"timestep": math.nan}, "timestep must be positive, got nan"),
        ({"temperature": -1.0}, "temperature must be zero or positive, got -1"),
        ({"friction": math.nan}, "friction must be zero or positive, got nan"),
        ({"max_temperature": 0.0}, "max_temperature must be positive, got 0"),
        ({"velocities": "some"}, "velocities must be one of auto, given, drawn, got 'some'"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        run_md(molecule(), **({"steps": 3} | options))


def test_atoms_that_cannot_move_are_refused():
    atoms = molecule()
    atoms.set_constraint(FixAtoms(range(9)))
    with pytest.raises(ValueError, match="their constraints hold all of them"):
        run_md(atoms, 3)


def test_the_default_folder_that_was_written_last(tmp_path, monkeypatch):
    """Also where numbers are missing; folders of other names are no candidates."""
    monkeypatch.chdir(tmp_path)
    assert str(latest("md", "t.xyz")) == "md"
    for age, name in enumerate(("md-old", "md-5", "md-2", "md", "md-0", "md.xyz", "md-3")):
        (tmp_path / name).mkdir()
        if name != "md-3":
            (tmp_path / name / "t.xyz").touch()
            os.utime(tmp_path / name / "t.xyz", (1000 + age, 1000 + age))
    assert str(latest("md", "t.xyz")) == "md"
    os.utime(tmp_path / "md-5" / "t.xyz")
    assert str(latest("md", "t.xyz")) == "md-5"
