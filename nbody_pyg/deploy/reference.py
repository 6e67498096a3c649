"""Source of the bonds of a deployed model: the molecule it was trained on, and comparison with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import AtomicData, has_hierarchy
from nbody_pyg.hierarchy import BondTree, Scheme, Topology, share_topology
from nbody_pyg.io.model_file import read_metadata
from nbody_pyg.system import System

#: Number of bonds that a message lists.
_MOST_NAMED = 4


def reference_record(frame: Data) -> dict[str, Any]:
    """The record in a model file of the frame whose parts all training frames shared, for
    :func:`reference_topology`."""
    return {key: None if frame.get(key) is None else frame[key].tolist() for key in ("z", "pos", "cell", "pbc")}


def reference_topology(
    metadata: Mapping[str, Any], scheme: Scheme, z: Sequence[int], periodic: bool = False
) -> Topology | None:
    """The topology that the model was trained with, if it has one for atoms ``z`` in this order, else None.

    A model trained on one molecule uses the bonds of one frame; a stretched bond must not change the hierarchy, and
    with it the energy. Also None if the scheme keeps no parts.

    Args:
        periodic: the atoms are in a cell. Files of earlier versions do not record this, and have no topology for it.
    """
    found = metadata.get("reference")
    if found is None or not scheme.keeps_parts or list(found["z"]) != list(z) or (periodic and "pbc" not in found):
        return None
    lattice = {
        key: None if found.get(key) is None else torch.tensor(found[key], dtype=dtype)
        for key, dtype in (("cell", torch.float64), ("pbc", torch.bool))
    }
    return scheme.topology(torch.tensor(found["z"]), torch.tensor(found["pos"], dtype=torch.float64), **lattice)


def is_periodic(pbc: Tensor | None) -> bool:
    """Whether some direction repeats."""
    return pbc is not None and bool(pbc.any())


def with_reference(frames: Sequence[Data], path: str | Path, scheme: Scheme | None) -> Sequence[Data]:
    """Frames with hierarchies, shared with the training frames if these are the same molecule."""
    if scheme is None:
        return frames
    metadata, out = read_metadata(path)["metadata"], []
    for frame in frames:
        tree = reference_topology(metadata, scheme, frame.z.tolist(), is_periodic(frame.get("pbc")))
        out.append(scheme(frame) if tree is None else share_topology([frame], scheme, tree)[0])
    return out


def parts_of_reference(reference: Any, scheme: Scheme) -> tuple[list[int], Topology]:
    """Atomic numbers and parts of a structure (ASE's Atoms, or Data with what the scheme reads, such as labels)."""
    data = reference if isinstance(reference, Data) else AtomicData.from_ase(reference, labels=False)
    data = data if has_hierarchy(data) else scheme(data)
    return data.z.tolist(), scheme.read(data)


def bond_changes(scheme: Scheme | None, topology: Topology | None, system: System) -> str | None:
    """How the bonds of one structure, as found at these positions, differ from those of ``topology``; None: not at all.

    Schemes without bonds never differ.
    """
    if not isinstance(scheme, BondTree) or topology is None:
        return None
    try:
        broken, formed = scheme.bond_changes(topology, system)
    except ValueError as error:  # an infinite network of bonds through the cell
        return str(error)
    return describe_bonds(system.z, broken, formed)


def describe_bonds(z: Tensor, broken: Sequence[tuple[int, int]], formed: Sequence[tuple[int, int]]) -> str | None:
    """Bonds in words, "broken: O2-H8; formed: C0-C5"; None where there are none."""

    def named(bonds: Sequence[tuple[int, int]]) -> str:
        atoms = [[f"{chemical_symbols[int(z[i])]}{i}" for i in bond] for bond in bonds[:_MOST_NAMED]]
        more = f" and {len(bonds) - _MOST_NAMED} more" if len(bonds) > _MOST_NAMED else ""
        return ", ".join(map("-".join, atoms)) + more

    words = [f"{what}: {named(bonds)}" for what, bonds in (("broken", broken), ("formed", formed)) if bonds]
    return "; ".join(words) or None
