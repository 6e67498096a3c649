"""Reference calculators by name, and first structures from a file or a SMILES string."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ase import Atoms

#: Labels with a short name: level of theory, package, and what to install.
KNOWN = {
    "gfn2": ("GFN2-xTB", "tblite"),
    "gfn1": ("GFN1-xTB", "tblite"),
    "emt": ("effective medium theory of ASE", "ase"),
}


def calculator(name: str, charge: float = 0.0, spin: float = 1.0) -> Any:
    """A new ASE calculator.

    Args:
        name: "gfn2", "gfn1", "emt"; or a function or class of yours that returns a calculator, as "module:name" or
            "file.py:name".
        charge, spin: total charge and multiplicity, for GFN.
    Raises: ValueError: no such calculator. ImportError: its package is not installed.
    """
    if name in ("gfn2", "gfn1"):
        try:
            from tblite.ase import TBLite
        except ImportError as error:
            raise ImportError(f"label {name!r} needs the package tblite; pip install tblite") from error
        method = KNOWN[name][0]
        return TBLite(method=method, charge=charge, multiplicity=int(spin), accuracy=0.1, verbosity=0)
    if name == "emt":
        from ase.calculators.emt import EMT

        return EMT()
    place, _, what = name.rpartition(":")
    if not place:
        raise ValueError(f"label must be one of {', '.join(KNOWN)}, or 'module:name' or 'file.py:name', got {name!r}")
    module = _module(place)
    made: Callable[[], Any] | None = getattr(module, what, None)
    if made is None:
        raise ValueError(f"label {name!r} must name a function or class of {place}, which has no {what!r}")
    return made()


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"label must name a module that can be imported, got {place!r}: {error}") from error
    if not Path(place).is_file():
        raise FileNotFoundError(f"no file {place} with a calculator")
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None  # as for every file that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_smiles(text: str, count: int = 1, seed: int = 0) -> list[Atoms]:
    """Up to ``count`` conformers of a molecule, embedded by ETKDG and relaxed by MMFF94.

    Raises: ValueError: no molecule. ImportError: rdkit is not installed.
    """
    try:
        from rdkit import Chem, rdBase  # type: ignore[import-not-found,unused-ignore]  # optional
        from rdkit.Chem import rdDistGeom, rdForceFieldHelpers  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("a SMILES string needs the package rdkit; pip install rdkit, or give a structure") from error
    rdBase.DisableLog("rdApp.*")
    molecule = Chem.MolFromSmiles(text)
    if molecule is None:
        raise ValueError(f"start must be a file of structures or a SMILES string, got {text!r}")
    molecule = Chem.AddHs(molecule)
    options: Any = rdDistGeom.ETKDGv3()
    options.randomSeed = seed
    found = list(rdDistGeom.EmbedMultipleConfs(molecule, count, options))
    if not found:
        raise ValueError(f"rdkit finds no structure of {text!r}; give one in a file")
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    charge = Chem.GetFormalCharge(molecule)
    out = []
    for conformer in found:
        atoms = Atoms(numbers, molecule.GetConformer(conformer).GetPositions())
        if charge:
            atoms.info["charge"] = charge
        out.append(atoms)
    return out
