"""Potentials of latent charges in periodic systems by Ewald sums, with torch-pme for the reciprocal part."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nbody_pyg.geometry import edge_vectors, neighbour_list
from nbody_pyg.hierarchy import Hierarchy
from nbody_pyg.multipoles import gaussian_factors

#: Width of the Gaussian (angstrom), and cutoffs of the sums in real and reciprocal space in units of it.
_SPLIT, _REACH = 1.0, 6.0


class EwaldField(nn.Module):
    r"""Potential of all other charges and all images in a periodic cell.

    .. math:: \phi_i = \sum_{j, n}{}' \frac{q_j}{r_{ijn}} \Big(\operatorname{erf} \frac{r_{ijn}}{2 w}
              - \operatorname{erf} \frac{r_{ijn}}{\sqrt2 \sigma}\Big)
              + \frac{4\pi}{V} \sum_{k \ne 0} \frac{e^{-\sigma^2 k^2 / 2}}{k^2} S(k)\, e^{i k r_i}
              - \sqrt{\tfrac{2}{\pi}}\, \frac{q_i}{\sigma}

    The charges are smeared as in an open system, with width :math:`w`; torch-pme computes the second sum. Both sums end
    where their terms are 1e-8 of the first. Further approximations: a net charge is compensated by a uniform
    background; the surrounding medium conducts (no surface term); and the list of wave vectors changes with the cell,
    by steps of that size. Only for fully periodic systems and charges without dipoles.

    Args:
        width: smearing of the charges, angstrom, below 0.7.

    Shapes: (atoms, 1, channels) -> the same. Cost: O(N V) for each graph. Smoothness: C-infinity up to the truncation.
    Raises: ImportError: torch-pme is not installed. ValueError: ``width`` too large for the real sum; in forward: a
        graph that is not periodic in all directions.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        if not 0 < width < _SPLIT / math.sqrt(2.0):
            raise ValueError(f"width must be below {_SPLIT / math.sqrt(2.0):.3f} angstrom for 'ewald', got {width!r}")
        try:
            import torchpme
        except ImportError as error:
            raise ImportError("long_range method 'ewald' needs torch-pme: pip install 'nbody_pyg[periodic]'") from error
        self.width = width
        potential = torchpme.CoulombPotential(smearing=_SPLIT)
        # It takes as many points as wavelengths fit in the cell, half of them for negative k: hence pi, not 2 pi
        self.reciprocal = torchpme.EwaldCalculator(potential, math.pi * _SPLIT / _REACH)

    def forward(
        self,
        moments: Float[Tensor, "atoms rows channels"],
        hierarchy: Hierarchy,
    ) -> Float[Tensor, "atoms rows channels"]:
        cell, pbc = hierarchy.system.cell, hierarchy.system.pbc
        if cell is None or pbc is None or not bool(pbc.all()):
            raise ValueError("long_range method 'ewald' needs a cell and pbc in all directions; use 'direct' if open")
        pos, batch, charges = hierarchy[0].pos, hierarchy[0].batch, moments[:, 0]
        if pos.shape[0] == 0:
            return torch.zeros_like(moments)
        pos, cell = pos.double(), cell.double()
        index, shift = neighbour_list(pos.detach(), _REACH * _SPLIT, batch, cell.detach(), pbc)
        vec = edge_vectors(pos, index, shift, cell, batch).to(charges.dtype)
        square = vec.square().sum(1)
        near = gaussian_factors(square, 0, self.width) - gaussian_factors(square, 0, _SPLIT / math.sqrt(2.0))
        field = torch.zeros_like(charges).index_add(0, index[1], near * charges.index_select(0, index[0]))
        pos = _inside(pos, batch, cell).to(charges.dtype)
        cell = cell.to(charges.dtype)
        far = [
            self.reciprocal(charges[part], cell[graph], pos[part], *_no_neighbours(index, pos))
            for graph, part in enumerate(_slices(batch, hierarchy.num_graphs))
            if part.start < part.stop  # torch-pme does not accept a graph without atoms
        ]
        # torch-pme counts each pair half at both of its ends
        return (field + 2.0 * torch.cat(far)).unsqueeze(1)

    def extra_repr(self) -> str:
        return f"width={self.width}"


def _slices(batch: Tensor, num_graphs: int) -> list[slice]:
    stops = torch.bincount(batch, minlength=num_graphs).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True)]


def _inside(pos: Tensor, batch: Tensor, cell: Tensor) -> Tensor:
    """Positions relative to the first atom of each graph, wrapped into the cell, to keep the precision of phases."""
    first = torch.searchsorted(batch, batch)
    pos, own = pos - pos[first], cell[batch]
    fraction = torch.linalg.solve(own.detach().mT, pos.detach().unsqueeze(-1)).squeeze(-1)
    return pos - torch.bmm(torch.floor(fraction).unsqueeze(1), own).squeeze(1)


def _no_neighbours(index: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """The real-space sum is computed here with smooth factors; torch-pme gets no pairs."""
    return index.new_zeros(0, 2), pos.new_zeros(0)
