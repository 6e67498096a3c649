"""The data sets that come with the library: GFN2-xTB dynamics of ethanol and alanine dipeptide."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nbody_pyg.datasets.arrays import read_npz
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.messages import nearest
from nbody_pyg.renamed import former

SPLITS = ("train", "test_300K", "test_600K")
_CURE = (
    "reinstall the package, or run from a checkout of the repository; "
    "`python datasets/make_embedded.py` there makes the files again"
)


def embedded_folder() -> Path:
    """Where the files lie: inside the installed package, else in ``datasets/embedded`` of the repository.

    Raises:
        FileNotFoundError: in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "_embedded", package.parents[1] / "datasets" / "embedded")
    for place in places:
        if (place / "manifest.json").exists():
            return place
    raise FileNotFoundError(f"the embedded data sets are missing (looked in {places[0]} and {places[1]}); {_CURE}")


def embedded_manifest() -> dict[str, Any]:
    """Level of theory, versions, seed, licence, and for each file its size, checksum and statistics."""
    manifest: dict[str, Any] = json.loads((embedded_folder() / "manifest.json").read_text())
    return manifest


def load_embedded(molecule: str, split: str = "train") -> Frames:
    """Frames of an embedded data set, float64, in eV and eV/angstrom.

    ====================  ==========================================================
    molecule              ``"ethanol"`` (9 atoms), ``"alanine_dipeptide"`` (22 atoms)
    ``"train"``           300 K, about 1000 frames
    ``"test_300K"``       300 K, other trajectories
    ``"test_600K"``       600 K, other trajectories: extrapolation
    ====================  ==========================================================

    Args:
        molecule: one of the two names.
        split: one of the three parts.

    Level of theory GFN2-xTB; see ``datasets/embedded/README.md``. Licence CC0.

    Raises:
        ValueError: unknown molecule or split, or a damaged file (its checksum differs).
        FileNotFoundError: the files were not installed.

    Example:
        >>> from nbody_pyg.datasets import load_embedded
        >>> load_embedded("ethanol", "test_300K")[0].forces.shape
        torch.Size([9, 3])
    """
    files = embedded_manifest()["files"]
    molecules = sorted({entry["molecule"] for entry in files.values()})
    if molecule not in molecules:
        raise ValueError(f"molecule {molecule!r} is not embedded; {nearest(molecule, molecules)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; {nearest(split, SPLITS)}")
    name = f"{molecule}_{split}.npz"
    path = embedded_folder() / name
    if not path.exists():
        raise FileNotFoundError(f"the embedded file {path} is missing; {_CURE}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != files[name]["sha256"]:
        raise ValueError(f"the embedded file {path} is damaged (its checksum differs from manifest.json); {_CURE}")
    frames = read_npz(path)
    frames.name = f"{molecule} {split}"
    return frames


embedded = former("embedded", load_embedded)
