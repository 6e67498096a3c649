"""A potential of silicon against the DFT of its training set: lattice, elastic constants, relaxation, phonons.

    nbody train --data.train Si_training.xyz --data.test Si_test.xyz --training.budget_seconds 300 \\
        --output.folder runs/Si
    python benchmarks/crystal.py runs/Si/model.nbody --frames Si_training.xyz Si_test.xyz

The files have cells of a cubic crystal at rest and stretched along one axis (``config_type`` Elastic in the sets of Zuo
et al. 2020), where symmetry keeps the atoms in their places. C11 and C12 are slopes of the stress at zero strain, from
a cubic polynomial through all of them, for the labels and for the model alike; B = (C11 + 2 C12) / 3. Relaxation starts
from a distorted cell with displaced atoms, and is compared with ASE's FrechetCellFilter with BFGS. Phonons are those of
phonopy (``pip install phonopy``), with displacements in 3 x 3 x 3 cubic cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import BFGS
from report import arguments, finish, start

from nbody_pyg.deploy import NBodyCalculator, load_model, relax, solid_properties
from nbody_pyg.units import GIGAPASCAL

#: Largest strain that a stretched cell may have, and the smallest number of cells for a polynomial of degree 3.
_LARGEST, _FEWEST = 0.12, 6


def stretched(frames: Sequence[Atoms]) -> tuple[list[Atoms], np.ndarray, np.ndarray, float]:
    """Cells at rest or stretched along one axis, with this axis, the strain, and the length of the cell at rest."""
    straight = [a for a in frames if np.allclose(a.cell.angles(), 90) and abs(a.get_forces()).max() < 1e-3]
    rest = min(straight, key=lambda a: abs(a.get_stress()).max())
    length = float(rest.cell.lengths()[0])
    kept, axes, strains = [], [], []
    for atoms in straight:
        strain = atoms.cell.lengths() / length - 1
        axis = int(abs(strain).argmax())
        if (
            len(atoms) == len(rest)
            and np.allclose(np.delete(strain, axis), 0, atol=1e-6)
            and abs(strain[axis]) < _LARGEST
        ):
            kept.append(atoms)
            axes.append(axis)
            strains.append(strain[axis])
    if len(kept) < _FEWEST:
        raise SystemExit(f"--frames must hold {_FEWEST} or more cells stretched along one axis, got {len(kept)}")
    return kept, np.array(axes), np.array(strains), length


def cubic_constants(stress: np.ndarray, axes: np.ndarray, strains: np.ndarray) -> tuple[float, float]:
    """C11 and C12, GPa, from stresses [cells, 6] in eV/angstrom^3."""
    along = stress[np.arange(len(axes)), axes]
    across = (stress[:, :3].sum(1) - along) / 2
    slopes = [np.polynomial.Polynomial.fit(strains, values, 3).deriv()(0.0) for values in (along, across)]
    return float(slopes[0]) / GIGAPASCAL, float(slopes[1]) / GIGAPASCAL


def frequencies(atoms: Atoms, calculator: NBodyCalculator) -> np.ndarray:
    """Phonons in THz on a mesh of 12 x 12 x 12 points, without the three of zero at the centre."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    cell = PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, scaled_positions=atoms.get_scaled_positions()
    )
    phonon = Phonopy(cell, supercell_matrix=np.diag([3, 3, 3]), primitive_matrix="F")
    phonon.generate_displacements(distance=0.01)
    forces = []
    for supercell in phonon.supercells_with_displacements:
        displaced = Atoms(supercell.symbols, cell=supercell.cell, scaled_positions=supercell.scaled_positions, pbc=True)
        forces.append(calculator.get_forces(displaced))
    phonon.forces = forces
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()
    phonon.run_mesh([12, 12, 12], is_gamma_center=True)
    found, centre = phonon.mesh.frequencies, (phonon.mesh.qpoints == 0).all(1)
    return np.concatenate([found[~centre].ravel(), np.sort(found[centre].ravel())[3:]])


def main() -> int:
    """Read the command line and print the table."""
    parser = arguments(__doc__, "crystal.json")
    parser.add_argument("model", help="a trained model of silicon")
    parser.add_argument("--frames", nargs="+", required=True, help="files with stretched cells")
    args = parser.parse_args()
    potential = load_model(args.model).double()
    calculator = NBodyCalculator(potential)
    frames = [atoms for file in args.frames for atoms in read(file, ":")]
    cells, axes, strains, length = stretched(frames)
    cubic = bulk("Si", cubic=True)
    multiple = round((len(cells[0]) / len(cubic)) ** (1 / 3))
    with start():
        labels = cubic_constants(np.stack([a.get_stress() for a in cells]), axes, strains)
        found = cubic_constants(np.stack([calculator.get_property("stress", a.copy()) for a in cells]), axes, strains)
        cubic.set_cell(cubic.cell * (length / multiple) / cubic.cell.lengths()[0], scale_atoms=True)
        solid = solid_properties(potential, cubic)
        start_from = cubic.copy()
        start_from.set_cell(cubic.cell.array * 1.03 + 0.15 * np.eye(3, k=1), scale_atoms=True)
        start_from.rattle(0.08, seed=0)
        ours = relax(potential, [start_from], fmax=1e-4, max_steps=2000, cell=True).frames[0]
        theirs = start_from.copy()
        theirs.calc = calculator
        BFGS(FrechetCellFilter(theirs), logfile=None).run(fmax=1e-4, steps=2000)
        distance = max(
            abs(ours.get_all_distances(mic=True) - theirs.get_all_distances(mic=True)).max(),
            abs(ours.cell.cellpar()[:3] - theirs.cell.cellpar()[:3]).max(),
        )
        modes = frequencies(solid.atoms, calculator)
    constant = float(solid.atoms.get_volume() ** (1 / 3))
    pairs = {
        "lattice constant, angstrom": (length / multiple, constant),
        "C11, GPa": (labels[0], found[0]),
        "C12, GPa": (labels[1], found[1]),
        "B = (C11 + 2 C12) / 3, GPa": ((labels[0] + 2 * labels[1]) / 3, (found[0] + 2 * found[1]) / 3),
    }
    rows: list[list[object]] = [
        [name, f"{a:.4f}", f"{b:.4f}", f"{100 * (b / a - 1):+.2f}"] for name, (a, b) in pairs.items()
    ]
    own = {
        "B of the equation of state, GPa": solid.bulk_modulus,
        "lowest phonon, THz": float(modes.min()),
        "highest phonon, THz": float(modes.max()),
        "relaxed cell against FrechetCellFilter, angstrom": float(distance),
    }
    rows += [[name, "", f"{value:.4g}", ""] for name, value in own.items()]
    records = [{"name": n, "labels": a, "model": b} for n, (a, b) in pairs.items()]
    records += [{"name": name, "model": value} for name, value in own.items()]
    return finish(args.out, f"{len(cells)} cells", ["", "labels", "model", "difference, %"], rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
