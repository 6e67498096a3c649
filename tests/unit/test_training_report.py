"""Errors by kind and by frame, a wrong order of stresses, plots, and the logs of TensorBoard and W&B."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from nbody_pyg.cli.main import main
from nbody_pyg.cli.plots import error_plot, learning_curve, parity_plot
from nbody_pyg.cli.tables import element_table, report
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import read_frames
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.training.evaluation import Evaluation
from nbody_pyg.training.loggers import run_log
from nbody_pyg.training.metrics import ErrorMeter
from nbody_pyg.training.report import errors_by_kind, frame_errors, shear_order

pytestmark = pytest.mark.layout

KINDS = ["bulk", "slab", "bulk", "", "slab"]


def drawn(count: int = 5, seed: int = 0) -> Frames:
    """Cells of 4 and 5 atoms with all labels."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number in range(count):
        size = 4 + number % 2
        sheared = torch.randn(1, 3, 3, generator=generator).double()
        out.append(AtomicData(
            z=torch.tensor([6, 8, 1, 1, 1][:size]), pos=torch.randn(size, 3, generator=generator).double(),
            cell=10.0 * torch.eye(3).double()[None], pbc=torch.ones(1, 3, dtype=torch.bool),
            energy=torch.randn(1, generator=generator).double(),
            forces=torch.randn(size, 3, generator=generator).double(), stress=sheared + sheared.transpose(1, 2),
        ))  # fmt: skip
    return Frames(out, name="a.xyz", numbers=range(10, 10 + count), kinds=[KINDS[k % 5] for k in range(count)])


def predicted(frames: Frames, error: float = 0.1, seed: int = 1) -> Evaluation:
    """The labels with errors."""
    generator = torch.Generator().manual_seed(seed)

    def off(label: torch.Tensor) -> torch.Tensor:
        return label + error * torch.randn(label.shape, generator=generator).double()

    energy, forces = off(torch.cat([f.energy for f in frames])), [off(f.forces) for f in frames]
    return Evaluation({"energy_mae": 1.0}, energy, forces, off(torch.cat([f.stress for f in frames])))


def test_errors_of_a_kind_are_those_of_its_frames():
    frames = drawn()
    found = predicted(frames)
    by_kind = errors_by_kind(frames, found)
    assert list(by_kind) == ["bulk", "slab", ""]
    for kind, errors in by_kind.items():
        rows = [i for i, name in enumerate(KINDS) if name == kind]
        difference = torch.cat([(found.forces[i] - frames[i].forces).flatten() for i in rows])
        energy = torch.stack([(found.energy[i] - frames[i].energy)[0] / len(frames[i].z) for i in rows])
        stress = torch.cat([(found.stress[i] - frames[i].stress[0]).flatten() for i in rows])
        assert errors["forces_rmse"] == pytest.approx(1000 * float(difference.square().mean().sqrt()))
        assert errors["energy_per_atom_mae"] == pytest.approx(1000 * float(energy.abs().mean()))
        assert errors["stress_rmse"] == pytest.approx(1000 * float(stress.square().mean().sqrt()))
        assert min(errors["forces_rmse"], errors["stress_rmse"]) > 10
    assert errors_by_kind(frames.select([0, 2]), predicted(frames.select([0, 2]))) == {}
    assert errors_by_kind(list(frames), found) == {}


def test_kinds_follow_their_frames():
    frames = drawn()
    assert frames[1:3].kinds == ("slab", "bulk") and frames.select([4, 0]).kinds == ("slab", "bulk")
    assert frames.replaced(list(frames)).kinds == frames.kinds and Frames(list(frames)).kinds == ("",) * 5


def test_errors_by_element():
    frames, meter = drawn(), ErrorMeter()
    found = predicted(frames)
    for k, frame in enumerate(frames):
        batch = frame.clone()
        batch.batch = torch.zeros_like(frame.z)
        meter.update({"forces": found.forces[k]}, batch)
    errors = meter.compute()
    z = torch.cat([frame.z for frame in frames])
    difference = torch.cat([a - frame.forces for a, frame in zip(found.forces, frames, strict=True)])
    for number, symbol in ((1, "H"), (6, "C"), (8, "O")):
        of = difference[z == number]
        assert errors[f"forces_rmse_{symbol}"] == pytest.approx(1000 * float(of.square().mean().sqrt()))
        assert errors[f"forces_mae_{symbol}"] == pytest.approx(1000 * float(of.abs().mean()))
    text = element_table({("m", "a"): errors, ("m", "without"): {"energy_mae": 1.0}})
    head, _, *rows = text.splitlines()
    assert head.split() == ["set", "element", "F", "MAE", "meV/A", "F", "RMSE", "meV/A"]
    assert [row.split()[1] for row in rows] == ["C", "H", "O"]
    assert rows[2].split()[3] == f"{errors['forces_rmse_O']:.2f}"
    assert element_table({("m", "a"): {"forces_mae_H": 1.0, "forces_rmse_H": 1.0}}) == ""


def test_the_largest_errors_are_named_by_the_numbers_in_the_file():
    frames = drawn()
    found = predicted(frames, error=0.001)
    found.forces[3][2, 1] += 7.0
    found.energy[1] += 3.0
    first, *others = frame_errors(frames, found)
    assert (first.number, first.kind, first.atom) == (13, "", 2) and first.forces_max == pytest.approx(7000, rel=1e-2)
    assert first.forces_rmse == pytest.approx(7000 / 15**0.5, rel=1e-2) and len(others) == 4
    assert next(one for one in others if one.number == 11).energy_per_atom == pytest.approx(3000 / 5, rel=1e-2)
    without = Frames([AtomicData(z=f.z, pos=f.pos, energy=f.energy) for f in frames], numbers=frames.numbers)
    assert frame_errors(without, Evaluation({}, found.energy, [], None))[0].number == 11
    bare = Frames([AtomicData(z=f.z, pos=f.pos) for f in frames])
    assert frame_errors(bare, found) == []
    text = report({"test": (frames, found)})
    assert "largest errors" in text and "config_type" in text and "1807" in text


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_shears_in_another_order_are_told(order):
    frames = drawn(20)
    found = predicted(frames, error=0.01)
    for frame in frames[:12]:
        shear = frame.stress[0][[1, 0, 0], [2, 2, 1]].clone()
        for k, (row, column) in zip(order, ((1, 2), (0, 2), (0, 1)), strict=True):
            frame.stress[0, row, column] = frame.stress[0, column, row] = shear[k]
    text = shear_order(frames, found)
    if order == (0, 1, 2):
        assert text is None
        return
    inverse = [order.index(k) for k in range(3)]
    names = ", ".join(("yz", "xz", "xy")[k] for k in inverse)
    assert f"12 of 20 frames fit the model if yz, xz, xy are taken to be {names}:" in text
    assert "note: test: the shear stresses" in report({"test": (frames, found)})
    # Two frames may be chance
    assert shear_order(frames[10:], Evaluation({}, found.energy[10:], found.forces[10:], found.stress[10:])) is None


@pytest.mark.slow
def test_plots_are_drawn(tmp_path):
    frames = drawn()
    results = {"test": (frames, predicted(frames)), "other": (frames[:2], predicted(frames[:2]))}
    parity_plot(results, tmp_path / "parity.png")
    error_plot(results, tmp_path / "histogram.png", "title")
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["kind", "step", "lr", "loss", "forces_mae"], ["train", 5, 0.1, 2, 3], ["val", 5, 0.1, "", 4]]
        )
    learning_curve(tmp_path / "metrics.csv", tmp_path / "curve.png")
    for name in ("parity", "histogram", "curve"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def write_solids(path) -> None:
    generator = np.random.default_rng(3)
    out = []
    for number in range(12):
        atoms = Atoms("CH4", generator.normal(size=(5, 3)) * 1.2, cell=[9, 9, 9], pbc=True)
        atoms.info["config_type"] = "hot" if number % 3 else "cold"
        results = {"energy": generator.normal(), "forces": generator.normal(size=(5, 3))}
        atoms.calc = SinglePointCalculator(atoms, **results, stress=generator.normal(size=6))
        out.append(atoms)
    write(path, out, format="extxyz")


SMALL = ["--model.channels", "4", "--model.lmax", "1", "--model.scheme.radii", "[3.0]", "--data.num_val", "3",
         "--training.log_every", "1", "--training.validate_every", "2", "--training.max_steps", "3"]  # fmt: skip


@pytest.mark.slow
def test_the_commands_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_solids("t.xyz")
    assert read_frames("t.xyz").kinds[:4] == ("cold", "hot", "hot", "cold")
    assert main(["train", "--data.train", "t.xyz", "--data.test", "t.xyz", *SMALL, "--output.folder", "r"]) == 0
    out = capsys.readouterr().out
    for words in ("config_type", "cold", "hot", "largest errors", "element", "r/curve.png", "r/histogram.png"):
        assert words in out
    assert main(["evaluate", "r/model.nbody", "t.xyz", "--out", "e"]) == 0
    out, (row,) = capsys.readouterr().out, json.loads((tmp_path / "e/errors.json").read_text())
    assert "largest errors" in out and set(row["config_type"]) == {"cold", "hot"}
    assert row["forces_rmse_C"] > 0 and len(row["largest"]) == 10
    assert row["largest"][0]["forces_rmse"] == max(one["forces_rmse"] for one in row["largest"]) > 0
    assert (tmp_path / "e/histogram.png").is_file()


class Board:
    """Stands in for a session of W&B and for a writer of TensorBoard."""

    made: ClassVar[list[Board]] = []

    def __init__(self, *arguments, **settings):
        self.settings, self.rows, self.closed = settings, [], False
        Board.made.append(self)

    def log(self, values, step):
        self.rows.append((step, values))

    def add_scalar(self, key, value, step):
        self.rows.append((step, {key: value}))

    def finish(self):
        self.closed = True

    close = finish


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_further_logs_have_the_values_of_the_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Board.made.clear()
    module = ModuleType("wandb" if name == "wandb" else "torch.utils.tensorboard")
    module.init, module.SummaryWriter = Board, Board
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    write_solids("t.xyz")
    assert main(["train", "--data.train", "t.xyz", *SMALL, "--output.folder", "r", "--output.logger", name]) == 0
    (board,) = Board.made
    assert board.closed
    found = {(step, key): value for step, values in board.rows for key, value in values.items()}
    with open("r/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"train", "val"}
    for row in rows:
        key = int(row["step"]), f"{row['kind']}/forces_mae"
        assert found[key] == pytest.approx(float(row["forces_mae"]), rel=1e-4) and found[key] > 0
    assert found[3, "train/lr"] > 0


def test_a_log_that_is_not_installed_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"output\.logger 'wandb' needs the package wandb; pip install wandb"):
        run_log("wandb", tmp_path, {}, 1)
    monkeypatch.chdir(tmp_path)
    write_solids("t.xyz")
    assert main(["train", "--data.train", "t.xyz", *SMALL, "--output.logger", "csv"]) == 1
