"""Convert a potential to a plain dictionary and back, for checkpoints and model files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbody_pyg.energy import AtomicReference, build_terms, describe_terms
from nbody_pyg.models import NBodyNet
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.system import PRECISIONS


def potential_config(potential: Potential | PropertyModel) -> dict[str, Any]:
    """JSON-able description: class and config of the model, E0 (eV), scale, dtype.

    A model without ``config()`` (any network that is not ours) is described by its class name only; such a
    potential is rebuilt by handing a model of the same shape to :func:`potential_from_config`.
    """
    model = potential.model
    described: dict[str, Any] = {"class": type(model).__name__, "config": potential.network.config()}
    if assumed := potential.network.assumed:
        described["assumed"] = dict(assumed)  # charge and spin of all training frames
    if isinstance(potential, PropertyModel):
        dtype = str(potential.dtype).removeprefix("torch.")
        return {"model": described, "e0": None, "scale": 1.0, "dtype": dtype, "property": potential.config()}
    reference = potential.reference
    return {
        "model": described,
        "e0": None if reference is None else {str(z): e for z, e in reference.energies.items()},
        "scale": float(potential.scale),
        "repulsion": None if potential.repulsion is None else potential.repulsion.config(),
        "dtype": str(potential.dtype or torch.float32).removeprefix("torch."),
        **({"terms": describe_terms(potential.terms)} if potential.terms else {}),
    }


def potential_from_config(config: dict[str, Any], model: nn.Module | None = None) -> Potential | PropertyModel:
    """Build the potential, or the model of properties, that :func:`potential_config` described, with fresh weights.

    Args:
        model: the network, if it is not one of ours.
    Raises: ValueError: a foreign model and none given, or a model of another class; a term of the energy whose class no
        imported module defines; unknown dtype.
    """
    described = config["model"]
    if model is None:
        model = _build_model(described)
    elif type(model).__name__ != described["class"]:
        raise ValueError(
            f"the file holds a {described['class']}, but model is a {type(model).__name__}; pass the same class"
        )
    assumed = {str(key): float(value) for key, value in (config["model"].get("assumed") or {}).items()}
    model.assumed = assumed  # type: ignore[assignment]  # on whatever module
    if config["dtype"] not in PRECISIONS:
        raise ValueError(f"dtype must be one of {sorted(PRECISIONS)}, got {config['dtype']!r}")
    if config.get("property") is not None:
        return PropertyModel.from_config(config["property"], model).to(PRECISIONS[config["dtype"]])
    e0 = config["e0"]
    reference = None if e0 is None else AtomicReference({int(z): e for z, e in e0.items()})
    described = config["repulsion"]
    repulsion = None if described is None else ZBLRepulsion.from_config(described)
    terms = build_terms(config.get("terms") or ())
    return Potential(model, reference, config["scale"], repulsion, terms).to(PRECISIONS[config["dtype"]])


def _build_model(described: dict[str, Any]) -> nn.Module:
    if described["config"] is None or described["class"] != NBodyNet.__name__:
        raise ValueError(
            f"the file holds a {described['class']}, which nbody_pyg cannot build by itself; build the "
            "network as it was and pass it as model="
        )
    return NBodyNet.from_config(described["config"])
