"""Checks of the definition of a composition scheme; every message names the node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Edges = tuple[Tensor | None, Tensor | None]  # indices and optional lattice shifts


def validate_parts(
    num_parts: Sequence[Tensor],
    batch: Callable[[int], Tensor],
    children: Sequence[Edges],
    pairs: Sequence[Edges],
    images: bool = False,
) -> None:
    r"""Raise unless parts and edges are a composition scheme, those of a :class:`~nbody_pyg.hierarchy.Topology`.

    A DAG in levels whose leaves are the atoms, with one root per graph that holds all atoms (a graph without atoms
    has no part at any level), and :math:`P_c \subseteq P_P` along every child edge. Edges join neighbouring levels,
    so there are no cycles, parts grow along edges by construction, and a root that every node reaches holds all
    atoms: it remains to check that each node has a parent and each part a child, and that edges are in range and within
        one graph.

    Args:
        num_parts: number of parts of each graph, level by level.
        batch: gives the graph of each part of a level.
        children: edges from the level below, level by level.
        pairs: edges within the level.
        images: allow repeated edges and self pairs, as periodic images give them (also allowed with shifts).

    Raises:
        ValueError: naming the level, the node and the rule.
    """
    if len(num_parts) < 2:
        raise ValueError("a hierarchy must have at least the atoms and the root, got a single level")
    for k, counts in enumerate(num_parts):
        if counts.shape != num_parts[0].shape or counts.is_floating_point():
            raise ValueError(
                f"num_parts[{k}] must be integers of shape {list(num_parts[0].shape)}, one per "
                f"graph, got {counts.dtype} {list(counts.shape)}"
            )
    filled = torch.stack(list(num_parts)).sum(dim=0) > 0
    for k, counts in enumerate(num_parts):
        empty = ((counts < 1) & filled).nonzero().flatten().tolist()
        if empty:
            what = "atom" if k == 0 else "root" if k == len(num_parts) - 1 else "part"
            raise ValueError(f"graph {empty[0]} has no {what} at level {k}; every level needs at least one")
    roots = num_parts[-1]
    many = ((roots != 1) & filled).nonzero().flatten().tolist()
    if many:
        raise ValueError(
            f"graph {many[0]} has two roots or more ({int(roots[many[0]])} parts at the last level, "
            f"{len(num_parts) - 1}); add a level with one part above them"
        )
    graphs = [batch(k) for k in range(len(num_parts))]
    for k in range(len(num_parts)):
        _check_children(graphs, k, *children[k], images)
        _check_pairs(graphs, k, *pairs[k], images)


def _name(graphs: Sequence[Tensor], level: int, node: int) -> str:
    """Name of a node: atom 3 (graph 0), part 2 of level 1 (graph 0)."""
    if level == 0:
        return f"atom {node} (graph {int(graphs[0][node])})"
    return f"part {node} of level {level} (graph {int(graphs[level][node])})"


def _check_edges(name: str, index: Tensor, shift: Tensor | None, sizes: tuple[int, int]) -> None:
    if index.dim() != 2 or index.shape[0] != 2 or index.is_floating_point():
        raise ValueError(f"{name} must be integers of shape [2, edges], got {index.dtype} {list(index.shape)}")
    if shift is not None and tuple(shift.shape) != (index.shape[1], 3):
        raise ValueError(f"the shifts of {name} must have shape [{index.shape[1]}, 3], got {list(shift.shape)}")
    for row, size in enumerate(sizes):
        bad = ((index[row] < 0) | (index[row] >= size)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name} must name nodes 0 to {size - 1} in row {row}, but column {bad[0]} holds "
                f"{int(index[row, bad[0]])}"
            )


def _repeated(index: Tensor, shift: Tensor | None, num_sources: int) -> int | None:
    """A column that occurs twice, if any."""
    rows = index.t() if shift is None else torch.cat([index.t().to(shift.dtype), shift], dim=1)
    _, inverse, count = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    twice = (count[inverse] > 1).nonzero().flatten().tolist()
    return twice[0] if twice else None


def _check_children(
    graphs: Sequence[Tensor], level: int, index: Tensor | None, shift: Tensor | None, images: bool
) -> None:
    if level == 0:
        if index is not None:
            raise ValueError("child_index[0] must be None: atoms are leaves and have no children")
        return
    if index is None:
        raise ValueError(f"child_index[{level}] must be a tensor [2, edges], got None; only atoms have no children")
    below, here = len(graphs[level - 1]), len(graphs[level])
    _check_edges(f"child_index[{level}]", index, shift, (below, here))
    cross = (graphs[level - 1][index[0]] != graphs[level][index[1]]).nonzero().flatten().tolist()
    if cross:
        child, parent = index[:, cross[0]].tolist()
        raise ValueError(
            f"{_name(graphs, level - 1, child)} and its parent {_name(graphs, level, parent)} must "
            "lie in the same graph; shift the indices of each graph when you batch by hand"
        )
    childless = (torch.bincount(index[1], minlength=here) == 0).nonzero().flatten().tolist()
    if childless:
        raise ValueError(f"{_name(graphs, level, childless[0])} has no child; every part needs at least one")
    orphans = (torch.bincount(index[0], minlength=below) == 0).nonzero().flatten().tolist()
    if orphans:
        raise ValueError(
            f"{_name(graphs, level - 1, orphans[0])} has no parent at level {level}, so the root "
            "misses its atoms; give it a parent (a part of its own will do)"
        )
    if not images and (column := _repeated(index, shift, below)) is not None:
        child, parent = index[:, column].tolist()
        raise ValueError(
            f"{_name(graphs, level - 1, child)} is listed twice as a child of "
            f"{_name(graphs, level, parent)}; children form a set, remove the repeated edge"
        )


def _check_pairs(
    graphs: Sequence[Tensor], level: int, index: Tensor | None, shift: Tensor | None, images: bool
) -> None:
    if index is None:
        return
    size = len(graphs[level])
    _check_edges(f"pair_index[{level}]", index, shift, (size, size))
    batch = graphs[level]
    cross = (batch[index[0]] != batch[index[1]]).nonzero().flatten().tolist()
    if cross:
        first, second = (_name(graphs, level, node) for node in index[:, cross[0]].tolist())
        raise ValueError(f"{first} and {second} are a pair, but must lie in the same graph for that")
    if images:
        return
    same = index[0] == index[1]
    if shift is not None:
        same = same & (shift == 0).all(dim=1)
    if bool(same.any()):
        node = int(index[0, same.nonzero()[0, 0]])
        raise ValueError(f"{_name(graphs, level, node)} is paired with itself; remove the self pair")
    if (column := _repeated(index, shift, size)) is not None:
        raise ValueError(f"pair_index[{level}] lists the pair {index[:, column].tolist()} twice; remove one")
    both = torch.cat([index, index.flip(0)], dim=1)
    both_shift = None if shift is None else torch.cat([shift, -shift])
    rows = both.t() if both_shift is None else torch.cat([both.t().to(both_shift.dtype), both_shift], dim=1)
    _, inverse, count = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    single = (count[inverse[: index.shape[1]]] == 1).nonzero().flatten().tolist()
    if single:
        source, target = index[:, single[0]].tolist()
        raise ValueError(
            f"pair_index[{level}] must hold both directions, but has ({source}, {target}) without "
            f"({target}, {source}); add the reversed pairs"
        )
