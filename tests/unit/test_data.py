"""AtomicData: conversion, shapes, ASE both ways, batching and reloading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data, InMemoryDataset
from torch_geometric.loader import DataLoader

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import BondTree, Topology


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
