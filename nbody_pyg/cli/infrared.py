"""nbody infrared: vibrations, infrared and Raman spectrum of a molecule."""

from __future__ import annotations

import argparse
import csv

import torch

from nbody_pyg.atomic_write import atomic_write, write_json
from nbody_pyg.cli.frames import read_atoms, write_atoms
from nbody_pyg.cli.outputs import output_folder
from nbody_pyg.cli.tables import table
from nbody_pyg.deploy.infrared import infrared_spectrum, plot_infrared, property_of
from nbody_pyg.io.model_file import load_model

_NAMES = ("infrared.json", "infrared.csv", "relaxed.xyz", "infrared.png")


def infrared(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    structures = read_atoms(args.file)
    if args.index >= len(structures):
        raise ValueError(f"--index must be below {len(structures)}, the number of structures in {args.file}")
    inputs = [args.model, args.dipole, args.polarizability, args.file]
    folder = output_folder(args.out, "infrared", args.overwrite, inputs, _NAMES)
    dipole = args.dipole
    if dipole is not None and property_of(load_model(dipole), "dipole") is None:
        print(f"{dipole} predicts no dipole (or several): no intensities\n")
        dipole = None
    found = infrared_spectrum(
        args.model, structures[args.index], dipole, args.polarizability, fmax=args.fmax, max_steps=args.steps
    )
    columns = {"frequency cm^-1": found.frequencies, "intensity km/mol": found.intensities,
               "activity A^4/amu": found.activities, "depolarization": found.depolarization}  # fmt: skip
    known = {name: column.tolist() for name, column in columns.items() if column is not None}
    head = ["mode", *known]
    rows = [[number, *row] for number, row in enumerate(zip(*known.values(), strict=True), 1)]
    print(table(head, rows))
    print(f"\nzero-point energy  {found.zero_point_energy:.6f} eV")
    if found.free_motions:
        print(f"frequencies below 1 cm^-1, which count as zero (free motions): {found.free_motions}")
    if not found.is_minimum:
        print("warning: negative frequencies are imaginary; the structure is no minimum")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "infrared.json", found.to_dict())
    with atomic_write(folder / "infrared.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    write_atoms(folder / "relaxed.xyz", [found.atoms])
    plotted = len(known) > 1
    names = _NAMES[: 4 if plotted else 3]
    if plotted:
        plot_infrared(found, folder / "infrared.png", args.width)
    print(f"\nwritten to {folder}: {', '.join(names)}")
    return 0 if found.is_minimum else 3
