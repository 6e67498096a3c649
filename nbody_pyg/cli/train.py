"""nbody train: read data, check labels, train, test, and write the model file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch_geometric.data import Data

from nbody_pyg.atomic_write import write_json, write_text
from nbody_pyg.cli.frames import sample_of
from nbody_pyg.cli.plots import error_plot, learning_curve, parity_plot, property_plot
from nbody_pyg.cli.tables import element_table, error_table, report
from nbody_pyg.datasets import UnitFiles, label_audit
from nbody_pyg.datasets.readers import find_files
from nbody_pyg.datasets.splits import Split, read_split
from nbody_pyg.datasets.units import are_units, unit_files
from nbody_pyg.deploy import load_model, read_metadata, reference_record, save_model, shipped_models
from nbody_pyg.interrupt import signal_name
from nbody_pyg.io.checkpoint import changes, read_checkpoint
from nbody_pyg.io.description import potential_from_config
from nbody_pyg.io.model_file import load_potential
from nbody_pyg.io.upgrades import up_to_date
from nbody_pyg.network import frame_states
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.required import required
from nbody_pyg.system import DEFAULT_STATE
from nbody_pyg.training.config import Config, DataConfig, ModelConfig, OutputConfig, completed, load_config
from nbody_pyg.training.defaults import Choice, choose_defaults, choose_init, keep_choices
from nbody_pyg.training.evaluation import Evaluation, evaluate
from nbody_pyg.training.finetune import Inheritance, ancestor_of, replayed, tuned_model
from nbody_pyg.training.folder import RunFolder
from nbody_pyg.training.inherited import with_architecture
from nbody_pyg.training.loggers import run_log
from nbody_pyg.training.prepare import (
    DataSets,
    build_potential,
    explicit,
    known_states,
    load_data,
    network_inputs,
    read_files,
    reference_mode,
)
from nbody_pyg.training.processes import is_first_process
from nbody_pyg.training.property_task import PropertyEvaluation, evaluate_properties
from nbody_pyg.training.run import FIT_FILES, FitResult, fit_in, require_device, require_elements
from nbody_pyg.training.settings import RESUMABLE, FineTuneConfig
from nbody_pyg.training.stream import shortest_in_units
from nbody_pyg.training.trainer import Callback, Trainer

# Largest structure that is stored in the model file as a sample, in atoms.
_LARGEST_SAMPLE = 1000


#: Files of a run. ``config.yaml`` is one of them if this command wrote it and nobody edited it.
_FILES = (
    *FIT_FILES,
    "model.nbody",
    "errors.json",
    "parity.png",
    "histogram.png",
    "curve.png",
    "split.json",
    "config.used.yaml",
)

# Settings that a resumed run may change: limits, paths of data (their contents are compared), and output.
_FREE = frozenset({f"training.{name}" for name in RESUMABLE} | {
    "data.root", "data.train", "data.val", "data.test", "data.num_test",
    "finetune.init", "finetune.replay", *(f"output.{field.name}" for field in dataclasses.fields(OutputConfig)),
})  # fmt: skip


def train(path: str | None, overrides: Sequence[str] = ()) -> int:
    """Run what the configuration file and the overrides describe; returns the exit status."""
    config = load_config(path, overrides)
    require_device(config.training)
    first = is_first_process(config.training)
    with contextlib.ExitStack() as stack:
        if not first:  # only the first process prints
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _train(config, stack.enter_context(RunFolder(config.output.folder, first)))


class KeptConfig(Callback):
    """Writes configuration and split when training begins, and the configuration into every checkpoint.

    If a checkpoint is rejected, the files of its run are unchanged. A ``config.yaml`` that this command did not write,
    or that was edited, is kept; ours is then ``config.used.yaml``.
    """

    def __init__(self, config: Config, split: Split | None, folder: Path):
        self.config, self.split, self.folder = config, split, folder

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.first:
            return
        text, path = self.config.text(), self.folder / "config.yaml"
        if path.exists() and _writer(path) is None:
            path = path.with_name("config.used.yaml")
        write_text(path, _headed(text, trainer.run["id"]))
        if self.split is not None:
            self.split.save(self.folder / "split.json")

    def on_save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config.to_dict()


_HEAD = re.compile(r"# Written by nbody train, run (\w*); sha256 of what follows: (\w{64})\n(.*)", re.DOTALL)


def _headed(text: str, run: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"# Written by nbody train, run {run}; sha256 of what follows: {digest}\n{text}"


def _writer(path: Path) -> str | None:
    """The run of a configuration file, if this command wrote it and it was not edited."""
    found = _HEAD.fullmatch(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return found[1] if found and hashlib.sha256(found[3].encode()).hexdigest() == found[2] else None


def _train(config: Config, run: RunFolder) -> int:
    torch.set_num_threads(config.training.threads)
    folder = run.path
    last, split, potential, names = None, None, None, None
    choices: tuple[Choice, ...] = ()
    if config.output.resume:
        last, split = _checkpoint(folder), _split(folder / "split.json")
        checkpoint = read_checkpoint(last)
        config = _same_init(config, checkpoint)
    init = None if config.finetune.init is None else load_model(config.finetune.init)
    heirs: Inheritance | None = None
    if init is not None:
        config = with_architecture(config, init)
    if last is not None:
        # With the numbers of neighbours, E0 and scale of the first run, even if frames were added since
        config, potential, names = _resumed(last, checkpoint, config)
        potential.ancestor = None if init is None else ancestor_of(init)
    explicit(config.model)  # finds wrong arguments of the network before the data are read
    data = load_data(config.data, split, names)
    print(label_audit(data.named(), _uses(config, data)), "\n")
    if potential is None:
        shipped = functools.cache(lambda: {name: load_potential(name) for name in shipped_models()})
        start = choose_init(config, data, shipped)
        if start is not None:
            init = shipped()[start.value]
            config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, init=start.value))
            config = with_architecture(config, init)
        config, choices = choose_defaults(config, data)
        choices = choices if start is None else (start, *choices)
        if init is None:
            potential = build_potential(config, data)
        else:
            given = config.finetune
            keep = given.keep_inputs or given.replay is not None or config.model.arguments.get("inputs") is not None
            shortest: dict[str, float] | None = {} if given.keep_elements or given.replay is not None else None
            if data.stream is not None and isinstance(init, Potential):
                shortest = shortest_in_units(data.stream)
            e0 = reference_mode(config.data)
            charges = config.model.arguments.get("long_range")
            tuned, heirs = tuned_model(init, data.train, e0, given.keep_elements, keep, shortest, charges)
            potential = known_states(tuned.to(getattr(torch, config.training.dtype)), data)
    require_elements(potential, data.named())
    _describe(potential, config, choices, heirs)
    shared, scheme = config.data.shares_hierarchy, required(potential.network.scheme)
    data = data.with_topology(scheme, shared)
    if data.stream is not None and config.finetune.replay is not None:
        raise ValueError("finetune.replay must be left out where data.train is read from HDF5 files; put them together")
    again = [] if init is None else [scheme(frame) for frame in _replayed(potential, init, config, len(data.train))]
    config = dataclasses.replace(config, model=_as_built(config.model, potential))
    files = _FILES if _writer(folder / "config.yaml") is None else (*_FILES, "config.yaml")
    logs = []
    if config.output.logger is not None:
        logs.append(run_log(config.output.logger, folder, config.to_dict(), config.training.log_every))
    result = fit_in(
        run, potential, _training_frames(data, again), data.val, config.training, last,
        callbacks=[KeptConfig(config, data.split, folder), *logs], files=files,
        finetune=None if init is None else config.finetune, sample=None if data.stream is None else data.train,
    )  # fmt: skip
    if not run.active:
        return 0  # only the first process tests, saves and reports
    if result.interrupted is not None:
        print(
            f"stopped by {signal_name(result.interrupted)} after step {result.steps}; continue with the same command "
            "and --output.resume true"
        )
        return 128 + result.interrupted
    if result.already_finished and _is_complete(folder / "model.nbody", result, config):
        print(f"model      {folder / 'model.nbody'}: unchanged")
        return 0
    _finish(potential, data, config, result, folder)
    return 0


def _same_init(config: Config, checkpoint: Mapping[str, Any]) -> Config:
    """The configuration of a resumed run with the model that was chosen for its start, if the user gives none."""
    stored = (checkpoint.get("config") or {}).get("finetune")
    if "finetune.init" not in config.given and stored is not None:
        return dataclasses.replace(config, finetune=FineTuneConfig(**stored))
    return config


#: Times as many frames are drawn from files as are replayed, because some have elements that the model lacks.
_SPARE = 20


def _training_frames(data: DataSets, again: Sequence[Data]) -> Sequence[Data] | UnitFiles:
    """The training frames behind those that are replayed."""
    if data.stream is not None:
        return data.stream
    return [*again, *data.train] if again else data.train


def _replayed(
    potential: Potential | PropertyModel, init: Potential | PropertyModel, config: Config, num_train: int
) -> list[Data]:
    """Frames of the first training, with energies that have the E0 of the new model."""
    given = config.finetune
    if given.replay is None:
        return []
    if not isinstance(potential, Potential) or not isinstance(init, Potential):
        raise ValueError("finetune.replay is for potentials, whose E0 is known; leave it out for properties")
    count, seed, files = given.replay_frames or num_train, config.training.seed, find_files(given.replay)
    frames: Sequence[Data]
    if are_units(files):
        frames = UnitFiles(unit_files(files)).sample(count=count * _SPARE, seed=seed)
    else:
        frames = read_files(given.replay, DataConfig(train=given.replay))
    out = replayed(potential, init, frames, count, seed)
    print(f"replay  {len(out)} of {len(frames)} frames of the first training, with the new E0\n")
    return out


def _split(path: Path) -> Split | None:
    """The split of an earlier run, or None."""
    try:
        return read_split(path) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to draw the split again from its seed") from error


def _resumed(
    last: Path, checkpoint: Mapping[str, Any], config: Config
) -> tuple[Config, Potential | PropertyModel, Sequence[str] | None]:
    """The configuration with the values chosen in the run of a checkpoint, its model with initial weights, and names of
    its HDF5 files, if it has any.

    Raises: ValueError: the configuration changes a setting that a resumed run must keep.
    """
    if _writer(last.with_name("config.yaml")) not in (None, checkpoint["run"]["id"]):
        raise ValueError(
            f"{last} belongs to another run than the other files of {last.parent}; resume it in a separate folder"
        )
    stored = checkpoint.get("config")
    if stored is None:
        raise ValueError(f"{last} was not written by nbody train; resume it with fit(resume=...)")
    stored = completed(stored)
    config = keep_choices(config, stored)
    given = dataclasses.replace(config, model=explicit(config.model)).to_dict()
    # If not given, they are computed from the frames of the first run.
    free = _FREE if config.model.arguments.get("avg_num_neighbors") else _FREE | {"model.avg_num_neighbors"}
    if words := changes(stored, given, free):
        raise ValueError(
            f"a resumed run must not change these settings: {words}; resume with the old values, or start a new run"
        )
    files = checkpoint["run"]["frames"]["train"].get("files")
    return config, potential_from_config(up_to_date(checkpoint["hyper_parameters"]["potential"])), files


def _as_built(config: ModelConfig, potential: Potential | PropertyModel) -> ModelConfig:
    """The section with all defaults and with the computed numbers of neighbours."""
    config = explicit(config)
    known = (potential.network.config() or {}).get("avg_num_neighbors")
    found = {"avg_num_neighbors": known} if known else {}
    return dataclasses.replace(config, arguments={**config.arguments, **found})


def _is_complete(path: Path, result: FitResult, config: Config) -> bool:
    """Whether a model file belongs to the finished run, with the requested weights and tests."""
    try:
        found = read_metadata(path)["metadata"]
        asked = found["config"]["output"]["weights"], found["config"]["data"]["test"]
    except (OSError, ValueError, KeyError):
        return False
    same = (found.get("run"), found.get("steps")) == (result.run, result.steps)
    return same and asked == (config.output.weights, config.data.test) and "errors" in found


def _uses(config: Config, data: DataSets) -> dict[str, str]:
    """How the network uses the charges and spins of the frames, for the table of labels."""
    states = frame_states(data.train)
    inputs = network_inputs(config.model, data.train)
    held = {
        key: "input" if key in inputs else "constant" if set(values) != {DEFAULT_STATE[key]} else "not used"
        for key, values in states.items()
    }
    if config.model.arguments.get("long_range") is not None and "charge" in held:
        held["charge"] = "input"
    charges = any(frame.get("charges") is not None for frame in data.train)
    return held | ({"charges": "input" if config.model.arguments.get("long_range") else "their sum"} if charges else {})


def _describe(
    potential: Potential | PropertyModel,
    config: Config,
    choices: Sequence[Choice] = (),
    heirs: Inheritance | None = None,
) -> None:
    for choice in choices:
        print(f"chosen  {choice}")
    for line in [] if heirs is None else heirs.lines():
        print(line)
    print(f"model   {potential.model!r}")
    if isinstance(potential, PropertyModel):
        for p in potential.properties:
            found = potential.statistics[p.name]
            print(f"target  {p.name}, {p.readout}; mean {found.mean:.5g}, scale {found.scale:.5g} {p.unit}".rstrip())
            _print_elements(found.elements or {}, p.unit)
        scale = ""
    else:
        _print_elements({} if potential.reference is None else potential.reference.energies, "eV", "E0", "none")
        scale = f"scale   {float(potential.scale):.4f}   "
    for key in sorted(potential.network.used):
        print(f"input   {key}{' (spin multiplicity 2S + 1)' if key == 'spin' else ''}")
    for key, value in potential.network.assumed.items():
        print(f"fixed   {key} {value:g}: the value of all training frames, and the only one that the model accepts")
    limits = {
        "CPU s": config.training.budget_seconds,
        "s of wall-clock time": config.training.wall_seconds,
        "epochs": config.training.max_epochs,
        "steps": config.training.max_steps,
    }
    until = " or ".join(f"{value:g} {name}" for name, value in limits.items() if value is not None)
    print(f"{scale}training until {until}")
    t = config.training
    if t.processes > 1:
        print(f"batch   {t.batch_size} x {t.processes} processes = {t.batch_size * t.processes} frames per step")
    elif int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        print(
            f"note: SLURM has {os.environ['SLURM_NTASKS']} tasks for this job, this run is one process; set "
            "training.processes to start more (start the command once, not with srun in every task)"
        )
    print(flush=True)


def _print_elements(
    values: Mapping[int, float], unit: str, title: str = "        of each", otherwise: str = ""
) -> None:
    text = ", ".join(f"{chemical_symbols[z]} {e:.4f}" for z, e in values.items()) or otherwise
    if text:
        print(f"{title:7s} {text} {unit}".rstrip())


def _checkpoint(folder: Path) -> Path:
    path = folder / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"output.resume is set, but there is no {path} to resume from")
    return path


def _finish(
    potential: Potential | PropertyModel, data: DataSets, config: Config, result: FitResult, folder: Path
) -> None:
    """Choose the weights, test them, and write model, errors and plot."""
    kept = _choose_weights(potential, data, config, result, folder)
    properties = potential.properties if isinstance(potential, PropertyModel) else ()
    record: dict[str, Any] = {
        "config": config.to_dict(),
        "run": result.run,
        "resumed": list(result.resumed),
        "steps": result.steps,
        "epochs": result.epochs,
        "cpu_seconds": round(result.cpu_seconds, 3),
        "weights": kept,
        "num_frames": {name: len(frames) for name, frames in data.named().items()}
        | ({} if data.stream is None else {"train": len(data.stream)}),
    }
    if config.data.shares_hierarchy:
        record["reference"] = reference_record(data.train[0])
    if len(data.train[0].z) <= _LARGEST_SAMPLE:
        record["sample"] = sample_of(data.train[0])  # `nbody check` tests the model on it
    save_model(potential, folder / "model.nbody", record)  # first, so that an error in the tests does not lose it
    sets = {**({"val": data.val} if len(data.val) else {}), **data.tests} or {"train": data.train}
    try:
        found = {name: _evaluate(potential, frames) for name, frames in sets.items()}
    except Exception:
        print(f"\nthe tests failed; the trained model is in {folder / 'model.nbody'}", file=sys.stderr)
        raise
    errors = {name: evaluation.errors for name, evaluation in found.items()}
    print(
        f"\n{result.steps} steps, {result.epochs} epochs, {result.cpu_seconds:.1f} CPU s "
        f"({1000 * result.cpu_seconds / max(result.steps, 1):.1f} ms per step); weights: {kept}\n"
    )
    totals = {("", name): values for name, values in errors.items()}
    print(error_table(totals, properties), "\n")
    energies = {name: (sets[name], one) for name, one in found.items() if isinstance(one, Evaluation)}
    for text in (element_table(totals), report({name: energies[name] for name in data.tests or energies if energies})):
        if text:
            print(text, "\n")
    record["errors"] = errors
    record["errors_unit"] = {p.name: p.unit for p in properties} or "meV and meV/angstrom"
    save_model(potential, folder / "model.nbody", record)
    write_json(folder / "errors.json", errors)
    print(f"model      {folder / 'model.nbody'}\nlog        {folder / 'metrics.csv'}")
    if config.output.plot:
        learning_curve(folder / "metrics.csv", folder / "curve.png")
        print(f"curve      {folder / 'curve.png'}")
        _plot(potential, sets, found, data, folder)


def _evaluate(potential: Potential | PropertyModel, frames: Sequence[Data]) -> Evaluation | PropertyEvaluation:
    if isinstance(potential, PropertyModel):
        return evaluate_properties(potential, frames)
    # Forces cost as much as energies: skip them for frames without force labels.
    return evaluate(potential, frames, compute_forces=any("forces" in frame for frame in frames))


def _plot(
    potential: Potential | PropertyModel,
    sets: Mapping[str, Sequence[Data]],
    found: Mapping[str, Evaluation | PropertyEvaluation],
    data: DataSets,
    folder: Path,
) -> None:
    names = list(data.tests) or list(sets)
    results: dict[str, Any] = {name: (sets[name], found[name]) for name in names if found[name].errors}
    if not results:
        return  # no labels to compare with
    if isinstance(potential, PropertyModel):
        property_plot(results, potential.properties, folder / "parity.png")
    else:
        parity_plot(results, folder / "parity.png")
        error_plot(results, folder / "histogram.png")
        print(f"histogram  {folder / 'histogram.png'}")
    print(f"parity     {folder / 'parity.png'}")


def _choose_weights(
    potential: Potential | PropertyModel, data: DataSets, config: Config, result: FitResult, folder: Path
) -> str:
    """Keep the last weights, or load those of best.ckpt if their validation error is smaller."""
    best = folder / "best.ckpt"
    if config.output.weights == "last" or not len(data.val) or result.best_step < 0 or not best.is_file():
        return f"last (step {result.steps})"
    now = _evaluate(potential, data.val).errors.get(result.monitor, float("inf"))
    if now <= result.best_score:
        return f"last (step {result.steps})"
    try:
        checkpoint = read_checkpoint(best)
    except ValueError as error:
        print(f"\n{error}")
        return f"last (step {result.steps}); best.ckpt cannot be read"
    if checkpoint.get("run", {}).get("id") != result.run or checkpoint["global_step"] != result.best_step:
        return f"last (step {result.steps}); best.ckpt belongs to another run"
    state = checkpoint["state_dict"]
    prefix = "potential."
    potential.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return f"best of validation (step {result.best_step})"
