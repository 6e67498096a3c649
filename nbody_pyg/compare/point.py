"""One run of a comparison: which model, on which frames, trained how; and how it is carried out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Data

from nbody_pyg.atomic_write import write_json
from nbody_pyg.compare.curve import LearningCurve
from nbody_pyg.compare.errors import OF_POTENTIALS, errors_on
from nbody_pyg.compare.graph import CutoffGraph
from nbody_pyg.compare.measure import latency, machine, peak_memory
from nbody_pyg.compare.peer import Facts
from nbody_pyg.compare.registry import build_peer, version
from nbody_pyg.data import elements_of
from nbody_pyg.datasets import fit_atomic_energies
from nbody_pyg.datasets.qm9 import target_labels
from nbody_pyg.datasets.readers import find_files
from nbody_pyg.energy import AtomicReference
from nbody_pyg.models import NBodyNet, compute_avg_num_neighbors
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.required import required
from nbody_pyg.training.config import Config, DataConfig, parse_config
from nbody_pyg.training.defaults import choose_defaults
from nbody_pyg.training.labels import label_shapes
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.loss import EnergyForceLoss
from nbody_pyg.training.prepare import (
    DataSets,
    build_potential,
    explicit,
    known_states,
    load_data,
    output_scale,
    property_statistics,
    wanted_properties,
)
from nbody_pyg.training.run import fit, require_elements
from nbody_pyg.training.settings import TrainingConfig

#: Frames of each set that a learning curve looks at.
_CURVE_FRAMES = 50


class WrongData(ValueError):
    """The frames cannot be read: no model can run on them."""


@dataclass(frozen=True)
class Point:
    """Everything that decides the result of a run, ready for JSON.

    Args:
        name: of the contestant, as the tables have it.
        title: the model in words.
        model: name in the registry.
        arguments: of our network (the section "model" of a configuration), or of the peer's adapter.
        data: the section "data" of a configuration.
        training: the section "training": optimizer, learning rate, budget, seed, and so on.
        cutoff: of the peers' graphs, angstrom.
        purpose: "search" (validation frames only) or "final" (tested in full).
        points: of the learning curve.
    """

    name: str
    title: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    cutoff: float = 5.0
    purpose: str = "final"
    points: int = 12

    @property
    def dataset(self) -> str:
        """The molecule, the target of QM9 with its family of splits, or the file, in one word."""
        for key in ("rmd17", "embedded", "qm9", "train"):
            if self.data.get(key):
                family = self.data.get("family", DataConfig.family) if key == "qm9" else None
                words = (Path(str(self.data[key])).stem, family, self.data.get("num_train"))
                # A part of the names of folders
                return (
                    re.sub(r"[/\\\x00-\x1f]", "_", "-".join(str(w) for w in words if w is not None)).lstrip(".")
                    or "data"
                )
        return "data"

    @property
    def limit(self) -> str:
        """The budget in words, e.g. "300 s" or "1000 steps"."""
        seconds, steps = self.training.get("budget_seconds"), self.training.get("max_steps")
        return f"{seconds:g} s" if seconds is not None else f"{steps} steps"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result; where the files lie is no part of that."""
        return dataclasses.asdict(self) | {"data": {k: v for k, v in self.data.items() if k != "root"}}

    @property
    def folder(self) -> Path:
        """Where its result lies, relative to the folder of the comparison; the digits are those of its settings."""
        t = self.training
        settings = self.settings
        if self.model == "nbody":  # a run with other defaults is another run
            settings["network"] = dataclasses.asdict(explicit(self.config(Path()).model))
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        words = [self.purpose, t["optimizer"], f"lr{t['lr']:g}", f"b{t['batch_size']}", f"seed{t['seed']}"]
        return Path(self.dataset) / self.name / "-".join([*words, self.limit.replace(" ", ""), digest])

    def config(self, folder: Path) -> Config:
        """The configuration of the same run for :func:`~nbody_pyg.training.run.fit`."""
        model = self.arguments if self.model == "nbody" else {}
        sections = {"data": self.data, "training": self.training, "model": model, "output": {"folder": str(folder)}}
        return parse_config({name: dict(values) for name, values in sections.items()})

    def __str__(self) -> str:
        t = self.training
        return (
            f"{self.dataset}, {self.name}, {t['optimizer']}, lr {t['lr']:g}, seed {t['seed']}, {self.limit}"
            f"{' (search)' if self.purpose == 'search' else ''}"
        )


def data_files(config: DataConfig) -> dict[str, str]:
    """A hash of the content of every file of frames that a configuration names: files change under their names."""
    tests = config.test if isinstance(config.test, Mapping) else {"test": config.test}
    named = [paths for paths in (config.train, config.val, *tests.values()) if paths is not None]
    files = [path for paths in named for path in find_files(paths) if path.is_file()]
    return {str(path): _content(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@functools.lru_cache(maxsize=64)
def _content(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def failed_record(point: Point, reason: str) -> dict[str, Any]:
    """The record of a run that has no result."""
    nothing: dict[str, Any] = {"val": {}, "test": {}, "curve": [], "latency": {}, "frames": {}}
    return {"point": dataclasses.asdict(point), "title": point.title, "status": "failed", "reason": reason, **nothing}


def deciding_error(records: Iterable[Mapping[str, Any]]) -> str:
    """By which error runs are chosen and ordered: "forces_mae", "energy_mae" where no run has learned forces, or that
    of the target of QM9."""
    found: set[str] = set()
    for record in records:
        if (error := _target_error(record["point"].get("data") or {})) not in (None, *OF_POTENTIALS):
            return required(error)
        weight = record["point"]["training"].get("force_weight", TrainingConfig.force_weight)
        for errors in (record["val"], *record["test"].values()):
            found.update(errors if weight > 0 else ("energy_mae",))
    return "energy_mae" if "energy_mae" in found and "forces_mae" not in found else "forces_mae"


def _target_error(data: Mapping[str, Any]) -> str | None:
    """The error of the first target of QM9 that a section "data" names; None where it names none."""
    if (target := data.get("qm9")) is None:
        return None
    return f"{'dipole' if target == 'dipole' else next(iter(target_labels(target)))}_mae"


def validation_scores(tried: Mapping[float, Mapping[str, Any]]) -> tuple[str, dict[float, float]]:
    """The deciding error of runs with several learning rates, and its value for each on the validation frames.

    It is infinite where the run has failed or has no such error.
    """
    error, scores = deciding_error(tried.values()), {}
    for lr, record in tried.items():
        value = record["val"].get(error, math.inf) if record["status"] == "done" else math.inf
        scores[lr] = value if math.isfinite(value) else math.inf
    return error, scores


def run_point(point: Point, folder: Path, note: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and test; resumes from ``last.ckpt`` in ``folder`` where an earlier run was stopped by a signal.

    Not in the budget, for any model: neighbour lists and hierarchies, the first steps (in which kernels are
    compiled), the learning curve, tests.

    Returns: the record, with "status" done, failed (the loss became infinite) or interrupted (by a signal).
    Raises: MissingPeer: the model's package is not installed; WrongData: the frames cannot be read.
    """
    config = point.config(folder)
    torch.set_num_threads(config.training.threads)
    try:
        data = load_data(config.data)
    except (ValueError, OSError) as error:
        raise WrongData(str(error)) from error
    if data.stream is not None:  # data.train is a sample of them
        raise WrongData(
            "data.train must hold frames in memory for nbody compare, got HDF5 files, which nbody train reads a few at "
            "a time; give extended xyz files or an ASE database"
        )
    if point.purpose == "search":
        data = DataSets(data.train, data.val)  # it must not see the test frames at all
    potential = build(point, config, data)
    require_elements(potential, data.named())
    data = data.with_topology(required(potential.scheme), config.data.shares_hierarchy).uniform(label_shapes(potential))
    record: dict[str, Any] = {
        "point": dataclasses.asdict(point), "title": point.title, "version": version(point.model),
        "machine": machine(), "parameters": sum(p.numel() for p in potential.parameters() if p.requires_grad),
        "frames": {name: len(frames) for name, frames in data.named().items()}, "files": data_files(config.data),
    }  # fmt: skip
    if isinstance(potential.model, NBodyNet):  # with what was chosen for these frames
        record["network"] = potential.model.config()
    record["memory_bytes"] = warm_up(potential, data.train, config.training)
    curve = LearningCurve(_curve_sets(data), point.points, note=note)
    checkpoint = _own_checkpoint(point, folder, record["files"], note)
    began = time.time()
    try:
        result = fit(
            potential, data.train, (), config.training, folder, resume=checkpoint,
            show_progress=False, callbacks=[curve],
        )  # fmt: skip
    except FloatingPointError as error:
        return record | {"status": "failed", "reason": str(error), "val": {}, "test": {}, "curve": curve.rows}
    if result.interrupted is not None:
        return record | {"status": "interrupted", "signal": result.interrupted}
    record |= {"steps": result.steps, "cpu_seconds": result.cpu_seconds, "wall_seconds": time.time() - began}
    device = "cuda" if config.training.device == "cuda" else "cpu"
    record["latency"] = latency(potential, data.train[0], 0.0 if point.purpose == "search" else 3.0, device)
    record["val"] = errors_on(potential, data.val, device) if len(data.val) else {}
    record["test"] = {name: errors_on(potential, frames, device) for name, frames in data.tests.items()}
    finite = all(math.isfinite(v) for errors in (record["val"], *record["test"].values()) for v in errors.values())
    status = {"status": "done"} if finite else {"status": "failed", "reason": "errors are not finite"}
    return record | {"curve": curve.rows} | status


def _own_checkpoint(point: Point, folder: Path, files: Mapping[str, str], note: Callable[[str], None]) -> Path | None:
    """The checkpoint in the folder, if it is of this run on these very files; another one is removed."""
    checkpoint, started = folder / "last.ckpt", folder / "started.json"
    now = plain({"settings": point.settings, "files": files})
    # Earlier versions left no note
    if checkpoint.is_file() and started.is_file() and json.loads(started.read_text(encoding="utf-8")) != now:
        note(f"{checkpoint.name} is of other data or settings; the run starts again")
        checkpoint.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, now)
    return checkpoint if checkpoint.is_file() else None


def build(point: Point, config: Config, data: DataSets) -> Potential | PropertyModel:
    """A potential, or a model of a property, with fresh weights.

    What is taken off the labels (E0, a mean, values of the elements) and their scale are the same for every model.

    Raises: ValueError: several properties, or one with a readout that the peer does not have.
    """
    if point.model == "nbody":  # the network that ``nbody train`` would choose; training is the same for all models
        chosen, _ = choose_defaults(config, data)
        return build_potential(dataclasses.replace(config, model=chosen.model), data)
    properties = wanted_properties(config)
    if len(properties) > 1:
        names = [p.name for p in properties]
        raise ValueError(f"data.qm9 must be one target for {point.model}, got {names}; give each a run of its own")
    species = tuple(elements_of(data.train))
    degree = compute_avg_num_neighbors(CutoffGraph(point.cutoff), data.train[:200])["pair_0"]
    readout = properties[0].readout if properties else "extensive"
    facts = Facts(species, point.cutoff, degree, getattr(torch, config.training.dtype), readout)
    peer = build_peer(point.model, facts, config.training.seed, **point.arguments)
    if properties:
        model = PropertyModel(peer, properties, property_statistics(data, properties)).to(facts.dtype)
        return known_states(model, data)
    reference = AtomicReference(fit_atomic_energies(data.train, config.data.e0))
    given = config.model.scale
    scale = output_scale(data.train, reference) if given == "forces" else float(given)
    return known_states(Potential(peer, reference, scale).to(facts.dtype), data)


def warm_up(
    potential: Potential | PropertyModel, frames: Sequence[Data], settings: TrainingConfig, steps: int = 3
) -> float | None:
    """Take gradients that are thrown away, so that what a first call compiles is not in the budget.

    Returns: bytes of memory that such a step takes; None where that cannot be told, or on a GPU.
    """
    if settings.device != "cpu":
        return None
    loader = FrameLoader(frames[: settings.batch_size * steps], settings.batch_size)
    loss = EnergyForceLoss()

    def step(batch: Data) -> None:
        if isinstance(potential, PropertyModel):
            torch.cat([value.flatten() for value in potential(batch).values()]).square().mean().backward()
            potential.zero_grad(set_to_none=True)
            return
        forces = "forces" in batch
        result = potential(batch, compute_forces=forces, create_graph=True)
        error = result["interaction_energy"] / len(batch.z)
        loss(error, result["forces"] - batch.forces.to(result["forces"].dtype) if forces else None).backward()
        potential.zero_grad(set_to_none=True)

    for batch in loader:
        step(batch)
    return peak_memory(lambda: step(loader.batch(range(min(settings.batch_size, loader.num_frames)))))


def _curve_sets(data: DataSets) -> dict[str, Sequence[Data]]:
    """Validation frames, and frames of the tests spread evenly, the same for every model."""
    sets = {"val": data.val, **data.tests}
    return {name: frames[:: max(1, len(frames) // _CURVE_FRAMES)] for name, frames in sets.items() if len(frames)}


def main(arguments: Sequence[str]) -> int:
    """``python -m nbody_pyg.compare.point FILE.json FOLDER``: one run in a separate process.

    Writes ``FOLDER/record.json``. Exit status: 0 done or failed, 3 package missing, 4 no frames (the reason is the last
    line of the output), 128 + number stopped by a signal.
    """
    spec, folder = Path(arguments[0]), Path(arguments[1])
    try:
        record = run_point(Point(**json.loads(spec.read_text())), folder, note=lambda line: print(line, flush=True))
    except ImportError as error:
        print(f"missing: {_line(error)}", flush=True)
        return 3
    except WrongData as error:
        print(f"data: {_line(error)}", flush=True)
        return 4
    if record["status"] == "interrupted":
        return 128 + int(record["signal"])
    write_json(folder / "record.json", record, default=float)
    return 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
