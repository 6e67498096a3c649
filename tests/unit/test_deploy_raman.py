"""Raman activities and depolarization ratios: averages over directions, finite differences, selection rules."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

import factories
from nbody_pyg import AtomicData, NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.deploy import InfraredSpectrum, infrared_spectrum, plot_infrared, save_model
from nbody_pyg.deploy.infrared import raman_activities
from nbody_pyg.properties import Property, PropertyModel, Statistics, property_irreps
from nbody_pyg.units import BOHR, COULOMB

SPECIES = [1, 6, 7, 8, 9]
MU = Property("mu", "dipole", "debye")
TENSOR = Property("tensor", "polarizability", "a0^3")
ODD = molecule("CH3CHO")
ODD.rattle(0.1, seed=5)  # no symmetry is left
ICOSAHEDRON = np.array([[0, s, t * (1 + 5**0.5) / 2] for s in (1, -1) for t in (1, -1)]) / np.sqrt((5 + 5**0.5) / 2)
#: Directions whose means of products of up to five components are those of the sphere.
DIRECTIONS = np.concatenate([np.roll(ICOSAHEDRON, k, axis=1) for k in range(3)])


def potential(atoms: Atoms) -> Potential:
    """Springs between all atoms, at rest there."""
    return factories.only(factories.Morse(cdist(atoms.positions, atoms.positions).tolist()), SPECIES)


def properties(*wanted: Property, statistics: dict[str, Statistics] | None = None) -> PropertyModel:
    torch.manual_seed(0)
    net = NBodyNet(SPECIES, NestedShells((4.0,)), channels=4, irreps_out=str(property_irreps(wanted)))
    return PropertyModel(net, wanted, statistics).double()


def anti_difluoroethane() -> tuple[Atoms, np.ndarray, np.ndarray]:
    """C2H4F2 of the symmetry C2h, turned; the atom that inversion brings each to; the mirror, [3, 3]."""
    half = np.array([[0.75, 0.0, 0.1], [1.35, 0.0, 1.3], [1.1, 0.88, -0.5], [1.1, -0.88, -0.5]])
    turn = Rotation.random(rng=np.random.default_rng(2)).as_matrix()
    atoms = Atoms("CFHHCFHH", np.concatenate([half, -half]) @ turn.T)
    return atoms, np.roll(np.arange(8), 4), turn @ np.diag([1.0, -1.0, 1.0]) @ turn.T


def assert_raman(found: tuple[np.ndarray, np.ndarray], slopes: np.ndarray, atol: float = 1e-10) -> None:
    """Light along x polarized along z is scattered along y: 45 times both polarizations, and their ratio.

    The means over all orientations of the molecule are those of products of a symmetric tensor with directions.
    """
    even = 0.5 * (slopes + slopes.swapaxes(1, 2))
    fields = np.einsum("kab,nb->kna", even, DIRECTIONS)
    parallel = np.square(np.einsum("kna,na->kn", fields, DIRECTIONS)).mean(1)
    perpendicular = 0.5 * (np.square(fields).sum(2).mean(1) - parallel)
    expected = 45 * (parallel + perpendicular)
    scale = expected.max()
    assert scale > 0 and (perpendicular / parallel).max() > 0.01
    np.testing.assert_allclose(found[0] / scale, expected / scale, rtol=0, atol=atol)
    np.testing.assert_allclose(found[1], perpendicular / parallel, rtol=0, atol=atol)


def test_the_formula_is_the_mean_over_orientations():
    slopes = np.random.default_rng(0).normal(size=(20, 3, 3))
    assert_raman(raman_activities(slopes), slopes)
    diagonal = np.diag([2.0, 2.0, 5.0])[None]  # a' = 3, gamma' = 3
    activity, depolarization = raman_activities(diagonal)
    assert activity == pytest.approx([45 * 9 + 7 * 9], rel=1e-14)
    assert depolarization == pytest.approx([27 / (45 * 9 + 36)], rel=1e-14)
    assert raman_activities(np.zeros((1, 3, 3))) == (0.0, 0.0)


@pytest.mark.parametrize("fault", ["4 for 7", "no symmetric part", "with the trace"])
def test_the_mean_rejects_faults(fault):
    slopes = np.random.default_rng(1).normal(size=(20, 3, 3))
    activity, depolarization = raman_activities(slopes)
    mean = np.trace(slopes, axis1=1, axis2=2) / 3
    if fault == "4 for 7":
        activity = 45 * mean**2 + 4 / 7 * (activity - 45 * mean**2)
    else:
        part = slopes if fault == "with the trace" else slopes - mean[:, None, None] * np.eye(3)
        square = 1.5 * np.square(part).sum((1, 2))
        activity, depolarization = 45 * mean**2 + 7 * square, 3 * square / (45 * mean**2 + 4 * square)
    with pytest.raises(AssertionError):
        assert_raman((activity, depolarization), slopes, atol=1e-3)


def test_activities_are_those_of_finite_differences():
    """Of the polarizability along each mode, by five points."""
    model, tensors = potential(ODD), properties(MU, TENSOR)
    found = infrared_spectrum(model, ODD, tensors, tensors, fmax=1e-6)
    step, slopes = 1e-3, []
    for mode in found.modes:
        frames = [found.atoms.copy() for _ in range(4)]
        for frame, times in zip(frames, (1, -1, 2, -2), strict=True):
            frame.positions += times * step * mode
        values = [tensors(AtomicData.from_ase(frame, labels=False))["tensor"][0].detach().numpy() for frame in frames]
        slopes.append((8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step))
    assert_raman((found.activities / BOHR**6, found.depolarization), np.array(slopes), atol=3e-10)
    assert found.activities.shape == found.depolarization.shape == (15,) and found.activities.min() > 0
    np.testing.assert_array_equal(found.intensities, infrared_spectrum(model, found.atoms, tensors).intensities)


def test_rotations_change_nothing(rotation):
    model, tensors = potential(ODD), properties(TENSOR)
    found = infrared_spectrum(model, ODD, None, tensors, fmax=1e-6)
    assert found.intensities is None and np.diff(found.frequencies).min() > 1  # no mode may be mixed with another
    turned = found.atoms.copy()
    turned.positions[:] = turned.positions @ rotation.numpy().T + [3.0, -1.0, 2.0]
    again = infrared_spectrum(model, turned, None, tensors, fmax=2e-6)
    scale = found.activities.max()
    assert scale > 1e-3 and found.depolarization.min() > 1e-3
    np.testing.assert_allclose(again.activities / scale, found.activities / scale, rtol=0, atol=1e-10)
    np.testing.assert_allclose(again.depolarization, found.depolarization, rtol=0, atol=1e-10)


def test_no_mode_of_a_centrosymmetric_molecule_is_in_both_spectra():
    """And the depolarization is 3/4 for modes that are not totally symmetric."""
    atoms, inverted, mirror = anti_difluoroethane()
    both = properties(MU, TENSOR)
    found = infrared_spectrum(potential(atoms), atoms, both, both)
    np.testing.assert_allclose(found.atoms.positions, atoms.positions, rtol=0, atol=1e-12)
    assert np.diff(found.frequencies).min() > 1 and found.frequencies[0] > 50
    weighted = found.modes * np.sqrt(atoms.get_masses())[:, None]
    reflected = cdist(atoms.positions @ mirror, atoms.positions).argmin(1)
    parity = -np.einsum("kid,kid->k", weighted, weighted[:, inverted])
    sides = np.einsum("kid,kid->k", weighted[:, reflected], weighted @ mirror)
    for characters in (parity, sides):
        np.testing.assert_allclose(np.abs(characters), 1.0, rtol=0, atol=1e-9)
    even, whole = parity > 0, (parity > 0) & (sides > 0)
    assert even.sum() == 9 and whole.sum() == 6  # 6 A_g + 3 B_g + 4 A_u + 5 B_u
    intensities, activities = found.intensities / found.intensities.max(), found.activities / found.activities.max()
    assert intensities[even].max() < 1e-16 and activities[~even].max() < 1e-16
    assert intensities[~even].min() > 1e-8 and activities[even].min() > 1e-8
    np.testing.assert_allclose(found.depolarization[even & ~whole], 0.75, rtol=0, atol=1e-10)
    assert found.depolarization[whole].min() > 0 and found.depolarization[whole].max() < 0.749
    assert found.depolarization.max() < 0.75 + 1e-10


def test_units():
    """The same polarizability in four units; the scale of the statistics makes it so."""
    model, found = potential(ODD), {}
    for unit, size in (("angstrom^3", 1.0), ("a0^3", BOHR**3), ("e^2*angstrom^2/eV", COULOMB), ("Å³", 1.0)):
        tensors = properties(Property("p", "polarizability", unit), statistics={"p": Statistics(scale=1 / size)})
        found[unit] = infrared_spectrum(model, ODD, polarizability=tensors).activities
    expected = found["angstrom^3"]
    assert expected.max() > 1e-3
    for activities in found.values():
        np.testing.assert_allclose(activities, expected, rtol=1e-9, atol=0)


def test_the_curve_holds_the_activities():
    found = infrared_spectrum(potential(ODD), ODD, polarizability=properties(TENSOR))
    grid = np.arange(-2000.0, 8000.0, 0.5)
    assert found.activities.sum() > 1e-3
    assert 0.5 * found.raman_spectrum(grid, 4.0).sum() == pytest.approx(found.activities.sum(), rel=2e-3)
    # The same lines as those of the absorption, with other areas
    swapped = InfraredSpectrum(found.atoms, found.frequencies, found.modes, found.activities)
    np.testing.assert_array_equal(swapped.spectrum(grid, 4.0), found.raman_spectrum(grid, 4.0))
    with pytest.raises(ValueError, match="raman_spectrum needs activities, which were not computed"):
        swapped.raman_spectrum(grid)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        found.raman_spectrum(grid, 0)


def test_wrong_polarizabilities():
    model = potential(ODD)
    for wrong, name in ((model, "Potential"), (properties(MU), "PropertyModel"),
                        (properties(TENSOR, Property("b", "polarizability", "a0^3")), "PropertyModel")):  # fmt: skip
        with pytest.raises(ValueError, match=f"one property of readout 'polarizability', got {name} without"):
            infrared_spectrum(model, ODD, polarizability=wrong)
    with pytest.raises(ValueError, match=r"a property with a unit, 'p' has none; train with --target\.p\.unit"):
        infrared_spectrum(model, ODD, polarizability=properties(Property("p", "polarizability")))
    wrong = properties(Property("p", "polarizability", "bohr^2"))
    with pytest.raises(ValueError, match=r"unknown polarizability unit 'bohr\^2'; did you mean 'bohr\^3'\?"):
        infrared_spectrum(model, ODD, polarizability=wrong)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, both = potential(ODD), properties(MU, TENSOR)
    save_model(model, "m.nbody")
    save_model(both, "both.nbody")
    save_model(properties(MU), "mu.nbody")
    write("a.xyz", ODD)
    words = ["infrared", "m.nbody", "a.xyz"]
    assert main([*words, "--dipole", "both.nbody", "--polarizability", "both.nbody"]) == 0
    out = capsys.readouterr().out
    assert "activity A^4/amu" in out and "depolarization" in out
    found = json.loads((tmp_path / "infrared/infrared.json").read_text())
    expected = infrared_spectrum(model, ODD, both, both)
    for key in ("intensities", "activities", "depolarization"):
        np.testing.assert_allclose(found[key], getattr(expected, key), rtol=1e-4, atol=0)
    with open("infrared/infrared.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["mode", "frequency cm^-1", "intensity km/mol", "activity A^4/amu", "depolarization"]
    assert [float(row[3]) for row in rows] == found["activities"] and len(rows) == 15
    assert [float(row[4]) for row in rows] == found["depolarization"]
    # Without a dipole: Raman alone
    assert main([*words, "--polarizability", "both.nbody", "--out", "raman"]) == 0
    assert "intensity" not in capsys.readouterr().out
    assert (tmp_path / "raman/infrared.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "raman/infrared.json").read_text())["intensities"] is None
    assert main([*words, "--polarizability", "mu.nbody", "--out", "none"]) == 1
    error = capsys.readouterr().err
    assert "one property of readout 'polarizability', got PropertyModel without" in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.layout
def test_the_plot(tmp_path):
    both = properties(MU, TENSOR)
    plot_infrared(infrared_spectrum(potential(ODD), ODD, both, both), tmp_path / "both.png", width=20.0)
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
