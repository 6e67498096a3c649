"""Infrared and Raman spectra beside the method that the models were trained on: frequencies, intensities, activities.

    python benchmarks/infrared.py --seconds 60

For each molecule GFN2-xTB labels 300 frames with energy, forces, dipole and polarizability: two thirds from Langevin
dynamics at 300 and 500 K, one third displaced along normal modes. A potential, a model of dipoles and a model of
polarizabilities are trained on them, each for ``--seconds`` of CPU time. Frequencies, intensities and activities are
compared with finite differences of GFN2-xTB (ase.vibrations; of polarizabilities along its modes). Needs the package
tblite.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from nbody_pyg.deploy.infrared import normal_modes, raman_activities
from nbody_pyg.training import fit
from nbody_pyg.training.config import parse_config
from nbody_pyg.training.defaults import choose_defaults
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets, build_potential
from nbody_pyg.training.property_task import evaluate_properties
from nbody_pyg.units import BOHR, WAVENUMBER, polarizability_factor

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
RAMAN = ["molecule", "alpha MAE A^3", "S mean A^4/amu", "S largest", "S sum", "S sum of GFN2", "depolarization mean",
         "largest"]  # fmt: skip
#: Models of properties that are trained beside the potential: readout (and name), unit.
TARGETS = {"dipole": "e*angstrom", "polarizability": "angstrom^3"}
#: Strength of the electric field, Ha/(e bohr), and accuracy of tblite in it: dipoles differ by little.
FIELD, ACCURACY = 1e-3, 0.01
#: Of each mode, with its unit in the tables.
SHOWN = {"frequencies": "cm^-1", "intensities": "km/mol", "activities": "A^4/amu", "depolarization": "rho"}
#: Frames that nothing is trained on, one in ten.
TEST = 10


def in_field(atoms: Atoms, field: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy (Ha) and dipole (e bohr) of GFN2-xTB for a neutral molecule in a field, Ha/(e bohr).

    The energy falls where the field and the dipole are parallel: its derivative by the field is minus the dipole.
    """
    from tblite.interface import Calculator
    from tblite.library import ffi

    found = Calculator("GFN2-xTB", atoms.numbers, atoms.positions / BOHR)
    found.set("verbosity", 0)
    found.set("accuracy", ACCURACY)
    # tblite 0.8 takes a pointer alone, not an array
    found.add("electric-field", ffi.from_buffer("double[]", np.array(field, dtype=float)))
    result = found.singlepoint()
    return float(result.get("energy")), np.array(result.get("dipole"))


def polarizability(atoms: Atoms) -> np.ndarray:
    """Of GFN2-xTB: differences of the dipole in a field, [3, 3], angstrom^3."""
    rows = [in_field(atoms, FIELD * axis)[1] - in_field(atoms, -FIELD * axis)[1] for axis in np.eye(3)]
    alpha = np.stack(rows) / (2 * FIELD) * polarizability_factor("bohr^3")
    return 0.5 * (alpha + alpha.T)


def reference(atoms: Atoms, delta: float) -> tuple[InfraredSpectrum, np.ndarray]:
    """Spectrum and Hessian of the calculator of the atoms at its minimum, by finite differences."""
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=1000)
    with tempfile.TemporaryDirectory() as place:
        found = Infrared(atoms, name=f"{place}/ir", delta=delta, nfree=4)
        found.run()
        frequencies, hessian = found.get_frequencies(), found.get_vibrations().get_hessian_2d()
    _, modes = normal_modes(hessian, atoms)
    rigid = len(frequencies) - len(modes)  # translations and rotations, the smallest ones
    slopes = []
    for mode in modes:
        step = delta / np.linalg.norm(mode, axis=1).max()
        ends = [Atoms(atoms.numbers, atoms.positions + sign * step * mode) for sign in (1, -1)]
        slopes.append((polarizability(ends[0]) - polarizability(ends[1])) / (2 * step))
    intensities = 42.2561 * found.intensities[rigid:]
    raman = raman_activities(np.array(slopes))
    return InfraredSpectrum(atoms, frequencies.real[rigid:], modes, intensities, *raman), hessian


def labelled(atoms: Atoms, positions: np.ndarray) -> AtomicData:
    """A frame with energy, forces and dipole of the calculator of the atoms, and the polarizability of GFN2-xTB."""
    frame = atoms.copy()
    frame.positions[:] = positions
    frame.calc = atoms.calc
    energy, forces, dipole = frame.get_potential_energy(), frame.get_forces(), frame.get_dipole_moment()
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces, dipole=dipole)
    data = AtomicData.from_ase(frame)
    data.polarizability = torch.from_numpy(polarizability(frame)).unsqueeze(0).to(data.dipole)
    return data


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
    models = {key: learned(train, args, folder / key, {"target": {key: {"readout": key, "unit": unit}}})
              for key, unit in TARGETS.items()}  # fmt: skip
    found = infrared_spectrum(potential.double(), rest, models["dipole"], models["polarizability"])
    off = found.frequencies - true.frequencies
    more, brighter, turned = (
        np.abs(getattr(found, key) - getattr(true, key)) for key in ("intensities", "activities", "depolarization")
    )
    worst = int(np.abs(off).argmax())
    record = {
        "molecule": name, "forces_mae": evaluate(potential, test).errors["forces_mae"],
        **{f"{key}_mae": evaluate_properties(model, test).errors[f"{key}_mae"] for key, model in models.items()},
        "mean": float(np.abs(off).mean()), "largest": float(np.abs(off).max()), "at": float(true.frequencies[worst]),
        "intensity_mean": float(more.mean()), "intensity_largest": float(more.max()),
        "activity_mean": float(brighter.mean()), "activity_largest": float(brighter.max()),
        "depolarization_mean": float(turned.mean()), "depolarization_largest": float(turned.max()),
        **{f"{key}_{what}": getattr(one, key).tolist() for what, one in (("model", found), ("gfn2", true))
           for key in SHOWN},
    }  # fmt: skip
    return record, found, true


def draw(spectra: dict[str, tuple[InfraredSpectrum, InfraredSpectrum]], path: Path, width: float = 15.0) -> None:
    """The spectrum of the model upwards, that of GFN2-xTB downwards: infrared left, Raman right, a row per molecule."""
    figure = Figure(figsize=(11, 2.1 * len(spectra)), layout="constrained")
    grid = np.arange(0.0, 4000.0, 2.0)
    for row, (name, pair) in zip(figure.subplots(len(spectra), 2, squeeze=False), spectra.items(), strict=True):
        for axes, curve in zip(row, ("spectrum", "raman_spectrum"), strict=True):
            for one, sign, colour, label in zip(
                pair, (1, -1), ("#1f5fa8", "#c4501b"), ("model", "GFN2-xTB"), strict=True
            ):
                height = sign * getattr(one, curve)(grid, width)
                axes.fill_between(grid, height, color=colour, alpha=0.8, lw=0, label=label)
            axes.axhline(0.0, color="0.3", lw=0.6)
            axes.set(title=f"{name}, {'infrared' if curve == 'spectrum' else 'Raman'}", xlim=(4000, 0), yticks=[])
    for axes in row:
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
            columns = {f"{who} {unit}": record[f"{key}_{who.lower()}"] for key, unit in SHOWN.items()
                       for who in ("GFN2", "model")}  # fmt: skip
            show(name, list(columns), list(zip(*columns.values(), strict=True)))
            write(args.out, {"results": records})
    rows = [
        [r["molecule"], len(r["frequencies_gfn2"]), r["forces_mae"], r["mean"], r["largest"], f"{r['at']:.0f}",
         r["intensity_mean"], r["intensity_largest"], sum(r["intensities_model"]), sum(r["intensities_gfn2"])]
        for r in records
    ]  # fmt: skip
    show("", HEAD, rows)
    rows = [
        [r["molecule"], r["polarizability_mae"], r["activity_mean"], r["activity_largest"], sum(r["activities_model"]),
         sum(r["activities_gfn2"]), r["depolarization_mean"], r["depolarization_largest"]]
        for r in records
    ]  # fmt: skip
    show("", RAMAN, rows)
    draw(spectra, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
