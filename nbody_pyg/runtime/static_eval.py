"""Shared by compiled programs and CUDA graphs: a system as a list of tensors, and evaluation without checks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbody_pyg.hierarchy.survivors import SmoothSurvivors
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.kernels.operands import check_range
from nbody_pyg.network import MODEL_INPUTS
from nbody_pyg.nn.term import covering_edges, search
from nbody_pyg.potential import Potential, parameter_gradients
from nbody_pyg.required import required
from nbody_pyg.system import Species, System

#: Largest difference from eager mode, relative to the largest number of a result.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Layout:
    """How a list of tensors represents a system: for each field the number of its tensor, or None.

    ``fields``: z, batch, cell, pbc, numbers of the elements, periodic, then num_parts, batch, child_index, child_shift,
    pair_index, pair_shift level by level, then index and shift of each list of ``cutoffs``. Fields that share a tensor
    share a number (shells of one radius compute their features once). ``modules`` are the network and the terms: a
    program knows those of the time when it was recorded, and is none for a potential that has got others.
    """

    fields: tuple[int | None, ...]
    levels: int
    stress: bool
    cutoffs: tuple[float, ...]
    modules: tuple[nn.Module | None, ...]

    @property
    def results(self) -> tuple[str, ...]:
        """Names of what :func:`evaluate` returns."""
        return ("interaction_energy", "forces", *["stress"] * self.stress, "energy")


def recordable(
    potential: Potential, stress: bool, z: Any, pos: Any = None, batch: Any = None, **keywords: Any
) -> System | None:
    """The checked system of a call; None if a recorded program cannot compute its energy.

    This is so for charges, spins, long range, and :class:`~nbody_pyg.hierarchy.SmoothSurvivors`, whose number of
    nonzero weights depends on the positions. It is also so for a term that does not know all elements of the network,
    and for a stress without a cell, for which eager mode raises the error.
    """
    system = potential.system(z, pos, batch, **{key: keywords.get(key) for key in MODEL_INPUTS})
    # The scheme is checked too: if there is no topology yet, eager mode searches for one
    centre = () if system.topology is None else system.topology.centre
    survivors = isinstance(potential.scheme, SmoothSurvivors) or any(index is not None for index in centre)
    charged = any(value is not None for value in (system.total_charge, system.formal_charges, system.spin))
    known = [term.species for term in (potential.reference, *potential.interactions()) if term is not None]
    foreign = any(species is not None and not set(required(potential.species)) <= set(species) for species in known)
    if survivors or charged or foreign or potential.network.long_range or (stress and system.cell is None):
        return None
    return (
        system if system.topology is not None else system.replace(topology=required(potential.scheme).compose(system))
    )


def flatten(potential: Potential, system: System, stress: bool) -> tuple[list[Tensor], Layout]:
    """A system with a topology as tensors, positions first, each the very object that it holds unless that has a
    gradient; and lists of neighbours for the terms that need more than its edges."""
    topology = system.topology
    count = topology.num_levels
    reach = {term.cutoff for term in potential.interactions() if term.cutoff is not None}
    cutoffs = tuple(cutoff for cutoff in sorted(reach) if covering_edges(potential.scheme, cutoff) is None)
    batches = [system.batch, *(topology.batch(k) for k in range(1, count))]
    columns = (topology.num_parts, batches, topology.child_index, topology.child_shift,
               topology.pair_index, topology.pair_shift, *(search(system, cutoff) for cutoff in cutoffs))  # fmt: skip
    species = None if system.species is None else system.species.index
    values = [system.z, system.batch, system.cell, system.pbc, species, topology.periodic, *itertools.chain(*columns)]
    tensors, numbers = [system.pos.detach()], {}
    for value in values:
        if value is not None and id(value) not in numbers:
            numbers[id(value)] = len(tensors)
            tensors.append(value.detach() if value.requires_grad else value)
    fields = tuple(None if value is None else numbers[id(value)] for value in values)
    modules = (potential.model, potential.reference, *potential.interactions())
    return tensors, Layout(fields, count, stress, cutoffs, modules)


def check_edges(topology: Topology) -> None:
    """Check the indices of edges, because compiled code does not.

    Raises: ValueError: an edge that points outside of its levels.
    """
    for level in range(topology.num_levels):
        size, child, pair = topology.size(level), topology.child_index[level], topology.pair_index[level]
        if child is not None and (level == 1 or child is not topology.child_index[level - 1]):
            check_range(f"child_index[{level}][0]", child[0], topology.size(level - 1))
            check_range(f"child_index[{level}][1]", child[1], size)
        if pair is not None:
            check_range(f"pair_index[{level}]", pair, size)


def evaluate(potential: Potential, layout: Layout, create_graph: bool, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The results of the potential, as ``layout.results`` names them. No value is read, so nothing waits for a GPU."""
    count, tail = layout.levels, -2 * len(layout.cutoffs) or None
    values: list[Any] = [None if n is None else tensors[n] for n in layout.fields]
    z, batch, cell, pbc, index, periodic, *fields = values
    parts, batches, child, child_shift, pair, pair_shift = (tuple(fields[k * count :][:count]) for k in range(6))
    topology = Topology(parts, child, pair, child_shift, pair_shift, None, periodic).assume(batches)
    species = None if index is None else Species(required(potential.species), index)
    system = System(z, tensors[0], batch, topology.num_graphs, cell, pbc, topology=topology, species=species)
    lists = (
        dict(zip(layout.cutoffs, zip(fields[tail::2], fields[tail + 1 :: 2], strict=True), strict=True))
        if tail
        else None
    )
    found = potential.evaluate(system, stress=layout.stress, create_graph=create_graph, lists=lists)
    return [found[name] for name in layout.results]


def check_same(
    found: dict[str, Tensor], wanted: dict[str, Tensor], parameters: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compare results with those of eager mode, and the gradients of a loss on them by some parameters.

    The comparison of gradients frees the graphs of both.

    Raises: ArithmeticError: a relative difference above :data:`TOLERANCE`.
    """
    names = [name for name in found if name != "energy"]  # it includes constants, relative to which errors look small
    pairs = [(found[name], wanted[name]) for name in names]
    if parameters:
        losses = [sum(value.square().sum() for value in column) for column in zip(*pairs, strict=True)]
        pairs += zip(*(parameter_gradients(loss, parameters) for loss in losses), strict=True)
    # As a tensor, so that NaN is kept
    error = float(torch.tensor([_relative(a.detach(), b.detach()) for a, b in pairs]).max())
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"results differ from eager mode by {error:.1e} of their largest number")


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _relative(found: Tensor, wanted: Tensor) -> float:
    size = max(float(wanted.abs().max()), 1e-6) if wanted.numel() else 1.0
    return float((found - wanted).abs().max()) / size if wanted.numel() else 0.0
