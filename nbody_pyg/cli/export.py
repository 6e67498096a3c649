"""nbody export: a potential as source code for programs without Python."""

from __future__ import annotations

import argparse

from nbody_pyg.cli.outputs import output_folder
from nbody_pyg.io.model_file import load_potential
from nbody_pyg.native.export import FILES, export_c
from nbody_pyg.system import PRECISIONS


def export(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    folder = output_folder(args.out, "exported", args.overwrite, [args.model], FILES)
    potential = load_potential(args.model)
    paths = export_c(potential, folder, None if args.dtype is None else PRECISIONS[args.dtype])
    print(f"written to {folder}: {', '.join(path.name for path in paths)}")
    print(f"compile: make -C {folder} (the library), make -C {folder} example")
    if potential.network.long_range:
        print("latent charges act between all atoms: call nbody_compute_whole; LAMMPS cannot run the model")
    return 0
