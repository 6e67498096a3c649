"""FrameLoader: the same batches as PyG's own loader, in a known order, shared out over processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch_geometric.data import Batch, Data

from nbody_pyg.training import FrameLoader


class Parts(Data):
    """A graph with one coarse level: increments that differ between the two rows of an index."""

    def __inc__(self, key, value, *args, **kwargs):
        if key == "child_1":
            return torch.tensor([[self.num_nodes], [int(self.num_parts_1)]])
        if key == "pair_1":
            return int(self.num_parts_1)
        return 0 if key == "num_parts_1" else super().__inc__(key, value, *args, **kwargs)

    def __cat_dim__(self, key, value, *args, **kwargs):
        return 1 if key in ("child_1", "pair_1") else super().__cat_dim__(key, value, *args, **kwargs)


def frames(sizes=(4, 1, 7, 3, 5, 2, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number, size in enumerate(sizes):
        parts = (size + 1) // 2
        out.append(
            Parts(
                z=torch.randint(1, 9, (size,), generator=generator),
                pos=torch.randn(size, 3, generator=generator, dtype=torch.float64),
                forces=torch.randn(size, 3, generator=generator, dtype=torch.float64),
                energy=torch.tensor([float(number)], dtype=torch.float64),
                cell=torch.randn(1, 3, 3, generator=generator, dtype=torch.float64),
                pbc=torch.tensor([[True, False, number % 2 == 0]]),
                num_parts_1=torch.tensor([parts]),
                child_1=torch.stack([torch.arange(size), torch.arange(size) // 2]),
                pair_1=torch.randint(0, parts, (2, number), generator=generator),
                edge_index=torch.randint(0, size, (2, 2 * number), generator=generator),
                scalar=torch.tensor(float(number)),
                number=number,
            )
        )
    return out


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert sorted(ours.keys()) == sorted(theirs.keys())
    for key in sorted(theirs.keys()):
        a, b = ours[key], theirs[key]
        if key == "num_nodes":
            assert a == b
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, key
        assert torch.equal(a, b), key
    assert ours.num_graphs == theirs.num_graphs and ours.num_nodes == theirs.num_nodes
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_equal_those_of_pyg(chunk, batch_size):
    data = frames()
    loader = FrameLoader(data, batch_size, chunk=chunk)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(data) // batch_size)
    for number, batch in enumerate(batches):
        assert_same(batch, Batch.from_data_list(data[number * batch_size : (number + 1) * batch_size]))
        assert batch.forces.abs().max() > 0


def test_any_frames_in_any_order_repeats_included():
    data = frames()
    assert_same(FrameLoader(data).batch([5, 0, 0, 3]), Batch.from_data_list([data[i] for i in (5, 0, 0, 3)]))


def test_explicit_num_nodes_and_frames_without_pairs():
    data = frames(sizes=(3, 4))
    for frame in data:
        frame.num_nodes = frame.z.numel()
        frame.pair_1 = torch.zeros(2, 0, dtype=torch.long)
    assert_same(FrameLoader(data).batch([1, 0]), Batch.from_data_list([data[1], data[0]]))


def test_shuffling_depends_on_seed_and_epoch_only():
    def numbers(loader):
        return torch.cat([batch.number for batch in loader]).tolist()

    data = frames()
    first, second = FrameLoader(data, 2, shuffle=True, seed=3), FrameLoader(data, 2, shuffle=True, seed=3)
    zero = numbers(first)
    assert sorted(zero) == list(range(7)) and zero == numbers(second) == numbers(first)
    first.set_epoch(1)
    assert numbers(first) != zero
    assert numbers(FrameLoader(data, 2, shuffle=True, seed=4)) != zero


def test_processes_share_every_frame():
    loaders = [FrameLoader(frames(), 2, shuffle=True, rank=rank, world=2) for rank in range(2)]
    assert len(loaders[0]) == len(loaders[1]) == 2
    seen = [number for loader in loaders for batch in loader for number in batch.number.tolist()]
    assert set(seen) == set(range(7)) and len(seen) == 8


def test_endless_batches_from_any_step():
    def first(count, step=0):
        return [batch.number.tolist() for batch in itertools.islice(loader.endless(step), count)]

    loader = FrameLoader(frames(), 2, shuffle=True, seed=3, chunk=3)
    whole = first(10)
    epochs = [list(itertools.chain(*whole[start : start + 4])) for start in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]
    assert [first(4, step) for step in (3, 4, 6)] == [whole[step : step + 4] for step in (3, 4, 6)]


def test_drop_last():
    loader = FrameLoader(frames(), 2, drop_last=True)
    assert len(loader) == 3 and [batch.num_graphs for batch in loader] == [2, 2, 2]


def test_errors():
    with pytest.raises(ValueError, match="frames is empty"):
        FrameLoader([])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        FrameLoader(frames(), 0)
    data = frames()
    del data[3].forces
    with pytest.raises(ValueError, match=r"frame 3 and frame 0 differ in \['forces'\]"):
        FrameLoader(data)
    data = frames()
    for frame in data:
        frame.name = {"x": 1}
    with pytest.raises(TypeError, match="'name' holds dict"):
        FrameLoader(data)


def test_the_comparison_of_batches_rejects_a_difference():
    wanted = Batch.from_data_list(frames())
    assert_same(wanted.clone(), wanted)
    for key in ("energy", "child_1", "batch"):
        for change in (lambda t: t.roll(1, -1) + 1, lambda t: t[:-1], lambda t: t.to(torch.float16)):
            other = wanted.clone()
            other[key] = change(other[key])
            with pytest.raises(AssertionError):
                assert_same(other, wanted)
    other = wanted.clone()
    del other["forces"]
    with pytest.raises(AssertionError):
        assert_same(other, wanted)
