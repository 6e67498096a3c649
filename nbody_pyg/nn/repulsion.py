"""Repulsion of nuclei at short range, where training sets have no data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from jaxtyping import Float
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.geometry import edge_vectors, neighbour_list
from nbody_pyg.kernels.autograd_flags import has_values
from nbody_pyg.nn.exact_buffers import Float64Buffers
from nbody_pyg.nn.term import EnergyTerm, Structure
from nbody_pyg.radial import quintic_step

#: e^2 / (4 pi eps_0), eV angstrom (CODATA 2018).
COULOMB = 14.3996454784
#: Universal screening function of Ziegler, Biersack and Littmark: weights and exponents.
SCREEN_WEIGHTS = (0.18175, 0.50986, 0.28022, 0.02817)
SCREEN_EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)
#: Screening length: 0.8854 bohr radii over Z1^0.23 + Z2^0.23, angstrom.
SCREEN_LENGTH = 0.8854 * 0.529177210903
SCREEN_POWER = 0.23
#: Reach without data, in sums of covalent radii; the shortest bonds (in N2, CO, acetylene) are 0.77 of theirs.
REACH_FACTOR = 0.75
#: Reach with data, in units of the shortest distance; the network extrapolates well to slightly shorter distances.
SEEN_FACTOR = 0.9
#: Fraction of the reach up to which the repulsion is unscaled. With a slower decay a network can pull two atoms through
#: it.
FADE_FROM = 0.7
#: Largest distance (angstrom) that counts as observed, and largest number of frames that are used.
_SEEN_WITHIN, _MAX_FRAMES = 3.0, 2000


class ZBLRepulsion(EnergyTerm, Float64Buffers):
    r"""Screened Coulomb repulsion between nuclei, zero from below bond lengths on.

    .. math::
        V(r) = \frac{e^2}{4 \pi \epsilon_0} \frac{Z_1 Z_2}{r} \phi(r / a)\, f(r / R_{12}), \quad
        \phi(x) = \sum_{k=1}^4 c_k e^{-d_k x}, \quad a = \frac{0.8854\, a_0}{Z_1^{0.23} + Z_2^{0.23}}

    f is 1 up to 0.7 of the reach and decays to 0 in a quintic step from there. :math:`R_{12}` is shorter than the
    shortest bonds, so the repulsion does not act where there are data. With a window up to the sum of the covalent
    radii, which is longer than multiple bonds, the forces of aspirin were a fifth less accurate. :meth:`from_frames`
    takes the reach from data. There are no learned parameters.

    Source: Ziegler, Biersack, Littmark, *The Stopping and Range of Ions in Matter* (1985); covalent radii of
    Cordero et al. (2008), as ASE has them.

    Args:
        species: atomic numbers that may meet.
        reach: distance (angstrom) at which the repulsion of a pair ends, by symbols (``{"C-H": 1.07}``); other pairs
            use 0.75 times the sum of their covalent radii, which is shorter than any known bond.

    Equivariance: invariant. Smoothness: C2 at the reach and at 0.7 of it, else C-infinity for r > 0.
    Cost: a comparison per edge of the list; more only for pairs within reach, which normal structures do not have.
    Raises: ValueError: no or unknown species, a reach for an unknown pair or not positive.

    Example:
        >>> ZBLRepulsion([1, 8])
        ZBLRepulsion(H-H 0.46, H-O 0.73, O-O 0.99 angstrom)
    """

    species: tuple[int, ...]
    cutoff: float
    numbers: Tensor
    charge: Tensor
    inverse_length: Tensor
    end: Tensor
    screen: Tensor
    _float64 = ("charge", "inverse_length", "end", "screen")

    def __init__(self, species: Sequence[int], reach: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.species = tuple(sorted({int(n) for n in species}))
        if not self.species or self.species[0] < 1 or self.species[-1] > 118:
            raise ValueError(f"species must be atomic numbers between 1 and 118, got {list(species)}; e.g. [1, 6, 8]")
        self.reach = pair_lengths("reach", self.species, reach or {})
        self.cutoff = max(self.reach.values())
        number = torch.tensor(self.species, dtype=torch.float64)
        power = number**SCREEN_POWER
        # Constants follow from the configuration, so that model files need not hold them.
        self.register_buffer("numbers", torch.tensor(self.species), persistent=False)
        self.register_buffer("charge", COULOMB * number[:, None] * number, persistent=False)
        self.register_buffer("inverse_length", (power[:, None] + power) / SCREEN_LENGTH, persistent=False)
        self.register_buffer("end", pair_table(self.species, self.reach), persistent=False)
        self.register_buffer(
            "screen", torch.tensor((SCREEN_WEIGHTS, SCREEN_EXPONENTS), dtype=torch.float64), persistent=False
        )

    @classmethod
    def from_frames(cls, species: Sequence[int], frames: Sequence[Data]) -> ZBLRepulsion:
        """A repulsion that ends below the shortest distance of each pair in some frames, so that it is zero on them.

        The reach is 0.9 times that distance; pairs that do not come within 3 angstrom use the reach without data. At
        most 2,000 frames are used.
        """
        return cls.below(species, shortest_distances(frames))

    @classmethod
    def below(cls, species: Sequence[int], shortest: Mapping[str, float]) -> ZBLRepulsion:
        """A repulsion that ends below shortest distances (angstrom) of pairs, by symbols, as in :meth:`from_frames`."""
        return cls(species, {name: SEEN_FACTOR * length for name, length in shortest.items()})

    def forward(self, structure: Structure) -> Float[Tensor, " atoms"]:
        """Share of each atom in the repulsion, eV: half of each of its pairs."""
        index, vec = structure.pairs(self.cutoff)
        source, target = structure.slots(self.species, self.numbers, "the repulsion")[index]
        kind, square = source * len(self.species) + target, vec.square().sum(-1)
        near = square < self.end.flatten()[kind].square()
        if has_values(square):  # normal structures have none
            kept = near.nonzero().flatten()
            index, square, kind = (x.index_select(-1, kept) for x in (index, square, kind))
        energy = vec.new_zeros(structure.z.shape[0])
        if square.shape[0] == 0:
            return energy
        return energy.index_add(0, index[1], 0.5 * self._pair(square, kind))

    def _pair(self, square: Tensor, kind: Tensor) -> Tensor:
        """V of pairs at a squared distance, with the number of the kind of each pair; zero beyond their reach."""
        charge, rate, end = (t.flatten()[kind].to(square.dtype) for t in (self.charge, self.inverse_length, self.end))
        r = torch.minimum(square, end * end).sqrt()
        weights, exponents = self.screen.to(square.dtype)
        screen = (torch.exp(-(r * rate).unsqueeze(-1) * exponents) * weights).sum(-1)
        # 1 up to FADE_FROM of the reach, then a step down
        window = quintic_step(((1.0 - r / end) / (1.0 - FADE_FROM)).clamp(0.0, 1.0))
        energy: Tensor = charge / r * screen * window
        return energy

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs, ready for JSON; radii included, so that energies of a file never change."""
        return {"name": "zbl", "species": list(self.species), "reach": dict(self.reach)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ZBLRepulsion:
        """Build the repulsion that :meth:`config` described.

        Raises: ValueError: another kind of repulsion.
        """
        if config.get("name") != "zbl":
            raise ValueError(f"name of a repulsion must be 'zbl', got {config.get('name')!r}; upgrade nbody_pyg")
        return cls(config["species"], config["reach"])

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {reach:.2f}" for name, reach in self.reach.items()) + " angstrom"


def shortest_distances(frames: Sequence[Data]) -> dict[str, float]:
    """The shortest distance (angstrom) of each pair of elements that comes within 3 angstrom, by symbols. At most 2,000
    frames are used."""
    shortest: dict[str, float] = {}
    for frame in frames[:: max(1, len(frames) // _MAX_FRAMES)]:
        for name, lengths in shortest_in_frames(frame).items():
            shortest[name] = min(float(lengths.min()), shortest.get(name, math.inf))
    return shortest


def shortest_in_frames(frames: Data) -> dict[str, Float[Tensor, " frames_with_the_pair"]]:
    """For each pair of elements the shortest distance (angstrom) in each frame of a batch, or in one frame, that has
    one within 3 angstrom."""
    batch, cell = frames.get("batch"), frames.get("cell")
    index, shift = neighbour_list(frames.pos, _SEEN_WITHIN, batch, cell, frames.get("pbc"))
    length = edge_vectors(frames.pos, index, shift, cell, batch).norm(dim=-1)
    first, second = frames.z[index].sort(dim=0).values
    frame = torch.zeros_like(first) if batch is None else batch[index[1]]
    keys, place = ((frame * 119 + first) * 119 + second).unique(return_inverse=True)
    least = length.new_full((len(keys),), math.inf).scatter_reduce(0, place, length, "amin")
    pairs = keys % 119**2
    return {pair_name(*divmod(pair, 119)): least[pairs == pair] for pair in pairs.unique().tolist()}


def pair_lengths(
    argument: str, species: Sequence[int], given: Mapping[str, float], strict: bool = True
) -> dict[str, float]:
    """A length (angstrom) for each pair of elements: those given by symbols (``{"C-H": 1.07}``), else 0.75 times the
    sum of the covalent radii.

    Args:
        argument: name of ``given`` in messages.
        strict: whether pairs of elements that are not among ``species`` are an error; otherwise they are left out.

    Raises: ValueError: an unknown pair, or a length that is not positive.
    """
    found = {
        pair_name(a, b): REACH_FACTOR * float(covalent_radii[a] + covalent_radii[b])
        for a, b in itertools.combinations_with_replacement(species, 2)
    }
    for name, value in given.items():
        words = name.split("-")
        known = len(words) == 2 and all(word in atomic_numbers for word in words)
        key = pair_name(*(atomic_numbers[word] for word in words)) if known else name
        if key not in found and (strict or not known):
            raise ValueError(f"{argument} names {name!r}; it must be one of the pairs {', '.join(found)}")
        if isinstance(value, bool) or not math.isfinite(value) or not value > 0:
            raise ValueError(f"{argument}[{name!r}] must be a positive finite length in angstrom, got {value!r}")
        if key in found:
            found[key] = float(value)
    return found


def pair_table(species: Sequence[int], lengths: Mapping[str, float]) -> Float[Tensor, "species species"]:
    """The lengths of :func:`pair_lengths` as a symmetric matrix, float64."""
    return torch.tensor([[lengths[pair_name(a, b)] for b in species] for a in species], dtype=torch.float64)


def pair_name(first: int, second: int) -> str:
    """Name of a pair of elements, the lighter one first: "H-O"."""
    return "-".join(chemical_symbols[n] for n in sorted((first, second)))
