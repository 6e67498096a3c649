"""Energy of latent charges: by a sum over all pairs, through the hierarchy, or by Ewald sums."""

from __future__ import annotations

import torch
from e3nn import o3
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.geometry import safe_norm
from nbody_pyg.hierarchy import Hierarchy, Level, Scheme, SmoothSurvivors
from nbody_pyg.longrange.charges import LatentCharges, LongRangeConfig
from nbody_pyg.longrange.ewald import EwaldField
from nbody_pyg.longrange.translation import Translation, TranslationGate, join_pairs, merge_pairs
from nbody_pyg.multipoles import all_pairs, l2l, m2l, m2m
from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.interaction import SoftNorm
from nbody_pyg.nn.irreps import Resettable, block_of
from nbody_pyg.radial import plateau_window
from nbody_pyg.required import required
from nbody_pyg.system import System
from nbody_pyg.units import COULOMB

#: Factor of the strengths: full optimizer steps are too large for an energy that sums over all pairs.
_SLOW = 0.1
#: Fraction of the pair radius within which the interaction of two parts is left to their children.
_PLATEAU = 0.7


class DirectField(nn.Module):
    r"""Local field of all other atoms by a sum over all pairs: exact.

    .. math:: L_i = \sum_{j \ne i} \mathrm{M2L}(M_j, \mathbf r_j - \mathbf r_i)

    Args:
        lmax: 0 for charges, 1 for charges and dipoles.
        width: smearing of the charges, angstrom.

    Shapes: (atoms, rows, channels) -> the same. Cost: O(N^2). Smoothness: C-infinity.
    """

    def __init__(self, lmax: int, width: float) -> None:
        super().__init__()
        self.lmax, self.width = lmax, width

    def forward(
        self, moments: Float[Tensor, "atoms rows channels"], hierarchy: Hierarchy
    ) -> Float[Tensor, "atoms rows channels"]:
        pos, index = hierarchy[0].pos, all_pairs(hierarchy[0].batch)
        vec = (pos.index_select(0, index[0]) - pos.index_select(0, index[1])).to(moments.dtype)
        return m2l(moments, vec, index, pos.shape[0], self.lmax, None, self.width)

    def extra_repr(self) -> str:
        return f"lmax={self.lmax}, width={self.width}"


class HierarchyField(Resettable):
    r"""Local field of all other atoms by a fast multipole method over the parts of a scheme.

    .. math:: E = \sum_k \sum_{A<B} \big(n^k_{AB} - w_k(R_{AB})\big) V_{AB}, \qquad
              n^{k}_{ij} = \sum_{AB} p_{iA}\, p_{jB}\, w_{k+1}(R_{AB}), \quad w_k(0) = 1, \; w_0 = 0

    A pair of parts within the window of its level leaves its interaction to the children, smoothly: w is 1 up to 0.7 of
    the ``pair_radius`` of the level and 0 beyond it. The children take over exactly what a level leaves to them, so
    every pair of atoms counts once. The energy differs from the direct sum only by the moments above ``lmax``. On the
    highest level with pairs all parts interact. Levels above it, and levels without pairs, are not used.

    The error comes from parts that are wide compared with 0.7 ``pair_radius``: choose pair radii of at least three
    times the radius of the parts. Overlapping parts must not interact as multipoles, so the cutoffs of
    ``SmoothSurvivors`` have to be at least 3.9 times its radii (5.8 times with parts at means).

    Args:
        scheme: composition scheme; its levels with pairs are used.
        lmax_atoms: 0 for charges, 1 for charges and dipoles.
        lmax: highest degree of the moments and fields of parts.
        width: smearing of the charges of atoms, angstrom; parts interact as point multipoles.
        trained: train a factor for each path of the translations.

    Shapes: (atoms, rows, channels) -> the same. Cost: O(N) pairs at fixed density up to the highest level with pairs.
    Smoothness: that of the scheme, at most C2. Raises: ValueError: no level of parts with pairs, or survivors that
    overlap beyond the plateau of their window.
    """

    def __init__(self, scheme: Scheme, lmax_atoms: int, lmax: int, width: float, trained: bool = False) -> None:
        super().__init__()
        self.radii = _far_radii(scheme)
        lmax = max(lmax, lmax_atoms)
        self.lmax_atoms, self.width = lmax_atoms, width
        self.up, self.across, self.down = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k in range(len(self.radii)):
            below = lmax if k else lmax_atoms
            self.up.append(TranslationGate(m2m, below, lmax, trained))
            self.across.append(TranslationGate(m2l, lmax, lmax, trained))
            self.down.append(TranslationGate(l2l, lmax, below, trained))

    def forward(
        self, moments: Float[Tensor, "atoms rows channels"], hierarchy: Hierarchy
    ) -> Float[Tensor, "atoms rows channels"]:
        levels, top = hierarchy.levels, len(self.radii)
        rising = [_children(levels[k]) for k in range(1, top + 1)]
        parts = [moments]
        for gate, edges in zip(self.up, rising, strict=True):
            parts.append(gate(parts[-1], edges))
        pairs = all_pairs(levels[top].batch)
        near = pairs, moments.new_ones(pairs.shape[1])
        field: Tensor | None = None
        for k in range(top, 0, -1):
            level, edges = levels[k], rising[k - 1]
            window = plateau_window(
                safe_norm(required(level.pair_vec)), _PLATEAU * self.radii[k - 1], self.radii[k - 1]
            )
            here = self.across[k - 1](parts[k], self._handed(level, near, window))
            field = here if field is None else here + field
            field = self.down[k - 1](field, edges.reversed(levels[k - 1].num_parts))
            near = self._below(level, window, edges, levels[k - 1].num_parts)
        index, weight = near
        pos = levels[0].pos
        vec = (pos.index_select(0, index[0]) - pos.index_select(0, index[1])).to(moments.dtype)
        return required(field) + m2l(moments, vec, index, moments.shape[0], self.lmax_atoms, weight, self.width)

    def _handed(self, level: Level, near: tuple[Tensor, Tensor], window: Tensor) -> Translation:
        """Weights of the pairs of this level minus what is left to the children; pairs of weight zero are dropped."""
        index, weight = near
        index = torch.cat([index, required(level.pair_index)], dim=1)
        index, weight = merge_pairs(index, torch.cat([weight, -window]), level.num_parts)
        keep = weight.detach().abs() > 1e-14
        index, weight = index[:, keep], weight[keep]
        vec = level.pos.index_select(0, index[0]) - level.pos.index_select(0, index[1])
        return Translation(index, vec.to(weight.dtype), weight, level.num_parts)

    def _below(self, level: Level, window: Tensor, edges: Translation, size: int) -> tuple[Tensor, Tensor]:
        """Pairs of children, with the weight that their parents left to them."""
        itself = torch.arange(level.num_parts, device=window.device).expand(2, -1)
        pairs = torch.cat([itself, required(level.pair_index)], dim=1)
        weight = torch.cat([window.new_ones(level.num_parts), window])
        keep = weight.detach() > 0
        return join_pairs(pairs[:, keep], weight[keep], edges.index, required(edges.window), (size, level.num_parts))

    def extra_repr(self) -> str:
        return f"radii={self.radii}, width={self.width}"


def _far_radii(scheme: Scheme) -> list[float]:
    """Pair radii of the levels that are used: from the first level of parts to the last with pairs."""
    radii: list[float] = []
    for spec in scheme.levels[1:-1]:
        if spec.pair_radius is None:
            break
        if isinstance(scheme, SmoothSurvivors) and _PLATEAU * spec.pair_radius < 2.0 * required(spec.child_radius):
            least = 2.0 * required(spec.child_radius) / _PLATEAU
            raise ValueError(
                f"cutoffs[{len(radii) + 1}] of SmoothSurvivors must be at least {least:.4g} angstrom for long_range "
                f"'hierarchy', so that no two parts that overlap meet as multipoles, got {spec.pair_radius}"
            )
        radii.append(spec.pair_radius)
    if not radii:
        raise ValueError(
            f"long_range 'hierarchy' needs parts with pairs, but level 1 of the scheme, {scheme.levels[1].name!r}, has "
            "no pair_radius; use method 'direct', or a scheme such as BondTree or SmoothSurvivors"
        )
    return radii


def _children(level: Level) -> Translation:
    return Translation(required(level.child_index), required(level.child_vec), level.child_weight, level.num_parts)


class LongRange(Resettable):
    r"""Energy of latent charges, for each atom.

    .. math:: E = \sum_c s_c\, \frac{k_e}{2} \sum_i \sum_{lm} M^c_{i, lm} L^c_{i, lm}
              + \sum_{i c} (\chi_i^c q_i^c + \eta_i^c (q_i^c)^2)

    with the latent moments M of :class:`~nbody_pyg.longrange.charges.LatentCharges`, the local field L of all other
    atoms, a learned strength and sign :math:`s_c` of each channel (1, -1, 1, ... at the start; with ``coulomb`` the
    first one stays 1), and a local term that is linear in the scalars of the atom and zero at the start. The only
    long-range term is bilinear, so energies of distant neutral systems are additive. Charges are in e if the energy is
    not scaled afterwards.

    Args:
        config: see :class:`~nbody_pyg.longrange.charges.LongRangeConfig`.
        scheme: composition scheme of the network.
        num_species: number of elements.
        irreps: type of the states of the atoms, or None.
        num_basis: radial functions on the edges between atoms, or 0.

    Shapes: states, species, share, edges, hierarchy -> (atoms,), eV.
    Equivariance: O(3), permutation. Smoothness: that of the states, and of the parts for "hierarchy".
    Raises: ValueError: periodic directions with a method for open systems.
    """

    held: Tensor

    def __init__(
        self,
        config: LongRangeConfig,
        scheme: Scheme,
        num_species: int,
        irreps: o3.Irreps | None,
        num_basis: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.norm = SoftNorm()  # products may be large, charges must not be
        self.charges = LatentCharges(config, num_species, irreps, num_basis)
        lmax = int(config.dipoles)
        self.field: nn.Module
        if config.method == "hierarchy":
            self.field = HierarchyField(scheme, lmax, config.lmax, config.width, config.trained)
        elif config.method == "ewald":
            self.field = EwaldField(config.width)
        else:
            self.field = DirectField(lmax, config.width)
        signs = torch.ones(config.channels)
        signs[1::2] = -1.0
        self.strength = nn.Parameter(signs / _SLOW)
        held = torch.zeros(config.channels, dtype=torch.bool)
        held[0] = config.coulomb
        self.register_buffer("held", held, persistent=False)
        self.local = nn.Parameter(torch.zeros(num_species, 2 * config.channels))
        features = 0 if irreps is None else irreps[0].mul
        self.local_states = nn.Linear(features, 2 * config.channels, bias=False) if features else None
        if self.local_states is not None:
            nn.init.zeros_(self.local_states.weight)

    def forward(
        self,
        x: Float[Tensor, "atoms rows channels_in"] | None,
        species: Int[Tensor, " atoms"],
        share: Float[Tensor, " atoms"],
        edges: EdgeFeatures | None,
        hierarchy: Hierarchy,
    ) -> Float[Tensor, " atoms"]:
        x = None if x is None else self.norm(x)
        moments = self.charges(x, species, share, edges)
        self.refuse_images(hierarchy.system)
        field = self.field(moments, hierarchy)
        pairs = (moments * field).sum(1) * (0.5 * COULOMB * self.factors)
        energies: Tensor = (pairs + self._local(x, species, moments[:, 0])).sum(1)
        return energies

    @property
    def factors(self) -> Float[Tensor, " channels"]:
        """Strength of each channel, in units of Coulomb's law."""
        return (_SLOW * self.strength).masked_fill(self.held, 1.0)

    def refuse_images(self, system: System) -> None:
        """Raise ValueError for a system with periodic directions, if the method is for open systems."""
        if self.config.method != "ewald" and system.pbc is not None:
            raise ValueError(
                f"pbc must be off for long_range method {self.config.method!r}, which does not know periodic images; "
                "use 'ewald'"
            )

    def _local(self, x: Tensor | None, species: Tensor, charges: Tensor) -> Tensor:
        weights = self.local.index_select(0, species)
        if self.local_states is not None:
            weights = weights + self.local_states(block_of(required(x), self.charges.irreps, 0)[:, 0])
        linear, square = weights.chunk(2, dim=1)
        return linear * charges + square * charges.square()
