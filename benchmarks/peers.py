"""The models that are timed: those of ``nbody compare``, as ``model(z, pos, batch) -> energy`` with edges given.

A peer that is not installed is named with the line that installs it. Settings are those of the registry of
``nbody_pyg.compare``, with a cutoff of 5 angstrom; weights are random, which a clock does not see.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from systems import CUTOFF, System
from torch import Tensor, nn

from nbody_pyg import NBodyNet
from nbody_pyg.compare.graph import CutoffGraph
from nbody_pyg.compare.peer import Facts, MissingPeer
from nbody_pyg.compare.registry import build_peer

SPECIES = (1, 6, 7, 8)
#: Typical number of neighbours, where a model wants one.
_NEIGHBOURS = 18.0
CONFIG = Path(__file__).parents[1] / "configs" / "rmd17.yaml"

#: Name in the tables -> name in the registry.
PEERS = {
    "NBodyNet": "nbody",
    "SchNet": "schnet",
    "PaiNN": "painn",
    "ViSNet": "visnet",
    "DimeNet++": "dimenet",
    "TensorNet": "tensornet",
    "NequIP S": "nequip",
    "NequIP": "nequip-l2",
    "MACE 64x0e": "mace",
    "MACE 128x0e+128x1o": "mace-128",
}
Missing = MissingPeer


class Timed(nn.Module):
    """A model whose topology is that of one system; ``index`` are the edges within the cutoff."""

    def __init__(self, model: nn.Module, system: System) -> None:
        super().__init__()
        self.model = model
        self.topology = model.scheme.topology(system.z, system.pos, system.batch)
        self.index = CutoffGraph(CUTOFF).topology(system.z, system.pos, system.batch).pair_index[0]

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        pos = pos.to(next(self.parameters()).dtype)
        return self.model(z, pos, batch, topology=self.topology)


def build(name: str, system: System) -> Timed:
    """The model for a system, in float32; our network has the settings of configs/rmd17.yaml, but the edges of all.

    Raises: Missing: it is not installed.
    """
    if PEERS[name] != "nbody":
        return Timed(build_peer(PEERS[name], Facts(SPECIES, CUTOFF, _NEIGHBOURS)), system)
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
    scheme = settings["scheme"] | {"radii": [CUTOFF] * len(settings["scheme"]["radii"])}
    torch.manual_seed(0)
    return Timed(NBodyNet.from_config({"species": SPECIES, **settings, "scheme": scheme}), system)
