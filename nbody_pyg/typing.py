"""The vocabulary of shapes: one name for each axis, and aliases for the tensors that recur.

Axes are written in jaxtyping's notation; a name that stands twice in one signature must have one size.

==============  =========================================================================
axis            meaning
==============  =========================================================================
``atoms``       all atoms of a batch
``graphs``      systems of a batch (molecules or cells)
``parts``       parts of one level of the hierarchy
``edges``       directed pairs of neighbours; row 0 is the source, row 1 the target
``dim``         components of a state: the dimension of its irreps
==============  =========================================================================

A leading space, ``" atoms"``, marks a shape of a single axis: it keeps linters from reading the
name as a reference. Shapes are checked only where jaxtyping's import hook is on, as in the tests.

>>> import torch
>>> isinstance(torch.zeros(5, 3), Positions), isinstance(torch.zeros(5, 2), Positions)
(True, False)
>>> isinstance(torch.zeros(2, 7, dtype=torch.int64), EdgeIndex)
True
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "AtomicNumbers",
    "BatchIndex",
    "Cells",
    "EdgeIndex",
    "EdgeShifts",
    "EdgeVectors",
    "Energies",
    "Forces",
    "Periodicity",
    "Positions",
    "States",
    "Stresses",
]

AtomicNumbers = Int[Tensor, " atoms"]
"""Atomic numbers."""

Positions = Float[Tensor, "atoms 3"]
"""Cartesian positions, angstrom."""

Forces = Float[Tensor, "atoms 3"]
"""Forces, eV/angstrom."""

BatchIndex = Int[Tensor, " atoms"]
"""The system of each atom."""

Energies = Float[Tensor, " graphs"]
"""One energy for each system, eV."""

Cells = Float[Tensor, "graphs 3 3"]
"""Lattice vectors as rows, angstrom."""

Periodicity = Bool[Tensor, "graphs 3"]
"""Which lattice vectors repeat."""

Stresses = Float[Tensor, "graphs 3 3"]
"""Derivative of the energy by the strain over the volume, eV/angstrom^3."""

EdgeIndex = Int[Tensor, "2 edges"]
"""Row 0 the source (child), row 1 the target (parent, receiver)."""

EdgeVectors = Float[Tensor, "edges 3"]
"""Position of the source minus that of the target, angstrom."""

EdgeShifts = Float[Tensor, "edges 3"]
"""Whole lattice vectors added to the position of the source."""

States = Float[Tensor, "parts dim"]
"""States of the parts of a level: direct sums of irreps."""
