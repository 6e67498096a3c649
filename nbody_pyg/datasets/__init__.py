"""Data: readers, splits, label audit, reference energies, benchmarks and the embedded sets."""

from __future__ import annotations

from nbody_pyg.datasets.arrays import read_npz
from nbody_pyg.datasets.audit import LabelTable, label_audit, require_labels
from nbody_pyg.datasets.clusters import charged_clusters
from nbody_pyg.datasets.embedded import embedded, embedded_folder, embedded_manifest, load_embedded
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.datasets.md17 import load_md17, load_rmd17
from nbody_pyg.datasets.particles import charged_particles
from nbody_pyg.datasets.pyg import from_pyg
from nbody_pyg.datasets.qm9 import load_qm9, load_qm9_dipoles, qm9_atomref, qm9_split
from nbody_pyg.datasets.readers import read_frames
from nbody_pyg.datasets.reference import fit_atomic_energies, fit_reference  # noqa: F401 (the old name)
from nbody_pyg.datasets.splits import FrameSplit, Split, read_indices, read_split, split_indices
from nbody_pyg.datasets.units import UnitFiles

__all__ = [
    "FrameSplit",
    "Frames",
    "LabelTable",
    "Split",
    "UnitFiles",
    "charged_clusters",
    "charged_particles",
    "embedded",
    "embedded_folder",
    "embedded_manifest",
    "fit_atomic_energies",
    "from_pyg",
    "label_audit",
    "load_embedded",
    "load_md17",
    "load_qm9",
    "load_qm9_dipoles",
    "load_rmd17",
    "qm9_atomref",
    "qm9_split",
    "read_frames",
    "read_indices",
    "read_npz",
    "read_split",
    "require_labels",
    "split_indices",
]
