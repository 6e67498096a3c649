"""nbody md: molecular dynamics from a model file and a structure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from ase.io import read
from matplotlib.figure import Figure

from nbody_pyg.deploy import Committee, MDReport, NBodyCalculator, run_md, stop_on_uncertainty

#: Exit status when the uncertainty ended the run.
STOPPED = 3


def md(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    if not Path(args.start).is_file():
        raise FileNotFoundError(f"no structure at {args.start}")
    atoms = read(args.start)
    members = list(dict.fromkeys([args.model, *args.committee]))
    options = {"device": args.device, "dtype": args.dtype, "compile": args.compile, "cuda_graphs": args.cuda_graphs}
    if len(members) == 1 and args.max_forces_std is not None:
        raise ValueError("--max-forces-std needs further models to compare with; name them with --committee")
    atoms.calc = Committee(members, **options) if len(members) > 1 else NBodyCalculator(args.model, **options)
    stop = None if args.max_forces_std is None else stop_on_uncertainty(args.max_forces_std)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    formula = atoms.get_chemical_formula()
    print(
        f"{formula}: {len(atoms)} atoms, {args.ensemble}, {args.steps} steps of {args.timestep} fs",
        flush=True,
    )
    result = run_md(
        atoms,
        args.steps,
        ensemble=args.ensemble,
        timestep=args.timestep,
        temperature=args.temperature,
        friction=args.friction,
        seed=args.seed,
        sample_every=args.every,
        log=folder / "md.log",
        trajectory=folder / "trajectory.xyz",
        report=_progress(args.steps) if sys.stderr.isatty() else None,
        stop=stop,
        stop_on_bond_change=args.stop_on_bond_change,
    )
    if result.bonds_from is not None:
        print(f"bonds: {result.bonds_from}, kept for the whole run")
    if result.bond_changes is not None:
        print(f"bonds as found later differ from those in use: first at {result.bond_changes}")
    print(result)
    if len(members) > 1:
        atoms.get_forces()
        spread = max(atoms.calc.results["forces_std"])
        print(f"committee of {len(members)}: forces differ by {spread:.3f} eV/A at the end")
    if args.ensemble == "langevin":
        print("(a thermostat exchanges energy: drift and jumps are no measure of the potential here)")
    plot_energies(result, folder / "energy.png", f"{formula}, {args.ensemble}, {args.timestep} fs")
    print(f"written to {folder}: md.log, trajectory.xyz, energy.png")
    if result.stopped is not None:
        print(f"\n{result.stopped}")
        return STOPPED
    return 0


def _progress(steps: int):
    def report(done: int) -> None:
        sys.stderr.write(f"\r{100 * done / steps:5.1f} %" + ("\n" if done >= steps else ""))

    return report


def plot_energies(result: MDReport, path: Path, title: str) -> None:
    """Total energy (zoomed) above, temperature below."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    shifted = 1000 * (result.total - result.total[0]) / result.num_atoms
    above.plot(result.time, shifted, color="#1f5fa8", lw=1.0)
    above.set_ylabel("total energy − start\n(meV per atom)")
    above.set_title(title, fontsize=11)
    below.plot(result.time, result.temperature, color="#c4501b", lw=0.8)
    below.set_ylabel("temperature (K)")
    below.set_xlabel("time (ps)")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    figure.savefig(path, dpi=150)
