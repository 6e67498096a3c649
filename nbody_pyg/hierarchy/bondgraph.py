"""The bond graph: bonds, fragments, and unwrapping of molecules in a cell."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nbody_pyg.geometry import nearest_images
from nbody_pyg.required import required
from nbody_pyg.system import System

#: Atoms nearer than this many times the sum of their covalent radii are bonded. C-H breaks at 1.39 angstrom,
#: C-C at 1.98; the nearest non-bonded contacts in organic molecules are near 1.6 (H...O) and 2.1 (H...C).
BOND_FACTOR = 1.3
# A hydrogen keeps its relatively shortest bond and every other one at most this much longer (a bridge).
_BRIDGE_TOLERANCE = 1.1


def covalent_bonds(atoms: System, factor: float = BOND_FACTOR) -> Tensor:
    """Bonds by covalent radii, both directions, sorted by target, then source.

    Hydrogen has one bond: to a heavy atom if one is near, else to hydrogen; ties within 10 % are all kept.

    Raises:
        ValueError: an atom is bonded to an image of itself, or twice to the same atom (an endless network).
    """
    radius = _covalent_radii(atoms.z)
    (source, target), shift = atoms.pairs(atoms.pos, atoms.batch, 2.0 * factor * float(radius.max()), parts=False)
    vec = (atoms.pos[source] - atoms.pos[target]).double()
    if shift is not None:
        cell = required(atoms.cell).double()
        vec = vec + torch.bmm(shift.double().unsqueeze(1), cell[atoms.batch[target]]).squeeze(1)
    ratio = vec.norm(dim=1) / (radius[source] + radius[target])
    near = ratio < factor
    source, target, ratio = source[near], target[near], ratio[near]
    keep = _one_bond_per_hydrogen(atoms.z == 1, source, target, ratio)
    bonds = torch.stack([source[keep], target[keep]])
    if shift is not None and bonds.shape[1]:
        twice = (bonds[:, 1:] == bonds[:, :-1]).all(dim=0)
        loops = torch.cat([bonds[:, bonds[0] == bonds[1]], bonds[:, 1:][:, twice]], dim=1)
        if loops.shape[1]:
            raise ValueError(_endless(int(loops[0, 0]), int(loops[1, 0])))
    return bonds


def check_lengths(atoms: System, bonds: Tensor) -> None:
    """Raise ValueError for an impossibly long bond: its atoms were moved apart, or renumbered."""
    source, target = bonds
    vec = (atoms.pos[source] - atoms.pos[target]).double()
    if atoms.pbc is not None:
        graph, cell = atoms.batch[target], required(atoms.cell)
        step, _ = nearest_images(vec, graph, cell, atoms.pbc, _CLEAR)
        vec = vec + torch.bmm(step.unsqueeze(1), cell.double()[graph]).squeeze(1)
    radius = _covalent_radii(atoms.z)
    torn = (vec.norm(dim=1) > _TORN * (radius[source] + radius[target])).nonzero().flatten().tolist()
    if torn:
        first, second = sorted(bonds[:, torn[0]].tolist())
        raise ValueError(
            f"bonds that were given or shared join atoms {first} and {second}, which are now "
            f"{float(vec[torn[0]].norm()):.2f} angstrom apart: atoms were moved or reordered after the scheme was "
            "applied; apply the scheme (or share_topology) afterwards"
        )


def _covalent_radii(z: Tensor) -> Tensor:
    from ase.data import covalent_radii

    return torch.from_numpy(np.asarray(covalent_radii, dtype=np.float64)).to(z.device)[z]


def _one_bond_per_hydrogen(hydrogen: Tensor, source: Tensor, target: Tensor, ratio: Tensor) -> Tensor:
    """Mask of the bonds that remain if hydrogens keep only their shortest bond."""
    num_atoms = hydrogen.shape[0]
    saturated = torch.zeros_like(hydrogen)  # hydrogens that have a heavy neighbour
    saturated[target[hydrogen[target] & ~hydrogen[source]]] = True
    between = hydrogen[source] & hydrogen[target]
    allowed = ~(between & (saturated[source] | saturated[target]))
    best = torch.full((num_atoms,), torch.inf, dtype=ratio.dtype, device=ratio.device)
    best = best.scatter_reduce(0, target[allowed], ratio[allowed], "amin")
    at_target = ~hydrogen[target] | (ratio <= _BRIDGE_TOLERANCE * best[target])
    at_source = ~hydrogen[source] | (ratio <= _BRIDGE_TOLERANCE * best[source])
    return allowed & at_target & at_source


def _endless(first: int, second: int) -> str:
    return (
        f"BondTree needs molecules, but the bonds through atoms {first} and {second} form a network "
        "without end across the periodic cell; use NestedShells for crystals and polymers, or pass the bonds "
        "of the molecules under the key 'bonds'"
    )


def components(num_nodes: int, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Connected component of each node, numbered by their smallest node."""
    label = np.arange(num_nodes)
    while True:
        low = label.copy()
        np.minimum.at(low, target, label[source])
        np.minimum.at(low, source, label[target])
        low = low[low]  # pointer jumping: long chains converge in few rounds
        if np.array_equal(low, label):
            return np.unique(label, return_inverse=True)[1].reshape(num_nodes)
        label = low


def bridges(num_nodes: int, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mask of the edges that are in no ring. Edges are given in both directions, each once."""
    start = np.searchsorted(target, np.arange(num_nodes + 1)).tolist()
    neighbour = source.tolist()
    entered, low = [-1] * num_nodes, [0] * num_nodes
    found: set[tuple[int, int]] = set()
    clock = 0
    for root in range(num_nodes):
        if entered[root] >= 0 or start[root] == start[root + 1]:
            continue
        entered[root] = low[root] = clock
        clock += 1
        stack = [(root, -1, start[root])]
        while stack:
            node, parent, edge = stack.pop()
            if edge < start[node + 1]:
                stack.append((node, parent, edge + 1))
                other = neighbour[edge]
                if entered[other] < 0:
                    entered[other] = low[other] = clock
                    clock += 1
                    stack.append((other, node, start[other]))
                elif other != parent:
                    low[node] = min(low[node], entered[other])
            elif parent >= 0:
                low[parent] = min(low[parent], low[node])
                if low[node] > entered[parent]:
                    found.update(((node, parent), (parent, node)))
    return np.fromiter(((s, t) in found for s, t in zip(neighbour, target.tolist(), strict=True)), bool, len(source))


def fragment_labels(z: np.ndarray, bonds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, piece and molecule of each atom (see BondTree), each numbered by its smallest atom.

    The rules use only the bond graph and the atomic numbers, and treat all atoms alike, so the labels are equivariant
    under automorphisms of the bond graph.
    """
    num_atoms, (source, target) = len(z), bonds
    hydrogen = z == 1
    num_heavy = np.bincount(target[~hydrogen[source]], minlength=num_atoms)
    joins = hydrogen[target] & ~hydrogen[source] & (num_heavy[target] == 1)
    bare = hydrogen & (num_heavy == 0)
    joins |= bare[source] & bare[target]
    group = components(num_atoms, source[joins], target[joins])

    num_groups = int(group.max()) + 1
    ends = np.stack([group[target], group[source]])
    ends = np.unique(ends[:, ends[0] != ends[1]], axis=1)  # sorted by target, then source
    degree = np.bincount(ends[0], minlength=num_groups)
    rotatable = bridges(num_groups, ends[1], ends[0]) & (degree[ends[0]] > 1) & (degree[ends[1]] > 1)
    piece = components(num_groups, ends[1][~rotatable], ends[0][~rotatable])[group]
    return group, piece, components(num_atoms, source, target)


#: Bonds are shorter than this many times the sum of their covalent radii.
_TORN = 2.0
#: A bond is ambiguous, and rejected, if its next image is less than this many times as long.
_CLEAR = 1.05


def unwrap(atoms: System, bonds: Tensor) -> Tensor:
    """Lattice image of each atom that puts its molecule together: ``pos + image @ cell`` is contiguous.

    Every bond joins nearest images. The first atom of each molecule is not moved.

    Raises:
        ValueError: two images of a bond are about equally long, or the bonds form an endless periodic network.
    """
    source, target = bonds
    graph = atoms.batch[target]
    vec = (atoms.pos[source] - atoms.pos[target]).double()
    step, ratio = nearest_images(vec, graph, required(atoms.cell), required(atoms.pbc), _CLEAR)
    unclear = (ratio < _CLEAR).nonzero().flatten().tolist()
    if unclear:
        first, second = sorted(bonds[:, unclear[0]].tolist())
        raise ValueError(
            f"BondTree cannot tell which image of atom {second} atom {first} is bonded to: two are about equally "
            "far. The bond has broken, or the cell is too small; find the bonds anew, take a larger cell, or use "
            "NestedShells"
        )
    image, broken = follow_images(atoms.z.shape[0], source, target, step)
    if len(broken):
        raise ValueError(_endless(int(source[broken[0]]), int(target[broken[0]])))
    return image.to(atoms.pos.dtype)


def follow_images(num_nodes: int, source: Tensor, target: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Images of the nodes of a graph by ``image[source] = image[target] + step``, and the edges that disagree.

    Edges are given in both directions. The first node of each connected part has image 0; edges that disagree close a
    loop around the cell.
    """
    component = components(num_nodes, source.cpu().numpy(), target.cpu().numpy())
    known = torch.zeros(num_nodes, dtype=torch.bool, device=step.device)
    known[torch.from_numpy(np.unique(component, return_index=True)[1]).to(step.device)] = True
    image = step.new_zeros(num_nodes, 3)
    while bool((new := known[target] & ~known[source]).any()):
        image[source[new]] = image[target[new]] + step[new]
        known[source[new]] = True
    return image, (image[source] != image[target] + step).any(dim=1).nonzero().flatten()
