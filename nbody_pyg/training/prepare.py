"""From a configuration to frames and an initial potential: data, split, E0, scale, mean numbers of neighbours."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import elements_of
from nbody_pyg.datasets import (
    Split,
    fit_atomic_energies,
    load_embedded,
    load_qm9,
    load_qm9_dipoles,
    load_rmd17,
    qm9_atomref,
    qm9_split,
    read_frames,
    require_labels,
    split_indices,
)
from nbody_pyg.datasets.convert import require_finished
from nbody_pyg.datasets.frames import Frames, has_label
from nbody_pyg.datasets.keys import levels_apart
from nbody_pyg.datasets.qm9 import TARGETS, target_labels
from nbody_pyg.datasets.readers import find_files, join_frames
from nbody_pyg.datasets.reference import is_isolated_atom
from nbody_pyg.datasets.units import SAMPLE, UnitFiles, are_units, unit_files
from nbody_pyg.energy import AtomicReference
from nbody_pyg.hierarchy import Scheme, Topology, share_topology
from nbody_pyg.messages import check_choice
from nbody_pyg.network import check_states, frame_states, learn_state, without_ions
from nbody_pyg.nn.electronic import check_inputs
from nbody_pyg.nn.inner_cutoff import inner_cutoffs
from nbody_pyg.nn.repulsion import ZBLRepulsion, shortest_distances
from nbody_pyg.potential import Potential
from nbody_pyg.properties import Property, PropertyModel, Statistics, fit_statistics, property_irreps
from nbody_pyg.required import required
from nbody_pyg.system import DEFAULT_STATE, System
from nbody_pyg.training.config import Config, DataConfig, ModelConfig
from nbody_pyg.training.labels import NO_FORCES, force_variance, uniform
from nbody_pyg.training.stream import shortest_in_units

if typing.TYPE_CHECKING:
    from nbody_pyg.models import NBodyNet


#: Number of frames that are searched for differing bonds.
_LOOKED_AT = 200


@dataclass
class DataSets:
    """Frames for training, for validation (maybe none) and for any number of named tests.

    ``split`` has the rows of a random split of one set of frames; None if there was none.
    """

    train: Sequence[Data]
    val: Sequence[Data]
    tests: dict[str, Sequence[Data]] = field(default_factory=dict)
    split: Split | None = None
    #: Training frames that are not in memory; ``train`` is then a sample of them.
    stream: UnitFiles | None = None

    def named(self) -> dict[str, Sequence[Data]]:
        return {"train": self.train, **({"val": self.val} if len(self.val) else {}), **self.tests}

    def with_topology(self, scheme: Scheme, shared: bool = False) -> DataSets:
        """The same frames with their hierarchies stored, so that training does not search for them.

        Args:
            shared: every frame has the parts of the first training frame (see share_topology).
        """
        if shared:
            tree = Topology.from_data(scheme(self.train[0]))
            _warn_of_odd_reference(scheme, tree, self.train[:_LOOKED_AT])

            def stored(frames: Sequence[Data]) -> Sequence[Data]:
                return share_topology(frames, scheme, tree)
        else:

            def stored(frames: Sequence[Data]) -> Sequence[Data]:
                return [scheme(frame) for frame in frames]

            _warn_of_bonds_that_differ(scheme, self.train[:_LOOKED_AT])

        def store(frames: Sequence[Data]) -> Sequence[Data]:
            return frames.replaced(stored(frames)) if isinstance(frames, Frames) else stored(frames)

        tests = {name: store(frames) for name, frames in self.tests.items()}
        train = self.train if self.stream is not None else store(self.train)
        return DataSets(train, store(self.val), tests, self.split, self.stream)

    def uniform(self, labels: Mapping[str, Sequence[int | str]]) -> DataSets:
        """The same frames with the same keys in each set; see :func:`nbody_pyg.training.labels.uniform`."""
        tests = {name: uniform(frames, labels) for name, frames in self.tests.items()}
        return DataSets(uniform(self.train, labels), uniform(self.val, labels), tests, self.split, self.stream)


def _warn_of_odd_reference(scheme: Scheme, tree: Topology, frames: Sequence[Data]) -> None:
    """Report if the shared bonds are found in few of the frames."""
    odd = sum(not scheme.holds(tree, System.from_data(f)) for f in frames)
    if 2 * odd > len(frames):
        warnings.warn(
            f"the bonds of the first training frame, which all frames share, are not those found in {odd} of "
            f"{len(frames)} frames: a bond of it may be stretched. Take another data.split_seed",
            stacklevel=3,
        )


def _warn_of_bonds_that_differ(scheme: Scheme, frames: Sequence[Data]) -> None:
    """Report if frames of one molecule have separate hierarchies that differ."""
    if not scheme.keeps_parts or any(not torch.equal(frame.z, frames[0].z) for frame in frames):
        return
    first = Topology.from_data(scheme(frames[0]))
    if first.bonds is None or any(scheme.inputs(frame) for frame in frames):
        return
    odd = sum(not scheme.holds(first, System.from_data(f)) for f in frames)
    if odd:
        warnings.warn(
            f"the frames hold the same atoms, but the bonds found in {odd} of {len(frames)} differ from those of the "
            "first: the energy has steps between them. If all are one molecule, set data.one_molecule to true",
            stacklevel=3,
        )


#: Settings of how files are read.
FILE_SETTINGS = ("units", "keys", "energy_key", "forces_key", "stress_key", "file_format", "drop_unconverged")


def load_data(config: DataConfig, split: Split | None = None, files: Sequence[str] | None = None) -> DataSets:
    """Read and split the data of the configuration.

    Args:
        split: of an earlier run, used instead of a new random one. Additional frames at the end are for training, or if
            ``num_train`` is given for the test.
        files: names of the HDF5 files of an earlier run; others are left out.
    Raises: ValueError, FileNotFoundError: of the readers; more frames requested than there are; a key or unit for data
    that have fixed ones; a test set with the name of another set; files with labels of two levels of theory.
    """
    if config.train is None:
        for name in FILE_SETTINGS:
            if getattr(config, name) is not None:
                raise ValueError(
                    f"data.{name} is for files named by data.train, got {getattr(config, name)!r} beside data that "
                    "have labels and units of their own; leave it out"
                )
    if config.embedded is not None:
        warm = {name: load_embedded(config.embedded, f"test_{name}") for name in ("300K", "600K")}
        return _split(load_embedded(config.embedded), None, warm, config, split)
    if config.rmd17 is not None:
        num_train, num_val = config.num_train or 950, 50 if config.num_val is None else config.num_val
        found = load_rmd17(required(config.root), config.rmd17, config.split, num_train=num_train, num_val=num_val)
        return DataSets(found.train, found.val, {"test": found.test})
    if config.qm9 is not None:
        return _load_qm9(config, split)
    if are_units(listed := find_files(required(config.train))):
        return _load_units(unit_files(listed), config, files)
    paths = config.test or {}
    paths = {"test": paths} if isinstance(paths, str) else paths
    if taken := {"train", "val"} & set(paths):
        raise ValueError(f"data.test must not name a set {taken.pop()!r}, which is another set of the run; rename it")
    _warn_of_training_files(required(config.train), {**paths, **({} if config.val is None else {"val": config.val})})
    tests = {name: read_files(path, config) for name, path in paths.items()}
    val = None if config.val is None else read_files(config.val, config)
    train = read_files(required(config.train), config)
    sets = {"train": train, **({} if val is None else {"val": val}), **tests}
    if wrong := levels_apart({title: getattr(frames, "sources", {}) for title, frames in sets.items()}):
        raise ValueError(wrong)
    return _split(train, val, tests, config, split)


#: Frames of the validation and of the test, of those in files.
_VAL, _TEST = 500, 1000


def _load_units(files: Sequence[Path], config: DataConfig, names: Sequence[str] | None) -> DataSets:
    """Training frames that stay in their files, and samples of the validation and test frames there."""
    for name in ("val", "test", *FILE_SETTINGS, "one_molecule"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"data.{name} must not be given for HDF5 files, which hold their splits, names and units, got "
                f"{getattr(config, name)!r}; leave it out"
            )
    require_finished(files)
    units = UnitFiles(files, config.num_train, 8 if config.files_in_memory is None else config.files_in_memory)
    units = units if names is None else units.only(names)
    val = units.sample("val", _VAL if config.num_val is None else config.num_val, config.split_seed)
    test = units.sample("test", _TEST if config.num_test is None else config.num_test, config.split_seed)
    tests = {"test": test} if len(test) else {}
    return DataSets(units.sample("train", SAMPLE, config.split_seed), val, dict(tests), None, units)


def _load_qm9(config: DataConfig, kept: Split | None) -> DataSets:
    """The first molecules of each list of the chosen split family; of the dipole set a random split."""
    if config.qm9 == "dipole":
        frames = load_qm9_dipoles(required(config.root))
        num_val = 500 if config.num_val is None else config.num_val
        num_test = 1000 if config.num_test is None else config.num_test
        num_train = config.num_train or len(frames) - num_val - num_test
        split = kept or split_indices(len(frames), num_train, num_val, num_test, seed=config.split_seed)
        part = split.apply(frames)
        return DataSets(part.train, part.val, {"test": part.test}, split)
    split = qm9_split(config.family)
    rows = (
        split.train[: config.num_train],
        split.val[: 1000 if config.num_val is None else config.num_val],
        split.test[: config.num_test],
    )
    every = load_qm9(config.root, required(config.qm9), np.concatenate(rows))  # read once: the files are large
    ends = np.cumsum([len(part) for part in rows])
    return DataSets(every[: ends[0]], every[ends[0] : ends[1]], {"test": every[ends[1] : ends[2]]})


def wanted_properties(config: Config) -> tuple[Property, ...]:
    """Properties to learn beside energies and forces: from the section ``target``, or from the targets of QM9."""
    name = config.data.qm9
    if config.target or name is None:
        return config.target
    if name == "dipole":
        return (Property("dipole", "dipole", "e*angstrom"),)
    labels = target_labels(name)
    if lacking := set(labels) - {"energy", *TARGETS}:
        raise ValueError(f"data.qm9 must name targets of {', '.join(TARGETS)} to learn, got {lacking.pop()!r}")
    return tuple(Property(key, TARGETS[key].readout, TARGETS[key].unit) for key in labels if key != "energy")


def read_files(paths: str | Sequence[str], config: DataConfig) -> Sequence[Data]:
    """The frames of the given files, in their order; those of folders and patterns sorted by name."""
    found = [
        read_frames(
            path,
            keys=config.keys,
            energy_key=config.energy_key,
            forces_key=config.forces_key,
            stress_key=config.stress_key,
            units=config.units,
            file_format=config.file_format,
            drop_unconverged=bool(config.drop_unconverged),
        )
        for path in find_files(paths)
    ]
    return found[0] if len(found) == 1 else join_frames(found)


def _warn_of_training_files(train: str | Sequence[str], others: Mapping[str, str | Sequence[str]]) -> None:
    """A folder or pattern of training files easily takes in those of validation or test."""
    named = {Path(name).resolve() for name in ([train] if isinstance(train, str) else train)}
    known = {path.resolve() for path in find_files(train)} - named  # who names a file twice wants it twice
    for name, paths in others.items():
        if twice := [str(path) for path in find_files(paths) if path.resolve() in known]:
            warnings.warn(
                f"the set {name!r} holds frames of {', '.join(twice)}, which data.train takes in too: errors on them "
                "say nothing of other frames; leave them out of data.train",
                stacklevel=3,
            )


def _split(
    frames: Sequence[Data],
    val: Sequence[Data] | None,
    tests: Mapping[str, Sequence[Data]],
    config: DataConfig,
    kept: Split | None,
) -> DataSets:
    if kept is None:
        split = _drawn_split(frames, val is not None, config)
    else:
        new = range(sum(len(rows) for rows in (kept.train, kept.val, kept.test)), len(frames))
        train, test = (new, ()) if config.num_train is None else ((), new)
        split = Split([*kept.train.tolist(), *train], kept.val, [*kept.test.tolist(), *test])
    part = split.apply(frames)
    if not tests and config.num_train is not None and len(part.test):
        tests = {"rest": part.test}  # frames that are not for training
    return DataSets(part.train, part.val if val is None else val, dict(tests), split)


def _drawn_split(frames: Sequence[Data], has_val: bool, config: DataConfig) -> Split:
    """A random split. Isolated atoms are always for training, so that E0 does not depend on the seed."""
    single = [number for number, frame in enumerate(frames) if is_isolated_atom(frame)]
    single = single if len(single) < len(frames) else []
    others = np.setdiff1d(np.arange(len(frames)), single)
    num_val = config.num_val
    if num_val is None:
        num_val = 0 if has_val else min(50, len(others) // 10)
    num_train = config.num_train or len(others) - num_val
    drawn = split_indices(len(others), num_train, num_val, seed=config.split_seed)
    return Split([*others[drawn.train].tolist(), *single], others[drawn.val], others[drawn.test])


def reference_mode(config: DataConfig) -> str | Mapping[str, float] | Mapping[int, float]:
    """How E0 is fitted, as ``fit_atomic_energies`` takes it.

    Raises: ValueError: the energies of QM9 without its frames.
    """
    if config.e0 != "atomref":
        return config.e0
    if not isinstance(config.qm9, str):
        raise ValueError(
            "data.e0 'atomref' is known for data.qm9 only, with one target; use lstsq, mean, isolated or {element: eV}"
        )
    return qm9_atomref(config.qm9)


def build_potential(config: Config, data: DataSets) -> Potential | PropertyModel:
    """An initial network with E0, scale and mean numbers of neighbours from the training frames.

    A potential, or a model of the properties that the configuration names.

    Seeds torch's generator, so that the same configuration gives the same weights.
    """
    if properties := wanted_properties(config):
        return known_states(_build_properties(config, data, properties), data)
    require_labels({"train": data.train}, _wanted(config), partial=True)
    e0 = reference_mode(config.data)
    has_energy = any(has_label(frame, "energy") for frame in data.train)
    inputs = network_inputs(config.model, data.train)
    terms = state_terms(data.train, inputs) if has_energy and inputs else None
    reference = (
        AtomicReference(fit_atomic_energies(_neutral(_for_reference(data, e0), e0, terms), e0)) if has_energy else None
    )
    scale = config.model.scale
    if scale == "forces":
        scale = output_scale(data.train, reference)
    repulsion = _repulsion(config.model, data)
    model = _network(config, data, inputs, repulsion)
    if terms is not None and model.electrons is not None and model.electrons.offset is not None:
        # A charge may contribute 10 eV, which would take many small steps
        with torch.no_grad():
            model.electrons.offset.copy_(terms.offset / float(scale))
    potential = Potential(model, reference, float(scale), repulsion).to(getattr(torch, config.training.dtype))
    return known_states(potential, data)


P = TypeVar("P", bound=Potential | PropertyModel)


def known_states(potential: P, data: DataSets) -> P:
    """The same, after checking charges and spins of all frames, so that errors are found before the training."""
    learn_state(potential.model, data.train)
    for name, frames in data.named().items():
        check_states(potential.model, frames, f"the {name} frames")
    return potential


def network_inputs(config: ModelConfig, frames: Sequence[Data]) -> list[str]:
    """Which of charge and spin are inputs of the network: from the configuration, else those that differ among the
    frames."""
    if (given := config.arguments.get("inputs")) is not None:
        return list(check_inputs(given)) if given else []
    return [key for key, values in frame_states(frames).items() if len(set(values)) > 1]


def output_scale(frames: Sequence[Data], reference: AtomicReference | None) -> float:
    """Scale of the output of a network, from the training frames.

    Root mean square of the forces. Where there are none, or all are zero, the spread of the interaction energy per
    atom: half of the distance between the quantiles 0.16 and 0.84, which is the standard deviation of a normal
    distribution and which single wild energies do not change. 1 where that is zero too.
    """
    forces = force_variance(frames) ** 0.5 if any(has_label(frame, "forces") for frame in frames) else 0.0
    if forces > NO_FORCES or reference is None:
        return forces if forces > NO_FORCES else 1.0
    e0 = reference.energies
    rest = [
        (float(frame.energy) - sum(e0[z] for z in frame.z.tolist())) / len(frame.z)
        for frame in frames
        if has_label(frame, "energy")
    ]
    low, high = np.quantile(rest, (0.16, 0.84)) if rest else (0.0, 0.0)
    spread = float(high - low) / 2
    return spread if spread > NO_FORCES else 1.0


@dataclass(frozen=True)
class StateTerms:
    """Contribution of charges and spins to the energies of frames: weights (as ``ElectronicEmbedding.offset``, eV), and
    the term of each frame, eV."""

    offset: Tensor
    energies: Tensor


def state_terms(frames: Sequence[Data], inputs: Sequence[str]) -> StateTerms:
    """By least squares over the frames with an energy, together with a value for each element, which is not used."""
    states = frame_states(frames)
    species = torch.tensor(elements_of(frames))
    counts = torch.stack([(frame.z[:, None] == species).sum(0) for frame in frames]).double()
    labels = [float(frame.energy) if has_label(frame, "energy") else math.nan for frame in frames]
    energies = torch.tensor(labels, dtype=torch.float64)
    default = [[DEFAULT_STATE[key]] * len(frames) for key in inputs]
    totals = [
        torch.tensor(states.get(key, same), dtype=torch.float64) - DEFAULT_STATE[key]
        for key, same in zip(inputs, default, strict=True)
    ]
    # Shares at the start are even
    shares = torch.stack(totals, dim=1) / counts.sum(1, keepdim=True)
    powers = torch.cat([shares, shares.square()], dim=1)
    design = (counts[:, :, None] * powers[:, None, :]).flatten(1)
    known = energies.isfinite()
    mean = energies[known].sum() / counts[known].sum()
    rest = (energies - mean * counts.sum(1))[known]
    both = torch.cat([counts, design], dim=1)[known]
    found = torch.linalg.lstsq(both, rest.unsqueeze(1), rcond=1e-10, driver="gelsd").solution.squeeze(1)
    offset = found[len(species) :]
    return StateTerms(offset.view(len(species), -1), design @ offset)


def _neutral(frames: Sequence[Data], e0: typing.Any, terms: StateTerms | None) -> Sequence[Data]:
    """Frames for fitting the energies of isolated atoms, without the contribution of charges and spins."""
    if e0 == "isolated":
        return without_ions(frames)
    if terms is None or e0 not in ("lstsq", "mean"):
        return frames
    out = [copy.copy(frame) for frame in frames]
    for frame, term in zip(out, terms.energies, strict=True):
        if has_label(frame, "energy"):
            frame.energy = frame.energy.double() - term
    return out


def _for_reference(data: DataSets, e0: typing.Any) -> Sequence[Data]:
    """The frames for E0, including single atoms of all sets."""
    if e0 != "isolated":
        return data.train
    others = [frame for frames in (data.val, *data.tests.values()) for frame in frames]
    known = set(elements_of(data.train))
    return [*data.train, *(f for f in others if is_isolated_atom(f) and int(f.z) in known and has_label(f, "energy"))]


def property_statistics(data: DataSets, properties: Sequence[Property]) -> dict[str, Statistics]:
    """Mean, values per element and scale of each property over the training frames that have it.

    Raises: ValueError: no training frame has the label.
    """
    require_labels({"train": data.train}, [p.name for p in properties], partial=True)
    known = {p: [frame for frame in data.train if has_label(frame, p.name)] for p in properties}
    return {p.name: fit_statistics(frames, p) for p, frames in known.items()}


def _build_properties(config: Config, data: DataSets, properties: tuple[Property, ...]) -> PropertyModel:
    statistics = property_statistics(data, properties)
    for key in ("irreps_out", "readout"):
        if key in config.model.arguments:
            raise ValueError(f"model.{key} must not be given for properties: it follows from their readouts")
    given = {"irreps_out": str(property_irreps(properties))}
    if any(p.readout == "root" for p in properties):
        given["readout"] = "root"
    network = _network(config, data, network_inputs(config.model, data.train), None, **given)
    model = PropertyModel(network, properties, statistics)
    return model.to(getattr(torch, config.training.dtype))


def explicit(config: ModelConfig) -> ModelConfig:
    """The same network, with the defaults of scheme and preset written out, because they may change."""
    with torch.random.fork_rng(devices=[]):
        model = _preset(config)([1], scheme=Scheme.from_config(dict(config.scheme)), **config.arguments)
    # These follow from the data
    data = {"species", "scheme", "preset", "irreps_out", "readout", "avg_num_neighbors", "inputs", "inner_cutoff"}
    found = {key: value for key, value in model.config().items() if key not in data}
    return dataclasses.replace(config, scheme=model.scheme.config(), arguments=found | dict(config.arguments))


def _network(
    config: Config, data: DataSets, inputs: Sequence[str], repulsion: ZBLRepulsion | None, **given: str
) -> NBodyNet:
    """An initial network for the elements of the training frames, with seeded weights."""
    from nbody_pyg.models import compute_avg_num_neighbors

    species = elements_of(data.train)
    scheme = Scheme.from_config(dict(config.model.scheme))
    arguments = dict(config.model.arguments)
    if arguments.get("avg_num_neighbors") is None:
        arguments["avg_num_neighbors"] = compute_avg_num_neighbors(scheme, data.train[:200])
    if arguments.get("inner_cutoff") is None and repulsion is not None:
        arguments["inner_cutoff"] = inner_cutoffs(repulsion)
    arguments["inputs"] = inputs or None
    make = _preset(config.model)
    torch.manual_seed(config.training.seed)
    return make(species, scheme=scheme, **(arguments | given))


def _preset(config: ModelConfig) -> Callable[..., NBodyNet]:
    from nbody_pyg.models import NBodyNet

    presets = {"practical": NBodyNet.practical, "strict": NBodyNet.strict}
    check_choice("model.preset", config.preset, presets)
    return presets[config.preset]


def _repulsion(config: ModelConfig, data: DataSets) -> ZBLRepulsion | None:
    """Repulsion that ends below the shortest distances of the training frames, so that it is zero on them. Of many
    frames in files it is not zero on a few."""
    if config.repulsion != "zbl" and not (config.repulsion == "auto" and config.preset == "practical"):
        return None
    species = elements_of(data.train)
    shortest = shortest_distances(data.train) if data.stream is None else shortest_in_units(data.stream)
    return ZBLRepulsion.below(species, shortest)


def _wanted(config: Config) -> list[str]:
    weights = config.training
    wanted = {
        "energy": weights.energy_weight,
        "forces": weights.force_weight,
        "stress": weights.stress_weight,
    }
    return [label for label, weight in wanted.items() if weight > 0]
