"""BondTree: bonds, fragments, symmetry under relabelling, cells, shared trees."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import BondTree, NestedShells, Topology, share_topology
from nbody_pyg.hierarchy.bondgraph import bridges, components

# With jaxtyping's import hook on, wrong types never reach the checks whose messages are tested here
own_checks = pytest.mark.skipif(
    any("jaxtyping-packages" in argument for argument in sys.argv), reason="the import hook refuses it first"
)


def _ase(name: str):
    from ase.build import molecule as build

    atoms = build(name)
    return torch.as_tensor(atoms.numbers).long(), torch.as_tensor(atoms.positions)


def _cubane():
    corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=torch.float64)
    return torch.tensor([6] * 8 + [1] * 8), torch.cat([corners * 0.785, corners * 1.415])


def _diborane():
    pos = [[0.88, 0, 0], [-0.88, 0, 0], [0, 0, 0.98], [0, 0, -0.98]]
    pos += [[x * 1.45, y * 1.04, 0] for x in (1, -1) for y in (1, -1)]
    return torch.tensor([5, 5] + [1] * 6), torch.tensor(pos, dtype=torch.float64)


def _two_molecules():
    (z1, r1), (z2, r2) = _ase("CH3CH2OH"), _ase("C6H6")
    return torch.cat([z1, z2]), torch.cat([r1, r2 + torch.tensor([9.0, 2.0, 1.0])])


def _ions():
    return torch.tensor([11, 17]), torch.tensor([[0.0, 0, 0], [0, 0, 6.0]], dtype=torch.float64)


SYSTEMS = {
    "benzene": lambda: _ase("C6H6"),
    "cubane": _cubane,
    "ethane": lambda: _ase("C2H6"),
    "butane": lambda: _ase("trans-butane"),
    "carbon dioxide": lambda: _ase("CO2"),
    "hydrogen": lambda: _ase("H2"),
    "one atom": lambda: _ase("Na"),
    "ion pair": _ions,
    "two molecules": _two_molecules,
    "diborane": _diborane,
    "spiropentane": lambda: _ase("C5H8"),
    "acetamide": lambda: _ase("CH3CONH2"),
}


def _parts(topology: Topology, level: int) -> list[list[int]]:
    atom, part = topology.parts(level)
    return [sorted(atom[part == k].tolist()) for k in range(topology.size(level))]


def _named(topology: Topology, rename: list[int]) -> list:
    """The topology in terms of sets of atoms, which no numbering of parts can change."""
    sets = [[frozenset(rename[a] for a in part) for part in _parts(topology, k)] for k in range(topology.num_levels)]
    found = []
    for k in range(topology.num_levels):
        for index, low in ((topology.child_index[k], k - 1), (topology.pair_index[k], k)):
            edges = [] if index is None else index.t().tolist()
            found.append(sorted((sorted(sets[low][s]), sorted(sets[k][t])) for s, t in edges))
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_tree_of_a_relabelled_molecule_is_the_relabelled_tree(name, generator):
    z, pos = SYSTEMS[name]()
    scheme = BondTree()
    expected = _named(scheme.topology(z, pos).validate(), list(range(len(z))))
    for _ in range(5):
        order = torch.randperm(len(z), generator=generator)
        found = _named(scheme.topology(z[order], pos[order]).validate(), order.tolist())
        assert found == expected


@pytest.mark.parametrize(
    ("name", "groups", "pieces", "molecules"),
    [
        ("benzene", 6, 1, 1),
        ("cubane", 8, 1, 1),
        ("ethane", 2, 1, 1),
        ("butane", 4, 2, 1),
        ("carbon dioxide", 3, 1, 1),
        ("hydrogen", 1, 1, 1),
        ("one atom", 1, 1, 1),
        ("ion pair", 2, 2, 2),
        ("two molecules", 9, 2, 2),
        ("diborane", 4, 1, 1),
        ("spiropentane", 5, 1, 1),
        ("acetamide", 4, 1, 1),
    ],
)
def test_number_of_parts(name, groups, pieces, molecules):
    topology = BondTree().topology(*SYSTEMS[name]())
    assert [topology.size(k) for k in (1, 2, 3, 4)] == [groups, pieces, molecules, 1]


def test_groups_and_pieces_of_ethanol_and_aspirin(molecules):
    topology = BondTree().topology(*molecules["ethanol"])
    assert _parts(topology, 1) == [[0, 3, 4], [1, 5, 6, 7], [2, 8]]
    # The bond C-O is not rotatable by our rule: its oxygen has no further heavy neighbour
    assert _parts(topology, 2) == [list(range(9))]
    bonds = torch.tensor([[0, 1, 2, 3, 4, 5, 2], [1, 2, 3, 4, 5, 0, 6]])
    chain = torch.tensor([[6, 7], [7, 8]])
    pos = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    ring = BondTree().topology(torch.full((9,), 6), pos, bonds=torch.cat([bonds, chain], dim=1))
    assert _parts(ring, 2) == [[0, 1, 2, 3, 4, 5], [6], [7, 8]]


def test_bridging_hydrogens_keep_both_bonds_and_a_group():
    topology = BondTree().topology(*_diborane())
    assert _parts(topology, 1) == [[0, 4, 5], [1, 6, 7], [2], [3]]


def test_a_transferring_proton_has_one_bond():
    z = torch.tensor([8, 1, 8])
    pos = torch.tensor([[0.0, 0, 0], [0.98, 0, 0], [2.22, 0, 0]], dtype=torch.float64)
    topology = BondTree().topology(z, pos)
    assert topology.bonds.tolist() == [[1, 0], [0, 1]]


def test_given_bonds_overrule_the_radii_and_stay(molecules):
    z, pos = molecules["ethanol"]
    scheme = BondTree()
    given = torch.tensor([[0, 1], [1, 0]])
    data = scheme(Data(z=z, pos=pos, bonds=given))
    assert torch.equal(data.bonds, torch.tensor([[1, 0], [0, 1]]))
    assert int(data.num_parts_3) == 8
    other = BondTree(bonds_key="edge_index")(Data(z=z, pos=pos, edge_index=given))
    assert int(other.num_parts_3) == 8
    # A second pass over moved positions keeps bonds that were given or shared, and finds others anew
    given = torch.tensor([range(8), range(1, 9)])
    for data, molecules_then in (
        (scheme(AtomicData(z=z, pos=pos)), 9),
        (scheme(AtomicData(z=z, pos=pos, bonds=given)), 1),
        (share_topology([AtomicData(z=z, pos=pos)], scheme)[0], 1),
    ):
        assert int(data.num_parts_3) == 1
        data.pos = pos * 3.0
        assert int(scheme(data).num_parts_3) == molecules_then
        assert int(scheme(data.without_hierarchy()).num_parts_3) == 9
    # Bonds that were given after another scheme was applied are given; those that BondTree found do not become so
    data = NestedShells()(AtomicData(z=z, pos=pos))
    data.bonds = given
    assert torch.equal(scheme(data).bonds, scheme.topology(z, pos, bonds=given).bonds)
    assert "bonds" not in NestedShells()(scheme(AtomicData(z=z, pos=pos)))


@own_checks
@pytest.mark.parametrize(
    ("bonds", "message"),
    [
        (torch.tensor([[0], [9]]), "bonds must join atoms 0 to 8, but hold 0 to 9"),
        (torch.zeros(3, 2, dtype=torch.long), r"shape \[2, num_bonds\]"),
        (torch.zeros(2, 2), r"bonds must be integers"),
    ],
)
def test_given_bonds_are_checked(molecules, bonds, message):
    z, pos = molecules["ethanol"]
    with pytest.raises(ValueError, match=message):
        BondTree().topology(z, pos, bonds=bonds)
    batch = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match=r"within a graph, but atoms \[0, 8\]"):
        BondTree().topology(z, pos, batch, bonds=torch.tensor([[0], [8]]))


def test_far_molecules_give_the_union_of_the_single_trees(molecules):
    scheme = BondTree()
    (z1, r1), (z2, r2) = molecules["chiral"], molecules["ethanol"]
    far = torch.tensor([1000.0, -30.0, 7.0], dtype=torch.float64)
    z, pos = torch.cat([z1, z2]), torch.cat([r1, r2 + far])
    topology = scheme.topology(z, pos)
    both = scheme.hierarchy(topology, z, pos)
    singles = [scheme.hierarchy(scheme.topology(*m), *m) for m in (molecules["chiral"], molecules["ethanol"])]
    for k in range(topology.num_levels - 1):
        n = singles[0][k].num_parts
        torch.testing.assert_close(both[k].pos[:n], singles[0][k].pos, rtol=0, atol=1e-12)
        torch.testing.assert_close(both[k].pos[n:], singles[1][k].pos + far, rtol=0, atol=1e-9)
        for name in ("child", "pair"):
            if getattr(both[k], f"{name}_index") is None:
                continue
            low = singles[0][k - 1].num_parts if name == "child" else n
            offset = torch.tensor([[low], [n]])
            index = [getattr(s[k], f"{name}_index") for s in singles]
            assert torch.equal(getattr(both[k], f"{name}_index"), torch.cat([index[0], index[1] + offset], dim=1))
            for value in (f"{name}_vec", f"{name}_weight"):
                single = torch.cat([getattr(s[k], value) for s in singles])
                torch.testing.assert_close(getattr(both[k], value), single, rtol=0, atol=1e-9)


def _waters():
    """Five waters in a cell, cut by its faces, with oxygens apart; whole in ``open``."""
    z, water = _ase("H2O")
    generator = torch.Generator().manual_seed(3)
    cell = torch.tensor([[7.0, 0, 0], [1.0, 8.0, 0], [-1.0, 0.5, 9.0]], dtype=torch.float64)
    sites = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.52, 0.5]])
    turn = [torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0] for _ in range(5)]
    pos = [water @ turn[k] + sites[k].double() @ cell for k in range(5)]
    return z.repeat(5), torch.cat(pos), cell[None], torch.tensor([[True, True, True]])


def _sorted_rows(value):
    rows = torch.round(value, decimals=6).tolist()
    return np.array(sorted(rows)) if rows else np.zeros((0, 3))


def test_a_cell_puts_molecules_together_whatever_images_are_given(generator):
    z, pos, cell, pbc = _waters()
    scheme = BondTree(cutoff=4.0, group_cutoff=5.0, piece_cutoff=5.0)
    whole = scheme.topology(z, pos, cell=cell, pbc=pbc).validate()
    open_tree = scheme.topology(z, pos)
    reference = scheme.hierarchy(whole, z, pos, cell)
    image = torch.randint(-2, 3, (len(z), 3), generator=generator).double()
    moved = pos + image @ cell[0]
    for topology in (
        scheme.topology(z, moved, cell=cell, pbc=pbc).validate(),
        scheme.update(whole, z, moved, None, cell, pbc),
    ):
        hierarchy = scheme.hierarchy(topology, z, moved, cell).validate()
        for k in range(1, 5):
            assert torch.equal(topology.child_index[k], open_tree.child_index[k])
            torch.testing.assert_close(hierarchy[k].child_vec, reference[k].child_vec, rtol=0, atol=1e-10)
        for k in (0, 1, 2):
            assert reference[k].pair_index.shape[1] > 0
            assert np.allclose(_sorted_rows(hierarchy[k].pair_vec), _sorted_rows(reference[k].pair_vec), atol=2e-6)
    # Inside the molecules the cell changes nothing
    outside = scheme.hierarchy(open_tree, z, pos)
    torch.testing.assert_close(reference[1].child_vec, outside[1].child_vec, rtol=0, atol=1e-12)
    assert reference[1].child_vec.abs().max() > 0.1
    # The root of a periodic system has no place of its own
    assert not reference.root.child_vec.any()
    assert outside.root.child_vec.abs().max() > 1.0


def test_periodic_shifts_survive_storage_and_batching(generator):
    z, pos, cell, pbc = _waters()
    pos = pos + torch.randint(-1, 2, (len(z), 3), generator=generator).double() @ cell[0]
    scheme = BondTree(cutoff=4.0)
    frame = scheme(AtomicData(z=z, pos=pos, cell=cell, pbc=pbc))
    batch = next(iter(DataLoader([frame, frame], batch_size=2)))
    topology = Topology.from_data(batch).validate()
    assert topology.periodic.tolist() == [True, True]
    both = scheme.hierarchy(topology, batch.z, batch.pos, batch.cell)
    single = scheme.hierarchy(Topology.from_data(frame), z, pos, cell)
    for k in range(1, 5):
        torch.testing.assert_close(both[k].child_vec, single[k].child_vec.repeat(2, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(both[0].pair_vec, single[0].pair_vec.repeat(2, 1), rtol=0, atol=1e-12)


def test_an_endless_network_is_refused():
    from ase.build import bulk

    atoms = bulk("C", cubic=True)
    data = AtomicData.from_ase(atoms)
    with pytest.raises(ValueError, match=r"network\s+without end.*NestedShells"):
        BondTree()(data)
    small = AtomicData.from_ase(bulk("C"))
    with pytest.raises(ValueError, match=r"network\s+without end"):
        BondTree()(small)


def test_children_of_a_trajectory_are_those_of_the_reference(molecules):
    z, pos = molecules["ethanol"]
    frames = [AtomicData(z=z, pos=pos + 0.3 * k * (torch.arange(9) == 3).double()[:, None]) for k in range(4)]
    alone = [BondTree()(frame) for frame in frames]
    assert int(alone[-1].num_parts_3) == 2, "the stretched bond breaks a tree of its own"
    scheme = BondTree(cutoff=3.0)
    shared = share_topology(frames, scheme)
    assert "child_1" not in frames[0]
    for frame in shared:
        assert torch.equal(frame.child_1, shared[0].child_1)
        assert torch.equal(frame.child_2, shared[0].child_2)
        assert torch.equal(frame.bonds, shared[0].bonds)
    own = scheme.update(Topology.from_data(shared[0]), z, frames[-1].pos)
    assert torch.equal(own.pair_index[0], shared[-1].pair_0), "pairs are those of the frame"
    assert shared[-1].pair_0.shape != shared[0].pair_0.shape
    again = share_topology(frames[:1], scheme, reference=Topology.from_data(shared[2]))
    assert torch.equal(again[0].child_1, shared[0].child_1)
    assert share_topology([], BondTree()) == []


def test_sharing_refuses_other_atoms(molecules):
    frames = [AtomicData(z=z, pos=pos) for z, pos in (molecules["ethanol"], molecules["methanol"])]
    with pytest.raises(ValueError, match="z of frame 1 differs"):
        share_topology(frames, BondTree())


def test_a_batch_equals_its_graphs(molecules):
    scheme = BondTree()
    frames = [AtomicData(z=z, pos=pos) for z, pos in molecules.values()]
    frames.append(AtomicData(z=torch.tensor([2]), pos=torch.zeros(1, 3, dtype=torch.float64)))
    built = Topology.from_data(scheme(Batch.from_data_list(frames)))
    collated = Topology.from_data(Batch.from_data_list([scheme(frame) for frame in frames]))
    for k in range(5):
        assert torch.equal(built.num_parts[k], collated.num_parts[k])
        for name in ("child_index", "pair_index"):
            one, two = getattr(built, name)[k], getattr(collated, name)[k]
            assert (one is None and two is None) or torch.equal(one, two)
    assert torch.equal(built.bonds, collated.bonds)


def test_positions_are_centres_of_mass_with_gradients(molecule):
    from ase import Atoms

    z, pos = molecule
    scheme = BondTree()
    topology = scheme.topology(z, pos)
    hierarchy = scheme.hierarchy(topology, z, pos)
    for k in range(1, 5):
        for part, atoms in enumerate(_parts(topology, k)):
            centre = Atoms(z[atoms].numpy(), pos[atoms].numpy()).get_center_of_mass()
            assert np.allclose(hierarchy[k].pos[part].numpy(), centre, atol=1e-10)

    def everything(r):
        levels = scheme.hierarchy(topology, z, r)
        values = [v for level in levels for v in (level.pos, level.child_vec, level.pair_vec, level.pair_weight)]
        return tuple(v for v in values if v is not None)

    assert torch.autograd.gradcheck(everything, (pos.requires_grad_(),), atol=1e-7)


def test_windows_end_at_their_radius(molecules):
    z, pos = molecules["ethanol"]
    scheme = BondTree(cutoff=3.0, group_cutoff=None, piece_cutoff=None)
    topology = scheme.topology(z, pos)
    level = scheme.hierarchy(topology, z, pos)[0]
    assert topology.pair_index[1] is None
    assert 0 < level.pair_weight.min() < 0.1 < 0.9 < level.pair_weight.max() <= 1
    wide = BondTree(cutoff=4.0, group_cutoff=None, piece_cutoff=None).topology(z, pos)
    padded = scheme.hierarchy(wide, z, pos)[0]
    assert padded.pair_weight.shape > level.pair_weight.shape
    torch.testing.assert_close(padded.pair_weight.sum(), level.pair_weight.sum(), rtol=0, atol=1e-12)


def test_config_and_repr():
    scheme = BondTree(cutoff=4.0, piece_cutoff=None)
    assert repr(scheme) == "BondTree(cutoff=4.0, group_cutoff=6.0, piece_cutoff=None, bonds_key='bonds')"
    assert BondTree.from_config(scheme.config()).config() == scheme.config()
    assert [level.name for level in scheme.levels] == ["atoms", "groups", "pieces", "molecules", "root"]
    assert [level.pair_radius for level in scheme.levels] == [4.0, 6.0, None, None, None]


@own_checks
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "5", True])
def test_radii_are_checked(value):
    with pytest.raises(ValueError, match="cutoff must be a positive finite length"):
        BondTree(cutoff=value)
    with pytest.raises(ValueError, match="piece_cutoff must be"):
        BondTree(piece_cutoff=value)


def test_graph_helpers_agree_with_networkx(generator):
    networkx = pytest.importorskip("networkx", reason="only a second opinion")
    for seed in range(20):
        graph = networkx.gnm_random_graph(12, 14, seed=seed)
        ends = np.array([*graph.edges, *((b, a) for a, b in graph.edges)]).T
        order = np.lexsort((ends[0], ends[1]))
        source, target = ends[0][order], ends[1][order]
        found = {(s, t) for s, t, b in zip(source, target, bridges(12, source, target), strict=True) if b}
        expected = set(networkx.bridges(graph))
        assert found == expected | {(b, a) for a, b in expected}
        label = components(12, source, target)
        assert label.max() + 1 == networkx.number_connected_components(graph)
        assert all(len(set(label[list(c)])) == 1 for c in networkx.connected_components(graph))


def test_real_aspirin_has_the_pieces_a_chemist_draws(data_dir):
    frames = np.load(data_dir / "rmd17" / "rmd17_aspirin_train_01.npz")
    z, pos = torch.as_tensor(frames["nuclear_charges"]).long(), torch.as_tensor(frames["coords"][0])
    topology = BondTree().topology(z, pos)
    assert [topology.size(k) for k in range(5)] == [21, 13, 4, 1, 1]
    heavy = [sorted(a for a in part if z[a] > 1) for part in _parts(topology, 2)]
    # Benzene ring, acetyl, carboxyl, and the oxygen between ring and acetyl
    assert sorted(len(part) for part in heavy) == [1, 3, 3, 6]
