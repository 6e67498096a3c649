"""QM9 from its own raw files in float64, its two families of splits, and dipole vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from ase.data import atomic_numbers

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.arrays import load_arrays
from nbody_pyg.datasets.frames import Frames, check_frame, chosen_rows
from nbody_pyg.datasets.splits import Split
from nbody_pyg.messages import nearest
from nbody_pyg.units import BOHR, HARTREE, energy_factor

NUM_QM9 = 130_831  # molecules, without the 3,054 that failed the consistency check of the authors


class Target(NamedTuple):
    """A property of QM9: its column in ``gdb9.sdf.csv``, the factor into our unit, that unit, and how it is read off
    the atoms (a readout of :class:`~nbody_pyg.properties.Property`)."""

    column: str
    factor: float
    unit: str
    readout: str = "extensive"


# In the order of PyG's y[:, 0..18].
TARGETS: Mapping[str, Target] = {
    "mu": Target("mu", 1.0, "D", "dipole_norm"),
    "alpha": Target("alpha", 1.0, "a0^3"),
    "homo": Target("homo", HARTREE, "eV", "intensive"),
    "lumo": Target("lumo", HARTREE, "eV", "intensive"),
    "gap": Target("gap", HARTREE, "eV", "intensive"),
    "r2": Target("r2", 1.0, "a0^2", "r2"),
    "zpve": Target("zpve", HARTREE, "eV"),
    "U0": Target("u0", HARTREE, "eV"),
    "U": Target("u298", HARTREE, "eV"),
    "H": Target("h298", HARTREE, "eV"),
    "G": Target("g298", HARTREE, "eV"),
    "Cv": Target("cv", 1.0, "cal/mol/K"),
    "U0_atomization": Target("u0_atom", energy_factor("kcal/mol"), "eV"),
    "U_atomization": Target("u298_atom", energy_factor("kcal/mol"), "eV"),
    "H_atomization": Target("h298_atom", energy_factor("kcal/mol"), "eV"),
    "G_atomization": Target("g298_atom", energy_factor("kcal/mol"), "eV"),
    "A": Target("A", 1.0, "GHz", "intensive"),
    "B": Target("B", 1.0, "GHz", "intensive"),
    "C": Target("C", 1.0, "GHz", "intensive"),
}
#: The twelve that are usually learned: regression targets 0 to 11 of the literature and of PyG.
REGRESSION_TARGETS = tuple(TARGETS)[:12]
# Energies (Ha) and heat capacities (cal/mol/K) of the free atoms at the level of the set, from its own atomref.txt.
_ATOMREF: Mapping[str, dict[int, float]] = {
    "U0": {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730},
    "U": {1: -0.498857, 6: -37.845355, 7: -54.582445, 8: -75.063163, 9: -99.717314},
    "H": {1: -0.497912, 6: -37.844411, 7: -54.581501, 8: -75.062219, 9: -99.716370},
    "G": {1: -0.510927, 6: -37.861317, 7: -54.598897, 8: -75.079532, 9: -99.733544},
}
TOTAL_ENERGIES = tuple(name for name in TARGETS if name[:2] in ("U", "H", "G", "U0") or name.endswith("_atomization"))


def load_qm9(
    root: str | Path, target: str | int = "U0_atomization", rows: Iterable[SupportsIndex] | None = None
) -> Frames:
    """Molecules of QM9 with one property, float64, in the order of PyG's ``QM9`` (rows 0 to 130,830).

    Energies of the whole molecule (U0, U, H, G and their atomization energies) are stored as ``energy`` in
    eV; any other target under its own name, in the unit of ``TARGETS``, with shape [1].

    ``root`` is either a folder (or its ``raw/``) with PyG's raw files ``gdb9.sdf``, ``gdb9.sdf.csv`` and
    ``uncharacterized.txt``, read here without RDKit; or a folder or file ``qm9_U0.npz`` (arrays n, Z, R,
    U0_Ha, U0_atomization_eV), which has U0 only.

    Args:
        root: the folder.
        target: a name of ``TARGETS``, or PyG's number of it (12 is ``U0_atomization``).
        rows: which molecules, such as the lists of :func:`qm9_split`; all by default.

    Raises:
        FileNotFoundError: no file of either form.
        ValueError: unknown target, rows out of range, damaged file.
    """
    name = _target_name(target)
    root = Path(root)
    packed = root if root.suffix == ".npz" else root / "qm9_U0.npz"
    if packed.exists():
        return _load_packed(packed, name, rows)
    for folder in (root, root / "raw"):
        if (folder / "gdb9.sdf").exists():
            return _load_sdf(folder, name, rows)
    raise FileNotFoundError(
        f"{str(root)!r} holds neither qm9_U0.npz nor gdb9.sdf; unpack PyG's raw archive "
        f"(torch_geometric.datasets.QM9.raw_url, and raw_url2 as uncharacterized.txt) there"
    )


def qm9_atomref(target: str) -> dict[int, float]:
    """Reference energies (eV) of H, C, N, O, F for a total energy of QM9: U0, U, H or G.

    With them taken off, a total energy is the atomization energy of the same name.

    Args:
        target: name of the energy; zero for each element for atomization energies, which have them off already.

    Raises:
        ValueError: a target that is no energy of the whole molecule.
    """
    name = _target_name(target)
    if name.endswith("_atomization"):
        return dict.fromkeys(_ATOMREF["U0"], 0.0)
    if name not in _ATOMREF:
        raise ValueError(f"target {name!r} has no energies of free atoms; only {', '.join(_ATOMREF)} have")
    return {z: energy * HARTREE for z, energy in _ATOMREF[name].items()}


def load_qm9_dipoles(path: str | Path, rows: Iterable[SupportsIndex] | None = None) -> Frames:
    """10,000 molecules of QM9 with RI-MP2/def2-TZVP dipole *vectors*, in e*angstrom and the frame of ``pos``.

    ``energy`` is the binding energy (eV); ``homo`` (eV) has shape [1]. ``path`` is ``qm9_10k_rimp2.npz``
    or its folder.

    Args:
        path: the file or its folder.
        rows: which molecules; all by default.
    """
    path = Path(path)
    path = path if path.suffix == ".npz" else path / "qm9_10k_rimp2.npz"
    raw = load_arrays(path)
    _require(raw, ("n", "Z", "R", "dipole_au", "binding_Ha", "homo_Ha"), path)
    frames = []
    for frame, row in _molecules(raw, rows, path.name):
        frame.energy = torch.tensor([raw["binding_Ha"][row] * HARTREE], dtype=torch.float64)
        frame.dipole = torch.from_numpy(raw["dipole_au"][row : row + 1].astype(np.float64) * BOHR)
        frame.homo = torch.tensor([raw["homo_Ha"][row] * HARTREE], dtype=torch.float64)
        frames.append(frame)
    sources = {"energy": ("binding_Ha",), "dipole": ("dipole_au",), "homo": ("homo_Ha",)}
    return Frames(frames, name=str(path), sources=sources, available=raw)


def qm9_split(family: str) -> Split:
    """The split of a family of published results, rebuilt from its seed; never put both in one table.

    ================  =========================  ===================================================
    family            train / val / test         rule
    ================  =========================  ===================================================
    ``"dimenet"``     110,000 / 10,000 / 10,831  numpy RandomState(42).permutation (DimeNet, PyG)
    ``"cormorant"``   100,000 / 17,748 / 13,083  numpy RandomState(0).permutation (Cormorant, EGNN)
    ================  =========================  ===================================================

    Args:
        family: one of the two names.

    The rows count the 130,831 molecules of :func:`load_qm9`.

    Raises:
        ValueError: another family.
    """
    if family == "dimenet":
        order = np.random.RandomState(42).permutation(NUM_QM9)
        return Split(order[:110_000], order[110_000:120_000], order[120_000:])
    if family == "cormorant":
        order = np.random.RandomState(0).permutation(NUM_QM9)
        return Split(order[:100_000], order[100_000:117_748], order[117_748:])
    raise ValueError(
        f"family must be 'dimenet' (110,000/10,000/10,831) or 'cormorant' (100,000/17,748/13,083), got {family!r}"
    )


def _target_name(target: str | int) -> str:
    names = list(TARGETS)
    if isinstance(target, int):
        if not 0 <= target < len(names):
            raise ValueError(f"target must lie in 0..{len(names) - 1} or be a name, got {target}")
        return names[target]
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not in QM9; {nearest(target, names)}")
    return target


def _store(frame: AtomicData, name: str, value: float, where: str) -> AtomicData:
    frame["energy" if name in TOTAL_ENERGIES else name] = torch.tensor([value], dtype=torch.float64)
    if not np.isfinite(value):
        raise ValueError(f"{where}: {name} is {value}; remove the molecule")
    check_frame(frame, where)
    return frame


def _frames(frames: list[AtomicData], path: Path, name: str, key: str, available: Iterable[str]) -> Frames:
    label = "energy" if name in TOTAL_ENERGIES else name
    return Frames(frames, name=f"{path} ({name})", sources={label: (key,)}, available=available)


def _require(raw: Mapping[str, np.ndarray], keys: Iterable[str], path: Path) -> None:
    for key in keys:
        if key not in raw:
            raise ValueError(f"{path.name} has no array {key!r}; {nearest(key, raw)}")


def _molecules(
    raw: Mapping[str, np.ndarray], rows: Iterable[SupportsIndex] | None, name: str
) -> Iterable[tuple[AtomicData, int]]:
    """Molecules of concatenated arrays: n atoms each, Z and R one after the other."""
    ends = np.cumsum(raw["n"])
    if int(ends[-1]) != len(raw["Z"]) or raw["R"].shape != (len(raw["Z"]), 3):
        raise ValueError(
            f"{name}: Z and R must hold sum(n) = {int(ends[-1])} atoms, got {len(raw['Z'])} and {list(raw['R'].shape)}"
        )
    # Checked once for all molecules: frame by frame it would take longer than reading.
    for key, value in raw.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{name}: {key} holds NaN or infinity at {np.argwhere(~np.isfinite(value))[0].tolist()}")
    if raw["n"].min() < 1 or raw["Z"].min() < 1 or raw["Z"].max() > 118:
        raise ValueError(f"{name}: every molecule must have atoms with atomic numbers in 1..118")
    for row in chosen_rows(rows, len(ends), name):
        atoms = slice(int(ends[row] - raw["n"][row]), int(ends[row]))
        z = torch.from_numpy(raw["Z"][atoms].astype(np.int64))
        yield AtomicData(z=z, pos=torch.from_numpy(raw["R"][atoms].astype(np.float64))), row


def _load_packed(path: Path, name: str, rows: Iterable[SupportsIndex] | None) -> Frames:
    columns = {"U0": ("U0_Ha", HARTREE), "U0_atomization": ("U0_atomization_eV", 1.0)}
    if name not in columns:
        raise ValueError(f"target {name!r} is not in {path.name}, which has U0 and U0_atomization only")
    key, factor = columns[name]
    raw = load_arrays(path)
    _require(raw, ("n", "Z", "R", key), path)
    energies = raw[key].astype(np.float64) * factor
    frames = []
    for frame, row in _molecules(raw, rows, path.name):
        frame.energy = torch.from_numpy(energies[row : row + 1].copy())
        frames.append(frame)
    return _frames(frames, path, name, key, raw)


def _load_sdf(folder: Path, name: str, rows: Iterable[SupportsIndex] | None) -> Frames:
    for file in ("gdb9.sdf.csv", "uncharacterized.txt"):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing beside gdb9.sdf; PyG's QM9 downloads it")
    target = TARGETS[name]
    head, *lines = (folder / "gdb9.sdf.csv").read_text().splitlines()
    columns = head.split(",")
    if target.column not in columns:
        raise ValueError(f"gdb9.sdf.csv has no column {target.column!r}; {nearest(target.column, columns)}")
    column = columns.index(target.column)
    # Nine lines of heading and two of closing stand around the list of failed molecules, counted from 1.
    failed = {int(line.split()[0]) - 1 for line in (folder / "uncharacterized.txt").read_text().split("\n")[9:-2]}
    entries = (folder / "gdb9.sdf").read_text().split("$$$$\n")[:-1]
    if len(entries) != len(lines):
        raise ValueError(
            f"gdb9.sdf holds {len(entries)} molecules and gdb9.sdf.csv {len(lines)}; use files of one archive"
        )
    kept = [i for i in range(len(entries)) if i not in failed]
    frames = []
    for row in chosen_rows(rows, len(kept), "gdb9.sdf"):
        entry, where = kept[row], f"molecule {kept[row]} of gdb9.sdf"
        value = float(lines[entry].split(",")[column]) * target.factor
        frames.append(_store(_molfile(entries[entry], where), name, value, where))
    return _frames(frames, folder / "gdb9.sdf", name, target.column, columns)


def _molfile(text: str, where: str) -> AtomicData:
    """Species and positions of a V2000 mol block: three lines of heading, the counts, one line per atom."""
    lines = text.split("\n")
    try:
        count = int(lines[3][:3])
        words = [line.split() for line in lines[4 : 4 + count]]
        pos = np.array([[float(x) for x in word[:3]] for word in words]).reshape(-1, 3)
        z = torch.tensor([atomic_numbers[word[3]] for word in words], dtype=torch.long)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{where} is no V2000 mol block ({error})") from None
    return AtomicData(z=z, pos=torch.from_numpy(pos))
