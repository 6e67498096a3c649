"""The protocol: a learning rate is chosen on validation frames, then every model runs for the same budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbody_pyg.compare.config import CompareConfig
from nbody_pyg.compare.contestants import Contestant, contestants
from nbody_pyg.compare.errors import quantity
from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point, validation_scores

Record = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The learning rate that a search chose for one optimizer.

    ``edge`` says that the best lies at the end of what was tried; ``score`` is the ``error`` on the validation frames,
    infinite where every run failed: the MAE of the forces, meV/angstrom, or where none are learned of energies, meV, or
    of a property, in its unit.
    """

    optimizer: str
    lr: float
    score: float
    edge: bool = False
    error: str = "forces_mae"


@dataclass
class Outcome:
    """What a comparison has found: records of searches and of finals, choices, and who was missing."""

    searches: list[Record] = field(default_factory=list)
    finals: list[Record] = field(default_factory=list)
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def compare(config: CompareConfig, run: Callable[[Point], Record], note: Callable[[str], None] = print) -> Outcome:
    """Carry a comparison out: contestant by contestant, search first, then the final runs of every molecule.

    Args:
        run: carries out one point, see :class:`~nbody_pyg.compare.runner.Runner`.
        note: called with one line at a time.
    """
    outcome, datasets = Outcome(), config.datasets()
    for contestant in contestants(config):
        try:
            for number, data in enumerate(datasets):
                if number == 0 or config.search_on == "each":
                    chosen = choose(contestant, data, config, run, outcome)
                    for choice in chosen if config.search else []:
                        note(f"  {contestant.name}: {describe(choice)}")
                if config.finals == "none" and config.search:
                    continue
                # Of a search, the best optimizer or each; what was given without a search, each
                for choice in chosen[:1] if config.search and config.finals == "best" else chosen:
                    for seed in config.seeds:
                        settings = {"optimizer": choice.optimizer, "lr": choice.lr, "seed": seed, **config.limit}
                        point = _point(contestant, data, config, settings, "final", config.points)
                        outcome.finals.append(run(point))
        except MissingPeer as error:
            outcome.missing[contestant.name] = str(error)
            note(f"  missing: {error}")
    return outcome


def choose(
    contestant: Contestant, data: Mapping[str, Any], config: CompareConfig, run: Callable[[Point], Record],
    outcome: Outcome,
) -> list[Choice]:  # fmt: skip
    """The best learning rate for each optimizer, the best optimizer first; without a search as they are given."""
    found = []
    for optimizer in contestant.optimizers(config):
        rates = contestant.rates(config, optimizer)
        if not config.search or len(rates) == 1:
            found.append(Choice(optimizer, rates[0], math.nan))
            continue
        tried: dict[float, Record] = {}
        further = sorted(rates)
        for _ in range(1 + config.extend):
            for lr in further:
                # With the whole schedule, and always with the first seed
                settings = {"optimizer": optimizer, "lr": lr, "seed": config.seeds[0], **config.search_limit}
                tried[lr] = run(_point(contestant, data, config, settings, "search", 1))
                outcome.searches.append(tried[lr])
            error, scores = validation_scores(tried)
            if all(record.get("died") for record in tried.values()):
                break  # no learning rate helps a model that does not run
            further = [lr for lr in (beyond(scores),) if lr is not None]
        best = min(scores, key=lambda lr: (scores[lr], lr))
        found.append(Choice(optimizer, best, scores[best], bool(further), error))
    found.sort(key=lambda choice: choice.score if math.isfinite(choice.score) else math.inf)
    outcome.choices[contestant.name] = found
    return found


def beyond(scores: Mapping[float, float]) -> float | None:
    """The next learning rate where the best lies at an end of those tried; None where it lies between two."""
    best = min(scores, key=lambda lr: (scores[lr], lr))
    if not math.isfinite(scores[best]):
        return float(f"{min(scores) / 3:.1g}")  # everything failed: smaller
    if best == max(scores):
        return float(f"{best * 3.16:.1g}")
    return float(f"{best / 3.16:.1g}") if best == min(scores) else None


def describe(choice: Choice) -> str:
    """A choice in words."""
    edge = ", at the edge of what was tried" if choice.edge else ""
    q = quantity(choice.error)
    score = f"{q.plural} {q.text(choice.score)} {q.unit}".rstrip()
    return f"{choice.optimizer}: learning rate {choice.lr:g}, validation {score}{edge}"


def _point(
    contestant: Contestant, data: Mapping[str, Any], config: CompareConfig, settings: Mapping[str, Any],
    purpose: str, points: int,
) -> Point:  # fmt: skip
    training = {"batch_size": config.batch_size, **config.training, **contestant.training, **settings}
    return Point(
        contestant.name, contestant.title, contestant.model, dict(contestant.arguments), dict(data), training,
        config.cutoff, purpose, points,
    )  # fmt: skip
