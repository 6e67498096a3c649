"""Where one compiled call may stand for a whole module: as long as nothing in it was subclassed, replaced or hooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Hooks on all modules of a process, such as those of profilers
_EVERYWHERE: tuple[Mapping[Any, Any], ...] = tuple(
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks", {})
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class AsWritten:
    """Whether a module and all modules in it run as they were written.

    It is false where one of them is of a class that the compiled call does not know (also a parametrised one), where
    its ``forward`` was replaced, on the object or on the class, where it has a forward or backward hook, and where a
    module was put in the place of another.

    Args:
        module: what the compiled call does.
        known: the classes that it knows.
    """

    def __init__(self, module: nn.Module, known: Mapping[type[nn.Module], Any]) -> None:
        everything = list(module.modules())
        self._known = all(type(m) in known or type(m) in _LISTS for m in everything)
        self._forwards = [(m, type(m), known[type(m)]) for m in everything if type(m) in known]
        self._children = [(m._modules, name, child) for m in everything for name, child in m._modules.items()]
        self._hooks = [getattr(m, name) for m in everything for name in _HOOKS]

    def __call__(self) -> bool:
        """As of now."""
        if not self._known or any(self._hooks) or any(_EVERYWHERE):
            return False
        for module, kind, forward in self._forwards:
            if type(module) is not kind or kind.forward is not forward or "forward" in module.__dict__:
                return False
        return all(modules.get(name) is child for modules, name, child in self._children)


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)


def written(*classes: type[nn.Module]) -> dict[type[nn.Module], Any]:
    """Classes with the forward that each has now, for :class:`AsWritten`; make it where they are defined."""
    return {one: one.forward for one in classes}
