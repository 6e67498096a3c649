r"""Units: constants, and conversion into the internal units eV, angstrom, amu, fs and e.

Everything inside the library is in eV, angstrom, eV/angstrom, eV/angstrom^3 (stress), e*angstrom (dipole).
Values in other units are converted once, where they enter or leave, with the factors of this module;
nothing else in the library holds a conversion factor, but for the repulsion of nuclei, whose constants stay those that
saved models were trained with. Constants: CODATA 2022 (the SI constants e, N_A, h, c and k_B are exact).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbody_pyg.messages import closest

ELEMENTARY_CHARGE = 1.602176634e-19  # C, exact
AVOGADRO = 6.02214076e23  # 1/mol, exact
BOLTZMANN = 1.380649e-23 / ELEMENTARY_CHARGE  # eV/K
SPEED_OF_LIGHT = 299792458.0  # m/s, exact
PLANCK = 6.62607015e-34  # J s, exact
ATOMIC_MASS = 1.66053906892e-27  # kg
HARTREE = 27.211386245981  # eV
BOHR = 0.529177210544  # angstrom
COULOMB = HARTREE * BOHR  # e^2 / (4 pi epsilon_0), eV angstrom

KJ_PER_MOL = 1e3 / (AVOGADRO * ELEMENTARY_CHARGE)
DEBYE = 1e-21 / SPEED_OF_LIGHT / ELEMENTARY_CHARGE * 1e10  # e angstrom

ENERGY_UNITS: Mapping[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": 4.184 * KJ_PER_MOL,
    "kJ/mol": KJ_PER_MOL,
    "Ha": HARTREE,
    "mHa": 1e-3 * HARTREE,
    "Ry": 0.5 * HARTREE,
    "cm^-1": 100.0 * PLANCK * SPEED_OF_LIGHT / ELEMENTARY_CHARGE,
}
LENGTH_UNITS: Mapping[str, float] = {"angstrom": 1.0, "bohr": BOHR, "nm": 10.0, "pm": 1e-2}
DIPOLE_UNITS: Mapping[str, float] = {"e*angstrom": 1.0, "debye": DEBYE, "e*bohr": BOHR}
#: Polarizabilities as volumes, alpha / (4 pi epsilon_0).
POLARIZABILITY_UNITS: Mapping[str, float] = {
    "angstrom^3": 1.0,
    "bohr^3": BOHR**3,
    "e^2*angstrom^2/eV": COULOMB,
    "e^2*bohr^2/Ha": BOHR**3,
}
GIGAPASCAL = 1e-21 / ELEMENTARY_CHARGE  # eV/angstrom^3
#: Wavenumber of a vibration whose stiffness is 1 eV/angstrom^2 and whose mass is 1 amu, cm^-1.
WAVENUMBER = (ELEMENTARY_CHARGE / ATOMIC_MASS) ** 0.5 * 1e10 / (200.0 * math.pi * SPEED_OF_LIGHT)
#: Integrated absorption N_A / (12 epsilon_0 c^2) |dmu/dQ|^2 where |dmu/dQ|^2 is 1 e^2/amu, km/mol.
ABSORPTION = AVOGADRO * math.pi * COULOMB * ELEMENTARY_CHARGE / (3e13 * SPEED_OF_LIGHT**2 * ATOMIC_MASS)
STRESS_UNITS: Mapping[str, float] = {
    "eV/angstrom^3": 1.0,
    "meV/angstrom^3": 1e-3,
    "GPa": GIGAPASCAL,
    "kbar": 0.1 * GIGAPASCAL,
    "bar": 1e-4 * GIGAPASCAL,
    "MPa": 1e-3 * GIGAPASCAL,
    "Pa": 1e-9 * GIGAPASCAL,
    "Ha/bohr^3": HARTREE / BOHR**3,
    "Ry/bohr^3": 0.5 * HARTREE / BOHR**3,
}

# Spellings met in files; compared without regard to case and spaces, except where case carries the meaning
# (meV).
_SPELLINGS: Mapping[str, str] = {
    "electronvolt": "eV",
    "millielectronvolt": "meV",
    "kcal mol^-1": "kcal/mol",
    "kcalmol": "kcal/mol",
    "kcal": "kcal/mol",
    "kj mol^-1": "kJ/mol",
    "kjmol": "kJ/mol",
    "hartree": "Ha",
    "hartrees": "Ha",
    "eh": "Ha",
    "e_h": "Ha",
    "millihartree": "mHa",
    "rydberg": "Ry",
    "cm-1": "cm^-1",
    "1/cm": "cm^-1",
    "a": "angstrom",
    "å": "angstrom",
    "ang": "angstrom",
    "angstroms": "angstrom",
    "ångström": "angstrom",
    "a0": "bohr",
    "bohrs": "bohr",
    "nanometer": "nm",
    "picometer": "pm",
    "d": "debye",
    "eang": "e*angstrom",
    "ea": "e*angstrom",
    "e*a": "e*angstrom",
    "e*å": "e*angstrom",
    "e*ang": "e*angstrom",
    "eangstrom": "e*angstrom",
    "e*a0": "e*bohr",
    "ea0": "e*bohr",
    "ebohr": "e*bohr",
    "a^3": "angstrom^3",
    "å^3": "angstrom^3",
    "å³": "angstrom^3",
    "ang^3": "angstrom^3",
    "angstrom3": "angstrom^3",
    "angstrom**3": "angstrom^3",
    "a0^3": "bohr^3",
    "a0**3": "bohr^3",
    "bohr3": "bohr^3",
    "bohr**3": "bohr^3",
    "e^2a^2/ev": "e^2*angstrom^2/eV",
    "e^2*a^2/ev": "e^2*angstrom^2/eV",
    "e^2angstrom^2/ev": "e^2*angstrom^2/eV",
    "e*angstrom^2/v": "e^2*angstrom^2/eV",
    "e^2a0^2/eh": "e^2*bohr^2/Ha",
    "e^2*a0^2/ha": "e^2*bohr^2/Ha",
    "e^2*a0^2/eh": "e^2*bohr^2/Ha",
    "e^2*bohr^2/hartree": "e^2*bohr^2/Ha",
    "ev/a^3": "eV/angstrom^3",
    "ev/a**3": "eV/angstrom^3",
    "ev/a3": "eV/angstrom^3",
    "ev/ang^3": "eV/angstrom^3",
    "ev/å^3": "eV/angstrom^3",
    "ev/å³": "eV/angstrom^3",
    "mev/a^3": "meV/angstrom^3",
    "kb": "kbar",
    "kilobar": "kbar",
    "gigapascal": "GPa",
    "hartree/bohr^3": "Ha/bohr^3",
    "ha/a0^3": "Ha/bohr^3",
    "rydberg/bohr^3": "Ry/bohr^3",
}


def _canonical(unit: str, table: Mapping[str, float], kind: str) -> str:
    """The table's own name of ``unit``."""
    if not isinstance(unit, str):
        raise TypeError(f"{kind} unit must be a string such as {next(iter(table))!r}, got {unit!r}")
    name = unit.strip()
    if name in table:
        return name
    if name[:3] == "MeV" or name == "mPa":  # lower-casing would read mega as milli, or milli as mega
        raise ValueError(f"unknown {kind} unit {unit!r}; did you mean {name.swapcase()[0] + name[1:]!r}?")
    plain = name.lower().replace(" ", "")
    spellings = {known.lower(): known for known in table}
    spellings |= {s.replace(" ", ""): known for s, known in _SPELLINGS.items() if known in table}
    if plain in spellings:
        return spellings[plain]
    near = closest(plain, spellings)
    hint = f"; did you mean {spellings[near]!r}?" if near else "."
    raise ValueError(f"unknown {kind} unit {unit!r}{hint} Known: {', '.join(table)}")


_TABLES = {"energy": ENERGY_UNITS, "length": LENGTH_UNITS, "dipole": DIPOLE_UNITS, "stress": STRESS_UNITS}


def _kind(unit: str) -> str | None:
    """What ``unit`` measures, a key of ``_TABLES``; None for an unknown word."""
    for kind, table in _TABLES.items():
        try:
            _canonical(unit, table, kind)
        except ValueError:
            continue
        return kind
    return None


def energy_factor(unit: str) -> float:
    """How many eV one ``unit`` of energy is.

    >>> round(energy_factor("kcal/mol"), 7)
    0.0433641
    """
    return ENERGY_UNITS[_canonical(unit, ENERGY_UNITS, "energy")]


def length_factor(unit: str) -> float:
    """How many angstrom one ``unit`` of length is."""
    return LENGTH_UNITS[_canonical(unit, LENGTH_UNITS, "length")]


def dipole_factor(unit: str) -> float:
    """How many e*angstrom one ``unit`` of dipole moment is."""
    return DIPOLE_UNITS[_canonical(unit, DIPOLE_UNITS, "dipole")]


def polarizability_factor(unit: str) -> float:
    """How many angstrom^3 one ``unit`` of polarizability is, as a volume.

    >>> round(polarizability_factor("a0^3"), 7)
    0.1481847
    """
    return POLARIZABILITY_UNITS[_canonical(unit, POLARIZABILITY_UNITS, "polarizability")]


@dataclass(frozen=True)
class Units:
    """The units of a file; its factors multiply a value of the file to give the internal unit.

    ============================  =========================
    property                      gives
    ============================  =========================
    ``energy_factor``             eV
    ``length_factor``             angstrom
    ``forces_factor``             eV/angstrom
    ``stress_factor``             eV/angstrom^3
    ``dipole_factor``             e*angstrom
    ============================  =========================

    Signs are not converted: a stress must have ASE's (positive when the system pulls inwards), which is minus a
    pressure and minus the stress that VASP writes in kB; a virial is minus the stress times the volume, and has the
    unit of the energy.

    Args:
        energy: a unit of energy: eV, meV, kcal/mol, kJ/mol, Ha, mHa, Ry, cm^-1 or a common spelling of one.
        length: a unit of length: angstrom, bohr, nm, pm. Forces are in energy/length.
        dipole: a unit of dipole: e*angstrom, debye, e*bohr.
        stress: a unit of stress: eV/angstrom^3, GPa, kbar, bar, MPa, Pa, Ha/bohr^3; None: energy/length^3.

    Raises:
        ValueError: unknown unit; the message names the nearest known one.

    Example:
        >>> Units("Hartree", "Bohr").forces_factor.__round__(4)
        51.4221
    """

    energy: str = "eV"
    length: str = "angstrom"
    dipole: str = "e*angstrom"
    stress: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "energy", _canonical(self.energy, ENERGY_UNITS, "energy"))
        object.__setattr__(self, "length", _canonical(self.length, LENGTH_UNITS, "length"))
        object.__setattr__(self, "dipole", _canonical(self.dipole, DIPOLE_UNITS, "dipole"))
        if self.stress is not None:
            object.__setattr__(self, "stress", _canonical(self.stress, STRESS_UNITS, "stress"))

    @classmethod
    def parse(cls, units: Units | str | Mapping[str, str]) -> Units:
        """Units from ``"kcal/mol"``, ``"eV, angstrom, GPa"``, a mapping, or units themselves.

        A string holds units of energy, length, dipole and stress, separated by commas, in any order; what is left
        out keeps its default.
        """
        if isinstance(units, Units):
            return units
        if isinstance(units, str):
            parts = [part.strip() for part in units.split(",")]
            if len(parts) > len(_TABLES) or not all(parts):
                raise ValueError(f"units must read 'energy[, length[, dipole[, stress]]]', got {units!r}")
            named: dict[str, str] = {}
            for part, place in zip(parts, _TABLES, strict=False):
                kind = _kind(part) or place  # an unknown word is refused as what should stand at its place
                if kind in named:
                    raise ValueError(f"units must name one unit of {kind}, got {units!r}")
                named[kind] = part
            return cls(**named)
        if isinstance(units, Mapping):
            unknown = set(units) - set(_TABLES)
            if unknown:
                raise ValueError(f"units knows energy, length, dipole and stress, got {sorted(unknown)}")
            return cls(**units)
        raise TypeError(f"units must be a Units, a string or a mapping, got {units!r}")

    @property
    def energy_factor(self) -> float:
        return ENERGY_UNITS[self.energy]

    @property
    def length_factor(self) -> float:
        return LENGTH_UNITS[self.length]

    @property
    def forces_factor(self) -> float:
        return self.energy_factor / self.length_factor

    @property
    def stress_factor(self) -> float:
        return self.energy_factor / self.length_factor**3 if self.stress is None else STRESS_UNITS[self.stress]

    @property
    def dipole_factor(self) -> float:
        return DIPOLE_UNITS[self.dipole]

    def factor(self, key: str) -> float:
        """Of a label, or of ``pos`` and ``cell``; 1 for what has no unit."""
        return getattr(self, f"{'length' if key in ('pos', 'cell') else key}_factor", 1.0)
