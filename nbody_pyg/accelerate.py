"""Old name of :mod:`nbody_pyg.runtime.compiled`."""

from __future__ import annotations

from nbody_pyg.renamed import former_module
from nbody_pyg.runtime import compiled

__getattr__ = former_module(__name__, compiled, ("CompiledPotential", "compile_potential"))
