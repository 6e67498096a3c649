"""Energies of latent charges beyond the cutoffs: all pairs, a fast multipole method, or an Ewald sum."""

from nbody_pyg.longrange.charges import LatentCharges, LongRangeConfig, charge_shares
from nbody_pyg.longrange.coulomb import LongRange

__all__ = ["LatentCharges", "LongRange", "LongRangeConfig", "charge_shares"]
