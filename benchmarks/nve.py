"""How well a trained model keeps the total energy: NVE dynamics from a model file.

    python benchmarks/nve.py MODEL --start embedded:ethanol --time 20 --timestep 0.5 --temperature 300 --dtype float64

    python benchmarks/nve.py MODEL --start FOLDER/water64_pbe0.npz --repeat 1 1 5 --time 2

A short run with a thermostat comes first, so that the mean temperature is near the one asked for. Prints the drift
(slope of a straight line through the total energy), the scatter about it, the largest jump between two samples and
the mean temperature; writes a plot beside the JSON file.
"""

from __future__ import annotations

from pathlib import Path

from ase import Atoms
from ase.io import read
from report import arguments, show, start, write

from nbody_pyg.cli.md import plot_energies
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import load_embedded, read_npz
from nbody_pyg.deploy import MDReport, NBodyCalculator, run_md


def structure(name: str) -> Atoms:
    """``embedded:ethanol`` (the first frame of its test set at 300 K), or the first frame of a file (npz, or ASE's)."""
    if name.startswith("embedded:"):
        frame = load_embedded(name.removeprefix("embedded:"), "test_300K")[0]
        return AtomicData(z=frame.z, pos=frame.pos).to_ase()
    if not Path(name).is_file():
        raise FileNotFoundError(f"no structure at {name}; give a file, or embedded:ethanol")
    if name.endswith(".npz"):
        frame = read_npz(name, units="eV")[0]
        return AtomicData(z=frame.z, pos=frame.pos, cell=frame.cell, pbc=frame.pbc).to_ase()
    return read(name)


def summary(report: MDReport) -> dict[str, float]:
    return {
        "time_ps": float(report.time[-1]),
        "drift_mev_per_atom_per_10ps": report.drift,
        "fluctuation_mev_per_atom": report.fluctuation,
        "largest_jump_mev_per_atom": report.largest_jump,
        "mean_temperature_k": float(report.temperature.mean()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "nve.json")
    parser.add_argument("model", help="model file, as nbody train writes it")
    parser.add_argument("--start", default="embedded:ethanol", help="embedded:NAME or a structure file")
    parser.add_argument("--repeat", type=int, nargs=3, default=(1, 1, 1), help="copies along each axis of the cell")
    parser.add_argument("--time", type=float, default=20.0, help="ps")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K, of the start")
    parser.add_argument("--equilibrate", type=float, default=1.0, help="ps of Langevin dynamics before; 0: none")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--every", type=int, default=10, help="steps between samples")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    steps, before = (round(1000 * time / args.timestep) for time in (args.time, args.equilibrate))
    with start():
        atoms = structure(args.start).repeat(args.repeat)
        atoms.calc = NBodyCalculator(args.model, dtype=args.dtype)
        common = {"timestep": args.timestep, "temperature": args.temperature, "seed": args.seed}
        if before > 0:
            run_md(atoms, before, ensemble="langevin", **common)
        report = run_md(atoms, steps, sample_every=args.every, **common)
    found = summary(report)
    formula = atoms.get_chemical_formula()
    title = f"{formula}, NVE, {args.timestep} fs, {args.temperature:g} K, {args.dtype}"
    show(f"{title}: {args.model}", ["", "value"], [[k.replace("_", " "), f"{v:.5g}"] for k, v in found.items()])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture = args.out.with_suffix(".png")
    plot_energies(report, picture, f"{title}: drift {report.drift:+.3f} meV per atom per 10 ps")
    settings = {
        key: getattr(args, key) for key in ("model", "start", "repeat", "timestep", "temperature", "dtype", "seed")
    }
    samples = {"time_ps": report.time.tolist(), "total_ev": report.total.tolist()}
    write(args.out, {"settings": settings, "results": found, "samples": samples})
    print(f"plot in {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
