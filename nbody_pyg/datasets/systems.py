"""The systems of a file as ASE reads them: what every command that takes structures begins with."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ase import Atoms

from nbody_pyg.datasets.convergence import converged_steps, mark_unconverged
from nbody_pyg.datasets.guesses import GuessedError, reader_options, without_guesses
from nbody_pyg.units import Units

# Of VASP's files.
_FIXED_NAMES = ("OUTCAR", "vasprun", "XDATCAR", "CONTCAR", "POSCAR")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_systems(
    path: str | Path, index: str | slice | int = ":", file_format: str | None = None
) -> tuple[list[Atoms], Mapping[str, Any]]:
    """The systems of a file, and the metadata that an ASE database has; see :func:`named_units`.

    Args:
        path: any file that ASE reads. ``@`` is a letter of the name like any other.
        index: which frames, in ASE's notation (``"::10"``), as a slice, or one of them by its number.
        file_format: ASE's name of the format, when the suffix does not tell.

    Raises:
        FileNotFoundError: no such file.
        OSError: the system refuses to read it.
        ValueError: ASE cannot read it, it does not name the elements or which atoms are there, or it holds no such
            frame.
    """
    path, chosen = Path(path), as_slice(index)
    systems = list(iter_systems(path, chosen, file_format))
    if not systems and chosen == slice(None):
        raise ValueError(f"path {str(path)!r} holds no frame; give a file with at least one")
    if not systems:
        raise ValueError(f"path {str(path)!r} holds no frame of index {index}; choose another index")
    return systems, read_metadata(path, file_format)


def iter_systems(path: Path, chosen: slice = slice(None), file_format: str | None = None) -> Iterator[Atoms]:
    """The systems of a file one after the other, of formats that allow it without holding all of them.

    Raises: as :func:`read_systems`, where it is read.
    """
    from ase.io import iread  # with all of scipy, which takes half a second and is not needed by most of the package
    from ase.io.formats import filetype

    if not path.exists():
        raise FileNotFoundError(f"path {str(path)!r} does not exist; give the file with the frames")
    try:
        if path.is_file() and path.stat().st_size == 0:
            return
        if _is_database(path, file_format):
            yield from _sliced(_read_database(path), chosen)
            return
        source, known = _without_mark(path, file_format)
        known = known or filetype(source)
        systems = iread(source, index=chosen, format=known, do_not_split_by_at_sign=True, **reader_options(known))
        systems = without_guesses(systems, path, known)
        yield from mark_unconverged(systems, _convergence(path, known, chosen), known)
    except GuessedError as error:
        raise ValueError(f"path {str(path)!r} {error}") from None
    except MemoryError as error:
        raise MemoryError(f"path {str(path)!r} needs more memory than there is, or is damaged") from error
    except Exception as error:  # ASE's parsers raise whatever they meet, OSError without a number too
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if not isinstance(error, AssertionError) or chosen == slice(None):
            raise _unreadable(path, file_format, error) from error
        # ASE refuses a second structure of formats that hold one


def _unreadable(path: Path, file_format: str | None, error: Exception) -> ValueError:
    return ValueError(
        f"path {str(path)!r} could not be read by ASE{f' as {file_format}' if file_format else ''} "
        f"({type(error).__name__}: {error}); check the file, or give its name the ending of its format"
    )


def _convergence(path: Path, file_format: str, chosen: slice) -> list[bool] | None:
    """Whether each of the chosen systems converged; None where the file does not tell."""
    if not path.is_file():
        return None
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        flags = converged_steps(file, file_format)
    return None if flags is None else flags[chosen]


def _sliced(systems: Iterator[Atoms], chosen: slice) -> Iterable[Atoms]:
    bounds = (chosen.start, chosen.stop, chosen.step)
    if any(number is not None and number < 0 for number in bounds):
        return list(systems)[chosen]
    return itertools.islice(systems, *bounds)


def title_of(path: str | Path) -> str:
    """The name of a file in messages, with its folder if its program gives every file this name."""
    path = Path(path)
    return f"{path.resolve().parent.name}/{path.name}" if path.name.startswith(_FIXED_NAMES) else path.name


def as_slice(index: str | slice | int) -> slice:
    """A slice from ASE's notation, or of one frame. Raises: ValueError: no slice."""
    if isinstance(index, slice):
        return index
    if isinstance(index, int):
        return slice(index, index + 1 or None)
    try:
        numbers = [int(part) if part else None for part in index.split(":")]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 3:
        raise ValueError(f"index must be a slice such as ':', '::10' or '100:200', got {index!r}")
    return slice(*numbers)


def _without_mark(path: Path, file_format: str | None) -> tuple[Any, str | None]:
    """The path as it is; of a text that begins with a byte order mark, as Windows writes it, text and format."""
    from ase.io.formats import filetype

    if not path.is_file():
        return str(path), file_format
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        start = file.read(3)
        coding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
        if coding is None:
            return str(path), file_format
        text = (start + file.read()).decode(coding)
    return io.StringIO(text, newline=None), file_format or filetype(str(path).removesuffix(".gz"), read=False)


def _is_database(path: Path, file_format: str | None) -> bool:
    return file_format in ("db", "json") or (file_format is None and path.suffix in (".db", ".json", ".aselmdb"))


def _read_database(path: Path) -> Iterator[Atoms]:
    """Systems of an ASE database, with key-value pairs and data of each row in ``info``."""
    from ase.db import connect

    with connect(path, serial=True) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info |= {**dict(row.data or {}), **row.key_value_pairs}
            yield atoms


def read_metadata(path: Path, file_format: str | None = None) -> Mapping[str, Any]:
    """The metadata of an ASE database; nothing for other files."""
    if not _is_database(path, file_format):
        return {}
    from ase.db import connect

    try:
        with connect(path, serial=True) as database:
            metadata: Mapping[str, Any] = database.metadata
            return metadata
    except Exception as error:  # as for systems
        raise _unreadable(path, file_format, error) from error


def named_units(metadata: Mapping[str, Any], name: str) -> Units:
    """Units as SchNetPack writes them into the metadata of a database; ours where nothing is said.

    Raises: ValueError: an unknown unit, or forces that are not in the units of energy over length.
    """
    named = metadata.get("_property_unit_dict")
    if not isinstance(named, Mapping):
        return Units()
    words = {"length": metadata.get("_distance_unit")} | {key: named.get(key) for key in ("energy", "dipole", "stress")}
    units = Units.parse({key: str(word) for key, word in words.items() if word})
    if named.get("forces"):
        energy, _, length = str(named["forces"]).rpartition("/")
        if Units(energy, length).forces_factor != units.forces_factor:
            raise ValueError(
                f"forces of {name} are in {named['forces']}, which is not {units.energy}/{units.length}; convert "
                "the file to one system of units and give units"
            )
    return units
