"""Public path of :mod:`nbody_pyg.runtime.compiled`."""

from nbody_pyg.runtime.compiled import CompiledPotential, compile_potential

__all__ = ["CompiledPotential", "compile_potential"]
