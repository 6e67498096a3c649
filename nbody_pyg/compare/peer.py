"""What every peer has in common: one call for the energy of a batch, with edges that are handed to it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import e3nn
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.compare.graph import CutoffGraph
from nbody_pyg.geometry import edge_vectors
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.required import required


class MissingPeer(ImportError):
    """A peer that is not installed; the message is the line that installs it, and what was not found."""


@dataclass(frozen=True)
class Facts:
    """Statistics of the training frames that a peer gets before it is built.

    ``species`` are atomic numbers, ascending; ``cutoff`` is in angstrom; ``degree`` is the mean number of
    neighbours within it. ``readout`` is that of the property to learn (a readout of
    :class:`~nbody_pyg.properties.Property`); an energy is "extensive".
    """

    species: tuple[int, ...]
    cutoff: float = 5.0
    degree: float = 12.0
    dtype: torch.dtype = torch.float32
    readout: str = "extensive"


@dataclass(frozen=True)
class Edges:
    """Pairs of atoms within the cutoff, both directions, sorted by target.

    ``index`` [2, edges]: row 0 the source j, row 1 the target i; ``vec`` [edges, 3]: r_j - r_i, in a periodic cell to
    the image within the cutoff, with gradients.
    """

    index: Int[Tensor, "2 edges"]
    vec: Float[Tensor, "edges 3"]


class Peer(nn.Module):
    r"""A model of another package as ``model(z, pos, batch, topology=...) -> energies``, or values of a property.

    Energies, forces and stress come from :class:`~nbody_pyg.potential.Potential`, as ours do. The edges are those of
    :class:`CutoffGraph`. Nothing is kept from one call to the next.

    A new peer is a subclass of some twenty lines: build the model in ``__init__``, write :meth:`energy`, and
    enter it in :mod:`nbody_pyg.compare.registry`. An energy that is a sum over atoms also gives extensive properties,
    and divided by their number intensive ones. A model with further readouts names them in ``readouts``, and its
    :meth:`energy` is the value of ``property_readout``.

    Args:
        facts: elements, cutoff, mean number of neighbours, precision, readout.

    Raises: ValueError: a readout that the model does not have.
    """

    #: Readouts of properties that the model has.
    readouts: ClassVar[tuple[str, ...]] = ("extensive", "intensive")

    #: Whether the model takes periodic cells.
    periodic: ClassVar[bool] = True

    type_of: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        if facts.readout not in self.readouts:
            raise ValueError(
                f"{type(self).__name__} must learn a property with the readout {' or '.join(self.readouts)}, got "
                f"{facts.readout!r}; leave this model out"
            )
        self.property_readout = facts.readout
        self.scheme = CutoffGraph(facts.cutoff)
        table = torch.full((119,), -1, dtype=torch.long)
        table[list(facts.species)] = torch.arange(len(facts.species))
        self.register_buffer("type_of", table, persistent=False)

    def forward(
        self,
        z: Int[Tensor, " atoms"],
        pos: Float[Tensor, "atoms 3"],
        batch: Int[Tensor, " atoms"],
        *,
        cell: Float[Tensor, "graphs 3 3"] | None = None,
        pbc: Tensor | None = None,
        topology: Topology | None = None,
    ) -> Tensor:
        """Energy (or property) of each graph; the edges are found here only where no topology is given.

        Raises: ValueError: a periodic cell, for a model that takes none.
        """
        if topology is None:
            topology = self.scheme.topology(z, pos, batch, cell, pbc)
        if not self.periodic and topology.periodic is not None and bool(topology.periodic.any()):
            raise ValueError(f"{type(self).__name__} takes no periodic cells; leave this model out")
        index, shift = topology.edges("pair", 0)
        num_atoms, index = topology.num_parts[0], required(index)
        edges = Edges(index, edge_vectors(pos, index, shift, cell, batch))
        value = self.energy(z, pos, batch, edges, num_atoms)
        return value.reshape(-1) / num_atoms.to(value.dtype) if self.property_readout == "intensive" else value

    def energy(
        self,
        z: Int[Tensor, " atoms"],
        pos: Float[Tensor, "atoms 3"],
        batch: Int[Tensor, " atoms"],
        edges: Edges,
        num_atoms: Int[Tensor, " graphs"],
    ) -> Tensor:
        """Energies, or values of the property before a mean is taken, [graphs] or [graphs, 1].

        ``num_atoms`` counts the atoms of each graph.
        """
        raise NotImplementedError

    def types(self, z: Int[Tensor, " atoms"]) -> Int[Tensor, " atoms"]:
        """Position of each element among the species."""
        return self.type_of.index_select(0, z)


def with_loops(index: Int[Tensor, "2 edges"], num_atoms: int) -> Int[Tensor, "2 edges_and_atoms"]:
    """The edges and one loop on every atom."""
    loops = torch.arange(num_atoms, device=index.device).expand(2, -1)
    return torch.cat([index, loops], dim=1)


def loop_vectors(
    vec: Float[Tensor, "edges 3"], num_atoms: int
) -> tuple[Float[Tensor, " edges_and_atoms"], Float[Tensor, "edges_and_atoms 3"]]:
    """Length and vector of every edge, and zeros for the loops after them.

    The norm is not taken of the loops, where it has no derivative.
    """
    return torch.cat([vec.norm(dim=-1), vec.new_zeros(num_atoms)]), torch.cat([vec, vec.new_zeros(num_atoms, 3)])


@contextlib.contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Build a peer with seeded weights, and put back what some of them change for the whole process.

    nequip sets the default dtype and e3nn's way to compile, and seeds every generator, mace sets environment variables,
    several set up logging: none of it may reach the models that come after.
    """
    dtype, environment, compiled = torch.get_default_dtype(), dict(os.environ), e3nn.get_optimization_defaults()
    level, states = logging.getLogger().level, (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peers say about themselves
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        e3nn.set_optimization_defaults(**compiled)
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        logging.getLogger().setLevel(level)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
