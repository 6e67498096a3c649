"""Predictions of a potential over many frames, and their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.geometry import has_volume
from nbody_pyg.network import model_frames
from nbody_pyg.potential import Potential
from nbody_pyg.training.labels import has_stress, label_shapes, uniform
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.metrics import ErrorMeter


@dataclass(frozen=True)
class Evaluation:
    """Predictions in the order of the frames, float64, and their errors (see :class:`ErrorMeter` for units).

    ``energy`` [num_frames] eV, ``forces`` one [num_atoms, 3] eV/angstrom per frame, ``stress``
    [num_frames, 3, 3] eV/angstrom^3 (NaN where a system has no volume) or None.
    """

    errors: dict[str, float]
    energy: Tensor
    forces: list[Tensor]
    stress: Tensor | None


def evaluate(
    potential: Potential,
    frames: Sequence[Data],
    batch_size: int = 20,
    device: torch.device | str = "cpu",
    compute_forces: bool = True,
) -> Evaluation:
    """Energies and forces of every frame; the stress if any frame has one to compare with.

    Labels are optional: frames without a label, or with NaN, are predicted and left out of the errors. Without
    ``compute_forces``
    the list of forces is empty. Periodic and open frames may be mixed.

    Raises: ValueError: a charge or spin that the model cannot use; the message names the frame.
    """
    frames = model_frames(potential.model, frames, getattr(frames, "name", "") or "frames")
    meter, energy, forces, stress = ErrorMeter(device), [], [], []
    for batch in FrameLoader(uniform(frames, label_shapes(potential)), batch_size, device=device, rank=0, world=1):
        strained = has_stress(batch)
        result = potential(batch, compute_forces=compute_forces, compute_stress=strained)
        meter.update(result, batch)
        energy.append(result["energy"].cpu())
        per_frame = torch.bincount(batch.batch, minlength=batch.num_graphs).tolist()
        if compute_forces:
            forces.extend(result["forces"].double().cpu().split(per_frame))
        if "stress" in batch:
            found = result["stress"].double().cpu() if strained else torch.zeros(batch.num_graphs, 3, 3).double()
            stress.append(found)
    if stress:
        solid = torch.tensor([_has_volume(frame) for frame in frames])
        stress = [torch.cat(stress).masked_fill(~solid.reshape(-1, 1, 1), math.nan)]
    return Evaluation(meter.compute(), torch.cat(energy), forces, torch.cat(stress) if stress else None)


def _has_volume(frame: Data) -> bool:
    """Whether a stress is defined: a periodic system whose cell has a volume, unlike some slabs and wires."""
    cell, pbc = frame.get("cell"), frame.get("pbc")
    if cell is None or (pbc is not None and not bool(pbc.any())):
        return False
    return has_volume(cell)
