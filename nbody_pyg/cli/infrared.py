"""nbody infrared: vibrations and infrared spectrum of a molecule."""

from __future__ import annotations

import argparse
import csv

import torch

from nbody_pyg.atomic_write import atomic_write, write_json
from nbody_pyg.cli.frames import read_atoms, write_atoms
from nbody_pyg.cli.outputs import output_folder
from nbody_pyg.cli.tables import table
from nbody_pyg.deploy.infrared import dipole_of, infrared_spectrum, plot_infrared
from nbody_pyg.io.model_file import load_model

_NAMES = ("infrared.json", "infrared.csv", "relaxed.xyz", "infrared.png")


def infrared(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    structures = read_atoms(args.file)
    if args.index >= len(structures):
        raise ValueError(f"--index must be below {len(structures)}, the number of structures in {args.file}")
    folder = output_folder(args.out, "infrared", args.overwrite, [args.model, args.dipole, args.file], _NAMES)
    dipole = args.dipole
    if dipole is not None and dipole_of(load_model(dipole)) is None:
        print(f"{dipole} predicts no dipole (or several): frequencies alone\n")
        dipole = None
    found = infrared_spectrum(args.model, structures[args.index], dipole, fmax=args.fmax, max_steps=args.steps)
    head = ["mode", "frequency cm^-1"] + ([] if found.intensities is None else ["intensity km/mol"])
    columns = [found.frequencies.tolist()] + ([] if found.intensities is None else [found.intensities.tolist()])
    rows = [[number, *row] for number, row in enumerate(zip(*columns, strict=True), 1)]
    print(table(head, rows))
    print(f"\nzero-point energy  {found.zero_point_energy:.6f} eV")
    if not found.is_minimum:
        print("warning: negative frequencies are imaginary; the structure is no minimum")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "infrared.json", found.to_dict())
    with atomic_write(folder / "infrared.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    write_atoms(folder / "relaxed.xyz", [found.atoms])
    names = _NAMES[: 3 if found.intensities is None else 4]
    if found.intensities is not None:
        plot_infrared(found, folder / "infrared.png", args.width)
    print(f"\nwritten to {folder}: {', '.join(names)}")
    return 0 if found.is_minimum else 3
