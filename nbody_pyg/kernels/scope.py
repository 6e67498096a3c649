"""Old name of :mod:`nbody_pyg.kernels.autograd_flags`."""

from __future__ import annotations

from nbody_pyg.kernels import autograd_flags
from nbody_pyg.renamed import former_module

__getattr__ = former_module(__name__, autograd_flags, vars(autograd_flags))
