"""Fast products, generated from the coupling tables; plain torch is the reference.

============  ==================================  ======================================================
backend       runs on                             implementation
============  ==================================  ======================================================
``c``         CPU tensors, with a C compiler      :mod:`nbody_pyg.kernels.codegen`, called through ctypes
``triton``    CUDA tensors, with Triton           :mod:`nbody_pyg.kernels.gpu`
``torch``     everything, any order of            the fallback inside each gate
              derivative
============  ==================================  ======================================================

:mod:`nbody_pyg.kernels.backend` chooses a backend for each tensor. The first two have two hand-written derivatives and
raise at a third. Code is generated from the same terms at the first use and cached in one folder.
"""

from nbody_pyg.kernels.backend import available_backends, backend, set_backend, use_backend

__all__ = ["available_backends", "backend", "set_backend", "use_backend"]
