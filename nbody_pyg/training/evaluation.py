"""Predictions of a potential over many frames, and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import is_topology_key
from nbody_pyg.potential import MODEL_INPUTS, Potential, model_frames
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.metrics import ErrorMeter

# What a potential computes with. All else is a label or an extra, and changes no prediction.
_INPUTS = frozenset({"z", "pos", "bonds", "scheme", *MODEL_INPUTS})


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
    list of forces is empty. Periodic and open frames may be mixed: they go through the potential apart.

    Raises: ValueError: a charge or spin that the model does not know, naming the frame.
    """
    frames = model_frames(potential.model, frames, getattr(frames, "name", "") or "frames")
    meter, energy, forces, stress, order = ErrorMeter(device), [], [], [], []
    for members, group in _groups(frames):
        order += members
        for batch in FrameLoader(group, batch_size, device=device, rank=0, world=1):
            result = potential(batch, compute_forces=compute_forces, compute_stress="stress" in batch)
            meter.update(result, batch)
            energy.append(result["energy"].cpu())
            per_frame = torch.bincount(batch.batch, minlength=batch.num_graphs).tolist()
            if compute_forces:
                forces.extend(result["forces"].double().cpu().split(per_frame))
            if "stress" in result:
                stress.append(result["stress"].double().cpu())
    back = torch.tensor(order).argsort()
    return Evaluation(
        meter.compute(),
        torch.cat(energy)[back],
        [forces[i] for i in back.tolist()] if forces else [],
        torch.cat(stress)[back] if stress else None,
    )


def _groups(frames: Sequence[Data]) -> list[tuple[list[int], Sequence[Data]]]:
    """Positions and frames of each set with the same inputs.

    Labels and extras that only some frames have are left out. Inputs are not: a bulk crystal without its
    cell and shifts would be another system.
    """
    keys = [frozenset(frame.keys()) for frame in frames]
    common = frozenset.intersection(*keys) if keys else frozenset()
    if all(found == common for found in keys):
        return [(list(range(len(keys))), frames)]
    members: dict[frozenset[str], list[int]] = {}
    for number, found in enumerate(keys):
        inputs = {key for key in found if key in _INPUTS or is_topology_key(key)}
        members.setdefault(common | inputs, []).append(number)
    return [(numbers, [_only(frames[i], kept) for i in numbers]) for kept, numbers in members.items()]


def _only(frame: Data, keys: frozenset[str]) -> Data:
    return type(frame).from_dict({key: value for key, value in frame.to_dict().items() if key in keys})
