"""A hierarchy on the data belongs to the atoms, positions and cell at which it was stored."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from factories import net
from nbody_pyg import BondTree, FromAssignment, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import share_topology
from nbody_pyg.hierarchy.mark import KEPT, MARK, mark_of
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.loader import FrameLoader

SCHEMES = {
    "shells": NestedShells((1.6, 2.3, 2.3)),
    "tree": BondTree(2.5, 3.0, 4.0),
    "pieces": ShellsAndPieces((1.6, 2.3), 4.0),
    "labels": FromAssignment(cutoff=2.5, part_cutoffs=(3.0,)),
    "survivors": SmoothSurvivors((1.5,), (2.4, 4.0)),
}


def frame(molecules, name: str = "ethanol", cell: float | None = None) -> AtomicData:
    z, pos = molecules[name]
    lattice = {}
    if cell is not None:
        lattice = {"cell": cell * torch.eye(3, dtype=torch.float64)[None], "pbc": torch.ones(1, 3, dtype=torch.bool)}
    return AtomicData(z=z, pos=pos, labels=torch.arange(len(z)) // 3, **lattice)


def _kept(data: Data, rows: list[int]) -> Data:
    for key in ("z", "pos", "labels"):
        data[key] = data[key][rows]
    return data


def _set(data: Data, key: str, value) -> Data:
    data[key] = value
    return data


#: What a transform after the scheme may do: some are PyG's, some everybody's own.
CHANGES = {
    "jitter": T.RandomJitter(0.3),
    "one atom": lambda d: _set(d, "pos", d.pos + 0.4 * (torch.arange(len(d.z)) == 3).double()[:, None]),
    "scale": T.RandomScale((1.3, 1.3)),
    "shrink": T.RandomScale((0.7, 0.7)),
    "normalize": T.NormalizeScale(),
    "permute": lambda d: _kept(d, list(range(len(d.z)))[::-1]),
    "swap": lambda d: _kept(d, [4, 1, 2, 3, 0, *range(5, len(d.z))]),
    "drop": lambda d: _kept(d, list(range(1, len(d.z)))),
    "in place": lambda d: _set(d, "pos", d.pos.mul_(0.8)),
    "substitute": lambda d: _set(d, "z", torch.where(d.z == 8, 6, d.z)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_atoms_have_the_energy_of_a_fresh_hierarchy(name, change, molecules):
    scheme = SCHEMES[name]
    model = net(scheme)
    stored = CHANGES[change](scheme(frame(molecules)))
    fresh = scheme(AtomicData(z=stored.z, pos=stored.pos, labels=stored.labels))
    wanted = model(fresh)
    assert torch.equal(model(stored), wanted) and wanted.abs() > 1e-4
    # Another energy than before, or the test shows nothing; the order of atoms alone changes none
    if change not in ("in place", "permute", "swap"):
        before = scheme(frame(molecules))
        assert wanted.item() != model(before).item()
    # In a batch, beside one that has not changed; and through a Potential, with forces
    other = scheme(frame(molecules, "methanol"))
    for frames in ([stored, other], [other, stored]):
        batch = next(iter(DataLoader(frames, batch_size=2)))
        found = model(batch)
        torch.testing.assert_close(found, torch.cat([model(f) for f in frames]), rtol=0, atol=1e-10)
    results = [Potential(model)(data)["forces"] for data in (stored, fresh)]
    assert torch.equal(*results) and results[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["shells", "tree"])
@pytest.mark.parametrize("change", ["cell", "pbc", "both"])
def test_changed_cells(name, change, molecules):
    scheme, model = SCHEMES[name], net(SCHEMES[name])
    stored = scheme(frame(molecules, cell=4.6))
    if change != "pbc":
        stored.cell = 1.1 * stored.cell
    if change != "cell":
        stored.pbc = torch.tensor([[False, True, True]])
    keys = ("z", "pos", "cell", "pbc")
    fresh = scheme(AtomicData(**{key: stored[key] for key in keys}))
    assert torch.equal(model(stored), model(fresh))
    assert model(stored).item() != model(scheme(frame(molecules, cell=4.6))).item()


@pytest.mark.parametrize("loader", [DataLoader, FrameLoader])
@pytest.mark.parametrize("name", SCHEMES)
def test_open_and_periodic_graphs_in_one_batch(name, loader, molecules):
    """All data have a cell; PyG takes the keys of the first, whose cell may be empty."""
    scheme, model = SCHEMES[name], Potential(net(SCHEMES[name]))
    crystal, still = frame(molecules, cell=5.0), frame(molecules, cell=5.0)
    still.cell, still.pbc = 0.0 * still.cell, ~still.pbc
    wanted = [model(data, compute_forces=True) for data in (crystal, still)]
    assert (wanted[0]["energy"] - wanted[1]["energy"]).abs() > 1e-3, "the images of the crystal act"
    for order in ([0, 1], [1, 0], [1, 1]):
        stored = [scheme((crystal, still)[k]) for k in order]
        batch = next(iter(loader(stored, batch_size=2)))
        found = model(batch, compute_forces=True)
        for key in ("energy", "forces"):
            expected = torch.cat([wanted[k][key] for k in order])
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-10)
        assert (scheme.read(batch).child_shift[1] is not None) == (0 in order), "open graphs cost no more than before"
    older = scheme(still)
    for key in [key for key in older.keys() if "_shift_" in key]:  # noqa: SIM118  (Data is no dict)
        del older[key]
    torch.testing.assert_close(model(older)["energy"], wanted[1]["energy"], rtol=0, atol=1e-10)
    for frames in ([older, scheme(crystal)], [scheme(crystal), older]):
        with pytest.raises(ValueError, match=r"'(child|pair)_shift_\d'.* another one \(or that of an earlier version"):
            Batch.from_data_list(frames)


def test_nothing_is_built_again_while_nothing_changes(molecules, monkeypatch):
    frames = [SCHEMES["shells"](frame(molecules, n)) for n in ("ethanol", "methanol", "ethanol", "methanol")]
    model = net(SCHEMES["shells"])
    wanted = torch.cat([model(f) for f in frames])
    monkeypatch.setattr(NestedShells, "topology", lambda *_, **__: pytest.fail("searched again"))
    for batch in (
        *DataLoader(frames, batch_size=4),
        *FrameLoader(frames, batch_size=4),
        Batch.from_data_list(frames),
        Batch.from_data_list(Batch.from_data_list(frames).to_data_list()),
    ):
        torch.testing.assert_close(model(batch), wanted, rtol=0, atol=1e-10)
    moved = frames[0].clone()
    moved.pos = moved.pos - 0.0  # -0.0 and 0.0 are one position
    assert torch.equal(model(moved), wanted[:1])


def test_a_batch_that_is_moved_after_collation(molecules):
    model = net(SCHEMES["shells"])
    frames = [SCHEMES["shells"](frame(molecules, n)) for n in ("ethanol", "methanol")]
    for batch in (*DataLoader(frames, batch_size=2), *FrameLoader(frames, batch_size=2)):
        batch.pos = batch.pos * 0.8
        wanted = model(batch.z, batch.pos, batch.batch)
        assert torch.equal(model(batch), wanted) and wanted.abs().min() > 1e-4
        assert (wanted - torch.cat([model(f) for f in frames])).abs().min() > 1e-4


def test_shared_trees_stay_and_their_lists_follow(molecules):
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    reference = frame(molecules)
    hot = frame(molecules)
    hot.pos[8] = hot.pos[2] + 1.6 * (hot.pos[8] - hot.pos[2])
    tree = scheme.read(scheme(reference))
    shared = share_topology([reference, hot], scheme, tree)
    jitter = 0.05 * torch.randn(9, 3, dtype=torch.float64)
    for data in (*shared, *(f.clone() for f in shared)):
        data.pos = data.pos + jitter
        wanted = model(data.z, data.pos, topology=scheme.update(tree, data.z, data.pos))
        assert torch.equal(model(data), wanted) and wanted.abs() > 1e-4
    assert (model(shared[1]) - model(shared[1].z, shared[1].pos)).abs() > 1e-3, "fresh, the bond is broken"
    batch = Batch.from_data_list(shared)
    batch.pos = batch.pos * 1.02
    single = [model(f.z, 1.02 * f.pos, topology=scheme.update(tree, f.z, 1.02 * f.pos)) for f in shared]
    torch.testing.assert_close(model(batch), torch.cat(single), rtol=0, atol=1e-10)


def test_given_bonds_stay(molecules):
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    data = frame(molecules)
    data.bonds = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]])
    stored = scheme(data)
    stored.pos = 1.4 * stored.pos
    wanted = model(data.z, stored.pos, topology=scheme.topology(data.z, stored.pos, bonds=data.bonds))
    assert torch.equal(model(stored), wanted) and (model(data.z, stored.pos) - wanted).abs() > 1e-3
    assert torch.equal(model(scheme(stored)), wanted), "the scheme applied again"


@pytest.mark.parametrize("change", ["permute", "drop", "substitute"])
def test_kept_parts_of_other_atoms_are_refused(change, molecules):
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    shared = share_topology([frame(molecules), frame(molecules)], scheme)
    CHANGES[change](shared[1])
    for data, graph in ((shared[1], 0), (Batch.from_data_list(shared), 1)):
        with pytest.raises(
            ValueError, match=rf"parts were given or shared, but graph {graph} has others, or in another"
        ):
            model(data)


def test_kept_parts_of_renumbered_atoms_are_refused(molecules):
    """Two hydrogens exchanged: the elements are the same, the bonds are not."""
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    (shared,) = share_topology([frame(molecules)], scheme)
    shared.pos = shared.pos[[0, 1, 2, 8, 4, 5, 6, 7, 3]]
    with pytest.raises(
        ValueError, match=r"join atoms \d and \d, which are now \d\.\d\d angstrom apart: atoms were moved"
    ):
        model(shared)


def test_a_batch_of_kept_and_found_parts(molecules):
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    frames = [*share_topology([frame(molecules)], scheme), scheme(frame(molecules, "methanol"))]
    batch = Batch.from_data_list(frames)
    torch.testing.assert_close(model(batch), torch.cat([model(f) for f in frames]), rtol=0, atol=1e-10)
    batch.pos = 1.01 * batch.pos
    with pytest.raises(
        ValueError, match="a batch in which some have parts that were given or shared, and others have not"
    ):
        model(batch)


def test_other_bonds_and_labels_after_the_scheme(molecules):
    """Bonds and labels that replace those of the hierarchy count as given ones; on their own and in a batch."""
    bonds = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7]])
    labels = torch.arange(9) // 2
    for name, key, value in (("tree", "bonds", bonds), ("labels", "labels", labels)):
        scheme, model = SCHEMES[name], net(SCHEMES[name])
        plain = frame(molecules)
        for stored in (scheme(plain), share_topology([plain], scheme)[0]):
            before = model(stored)
            stored[key] = value
            wanted = model(plain.z, plain.pos, topology=scheme.topology(plain.z, plain.pos, **{key: value}))
            assert torch.equal(model(stored), wanted) and (wanted - before).abs() > 1e-3
            assert torch.equal(model(scheme(stored)), wanted), "the scheme applied again"
            batch = Batch.from_data_list([stored, stored])
            torch.testing.assert_close(model(batch), wanted.repeat(2), rtol=0, atol=1e-10)
    stored = SCHEMES["labels"](plain)
    wanted = model(stored)
    del stored.labels
    assert torch.equal(model(stored), wanted), "labels are not needed once the parts are stored"


def test_hierarchies_without_a_mark_are_used_with_a_warning(molecules):
    stored = SCHEMES["shells"](frame(molecules))
    wanted = net(SCHEMES["shells"])(stored)
    del stored[MARK]
    with pytest.warns(UserWarning, match="stored by an earlier version, which did not note its positions"):
        assert torch.equal(net(SCHEMES["shells"])(stored), wanted)


def test_every_small_change_changes_the_mark(molecules):
    """Last bits of positions, exchanged atoms, exchanged coordinates, single precision."""
    data = NestedShells()(frame(molecules, cell=20.0))
    marks = {tuple(data[MARK][0].tolist())}
    for row in range(9):
        for column in range(3):
            moved = data.clone()
            moved.pos[row, column] = torch.nextafter(moved.pos[row, column], torch.tensor(9.0, dtype=torch.float64))
            marks.add(tuple(NestedShells()(moved)[MARK][0].tolist()))
    for rows in ([1, 0, *range(2, 9)], [0, 1, 2, 4, 3, *range(5, 9)]):
        marks.add(tuple(NestedShells()(_kept(data.clone(), rows))[MARK][0].tolist()))
    turned = data.clone()
    turned.pos = turned.pos[:, [1, 0, 2]]
    marks.add(tuple(NestedShells()(turned)[MARK][0].tolist()))
    single = data.clone()
    single.pos = single.pos.float()
    marks.add(tuple(NestedShells()(single)[MARK][0].tolist()))
    assert len(marks) == 1 + 27 + 2 + 1 + 1
    assert "hierarchy_mark" not in data.without_hierarchy()


#: Marks that version 0.2 stored for methanol.
EARLIER = {
    "shells": [670746349654981678, -8915076775377396487, 0, 0],
    "tree": [670746349654981678, -8915076775377396487, -4329172309392800004, 2],
    "shared": [670746349654981678, -8915076775377396487, -4329172309392800004, 1],
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", ["shells", "tree"])
def test_hierarchies_of_an_earlier_version_are_built_again(name, moved, molecules):
    """Bonds that were found then do not count as given ones now, where a hydrogen has left."""
    scheme, model = SCHEMES[name], net(SCHEMES[name])
    stored = scheme(frame(molecules, "methanol"))
    stored[MARK] = torch.tensor([EARLIER[name]])
    if moved:
        stored.pos[3] += 2.0 * (stored.pos[3] - stored.pos[0])
    wanted = model(stored.z, stored.pos)
    for data in (stored, Batch.from_data_list([stored, stored])):
        with pytest.warns(
            UserWarning, match="stored by an earlier version, whose mark misses some changes of atoms, so"
        ):
            torch.testing.assert_close(model(data), wanted.expand(data[MARK].shape[0]), rtol=0, atol=1e-10)
    assert wanted.abs() > 1e-4
    torch.testing.assert_close(model(scheme(stored)), wanted, rtol=0, atol=0)


def test_kept_parts_of_an_earlier_version_are_refused(molecules):
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    (shared,) = share_topology([frame(molecules, "methanol")], scheme)
    wanted = model(shared)
    shared[MARK] = torch.tensor([EARLIER["shared"]])
    with pytest.raises(
        ValueError, match=r"by an earlier version, whose .* and its parts were given or shared; apply the"
    ):
        model(shared)
    assert torch.equal(model(scheme(shared)), wanted) and wanted.abs() > 1e-4


def _permutations(length: int, count: int = 2000):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.randperm(length, generator=generator)


@pytest.mark.parametrize("what", ["elements", "points", "labels", "table", "cell"])
def test_no_exchange_leaves_the_mark(what):
    """Values from a few numbers, as in alloys and on grids: sums of products of a value and its place would agree."""
    grid = 2.0 * torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    data = AtomicData(z=torch.tensor([6, 8, 8, 6, 1, 1, 6, 8]), pos=grid, labels=torch.tensor([0, 1, 1, 0, 2, 2, 0, 1]))
    data.cell = torch.tensor([[[4.0, 0, 0], [2.0, 4.0, 0], [2.0, 0.0, 4.0]]], dtype=torch.float64)
    data.pbc = torch.ones(1, 3, dtype=torch.bool)
    if what == "table":
        data.labels = torch.stack([data.labels, data.labels.flip(0), data.labels.roll(1), data.labels.roll(3)], dim=1)
    key = {"elements": "z", "points": "pos", "cell": "cell"}.get(what, "labels")
    values = data[key] if what == "points" else data[key].flatten()
    marks: dict[tuple[int, ...], torch.Tensor] = {}
    for order in _permutations(len(values)):
        data[key] = values[order].view(data[key].shape)
        mark = tuple(mark_of(data, KEPT, "labels")[0].tolist())
        assert torch.equal(marks.setdefault(mark, data[key]), data[key])
    assert len(marks) > 100
    # Each number of the cell differs from one of pbc in the same place
    for cell, pbc in ((1.0, False), (0.0, True)):
        data.cell, data.pbc = cell * torch.ones(1, 3, 3, dtype=torch.float64), torch.full((1, 3), pbc)
        marks[tuple(mark_of(data, KEPT, "labels")[0].tolist())] = data.pbc
    assert len({mark for mark, value in marks.items() if value.dtype == torch.bool}) == 2


@pytest.mark.parametrize("name", ["shells", "tree"])
def test_an_empty_cell_is_no_cell(name, molecules, monkeypatch):
    """Where open and periodic frames are mixed, ``uniform`` gives the open ones a cell after the scheme."""
    scheme, model = SCHEMES[name], Potential(net(SCHEMES[name]))
    shared = share_topology([frame(molecules)], scheme)[0]
    frames = [shared, scheme(frame(molecules, cell=5.0))]
    wanted = torch.cat([model(data, compute_forces=False)["energy"] for data in frames])
    monkeypatch.setattr(type(scheme), "compose", lambda *_: pytest.fail("built again"))
    for order in ([0, 1], [1, 0]):
        found = evaluate(model, [frames[k] for k in order], compute_forces=False)
        torch.testing.assert_close(found.energy, wanted[order], rtol=0, atol=1e-10)
    assert (wanted[0] - wanted[1]).abs() > 1e-3


def test_exchanged_elements_have_the_energy_of_a_fresh_hierarchy():
    """The mark of version 0.2 was the same for both: a sum over the atoms of element times place."""
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    pos = torch.tensor([[0, 0, 0], [1.2, 0, 0], [2.4, 0, 0.2], [3.6, 0.3, 0]], dtype=torch.float64)
    stored = scheme(AtomicData(z=torch.tensor([1, 6, 6, 1]), pos=pos))
    before = model(stored)
    for z in ([6, 1, 1, 6], [6, 1, 6, 1]):
        stored.z = torch.tensor(z)
        wanted = model(stored.z, pos)
        assert torch.equal(model(stored), wanted) and (wanted - before).abs() > 1e-3


def test_kept_parts_of_atoms_in_another_order_are_refused():
    """H-C-C-H as C-H-H-C, whose bonds would all have a plausible length."""
    scheme = SCHEMES["tree"]
    z, pos = torch.tensor([6, 1, 1, 6]), torch.tensor([[0, 0, 0], [-1.06, 0, 0], [2.26, 0, 0], [1.2, 0, 0.1]]).double()
    stored = scheme(AtomicData(z=z, pos=pos, bonds=torch.tensor([[0, 3, 0], [1, 2, 3]])))
    order = [1, 0, 3, 2]
    stored.z, stored.pos = z[order], pos[order]
    with pytest.raises(ValueError, match="parts were given or shared, but graph 0 has others, or in another order"):
        net(scheme)(stored)


def test_bonds_under_a_key_of_ones_own(molecules):
    """Bonds that change after the scheme, or come to data whose bonds were found, in the key that the scheme reads."""
    scheme = BondTree(2.5, 3.0, 4.0, bonds_key="edge_index")
    model = net(scheme)
    z, pos = molecules["ethanol"]
    found = scheme(AtomicData(z=z, pos=pos))
    first = found.bonds
    given = scheme(AtomicData(z=z, pos=pos, edge_index=first))
    before = model(given)
    assert torch.equal(before, model(found))
    less = first[:, (first != 0).all(dim=0)]
    wanted = model(scheme(AtomicData(z=z, pos=pos, edge_index=less)))
    assert (wanted - before).abs() > 1e-3
    for stored in (found, given):
        batch = Batch.from_data_list([stored, stored])
        stored.edge_index = less
        assert torch.equal(model(stored), wanted)
        changed = Batch.from_data_list([stored, stored])
        torch.testing.assert_close(model(changed), wanted.repeat(2), rtol=0, atol=1e-10)
        torch.testing.assert_close(model(batch), before.repeat(2), rtol=0, atol=1e-10)
        assert torch.equal(model(scheme(stored)), wanted), "the scheme applied again"
    kept = scheme(AtomicData(z=z, pos=pos, edge_index=less))
    del kept["edge_index"]
    assert torch.equal(model(kept), wanted), "bonds are not needed under this key once the parts are stored"


def test_kept_parts_of_which_the_bonds_are_gone(molecules):
    scheme, model = SCHEMES["tree"], net(SCHEMES["tree"])
    bonds = scheme(frame(molecules)).bonds
    stored = scheme(_set(frame(molecules), "bonds", bonds[:, (bonds != 0).all(dim=0)]))
    wanted = model(stored)
    del stored["bonds"]
    assert torch.equal(model(stored), wanted) and (wanted - model(frame(molecules))).abs() > 1e-3
    stored.pos = 1.01 * stored.pos
    with pytest.raises(ValueError, match="data whose atoms have moved must hold 'bonds', along which their given or"):
        model(stored)


def test_a_dataset_with_a_transform_after_the_scheme(tmp_path, molecules):
    """PyG's usual way: pre_transform stores, transform moves; through a file, and a loader."""
    from torch_geometric.data import InMemoryDataset

    scheme = SCHEMES["shells"]
    frames = [frame(molecules, n) for n in ("ethanol", "methanol")]

    class Frames(InMemoryDataset):
        def __init__(self, root, transform=None, pre_transform=None):
            super().__init__(root, transform, pre_transform)
            self.load(self.processed_paths[0], data_cls=AtomicData)

        processed_file_names = "data.pt"

        def process(self):
            self.save([self.pre_transform(f) for f in frames], self.processed_paths[0])

    dataset = Frames(str(tmp_path), transform=T.RandomScale((0.8, 0.8)), pre_transform=scheme)
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    model = net(scheme)
    wanted = torch.cat([model(f.z, 0.8 * f.pos) for f in frames])
    torch.testing.assert_close(model(batch), wanted, rtol=0, atol=1e-10)
    still = next(iter(DataLoader(Frames(str(tmp_path), pre_transform=scheme), batch_size=2)))
    torch.testing.assert_close(model(still), torch.cat([model(f.z, f.pos) for f in frames]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scheme", [SCHEMES[name] for name in ("shells", "tree", "survivors")], ids=repr)
@pytest.mark.parametrize("given", [True, False], ids=["pbc", "cell alone"])
def test_a_stored_hierarchy_of_a_cell_gives_the_value_of_the_structure(molecules, scheme, given):
    """The place of the root means nothing in a cell, with or without pbc, so the image of an atom changes nothing."""
    network = net(scheme=scheme, readout="root").double()
    values = []
    for image in (0, 1):
        data = frame(molecules, cell=7.0)
        data.pos = data.pos + 7.0 * image * (torch.arange(len(data.z)) == 3)[:, None] * torch.eye(3)[0]
        if not given:
            del data["pbc"]
        values += [network(structure).item() for structure in (data.clone(), scheme(data))]
    assert values == pytest.approx([values[0]] * 4, abs=1e-10) and abs(values[0]) > 1e-6
