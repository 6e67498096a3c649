"""``Potential.evaluate`` as a compiled program or a CUDA graph."""

from nbody_pyg.runtime.compiled import CompiledPotential, compile_potential
from nbody_pyg.runtime.cuda_graphs import CapturedPotential, CapturedStep

__all__ = ["CapturedPotential", "CapturedStep", "CompiledPotential", "compile_potential"]
