"""Small networks and potentials that the tests share; each call with the same seed gives the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.energy import EnergyTerm, Structure
from nbody_pyg.hierarchy import Scheme
from nbody_pyg.radial import smooth_cutoff

SPECIES = (1, 6, 8)
SMALL = {"channels": 4, "lmax": 1}


def net(
    scheme: Scheme | None = None, species: Sequence[int] = SPECIES, *, seed: int | None = 0, **options: Any
) -> NBodyNet:
    """A small network in float64, of one shell where no scheme is given; ``seed=None`` goes on with the generator."""
    if seed is not None:
        torch.manual_seed(seed)
    return wake_long_range(NBodyNet(list(species), scheme or NestedShells((4.0,)), **(SMALL | options)).double())


def potential(
    scheme: Scheme | None = None,
    e0: Mapping[int, float] | None = None,
    scale: float = 1.0,
    repulsion: Any = "auto",
    *,
    seed: int | None = 0,
    **options: Any,
) -> Potential:
    """A small potential in float64."""
    return Potential(net(scheme, seed=seed, **options), e0, scale, repulsion).double()


def wake_long_range(model: NBodyNet) -> NBodyNet:
    """Give the local part of long-range interactions weights: they start at zero, and tests would see nothing."""
    if model.long_range is not None:
        with torch.no_grad():
            for weight in (model.long_range.local, model.long_range.local_states.weight):
                weight.normal_(std=0.1)
    return model


class LennardJones(EnergyTerm):
    """Pairs of atoms, smooth at ``cutoff`` angstrom; the minimum is at 1.12 times ``length``."""

    def __init__(self, length: float = 2.4, depth: float = 0.4, cutoff: float = 7.0) -> None:
        super().__init__()
        self.length, self.cutoff = length, cutoff
        self.depth = nn.Parameter(torch.tensor(depth))

    def forward(self, structure: Structure) -> Tensor:
        index, vec = structure.pairs(self.cutoff)
        r = vec.norm(dim=-1)
        energy = 4 * self.depth * ((self.length / r) ** 12 - (self.length / r) ** 6) * smooth_cutoff(r, self.cutoff)
        return energy.new_zeros(structure.z.shape).index_add(0, index[1], 0.5 * energy)


class Morse(EnergyTerm):
    """A spring that softens between each pair of atoms of one molecule, at rest at ``lengths`` [atoms][atoms]."""

    cutoff = 9.0

    def __init__(self, lengths: list[list[float]], depth: float = 2.0, sharpness: float = 1.8) -> None:
        super().__init__()
        self.lengths, self.depth, self.sharpness = lengths, depth, sharpness

    def forward(self, structure: Structure) -> Tensor:
        index, vec = structure.pairs(self.cutoff)
        r = vec.norm(dim=-1)
        rest = torch.tensor(self.lengths, dtype=torch.float64).to(r)[index[0], index[1]]
        energy = self.depth * (1 - torch.exp(-self.sharpness * (r - rest))) ** 2 * smooth_cutoff(r, self.cutoff)
        return energy.new_zeros(structure.z.shape).index_add(0, index[1], 0.5 * energy)


def only(term: EnergyTerm, species: Sequence[int]) -> Potential:
    """A potential that is this term alone: the network gives nothing."""
    silent = net(species=species)
    with torch.no_grad():
        for weight in silent.parameters():
            weight.mul_(0.0)
    return Potential(silent, repulsion=None, terms=[term]).double()


def argon(term: EnergyTerm) -> Potential:
    """A potential of argon that is this term alone."""
    return only(term, [18])


class Springs(nn.Module):
    """Half a stiffness times the squared distances from the mean position of each graph; a cell changes nothing."""

    def __init__(self, stiffness: float = 0.3) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor, *, cell: Tensor | None = None) -> Tensor:
        count = torch.bincount(batch)
        centre = pos.new_zeros(len(count), 3).index_add(0, batch, pos) / count[:, None]
        square = (pos - centre[batch]).square().sum(1)
        return pos.new_zeros(len(count)).index_add(0, batch, 0.5 * self.stiffness * square)


class StandIn:
    """For CUDA graphs on the CPU: runs what was recorded again, into the tensors of the first results, as they do."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, run, device):
        results = [result.clone() for result in run()]
        self.captured += 1

        def replay() -> list[Tensor]:
            self.replayed += 1
            for kept, new in zip(results, run(), strict=True):
                kept.copy_(new)
            return results

        return replay
