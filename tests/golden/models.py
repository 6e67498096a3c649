"""Makes the model file of the present format and what it gives; run once per released format, never again.

python tests/golden/models.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.deploy import FORMAT_VERSION, load_model, save_model
from nbody_pyg.nn.repulsion import ZBLRepulsion

FOLDER = Path(__file__).parent
Z = [6, 8, 1, 1, 1, 1]
POS = [[-0.05, 0.67, 0.01], [-0.05, -0.76, -0.02], [-1.08, 1.0, 0.03], [0.46, 1.07, -0.88], [0.45, 1.04, 0.91],
       [0.86, -1.06, 0.03]]  # fmt: skip


def values(path: Path) -> dict[str, list]:
    """Energy (eV) and forces (eV/angstrom) of methanol from a model file, in float64."""
    potential = load_model(path).double()
    found = potential(torch.tensor(Z), torch.tensor(POS, dtype=torch.float64))
    return {"energy": found["energy"].tolist(), "forces": found["forces"].tolist()}


if __name__ == "__main__":
    torch.manual_seed(11)
    net = NBodyNet([1, 6, 8], NestedShells((3.0, 3.0)), channels=2, lmax=1)
    target = FOLDER / f"model_format_{FORMAT_VERSION}.nbody"
    # Reaches beyond the bonds of methanol, so that the repulsion is part of what is kept.
    repulsion = ZBLRepulsion([1, 6, 8], {"H-O": 1.2, "C-O": 1.6})
    save_model(Potential(net, {"H": -13.6, "C": -1030.5, "O": -2041.8}, 0.7, repulsion), target, {"note": "golden"})
    target.with_suffix(".json").write_text(json.dumps(values(target)) + "\n")
