"""Splits: reproducible, disjoint, in range; files; errors by message."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, Split, qm9_split, read_indices, read_split, split_indices


@given(st.integers(1, 60), st.integers(0, 30), st.integers(0, 30), st.integers(0, 2**31))
def test_seeded_splits_are_disjoint_and_complete(train, val, test, seed):
    n = train + val + test
    split = split_indices(n, train, val, seed=seed)
    assert (len(split.train), len(split.val), len(split.test)) == (train, val, test)
    assert sorted([*split.train, *split.val, *split.test]) == list(range(n))
    again = split_indices(n, train, val, test, seed=seed)
    assert np.array_equal(split.train, again.train)
    assert split.fingerprint == again.fingerprint


def test_seed_zero_is_pinned():
    # The generator's stream is part of the interface: published results depend on it
    assert split_indices(10, 4, 2, seed=0).train.tolist() == [4, 6, 2, 7]
    assert split_indices(10, 4, 2, seed=0).fingerprint != split_indices(10, 4, 2, seed=1).fingerprint


def test_fractions_and_sizes():
    split = split_indices(200, 0.8, 0.1, 0.05)
    assert (len(split.train), len(split.val), len(split.test)) == (160, 20, 10)
    assert repr(split).startswith("Split(160/20/10, ")


def frame(number: int) -> AtomicData:
    return AtomicData(z=torch.tensor([number + 1]), pos=torch.zeros(1, 3))


def test_apply_and_fingerprint():
    frames = Frames([frame(i) for i in range(6)], name="six")
    parts = Split([4, 0], [1], [5, 2]).apply(frames)
    assert [int(f.z) for f in parts.train] == [5, 1]
    assert [int(f.z) for f in parts.test] == [6, 3]
    assert parts.val.name == "six"
    assert Split([0, 4], [1], [2, 5]).fingerprint == Split([4, 0], [1], [5, 2]).fingerprint
    assert Split([0, 4, 1], [], [2, 5]).fingerprint != Split([0, 4], [1], [2, 5]).fingerprint


def test_files(tmp_path):
    split = split_indices(30, 10, 5, seed=3)
    split.save(tmp_path / "split.json")
    again = read_split(tmp_path / "split.json")
    assert again.train.tolist() == split.train.tolist()
    assert again.fingerprint == split.fingerprint
    np.savez(tmp_path / "split.npz", a_train=[3, 1], a_valid=[0], a_test=[2], idx_train=[7], idx_val=[8])
    assert read_split(tmp_path / "split.npz", "a_").val.tolist() == [0]
    assert read_split(tmp_path / "split.npz").train.tolist() == [7]
    (tmp_path / "index.csv").write_text("5\n3\n9\n")
    assert read_indices(tmp_path / "index.csv").tolist() == [5, 3, 9]
    np.save(tmp_path / "index.npy", np.array([2, 4]))
    assert read_indices(tmp_path / "index.npy").tolist() == [2, 4]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Split([0, 1], [1, 2], []), ValueError, r"train and val share 1 indices, for example \[1\]"),
        (lambda: Split([0, 1], [], [3, 1]), ValueError, "train and test share 1 indices"),
        (lambda: Split([0], [2, 3], [3]), ValueError, "val and test share 1 indices"),
        (
            lambda: Split([0, 1, 1], [], []),
            ValueError,
            r"train holds 1 indices more than once, for example \[1\]",
        ),
        (lambda: Split([0, -1], [], []), ValueError, "train holds the negative index -1"),
        (lambda: Split(np.array([0.5, 1.0]), [], []), TypeError, "train must be a flat list of integers"),
        (lambda: Split([0], [9], []).check(9), ValueError, r"val holds index 9, but there are only 9 frames"),
        (lambda: Split([7], [], []).apply([frame(0), frame(1)]), ValueError, "but there are only 2 frames"),
        (lambda: split_indices(5, 4, 2), ValueError, "take 6 frames, but there are only 5"),
        (lambda: split_indices(5, 0, 2), ValueError, "train must take at least one of the 5 frames"),
        (lambda: split_indices(5, 2, -1), ValueError, "val must be a number of frames"),
        (
            lambda: split_indices(5, 1.5),
            ValueError,
            "train must be a number of frames, or a fraction below 1",
        ),
        (lambda: qm9_split("egnn"), ValueError, "family must be 'dimenet'"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_split(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_indices(tmp_path / "no.csv")
    (tmp_path / "a.json").write_text('{"training": [1]}')
    with pytest.raises(ValueError, match="has no list 'train'; there are: training"):
        read_split(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("1\n")
    with pytest.raises(ValueError, match=r"must end in .json or .npz"):
        read_split(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("1\ntwo\n")
    with pytest.raises(ValueError, match="must hold one whole number a line"):
        read_indices(tmp_path / "a.csv")


def test_qm9_families():
    for family, sizes in (("dimenet", (110_000, 10_000, 10_831)), ("cormorant", (100_000, 17_748, 13_083))):
        split = qm9_split(family)
        assert (len(split.train), len(split.val), len(split.test)) == sizes
        split.check(130_831)
    assert qm9_split("dimenet").train[:3].tolist() == [112526, 100113, 55940]
    assert qm9_split("cormorant").test[:3].tolist() == [115839, 90242, 66405]
    # The families overlap: a model of one has seen test molecules of the other
    assert np.intersect1d(qm9_split("dimenet").train, qm9_split("cormorant").test).size > 10_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", b"", "split file 's.json' is no json that can be read: Expecting value"),
        ("s.json", b"\xff", "split file 's.json' is no json that can be read: 'utf-8' codec"),
        ("s.json", b"[1, 2]", r"split file 's.json' must hold the lists train, val and test by name, got \[1, 2\]"),
        ("s.json", b'{"train": [[1], [2, 3]]}', r"train must be a flat list of integers, got \[\[1\], \[2, 3\]\]"),
        ("s.npz", b"PK", "split file 's.npz' is no npz that can be read"),
    ],
)
def test_a_damaged_split_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=message):
        read_split(tmp_path / name)


@pytest.mark.parametrize(("name", "kind"), [("rows.npy", "is no npy that can be read"), ("rows.csv", "must hold one")])
def test_a_damaged_index_file_is_named(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"index file '{name}' {kind}"):
        read_indices(tmp_path / name)
