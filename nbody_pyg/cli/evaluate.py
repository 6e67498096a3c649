"""nbody evaluate: errors of one or several models, parity plots and predictions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch_geometric.data import Data

from nbody_pyg.cli.plots import parity_plot
from nbody_pyg.cli.tables import error_table
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import embedded, label_audit, read_frames
from nbody_pyg.deploy import load_model, read_metadata, with_reference
from nbody_pyg.potential import frame_states
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.evaluation import Evaluation
from nbody_pyg.training.evaluation import evaluate as predict
from nbody_pyg.training.property_task import evaluate_properties


def evaluate(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    models = [args.model, *(path for path in args.data if path.endswith(".nbody"))]
    sets = {_name(p): _frames(p, args) for p in args.data if not p.endswith(".nbody")}
    if not sets:
        raise ValueError("no data: name at least one file of frames after the model files")
    print(label_audit(sets, _uses(models, sets)), "\n")
    folder = Path(args.out) if args.out else Path(args.model).parent / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    labels = _distinct(models)
    errors = {}
    for path in models:
        potential = load_model(path, device=args.device)
        scheme = getattr(potential.model, "scheme", None)
        if isinstance(potential, PropertyModel):
            if len(models) > 1:
                raise ValueError(f"{path} holds a model of properties; evaluate it by itself, not beside others")
            return _evaluate_properties(potential, sets, folder, args)
        found = {
            name: predict(potential, with_reference(frames, path, scheme), args.batch_size, args.device)
            for name, frames in sets.items()
        }
        errors |= {(labels[path], name): evaluation.errors for name, evaluation in found.items()}
        stem = "" if len(models) == 1 else f"{labels[path].replace('/', '_')}_"
        for name, evaluation in found.items():
            _write(sets[name], evaluation, folder / f"{stem}{name.replace(':', '_')}_predictions.xyz")
        labelled = {n: (sets[n], found[n]) for n in found if _has_labels(found[n])}
        if labelled and not args.no_plot:
            parity_plot(labelled, folder / f"{stem}parity.png", labels[path] if stem else "")
    if any(errors.values()):
        print(error_table(errors), "\n")
    else:
        print("the frames carry no labels: predictions only\n")
    record = [{"model": model, "set": name, **found} for (model, name), found in errors.items()]
    (folder / "errors.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return 0


def _evaluate_properties(model: PropertyModel, sets: dict, folder: Path, args: argparse.Namespace) -> int:
    """Table and predictions (npz, one array per property) of a model that is no potential."""
    errors = {}
    for name, frames in sets.items():
        found = evaluate_properties(model, frames, args.batch_size, args.device)
        errors["", name] = found.errors
        values = {key: value.numpy() for key, value in found.values.items()}
        np.savez(folder / f"{name.replace(':', '_')}_predictions.npz", **values)
    if any(errors.values()):
        print(error_table(errors, model.properties), "\n")
    else:
        print(f"the frames carry none of the labels {[p.name for p in model.properties]}: predictions only\n")
    (folder / "errors.json").write_text(json.dumps([{"set": n, **e} for (_, n), e in errors.items()], indent=1) + "\n")
    print(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return 0


def _uses(models: Sequence[str], sets: dict[str, Sequence[Data]]) -> dict[str, str]:
    """What the models do with the charges and spins that the frames have; none where they have none."""
    told = {key for frames in sets.values() for key in frame_states(frames)}
    configs = [read_metadata(path)["model"].get("config") or {} for path in models]
    taken = [{*(c.get("inputs") or ()), *(["charge"] if c.get("long_range") else [])} for c in configs]
    words = {0: "not used", len(models): "input"}
    return {key: words.get(sum(key in used for used in taken), "input of some") for key in sorted(told)}


def _has_labels(evaluation: Evaluation) -> bool:
    return "energy_mae" in evaluation.errors or "forces_mae" in evaluation.errors


def _frames(path: str, args: argparse.Namespace) -> Sequence[Data]:
    """An embedded set "molecule:split", or a file."""
    if ":" in path and not Path(path).exists():
        return embedded(*path.split(":", 1))
    return read_frames(path, energy_key=args.energy_key, forces_key=args.forces_key, units=args.units)


def _name(path: str) -> str:
    return path if ":" in path and not Path(path).exists() else Path(path).stem


def _distinct(paths: Sequence[str]) -> dict[str, str]:
    """Short names: the file, or the folder too where files share a name."""
    stems = [Path(p).stem for p in paths]
    if len(set(stems)) == len(stems):
        return dict(zip(paths, stems, strict=True))
    return {path: f"{Path(path).parent.name}/{Path(path).stem}" for path in paths}


def _write(frames: Sequence[Data], found: Evaluation, path: Path) -> None:
    """Extended xyz: predictions as energy and forces, labels as REF_energy and REF_forces."""
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    out = []
    for number, frame in enumerate(frames):
        keys = ("z", "pos", "cell", "pbc", "charge", "charges", "spin")
        atoms = AtomicData(**{key: frame.get(key) for key in keys}).to_ase()
        results = {"energy": float(found.energy[number]), "forces": found.forces[number].numpy()}
        if found.stress is not None:
            results["stress"] = found.stress[number].numpy().reshape(9)[[0, 4, 8, 5, 2, 1]]
        atoms.calc = SinglePointCalculator(atoms, **results)
        if frame.get("energy") is not None:
            atoms.info["REF_energy"] = float(frame.energy)
        if frame.get("forces") is not None:
            atoms.arrays["REF_forces"] = frame.forces.numpy()
        out.append(atoms)
    write(path, out, format="extxyz")
