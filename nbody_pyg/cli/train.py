"""nbody train: data, label audit, training, test, model file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from lightning.pytorch import Callback, LightningModule, Trainer
from torch_geometric.data import Data

from nbody_pyg.cli.frames import sample_of
from nbody_pyg.cli.plots import parity_plot, property_plot
from nbody_pyg.cli.tables import error_table
from nbody_pyg.datasets import label_audit
from nbody_pyg.deploy import save_model
from nbody_pyg.nn.charges import DEFAULT_STATE
from nbody_pyg.potential import Potential, frame_states
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training import FitResult, fit
from nbody_pyg.training.config import Config, config_parser, load_config
from nbody_pyg.training.evaluation import Evaluation, evaluate
from nbody_pyg.training.prepare import DataSets, build_potential, explicit, load_data, network_inputs
from nbody_pyg.training.property_task import PropertyEvaluation, evaluate_properties

# Atoms of a structure that is kept in the model file, as text.
_LARGEST_SAMPLE = 1000


def train(path: str | None, overrides: Sequence[str] = (), wants_help: bool = False) -> int:
    """Run what the configuration file and the overrides describe; returns the exit status."""
    if wants_help:
        config_parser().print_help()
        return 0
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # one process of several speaks
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _train(load_config(path, overrides))


class KeptConfig(Callback):
    """Writes the configuration when training begins: a checkpoint that is refused leaves that of its run as it was."""

    def __init__(self, config: Config, path: Path):
        self.config, self.path = config, path

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.config.save(self.path)


def _train(config: Config) -> int:
    torch.set_num_threads(config.training.threads)
    folder = Path(config.output.folder)
    data = load_data(config.data)
    print(label_audit(data.named(), _uses(config, data)), "\n")
    potential = build_potential(config, data)
    _describe(potential, config)
    shared = config.data.shares_hierarchy
    data = data.with_topology(potential.model.scheme, shared)
    resume = _checkpoint(folder) if config.output.resume else None
    if resume is None and (folder / "model.nbody").exists():
        print(f"replacing the earlier run in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = KeptConfig(dataclasses.replace(config, model=explicit(config.model)), folder / "config.yaml")
    result = fit(potential, data.train, data.val, config.training, folder, resume, callbacks=[kept])
    if result.interrupted is not None:
        print(
            f"stopped by signal {result.interrupted} after step {result.steps}; go on with the same command "
            "and --output.resume true"
        )
        return 128 + result.interrupted
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return 0  # the first process tests and saves
    _finish(potential, data, config, result, folder)
    return 0


def _uses(config: Config, data: DataSets) -> dict[str, str]:
    """What the network does with charges and spins, for the table of labels; none where there are no such labels."""
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


def _describe(potential: Potential | PropertyModel, config: Config) -> None:
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
    for key in sorted(getattr(potential.model, "used", ())):
        print(f"input   {key}{' (spin multiplicity 2S + 1)' if key == 'spin' else ''}")
    for key, value in potential.model.assumed.items():
        print(f"fixed   {key} {value:g}: that of all training frames, and the only one that the model knows")
    limits = {
        "CPU s": config.training.budget_seconds,
        "epochs": config.training.max_epochs,
        "steps": config.training.max_steps,
    }
    until = " or ".join(f"{value:g} {name}" for name, value in limits.items() if value is not None)
    print(f"{scale}training until {until}\n", flush=True)


def _print_elements(values: dict[int, float], unit: str, title: str = "        of each", otherwise: str = "") -> None:
    text = ", ".join(f"{chemical_symbols[z]} {e:.4f}" for z, e in values.items()) or otherwise
    if text:
        print(f"{title:7s} {text} {unit}".rstrip())


def _checkpoint(folder: Path) -> Path:
    path = folder / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"output.resume is set, but there is no {path} to go on from")
    return path


def _finish(
    potential: Potential | PropertyModel, data: DataSets, config: Config, result: FitResult, folder: Path
) -> None:
    """Choose the weights, test them, and write model, errors and plot."""
    kept = _choose_weights(potential, data, config, result, folder)
    sets = {**({"val": data.val} if len(data.val) else {}), **data.tests} or {"train": data.train}
    found = {name: _evaluate(potential, frames) for name, frames in sets.items()}
    errors = {name: evaluation.errors for name, evaluation in found.items()}
    print(
        f"\n{result.steps} steps, {result.epochs} epochs, {result.cpu_seconds:.1f} CPU s "
        f"({1000 * result.cpu_seconds / max(result.steps, 1):.1f} ms per step); weights: {kept}\n"
    )
    properties = potential.properties if isinstance(potential, PropertyModel) else ()
    print(error_table({("", name): values for name, values in errors.items()}, properties), "\n")
    record: dict[str, Any] = {
        "config": config.to_dict(),
        "steps": result.steps,
        "epochs": result.epochs,
        "cpu_seconds": round(result.cpu_seconds, 3),
        "weights": kept,
        "num_frames": {name: len(frames) for name, frames in data.named().items()},
        "errors": errors,
        "errors_unit": {p.name: p.unit for p in properties} or "meV and meV/angstrom",
    }
    if config.data.shares_hierarchy:
        record["reference"] = {"z": data.train[0].z.tolist(), "pos": data.train[0].pos.tolist()}
    if len(data.train[0].z) <= _LARGEST_SAMPLE:
        record["sample"] = sample_of(data.train[0])  # on which `nbody check` can test the model
    save_model(potential, folder / "model.nbody", record)
    (folder / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")
    print(f"model      {folder / 'model.nbody'}\nlog        {folder / 'metrics.csv'}")
    if config.output.plot:
        _plot(potential, sets, found, data, folder)


def _evaluate(potential: Potential | PropertyModel, frames: Sequence[Data]) -> Evaluation | PropertyEvaluation:
    if isinstance(potential, PropertyModel):
        return evaluate_properties(potential, frames)
    # Forces cost as much again as energies: not for thousands of molecules without a label for them.
    return evaluate(potential, frames, compute_forces=any("forces" in frame for frame in frames))


def _plot(potential: Potential | PropertyModel, sets: dict, found: dict, data: DataSets, folder: Path) -> None:
    names = list(data.tests) or list(sets)
    results = {name: (sets[name], found[name]) for name in names}
    if isinstance(potential, PropertyModel):
        property_plot(results, potential.properties, folder / "parity.png")
    else:
        parity_plot(results, folder / "parity.png")
    print(f"parity     {folder / 'parity.png'}")


def _choose_weights(
    potential: Potential | PropertyModel, data: DataSets, config: Config, result: FitResult, folder: Path
) -> str:
    """Leave the last weights in place, or those of best.ckpt where their validation error is smaller."""
    best = folder / "best.ckpt"
    if config.output.weights == "last" or not len(data.val) or result.best_step < 0 or not best.is_file():
        return f"last (step {result.steps})"
    now = _evaluate(potential, data.val).errors.get(result.monitor, float("inf"))
    if now <= result.best_score:
        return f"last (step {result.steps})"
    state = torch.load(best, weights_only=True)["state_dict"]
    prefix = "potential."
    potential.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return f"best of validation (step {result.best_step})"
