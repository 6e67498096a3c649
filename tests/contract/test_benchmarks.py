"""The benchmarks run: in a tiny setting each prints its table and writes its JSON. Figures are not judged here."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import zipfile

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.units import kcal, mol
from torch_geometric.data import Batch

from loading import load_script
from nbody_pyg import AtomicData, NBodyNet, NestedShells
from nbody_pyg.datasets import charged_clusters, load_embedded
from nbody_pyg.deploy import save_model
from nbody_pyg.kernels import set_backend
from nbody_pyg.potential import Potential
from nbody_pyg.testing import rotate_features
from nbody_pyg.units import BOHR

TINY = {
    "kernels": "--lmax 1 --nodes 12 --edges 40 --channels 16 --seconds 0.05",
    "speed": "--molecules ethanol --waters 8 --potentials NBodyNet-torch NEP4 GFN2-xTB --seconds 0.01 --rounds 2",
    "models": "--models NBodyNet SchNet PaiNN --batch 2 --waters 3 --seconds 0.05",
    "scaling": "--sweeps atoms neighbours --waters 100 105 --cutoffs 3 5 --fixed 5 --seconds 0.02",
    "nve": "{model} --time 0.01 --every 2 --equilibrate 0.005",
    "md": "--waters 2 --seconds 0.02",
    "smoothness": "--atoms 16 --length 0.3 --channels 2 --seeds 0 1",
    "hierarchy": "--waters 4 6 --all-pairs 3 4 --channels 2 --seconds 0.02",
    "sapt": "--data {dimers} --seconds 0.2 --batch 3",
    "large": "--data {large} --sets ac_ala3_nhme --only small+charges --seconds 0.3 --timing 0.05 "
    '--add small={{"lmax":1,"channels":16}}',
    "clusters": "--data {clusters} --models near clusters EGNN --seconds 0.1 --channels 2 --lmax 1 --correlation 2 "
    "--egnn-channels 4",
    "longrange": "--data {longrange} --tasks cumulene --models survivors --seconds 0.2",
    "charges": "--data {longrange} --tasks two_atoms --networks charges --seconds 0.2",
    "native": "--water 4 --threads 1 --seconds 0.05",
    "particles": "--data {particles} --seconds 0.1 --channels 2 --lmax 1 --correlation 2 --plain",
    "few_frames": "--data {rmd17} --molecules ethanol --members 2 --set training.max_steps=2 model.lmax=1 "
    "model.channels=16 data.num_train=6 data.num_val=2",
    "finetune": "--init {model} --data {rmd17} --molecules ethanol --frames 6 --steps 2 --start "
    "--set model.lmax=1 model.channels=16",
}
#: What the table must show, and the keys of a record in the JSON.
SHOWN = {
    "kernels": ["GFLOP/s", "edge product, lmax 1", "nbody_pyg torch", "dense einsum", "x bound"],
    "speed": [r"ethanol, 9 atoms", "box of 8 molecules of water, 24 atoms", r"NBodyNet-torch +\d", r"NEP4 +[\d-]"],
    "models": ["molecule: 1 graphs, 22 atoms", "droplet: 1 graphs, 9 atoms", "NBodyNet, SOAP", "SchNet"],
    "scaling": ["us per atom", r"E\+F time ~ \(atoms\)\^", "against neighbours"],
    "nve": ["drift mev per atom per 10ps", "mean temperature k"],
    "md": ["E\\+F alone", "no skin", "skin 0.5"],
    "smoothness": [r"max \|d2E\|/h\^2", "survivors", "hard"],
    "hierarchy": ["of it topology ms", r"all pairs: time ~ N\^"],
    "clusters": ["no forces between clusters, exact", r"near +0 ", r"clusters +0 ", r"EGNN +0 "],
    "longrange": ["median MAE eV", r"cumulene +survivors +\d+ +\d+ +test +10 "],
    "charges": ["far: energy MAE meV", r"two_atoms +charges +\d+ "],
    "native": ["native", "torch"],
    "particles": ["EGNN", "SEGNN", "NBodyNet, pairs, plain"],
    "few_frames": [r"ethanol +1 ", r"ethanol +2 ", "MACE's F"],
    "finetune": [r"ethanol +6 +scratch +", r"ethanol +6 +all +", r"ethanol +6 +adapters +"],
    "large": [r"small\+charges +1 ", r"small +1 ", "test F meV/A", "x flat2"],
    "sapt": ["MAE of Elst, meV", "beyond, ion pairs", "k q q / R", "Share of k q q / R"],
}
HELPERS = (
    "kernels",
    "speed",
    "contestants",
    "models",
    "scaling",
    "nve",
    "md",
    "smoothness",
    "hierarchy",
    "sapt",
    "few_frames",
    "particles",
    "clusters",
    "finetune",
    "large",
    "salt_bridge",
    "active",
    "extrapolation",
    "infrared",
    "longrange",
    "charges",
    "native",
    "timing",
    "report",
    "systems",
    "peers",
    "products",
)


@pytest.fixture(scope="module")
def folder(root):
    return root / "benchmarks"


@pytest.fixture
def script(folder, monkeypatch):
    """A function name -> the script as a module; they import each other by their bare names."""
    monkeypatch.syspath_prepend(str(folder))
    choice = sys.modules["nbody_pyg.kernels.backend"]
    forced = choice._forced.set(choice._forced.get())  # the benchmarks force one; this puts it back
    before = {name: sys.modules.pop(name) for name in HELPERS if name in sys.modules}
    yield importlib.import_module
    choice._forced.reset(forced)
    for name in HELPERS:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def model(tmp_path):
    """A model file for ethanol, untrained and tiny."""
    network = NBodyNet([1, 6, 8], NestedShells((4.0,)), channels=16, lmax=1)
    path = tmp_path / "m.nbody"
    save_model(Potential(network, {1: -10.0, 6: -50.0, 8: -100.0}, scale=0.01), path)
    return path


@pytest.fixture
def dimers(tmp_path):
    """A folder with an archive of the form of SAPT10k: ions and water at distances from 3 to 8 angstrom."""
    frames, water = [], [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]]
    kinds = [
        (Atoms("OH2", water), Atoms("He"), (0, 0)),
        (Atoms("OH3", [*water, [-0.3, -0.4, 0.8]]), Atoms("F"), (1, -1)),
        (Atoms("OH3", [*water, [-0.3, -0.4, 0.8]]), Atoms("He"), (1, 0)),
    ]
    for n in range(30):
        place, (first, second, charge) = 3.0 + 0.15 * n, kinds[n % 3]
        second.positions[:] = [0.0, 0.0, -place]
        both = first + second
        sizes = {"num_a": len(first), "num_b": len(second), "charge_a": charge[0], "charge_b": charge[1]}
        for kind in ("dimer_original", "dimer_translated"):
            both.info = {"structure_type": kind, "Elst": -30.0 / place, "benchmark_Eint": -33.0 / place} | sizes
            frames.append(both.copy())
    write(tmp_path / "sapt10k.xyz", frames, format="extxyz")
    with zipfile.ZipFile(tmp_path / "sapt10k.zip", "w") as archive:
        archive.write(tmp_path / "sapt10k.xyz", "sapt10k.xyz")
    return tmp_path


@pytest.fixture
def rmd17(tmp_path):
    """A folder with files of the form of rMD17: the embedded ethanol in kcal/mol."""
    frames, unit = load_embedded("ethanol"), kcal / mol
    for part, rows in (("train", frames[:8]), ("test", frames[8:13])):
        np.savez(
            tmp_path / f"rmd17_ethanol_{part}_01.npz",
            nuclear_charges=rows[0].z.numpy(),
            coords=np.stack([frame.pos.numpy() for frame in rows]),
            energies=np.array([float(frame.energy) / unit for frame in rows]),
            forces=np.stack([frame.forces.numpy() / unit for frame in rows]),
            old_indices=np.arange(len(rows)) + (100 if part == "test" else 0),
        )
    return tmp_path


@pytest.fixture
def longrange(tmp_path):
    """A folder with files of the form of cumulene_profile.npz and two_atoms.npz, as many frames as the splits take."""
    rng = np.random.default_rng(0)
    chain = np.array([[x, 0.0, 0.0] for x in (0.0, 1.3, 2.6)] + [[-0.6, 0.9, 0.0], [-0.6, -0.9, 0.0],
                     [3.2, 0.0, 0.9], [3.2, 0.0, -0.9]])  # fmt: skip
    for name, count, pos, z in (
        ("cumulene_profile", 610, chain, [6, 6, 6, 1, 1, 1, 1]),
        ("two_atoms", 3210, np.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]), [11, 17]),
    ):
        moved = pos + rng.normal(scale=0.05, size=(count, *pos.shape)) + rng.uniform(0, 3, (count, 1, 1)) * pos / 4
        np.savez(
            tmp_path / f"{name}.npz", positions=moved, atomic_numbers=np.tile(z, (count, 1)),
            energy=np.square(moved).sum((1, 2)), forces=-2.0 * (moved - moved.mean(1, keepdims=True)),
        )  # fmt: skip
    return tmp_path


@pytest.fixture
def particles(root, tmp_path):
    """A folder with a small set of charged particles."""
    make = load_script(root / "datasets" / "make_particles.py")
    assert make.main(["--out", str(tmp_path), "--particles", "3", "--systems", "100", "4", "4"]) == 0
    return tmp_path


@pytest.fixture
def clusters(root, tmp_path):
    """A folder with a small set of bound clusters."""
    make = load_script(root / "datasets" / "make_particles.py")
    size = ["--particles", "6", "--clusters", "2", "--systems", "20", "4", "4"]
    assert make.main(["--bound", "--out", str(tmp_path), *size]) == 0
    return tmp_path


def test_active_learning_without_time_for_a_round_says_so(script, monkeypatch, tmp_path):
    module = script("active")
    write(tmp_path / "cu.xyz", bulk("Cu"))
    monkeypatch.setattr(module, "trajectory", lambda *_: ())
    monkeypatch.setattr(module, "learn", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["active.py", str(tmp_path / "cu.xyz"), "--minutes", "0.5"])
    with pytest.raises(SystemExit, match=r"no round began within --minutes 0\.5") as end:
        module.main()
    assert isinstance(end.value.code, str), "a message and exit status 1"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_script_prints_a_table_and_writes_json(name, script, model, dimers, rmd17, root, request, tmp_path, capsys):
    out = tmp_path / "result" / f"{name}.json"
    folders = {name: request.getfixturevalue(name)} if name in ("particles", "clusters") else {}
    if "{longrange}" in TINY[name]:
        folders["longrange"] = request.getfixturevalue("longrange")
    folders["large"] = root / "tests" / "fixtures" / "large"
    arguments = TINY[name].format(model=model, dimers=dimers, rmd17=rmd17, **folders).split()
    assert script(name).main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for words in SHOWN[name]:
        assert re.search(words, printed), f"{words!r} is missing in\n{printed}"
    ruler = next(line for line in printed.splitlines() if re.fullmatch(r"-+(  -+)+", line))
    lines = printed.splitlines()
    body = lines[lines.index(ruler) + 1]
    assert len(body) <= len(ruler), "the first row is not aligned with its head"
    found = json.loads(out.read_text())
    assert {"processor", "versions", "load at the start"} <= set(found["machine"])
    check = {
        "kernels": _kernels, "speed": _speed, "models": _models, "scaling": _scaling, "nve": _nve,
        "md": _md, "smoothness": _smoothness, "hierarchy": _hierarchy, "sapt": _sapt,
        "few_frames": _few_frames, "finetune": _finetune, "particles": _particles, "clusters": _clusters,
        "large": _large, "longrange": _longrange, "charges": _charges, "native": _native,
    }  # fmt: skip
    check[name](found, out)


def _longrange(found, out):
    (record,) = found["results"]
    assert record["median_mae_ev"] > 0 and record["errors"]["energy_mae"] > 0


def _charges(found, out):
    (record,) = found["results"]
    assert record["steps"] > 0


def _native(found, out):
    assert len(found["results"]) >= 2


def _kernels(found, out):
    assert found["hardware"]["flop_per_s"] > 0
    assert [record["problem"] for record in found["results"]] == ["edge product", "density", "node product"]
    for record in found["results"]:
        assert max(record["errors"].values()) < 1e-10
        assert {"forward", "first", "second"} == set(record["times"])
        assert all(t["minimum_s"] > 0 for times in record["times"].values() for t in times.values())


def _speed(found, out):
    names = ["NBodyNet-torch", "NEP4", "GFN2-xTB"]
    assert [r["potential"] for r in found["results"]] == [*names, *names[:2]], "GFN2-xTB has no box"
    for record in found["results"]:
        if "failed" in record:
            assert record["potential"] != "NBodyNet-torch" and "MD" not in record
            assert record["failed"].startswith("not installed: pip install")
        else:
            assert all(record[task]["minimum_s"] > 0 and record[task]["rounds"] >= 2 for task in ("MD", "E+F"))


def _models(found, out):
    assert [record["system"] for record in found["results"]] == ["molecule", "batch", "droplet"]
    assert "SchNet" in found["results"][0]["times"]["E+F"]
    assert set(found["missing"]) <= {"PaiNN"}
    assert all("pip install" in reason for reason in found["missing"].values())


def _scaling(found, out):
    sweeps = found["sweeps"]
    assert set(sweeps) == {"atoms", "neighbours"}
    assert [record["atoms"] for record in sweeps["atoms"]["results"]] == [300, 315]
    assert "E+F time from 300 atoms" in sweeps["atoms"]["exponents"]


def _nve(found, out):
    assert found["results"]["time_ps"] == pytest.approx(0.01)
    assert len(found["samples"]["total_ev"]) == 11
    assert out.with_suffix(".png").stat().st_size > 1000


def _md(found, out):
    searches = found["results"][0]["searches_per_step"]
    assert searches["no skin"] == 1 and 0 < searches["skin 0.5"] < 1


def _finetune(found, out):
    records = {record["way"]: record for record in found["results"]}
    assert set(records) == {"scratch", "all", "readouts", "adapters"}
    assert len({records[way]["start_forces_mae"] for way in ("all", "readouts", "adapters")}) == 1
    assert len({record["forces_mae"] for record in records.values()}) == 4
    assert all(record["steps"] == 2 and record["forces_mae"] > 0 for record in records.values())


def _few_frames(found, out):
    one, two = found["results"]
    assert (one["members"], two["members"]) == (1, 2) and two["cpu_seconds"] > one["cpu_seconds"]
    # The mean is never worse than the mean of the errors.
    for key in ("energy_mae", "forces_mae"):
        assert 0 < two[key] <= (one[key] + two["last_member"][key]) / 2 * (1 + 1e-6)


def _particles(found, out):
    (record,) = found["results"]
    assert record["seed"] == 0 and record["epochs"] >= 1 and 0 < record["val"] < 10 and 0 < record["test"] < 10


def _clusters(found, out):
    simple, trained = found["results"][:3], found["results"][3:]
    assert [record["model"] for record in trained] == ["near", "clusters", "EGNN"]
    for record in (*simple, *trained):
        for values in (record["val"], record["test"]):
            assert 0 < values["mse"] < 100 and values["mse"] == pytest.approx(values["centres"] + values["inside"])
    assert simple[2]["test"]["mse"] < simple[0]["test"]["mse"]
    assert all(record["steps"] >= 1 and record["parameters"] > 100 for record in trained)


@pytest.mark.parametrize("name", ["near", "near and all", "clusters", "survivors", "EGNN"])
def test_networks_for_clusters_are_covariant(name, script, rotation):
    module = script("clusters")
    set_backend("torch")  # which compiles nothing
    frames = charged_clusters(2, seed=1, num_clusters=3, cluster_size=4, steps_before=5, steps_between=5)
    for frame in frames:  # clusters at 14, 28 and 42, beyond three shells
        frame.pos = frame.pos - frame.pos.view(3, 4, 3).mean(1)[frame.labels]
        frame.pos[:, 0] += 14.0 * frame.labels
    net = module.build(name, frames, 0, {"channels": 4, "lmax": 1, "correlation": 2}, 4)
    net.double().requires_grad_(False)
    data = Batch.from_data_list(frames)
    value, turned = net(data), data.clone()
    turned.pos, turned.x = data.pos @ rotation.T + 2.0, rotate_features(data.x, "0e + 1o", rotation)
    torch.testing.assert_close(net(turned), value @ rotation.T, rtol=0, atol=1e-10)
    assert float(value.norm(dim=1).min()) > 1e-4
    # A charge of another cluster counts for all but the network of near shells
    other = data.clone()
    other.x = data.x * torch.where(torch.arange(len(data.x)) == 0, -1.0, 1.0).unsqueeze(1)
    change = (net(other) - value)[4:8].norm(dim=1)
    assert float(change.min()) > 1e-9 if name != "near" else not change.any()
    assert torch.equal(net(other)[12:], value[12:])


def test_errors_of_clusters_are_divided(script):
    module = script("clusters")
    labels = torch.tensor([0, 0, 1, 1])
    frames = [AtomicData(pos=torch.zeros(4, 3), y=torch.zeros(4, 3), labels=labels) for _ in range(2)]
    value = torch.zeros(8, 3)
    value[:2] += 2.0  # the first cluster of the first system as a whole
    value[6], value[7] = 1.0, -1.0  # inside the last
    found = module.errors(value, frames)
    assert found == pytest.approx({"mse": 1.25, "centres": 1.0, "inside": 0.25})


def _large(found, out):
    (result,) = found["results"]
    sizes = {record["point"]["name"]: record["parameters"] for record in result["records"]}
    assert set(sizes) == {"small", "small+charges"} and sizes["small"] < sizes["small+charges"]
    assert all(record["steps"] >= 1 and record["val"]["energy_mae"] > 0 for record in result["records"])
    assert set(result["times"]) == {"flat2", *sizes} and result["training"]["energy_per"] == "molecule"
    assert out.with_suffix(".md").read_text().count("\n| small") == 2


@pytest.mark.slow
def test_training_step_with_threads(script, tmp_path, capsys):
    out = tmp_path / "t.json"
    assert script("scaling").main(["--training", "--batch", "2", "--rounds", "1", "--out", str(out)]) == 0
    assert "training step, wall-clock time" in capsys.readouterr().out
    found = json.loads(out.read_text())["training"]
    assert found["atoms"] == 42 and min(found["ms with one thread"], found["ms with several"]) > 0
    assert torch.get_num_threads() == 1


def test_speed_goes_on_without_a_contestant_that_fails(script):
    speed = script("speed")

    def ends(count):
        if count > 1:
            raise speed.Failed("its process ended")
        return 1e-3

    found = speed.interleave({"first": ends, "second": lambda count: 2e-3 * count}, 0.0, 3)
    assert found["first"] == "its process ended" and found["second"].samples == pytest.approx([2e-3] * 3)
    record = {"potential": "first", "atoms": 10, "failed": "its process ended"}
    assert speed.row(record, found["second"]) == ["first", None, None, None, None, "its process ended"]
    record = {"potential": "second", "atoms": 10, "MD": found["second"]}
    assert speed.row(record, found["second"])[1:4] == pytest.approx([200.0, 200.0, 1.0])


@pytest.mark.parametrize("count", [8, 26, pytest.param(334, marks=pytest.mark.slow)])
def test_boxes_of_water_have_the_density_of_the_liquid(script, count):
    box = script("systems").box(count)
    assert len(box) == 3 * count and box.pbc.all()
    assert float(box.get_masses().sum()) * 1.66053907 / box.get_volume() == pytest.approx(1.0, abs=0.01)
    distances = box.get_all_distances(mic=True)[~np.eye(len(box), dtype=bool)]
    assert distances.min() > 0.9


def test_molecules_have_the_sizes_that_the_table_says(script):
    speed = script("speed")
    assert [len(speed.system(name)) for name in speed.MOLECULES] == [9, 22, 42, 64]


class _Attraction(Calculator):
    """Nitrogen and sulfur of the salt bridge as point charges of some strength, eV angstrom."""

    implemented_properties = ("energy",)

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = -self.strength / self.atoms.get_distance(1, 21)


def test_salt_bridge_pulls_the_ions_apart(script, root, tmp_path, capsys, monkeypatch):
    module, folder = script("salt_bridge"), root / "tests" / "fixtures" / "large"
    monkeypatch.setattr(module, "calculator", lambda name: _Attraction(14.0))
    monkeypatch.setattr(module, "NBodyCalculator", lambda name: _Attraction(14.7))
    out = tmp_path / "bridge.json"
    assert module.main(["some.nbody", "--data", str(folder), "--frames", "1", "--out", str(out)]) == 0
    assert "30.00  -0.397       -0.416    1.050  5.0" in capsys.readouterr().out
    records = json.loads(out.read_text())["results"]
    assert [record["distance"] for record in records] == list(module.DISTANCES)
    assert records[0]["reference_eV"] == pytest.approx(-14.0 / 5 + 14.0 / 200)
    frame = next(atoms for atoms in read(folder / "salt_bridge_test.extxyz", ":") if len(atoms) == module.SIZE)
    apart = module.pulled(frame, 20.0)
    assert apart.get_distance(module.N, module.S) == pytest.approx(20.0)
    for ion in (slice(0, module.ANION), slice(module.ANION, None)):
        np.testing.assert_allclose(apart[ion].get_all_distances(), frame[ion].get_all_distances(), atol=1e-10)


@pytest.mark.slow
def test_large_finds_its_networks(script, root, tmp_path, capsys):
    large = script("large")
    assert large.model("flat2+charges", {})["long_range"] == "direct" and large.model("painn", {}) is None
    with pytest.raises(ValueError, match=r"names of networks, got 'flat4'.*flat"):
        large.model("flat4", {})
    with pytest.raises(ValueError, match=r"NAME=\{KEY: VALUE\}, got 'wide'"):
        large.added("wide")
    with pytest.raises(FileNotFoundError, match=r"dha_train\.extxyz"):
        large.files("dha", tmp_path)
    assert set(large.files("salt_bridge", root / "tests" / "fixtures" / "large")["test"]) == {"test", "far"}
    command = TINY["large"].format(large=root / "tests" / "fixtures" / "large").replace("small+charges", "small")
    for times in (0, 1):  # the second time the run is there
        assert large.main([*command.split(), "--out", str(tmp_path / "a.json")]) == 0
        assert capsys.readouterr().out.count("there already") == times


def test_polarizabilities_of_gfn2_are_derivatives_of_the_energy_in_a_field(script):
    pytest.importorskip("tblite.interface", reason="needs tblite, from the extra [data]")
    module = script("infrared")
    water = Atoms("OH2", [[0.0, 0.1, 0.0], [0.9, 0.5, 0.3], [-0.7, 0.6, -0.4]])
    axis, step = np.array([0.6, -0.48, 0.64]), 3e-3
    (energy, dipole), (up, _), (down, _) = (module.in_field(water, sign * step * axis) for sign in (0, 1, -1))
    assert (down - up) / (2 * step) == pytest.approx(dipole @ axis, abs=1e-4)
    volume = (2 * energy - up - down) / step**2 * BOHR**3
    assert volume == pytest.approx(axis @ module.polarizability(water) @ axis, abs=1e-3) and volume > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use thermalize_momenta:DeprecationWarning")
def test_extrapolation_turns_bonds_and_tests_every_set(script, model, tmp_path, monkeypatch, capsys):
    module, start = script("extrapolation"), load_embedded("ethanol")[0].to_ase()
    for one in (module, script("active")):
        monkeypatch.setattr(one, "calculator", lambda *_: EMT())
    monkeypatch.setattr(module, "from_smiles", lambda smiles, seed: [start.copy()])
    monkeypatch.setattr(module, "rotatable", lambda smiles: [((0, 2), [2, 8])])
    copies = module.turned(start, "CCO", 90.0)
    assert len(copies) == 3
    for atoms, angle in zip(copies, (90.0, 180.0, 270.0), strict=True):
        assert (atoms.get_dihedral(1, 0, 2, 8) - start.get_dihedral(1, 0, 2, 8)) % 360 == pytest.approx(angle)
        np.testing.assert_allclose(atoms.positions[:8], start.positions[:8], atol=1e-12)
        assert atoms.get_distance(2, 8) == pytest.approx(start.get_distance(2, 8))
    highest = sorted(EMT().get_potential_energy(atoms) for atoms in copies)[1]
    assert len(module.labelled(copies, EMT(), highest)) == 2
    words = "--frames 4 --test 2 --every 1 --seconds 0.1 --temperatures 600 --molecules some"
    out = tmp_path / "extrapolation.json"
    assert module.main([*words.split(), "--init", str(model), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["results"]
    assert [(r["way"], r["test"]) for r in found] == [
        (way, test) for way in ("scratch", "all") for test in ("300 K", "600 K", "torsions")
    ]
    assert all(r["forces_mae"] > 0 and r["force_rms"] > 0 for r in found) and "torsions" in capsys.readouterr().out


def test_rotatable_bonds(script):
    pytest.importorskip("rdkit", reason="rdkit is not installed")
    bonds = script("extrapolation").rotatable("CCCO")  # C0 C1 C2 O3, H of O last
    assert [pair for pair, _ in bonds] == [(1, 2)]
    assert {0, 1}.isdisjoint(bonds[0][1]) and {2, 3} <= set(bonds[0][1]) and len(bonds[0][1]) == 5


def _smoothness(found, out):
    assert [[row["h"] for row in path] for path in found["results"]["survivors"]] == 2 * [[1e-2, 1e-3, 1e-4]]
    assert all(row["curvature"] > 0 for paths in found["results"].values() for path in paths for row in path)
    assert out.with_suffix(".png").stat().st_size > 1000


def _hierarchy(found, out):
    assert [record["atoms"] for record in found["results"]] == [9, 12, 12, 18]
    assert all(record["evaluate_s"] > record["topology_s"] > 0 for record in found["results"])


def _sapt(found, out):
    near, *beyond = found["tests"].values()
    assert found["training"] + near + sum(beyond) == 30 and min(near, *beyond) > 0
    tails = {record["network"]: record["tail"] for record in found["results"]}
    assert abs(tails["local"]["100.0"]["median"]) < 1e-4, "monomers do not see each other"
    assert 0.5 < tails["charges"]["100.0"]["median"] < 2
    assert out.with_suffix(".png").stat().st_size > 1000


def test_sapt_says_what_is_missing(script, tmp_path, capsys):
    assert script("sapt").main(["--data", str(tmp_path)]) == 0
    assert "skipped: there is no" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.data
def test_sapt_reads_its_data(script, data_dir):
    path = data_dir / "longrange" / "sapt10k.zip"
    if not path.exists():
        pytest.skip(f"no benchmark data {path}")
    sapt = script("sapt")
    dimers = sapt.load(path, "Elst")
    assert len(dimers) == 9948 and sum(d.ions == 2 for d in dimers) == 196
    assert dimers[0].energy == pytest.approx(-18.84952 * 0.0433641, rel=1e-5)
    pair = next(d for d in dimers if d.ions == 2)
    assert pair.charge == (float(pair.first.charges.sum().round()), float(pair.second.charges.sum().round()))
    apart = pair.joined(50.0).pos[len(pair.first.z) :] - pair.second.pos
    assert float(apart.norm(dim=1).max()) == pytest.approx(50.0 - pair.distance)


def test_snap_compares_energies_up_to_a_constant(script, tmp_path, monkeypatch):
    snap, frames, factors = script("snap"), [], iter((1.1, 0.9))
    for seed in (0, 1):
        frames.append(bulk("Cu", cubic=True))
        frames[-1].rattle(0.1, seed=seed)
        frames[-1].calc = EMT()
        frames[-1].get_forces()

    class Other(EMT):
        def calculate(self, *args):
            super().calculate(*args)
            factor = next(factors)
            self.results["forces"] = factor * self.results["forces"]
            self.results["energy"] += len(self.atoms) * (5.0 + 0.003 * (factor > 1))

    write(tmp_path / "Cu_test.xyz", frames)
    monkeypatch.setattr(snap, "LAMMPSlib", lambda **given: Other())
    energy, force, share = snap.errors(tmp_path / "Cu_test.xyz", "Cu", tmp_path / "Cu")
    rms = np.sqrt(np.mean([np.square(atoms.get_forces()) for atoms in frames]))
    assert energy == pytest.approx(1.5, abs=1e-4) and share == pytest.approx(10.0, abs=1e-3)
    assert force == pytest.approx(100.0 * rms, rel=1e-4) and rms > 0.1


def test_crystal_finds_the_constants_of_stretched_cells(script):
    """Of cells whose stress is known: sigma = C e + 300 GPa e^2; other cells are left out."""
    crystal, gigapascal, cells = script("crystal"), 1 / 160.21766208, []
    constants = np.array([[160.0, 60.0, 60.0], [60.0, 160.0, 60.0], [60.0, 60.0, 160.0]]) * gigapascal
    for axis in range(3):
        for strain in (-0.06, -0.02, 0.0, 0.03, 0.07, 0.2):
            stretch = np.eye(3)[axis] * strain
            cells.append(bulk("Cu", cubic=True))
            cells[-1].set_cell(cells[-1].cell.array * (1 + stretch), scale_atoms=True)
            stress = [*(constants @ stretch + 300 * gigapascal * strain**2), 0, 0, 0]
            cells[-1].calc = SinglePointCalculator(cells[-1], energy=0.0, forces=np.zeros((4, 3)), stress=stress)
    sheared = bulk("Cu", cubic=True)
    sheared.set_cell(sheared.cell.array + 0.1 * np.eye(3, k=1), scale_atoms=True)
    sheared.calc = SinglePointCalculator(sheared, energy=0.0, forces=np.zeros((4, 3)), stress=np.ones(6))
    kept, axes, strains, length = crystal.stretched([sheared, *cells])
    assert len(kept) == 15 and length == pytest.approx(3.61)
    found = crystal.cubic_constants(np.stack([a.get_stress() for a in kept]), axes, strains)
    assert found == pytest.approx((160.0, 60.0), rel=1e-6)
    with pytest.raises(SystemExit, match="must hold 6 or more cells stretched along one axis, got 1"):
        crystal.stretched([sheared, cells[2]])


def test_every_path_can_fail_the_comparison(script):
    """The check before timing sees a wrong product."""
    products = script("products")
    problem = products.edge_product(6, 20, 4, 1, torch.float64)
    assert max(problem.errors().values()) < 1e-12
    path = problem.paths["nbody_pyg torch"]
    right = path.call
    path.call = lambda *inputs: right(*inputs) * (1 + 1e-6)
    errors = problem.errors()
    assert errors["nbody_pyg torch"] > 1e-7
    assert errors["dense einsum"] < 1e-12


def test_timing_helpers(script):
    timing = script("timing")
    assert timing.exponent([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)
    times = timing.interleave({"short": lambda: sum(range(100)), "long": lambda: sum(range(10_000))}, 0.05, (5, 9))
    assert 5 <= len(times["short"].samples) == len(times["long"].samples) <= 9
    assert times["long"].over(times["short"]) > 10
    held = timing.peak_memory(lambda: torch.ones(4_000_000).sum())
    assert held is None or 15e6 < held < 60e6


def test_benchmarks_stay_out_of_the_wheel(root, folder):
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject["tool"]["setuptools"]["packages"]["find"]["include"] == ["nbody_pyg*"]
    assert not (folder / "__init__.py").exists()


def test_the_readme_names_every_script(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in folder.glob("*.py"))
    assert [name for name in scripts if name not in text] == []
