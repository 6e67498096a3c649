"""export_c: a potential as C source, header, weights, Makefile and example, for programs without Python."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from string import Template

import numpy as np
import torch

from nbody_pyg.atomic_write import atomic_write, write_text
from nbody_pyg.native.program import Program, c_text, write_program
from nbody_pyg.potential import Potential
from nbody_pyg.required import required

#: Names of the files of an export.
FILES = ("nbody_model.c", "nbody_model.h", "nbody_model.weights", "example.c", "Makefile")
_MAGIC = b"NBODYW1\0"
#: Positions of the example, angstrom: no symmetry, distances of bonds.
_EXAMPLE = ((0.0, 0.0, 0.0), (1.1, 0.1, -0.2), (-0.4, 1.2, 0.3), (0.2, -0.5, 1.3), (-0.9, -0.8, -0.7))


def export_c(potential: Potential, folder: str | Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write a potential as C source (``nbody_model.c``), header, weights, Makefile and an example into a folder.

    Args:
        potential: one that the native evaluator can compute, see :func:`~nbody_pyg.native.why_not`.
        folder: made if it does not exist; files of an earlier export are replaced.
        dtype: of the arithmetic; by default that of the weights. ``-DNBODY_REAL=double`` changes it when compiling.

    Returns: the paths of the files.
    Raises: ValueError: a potential that it cannot compute. OSError: the folder cannot be written.
    """
    program = write_program(potential, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in FILES]
    write_text(paths[0], program.source)
    write_text(paths[1], c_text("nbody_model.h"))
    with atomic_write(paths[2]) as temporary:
        temporary.write_bytes(weight_bytes(program))
    write_text(paths[3], _example(potential, program))
    write_text(paths[4], c_text("Makefile"))
    return paths


def example_atoms(potential: Potential) -> tuple[list[int], list[tuple[float, float, float]]]:
    """Atomic numbers and positions (angstrom) of the example."""
    cycle = itertools.cycle(required(potential.species))
    return [next(cycle) for _ in _EXAMPLE], list(_EXAMPLE)


def weight_bytes(program: Program) -> bytes:
    """The file of weights: a mark, the fingerprint of the program, count, checksum, numbers (float64)."""
    values = np.ascontiguousarray(program.numbers.numpy(), dtype="<f8").tobytes()
    return _MAGIC + program.fingerprint.encode() + struct.pack("<qQ", len(values) // 8, _checksum(values)) + values


def _checksum(values: bytes) -> int:
    """FNV-1a over words of eight bytes."""
    total = 14695981039346656037
    for (word,) in struct.iter_unpack("<Q", values):
        total = (total ^ word) * 1099511628211 & 0xFFFFFFFFFFFFFFFF
    return total


def _example(potential: Potential, program: Program) -> str:
    numbers, positions = example_atoms(potential)
    return Template(c_text("example.c")).substitute(
        count=len(numbers),
        numbers=", ".join(map(str, numbers)),
        positions=", ".join(f"{x!r}" for row in positions for x in row),
        shells=len(program.radii),
    )
