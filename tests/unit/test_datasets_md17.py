"""rMD17 and MD17: both layouts of files, the 950/50 rule, errors by message."""

from __future__ import annotations

import numpy as np
import pytest

from nbody_pyg.datasets import load_md17, load_rmd17
from nbody_pyg.units import energy_factor

KCAL = energy_factor("kcal/mol")
NUM = 2400


def arrays(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Frames whose numbers tell their row in the full file."""
    pos = np.zeros((len(rows), 4, 3)) + np.arange(4)[None, :, None] + rows[:, None, None] * 1e-4
    return {
        "nuclear_charges": np.array([6, 1, 8, 1], dtype=np.uint8),
        "coords": pos,
        "energies": -1000.0 - rows,
        "forces": pos * 2.0,
        "old_indices": rows + 7,
    }


@pytest.fixture
def lists():
    order = np.random.default_rng(0).permutation(NUM)
    return order[:1000], order[1000:2000]


@pytest.fixture
def packed(tmp_path, lists):
    for part, rows in zip(("train", "test"), lists, strict=True):
        np.savez(tmp_path / f"rmd17_aspirin_{part}_01.npz", **arrays(rows))
    return tmp_path


@pytest.fixture
def archive(tmp_path, lists):
    root = tmp_path / "archive"
    (root / "rmd17" / "npz_data").mkdir(parents=True)
    (root / "rmd17" / "splits").mkdir()
    np.savez(root / "rmd17" / "npz_data" / "rmd17_aspirin.npz", **arrays(np.arange(NUM)))
    for part, rows in zip(("train", "test"), lists, strict=True):
        (root / "rmd17" / "splits" / f"index_{part}_01.csv").write_text("\n".join(map(str, rows)) + "\n")
    return root


def test_950_and_50_of_the_first_1000(packed, lists):
    train, val, test = load_rmd17(packed, "aspirin")
    assert (len(train), len(val), len(test)) == (950, 50, 1000)
    energies = [frame.energy.item() for frame in (*train, *val, *test)]
    np.testing.assert_allclose(energies, (-1000.0 - np.concatenate(lists)) * KCAL, rtol=1e-15)


def test_the_published_archive_gives_the_same(packed, archive):
    for ours, theirs in zip(load_rmd17(packed, "aspirin"), load_rmd17(archive, "aspirin"), strict=True):
        assert len(ours) == len(theirs)
        assert all(a.energy.equal(b.energy) and a.forces.equal(b.forces) for a, b in zip(ours, theirs, strict=True))


def test_small_training_sets_are_the_first_frames(packed, lists):
    train, val, test = load_rmd17(packed, "aspirin", num_train=50, num_val=0)
    assert [round(-f.energy.item() / KCAL - 1000) for f in train] == lists[0][:50].tolist()
    assert (len(val), len(test)) == (0, 1000)


def test_whole_files(archive):
    frames = load_md17(archive, "revised aspirin", rows=slice(0, None, 800))
    assert [round(-f.energy.item() / KCAL - 1000) for f in frames] == [0, 800, 1600]
    np.savez(
        archive / "md17_salicylic.npz",
        z=[6, 1, 8, 1],
        R=np.ones((2, 4, 3)),
        E=[[1.0], [2.0]],
        F=np.ones((2, 4, 3)),
    )
    frames = load_md17(archive, "salicylic acid")
    assert frames[1].energy.item() == pytest.approx(2 * KCAL, rel=1e-15)


def test_errors(packed, archive, tmp_path):
    with pytest.raises(ValueError, match=r"molecule 'asprin' is not in rMD17; did you mean aspirin\?"):
        load_rmd17(packed, "asprin")
    with pytest.raises(ValueError, match="split must be 1, 2, 3, 4 or 5, got 6"):
        load_rmd17(packed, "aspirin", 6)
    with pytest.raises(ValueError, match=r"num_train \+ num_val must take 1 to 1000 frames"):
        load_rmd17(packed, "aspirin", num_train=990)
    with pytest.raises(FileNotFoundError, match=r"holds neither rmd17_ethanol_train_01.npz nor rmd17/npz_data"):
        load_rmd17(packed, "ethanol")
    with pytest.raises(FileNotFoundError, match=r"index_train_02.csv is missing"):
        load_rmd17(archive, "aspirin", 2)
    with pytest.raises(ValueError, match=r"molecule 'etanol' is not in MD17; did you mean ethanol\?"):
        load_md17(packed, "etanol")
    with pytest.raises(ValueError, match=r"molecule 'etanol' is not in rMD17; did you mean ethanol\?"):
        load_md17(packed, "revised etanol")
    with pytest.raises(FileNotFoundError, match=r"md17_ethanol.npz is neither in"):
        load_md17(tmp_path, "ethanol")


def test_files_of_two_splits_are_refused(packed, lists):
    np.savez(packed / "rmd17_aspirin_test_01.npz", **arrays(lists[0][5:9]))
    with pytest.raises(ValueError, match="share frames; use files of one split"):
        load_rmd17(packed, "aspirin")
