"""Reference energies against exact answers, and the cases where compositions do not determine them."""

from __future__ import annotations

import logging

import pytest
import torch

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, fit_atomic_energies

E0 = {1: -13.587222780835477, 6: -1029.4889999855063, 8: -2041.9816003861047}
FORMULAS = [[6, 1, 1, 1, 1], [8, 1, 1], [6, 8], [6, 6, 1, 1, 8], [8, 8]]


def frame(species: list[int], extra: float = 0.0) -> AtomicData:
    energy = sum(E0[z] for z in species) + extra
    z = torch.tensor(species)
    pos = torch.randn(len(species), 3, dtype=torch.float64)
    return AtomicData(z=z, pos=pos, energy=torch.tensor([energy], dtype=torch.float64))


def total(reference: dict[int, float], species: list[int]) -> float:
    return sum(reference[z] for z in species)


def test_least_squares_recovers_exact_references():
    reference = fit_atomic_energies([frame(species) for species in FORMULAS])
    assert reference == pytest.approx(E0, abs=1e-9, rel=0)


def test_least_squares_is_orthogonal_to_the_compositions():
    frames = [frame(species, extra) for species, extra in zip(FORMULAS, (0.3, -0.2, 0.5, -0.4, 0.1), strict=True)]
    reference = fit_atomic_energies(frames)
    left = torch.tensor([float(f.energy) - total(reference, s) for f, s in zip(frames, FORMULAS, strict=True)])
    for z in E0:
        assert abs(sum(float(r) * s.count(z) for r, s in zip(left, FORMULAS, strict=True))) < 1e-6
    assert left.abs().max() > 0.01


def test_one_composition_falls_back_to_the_mean_per_atom(caplog):
    frames = [frame([6, 1, 1, 1, 1], extra) for extra in (-0.2, 0.2)]
    with caplog.at_level(logging.WARNING):
        reference = fit_atomic_energies(frames)
    assert "1 composition cannot determine the 2 elements H, C" in caplog.text
    mean = total(E0, [6, 1, 1, 1, 1]) / 5
    assert reference == pytest.approx({1: mean, 6: mean}, abs=1e-9)
    assert fit_atomic_energies(frames, "mean") == pytest.approx(reference, abs=1e-9)


def test_partly_determined_references_still_fit(caplog):
    # H and O always come as water: only their sum 2 H + O is determined
    formulas = [[8, 1, 1], [8, 1, 1, 8, 1, 1], [8, 1, 1, 6], [6]]
    reference = fit_atomic_energies([frame(s) for s in formulas])
    assert "2 compositions cannot determine the 3 elements" in caplog.text
    for species in formulas:
        assert total(reference, species) == pytest.approx(total(E0, species), abs=1e-9)


def test_isolated_and_mapping():
    frames = [frame([z]) for z in E0] + [
        frame([8, 1, 1], -9.5),
        frame([1], 3.0),
    ]  # the excited atom is not taken
    assert fit_atomic_energies(frames, "isolated") == pytest.approx(E0, abs=1e-12)
    bound = frame([6], -7.0)  # a crystal with one atom per cell is lower than its atoms
    bound.cell, bound.pbc = 2.5 * torch.eye(3, dtype=torch.float64).unsqueeze(0), torch.ones(1, 3, dtype=torch.bool)
    assert fit_atomic_energies([*frames, bound], "isolated") == pytest.approx(E0, abs=1e-12)
    assert fit_atomic_energies(frames, {"H": E0[1], "C": E0[6], 8: E0[8], "N": 5.0}) == pytest.approx(E0, abs=1e-12)


def test_a_wrong_level_of_theory_warns():
    frames = [frame([8, 1, 1])]
    with pytest.warns(UserWarning, match=r"eV per atom are left in frame 0.*level of theory or units"):
        fit_atomic_energies(frames, {1: -0.5, 8: -75.0})


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("average", "mode must be 'lstsq', 'mean', 'isolated' or a mapping"),
        ("isolated", "needs a frame with an isolated atom of H, there is none"),
        ({"O": -2041.0}, "mode gives no reference energy for H"),
        ({"O": -2041.0, "H": float("nan")}, "mode must hold finite energies"),
        ({"Ox": -2041.0}, "mode names 'Ox', which is no element symbol"),
    ],
)
def test_errors(mode, message):
    with pytest.raises(ValueError, match=message):
        fit_atomic_energies([frame([8, 1, 1])], mode)


def test_energies_are_required():
    with pytest.raises(ValueError, match="label 'energy' is in none"):
        fit_atomic_energies([AtomicData(z=torch.tensor([1]), pos=torch.zeros(1, 3))])
    with pytest.raises(ValueError, match="holds no frame"):
        fit_atomic_energies([])


@pytest.mark.parametrize("mode", ["lstsq", "mean"])
def test_one_wrong_energy_does_not_move_the_references(mode):
    good = [frame(species, 0.01 * n) for n, species in enumerate(FORMULAS * 6)]
    if mode == "mean":
        good = good[::5]
    expected = fit_atomic_energies(good, mode)
    with pytest.warns(UserWarning, match=r"eV per atom are left in frame 4 of x.xyz \(1 of \d+\)"):
        found = fit_atomic_energies(Frames([*good[:4], frame(FORMULAS[0], 1e6), *good[4:]], name="x.xyz"), mode)
    assert found == pytest.approx(expected, abs=1e-8, rel=0)


def test_frames_without_an_energy_do_not_count():
    frames = [frame(species) for species in FORMULAS]
    bare, nan = frame(FORMULAS[0]), frame(FORMULAS[1])
    del bare.energy
    nan.energy = nan.energy * float("nan")
    assert fit_atomic_energies([bare, *frames, nan]) == pytest.approx(E0, abs=1e-9, rel=0)
    square = [AtomicData(z=f.z, pos=f.pos, energy=f.energy.reshape(1, 1)) for f in frames]
    assert fit_atomic_energies(square) == pytest.approx(E0, abs=1e-9, rel=0)
