"""AtomicData: conversion, shapes, ASE both ways, batching and reloading."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data, InMemoryDataset
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage
from torch_geometric.loader import DataLoader

from nbody_pyg import NBodyNet
from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import BondTree, NestedShells, SmoothSurvivors, Topology, share_topology


def _labelled(z, pos, energy=-1.5) -> AtomicData:
    return AtomicData(
        z=z,
        pos=pos,
        energy=torch.tensor([energy], dtype=torch.float64),
        forces=torch.ones_like(pos),
        cell=torch.eye(3, dtype=torch.float64)[None] * 20.0,
        pbc=torch.tensor([[True, True, False]]),
        dipole=torch.ones(1, 3, dtype=torch.float64),
        stress=torch.ones(1, 3, 3, dtype=torch.float64),
    )


def test_from_data_keeps_keys_and_adds_the_leading_one(molecule):
    z, pos = molecule
    data = Data(z=z, pos=pos, energy=torch.tensor(2.0), cell=torch.eye(3), pbc=[True] * 3, name="x", charge=1)
    out = AtomicData.from_data(data)
    assert isinstance(out, AtomicData)
    assert out.name == "x"
    assert out.pos is pos, "tensors are shared"
    assert out.energy.shape == (1,)
    assert out.cell.shape == (1, 3, 3)
    assert out.pbc.shape == (1, 3)
    assert out.pbc.dtype == torch.bool
    assert out.charge.tolist() == [1.0]
    assert data.energy.shape == (), "the input is left as it was"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": None}, "data must hold 'pos'"),
        ({"z": None}, "data must hold 'z'"),
        ({"z": torch.ones(4)}, "z must hold integers"),
        ({"pos": torch.zeros(4, 2)}, r"pos must have shape \[4, 3\]"),
        ({"forces": torch.zeros(3, 3)}, r"forces must have shape \[4, 3\]"),
        ({"energy": torch.zeros(2)}, r"energy must have shape \[1\]"),
        ({"cell": torch.zeros(3)}, r"cell must have shape \[1, 3, 3\]"),
    ],
)
def test_from_data_names_the_wrong_key(change, message):
    keys = {"z": torch.ones(4, dtype=torch.long), "pos": torch.randn(4, 3)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        AtomicData.from_data(Data(**{key: value for key, value in keys.items() if value is not None}))


def test_from_data_refuses_a_batch(molecule):
    z, pos = molecule
    with pytest.raises(TypeError, match="got a Batch"):
        AtomicData.from_data(Batch.from_data_list([Data(z=z, pos=pos)]))


def test_ase_there_and_back(molecule):
    z, pos = molecule
    data = _labelled(z, pos)
    data.stress = torch.arange(9, dtype=torch.float64).reshape(1, 3, 3)
    data.stress = data.stress + data.stress.mT
    again = AtomicData.from_ase(data.to_ase())
    for key in ("z", "pos", "energy", "forces", "cell", "pbc", "dipole", "stress"):
        assert torch.equal(again[key], data[key]), key
    assert again.pos.dtype == torch.float64
    assert AtomicData.from_ase(data.to_ase(), labels=False).get("energy") is None


def test_stress_follows_the_order_of_ase():
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = Atoms("H", cell=[9, 9, 9], pbc=True)
    atoms.calc = SinglePointCalculator(atoms, stress=np.arange(1.0, 7.0))
    stress = AtomicData.from_ase(atoms).stress[0]
    assert stress.tolist() == [[1, 6, 5], [6, 2, 4], [5, 4, 3]]


def test_a_cell_without_periodicity_is_dropped():
    from ase.build import molecule as build

    assert AtomicData.from_ase(build("H2O", vacuum=5.0)).get("cell") is None


def test_batching_stacks_values_of_graphs(molecules):
    frames = [_labelled(*molecules[name], energy=-k) for k, name in enumerate(sorted(molecules))]
    batch = next(iter(DataLoader(frames, batch_size=3)))
    assert batch.cell.shape == (3, 3, 3)
    assert batch.pbc.shape == (3, 3)
    assert batch.energy.tolist() == [0.0, -1.0, -2.0]
    assert batch.forces.shape == batch.pos.shape
    for k, frame in enumerate(batch.to_data_list()):
        assert torch.equal(frame.pos, frames[k].pos)


def test_every_level_survives_batching_and_separation(molecules):
    scheme = BondTree(cutoff=3.0)
    single = AtomicData(z=torch.tensor([8]), pos=torch.zeros(1, 3, dtype=torch.float64))
    frames = [scheme(AtomicData(z=z, pos=pos)) for z, pos in molecules.values()]
    frames.insert(1, scheme(single))
    batch = next(iter(DataLoader(frames, batch_size=len(frames))))
    offsets = [torch.cumsum(torch.tensor([0] + [int(n) for n in level]), 0) for level in _sizes(frames)]
    for level in range(5):
        for name in ("child", "pair"):
            key = f"{name}_{level}"
            if key not in frames[0]:
                continue
            expected = []
            for k, frame in enumerate(frames):
                low = offsets[level if name == "pair" else level - 1][k]
                expected.append(frame[key] + torch.stack([low, offsets[level][k]])[:, None])
            assert torch.equal(batch[key], torch.cat(expected, dim=1)), key
    for frame, again in zip(frames, batch.to_data_list(), strict=True):
        for key in frame.keys():  # noqa: SIM118  (Data is no dict)
            assert _same(frame[key], again[key]), key


def _same(one, two) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def _sizes(frames):
    levels = [Topology.from_data(frame).num_parts for frame in frames]
    return list(zip(*levels, strict=True))


class _Stored(InMemoryDataset):
    def __init__(self, root, frames=None):
        self._frames = frames
        super().__init__(root)
        self.load(self.processed_paths[0])

    @property
    def processed_file_names(self):
        return ["frames.pt"]

    def process(self):
        self.save(self._frames, self.processed_paths[0])


@pytest.mark.filterwarnings("error")
def test_a_processed_dataset_reloads_without_pickle(tmp_path, molecules, capsys):
    frames = [BondTree()(AtomicData(z=z, pos=pos)) for z, pos in molecules.values()]
    _Stored(str(tmp_path), frames)
    again = _Stored(str(tmp_path))
    capsys.readouterr()
    for frame, stored in zip(frames, again, strict=True):
        assert isinstance(stored, AtomicData)
        for key in frame.keys():  # noqa: SIM118
            assert _same(frame[key], stored[key]), key
    raw = torch.load(again.processed_paths[0], weights_only=True)
    assert raw[2] is AtomicData
    batch = next(iter(DataLoader(again, batch_size=3)))
    Topology.from_data(batch).validate()


def test_without_hierarchy_drops_what_schemes_wrote(molecule):
    z, pos = molecule
    data = BondTree()(AtomicData(z=z, pos=pos, tag=torch.tensor([3])))
    assert sorted(data.without_hierarchy().to_dict()) == ["pos", "tag", "z"]
    assert "child_1" in data


# ------------------------------------------------------------------ in the hands of PyG
@pytest.mark.slow
def test_data_with_and_without_a_hierarchy_do_not_mix(molecules):
    plain = [AtomicData(z=z, pos=pos) for z, pos in molecules.values()]
    stored = BondTree()(plain[0])
    for other in (plain[1], NestedShells()(plain[1])):
        with pytest.raises(ValueError, match=r"data has no '.*_\d': no scheme was applied to it, or another one"):
            next(iter(DataLoader([stored, other], batch_size=2)))
    with pytest.raises(KeyError, match="child_1"):
        plain[0]["child_1"]
    assert plain[0].get("child_1") is None and "child_1" not in plain[0]
    # Parts that were given or shared would be lost where they are not on the first
    (shared,) = share_topology([plain[0]], BondTree())
    for other in (stored, shared):
        with pytest.raises(ValueError, match="data 1 of a batch has 'child_1', which PyG would drop, for data 0 "):
            next(iter(DataLoader([plain[1], other], batch_size=2)))


def test_keys_of_ones_own_are_left_alone(molecules):
    z, pos = molecules["methanol"]
    own = {
        "pair_0": torch.arange(3),
        "child_1": torch.arange(8).view(2, 4),
        "centre_1": torch.tensor([1]),
        "bonds": torch.rand(5),
        "pair_energy": torch.tensor([2.0]),
        "child_support": torch.tensor([7]),
    }
    frames = [AtomicData(z=z, pos=pos, **own) for _ in range(3)]
    for again in Batch.from_data_list(frames).to_data_list():
        for key, value in own.items():
            assert torch.equal(again[key], value), key
    for key in ("pair_0", "child_1", "centre_1"):
        for scheme in (BondTree(), NestedShells()):
            with pytest.raises(ValueError, match=f"data has the key '{key}' of its own, .* rename it"):
                scheme(AtomicData(z=z, pos=pos, **{key: own[key]}))
    with pytest.raises(ValueError, match="data has the key 'scheme' of its own"):
        BondTree()(Data(z=z, pos=pos, scheme="mine"))
    harmless = {key: own[key] for key in ("bonds", "pair_energy", "child_support")}
    kept = NestedShells()(AtomicData(z=z, pos=pos, **harmless))
    assert torch.equal(kept.bonds, own["bonds"]) and kept.pair_energy == 2.0 and kept.child_support == 7
    with pytest.raises(ValueError, match=r"data has the key 'bonds' of its own, .* those it used; rename it"):
        BondTree(bonds_key="mine")(AtomicData(z=z, pos=pos, bonds=own["bonds"]))
    # Applied again: what a scheme wrote it may replace
    assert torch.equal(NestedShells()(kept).child_1, kept.child_1)


@pytest.mark.parametrize("key", ["child_1", "child_3", "pair_0"])
def test_a_hierarchy_of_which_keys_were_excluded_is_named(key, molecules):
    scheme = BondTree()
    net = NBodyNet([1, 6, 7, 8, 9], scheme, channels=2).double()
    frames = [scheme(AtomicData(z=z, pos=pos)) for z, pos in molecules.values()]
    batch = next(iter(DataLoader(frames, batch_size=3, exclude_keys=[key])))
    with pytest.raises(ValueError, match=key if key != "pair_0" else "topology must have 5 levels, with pairs"):
        net(batch)
    # Plain Data do not know how to number parts
    copies = [Data.from_dict(frame.to_dict()) for frame in (frames[0], frames[0])]
    with pytest.raises(ValueError, match="only AtomicData are batched rightly"):
        net(Batch.from_data_list(copies))


@pytest.mark.slow
def test_the_ways_of_pyg_with_stored_data(molecules, tmp_path):
    scheme = BondTree()
    net = NBodyNet([1, 6, 7, 8, 9], scheme, channels=2).double().requires_grad_(False)
    frames = [T.Compose([T.Center(), scheme])(Data(z=z, pos=pos)) for z, pos in molecules.values()]
    batch = next(iter(DataLoader(frames, batch_size=3, follow_batch=["child_1"], exclude_keys=["bonds"])))
    expected = net(batch)
    assert float(expected.abs().min()) > 1e-6 and batch.child_1_batch.shape == (batch.child_1.shape[1],)
    ways = {
        "index": torch.cat([net(batch[k]) for k in range(3)]),
        "list": torch.cat([net(data) for data in batch.to_data_list()]),
        "select": net(Batch.from_data_list(batch.index_select([0, 1, 2]))),
        "deepcopy": net(copy.deepcopy(batch)),
        "copy": net(copy.copy(batch)),
        "clone": net(batch.clone().contiguous().to("cpu")),
        "pickle": net(pickle.loads(pickle.dumps(batch))),
        "dict": torch.cat([net(AtomicData.from_dict(data.to_dict())) for data in frames]),
    }
    for name, found in ways.items():
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)
    assert all(data.validate() for data in frames)
    # What PyG's own Data need to be read without trust, and nothing more
    path = tmp_path / "frames.pt"
    torch.save(frames, path)
    with torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        again = torch.load(path, weights_only=True)
    torch.testing.assert_close(net(Batch.from_data_list(again)), expected, rtol=0, atol=1e-12)


def test_an_empty_system_is_stored_and_batched(molecules):
    z, pos = molecules["methanol"]
    for scheme in (BondTree(), NestedShells(), SmoothSurvivors()):
        full, empty = scheme(AtomicData(z=z, pos=pos)), scheme(AtomicData(z=z[:0], pos=pos[:0]))
        assert set(full.keys()) == set(empty.keys())
        batch = Batch.from_data_list([empty, full, empty])
        assert batch.num_parts_1.tolist() == [0, int(full.num_parts_1), 0]
        for again, frame in zip(batch.to_data_list(), (empty, full, empty), strict=True):
            for key in frame.keys():  # noqa: SIM118
                assert _same(frame[key], again[key]), key


@pytest.mark.parametrize("key", ["charge", "charges", "spin", "cell"])
def test_a_key_that_only_some_of_a_batch_have_is_named(key):
    plain = AtomicData(z=torch.tensor([8, 1, 1]), pos=torch.eye(3, dtype=torch.float64))
    value = {"cell": torch.eye(3).unsqueeze(0), "charges": torch.ones(3)}.get(key, torch.ones(1))
    marked = AtomicData(**plain.to_dict(), **{key: value})
    with pytest.raises(ValueError, match=f"data has no '{key}'; where others of a batch have one all must have it"):
        Batch.from_data_list([marked, plain])
    with pytest.raises(ValueError, match=f"data 2 of a batch has '{key}', which PyG would drop, for data 0 has"):
        Batch.from_data_list([plain, plain, marked])
    with pytest.raises(KeyError, match=key):
        plain[key]
    assert plain.stores and key not in Batch.from_data_list([plain, plain])  # what failed is forgotten
    assert plain.get(key) is None and Batch.from_data_list([marked, marked])[key].shape[0] == 2 * len(value)


def test_bonds_that_only_some_of_a_batch_have_are_named(molecules):
    """Without its given bonds a molecule would have those that are found; a scheme applied to each keeps both right."""
    scheme, (z, pos) = BondTree(), molecules["methanol"]
    net = NBodyNet([1, 6, 8], scheme, channels=2).double()
    found = AtomicData(z=z, pos=pos)
    bonds = scheme(found).bonds
    given = AtomicData(z=z, pos=pos, bonds=bonds[:, (bonds != bonds[0, 0]).all(dim=0)])
    with pytest.raises(ValueError, match=r"data has no 'bonds'; where others .*\(a BondTree that is applied to each"):
        Batch.from_data_list([given, found])
    with pytest.raises(
        ValueError, match="data 1 of a batch has 'bonds', which PyG would drop, for data 0 has no 'bonds'"
    ):
        Batch.from_data_list([found, given])
    alone = torch.cat([net(found), net(given)])
    assert (alone[0] - alone[1]).abs() > 1e-4 and alone.abs().min() > 1e-4
    batch = Batch.from_data_list([scheme(found), scheme(given)])
    torch.testing.assert_close(net(batch), alone, rtol=0, atol=1e-10)


def test_a_cell_without_pbc_repeats_along_its_vectors_also_in_ase():
    cell = torch.diag(torch.tensor([7.0, 8.0, 0.0], dtype=torch.float64))[None]
    atoms = AtomicData(z=torch.tensor([8, 1]), pos=torch.eye(2, 3, dtype=torch.float64), cell=cell).to_ase()
    assert atoms.pbc.tolist() == [True, True, False]
    assert AtomicData.from_ase(atoms).pbc.tolist() == [[True, True, False]]
