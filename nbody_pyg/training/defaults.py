"""Settings chosen from the training frames if the user gives none: one rule for molecules and solids."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import chemical_symbols
from torch_geometric.data import Data

from nbody_pyg.data import elements_of, has_hierarchy
from nbody_pyg.datasets.frames import has_label
from nbody_pyg.datasets.reference import is_isolated_atom
from nbody_pyg.geometry import edge_vectors, neighbour_list
from nbody_pyg.hierarchy import Scheme
from nbody_pyg.messages import symbols
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.training.config import LIMIT_KEYS, LIMITS, Config, insert, parse_config
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.finetune import start_for
from nbody_pyg.training.prepare import DataSets
from nbody_pyg.training.settings import NO_INIT

#: Radii of the shells: multiples of the distance between first neighbours, and minimum radii, angstrom.
RADII = ((1.9, 3.5), (2.5, 5.0))
#: Of the windows.
EXPONENT = 3
#: Degree and channels if first neighbours are farther apart than bonds of organic molecules.
DENSE = {"lmax": 3, "channels": 16}
#: Latent charges of molecules with a charge that are wider than twice the larger radius.
CHARGES = {"method": "direct", "states": True, "transfers": False}
#: Directed edges of a step, in both shells together; and the largest number of frames of a step.
EDGES_PER_STEP, MOST_FRAMES = 10_000, 5
#: Weights for energies and stresses per atom, angstrom^-2.
PER_ATOM_WEIGHT, STRESS_WEIGHT = 5.0, 0.1
#: Learning rates of runs that start from a trained model: of all weights, and of readouts and adapters alone.
TUNED_LR, FEW_WEIGHTS_LR = 4e-3, 1e-2
#: Passes of such a run over its frames, for each atom of a frame: after more, the weights fit the frames too closely.
#: They were found with this number of frames; where there are more, these may be passed more often in proportion.
EPOCHS_PER_ATOM, EPOCHS_FRAMES = 10, 50
#: Largest number of training frames with which a run starts from a shipped model, and frames to compare these on.
FEW_FRAMES, COMPARED = 1000, 20
#: Largest number where the run trains latent charges, which no shipped model has.
FEW_CHARGED = 300
#: Number of frames that are measured, and largest distance of neighbours, angstrom.
_MEASURED, _REACH = 200, 6.0


@dataclass(frozen=True)
class Choice:
    """A chosen setting: its dotted key, value and reason."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key} {self.value}: {self.reason}"


@dataclass(frozen=True)
class FrameStatistics:
    """Statistics of training frames that the rule uses.

    ===================  ==========================================================================================
    field                meaning, unit
    ===================  ==========================================================================================
    ``sizes``            least and greatest number of atoms of a frame; isolated atoms, which only tell E0, do not count
    ``mean_size``        mean number of atoms of a frame, likewise
    ``periodic``         whether any frame repeats in any direction
    ``first_shell``      distance between first neighbours, angstrom: for each element the median over its atoms of
                         the distance to the nearest atom, and of these the greatest; 0 where no atom has a neighbour
    ``element``          the element with that distance
    ``labels``           which of energy, forces and stress some frame knows
    ``charged``          whether any frame has a total charge
    ``width``            twice the largest distance of an atom from the centre, median of the frames, angstrom; 0 if
                         any frame repeats
    ===================  ==========================================================================================
    """

    sizes: tuple[int, int]
    mean_size: float
    periodic: bool
    first_shell: float
    element: str
    labels: frozenset[str]
    charged: bool
    width: float

    @classmethod
    def of(cls, frames: Sequence[Data]) -> FrameStatistics:
        """Statistics of frames; distances are measured on at most 200 of them, evenly spaced."""
        nearest: dict[int, list[torch.Tensor]] = {}
        for frame in _some(frames):
            shortest, z = _nearest(frame), frame.z
            for number in z.unique().tolist():
                nearest.setdefault(number, []).append(shortest[z == number])
        known = {number: torch.cat(values) for number, values in nearest.items()}
        medians = {number: float(values[values.isfinite()].median()) for number, values in known.items()
                   if bool(values.isfinite().any())}  # fmt: skip
        number = max(medians, key=lambda n: (medians[n], n), default=0)
        counts = [len(frame.z) for frame in frames if not is_isolated_atom(frame)] or [1]
        labels = (name for name in ("energy", "forces", "stress") if any(has_label(f, name) for f in frames))
        periodic = any(_is_periodic(frame) for frame in frames)
        widths = [float(2.0 * (f.pos - f.pos.mean(0)).norm(dim=1).max()) for f in _some(frames)]
        return cls(
            (min(counts), max(counts)), sum(counts) / len(counts), periodic,
            medians.get(number, 0.0), chemical_symbols[number], frozenset(labels),
            any(_charge(frame) for frame in frames), 0.0 if periodic else statistics.median(widths),
        )  # fmt: skip

    @property
    def one_molecule_size(self) -> bool:
        """Whether all frames are open systems with the same number of atoms."""
        return not self.periodic and self.sizes[0] == self.sizes[1]


def choose_defaults(config: Config, data: DataSets) -> tuple[Config, tuple[Choice, ...]]:
    r"""The configuration with settings that the user did not give chosen from the training frames, and the reasons.

    With the distance d between first neighbours (:class:`FrameStatistics`) the shells of ``NestedShells`` reach to

    .. math:: R_1 = \max(1.9\, d,\; 3.5), \qquad R_2 = \max(2.5\, d,\; 5)

    so that the window is not small at first neighbours. Organic molecules and water have d below 1.8 angstrom and keep
    3.5 and 5.
    For larger d, as in metals and semiconductors, the network gets degree 3 with 16 channels, because atoms have many
    neighbours, whose angles matter. Molecules with a charge that are wider than 2 R_2 get latent charges, because no
    shell sees charges far away.
    Energy errors count per molecule if all frames are molecules of one size, otherwise per atom, because the energies
    of large cells would outweigh the forces. Stress is trained if frames have it. E0 is that of isolated atoms if every
    element has a frame of one atom without images nearer than 6 angstrom. A step has as many frames as have 10,000
    edges together, and at most five. A run that starts from a trained model has a smaller learning rate, no weight
    decay, the lengths of the errors in the loss in place of their squares, and, if all weights are trained, at most ten
    passes for each atom of a frame, in proportion more with more than 50 frames.

    Settings given by the user are not changed, nor is a configuration read from the ``config.yaml`` of a run.
    """
    found = FrameStatistics.of(data.train)
    choices = [*_reference(config, data), *_radii(config, found), *_degree(config, found)]
    choices += [*_charges(config, found), *_loss(config, found)]
    choices += _tuning(config)
    chosen = _with(config, choices)
    by_atoms = config.training.batch_atoms is not None
    batch = [] if "training.batch_size" in config.given or by_atoms else [_batch_size(chosen, data.train)]
    limits = _limits(config, found, len(data.train))
    return _with(chosen, [*batch, *limits]), (*choices, *batch, *limits)


def choose_init(config: Config, data: DataSets, models: Callable[[], Mapping[str, Potential]]) -> Choice | None:
    """The shipped model to start from if the user gives none: for few frames of molecules with forces.

    Of the models that know all elements it is the one whose forces, as they are where training starts, are nearest to
    those of the training frames (by the median frame). None if in half of them its errors are larger than the forces
    and than 300 meV/angstrom: then it does not know such structures.

    Args:
        models: gives the shipped models by their names; asked last, because it reads their files.
    """
    frames = data.train
    free = not any(key == "finetune.init" or key.startswith("model.") for key in config.given)
    ordinary = not (config.target or config.data.qm9 or data.stream is not None)
    if not (free and ordinary) or len(frames) > FEW_FRAMES:
        return None
    molecules = [frame for frame in frames if not is_isolated_atom(frame)]
    if not molecules or any(
        _is_periodic(f) or f.get("spin") is not None or not has_label(f, "forces") for f in molecules
    ):
        return None
    charged = len(frames) > FEW_CHARGED and any(_charge(frame) for frame in frames)
    if charged and _charges(config, FrameStatistics.of(frames)):  # distances are measured for charged frames only
        return None
    elements = elements_of(frames)
    compared = _some(molecules, COMPARED)
    starts = {
        name: start_for(model, molecules)
        for name, model in models().items()
        if set(elements) <= set(model.species or ())
    }
    found = {name: _force_errors(start, compared) for name, start in starts.items()}
    errors = {name: statistics.median(each) for name, each in found.items()}
    best = min(errors, key=lambda name: (errors[name], name), default=None)
    if best is None:
        return None
    if statistics.median(e / _mean_force(f) for e, f in zip(found[best], compared, strict=True)) >= 1.0:
        return None
    words = f"{len(frames)} frames of molecules of {symbols(elements)}; before training its forces are off by "
    words += f"{errors[best]:.0f} meV/angstrom"
    words += "".join(f", those of {name} by {error:.0f}" for name, error in errors.items() if name != best)
    return Choice("finetune.init", best, f"{words}; --init {NO_INIT} for random weights")


def _force_errors(model: Potential, frames: Sequence[Data]) -> list[float]:
    """Mean absolute error of the forces of each frame, meV/angstrom."""
    scheme = required(model.scheme)
    return [evaluate(model, [scheme(frame)]).errors["forces_mae"] for frame in frames]


def _mean_force(frame: Data) -> float:
    """Mean absolute value of the forces, meV/angstrom, at least 300: near minima every error is larger than that."""
    return max(1000.0 * float(frame.forces.abs().nanmean()), 300.0)


def _tuning(config: Config) -> list[Choice]:
    """Learning rate, weight decay and penalty of a run that starts from a trained model."""
    if config.finetune.init is None:
        return []
    few = _few_weights(config)
    lr, what = (FEW_WEIGHTS_LR, f"{config.finetune.parts} are") if few else (TUNED_LR, "weights of a trained model are")
    found = [Choice("training.lr", lr, f"{what} trained")]
    found.append(Choice("training.weight_decay", 0.0, "decay would pull away from the trained weights"))
    if not config.target:
        found.append(Choice("training.penalty", "norm", "forces of few frames are learned better than by squares"))
    return [choice for choice in found if choice.key not in config.given]


def keep_choices(config: Config, stored: Mapping[str, Any]) -> Config:
    """The configuration of a resumed run; settings that the user did not give are those of the stored nested form."""
    kept = []
    for key in (*CHOSEN, *(TUNED if config.finetune.init is not None else ())):
        section, _, name = key.rpartition(".")
        values: Any = stored
        for part in section.split("."):
            values = values.get(part) or {}
        if key not in config.given and name in values:
            kept.append(Choice(key, values[name], "as before"))
    if not config.given.isdisjoint(LIMIT_KEYS):
        passes = {"training.max_epochs"} if _passes_are_free(config) else set()
        kept = [choice for choice in kept if choice.key not in LIMIT_KEYS - passes]
    return _with(config, kept)


#: Keys that are chosen if the user does not give them.
CHOSEN = ("data.e0", "model.lmax", "model.channels", "model.long_range", "model.scheme.radii", "model.scheme.exponent",
          "training.energy_per", "training.energy_weight", "training.stress_weight", "training.batch_size",
          *sorted(LIMIT_KEYS))  # fmt: skip
#: Further ones of a run that starts from a trained model.
TUNED = ("training.lr", "training.weight_decay", "training.penalty")


def _with(config: Config, choices: Sequence[Choice]) -> Config:
    tree = config.to_dict()
    for choice in choices:
        insert(tree, choice.key, choice.value)
    return dataclasses.replace(parse_config(tree), given=config.given)


def _reference(config: Config, data: DataSets) -> list[Choice]:
    """Energies of isolated atoms, if every element has one, in any set."""
    if "data.e0" in config.given or config.target or config.data.qm9 is not None:
        return []
    frames = [frame for frames in data.named().values() for frame in frames]
    single = {int(f.z[0]) for f in frames if is_isolated_atom(f) and has_label(f, "energy") and not _charge(f)}
    if not single.issuperset(z for frame in data.train for z in frame.z.tolist()):
        return []
    return [Choice("data.e0", "isolated", f"frames hold single atoms of {symbols(sorted(single))}")]


def _charge(frame: Data) -> float:
    given = [frame.get(key) for key in ("charge", "charges")]
    return next((float(torch.as_tensor(values).sum()) for values in given if values is not None), 0.0)


def _radii(config: Config, found: FrameStatistics) -> list[Choice]:
    if config.model.scheme["name"] != "NestedShells":
        return []
    wanted = [round(max(factor * found.first_shell, least), 2) for factor, least in RADII]
    near = (
        f"first neighbours of {found.element} are {found.first_shell:.2f} angstrom apart" if found.first_shell else ""
    )
    if wanted == [least for _, least in RADII]:
        reason = f"enough for bonds of molecules; {near}" if near else "no atom has a neighbour"
    else:
        reason = f"{near}; " + " and ".join(f"{factor:g}" for factor, _ in RADII) + " times that"
    exponent = Choice("model.scheme.exponent", EXPONENT, "neighbours fade from the start")
    chosen = [Choice("model.scheme.radii", wanted, reason), exponent]
    return [choice for choice in chosen if choice.key not in config.given]


def _degree(config: Config, found: FrameStatistics) -> list[Choice]:
    """Angles between many neighbours need a higher degree, for which fewer channels pay."""
    keys = [f"model.{name}" for name in DENSE]
    factor, least = RADII[0]
    named = not config.given.isdisjoint([*keys, "model.irreps"])
    if factor * found.first_shell <= least or config.model.preset != "practical" or named:
        return []
    reason = "first neighbours are farther apart than bonds of organic molecules, so there are many; angles count"
    return [Choice(key, value, reason) for key, value in zip(keys, DENSE.values(), strict=True)]


def _charges(config: Config, found: FrameStatistics) -> list[Choice]:
    """Latent charges where some frame has a charge and frames are wide."""
    radii = config.model.scheme.get("radii") or [least for _, least in RADII]
    energies = not config.target and config.data.qm9 is None and config.model.preset == "practical"
    reach = 2.0 * max(radii)
    if not (energies and found.charged and found.width > reach) or config.training.compile:
        return []
    if "model.long_range" in config.given or config.model.arguments.get("long_range") is not None:
        return []
    reason = f"frames have a charge and are {found.width:.0f} angstrom wide, more than {reach:g}"
    return [Choice("model.long_range", dict(CHARGES), reason)]


def _loss(config: Config, found: FrameStatistics) -> list[Choice]:
    """Normalisation of energy errors, and the stress weight."""
    if config.target or config.data.qm9 is not None:
        return []
    training, given, choices = config.training, config.given, []
    per = training.energy_per
    if "training.energy_per" not in given:
        low, high = found.sizes
        if found.one_molecule_size:
            per, reason = "molecule", f"all frames are molecules of {low} atoms"
        else:
            what = "periodic cells" if found.periodic else "molecules"
            per, reason = "atom", f"{what} of {low} to {high} atoms; per molecule the largest would outweigh the forces"
        choices.append(Choice("training.energy_per", per, reason))
    if "training.energy_weight" not in given:
        weight = PER_ATOM_WEIGHT if per == "atom" else training.energy_weight
        choices.append(Choice("training.energy_weight", weight, "angstrom^-2"))
    if "training.stress_weight" not in given and "stress" in found.labels:
        choices.append(Choice("training.stress_weight", STRESS_WEIGHT, "frames have a stress; angstrom^-2"))
    return choices


def _batch_size(config: Config, frames: Sequence[Data]) -> Choice:
    """Number of frames with the edges of a step together, at most all frames."""
    scheme = Scheme.from_config(dict(config.model.scheme))
    edges = [_num_edges(scheme, frame) for frame in _some(frames)]
    mean = sum(edges) / len(edges)
    size = min(max(round(EDGES_PER_STEP / max(mean, 1.0)), 1), MOST_FRAMES)
    return Choice("training.batch_size", size, f"a frame has {mean:.0f} edges")


def _num_edges(scheme: Scheme, frame: Data) -> int:
    topology = scheme.read(frame if has_hierarchy(frame) else scheme(frame))
    return sum(index.shape[1] for index in (*topology.child_index, *topology.pair_index) if index is not None)


def _limits(config: Config, found: FrameStatistics, num_frames: int) -> list[Choice]:
    """The limits of a run without any, and passes over the frames where a trained model is tuned."""
    limits = LIMITS if config.given.isdisjoint(LIMIT_KEYS) else {}
    chosen = {key: Choice(f"training.{key}", value, "no limit of the run was given") for key, value in limits.items()}
    if _passes_are_free(config):
        most = LIMITS["max_epochs"]
        passes = min(math.ceil(EPOCHS_PER_ATOM * found.mean_size), most)
        reason = f"{EPOCHS_PER_ATOM} for each atom of a frame; after more, a trained model fits few frames too closely"
        if num_frames > EPOCHS_FRAMES:
            passes = math.ceil(passes * num_frames / EPOCHS_FRAMES)
            reason += f"; in proportion more with more than {EPOCHS_FRAMES} frames"
        if limits and passes > most:
            passes, reason = most, "no limit of the run was given"
        chosen["max_epochs"] = Choice("training.max_epochs", passes, reason)
    return list(chosen.values())


def _passes_are_free(config: Config) -> bool:
    """Whether the passes of a run that trains all weights of a trained model are not limited by the user."""
    given = config.given.intersection({"training.max_epochs", "training.max_steps"})
    return config.finetune.init is not None and not _few_weights(config) and not given


def _few_weights(config: Config) -> bool:
    """Whether a run that starts from a trained model trains a small part of its weights."""
    return config.finetune.parts in ("readouts", "adapters")


def _some(frames: Sequence[Data], most: int = _MEASURED) -> Sequence[Data]:
    """At most ``most`` of the frames, evenly spaced."""
    return [frames[i] for i in range(0, len(frames), -(-len(frames) // most))]


def _is_periodic(frame: Data) -> bool:
    pbc = frame.get("pbc")
    return bool(torch.as_tensor(pbc).any()) if pbc is not None else frame.get("cell") is not None


def _nearest(frame: Data) -> torch.Tensor:
    """Distance of each atom to the nearest one; infinite if there is none in reach."""
    cell, pbc = (frame.get("cell"), frame.get("pbc")) if _is_periodic(frame) else (None, None)
    index, shift = neighbour_list(frame.pos, _REACH, None, cell, pbc)
    length = edge_vectors(frame.pos, index, shift, cell).norm(dim=-1).double()
    nearest = torch.full((len(frame.z),), torch.inf, dtype=torch.float64)
    return nearest.scatter_reduce(0, index[1], length, "amin")
