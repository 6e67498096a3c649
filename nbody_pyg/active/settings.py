"""Settings of active learning; a light module, because the command line reads them before torch is loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

#: One of so many labelled structures is for validation.
VALIDATION = 5
#: Labels before the first round: with random weights, and where the members start from a trained model.
FIRST, FIRST_TRAINED = 30, 15
#: Value of ``init`` that leaves the choice to the loop.
AUTO = "auto"


def _setting(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LearnConfig:
    """Settings of active learning; times in seconds, lengths in angstrom, energies in eV, temperatures in K."""

    label: str = _setting("gfn2", "gfn2, gfn1, emt, or module:name or file.py:name of an ASE calculator")
    temperature: float = _setting(500.0, "of the dynamics, K")
    first: int | None = _setting(None, "labels before the first round; none: 15 with a trained model, else 30")
    per_round: int = _setting(20, "largest number of new labels per round")
    rounds: int = _setting(20, "largest number of rounds")
    minutes: float = _setting(15.0, "wall-clock time after which no further round begins")
    limit: float | None = _setting(None, "uncertainty of a force that asks for a label, eV/A; none: 15 % of their rms")
    members: int = _setting(2, "networks of the committee")
    train_seconds: float = _setting(45.0, "CPU seconds of training of each member and round")
    final_seconds: float = _setting(120.0, "CPU seconds of training of each member at the end")
    walkers: int = _setting(4, "runs of dynamics per round")
    steps: int = _setting(2000, "steps of each run")
    timestep: float = _setting(0.5, "fs")
    rattle: float = _setting(0.04, "mean standard deviation of the first displacements, angstrom")
    processes: int = _setting(2, "processes; 0: none but this one")
    seed: int = _setting(0, "of everything that is random")
    init: str = _setting(
        AUTO,
        "model file or shipped model that the members start from; none: random weights; auto: a shipped model that "
        "knows the atoms, if there is one",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("label", "init", "seed", "processes"):
                continue
            if value is None and field.name in ("limit", "first"):
                continue
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} must be positive, got {value!r}")
        for name, least in (("members", 2), ("first", 2 * VALIDATION), ("processes", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
