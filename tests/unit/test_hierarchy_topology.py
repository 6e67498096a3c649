"""Topology and Hierarchy: the definition of a composition scheme, checked node by node."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

from factories import net
from nbody_pyg.hierarchy import BondTree, Hierarchy, NestedShells, SmoothSurvivors, Topology


def _two_graphs() -> Topology:
    """Graph 0: atoms 0-2 in parts {0, 1}, {1, 2}; graph 1: atoms 3, 4 in one part."""
    return Topology(
        num_parts=(torch.tensor([3, 2]), torch.tensor([2, 1]), torch.tensor([1, 1])),
        child_index=(
            None,
            torch.tensor([[0, 1, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2]]),
            torch.tensor([[0, 1, 2], [0, 0, 1]]),
        ),
        pair_index=(None, torch.tensor([[1, 0], [0, 1]]), None),
    )


def test_sizes_batches_and_parts():
    topology = _two_graphs().validate()
    assert repr(topology) == "Topology(5 -> 3 -> 2, graphs=2)"
    assert [topology.size(k) for k in range(3)] == [5, 3, 2]
    assert topology.batch(0).tolist() == [0, 0, 0, 1, 1]
    assert topology.batch(1).tolist() == [0, 0, 1]
    assert topology.batch(1) is topology.batch(1), "computed once"
    assert topology.parts(1).tolist() == [[0, 1, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2]]
    # Atom 1 lies in both parts of graph 0 and counts once in its root
    assert topology.parts(-1).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1]]


def _edit(level: int, edges: list[list[int]], which: str = "child_index") -> Topology:
    topology = _two_graphs()
    values = list(getattr(topology, which))
    values[level] = torch.tensor(edges)
    return replace(topology, **{which: tuple(values)})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda: _edit(1, [[0, 1, 1, 2, 3, 9], [0, 0, 1, 1, 2, 2]]),
            r"0 to 4 in row 0, but column 5 holds 9",
        ),
        (lambda: _edit(1, [[0, 1, 1, 2, 3, 4], [0, 0, 1, 1, 2, -1]]), r"row 1, but column 5 holds -1"),
        (
            lambda: _edit(1, [[0, 1, 1, 2, 3, 4], [0, 0, 1, 1, 2, 0]]),
            r"atom 4 \(graph 1\) and its parent part 0 of level 1 \(graph 0\) must lie in the same graph",
        ),
        (lambda: _edit(1, [[0, 1, 1, 2], [0, 0, 1, 1]]), r"part 2 of level 1 \(graph 1\) has no child"),
        (
            lambda: _edit(1, [[0, 1, 1, 3, 4], [0, 0, 1, 2, 2]]),
            r"atom 2 \(graph 0\) has no parent at level 1, so the root misses its atoms",
        ),
        (lambda: _edit(2, [[0, 2], [0, 1]]), r"part 1 of level 1 \(graph 0\) has no parent at level 2"),
        (
            lambda: _edit(1, [[0, 0, 1, 1, 2, 3, 4], [0, 0, 0, 1, 1, 2, 2]]),
            r"atom 0 \(graph 0\) is listed twice as a child of part 0 of level 1",
        ),
        (lambda: _edit(1, [[0, 1, 2]]), r"child_index\[1\] must be integers of shape \[2, edges\]"),
        (lambda: _edit(1, [[1], [0]], "pair_index"), r"has \(1, 0\) without \(0, 1\)"),
        (
            lambda: _edit(1, [[1, 1], [1, 1]], "pair_index"),
            r"part 1 of level 1 \(graph 0\) is paired with itself",
        ),
        (lambda: _edit(1, [[2, 0], [0, 2]], "pair_index"), "are a pair, but must lie in the same graph"),
        (lambda: _edit(1, [[1, 0, 0], [0, 1, 1]], "pair_index"), "twice"),
        (
            lambda: replace(_two_graphs(), num_parts=(*_two_graphs().num_parts[:2], torch.tensor([1, 2]))),
            "graph 1 has two roots or more",
        ),
        (
            lambda: replace(_two_graphs(), num_parts=(*_two_graphs().num_parts[:2], torch.tensor([1, 0]))),
            "graph 1 has no root",
        ),
        (
            lambda: replace(_two_graphs(), num_parts=(torch.tensor([5, 0]), *_two_graphs().num_parts[1:])),
            "graph 1 has no atom",
        ),
    ],
)
def test_validate_names_the_node(broken, message):
    with pytest.raises(ValueError, match=message):
        broken().validate()


def test_one_entry_per_level_is_required():
    with pytest.raises(ValueError, match=r"child_index must have one entry per level \(2\), got 1"):
        Topology((torch.tensor([1]), torch.tensor([1])), (None,))


def test_store_and_read_back():
    topology = _two_graphs()
    data = topology.store(Data(pos=torch.zeros(5, 3), batch=torch.tensor([0, 0, 0, 1, 1]), child_7=1))
    assert "child_7" not in data, "keys of an older hierarchy go"
    again = Topology.from_data(data)
    for k in range(3):
        assert torch.equal(again.num_parts[k], topology.num_parts[k])
    assert torch.equal(again.child_index[1], topology.child_index[1])
    assert again.pair_index[0] is None
    assert torch.equal(again.pair_index[1], topology.pair_index[1])


def test_data_without_hierarchy_says_what_to_do():
    with pytest.raises(ValueError, match=r"num_parts_1.*transform=BondTree\(\)"):
        Topology.from_data(Data(z=torch.ones(1), pos=torch.zeros(1, 3)))


def test_to_moves_everything():
    moved = _two_graphs().to("meta")
    assert moved.device.type == "meta"
    assert moved.child_index[1].device.type == "meta"
    assert moved.child_shift == (None, None, None)


@pytest.mark.parametrize(
    ("edges", "num_atoms", "message"),
    [
        ([[0, 1, 2, 3, 4], [2, 2, 3, 4, 3]], 2, r"cycle 3 <- 4 <- 3|cycle 4 <- 3 <- 4"),
        ([[0, 1], [2, 3]], 2, r"one root, but nodes \[2, 3\] have no parent"),
        ([[0], [2]], 2, "atom 1 has no parent"),
        ([[0, 1, 3], [2, 2, 2]], 2, "node 3 has no child and is no atom"),
        ([[0, 1, 2], [2, 2, 1]], 2, "atom 1 must be a leaf, but has the child 2"),
        ([[0, 0, 1], [2, 2, 2]], 2, r"each edge once, but \(0, 2\) is repeated"),
        ([[0, -1], [2, 2]], 2, "nodes from 0"),
        ([[], []], 0, "num_atoms must be at least 1"),
        ([[0.5], [1.5]], 1, "edges must be integers"),
    ],
)
def test_from_dag_names_the_node(edges, num_atoms, message):
    with pytest.raises(ValueError, match=message):
        Topology.from_dag(torch.tensor(edges, dtype=None if edges[0] else torch.long), num_atoms)


def test_from_dag_inserts_pass_through_nodes():
    # Node 3 = {0, 1}; the root 4 takes 3 and, skipping a level, atom 2
    topology = Topology.from_dag(torch.tensor([[0, 1, 3, 2], [3, 3, 4, 4]]), 3)
    assert repr(topology) == "Topology(3 -> 2 -> 1, graphs=1)"
    assert topology.child_index[1].tolist() == [[2, 0, 1], [0, 1, 1]]
    assert topology.parts(1).tolist() == [[2, 0, 1], [0, 1, 1]]
    assert topology.parts(2).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_from_dag_of_one_atom():
    topology = Topology.from_dag(torch.zeros(2, 0, dtype=torch.long), 1)
    assert repr(topology) == "Topology(1 -> 1, graphs=1)"


@given(st.data())
def test_from_dag_keeps_the_part_of_every_node(data):
    num_atoms = data.draw(st.integers(2, 6))
    parts = [{atom} for atom in range(num_atoms)]
    edges = []
    for node in range(num_atoms, num_atoms + data.draw(st.integers(0, 5))):
        below = data.draw(st.sets(st.integers(0, node - 1), min_size=1))
        parts.append(set().union(*(parts[child] for child in below)))
        edges += [(child, node) for child in below]
    root = len(parts)
    edges += [(node, root) for node in range(root) if all(child != node for child, _ in edges)]
    edges += [(root - 1, root)] if not any(parent == root for _, parent in edges) else []
    topology = Topology.from_dag(torch.tensor(edges).t(), num_atoms)
    found = [_part_sets(topology, k) for k in range(topology.num_levels)]
    everything = set().union(*found)
    assert {frozenset(part) for part in parts} <= everything | {frozenset(range(num_atoms))}
    assert found[-1] == {frozenset(range(num_atoms))}


def _part_sets(topology, level):
    atom, part = topology.parts(level)
    return {frozenset(atom[part == k].tolist()) for k in range(topology.size(level))}


def test_a_scheme_equals_the_levels_of_its_dag(molecule):
    z, pos = molecule
    tree = BondTree().topology(z, pos)
    edges, start = [], 0
    for k in range(1, tree.num_levels):
        offset = torch.tensor([[start], [start + tree.size(k - 1)]])
        edges.append(tree.child_index[k] + offset)
        start += tree.size(k - 1)
    again = Topology.from_dag(torch.cat(edges, dim=1), len(z))
    for k in range(1, tree.num_levels):
        assert torch.equal(again.child_index[k], tree.child_index[k])


def _hierarchy(molecule) -> Hierarchy:
    z, pos = molecule
    scheme = NestedShells((2.0,))
    return scheme.hierarchy(scheme.topology(z, pos), z, pos)


def test_hierarchy_is_a_sequence_of_levels(molecule):
    hierarchy = _hierarchy(molecule).validate()
    n = len(molecule[0])
    assert len(hierarchy) == 3
    assert hierarchy.root is hierarchy[-1]
    assert [level.num_parts for level in hierarchy] == [n, n, 1]
    assert repr(hierarchy) == f"Hierarchy({n} -> {n} -> 1, graphs=1)"
    assert repr(hierarchy.root) == f"Level(parts=1, children={n}, pairs=0)"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("child_weight", lambda level: level.child_weight * 2, r"child_weight of level 1 .* in \[0.0, 1.0\]"),
        ("pos", lambda level: level.pos * torch.nan, "pos of level 1 must be finite"),
        ("child_vec", lambda level: level.child_vec[:-1], "child_vec of level 1 must have shape"),
        ("child_weight", lambda level: None, "child_weight of level 1 must have shape"),
    ],
)
def test_hierarchy_validate_names_the_tensor(molecule, name, value, message):
    hierarchy = _hierarchy(molecule)
    level = replace(hierarchy[1], **{name: value(hierarchy[1])})
    with pytest.raises(ValueError, match=message):
        replace(hierarchy, levels=(hierarchy[0], level, hierarchy[2])).validate()


@pytest.mark.parametrize("scheme", [NestedShells(), BondTree(), SmoothSurvivors()], ids=lambda s: type(s).__name__)
def test_a_periodic_topology_needs_its_cell(scheme, molecules):
    """Without the cell the images of the atoms would be taken to be in one place."""
    z, pos = molecules["ethanol"]
    network, cell, pbc = net(scheme), 6.0 * torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    topology = scheme.topology(z, pos, cell=cell, pbc=pbc)
    value = network(z, pos, cell=cell, pbc=pbc, topology=topology)
    assert (value - network(z, pos)).abs() > 1e-4
    with pytest.raises(ValueError, match="cell must be given with the topology of a periodic system, got None; pass"):
        network(z, pos, topology=topology)
