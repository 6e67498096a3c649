"""Convert a user's DAG of parts into levels."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def levels_of_dag(
    edges: Int[Tensor, "2 edges"], num_atoms: int
) -> tuple[tuple[Int[Tensor, "1"], ...], tuple[Int[Tensor, "2 _"] | None, ...]]:
    """Assign levels to a DAG of parts of one system.

    A node's level is the length of the longest path from an atom to it. Where an edge skips levels, one pass-through
    node per skipped level represents the child there (shared by all its parents): a part with one child and the same
    atoms, so the composition scheme stays the same.

    Args:
        edges: [2, E], row 0 the child, row 1 the parent; nodes 0 to ``num_atoms - 1`` are the atoms.
        num_atoms: number of atoms, at least 1.

    Returns:
        ``num_parts`` and ``child_index`` of a :class:`~nbody_pyg.hierarchy.Topology`. Parts are numbered by their
        node within each level.

    Raises:
        ValueError: naming the node: a cycle, two roots, an atom without a parent, a part without atoms, an
            atom
            with children, a repeated edge.
    """
    if num_atoms < 1:
        raise ValueError(f"num_atoms must be at least 1, got {num_atoms}")
    edges = torch.as_tensor(edges)
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        raise ValueError(f"edges must be integers of shape [2, num_edges], got {edges.dtype} {list(edges.shape)}")
    if edges.numel() and int(edges.min()) < 0:
        raise ValueError(f"edges must name nodes from 0, got {int(edges.min())}")
    if edges.numel() == 0:
        edges = torch.tensor([range(num_atoms), [num_atoms] * num_atoms]) if num_atoms == 1 else edges.reshape(2, 0)
    pairs = list(zip(*edges.tolist(), strict=True))
    num_nodes = max([num_atoms - 1, *(node for pair in pairs for node in pair)]) + 1
    children: list[list[int]] = [[] for _ in range(num_nodes)]
    parents: list[list[int]] = [[] for _ in range(num_nodes)]
    for child, parent in pairs:
        if parent in parents[child]:
            raise ValueError(f"edges must hold each edge once, but ({child}, {parent}) is repeated")
        children[parent].append(child)
        parents[child].append(parent)
    level = _levels(children, parents, num_atoms)
    roots = [node for node in range(num_nodes) if not parents[node]]
    if len(roots) > 1:
        orphan = next((node for node in roots if node < num_atoms), None)
        if orphan is not None:
            raise ValueError(f"atom {orphan} has no parent, so the root misses it; add an edge from it to a part")
        raise ValueError(f"the DAG must have one root, but nodes {roots} have no parent; join them under one node")
    return _assemble(parents, level, num_atoms)


def _levels(children: list[list[int]], parents: list[list[int]], num_atoms: int) -> list[int]:
    """Longest path from the atoms, in topological order."""
    for node, below in enumerate(children):
        if node < num_atoms and below:
            raise ValueError(
                f"atom {node} must be a leaf, but has the child {below[0]}; atoms are nodes below {num_atoms}"
            )
        if node >= num_atoms and not below:
            raise ValueError(f"node {node} has no child and is no atom, so its part is empty; remove or fill it")
    waiting = [len(below) for below in children]
    ready = list(range(num_atoms))
    level = [0] * len(children)
    seen = 0
    while ready:
        node = ready.pop()
        seen += 1
        for parent in parents[node]:
            level[parent] = max(level[parent], level[node] + 1)
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
    if seen < len(children):
        stuck = next(node for node, count in enumerate(waiting) if count > 0)
        # Walk down among stuck nodes: the first repeated one lies on a cycle.
        path = [stuck]
        while True:
            lower = next(c for c in children[path[-1]] if waiting[c] > 0)
            if lower in path:
                cycle = [*path[path.index(lower) :], lower]
                raise ValueError(f"edges must form a DAG, but hold the cycle {' <- '.join(map(str, cycle))}")
            path.append(lower)
    return level


def _assemble(
    parents: list[list[int]], level: list[int], num_atoms: int
) -> tuple[tuple[Int[Tensor, "1"], ...], tuple[Int[Tensor, "2 _"] | None, ...]]:
    """Number the nodes (and pass-through nodes) of each level and connect them."""
    top = max(level)
    # A node is present from its own level up to just below its highest parent.
    reach = [max([level[p] - 1 for p in above], default=level[n]) for n, above in enumerate(parents)]
    present = [[n for n in range(len(level)) if level[n] <= k <= reach[n]] for k in range(top + 1)]
    number = [{node: i for i, node in enumerate(nodes)} for nodes in present]
    child_index: list[Tensor | None] = [None]
    for k in range(1, top + 1):
        columns = [(number[k - 1][n], number[k][n]) for n in present[k] if level[n] < k]
        columns += [(number[k - 1][n], number[k][p]) for n in present[k - 1] for p in parents[n] if level[p] == k]
        columns.sort(key=lambda column: column[::-1])  # by parent, then child
        child_index.append(torch.tensor(columns, dtype=torch.long).t().contiguous())
    return tuple(torch.tensor([len(nodes)]) for nodes in present), tuple(child_index)
