"""One file per model: safetensors for the weights, JSON for everything else; no pickle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nbody_pyg.deploy.fingerprint import cg_fingerprint
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.build import potential_config, potential_from_config
from nbody_pyg.training.checkpoint import is_checkpoint
from nbody_pyg.training.durable import written_whole

#: 2 since potentials have a repulsion, which a reader of format 1 would leave out; 3 since windows have an exponent.
FORMAT_VERSION = 3
_KEY = "nbody_pyg"
_PACKAGES = ("nbody_pyg", "torch", "torch_geometric", "e3nn")


def save_model(
    potential: Potential | PropertyModel, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a potential (or a model of properties) into one file, whole or not at all (temporary file, then rename).

    Args:
        metadata: what else to keep, JSON-able: training settings, data, errors.
    Raises: TypeError: metadata that JSON cannot hold.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in potential.state_dict().items()}
    header = {
        "format_version": FORMAT_VERSION,
        **potential_config(potential),
        "species": _species(potential),
        "units": {"energy": "eV", "length": "angstrom", "forces": "eV/angstrom", "stress": "eV/angstrom^3"},
        "num_parameters": sum(p.numel() for p in potential.parameters()),
        "cg_fingerprint": cg_fingerprint(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "sha256": _digest(tensors),
        "metadata": dict(metadata or {}),
    }
    text = json.dumps(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: text})


def load_model(
    path: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> Potential | PropertyModel:
    """Read a potential, or a model of properties, ready for evaluation.

    Args:
        model: the network, where it is not one of ours: built as it was when the file was written.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, truncated or damaged, written by a newer version, weights that do not
            fit the network, or another convention of the Clebsch-Gordan coefficients.
    """
    header, tensors = _read(Path(path))
    if header["sha256"] != _digest(tensors):
        raise ValueError(f"{path} is damaged: its weights do not match their checksum; get a fresh copy")
    theirs = header["versions"]
    if model is None and header["cg_fingerprint"] != cg_fingerprint():
        raise ValueError(
            f"{path} was written with e3nn {theirs['e3nn']}, whose Clebsch-Gordan coefficients differ from "
            f"those of e3nn {_version('e3nn')} installed here, so that its energies would be wrong; "
            f"install e3nn=={theirs['e3nn']}"
        )
    potential = potential_from_config(header, model)
    problems = potential.load_state_dict(tensors, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise ValueError(
            f"weights of {path} do not fit the network: missing {problems.missing_keys[:3]}, "
            f"unexpected {problems.unexpected_keys[:3]}; written by nbody_pyg {theirs['nbody_pyg']}"
        )
    return potential.to(device).eval()


def load_potential(path: str | Path, device: torch.device | str = "cpu") -> Potential:
    """Read a potential with :func:`load_model`.

    Raises: ValueError: a model of other properties, or what :func:`load_model` refuses; FileNotFoundError.
    """
    return require_potential(load_model(path, device=device), f" ({path})")


def require_potential(model: nn.Module, origin: str = "") -> Potential:
    """Return the model; ``origin`` is what the message adds to it.

    Raises: ValueError: a model of other properties than energies.
    """
    if not isinstance(model, Potential):
        raise ValueError(
            f"potential must give energies and forces, got a {type(model).__name__} for other properties{origin}; "
            "train one on energies (data.qm9 U0, or frames with energy and forces)"
        )
    return model


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Everything in a model file but the weights."""
    return _read(Path(path), weights=False)[0]


def _read(path: Path, weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    if is_checkpoint(path):
        raise ValueError(
            f"{path} is a checkpoint of a training (or another file of torch.save), no model file; the model of a run "
            "is model.nbody in its folder, which nbody train writes at its end (go on with --output.resume true)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            header = None if text is None else json.loads(text)
            known = header is not None and header["format_version"] <= FORMAT_VERSION
            names = list(file.keys()) if weights and known else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no readable model file, it is truncated or damaged ({error}); get a fresh copy"
        ) from error
    if header is None:
        raise ValueError(f"{path} is a safetensors file, but was not written by nbody_pyg")
    if not known:
        raise ValueError(
            f"{path} has format version {header['format_version']}, this nbody_pyg {_version('nbody_pyg')} "
            f"reads up to {FORMAT_VERSION}; upgrade nbody_pyg"
        )
    return header, tensors


def _species(potential: Potential | PropertyModel) -> list[int] | None:
    for source in (potential.model, getattr(potential, "reference", None)):
        if (species := getattr(source, "species", None)) is not None:
            return [int(z) for z in species]
    return None


def _version(package: str) -> str:
    if package == "nbody_pyg":
        from nbody_pyg import __version__

        return __version__
    return importlib.metadata.version(package)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
