"""Frames in HDF5 files: every frame once per epoch, in a seeded order, with a few files in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import weakref

import numpy as np
import pytest
import torch

import factories
from damage import assert_error_or_right, damaged_copies
from nbody_pyg.cli import main
from nbody_pyg.datasets import UnitFiles, fit_atomic_energies, load_embedded, read_frames
from nbody_pyg.deploy import load_model, read_metadata
from nbody_pyg.io.checkpoint import read_checkpoint
from nbody_pyg.nn.repulsion import shortest_distances
from nbody_pyg.training import TrainingConfig, fit
from nbody_pyg.training.config import load_config
from nbody_pyg.training.stream import StreamLoader, shortest_in_units

h5py = pytest.importorskip("h5py", reason="units are HDF5 files, which need h5py")

E0 = {1: -13.6, 6: -1030.0, 8: -2040.0}
SETTINGS = TrainingConfig(
    max_steps=5, batch_atoms=20, dtype="float64", validate_every=3, log_every=1, warmup_steps=0, constant_fraction=1.0
)


def write_unit(path, number: int, count: int = 6, **changed) -> None:
    """Ethanol, whole and without one or two hydrogens; the energy of a frame is its number, from 1 on, plus E0."""
    columns = {name: [] for name in ("z", "pos", "forces", "energy", "natoms", "total_charge", "dipole", "split")}
    frames = load_embedded("ethanol")
    for row in range(count):
        frame, kept = frames[number * count + row], slice(0, 9 - row % 3)
        columns["z"] += frame.z[kept].tolist()
        columns["pos"] += frame.pos[kept].tolist()
        columns["forces"] += frame.forces[kept].tolist()
        label = (number * count + row + 1) / 100
        columns["energy"].append(label + sum(E0[z] for z in frame.z[kept].tolist()))
        columns["natoms"].append(len(frame.z[kept]))
        columns["total_charge"].append(0)
        columns["dipole"].append([0.1, 0.2, float(row)])
        columns["split"].append({4: 1, 5: 2}.get(row, 0))
    columns |= changed
    types = {"z": np.uint8, "natoms": np.int32, "total_charge": np.int8, "split": np.uint8, "forces": np.float32}
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs["kind"] = f"kind {number % 2}"
        for name, values in columns.items():
            if values is not None:
                file.create_dataset(name, data=np.array(values, dtype=types.get(name, np.float64)), fletcher32=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five files of six frames, of which four are for training."""
    out = tmp_path_factory.mktemp("units")
    for number in range(5):
        write_unit(out / f"unit_{number:05d}.h5", number)
    (out / "manifest.json").write_text("{}")
    return out


@pytest.fixture
def units(folder):
    return UnitFiles(sorted(folder.glob("*.h5")))


def numbers(batch) -> list[int]:
    """The numbers of the frames of a batch, from their energies."""
    e0 = torch.zeros(9, dtype=torch.float64).index_put((torch.tensor([*E0]),), torch.tensor([*E0.values()]).double())
    own = batch.energy - torch.zeros(batch.num_graphs).double().index_add(0, batch.batch, e0[batch.z])
    return (own * 100).round().int().tolist()


def loader(units, **given) -> StreamLoader:
    return StreamLoader(units, lambda frames: frames, **({"batch_atoms": 20, "window": 2, "seed": 3} | given))


# -- files -----------------------------------------------------------------------------------------------------
def test_a_file_is_read_in_our_units_and_splits(units, folder):
    assert len(units) == 20 and units.count("val") == units.count("test") == 5
    assert repr(units) == "UnitFiles(5 files, 20 training frames; H, C, O)"
    frames = units.read(1, [3, 0])
    source = load_embedded("ethanol")
    assert torch.equal(frames[0].pos, source[9].pos) and torch.equal(frames[1].z, source[6].z)
    torch.testing.assert_close(frames[0].forces.double(), source[9].forces, rtol=1e-6, atol=1e-6)
    assert frames[0].energy.dtype == torch.float64 and float(frames[0].energy) == pytest.approx(
        0.10 + sum(E0[z] for z in source[9].z.tolist()), abs=1e-9
    )
    assert frames[0].charge.tolist() == [0.0] and frames[0].dipole.shape == (1, 3) and frames.numbers == (3, 0)
    assert len(read_frames(folder / "unit_00000.h5")) == 6
    fitted = fit_atomic_energies(units.sample("train", 15))
    assert fitted[1] == pytest.approx(E0[1], abs=2.0)


def test_shortest_distances_of_all_training_frames(units, folder, monkeypatch):
    monkeypatch.setattr("nbody_pyg.training.stream._LEFT_OUT", 0.0)
    frames = [units.read(number, units.rows(number)) for number in range(5)]
    every = [frame for of_file in frames for frame in of_file]
    assert len(every) == 20
    expected = shortest_distances(every)
    found = shortest_in_units(units)
    assert found.keys() == expected.keys() == {"H-H", "H-C", "H-O", "C-C", "C-O"} and found["H-C"] > 0.9
    assert found == pytest.approx(expected, abs=1e-10)
    # One of twenty left out: the second shortest
    monkeypatch.setattr("nbody_pyg.training.stream._LEFT_OUT", 0.05)
    single = sorted(shortest_distances([frame])["C-C"] for frame in every)
    assert shortest_in_units(units)["C-C"] == pytest.approx(single[1], abs=1e-10) and single[1] > single[0]


def test_shortest_distances_across_a_cell(tmp_path):
    given = {"cell": [3.5 * np.eye(3), np.zeros((3, 3))], "pbc": [[1, 1, 1], [0, 0, 0]]}
    one = {"z": [8, 1, 8, 1], "natoms": [2, 2], "total_charge": [0, 0], "split": [0, 0], "energy": [1.0, 2.0]}
    pos = [[0.1, 0.0, 0.0], [3.2, 0.0, 0.0], [0.1, 0.0, 0.0], [1.3, 0.0, 0.0]]
    write_unit(tmp_path / "a.h5", 0, pos=pos, forces=np.ones((4, 3)), dipole=None, **one, **given)
    assert shortest_in_units(UnitFiles([tmp_path / "a.h5"]))["H-O"] == pytest.approx(0.4, abs=1e-10)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "frame 1 of a.h5"), (None, "a.h5, training frames: .*coincident")]
)
def test_damaged_positions_name_the_file(tmp_path, value, message):
    pos = [[0.1, 0.0, 0.0], [1.3, 0.0, 0.0], [0.1, 0.0, 0.0], [0.1 if value is None else value, 0.0, 0.0]]
    one = {"z": [8, 1, 8, 1], "natoms": [2, 2], "total_charge": [0, 0], "split": [0, 0], "energy": [1.0, 2.0]}
    write_unit(tmp_path / "a.h5", 0, pos=pos, forces=np.ones((4, 3)), dipole=None, **one)
    with pytest.raises(ValueError, match=message):
        shortest_in_units(UnitFiles([tmp_path / "a.h5"]))


@pytest.mark.slow
def test_runs_on_files_only_repel_below_their_distances(folder, units, tmp_path):
    shortest = shortest_in_units(units)
    words = [f"--data.train={folder}", "--model.channels=4", "--training.max_steps=2", "--output.plot=false"]
    assert main(["train", *words, f"--output.folder={tmp_path / 'a'}"]) == 0
    first = load_model(tmp_path / "a" / "model.nbody")
    assert first.repulsion.reach["C-O"] == pytest.approx(0.9 * shortest["C-O"])
    assert (
        main(["train", *words, "--init", str(tmp_path / "a" / "model.nbody"), f"--output.folder={tmp_path / 'b'}"]) == 0
    )
    second = load_model(tmp_path / "b" / "model.nbody")
    assert second.repulsion.reach["C-O"] == pytest.approx(0.9 * shortest["C-O"])
    lengths = second.model.inner_cutoff.lengths
    assert lengths["C-O"] == pytest.approx(0.95 * shortest["C-O"], abs=1e-3)


def test_samples_are_seeded_and_of_one_split(units):
    first, again, other = units.sample("train", 7), units.sample("train", 7), units.sample("train", 7, seed=1)
    keys = [[float(f.energy) for f in frames] for frames in (first, again, other)]
    assert keys[0] == keys[1] != keys[2] and len(set(keys[0])) == 7
    assert {round(float(f.dipole[0, 2])) for f in units.sample("val")} == {4}
    assert units.read(1).kinds[0] == "kind 1" and set(units.sample("val").kinds) == {"kind 0", "kind 1"}
    assert {round(float(f.dipole[0, 2])) for f in units.sample("test", 3)} == {5}


def test_a_sample_has_every_element(tmp_path, folder):
    """One frame in 25 has sulfur: without it the model would not know the element."""
    write_unit(tmp_path / "rare.h5", 5, count=1, z=[16, *load_embedded("ethanol")[5].z[1:].tolist()])
    units = UnitFiles([*sorted(folder.glob("*.h5")), tmp_path / "rare.h5"])
    for seed in range(3):
        assert 16 in {int(z) for f in units.sample("train", 4, seed=seed) for z in f.z}


def test_fewer_frames_are_the_first_ones(folder):
    files = sorted(folder.glob("*.h5"))
    few = UnitFiles(files, num_train=6)
    assert len(few) == 6 and few.count("val") == 5 and few.digest() != UnitFiles(files).digest()
    assert sorted(n for b in loader(few) for n in numbers(b)) == [1, 2, 3, 4, 7, 8]
    with pytest.raises(ValueError, match="must hold 99 training frames, got 20; name more files"):
        UnitFiles(files, num_train=99)
    # A file that stands before the others now changes nothing for those that are kept
    later = UnitFiles(files[1:], num_train=6)
    same = UnitFiles(files, num_train=6).only(later.names)
    assert len(same) == 6 and same.digest() == later.digest()
    assert [s.tolist() for s in same.splits] == [s.tolist() for s in later.splits]


def test_files_of_one_name_in_two_folders_are_told_apart(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(sorted(folder.glob("*.h5"))[name == "two"], tmp_path / name / "a.h5")
    both = UnitFiles(sorted(tmp_path.glob("*/a.h5")))
    assert both.names == ["one/a.h5", "two/a.h5"]
    kept = both.only(["two/a.h5"])
    assert kept.files == [tmp_path / "two" / "a.h5"] and kept.digest() == UnitFiles(kept.files).digest()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forces": None}, r"a\.h5 must hold forces with 2 axes; make it anew"),
        ({"pos": [1.0, 2.0]}, r"a\.h5 must hold pos with 2 axes"),
        ({"natoms": [1] * 6}, r"a\.h5 is damaged: lengths of its datasets differ"),
        ({"natoms": [9, 8, 7, 9, 17, -2]}, r"a\.h5 is damaged: lengths of its datasets differ"),
        ({"split": [3] * 6}, r"a\.h5 is damaged: .* or a split is above 2"),
    ],
)
def test_damaged_files_are_refused(tmp_path, changed, message):
    write_unit(tmp_path / "a.h5", 0, **changed)
    with pytest.raises(ValueError, match=message):
        UnitFiles([tmp_path / "a.h5"])


def test_files_without_training_frames(tmp_path):
    """They are read and sampled, but not trained on."""
    write_unit(tmp_path / "a.h5", 0, split=[1, 1, 2, 2, 2, 2])
    units = UnitFiles([tmp_path / "a.h5"])
    assert len(units.sample("test")) == 4 and len(read_frames(tmp_path / "a.h5")) == 6
    for use in (units.sample, lambda: loader(units)):
        with pytest.raises(ValueError, match=r"1 files from .* on must hold 1 training frames, got 0"):
            use()


@pytest.mark.parametrize(("flips", "cuts"), [(100, 20), pytest.param(1000, 200, marks=pytest.mark.slow)])
def test_files_with_checksums_are_refused_or_right(tmp_path, flips, cuts):
    write_unit(tmp_path / "a.h5", 0)

    def content(path):
        frames = UnitFiles([path]).read(0)  # without their kind: HDF5 has no checksums of texts
        return [{key: value.tolist() for key, value in frame.to_dict().items()} for frame in frames]

    assert_error_or_right(tmp_path / "a.h5", content, flips, cuts)


@pytest.mark.slow
def test_whatever_h5py_raises_names_the_file(tmp_path):
    """Files without checksums may give other numbers, but no error of the library."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.update({"natoms": [1], "z": [1], "pos": [[0.0] * 3], "forces": [[0.0] * 3], "energy": [1.0]})
    for content in damaged_copies((tmp_path / "a.h5").read_bytes(), 150, 20):
        (tmp_path / "b.h5").write_bytes(content)
        with contextlib.suppress(ValueError):
            UnitFiles([tmp_path / "b.h5"]).read(0)


def test_cut_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"a\.h5 is no readable HDF5 file"):
        UnitFiles([tmp_path / "a.h5"])
    with pytest.raises(FileNotFoundError, match=r"no file at .*b\.h5"):
        UnitFiles([tmp_path / "b.h5"])
    with pytest.raises(ValueError, match="paths must name at least one HDF5 file"):
        UnitFiles([])
    write_unit(tmp_path / "c.h5", 0, energy=[float("nan")] * 5 + [float("inf")])
    with pytest.raises(ValueError, match=r"frame 5 of c\.h5: energy is inf"):
        UnitFiles([tmp_path / "c.h5"]).read(0)


# -- batches -----------------------------------------------------------------------------------------------------
def test_every_frame_comes_once_per_epoch_in_a_seeded_order(units):
    train = {6 * file + row + 1 for file in range(5) for row in range(4)}
    stream = loader(units)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([numbers(batch) for batch in stream])
        assert len(orders[-1]) == len(stream) and all(orders[-1])
        flat = [n for batch in orders[-1] for n in batch]
        assert len(flat) == 20 and set(flat) == train
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != [numbers(batch) for batch in loader(units, seed=4)]
    # Frames of several files are mixed within a window
    assert any(len({(n - 1) // 6 for n in batch}) > 1 for batch in orders[0])


@pytest.mark.parametrize("atoms", [9, 20, 50, 10_000])
def test_batches_have_about_equal_numbers_of_atoms(units, atoms):
    stream = loader(units, batch_atoms=atoms)
    sizes = [len(batch.z) for batch in stream]
    mean = sum(sizes) / len(sizes)
    assert len(sizes) == len(stream) == max(1, stream.num_atoms // atoms)
    assert sum(sizes) == stream.num_atoms == 165 and max(sizes) <= mean + 9 and min(sizes) > 0


def test_a_stream_goes_on_from_any_batch(units):
    stream = loader(units)
    count = 2 * len(stream) + 3
    endless = stream.endless()
    every = [numbers(next(endless)) for _ in range(count)]
    for start in (1, len(stream) - 1, len(stream), len(stream) + 2):
        later = loader(units).endless(start)
        assert [numbers(next(later)) for _ in range(count - start)] == every[start:]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches(units, world):
    whole = [numbers(batch) for batch in loader(units)]
    shares = [[numbers(b) for b in loader(units, rank=rank, world=world)] for rank in range(world)]
    assert {len(share) for share in shares} == {len(whole) // world}
    for rank, share in enumerate(shares):
        assert share == whole[rank::world][: len(share)]


def test_few_files_are_in_memory(units, monkeypatch):
    """The largest number of files whose frames are alive while an epoch runs."""
    refs: list[weakref.ref] = []
    read = UnitFiles.read

    def counted(self, number, rows=None):
        frames = read(self, number, rows)
        for frame in frames:
            frame.file = torch.tensor([number])
            refs.append(weakref.ref(frame))
        return frames

    monkeypatch.setattr(UnitFiles, "read", counted)
    gc.freeze()  # what is there already need not be looked at again and again
    for window, bound in ((1, 2), (2, 4), (5, 5)):
        most = 0
        for batch in loader(units, window=window):
            assert batch.num_graphs
            gc.collect()
            alive = [frame for frame in (ref() for ref in refs) if frame is not None]
            most = max(most, len({int(frame.file) for frame in alive}))
            del alive
        assert window <= most <= bound, f"{most} files with a window of {window}"
    gc.unfreeze()
    assert most == 5, "a window of all files holds them all: the count sees them"


# -- runs --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_on_files_goes_on_with_the_same_bits(folder, units, tmp_path):
    ends = []
    for name, stops in (("one", (6,)), ("two", (2, 6))):
        for number, steps in enumerate(stops):
            model = factories.potential(e0=E0)
            last = tmp_path / name / "last.ckpt" if number else None
            val = units.sample("val")
            fit(model, units, val, dataclasses.replace(SETTINGS, max_steps=steps), tmp_path / name, last)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends) and float(ends[0].abs().max()) > 0.1
    start = torch.cat([p.detach().flatten() for p in factories.potential(e0=E0).parameters()])
    assert float((ends[0] - start).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="files must be there for the run that goes on, from unit_00000"):
        fit(model, UnitFiles([folder / "unit_00001.h5"]), val, SETTINGS, tmp_path / "two", last)
    with pytest.raises(ValueError, match="in_memory must be as in the run that is resumed, 8, got 2"):
        fit(model, UnitFiles(units.files, in_memory=2), val, SETTINGS, tmp_path / "two", last)
    with pytest.raises(ValueError, match="in_memory must be at least 1, got 0"):
        UnitFiles(units.files, in_memory=0)
    with pytest.raises(ValueError, match="batch_atoms is for frames in HDF5 files, got 20; use batch_size"):
        fit(model, val, val, SETTINGS, tmp_path / "three")


@pytest.mark.parametrize("name", ["pos", "forces", "dipole"])
def test_a_run_does_not_go_on_with_other_positions_or_labels(tmp_path, name):
    """The energies, sizes and splits are the same."""
    for number in range(2):
        write_unit(tmp_path / f"{number}.h5", number)
    units = UnitFiles(sorted(tmp_path.glob("*.h5")))
    before, settings = units.content(), dataclasses.replace(SETTINGS, max_steps=1)
    fit(factories.potential(e0=E0), units, (), settings, tmp_path / "run")
    with h5py.File(tmp_path / "1.h5", "r+") as file:
        file[name][2, 1] += 0.01
    changed = UnitFiles(units.files)
    assert changed.digest() == units.digest() and changed.content() != before
    with pytest.raises(ValueError, match="training frames must be those of the run that is resumed"):
        fit(factories.potential(e0=E0), changed, (), dataclasses.replace(settings, max_steps=2), tmp_path / "run",
            tmp_path / "run" / "last.ckpt")  # fmt: skip


@pytest.mark.slow
def test_the_recipe_runs_and_leaves_new_files_out(folder, tmp_path, request, capsys):
    here = tmp_path / "units"
    here.mkdir()
    for path in folder.iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    recipe = str(request.config.rootpath / "configs" / "pretrained.yaml")
    words = ["train", recipe, "--data.train", str(here), "--model.channels", "2",
             "--model.lmax", "1", "--model.scheme.radii", "[3.0]", "--training.batch_atoms", "30",
             "--output.folder", str(tmp_path / "r"), "--output.plot", "false"]  # fmt: skip
    assert main([*words, "--training.max_steps", "3"]) == 0
    first = read_metadata(tmp_path / "r" / "model.nbody")
    assert first["metadata"]["num_frames"] == {"train": 20, "val": 5, "test": 5}
    reach = first["repulsion"]["reach"]
    shortest = shortest_in_units(UnitFiles(sorted(here.glob("*.h5"))))
    assert reach["H-O"] == pytest.approx(0.9 * shortest["H-O"]) and reach["O-O"] == pytest.approx(0.75 * 2 * 0.66)
    assert first["e0"].keys() == {"1", "6", "8"} and first["metadata"]["errors"]["test"]["forces_mae"] > 0
    write_unit(here / "unit_00005.h5", 5)
    assert main([*words, "--training.max_steps", "5", "--output.resume", "true"]) == 0
    found = read_checkpoint(tmp_path / "r" / "last.ckpt")
    assert found["global_step"] == 5 and found["run"]["frames"]["train"]["count"] == 20
    assert found["run"]["frames"]["train"]["files"] == [f"unit_{n:05d}.h5" for n in range(5)]
    # The model of files is fine-tuned, with frames of them replayed
    more = ["train", "--init", str(tmp_path / "r" / "model.nbody"), "--data.embedded", "ethanol", "--data.num_train",
            "4", "--data.num_val", "2", "--training.max_steps", "2", "--finetune.replay", str(here), "--output.plot",
            "false", "--finetune.replay_frames", "3", "--output.folder", str(tmp_path / "s")]  # fmt: skip
    capsys.readouterr()
    assert main(more) == 0
    assert "replay  3 of " in capsys.readouterr().out
    assert load_model(tmp_path / "s" / "model.nbody").ancestor["name"] == "model.nbody"
    for wrong in (["--data.test", "x.xyz"], ["--data.units", "Ha"]):
        assert main([*words, *wrong]) == 1
        assert f"data{wrong[0][6:]} must not be given for HDF5 files" in capsys.readouterr().err


def test_the_recipe_is_a_configuration(request):
    config = load_config(request.config.rootpath / "configs" / "pretrained.yaml")
    assert config.training.batch_atoms == 160 and config.model.arguments == {"channels": 48, "lmax": 2}
    assert config.training.energy_per == "atom" and config.data.files_in_memory == 8
