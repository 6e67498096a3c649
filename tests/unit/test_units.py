"""Units: factors against published values, spellings, errors by message."""

from __future__ import annotations

import math

import pytest

from nbody_pyg import units
from nbody_pyg.units import Units, dipole_factor, energy_factor, length_factor, polarizability_factor


@pytest.mark.parametrize(
    ("unit", "factor", "digits"),
    [
        ("eV", 1.0, 15),
        ("meV", 1e-3, 15),
        ("kcal/mol", 0.0433641043, 9),
        ("kJ/mol", 0.0103642697, 9),
        ("Ha", 27.211386246, 8),
        ("Hartree", 27.211386246, 8),
        ("Ry", 13.605693123, 8),
        ("cm-1", 1.239841984e-4, 12),
        ("KCAL/MOL", 0.0433641043, 9),
        ("kcal mol^-1", 0.0433641043, 9),
    ],
)
def test_energy_factors(unit: str, factor: float, digits: int) -> None:
    assert energy_factor(unit) == pytest.approx(factor, abs=10.0**-digits, rel=0)


def test_length_dipole_and_coulomb() -> None:
    assert length_factor("Bohr") == pytest.approx(0.529177210544, abs=1e-12)
    assert length_factor("Å") == length_factor("Angstrom") == 1.0
    assert dipole_factor("Debye") == pytest.approx(0.20819433, abs=1e-8)
    assert dipole_factor("e*bohr") / dipole_factor("D") == pytest.approx(2.541746, abs=1e-6)
    assert pytest.approx(14.3996454, abs=1e-6) == units.COULOMB
    assert pytest.approx(8.617333262e-5, abs=1e-13) == units.BOLTZMANN


def test_polarizabilities() -> None:
    """As volumes; 1 e^2 a0^2 / Ha is 1.6487772e-41 C^2 m^2/J (CODATA), and 1 a0^3 when divided by 4 pi epsilon_0."""
    volume = 1.64877727436e-41 / (4 * math.pi * 8.8541878188e-12) * 1e30
    for spelling in ("a0^3", "bohr^3", "Bohr3", "e^2*bohr^2/Ha", "e^2 a0^2/Eh"):
        assert polarizability_factor(spelling) == pytest.approx(volume, rel=1e-8)
    for spelling in ("angstrom^3", "A^3", "Å³", "Angstrom**3"):
        assert polarizability_factor(spelling) == 1.0
    of_two_charges = polarizability_factor("e^2*angstrom^2/eV")  # the field of e at 1 angstrom is 14.4 V/angstrom
    assert of_two_charges == pytest.approx(14.3996454, abs=1e-6)
    assert polarizability_factor("e*angstrom^2/V") == polarizability_factor("e^2 A^2/eV") == of_two_charges


def test_the_constants_agree_with_ase() -> None:
    import ase.units  # an older CODATA set: equal to eight digits

    assert ase.units.Hartree == pytest.approx(units.HARTREE, rel=1e-8)
    assert ase.units.Bohr == pytest.approx(units.BOHR, rel=1e-8)
    assert ase.units.kcal / ase.units.mol == pytest.approx(energy_factor("kcal/mol"), rel=1e-7)
    assert ase.units.Debye == pytest.approx(units.DEBYE, rel=1e-7)
    assert ase.units.kB == pytest.approx(units.BOLTZMANN, rel=1e-5)


def test_derived_factors() -> None:
    atomic = Units("Ha", "bohr", "debye")
    assert atomic.forces_factor == pytest.approx(51.422067, abs=1e-5)
    assert atomic.stress_factor == pytest.approx(183.631534, abs=1e-4)
    assert atomic.dipole_factor == units.DEBYE
    assert Units() == Units("eV", "angstrom", "e*angstrom")
    assert Units("hartree", "a0") == Units("Ha", "bohr")


def test_parse() -> None:
    assert Units.parse("kcal/mol") == Units("kcal/mol")
    assert Units.parse("Ha, bohr") == Units("Ha", "bohr")
    assert Units.parse("eV, Ang, D") == Units("eV", "angstrom", "debye")
    assert Units.parse({"energy": "kJ/mol", "length": "nm"}) == Units("kJ/mol", "nm")
    assert Units.parse(Units("Ha")) == Units("Ha")
    assert Units.parse("eV, angstrom, kbar") == Units(stress="kbar")
    assert Units.parse("GPa, Ha, bohr") == Units("Ha", "bohr", stress="GPa")
    assert Units.parse({"stress": "eV/A^3"}) == Units(stress="eV/angstrom^3")


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("eV/A^3", 1.0),
        ("GPa", 1 / 160.2176634),
        ("kbar", 1 / 1602.176634),
        ("kB", 1 / 1602.176634),
        ("bar", 1 / 1602176.634),
        ("MPa", 1 / 160217.6634),
        ("Ha/bohr^3", 27.211386245981 / 0.529177210544**3),
    ],
)
def test_stress_factors(unit: str, factor: float) -> None:
    assert Units(stress=unit).stress_factor == pytest.approx(factor, rel=1e-8)
    assert Units("kcal/mol", "bohr", stress=unit).stress_factor == Units(stress=unit).stress_factor


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: energy_factor("kcal/mole"),
            ValueError,
            r"unknown energy unit 'kcal/mole'; did you mean 'kcal/mol'\?",
        ),
        (lambda: energy_factor("MeV"), ValueError, "did you mean 'meV'"),
        (lambda: energy_factor("furlong"), ValueError, r"unknown energy unit 'furlong'.*Known: eV, meV"),
        (lambda: length_factor("angstorm"), ValueError, "did you mean 'angstrom'"),
        (lambda: polarizability_factor("bohr^2"), ValueError, r"unknown polarizability unit 'bohr\^2'; did you mean"),
        (lambda: polarizability_factor("furlong"), ValueError, r"'furlong'\. Known: angstrom\^3, bohr\^3, e\^2"),
        (lambda: dipole_factor("deby"), ValueError, "did you mean 'debye'"),
        (lambda: Units(energy=1.0), TypeError, "energy unit must be a string|Expected type"),
        (lambda: Units.parse("eV,"), ValueError, "units must read 'energy"),
        (lambda: Units.parse({"mass": "amu"}), ValueError, "units knows energy, length, dipole and stress"),
        (lambda: Units.parse("GPa, kbar"), ValueError, "one unit of stress, got 'GPa, kbar'"),
        (lambda: Units.parse("eV, angstrom, kbr"), ValueError, "unknown dipole unit 'kbr'"),
        (lambda: Units(stress="mPa"), ValueError, "did you mean 'MPa'"),
        (lambda: Units.parse(3), TypeError, "units must be a Units, a string or a mapping|Expected type"),
    ],
)
def test_errors(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
