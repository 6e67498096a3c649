"""The generated program, compiled and called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nbody_pyg.kernels import build
from nbody_pyg.kernels.threads import num_threads
from nbody_pyg.native.program import Program
from nbody_pyg.native.support import REALS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Edges(NamedTuple):
    """Edges of one shell.

    ============  ===================  ==========================================================
    field         shape, unit          meaning
    ============  ===================  ==========================================================
    ``receiver``  [edges]              atom whose neighbourhood it is
    ``source``    [edges]              its neighbour
    ``vector``    [edges, 3] angstrom  position of the source minus that of the receiver
    ============  ===================  ==========================================================
    """

    receiver: Integers
    source: Integers
    vector: Floats


class Result(NamedTuple):
    """What the program computes.

    ============  ===================  ==============================================================
    field         shape, unit          meaning
    ============  ===================  ==============================================================
    ``energies``  [num_local] eV       of each atom, with that of the isolated atom
    ``forces``    [num_atoms, 3] eV/A  or None, if they were not asked for
    ``virial``    [3, 3] eV            derivative of the energy by strain; stress times volume
    ============  ===================  ==============================================================
    """

    energies: Floats
    forces: Floats | None
    virial: Floats


class _CEdges(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("receiver", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("vector", ctypes.c_void_p),
    )


class CompiledModel:
    """A program in memory: compiled (or taken from the cache of compiled code), with its numbers.

    Not for two threads at once; the computation itself uses the threads of torch, with the same bits for any number.

    Args:
        program: source and numbers.
        dtype: of the arithmetic.
    Raises: RuntimeError: it cannot be compiled or loaded; out of memory.
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self._library: Any = build.load(f"#define NBODY_REAL {REALS[dtype]}\n{program.source}", "-O2")
        library, pointer = self._library, ctypes.c_void_p
        library.nbody_create.argtypes, library.nbody_create.restype = [ctypes.c_int64, pointer], pointer
        library.nbody_free.argtypes, library.nbody_free.restype = [pointer], None
        library.nbody_error.restype = ctypes.c_char_p
        library.nbody_set_threads.argtypes = [pointer, ctypes.c_int]
        library.nbody_memory.argtypes, library.nbody_memory.restype = [pointer], ctypes.c_int64
        counts = [ctypes.c_int64, ctypes.c_int64]
        library.nbody_compute.argtypes = [pointer, *counts, *[pointer] * 5]
        library.nbody_compute_whole.argtypes = [pointer, ctypes.c_int64, *[pointer] * 6]
        library.nbody_vectors.argtypes, library.nbody_vectors.restype = [ctypes.c_int64, *[pointer] * 6], None
        numbers = np.ascontiguousarray(program.numbers.numpy())
        self._shells = len(program.radii)
        self._model = library.nbody_create(len(numbers), numbers.ctypes.data)
        if not self._model:
            raise RuntimeError(f"the native model could not be made: {self._problem()}")

    def compute(
        self,
        z: Integers,
        edges: Sequence[Edges],
        num_local: int | None = None,
        forces: bool = True,
        positions: Floats | None = None,
    ) -> Result:
        """Energies, forces and virial of atoms whose edges are given.

        Args:
            z: [num_atoms] atomic numbers.
            edges: those of each shell; they may be longer than its radius.
            num_local: atoms from this number on are ghosts; None: there are none.
            forces: compute forces and virial.
            positions: [num_atoms, 3] of a whole open system, for latent charges; other programs do not read them.
        Raises: ValueError: edges of another number of shells, an unknown element, an edge to no atom, a NaN; arrays of
            other shapes; with latent charges: no positions, ghosts, or edges to periodic images.
        """
        if len(edges) != self._shells:
            raise ValueError(f"edges must hold those of each of the {self._shells} shells, got {len(edges)}")
        num_atoms = len(z)
        local = num_atoms if num_local is None else num_local
        z = np.ascontiguousarray(z, dtype=np.int64)
        kept = [self._checked(shell) for shell in edges]
        array = (_CEdges * len(kept))(
            *[_CEdges(len(s.source), s.receiver.ctypes.data, s.source.ctypes.data, s.vector.ctypes.data) for s in kept]
        )
        energies, virial = np.zeros(max(local, 0)), np.zeros((3, 3))
        found = np.empty((num_atoms, 3)) if forces else None
        given = ctypes.addressof(array), energies.ctypes.data, None if found is None else found.ctypes.data
        status = self._library.nbody_set_threads(self._model, num_threads())
        if positions is None or local != num_atoms:
            status = status or self._library.nbody_compute(
                self._model, num_atoms, local, z.ctypes.data, *given, virial.ctypes.data
            )
        else:
            where = self._checked_positions(positions, num_atoms)
            status = status or self._library.nbody_compute_whole(
                self._model, num_atoms, z.ctypes.data, where.ctypes.data, *given, virial.ctypes.data
            )
        if status:
            raise ValueError(f"the native evaluator refuses its input: {self._problem()}")
        return Result(energies, found, virial)

    def vectors(
        self, receiver: Integers, source: Integers, positions: Floats, shift: Floats | None, cell: Floats | None
    ) -> Floats:
        """Vectors [edges, 3] of edges between these positions, with lattice shifts of the rows of a cell."""
        vector = np.empty((len(source), 3))
        self._library.nbody_vectors(
            len(source), receiver.ctypes.data, source.ctypes.data, positions.ctypes.data,
            None if shift is None else shift.ctypes.data, None if cell is None else cell.ctypes.data,
            vector.ctypes.data,
        )  # fmt: skip
        return vector

    @property
    def memory(self) -> int:
        """Bytes that the program holds; they grow with the number of edges of the largest structure."""
        held: int = self._library.nbody_memory(self._model)
        return held

    def _checked(self, edges: Edges) -> Edges:
        receiver, source = (np.ascontiguousarray(x, dtype=np.int64) for x in edges[:2])
        vector = np.ascontiguousarray(edges.vector, dtype=np.float64)
        if receiver.shape != source.shape or receiver.ndim != 1 or vector.shape != (len(source), 3):
            raise ValueError(
                f"edges must have receivers and sources [edges] and vectors [edges, 3], got {receiver.shape}, "
                f"{source.shape} and {vector.shape}"
            )
        return Edges(receiver, source, vector)

    def _checked_positions(self, positions: Floats, num_atoms: int) -> Floats:
        positions = np.ascontiguousarray(positions, dtype=np.float64)
        if positions.shape != (num_atoms, 3):
            raise ValueError(f"positions must have shape ({num_atoms}, 3), got {positions.shape}")
        return positions

    def _problem(self) -> str:
        text: bytes = self._library.nbody_error()
        return text.decode()

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.nbody_free(self._model)
            self._model = None
