"""Which frames and which kinds of frames have the errors of an evaluation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch_geometric.data import Data

from nbody_pyg.datasets.frames import has_label, kinds_of, numbers_of
from nbody_pyg.training.evaluation import Evaluation
from nbody_pyg.training.metrics import ErrorMeter

#: Rows and columns of the shear components yz, xz, xy.
_SHEAR = ((1, 0, 0), (2, 2, 1))
_SHEAR_NAMES = ("yz", "xz", "xy")
#: A frame counts as one of another order if that one divides its error by this factor.
_CLEARLY = 2.5


@dataclass(frozen=True)
class FrameError:
    """Errors of one frame; None for labels that it does not have.

    number: its number in the file. kind: its ``config_type``, or "". energy_per_atom: meV per atom, with sign.
    forces_rmse and forces_max: meV/angstrom, root mean square and largest absolute value of a component. atom: the one
    with the largest.
    """

    number: int
    kind: str
    energy_per_atom: float | None
    forces_rmse: float | None
    forces_max: float | None
    atom: int | None


def errors_by_kind(frames: Sequence[Data], found: Evaluation) -> dict[str, dict[str, float]]:
    """Errors (:class:`ErrorMeter`) of the frames of each ``config_type``; empty where all have the same."""
    kinds = kinds_of(frames)
    if len(set(kinds)) < 2:
        return {}
    meters = {kind: ErrorMeter() for kind in dict.fromkeys(kinds)}
    for place, (frame, kind) in enumerate(zip(frames, kinds, strict=True)):
        result = {"energy": found.energy[place : place + 1]}
        if found.forces:
            result["forces"] = found.forces[place]
        if found.stress is not None:
            result["stress"] = found.stress[place : place + 1]
        alone = copy.copy(frame)
        alone.batch = torch.zeros_like(frame.z)
        meters[kind].update(result, alone)
    return {kind: meter.compute() for kind, meter in meters.items()}


def frame_errors(frames: Sequence[Data], found: Evaluation) -> list[FrameError]:
    """Errors of every frame that has a label, the largest first: by forces, or by energies where none has forces."""
    kinds, numbers, out = kinds_of(frames), numbers_of(frames), []
    for place, frame in enumerate(frames):
        energy = rmse = most = atom = None
        if has_label(frame, "energy"):
            energy = 1000.0 * float(found.energy[place] - frame.energy.double().reshape(())) / len(frame.z)
        if found.forces and has_label(frame, "forces"):
            error = 1000.0 * (found.forces[place] - frame.forces.double()).abs().nan_to_num(0.0)
            known = ~frame.forces.isnan()
            rmse, most = float(error[known].square().mean().sqrt()), float(error.max())
            atom = int(error.max(dim=1).values.argmax())
        if energy is not None or rmse is not None:
            out.append(FrameError(numbers[place], kinds[place], energy, rmse, most, atom))
    forces = any(one.forces_rmse is not None for one in out)
    return sorted(out, key=lambda one: -abs((one.forces_rmse if forces else one.energy_per_atom) or 0.0))


def shear_order(frames: Sequence[Data], found: Evaluation) -> str | None:
    """A sentence if the shear components of many labelled stresses agree with the predictions in another order only.

    Codes list the six components of a stress in different orders (xx yy zz yz xz xy: Voigt, ASE; xx yy zz xy yz zx:
    VASP; xx yy zz xy xz yz: LAMMPS). A file made with the wrong one has a trace that is right, and wrong shears.
    """
    known = [i for i, frame in enumerate(frames) if has_label(frame, "stress")]
    if found.stress is None or not known:
        return None
    label = torch.cat([frames[i].stress.reshape(1, 3, 3) for i in known]).double()[:, *_SHEAR]
    other = found.stress[known][:, *_SHEAR]
    orders = list(itertools.permutations(range(3)))  # the first is the one as it stands
    errors = torch.stack([(label[:, order] - other).square().mean(1).sqrt() for order in orders], dim=1)
    better = (errors[:, 1:] * _CLEARLY < errors[:, :1]) & (errors[:, 1:] == errors[:, 1:].min(1, keepdim=True).values)
    counts = better.sum(0)
    best = int(counts.argmax())
    if int(counts[best]) < max(3, 0.2 * len(known)):
        return None
    at = better[:, best]
    before, after = (1000.0 * float(errors[at, k].square().mean().sqrt()) for k in (0, best + 1))
    names = ", ".join(_SHEAR_NAMES[k] for k in orders[best + 1])
    return (
        f"the shear stresses of {int(at.sum())} of {len(known)} frames fit the model if yz, xz, xy are taken to be "
        f"{names}: RMSE {after:.2f} in place of {before:.2f} meV/A^3; compare the order of the components in the file "
        "with that of the code that made them (Voigt: yz xz xy, VASP: xy yz zx), or train with stress_weight 0"
    )
