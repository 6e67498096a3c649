"""What is compared, and how: one frozen dataclass, read from YAML and the command line."""

# ruff: noqa: RUF009 (setting() makes the field itself)
from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse

from nbody_pyg.compare.registry import MODELS, entry
from nbody_pyg.datasets.qm9 import target_labels
from nbody_pyg.messages import check_choice, nearest
from nbody_pyg.training.config import (
    expand_path,
    insert,
    parse_config,
    parse_value,
    read_options,
    read_tree,
    switch_scheme,
    typed,
)
from nbody_pyg.training.optim import optimizer_names
from nbody_pyg.training.prepare import wanted_properties
from nbody_pyg.training.settings import setting

#: Keys of the nested sections; everything in them is a key of ``nbody train`` too.
SECTIONS = ("data", "training", "model")
#: What ``nbody compare`` runs on when no data is named.
_FIRST_TRY = {"embedded": "ethanol", "num_val": 50}


def _list(text: str, *values: Any) -> Any:
    return field(default_factory=lambda: list(values), metadata={"help": text})


@dataclass(frozen=True)
class CompareConfig:
    """A comparison. Every model runs through the same trainer, on the same frames, for the same budget.

    Raises: ValueError: an unknown model, a value out of range, a limit given twice.
    """

    models: list[str] = _list(f"models to compare:  {', '.join(MODELS)}", "nbody", "schnet")
    budget: float | None = setting(None, "CPU seconds of training for each run (default: 60, without --steps)")
    steps: int | None = setting(None, "optimizer steps of each run, instead of a budget")
    seeds: list[int] = _list("one final run of each model for every seed", 0)
    optimizers: list[str] | None = setting(
        None, "train every model with each of these: adam, soap (default: both in a search, else the model's best)"
    )
    lr: float | None = setting(None, "learning rate of every model (default: the registry's, or the search's)")
    batch_size: int = setting(4, "molecules per step")
    search: list[float] | None = setting(None, "learning rates to try first, judged on the validation frames")
    search_seconds: float = setting(60.0, "CPU seconds of each run of the search")
    search_steps: int | None = setting(None, "steps of each run of the search, instead of seconds")
    extend: int = setting(2, "further learning rates (by factors of 3) where the best lies at the edge of the search")
    search_on: str = setting("first", "search on the 'first' molecule and use the result for all, or on 'each'")
    finals: str = setting("best", "after a search, a final run for the 'best' optimizer, for 'each', or for 'none'")
    cutoff: float = setting(5.0, "cutoff of the peers' neighbour lists, angstrom")
    points: int = setting(12, "points of a learning curve")
    arguments: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "arguments of a peer's adapter, e.g. {painn: {features: 64}}"}
    )
    ablation: str | None = setting(None, "YAML file of variants of our network, compared instead of models")
    variants: list[str] | None = setting(None, "variants of the file to run (default: all)")
    python: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Python of a model's separate environment, e.g. mace=PATH"}
    )
    out: str = setting("runs/compare", "folder of the results; finished runs found there are not run again")
    report: bool = setting(False, "run nothing; write tables and plots of the runs in the folder")
    isolate: bool = setting(True, "run every model in a separate process, so that no model can disturb another")
    timeout: float | None = setting(
        None, "wall-clock seconds after which a run in a separate process is stopped as failed (default: 600 and 20 "
        "times its budget; with steps a day)"
    )  # fmt: skip
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.models:
            entry(name)
        for name in (*self.arguments, *self.python):
            entry(name)
        if self.budget is not None and self.steps is not None:
            raise ValueError(f"give budget or steps, not both, got {self.budget} and {self.steps}")
        numbers = (
            "budget",
            "steps",
            "lr",
            "batch_size",
            "search_seconds",
            "search_steps",
            "cutoff",
            "points",
            "timeout",
        )
        for name, value in [*((n, getattr(self, n)) for n in numbers), *(("search", lr) for lr in self.search or ())]:
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in self.optimizers or ():
            check_choice("optimizers", name, optimizer_names())
        for name, choices in (("search_on", ("first", "each")), ("finals", ("best", "each", "none"))):
            check_choice(name, getattr(self, name), choices)
        if self.timeout is not None and not self.isolate:
            raise ValueError("timeout needs isolate: only a process of its own can be ended; leave one of them out")
        if self.search and self.lr is not None:
            raise ValueError(f"give lr, or learning rates to search, not both, got {self.lr} and {self.search}")
        taken = {"budget_seconds", "max_steps", "max_epochs", "batch_size", "lr", "optimizer", "seed"}
        if found := sorted(taken & set(self.training)):
            raise ValueError(
                f"training.{found[0]} is set by the comparison: use budget, steps, batch_size, lr, optimizers or seeds"
            )
        for data in self.datasets():  # finds a wrong key before anything runs
            wanted_properties(
                parse_config({"data": data, "training": self.training | {"max_steps": 1}, "model": self.model})
            )

    @property
    def limit(self) -> dict[str, Any]:
        """Of the final runs, as keys of a training configuration."""
        if self.steps is not None:
            return {"max_steps": self.steps}
        return {"budget_seconds": float(self.budget or 60.0)}

    @property
    def search_limit(self) -> dict[str, Any]:
        """Of the runs of the search."""
        if self.search_steps is not None:
            return {"max_steps": self.search_steps}
        return {"budget_seconds": float(self.search_seconds)}

    def datasets(self) -> list[dict[str, Any]]:
        """The data sections: one for each molecule, or each target of QM9, where several are named.

        Raises: ValueError: a target named twice.
        """
        data = dict(self.data) or dict(_FIRST_TRY)
        if isinstance(targets := data.get("qm9"), list) or targets == "all":
            data["qm9"] = list(target_labels(targets))
        for key in ("rmd17", "embedded", "qm9"):
            if isinstance(data.get(key), list):
                return [{**data, key: name} for name in data[key]]
        return [data]


def load_compare(path: str | Path | None = None, words: Sequence[str] = ()) -> CompareConfig:
    """Read a YAML file and lay the words of the command line over it.

    Options are ``--key value``, ``--key value value`` for lists, ``--section.key value``, and ``--python
    model=PATH``.

    Raises: FileNotFoundError: no such file; ValueError: unknown keys and wrong values.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_tree(path, "keys of a comparison")
    (_, loose), *options = read_options(words)
    if loose:
        raise ValueError(f"cannot read {loose[0]!r}; options look like --budget 300")
    given = [_given(key, texts) for key, texts in options]
    switch_scheme(tree, dict(given))
    for key, value in given:
        insert(tree, key, (tree.get(key) or {}) | value if key == "python" else value)
    known = {f.name: f for f in dataclasses.fields(CompareConfig)}
    hints = typing.get_type_hints(CompareConfig)
    for key in tree:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; {nearest(key, known)}")
        if "list" in str(hints[key]) and tree[key] is not None and not isinstance(tree[key], list):
            tree[key] = [tree[key]]
        tree[key] = typed(tree[key], hints[key])
    try:
        parsed = compare_parser().parse_object({k: v for k, v in tree.items() if k not in SECTIONS})
    except jsonargparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    values = {key: _plain(value) for key, value in vars(parsed).items()}
    for key in ("out", "ablation"):
        values[key] = None if values[key] is None else expand_path(values[key])
    values["python"] = {name: expand_path(path) for name, path in values["python"].items()}
    values |= {name: dict(tree.get(name) or {}) for name in SECTIONS}
    return CompareConfig(**values)


def compare_parser() -> jsonargparse.ArgumentParser:
    """The keys with their defaults and help."""
    parser = jsonargparse.ArgumentParser(
        prog="nbody compare", usage="nbody compare [CONFIG.yaml] [--KEY VALUE ...] [--data.KEY VALUE ...]",
        exit_on_error=False, add_help=False,
        description="Train models on the same frames for the same time, and report where ours is better or worse. "
        "Keys of data, training and model are those of nbody train, e.g. --data.rmd17 aspirin ethanol "
        "--data.root FOLDER, --training.energy_weight 0.05, --model.channels 48. Several targets of QM9 (--data.qm9 "
        "homo mu, or all) are learned one by one, each in a run of its own; nbody train makes one model of them.",
    )  # fmt: skip
    hints, defaults = typing.get_type_hints(CompareConfig), CompareConfig()
    for each in dataclasses.fields(CompareConfig):
        if each.name in SECTIONS:
            continue
        default = getattr(defaults, each.name)
        parser.add_argument(f"--{each.name}", type=hints[each.name], default=default, help=each.metadata["help"])
    return parser


def _given(key: str, texts: Sequence[str]) -> tuple[str, Any]:
    """Key and value of an option: read as YAML, a list where there are several."""
    key = key if "." in key else key.replace("-", "_")
    if not texts and key != "report":
        raise ValueError(f"--{key} needs a value")
    if key == "python":
        pairs = [text.partition("=") for text in texts]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f"--python takes MODEL=PATH, got {texts}")
        return key, {name: path for name, _, path in pairs}
    # A folder named 2024 is a name
    named = typing.get_type_hints(CompareConfig).get(key) in (str, str | None, list[str], list[str] | None)
    values = [
        text if named and text != "null" and not text.startswith("[") else parse_value(text, f"--{key} {text}")
        for text in texts or ["true"]
    ]
    return key, values[0] if len(values) == 1 else values


def _plain(value: Any) -> Any:
    if isinstance(value, (jsonargparse.Namespace, Mapping)):
        return {k: _plain(v) for k, v in (vars(value) if isinstance(value, jsonargparse.Namespace) else value).items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
