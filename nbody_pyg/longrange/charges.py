"""Latent charges: shares of the total charge, moved between neighbours; and the settings of long-range energies."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.multipoles.coefficients import check_lmax
from nbody_pyg.nn.edges import EdgeFeatures, sum_into
from nbody_pyg.nn.electronic import spread_total
from nbody_pyg.nn.irreps import Resettable, block_of
from nbody_pyg.required import required

METHODS = ("direct", "hierarchy", "ewald")


@dataclass(frozen=True)
class LongRangeConfig:
    """Settings for ``long_range=`` of :class:`~nbody_pyg.NBodyNet`.

    Args:
        method: "direct" sums over all pairs of atoms (exact, O(N^2), open systems); "hierarchy" is a fast multipole
            method over the parts of the scheme (open systems); "ewald" is for periodic systems, charges only, and
            needs torch-pme.
        channels: number of latent charges of each atom.
        dipoles: each atom has latent dipoles as well.
        elements: each element has a learned charge. The total charge of a system then follows from its composition, not
            from its ``charge``.
        states: each atom has a learned charge that depends on its element and its state, so that a group of atoms has
            its charge wherever it is. Given charges of systems and atoms are not placed on the atoms.
        transfers: atoms exchange charge with their neighbours.
        width: standard deviation of the Gaussian charge distributions, angstrom; it keeps r -> 0 finite.
        lmax: highest degree of the moments of parts, for "hierarchy".
        trained: train factors of the analytic translations, for "hierarchy".
        coulomb: fix the strength of the first channel, which has the given charges, to Coulomb's law: ions of known
            charge then have the exact energy of point charges at large distance. Otherwise it is learned.
    """

    method: str = "direct"
    channels: int = 2
    dipoles: bool = False
    elements: bool = False
    states: bool = False
    transfers: bool = True
    width: float = 0.5
    lmax: int = 4
    trained: bool = False
    coulomb: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}; try 'direct'")
        if isinstance(self.channels, bool) or not isinstance(self.channels, int) or self.channels < 1:
            raise ValueError(f"channels must be a positive integer, got {self.channels!r}; try 2")
        if not (isinstance(self.width, (int, float)) and math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"width must be a positive length in angstrom, got {self.width!r}; try 0.5")
        if self.method == "ewald" and self.dipoles:
            raise ValueError("dipoles must be off with method 'ewald', which knows charges only; use 'direct' if open")
        if self.coulomb and self.own:
            raise ValueError(
                "coulomb must be off with elements or states, whose learned charges are in no unit; choose one"
            )
        check_lmax("lmax", self.lmax)

    @property
    def own(self) -> bool:
        """Whether atoms have learned charges of their own."""
        return self.elements or self.states

    @property
    def takes_charge(self) -> bool:
        """Whether given charges of systems and atoms are placed on the atoms."""
        return not self.states

    @classmethod
    def parse(cls, given: Mapping[str, Any] | str | LongRangeConfig) -> LongRangeConfig:
        """Settings from a dictionary, or from the name of a method.

        Raises: ValueError: an unknown key, or a value out of range.
        """
        if isinstance(given, LongRangeConfig):
            return given
        given = {"method": given} if isinstance(given, str) else dict(given)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"long_range must hold some of {known}, got {unknown}; check the spelling")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The config, ready for JSON."""
        return dataclasses.asdict(self)


class LatentCharges(Resettable):
    r"""Charges (and dipoles) of atoms from their states, with exact conservation.

    .. math:: q_i = Q_i + \sum_j p_{ij}, \qquad
              p_{ij} = -p_{ji} = \sum_b w_{ij} B_b(r_{ij}) (u_{b i} v_j - u_{b j} v_i), \qquad
              \boldsymbol\mu_i = W \psi_i^1

    The transfers p are antisymmetric and vanish with the window w of the edges, so charge is conserved to rounding and
    moves only between neighbours: the charges of a molecule do not depend on a distant one. :math:`Q_i` is the
    initial share of the total charge on the atom. It enters the first channel; the others start neutral. With
    ``elements`` a learned charge of its element is added to every channel, with ``states`` also one that is linear in
    the scalars of the atom. u and v are linear in these scalars, plus a constant of the element.

    ===============  ====================  =====================================================
    symbol           code                  shape, unit
    ===============  ====================  =====================================================
    :math:`\psi`     ``x``                 (atoms, rows, channels_in), or None
    w B              ``edges``             see :class:`~nbody_pyg.nn.edges.EdgeFeatures`, both directions
    Q                ``share``             (atoms,), e
    q, mu            result                (atoms, 1 or 4, channels), e and e angstrom
    ===============  ====================  =====================================================

    Args:
        config: channels, dipoles, elements, states, transfers.
        num_species: number of elements.
        irreps: type of the states of the atoms, or None if they have none.
        num_basis: number of radial functions on the edges, or 0 without edges.

    Equivariance: O(3), permutation. Smoothness: that of the states and windows. Cost: O(edges basis channels).
    Raises: ValueError: dipoles from states without vectors.
    """

    gain: Tensor

    def __init__(
        self, config: LongRangeConfig, num_species: int, irreps: o3.Irreps | None = None, num_basis: int = 0
    ) -> None:
        super().__init__()
        self.config, self.irreps = config, irreps
        channels, self.num_basis = config.channels, num_basis if config.transfers else 0
        width = self.num_basis * channels + channels
        self.scalars = self.dipole = self.offset = self.own = self.own_states = None
        features = 0 if irreps is None else irreps[0].mul
        if self.num_basis:
            self.offset = nn.Parameter(torch.randn(num_species, width) * 0.1)
            if features:
                self.scalars = nn.Linear(features, width, bias=False)
                nn.init.normal_(self.scalars.weight, std=0.1 * features**-0.5)
        if config.dipoles:
            vectors = [] if irreps is None else [n for n, (_, ir) in enumerate(irreps) if (ir.l, ir.p) in ((1, -1),)]
            if not vectors:
                raise ValueError(
                    f"dipoles must come from vectors 1o, got states of type {irreps}; set lmax to 1 or more"
                )
            self._vectors = vectors[0]
            count = required(irreps)[vectors[0]].mul
            self.dipole = nn.Parameter(torch.randn(count, channels) * 0.1 * count**-0.5)
        if config.own:
            # Not zero: an energy that is bilinear in charges has no slope there
            self.own = nn.Parameter(torch.randn(num_species, channels) * 0.3)
        if config.states and features:
            self.own_states = nn.Linear(features, channels, bias=False)
            nn.init.normal_(self.own_states.weight, std=0.1 * features**-0.5)
        gain = torch.zeros(channels)
        gain[0] = 1.0
        self.register_buffer("gain", gain, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "atoms rows channels_in"] | None,
        species: Int[Tensor, " atoms"],
        share: Float[Tensor, " atoms"],
        edges: EdgeFeatures | None = None,
    ) -> Float[Tensor, "atoms rows_out channels"]:
        charges = share.unsqueeze(1) * self.gain
        if self.own is not None:
            charges = charges + self.own.index_select(0, species)
        if self.own_states is not None:
            charges = charges + self.own_states(block_of(required(x), self.irreps, 0)[:, 0])
        if self.num_basis:
            charges = charges + self._transferred(x, species, required(edges))
        if self.dipole is None:
            return charges.unsqueeze(1)
        return torch.cat([charges.unsqueeze(1), block_of(required(x), self.irreps, self._vectors) @ self.dipole], dim=1)

    def _transferred(self, x: Tensor | None, species: Tensor, edges: EdgeFeatures) -> Tensor:
        channels, (source, target) = self.config.channels, edges.index
        features = required(self.offset).index_select(0, species)
        if self.scalars is not None:
            features = features + self.scalars(block_of(required(x), self.irreps, 0)[:, 0])
        u, v = features[:, :-channels].view(-1, self.num_basis, channels), features[:, -channels:]
        # Sum over the basis first: this leaves one number per edge and channel
        radial = edges.radial.unsqueeze(1)
        given = torch.bmm(radial, u.index_select(0, target)).squeeze(1) * v.index_select(0, source)
        taken = torch.bmm(radial, u.index_select(0, source)).squeeze(1) * v.index_select(0, target)
        return sum_into(given - taken, target, species.shape[0])

    def extra_repr(self) -> str:
        return f"{self.irreps} -> {self.config.channels} charges, dipoles={self.config.dipoles}"


@contextlib.contextmanager
def recorded_charges(layer: LatentCharges) -> Iterator[list[Float[Tensor, "atoms channels"]]]:
    """The charges that a layer computes within this block, with their graph of derivatives."""
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, given, moments: found.append(moments[:, 0]))
    try:
        yield found
    finally:
        handle.remove()


def charge_errors(
    charges: Float[Tensor, "atoms channels"],
    batch: Int[Tensor, " atoms"],
    total: Float[Tensor, " graphs"],
    gain: Float[Tensor, " channels"],
) -> Float[Tensor, "graphs channels"]:
    r"""Sums of the charges of each graph less what they should be, e.

    .. math:: \sum_{i \in g} q_i^c - Q_g \delta_{c 0}
    """
    return sum_into(charges, batch, len(total)) - total.to(charges).unsqueeze(1) * gain


def charge_shares(
    batch: Int[Tensor, " atoms"],
    charge: Float[Tensor, " graphs"] | None,
    formal: Float[Tensor, " atoms"] | None,
    like: Tensor,
    weight: Float[Tensor, " atoms"] | None = None,
) -> Float[Tensor, " atoms"]:
    r"""Share of every atom in the total charge, before transfers.

    .. math:: s_i = Q\, w_i \Big/ \sum_j w_j

    ``formal`` charges stay on their atoms, which keeps fragments independent of each other. Without them, ``charge`` is
    distributed over the atoms of its graph by ``weight`` (evenly without it). Without both, all shares are zero.
    """
    if formal is not None:
        return formal.to(like)
    if charge is None:
        return like.new_zeros(batch.shape[0])
    return spread_total(charge.to(like), batch, like.new_ones(batch.shape[0]) if weight is None else weight)
