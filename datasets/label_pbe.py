"""Label frames of ``make_pretraining.py`` by density functional theory: PBE/def2-SVP, the level of revised MD17.

Run ``python datasets/label_pbe.py --units FOLDER --out FOLDER``. It needs ``pyscf``, ``h5py`` and ``rdkit``.

Of each structure of a unit one frame is taken, at random, if its basis has at most ``--functions`` functions (benzene
has 114) and its energy is found: restricted Kohn-Sham with density fitting, effective core potentials for I. The frames
of a unit are written whole into a unit of the same number. A unit whose file exists is done, so an interrupted run goes
on where it stopped. The molecules of revised MD17 and acetylacetone are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when pyscf is loaded

import h5py
import numpy as np
import torch
from pyscf import dft, gto, lib
from rdkit import Chem

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.datasets.units import write_unit
from nbody_pyg.units import BOHR, DEBYE, HARTREE

SEED = 20261130
BASIS, FUNCTIONAL, GRID, TOLERANCE = "def2-svp", "pbe", 1, 1e-7  # forces to a few meV/A
#: Molecules on which models that start from these labels are tested.
LEFT_OUT = ("CC(=O)Oc1ccccc1C(=O)O", "CCO", "O=CCC=O", "O=CC=CO", "c1ccc2ccccc2c1", "CC(=O)CC(C)=O", "CC(=O)C=C(C)O")


def bare(smiles: str) -> str:
    """Canonical SMILES without stereochemistry."""
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def functions(z: np.ndarray) -> int:
    """Number of basis functions of def2-SVP."""
    sizes = {1: 5, 15: 18, 16: 18, 17: 18, 35: 32, 53: 32}
    return sum(sizes.get(int(number), 14) for number in z)


def label(z: np.ndarray, pos: np.ndarray, charge: int) -> AtomicData | None:
    """A frame with energy, forces and dipole of its closed shell; None without convergence."""
    atoms = [(int(number), xyz) for number, xyz in zip(z, pos, strict=True)]
    core = {"I": BASIS} if 53 in z else {}
    molecule = gto.M(atom=atoms, basis=BASIS, ecp=core, charge=charge, spin=0, unit="Angstrom", verbose=0)
    field = dft.RKS(molecule, xc=FUNCTIONAL).density_fit()
    field.grids.level, field.conv_tol = GRID, TOLERANCE
    energy = field.kernel()
    if not field.converged:
        return None
    forces = -HARTREE / BOHR * field.nuc_grad_method().kernel()
    dipole = DEBYE * np.asarray(field.dip_moment(unit="Debye", verbose=0))
    numbers = {"energy": [HARTREE * energy], "forces": forces, "dipole": dipole[None], "charge": [charge], "pos": pos}
    values = {key: torch.as_tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    return AtomicData(z=torch.as_tensor(z, dtype=torch.long), **values)


def labelled(path: Path, largest: int) -> tuple[Frames, list[int]]:
    """One frame of each structure of a unit that is small enough, with its new labels; and the split of each."""
    rng = np.random.default_rng([SEED, int(path.stem.removeprefix("unit_"))])
    left_out = {bare(smiles) for smiles in LEFT_OUT}
    with h5py.File(path) as file:
        unit = {key: file[key][:] for key in ("z", "pos", "natoms", "total_charge", "structure", "split")}
        names, kind = file["smiles"].asstr()[:], str(file.attrs["kind"])
    ends, found = np.cumsum(unit["natoms"]), {}
    for structure, name in enumerate(names):
        row = int(rng.choice(np.flatnonzero(unit["structure"] == structure)))
        atoms = slice(ends[row] - unit["natoms"][row], ends[row])
        if functions(unit["z"][atoms]) > largest or bare(name) in left_out:
            continue
        frame = label(unit["z"][atoms], unit["pos"][atoms], int(unit["total_charge"][row]))
        if frame is not None:
            found[row] = frame
    note = f"labels of {FUNCTIONAL.upper()}/{BASIS}, density fitting, grid level {GRID}"
    frames = Frames(found.values(), name=str(path), numbers=list(found), kinds=[kind] * len(found), notes=[note])
    return frames, unit["split"][list(found)].tolist()


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
        frames, splits = labelled(path, args.functions)
        if frames:
            write_unit(target, frames, splits)
        print(f"{path.name}: {len(frames)} frames, {time.process_time() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
