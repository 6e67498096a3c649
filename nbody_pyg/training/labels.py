"""Labels of the frames of a run: shapes, missing labels, which labels are learned, and the scale of the forces."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import VOIGT, implied_pbc, is_topology_key
from nbody_pyg.datasets.audit import outliers, require_labels
from nbody_pyg.datasets.frames import LABEL_SHAPES, Frames, has_label, listed, shaped_label
from nbody_pyg.geometry import complete_cell, has_volume
from nbody_pyg.network import MODEL_INPUTS
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.settings import TrainingConfig

logger = logging.getLogger(__name__)

#: Root mean square below which forces count as zero (those of ideal crystals, up to rounding), eV/angstrom.
NO_FORCES = 1e-6

Shape = Sequence[int | str]
#: Labels that a potential learns, and the setting with the weight of each.
WEIGHTS = {"forces": "force_weight", "energy": "energy_weight", "stress": "stress_weight"}
# Inputs of models. All other keys are labels or extras, and change no prediction.
_INPUTS = frozenset({"z", "pos", "bonds", "scheme", *MODEL_INPUTS})


def label_shapes(model: Potential | PropertyModel) -> dict[str, Shape]:
    """The labels that a model learns, with the shape of one system of N atoms."""
    if isinstance(model, PropertyModel):
        return {p.name: (1, *p.shape) for p in model.properties}
    return {label: LABEL_SHAPES[label] for label in WEIGHTS}


def aligned(label: Tensor, like: Tensor, name: str) -> Tensor:
    """The labels of a batch in the shape of the predictions, so that a difference is not broadcast.

    Raises: ValueError: the number of values differs.
    """
    if label.shape == like.shape:
        return label
    rows = like.shape[0]
    if like.shape[1:] == (3, 3) and label.numel() == 6 * rows and label.shape[-1] == 6:
        return label.reshape(rows, 6)[:, VOIGT].reshape(like.shape)
    squeezed = [tuple(size for size in x.shape if size != 1) for x in (label, like)]
    stacked = like.shape[1:] == (3, 3) and tuple(label.shape) in ((3 * rows, 3), (rows, 9))
    if label.numel() == like.numel() and (squeezed[0] == squeezed[1] or label.dim() == 1 or stacked):
        return label.reshape(like.shape)
    raise ValueError(
        f"{name} of a batch must have shape {list(like.shape)}, got {list(label.shape)}; give each frame "
        f"{name} of shape {list(LABEL_SHAPES.get(name, (1, *like.shape[1:])))}"
    )


def has_stress(batch: Data) -> bool:
    """Whether a batch has labels of the stress and a periodic system: open ones alone have no cell to strain."""
    if "stress" not in batch:
        return False
    periodic = batch.get("cell") if batch.get("pbc") is None else batch.pbc
    return periodic is not None and bool(periodic.any())


def uniform(frames: Sequence[Data], labels: Mapping[str, Shape], like: Data | None = None) -> Sequence[Data]:
    """Frames with the same keys, as mini-batches need them; the given frames if they have them already.

    A label that only some of the frames have is NaN in the others. Labels that no frame has and other keys that the
    model does not use are left out. Open systems among periodic ones get a cell without periodic directions.

    Args:
        frames: graphs with and without labels, cells and hierarchies.
        labels: labels that may be missing, with their shapes.
        like: a frame whose keys the result has, where these frames are a part of all; by default those found here.

    Raises: ValueError: a label of another shape, or a hierarchy that only some of the frames have.
    """
    if len(frames) == 0:
        return frames
    keys = [frozenset(frame.keys()) for frame in frames]
    if like is None:
        found = [label for label in labels if any(has_label(frame, label) for frame in frames)]
        wanted = frozenset.intersection(*keys) - set(labels) | set(found)
    else:
        wanted = frozenset(like.keys())
        found = [label for label in labels if label in wanted]
    flat = [_is_flat(frame, found) for frame in frames]
    alike = all(own == wanted for own in keys) and not any(flat)
    if alike and all(
        _label(frame, label, labels[label], f"frame {number}") is frame[label]
        for number, frame in enumerate(frames)
        for label in found
    ):
        return frames
    inputs = _inputs_of_some(frames, keys, wanted) if like is None else wanted - set(labels)
    out = []
    for number, frame in enumerate(frames):
        new = copy.copy(frame)
        for key in list(new.keys()):
            if key not in wanted and key not in inputs:
                del new[key]
        for label in found:
            new[label] = _label(frame, label, labels[label], f"frame {number}")
        for key in sorted(inputs - keys[number]):
            new[key] = _filler(frame, key, number)
        if flat[number]:
            new.cell = complete_cell(frame.cell.reshape(1, 3, 3), frame.pbc.reshape(1, 3)).to(frame.cell)
        out.append(new)
    return frames.replaced(out) if isinstance(frames, Frames) else out


def _inputs_of_some(frames: Sequence[Data], keys: Sequence[frozenset[str]], wanted: frozenset[str]) -> frozenset[str]:
    """Inputs of a model that only some of the frames have."""
    inputs = frozenset(key for key in frozenset.union(*keys) - wanted if key in _INPUTS or is_topology_key(key))
    if any("cell" in own and "pbc" not in own for own in keys) or any(
        frame.get("pbc") is not None and bool(torch.as_tensor(frame.pbc).any()) for frame in frames
    ):
        return inputs
    return frozenset(key for key in inputs if key not in ("cell", "pbc") and "_shift_" not in key)  # of open systems


def _is_flat(frame: Data, found: Sequence[str]) -> bool:
    """A slab or wire without a stress whose cell has no volume, among frames with a stress."""
    if "stress" not in found or has_label(frame, "stress") or frame.get("cell") is None or frame.get("pbc") is None:
        return False
    return not has_volume(frame.cell)


def _label(frame: Data, label: str, shape: Shape, where: str) -> Tensor:
    value = frame.get(label)
    if value is None:
        size = [len(frame.z) if n == "N" else int(n) for n in shape]
        return torch.full(size, math.nan, dtype=torch.float64, device=frame.pos.device)
    return shaped_label(value, label, len(frame.z), where, shape).to(frame.pos.device)


def _filler(frame: Data, key: str, number: int) -> Tensor:
    """Default of an input that a frame does not have."""
    if key == "cell":
        return torch.eye(3, dtype=torch.float64, device=frame.pos.device).reshape(1, 3, 3)
    if key == "pbc":
        own = frame.get("cell")
        own = torch.zeros(1, 3, 3, device=frame.pos.device) if own is None else own
        return implied_pbc(own.reshape(1, 3, 3))
    if key == "charge":
        return torch.zeros(1, dtype=torch.float64, device=frame.pos.device)
    if "_shift_" in key and (index := frame.get(key.replace("_shift", ""))) is not None:
        return torch.zeros(index.shape[1], 3, dtype=frame.pos.dtype, device=frame.pos.device)
    raise ValueError(f"frame {number} lacks {key!r}, which other frames have; give it to all frames or to none")


@dataclass(frozen=True)
class Targets:
    """Frames that a trainer can batch; ``shares`` is the fraction of the training frames that have each label.

    (For forces it is the fraction of their atoms.)
    """

    train: Sequence[Data]
    val: Sequence[Data]
    shares: dict[str, float]


def learned_labels(model: Potential | PropertyModel, settings: TrainingConfig) -> list[str]:
    """Names of the labels that a run learns: those with a positive weight."""
    if isinstance(model, PropertyModel):
        return [p.name for p in model.properties]
    return [label for label, weight in WEIGHTS.items() if getattr(settings, weight) > 0]


def targets(
    model: Potential | PropertyModel, train: Sequence[Data], val: Sequence[Data], settings: TrainingConfig
) -> Targets:
    """Frames that a trainer can batch, with their labels.

    Raises: ValueError: a label with a positive weight that no training frame has, one of another shape, or infinite.
    """
    shapes, learned = label_shapes(model), learned_labels(model, settings)
    for label in learned:
        try:
            require_labels({"train": train}, [label], partial=True)
        except ValueError as error:
            cure = f", or set {WEIGHTS[label]} to 0 to train without it" if label in WEIGHTS else ""
            raise ValueError(f"{error}{cure}") from None
    bare = [i for i, frame in enumerate(train) if not any(has_label(frame, label) for label in learned)]
    if bare:
        logger.warning(
            "train: %s (%d of %d) hold none of %s; the loss leaves them out",
            listed(train, bare), len(bare), len(train), ", ".join(learned),
        )  # fmt: skip
    train, val = uniform(train, shapes), uniform(val, shapes)
    return Targets(train, val, {label: _share(train, label) for label in learned})


def deciding_metric(model: Potential | PropertyModel, val: Sequence[Data], settings: TrainingConfig) -> str | None:
    """The metric by which the best weights are chosen, from the labels of the validation frames, or None.

    A log message reports if it is not the usual one, or if there is none. Without validation frames it is the usual
    one.
    """
    learned = learned_labels(model, settings)
    known = [label for label in learned if not len(val) or any(has_label(frame, label) for frame in val)]
    if not known:
        logger.warning("validation frames have no label that is learned: no best weights, the last ones are kept")
    elif known[0] != learned[0]:
        logger.warning("validation frames have no %s: the best weights are chosen by %s", learned[0], known[0])
    return f"{known[0]}_mae" if known else None


def _share(frames: Sequence[Data], label: str) -> float:
    """Fraction of the rows of a label that are known."""
    known = total = 0
    for place, frame in enumerate(frames):
        values = frame[label].reshape(len(frame[label]), -1)
        if bool(values.isinf().any()):
            raise ValueError(f"{label} must be finite, but {listed(frames, [place])} holds infinite values; remove it")
        rows = ~values.isnan().any(dim=1)
        known, total = known + int(rows.sum()), total + len(rows)
    return known / total


def force_variance(frames: Sequence[Data]) -> float:
    """Mean square of all known force components, (eV/angstrom)^2; 1 where the frames have no forces.

    Outliers are ignored: frames with a force above 50 eV/angstrom and 50 times the usual size.

    Raises: ValueError: infinite forces.
    Warns: UserWarning: names the frames that are ignored.
    """
    known = {
        i: frame.forces.detach().double().flatten() for i, frame in enumerate(frames) if has_label(frame, "forces")
    }
    if not known:
        return 1.0
    if any(bool(values.isinf().any()) for values in known.values()):
        raise ValueError("forces must be finite, but training frames hold infinite values; remove those frames")
    odd = outliers(frames, "forces")
    if odd:
        warnings.warn(
            f"the scale of the forces is taken without {listed(frames, odd)}, where they are far beyond those of all "
            "others; they are trained on unless you remove them",
            stacklevel=1,
        )
    values = torch.cat([values for i, values in known.items() if i not in set(odd)])
    return float(values[~values.isnan()].square().mean())
