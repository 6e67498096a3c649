"""nbody hierarchy: build a hierarchy, check it, print its levels, draw it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ase.io import read

from nbody_pyg.cli.tables import table
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import embedded
from nbody_pyg.deploy import load_model
from nbody_pyg.hierarchy import Scheme
from nbody_pyg.training.config import parse_yaml, scheme_arguments


def hierarchy(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    frame = _frame(args.file, args.index)
    scheme = load_model(args.model).model.scheme if args.model else _scheme(args)
    topology = scheme.read(scheme(frame)).validate()
    print(f"{scheme!r}\nsymmetry:   {scheme.symmetry}\ncontinuity: {scheme.continuity}\n")
    rows = []
    for k, level in enumerate(scheme.levels):
        child, pair = topology.child_index[k], topology.pair_index[k]
        count = topology.size(k)
        members = 1.0 if k == 0 else topology.parts(k).shape[1] / count
        rows.append(
            (
                k,
                level.name,
                count,
                float(members),
                None if child is None else child.shape[1] / count,
                None if pair is None else pair.shape[1] / count,
            )
        )
    print(table(["level", "name", "parts", "atoms/part", "children/part", "neighbours/part"], rows))
    print("\nvalid: every part is the union of its children, and the root holds all atoms")
    if args.plot:
        from nbody_pyg.hierarchy import plot_hierarchy

        plot_hierarchy(frame, scheme).savefig(args.plot, dpi=180, bbox_inches="tight")
        print(f"drawn in {args.plot}")
    return 0


def _frame(path: str, index: int) -> AtomicData:
    if not Path(path).exists() and "." not in path:
        return embedded(path)[index]
    if not Path(path).is_file():
        raise FileNotFoundError(f"no structure at {path}")
    return AtomicData.from_ase(read(path, index=index))


def _scheme(args: argparse.Namespace) -> Scheme:
    known = scheme_arguments(args.scheme)
    arguments: dict[str, Any] = {}
    for word in args.set:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ValueError(f"--set takes KEY=VALUE with KEY among {', '.join(known)}, got {word!r}")
        arguments[key] = parse_yaml(text, f"--set {word}")
    return Scheme.from_config({"name": args.scheme, **arguments})
