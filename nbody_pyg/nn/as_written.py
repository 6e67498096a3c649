"""Decide when one compiled call may replace a module: if nothing in it was subclassed, replaced or hooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Global module hooks, such as those of profilers
_EVERYWHERE: tuple[Mapping[Any, Any], ...] = tuple(
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks", {})
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class AsWritten:
    """Whether a module and all its submodules run unchanged.

    It is false if one of them is of a class that the compiled call does not know (including parametrised ones), if its
    ``forward`` was replaced on the object or on the class, if it has a forward or backward hook, or if a module was
    replaced by another.

    Args:
        module: the module that the compiled call replaces.
        known: the classes that the compiled call knows.
    """

    def __init__(self, module: nn.Module, known: Mapping[type[nn.Module], Any]) -> None:
        everything = list(module.modules())
        self._known = all(type(m) in known or type(m) in _LISTS for m in everything)
        self._forwards = [(m, type(m), known[type(m)]) for m in everything if type(m) in known]
        self._children = [(m._modules, name, child) for m in everything for name, child in m._modules.items()]
        self._hooks = [getattr(m, name) for m in everything for name in _HOOKS]

    def __call__(self) -> bool:
        """Whether the module runs unchanged now."""
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
