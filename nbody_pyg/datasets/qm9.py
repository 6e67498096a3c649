"""QM9 in float64 from the package qm9pack or its own raw files, its two families of splits, and dipole vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from ase.data import atomic_numbers

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.arrays import load_arrays
from nbody_pyg.datasets.frames import Frames, check_frame, chosen_rows
from nbody_pyg.datasets.qm9pack import TENSOR, read_qm9pack
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
#: Columns of the package qm9pack. It has no atomization energies: the free atoms are taken off here.
_PACKAGE: Mapping[str, str] = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "gap": "HOMO_LUMO_gap_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "U0": "InternalEnergy_0K_au",
    "U": "InternalEnergy_298K_au",
    "H": "Enthalphy_298K_au",
    "G": "GibbsFreeEnergy_298K_au",
    "Cv": "Heatcapacity_Cv_cal_mol_K",
    "A": "RotA_GHz",
    "B": "RotB_GHz",
    "C": "RotC_GHz",
}
#: What the package has beside the targets, with its columns.
_EXTRAS: Mapping[str, tuple[str, ...]] = {"mulliken_charges": ("Mulliken_pop",), "polarizability_tensor": TENSOR}


def load_qm9(
    root: str | Path | None = None,
    target: str | int | Sequence[str | int] = "U0_atomization",
    rows: Iterable[SupportsIndex] | None = None,
) -> Frames:
    """Molecules of QM9 with one or more properties, float64, in the order of PyG's ``QM9`` (rows 0 to 130,830).

    One target is stored under its own name, in the unit of ``TARGETS``, with shape [1]; an energy of the whole molecule
    (U0, U, H, G and their atomization energies) as ``energy`` in eV. Several targets all keep their own names.

    Without ``root`` the package ``qm9pack`` is read (``pip install 'nbody_pyg[qm9]'``; its text files, nothing of it is
    imported). It has two more targets:

    =========================  =============================================================================
    ``mulliken_charges``       [N], in e
    ``polarizability_tensor``  [1, 3, 3], in a0^3; its axes are those of the calculation, not those of
                               ``pos``: only trace and eigenvalues have a meaning beside ``pos``
    =========================  =============================================================================

    ``root`` is either a folder (or its ``raw/``) with PyG's raw files ``gdb9.sdf``, ``gdb9.sdf.csv`` and
    ``uncharacterized.txt``, read here without RDKit; or a folder or file ``qm9_U0.npz`` (arrays n, Z, R,
    U0_Ha, U0_atomization_eV), which has U0 only.

    Args:
        root: the folder, or None for the package.
        target: a name of ``TARGETS``, or PyG's number of it (12 is ``U0_atomization``); a list of them; or ``"all"``
            for the twelve of ``REGRESSION_TARGETS``.
        rows: which molecules, such as the lists of :func:`qm9_split`; all by default.

    Raises:
        FileNotFoundError: no file of either form.
        ImportError: no ``root``, and the package is not installed.
        ValueError: unknown target, a target that the files lack, rows out of range, damaged file.
    """
    labels = target_labels(target)
    if root is None:
        return _load_package(labels, rows)
    root = Path(root)
    if lacking := [name for name in labels.values() if name in _EXTRAS]:
        raise ValueError(f"target {lacking[0]!r} is in the package qm9pack only; leave out the folder {str(root)!r}")
    packed = root if root.suffix == ".npz" else root / "qm9_U0.npz"
    if packed.exists():
        return _load_packed(packed, labels, rows)
    for folder in (root, root / "raw"):
        if (folder / "gdb9.sdf").exists():
            return _load_sdf(folder, labels, rows)
    raise FileNotFoundError(
        f"{str(root)!r} holds neither qm9_U0.npz nor gdb9.sdf; leave the folder out to read the package qm9pack, or "
        f"unpack PyG's raw archive (torch_geometric.datasets.QM9.raw_url, and raw_url2 as uncharacterized.txt) there"
    )


def target_labels(target: str | int | Sequence[str | int]) -> dict[str, str]:
    """The key on the frames of each target, with the name of the target; see :func:`load_qm9`.

    >>> target_labels("U0"), target_labels(["mu", "U0"])
    ({'energy': 'U0'}, {'mu': 'mu', 'U0': 'U0'})
    """
    if target == "all":
        target = REGRESSION_TARGETS
    if isinstance(target, (str, int)):
        name = _target_name(target)
        return {"energy" if name in TOTAL_ENERGIES else name: name}
    names = [_target_name(one) for one in target]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"target must list different targets of QM9, got {list(target)}")
    return {name: name for name in names}


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
    if target not in TARGETS and target not in _EXTRAS:
        raise ValueError(f"target {target!r} is not in QM9; {nearest(target, [*names, *_EXTRAS])}")
    return target


def _frames(
    frames: list[AtomicData], place: str, labels: Mapping[str, str], keys: Mapping[str, Sequence[str]],
    available: Iterable[str],
) -> Frames:  # fmt: skip
    sources = {label: tuple(keys[name]) for label, name in labels.items()}
    return Frames(frames, name=f"{place} ({', '.join(labels.values())})", sources=sources, available=available)


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


def _load_packed(path: Path, labels: Mapping[str, str], rows: Iterable[SupportsIndex] | None) -> Frames:
    columns = {"U0": ("U0_Ha", HARTREE), "U0_atomization": ("U0_atomization_eV", 1.0)}
    if lacking := [name for name in labels.values() if name not in columns]:
        raise ValueError(
            f"target {lacking[0]!r} is not in {path.name}, which has U0 and U0_atomization only; leave the folder out "
            "to read the package qm9pack"
        )
    raw = load_arrays(path)
    _require(raw, ("n", "Z", "R", *(columns[name][0] for name in labels.values())), path)
    values = {label: raw[columns[name][0]] * columns[name][1] for label, name in labels.items()}
    frames = [_labelled(frame, row, values) for frame, row in _molecules(raw, rows, path.name)]
    return _frames(frames, str(path), labels, {name: (key,) for name, (key, _) in columns.items()}, raw)


def _labelled(frame: AtomicData, row: int, values: Mapping[str, np.ndarray]) -> AtomicData:
    """The frame with the value of its row for each label, float64."""
    for label, value in values.items():
        frame[label] = torch.from_numpy(value[row : row + 1].astype(np.float64))
    return frame


def _load_package(labels: Mapping[str, str], rows: Iterable[SupportsIndex] | None) -> Frames:
    targets = {name: (_PACKAGE[name.removesuffix("_atomization")],) for name in TARGETS}
    keys: Mapping[str, Sequence[str]] = {**targets, **_EXTRAS}
    raw = read_qm9pack({key for name in labels.values() for key in keys[name]})
    starts = np.cumsum(raw["n"]) - raw["n"]
    values = {}
    for label, name in labels.items():
        if name == "polarizability_tensor":
            values[label] = np.stack([raw[key] for key in TENSOR], axis=1).reshape(-1, 3, 3)
        elif name.endswith("_atomization"):
            free = np.zeros(119)
            free[list(_ATOMREF["U0"])] = list(_ATOMREF[name.removesuffix("_atomization")].values())
            values[label] = (raw[keys[name][0]] - np.add.reduceat(free[raw["Z"]], starts)) * HARTREE
        elif name in TARGETS:
            values[label] = raw[keys[name][0]] * TARGETS[name].factor
    frames = []
    for frame, row in _molecules(raw, rows, "qm9pack"):
        if "mulliken_charges" in labels:
            atoms = slice(int(starts[row]), int(starts[row] + raw["n"][row]))
            frame.mulliken_charges = torch.from_numpy(raw["Mulliken_pop"][atoms].copy())
        frames.append(_labelled(frame, row, values))
    return _frames(frames, "qm9pack", labels, keys, raw)


def _load_sdf(folder: Path, labels: Mapping[str, str], rows: Iterable[SupportsIndex] | None) -> Frames:
    for file in ("gdb9.sdf.csv", "uncharacterized.txt"):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing beside gdb9.sdf; PyG's QM9 downloads it")
    head, *lines = (folder / "gdb9.sdf.csv").read_text().splitlines()
    columns = head.split(",")
    for name in labels.values():
        if TARGETS[name].column not in columns:
            raise ValueError(
                f"gdb9.sdf.csv has no column {TARGETS[name].column!r}; {nearest(TARGETS[name].column, columns)}"
            )
    places = {label: columns.index(TARGETS[name].column) for label, name in labels.items()}
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
        frame, words = _molfile(entries[entry], where), lines[entry].split(",")
        for label, place in places.items():
            value = float(words[place]) * TARGETS[labels[label]].factor
            if not np.isfinite(value):
                raise ValueError(f"{where}: {labels[label]} is {value}; remove the molecule")
            frame[label] = torch.tensor([value], dtype=torch.float64)
        check_frame(frame, where)
        frames.append(frame)
    keys = {name: (TARGETS[name].column,) for name in labels.values()}
    return _frames(frames, str(folder / "gdb9.sdf"), labels, keys, columns)


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
