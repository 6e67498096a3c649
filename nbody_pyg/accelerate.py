"""Old name of :mod:`nbody_pyg.compiled`."""

from __future__ import annotations

from nbody_pyg import compiled
from nbody_pyg.renamed import former_module

__getattr__ = former_module(__name__, compiled, ("CompiledPotential", "compile_potential"))
