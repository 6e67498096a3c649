"""The models that are compared, each behind ``model(z, pos, batch) -> energy`` with its edges handed in.

A peer that is not installed is named with the line that installs it. Settings are those that the authors recommend
for small molecules, with a cutoff of 5 angstrom; weights are random, which a clock does not see.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from systems import CUTOFF, System
from torch import Tensor, nn

from nbody_pyg import NBodyNet
from nbody_pyg.geometry import neighbour_list

SPECIES = (1, 6, 7, 8)
#: Typical number of neighbours, where a model wants one.
_NEIGHBOURS = 18.0
#: mace-torch pins e3nn 0.4.4, older than what nbody_pyg asks for; mace-torch 0.3.16 was seen to run with e3nn 0.6.
_MACE = "pip install --no-deps mace-torch opt-einsum opt-einsum-fx torch-ema; pip install pandas"
CONFIG = Path(__file__).parents[1] / "configs" / "rmd17.yaml"


class Missing(Exception):
    """A peer that cannot run here, with the reason or the line that installs it."""


class Peer(nn.Module):
    """A model whose edges are those of one system: row 0 source, row 1 target."""

    def __init__(self, model: nn.Module, system: System) -> None:
        super().__init__()
        self.model, self.num_graphs = model, system.num_graphs
        self.index = neighbour_list(system.pos, CUTOFF, system.batch)[0]

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        return self.model(z, pos.to(next(self.parameters()).dtype), batch)


class NBody(Peer):
    """NBodyNet with the settings of configs/rmd17.yaml and its topology handed in."""

    def __init__(self, system: System) -> None:
        settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
        model = NBodyNet.from_config({"species": SPECIES, **settings})
        super().__init__(model, system)
        self.topology = model.scheme.topology(system.z, system.pos, system.batch)

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        return self.model(z, pos, batch, topology=self.topology)


class SchNet(Peer):
    """PyG's SchNet, 128 channels, 6 interactions."""

    def __init__(self, system: System) -> None:
        from torch_geometric.nn.models import SchNet as Model

        super().__init__(Model(cutoff=CUTOFF, interaction_graph=self._graph), system)

    def _graph(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        source, target = self.index
        return self.index, (pos[source] - pos[target]).norm(dim=-1)


class ViSNet(Peer):
    """PyG's ViSNet, 128 channels, 6 layers; it wants self loops among its edges."""

    def __init__(self, system: System, lmax: int) -> None:
        from torch_geometric.nn.models import ViSNet as Model

        super().__init__(Model(lmax=lmax, cutoff=CUTOFF), system)
        loops = torch.arange(system.num_atoms).expand(2, -1)
        distance = self.model.representation_model.distance
        distance.forward = self._distance
        self.index = torch.cat([self.index, loops], dim=1)
        self.bonded = self.index[0] != self.index[1]

    def _distance(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vec = pos[self.index[0]] - pos[self.index[1]]
        length = vec.new_zeros(len(vec))
        length[self.bonded] = vec[self.bonded].norm(dim=-1)
        return self.index, length, vec

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        return super().forward(z, pos, batch)[0]


class PaiNN(Peer):
    """schnetpack's PaiNN, 128 features, 3 interactions, with its atomwise readout."""

    def __init__(self, system: System) -> None:
        import torch.utils.data.dataloader as loader

        if not hasattr(loader, "T_co"):  # a name of torch that schnetpack 2.1 imports and that has changed
            loader.T_co = loader._T_co
        from schnetpack import properties as key
        from schnetpack.atomistic import Atomwise
        from schnetpack.nn import CosineCutoff, GaussianRBF
        from schnetpack.representation import PaiNN as Model

        body = Model(128, 3, GaussianRBF(n_rbf=20, cutoff=CUTOFF), CosineCutoff(CUTOFF))
        super().__init__(nn.ModuleDict({"body": body, "readout": Atomwise(n_in=128, output_key="energy")}), system)
        self.key = key

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        source, target = self.index
        pos, key = pos.to(next(self.parameters()).dtype), self.key
        inputs = {key.Z: z, key.R: pos, key.idx_m: batch, key.idx_i: target, key.idx_j: source,
                  key.Rij: pos[source] - pos[target], key.n_atoms: torch.bincount(batch)}  # fmt: skip
        return self.model["readout"](self.model["body"](inputs))["energy"]


class NequIP(Peer):
    """nequip's network, lmax 2, 64 features of natural parity, 4 layers, in eager mode."""

    def __init__(self, system: System) -> None:
        from nequip.data import AtomicDataDict as key
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state

        set_global_state()
        model = NequIPGNNModel(
            seed=0, model_dtype="float32", type_names=["H", "C", "N", "O"], r_max=CUTOFF, num_layers=4, l_max=2,
            parity=False, num_features=64, avg_num_neighbors=_NEIGHBOURS, do_derivatives=False,
        )  # fmt: skip
        super().__init__(model, system)
        self.key, self.types = key, torch.tensor([SPECIES.index(z) for z in system.z.tolist()])
        # the receiver comes first in nequip
        self.index = self.index.flip(0)
        self.counts = torch.bincount(system.batch)

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        key = self.key
        data = {key.POSITIONS_KEY: pos.float(), key.EDGE_INDEX_KEY: self.index, key.ATOM_TYPE_KEY: self.types,
                key.BATCH_KEY: batch, key.NUM_NODES_KEY: self.counts}  # fmt: skip
        return self.model(data)[key.TOTAL_ENERGY_KEY]


class MACE(Peer):
    """mace-torch's ScaleShiftMACE: lmax 3, correlation 3, two layers."""

    def __init__(self, system: System, irreps: str) -> None:
        from e3nn import o3
        from mace.modules import ScaleShiftMACE, interaction_classes

        block = interaction_classes["RealAgnosticResidualInteractionBlock"]
        model = ScaleShiftMACE(
            r_max=CUTOFF, num_bessel=8, num_polynomial_cutoff=5, max_ell=3, interaction_cls=block,
            interaction_cls_first=block, num_interactions=2, num_elements=len(SPECIES), hidden_irreps=o3.Irreps(irreps),
            MLP_irreps=o3.Irreps("16x0e"), atomic_energies=torch.zeros(len(SPECIES)).numpy(), gate=nn.functional.silu,
            avg_num_neighbors=_NEIGHBOURS, atomic_numbers=list(SPECIES), correlation=3, radial_type="bessel",
            atomic_inter_scale=1.0, atomic_inter_shift=0.0,
        )  # fmt: skip
        super().__init__(model.float(), system)
        types = torch.tensor([SPECIES.index(z) for z in system.z.tolist()])
        self.given = {
            "node_attrs": nn.functional.one_hot(types, len(SPECIES)).float(),
            "edge_index": self.index,
            "shifts": torch.zeros(self.index.shape[1], 3),
            "unit_shifts": torch.zeros(self.index.shape[1], 3),
            "cell": torch.zeros(3 * system.num_graphs, 3),
            "ptr": torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(system.batch).cumsum(0)]),
            "head": torch.zeros(system.num_graphs, dtype=torch.long),
        }

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        data = self.given | {"positions": pos.float(), "batch": batch}
        return self.model(data, training=self.training, compute_force=False)["interaction_energy"]


#: Name -> (how to build it for a system, how to install it).
PEERS: dict[str, tuple[Callable[[System], Peer], str]] = {
    "NBodyNet": (NBody, ""),
    "SchNet": (SchNet, "pip install torch_geometric"),
    "PaiNN": (PaiNN, "pip install schnetpack==2.1.1"),
    "ViSNet": (lambda system: ViSNet(system, 1), "pip install torch_geometric"),
    "NequIP": (NequIP, "pip install nequip"),
    "MACE 64x0e": (
        lambda system: MACE(system, "64x0e"),
        _MACE,
    ),
    "MACE 128x0e+128x1o": (
        lambda system: MACE(system, "128x0e + 128x1o"),
        _MACE,
    ),
}


def build(name: str, system: System) -> Peer:
    """The model for a system, in float32.

    Raises: Missing: it is not installed, or does not run with the versions here.
    """
    maker, install = PEERS[name]
    dtype, level = torch.get_default_dtype(), logging.getLogger().level
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peers say about themselves
            return maker(system)
    except ImportError as error:
        raise Missing(f"{install} ({error})") from error
    finally:  # some peers change these for the whole process
        torch.set_default_dtype(dtype)
        logging.getLogger().setLevel(level)
