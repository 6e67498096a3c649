"""The ASE calculator and molecular dynamics with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.build import molecule as ase_molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.io import read

import factories
from nbody_pyg import BondTree, NestedShells
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator, run_md, save_model, with_reference
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import AtomicReference, Potential
from nbody_pyg.properties import Property, PropertyModel, property_irreps

E0 = AtomicReference({1: -13.6, 6: -1030.5, 8: -2041.8})


def network(scheme=None, species=(1, 6, 8)) -> NBodyNet:
    torch.manual_seed(3)
    return NBodyNet(species, scheme or NestedShells((4.0,)), channels=4, lmax=1)


@pytest.fixture(params=[NestedShells((4.0,)), BondTree(cutoff=4.0)], ids=["shells", "tree"])
def calculator(request) -> NBodyCalculator:
    return NBodyCalculator(Potential(network(request.param), E0), dtype="float64")


@pytest.fixture
def ethanol() -> Atoms:
    atoms = ase_molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=2)
    return atoms


@pytest.mark.slow
def test_forces_are_the_slope_of_the_energy(calculator, ethanol):
    ethanol.calc = calculator
    forces = ethanol.get_forces()
    numerical = calculate_numerical_forces(ethanol, eps=1e-5)
    assert np.abs(forces).max() > 1e-3
    assert np.abs(forces - numerical).max() < 1e-6 * np.abs(forces).max()
    assert ethanol.get_potential_energy(force_consistent=True) == ethanol.get_potential_energy()


@pytest.mark.slow
def test_energies_of_atoms_sum_to_the_energy(ethanol):
    ethanol.calc = NBodyCalculator(Potential(network(), E0, 0.6), dtype="float64")
    energies = ethanol.get_potential_energies()
    assert energies.shape == (9,)
    assert energies.sum() == pytest.approx(ethanol.get_potential_energy(), abs=1e-9)
    ethanol.calc = NBodyCalculator(Potential(network(BondTree()), E0))
    with pytest.raises(PropertyNotImplementedError, match="every part is centred on an atom"):
        ethanol.get_potential_energies()


def test_stress_of_a_crystal():
    atoms = bulk("C", "diamond", a=3.7, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = NBodyCalculator(Potential(network(), E0), dtype="float64")
    stress = atoms.get_stress()
    assert stress.shape == (6,) and np.abs(stress).max() > 1e-5
    assert np.abs(stress - calculate_numerical_stress(atoms, eps=1e-5)).max() < 1e-7


def test_no_stress_without_a_cell(ethanol, calculator):
    ethanol.calc = calculator
    with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic cell"):
        ethanol.get_stress()


def test_unknown_element(calculator):
    atoms = ase_molecule("CH3Cl")
    atoms.calc = calculator
    with pytest.raises(ValueError, match=r"atoms hold \['Cl'\], but the model was trained on \['H', 'C', 'O'\]"):
        atoms.get_potential_energy()


def test_model_file_and_precision(tmp_path, ethanol):
    potential = Potential(network(), E0)
    save_model(potential, tmp_path / "m.nbody")
    energies = {}
    for dtype in (None, "float32", "float64"):
        ethanol.calc = NBodyCalculator(tmp_path / "m.nbody", dtype=dtype)
        energies[dtype] = ethanol.get_potential_energy()
    assert energies[None] == energies["float32"]
    assert 0 < abs(energies["float32"] - energies["float64"]) < 1e-4
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'half'"):
        NBodyCalculator(potential, dtype="half")


def test_a_model_of_properties_is_refused():
    properties = [Property("gap", "intensive", "eV")]
    net = NBodyNet([1, 6, 8], NestedShells((4.0,)), channels=4, irreps_out=str(property_irreps(properties)))
    with pytest.raises(ValueError, match="potential must give energies and forces, got a PropertyModel for other"):
        NBodyCalculator(PropertyModel(net, properties))


@pytest.mark.filterwarnings("ignore:bonds found in this structure differ")
def test_model_of_one_molecule_brings_its_hierarchy(tmp_path, ethanol):
    """Started from a structure with a long bond, it still has the groups that it was trained with."""
    potential = Potential(network(BondTree(cutoff=4.0)), E0).double()
    reference = {"z": ethanol.numbers.tolist(), "pos": ethanol.positions.tolist()}
    save_model(potential, tmp_path / "m.nbody", {"reference": reference})
    stretched = ethanol.copy()
    away = ethanol.positions[8] - ethanol.positions[2]
    stretched.positions[8] += 1.0 * away
    energies = []
    for source in (tmp_path / "m.nbody", potential):
        stretched.calc = NBodyCalculator(source)
        energies.append(stretched.get_potential_energy())
    ethanol.calc = NBodyCalculator(potential, bonds="first")
    ethanol.get_potential_energy()
    for _ in range(4):
        ethanol.positions[8] += 0.25 * away
        followed = ethanol.get_potential_energy()
    assert energies[0] == pytest.approx(followed, abs=1e-8) != energies[1]
    frames = [AtomicData.from_ase(stretched, labels=False)]
    shared = with_reference(frames, tmp_path / "m.nbody", potential.model.scheme)
    assert float(potential(shared[0])["energy"]) == pytest.approx(energies[0], abs=1e-8)
    single = with_reference([AtomicData.from_ase(ase_molecule("CH4"))], tmp_path / "m.nbody", potential.model.scheme)
    assert single[0].num_nodes == 5 and "num_parts_1" in single[0]


def test_other_atoms_and_other_periodicity(calculator, ethanol):
    energies = []
    for atoms in (ethanol, ase_molecule("CH4"), ethanol):
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[2] != energies[1]


def test_single_atom(calculator):
    atoms = Atoms("H", positions=[[0.1, 0.2, 0.3]], calculator=calculator)
    assert np.abs(atoms.get_forces()).max() == 0 and np.isfinite(atoms.get_potential_energy())


# -- dynamics ----------------------------------------------------------------------------------------------
class Harmonic(torch.nn.Module):
    """Every atom on a spring to the centre: bounded, smooth dynamics."""

    species = (1, 6, 8)

    def forward(self, z, pos, batch):
        return (0.1 * (pos - pos.mean(0)).square().sum()).reshape(1)


def test_nve_conserves_energy_and_writes_its_files(tmp_path, ethanol):
    ethanol.calc = NBodyCalculator(Potential(Harmonic()), dtype="float64")
    seen = []
    report = run_md(ethanol, 400, timestep=0.2, temperature=300, log=tmp_path / "md.log",
                    trajectory=tmp_path / "t.xyz", report=seen.append)  # fmt: skip
    assert len(report.time) == 41 == len(seen) and report.time[-1] == pytest.approx(0.08)
    assert abs(report.largest_jump) < 0.5 and report.temperature.min() > 0
    assert np.ptp(report.total) < 1e-2 * np.ptp(report.potential)
    frames = read(tmp_path / "t.xyz", ":")
    assert len(frames) == 41 and frames[-1].get_forces().shape == (9, 3)
    assert len((tmp_path / "md.log").read_text().splitlines()) == 42
    assert "drift" in str(report) and "largest jump" in str(report)


def test_drift_is_the_slope():
    from nbody_pyg.deploy import MDReport

    time = np.linspace(0.0, 2.0, 50)
    flat = np.zeros(50)
    report = MDReport(time, 3.0 + 0.009 * time, flat, flat, num_atoms=9)
    assert report.drift == pytest.approx(10.0) and report.fluctuation < 1e-9
    assert report.largest_jump == pytest.approx(1000 * 0.009 * time[1] / 9)


def test_langevin_is_repeatable_and_keeps_given_velocities(tmp_path, ethanol):
    totals = []
    for _ in range(2):
        atoms = ethanol.copy()
        atoms.calc = NBodyCalculator(Potential(Harmonic()))
        atoms.set_momenta(np.full((9, 3), 0.3))
        report = run_md(atoms, 20, ensemble="langevin", seed=4, trajectory=tmp_path / "t.traj")
        totals.append(report.total)
    assert np.array_equal(*totals) and totals[0][0] != totals[0][-1]
    first = read(tmp_path / "t.traj", 0)
    assert np.allclose(first.get_momenta(), 0.3)


def test_dynamics_errors(ethanol):
    with pytest.raises(ValueError, match="atoms carry no calculator"):
        run_md(ethanol, 10)
    ethanol.calc = NBodyCalculator(Potential(Harmonic()))
    with pytest.raises(ValueError, match=r"ensemble must be one of nve, langevin, .*, got 'nvt'"):
        run_md(ethanol, 10, ensemble="nvt")
    with pytest.raises(ValueError, match="timestep must be positive, got 0"):
        run_md(ethanol, 10, timestep=0)


def test_a_stress_that_was_asked_for_once_comes_with_the_forces(monkeypatch):
    """NPT asks for energy, forces and stress one after the other: one evaluation at each step, not two."""
    atoms = bulk("C", cubic=True)
    atoms.rattle(0.05, seed=1)
    model = factories.potential(NestedShells((3.0,)), scale=0.3)
    atoms.calc = NBodyCalculator(model, engine="torch")
    counted = []
    evaluate = atoms.calc._evaluate
    monkeypatch.setattr(atoms.calc, "_evaluate", lambda *a, **k: counted.append(k) or evaluate(*a, **k))
    before = []
    for step in range(3):
        atoms.rattle(0.01, seed=step)
        before.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    assert [k["compute_stress"] for k in counted] == [False, True, True, True], "one more at the first step only"
    fresh = atoms.copy()
    fresh.calc = NBodyCalculator(model)
    np.testing.assert_allclose(before[-1][2], fresh.get_stress(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(before[-1][1], fresh.get_forces(), rtol=0, atol=1e-10)
    assert np.abs(before[-1][2]).max() > 1e-6
    # An open system, and one without a volume, have none
    atoms.pbc = False
    assert np.abs(atoms.get_forces()).max() > 1e-6 and "stress" not in atoms.calc.results
