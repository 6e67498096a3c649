"""nbody md: molecular dynamics from a model file and a structure."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from ase import Atoms
from ase.io import write
from matplotlib.figure import Figure

from nbody_pyg.atomic_write import atomic_write, save_figure
from nbody_pyg.cli.arguments import require_device
from nbody_pyg.cli.frames import read_atoms
from nbody_pyg.cli.outputs import latest, output_folder
from nbody_pyg.data import electronic_state_of
from nbody_pyg.deploy import Committee, MDReport, NBodyCalculator, run_md, stop_on_uncertainty
from nbody_pyg.deploy.dynamics import cut_to_whole_frames
from nbody_pyg.deploy.ensembles import ENSEMBLES, has_pressure
from nbody_pyg.deploy.trajectory_files import LIBRARY_FORMATS
from nbody_pyg.interrupt import GracefulStop

#: Exit status when the run was stopped, by the uncertainty or because it failed.
STOPPED = 3
_TRAJECTORY = "trajectory.xyz"
_FIRST, _CHECKPOINT, _STOP = "trajectory-first.xyz", "checkpoint.npz", "STOP"
_SUFFIXES = {"extxyz": ".xyz", "traj": ".traj", "dcd": ".dcd", "xtc": ".xtc"}
# What a run may write, beside md.log and the pictures.
_WRITTEN = [f"trajectory{suffix}" for suffix in _SUFFIXES.values()]
_WRITTEN += [f"trajectory-[0-9]*{suffix}" for suffix in LIBRARY_FORMATS] + [_FIRST, _CHECKPOINT]
# Smallest time between two progress lines, s.
_PROGRESS_SECONDS = 0.5


def md(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    require_device(args.device)
    members = list(dict.fromkeys([args.model, *args.committee]))
    if len(members) == 1 and args.max_forces_std is not None:
        raise ValueError("--max-forces-std needs further models; give them with --committee")
    _check_ensemble(args)
    folder, trajectory, atoms = _begin(args)
    electronic_state_of(atoms, args.start or "the first structure")  # finds contradictions before the model is read
    options = {"device": args.device, "dtype": args.dtype, "compile": args.compile, "cuda_graphs": args.cuda_graphs,
               "engine": args.engine}  # fmt: skip
    atoms.calc = Committee(members, **options) if len(members) > 1 else NBodyCalculator(args.model, **options)
    folder.mkdir(parents=True, exist_ok=True)
    formula = atoms.get_chemical_formula()
    goal = f"{'continued in' if args.restart else 'written to'} {folder}"
    print(
        f"{formula}: {len(atoms)} atoms, {args.ensemble}, {args.steps} steps of {args.timestep} fs; {goal}",
        flush=True,
    )
    first = getattr(atoms.calc, "members", [atoms.calc])[0]
    stop_file, progress = folder / _STOP, Progress(args.steps, args.timestep)

    def report(done: int) -> None:
        if not progress.begun:  # which engine it is depends on the structure
            reason = "" if first.engine_reason is None else f" ({first.engine_reason})"
            print(f"engine: {first.engine}{reason}", flush=True)
        if done == 0 and not args.restart:
            _replace_old(folder, trajectory, atoms)
        progress(done)

    uncertain = None if args.max_forces_std is None else stop_on_uncertainty(args.max_forces_std)
    with GracefulStop() as interrupt:

        def stop(atoms: Atoms) -> str | None:
            wish = interrupt.reason or (f"by the file {stop_file}" if stop_file.exists() else None)
            return wish or (None if uncertain is None else uncertain(atoms))

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
            trajectory=trajectory,
            report=report,
            stop=stop,
            velocities=args.velocities,
            max_temperature=args.max_temperature,
            restart=args.restart,
            stop_on_bond_change=args.stop_on_bond_change,
            pressure=1.0 if args.pressure is None else args.pressure,
            thermostat_time=args.thermostat_time,
            barostat_time=args.barostat_time,
            checkpoint=folder / _CHECKPOINT,
        )
    by_file = stop_file.exists()
    stop_file.unlink(missing_ok=True)  # it is for one run
    print(f"velocities: {result.velocities}")
    if result.bonds_from is not None:
        print(f"bonds: {result.bonds_from}, kept for the whole run")
    if result.bond_changes is not None:
        print(f"bonds found differ from those in use, first at {result.bond_changes}")
    print(result)
    if has_pressure(args.ensemble) and len(result.volume):
        print(f"volume: mean {result.volume.mean():.2f}, at the end {result.volume[-1]:.2f} A^3")
    if (speed := progress.speed()) is not None:
        print(f"speed: {speed}")
    if len(members) > 1:
        atoms.get_forces()
        spread = max(atoms.calc.results["forces_std"])
        print(f"committee of {len(members)}: forces differ by {spread:.3f} eV/A at the end")
    if args.ensemble != "nve":
        print("(the thermostat exchanges energy: drift and jumps say nothing about the potential here)")
    written = ["md.log", trajectory.name, _CHECKPOINT]
    if len(result.time):
        # The plot of the run that is continued stays
        name = f"energy-{result.first_step}.png" if args.restart else "energy.png"
        plot_energies(result, folder / name, f"{formula}, {args.ensemble}, {args.timestep} fs")
        written.append(name)
    print(f"written to {folder}: {', '.join(written)}")
    if result.stopped is not None:
        print(f"\n{result.stopped}")
        return interrupt.status or (0 if by_file else STOPPED)
    return 0


def _check_ensemble(args: argparse.Namespace) -> None:
    """Raises: ValueError: an option that the ensemble does not have."""
    baths = [name for name in ENSEMBLES if name not in ("nve", "langevin")]
    pressures = [name for name in ENSEMBLES if has_pressure(name)]
    for option, value, ensembles in (
        ("--friction", args.friction, ["langevin"]),
        ("--thermostat-time", args.thermostat_time, baths),
        ("--barostat-time", args.barostat_time, pressures),
        ("--pressure", args.pressure, pressures),
    ):
        if value is not None and args.ensemble not in ensembles:
            raise ValueError(
                f"{option} needs --ensemble {' or '.join(ensembles)}; leave it out, or choose such an ensemble"
            )


def _begin(args: argparse.Namespace) -> tuple[Path, Path, Atoms]:
    """The folder of the run, its trajectory and its first structure."""
    start = None if args.start is None else read_atoms(args.start, index=-1)[0]
    if not args.restart:
        if start is None:
            raise ValueError("START is missing: give a file with the start structure, or continue a run with --restart")
        names = ("md.log", *_WRITTEN, "energy*.png")
        cure = "continue it with --restart, replace it with --overwrite, or choose another folder with --out"
        if left_out := start.info.get("constraints_left_out"):
            raise ValueError(
                f"{args.start} was written without its constraints ({left_out}), which extended xyz does not hold; "
                "start from a file that has them (.traj), or remove constraints_left_out from it to run without them"
            )
        inputs = [args.model, args.start, *args.committee]
        folder = output_folder(args.out, "md", args.overwrite, inputs, names, cure)
        return folder, (folder / _TRAJECTORY).with_suffix(_SUFFIXES[args.format or "extxyz"]), start
    if args.overwrite:
        raise ValueError("--restart and --overwrite exclude each other; give one of them")
    if args.velocities != "auto":
        raise ValueError("--restart takes the velocities of the trajectory; leave --velocities out")
    folder = latest("md", "md.log") if args.out is None else Path(args.out)
    trajectory = _trajectory_of(folder, args.format)
    if trajectory.suffix in LIBRARY_FORMATS:
        return folder, trajectory, read_atoms(str(folder / _FIRST), index=0)[0] if start is None else start
    if trajectory.suffix == ".xyz":
        cut_to_whole_frames(trajectory)
    return folder, trajectory, read_atoms(str(trajectory), index=0)[0] if start is None else start


def _replace_old(folder: Path, trajectory: Path, atoms: Atoms) -> None:
    """Remove files of the run that this one replaces, and write what the trajectory does not hold."""
    for name in (*_WRITTEN, "energy-*.png"):
        for path in folder.glob(name):
            if path != trajectory:
                path.unlink()
    if trajectory.suffix in LIBRARY_FORMATS:  # they do not name the elements
        with atomic_write(folder / _FIRST) as temporary:
            write(temporary, atoms, format="extxyz", write_results=False)


def _trajectory_of(folder: Path, wanted: str | None) -> Path:
    """The trajectory to continue.

    Raises: FileNotFoundError: there is none. ValueError: it has another format.
    """
    names = [(folder / _TRAJECTORY).with_suffix(suffix) for suffix in _SUFFIXES.values()]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"nothing to continue: there is no {folder / _TRAJECTORY}")
    if wanted is not None and found.suffix != _SUFFIXES[wanted]:
        raise ValueError(f"--format must be that of the trajectory {found}, got {wanted}; leave it out")
    return found


class Progress:
    """The progress of a run: percentage, speed and time left, on one line of stderr if that is a terminal.

    Args:
        steps: of the run.
        timestep: fs.
    """

    def __init__(self, steps: int, timestep: float) -> None:
        self.steps, self.timestep, self.shown = steps, timestep, sys.stderr.isatty()
        self._begun: tuple[int, float] | None = None
        self._last, self._done = -_PROGRESS_SECONDS, (0, 0.0)

    @property
    def begun(self) -> bool:
        """Whether it has been called."""
        return self._begun is not None

    def __call__(self, done: int) -> None:
        """Called with the number of steps done."""
        now = time.monotonic()
        self._done = (done, now)
        if self._begun is None:
            self._begun = (done, now)  # from here, because the first evaluation is slower
        if self.shown and (now - self._last >= _PROGRESS_SECONDS or done >= self.steps):
            self._last = now
            text = f"{100 * done / max(self.steps, 1):5.1f} %"
            if (speed := self.speed()) is not None:
                left = (self.steps - done) * self._seconds_per_step()
                text += f"  {speed}  {_duration(left)} left"
            sys.stderr.write(f"\r{text:<78}" + ("\n" if done >= self.steps else ""))

    def _seconds_per_step(self) -> float:
        (first, begun), (last, now) = self._begun or (0, 0.0), self._done
        return (now - begun) / (last - first) if last > first else 0.0

    def speed(self) -> str | None:
        """Nanoseconds per day and milliseconds per step; None before the second sample."""
        seconds = self._seconds_per_step()
        if seconds <= 0:
            return None
        return f"{self.timestep * 1e-6 * 86400 / seconds:.3g} ns/day ({1e3 * seconds:.3g} ms per step)"


def _duration(seconds: float) -> str:
    """Such as "2 h 5 min", "3 min 10 s" or "8 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


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
