"""EnergyTerm: one summand of the energy, and its input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.geometry import edge_vectors, neighbour_list
from nbody_pyg.hierarchy import EdgeSet, Hierarchy, Scheme
from nbody_pyg.kernels.autograd_flags import has_values
from nbody_pyg.messages import symbols
from nbody_pyg.required import required
from nbody_pyg.system import System


class Structure:
    r"""The atoms of one evaluation, with gradients, and data shared by the terms of the energy.

    ==============  ======================  ============================================================
    attribute       shape, unit             meaning
    ==============  ======================  ============================================================
    ``system``                              atoms, cell, and the charge and spin that the network uses
    ``hierarchy``   or None                 the parts, for an :class:`~nbody_pyg.models.NBodyNet`
    ``z``           [atoms]                 atomic numbers
    ``pos``         [atoms, 3], angstrom    positions; differences are those of :meth:`pairs`
    ``batch``       [atoms]                 graph of each atom
    ==============  ======================  ============================================================

    Args:
        scheme: that of the hierarchy, or of the topology of the system.
        dtype: of the vectors of pairs; None for that of the positions.
        lists: neighbour lists (index, shift) that exist already, by their cutoff.
    """

    def __init__(
        self,
        system: System,
        hierarchy: Hierarchy | None = None,
        scheme: Scheme | None = None,
        dtype: torch.dtype | None = None,
        lists: Mapping[float, tuple[Tensor, Tensor | None]] | None = None,
    ) -> None:
        self.system, self.hierarchy, self.scheme = system, hierarchy, scheme
        self.z, self.pos, self.batch = system.z, system.pos, system.batch
        self._dtype, self._lists = dtype or system.pos.dtype, dict(lists or {})
        self._pairs: dict[float, tuple[Tensor, Tensor]] = {}

    def pairs(self, cutoff: float) -> tuple[Int[Tensor, "2 pairs"], Float[Tensor, "pairs 3"]]:
        """Source and target of all pairs of atoms nearer than ``cutoff``, each in both orders, and the vectors from
        target to source (angstrom, periodic images included).

        Edges of the hierarchy are used if they reach that far; otherwise neighbours are searched once for all terms. In
        a compiled program the number of pairs does not depend on distances: pairs beyond the cutoff are placed at the
        cutoff, where a smooth term is zero.
        """
        if cutoff not in self._pairs:
            index, vec = self._edges(cutoff)
            square = vec.detach().square().sum(-1)
            inside = (square < cutoff**2) & (square > 0)  # a shell contains its centre
            if has_values(square):
                near = inside.nonzero().flatten()
                index, vec = index.index_select(1, near), vec.index_select(0, near)
            else:
                vec = vec.masked_fill(~inside.unsqueeze(-1), (1.0 + 1e-6) * cutoff / math.sqrt(3.0))
            self._pairs[cutoff] = index, vec
        return self._pairs[cutoff]

    def slots(self, species: tuple[int, ...], numbers: Int[Tensor, " species"], of: str) -> Int[Tensor, " atoms"]:
        """Index of the element of each atom among ascending atomic numbers, given as numbers and as a tensor.

        Raises: ValueError: an element that is not among them; ``of`` names their owner in the message.
        """
        if (known := self.system.index_among(species)) is not None:
            return known
        slot = torch.searchsorted(numbers, self.z).clamp(max=len(species) - 1)
        unknown = numbers[slot] != self.z
        if has_values(unknown) and bool(unknown.any()):
            missing = symbols(sorted(set(self.z[unknown].tolist())))
            raise ValueError(
                f"z must hold elements of {of} ({symbols(species)}), got {missing}; give it what it needs for them, or "
                "leave these systems out"
            )
        return slot

    def per_graph(self, atoms: Float[Tensor, " atoms"]) -> Float[Tensor, " graphs"]:
        """Sum of the energies of the atoms of each graph."""
        return atoms.new_zeros(self.system.num_graphs).index_add(0, self.batch, atoms)

    def _edges(self, cutoff: float) -> tuple[Tensor, Tensor]:
        held, topology = covering_edges(self.scheme, cutoff), self.system.topology
        if held is not None and self.hierarchy is not None:
            index, vec, _ = self.hierarchy[held.level].edges(held.kind)
            return required(index), required(vec)
        if cutoff in self._lists:
            index, shift = self._lists[cutoff]
        elif held is not None and topology is not None:
            found, shift = topology.edges(held.kind, held.level)
            index = required(found)
        elif not has_values(self.pos):
            raise RuntimeError(f"a term asks for pairs within {cutoff:g}, which must be its attribute 'cutoff'")
        else:
            index, shift = search(self.system, cutoff)
        system = self.system
        return index, edge_vectors(self.pos, index, shift, system.cell, self.batch).to(self._dtype)


class EnergyTerm(nn.Module):
    r"""A summand of the energy of a :class:`~nbody_pyg.potential.Potential` that is a sum over atoms.

    .. math:: E_b = \sum_{i \in b} \epsilon_i(z, r)

    A subclass writes ``forward(structure)``, which takes a :class:`Structure` and returns the energy of each atom.
    Forces, stress and Hessian products are derivatives of the sum of all terms. Parameters are trained with the
    network. A model file holds the name of the class, its arguments (:meth:`config`) and its weights. Compiled programs
    follow sizes that are taken from shapes (``structure.z.shape[0]``); ``len`` would make them constants, and such a
    potential runs in eager mode, with a warning.

    Attributes:
        cutoff: distance (angstrom) of the pairs that ``forward`` uses; None if it uses none.
        species: atomic numbers that the term knows; None if it accepts all.

    Equivariance: the energies must be invariant. Smoothness: the term must vanish at its cutoff.
    Example: see ``docs/extending.md``.
    """

    cutoff: float | None = None
    species: tuple[int, ...] | None = None

    def forward(self, structure: Structure) -> Float[Tensor, " atoms"]:
        """Energy of each atom, eV."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(structure)")

    def config(self) -> dict[str, Any]:
        """Arguments that build the same term, ready for JSON: the attributes with the names of the constructor's
        arguments.

        Raises: ValueError: an argument that is not stored as an attribute.
        """
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        if missing := [name for name in names if not hasattr(self, name)]:
            raise ValueError(
                f"{type(self).__name__} must keep its argument {missing[0]!r} as an attribute of this name to be "
                "saved, or define config()"
            )
        return {name: getattr(self, name) for name in names}


def search(system: System, cutoff: float) -> tuple[Tensor, Tensor | None]:
    """Neighbour list of the atoms: index and lattice shifts."""
    still = system.detached()
    return neighbour_list(still.pos, cutoff, still.batch, still.cell, still.pbc)


def covering_edges(scheme: Scheme | None, reach: float) -> EdgeSet | None:
    """Edge set of a hierarchy that joins all atoms nearer than ``reach``, or None."""
    if scheme is None:
        return None
    first = scheme.levels[0].pair_radius
    if first is not None and first >= reach:
        return EdgeSet("pair", 0)
    shell = scheme.levels[1].child_radius
    if scheme.centred_levels > 1 and shell is not None and shell >= reach:
        return EdgeSet("child", 1)
    return None
