"""Which parameters of a model are trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from nbody_pyg.messages import nearest
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.settings import PARTS

#: Parameters of the readouts, and energies of the elements that the network adds to them.
_READOUTS = ("readouts", "shift")
#: Matrices W^l of the interactions of an NBodyNet.
_MAP = re.compile(r"interactions\..*weights\.\d+")


def choose_parts(potential: Potential | PropertyModel, parts: str | Sequence[str]) -> None:
    """Set ``requires_grad`` to False for all parameters but those of the named parts.

    Args:
        parts: "all", "readouts", "adapters" (all; :func:`adapted_maps` are then changed by adapters), or names of
            modules and parameters of the network, such as ``["readouts", "interactions.1"]``.

    Raises: ValueError: a name that is no part of the network, or that has no parameters.
    """
    named = dict(potential.model.named_parameters())
    wanted = [parts] if isinstance(parts, str) else list(parts)
    if wanted in (["all"], ["adapters"]):
        return
    names = [name for part in wanted for name in (_READOUTS if part == "readouts" else [part])]
    if unknown := [n for n in names if n not in _READOUTS and not any(_inside(p, n) for p in named)]:
        first = sorted({name.split(".")[0] for name in named})
        raise ValueError(
            f"finetune.parts must be {', '.join(PARTS)}, or name parts of the network, got {unknown[0]!r}; "
            f"{nearest(unknown[0], [*PARTS, *first])}"
        )
    chosen = {f"model.{p}" for p in named if any(_inside(p, n) for n in names)}
    if not chosen:
        raise ValueError(
            f"finetune.parts must name parts with parameters, got {parts!r}, of which "
            f"{type(potential.model).__name__} has none; name its modules, or train 'all'"
        )
    for name, p in potential.named_parameters():
        p.requires_grad_(p.requires_grad and name in chosen)


@contextlib.contextmanager
def parts_restored(potential: Potential | PropertyModel) -> Iterator[None]:
    """Context after which the parameters are trainable or not as they were before."""
    before = [(p, p.requires_grad) for p in potential.parameters()]
    try:
        yield
    finally:
        for p, trained in before:
            p.requires_grad_(trained)


def adapted_maps(potential: Potential | PropertyModel, rank: int) -> dict[str, nn.Parameter]:
    """The matrices W^l of the interactions that are larger than ``rank`` on both sides, by their names.

    Raises: ValueError: there are none.
    """
    found = {
        name: p
        for name, p in potential.named_parameters()
        if p.dim() == 2 and min(p.shape) > rank and _MAP.fullmatch(name.removeprefix("model."))
    }
    if not found:
        raise ValueError(
            f"finetune.rank must be below the sides of the maps W^l of an NBodyNet, got {rank} for "
            f"{type(potential.model).__name__}, which has no such map; choose a smaller rank, or finetune.parts all"
        )
    return found


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
