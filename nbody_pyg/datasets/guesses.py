"""What ASE fills in where a file does not say it: elements, energies and whole atoms."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

_DUMPS = ("lammps-dump-text", "lammps-dump-binary")
# Names of atoms that begin with them are this element in every residue.
_TWO_LETTERS = ("BR", "CL", "CU", "FE", "LI", "MG", "SI", "ZN")


class GuessedError(ValueError):
    """A file does not say what a structure needs, and ASE would guess it."""


class _NoElements:
    """In the place of the elements of the types of a LAMMPS dump: asked only where the file does not name them."""

    def __getitem__(self, place: int) -> NoReturn:
        raise GuessedError(
            "has atom types but no elements; write it with the column 'element' and 'dump_modify ... element Si O', or "
            "convert it: ase.io.read(file, ':', specorder=['Si', 'O']), then ase.io.write to a file .xyz"
        )


def reader_options(file_format: str) -> Mapping[str, Any]:
    """Arguments for ASE's reader of a format, with which it does not take types as atomic numbers."""
    return {"specorder": _NoElements()} if file_format in _DUMPS else {}


def without_guesses(systems: Iterable[Atoms], path: Path, file_format: str) -> Iterator[Atoms]:
    """The systems of a file, without energies that ASE invents.

    Raises: GuessedError: the file does not name the elements, or which atoms are there.
    """
    for number, atoms in enumerate(systems):
        if number == 0:
            _check_names(atoms, path, file_format)
            _check_types(atoms, path, file_format)
        if file_format in _DUMPS and atoms.calc is not None:
            atoms.calc.results.pop("energy", None)  # 0 in every frame
        if (part := _partial(atoms)) is not None:
            raise GuessedError(
                f"has partly occupied sites ({part}), so it does not say which atoms are there; give an ordered "
                "structure, with every site full or removed, for example a supercell, and no occupancy beside it"
            )
        yield atoms


def _partial(atoms: Atoms) -> str | None:
    """A site of a crystal, or an atom, that is not always there: its occupancy in words."""
    sites = atoms.info.get("occupancy")
    for site in sites.values() if isinstance(sites, Mapping) else ():
        if isinstance(site, Mapping) and any(abs(share - 1) > 1e-3 for share in site.values()):
            return ", ".join(f"{name} {share:g}" for name, share in site.items())
    for key in ("occupancy", "occupancies"):
        # Programs write 0 for atoms that they have built
        shares = np.asarray(atoms.arrays.get(key, 1.0), dtype=float)
        if (odd := np.flatnonzero((shares > 1e-3) & (shares < 1 - 1e-3))).size:
            return f"{atoms.symbols[odd[0]]} {shares[odd[0]]:g}"
    return None


def _check_types(atoms: Atoms, path: Path, file_format: str) -> None:
    """Raise where ASE takes the types of a file as atomic numbers."""
    if file_format == "lammps-data" and "masses" not in atoms.arrays:
        if np.array_equal(atoms.numbers, atoms.arrays["type"]):
            raise GuessedError("has atom types but no elements; add its section Masses, with real masses")
    elif file_format in _DUMPS and "type" in atoms.arrays:
        if len(np.unique(atoms.arrays["type"])) > 1 and set(atoms.symbols) == {"C"}:
            raise GuessedError(
                "names carbon for all of its types, as LAMMPS does where it is not told the elements; write it with "
                "'dump_modify ... element Si O', or give types of one element one number"
            )
    elif file_format == "netcdftrajectory":
        from ase.io.netcdftrajectory import NetCDFTrajectory

        with NetCDFTrajectory(str(path)) as trajectory:
            len(trajectory)  # opens it
            if "Z" not in trajectory.nc.variables and getattr(trajectory.nc, "program", "") != "ASE":
                raise GuessedError("names no elements; convert it to extended xyz, with the elements of its topology")


def _check_names(atoms: Atoms, path: Path, file_format: str) -> None:
    """Raise unless the names of atoms, where they are all that a file has, stand for the elements that ASE takes."""
    for name, residue, symbol in _named_atoms(atoms, path, file_format):
        if _is_doubtful(name, residue, symbol):
            raise GuessedError(
                f"names no elements, and ASE would take the atom {name} of {residue} for {symbol}; give the elements: "
                "columns 77 and 78 of PDB, or extended xyz"
            )


def _named_atoms(atoms: Atoms, path: Path, file_format: str) -> Iterable[tuple[str, str, str]]:
    """Name, residue and element of the atoms whose element ASE takes from their name."""
    if file_format == "gromacs":
        yield from zip(atoms.arrays["atomtypes"], atoms.arrays["residuenames"], atoms.symbols, strict=True)
    elif file_format == "gromos":
        inside, symbols = False, iter(atoms.symbols)
        for words in map(str.split, _lines(path)):
            inside = words[:1] == ["POSITION"] or (inside and words[:1] != ["END"])
            if inside and len(words) >= 7:
                yield words[2], words[1], next(symbols)
    elif file_format == "proteindatabank":
        for line in _lines(path):
            if line.startswith(("ATOM  ", "HETATM")) and line[76:78].strip().capitalize() not in atomic_numbers:
                name = line[12:16].strip()
                pair = name[:2].capitalize()
                yield name, line[17:21].strip(), pair if pair in atomic_numbers else name[:1]


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", errors="replace") if path.suffix == ".gz" else path.open(errors="replace") as file:
        yield from file


def _is_doubtful(name: str, residue: str, symbol: str) -> bool:
    """Whether a name may be another element: CA is carbon in a protein, CL and a lone NA never C and N."""
    if len(symbol) == 2 and name.startswith(symbol):
        return False  # in the case of an element: Cl1
    letters, taken = _letters(name), symbol.upper()
    if letters == _letters(residue) or letters[:2] in _TWO_LETTERS:
        return taken != (letters if letters == _letters(residue) else letters[:2])
    return not letters.startswith(taken) or (len(taken) == 2 and taken[0] in atomic_numbers)


def _letters(word: str) -> str:
    return re.sub("[^A-Z].*", "", word.upper())
