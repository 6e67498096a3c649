"""rMD17 and MD17 from their own raw files, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import SupportsIndex

from nbody_pyg.datasets.arrays import load_arrays, read_npz
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.datasets.splits import FrameSplit, Split, read_indices
from nbody_pyg.messages import nearest
from nbody_pyg.units import Units

RMD17_MOLECULES = (
    "aspirin", "azobenzene", "benzene", "ethanol", "malonaldehyde", "naphthalene", "paracetamol", "salicylic",
    "toluene", "uracil",
)  # fmt: skip
MD17_FILES: Mapping[str, str] = {
    "aspirin": "md17_aspirin.npz",
    "azobenzene": "azobenzene_dft.npz",
    "benzene": "md17_benzene2017.npz",
    "benzene FHI-aims": "benzene2018_dft.npz",
    "ethanol": "md17_ethanol.npz",
    "malonaldehyde": "md17_malonaldehyde.npz",
    "naphthalene": "md17_naphthalene.npz",
    "paracetamol": "paracetamol_dft.npz",
    "salicylic acid": "md17_salicylic.npz",
    "toluene": "md17_toluene.npz",
    "uracil": "md17_uracil.npz",
}
_KCAL = Units("kcal/mol", "angstrom")
_POOL = 1000  # frames of each published training list


def load_rmd17(
    root: str | Path,
    molecule: str,
    split: int = 1,
    *,
    num_train: int = 950,
    num_val: int = 50,
) -> FrameSplit:
    """Revised MD17 in eV and eV/angstrom, float64, in the published split ``split`` (1 to 5).

    Training and validation frames are the first ``num_train`` and the next ``num_val`` of the split's list
    of 1000; the test frames are all of its test list. The lists of different splits share frames: do not
    mix them.

    ``root`` holds either ``rmd17_<molecule>_train_01.npz`` and ``..._test_01.npz``, or the published
    archive as PyG unpacks it: ``[raw/]rmd17/npz_data/rmd17_<molecule>.npz`` with
    ``rmd17/splits/index_train_01.csv``.

    Args:
        root: the folder.
        molecule: one of ``RMD17_MOLECULES``.
        split: number of the published split.
        num_train: frames for training.
        num_val: frames for validation.

    Raises:
        FileNotFoundError: neither layout is there; the message names the files looked for.
        ValueError: unknown molecule or split, more than 1000 frames wanted, train and test that share frames.

    Source: Christensen and von Lilienfeld 2020, doi:10.6084/m9.figshare.12672038 (CC0), PBE/def2-SVP.
    """
    molecule = molecule.removesuffix(" acid")
    if molecule not in RMD17_MOLECULES:
        raise ValueError(f"molecule {molecule!r} is not in rMD17; {nearest(molecule, RMD17_MOLECULES)}")
    if split not in range(1, 6):
        raise ValueError(f"split must be 1, 2, 3, 4 or 5, got {split!r}")
    if num_train < 1 or num_val < 0 or num_train + num_val > _POOL:
        raise ValueError(
            f"num_train + num_val must take 1 to {_POOL} frames (the split's training list), "
            f"got {num_train} + {num_val}"
        )
    root = Path(root)
    pair = [root / f"rmd17_{molecule}_{part}_{split:02d}.npz" for part in ("train", "test")]
    if all(path.exists() for path in pair):
        pool, test = (read_npz(path, units=_KCAL) for path in pair)
        if set(_md17_rows(pair[0])) & set(_md17_rows(pair[1])):
            raise ValueError(f"{pair[0].name} and {pair[1].name} share frames; use files of one split")
        if num_train + num_val > len(pool):
            raise ValueError(f"{pair[0].name} holds {len(pool)} frames, got {num_train} + {num_val} to take")
        return FrameSplit(pool[:num_train], pool[num_train : num_train + num_val], test)
    archive = _archive(root, molecule, pair[0].name)
    lists = [archive / "splits" / f"index_{part}_{split:02d}.csv" for part in ("train", "test")]
    if not all(path.exists() for path in lists):
        raise FileNotFoundError(
            f"{lists[0]} is missing: the archive of rMD17 has it under splits/; "
            f"with load_md17(root, 'revised {molecule}') and split_indices you make a split of your own"
        )
    train, test_rows = (read_indices(path) for path in lists)
    rows = Split(train[:num_train], train[num_train : num_train + num_val], test_rows)
    return rows.apply(read_npz(archive / "npz_data" / f"rmd17_{molecule}.npz", units=_KCAL))


def load_md17(root: str | Path, molecule: str, rows: Iterable[SupportsIndex] | slice | None = None) -> Frames:
    """Every frame of a raw MD17 or rMD17 file, in eV and eV/angstrom, float64.

    Args:
        root: the folder with the file, or the root that was given to PyG's ``MD17``.
        molecule: PyG's name: ``"ethanol"``, ``"benzene FHI-aims"``, ``"revised ethanol"``, ...
        rows: which frames; all by default. MD17 has up to 627,983.

    Raises:
        FileNotFoundError: no such file under ``root``.
        ValueError: unknown molecule, damaged file.

    The energies of MD17 are noisy; use rMD17 where it matters, and never train on more than 1000 frames of
    either.
    """
    root = Path(root)
    if molecule.startswith("revised "):
        name = molecule.removeprefix("revised ").removesuffix(" acid")
        if name not in RMD17_MOLECULES:
            raise ValueError(f"molecule {name!r} is not in rMD17; {nearest(name, RMD17_MOLECULES)}")
        return read_npz(
            _archive(root, name, f"rmd17_{name}.npz") / "npz_data" / f"rmd17_{name}.npz",
            units=_KCAL,
            rows=rows,
        )
    if molecule not in MD17_FILES:
        names = [*MD17_FILES, *(f"revised {name}" for name in RMD17_MOLECULES)]
        raise ValueError(f"molecule {molecule!r} is not in MD17; {nearest(molecule, names)}")
    file = MD17_FILES[molecule]
    for folder in (root, root / "raw", root / molecule / "raw"):
        if (folder / file).exists():
            return read_npz(folder / file, units=_KCAL, rows=rows)
    raise FileNotFoundError(
        f"{file} is neither in {root} nor in its raw/; download it from http://www.sgdml.org, or let "
        f"torch_geometric.datasets.MD17({str(root)!r}, {molecule!r}) do so"
    )


def _archive(root: Path, molecule: str, other: str) -> Path:
    """The folder that holds npz_data/ and splits/ of the published archive."""
    for folder in (
        root / "raw" / "rmd17",
        root / "rmd17",
        root,
        root / f"revised {molecule}" / "raw" / "rmd17",
    ):
        if (folder / "npz_data" / f"rmd17_{molecule}.npz").exists():
            return folder
    raise FileNotFoundError(
        f"{str(root)!r} holds neither {other} nor rmd17/npz_data/rmd17_{molecule}.npz; unpack the archive of "
        f"https://doi.org/10.6084/m9.figshare.12672038 there, or let PyG's MD17 download it"
    )


def _md17_rows(path: Path) -> list[int]:
    arrays = load_arrays(path)
    return arrays["old_indices"].tolist() if "old_indices" in arrays else []
