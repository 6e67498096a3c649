"""nbody solid: relaxed cell, equation of state and elastic constants of a crystal."""

from __future__ import annotations

import argparse

import torch

from nbody_pyg.atomic_write import write_json
from nbody_pyg.cli.frames import read_atoms, write_atoms
from nbody_pyg.cli.outputs import output_folder
from nbody_pyg.cli.tables import table
from nbody_pyg.deploy.solids import COMPONENTS, plot_equation_of_state, solid_properties
from nbody_pyg.io.model_file import load_potential

_NAMES = ("solid.json", "relaxed.xyz", "equation_of_state.png")


def solid(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    structures = read_atoms(args.file)
    if args.index >= len(structures):
        raise ValueError(f"--index must be below {len(structures)}, the number of structures in {args.file}")
    folder = output_folder(args.out, "solid", args.overwrite, [args.model, args.file], _NAMES)
    potential = load_potential(args.model).double()
    atoms = structures[args.index]
    found = solid_properties(
        potential, atoms, fmax=args.fmax, max_steps=args.steps, volume_range=args.range, strain=args.strain
    )
    size = len(atoms)
    both = {"start": atoms, "relaxed": found.atoms}
    cell = [[when, *(f"{value:.4f}" for value in one.cell.cellpar())] for when, one in both.items()]
    print(table(["cell", "a A", "b A", "c A", "alpha", "beta", "gamma"], cell))
    print(f"\nvolume        {found.volume / size:.4f} A^3 per atom")
    print(f"energy        {found.energy / size:.6f} eV per atom")
    print(f"bulk modulus  {found.bulk_modulus:.2f} GPa (Birch-Murnaghan)\n")
    rows = [[name, *map(float, row)] for name, row in zip(COMPONENTS, found.elastic, strict=True)]
    print(table(["C GPa", *COMPONENTS], rows))
    print("\n" + ", ".join(f"{name} modulus {value:.2f} GPa" for name, value in found.moduli.items()) + " (Hill)")
    if not found.is_stable:
        print("the crystal is not stable: a strain lowers its energy")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "solid.json", {**found.to_dict(), "cellpar": found.atoms.cell.cellpar().tolist()})
    write_atoms(folder / "relaxed.xyz", [found.atoms])
    plot_equation_of_state(found, folder / "equation_of_state.png")
    print(f"\nwritten to {folder}: {', '.join(_NAMES)}")
    return 0 if found.is_stable else 3
