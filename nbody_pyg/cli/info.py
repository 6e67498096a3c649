"""nbody info: the contents of a model file."""

from __future__ import annotations

import argparse
import json

import torch
from ase.data import chemical_symbols

from nbody_pyg.cli.tables import error_table, table
from nbody_pyg.deploy import cg_fingerprint, read_metadata
from nbody_pyg.kernels.backend import backend
from nbody_pyg.kernels.build import cache_folder, compiler
from nbody_pyg.properties import Property


def info(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    header = read_metadata(args.model)
    if args.json:
        print(json.dumps(header, indent=1))
        return 0
    model, record = header["model"], header["metadata"]
    config = dict(model["config"] or {})
    scheme = dict(config.pop("scheme", None) or {})
    species = header["species"] or []
    matches = header["cg_fingerprint"] == cg_fingerprint()
    rows = [
        ("model", model["class"]),
        ("parameters", f"{header['num_parameters']:,}"),
        ("dtype", header["dtype"]),
        ("elements", " ".join(chemical_symbols[z] for z in species)),
        *_scales(header),
        *[(f"fixed {key}", f"{value:g}") for key, value in (model.get("assumed") or {}).items()],
        ("repulsion", _repulsion(header.get("repulsion"))),
        ("format version", header["format_version"]),
        ("written with", ", ".join(f"{name} {version}" for name, version in header["versions"].items())),
        ("units", ", ".join(f"{name} {unit}" for name, unit in header["units"].items())),
        ("products here", _products()),
        ("CG fingerprint", f"{header['cg_fingerprint'][:16]} ({'same' if matches else 'DIFFERENT'} here)"),
    ]
    rows += [("scheme", scheme.pop("name", ""))] if scheme else []
    rows += [(f"scheme.{key}", _short(value)) for key, value in scheme.items()]
    rows += [(key, _short(value)) for key, value in config.items() if key != "species"]
    for key in ("steps", "epochs", "cpu_seconds", "weights", "num_frames"):
        if key in record:
            rows.append((key.replace("_", " "), _short(record[key])))
    print(table(["", args.model], [(key, str(value)) for key, value in rows]))
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
    return 0


def _scales(header: dict) -> list[tuple[str, str]]:
    """The scale of a potential, or what is known of each property."""
    described = header.get("property")
    if described is None:
        return [("scale", f"{header['scale']:.6g}")]
    rows = []
    for p in described["properties"]:
        known = described["statistics"][p["name"]]
        text = f"{p['readout']}, {p['unit'] or 'no unit'}; mean {known['mean']:.6g}, scale {known['scale']:.6g}"
        rows.append((f"target {p['name']}", text))
    return rows


def _repulsion(described: dict | None) -> str:
    if described is None:
        return "none"
    return f"{described['name']}, below {', '.join(f'{k} {v:.2f}' for k, v in described['reach'].items())} angstrom"


def _products() -> str:
    """Which implementation of the products would run on this machine's CPU and GPU, and why."""
    if backend() == "c":
        text = f"c (compiled once with {compiler()}, kept in {cache_folder()})"
    else:
        text = backend() if compiler() else "torch (no C compiler found; with one, training is several times faster)"
    if torch.cuda.is_available():
        text += f"; on the GPU {backend(torch.empty(0, device='cuda'))}"
    return text


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
