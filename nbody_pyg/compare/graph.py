"""CutoffGraph: atoms, the pairs of them within a cutoff, and the molecule; what a flat network needs."""

from __future__ import annotations

import torch

from nbody_pyg.hierarchy.scheme import LevelSpec, Scheme, check_radius
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.system import System


class CutoffGraph(Scheme):
    """The scheme of the peers: a list of neighbours, complete, both directions, sorted by target, and a root.

    As a scheme it stores the edges on the frames by the same transform as ours, and every model finds them
    in its batches in the same way.

    Args:
        cutoff: angstrom.

    Symmetry: E(3) and permutations. Continuity: that of the model's own window at the cutoff.
    Cost: O(N) edges at fixed density.
    Raises: ValueError: a cutoff that is not positive.
    """

    symmetry = "E(3), permutations"
    continuity = "that of the model"
    centred = True

    def __init__(self, cutoff: float = 5.0) -> None:
        self.cutoff = check_radius("cutoff", cutoff)
        self.levels = (LevelSpec("atoms", pair_radius=self.cutoff), LevelSpec("molecule", child_radius=self.cutoff))

    def build(self, system: System) -> Topology:
        atoms, pos = system, system.pos
        index, shift = atoms.pairs(atoms.pos, atoms.batch, self.cutoff, parts=False)
        root = torch.stack([torch.arange(pos.shape[0], device=pos.device), atoms.batch])
        return Topology(
            num_parts=(atoms.num_atoms, torch.ones_like(atoms.num_atoms)),
            child_index=(None, root),
            pair_index=(index, None),
            pair_shift=(shift, None),
            periodic=atoms.periodic,
        )
