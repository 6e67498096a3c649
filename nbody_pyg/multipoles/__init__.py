"""Multipole algebra in e3nn's conventions: solid harmonics, translations, a fast multipole method."""

from nbody_pyg.multipoles.damping import gaussian_factors
from nbody_pyg.multipoles.fast_multipole import FastMultipole, all_pairs, direct_potential
from nbody_pyg.multipoles.harmonics import irregular_harmonics, regular_harmonics
from nbody_pyg.multipoles.translations import l2l, l2p, m2l, m2m, p2m

__all__ = [
    "FastMultipole",
    "all_pairs",
    "direct_potential",
    "gaussian_factors",
    "irregular_harmonics",
    "l2l",
    "l2p",
    "m2l",
    "m2m",
    "p2m",
    "regular_harmonics",
]
