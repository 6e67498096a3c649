"""``nbody md``: ensembles, formats, restarts from the checkpoint, progress, and the file that stops a run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.io import read, write

import factories
from nbody_pyg.cli import main
from nbody_pyg.cli import md as command
from nbody_pyg.deploy import NBodyCalculator, save_model
from nbody_pyg.deploy.md_checkpoint import MDState
from nbody_pyg.hierarchy import NestedShells


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    """A model file, a molecule and a crystal in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_model(factories.potential(NestedShells((3.0,))), "m.nbody")
    crystal = bulk("C", "diamond", a=3.7, cubic=True)
    crystal.rattle(0.05, seed=1)
    write("crystal.xyz", crystal)
    write("ethanol.xyz", molecule("CH3CH2OH"))
    return "m.nbody"


def end(folder: str) -> MDState:
    return MDState.load(Path(folder) / "checkpoint.npz")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ensemble", "words"),
    [
        ("langevin", ["--friction", "0.05"]),
        ("bussi", ["--thermostat-time", "20"]),
        ("npt", ["--pressure", "3e6", "--barostat-time", "200"]),
    ],
)
def test_an_interrupted_command_goes_on_bit_for_bit(model, capsys, ensemble, words):
    start = "crystal.xyz" if ensemble == "npt" else "ethanol.xyz"
    words = ["--ensemble", ensemble, "--every", "4", "--seed", "3", *words]
    assert main(["md", model, start, "--steps", "24", "--out", "whole", *words]) == 0
    assert main(["md", model, start, "--steps", "10", "--out", "cut", *words]) == 0
    assert main(["md", model, "--restart", "--steps", "14", "--out", "cut", *words]) == 0
    out = capsys.readouterr().out
    whole, cut = end("whole"), end("cut")
    assert cut.step == 24 and np.array_equal(whole.positions, cut.positions)
    assert np.array_equal(whole.momenta, cut.momenta) and np.abs(cut.momenta).max() > 0.1
    assert [f.info["step"] for f in read("cut/trajectory.xyz", ":")] == [0, 4, 8, 10, 14, 18, 22, 24]
    assert "velocities: those of step 10 of the checkpoint" in out
    assert re.search(r"speed: [\d.e-]+ ns/day \([\d.e+]+ ms per step\)", out)
    assert ("volume: mean" in out) == (ensemble == "npt")


@pytest.mark.parametrize(
    ("stop", "status", "reason"),
    [
        (lambda: Path("md/STOP").touch(), 0, "by the file md/STOP"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "by SIGTERM"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(model, capsys, monkeypatch, stop, status, reason):
    words = ["--every", "5", "--dtype", "float64"]
    assert main(["md", model, "ethanol.xyz", "--steps", "30", "--out", "whole", *words]) == 0
    real = NBodyCalculator.calculate

    def calculate(self, *args):
        real(self, *args)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 8:
            stop()

    with monkeypatch.context() as patched:
        patched.setattr(NBodyCalculator, "calculate", calculate)
        assert main(["md", model, "ethanol.xyz", "--steps", "30", *words]) == status
    assert f"stopped after step 7 (3.50 fs): {reason}" in capsys.readouterr().out
    assert not Path("md/STOP").exists()
    assert main(["md", model, "--restart", "--steps", "23", "--out", "md", *words]) == 0
    assert [f.info["step"] for f in read("md/trajectory.xyz", ":")] == [0, 5, 7, 12, 17, 22, 27, 30]
    assert np.array_equal(end("md").positions, end("whole").positions)


def test_formats(model, capsys):
    assert main(["md", model, "ethanol.xyz", "--steps", "4", "--every", "2", "--format", "traj"]) == 0
    assert main(["md", model, "--restart", "--steps", "2", "--every", "2"]) == 0
    assert [f.info["step"] for f in read("md/trajectory.traj", ":")] == [0, 2, 4, 6]
    assert main(["md", model, "--restart", "--format", "xtc"]) == 1
    assert "--format must be that of the trajectory md/trajectory.traj, got xtc" in capsys.readouterr().err
    assert main(["md", model, "ethanol.xyz", "--steps", "2", "--out", "md"]) == 1
    assert "exists; continue it with --restart, replace it with --overwrite" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("mdtraj") is None, reason="mdtraj is not installed: nbody_pyg[trajectories]"
)
@pytest.mark.filterwarnings("ignore")  # those of mdtraj
def test_binary_formats(model):
    from mdtraj.formats import XTCTrajectoryFile

    assert main(["md", model, "ethanol.xyz", "--steps", "4", "--every", "2", "--format", "xtc"]) == 0
    assert main(["md", model, "--restart", "--steps", "2", "--every", "2"]) == 0
    assert sorted(p.name for p in Path("md").glob("trajectory*")) == [
        "trajectory-4.xtc", "trajectory-first.xyz", "trajectory.xtc"
    ]  # fmt: skip
    with XTCTrajectoryFile("md/trajectory-4.xtc") as file:
        assert file.read()[2].tolist() == [6]
    assert read("md/trajectory-first.xyz").symbols.formula.format("hill") == "C2H6O"
    # Replaced by a run of another format: nothing of the old one is left
    assert main(["md", model, "ethanol.xyz", "--steps", "2", "--out", "md", "--overwrite"]) == 0
    assert sorted(p.name for p in Path("md").iterdir()) == ["checkpoint.npz", "energy.png", "md.log", "trajectory.xyz"]


def test_a_run_that_fails_replaces_nothing(model, capsys):
    assert main(["md", model, "ethanol.xyz", "--steps", "2", "--format", "traj"]) == 0
    before = {p.name: p.read_bytes() for p in Path("md").iterdir()}
    write("n2.xyz", molecule("N2"))
    assert main(["md", model, "n2.xyz", "--steps", "2", "--out", "md", "--overwrite"]) == 1
    assert "atoms hold ['N']" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in Path("md").iterdir()} == before
    # Files of others in the folder stay too
    shutil.copy("n2.xyz", "md/trajectory_of_mine.xyz")
    assert main(["md", model, "ethanol.xyz", "--steps", "2", "--out", "md", "--overwrite"]) == 0
    assert Path("md/trajectory_of_mine.xyz").exists() and not Path("md/trajectory.traj").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pressure", "1"], "--pressure needs --ensemble npt or npt-full; leave it out"),
        (["--barostat-time", "100", "--ensemble", "bussi"], "--barostat-time needs --ensemble npt or npt-full"),
        (
            ["--thermostat-time", "9", "--ensemble", "langevin"],
            "--thermostat-time needs --ensemble bussi or nose-hoover",
        ),
        (["--ensemble", "npt"], "ensemble 'npt' needs a cell that is periodic in three directions"),
    ],
)
def test_options_of_other_ensembles(model, capsys, words, message):
    assert main(["md", model, "ethanol.xyz", "--steps", "2", *words]) == 1
    assert message in capsys.readouterr().err


def test_progress_tells_speed_and_time_left(monkeypatch, capsys):
    times = iter([0.0, 1.0, 1.1, 2.0, 10.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True, raising=False)
    progress = command.Progress(steps=1000, timestep=0.5)
    for done in (0, 10, 11, 20, 1000):
        progress(done)
    lines = capsys.readouterr().err.split("\r")
    # 0.1 s for a step of 0.5 fs: 864,000 steps a day
    assert lines[2].strip() == "1.0 %  0.432 ns/day (100 ms per step)  1 min 39 s left"
    assert lines[3].strip() == "2.0 %  0.432 ns/day (100 ms per step)  1 min 38 s left", "not at 11 steps, 0.1 s later"
    assert lines[4].strip().startswith("100.0 %  4.32 ns/day") and lines[4].endswith("\n")
    assert [command._duration(s) for s in (8, 190, 7500)] == ["8 s", "3 min 10 s", "2 h 5 min"]
    assert command.Progress(5, 0.5).speed() is None
