"""Label frames of ``make_pretraining.py`` by density functional theory: PBE/def2-SVP, the level of revised MD17.

Run ``python datasets/label_pbe.py --units FOLDER --out FOLDER``. It needs ``pyscf``, ``h5py`` and ``rdkit``.

Of each structure of a unit one frame is taken, at random, if its basis has at most ``--functions`` functions (benzene
has 114) and its energy is found: restricted Kohn-Sham with density fitting, effective core potentials for I. The frames
of a unit are written whole into a unit of the same number, with the datasets of ``nbody_pyg.datasets.UnitFiles``. A
unit whose file exists is done, so an interrupted run goes on where it stopped. The molecules of revised MD17 and
acetylacetone are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when pyscf is loaded

import h5py
import numpy as np
from pyscf import dft, gto, lib
from rdkit import Chem

SEED = 20261130
BASIS, FUNCTIONAL, GRID, TOLERANCE = "def2-svp", "pbe", 1, 1e-7  # forces to a few meV/A
HARTREE, BOHR, DEBYE = 27.211386245988, 0.529177210903, 0.20819433442462576  # eV, angstrom, e angstrom
#: Molecules on which models that start from these labels are tested.
LEFT_OUT = ("CC(=O)Oc1ccccc1C(=O)O", "CCO", "O=CCC=O", "O=CC=CO", "c1ccc2ccccc2c1", "CC(=O)CC(C)=O", "CC(=O)C=C(C)O")
COLUMNS = ("z", "pos", "forces", "energy", "dipole", "natoms", "total_charge", "split", "structure", "temperature")


def bare(smiles: str) -> str:
    """Canonical SMILES without stereochemistry."""
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def functions(z: np.ndarray) -> int:
    """Number of basis functions of def2-SVP."""
    sizes = {1: 5, 15: 18, 16: 18, 17: 18, 35: 32, 53: 32}
    return sum(sizes.get(int(number), 14) for number in z)


def label(z: np.ndarray, pos: np.ndarray, charge: int) -> dict[str, np.ndarray] | None:
    """Energy (eV), forces (eV/angstrom) and dipole (e angstrom) of a closed shell; None without convergence."""
    atoms = [(int(number), xyz) for number, xyz in zip(z, pos, strict=True)]
    core = {"I": BASIS} if 53 in z else {}
    molecule = gto.M(atom=atoms, basis=BASIS, ecp=core, charge=charge, spin=0, unit="Angstrom", verbose=0)
    field = dft.RKS(molecule, xc=FUNCTIONAL).density_fit()
    field.grids.level, field.conv_tol = GRID, TOLERANCE
    energy = field.kernel()
    if not field.converged:
        return None
    gradient = field.nuc_grad_method().kernel()
    dipole = field.dip_moment(unit="Debye", verbose=0)
    return {
        "energy": np.float64(HARTREE * energy),
        "forces": -HARTREE / BOHR * gradient,
        "dipole": DEBYE * np.asarray(dipole),
    }


def frames(path: Path, largest: int) -> Iterator[dict[str, np.ndarray]]:
    """One frame of each structure that is small enough, with its new labels."""
    rng = np.random.default_rng([SEED, int(path.stem.removeprefix("unit_"))])
    left_out = {bare(smiles) for smiles in LEFT_OUT}
    with h5py.File(path) as file:
        unit = {
            key: file[key][:] for key in ("z", "pos", "natoms", "total_charge", "structure", "temperature", "split")
        }
        names = file["smiles"].asstr()[:]
    ends = np.cumsum(unit["natoms"])
    for structure, name in enumerate(names):
        rows = np.flatnonzero(unit["structure"] == structure)
        row = int(rng.choice(rows))
        atoms = slice(ends[row] - unit["natoms"][row], ends[row])
        z, pos, charge = unit["z"][atoms], unit["pos"][atoms], int(unit["total_charge"][row])
        if functions(z) > largest or bare(name) in left_out:
            continue
        found = label(z, pos, charge)
        if found is not None:
            yield {"z": z, "pos": pos, **found} | {key: unit[key][row] for key in COLUMNS[5:]}


def write(path: Path, kind: str, rows: list[dict[str, np.ndarray]]) -> None:
    """A unit, written whole."""
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    with h5py.File(unfinished, "w", libver="v110") as file:
        for key in COLUMNS:
            values = [np.asarray(row[key]) for row in rows]
            together = np.concatenate(values) if key in COLUMNS[:3] else np.array(values)
            file.create_dataset(key, data=together, compression="gzip", shuffle=True, fletcher32=True)
        file.attrs.update(kind=kind, level_of_theory=f"{FUNCTIONAL.upper()}/{BASIS}", functional_grid=GRID)
    os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=Path, required=True, help="folder of make_pretraining.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the labelled units")
    parser.add_argument("--functions", type=int, default=140, help="largest number of basis functions")
    parser.add_argument("--numbers", type=int, nargs=2, default=(0, 100_000), help="first unit, and end")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    lib.num_threads(1)
    for path in sorted(args.units.glob("unit_*.h5")):
        target = args.out / path.name
        if target.exists() or not args.numbers[0] <= int(path.stem.removeprefix("unit_")) < args.numbers[1]:
            continue
        begin = time.process_time()
        rows = list(frames(path, args.functions))
        if rows:
            with h5py.File(path) as file:
                write(target, str(file.attrs["kind"]), rows)
        print(f"{path.name}: {len(rows)} frames, {time.process_time() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
