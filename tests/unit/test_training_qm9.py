"""QM9 by configuration: every target with its unit and readout, both split families, reference energies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.data import chemical_symbols
from torch_geometric.datasets.qm9 import atomrefs, conversion

from nbody_pyg.cli import main
from nbody_pyg.compare import point
from nbody_pyg.compare.measure import latency
from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point, build, deciding_error, run_point
from nbody_pyg.compare.report import load_records
from nbody_pyg.datasets import Split, load_qm9, qm9_atomref, qm9_split
from nbody_pyg.datasets.qm9 import REGRESSION_TARGETS, TARGETS
from nbody_pyg.deploy import load_model, read_metadata
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training import prepare
from nbody_pyg.training.config import load_config
from nbody_pyg.training.property_task import evaluate_properties
from nbody_pyg.units import HARTREE

COUNT = 24
HEAD = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv,u0_atom,u298_atom,h298_atom,g298_atom"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """gdb9.sdf, gdb9.sdf.csv and uncharacterized.txt in their exact form, of COUNT + 1 made-up molecules."""
    folder, rng = tmp_path_factory.mktemp("qm9") / "raw", np.random.default_rng(7)
    folder.mkdir()
    blocks, rows = [], [HEAD]
    for number in range(COUNT + 1):
        z = rng.choice([1, 6, 7, 8, 9], size=rng.integers(4, 7))
        lines = [f"gdb_{number + 1}", "     RDKit          3D", "", f"{len(z):3d}  0  0  0  0  0  0  0  0  0999 V2000"]
        for n, place in zip(z, 1.2 * rng.normal(size=(len(z), 3)), strict=True):
            lines.append("".join(f"{x:10.4f}" for x in place) + f" {chemical_symbols[n]:<3s} 0  0")
        blocks.append("\n".join([*lines, "M  END", "$$$$\n"]))
        values = rng.normal(size=19)
        values[10:14] += sum(qm9_atomref("U0")[n] for n in z.tolist()) / HARTREE
        rows.append(f"gdb_{number + 1}," + ",".join(f"{v:.8f}" for v in values))
    (folder / "gdb9.sdf").write_text("".join(blocks))
    (folder / "gdb9.sdf.csv").write_text("\n".join(rows) + "\n")
    failed = ["-"] * 9 + ["    3   C   0.1"] + ["", ""]
    (folder / "uncharacterized.txt").write_text("\n".join(failed))
    return folder.parent


@pytest.fixture
def small_split(monkeypatch):
    rows = np.arange(COUNT)
    monkeypatch.setattr(prepare, "qm9_split", lambda family: Split(rows[:16], rows[16:20], rows[20:]))


def test_units_and_reference_energies_are_those_of_pyg():
    """PyG's table of conversions, in the order of its targets, and its energies of the atoms."""
    pyg = dict(zip(TARGETS, conversion.tolist(), strict=True))
    for name, target in TARGETS.items():
        assert target.factor == pytest.approx(pyg[name], rel=1e-6), name
    for number, name in ((7, "U0"), (8, "U"), (9, "H"), (10, "G")):
        ours = qm9_atomref(name)
        assert [ours[z] for z in (1, 6, 7, 8, 9)] == pytest.approx(atomrefs[number], rel=1e-7)
    assert set(qm9_atomref("U0_atomization").values()) == {0.0}
    with pytest.raises(ValueError, match="target 'homo' has no energies of free atoms"):
        qm9_atomref("homo")
    readouts = {name: TARGETS[name].readout for name in REGRESSION_TARGETS}
    assert len(readouts) == 12 and readouts["mu"] == "dipole_norm" and readouts["r2"] == "r2"
    assert [n for n, kind in readouts.items() if kind == "intensive"] == ["homo", "lumo", "gap"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REGRESSION_TARGETS)
def test_every_target_has_data_and_a_model(name, raw, small_split):
    config = load_config(None, ["--data.qm9", name, "--data.root", str(raw), "--training.max_steps", "1",
                                "--training.force_weight", "0", "--model.channels", "2",
                                "--model.scheme.radii", "[3.0]"])  # fmt: skip
    data = prepare.load_data(config.data)
    assert [len(frames) for frames in data.named().values()] == [16, 4, 4]
    rows = (raw / "raw" / "gdb9.sdf.csv").read_text().splitlines()[1:]
    column = HEAD.split(",").index(TARGETS[name].column)
    value = float(rows[3].split(",")[column]) * TARGETS[name].factor  # the third molecule has failed
    label = "energy" if name in ("U0", "U", "H", "G") else name
    assert float(data.train[2][label]) == pytest.approx(value, rel=1e-12)
    model = prepare.build_potential(config, data)
    out = model(data.train[0])
    if label == "energy":
        assert isinstance(model, Potential) and out["energy"].dtype == torch.float64
    else:
        assert isinstance(model, PropertyModel) and bool(out[name].isfinite().all())
        assert model.properties[0].unit == TARGETS[name].unit


def test_atomref_leaves_the_atomization_energy(raw, small_split):
    words = ["--data.root", str(raw), "--training.max_steps", "1", "--training.force_weight", "0"]
    words += ["--model.channels", "2", "--model.scheme.radii", "[3.0]", "--data.e0", "atomref"]
    config = load_config(None, [*words, "--data.qm9", "U0"])
    model = prepare.build_potential(config, prepare.load_data(config.data))
    assert model.reference.energies == {z: qm9_atomref("U0")[z] for z in model.reference.species}
    other = load_config(None, ["--data.embedded", "ethanol", "--data.e0", "atomref", "--training.max_steps", "1"])
    with pytest.raises(ValueError, match=r"'atomref' is known for data\.qm9 only"):
        prepare.build_potential(other, prepare.load_data(other.data))


@pytest.mark.slow
def test_a_property_is_trained_saved_and_evaluated_by_command(raw, small_split, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--data.qm9", "mu", "--data.root", str(raw), "--training.max_steps", "4", "--training.batch_size", "4"]
    words += ["--model.channels", "2", "--model.scheme.radii", "[3.0]", "--training.validate_every", "2"]
    assert main(["--debug", "train", *words, "--output.folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "mu MAE D" in printed and "mu, dipole_norm" in printed
    assert (folder / "parity.png").stat().st_size > 5000
    model = load_model(folder / "model.nbody")
    assert isinstance(model, PropertyModel)
    assert read_metadata(folder / "model.nbody")["metadata"]["errors_unit"] == {"mu": "D"}
    assert main(["info", str(folder / "model.nbody")]) == 0
    assert "dipole_norm, D" in capsys.readouterr().out
    frame = load_qm9(raw, "mu", [0])[0]
    frame.to_ase().write(tmp_path / "one.xyz")
    assert main(["evaluate", str(folder / "model.nbody"), str(tmp_path / "one.xyz"), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "one_predictions.npz") as found:
        torch.testing.assert_close(torch.from_numpy(found["mu"]), model(frame)["mu"].detach(), rtol=1e-5, atol=1e-6)


def test_the_section_target_is_checked_and_kept(tmp_path):
    words = ["--data.qm9", "dipole", "--data.root", "x", "--training.max_steps", "1"]
    config = load_config(None, [*words, "--target.dipole.readout", "dipole", "--target.dipole.weight", "2"])
    (found,) = config.target
    assert (found.name, found.readout, found.weight) == ("dipole", "dipole", 2)
    config.save(tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    for words_, message in (
        (
            ["--target.dipole.readuot", "dipole"],
            "unknown key target.dipole.readuot; did you mean target.dipole.readout",
        ),
        (["--target.dipole.readout", "vector"], "readout of dipole must be one of"),
        (["--target.dipole.weight", "heavy"], "target.dipole.weight must be a number, got 'heavy'"),
        (["--target.dipole", "3"], "target.dipole must hold keys and values"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, [*words, *words_])
    with pytest.raises(ValueError, match=r"data\.qm9 'dipole' needs data\.root"):
        load_config(None, ["--data.qm9", "dipole", "--training.max_steps", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["[mu, r2, U0, homo]", "all"])
def test_one_model_of_several_targets(wanted, raw, small_split, tmp_path, pytestconfig):
    """Each with its readout; the recipe of QM9 trains, saves, evaluates and predicts them together."""
    folder = tmp_path / "run"
    words = ["--data.qm9", wanted, "--data.root", str(raw), "--training.max_steps", "4", "--training.batch_size", "4"]
    words += ["--model.channels", "2", "--output.folder", str(folder), "--training.validate_every", "2"]
    assert main(["--debug", "train", str(pytestconfig.rootpath / "configs" / "qm9.yaml"), *words]) == 0
    names = REGRESSION_TARGETS if wanted == "all" else ("mu", "r2", "U0", "homo")
    model = load_model(folder / "model.nbody")
    assert {p.name: (p.readout, p.unit) for p in model.properties} == {
        name: (TARGETS[name].readout, TARGETS[name].unit) for name in names
    }
    frames = load_qm9(raw, names, [20, 21])
    values = [{name: value.item() for name, value in model(frame).items()} for frame in frames]
    for name in names:
        assert values[0][name] != values[1][name]
        assert abs(values[0][name]) > 1e-3
    frames[0].to_ase().write(tmp_path / "one.xyz")
    assert main(["evaluate", str(folder / "model.nbody"), str(tmp_path / "one.xyz"), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "one_predictions.npz") as found:
        for name in names:
            assert found[name].item() == pytest.approx(values[0][name], rel=1e-4)


#: Peers that learn every target, tiny.
PEERS = {
    "schnet": {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 8},
    "dimenet": {
        "hidden_channels": 8, "num_blocks": 1, "int_emb_size": 4, "basis_emb_size": 4, "out_emb_channels": 8,
        "num_spherical": 2, "num_radial": 2,
    },
    "painn": {"features": 8, "layers": 1, "num_basis": 8},
}  # fmt: skip
OURS = {"channels": 2, "scheme": {"name": "NestedShells", "radii": [3.0]}}


@pytest.fixture
def quick(monkeypatch):
    """The time of a molecule is measured a few times only."""
    monkeypatch.setattr(point, "latency", lambda model, frame, seconds, device: latency(model, frame, 0.0, device))


def _point(name: str, raw: Path, model: str, arguments: dict, **training) -> Point:
    settings = {"optimizer": "soap", "lr": 1e-2, "batch_size": 4, "seed": 0, "max_steps": 3, "force_weight": 0}
    data = {"qm9": name, "root": str(raw)}
    return Point(model, model, model, arguments, data, settings | training, points=2)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (m, n)
        for m in ("nbody", *PEERS)
        for n in REGRESSION_TARGETS
        if m != "dimenet" or n in ("mu", "homo", "r2", "U0")
    ],
)  # the functions of DimeNet++ take sympy a second for each
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peers' own making
def test_every_model_of_a_comparison_learns_every_target(model, name, raw, small_split, quick, tmp_path):
    """The statistics are those of our network, the error is that of the target, the curve ends at it."""
    one = _point(name, raw, model, PEERS.get(model, OURS))
    config = one.config(tmp_path)
    data = prepare.load_data(config.data)
    try:
        built = build(one, config, data)
    except MissingPeer as error:
        pytest.skip(str(error))
    ours = prepare.build_potential(
        config if model == "nbody" else _point(name, raw, "nbody", OURS).config(tmp_path), data
    )
    label = "energy" if name in ("U0", "U", "H", "G") else name
    if label == "energy":
        assert built.reference.energies == ours.reference.energies and built.scale == ours.scale
    else:
        assert built.statistics == ours.statistics and built.properties == ours.properties
        assert built.statistics[name].scale not in (0.0, 1.0)
    notes: list[str] = []
    record = run_point(one, tmp_path, note=notes.append)
    assert (record["status"], record["steps"], record["frames"]) == ("done", 3, {"train": 16, "val": 4, "test": 4})
    error = record["test"]["test"][f"{label}_mae"]
    assert error > 0 and record["val"][f"{label}_mae"] > 0 and "forces_mae" not in record["val"]
    assert record["curve"][-1]["test"][f"{label}_mae"] == pytest.approx(error)
    assert deciding_error([record]) == f"{label}_mae"
    unit = "meV" if TARGETS[name].unit == "eV" else TARGETS[name].unit
    assert notes[-1].endswith(f" {unit}") and f"test {'E' if label == 'energy' else name} " in notes[-1]


@pytest.mark.slow
def test_a_comparison_trains_ours_as_the_command_does(raw, small_split, quick, tmp_path, pytestconfig):
    words = ["--data.qm9", "homo", "--data.root", str(raw), "--training.max_steps", "6", "--training.batch_size", "4"]
    words += ["--model.channels", "2", "--output.folder", str(tmp_path / "train"), "--training.validate_every", "6"]
    words += ["--training.budget_seconds", "null"]
    assert main(["--debug", "train", str(pytestconfig.rootpath / "configs" / "qm9.yaml"), *words]) == 0
    trained = load_model(tmp_path / "train" / "model.nbody")
    words = [
        "--data.qm9",
        "homo",
        "--data.root",
        str(raw),
        "--steps",
        "6",
        "--batch_size",
        "4",
        "--model.channels",
        "2",
    ]
    words += ["--budget", "null", "--models", "nbody", "--out", str(tmp_path / "compare"), "--isolate", "false"]
    assert main(["--debug", "compare", str(pytestconfig.rootpath / "configs" / "compare_qm9.yaml"), *words]) == 0
    (record,) = load_records(tmp_path / "compare")
    frames = prepare.load_data(Point(**record["point"]).config(tmp_path).data).tests["test"]
    errors = evaluate_properties(trained, frames).errors
    assert record["test"]["test"]["homo_mae"] == pytest.approx(errors["homo_mae"], rel=1e-5)


@pytest.mark.slow
def test_targets_of_a_comparison_in_one_table(raw, small_split, quick, tmp_path, pytestconfig, capsys):
    """A peer without the readout fails on that target alone, and the reason is said."""
    words = [
        "--data.qm9",
        "homo",
        "mu",
        "--data.root",
        str(raw),
        "--steps",
        "2",
        "--budget",
        "null",
        "--batch_size",
        "4",
    ]
    words += ["--models", "nbody", "schnet", "visnet", "--out", str(tmp_path), "--isolate", "false", "--points", "2"]
    words += ["--model.channels", "2", "--arguments.schnet", str(PEERS["schnet"])]
    words += ["--arguments.visnet", "{hidden_channels: 8, num_heads: 2, num_layers: 1, num_rbf: 8}"]
    assert main(["compare", str(pytestconfig.rootpath / "configs" / "compare_qm9.yaml"), *words]) == 3
    printed = capsys.readouterr().out
    assert "ViSNet must learn a property with the readout extensive or intensive, got 'dipole_norm'" in printed
    page = (tmp_path / "table.md").read_text()
    assert "| model | optimizer | mu D | homo meV |" in page and "homo MAE meV |" in page and "mu MAE D |" in page
    (visnet,) = (line for line in page.splitlines() if line.startswith("| ViSNet") and line.count("|") == 5)
    cells = visnet.split(" | ")
    assert cells[2] == "failed" and float(cells[3].strip(" |")) > 0
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_several_targets_in_one_model_are_no_run_of_a_peer(raw, small_split, tmp_path):
    one = _point(["mu", "homo"], raw, "schnet", PEERS["schnet"])
    with pytest.raises(ValueError, match=r"data.qm9 must be one target for schnet, got \['mu', 'homo'\]"):
        run_point(one, tmp_path, note=lambda _: None)


def test_the_data_come_from_the_package_without_a_folder(small_split, monkeypatch):
    asked = []

    def loader(root, target, rows):
        asked.append((root, target, len(rows)))
        raise ImportError("no data here")

    monkeypatch.setattr(prepare, "load_qm9", loader)
    for target in ("homo", ["mu", "U"]):
        config = load_config(None, ["--data.qm9", str(target), "--training.max_steps", "1"])
        assert config.data.qm9 == target
        with pytest.raises(ImportError, match="no data here"):
            prepare.load_data(config.data)
    assert asked == [(None, "homo", 24), (None, ["mu", "U"], 24)]


def test_wrong_lists_of_targets(raw, small_split):
    for wanted, message in (
        ("[mu, muu]", "target 'muu' is not in QM9; did you mean mu"),
        ("[mu, dipole]", "target 'dipole' is not in QM9"),
        ("[mu, mulliken_charges]", r"data\.qm9 must name targets of .* to learn, got 'mulliken_charges'"),
    ):
        config = load_config(None, ["--data.qm9", wanted, "--training.max_steps", "1"])
        with pytest.raises(ValueError, match=message):
            prepare.wanted_properties(config)


def test_the_families_share_no_roles():
    """Half of the molecules tested in one family are trained on in the other: never in one table."""
    dimenet, cormorant = qm9_split("dimenet"), qm9_split("cormorant")
    assert dimenet.fingerprint != cormorant.fingerprint
    assert len(np.intersect1d(dimenet.test, cormorant.train)) > 5000
