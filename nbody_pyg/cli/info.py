"""nbody info: contents of a model file, and the backends of this machine."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import textwrap
from typing import Any

import torch
from ase.data import chemical_symbols

from nbody_pyg.cli.tables import error_table, table
from nbody_pyg.deploy import cg_fingerprint, load_model, read_metadata
from nbody_pyg.io.model_file import SEALED
from nbody_pyg.kernels import available_backends, build
from nbody_pyg.kernels.backend import backend
from nbody_pyg.messages import printable
from nbody_pyg.native import why_not, why_not_here
from nbody_pyg.properties import Property


def info(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.model is None:
        rows = dict(_machine())
        print(json.dumps(rows, indent=1) if args.json else table(["", "this machine"], list(rows.items())))
        return 0
    header = read_metadata(args.model)
    if args.json:
        print(json.dumps(header, indent=1))
        return 0
    try:
        _show(args.model, _shown(header))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{args.model} holds entries in a form that this version does not know; see --json") from error
    return 0


def _show(path: str, header: dict[str, Any]) -> None:
    model, record = header["model"], header["metadata"]
    config = dict(model["config"] or {})
    scheme = dict(config.pop("scheme", None) or {})
    species = header["species"] or []
    matches = header["cg_fingerprint"] == cg_fingerprint()
    covered = "all of it" if header["format_version"] >= SEALED else "the weights, not the settings"
    rows = [
        ("model", model["class"]),
        ("parameters", f"{header['num_parameters']:,}, all finite"),
        ("dtype", header["dtype"]),
        ("elements", " ".join(chemical_symbols[z] for z in species)),
        *_scales(header),
        *_ancestors(record.get("ancestor")),
        *[(f"fixed {key}", f"{value:g}") for key, value in (model.get("assumed") or {}).items()],
        ("repulsion", _repulsion(header.get("repulsion"))),
        ("format version", header["format_version"]),
        ("checksum", f"{header['sha256'][:16]} (matches; it covers {covered})"),
        ("written with", ", ".join(f"{name} {version}" for name, version in header["versions"].items())),
        ("units", ", ".join(f"{name} {unit}" for name, unit in header["units"].items())),
        ("CG fingerprint", f"{header['cg_fingerprint'][:16]} ({'same' if matches else 'DIFFERENT'} here)"),
        *((f"{name} here", value) for name, value in _machine() if name != "engine"),
        ("engine here", _engine(path)),
    ]
    rows += [("scheme", scheme.pop("name", ""))] if scheme else []
    rows += [(f"scheme.{key}", _short(value)) for key, value in scheme.items()]
    rows += [(key, _short(value)) for key, value in config.items() if key != "species"]
    for key in ("steps", "epochs", "cpu_seconds", "weights", "num_frames"):
        if key in record:
            rows.append((key.replace("_", " "), _short(record[key])))
    print(table(["", path], [line for key, value in rows for line in _folded(key, str(value))]))
    if header["e0"]:
        print("\nE0, eV")
        print(
            table(
                ["element", "energy"],
                [(chemical_symbols[int(z)], f"{e:.6f}") for z, e in header["e0"].items()],
            )
        )
    if record.get("errors"):
        print("\nerrors after training")
        properties = [Property(**p) for p in (header.get("property") or {}).get("properties", [])]
        print(error_table({("", name): values for name, values in record["errors"].items()}, properties))


def _shown(value: Any) -> Any:
    """The same with control characters in texts escaped."""
    if isinstance(value, dict):
        return {printable(key): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def _folded(key: str, value: str) -> list[tuple[str, str]]:
    """Rows of one entry: a long value takes several lines."""
    lines = textwrap.wrap(value, 100, break_long_words=False, break_on_hyphens=False) or [""]
    return [(key, lines[0]), *(("", line) for line in lines[1:])]


def _scales(header: dict[str, Any]) -> list[tuple[str, str]]:
    """The scale of a potential, or the statistics of each property."""
    described = header.get("property")
    if described is None:
        return [("scale", f"{header['scale']:.6g}")]
    rows = []
    for p in described["properties"]:
        known = described["statistics"][p["name"]]
        text = f"{p['readout']}, {p['unit'] or 'no unit'}; mean {known['mean']:.6g}, scale {known['scale']:.6g}"
        rows.append((f"target {p['name']}", text))
    return rows


def _ancestors(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The models that the training started from, the nearest one first."""
    rows = []
    while found:
        rows.append(("ancestor", f"{found['name']}, checksum {found['sha256'][:16]}"))
        found = found.get("ancestor")
    return rows


def _repulsion(described: dict[str, Any] | None) -> str:
    if described is None:
        return "none"
    return f"{described['name']}, below {', '.join(f'{k} {v:.2f}' for k, v in described['reach'].items())} angstrom"


def _engine(path: str) -> str:
    """What evaluates this model in ASE and in ``nbody md`` on the CPU."""
    try:
        reason = why_not(load_model(path))
    except (ValueError, TypeError) as error:  # a network of another package, or of an older version
        reason = str(error)
    reason = reason or why_not_here()
    return "native" if reason is None else f"torch ({printable(' '.join(reason.split()))})"


def _machine() -> list[tuple[str, str]]:
    """The backend that runs on this machine, its compiler, threads and cache."""
    problem, found = build.broken(), build.compiler()
    runs = backend() if problem is None else "torch (several times slower than c)"
    if torch.cuda.is_available():
        runs += f"; on the GPU {backend(torch.empty(0, device='cuda'))}"
    try:
        folder = build.own_cache()
        cache = f"{folder} ({'used' if os.access(folder, os.W_OK) else 'not writable, so nothing is cached'})"
    except (RuntimeError, OSError) as error:
        cache = f"not used, so every process compiles again: {error}"
    rows = [
        ("products", runs),
        ("engine", "torch" if why_not_here() else "native, for energies on NestedShells; else torch"),
        ("backends", " ".join(available_backends())),
        ("compiler", "none" if found is None else shlex.join(found)),
        ("threads", _threads(problem)),
        ("cache", cache),
    ]
    return rows if problem is None else [*rows, ("problem", printable(" ".join(problem.split())))]


def _threads(problem: str | None) -> str:
    """Threads of the compiled products."""
    if problem is None and (reason := build.no_threads()):
        return f"1: the compiler has no OpenMP ({printable(' '.join(reason.split()))})"
    return str(torch.get_num_threads())


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
