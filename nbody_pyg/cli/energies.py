"""nbody energies: energy of each part of the hierarchy of a structure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.cli.frames import read_structures
from nbody_pyg.cli.outputs import output_plot
from nbody_pyg.cli.tables import table
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import EnergyExplanation, explain_energy, plot_energy_parts, read_metadata
from nbody_pyg.deploy.reference import bond_changes, is_periodic, reference_topology
from nbody_pyg.hierarchy import Scheme, Topology
from nbody_pyg.io.model_file import load_potential
from nbody_pyg.system import System


def energies(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    plot = output_plot(args.plot, args.overwrite, [args.file, args.model])
    potential = load_potential(args.model).double()
    frames = read_structures(args.file)
    metadata = read_metadata(args.model)["metadata"]
    scheme = potential.scheme

    names = [] if scheme is None else [level.name for level in scheme.levels]
    level = _level(names, args.level)

    def explain(index: int) -> EnergyExplanation:
        if not -len(frames) <= index < len(frames):
            raise ValueError(f"index must lie in 0..{len(frames) - 1} ({args.file}), got {index}")
        frame = frames[index]
        # Both frames use the parts of the first, so that they can be compared.
        first = frames[args.index]
        if not torch.equal(first.z, frame.z):
            raise ValueError(
                f"--minus must name a frame with the atoms of frame {args.index}, in its order, got frame {index} "
                f"({frame.to_ase().get_chemical_formula()} instead of {first.to_ase().get_chemical_formula()})"
            )
        tree = None if scheme is None else _tree(scheme, metadata, first, frame)
        if (changes := bond_changes(scheme, tree, System.from_data(frame))) is not None:
            print(f"bonds found in frame {index} differ from those that its energy uses: {changes}")
        return explain_energy(potential, frame, tree)

    found = explain(args.index)
    what = f"frame {args.index} of {args.file}"
    if args.minus is not None:
        found, what = found.minus(explain(args.minus)), f"{what} minus frame {args.minus}"
    print(f"{what}: {found.total:.6f} eV\n")
    rows = [(name, f"{value:+.6f}") for name, value in found.by_level.items()]
    print(table(["level", "energy eV"], [*rows, ("sum", f"{sum(found.by_level.values()):+.6f}")]))
    if level is not None:
        _parts(found, level)
    if plot is not None:
        print(f"\ndrawn in {save_figure(plot_energy_parts(found, level), plot, dpi=160)}")
    return 0


def _tree(scheme: Scheme, metadata: dict[str, Any], first: AtomicData, frame: AtomicData) -> Topology:
    """Parts of the reference molecule if the model has one, else of ``first``, at the positions of ``frame``."""
    tree = reference_topology(metadata, scheme, frame.z.tolist(), is_periodic(frame.get("pbc")))
    if tree is None:
        tree = scheme.compose(System.from_data(first))
    return scheme.rebuild(tree, System.from_data(frame))


def _level(names: Sequence[str], wanted: str | None) -> int | None:
    if wanted is None:
        return None
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise ValueError(f"level must be one of {', '.join(names)} or its number, got {wanted!r}")


def _parts(found: EnergyExplanation, level: int) -> None:
    values = found.within(level)
    atoms: list[list[int]] = [[] for _ in values]
    pairs = found.topology.parts(level).t().tolist() if level else [[i, i] for i in range(len(values))]
    for atom, part in pairs:
        atoms[part].append(atom)
    symbols = AtomicData(z=found.frame.z, pos=found.frame.pos).to_ase().symbols
    rows = [
        (part, str(symbols[own].get_chemical_formula()), f"{float(values[part]):+.6f}", " ".join(map(str, own[:12])))
        for part, own in enumerate(atoms)
    ]
    print(f"\nwithin each of {found.names[level]}")
    print(table(["part", "formula", "energy eV", "atoms"], rows))
