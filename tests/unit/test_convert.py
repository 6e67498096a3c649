"""nbody convert: any files as HDF5 units, a part at a time, with the keys, units and checks of training."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.db import connect
from ase.io import read, write
from unit.test_many_kinds_of_frames import ATOMS, KINDS, TINY

import factories
from damage import assert_error_or_right
from nbody_pyg.cli import main
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import UnitFiles, label_audit, read_frames
from nbody_pyg.datasets import convert as module
from nbody_pyg.datasets.convert import ConvertConfig, convert
from nbody_pyg.datasets.frames import LABEL_SHAPES
from nbody_pyg.datasets.readers import find_files, join_frames
from nbody_pyg.deploy import read_metadata
from nbody_pyg.io.checkpoint import read_checkpoint
from nbody_pyg.training import TrainingConfig, fit
from nbody_pyg.training.config import DataConfig
from nbody_pyg.training.prepare import load_data

h5py = pytest.importorskip("h5py", reason="units are HDF5 files, which need h5py")
KEYS = ("z", "pos", "cell", "pbc", *LABEL_SHAPES)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kinds() -> list[Atoms]:
    """Frames of all kinds, with a ``config_type`` and some with charge and spin."""
    systems = []
    for number, (name, given) in enumerate(KINDS.items()):
        atoms = given.copy()
        atoms.calc = given.calc
        atoms.info["config_type"] = name.split(",")[0].replace(" ", "_")
        if number % 7 == 3:
            atoms.info |= {"charge": 1, "spin": 2}
        systems.append(atoms)
    return systems


def periodic(count: int = 24, seed: int = 0) -> list[Atoms]:
    """Cells of copper and aluminium with all labels."""
    from unit.test_many_kinds_of_frames import cell, labelled

    return [labelled(cell(), seed=seed + number) for number in range(count)]


def every(folder: str) -> dict[int, tuple[AtomicData, str]]:
    """Number -> frame and kind, of all units."""
    units = UnitFiles(sorted(Path(folder).glob("*.h5")))
    found = {}
    for number in range(len(units.files)):
        frames = units.read(number)
        found |= {n: (f, kind) for n, f, kind in zip(frames.numbers, frames, frames.kinds, strict=True)}
    return found


def same(one: AtomicData, other: AtomicData) -> bool:
    return all((one.get(key) is None) == (other.get(key) is None) for key in KEYS) and all(
        torch.equal(one[key], other[key]) for key in KEYS if one.get(key) is not None
    )


# -- what is written ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_file", [1, 4, 100])
def test_units_hold_what_the_readers_give(here, per_file):
    systems = kinds()
    write("a.xyz", systems[:10])
    write("b.traj", systems[10:])
    whole = join_frames([read_frames(path) for path in ("a.xyz", "b.traj")])
    convert(["a.xyz", "b.traj"], "u", ConvertConfig(frames_per_file=per_file))
    found = every("u")
    assert len(list(Path("u").glob("*.h5"))) == -(-len(systems) // per_file)
    assert sorted(found) == list(range(len(systems)))
    for number, (frame, kind) in found.items():
        assert same(frame, whole[number]) and kind == systems[number].info["config_type"], number
    assert sum(frame.get("stress") is not None for frame, _ in found.values()) == 6
    assert not any(Path("u").glob(".*"))


def test_the_audit_is_that_of_the_whole(here):
    write("a.xyz", kinds())
    table = convert("a.xyz", "u", ConvertConfig(num_val=0, frames_per_file=5))
    whole = label_audit({"train": read_frames("a.xyz")})
    assert len(table.rows) == len(whole.rows) >= 5
    for one, other in zip(table.rows, whole.rows, strict=True):
        assert (one.label, one.keys, one.found, one.total, one.count) == (
            other.label, other.keys, other.found, other.total, other.count,
        )  # fmt: skip
        for name in ("minimum", "maximum", "mean", "std"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-10)
    assert max(row.std for row in table.rows) > 0.1


def test_splits_are_drawn_and_isolated_atoms_stay_in_training(here, capsys):
    write("a.xyz", kinds())
    write("t.xyz", periodic(3, seed=50))
    options = ["--num-val", "8", "--num-test", "6", "--frames-per-file", "7"]
    assert main(["convert", "a.xyz", "--test", "t.xyz", "--out", "u", *options]) == 0
    out = capsys.readouterr().out
    assert "written to u: 9 train, 8 val, 9 test frames; nbody train --data.train u" in out
    units = UnitFiles(sorted(Path("u").glob("*.h5")))
    train = units.sample("train")
    assert {int(f.z) for f in train if len(f.z) == 1} == {13, 29}
    # Frames of the test file come after those of the training file
    assert {n for n in units.sample("test").numbers if n >= len(KINDS)} == {23, 24, 25}
    convert("a.xyz", "again", ConvertConfig(num_val=8, num_test=6, frames_per_file=7), test="t.xyz")
    assert UnitFiles(sorted(Path("again").glob("*.h5"))).digest() == units.digest()
    with pytest.raises(ValueError, match="num_val and num_test must be at most the 20 training frames, got 20 and 1"):
        convert("a.xyz", "more", ConvertConfig(num_val=20, num_test=1))


def test_structures_of_two_splits_are_told(here):
    write("a.xyz", [*periodic(10), *periodic(10)])
    table = convert("a.xyz", "u", ConvertConfig(num_val=4, frames_per_file=6))
    assert "of the 4 structures of val stand in train too" in str(table)


def test_keys_units_and_formats_are_those_of_training(here):
    systems = periodic(6)
    for atoms in systems:
        atoms.info["my_energy"] = atoms.calc.results["energy"] / 27.211386245988
        atoms.arrays["my_forces"] = atoms.calc.results["forces"] / 27.211386245988
        atoms.calc = None
    write("a.dat", systems, format="extxyz")
    given = {"keys": {"energy": "my_energy", "forces": "my_forces"}, "units": "Ha, angstrom", "file_format": "extxyz"}
    convert("a.dat", "u", ConvertConfig(**given, frames_per_file=4))
    whole = read_frames("a.dat", **given)
    assert all(same(frame, whole[number]) for number, (frame, _) in every("u").items())
    np.testing.assert_allclose(float(whole[0].energy), float(read_frames("a.dat", **given)[0].energy))
    with pytest.raises(ValueError, match=r"energy_key 'my_enrgy' is in no frame of a.dat; did you mean my_energy\?"):
        convert("a.dat", "v", ConvertConfig(**given | {"keys": {"energy": "my_enrgy"}}))
    # Nothing was written, so other options are no conflict
    convert("a.dat", "v", ConvertConfig(**given))
    with pytest.raises(ValueError, match=r"keys must name labels .* got 'enegy'; did you mean energy"):
        ConvertConfig(keys={"enegy": "x"})
    with pytest.raises(ValueError, match="frames_per_file must be at least 1, got 0"):
        ConvertConfig(frames_per_file=0)


def test_one_key_is_chosen_for_the_whole_file_not_for_a_part(here, monkeypatch):
    """The first frames have another key than the last ones: two levels of theory."""
    monkeypatch.setattr(module, "_CHUNK", 3)
    systems = periodic(12)
    for number, atoms in enumerate(systems):
        name = "energy" if number < 6 else "REF_energy"
        atoms.info[name], atoms.calc = -float(number), None
    write("a.xyz", systems)
    with pytest.raises(ValueError, match=r"energy stands under several keys in the 12 frames .*'REF_energy' in 6"):
        convert("a.xyz", "u")
    write("a.xyz", systems[:6])
    write("b.xyz", systems[6:])
    with pytest.raises(ValueError, match="which may be several levels of theory"):
        convert(["a.xyz", "b.xyz"], "v")
    systems[9].info["REF_energy"] = np.array([1.0, 2.0])
    write("c.xyz", systems[6:])
    with pytest.raises(ValueError, match=r"frame 3 of c.xyz, info\['REF_energy'\]: energy must have shape"):
        convert("c.xyz", "w", ConvertConfig(frames_per_file=2))


def test_databases_and_arrays(here):
    systems = kinds()
    with connect("a.db") as database:
        for number, atoms in enumerate(systems):
            database.write(atoms, key_value_pairs={"dft_energy": -float(number)}, data={"extra": [1.0]})
    convert("a.db", "u", ConvertConfig(keys={"energy": "dft_energy"}, frames_per_file=5))
    assert [float(every("u")[n][0].energy) for n in (0, 9, 22)] == [0.0, -9.0, -22.0]
    np.savez("b.npz", z=np.array([29, 13]), R=np.random.default_rng(0).normal(size=(7, 2, 3)) * 3, E=np.arange(7.0),
             F=np.ones((7, 2, 3)))  # fmt: skip
    convert("b.npz", "v", ConvertConfig(units="kcal/mol", frames_per_file=3))
    whole = read_frames("b.npz", units="kcal/mol")
    assert all(same(frame, whole[number]) for number, (frame, _) in every("v").items()) and len(every("v")) == 7
    with pytest.raises(ValueError, match="files to convert must not be HDF5, which training reads as they are"):
        convert("v/*.h5", "w")


# -- stops -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_conversion_that_was_stopped_goes_on(here, monkeypatch):
    write("a.xyz", kinds())
    write("b.xyz", periodic(6))
    config = ConvertConfig(frames_per_file=4)
    convert(["a.xyz", "b.xyz"], "whole", config)
    wrote, count = module.write_unit, 0

    def stopped(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        wrote(*args)

    monkeypatch.setattr(module, "write_unit", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(["a.xyz", "b.xyz"], "u", config)
    assert sorted(p.name for p in Path("u").iterdir()) == ["convert.json", "unit_00000.h5", "unit_00001.h5"]
    with pytest.raises(ValueError, match="the conversion into u was not finished; run nbody convert with the same"):
        load_data(DataConfig(train="u"))
    times = {p.name: p.stat().st_mtime_ns for p in Path("u").glob("*.h5")}
    table = convert(["a.xyz", "b.xyz"], "u", config)
    one, other = (UnitFiles(sorted(Path(name).glob("*.h5"))) for name in ("u", "whole"))
    assert one.digest() == other.digest() and one.names == other.names
    assert {p: Path("u", p).stat().st_mtime_ns for p in times} == times
    assert all(same(every("u")[n][0], frame) for n, (frame, _) in every("whole").items())
    assert table.count("energy") == (label_audit(read_frames("a.xyz")).count("energy")[0] + 6, len(KINDS) + 6)


@pytest.mark.slow
def test_a_damaged_unit_is_refused_or_right(here):
    write("a.xyz", periodic(4))
    convert("a.xyz", "u")
    (unit,) = Path("u").glob("*.h5")

    def content(path: Path) -> list:
        frames = UnitFiles([path]).read(0)
        return [[frame[key].tolist() for key in sorted(frame.keys())] for frame in frames]

    assert_error_or_right(unit, content, 100, 20)


@pytest.mark.slow
def test_a_killed_process_leaves_no_half_file(here):
    write("a.xyz", periodic(12))
    script = (
        "import os, signal, h5py\nfrom nbody_pyg.datasets import convert as m\n"
        "old = h5py.File.create_dataset\n"
        "def slow(self, name, **words):\n    old(self, name, **words)\n"
        "    if name == 'pos' and len(os.listdir('u')) > 3:\n"
        "        self.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "h5py.File.create_dataset = slow\nm.convert('a.xyz', 'u', m.ConvertConfig(frames_per_file=2))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": root}, check=False)
    assert done.returncode == -9
    names = sorted(p.name for p in Path("u").iterdir())
    assert [n for n in names if not n.startswith(".")] == ["convert.json", "unit_00000.h5", "unit_00001.h5"]
    assert len(names) == 4, "the unfinished one is hidden"
    assert len(find_files("u")) == 3
    assert main(["convert", "a.xyz", "--out", "u", "--frames-per-file", "2"]) == 0
    assert len(every("u")) == 12 and not any(Path("u").glob(".*"))


def test_nothing_is_replaced(here, capsys):
    write("a.xyz", periodic(4))
    Path("full").mkdir()
    Path("full/mine").write_text("x")
    assert main(["convert", "a.xyz", "--out", "full"]) == 1
    assert "full is there and not empty, nothing is replaced; name another with --out" in capsys.readouterr().err
    assert main(["convert", "a.xyz", "--out", "u"]) == 0
    assert main(["convert", "a.xyz", "--out", "u"]) == 0, "a finished one is shown again"
    assert main(["convert", "a.xyz", "--out", "u", "--seed", "1"]) == 1
    assert "u holds a conversion of other files or with other options" in capsys.readouterr().err
    Path("u/convert.json").write_text("{}")
    assert main(["convert", "a.xyz", "--out", "u"]) == 1
    assert "u/convert.json is damaged" in capsys.readouterr().err
    assert main(["convert", "no.xyz", "--out", "v"]) == 1
    assert "path 'no.xyz' does not exist" in capsys.readouterr().err and not Path("v").exists()


def test_few_frames_are_in_memory(here, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4)
    write("a.xyz", [Atoms("CuAl", [[0, 0, 0], [0, 0, 2 + n / 100]], info={"energy": -1.0}) for n in range(40)])
    refs: list[weakref.ref] = []
    most = 0
    original = module.iter_systems

    def counted(*args, **given):
        nonlocal most
        for atoms in original(*args, **given):
            refs.append(weakref.ref(atoms))
            most = max(most, sum(ref() is not None for ref in refs))
            yield atoms
            del atoms

    monkeypatch.setattr(module, "iter_systems", counted)
    gc.collect()
    convert("a.xyz", "u", ConvertConfig(frames_per_file=4))
    assert len(refs) == 80 and 4 <= most <= 9, f"{most} frames at once"


# -- training ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_converted_frames_train_and_give_reports(here, capsys):
    write("a.xyz", [*kinds(), *periodic(10, seed=9)])
    assert main(["convert", "a.xyz", "--out", "u", "--frames-per-file", "6", "--num-val", "9"]) == 0
    capsys.readouterr()
    words = ["train", "--data.train", "u", "--data.files_in_memory", "2", "--training.batch_atoms", "12", *TINY]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "chosen  training.stress_weight" in out and "chosen  data.e0 isolated" in out
    assert "input   charge" in out and "input   spin" in out
    assert "config_type" in out and "bulk" in out and "results['energy']" in out
    errors = json.loads(Path("r/errors.json").read_text())["val"]
    assert {"energy_rmse", "forces_rmse", "stress_rmse"} <= set(errors)
    assert all(np.isfinite(value) and value > 0 for key, value in errors.items() if key.endswith("_rmse"))
    found = read_metadata("r/model.nbody")
    assert {int(z): e for z, e in found["e0"].items()} == pytest.approx({29: ATOMS["Cu"], 13: ATOMS["Al"]}, abs=1e-6)
    assert found["metadata"]["num_frames"] == {"train": 24, "val": 9}
    for number in (0, 1):  # the second holds frames 6 to 11 of a.xyz
        words = ["evaluate", "r/model.nbody", f"u/unit_0000{number}.h5", "--out", f"e{number}", "--no-plot"]
        assert main(words) == 0
        found = read(next(Path(f"e{number}").glob("*.xyz")), ":")
        assert len(found) == 6 and any(np.isfinite(atoms.get_potential_energy()) for atoms in found if atoms.calc)


@pytest.mark.slow
def test_the_loss_is_that_of_frames_in_memory(here):
    """One step over all frames at once gives the same weights, from units of which each lacks other labels."""
    write("a.xyz", [atoms for atoms in kinds() if "charge" not in atoms.info])
    convert("a.xyz", "u", ConvertConfig(num_val=0, frames_per_file=3))
    units, frames = UnitFiles(sorted(Path("u").glob("*.h5"))), read_frames("a.xyz")
    atoms = sum(len(frame.z) for frame in frames)
    ends = []
    for name, given in (("one", {"batch_size": len(frames)}), ("two", {"batch_atoms": atoms})):
        model = factories.potential(e0=ATOMS_E0, species=(13, 29))
        settings = TrainingConfig(
            max_steps=2, dtype="float64", validate_every=9, warmup_steps=0, stress_weight=0.1, energy_per="atom",
            optimizer="adam", ema_decay=0.0, **given,
        )  # fmt: skip
        fit(model, frames if name == "one" else units, (), settings, name, show_progress=False)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)
    start = factories.potential(e0=ATOMS_E0, species=(13, 29))
    assert float((ends[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max()) > 1e-3


ATOMS_E0 = {29: ATOMS["Cu"], 13: ATOMS["Al"]}


@pytest.mark.slow
def test_a_run_on_periodic_units_goes_on_with_the_same_bits(here):
    write("a.xyz", [*periodic(12), *kinds()])
    convert("a.xyz", "u", ConvertConfig(num_val=5, frames_per_file=5))
    words = ["train", "--data.train", "u", "--data.files_in_memory", "2", "--training.batch_atoms", "16",
             "--training.dtype", "float64", "--training.validate_every", "2", "--training.warmup_steps", "0",
             "--training.constant_fraction", "1.0", *TINY]  # fmt: skip
    for steps, more in (("3", []), ("7", ["--output.resume", "true"])):
        assert main([*words, "--output.folder", "two", "--training.max_steps", steps, *more]) == 0
    assert main([*words, "--output.folder", "one", "--training.max_steps", "7"]) == 0
    one, two = (read_checkpoint(Path(name, "last.ckpt")) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 7
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


@pytest.mark.slow
def test_two_processes_train_on_units(here):
    write("a.xyz", [*periodic(16), *kinds()])
    convert("a.xyz", "u", ConvertConfig(num_val=6, frames_per_file=5))
    words = [sys.executable, "-c", "import sys; from nbody_pyg.cli import main; sys.exit(main(sys.argv[1:]))", "train",
             "--data.train", "u", "--training.batch_atoms", "16", "--training.processes", "2", *TINY]  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(Path("r/errors.json").read_text())["val"]
    assert errors["forces_rmse"] > 0 and errors["stress_rmse"] > 0


# -- samples -----------------------------------------------------------------------------------------------------
def test_a_sample_has_every_label_state_and_isolated_atom(here):
    systems = [Atoms("CuAl", [[0, 0, 0], [0, 0, 2 + n / 100]], info={"energy": -1.0}) for n in range(60)]
    systems[31].info["charge"] = 1
    systems[47] = periodic(1)[0]
    systems[11] = KINDS["atom of Al"]
    write("a.xyz", systems)
    convert("a.xyz", "u", ConvertConfig(num_val=0, frames_per_file=10))
    units = UnitFiles(sorted(Path("u").glob("*.h5")))
    for seed in range(3):
        sample = units.sample("train", 3, seed=seed)
        assert {1.0, 0.0} == {float(f.charge) for f in sample} and len(sample) < 20
        assert sum("stress" in f for f in sample) == sum(f.get("pbc") is not None for f in sample) == 1
        assert sum(len(f.z) == 1 for f in sample) == 1 and any(has_forces(f) for f in sample)
    assert len(set(sample.numbers)) == len(sample), "frames are named by their numbers in the converted file"


def has_forces(frame: AtomicData) -> bool:
    return frame.get("forces") is not None


@pytest.mark.slow
def test_the_sample_of_the_start_is_drawn_once(here, monkeypatch):
    write("a.xyz", periodic(12))
    convert("a.xyz", "u", ConvertConfig(frames_per_file=5))
    drawn = []
    sample = UnitFiles.sample

    def counted(self, split="train", *args, **given):
        drawn.append(split)
        return sample(self, split, *args, **given)

    monkeypatch.setattr(UnitFiles, "sample", counted)
    assert main(["train", "--data.train", "u", *TINY]) == 0
    assert sorted(drawn) == ["test", "train", "val"]
