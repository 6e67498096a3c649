"""Make the embedded data sets: GFN2-xTB molecular dynamics of ethanol and alanine dipeptide.

Run ``python datasets/make_embedded.py`` (about 22 CPU-minutes on one thread; needs ``tblite`` and ``ase``).
Finished walkers are kept in ``<out>/.partial`` until the set is complete, so an interrupted run resumes.

Each split is sampled by its own Langevin walkers with their own seeds. Positions are rounded to 1e-6 A and
*then* labelled by a fresh single-point calculation, so that a label belongs to exactly the positions
stored and does not depend on the self-consistent solution of the step before. Every frame must keep the
bond graph of the relaxed molecule; a walker that breaks a bond, or a set whose temperature or forces are
off, stops the script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import ase
import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.optimize import BFGS
from tblite.ase import TBLite

SEED = 20240611
BOND_FACTOR = 1.3  # a pair is bonded when closer than 1.3 x the sum of its covalent radii
MD_ACCURACY = 0.1  # tblite's accuracy multiplier (default 1); smaller is tighter
LABEL_ACCURACY = 0.01
ISOLATED_SPIN = {1: 1, 6: 2, 7: 3, 8: 2}  # unpaired electrons of the free atoms


@dataclass(frozen=True)
class Split:
    """How one split is sampled; ``walkers`` trajectories share ``frames``."""

    name: str
    temperature: float  # K
    frames: int
    walkers: int


@dataclass(frozen=True)
class Sampling:
    """Langevin settings of one molecule, in fs."""

    timestep: float
    friction: float  # 1/fs
    equilibration: float
    stride: float


SPLITS = (
    Split("train", 300.0, 1000, 10),
    Split("test_300K", 300.0, 250, 5),
    Split("test_600K", 600.0, 250, 5),
)
SAMPLING = {
    "ethanol": Sampling(timestep=0.5, friction=0.01, equilibration=2000.0, stride=50.0),
    "alanine_dipeptide": Sampling(timestep=1.0, friction=0.01, equilibration=1000.0, stride=40.0),
}


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, bond: float, angle: float, dihedral: float) -> np.ndarray:
    """Position d with |cd| = bond, angle bcd and dihedral abcd in degrees."""
    angle, dihedral = np.radians(angle), np.radians(dihedral)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    local = bond * np.array([-np.cos(angle), np.sin(angle) * np.cos(dihedral), np.sin(angle) * np.sin(dihedral)])
    return c + local[0] * axis + local[1] * np.cross(normal, axis) + local[2] * normal


def alanine_dipeptide(phi: float, psi: float) -> Atoms:
    """Ac-Ala-NHMe (L) from textbook bond lengths and angles at the backbone dihedrals phi and psi."""
    # symbol, bonded to, angle with, dihedral with, bond, angle, dihedral; atoms 0-2 fix the frame
    rows = [
        ("N", 1, 0, 2, 1.34, 116.5, 180.0),  # 3: peptide nitrogen
        ("H", 3, 1, 2, 1.01, 119.0, 180.0),
        ("C", 3, 1, 0, 1.46, 121.5, 180.0),  # 5: C-alpha
        ("C", 5, 3, 1, 1.53, 111.0, phi),  # 6: carbonyl of alanine
        ("C", 5, 3, 1, 1.53, 110.0, phi - 121.0),  # 7: C-beta on the side of the L form
        ("H", 5, 3, 1, 1.09, 108.0, phi + 119.0),
        ("O", 6, 5, 3, 1.23, 120.5, psi + 180.0),  # 9
        ("N", 6, 5, 3, 1.34, 116.5, psi),  # 10
        ("H", 10, 6, 9, 1.01, 119.0, 180.0),
        ("C", 10, 6, 5, 1.45, 121.5, 180.0),  # 12: N-methyl
    ]
    for carbon, b, a in ((0, 1, 3), (7, 5, 3), (12, 10, 6)):
        rows += [("H", carbon, b, a, 1.09, 109.5, turn) for turn in (60.0, 180.0, 300.0)]
    symbols = ["C", "C", "O"]
    turn = np.radians(120.5)
    pos = [np.zeros(3), np.array([1.52, 0.0, 0.0])]
    pos.append(pos[1] + 1.23 * np.array([-np.cos(turn), np.sin(turn), 0.0]))
    for symbol, c, b, a, bond, angle, dihedral in rows:
        symbols.append(symbol)
        pos.append(place(pos[a], pos[b], pos[c], bond, angle, dihedral))
    return Atoms(symbols, positions=np.array(pos))


def starts(name: str) -> list[Atoms]:
    """Start geometries: known conformers, before relaxation."""
    if name == "ethanol":
        anti, gauche = molecule("CH3CH2OH"), molecule("CH3CH2OH")
        # atoms: C1 C0 O2 and the hydroxyl hydrogen 3; the turn makes the gauche conformer
        gauche.set_dihedral(0, 1, 2, 3, 60.0, indices=[3])
        return [anti, gauche]
    angles = [(-83.0, 73.0), (-155.0, 160.0), (-80.0, -20.0), (-130.0, 25.0), (60.0, 40.0), (72.0, -57.0)]
    return [alanine_dipeptide(phi, psi) for phi, psi in angles]


def bonds(atoms: Atoms) -> frozenset[tuple[int, int]]:
    """Bonded pairs by covalent radii."""
    radii = covalent_radii[atoms.numbers]
    close = atoms.get_all_distances() < BOND_FACTOR * (radii[:, None] + radii[None, :])
    return frozenset((int(i), int(j)) for i, j in zip(*np.where(np.triu(close, 1)), strict=True))


def expected_bonds(name: str) -> frozenset[tuple[int, int]]:
    """The bond graph on paper, against which the start geometries are checked."""
    if name == "ethanol":
        pairs = [(0, 1), (0, 2), (2, 3), (0, 4), (0, 5), (1, 6), (1, 7), (1, 8)]
        graph = bonds(molecule("CH3CH2OH"))
        if len(graph) != len(pairs):
            raise RuntimeError(f"ethanol must have 8 bonds, found {sorted(graph)}")
        return graph
    heavy = [
        (0, 1),
        (1, 2),
        (1, 3),
        (3, 4),
        (3, 5),
        (5, 6),
        (5, 7),
        (5, 8),
        (6, 9),
        (6, 10),
        (10, 11),
        (10, 12),
    ]
    methyl = [(carbon, 13 + 3 * k + h) for k, carbon in enumerate((0, 7, 12)) for h in range(3)]
    return frozenset(heavy + methyl)


def calculator(accuracy: float) -> TBLite:
    return TBLite(method="GFN2-xTB", accuracy=accuracy, verbosity=0)


def chirality(atoms: Atoms) -> float:
    """Signed volume at C-alpha of the dipeptide (N, carbonyl C, C-beta): one sign for the L form."""
    n, c, cb = (atoms.positions[i] - atoms.positions[5] for i in (3, 6, 7))
    return float(np.dot(n, np.cross(c, cb)))


def relax(name: str) -> list[Atoms]:
    """Relax every start with GFN2-xTB and check its bonds and its handedness."""
    graph, relaxed = expected_bonds(name), []
    for atoms in starts(name):
        atoms.calc = calculator(LABEL_ACCURACY)
        if not BFGS(atoms, logfile=None).run(fmax=0.005, steps=1000):
            raise RuntimeError(f"{name}: a start geometry did not relax")
        if bonds(atoms) != graph:
            raise RuntimeError(f"{name}: relaxed bonds {sorted(bonds(atoms))} differ from {sorted(graph)}")
        if name == "alanine_dipeptide" and chirality(atoms) < 1.0:
            raise RuntimeError(f"{name}: a start is not the L form (signed volume {chirality(atoms):.2f})")
        relaxed.append(atoms)
    return relaxed


def label(numbers: np.ndarray, pos: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy and forces from a calculation that knows nothing of its predecessor."""
    atoms = Atoms(numbers=numbers, positions=pos, calculator=calculator(LABEL_ACCURACY))
    return float(atoms.get_potential_energy()), atoms.get_forces()


def walk(name: str, split: Split, walker: int, start: Atoms) -> dict[str, np.ndarray]:
    """One Langevin trajectory: equilibrate, then keep a labelled frame every stride."""
    settings = SAMPLING[name]
    molecules, splits = list(SAMPLING), [s.name for s in SPLITS]
    rng = np.random.default_rng([SEED, molecules.index(name), splits.index(split.name), walker])
    graph, atoms = expected_bonds(name), start.copy()
    atoms.calc = calculator(MD_ACCURACY)
    MaxwellBoltzmannDistribution(atoms, temperature_K=split.temperature, rng=rng)
    Stationary(atoms)
    ZeroRotation(atoms)
    dynamics = Langevin(
        atoms,
        settings.timestep * units.fs,
        temperature_K=split.temperature,
        friction=settings.friction / units.fs,
        rng=rng,
        fixcm=False,  # the centre of mass is subtracted from the stored frames
    )
    dynamics.run(round(settings.equilibration / settings.timestep))
    frames: dict[str, list] = {"coords": [], "energies": [], "forces": [], "time": [], "temperature": []}
    for index in range(split.frames // split.walkers):
        dynamics.run(round(settings.stride / settings.timestep))
        if bonds(atoms) != graph:
            raise RuntimeError(f"{name} {split.name} walker {walker}: bonds changed at frame {index}")
        pos = np.round(atoms.positions - atoms.get_center_of_mass(), 6)
        energy, forces = label(atoms.numbers, pos)
        if not (np.isfinite(energy) and np.isfinite(forces).all() and np.abs(forces.sum(0)).max() < 1e-4):
            raise RuntimeError(f"{name} {split.name} walker {walker}: label of frame {index} is not sound")
        frames["coords"].append(pos)
        frames["energies"].append(energy)
        frames["forces"].append(forces)
        frames["time"].append(settings.equilibration + (index + 1) * settings.stride)
        frames["temperature"].append(atoms.get_temperature())
    return {key: np.array(value) for key, value in frames.items()}


def check_forces(numbers: np.ndarray, pos: np.ndarray, forces: np.ndarray, step: float = 1e-3) -> float:
    """Largest difference between stored forces and central differences of the labels on three components,
    eV/A."""
    worst = 0.0
    for component in (0, pos.size // 2, pos.size - 1):
        shift = np.zeros(pos.size)
        shift[component] = step
        plus, minus = (label(numbers, pos + s * shift.reshape(-1, 3))[0] for s in (1, -1))
        worst = max(worst, abs(-(plus - minus) / (2 * step) - forces.reshape(-1)[component]))
    return worst


def statistics(numbers: np.ndarray, data: dict[str, np.ndarray], name: str, temperature: float) -> dict[str, float]:
    """Figures for the data card; raises when the sample is not what it claims to be."""
    fd_error = check_forces(numbers, data["coords"][0], data["forces"][0])
    if fd_error > 1e-3:
        raise RuntimeError(f"{name}: forces differ from finite differences by {fd_error:.2e} eV/A")
    kinetic = float(data["temperature"].mean())
    if abs(kinetic - temperature) > 0.1 * temperature:
        raise RuntimeError(f"{name}: mean temperature {kinetic:.0f} K, wanted {temperature:.0f} K")
    return {
        "energy_mean_eV": round(float(data["energies"].mean()), 6),
        "energy_std_eV": round(float(data["energies"].std()), 6),
        "force_rms_eV_per_A": round(float(np.sqrt((data["forces"] ** 2).mean())), 6),
        "force_max_eV_per_A": round(float(np.abs(data["forces"]).max()), 6),
        "kinetic_temperature_K": round(kinetic, 1),
        "finite_difference_error_eV_per_A": float(f"{fd_error:.1e}"),
    }


def isolated_atoms() -> dict[str, float]:
    """Energies of the free atoms at the same level, eV."""
    energies = {}
    for number, unpaired in ISOLATED_SPIN.items():
        atoms = Atoms(numbers=[number], positions=[[0.0, 0.0, 0.0]])
        atoms.calc = TBLite(method="GFN2-xTB", accuracy=LABEL_ACCURACY, verbosity=0, multiplicity=unpaired + 1)
        energies[str(number)] = round(float(atoms.get_potential_energy()), 8)
    return energies


def make_split(name: str, split: Split, relaxed: list[Atoms], out: Path) -> dict:
    """Run or resume every walker of a split, write one npz and return its manifest entry."""
    partial = out / ".partial"
    partial.mkdir(exist_ok=True)
    parts = []
    for walker in range(split.walkers):
        cache = partial / f"{name}_{split.name}_{walker}.npz"
        if not cache.exists():
            begin = time.process_time()
            part = walk(name, split, walker, relaxed[walker % len(relaxed)])
            with open(cache.with_suffix(".tmp"), "wb") as file:
                np.savez(file, **part)
            cache.with_suffix(".tmp").rename(cache)
            print(f"{name} {split.name} walker {walker}: {time.process_time() - begin:.0f} s", flush=True)
        with np.load(cache) as file:
            parts.append({key: file[key] for key in file.files})
    data = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    numbers = relaxed[0].numbers
    path = out / f"{name}_{split.name}.npz"
    np.savez_compressed(
        path,
        nuclear_charges=numbers.astype(np.uint8),
        coords=data["coords"],
        energies=np.round(data["energies"], 8),
        forces=data["forces"].astype(np.float32),
        walker=np.repeat(np.arange(split.walkers), [len(p["energies"]) for p in parts]).astype(np.uint8),
        time_fs=data["time"].astype(np.float32),
        energy_unit=np.array("eV"),
        length_unit=np.array("angstrom"),
    )
    return {
        "molecule": name,
        "split": split.name,
        "frames": len(data["energies"]),
        "atoms": len(numbers),
        "temperature_K": split.temperature,
        "walkers": split.walkers,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "statistics": statistics(numbers, data, name, split.temperature),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "embedded", help="folder")
    parser.add_argument("--molecules", nargs="+", choices=list(SAMPLING), default=list(SAMPLING))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"files": {}}
    manifest |= {
        "format": 1,
        "level_of_theory": "GFN2-xTB, closed shell, charge 0, electronic temperature 300 K, gas phase",
        "units": {"coords": "angstrom", "energies": "eV", "forces": "eV/angstrom"},
        "script": "datasets/make_embedded.py",
        "seed": SEED,
        "accuracy": {"dynamics": MD_ACCURACY, "labels": LABEL_ACCURACY},
        "versions": {"tblite": version("tblite"), "ase": ase.__version__, "numpy": np.__version__,
                     "python": platform.python_version()},
        "sampling_fs": {name: asdict(settings) for name, settings in SAMPLING.items()},
        "licence": "CC0-1.0",
        "isolated_atoms_eV": isolated_atoms(),
    }  # fmt: skip
    for name in args.molecules:
        relaxed = relax(name)
        energies = np.array([atoms.get_potential_energy() for atoms in relaxed])
        print(name, "relaxed starts, eV above the lowest:", np.round(energies - energies.min(), 4), flush=True)
        for split in SPLITS:
            manifest["files"][f"{name}_{split.name}.npz"] = make_split(name, split, relaxed, args.out)
            path.write_text(json.dumps(manifest, indent=1) + "\n")
    for cache in sorted((args.out / ".partial").glob("*.npz")):
        cache.unlink()
    (args.out / ".partial").rmdir()


if __name__ == "__main__":
    sys.exit(main())
