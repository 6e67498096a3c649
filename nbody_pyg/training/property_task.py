"""PropertyTask: a PropertyModel, its loss and its errors in the trainer of potentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.network import model_frames
from nbody_pyg.properties import Property, PropertyModel
from nbody_pyg.training.labels import aligned, label_shapes, uniform
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.loss import penalized
from nbody_pyg.training.metrics import Meter, RunningMeans
from nbody_pyg.training.task import PotentialTask


class PropertyMeter:
    r"""Errors of properties in their own units, summed over batches and processes in float64.

    ================  ============================================================================
    key               meaning
    ================  ============================================================================
    ``NAME_mae``      mean absolute error over graphs and components
    ``NAME_rmse``     root mean square error over components
    ``NAME_r2``       :math:`1 - \sum (y - y^*)^2 / \sum (y^* - \bar y^*)^2`, mean of each component
    ================  ============================================================================
    """

    def __init__(self, properties: Sequence[Property], device: torch.device | str = "cpu") -> None:
        self.properties = tuple(properties)
        # Per property and component: count, |error|, error^2, label, label^2
        sizes = [max(torch.Size(p.shape).numel(), 1) for p in self.properties]
        self.sums = [torch.zeros(5, size, dtype=torch.float64, device=device) for size in sizes]

    @torch.no_grad()
    def update(self, result: dict[str, Tensor], batch: Data | dict[str, Tensor]) -> None:
        """Add a batch: values of the model, and the labels of the same graphs."""
        for p, sums in zip(self.properties, self.sums, strict=True):
            if p.name not in batch:
                continue
            label = aligned(batch[p.name], result[p.name], p.name).double().reshape(len(result[p.name]), -1)
            error = result[p.name].reshape(label.shape) - label
            known = ~label.isnan().any(dim=1)
            label, error = label[known], error[known]
            ones = torch.ones_like(label)
            sums += torch.stack([x.sum(0) for x in (ones, error.abs(), error.square(), label, label.square())])

    def reduce(self) -> None:
        """Sum over the processes of torch.distributed, where it runs."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for sums in self.sums:
                dist.all_reduce(sums)

    def compute(self) -> dict[str, float]:
        out = {}
        for p, (count, absolute, square, label, label2) in zip(self.properties, self.sums, strict=True):
            if not float(count.sum()):
                continue
            total = float(count.sum())
            out[f"{p.name}_mae"] = float(absolute.sum()) / total
            out[f"{p.name}_rmse"] = (float(square.sum()) / total) ** 0.5
            spread = float((label2 - label.square() / count).sum())
            out[f"{p.name}_r2"] = 1.0 - float(square.sum()) / spread if spread > 0 else float("nan")
        return out


class _PropertyMeans(RunningMeans):
    """Means since the last row of the log, under the name of the first property and in its unit."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def take(self) -> dict[str, float]:
        error = {f"{self.name}_mae": float(self.energy) / self.energies_seen} if self.energies_seen else {}
        kept = super().take()
        return {"loss": kept["loss"], "grad_norm": kept["grad_norm"], **error}


class PropertyTask(PotentialTask):
    r"""Trains a :class:`~nbody_pyg.properties.PropertyModel`: everything else is as for potentials.

    .. math:: L = \sum_p w_p \Big\langle d\Big(\frac{y_p - y_p^*}{s_p}\Big) \Big\rangle

    Args:
        potential: the model; or the dictionary that a checkpoint holds in its place.
        settings: a TrainingConfig; of its weights only ``penalty`` is used.
        force_variance: not used; a checkpoint passes it.
        finetune: as for :class:`~nbody_pyg.training.PotentialTask`.
    """

    potential: PropertyModel

    def __init__(self, potential: Any, settings: Any, force_variance: float = 1.0, finetune: Any = None):
        super().__init__(potential, settings, force_variance, finetune)
        first = self.potential.properties[0]
        self.monitor = f"{first.name}_mae"
        self.shown = tuple((p.name, f"{p.name}_mae", p.unit) for p in self.potential.properties)
        self.running = _PropertyMeans(first.name)

    def training_step(self, batch: Any) -> Tensor:
        values = self.potential(batch)
        loss = torch.zeros(())
        first: Tensor | None = None
        for p in self.potential.properties:
            # The difference is taken in float64, and only then cast. A missing label is NaN.
            label = aligned(batch[p.name], values[p.name], p.name)
            known = ~label.reshape(len(label), -1).isnan().any(dim=1)
            error = (values[p.name] - label)[known].to(self.potential.dtype) / self.potential.statistics[p.name].scale
            share = self.shares.get(p.name, 1.0)
            factor = len(error) / (len(label) * share) if share < 1.0 else 1.0
            loss = loss + p.weight * factor * penalized(error, self.settings.penalty, 1.0)
            first = error if first is None else first
        scale = self.potential.statistics[self.potential.properties[0].name].scale
        self.running.add(loss, None if first is None else first * scale, None)
        return loss

    def meter(self, device: torch.device | str = "cpu") -> PropertyMeter:
        return PropertyMeter(self.potential.properties, device)

    def validation_step(self, batch: Any, meter: Meter) -> None:
        with torch.no_grad():
            meter.update(self.potential(batch), batch)


@dataclass(frozen=True)
class PropertyEvaluation:
    """Predictions in the order of the frames, float64, by property; and their errors (:class:`PropertyMeter`)."""

    errors: dict[str, float]
    values: dict[str, Tensor]


def evaluate_properties(
    model: PropertyModel, frames: Sequence[Data], batch_size: int = 100, device: torch.device | str = "cpu"
) -> PropertyEvaluation:
    """The properties of every frame; frames without a label are predicted and left out of the errors."""
    frames = model_frames(model.model, frames, getattr(frames, "name", "") or "frames")
    meter, found = PropertyMeter(model.properties, device), []
    with torch.no_grad():
        for batch in FrameLoader(uniform(frames, label_shapes(model)), batch_size, device=device, rank=0, world=1):
            found.append(model(batch))
            meter.update(found[-1], batch)
    return PropertyEvaluation(
        meter.compute(), {p.name: torch.cat([x[p.name].cpu() for x in found]) for p in model.properties}
    )
