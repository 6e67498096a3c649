"""Two ions pulled apart: the energy of a model beside that of the method that it was trained on.

    nbody train --init none --data.train FOLDER/salt_bridge_train.extxyz --data.val FOLDER/salt_bridge_val.extxyz \
        --training.budget_seconds 400 --model.long_range "{method: direct, states: true, transfers: false}"
    python benchmarks/salt_bridge.py runs/train/model.nbody --data FOLDER

FOLDER has the files of datasets/make_large.py. In test frames without water the anion is moved along the line from N to
S. Energies are those relative to 200 angstrom; "worst" is the largest relative error of a frame. Needs tblite.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from report import arguments, finish, start

from nbody_pyg.active import calculator
from nbody_pyg.deploy import NBodyCalculator

DISTANCES = (5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0)
FAR = 200.0
#: Nitrogen, first atom of the anion, sulfur; and atoms of a frame without water.
N, ANION, S, SIZE = 1, 17, 21, 25
HEAD = ["N-S A", "GFN2-xTB eV", "model eV", "ratio", "worst %"]


def pulled(atoms: Atoms, distance: float) -> Atoms:
    """A copy with the anion at another distance."""
    line = atoms.positions[S] - atoms.positions[N]
    length = np.linalg.norm(line)
    out = Atoms(atoms.numbers, atoms.positions)
    out.positions[ANION:] += (distance / length - 1.0) * line
    return out


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "salt_bridge.json")
    parser.add_argument("model", help="model file, or name of a model of the package")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of datasets/make_large.py")
    parser.add_argument("--frames", type=int, default=5, help="number of test frames, evenly spaced")
    args = parser.parse_args(argv)
    dry = [atoms for atoms in read(args.data / "salt_bridge_test.extxyz", ":") if len(atoms) == SIZE]
    frames = dry[:: max(len(dry) // args.frames, 1)][: args.frames]
    methods = {"reference": calculator("gfn2"), "model": NBodyCalculator(args.model)}
    curves = {name: np.empty((len(frames), len(DISTANCES) + 1)) for name in methods}
    with start():
        for name, method in methods.items():
            for row, frame in enumerate(frames):
                for column, distance in enumerate((*DISTANCES, FAR)):
                    atoms = pulled(frame, distance)
                    atoms.calc = method
                    curves[name][row, column] = atoms.get_potential_energy()
    energies = {name: curve[:, :-1] - curve[:, -1:] for name, curve in curves.items()}
    worst = np.abs(energies["model"] / energies["reference"] - 1.0).max(axis=0)
    reference, model = (energies[name].mean(axis=0) for name in ("reference", "model"))
    records = [
        {"distance": d, "reference_eV": float(e), "model_eV": float(m), "worst": float(w)}
        for d, e, m, w in zip(DISTANCES, reference, model, worst, strict=True)
    ]
    rows = [
        [r["distance"], f"{r['reference_eV']:.3f}", f"{r['model_eV']:.3f}", f"{r['model_eV'] / r['reference_eV']:.3f}",
         f"{100 * r['worst']:.1f}"]
        for r in records
    ]  # fmt: skip
    return finish(args.out, f"{len(frames)} frames", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
