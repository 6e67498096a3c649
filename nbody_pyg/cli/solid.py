"""nbody solid: relaxed cell, equation of state and elastic constants of a crystal."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nbody_pyg.atomic_write import atomic_write, write_json
from nbody_pyg.cli.frames import read_atoms, write_atoms
from nbody_pyg.cli.outputs import output_folder
from nbody_pyg.cli.tables import table
from nbody_pyg.deploy.model_file import load_potential
from nbody_pyg.deploy.solids import plot_equation_of_state, solid_properties

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
    lengths, size = found.atoms.cell.cellpar(), len(atoms)
    both = {"start": atoms, "relaxed": found.atoms}
    cell = [[when, *(f"{value:.4f}" for value in one.cell.cellpar())] for when, one in both.items()]
    print(table(["cell", "a A", "b A", "c A", "alpha", "beta", "gamma"], cell))
    print(f"\nvolume        {found.volume / size:.4f} A^3 per atom")
    print(f"energy        {found.energy / size:.6f} eV per atom")
    print(f"bulk modulus  {found.bulk_modulus:.2f} GPa (Birch-Murnaghan)\n")
    names = ("xx", "yy", "zz", "yz", "xz", "xy")
    rows = [[name, *map(float, row)] for name, row in zip(names, found.elastic, strict=True)]
    print(table(["C GPa", *names], rows))
    print("\n" + ", ".join(f"{name} modulus {value:.2f} GPa" for name, value in found.moduli.items()) + " (Hill)")
    if not found.is_stable:
        print("the crystal is not stable: a strain lowers its energy")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "solid.json", {**found.to_dict(), "cellpar": lengths.tolist()})
    write_atoms(Path(folder / "relaxed.xyz"), [found.atoms])
    with atomic_write(folder / "equation_of_state.png") as temporary:
        plot_equation_of_state(found, temporary)
    print(f"\nwritten to {folder}: {', '.join(_NAMES)}")
    return 0 if found.is_stable else 3
