"""Committees: mean and spread, and dynamics that stop when the members disagree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.build import molecule as ase_molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces
from ase.io import read

from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.deploy import Committee, NBodyCalculator, run_md, save_model, stop_on_uncertainty


def member(seed: int, species=(1, 6, 8)) -> Potential:
    torch.manual_seed(seed)
    return Potential(NBodyNet(species, NestedShells((4.0,)), channels=4, lmax=1), {z: -float(z) for z in species})


@pytest.fixture(scope="module")
def members() -> list[Potential]:
    return [member(seed).double() for seed in (1, 2, 3)]


@pytest.fixture
def ethanol() -> Atoms:
    atoms = ase_molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=2)
    return atoms


def test_mean_and_standard_deviation(members, ethanol):
    ethanol.calc = Committee(members)
    ethanol.get_potential_energy()
    found = ethanol.calc.results
    alone = []
    for potential in members:
        other = ethanol.copy()
        other.calc = NBodyCalculator(potential)
        alone.append((other.get_potential_energy(), other.get_forces()))
    energy, forces = np.array([e for e, _ in alone]), np.stack([f for _, f in alone])
    assert found["energy"] == pytest.approx(energy.mean(), abs=1e-10)
    assert found["energy_std"] == pytest.approx(energy.std(ddof=1), abs=1e-10)
    assert np.abs(found["forces"] - forces.mean(0)).max() < 1e-10
    lengths = np.linalg.norm(forces - forces.mean(0), axis=2)
    assert np.abs(found["forces_std"] - np.sqrt((lengths**2).sum(0) / 2)).max() < 1e-10
    assert found["forces_std"].shape == (9,) and found["forces_std"].min() > 1e-4


def test_energies_of_the_atoms(members, ethanol):
    ethanol.calc = Committee(members)
    found = ethanol.get_potential_energies()
    alone = np.stack([NBodyCalculator(potential).get_property("energies", ethanol) for potential in members])
    assert np.abs(found - alone.mean(0)).max() < 1e-10 < alone.std(0).min()
    assert found.sum() == pytest.approx(ethanol.get_potential_energy(), abs=1e-9)
    tree = Potential(NBodyNet((1, 6, 8), BondTree(), channels=4)).double()
    with pytest.raises(PropertyNotImplementedError, match="energies need a hierarchy in which every part is centred"):
        Committee([members[0], tree]).get_property("energies", ethanol)


def test_mean_forces_are_the_slope_of_the_mean_energy(members, ethanol):
    ethanol.calc = Committee(members)
    numerical = calculate_numerical_forces(ethanol, eps=1e-5)
    assert np.abs(numerical - ethanol.get_forces()).max() < 1e-6 * np.abs(numerical).max()


def test_stress_of_a_crystal():
    crystal = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    crystal.rattle(0.1, seed=1)
    crystal.calc = Committee([member(seed, (8, 12)) for seed in (1, 2)])
    assert crystal.get_stress().shape == (6,) and crystal.calc.results["stress_std"].max() > 0


def test_members_share_their_lists(members, ethanol):
    ethanol.calc = Committee(members)
    ethanol.get_potential_energy()
    assert ethanol.calc.members[0].topologies.rebuilds == 1
    assert ethanol.calc.members[0].topologies is ethanol.calc.members[2].topologies


def test_dynamics_stop_on_uncertainty(members, ethanol, tmp_path):
    ethanol.calc = Committee(members)
    ethanol.get_potential_energy()
    start = float(ethanol.calc.results["forces_std"].max())
    quiet = run_md(ethanol, 3, stop=stop_on_uncertainty(100.0 * start), timestep=0.1)
    assert quiet.stopped is None
    path = tmp_path / "run.xyz"
    found = run_md(ethanol, 50, stop=stop_on_uncertainty(1e-6), trajectory=path, sample_every=10, timestep=0.1)
    assert found.stopped.startswith("stopped after step 0 (0.00 fs): the members disagree on the force on atom")
    assert len(read(path, index=":")) == 1 and len(found.time) == 1


def test_last_structure_is_kept(members, ethanol, tmp_path):
    ethanol.calc = Committee(members)
    calls = []

    def third(atoms):
        calls.append(atoms.positions.copy())
        return "enough" if len(calls) == 4 else None

    found = run_md(ethanol, 50, stop=third, trajectory=tmp_path / "run.xyz", sample_every=10, timestep=0.1)
    frames = read(tmp_path / "run.xyz", index=":")
    assert found.stopped == "stopped after step 3 (0.30 fs): enough"
    assert len(frames) == 2 and np.abs(frames[-1].positions - calls[-1]).max() < 1e-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Committee([m]), "members must list at least two potentials"),
        (lambda m: Committee("a.nbody"), "members must list at least two potentials"),
        (lambda m: Committee([m, member(1, (1, 7))]), "members must know the same elements"),
        (lambda m: stop_on_uncertainty(0.0), "must be positive"),
        (lambda m: stop_on_uncertainty(1.0)(Atoms("H")), "needs a committee"),
    ],
)
def test_errors(members, call, message):
    with pytest.raises(ValueError, match=message):
        call(members[0])


def test_command(members, ethanol, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.nbody", "b.nbody")]
    for path, potential in zip(paths, members, strict=False):
        save_model(potential, path)
    start = tmp_path / "start.xyz"
    ethanol.write(start)
    words = ["md", paths[0], str(start), "--steps", "20", "--timestep", "0.1", "--out", str(tmp_path / "md")]
    assert main([*words, "--committee", paths[1], "--max-forces-std", "1e-5"]) == 3
    out = capsys.readouterr().out
    assert "committee of 2" in out and "the structure is unlike the training data" in out
    assert len(read(tmp_path / "md" / "trajectory.xyz", index=":")) == 1
    assert main([*words, "--committee", *paths]) == 1
    assert "md.log exists; continue it with --restart, replace it with --overwrite" in capsys.readouterr().err
    assert main([*words, "--committee", *paths, "--overwrite"]) == 0
    assert main([*words, "--max-forces-std", "0.5"]) == 1
    assert "--max-forces-std needs further models" in capsys.readouterr().err
