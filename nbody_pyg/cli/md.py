"""nbody md: molecular dynamics from a model file and a structure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from ase import Atoms
from matplotlib.figure import Figure

from nbody_pyg.atomic_write import save_figure
from nbody_pyg.cli.arguments import require_device
from nbody_pyg.cli.frames import read_atoms
from nbody_pyg.cli.interrupt import interruptible
from nbody_pyg.cli.outputs import latest, output_folder
from nbody_pyg.data import electronic_state_of
from nbody_pyg.deploy import Committee, MDReport, NBodyCalculator, run_md, stop_on_uncertainty
from nbody_pyg.deploy.dynamics import cut_to_whole_frames

#: Exit status when the run was stopped, by the uncertainty or because it failed.
STOPPED = 3
_TRAJECTORY = "trajectory.xyz"


def md(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    require_device(args.device)
    members = list(dict.fromkeys([args.model, *args.committee]))
    if len(members) == 1 and args.max_forces_std is not None:
        raise ValueError("--max-forces-std needs further models; give them with --committee")
    if args.friction is not None and args.ensemble != "langevin":
        raise ValueError("--friction needs --ensemble langevin; leave it out, or choose that ensemble")
    folder, atoms = _begin(args)
    electronic_state_of(atoms, args.start or "the first structure")  # finds contradictions before the model is read
    options = {"device": args.device, "dtype": args.dtype, "compile": args.compile, "cuda_graphs": args.cuda_graphs}
    options["engine"] = args.engine
    atoms.calc = Committee(members, **options) if len(members) > 1 else NBodyCalculator(args.model, **options)
    folder.mkdir(parents=True, exist_ok=True)
    formula = atoms.get_chemical_formula()
    goal = f"{'continued in' if args.restart else 'written to'} {folder}"
    print(
        f"{formula}: {len(atoms)} atoms, {args.ensemble}, {args.steps} steps of {args.timestep} fs; {goal}",
        flush=True,
    )
    for calculator in getattr(atoms.calc, "members", [atoms.calc])[:1]:
        reason = calculator.engine_reason
        print(f"engine: {calculator.engine}{'' if reason is None else f' ({reason})'}", flush=True)
    uncertain = None if args.max_forces_std is None else stop_on_uncertainty(args.max_forces_std)
    with interruptible() as interrupt:

        def stop(atoms: Atoms) -> str | None:
            return interrupt.reason or (None if uncertain is None else uncertain(atoms))

        result = run_md(
            atoms,
            args.steps,
            ensemble=args.ensemble,
            timestep=args.timestep,
            temperature=args.temperature,
            friction=0.01 if args.friction is None else args.friction,
            seed=args.seed,
            sample_every=args.every,
            log=folder / "md.log",
            trajectory=folder / _TRAJECTORY,
            report=_progress(args.steps) if sys.stderr.isatty() else None,
            stop=stop,
            velocities=args.velocities,
            max_temperature=args.max_temperature,
            restart=args.restart,
            stop_on_bond_change=args.stop_on_bond_change,
        )
    for path in folder.glob("energy-*.png") if args.overwrite else ():
        path.unlink()  # of a run whose trajectory is replaced
    print(f"velocities: {result.velocities}")
    if result.bonds_from is not None:
        print(f"bonds: {result.bonds_from}, kept for the whole run")
    if result.bond_changes is not None:
        print(f"bonds found differ from those in use, first at {result.bond_changes}")
    print(result)
    if len(members) > 1:
        atoms.get_forces()
        spread = max(atoms.calc.results["forces_std"])
        print(f"committee of {len(members)}: forces differ by {spread:.3f} eV/A at the end")
    if args.ensemble == "langevin":
        print("(the thermostat exchanges energy: drift and jumps say nothing about the potential here)")
    written = ["md.log", _TRAJECTORY]
    if len(result.time):
        # The plot of the run that is continued stays
        name = f"energy-{result.first_step}.png" if args.restart else "energy.png"
        plot_energies(result, folder / name, f"{formula}, {args.ensemble}, {args.timestep} fs")
        written.append(name)
    print(f"written to {folder}: {', '.join(written)}")
    if result.stopped is not None:
        print(f"\n{result.stopped}")
        return interrupt.status or STOPPED
    return 0


def _begin(args: argparse.Namespace) -> tuple[Path, Atoms]:
    """The folder of the run and its first structure."""
    start = None if args.start is None else read_atoms(args.start, index=-1)[0]
    if not args.restart:
        if start is None:
            raise ValueError("START is missing: give a file with the start structure, or continue a run with --restart")
        names = ("md.log", _TRAJECTORY, "energy*.png")
        cure = "continue it with --restart, replace it with --overwrite, or choose another folder with --out"
        if left_out := start.info.get("constraints_left_out"):
            raise ValueError(
                f"{args.start} was written without its constraints ({left_out}), which extended xyz does not hold; "
                "start from a file that has them (.traj), or remove constraints_left_out from it to run without them"
            )
        inputs = [args.model, args.start, *args.committee]
        return output_folder(args.out, "md", args.overwrite, inputs, names, cure), start
    if args.overwrite:
        raise ValueError("--restart and --overwrite exclude each other; give one of them")
    if args.velocities != "auto":
        raise ValueError("--restart takes the velocities of the trajectory; leave --velocities out")
    folder = latest("md", _TRAJECTORY) if args.out is None else Path(args.out)
    if not (folder / _TRAJECTORY).is_file():
        raise FileNotFoundError(f"nothing to continue: there is no {folder / _TRAJECTORY}")
    cut_to_whole_frames(folder / _TRAJECTORY)
    return folder, read_atoms(str(folder / _TRAJECTORY), index=0)[0] if start is None else start


def _progress(steps: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        sys.stderr.write(f"\r{100 * done / max(steps, 1):5.1f} %" + ("\n" if done >= steps else ""))

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
    save_figure(figure, path, dpi=150)
