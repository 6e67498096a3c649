"""Predictions of a potential over many frames, and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.potential import Potential
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.metrics import ErrorMeter


@dataclass(frozen=True)
class Evaluation:
    """Predictions in the order of the frames, float64, and their errors (see :class:`ErrorMeter` for units).

    ``energy`` [num_frames] eV, ``forces`` one [num_atoms, 3] eV/angstrom per frame, ``stress``
    [num_frames, 3, 3] eV/angstrom^3 or None.
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
    """Energies and forces of every frame; the stress where all frames carry a stress to compare with.

    Labels are optional: what has none is predicted and left out of the errors. Without ``compute_forces`` the
    list of forces is empty.
    """
    loader = FrameLoader(_uniform(frames), batch_size, device=device)
    meter, energy, forces, stress = ErrorMeter(device), [], [], []
    for batch in loader:
        result = potential(batch, compute_forces=compute_forces, compute_stress="stress" in batch)
        meter.update(result, batch)
        energy.append(result["energy"].cpu())
        per_frame = torch.bincount(batch.batch, minlength=batch.num_graphs).tolist()
        if compute_forces:
            forces.extend(result["forces"].double().cpu().split(per_frame))
        if "stress" in result:
            stress.append(result["stress"].double().cpu())
    return Evaluation(meter.compute(), torch.cat(energy), forces, torch.cat(stress) if stress else None)


def _uniform(frames: Sequence[Data]) -> Sequence[Data]:
    """Frames with the same keys: labels and extras that only some frames have are left out."""
    keys = set.intersection(*(set(frame.keys()) for frame in frames)) if frames else set()
    if all(set(frame.keys()) == keys for frame in frames):
        return frames
    return [type(frame).from_dict({k: v for k, v in frame.to_dict().items() if k in keys}) for frame in frames]
