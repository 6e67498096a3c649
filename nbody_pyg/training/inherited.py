"""The section ``model`` of a run that starts from a trained model: that of the model, and checked where it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import Potential
from nbody_pyg.properties import Property, PropertyModel
from nbody_pyg.training.config import Config, ModelConfig
from nbody_pyg.training.finetune import ancestor_of, require_same_architecture

#: Entries of the configuration of a network that are no keys of the section.
_OTHERS = frozenset({"species", "scheme", "preset", "gate", "irreps_out"})


def with_architecture(config: Config, init: Potential | PropertyModel) -> Config:
    """The configuration with the architecture of a trained model; latent charges that it lacks may be added.

    Raises: ValueError: another value of the user, or other properties; the message names the argument, both values and
    the cure.
    """
    name = str(ancestor_of(init)["name"])
    if not isinstance(init.model, NBodyNet):
        raise ValueError(
            f"finetune.init must hold an NBodyNet, got {name} with a {type(init.model).__name__}; use fit(init=...)"
        )
    cure = f"leave it out to start from {name}, or train without --init"
    _require_same_properties(config, init, name, cure)
    old = init.model.config()
    require_same_architecture(_given(config, old), init.model, name, cure, "model.")
    scale, repulsion = 1.0, None
    if isinstance(init, Potential):
        scale, repulsion = float(init.scale), init.repulsion
    kind = "none" if repulsion is None else "zbl"
    for key, mine, theirs in (
        ("scale", config.model.scale, scale),
        ("repulsion", config.model.repulsion, kind),
    ):
        if f"model.{key}" in config.given and mine not in (theirs, "auto", "forces"):
            raise ValueError(f"model.{key} must be that of {name}, {theirs!r}, got {mine!r}; {cure}")
    dropped = _OTHERS | ({"target", "readout"} if isinstance(init, PropertyModel) else set())
    arguments = {key: value for key, value in old.items() if key not in dropped}
    if config.model.arguments.get("inputs") is None:
        arguments.pop("inputs", None)  # tuned_model drops them where all frames are neutral singlets
    if arguments.get("long_range") is None and (added := config.model.arguments.get("long_range")) is not None:
        arguments["long_range"] = added
    model = ModelConfig(str(old["preset"]), old["scheme"], scale, kind, arguments)
    named = {"model", "model.scheme", *(f"model.{key}" for key in arguments)}
    named |= {f"model.{key}" for key in ("preset", "scale", "repulsion", "channels", "lmax", "irreps")}
    named |= {f"model.scheme.{key}" for key in old["scheme"]}
    if arguments.get("long_range") is None and "model.long_range" not in config.given:
        named.discard("model.long_range")  # may still be chosen
    target = config.target or (init.properties if isinstance(init, PropertyModel) else ())
    return dataclasses.replace(config, model=model, target=tuple(target), given=config.given | named)


def _given(config: Config, old: Mapping[str, Any]) -> NBodyNet:
    """The network that the user asks for: with the arguments that are given, all others those of ``old``."""
    mine = dict(config.model.arguments)
    merged = dict(old)
    if "irreps" in mine:
        merged.pop("channels", None)
        merged.pop("lmax", None)
    elif {"channels", "lmax"} & set(mine):
        merged.pop("irreps", None)
    merged |= {k: v for k, v in mine.items() if v is not None or k not in ("channels", "lmax", "irreps")}
    if "model.preset" in config.given:
        merged["preset"] = config.model.preset
    if any(key.startswith("model.scheme") for key in config.given):
        scheme, known = dict(config.model.scheme), dict(old["scheme"])
        merged["scheme"] = known | scheme if scheme.get("name") == known["name"] else scheme
    return NBodyNet.from_config(merged)


def _require_same_properties(config: Config, init: Potential | PropertyModel, name: str, cure: str) -> None:
    wanted = {p.name: p for p in config.target}
    has: dict[str, Property] = {p.name: p for p in init.properties} if isinstance(init, PropertyModel) else {}
    if wanted and {n: p.readout for n, p in wanted.items()} != {n: p.readout for n, p in has.items()}:
        raise ValueError(
            f"target must be that of {name}, {', '.join(has) or 'energies'}, got {', '.join(wanted)}; {cure}"
        )
