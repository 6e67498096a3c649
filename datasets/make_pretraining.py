"""Make the data of pretraining: GFN2-xTB molecular dynamics of a broad set of small organic molecules.

Run ``python datasets/make_pretraining.py --out FOLDER --frames 500000 --processes 2``. It needs ``tblite``, ``ase``,
``rdkit``, ``h5py`` and the packages ``qm9pack`` and ``molsets``, of which only the lists of SMILES are read (install
these two with ``pip install --no-deps``).

The work is cut into units. A unit has a number, its own random numbers, and writes one HDF5 file; a unit whose file
exists is done, so an interrupted run goes on where it stopped, and any number of processes gives the same files.
``manifest.json`` lists level of theory, counts, versions, licences and the hash of every file.

===========  ======================================================================================================
kind         structures
===========  ======================================================================================================
qm9          molecules of QM9: H, C, N, O, F, up to nine heavy atoms
drug         drug-like molecules of MOSES with up to 20 heavy atoms: adds S, Cl, Br
fragment     BRICS fragments of MOSES, capped by hydrogen
hetero       fragments of which hydrogens and oxygens are replaced: F, Cl, Br, I, S, phosphates, phosphines
ion          fragments that have lost or gained protons at acids, alcohols, amines
peptide      capped peptides of one to three of twenty amino acids
cluster      two to four small molecules, ions and waters at contact distances
bond         fragments with one bond compressed or stretched, up to 2.5 times its length
proton       molecules with an internal hydrogen bond, half of them enols of 1,3-dicarbonyls: in two of three frames
             the hydrogen stands anywhere between donor and acceptor. Only with ``--kind proton``
===========  ======================================================================================================

All kinds but the last are sampled by Langevin dynamics at temperatures between 100 and 1000 K (clusters up to 500 K).
With ``--dynamics MODEL`` (a model file of nbody_pyg, or the name of one that comes with it) the dynamics follow the
forces of this model, which is faster; energies and forces of the frames are those of GFN2-xTB all the same.
A frame belongs to the split "train", "val" or "test" by the Murcko scaffold of its molecule (its SMILES where it
has no ring), so that no scaffold stands in two splits. ``--split test --temperature 300 --structures 25`` makes a set
of other molecules of the split "test" alone, all by dynamics at 300 K, 25 of them in a unit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each process; read once, when tblite is loaded

import h5py
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.data import vdw_radii
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, ZeroRotation
from rdkit import Chem, RDLogger
from rdkit.Chem import BRICS, AllChem, rdMolTransforms
from rdkit.Chem.Scaffolds import MurckoScaffold
from tblite.ase import TBLite

SEED = 20261129
ACCURACY = 0.1  # tblite's accuracy multiplier (default 1); smaller is tighter
STRUCTURES = 40  # structures in a unit
FRAMES = 10  # frames of a structure
STRUCTURES_OF_MODEL, FRAMES_OF_MODEL = 150, 3  # the same for dynamics of a model
TIMESTEP, FRICTION, EQUILIBRATION, STRIDE = 1.0, 0.02, 40, 7  # fs, 1/fs, steps, steps
TOGETHER, APART = 25, 100.0  # structures whose dynamics of a model run in one system; their distance, A
MAX_FORCE = 40.0  # eV/A; a frame above it is left out
ELEMENTS = {1, 6, 7, 8, 9, 15, 16, 17, 35, 53}
SPLITS = ("train", "val", "test")
#: What ends the frames of one structure.
FAILURES = (CalculationFailed, RuntimeError, ValueError)
#: Share of the units of each kind.
MIXTURE = {"qm9": 30, "drug": 12, "fragment": 18, "hetero": 12, "ion": 9, "peptide": 5, "cluster": 9, "bond": 5}

AMINO_ACIDS = {
    "G": "", "A": "C", "V": "C(C)C", "L": "CC(C)C", "I": "[C@@H](C)CC", "M": "CCSC", "F": "Cc1ccccc1",
    "W": "Cc1c[nH]c2ccccc12", "S": "CO", "T": "[C@H](C)O", "C": "CS", "Y": "Cc1ccc(O)cc1", "N": "CC(N)=O",
    "Q": "CCC(N)=O", "D": "CC(O)=O", "E": "CCC(O)=O", "K": "CCCCN", "R": "CCCNC(N)=N", "H": "Cc1c[nH]cn1",
}  # fmt: skip
#: Substituents of the kind "proton" and its molecules; the first is hydrogen.
SUBSTITUENTS = ("[H]", "C", "CC", "C(C)C", "F", "Cl", "OC", "N", "N(C)C", "c9ccccc9", "C#N", "C(F)(F)F", "C=C", "SC")
CHELATES = ("O=C({0})C({1})=C({2})O", "O=C({0})C({1})=C({2})N", "N=C({0})C({1})=C({2})O", "O=C({0})c1ccccc1O",
            "O=C({0})C({1})=C({2})S", "CN=C({0})c1cccc({1})c1O", "O=C({0})c1c(O)cc({1})cc1{2}")  # fmt: skip
#: Molecules on which fine-tuned models are tested (malonaldehyde and acetylacetone), by their substituents.
NO_CHELATES = {("[H]", "[H]", "[H]"), ("C", "[H]", "C")}
#: Small partners of clusters, beside molecules of QM9.
PARTNERS = ("O", "O", "O", "O", "CO", "N", "CC(O)=O", "CC(N)=O", "C", "F", "S",
            "[NH4+]", "[OH3+]", "CC(=O)[O-]", "[Cl-]", "[Br-]")  # fmt: skip
#: Replacements of the kind "hetero", as reactions.
REPLACEMENTS = tuple(
    AllChem.ReactionFromSmarts(text)
    for text in (
        *(f"[cH:1]>>[c:1]{x}" for x in ("F", "Cl", "Br", "I")),
        *(f"[CX4;H1,H2,H3:1]>>[C:1]{x}" for x in ("F", "Cl", "Br", "I", "S", "P(C)C", "S(C)(=O)=O", "OP(=O)(OC)OC")),
        "[OX2H1:1]>>[S:1]",
        "[CX3:1]=[OX1]>>[C:1]=S",
        "[OX2:1]([#6:2])[#6:3]>>[S:1]([#6:2])[#6:3]",
        "[OX2H1:1]>>[O:1]P(=O)(O)OC",
        "[cH:1]>>[c:1]P(=O)(C)C",
        "[cH:1]>>[c:1]S(N)(=O)=O",
    )
)
#: Proton transfers of the kind "ion".
IONISATIONS = tuple(
    AllChem.ReactionFromSmarts(text)
    for text in (
        "[NX3;!$(N-C=[O,S,N]);!$(N-[a]):1]>>[N+:1]",
        "[nX2:1]>>[nH+:1]",
        "[CX3:1](=[O:2])[OX2H1:3]>>[C:1](=[O:2])[O-:3]",
        "[c:1][OX2H1:2]>>[c:1][O-:2]",
        "[CX4:1][OX2H1:2]>>[C:1][O-:2]",
        "[#6:1][SX2H1:2]>>[#6:1][S-:2]",
        "[nX3H1:1]>>[n-:1]",
    )
)


@dataclass(frozen=True)
class Structure:
    """A molecule or cluster before it is sampled."""

    name: str
    atoms: Atoms
    charge: int
    split: str


def split_of(molecule: Chem.Mol) -> str:
    """The split of a molecule, from the hash of its scaffold: 2 % val, 2 % test."""
    scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False) or Chem.MolToSmiles(molecule)
    number = int(hashlib.sha256(scaffold.encode()).hexdigest()[:8], 16) % 50
    return {0: "test", 1: "val"}.get(number, "train")


def build(smiles: str, rng: np.random.Generator) -> tuple[Chem.Mol, Atoms] | None:
    """A conformer by ETKDG and a short relaxation by MMFF94 or UFF; None where there is none, and for radicals."""
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        return None
    molecule = Chem.AddHs(molecule)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    if not set(numbers) <= ELEMENTS or (sum(numbers) - Chem.GetFormalCharge(molecule)) % 2:
        return None
    if AllChem.EmbedMolecule(molecule, randomSeed=int(rng.integers(2**31))) != 0:
        return None
    if AllChem.MMFFHasAllMoleculeParams(molecule):
        AllChem.MMFFOptimizeMolecule(molecule, maxIters=200)
    elif AllChem.UFFHasAllMoleculeParams(molecule):
        AllChem.UFFOptimizeMolecule(molecule, maxIters=200)
    return molecule, Atoms(numbers=numbers, positions=molecule.GetConformer().GetPositions())


def pick(items: Sequence, rng: np.random.Generator) -> Any:
    """One of some items."""
    return items[rng.integers(len(items))]


# -- SMILES ------------------------------------------------------------------------------------------------
def read_lists() -> dict[str, list[str]]:
    """SMILES of QM9 and of MOSES (training part), from the files of the packages qm9pack and molsets."""
    qm9: list[str] = []
    for part in (1, 2, 3):
        path = distribution("qm9pack").locate_file(f"qm9pack/data/qm9_part{part}.csv")
        with open(path, newline="") as file:
            qm9 += [row["SMILES"] for row in csv.DictReader(file)]
    with gzip.open(distribution("molsets").locate_file("moses/dataset/data/train.csv.gz"), "rt") as file:
        moses = [line.strip() for line in file][1:]
    return {"qm9": qm9, "moses": moses}


def fragment(smiles: str, rng: np.random.Generator) -> str | None:
    """One of the BRICS fragments of a molecule with hydrogen at the cuts, of 3 to 15 heavy atoms."""
    molecule = Chem.MolFromSmiles(smiles)
    pieces = sorted(BRICS.BRICSDecompose(molecule)) if molecule is not None else []
    found = []
    for piece in pieces:
        capped = Chem.MolFromSmiles(piece)
        if capped is None:
            continue
        cut, hydrogen = Chem.MolFromSmarts("[#0]"), Chem.MolFromSmiles("[H]")
        capped = Chem.RemoveHs(Chem.ReplaceSubstructs(capped, cut, hydrogen, replaceAll=True)[0])
        if 3 <= capped.GetNumHeavyAtoms() <= 15:
            found.append(Chem.MolToSmiles(capped))
    return pick(found, rng) if found else None


def react(smiles: str, reactions: tuple, rng: np.random.Generator) -> str | None:
    """A product of one of the reactions that apply, chosen at random."""
    molecule, products = Chem.MolFromSmiles(smiles), set()
    for reaction in reactions:
        for (product,) in reaction.RunReactants((molecule,)):
            try:
                Chem.SanitizeMol(product)
            except Chem.MolSanitizeException:
                continue
            products.add(Chem.MolToSmiles(product))
    return pick(sorted(products), rng) if products else None


def peptide(rng: np.random.Generator) -> str:
    """Ac-(X)n-NHMe of L amino acids, n from 1 to 3; proline is left out."""
    letters = rng.choice(list(AMINO_ACIDS), size=rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    units_ = [f"N[C@@H]({AMINO_ACIDS[x]})C(=O)" if AMINO_ACIDS[x] else "NCC(=O)" for x in letters]
    return "CC(=O)" + "".join(units_) + "NC"


# -- structures ----------------------------------------------------------------------------------------------
def molecules(kind: str, lists: dict[str, list[str]], rng: np.random.Generator) -> Iterator[str]:
    """Endless SMILES of one kind."""
    while True:
        if kind == "qm9":
            yield pick(lists["qm9"], rng)
        elif kind == "peptide":
            yield peptide(rng)
        elif kind == "proton" and rng.random() < 0.5:
            substituents = tuple(pick(SUBSTITUENTS[: 4 if rng.random() < 0.5 else None], rng) for _ in range(3))
            if substituents not in NO_CHELATES:
                yield pick(CHELATES, rng).format(*substituents)
        elif kind == "drug":
            smiles = pick(lists["moses"], rng)
            if Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() <= 20:
                yield smiles
        else:
            base = fragment(pick(lists["moses"], rng), rng) if rng.random() < 0.7 else pick(lists["qm9"], rng)
            if base is not None and kind == "hetero":
                base = react(base, REPLACEMENTS, rng)
                if base is not None and rng.random() < 0.3:
                    base = react(base, REPLACEMENTS, rng) or base
            elif base is not None and kind == "ion":
                base = react(base, IONISATIONS, rng)
            if base is not None:
                yield base


def joined(whole: Atoms, atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """A structure with one more molecule, turned at random, at a random side, at 0.7 to 1.2 times contact."""
    atoms.rotate(rng.uniform(0, 360), rng.normal(size=3), center="COM")
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    contact = vdw_radii[atoms.numbers][:, None] + vdw_radii[whole.numbers][None, :]
    contact = np.nan_to_num(contact, nan=3.6) * rng.uniform(0.7, 1.2)
    start = pick(whole.positions, rng)
    for distance in np.arange(0.0, 30.0, 0.1):
        moved = atoms.positions - atoms.positions.mean(0) + start + distance * direction
        if (np.linalg.norm(moved[:, None] - whole.positions[None], axis=-1) > contact).all():
            break
    atoms.positions = moved
    return whole + atoms


def cluster(lists: dict[str, list[str]], rng: np.random.Generator) -> Structure | None:
    """Two to four small molecules, each placed at a random side of those before, at 0.7 to 1.2 times contact."""
    parts, names, splits, charge = [], [], [], 0
    for _ in range(rng.choice([2, 3, 4], p=[0.6, 0.25, 0.15])):
        smiles = pick(PARTNERS if rng.random() < 0.6 else lists["qm9"], rng)
        built = build(smiles, rng)
        if built is None:
            return None
        molecule, atoms = built
        parts.append(atoms)
        names.append(smiles)
        charge += Chem.GetFormalCharge(molecule)
        # Partners such as water stand in every split: a cluster goes where its other molecules go
        splits.append("train" if smiles in PARTNERS else split_of(Chem.RemoveHs(molecule)))
    if abs(charge) > 1:
        return None
    whole = parts[0]
    for atoms in parts[1:]:
        whole = joined(whole, atoms, rng)
    split = max(splits, key=SPLITS.index)
    return Structure(".".join(names), whole, charge, split)


def hydrogen_bonds(atoms: Atoms) -> list[tuple[int, int, int]]:
    """Donor, hydrogen and acceptor (N, O, S) of each hydrogen bond: D-A below 3.2 A, angle D-H-A above 110 degrees."""
    polar = np.flatnonzero(np.isin(atoms.numbers, [7, 8, 16]))
    distances = atoms.get_all_distances()
    found = []
    for hydrogen in np.flatnonzero(atoms.numbers == 1):
        donor = int(distances[hydrogen].argsort()[1])  # the nearest atom
        if donor not in polar:
            continue
        found += [
            (donor, int(hydrogen), int(acceptor))
            for acceptor in polar
            if acceptor != donor
            and 2.0 < distances[donor, acceptor] < 3.2
            and distances[hydrogen, acceptor] > 1.3
            and atoms.get_angle(donor, hydrogen, acceptor) > 110.0
        ]
    return found


def shift_proton(atoms: Atoms, rng: np.random.Generator) -> None:
    """Put the hydrogen of one of the hydrogen bonds near the line from donor to acceptor, 0.9 A from both or more."""
    bonds = hydrogen_bonds(atoms)
    if bonds:
        donor, hydrogen, acceptor = pick(bonds, rng)
        line = atoms.positions[acceptor] - atoms.positions[donor]
        length = np.linalg.norm(line)
        place = atoms.positions[donor] + rng.uniform(0.9, length - 0.9) / length * line
        atoms.positions[hydrogen] = place + rng.normal(scale=0.1, size=3)


def structures(
    kind: str, lists: dict[str, list[str]], rng: np.random.Generator, split: str | None = None
) -> Iterator[tuple[Structure, Chem.Mol | None]]:
    """Endless structures of one kind, of all splits or one of them, with the molecule where there is one."""
    if kind == "cluster":
        while True:
            found = cluster(lists, rng)
            if found is not None and split in (None, found.split):
                yield found, None
    for smiles in molecules("fragment" if kind == "bond" else kind, lists, rng):
        if split is not None and (plain := Chem.MolFromSmiles(smiles)) is not None and split_of(plain) != split:
            continue  # before the atoms are placed, which takes time
        built = build(smiles, rng)
        if built is not None and (kind != "proton" or hydrogen_bonds(built[1])):
            molecule, atoms = built
            structure = Structure(smiles, atoms, Chem.GetFormalCharge(molecule), split_of(Chem.RemoveHs(molecule)))
            if split in (None, structure.split):
                yield structure, molecule


# -- sampling ------------------------------------------------------------------------------------------------
def calculator(charge: int) -> TBLite:
    return TBLite(method="GFN2-xTB", charge=charge, multiplicity=1, accuracy=ACCURACY, verbosity=0)


def labels(atoms: Atoms) -> dict[str, np.ndarray]:
    """What a frame keeps: all of it belongs to the positions as they are stored (float64), about their centre."""
    centre, charges = atoms.positions.mean(0), atoms.get_charges()
    return {
        "pos": atoms.positions - centre,
        "energy": np.float64(atoms.get_potential_energy(apply_constraint=False)),
        "forces": atoms.get_forces(apply_constraint=False),
        "dipole": atoms.get_dipole_moment() - charges.sum() * centre,
        "charges": charges,
    }


def heat(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Momenta with the kinetic energy of twice the temperature, for a structure at a minimum."""
    width = np.sqrt(2 * units.kB * temperature * atoms.get_masses())
    atoms.set_momenta(width[:, None] * rng.standard_normal((len(atoms), 3)))
    if len(atoms) > 2:
        Stationary(atoms)
        ZeroRotation(atoms)


def langevin(atoms: Atoms, temperature: float | np.ndarray, rng: np.random.Generator) -> Langevin:
    """Langevin dynamics at one temperature, or at one for each atom, shape (N, 1)."""
    return Langevin(
        atoms,
        TIMESTEP * units.fs,
        temperature_K=temperature,
        friction=FRICTION / units.fs,
        rng=rng,
        fixcm=False,
    )


@functools.cache
def model_forces(name: str) -> Calculator:
    """The calculator of a model of nbody_pyg."""
    from nbody_pyg.deploy import NBodyCalculator  # only for --dynamics

    return NBodyCalculator(name)


class ChargedForces(Calculator):
    """Forces of a model on structures in one system, each with its total charge, as one batch of graphs."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's interface)

    def __init__(self, name: str, structures: Sequence[Structure]) -> None:
        from torch_geometric.data import Batch

        from nbody_pyg.data import AtomicData
        from nbody_pyg.system import System

        super().__init__()
        frames = [structure.atoms.copy() for structure in structures]
        for frame, structure in zip(frames, structures, strict=True):
            frame.info["charge"] = structure.charge
        self.potential = model_forces(name).potential
        system = System.from_data(Batch.from_data_list([AtomicData.from_ase(frame) for frame in frames]))
        self.system = system.replace(pos=system.pos.double())  # they are far apart

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms, properties, system_changes)
        out = self.potential(self.system.replace(pos=self.system.pos.new_tensor(self.atoms.positions)))
        self.results = {"energy": float(out["energy"].sum()), "forces": out["forces"].double().numpy()}


def dynamics(structure: Structure, temperature: float, rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Frames of a short Langevin run that starts with the kinetic energy of twice the temperature at a minimum."""
    atoms = structure.atoms.copy()
    atoms.calc = calculator(structure.charge)
    heat(atoms, temperature, rng)
    run = langevin(atoms, temperature, rng)
    run.run(EQUILIBRATION)
    for _ in range(FRAMES):
        run.run(STRIDE)
        frame = atoms.copy()
        frame.calc = atoms.calc
        yield labels(frame)


def dynamics_of_model(
    structures: Sequence[Structure], temperatures: Sequence[float], rng: np.random.Generator, model: str
) -> list[list[np.ndarray]]:
    """Positions of the frames of each structure, by Langevin dynamics with the forces of a model.

    They are far apart in one system, which takes less time than one after another. Frames are further apart than those
    of :func:`dynamics`, as they are few.
    """
    whole = Atoms()
    for number, (structure, temperature) in enumerate(zip(structures, temperatures, strict=True)):
        atoms = structure.atoms.copy()
        heat(atoms, temperature, rng)
        atoms.positions += np.array([number, 0.0, 0.0]) * APART - atoms.positions.mean(0)
        whole += atoms
    charged = any(structure.charge for structure in structures)
    whole.calc = ChargedForces(model, structures) if charged else model_forces(model)
    sizes = [len(structure.atoms) for structure in structures]
    run = langevin(whole, np.repeat(temperatures, sizes)[:, None], rng)
    run.run(EQUILIBRATION)
    frames = []
    for _ in range(FRAMES_OF_MODEL):
        run.run(2 * STRIDE)
        frames.append(np.split(whole.positions.copy(), np.cumsum(sizes)[:-1]))
    return [list(of_structure) for of_structure in zip(*frames, strict=True)]


def stretched(
    structure: Structure, molecule: Chem.Mol, rng: np.random.Generator, frames: int = FRAMES
) -> Iterator[dict[str, np.ndarray]]:
    """Frames in which one bond outside of rings has 0.75 to 2.5 times its length; all atoms are rattled by 0.03 A."""
    bonds = [bond for bond in molecule.GetBonds() if not bond.IsInRing()]
    for _ in range(frames if bonds else 0):
        changed = Chem.Mol(molecule)
        bond = pick(bonds, rng)
        ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        conformer = changed.GetConformer()
        factor = rng.uniform(0.75, 1.0) if rng.random() < 0.4 else rng.uniform(1.0, 2.5)
        length = factor * rdMolTransforms.GetBondLength(conformer, *ends)
        rdMolTransforms.SetBondLength(conformer, *ends, length)
        atoms = structure.atoms.copy()
        atoms.positions = conformer.GetPositions() + rng.normal(scale=0.03, size=(len(atoms), 3))
        atoms.calc = calculator(structure.charge)
        yield labels(atoms)


def sound(frame: dict[str, np.ndarray]) -> bool:
    """Whether a frame is kept: finite, no force above the bound, no net force."""
    forces = frame["forces"]
    finite = all(np.isfinite(value).all() for value in frame.values())
    return finite and np.abs(forces).max() < MAX_FORCE and np.abs(forces.sum(0)).max() < 1e-3


def temperature_of(kind: str, rng: np.random.Generator, given: float | None) -> float:
    """Of the dynamics of one structure, K, drawn if it is not given; 0 where there are no dynamics."""
    if kind == "bond":
        return 0.0
    if given is not None:
        return given
    return float(np.exp(rng.uniform(np.log(100.0), np.log(500.0 if kind == "cluster" else 1000.0))))


def sound_ones(frames: Iterator[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The sound ones of labelled frames, up to the first without a self-consistent solution."""
    found = []
    with contextlib.suppress(*FAILURES):
        found.extend(frame for frame in frames if sound(frame))
    return found


def sample(
    kind: str,
    structure: Structure,
    molecule: Chem.Mol | None,
    temperature: float,
    rng: np.random.Generator,
    frames: int = FRAMES,
) -> list[dict[str, np.ndarray]]:
    """Sound frames of a structure without the help of a model."""
    if kind == "bond":
        return sound_ones(stretched(structure, molecule, rng, frames))
    return sound_ones(dynamics(structure, temperature, rng))


def sample_by_model(
    kind: str, structures: Sequence[Structure], temperatures: Sequence[float], rng: np.random.Generator, model: str
) -> list[list[dict[str, np.ndarray]]]:
    """Sound frames of each structure by the dynamics of a model: neutral structures together, and charged ones."""
    neutral = [n for n, structure in enumerate(structures) if structure.charge == 0]
    charged = [n for n, structure in enumerate(structures) if structure.charge != 0]
    jobs = [job for job in (neutral, charged) if job]
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in structures]
    while jobs:
        job = jobs.pop(0)
        try:
            frames = dynamics_of_model([structures[n] for n in job], [temperatures[n] for n in job], rng, model)
        except FAILURES:
            if len(job) > 1:  # one of them: the others alone
                jobs[:0] = [[n] for n in job]
            continue
        for n, of_structure in zip(job, frames, strict=True):
            moved = [structures[n].atoms.copy() for _ in of_structure]
            for atoms, positions in zip(moved, of_structure, strict=True):
                atoms.positions = positions
                if kind == "proton" and rng.random() < 2 / 3:
                    shift_proton(atoms, rng)
            found[n] = sound_ones(labelled(atoms, structures[n].charge) for atoms in moved)
    return found


def labelled(atoms: Atoms, charge: int) -> dict[str, np.ndarray]:
    """Labels of atoms with this total charge."""
    atoms.calc = calculator(charge)
    return labels(atoms)


# -- units ---------------------------------------------------------------------------------------------------
def kind_of(number: int) -> str:
    """Kind of a unit: the mixture is kept by every hundred units, in a fixed shuffled order."""
    order = np.random.default_rng(SEED).permutation(np.repeat(list(MIXTURE), list(MIXTURE.values())))
    return str(order[number % len(order)])


def make_unit(
    number: int,
    out: Path,
    lists: dict[str, list[str]],
    count: int = STRUCTURES,
    model: str | None = None,
    split: str | None = None,
    temperature: float | None = None,
    kind: str | None = None,
) -> dict[str, float]:
    """Make one unit and write its file whole; returns what is printed of it."""
    kind = kind or kind_of(number)
    rng, begin = np.random.default_rng([SEED, number]), time.process_time()
    columns: dict[str, list] = {key: [] for key in ("z", "pos", "forces", "charges", "energy", "dipole", "natoms",
                                                    "total_charge", "structure", "temperature", "split")}  # fmt: skip
    names, failed = [], 0
    source = structures(kind, lists, rng, split)
    by_model = model is not None and kind != "bond"
    while len(names) < count and failed < 10 * count:
        drawn = [next(source) for _ in range(min(TOGETHER, count - len(names)) if by_model else 1)]
        temperatures = [temperature_of(kind, rng, temperature) for _ in drawn]
        if by_model:
            sampled = sample_by_model(kind, [structure for structure, _ in drawn], temperatures, rng, model)
        else:
            (structure, molecule), *_ = drawn
            frames = FRAMES if model is None else FRAMES_OF_MODEL
            sampled = [sample(kind, structure, molecule, temperatures[0], rng, frames)]
        for (structure, _), kelvin, frames in zip(drawn, temperatures, sampled, strict=True):
            if not frames:
                failed += 1
                continue
            for frame in frames:
                columns["z"].append(structure.atoms.numbers)
                for key, value in frame.items():
                    columns[key].append(value)
                columns["natoms"].append(len(structure.atoms))
                columns["total_charge"].append(structure.charge)
                columns["structure"].append(len(names))
                columns["temperature"].append(kelvin)
                columns["split"].append(SPLITS.index(structure.split))
            names.append(structure.name)
    path = out / f"unit_{number:05d}.h5"
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    # With checksums of the data (fletcher32) and of what describes them (format 1.10), so that damage is noticed
    with h5py.File(unfinished, "w", libver="v110") as file:
        for key in ("z", "charges", "pos", "forces"):
            data = np.concatenate(columns[key]).astype({"z": np.uint8, "pos": np.float64}.get(key, np.float32))
            file.create_dataset(key, data=data, compression="gzip", shuffle=True, fletcher32=True)
        for key, dtype in {"energy": "f8", "dipole": "f4", "natoms": "i4", "total_charge": "i1", "structure": "i4",
                           "temperature": "f4", "split": "u1"}.items():  # fmt: skip
            file.create_dataset(key, data=np.array(columns[key]).astype(dtype), fletcher32=True)
        file.create_dataset("smiles", data=names, dtype=h5py.string_dtype())
        measured = "pos angstrom, energy eV, forces eV/angstrom, dipole e angstrom, charges e"
        file.attrs.update(kind=kind, number=number, seed=SEED, failed=failed, splits=SPLITS, units=measured)
        file.attrs.update(dynamics=model or "GFN2-xTB")
    os.replace(unfinished, path)
    seconds = time.process_time() - begin
    return {"unit": number, "kind": kind, "frames": len(columns["energy"]), "failed": failed, "seconds": round(seconds)}


def manifest(out: Path) -> dict:
    """What the folder holds, from the files themselves."""
    frames, atoms, elements, splits, dynamics_of, files = *(Counter() for _ in range(5)), {}
    for path in sorted(out.glob("unit_*.h5")):
        with h5py.File(path) as file:
            kind, z, natoms = file.attrs["kind"], file["z"][:], file["natoms"][:]
            frames[kind] += len(natoms)
            atoms[kind] += len(z)
            elements.update(dict(zip(*(x.tolist() for x in np.unique(z, return_counts=True)), strict=True)))
            splits.update(SPLITS[s] for s in file["split"][:].tolist())
            dynamics_of[file.attrs.get("dynamics", "GFN2-xTB")] += len(natoms)
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "level_of_theory": "GFN2-xTB, closed shell, electronic temperature 300 K, gas phase",
        "script": "datasets/make_pretraining.py",
        "seed": SEED,
        "mixture": MIXTURE,
        "frames": dict(frames) | {"all": sum(frames.values())},
        "mean_atoms": {kind: round(atoms[kind] / frames[kind], 1) for kind in frames},
        "atoms_by_element": dict(sorted(elements.items())),
        "frames_by_split": dict(splits),
        "frames_by_dynamics": dict(dynamics_of),
        "versions": {name: version(name) for name in ("tblite", "ase", "rdkit", "qm9pack", "molsets", "numpy", "h5py")}
        | {"python": platform.python_version()},
        "licences": {
            "structures": "QM9 through qm9pack (MIT), MOSES through molsets (MIT)",
            "frames": "CC0-1.0",
        },
        "files": files,
    }


def _work(job: tuple[int, Path, int, str | None, str | None, float | None, str | None]) -> dict[str, float]:
    number, out, *settings = job
    return make_unit(number, out, _lists(), *settings)


_found: dict[str, list[str]] = {}


def _lists() -> dict[str, list[str]]:
    """The lists of SMILES, read once in each process."""
    if not _found:
        RDLogger.DisableLog("rdApp.*")
        _found.update(read_lists())
    return _found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--frames", type=int, default=500_000, help="number of frames, about")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dynamics", metavar="MODEL", help="model that the dynamics follow (default: GFN2-xTB)")
    parser.add_argument("--first", type=int, default=0, help="number of the first unit")
    parser.add_argument("--split", choices=SPLITS, help="molecules of this split only (default: all)")
    parser.add_argument("--kind", choices=[*MIXTURE, "proton"], help="of all units (default: the mixture)")
    parser.add_argument("--temperature", type=float, help="of all dynamics, K (default: drawn for each structure)")
    parser.add_argument(
        "--structures", type=int, help=f"in a unit (default: {STRUCTURES}; of a model {STRUCTURES_OF_MODEL})"
    )
    args = parser.parse_args()
    if args.kind == "proton" and args.dynamics is None:
        parser.error("--kind proton needs the dynamics of a model; add --dynamics organic")
    args.out.mkdir(parents=True, exist_ok=True)
    count, each = (STRUCTURES, FRAMES) if args.dynamics is None else (STRUCTURES_OF_MODEL, FRAMES_OF_MODEL)
    count = args.structures or count
    wanted = range(args.first, args.first - (-args.frames // (count * each)))
    if args.temperature is not None:
        wanted = [number for number in wanted if (args.kind or kind_of(number)) != "bond"]
    missing = [number for number in wanted if not (args.out / f"unit_{number:05d}.h5").exists()]
    jobs = [(number, args.out, count, args.dynamics, args.split, args.temperature, args.kind) for number in missing]
    print(f"{len(wanted)} units, {len(wanted) - len(jobs)} of them done", flush=True)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for done in pool.imap_unordered(_work, jobs):
            print(json.dumps(done), flush=True)
    text = json.dumps(manifest(args.out), indent=1)
    (args.out / "manifest.json").write_text(text + "\n")
    print(text[: text.index('"files"')])
    return 0


if __name__ == "__main__":
    sys.exit(main())
