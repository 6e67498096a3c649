"""Vibrations and infrared spectra beside the finite differences of ASE."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read, write
from ase.vibrations import Infrared
from scipy.spatial.distance import cdist

import factories
from nbody_pyg import AtomicData, NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.deploy import InfraredSpectrum, NBodyCalculator, infrared_spectrum, plot_infrared, save_model
from nbody_pyg.properties import Property, PropertyModel, property_irreps
from nbody_pyg.radial import smooth_cutoff
from nbody_pyg.units import ABSORPTION, DEBYE, WAVENUMBER

pytestmark = pytest.mark.layout

SPECIES = [1, 6, 7, 8, 9]
WATER = Atoms("OH2", [[0.0, 0.1, 0.0], [0.9, 0.5, 0.3], [-0.7, 0.6, -0.4]])
AXIS = np.array([0.6, -0.48, 0.64])  # a unit vector
CO2 = Atoms("COO", [0 * AXIS, 1.16 * AXIS, -1.16 * AXIS])
ODD = molecule("CH3CHO")
ODD.rattle(0.1, seed=5)  # no symmetry is left


class Both(Calculator):
    """Energy and forces of one model, dipole (e angstrom) of another: what ase.vibrations.Infrared asks for."""

    implemented_properties = ["energy", "forces", "dipole"]  # noqa: RUF012 (as in ASE)

    def __init__(self, potential: Potential, dipole: PropertyModel) -> None:
        super().__init__()
        self.own, self.model = NBodyCalculator(potential), dipole

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        energy, forces, _ = self.own.evaluate(atoms)
        mu = self.model(AtomicData.from_ase(atoms, labels=False))["mu"][0].detach().numpy() * DEBYE
        self.results = {"energy": energy, "forces": forces, "dipole": mu}


def potential(atoms: Atoms, stretched: float = 1.0) -> Potential:
    """Springs between all atoms; that between atoms 1 and 2 is stretched."""
    lengths = cdist(atoms.positions, atoms.positions)
    lengths[1:3, 1:3] *= stretched
    return factories.only(factories.Morse(lengths.tolist()), SPECIES)


def dipole(*more: Property) -> PropertyModel:
    wanted = [*more, Property("mu", "dipole", "debye")]
    net = NBodyNet(SPECIES, NestedShells((4.0,)), channels=4, irreps_out=str(property_irreps(wanted)))
    return PropertyModel(net, wanted).double()


CASES = {"bent": (WATER, 1.0), "linear": (CO2, 1.1), "asymmetric": (ODD, 1.0)}


@pytest.fixture(params=CASES)
def case(request) -> tuple[Potential, Atoms]:
    atoms, stretched = CASES[request.param]
    start = atoms.copy()
    start.rattle(0.02, seed=3)
    return potential(atoms, stretched), start


@pytest.mark.slow
def test_frequencies_and_intensities_are_those_of_finite_differences(case, tmp_path):
    model, start = case
    moment = dipole(Property("alpha", "extensive"))
    found = infrared_spectrum(model, start, moment, fmax=1e-7)
    atoms = found.atoms.copy()
    atoms.calc = Both(model, moment)
    ase = Infrared(atoms, name=str(tmp_path / "ir"), delta=0.002, nfree=4)
    ase.run()
    expected, rigid = ase.get_frequencies(), 3 * len(atoms) - len(found.frequencies)
    assert rigid == (5 if len(atoms) == 3 and atoms.numbers[0] == 6 else 6)
    assert np.abs(expected[:rigid]).max() < 1 and found.frequencies.min() > 100
    np.testing.assert_allclose(found.frequencies, expected.real[rigid:], rtol=0, atol=0.01)
    theirs = 42.2561 * ase.intensities[rigid:]
    assert theirs.sum() > 1 and found.is_minimum
    if rigid == 5:  # the two bends may be mixed
        ours, theirs = (np.array([*values[2:], values[:2].sum()]) for values in (found.intensities, theirs))
        assert abs(found.frequencies[0] - found.frequencies[1]) < 1e-4
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(found.intensities, theirs, rtol=1e-4, atol=1e-4)
    assert found.zero_point_energy == pytest.approx(float(ase.get_zero_point_energy()), abs=1e-5)


@pytest.mark.slow
def test_a_calculator_gives_the_same_intensities(case):
    model, start = case
    moment = dipole()
    found = infrared_spectrum(model, start, moment, fmax=1e-6)
    differences = infrared_spectrum(model, found.atoms, Both(model, moment), fmax=1e-6)
    np.testing.assert_allclose(differences.intensities, found.intensities, rtol=1e-3, atol=1e-3)
    assert found.intensities.max() > 1
    np.testing.assert_array_equal(differences.frequencies, found.frequencies)


def test_rotations_change_nothing(rotation):
    model, moment = potential(ODD), dipole()
    found = infrared_spectrum(model, ODD, moment, fmax=1e-6)
    turned = found.atoms.copy()
    turned.positions[:] = turned.positions @ rotation.numpy().T + [3.0, -1.0, 2.0]
    again = infrared_spectrum(model, turned, moment, fmax=2e-6)
    scale = found.intensities.max()
    assert scale > 1 and found.frequencies.min() > 100
    np.testing.assert_allclose(again.frequencies / 1000, found.frequencies / 1000, rtol=0, atol=1e-10)
    np.testing.assert_allclose(again.intensities / scale, found.intensities / scale, rtol=0, atol=1e-10)


def test_the_modes_are_orthonormal_without_translation_and_rotation():
    found = infrared_spectrum(potential(ODD), ODD)
    weighted = found.modes * np.sqrt(found.atoms.get_masses())[:, None]
    np.testing.assert_allclose(np.einsum("kid,lid->kl", weighted, weighted), np.eye(15), rtol=0, atol=1e-10)
    momentum = found.modes * found.atoms.get_masses()[:, None]
    arms = found.atoms.positions - found.atoms.get_center_of_mass()
    assert np.abs(momentum.sum(1)).max() < 1e-10 and np.abs(np.cross(arms, momentum).sum(1)).max() < 1e-9
    assert found.intensities is None


def test_two_atoms_by_hand():
    """One spring and two point charges: omega^2 = 2 D a^2 / m, and the intensity of a derivative q / sqrt(m)."""
    start = Atoms("HF", [[0, 0, 0], [0.3, 0.5, 0.7]])
    start.set_masses([2.014, 19.0])
    model = potential(Atoms("HF", [[0, 0, 0], [0.3, 0.5, 0.7]]))

    class Charges(Calculator):
        implemented_properties = ["dipole"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=("dipole",), system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            self.results = {"dipole": 0.4 * (atoms.positions[0] - atoms.positions[1])}

    found = infrared_spectrum(model, start, Charges())
    mass = 2.014 * 19.0 / 21.014
    factor = float(smooth_cutoff(torch.tensor([0.83**0.5], dtype=torch.float64), 9.0))
    assert found.frequencies == pytest.approx([WAVENUMBER * (2 * 2.0 * factor * 1.8**2 / mass) ** 0.5], rel=1e-9)
    assert found.intensities == pytest.approx([ABSORPTION * 0.4**2 / mass], rel=1e-9)
    assert pytest.approx(42.2561, rel=1e-5) == ABSORPTION * DEBYE**2  # of (D/A)^2/amu
    grid = np.arange(0.0, 20000.0, 0.5)
    curve = found.spectrum(grid, width=4.0)
    assert curve.sum() * 0.5 == pytest.approx(found.intensities[0], rel=2e-3)
    assert grid[curve.argmax()] == pytest.approx(found.frequencies[0], abs=0.5)
    half = curve[np.abs(grid - found.frequencies[0]).argmin() + 4]
    assert half == pytest.approx(0.5 * curve.max(), rel=0.3)


def test_imaginary_frequencies_are_negative():
    """Ends that attract a linear molecule's bend, held straight by symmetry."""
    found = infrared_spectrum(potential(CO2, stretched=0.9), CO2)
    assert (found.frequencies < -10).sum() == 2 and not found.is_minimum
    expected = 0.5 * found.frequencies[2:].sum() / 8065.544
    assert found.zero_point_energy == pytest.approx(expected, rel=1e-6)


def test_jacobian_is_the_derivative_of_the_dipole():
    model = dipole(Property("tensor", "polarizability"))
    frame = AtomicData.from_ase(ODD)
    for name in ("mu", "tensor"):
        found, h = model.jacobian(frame, name), 1e-5
        values = []
        for sign in (1, -1):
            moved = frame.clone()
            moved.pos[2, 1] += sign * h
            values.append(model(moved)[name].detach())
        torch.testing.assert_close(found[..., 2, 1], (values[0] - values[1]) / (2 * h), rtol=0, atol=1e-8)
        assert float(found[..., 2, 1].abs().max()) > 1e-3 and not found.requires_grad
    assert not frame.pos.requires_grad
    with pytest.raises(ValueError, match="name must be one of tensor, mu, got 'dipole'"):
        model.jacobian(frame, "dipole")


def test_wrong_arguments():
    model = potential(WATER)
    with pytest.raises(ValueError, match="atoms must be two or more, got 1; a single atom does not vibrate"):
        infrared_spectrum(model, Atoms("H"))
    with pytest.raises(ValueError, match=r"atoms must not be periodic, got pbc \[True, True, True\]"):
        infrared_spectrum(model, Atoms("H2", [[0, 0, 0], [0, 0, 1]], cell=[4, 4, 4], pbc=True))
    with pytest.raises(ValueError, match=r"atoms must have no constraints, got 1; remove them: del atoms\.constraints"):
        infrared_spectrum(model, Atoms("H2", [[0, 0, 0], [0, 0, 1]], constraint=FixAtoms([0])))
    with pytest.raises(ValueError, match="one property of readout 'dipole', got Potential without"):
        infrared_spectrum(model, WATER, model)
    with pytest.raises(ValueError, match="step must be positive, got 0"):
        infrared_spectrum(model, WATER, step=0)
    bent = WATER.copy()
    bent.rattle(0.1, seed=1)
    with pytest.raises(ValueError, match="the molecule did not relax within max_steps 1: a force of"):
        infrared_spectrum(model, bent, max_steps=1)
    found = infrared_spectrum(model, WATER)
    with pytest.raises(ValueError, match="spectrum needs intensities, which were not computed"):
        found.spectrum(np.zeros(1))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        InfraredSpectrum(found.atoms, found.frequencies, found.modes, np.ones(3)).spectrum(np.zeros(1), 0)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, moment = potential(WATER), dipole(Property("alpha", "extensive"))
    save_model(model, "m.nbody")
    save_model(moment, "d.nbody")
    write("w.xyz", WATER)
    expected = infrared_spectrum(model, WATER, moment)
    assert main(["infrared", "m.nbody", "w.xyz", "--dipole", "d.nbody"]) == 0
    out = capsys.readouterr().out
    assert "frequency cm^-1" in out and "intensity km/mol" in out and "zero-point energy" in out
    found = json.loads((tmp_path / "infrared/infrared.json").read_text())
    np.testing.assert_allclose(found["frequencies"], expected.frequencies, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found["intensities"], expected.intensities, rtol=1e-5)
    with open("infrared/infrared.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["mode", "frequency cm^-1", "intensity km/mol"] and len(rows) == 3
    assert [float(row[1]) for row in rows] == found["frequencies"]
    assert (tmp_path / "infrared/infrared.png").read_bytes()[:4] == b"\x89PNG"
    assert np.abs(read("infrared/relaxed.xyz").get_forces()).max() < 1e-4
    # Without a dipole: frequencies alone
    assert main(["infrared", "m.nbody", "w.xyz", "--out", "plain"]) == 0
    assert "intensity" not in capsys.readouterr().out and not (tmp_path / "plain/infrared.png").exists()
    gap = Property("gap", "intensive")
    net = NBodyNet(SPECIES, NestedShells((4.0,)), channels=4, irreps_out="1x0e")
    save_model(PropertyModel(net, [gap]), "gap.nbody")
    assert main(["infrared", "m.nbody", "w.xyz", "--dipole", "gap.nbody", "--out", "none"]) == 0
    assert "gap.nbody predicts no dipole" in capsys.readouterr().out
    assert main(["infrared", "m.nbody", "w.xyz", "--index", "3"]) == 1
    assert "--index must be below 1, the number of structures in w.xyz" in capsys.readouterr().err
    # No minimum: 3
    save_model(potential(CO2, stretched=0.9), "saddle.nbody")
    write("c.xyz", CO2)
    assert main(["infrared", "saddle.nbody", "c.xyz", "--out", "saddle"]) == 3
    assert "negative frequencies are imaginary" in capsys.readouterr().out


def test_free_motions_are_zero(tmp_path, monkeypatch, capsys):
    """Two molecules that do not interact: the soft modes are round-off, not a saddle point."""
    atoms = CO2.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)

    def spectrum(*frequencies: float) -> InfraredSpectrum:
        return InfraredSpectrum(atoms, np.array(frequencies), np.zeros((3, 3, 3)), np.array([5.0, 5.0, 100.0]))

    free, soft, saddle = spectrum(-0.1, 0.2, 1500.0), spectrum(2.0, 3.0, 1500.0), spectrum(-5.0, 0.2, 1500.0)
    assert [found.is_minimum for found in (free, soft, saddle)] == [True, True, False]
    assert [found.free_motions for found in (free, soft, saddle)] == [2, 0, 1]
    assert free.zero_point_energy == pytest.approx(750.0 / 8065.544, rel=1e-6)
    grid = np.arange(0.0, 20.0)
    assert soft.spectrum(grid).max() > 0.1 > 0.01 > free.spectrum(grid).max() > 0
    monkeypatch.chdir(tmp_path)
    write("c.xyz", CO2)
    for found, status in ((free, 0), (saddle, 3)):
        monkeypatch.setattr("nbody_pyg.cli.infrared.infrared_spectrum", lambda *a, found=found, **k: found)
        assert main(["infrared", "m.nbody", "c.xyz"]) == status
        out = capsys.readouterr().out
        assert f"frequencies below 1 cm^-1, which count as zero (free motions): {found.free_motions}\n" in out
        assert ("the structure is no minimum" in out) == (status == 3)


def test_the_plot(tmp_path):
    found = infrared_spectrum(potential(ODD), ODD, dipole())
    plot_infrared(found, tmp_path / "ir.png", width=20.0)
    assert (tmp_path / "ir.png").read_bytes()[:4] == b"\x89PNG"
