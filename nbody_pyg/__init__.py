"""Covariant hierarchical N-body networks for atoms, as a PyTorch Geometric library."""

__all__ = ["__version__"]

__version__ = "0.1.0"
