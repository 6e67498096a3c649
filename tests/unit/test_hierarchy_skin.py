"""TopologyCache: lists with a skin give what a search at every step gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, ShellsAndPieces
from nbody_pyg.hierarchy import LevelSpec, Scheme, Topology, TopologyCache
from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.radial import vector_window
from nbody_pyg.system import System

SCHEMES = {
    "shells": NestedShells((3.0, 3.0, 2.2)),
    "tree": BondTree(3.0, 3.5, 4.0),
    "pieces": ShellsAndPieces((3.0, 2.2), 4.0),
    "labels": FromAssignment(labels=[i // 3 for i in range(36)], cutoff=3.0, part_cutoffs=(4.5,)),
}


def waters(count: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Molecules of water on a grid, in a cell that they fill."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3))[:count].double() * 3.0
    one = torch.tensor([[0, 0, 0], [0.9572, 0, 0], [-0.24, 0.9266, 0]], dtype=torch.float64)
    turns = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64, generator=generator))[0]
    pos = (grid.unsqueeze(1) + one @ turns.mT).reshape(-1, 3)
    return torch.tensor([8, 1, 1]).repeat(count), pos, torch.diag(torch.tensor([6.0, 6.0, 9.0])).double()[None]


def drift(pos: torch.Tensor, molecules: int) -> torch.Tensor:
    """A step in which molecules move as wholes and their atoms a little."""
    whole = torch.randn(molecules, 1, 3, dtype=torch.float64).expand(-1, len(pos) // molecules, 3).reshape(-1, 3)
    return 0.04 * whole + 0.005 * torch.randn_like(pos)


def assert_same_topology(found: Topology, wanted: Topology) -> None:
    for name in ("child_index", "pair_index"):
        for a, b in zip(getattr(found, name), getattr(wanted, name), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
    for k in range(wanted.num_levels):
        assert found.size(k) == wanted.size(k) and torch.equal(found.batch(k), wanted.batch(k))


@pytest.mark.slow
@pytest.mark.parametrize("periodic", [False, True], ids=["open", "cell"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_trajectory_is_the_same_with_and_without_skin(name, periodic):
    """Edges, energies and forces, through several searches and changes of the cell."""
    scheme = SCHEMES[name]
    z, pos, cell = waters()
    cell, pbc = (cell, torch.ones(1, 3, dtype=torch.bool)) if periodic else (None, None)
    potential = Potential(NBodyNet([1, 8], scheme, channels=4, lmax=1)).double()
    cache, tree = TopologyCache(scheme, skin=0.6), scheme.topology(z, pos, None, cell, pbc)
    for step in range(16):
        pos = pos + drift(pos, 12)
        if periodic and step >= 8:  # barostat: a shear and a change of volume, with the atoms
            bend = torch.eye(3, dtype=torch.float64) + 0.004 * torch.tensor([[1.0, 0.5, 0], [0, -1.5, 0], [0, 0, 1]])
            pos, cell = pos @ bend, cell @ bend
        topology = cache(z, pos, None, cell, pbc)
        tree = scheme.update(tree, z, pos, None, cell, pbc)
        if not (periodic and name == "labels"):  # parts may be held in another image of the cell
            assert_same_topology(topology, tree)
        results = [potential(z, pos, cell=cell, pbc=pbc, topology=t) for t in (topology, tree)]
        assert results[0]["forces"].abs().max() > 1e-3
        for key in ("energy", "forces"):
            torch.testing.assert_close(results[0][key], results[1][key], rtol=0, atol=1e-10)
    assert 2 <= cache.rebuilds <= 12 and cache.calls == 16, "the trajectory tests both kept and new lists"


def test_the_comparison_can_fail(monkeypatch):
    """Lists that are kept for too long miss edges, and the test above would see it."""
    z, pos, _ = waters()
    cache = TopologyCache(SCHEMES["shells"], skin=0.1)
    cache(z, pos)
    monkeypatch.setattr(TopologyCache, "_within", lambda *_: True)
    pos = pos * 0.9
    with pytest.raises(AssertionError):
        assert_same_topology(cache(z, pos), SCHEMES["shells"].topology(z, pos))


def test_levels_of_one_radius_go_on_sharing_their_edges():
    z, pos, _ = waters()
    topology = TopologyCache(SCHEMES["shells"], skin=0.5)(z, pos)
    assert topology.child_index[1] is topology.child_index[2] is not topology.child_index[3]


def test_when_lists_are_searched_again():
    z, pos, cell = waters()
    pbc = torch.ones(1, 3, dtype=torch.bool)
    cache = TopologyCache(NestedShells((3.0,)), skin=0.5)

    def rebuilds(*arguments) -> int:
        cache(*arguments)
        return cache.rebuilds

    moved = pos.clone()
    moved[4, 1] += 0.24
    assert rebuilds(z, pos) == 1 == rebuilds(z, moved), "within half the skin"
    moved[4, 1] += 0.02  # in place: the cache must have kept copies
    assert rebuilds(z, moved) == 2
    assert rebuilds(z[:-3], pos[:-3]) == 3 and rebuilds(z, pos) == 4, "other atoms"
    assert rebuilds(z.flip(0), pos) == 5, "other elements"
    assert rebuilds(z, pos, None, cell, pbc) == 6, "a cell"
    assert rebuilds(z, pos, None, cell, pbc & torch.tensor([True, True, False])) == 7, "other periodicity"
    assert rebuilds(z, pos, None, cell, pbc) == 8
    # Affine changes leave the skin alone but for the strain itself: 3.5 angstrom may shrink to 3.0.
    assert rebuilds(z, 1.5 * pos, None, 1.5 * cell, pbc) == 8, "a list that is stretched holds more than it must"
    cache(z, pos + 9.0, None, cell, pbc)
    assert cache.rebuilds == 9
    assert rebuilds(z, pos + 9.0 - 1e-3, None, cell, pbc) == 9
    assert rebuilds(z, 0.99 * (pos + 9.0), None, 0.99 * cell, pbc) == 9
    assert rebuilds(z, 0.84 * (pos + 9.0), None, 0.84 * cell, pbc) == 10
    assert rebuilds(z, 0.84 * (pos + 9.0), None, 0.9 * cell, pbc) == 11, "atoms that do not follow their cell"
    cache.forget()
    assert rebuilds(z, 0.84 * (pos + 9.0), None, 0.9 * cell, pbc) == 12 and cache.topology is not None


def test_parts_do_not_depend_on_earlier_calls():
    """A bond that breaks within the skin: the tree is that of the positions, or that of ``start``."""
    z, pos, _ = waters(2)
    scheme = BondTree(4.0, 4.0, 4.0)
    stretched = pos.clone()
    stretched[1] = pos[0] + 1.25 / 0.9572 * (pos[1] - pos[0])
    broken = pos.clone()
    broken[1] = pos[0] + 1.28 / 0.9572 * (pos[1] - pos[0])
    cache = TopologyCache(scheme, skin=1.0)
    kept = TopologyCache(scheme, skin=1.0, start=lambda z, pbc: scheme.topology(z, pos))
    for where in (pos, stretched, broken, stretched, broken, pos):
        found, fixed = cache(z, where), kept(z, where)
        assert_same_topology(found, scheme.topology(z, where))
        assert_same_topology(fixed, scheme.update(scheme.topology(z, pos), z, where))
        assert found.size(3) == (3 if where is broken else 2) and fixed.size(3) == 2
    assert kept.rebuilds == 1 and cache.rebuilds == 5


def test_batches_of_copies():
    z, pos, cell = waters()
    batch = torch.arange(2).repeat_interleave(len(z))
    z, pos, cells = z.repeat(2), torch.cat([pos, 0.99 * pos]), torch.cat([cell, 0.99 * cell])
    pbc = torch.tensor([[True, True, True], [True, False, True]])
    scheme = NestedShells((3.0,))
    cache = TopologyCache(scheme)
    cache(z, pos, batch, cells, pbc)
    pos, cells = pos + 0.02 * torch.randn_like(pos), cells * 1.01
    assert_same_topology(cache(z, pos, batch, cells, pbc), scheme.topology(z, pos, batch, cells, pbc))
    assert cache.rebuilds == 1


@pytest.mark.parametrize("name", ["bonds", "labels"])
def test_other_bonds_and_labels_are_searched_again(name):
    """Parts that are given belong to the atoms; while they stay the same, the lists are kept."""
    z, pos, _ = waters(4)
    scheme = BondTree(3.0, 3.5, 4.0) if name == "bonds" else FromAssignment(cutoff=3.0, part_cutoffs=(4.5,))
    found = BondTree().topology(z, pos).bonds
    one, two = (found, found[:, (found != 1).all(dim=0)]) if name == "bonds" else (torch.arange(12) // 3, z)
    cache, rebuilds = TopologyCache(scheme, skin=0.5), []
    for given in (one, one, two.clone(), two, one, one):
        pos = pos + 0.01 * torch.randn_like(pos)
        system = System.from_tensors(z, pos, given={name: given})
        assert_same_topology(cache(system), scheme.compose(system))
        rebuilds.append(cache.rebuilds)
    assert rebuilds == [1, 1, 2, 2, 3, 3]
    if name == "bonds":
        given = System.from_tensors(z, pos, given={name: two})
        assert_same_topology(cache(System.from_tensors(z, pos)), scheme.compose(System.from_tensors(z, pos)))
        assert_same_topology(cache(given), scheme.compose(given))
        assert cache(given).size(3) == 5 and cache(System.from_tensors(z, pos)).size(3) == 4
    changed = two.clone()
    cache(System.from_tensors(z, pos, given={name: changed}))
    changed[..., 0] = changed[..., -1]  # in place: the cache must have kept a copy
    system = System.from_tensors(z, pos, given={name: changed})
    assert_same_topology(cache(system), scheme.compose(system))


def test_graphs_without_atoms_at_the_end_are_counted():
    z, pos, _ = waters(4)
    cache, batch = TopologyCache(NestedShells((3.0,)), skin=0.5), torch.zeros(12, dtype=torch.long)
    for number in (2, 4, 1):
        system = System.from_tensors(z, pos, batch, batch_size=number)
        assert_same_topology(cache(system), NestedShells((3.0,)).compose(system))
        assert cache(system).num_graphs == number


class Nearest(Scheme):
    """A scheme of somebody else that does not say how its lists could be kept."""

    symmetry = continuity = "none"

    def __init__(self) -> None:
        self.levels = (LevelSpec("atoms", None, 3.0), LevelSpec("root", 4.0))
        self.searches = 0

    def build(self, system):
        self.searches += 1
        return FromAssignment(labels=[0] * len(system.z), cutoff=3.0).build(system)


def test_schemes_that_say_nothing_are_updated_at_every_step():
    z, pos, _ = waters()
    scheme = Nearest()
    cache = TopologyCache(scheme)
    for _ in range(3):
        cache(z, pos)
    assert scheme.searches == cache.rebuilds == 3


def test_errors():
    with pytest.raises(ValueError, match="skin must be a length in angstrom, 0 or above, got -1"):
        TopologyCache(NestedShells(), skin=-1)
    with pytest.warns(
        DeprecationWarning, match="carry_on has no effect, since parts no longer depend on earlier calls"
    ):
        TopologyCache(NestedShells(), carry_on=1.0)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_vanish_exactly_beyond_the_cutoff(backend, dtype):
    """Value and two derivatives: edges that a list holds beyond the cutoff change nothing."""
    set_backend(backend)
    try:
        vec = (
            torch.randn(50, 3, dtype=dtype).sign() * torch.linspace(2.9, 5.0, 50, dtype=dtype)[:, None]
        ).requires_grad_()
        window = vector_window(vec, 5.0)
        (slope,) = torch.autograd.grad(window.sum(), vec, create_graph=True)
        (bend,) = torch.autograd.grad((slope * torch.randn_like(vec)).sum(), vec)
    finally:
        set_backend("auto")
    assert (vec.norm(dim=1) > 5.0).all()
    for value in (window, slope, bend):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("name", ["child_index", "pair_index"])
def test_the_comparison_of_topologies_rejects_a_difference(name):
    z, pos, _ = waters()
    wanted = BondTree().compose(System.from_tensors(z, pos))
    assert_same_topology(wanted, wanted)
    level = next(k for k in range(wanted.num_levels) if getattr(wanted, name)[k] is not None)
    columns = list(getattr(wanted, name))
    for other in (columns[level].flip(1), columns[level][:, 1:], None):
        columns[level] = other
        with pytest.raises(AssertionError, match=name):
            assert_same_topology(dataclasses.replace(wanted, **{name: tuple(columns)}), wanted)
        columns[level] = getattr(wanted, name)[level]
