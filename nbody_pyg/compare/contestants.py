"""Models of a comparison: from the registry, or named variants of our network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbody_pyg.compare.config import CompareConfig
from nbody_pyg.compare.registry import entry
from nbody_pyg.training.config import parse_yaml
from nbody_pyg.training.settings import TrainingConfig


@dataclass(frozen=True)
class Contestant:
    """A line of the table.

    Args:
        name: short and unique; a part of the names of files.
        title: in words.
        model: name in the registry.
        arguments: of the model, see :class:`~nbody_pyg.compare.point.Point`.
        training: settings of a variant, which override those of the comparison.
        group: what a variant is about.
    """

    name: str
    title: str
    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""

    def rates(self, config: CompareConfig, optimizer: str) -> list[float]:
        """Learning rates to try: one where nothing is searched."""
        if "lr" in self.training:
            return [float(self.training["lr"])]
        if config.lr is not None:
            return [config.lr]
        return config.search or [entry(self.model).lr[optimizer]]

    def optimizers(self, config: CompareConfig) -> list[str]:
        """Optimizers to train with, ours first."""
        if "optimizer" in self.training:
            return [str(self.training["optimizer"])]
        if config.optimizers:
            return config.optimizers
        return ["soap", "adam"] if config.search else [entry(self.model).optimizer]


def contestants(config: CompareConfig) -> list[Contestant]:
    """Those that the configuration names.

    Raises: FileNotFoundError, ValueError: no such file of variants, an unknown variant or key.
    """
    if config.ablation is not None:
        return variants(config.ablation, config)
    return [
        Contestant(name, entry(name).title, name, config.model if name == "nbody" else config.arguments.get(name, {}))
        for name in config.models
    ]


def variants(path: str | Path, config: CompareConfig) -> list[Contestant]:
    """The variants of an ablation: groups of named overrides ``section.key: value`` over the base.

    The file holds ``groups: {group: {name: {model.lmax: 1, training.lr: 0.003}}}``. The comparison's own
    sections model and training are the base; a variant without overrides is the base itself.

    Raises: FileNotFoundError; ValueError: a name given twice, an unknown variant, section or key.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of variants at {path}")
    tree = parse_yaml(Path(path).read_bytes(), str(path))
    groups = tree.get("groups") if isinstance(tree, Mapping) else None
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{path} must hold groups of variants: {{groups: {{group: {{name: {{model.lmax: 1}}}}}}}}")
    found: dict[str, Contestant] = {}
    for group, members in groups.items():
        if not isinstance(members, Mapping):
            raise ValueError(f"{path}: group {group!r} must hold variants {{name: {{key: value}}}}, got {members!r}")
        for name, overrides in members.items():
            if not isinstance(overrides or {}, Mapping):
                raise ValueError(f"{path}: variant {name!r} must hold keys and values, got {overrides!r}")
            _check_name(str(name), path)
            if str(name) in found:
                raise ValueError(f"{path} names the variant {name!r} twice; names are unique over all groups")
            found[str(name)] = _variant(str(name), str(group), overrides or {}, config)
    if config.variants is None:
        return list(found.values())
    if unknown := [name for name in config.variants if name not in found]:
        raise ValueError(f"{path} has no variant {unknown[0]!r}; it has {', '.join(found)}")
    return [found[name] for name in config.variants]


def _check_name(name: str, path: str | Path) -> None:
    """The name of a variant is a part of the names of files."""
    if not 0 < len(name) <= 80 or not name.isprintable() or set(name) & set('/\\:*?"<>|') or name[0] in ". ":
        raise ValueError(
            f"{path}: names of variants must be words of at most 80 letters that may stand in the name of a file "
            f"(no slashes, no dot at the start), got {name!r}"
        )


def _variant(name: str, group: str, overrides: Mapping[str, Any], config: CompareConfig) -> Contestant:
    model, training = dict(config.model), {}
    allowed = {f.name for f in dataclasses.fields(TrainingConfig)} - {"budget_seconds", "max_steps", "max_epochs"}
    for key, value in overrides.items():
        section, _, rest = str(key).partition(".")
        if section == "model" and rest:
            model[rest] = value
        elif section == "training" and rest in allowed:
            training[rest] = value
        else:
            raise ValueError(f"variant {name!r} overrides {key!r}; keys are model.KEY and training.KEY of nbody train")
    words = ", ".join(f"{str(k).partition('.')[2]} {_short(v)}" for k, v in overrides.items())
    return Contestant(name, words or "as it is", "nbody", model, training, group)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(_short(v) for v in value.values())
    return "[" + " ".join(_short(v) for v in value) + "]" if isinstance(value, list) else str(value)
