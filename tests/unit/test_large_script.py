"""The script that makes data of large molecules: its pieces, an interrupted run, and the fixture that it made."""

from __future__ import annotations

import numpy as np
import pytest
from ase.io import read

from loading import load_script
from nbody_pyg.datasets import read_frames

REASON = "making data of large molecules needs rdkit, h5py and tblite"


@pytest.fixture
def script(request, monkeypatch):
    for name in ("h5py", "rdkit.Chem", "tblite.ase"):
        pytest.importorskip(name, reason=REASON)
    folder = request.config.rootpath / "datasets"
    monkeypatch.syspath_prepend(str(folder))
    return load_script(folder / "make_large.py")


@pytest.mark.parametrize(("name", "atoms"), [("ac_ala3_nhme", 42), ("salt_bridge", 25)])
def test_frames_of_the_fixture_are_read(request, name, atoms):
    folder = request.config.rootpath / "tests" / "fixtures" / "large"
    files = sorted(folder.glob(f"{name}_*.extxyz"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000 and len(files) >= 3
    for path in files:
        for frame in read_frames(path):
            assert len(frame.z) == atoms and float(frame.charge) == 0.0 and float(frame.energy) < -1000.0
            assert float(frame.forces.sum(0).abs().max()) < 1e-3 < float(frame.forces.abs().max())


def test_pieces_share_the_frames_among_the_walkers(script):
    assert script.pieces(2, 25) == [(0, 0, 10), (0, 1, 3), (1, 0, 10), (1, 1, 2)]
    for kind in script.KINDS.values():
        for walkers, frames in kind.splits.values():
            found = script.pieces(walkers, frames)
            assert sum(count for *_, count in found) == frames and {walker for walker, *_ in found} == {*range(walkers)}


def test_random_numbers_depend_on_every_name(script):
    first = script.generator("dha", "train", 0, 1).random(3)
    np.testing.assert_array_equal(first, script.generator("dha", "train", 0, 1).random(3))
    for other in (("dha", "test", 0, 1), ("dha", "train", 1, 1), ("dha", "train", 0, 2), ("at_at", "train", 0, 1)):
        assert np.abs(script.generator(*other).random(3) - first).min() > 0


@pytest.mark.parametrize(("kind", "atoms"), [("ac_ala3_nhme", 42), ("dha", 56), ("at_at", 60), ("stachyose", 87)])
def test_molecules_have_their_sizes(script, kind, atoms):
    assert len(script.KINDS[kind].start("train", 0, np.random.default_rng(0))) == atoms


@pytest.mark.parametrize(("pair", "bridges"), [("AT", {(7, 21), (9, 23)}), ("CG", {(0, 23), (7, 21), (6, 20)})])
def test_paired_bases_are_at_the_distance_of_hydrogen_bonds(script, pair, bridges):
    atoms = script.stack(f"{pair} {pair}", np.random.default_rng(0))
    half = len(atoms) // 2
    size = len(script.base(pair[0], np.random.default_rng(0)))
    near = {
        (i, j)
        for i in range(size)
        for j in range(size, half)
        if {int(atoms.numbers[i]), int(atoms.numbers[j])} <= {7, 8} and 2.6 < atoms.get_distance(i, j) < 3.2
    }
    assert near == bridges
    assert atoms.positions[half:, 2].mean() - atoms.positions[:half, 2].mean() == pytest.approx(script.RISE, abs=0.1)


def test_ions_of_the_salt_bridge_are_at_the_distance_of_the_walker(script):
    for split, walker, wanted in (("far", 17, 29.5), ("train", 0, 4.625)):
        atoms = script.salt_bridge(split, walker, np.random.default_rng(0))
        first, second = atoms.info["held"]
        assert atoms.symbols[first] == "N" and atoms.symbols[second] == "S"
        assert atoms.get_distance(first, second) == pytest.approx(wanted)
        assert len(atoms) == 25 + 12 * (walker % 2)
        apart = np.linalg.norm(atoms.positions[:17, None] - atoms.positions[None, 17:25], axis=-1)
        assert apart.min() > 1.2


@pytest.mark.slow
def test_charged_peptides_of_the_test_are_longer(script):
    lengths = {}
    for split in ("train", "test"):
        found = [script.peptide(split, walker, np.random.default_rng(walker)) for walker in range(2)]
        lengths[split] = [len(atoms.info["name"]) for atoms in found]
        for atoms in found:
            assert atoms.info["charge"] == 2 and sum(atoms.numbers) % 2 == 0
    assert lengths == {"train": [2, 3], "test": [6, 7]}


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", [None, "organic"])
def test_an_interrupted_run_gives_the_same_file(script, tmp_path, monkeypatch, dynamics):
    settings = {"PIECE": 2, "EQUILIBRATION": 3, "STRIDE": 2}
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    water = script.Kind(
        lambda split, walker, rng: script.named(script.conformer("O", rng), "w"), 300.0, {"test": (2, 6)}
    )
    monkeypatch.setitem(script.KINDS, "water", water)
    whole = script.make_split("water", "test", tmp_path / "whole", dynamics)
    made, stop = script.piece, []

    def stopped(*arguments):
        if len(stop) == 1:
            raise KeyboardInterrupt
        stop.append(arguments)
        return made(*arguments)

    monkeypatch.setattr(script, "piece", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.make_split("water", "test", tmp_path / "cut", dynamics)
    monkeypatch.setattr(script, "piece", made)
    assert script.make_split("water", "test", tmp_path / "cut", dynamics).read_bytes() == whole.read_bytes()
    frames = read(whole, ":")
    for frame in frames:
        assert frame.info["dynamics"] == (dynamics or "GFN2-xTB")
        atoms = frame.copy()
        atoms.calc = script.calculator(0)
        assert frame.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
    assert len(frames) == 6 and [frame.info["walker"] for frame in frames] == [0, 0, 0, 1, 1, 1]
    assert np.abs(frames[0].positions - frames[1].positions).max() > 1e-3
    assert not list(tmp_path.rglob("*.part")) and not list((tmp_path / "cut" / ".pieces").iterdir())


def test_a_walk_that_breaks_bonds_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "EQUILIBRATION", 1)
    monkeypatch.setattr(script, "ATTEMPTS", 2)
    monkeypatch.setattr(script, "sound", lambda frame: False)
    water = script.Kind(
        lambda split, walker, rng: script.named(script.conformer("O", rng), "w"), 300.0, {"test": (1, 2)}
    )
    monkeypatch.setitem(script.KINDS, "water", water)
    with pytest.raises(RuntimeError, match="not sound in 2 attempts"):
        script.make_split("water", "test", tmp_path)
