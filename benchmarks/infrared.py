"""Infrared spectra beside the method that the potential was trained on: harmonic frequencies and intensities.

    python benchmarks/infrared.py --seconds 60

For each molecule GFN2-xTB labels 300 frames with energy, forces and dipole: two thirds from Langevin dynamics at 300
and 500 K, one third displaced along normal modes. A potential and a model of dipoles are trained on them, each for
``--seconds`` of CPU time. Frequencies and intensities are compared with finite differences of GFN2-xTB
(ase.vibrations). Needs the package tblite.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS
from ase.vibrations import Infrared
from matplotlib.figure import Figure
from report import arguments, show, start, write

from nbody_pyg.active import calculator
from nbody_pyg.atomic_write import save_figure
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.deploy import InfraredSpectrum, infrared_spectrum
from nbody_pyg.deploy.infrared import normal_modes
from nbody_pyg.training import fit
from nbody_pyg.training.config import parse_config
from nbody_pyg.training.defaults import choose_defaults
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets, build_potential
from nbody_pyg.training.property_task import evaluate_properties
from nbody_pyg.units import WAVENUMBER

FORMAMIDE = Atoms("OCNH3", [[1.2, 0.23, 0], [0, 0.42, 0], [-0.93, -0.56, 0], [-0.44, 1.43, 0], [-0.65, -1.53, 0],
                            [-1.91, -0.33, 0]])  # fmt: skip
MOLECULES = {
    "water": molecule("H2O"),
    "methanol": molecule("CH3OH"),
    "ethanol": molecule("CH3CH2OH"),
    "acetaldehyde": molecule("CH3CHO"),
    "formamide": FORMAMIDE,
}
HEAD = ["molecule", "modes", "F MAE meV/A", "mean cm^-1", "largest cm^-1", "at cm^-1", "I mean km/mol", "I largest",
        "I sum", "I sum of GFN2"]  # fmt: skip
#: Frames that nothing is trained on, one in ten.
TEST = 10


def reference(atoms: Atoms, delta: float) -> tuple[InfraredSpectrum, np.ndarray]:
    """Spectrum and Hessian of the calculator of the atoms at its minimum, by finite differences."""
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=1000)
    with tempfile.TemporaryDirectory() as place:
        found = Infrared(atoms, name=f"{place}/ir", delta=delta, nfree=4)
        found.run()
        frequencies, hessian = found.get_frequencies(), found.get_vibrations().get_hessian_2d()
    _, modes = normal_modes(hessian, atoms)
    rigid = len(frequencies) - len(modes)  # translations and rotations, the smallest ones
    return InfraredSpectrum(atoms, frequencies.real[rigid:], modes, 42.2561 * found.intensities[rigid:]), hessian


def labelled(atoms: Atoms, positions: np.ndarray) -> AtomicData:
    """A frame with energy, forces and dipole of the calculator of the atoms."""
    frame = atoms.copy()
    frame.positions[:] = positions
    frame.calc = atoms.calc
    energy, forces, dipole = frame.get_potential_energy(), frame.get_forces(), frame.get_dipole_moment()
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces, dipole=dipole)
    return AtomicData.from_ase(frame)


def sampled(rest: Atoms, hessian: np.ndarray, count: int, seed: int) -> Frames:
    """Frames from dynamics at 300 and 500 K, and from classical normal modes at 20 to 300 K."""
    rng, places = np.random.default_rng(seed), []
    for temperature in (300.0, 500.0):
        atoms = rest.copy()
        atoms.calc = rest.calc
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
        dynamics = Langevin(
            atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False
        )
        dynamics.run(200)
        for _ in range(count // 3):
            dynamics.run(20)
            places.append(atoms.positions.copy())
    frequencies, modes = normal_modes(hessian, rest)
    for _ in range(count - len(places)):
        spread = np.sqrt(units.kB * rng.uniform(20.0, 300.0)) * WAVENUMBER / frequencies
        places.append(rest.positions + np.einsum("k,kid->id", spread * rng.standard_normal(len(modes)), modes))
    return Frames([labelled(rest, place) for place in places])


def learned(frames: Frames, args: Any, folder: Path, target: dict[str, Any]) -> Any:
    """A model with the settings that ``nbody train`` chooses for these frames."""
    training = {"budget_seconds": args.seconds, "seed": args.seed, "validate_every": 10**6}
    config = parse_config({"data": {"train": "in memory"}, "training": training} | target)
    data = DataSets(frames, ())
    config, _ = choose_defaults(config, data)
    model = build_potential(config, data)
    fit(model, frames, (), config.training, folder, show_progress=False)
    return model


def compare(name: str, args: Any) -> tuple[dict[str, Any], InfraredSpectrum, InfraredSpectrum]:
    """Record of one molecule, and the spectra of the model and of GFN2-xTB."""
    rest = MOLECULES[name].copy()
    rest.calc = calculator("gfn2")
    true, hessian = reference(rest, args.delta)
    frames = sampled(rest, hessian, args.frames, args.seed)
    held = list(range(TEST - 1, len(frames), TEST))
    train, test = frames.select([i for i in range(len(frames)) if i not in held]), frames.select(held)
    folder = args.out.parent / "infrared" / name
    potential = learned(train, args, folder / "energy", {})
    dipole = learned(
        train, args, folder / "dipole", {"target": {"dipole": {"readout": "dipole", "unit": "e*angstrom"}}}
    )
    found = infrared_spectrum(potential.double(), rest, dipole)
    off = found.frequencies - true.frequencies
    more = found.intensities - true.intensities
    worst = int(np.abs(off).argmax())
    record = {
        "molecule": name, "forces_mae": evaluate(potential, test).errors["forces_mae"],
        "dipole_mae": evaluate_properties(dipole, test).errors["dipole_mae"],
        "mean": float(np.abs(off).mean()), "largest": float(np.abs(off).max()), "at": float(true.frequencies[worst]),
        "intensity_mean": float(np.abs(more).mean()), "intensity_largest": float(np.abs(more).max()),
        **{f"{key}_{what}": getattr(one, key).tolist() for what, one in (("model", found), ("gfn2", true))
           for key in ("frequencies", "intensities")},
    }  # fmt: skip
    return record, found, true


def draw(spectra: dict[str, tuple[InfraredSpectrum, InfraredSpectrum]], path: Path, width: float = 15.0) -> None:
    """The spectrum of the model upwards, that of GFN2-xTB downwards, a panel for each molecule."""
    figure = Figure(figsize=(7.5, 2.1 * len(spectra)), layout="constrained")
    for axes, (name, pair) in zip(figure.subplots(len(spectra), squeeze=False)[:, 0], spectra.items(), strict=True):
        grid = np.arange(0.0, 4000.0, 2.0)
        for one, sign, colour, label in zip(pair, (1, -1), ("#1f5fa8", "#c4501b"), ("model", "GFN2-xTB"), strict=True):
            axes.fill_between(grid, sign * one.spectrum(grid, width), color=colour, alpha=0.8, lw=0, label=label)
        axes.axhline(0.0, color="0.3", lw=0.6)
        axes.set(title=name, xlim=(4000, 0), yticks=[])
    axes.set(xlabel="wavenumber (cm⁻¹)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    save_figure(figure, path, dpi=160)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "infrared.json")
    parser.add_argument("--molecules", nargs="+", choices=list(MOLECULES), default=list(MOLECULES))
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time of each training")
    parser.add_argument("--frames", type=int, default=300, help="labelled frames of each molecule")
    parser.add_argument("--delta", type=float, default=0.005, help="step of the finite differences, angstrom")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    records, spectra = [], {}
    with start():
        for name in args.molecules:
            record, *spectra[name] = compare(name, args)
            records.append(record)
            pairs = zip(
                *(record[f"{k}_{w}"] for k in ("frequencies", "intensities") for w in ("gfn2", "model")), strict=True
            )
            show(name, ["GFN2 cm^-1", "model cm^-1", "GFN2 km/mol", "model km/mol"], list(pairs))
            write(args.out, {"results": records})
    rows = [
        [r["molecule"], len(r["frequencies_gfn2"]), r["forces_mae"], r["mean"], r["largest"], f"{r['at']:.0f}",
         r["intensity_mean"], r["intensity_largest"], sum(r["intensities_model"]), sum(r["intensities_gfn2"])]
        for r in records
    ]  # fmt: skip
    show("", HEAD, rows)
    draw(spectra, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
