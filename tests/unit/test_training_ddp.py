"""Two processes with half the batch each take the steps of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from torch import nn
from nbody_pyg.data import AtomicData
from nbody_pyg.potential import Potential
from nbody_pyg.training import TrainingConfig, fit

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
    result = fit(Potential(Net()), frames, frames[:4], settings, folder, show_progress=False)
"""


@pytest.mark.slow
def test_two_gloo_processes_equal_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    states = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), str(folder), str(processes)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        states.append(torch.load(folder / "last.ckpt", weights_only=True))
    one, two = states
    assert one["global_step"] == two["global_step"] == 8
    for part in ("state_dict", "training_state"):
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], rtol=0, atol=1e-10), name
    assert one["training_state"]["potential.model.out.weight"].abs().max() > 0
    scores = [state["callbacks"]["Checkpoints"]["best_score"] for state in states]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
