"""Optimizers by name. A class defined here can be named in a configuration."""

from __future__ import annotations

from torch import nn, optim

from nbody_pyg.messages import check_choice
from nbody_pyg.training.flat import FlatParameters
from nbody_pyg.training.soap import Soap

__all__ = ["Soap", "build_optimizer"]


def optimizer_names() -> list[str]:
    """Names allowed in a configuration: those of torch, and the classes of this file."""
    own = [k for k, v in globals().items() if isinstance(v, type) and issubclass(v, optim.Optimizer)]
    return sorted({"adam", "adamw", "soap", *own})


def build_optimizer(
    name: str, module: nn.Module, lr: float, weight_decay: float = 0.0, flat: FlatParameters | None = None
) -> optim.Optimizer:
    """The optimizer ``name`` over the trainable parameters of ``module``.

    ``soap`` is :class:`~nbody_pyg.training.soap.Soap`; ``adam`` (AMSGrad, fused) and ``adamw`` come from
    torch; any other name is looked up in this file. A class that distinguishes parameters has ``from_module(module, lr,
    weight_decay)``. The element-wise ones work on ``flat`` if it is given.

    Raises: ValueError: unknown name, or nothing to train.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("module has no trainable parameters")
    if name in ("adam", "adamw"):
        kind = optim.Adam if name == "adam" else optim.AdamW
        chosen = parameters if flat is None else [flat.parameter]
        return kind(chosen, lr=lr, weight_decay=weight_decay, amsgrad=True, fused=True)
    check_choice("optimizer", name, optimizer_names())
    found = Soap if name == "soap" else globals()[name]
    if hasattr(found, "from_module"):
        return found.from_module(module, lr=lr, weight_decay=weight_decay)
    return found(parameters, lr=lr, weight_decay=weight_decay)
