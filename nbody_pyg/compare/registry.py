"""The models that can be compared: what they are, whose settings they have, and how they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nbody_pyg.compare.peer import Facts, MissingPeer, undisturbed
from nbody_pyg.messages import nearest

_TORCHMD = "pip install --no-deps torchmd-net && pip install warp-lang h5py"
_SCHNETPACK = (
    "pip install --no-deps schnetpack torch-ema pytorch-lightning lightning-utilities torchmetrics && "
    "pip install fasteners dirsync hydra-core tensorboardX progressbar2 h5py matscipy"
)
#: mace-torch pins e3nn 0.4.4, older than what nbody_pyg asks for; 0.3.16 was seen to run with e3nn 0.6.
_MACE = (
    "pip install --no-deps mace-torch opt-einsum opt-einsum-fx torch-ema && pip install pandas prettytable h5py orjson "
    "configargparse python-hostlist GitPython (or in an environment of its own: --python mace=PATH)"
)


@dataclass(frozen=True)
class Entry:
    """A model as it enters a comparison.

    ``build`` is "module:class" of the adapter, empty for our own network. ``lr`` holds, by optimizer, the
    learning rate that a search on the validation frames of rMD17 aspirin chose (PaiNN, TensorNet), or one that
    is usual for the model where no search was made yet. A comparison without a search takes it, with
    ``optimizer``, the better of the two there.
    """

    title: str
    build: str
    distribution: str
    install: str
    settings: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=lambda: {"soap": 3e-3, "adam": 1e-3})
    optimizer: str = "soap"


_ADAPTERS = "nbody_pyg.compare.adapters."
_PYG = "pip install torch_geometric"

MODELS: dict[str, Entry] = {
    "nbody": Entry(
        "NBodyNet", "", "nbody_pyg", "", "the practical preset", lr={"adam": 5e-3, "soap": 1e-2},
    ),
    "schnet": Entry(
        "SchNet (PyG)", _ADAPTERS + "pyg:SchNet", "torch_geometric", _PYG,
        "128 channels, 6 interactions, 50 Gaussians: the defaults",
    ),
    "dimenet": Entry(
        "DimeNet++ (PyG)", _ADAPTERS + "pyg:DimeNet", "torch_geometric", _PYG,
        "128 channels, 4 blocks, 7 spherical and 6 radial functions: the authors'",
        {
            "hidden_channels": 128, "out_channels": 1, "num_blocks": 4, "int_emb_size": 64, "basis_emb_size": 8,
            "out_emb_channels": 256, "num_spherical": 7, "num_radial": 6,
        },
    ),
    "visnet": Entry(
        "ViSNet lmax 1 (PyG)", _ADAPTERS + "pyg:ViSNet", "torch_geometric", _PYG,
        "128 channels, 6 layers, 8 heads: the defaults", {"lmax": 1},
    ),
    "visnet-l2": Entry(
        "ViSNet lmax 2 (PyG)", _ADAPTERS + "pyg:ViSNet", "torch_geometric", _PYG,
        "128 channels, 6 layers, 8 heads", {"lmax": 2},
    ),
    "painn": Entry(
        "PaiNN (schnetpack)", _ADAPTERS + "schnetpack:Schnetpack", "schnetpack", _SCHNETPACK,
        "128 features, 3 interactions, 20 Gaussians: the authors'", {"kind": "painn"},
        lr={"adam": 3e-3, "soap": 3e-3},
    ),
    "schnet-spk": Entry(
        "SchNet (schnetpack)", _ADAPTERS + "schnetpack:Schnetpack", "schnetpack", _SCHNETPACK,
        "128 features, 6 interactions, 20 Gaussians", {"kind": "schnet", "layers": 6},
    ),
    "tensornet": Entry(
        "TensorNet (torchmd-net)", _ADAPTERS + "torchmdnet:TensorNet", "torchmd-net", _TORCHMD,
        "128 channels, 2 layers, 32 radial functions: the authors' for rMD17", {"num_layers": 2, "num_rbf": 32},
        # SOAP's rate won in runs of 60 s and did not recover from its start in one of 300 s
        lr={"adam": 3e-3, "soap": 1e-2}, optimizer="adam",
    ),
    "nequip": Entry(
        "NequIP S", _ADAPTERS + "nequip:NequIP", "nequip", "pip install nequip",
        "preset S: lmax 1, 128 and 64 features, 2 layers", {"preset": "S"}, lr={"adam": 1e-2, "soap": 1e-2},
    ),
    "nequip-l2": Entry(
        "NequIP lmax 2", _ADAPTERS + "nequip:NequIP", "nequip", "pip install nequip",
        "lmax 2, 64 features of natural parity, 4 layers",
        {"num_layers": 4, "l_max": 2, "parity": False, "num_features": 64}, lr={"adam": 5e-3, "soap": 1e-2},
    ),
    "mace": Entry(
        "MACE 64x0e", _ADAPTERS + "mace:MACE", "mace-torch", _MACE,
        "64x0e, lmax 3, correlation 3, 2 layers, 8 Bessel functions", {"irreps": "64x0e"},
        lr={"adam": 1e-2, "soap": 1e-2},
    ),
    "mace-128": Entry(
        "MACE 128x0e+128x1o", _ADAPTERS + "mace:MACE", "mace-torch", _MACE,
        "128x0e+128x1o, lmax 3, correlation 3, 2 layers: the authors'", {"irreps": "128x0e + 128x1o"},
        lr={"adam": 1e-2, "soap": 1e-2},
    ),
}  # fmt: skip


def entry(name: str) -> Entry:
    """The entry of a model. Raises: ValueError: no such name; the message has the nearest one."""
    if name not in MODELS:
        raise ValueError(f"models must be names of the registry, got {name!r}; {nearest(name, MODELS)}")
    return MODELS[name]


def build_peer(name: str, facts: Facts, seed: int = 0, **arguments: Any) -> nn.Module:
    """A peer with fresh weights that depend on ``seed`` alone; ``arguments`` replace those of its entry.

    Raises: MissingPeer: its package is not installed, with the line that installs it; ValueError: no peer.
    """
    found = entry(name)
    if not found.build:
        raise ValueError(f"{name!r} is no peer but our own network; build it with NBodyNet")
    module, _, kind = found.build.partition(":")
    try:
        with undisturbed(seed):
            adapter = getattr(importlib.import_module(module), kind)
            peer: nn.Module = adapter(facts, **{**found.arguments, **arguments})
            return peer
    except ImportError as error:
        broken = _version(found.distribution) is not None
        words = "is installed, but cannot be imported; install it anew" if broken else "is not installed"
        raise MissingPeer(f"{found.title} {words}: {found.install} ({error})") from error


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version(name: str) -> str:
    """Package and version of a model, as far as it can be told."""
    distribution = entry(name).distribution
    return " ".join([distribution, *filter(None, [_version(distribution)])])
