"""nbody evaluate: errors, parity plots and predictions of one or several models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.stress import full_3x3_to_voigt_6_stress
from torch_geometric.data import Data

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.cli.arguments import require_device
from nbody_pyg.cli.outputs import output_folder
from nbody_pyg.cli.plots import error_plot, parity_plot
from nbody_pyg.cli.tables import element_table, error_table, report
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import label_audit, load_embedded, read_frames
from nbody_pyg.datasets.frames import Frames, has_label
from nbody_pyg.datasets.keys import levels_apart, named_keys
from nbody_pyg.datasets.readers import frames_of, without_labels
from nbody_pyg.datasets.systems import named_units, read_systems
from nbody_pyg.datasets.units import SUFFIXES
from nbody_pyg.deploy import load_model, read_metadata, with_reference
from nbody_pyg.network import frame_states
from nbody_pyg.potential import Potential
from nbody_pyg.properties import Property, PropertyModel
from nbody_pyg.required import required
from nbody_pyg.training.evaluation import Evaluation
from nbody_pyg.training.evaluation import evaluate as predict
from nbody_pyg.training.property_task import PropertyEvaluation, evaluate_properties
from nbody_pyg.training.report import errors_by_kind, frame_errors

_LEFT_OUT = 3  # the exit status
Found = TypeVar("Found", Evaluation, PropertyEvaluation)


@dataclass
class EvaluationSet:
    """The frames of a file that could be read; ``odd`` maps the numbers of the others to their errors."""

    frames: Frames
    total: int
    systems: list[Atoms] | None = None
    odd: dict[int, str] = field(default_factory=dict)


@dataclass
class Result:
    """Predictions of a model for ``frames``; ``odd`` maps the numbers of the other frames to their errors."""

    frames: Frames
    found: Evaluation | PropertyEvaluation
    odd: dict[int, str]


def evaluate(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    require_device(args.device)
    models = [args.model, *(path for path in args.data if path.endswith(".nbody"))]
    paths = [path for path in args.data if not path.endswith(".nbody")]
    if not paths:
        raise ValueError("no data: name at least one file of frames after the model files")
    names = ("errors.json", "*parity.png", "*histogram.png", "*predictions.*")
    default = str(Path(args.model).parent / "evaluate")
    folder = output_folder(args.out, default, args.overwrite, [args.model, *args.data], names)
    titles, labels = distinct_names(paths), distinct_names(models)
    for path in models if len(models) > 1 else ():
        if read_metadata(path).get("property") is not None:
            raise ValueError(f"{path} holds a model of properties; evaluate it by itself, not beside others")
    sets = {titles[path]: _read(path, args) for path in paths}
    frames = {title: data.frames for title, data in sets.items()}
    print(label_audit(frames, _uses(models, frames)))
    if wrong := levels_apart({title: data.frames.sources for title, data in sets.items()}):
        print(f"note: {wrong}")
    print()
    folder.mkdir(parents=True, exist_ok=True)
    files = OutputFiles(folder, [*paths, *models])
    record, errors, left_out, reports = [], {}, 0, []
    properties: Sequence[Property] = ()
    for path in models:
        potential = load_model(path, device=args.device)
        if isinstance(potential, PropertyModel):
            properties = potential.properties
        title = "" if len(models) == 1 else labels[path]
        results = {name: _evaluate(potential, data, path, args) for name, data in sets.items()}
        for name, result in results.items():
            _tell(name, sets[name], result, title)
            left_out += len(result.odd)
            errors[labels[path], name] = result.found.errors
            found = result.found
            ending = "npz" if isinstance(found, PropertyEvaluation) else "xyz"
            with files.open(title, name, f"predictions.{ending}") as temporary:
                if isinstance(found, PropertyEvaluation):
                    _write_arrays(sets[name], result.frames, found, temporary)
                else:
                    _write_systems(sets[name], result, found, temporary)
            record.append({
                "model": labels[path], "set": name, "frames": len(result.frames), "left_out": sorted(result.odd),
                "predictions": files.written[-1], **_details(result), **result.found.errors,
            })  # fmt: skip
        known = {name: result for name, result in results.items() if _known(result)}
        labelled = {name: (r.frames, r.found) for name, r in known.items() if isinstance(r.found, Evaluation)}
        if labelled and not args.no_plot:
            with files.open(title, "parity.png") as temporary:
                parity_plot(labelled, temporary, title)
            with files.open(title, "histogram.png") as temporary:
                error_plot(labelled, temporary, title)
        if labelled and (text := report(labelled)):
            reports.append(f"{title}\n{text}" if title else text)
    if any(errors.values()):
        print("\n\n".join(filter(None, [error_table(errors, properties), element_table(errors), *reports])), "\n")
    elif properties:
        print(f"the frames carry none of the labels {[p.name for p in properties]}: predictions only\n")
    else:
        print("the frames carry no labels: predictions only\n")
    with files.open("errors.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {folder}: {', '.join(sorted(files.written))}")
    return _LEFT_OUT if left_out else 0


def _known(result: Result) -> bool:
    return "energy_mae" in result.found.errors or "forces_mae" in result.found.errors


def _details(result: Result) -> dict[str, Any]:
    """Errors by ``config_type``, and of the ten frames with the largest."""
    if not isinstance(result.found, Evaluation):
        return {}
    kinds = errors_by_kind(result.frames, result.found)
    worst = [dataclasses.asdict(one) for one in frame_errors(result.frames, result.found)[:10]]
    return ({"config_type": kinds} if kinds else {}) | ({"largest": worst} if worst else {})


def _tell(name: str, data: EvaluationSet, result: Result, model: str) -> None:
    """Report every frame that was left out, with its reason."""
    for number, reason in sorted(result.odd.items()):
        where = "" if reason.startswith("frame ") else f"frame {number} of {Path(data.frames.name).name or name}: "
        print(f"left out{f' for {model}' if model else ''}: {where}{reason}", file=sys.stderr)
    if result.odd:
        print(f"{name}: errors over {len(result.frames)} of {data.total} frames", file=sys.stderr)


def _uses(models: Sequence[str], sets: Mapping[str, Sequence[Data]]) -> dict[str, str]:
    """How the models use the charges and spins of the frames."""
    told = {key for frames in sets.values() for key in frame_states(frames)}
    configs = [read_metadata(path)["model"].get("config") or {} for path in models]
    taken = [{*(c.get("inputs") or ()), *(["charge"] if c.get("long_range") else [])} for c in configs]
    words = {0: "not used", len(models): "input"}
    return {key: words.get(sum(key in used for used in taken), "input of some") for key in sorted(told)}


# -- reading -------------------------------------------------------------------------------------------------
def _is_embedded(path: str) -> bool:
    return ":" in path and not Path(path).exists()


def _read(path: str, args: argparse.Namespace) -> EvaluationSet:
    """An embedded set "molecule:split", or a file."""
    keys = named_keys(args.keys, energy_key=args.energy_key, forces_key=args.forces_key, stress_key=args.stress_key)
    if _is_embedded(path) or path.endswith((".npz", *SUFFIXES)):
        if _is_embedded(path):
            frames = load_embedded(*path.split(":", 1))
        else:
            frames = read_frames(path, units=args.units, keys=keys)
        # By their places: those of an HDF5 file know their numbers in the files that it was made from
        return EvaluationSet(frames.replaced(frames, numbers=range(len(frames))), len(frames))
    systems, metadata = read_systems(path)
    frames, odd = frames_of(systems, path, keys, args.units or named_units(metadata, path))
    if not frames:
        raise ValueError(odd[0])
    return EvaluationSet(frames, len(systems), systems, odd)


def _evaluate(potential: Potential | PropertyModel, data: EvaluationSet, path: str, args: argparse.Namespace) -> Result:
    """Predictions for all frames that the model accepts."""

    def run(frames: Frames) -> Evaluation | PropertyEvaluation:
        frames = frames.replaced(with_reference(frames, path, potential.scheme))
        if isinstance(potential, PropertyModel):
            return evaluate_properties(potential, frames, args.batch_size, args.device)
        return predict(potential, frames, args.batch_size, args.device)

    frames, found, odd = _without_odd(data.frames, run)
    return Result(frames, found, data.odd | odd)


def _without_odd(frames: Frames, run: Callable[[Frames], Any]) -> tuple[Frames, Any, dict[int, str]]:
    """Result of ``run`` for the frames that it accepts, and the errors of the others."""
    try:
        return frames, run(frames), {}
    except ValueError as error:
        whole = error
    odd: dict[int, str] = {}
    good = []
    for place, number in enumerate(frames.numbers):
        try:
            run(frames.select([place]))
            good.append(place)
        except ValueError as error:
            odd[number] = str(error).removeprefix(f"frame 0 of {frames.name or 'frames'}: ")  # 0 of one frame
    if not good or not odd:  # all frames fail, or none alone: the error does not belong to single frames
        raise whole
    chosen = frames.select(good)
    return chosen, run(chosen), odd


# -- names ---------------------------------------------------------------------------------------------------
def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """A short name for each path: the file name without suffix, with as many parent folders as make it unique.

    Raises: ValueError: a file is given twice.
    """
    whole = {path: path if _is_embedded(path) else os.path.normpath(os.path.abspath(path)) for path in paths}
    for number, path in enumerate(paths):
        if whole[path] in [whole[other] for other in paths[:number]]:
            raise ValueError(f"{path} is given twice; give each file once")
    forms = {path: _forms(path, whole[path]) for path in paths}
    names = {path: forms[path][0] for path in paths}
    for step in range(1, max(map(len, forms.values()))):
        taken = list(names.values())
        for path, name in names.items():
            if taken.count(name) > 1:
                names[path] = forms[path][min(step, len(forms[path]) - 1)]
    return names


def _forms(path: str, whole: str) -> list[str]:
    """Names of a file, from short to long: a, a.xyz, folder/a, folder/a.xyz, ..."""
    if _is_embedded(path):
        return [path]
    parts = Path(whole).parts[1:]
    ends = [(*parts[-n:-1], end) for n in range(1, len(parts) + 1) for end in (Path(whole).stem, parts[-1])]
    return ["/".join(end) for end in ends]


class OutputFiles:
    """The files that a command writes into its folder: atomically, under distinct names, never over an input."""

    def __init__(self, folder: Path, inputs: Sequence[str]) -> None:
        self.folder = folder
        self.written: list[str] = []
        self._inputs = {os.path.realpath(path) for path in inputs}

    def open(self, *words: str) -> Any:
        """Context manager of a file named after the words; it appears when the context ends.

        Raises: ValueError: it would replace an input of this command.
        """
        # A name must not lead into another folder.
        plain = "_".join(re.sub(r"[^\w.@+=,-]+", "_", word) for word in words if word).lstrip(".")
        stem, ending = plain.rsplit(".", 1)
        name, number = plain, 1
        while name.lower() in (other.lower() for other in self.written):
            number += 1
            name = f"{stem}_{number}.{ending}"
        path = self.folder / name
        if os.path.realpath(path) in self._inputs:
            raise ValueError(
                f"{path} is an input of this command and would be replaced; choose another folder with --out"
            )
        self.written.append(name)
        return atomic_write(path)


# -- predictions ---------------------------------------------------------------------------------------------
def _write_arrays(data: EvaluationSet, frames: Frames, found: PropertyEvaluation, path: Path) -> None:
    """An array of each property with one row per frame of the file; NaN for frames that were left out."""
    rows = list(frames.numbers)
    arrays: dict[str, Any] = {}
    for key, value in found.values.items():
        arrays[key] = np.full((data.total, *value.shape[1:]), np.nan)
        arrays[key][rows] = value.numpy()
    with path.open("wb") as file:  # numpy would append a suffix to a path
        np.savez(file, **arrays)


def _write_systems(data: EvaluationSet, result: Result, found: Evaluation, path: Path) -> None:
    """Extended xyz of every frame of the file, in its order, with all its other data.

    Predictions are the results energy, forces and stress; labels are REF_energy, REF_forces and REF_stress. A frame
    that was left out has no results; ``left_out`` holds the reason.
    """
    place_of = {number: place for place, number in enumerate(result.frames.numbers)}
    frame_of = dict(zip(data.frames.numbers, data.frames, strict=True))
    out = []
    for number in range(data.total):
        frame = frame_of.get(number)
        atoms = _system(data.systems[number] if data.systems else None, frame)
        for label in ("energy", "forces", "stress"):
            if frame is not None and has_label(frame, label):
                value = frame[label].detach().cpu().double().numpy()
                store: dict[str, Any] = atoms.arrays if label == "forces" else atoms.info
                store[f"REF_{label}"] = float(value[0]) if label == "energy" else value.reshape(-1, 3)
        place = place_of.get(number)
        if place is None:
            atoms.info["left_out"] = result.odd.get(number, "")
        else:
            results: dict[str, Any] = {"energy": float(found.energy[place]), "forces": found.forces[place].numpy()}
            if found.stress is not None and bool(found.stress[place].isfinite().all()):
                results["stress"] = full_3x3_to_voigt_6_stress(found.stress[place].numpy())
            atoms.calc = SinglePointCalculator(atoms, **results)
        out.append(atoms)
    write(path, out, format="extxyz")


def _system(given: Atoms | None, frame: AtomicData | None) -> Atoms:
    """The system of the file without its labels, in our units; or one made from the frame."""
    if given is None:
        inputs = ("z", "pos", "cell", "pbc", "charge", "charges", "spin")
        known = {key: value for key, value in required(frame).to_dict().items() if key in inputs}
        made: Atoms = AtomicData(**known).to_ase()
        return made
    atoms = without_labels(given)
    if frame is not None:
        atoms.arrays["positions"] = frame.pos.double().numpy()
        if frame.get("cell") is not None:
            atoms.cell = frame.cell.reshape(3, 3).double().numpy()
    return atoms
