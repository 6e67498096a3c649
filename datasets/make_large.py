"""Make data of large molecules and of separated charges: GFN2-xTB molecular dynamics.

Run ``python datasets/make_large.py --out FOLDER``. It needs what ``make_pretraining.py`` imports (``tblite``, ``ase``,
``rdkit``, ``h5py``). ``--kinds`` selects kinds.

A split is sampled by Langevin walkers of its own; each starts from its own conformer and random numbers. A walk is cut
into pieces of ten frames, and each piece is written whole and starts from the file of the piece before. An interrupted
run goes on with the next piece and gives the same files. Every frame keeps the bonds of its start; a piece that does
not is made again with other random numbers. A finished split is one extxyz file ``KIND_SPLIT.extxyz`` (energy eV,
forces eV/angstrom, ``charge`` e in ``info``); ``manifest.json`` lists what a folder holds.

================  ==================================================================================================
kind              structures
================  ==================================================================================================
ac_ala3_nhme      Ac-Ala3-NHMe, 42 atoms; the kinds of MD22 are sampled at 500 K
charged_peptides  Me3N(+)-CH2-CO-X(n)-NH-CH2-CH2-N(+)Me3, X of glycine and alanine, total charge 2, 300 K: n from 2
                  to 5 in train and val, from 6 to 10 in test
dha               docosahexaenoic acid, 56 atoms
salt_bridge       tetramethylammonium and triflate at N-S distances from 4.5 to 12 angstrom (train, val, test)
                  and from 12 to 30 (far), every second walker with four waters, 300 K
at_at             two stacked pairs of adenine and thymine, 60 atoms
stachyose         a tetrasaccharide, 87 atoms
at_at_cg_cg       four stacked pairs, 118 atoms
================  ==================================================================================================

With ``--dynamics MODEL`` (a model file of nbody_pyg, or the name of one that comes with it) the walks follow the forces
of this model; energies and forces of the frames are those of GFN2-xTB all the same.

The ions have no proton to lose and keep their charges. Others do not: between primary ammonium and carboxylate
GFN2-xTB moves an electron, or does not converge, from about 10 angstrom on, in a peptide with one positive and one
negative end from about 8 residues on. N and S of the salt bridge are held at one distance during each walk; energies
and forces are without this constraint.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when tblite is loaded

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixBondLength
from ase.io import read, write
from ase.optimize import LBFGS
from make_embedded import bonds
from make_pretraining import FRICTION, TIMESTEP, build, calculator, heat, joined, labels, langevin, model_forces, sound
from rdkit import Chem
from rdkit.Chem import AllChem
from scipy.spatial.transform import Rotation

SEED = 20261130
STRIDE, EQUILIBRATION, PIECE = 10, 200, 10  # steps, steps, frames
ATTEMPTS = 10  # with new random numbers, for a piece that is not sound or a conformer that is not found
CATION, ANION = "C[N+](C)(C)C", "FC(F)(F)S(=O)(=O)[O-]"
MOLECULES = {
    "ac_ala3_nhme": "CC(=O)" + 3 * "N[C@@H](C)C(=O)" + "NC",
    "dha": "CC" + 6 * r"/C=C\C" + "CC(=O)O",
    "stachyose": "C([C@@H]1[C@@H]([C@@H]([C@H]([C@H](O1)OC[C@@H]2[C@@H]([C@@H]([C@H]([C@H](O2)OC[C@@H]3[C@H]([C@@H]"
    "([C@H]([C@H](O3)O[C@]4([C@H]([C@@H]([C@H](O4)CO)O)O)CO)O)O)O)O)O)O)O)O)O)O",
}
#: Of each base, its SMILES and three atoms in the standard frame of a base pair (Olson et al., doi:10.1006/
#: jmbi.2001.4987), angstrom.
BASES = {
    "A": ("[nH]1cnc2c1ncnc2N", {0: (-1.291, 4.498), 7: (-0.668, 0.532), 9: (1.611, 0.909)}),
    "T": ("Cc1c[nH]c(=O)[nH]c1=O", {3: (-1.284, 4.500), 6: (-0.298, 2.407), 8: (1.944, 2.119)}),
    "G": ("[nH]1cnc2c1nc(N)[nH]c2=O", {0: (-1.289, 4.551), 8: (-0.700, 0.641), 10: (1.554, 0.955)}),
    "C": ("Nc1cc[nH]c(=O)n1", {4: (-1.285, 4.542), 7: (-0.391, 2.344), 0: (1.875, 2.027)}),
}
RISE, TWIST = 3.4, 36.0  # angstrom and degrees between stacked pairs


@dataclass(frozen=True)
class Kind:
    """Start of a walk (split, walker, random numbers), temperature in K, and walkers and frames of each split."""

    start: Callable[[str, int, np.random.Generator], Atoms]
    temperature: float
    splits: dict[str, tuple[int, int]]


def generator(*names: object) -> np.random.Generator:
    """Random numbers of one step of the work, which depend on its names alone."""
    return np.random.default_rng([SEED, zlib.crc32(" ".join(map(str, names)).encode())])


# -- structures ----------------------------------------------------------------------------------------------
def conformer(smiles: str, rng: np.random.Generator) -> Atoms:
    """A relaxed conformer; embedding is tried again where it fails."""
    for _ in range(ATTEMPTS):
        built = build(smiles, rng)
        if built is not None:
            return built[1]
    raise RuntimeError(f"no conformer of {smiles} in {ATTEMPTS} attempts")


def named(atoms: Atoms, name: str, charge: int = 0, held: tuple[int, int] | None = None) -> Atoms:
    """The structure with what its walk must know: name, total charge, pair at a fixed distance."""
    atoms.info = {"charge": charge, "name": name}
    if held is not None:
        atoms.info["held"] = list(held)
    return atoms


def peptide(split: str, walker: int, rng: np.random.Generator) -> Atoms:
    """A peptide with a permanent charge at each end; the walkers of one length differ in the distance of the ends."""
    lengths = range(6, 11) if split == "test" else range(2, 6)
    walkers = KINDS["charged_peptides"].splits[split][0] // len(lengths)
    turn, letters = walker // len(lengths), rng.choice(["G", "A"], size=lengths[walker % len(lengths)])
    residues = {"G": "NCC(=O)", "A": "N[C@@H](C)C(=O)"}
    smiles = CATION + "C(=O)" + "".join(residues[x] for x in letters) + "NCC[N+](C)(C)C"
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    (first,), (last,) = molecule.GetSubstructMatches(Chem.MolFromSmarts("[N+]"))
    properties = AllChem.MMFFGetMoleculeProperties(molecule)
    properties.SetMMFFDielectricConstant(80.0)  # in the gas phase all would be stretched
    found = []
    for index in AllChem.EmbedMultipleConfs(molecule, 16, randomSeed=int(rng.integers(2**31))):
        AllChem.MMFFGetMoleculeForceField(molecule, properties, confId=index).Minimize(maxIts=200)
        positions = molecule.GetConformer(index).GetPositions()
        found.append((float(np.linalg.norm(positions[first] - positions[last])), index, positions))
    found.sort(key=lambda item: item[:2])
    chosen = found[int((turn + 0.5) / walkers * len(found))]
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return named(Atoms(numbers=numbers, positions=chosen[2]), "".join(letters), charge=2)


def salt_bridge(split: str, walker: int, rng: np.random.Generator) -> Atoms:
    """Two ions at the distance of the walker, with four waters at every second one."""
    low, high = (12.0, 30.0) if split == "far" else (4.5, 12.0)
    distance = low + (walker + 0.5) / KINDS["salt_bridge"].splits[split][0] * (high - low)
    cation, anion = conformer(CATION, rng), conformer(ANION, rng)
    held = 1, len(cation) + 4  # nitrogen, sulfur
    for atoms, center in ((cation, 1), (anion, 4)):
        atoms.rotate(rng.uniform(0, 360), rng.normal(size=3))
        atoms.positions -= atoms.positions[center]
    tail = anion.positions[1]  # the CF3 group points away, as in contact
    anion.rotate(tail, (1.0, 0.0, 0.0))
    anion.positions += [distance, 0.0, 0.0]
    whole = cation + anion
    for _ in range(4 * (walker % 2)):
        whole = joined(whole, conformer("O", rng), rng)
    return named(whole, "wet" if walker % 2 else "dry", held=held)


def base(letter: str, rng: np.random.Generator) -> Atoms:
    """A base in the standard frame of its pair."""
    smiles, frame = BASES[letter]
    atoms = conformer(smiles, rng)
    source, target = atoms.positions[list(frame)], np.array([(*xy, 0.0) for xy in frame.values()])
    turn, _ = Rotation.align_vectors(target - target.mean(0), source - source.mean(0))
    atoms.positions = turn.apply(atoms.positions - source.mean(0)) + target.mean(0)
    return atoms


def stack(pairs: str, rng: np.random.Generator) -> Atoms:
    """Stacked base pairs, "AT CG" for two: ``RISE`` and ``TWIST`` from one to the next."""
    whole = Atoms()
    for level, (first, second) in enumerate(pairs.split()):
        other = base(second, rng)
        other.positions *= [1.0, -1.0, -1.0]
        pair = base(first, rng) + other
        pair.rotate(TWIST * level, "z")
        pair.positions[:, 2] += RISE * level
        whole += pair
    return whole


def _molecule(name: str) -> Callable[[str, int, np.random.Generator], Atoms]:
    return lambda split, walker, rng: named(conformer(MOLECULES[name], rng), name)


def _stack(name: str, pairs: str) -> Callable[[str, int, np.random.Generator], Atoms]:
    return lambda split, walker, rng: named(stack(pairs, rng), name)


_MD22 = {"train": (5, 500), "val": (2, 50), "test": (4, 200)}
#: In the order in which they are made.
KINDS = {
    "ac_ala3_nhme": Kind(_molecule("ac_ala3_nhme"), 500.0, _MD22),
    "charged_peptides": Kind(peptide, 300.0, {"train": (120, 600), "val": (8, 80), "test": (10, 200)}),
    "dha": Kind(_molecule("dha"), 500.0, _MD22),
    "salt_bridge": Kind(salt_bridge, 300.0, {"train": (30, 300), "val": (10, 50), "test": (10, 100), "far": (18, 180)}),
    "at_at": Kind(_stack("at_at", "AT AT"), 500.0, _MD22),
    "stachyose": Kind(_molecule("stachyose"), 500.0, _MD22),
    "at_at_cg_cg": Kind(_stack("at_at_cg_cg", "AT AT CG CG"), 500.0, _MD22),
}


# -- walks ---------------------------------------------------------------------------------------------------
def frame_of(atoms: Atoms, reference: Calculator, **info: object) -> Atoms | None:
    """A copy with the labels of ``reference`` and momenta; None where the frame is not sound."""
    frame = Atoms(numbers=atoms.numbers, positions=atoms.positions, momenta=atoms.get_momenta())
    frame.calc = reference
    found = labels(frame)
    if not sound(found):
        return None
    frame.calc = SinglePointCalculator(frame, energy=float(found["energy"]), forces=found["forces"])
    frame.info = atoms.info | info
    return frame


def walk(
    atoms: Atoms,
    temperature: float,
    count: int,
    rng: np.random.Generator,
    equilibrated: bool,
    dynamics: str | None = None,
) -> list[Atoms]:
    """The next frames of a walk from ``atoms``; fewer than ``count`` if one is not sound or has other bonds.

    The walk follows the forces of the model ``dynamics``, or those of GFN2-xTB.
    """
    graph, frames = bonds(atoms), []
    reference = calculator(atoms.info["charge"])
    atoms.calc = reference if dynamics is None else model_forces(dynamics)
    atoms.info["dynamics"] = dynamics or "GFN2-xTB"
    if "held" in atoms.info:
        first, second = (int(x) for x in atoms.info["held"])
        atoms.set_constraint(FixBondLength(first, second))
        atoms.info["distance"] = round(float(atoms.get_distance(first, second)), 4)
    try:
        if not equilibrated:
            LBFGS(atoms, logfile=None).run(fmax=0.2, steps=50)
            heat(atoms, temperature, rng)
            langevin(atoms, temperature, rng).run(EQUILIBRATION)
        run = langevin(atoms, temperature, rng)
        for _ in range(count):
            run.run(STRIDE)
            frame = frame_of(atoms, reference, temperature=temperature)
            if frame is None or bonds(atoms) != graph:
                break
            frames.append(frame)
    except CalculationFailed as error:  # no self-consistent solution
        print(f"{atoms.info['name']}: {error}", file=sys.stderr, flush=True)
    return frames


def piece(
    kind: str, split: str, walker: int, number: int, count: int, before: Path | None, dynamics: str | None = None
) -> list[Atoms]:
    """One piece of a walk, from the last frame of the piece before."""
    for attempt in range(ATTEMPTS):
        if before is None:
            # Another attempt takes another conformer
            atoms = KINDS[kind].start(split, walker, generator(kind, split, walker, attempt))
            atoms.info["walker"] = walker
        else:
            atoms = read(before, -1)
            atoms.info.pop("temperature")
        rng = generator(kind, split, walker, "piece", number, attempt)
        frames = walk(atoms, KINDS[kind].temperature, count, rng, before is not None, dynamics)
        if len(frames) == count:
            return frames
    raise RuntimeError(f"{kind} {split} walker {walker} piece {number}: not sound in {ATTEMPTS} attempts")


def save(path: Path, frames: list[Atoms]) -> None:
    """Write a file whole."""
    unfinished = path.with_name(path.name + ".part")
    write(unfinished, frames, format="extxyz")
    os.replace(unfinished, path)


def pieces(walkers: int, frames: int) -> list[tuple[int, int, int]]:
    """Walker, number and frames of every piece of a split; the first walkers take what does not divide."""
    found = []
    for walker in range(walkers):
        share = frames // walkers + (walker < frames % walkers)
        sizes = [PIECE] * (share // PIECE) + ([share % PIECE] if share % PIECE else [])
        found += [(walker, number, size) for number, size in enumerate(sizes)]
    return found


def make_split(kind: str, split: str, out: Path, dynamics: str | None = None) -> Path:
    """Make what is missing of a split; its file is the pieces one after another, without momenta."""
    path, folder = out / f"{kind}_{split}.extxyz", out / ".pieces"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Path] = []
    for walker, number, count in pieces(*KINDS[kind].splits[split]):
        current = folder / f"{kind}_{split}_{walker}_{number}.extxyz"
        if not current.exists():
            save(current, piece(kind, split, walker, number, count, done[-1] if number else None, dynamics))
        done.append(current)
    frames = list(itertools.chain.from_iterable(read(part, ":") for part in done))
    for frame in frames:
        del frame.arrays["momenta"]
        frame.info.pop("held", None)
    save(path, frames)
    for part in done:
        part.unlink()
    return path


def manifest(out: Path) -> dict:
    """What the folder holds, from the files themselves."""
    files = {}
    for kind, settings in KINDS.items():
        for split, (walkers, _) in settings.splits.items():
            path = out / f"{kind}_{split}.extxyz"
            if path.exists():
                frames = read(path, ":")
                files[path.name] = {
                    "frames": len(frames), "atoms": sorted({len(frame) for frame in frames}), "walkers": walkers,
                    "dynamics": sorted({frame.info.get("dynamics", "GFN2-xTB") for frame in frames}),
                    "temperature_K": settings.temperature, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }  # fmt: skip
    return {
        "level_of_theory": "GFN2-xTB, closed shell, electronic temperature 300 K, gas phase",
        "script": "datasets/make_large.py",
        "seed": SEED,
        "dynamics": {"timestep_fs": TIMESTEP, "friction_per_fs": FRICTION, "steps_between_frames": STRIDE},
        "versions": {name: version(name) for name in ("tblite", "ase", "rdkit", "numpy")}
        | {"python": platform.python_version()},
        "licence": "CC0-1.0",
        "files": files,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--dynamics", metavar="MODEL", help="model that the walks follow (default: GFN2-xTB)")
    args = parser.parse_args(argv)
    for kind in args.kinds:
        files = [make_split(kind, split, args.out, args.dynamics) for split in KINDS[kind].splits]
        found = manifest(args.out)
        (args.out / "manifest.json").write_text(json.dumps(found, indent=1) + "\n")
        counts = ", ".join(f"{path.name} {found['files'][path.name]['frames']} frames" for path in files)
        print(f"{kind}: {counts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
