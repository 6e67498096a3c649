"""Latent charges as the native program has them: sizes and numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from nbody_pyg.longrange.coulomb import LongRange
from nbody_pyg.required import required
from nbody_pyg.units import COULOMB


def charge_sizes(layer: LongRange) -> dict[str, int]:
    """Constants of the program.

    =============  ==================================================================
    ``CHARGES``    channels
    ``FUNCTIONS``  radial functions of the transfers, 0 without them
    ``SCALARS``    of the states of an atom
    ``FEATURES``   numbers that each atom has: own, chi, eta and, for transfers, u, v
    =============  ==================================================================
    """
    channels, functions = layer.config.channels, layer.charges.num_basis
    return {
        "CHARGES": channels,
        "FUNCTIONS": functions,
        "SCALARS": required(layer.charges.irreps)[0].mul,
        "FEATURES": (3 + (functions + 1 if functions else 0)) * channels,
    }


def charge_numbers(layer: LongRange) -> list[Tensor]:
    """1 / 2 width, strengths (eV angstrom), features of each element, and their weights [SCALARS, FEATURES]."""
    sizes, charges = charge_sizes(layer), layer.charges
    parts = [
        (charges.own, charges.own_states, sizes["CHARGES"]),
        (layer.local, layer.local_states, 2 * sizes["CHARGES"]),
    ]
    if charges.num_basis:
        parts.append((charges.offset, charges.scalars, (charges.num_basis + 1) * sizes["CHARGES"]))
    zeros = layer.local.new_zeros
    constants = [zeros(len(layer.local), size) if found is None else found for found, _, size in parts]
    weights = [zeros(size, sizes["SCALARS"]) if linear is None else linear.weight for _, linear, size in parts]
    beta = torch.tensor([0.5 / layer.config.width], dtype=torch.float64)
    found = [beta, COULOMB * layer.factors.double().cpu(), torch.cat(constants, dim=1), torch.cat(weights).t()]
    return [numbers.flatten() for numbers in found]
