"""From a configuration to frames and a fresh potential: data, split, E0, scale, typical degrees."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Data

from nbody_pyg.datasets import (
    embedded,
    fit_reference,
    load_qm9,
    load_qm9_dipoles,
    load_rmd17,
    qm9_atomref,
    qm9_split,
    read_frames,
    require_labels,
    split_indices,
)
from nbody_pyg.datasets.frames import Frames, has_label
from nbody_pyg.datasets.keys import levels_apart
from nbody_pyg.datasets.qm9 import TARGETS, TOTAL_ENERGIES
from nbody_pyg.hierarchy import Scheme, Topology, share_topology
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.potential import AtomicReference, Potential
from nbody_pyg.properties import Property, PropertyModel, fit_statistics, property_irreps
from nbody_pyg.training.config import Config, DataConfig, ModelConfig, model_arguments
from nbody_pyg.training.labels import force_variance, uniform

if typing.TYPE_CHECKING:
    from nbody_pyg.models import NBodyNet


@dataclass
class DataSets:
    """Frames for training, for validation (maybe none) and for any number of named tests."""

    train: Sequence[Data]
    val: Sequence[Data]
    tests: dict[str, Sequence[Data]] = field(default_factory=dict)

    def named(self) -> dict[str, Sequence[Data]]:
        return {"train": self.train, **({"val": self.val} if len(self.val) else {}), **self.tests}

    def with_topology(self, scheme: Scheme, shared: bool = False) -> DataSets:
        """The same frames with their hierarchies stored, so that training does not search for them.

        Args:
            shared: every frame takes the parts of the first training frame (see share_topology).
        """
        if shared:
            tree = Topology.from_data(scheme(self.train[0]))

            def stored(frames: Sequence[Data]) -> Sequence[Data]:
                return share_topology(frames, scheme, tree)
        else:

            def stored(frames: Sequence[Data]) -> Sequence[Data]:
                return [scheme(frame) for frame in frames]

        def store(frames: Sequence[Data]) -> Sequence[Data]:
            return frames.replaced(stored(frames)) if isinstance(frames, Frames) else stored(frames)

        return DataSets(store(self.train), store(self.val), {n: store(f) for n, f in self.tests.items()})

    def uniform(self, labels: Mapping[str, Sequence[int | str]]) -> DataSets:
        """The same frames with the same keys in each set; see :func:`nbody_pyg.training.labels.uniform`."""
        tests = {name: uniform(frames, labels) for name, frames in self.tests.items()}
        return DataSets(uniform(self.train, labels), uniform(self.val, labels), tests)


def load_data(config: DataConfig) -> DataSets:
    """Read and split what the configuration names.

    Raises: ValueError, FileNotFoundError: of the readers; more frames wanted than there are; a key or unit for data
        that have their own; a test set of the name of another set; files with labels of two levels of theory.
    """
    if config.train is None:
        for name in ("units", "energy_key", "forces_key", "stress_key"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"data.{name} is for files named by data.train, got {getattr(config, name)!r} beside data that "
                    "have labels and units of their own; leave it out"
                )
    if config.embedded is not None:
        tests = {name: embedded(config.embedded, f"test_{name}") for name in ("300K", "600K")}
        return _split(embedded(config.embedded), None, tests, config)
    if config.rmd17 is not None:
        num_train, num_val = config.num_train or 950, 50 if config.num_val is None else config.num_val
        found = load_rmd17(config.root, config.rmd17, config.split, num_train=num_train, num_val=num_val)
        return DataSets(found.train, found.val, {"test": found.test})
    if config.qm9 is not None:
        return _load_qm9(config)
    paths = config.test or {}
    paths = {"test": paths} if isinstance(paths, str) else paths
    if taken := {"train", "val"} & set(paths):
        raise ValueError(f"data.test must not name a set {taken.pop()!r}, which is another set of the run; rename it")
    tests = {name: _read(path, config) for name, path in paths.items()}
    val = None if config.val is None else _read(config.val, config)
    train = _read(config.train, config)
    sets = {"train": train, **({} if val is None else {"val": val}), **tests}
    if wrong := levels_apart({title: getattr(frames, "sources", {}) for title, frames in sets.items()}):
        raise ValueError(wrong)
    return _split(train, val, tests, config)


def _load_qm9(config: DataConfig) -> DataSets:
    """The first molecules of each list of the chosen split family; of the dipole set a random split."""
    if config.qm9 == "dipole":
        frames = load_qm9_dipoles(config.root)
        num_val = 500 if config.num_val is None else config.num_val
        num_test = 1000 if config.num_test is None else config.num_test
        num_train = config.num_train or len(frames) - num_val - num_test
        part = split_indices(len(frames), num_train, num_val, num_test, seed=config.split_seed).apply(frames)
        return DataSets(part.train, part.val, {"test": part.test})
    split = qm9_split(config.family)
    rows = (
        split.train[: config.num_train],
        split.val[: 1000 if config.num_val is None else config.num_val],
        split.test[: config.num_test],
    )
    # Read once: the text files of QM9 take a minute.
    every = load_qm9(config.root, config.qm9, np.concatenate(rows))
    ends = np.cumsum([len(part) for part in rows])
    return DataSets(every[: ends[0]], every[ends[0] : ends[1]], {"test": every[ends[1] : ends[2]]})


def wanted_properties(config: Config) -> tuple[Property, ...]:
    """What is learned beside energies and forces: the section ``target``, or what the target of QM9 asks for."""
    name = config.data.qm9
    if config.target or name is None:
        return config.target
    if name == "dipole":
        return (Property("dipole", "dipole", "e*angstrom"),)
    if name in TARGETS and name not in TOTAL_ENERGIES:
        return (Property(name, TARGETS[name].readout, TARGETS[name].unit),)
    return ()


def _read(path: str, config: DataConfig) -> Sequence[Data]:
    return read_frames(
        Path(path),
        energy_key=config.energy_key,
        forces_key=config.forces_key,
        stress_key=config.stress_key,
        units=config.units,
    )


def _split(frames: Sequence[Data], val: Sequence[Data] | None, tests: dict, config: DataConfig) -> DataSets:
    num_val = config.num_val
    if num_val is None:
        num_val = 0 if val is not None else min(50, len(frames) // 10)
    num_train = config.num_train or len(frames) - num_val
    part = split_indices(len(frames), num_train, num_val, seed=config.split_seed).apply(frames)
    if not tests and config.num_train is not None and len(part.test):
        tests = {"rest": part.test}  # frames that nobody asked to train on
    return DataSets(part.train, part.val if val is None else val, tests)


def build_potential(config: Config, data: DataSets) -> Potential | PropertyModel:
    """A fresh network with E0, scale and typical degrees taken from the training frames.

    A potential, or a model of the properties that the configuration names.

    Seeds torch's generator, so that the same configuration gives the same weights.
    """
    if properties := wanted_properties(config):
        return _build_properties(config, data, properties)
    require_labels({"train": data.train}, _wanted(config), partial=True)
    e0 = config.data.e0
    if e0 == "atomref":
        if config.data.qm9 is None:
            raise ValueError("data.e0 'atomref' is known for data.qm9 only; use lstsq, mean, isolated or {element: eV}")
        e0 = qm9_atomref(config.data.qm9)
    has_energy = any(has_label(frame, "energy") for frame in data.train)
    reference = AtomicReference(fit_reference(_for_reference(data, e0), e0)) if has_energy else None
    scale = config.model.scale
    if scale == "forces":
        scale = force_variance(data.train) ** 0.5
    model = _network(config, data)
    repulsion = _repulsion(config.model, model.species, data.train)
    return Potential(model, reference, float(scale), repulsion).to(getattr(torch, config.training.dtype))


def _for_reference(data: DataSets, e0: dict[str, float] | str) -> Sequence[Data]:
    """The frames that E0 is taken from: single atoms count wherever the split has put them."""
    if e0 != "isolated":
        return data.train
    others = [frame for frames in (data.val, *data.tests.values()) for frame in frames]
    known = {int(z) for frame in data.train for z in frame.z.unique()}
    return [*data.train, *(f for f in others if len(f.z) == 1 and int(f.z) in known and has_label(f, "energy"))]


def _build_properties(config: Config, data: DataSets, properties: tuple[Property, ...]) -> PropertyModel:
    require_labels({"train": data.train}, [p.name for p in properties], partial=True)
    for key in ("irreps_out", "target"):
        if key in config.model.arguments:
            raise ValueError(f"model.{key} must not be given for properties: it follows from their readouts")
    given = {"irreps_out": str(property_irreps(properties))}
    if any(p.readout == "root" for p in properties):
        given["target"] = "intensive"
    known = {p: [frame for frame in data.train if has_label(frame, p.name)] for p in properties}
    statistics = {p.name: fit_statistics(frames, p) for p, frames in known.items()}
    model = PropertyModel(_network(config, data, **given), properties, statistics)
    return model.to(getattr(torch, config.training.dtype))


def explicit(config: ModelConfig) -> ModelConfig:
    """The same network, with the defaults of scheme and preset that it relies on written out: they may change."""
    with torch.random.fork_rng(devices=[]):
        model = _preset(config)([1], scheme=Scheme.from_config(dict(config.scheme)), **config.arguments)
    # Elements, degrees and the type of the target follow from the data
    found = {k: v for k, v in model.config().items() if k in ("channels", "lmax", "body_order", *model.DEFAULTS)}
    del found["degrees"]
    return dataclasses.replace(config, scheme=model.scheme.config(), arguments=found | dict(config.arguments))


def _network(config: Config, data: DataSets, **given: str) -> NBodyNet:
    """A fresh network for the elements of the training frames, with seeded weights."""
    from nbody_pyg.models import edge_degrees

    species = sorted({int(z) for frame in data.train for z in frame.z.unique()})
    scheme = Scheme.from_config(dict(config.model.scheme))
    arguments = dict(config.model.arguments)
    if "degrees" in model_arguments() and arguments.get("degrees") is None:
        arguments["degrees"] = edge_degrees(scheme, data.train[:200])
    make = _preset(config.model)
    torch.manual_seed(config.training.seed)
    return make(species, scheme=scheme, **(arguments | given))


def _preset(config: ModelConfig) -> Callable[..., NBodyNet]:
    from nbody_pyg.models import NBodyNet

    presets = {"practical": NBodyNet.practical, "strict": NBodyNet.strict}
    if config.preset not in presets:
        raise ValueError(f"model.preset must be one of {sorted(presets)}, got {config.preset!r}")
    return presets[config.preset]


def _repulsion(config: ModelConfig, species: Sequence[int], frames: Sequence[Data]) -> ZBLRepulsion | None:
    """Repulsion that ends below the shortest distances of the training frames, which it leaves alone."""
    wanted = config.repulsion == "zbl" or (config.repulsion == "auto" and config.preset == "practical")
    return ZBLRepulsion.from_frames(species, frames) if wanted else None


def _wanted(config: Config) -> list[str]:
    weights = config.training
    wanted = {
        "energy": weights.energy_weight,
        "forces": weights.force_weight,
        "stress": weights.stress_weight,
    }
    return [label for label, weight in wanted.items() if weight > 0]
