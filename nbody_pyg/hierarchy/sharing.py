"""One tree for all frames of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch_geometric.data import Data

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy.scheme import Scheme
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.system import System


def share_topology(frames: Sequence[Data], scheme: Scheme, reference: int | Topology = 0) -> list[AtomicData]:
    """Store on all frames of one trajectory the parts of one reference frame.

    The tree is part of the definition of the energy. If a hot frame stretches a bond past the limit of the covalent
    radii, a separate tree for it would make the energy discontinuous. Here every frame has the children of the
    reference; only the lists that depend on positions (pairs, lattice images) are computed for each frame, by
    :meth:`Scheme.rebuild`. For schemes without fixed children (NestedShells) it equals applying the
    scheme.

    Args:
        frames: frames with the same atoms in the same order. Isomers have the same atoms too: call this once
            for
            each trajectory, never for a set of different molecules.
        scheme: the composition scheme.
        reference: which frame's tree to take (an equilibrated or relaxed one is best), or a topology.

    Returns:
        New AtomicData with the hierarchy stored; the frames are not changed.

    Raises:
        ValueError: a frame has other atoms than the reference; its number is in the message.
    """
    if not frames:
        return []
    frames = [AtomicData.from_data(frame) for frame in frames]
    first = frames[0 if isinstance(reference, Topology) else reference]
    if isinstance(reference, Topology):
        tree = reference
    else:
        tree = Topology.from_data(scheme(first))
    for number, frame in enumerate(frames):
        if not torch.equal(frame.z, first.z):
            raise ValueError(
                f"frames must hold the same atoms in the same order, but z of frame {number} differs from "
                "the reference; call share_topology once for each trajectory"
            )
        own = scheme.rebuild(tree, System.from_data(frame).detached())
        scheme.store(own, frame, kept=scheme.keeps_parts)
    return frames
