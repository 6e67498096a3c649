"""Frames from any PyTorch Geometric data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import MD17, QM9

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import LABEL_SHAPES, Frames, check_frame, shaped_label
from nbody_pyg.messages import nearest
from nbody_pyg.units import Units

FORCES_KEYS = ("forces", "force")
_QM9_ENERGIES = (2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15)  # the columns of QM9.y that PyG gives in eV
_ROUNDING = 1e-4  # eV; above this the rounding of float32 labels is worth a word


def from_pyg(
    dataset: Iterable[Data],
    target: int | None = None,
    *,
    name: str = "energy",
    energy_key: str | None = None,
    forces_key: str | None = None,
    units: Units | str | Mapping[str, str] | None = None,
) -> Frames:
    """Frames of a PyG data set: `z`, `pos` and labels in float64 and our units; every other key is kept.

    ``MD17`` (kcal/mol) and ``QM9`` (eV) are known by their class; for any other data set the units must be
    given. PyG stores labels in float32: total energies are then rounded by up to 1 meV, of which a warning
    tells. Prefer :func:`load_rmd17`, :func:`load_md17` and :func:`load_qm9`, or the atomization energies
    12 to 15 of QM9.

    Args:
        dataset: the data set, or any iterable of `Data` with ``z`` and ``pos``.
        target: column of ``y`` that becomes the label ``name``.
        name: the label that ``target`` fills. Only labels with a unit (energy) are converted.
        energy_key: key of the energy where it is not ``energy``, such as ``"y"``.
        forces_key: key of the forces where it is neither ``forces`` nor ``force``.
        units: units of the data set.

    Raises:
        ValueError: empty data set, unknown units, missing key, target out of range, wrong shape, NaN.
    """
    factors = _units(dataset, target, name, units)
    title = type(dataset).__name__
    frames: list[AtomicData] = []
    available: set[str] = set()
    sources: dict[str, dict[str, None]] = {}
    rounding = 0.0
    for number, data in enumerate(dataset):
        where = f"graph {number} of {title}"
        available |= set(data.keys())
        frame, used, step = _frame(data, target, name, energy_key, forces_key, where)
        rounding = max(rounding, step * factors.energy_factor)
        for key in ("pos", "cell", "energy", "forces", "stress", "dipole"):
            if isinstance(frame.get(key), Tensor):
                frame[key] = frame[key].double() * factors.factor(key)
        check_frame(frame, where)
        frames.append(frame)
        for label, key in used.items():
            sources.setdefault(label, {})[key] = None
    if not frames:
        raise ValueError(f"dataset {title} holds no graph")
    if rounding > _ROUNDING:
        warnings.warn(
            f"{title} stores its energies in float32, rounded by up to {1e3 * rounding:.2f} meV. Read the "
            f"raw files in float64 (load_rmd17, load_md17, load_qm9), or train on atomization energies",
            stacklevel=2,
        )
    return Frames(frames, name=title, sources={k: tuple(v) for k, v in sources.items()}, available=available)


def _units(
    dataset: Iterable[Data], target: int | None, name: str, units: Units | str | Mapping[str, str] | None
) -> Units:
    if units is not None:
        return Units.parse(units)
    if isinstance(dataset, MD17):
        return Units("kcal/mol", "angstrom")
    if isinstance(dataset, QM9):
        if name == "energy" and target is not None and target not in _QM9_ENERGIES:
            raise ValueError(
                f"target {target} of QM9 is no energy (energies: {list(_QM9_ENERGIES)}); give it a name "
                f"of its own, such as name='alpha'"
            )
        return Units("eV", "angstrom")
    raise ValueError(f"units of {type(dataset).__name__} are not known; give units, for example units='kcal/mol'")


def _frame(
    data: Data, target: int | None, name: str, energy_key: str | None, forces_key: str | None, where: str
) -> tuple[AtomicData, dict[str, str], float]:
    """The frame before conversion, the keys used, and the spacing of its stored energy."""
    data = data.clone() if not isinstance(data, AtomicData) else data.clone().without_hierarchy()
    used: dict[str, str] = {}
    energy = _take(data, energy_key, ("energy",), "energy", where)
    forces = _take(data, forces_key, FORCES_KEYS, "forces", where)
    step = 0.0
    if target is not None:
        value = _column(data, target, where)
        if name == "energy":
            energy = (value, f"y[{target}]")
        else:
            data[name] = value.double().reshape(1)
            used[name] = f"y[{target}]"
    if energy is not None:
        stored = energy[0].reshape(-1)
        if stored.dtype == torch.float32:
            step = 0.5 * float(np.spacing(np.abs(stored.detach().cpu().numpy()).max(initial=0.0)))
        data.energy = stored
        used["energy"] = energy[1]
    if forces is not None:
        data.forces = forces[0]
        used["forces"] = forces[1]
    for label in LABEL_SHAPES:
        if isinstance(data.get(label), Tensor):
            data[label] = shaped_label(data[label], label, int(data.num_nodes or 0), where)
            used.setdefault(label, label)
    return AtomicData.from_data(data), used, step


def _take(data: Data, given: str | None, keys: tuple[str, ...], label: str, where: str) -> tuple[Tensor, str] | None:
    """Remove a label from the data under whichever key holds it."""
    if given is not None and given not in data:
        raise ValueError(f"{where}: {label}_key {given!r} is missing; {nearest(given, data.keys())}")
    key = given or next((k for k in keys if k in data), None)
    if key is None:
        return None
    value = data[key]
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.float64)
    del data[key]
    return value, key


def _column(data: Data, target: int, where: str) -> Tensor:
    y = data.get("y")
    if not isinstance(y, Tensor):
        raise ValueError(f"{where}: target {target} needs the key 'y'; {nearest('y', data.keys())}")
    flat = y.reshape(-1)
    if not 0 <= target < flat.numel():
        raise ValueError(f"{where}: target must lie in 0..{flat.numel() - 1} (columns of y), got {target}")
    return flat[target]
