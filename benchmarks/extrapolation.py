"""Trained on dynamics at 300 K: errors at higher temperatures and along torsions, from random weights and fine-tuned.

    python benchmarks/extrapolation.py --init organic --label gfn1

Training and test frames are those of Langevin dynamics with the reference method; each test set has its own trajectory.
Torsions: each bond that rdkit calls rotatable is turned in a test frame at 300 K in steps of 15 degrees. Structures
with energies more than --above eV over that of the frame are left out. Nothing is chosen on test frames. The level
of the labels should not be that of the pretrained model. Needs rdkit and the package of the calculator.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from active import trajectory
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from report import arguments, finish, start

from nbody_pyg.active import calculator, from_smiles
from nbody_pyg.active.loop import trained, tuned
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.potential import Potential
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets

#: The enol of acetylacetone, and alanine dipeptide.
MOLECULES = {"acetylacetone": "CC(=O)/C=C(/C)O", "alanine_dipeptide": "CC(=O)NC(C)C(=O)NC"}
#: From random weights, or all weights of the model fine-tuned.
WAYS = ("scratch", "all")
HEAD = ["molecule", "way", "CPU s", "test set", "frames", "E MAE meV", "F MAE meV/A", "E RMSE", "F RMSE", "F of labels"]


def rotatable(smiles: str) -> list[tuple[tuple[int, int], list[int]]]:
    """Bonds between two heavy atoms, single and in no ring, neither of which ends a chain; with the atoms that turn."""
    from rdkit import Chem

    heavy = Chem.MolFromSmiles(smiles)
    molecule, found = Chem.AddHs(heavy), []
    for i, j in heavy.GetSubstructMatches(Chem.MolFromSmarts("[!$([D1])]-&!@[!$([D1])]")):
        seen, todo = {j}, [j]
        while todo:
            for atom in molecule.GetAtomWithIdx(todo.pop()).GetNeighbors():
                number = atom.GetIdx()
                if number not in seen and number != i:
                    seen.add(number)
                    todo.append(number)
        found.append(((i, j), sorted(seen)))
    return found


def turned(atoms: Atoms, smiles: str, step: float = 15.0) -> list[Atoms]:
    """Copies with each rotatable bond at every angle."""
    out = []
    for (i, j), moving in rotatable(smiles):
        axis = atoms.positions[j] - atoms.positions[i]
        for number in range(1, round(360 / step)):
            part = Atoms(atoms.numbers[moving], atoms.positions[moving])
            part.rotate(number * step, axis, center=atoms.positions[j])
            copy = Atoms(atoms.numbers, atoms.positions)
            copy.positions[moving] = part.positions
            out.append(copy)
    return out


def labelled(structures: list[Atoms], reference: Any, highest: float) -> Frames:
    """Those of at most this energy, eV, with energies and forces."""
    out = []
    for atoms in structures:
        atoms.calc = reference
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        if results["energy"] <= highest:
            out.append(AtomicData.from_ase(atoms))
    return Frames(out)


def data_of(name: str, args: Any) -> tuple[Frames, dict[str, Frames]]:
    """Training frames, and the test sets by name."""
    smiles = MOLECULES.get(name, name)
    (first,) = from_smiles(smiles, seed=args.seed)
    sets = {
        f"{kelvin:g} K": trajectory(first, args.label, kelvin, args.test, args.every, args.seed + 100 + number)
        for number, kelvin in enumerate((300.0, *args.temperatures))
    }
    frame = sets["300 K"][0]
    atoms = Atoms(frame.z.numpy(), frame.pos.numpy())
    highest = float(frame.energy) + args.above
    sets["torsions"] = labelled(turned(atoms, smiles), calculator(args.label), highest)
    return trajectory(first, args.label, 300.0, args.frames, args.every, args.seed + 200), sets


def model_of(way: str, frames: Frames, args: Any, folder: Path) -> tuple[Potential, float]:
    """The trained model, and the CPU seconds that it took."""
    data, begin = DataSets(frames, ()), time.process_time()
    if way == "scratch":
        model = trained(data, args.seconds, args.seed, folder)
    else:
        model = tuned(data, args.seconds, args.seed, folder, args.init)
    return model, time.process_time() - begin


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "extrapolation.json")
    parser.add_argument("--init", default="organic", help="model file, or name of a shipped model, to start from")
    parser.add_argument("--label", default="gfn1", help="reference method")
    parser.add_argument("--molecules", nargs="+", default=list(MOLECULES), help=f"{', '.join(MOLECULES)}, or SMILES")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[600.0, 1000.0], help="of the tests, K")
    parser.add_argument("--frames", type=int, default=450, help="number of training frames")
    parser.add_argument("--test", type=int, default=250, help="frames of each test set")
    parser.add_argument("--every", type=int, default=40, help="steps of 0.5 fs between two frames")
    parser.add_argument("--above", type=float, default=2.0, help="highest energy of torsions, eV")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU time of training for each network")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    records = []
    with start():
        for name in args.molecules:
            frames, tests = data_of(name, args)
            for way in args.ways:
                model, seconds = model_of(way, frames, args, args.out.parent / "extrapolation" / f"{name}_{way}")
                for title, test in tests.items():
                    rms = float(np.sqrt(np.mean([float(frame.forces.square().mean()) for frame in test])))
                    record = {"molecule": name, "way": way, "cpu_seconds": seconds, "test": title, "frames": len(test)}
                    records.append(record | evaluate(model, test).errors | {"force_rms": 1000.0 * rms})
                    print(records[-1], flush=True)
    keys = ("energy_mae", "forces_mae", "energy_rmse", "forces_rmse", "force_rms")
    rows = [
        [r["molecule"], r["way"], f"{r['cpu_seconds']:.0f}", r["test"], r["frames"], *(f"{r[key]:.2f}" for key in keys)]
        for r in records
    ]
    return finish(args.out, "", HEAD, rows, records)


if __name__ == "__main__":
    raise SystemExit(main())
