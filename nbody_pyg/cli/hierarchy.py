"""nbody hierarchy: build a hierarchy, check it, print its levels, draw it."""

from __future__ import annotations

import argparse
from typing import Any

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.cli.frames import read_atoms
from nbody_pyg.cli.outputs import output_plot
from nbody_pyg.cli.tables import table
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import load_model, with_reference
from nbody_pyg.deploy.reference import bond_changes
from nbody_pyg.hierarchy import Scheme
from nbody_pyg.models import NBodyNet
from nbody_pyg.system import System
from nbody_pyg.training.config import parse_yaml, scheme_arguments


def hierarchy(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.model and (args.scheme or args.set):
        raise ValueError("--model uses the scheme of the model file; leave --scheme and --set out")
    plot = output_plot(args.plot, args.overwrite, [args.file, args.model])
    frame = AtomicData.from_ase(read_atoms(args.file, args.index)[0], labels=False)
    if args.model:
        model = load_model(args.model).model
        assert isinstance(model, NBodyNet)  # no other is in a file
        scheme = model.scheme
        frame = with_reference([frame], args.model, scheme)[0]
        topology = scheme.read(frame).validate()
        if (changes := bond_changes(scheme, topology, System.from_data(frame))) is not None:
            print(f"bonds are those of the model's reference molecule; those found here differ: {changes}\n")
    else:
        scheme = _scheme(args)
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
    if plot is not None:
        from nbody_pyg.hierarchy import plot_hierarchy

        print(f"drawn in {save_figure(plot_hierarchy(frame, scheme), plot, dpi=180, bbox_inches='tight')}")
    return 0


def _scheme(args: argparse.Namespace) -> Scheme:
    name = args.scheme or "BondTree"
    known = scheme_arguments(name)
    arguments: dict[str, Any] = {}
    for word in args.set:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ValueError(f"--set takes KEY=VALUE with KEY among {', '.join(known)}, got {word!r}")
        arguments[key] = parse_yaml(text, f"--set {word}")
    return Scheme.from_config({"name": name, **arguments})
