"""Errors of a comparison: how they are computed, and the name and unit that reports give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch_geometric.data import Data

from nbody_pyg.datasets.qm9 import TARGETS
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.property_task import evaluate_properties

#: Errors of potentials.
OF_POTENTIALS = ("energy_mae", "forces_mae")


@dataclass(frozen=True)
class Quantity:
    """What an error is the error of.

    Records have the units of training. Reports have the usual ones: a property in eV is in meV, as energies are.

    Args:
        key: of the error in the records.
        word: its name in a sentence.
        head: its name in the head of a table.
        plural: its name after a learning rate that was chosen by it.
        unit: of reports.
        factor: from the unit of the records into that of reports.
        digits: after the point, in tables.
    """

    key: str
    word: str
    head: str
    plural: str
    unit: str
    factor: float = 1.0
    digits: int = 2

    def text(self, value: float, fewer: int = 1) -> str:
        """A value of the records in the unit of reports."""
        return f"{self.factor * value:.{self.digits - fewer}f}"


def quantity(key: str) -> Quantity:
    """The quantity of an error.

    >>> quantity("homo_mae").unit, quantity("homo_mae").text(0.0123, fewer=0)
    ('meV', '12.30')
    """
    if key == "forces_mae":
        return Quantity(key, "force", "F", "forces", "meV/A")
    if key == "energy_mae":
        return Quantity(key, "energy", "E", "energies", "meV")
    name = key.removesuffix("_mae")
    unit = "e*angstrom" if name == "dipole" else TARGETS[name].unit if name in TARGETS else ""
    if unit == "eV":
        return Quantity(key, name, name, name, "meV", 1000.0)
    return Quantity(key, name, name, name, unit, digits=4)


def listed(errors: Mapping[str, float], fewer: int = 1) -> str:
    """The mean absolute errors in one line, without those of single elements and per atom.

    >>> listed({"energy_mae": 1.0, "energy_rmse": 2.0, "forces_mae": 3.0})
    'E 1.0 meV F 3.0 meV/A'
    """
    keys = [key for key in OF_POTENTIALS if key in errors]
    if not keys:
        keys = [key for key in errors if key.endswith("_mae")]
    found = [(quantity(key), errors[key]) for key in keys]
    return " ".join(f"{q.head} {q.text(value, fewer)} {q.unit}".rstrip() for q, value in found)


def errors_on(model: Potential | PropertyModel, frames: Sequence[Data], device: torch.device | str) -> dict[str, float]:
    """Errors of a model on frames, in the units of training."""
    if isinstance(model, PropertyModel):
        return evaluate_properties(model, frames, device=device).errors
    return evaluate(model, frames, device=device, compute_forces="forces" in frames[0]).errors
