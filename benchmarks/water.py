"""Liquid water: dynamics with a trained model, and its O-O radial distribution beside that of the reference frames.

    nbody train configs/water.yaml --data.train FOLDER/water64_pbe0.npz
    python benchmarks/water.py runs/water/model.nbody --data FOLDER/water64_pbe0.npz --time 20 --minutes 9

The run is written in pieces of at most ``--minutes``: the same command goes on where the last one stopped, until the
time asked for is reached. Langevin dynamics at 300 K (the thermostat has a weak friction), then, with ``--nve``,
dynamics at constant energy from its end. Prints height and place of the first peak of both distributions, and draws
them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.geometry import find_mic
from ase.io import read
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin
from matplotlib.figure import Figure
from report import arguments, show, start, write

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, read_npz
from nbody_pyg.deploy import NBodyCalculator, run_md

#: Width of the bins of the distribution, angstrom.
WIDTH = 0.05


def oxygen_distances(positions: np.ndarray, numbers: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Nearest-image distances between all oxygens of one frame."""
    oxygen = positions[numbers == 8]
    first, second = np.triu_indices(len(oxygen), 1)
    return find_mic(oxygen[first] - oxygen[second], cell)[1]


def radial_distribution(frames: list[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Distances (bin centres) up to half the shortest cell height, and g(r)."""
    volume = frames[0].get_volume()
    reach = 0.5 * min(volume / np.linalg.norm(np.cross(*np.delete(frames[0].cell.array, k, 0))) for k in range(3))
    edges = np.arange(0.0, reach, WIDTH)
    counts = np.zeros(len(edges) - 1)
    for atoms in frames:
        counts += np.histogram(oxygen_distances(atoms.positions, atoms.numbers, atoms.cell.array), edges)[0]
    number = int((frames[0].numbers == 8).sum())
    shells = 4.0 / 3.0 * np.pi * np.diff(edges**3)
    ideal = 0.5 * number * (number - 1) / volume * shells * len(frames)
    return 0.5 * (edges[1:] + edges[:-1]), counts / ideal


def first_peak(r: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    """Place and height of the first peak: the top of a parabola through the bins around the highest one."""
    top = int(np.argmax(np.where((r > 2.4) & (r < 3.4), g, 0.0)))
    near = slice(top - 3, top + 4)
    a, b, c = np.polyfit(r[near], g[near], 2)
    place = -b / (2.0 * a)
    return float(place), float(a * place**2 + b * place + c)


def reference_frames(path: Path) -> Frames:
    return read_npz(path, units="eV")


def as_atoms(frame: AtomicData) -> Atoms:
    return AtomicData(z=frame.z, pos=frame.pos, cell=frame.cell, pbc=frame.pbc).to_ase()


def thermostatted(args, first: Atoms, until: float) -> bool:
    """Go on with the trajectory, or begin it; True when it has reached its time."""
    path, done = args.trajectory, 0
    atoms = first
    if path.is_file():
        with Trajectory(str(path)) as old:
            done = (len(old) - 1) * args.every
            atoms = old[-1]
    total = round(1000 * args.time / args.timestep)
    if done >= total:
        return True
    atoms.calc = NBodyCalculator(args.model, dtype=args.dtype)
    rng = np.random.default_rng([args.seed, done])
    if not done:
        width = np.sqrt(units.kB * args.temperature * atoms.get_masses())
        atoms.set_momenta(width[:, None] * rng.standard_normal((len(atoms), 3)))
    dynamics = Langevin(
        atoms, args.timestep * units.fs, temperature_K=args.temperature, friction=args.friction / units.fs,
        rng=rng, fixcm=False,
    )  # fmt: skip
    began, wall = time.process_time(), time.monotonic()
    with Trajectory(str(path), "a" if done else "w", atoms) as writer:
        if not done:
            writer.write()
        while done < total and time.monotonic() - wall < until:
            dynamics.run(args.every)
            done += args.every
            writer.write()
    spent = 1000 * (time.process_time() - began) / max(dynamics.nsteps, 1)
    lists = atoms.calc.topologies
    print(
        f"{done * args.timestep / 1000:.2f} of {args.time:g} ps, {spent:.1f} CPU ms per step, "
        f"{lists.rebuilds} searches in {lists.calls} calls, {atoms.get_temperature():.0f} K", flush=True,
    )  # fmt: skip
    return done >= total


def compare(args, reference: list[Atoms]) -> dict[str, float]:
    frames = read(args.trajectory, index=":")
    skip = round(1000 * args.skip / (args.timestep * args.every))
    used = frames[skip:]
    r, found = radial_distribution(used)
    _, wanted = radial_distribution(reference)
    (place, height), (place0, height0) = first_peak(r, found), first_peak(r, wanted)
    temperature = np.mean([atoms.get_temperature() for atoms in used])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    name0 = f"PBE0 frames ({len(reference)}): peak {height0:.2f} at {place0:.3f} Å"
    name = f"model, {args.time - args.skip:g} ps at {temperature:.0f} K: peak {height:.2f} at {place:.3f} Å"
    axes.plot(r, wanted, color="0.35", lw=2.5, label=name0)
    axes.plot(r, found, color="#c4501b", lw=1.6, label=name)
    axes.axhline(1.0, color="0.8", lw=0.8, zorder=0)
    axes.set(xlabel="O–O distance (Å)", ylabel="g(r)", xlim=(2.0, r[-1]), ylim=(0, None))
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out.with_suffix(".png"), dpi=150)
    return {
        "peak_place": place, "peak_place_reference": place0, "place_error_percent": 100 * (place / place0 - 1),
        "peak_height": height, "peak_height_reference": height0, "height_error_percent": 100 * (height / height0 - 1),
        "mean_temperature_k": float(temperature), "frames": len(used),
    }  # fmt: skip


def conserved(args) -> dict[str, float]:
    """Constant energy from the end of the thermostatted run."""
    atoms = read(args.trajectory, index=-1)
    atoms.calc = NBodyCalculator(args.model, dtype="float64" if args.nve_float64 else args.dtype)
    report = run_md(atoms, round(1000 * args.nve / args.timestep), timestep=args.timestep, sample_every=5)
    print(report)
    return {
        "nve_ps": float(report.time[-1]), "nve_drift_mev_per_atom_per_10ps": report.drift,
        "nve_fluctuation_mev_per_atom": report.fluctuation, "nve_largest_jump_mev_per_atom": report.largest_jump,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "water.json")
    parser.add_argument("model", help="model file, as nbody train writes it")
    parser.add_argument("--data", type=Path, required=True, help="water64_pbe0.npz")
    parser.add_argument("--time", type=float, default=20.0, help="ps")
    parser.add_argument("--skip", type=float, default=2.0, help="ps at the beginning that are not counted")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--friction", type=float, default=0.005, help="1/fs")
    parser.add_argument("--every", type=int, default=40, help="steps between frames")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall time of this piece")
    parser.add_argument("--nve", type=float, default=0.0, help="ps at constant energy after the run")
    parser.add_argument("--nve-float64", action="store_true", help="in double precision")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trajectory", type=Path, default=Path("runs/water/md.traj"))
    args = parser.parse_args(argv)
    with start():
        frames = [as_atoms(frame) for frame in reference_frames(args.data)]
        args.trajectory.parent.mkdir(parents=True, exist_ok=True)
        if not thermostatted(args, frames[0].copy(), 60 * args.minutes):
            print("not there yet; the same command goes on")
            return 0
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = compare(args, frames)
        if args.nve > 0:
            found |= conserved(args)
    show(f"liquid water: {args.model}", ["", "value"], [[k.replace("_", " "), f"{v:.5g}"] for k, v in found.items()])
    keys = ("time", "skip", "timestep", "temperature", "friction", "every", "dtype", "seed")
    write(args.out, {"settings": {key: getattr(args, key) for key in keys}, "results": found})
    print(json.dumps({"plot": str(args.out.with_suffix(".png"))}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
