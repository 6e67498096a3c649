"""Assertions on symmetry, conservation, extensivity and smoothness, for any model of atoms.

Every helper takes a plain function ``energy(z, pos, batch) -> [num_graphs]``, a module with that forward
(PyG's models, :class:`~nbody_pyg.models.NBodyNet`), a :class:`~nbody_pyg.potential.Potential`, or a function
that returns ``{"energy": ..., "forces": ...}``. Modules are copied and tested in float64. By default
geometries are drawn at random: they are never planar, hold several elements, and one of them is dense enough
to reveal a cap on the number of neighbours. A result that does not depend on its input fails too: it would
pass anything. :func:`check_potential` measures all of it on a trained potential, and more.
"""

from __future__ import annotations

from nbody_pyg.testing.check import Check, CheckReport, check_potential
from nbody_pyg.testing.physics import assert_conservative, assert_extensive
from nbody_pyg.testing.separability import assert_separable, assert_size_transfer
from nbody_pyg.testing.smoothness import assert_smooth
from nbody_pyg.testing.symmetry import (
    assert_batch_independent,
    assert_equivariant,
    assert_permutation_invariant,
    assert_translation_invariant,
    rotate_features,
    wigner_matrix,
)
from nbody_pyg.testing.systems import random_molecule

__all__ = [
    "Check",
    "CheckReport",
    "assert_batch_independent",
    "assert_conservative",
    "assert_equivariant",
    "assert_extensive",
    "assert_permutation_invariant",
    "assert_separable",
    "assert_size_transfer",
    "assert_smooth",
    "assert_translation_invariant",
    "check_potential",
    "random_molecule",
    "rotate_features",
    "wigner_matrix",
]
