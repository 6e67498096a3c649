"""Two processes with half the batch each take the steps of one process with the whole batch, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbody_pyg.training import TrainingConfig
from nbody_pyg.training.processes import together

SCRIPT = """
import sys
import torch
from torch import nn
from nbody_pyg.data import AtomicData
from nbody_pyg.potential import Potential
from nbody_pyg.training import Callback, TrainingConfig, fit

class Fail(Callback):
    def __init__(self, rank):
        self.rank = rank
    def on_step(self, trainer):
        if trainer.step == 3 and self.rank == str(torch.distributed.get_rank()):
            raise OSError(f"process {self.rank} stumbles")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 6), nn.Linear(6, 1)
        self.unused = nn.Parameter(torch.ones(2))
    def forward(self, z, pos, batch):
        count = torch.bincount(batch)
        centre = pos.new_zeros(len(count), 3).index_add(0, batch, pos) / count[:, None]
        radius = (pos - centre[batch]).square().sum(1, keepdim=True)
        energy = self.out(torch.tanh(self.embed(z) * radius)).squeeze(-1)
        return pos.new_zeros(len(count)).index_add(0, batch, energy)

if __name__ == "__main__":
    folder, processes = sys.argv[1], int(sys.argv[2])
    generator = torch.Generator().manual_seed(0)
    frames = []
    for _ in range(16):
        pos = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        vec = pos - pos.mean(0)
        frames.append(AtomicData(z=torch.tensor([6, 8, 1, 1]), pos=pos, energy=vec.square().sum().reshape(1),
                                 forces=-2 * vec))
    torch.manual_seed(1)
    settings = TrainingConfig(max_steps=8, batch_size=4 // processes, processes=processes, dtype="float64",
                              optimizer="adam", validate_every=4, warmup_steps=2, budget_seconds=600)
    callbacks = [Fail(rank) for rank in sys.argv[3:]]
    result = fit(Potential(Net()), frames, frames[:4], settings, folder, show_progress=False, callbacks=callbacks)
"""


def start(folder, processes: int, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), str(processes), *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")],
    ids=["by itself", "torchrun"],
)
def test_two_gloo_processes_equal_one(tmp_path, launcher):
    states = []
    for processes in (1, 2):
        done = start(tmp_path / str(processes), processes, launcher=launcher if processes == 2 else ())
        assert done.returncode == 0, done.stderr[-3000:]
        states.append(torch.load(tmp_path / str(processes) / "last.ckpt", weights_only=True))
    one, two = states
    assert one["global_step"] == two["global_step"] == 8
    for part in ("state_dict", "training_state"):
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], rtol=0, atol=1e-10), name
    assert one["training_state"]["potential.model.out.weight"].abs().max() > 0
    scores = [state["callbacks"]["Checkpoints"]["best_score"] for state in states]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_when_one_process_fails_all_end_and_it_says_why(tmp_path, rank):
    done = start(tmp_path / "run", 2, rank)
    assert done.returncode == 1 and f"OSError: process {rank} stumbles" in done.stderr
    assert ("ChildProcessError: a process of the training has failed" in done.stderr) == (rank == "1")
    assert not (tmp_path / "run/.lock").exists()


def test_processes_that_cannot_be_started(monkeypatch):
    settings = TrainingConfig(max_steps=1, processes=3)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with (
        pytest.raises(ValueError, match=r"training\.processes must be 1 in a notebook .*; write a script"),
        together(settings),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"training\.processes is 3, but 2 were started"), together(settings):
        pass
