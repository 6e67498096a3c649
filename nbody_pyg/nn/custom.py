"""User-defined gates in a network: the gate of each kind of step, and the names of classes in a model file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from e3nn import o3
from torch import Tensor, nn

from nbody_pyg.messages import short
from nbody_pyg.nn.irreps import state_shape

#: Kinds of steps of a network: along the pairs of a level, from children to parents, and back.
KINDS = ("pair", "up", "down")


class GateFactory(Protocol):
    """A factory of the gates of a network, such as a class of gates.

    It is called once for every step, with the type of the sources and the type of the result, each with one
    multiplicity. If types have several, it is called for each group of channels of one multiplicity
    (:func:`~nbody_pyg.nn.irreps.channel_groups`), and a group may have fewer degrees than the harmonics of the edges.
    The gate is a module; its ``forward(x, edges)`` takes the states (sources, rows, channels) and the
    :class:`~nbody_pyg.nn.edges.EdgeFeatures` of the step, and returns (targets, rows, channels).
    """

    def __call__(
        self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, *, num_basis: int, avg_num_neighbors: float
    ) -> nn.Module: ...


def gate_factories(given: GateFactory | str | Mapping[str, GateFactory | str] | None) -> dict[str, GateFactory]:
    """The factory of each kind of step that has one.

    Raises: ValueError: an unknown kind of step, or a name that is not a class of modules. TypeError: not a factory.
    """
    if given is None:
        return {}
    by_kind = dict(given) if isinstance(given, Mapping) else dict.fromkeys(KINDS, given)
    if not by_kind or not set(by_kind) <= set(KINDS):
        raise ValueError(f"gate must be a class of gates, or a mapping from some of {KINDS} to one, got {short(given)}")
    return {
        kind: _callable(imported_class(one, nn.Module, "gate") if isinstance(one, str) else one)
        for kind, one in by_kind.items()
    }


def gate_names(factories: Mapping[str, GateFactory]) -> dict[str, str]:
    """Where each class of gates is defined, "module:name", as a model file tells it.

    Raises: ValueError: a factory that is no class, or no class at the top of an importable module.
    """
    return {kind: class_name(factory, "gate") for kind, factory in factories.items()}


def class_name(cls: Any, what: str) -> str:
    """Where a class is defined, "module:name", as a model file tells it; ``what`` it is of, for messages.

    Raises: ValueError: no class, or no class at the top of an importable module.
    """
    name = f"{cls.__module__}:{cls.__qualname__}" if isinstance(cls, type) else repr(cls)
    if not isinstance(cls, type) or _found(name) is not cls:
        raise ValueError(
            f"{what} must be a class at the top of a module to be saved or copied by its settings, got "
            f"{short(name)}; define one there that calls it"
        )
    return name


def checked_state(x: Tensor, gate: nn.Module, targets: int, irreps: o3.Irreps) -> Tensor:
    """The result of a gate, which must not be broadcast.

    Raises: ValueError: another shape than (targets, rows, channels).
    """
    wanted = (targets, *state_shape(irreps))
    if tuple(x.shape) != wanted:
        raise ValueError(
            f"{type(gate).__name__} must return states of shape {list(wanted)} (targets, rows, channels) of type "
            f"{irreps}, got {list(x.shape)}; sum over edges.num_targets targets"
        )
    return x


def _callable(factory: Any) -> GateFactory:
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(
            f"gate must be a class of gates, not one gate or anything else, got {short(repr(factory))}; every step "
            "makes its own"
        )
    gate: GateFactory = factory
    return gate


def _found(name: str) -> Any:
    """The attribute of this name of a loaded module, or None."""
    module, _, attribute = name.partition(":")
    return getattr(sys.modules.get(module), attribute, None) if attribute else None


def imported_class(name: str, base: type[nn.Module], what: str) -> type:
    """The class of this name. Nothing is imported, because a model file must not run code.

    Raises: ValueError: no loaded module defines such a class.
    """
    found = _found(name)
    if not isinstance(found, type) or not issubclass(found, base):
        module = name.partition(":")[0]
        raise ValueError(
            f"{what} {short(name)} is not known: no module that was imported defines such a class; import "
            f"{short(module)} first"
        )
    return found
