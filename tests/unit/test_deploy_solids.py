"""Equation of state and elastic constants: beside the stresses and curvatures of the energy itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

import factories
from nbody_pyg import NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.deploy import NBodyCalculator, SolidProperties, plot_equation_of_state, save_model, solid_properties
from nbody_pyg.units import GIGAPASCAL

pytestmark = pytest.mark.layout


@pytest.fixture(scope="module")
def model() -> Potential:
    return factories.argon(factories.LennardJones())


@pytest.fixture(scope="module")
def found(model) -> SolidProperties:
    atoms = bulk("Ar", "fcc", 4.0, cubic=True)
    atoms.rattle(0.02, seed=1)
    return solid_properties(model, atoms, fmax=1e-5)


def energy_density(model: Potential, atoms: Atoms, strain: np.ndarray) -> float:
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return NBodyCalculator(model).get_potential_energy(moved) / atoms.get_volume()


def test_elastic_constants_are_curvatures_of_the_energy(model, found):
    """Atoms of this lattice stay at their places in every homogeneous strain, so no relaxation is needed here."""
    h, c = 0.004, found.elastic
    unit = np.eye(6)
    shapes = [
        np.array([[e[0], e[5] / 2, e[4] / 2], [e[5] / 2, e[1], e[3] / 2], [e[4] / 2, e[3] / 2, e[2]]]) for e in unit
    ]

    def curvature(a: np.ndarray, b: np.ndarray) -> float:
        plus, minus = (energy_density(model, found.atoms, h * (a + s * b)) for s in (1, -1))
        back, forth = (energy_density(model, found.atoms, -h * (a + s * b)) for s in (1, -1))
        return (plus - minus + back - forth) / (4 * h * h) / GIGAPASCAL

    for i, j in ((0, 0), (0, 1), (3, 3), (5, 5)):
        zero = energy_density(model, found.atoms, np.zeros((3, 3)))
        if i == j:
            steps = [energy_density(model, found.atoms, s * h * shapes[i]) for s in (1, -1)]
            expected = (sum(steps) - 2 * zero) / h**2 / GIGAPASCAL
        else:
            expected = curvature(shapes[i], shapes[j])
        assert c[i, j] == pytest.approx(expected, rel=5e-3) and c[i, j] > 1
    # Cubic: three constants
    np.testing.assert_allclose([c[1, 1], c[2, 2]], c[0, 0], rtol=1e-3)
    np.testing.assert_allclose([c[3, 3], c[4, 4]], c[5, 5], rtol=1e-3)
    assert np.abs(c[:3, 3:]).max() < 1e-3 * c[0, 0] and found.is_stable


def test_the_equation_of_state_agrees_with_the_elastic_constants(found):
    c = found.elastic
    bulk_modulus = (c[0, 0] + 2 * c[0, 1]) / 3
    assert found.bulk_modulus == pytest.approx(bulk_modulus, rel=0.01) and found.bulk_modulus > 10
    assert found.moduli["bulk"] == pytest.approx(bulk_modulus, rel=1e-3)
    voigt = (c[0, 0] - c[0, 1] + 3 * c[3, 3]) / 5
    reuss = 5 / (4 / (c[0, 0] - c[0, 1]) + 3 / c[3, 3])
    assert found.moduli["shear"] == pytest.approx((voigt + reuss) / 2, rel=1e-3)
    assert found.volume == pytest.approx(found.atoms.get_volume(), rel=1e-3)
    assert found.energy == pytest.approx(found.atoms.get_potential_energy(), abs=1e-3)
    assert len(found.volumes) == 9 and np.ptp(found.energies) > 1e-3


def test_atoms_relax_in_strained_cells(model):
    """Two lattices that may slide against each other: held in place they are stiffer."""
    torch.manual_seed(4)
    atoms = Atoms("Ar2", scaled_positions=[[0, 0, 0], [0.31, 0.36, 0.4]], cell=[3.4, 3.5, 4.4], pbc=True)
    found = solid_properties(model, atoms, fmax=1e-4, max_steps=1000)
    held = []
    for sign in (1, -1):
        moved = found.atoms.copy()
        moved.set_cell(found.atoms.cell.array @ (np.eye(3) + sign * 0.005 * np.eye(3)), scale_atoms=True)
        held.append(NBodyCalculator(model).get_stress(moved)[:3].sum())
    clamped = (held[0] - held[1]) / 0.01 / 9 / GIGAPASCAL
    assert found.elastic[:3, :3].sum() / 9 <= clamped * (1 + 1e-6) and clamped > 1


def test_wrong_arguments(model, tmp_path):
    atoms = bulk("Ar", "fcc", 4.0, cubic=True)
    open_one = Atoms("Ar2", [[0, 0, 0], [0, 0, 3]])
    with pytest.raises(ValueError, match=r"atoms must be periodic in all directions, got pbc \[False, False, False\]"):
        solid_properties(model, open_one)
    with pytest.raises(ValueError, match="points must be 5 or more, for a fit of four numbers, got 3"):
        solid_properties(model, atoms, points=3)
    with pytest.raises(ValueError, match=r"strain must lie between 0 and 0\.3, got -0\.1"):
        solid_properties(model, atoms, strain=-0.1)
    with pytest.raises(ValueError, match="the crystal did not relax within max_steps 1: a force of"):
        solid_properties(model, atoms, max_steps=1, fmax=1e-8)


def test_the_command_and_its_plot(found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plot_equation_of_state(found, "eos.png")
    assert (tmp_path / "eos.png").read_bytes()[:4] == b"\x89PNG"
    net = factories.net(NestedShells((4.0,)), species=[14], seed=2)
    save_model(Potential(net, {14: -3.0}, 0.3), "m.nbody")
    write("si.xyz", bulk("Si", cubic=True))
    # The crystal of an untrained network need not be stable: 3
    assert main(["solid", "m.nbody", "si.xyz", "--fmax", "0.05", "--steps", "2000"]) in (0, 3)
    out = capsys.readouterr().out
    assert "bulk modulus" in out and "C GPa" in out
    assert json.loads((tmp_path / "solid/solid.json").read_text())["num_atoms"] == 8
    assert read("solid/relaxed.xyz").get_stress().shape == (6,)
    assert main(["solid", "m.nbody", "si.xyz", "--index", "3"]) == 1
    assert "--index must be below 1, the number of structures in si.xyz" in capsys.readouterr().err
