"""explain_energy: contribution of each part of a molecule to its energy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import Topology
from nbody_pyg.potential import Potential
from nbody_pyg.required import required


@dataclass(frozen=True)
class EnergyExplanation:
    r"""The energy of one structure, decomposed over its hierarchy.

    .. math:: E = \sum_i E_0(z_i) + \sum_k \sum_{P \in \mathrm{level}\ k} \epsilon_P + \sum_i V_i + \sum_i E_i

    ==================  ================================  ===================================================
    field               shape, unit                       meaning
    ==================  ================================  ===================================================
    ``own``             {level: [parts]}, eV              :math:`\epsilon_P`, the readout of a part
    ``repulsion``       [atoms], eV                       :math:`V_i`, half of that of each close pair
    ``terms``           [atoms], eV                       sum of the user's terms
    ``reference``       [atoms], eV                       :math:`E_0(z_i)`
    ``total``           eV                                E: the sum of all of them, to round-off
    ==================  ================================  ===================================================

    float64. The decomposition is learned and not unique: two networks with the same errors may decompose an energy
    differently. Compare structures with one network only.
    """

    frame: AtomicData
    topology: Topology
    names: tuple[str, ...]
    centred_levels: int
    own: dict[int, Tensor]
    repulsion: Tensor
    reference: Tensor
    terms: Tensor

    @property
    def total(self) -> float:
        parts = [*self.own.values(), self.repulsion, self.reference, self.terms]
        return float(torch.stack([part.sum() for part in parts]).sum())

    @property
    def by_level(self) -> dict[str, float]:
        """Sum over the parts of each level, by name, and of repulsion, user terms and isolated atoms."""
        rows = {self.names[k]: values for k, values in sorted(self.own.items())} | {"repulsion": self.repulsion}
        rows |= {"own terms": self.terms} if bool(self.terms.any()) else {}
        return {name: float(values.sum()) for name, values in (rows | {"isolated atoms": self.reference}).items()}

    def on_atoms(self) -> Float[Tensor, " atoms"]:
        """Interaction energy by atom: that of a part goes to its centre atom, or in equal shares to its atoms."""
        total = self.repulsion + self.terms
        for k, values in self.own.items():
            if k < self.centred_levels:
                total = total + values
                continue
            atom, part = self.topology.parts(k)
            size = torch.bincount(part, minlength=len(values)).clamp(min=1)
            total = total.index_add(0, atom, (values / size)[part])
        return total

    def within(self, level: int) -> Float[Tensor, " parts"]:
        """Interaction energy of each part of a level including all its descendants, but not that of higher levels or
        between parts.

        Raises: ValueError: no such level, or parts that overlap, for which energies would be counted twice.
        """
        if not 0 <= level < self.topology.num_levels:
            raise ValueError(f"level must lie in 0..{self.topology.num_levels - 1}, got {level}")
        total = self.repulsion + self.terms
        total = total + self.own[0] if 0 in self.own else total
        for k in range(1, level + 1):
            child, parent = required(self.topology.child_index[k])
            if len(child.unique()) != len(child):
                raise ValueError(
                    f"level {k} ({self.names[k]}) has parts that overlap, so that energies within them do not add; "
                    "use on_atoms(), or a hierarchy that is a tree (BondTree)"
                )
            above = total.new_zeros(self.topology.size(k)).index_add(0, parent, total[child])
            total = above + self.own[k] if k in self.own else above
        return total

    def minus(self, other: EnergyExplanation) -> EnergyExplanation:
        """The difference to another structure with the same parts, for each part.

        Raises: ValueError: another molecule or another hierarchy.
        """
        same = self.frame.z.equal(other.frame.z) and self.own.keys() == other.own.keys()
        if not same or any(len(self.own[k]) != len(other.own[k]) for k in self.own):
            raise ValueError("other must have the same atoms and parts; give both the same topology")
        own = {k: values - other.own[k] for k, values in self.own.items()}
        rest = {name: getattr(self, name) - getattr(other, name) for name in ("repulsion", "reference", "terms")}
        return replace(self, own=own, **rest)


def explain_energy(potential: Potential, frame: Data, topology: Topology | None = None) -> EnergyExplanation:
    """Decompose the energy of one structure.

    Parts sum to the energy: to 1e-10 eV for a potential in float64 (``copy.deepcopy(potential).double()``).

    Args:
        topology: the hierarchy to use, instead of one built for these positions or stored on the frame.
    Raises: ValueError: a batch, or a model that does not provide energies of parts.
    """
    if frame.get("batch") is not None and int(frame.batch.max()) > 0:
        raise ValueError("frame must be a single structure, got a batch; pass batch.get_example(i)")
    parts = potential.energies(frame, topology=topology)
    scheme = required(potential.scheme)
    names, topology = tuple(spec.name for spec in scheme.levels), parts.hierarchy.topology()
    return EnergyExplanation(
        AtomicData.from_data(frame), topology, names, scheme.centred_levels, parts.levels, *parts[2:]
    )
