"""Positions of parts: mass-weighted means of their atoms, differentiable, never detached."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.kernels.autograd_flags import constant_table
from nbody_pyg.required import required
from nbody_pyg.system import System


@constant_table
def _mass_table(device: torch.device) -> Tensor:
    from ase.data import atomic_masses as table

    # Placeholders (Z = 0 or beyond the table) count as 1 amu: a mean needs positive weights.
    masses = np.array(table, dtype=np.float64)
    masses[~np.isfinite(masses) | (masses <= 0)] = 1.0
    return torch.from_numpy(masses).to(device)


def atomic_masses(z: Integer[Tensor, " atoms"], dtype: torch.dtype = torch.float64) -> Float[Tensor, " atoms"]:
    """Standard atomic masses in amu (from `ase.data`), looked up in float64 and then cast."""
    return _mass_table(z.device).index_select(0, z).to(dtype)


def lattice_vectors(
    shift: Float[Tensor, "edges 3"], cell: Float[Tensor, "graphs 3 3"], graph: Int[Tensor, " edges"]
) -> Float[Tensor, "edges 3"]:
    """Cartesian translation ``shift @ cell`` of each edge, in the dtype of ``cell``."""
    shift = shift.to(cell.dtype)
    if cell.shape[0] == 1:
        return shift @ cell[0]
    return torch.bmm(shift.unsqueeze(1), cell.index_select(0, graph)).squeeze(1)


def child_vectors(
    child_pos: Float[Tensor, "children 3"],
    parent_pos: Float[Tensor, "parents 3"],
    index: Int[Tensor, "2 edges"],
    shift: Float[Tensor, "edges 3"] | None,
    cell: Float[Tensor, "graphs 3 3"] | None,
    batch: Int[Tensor, " parents"],
) -> Float[Tensor, "edges 3"]:
    """Vectors from parents to children, ``r_child - r_parent + shift @ cell``."""
    vec = child_pos.index_select(0, index[0]) - parent_pos.index_select(0, index[1])
    if shift is None or cell is None:
        return vec
    return vec + lattice_vectors(shift, cell.to(vec.dtype), batch.index_select(0, index[1]))


def tree_positions(topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
    r"""Mass-weighted means, level by level. Exact if every node has one parent.

    .. math:: m_P = \sum_c m_c, \qquad r_P = m_P^{-1} \sum_c m_c (r_c + n_{cP} C)
    """
    pos, cell = system.pos, system.cell
    mass, levels = atomic_masses(system.z, pos.dtype), [pos]
    for k in range(1, topology.num_levels):
        child, parent = required(topology.child_index[k])
        size, shift = topology.size(k), topology.child_shift[k]
        here, child_mass = levels[-1].index_select(0, child), mass.index_select(0, child)
        if shift is not None and cell is not None:
            here = here + lattice_vectors(shift, cell.to(pos.dtype), topology.batch(k).index_select(0, parent))
        mass = pos.new_zeros(size).index_add(0, parent, child_mass)
        total = pos.new_zeros(size, 3).index_add(0, parent, child_mass.unsqueeze(-1) * here)
        levels.append(total / mass.unsqueeze(-1))
    return levels


def member_positions(topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
    r"""Mass-weighted means over the unique atoms of each part: correct for every DAG, also if parts overlap.

    .. math:: r_P = \Big(\sum_{a \in P} m_a\Big)^{-1} \sum_{a \in P} m_a (r_a + n_{aP} C)
    """
    pos, cell = system.pos, system.cell
    mass, levels = atomic_masses(system.z, pos.dtype), [pos]
    for k in range(1, topology.num_levels):
        atom, part = topology.parts(k)
        shift, size = topology.part_shift(k), topology.size(k)
        here, weight = pos.index_select(0, atom), mass.index_select(0, atom)
        if shift is not None and cell is not None:
            here = here + lattice_vectors(shift, cell.to(pos.dtype), topology.batch(k).index_select(0, part))
        norm = pos.new_zeros(size).index_add(0, part, weight)
        total = pos.new_zeros(size, 3).index_add(0, part, weight.unsqueeze(-1) * here)
        levels.append(total / norm.unsqueeze(-1))
    return levels
