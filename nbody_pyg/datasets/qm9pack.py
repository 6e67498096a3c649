"""The text files of the package qm9pack, as arrays."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers

from nbody_pyg.messages import nearest

#: Columns of the polarizability tensor, row by row.
TENSOR = ("A_xx", "A_xy", "A_xz", "A_xy", "A_yy", "A_yz", "A_xz", "A_yz", "A_zz")


def read_qm9pack(columns: Iterable[str]) -> dict[str, np.ndarray]:
    """Columns of the package as arrays, and the molecules: n atoms each, Z and R (angstrom) one after the other.

    Only its text files are read; its code, which needs pandas, is not imported.

    Args:
        columns: names of the package, in its units; one value for a molecule, or for an atom (Mulliken_pop).

    Raises:
        ImportError: the package is not installed.
        ValueError: a column that is missing, damaged files.
    """
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("QM9 without a folder needs the package qm9pack: pip install 'nbody_pyg[qm9]'")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    wanted = ["XYZ_file", "Elements", "XYZ_Ang", *sorted(set(columns) - set(TENSOR))]
    found: dict[str, list[str]] = {key: [] for key in wanted}
    for part in (1, 2, 3):
        _read_columns(folder / f"qm9_part{part}.csv", found)
    words = [text.strip("[]").replace("'", "").split(",") for text in found["Elements"]]
    species = np.array([atomic_numbers.get(word, 0) for names in words for word in names])
    out = {"n": np.array([len(names) for names in words]), "Z": species}
    out["R"] = _numbers(found["XYZ_Ang"], 3 * out["n"], "XYZ_Ang").reshape(-1, 3)
    for key in wanted[3:]:
        out[key] = _numbers(found[key], out["n"] if key == "Mulliken_pop" else np.ones_like(out["n"]), key)
    if not set(TENSOR).isdisjoint(columns):
        tensor: dict[str, list[str]] = {key: [] for key in ("XYZ_file", *TENSOR)}
        _read_columns(folder / "qm9_polarizability.csv", tensor)
        if tensor["XYZ_file"] != found["XYZ_file"]:
            raise ValueError(f"{folder}: qm9_polarizability.csv holds other molecules than the parts; install it again")
        out |= {key: _numbers(tensor[key], np.ones_like(out["n"]), key) for key in set(TENSOR)}
    return out


def _read_columns(path: Path, into: Mapping[str, list[str]]) -> None:
    """Append the texts of the named columns of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        head = next(lines, [])
        for key in into:
            if key not in head:
                raise ValueError(f"{path.name} of qm9pack has no column {key!r}; {nearest(key, head)}")
        places = [(head.index(key), values) for key, values in into.items()]
        for number, line in enumerate(lines, 2):
            if len(line) != len(head):
                raise ValueError(f"line {number} of {path} must have {len(head)} columns, got {len(line)}; "
                                 "install the package again")  # fmt: skip
            for place, values in places:
                values.append(line[place])


def _numbers(texts: Sequence[str], sizes: np.ndarray, key: str) -> np.ndarray:
    """All numbers of a column of numbers or bracketed lists, one after the other; ``sizes`` of each row."""
    brackets = str.maketrans("", "", "[]")
    words = [text.translate(brackets).split(",") for text in texts]
    found = np.array([len(word) for word in words])
    if len(bad := np.flatnonzero(found != sizes)):
        raise ValueError(
            f"row {bad[0]} of qm9pack must have {sizes[bad[0]]} numbers in {key}, got {found[bad[0]]}; install it again"
        )
    try:
        return np.array([one for word in words for one in word], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"column {key} of qm9pack must hold numbers ({error}); install it again") from None
