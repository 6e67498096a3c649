"""Fast products: C generated from the coupling tables, compiled once, cached; plain torch stays the reference."""

from nbody_pyg.kernels.backend import available_backends, backend, set_backend

__all__ = ["available_backends", "backend", "set_backend"]
