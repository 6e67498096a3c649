"""Deployment: the model file, the ASE calculator and molecular dynamics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbody_pyg.deploy.calculator import NBodyCalculator
from nbody_pyg.deploy.committee import Committee, stop_on_uncertainty
from nbody_pyg.deploy.energies import EnergyExplanation, explain_energy
from nbody_pyg.deploy.energy_plot import plot_energy_parts
from nbody_pyg.deploy.reference import reference_record, reference_topology, with_reference
from nbody_pyg.deploy.relax import Relaxation, relax
from nbody_pyg.io.fingerprint import cg_fingerprint
from nbody_pyg.io.model_file import find_model, load_model, read_metadata, save_model, shipped_models
from nbody_pyg.io.upgrades import FORMAT_VERSION
from nbody_pyg.lazy_imports import imported_later

if TYPE_CHECKING:
    from nbody_pyg.deploy.dynamics import MDReport, run_md
    from nbody_pyg.deploy.infrared import InfraredSpectrum, infrared_spectrum, plot_infrared
    from nbody_pyg.deploy.solids import SolidProperties, plot_equation_of_state, solid_properties

__all__ = [
    "FORMAT_VERSION",
    "Committee",
    "EnergyExplanation",
    "InfraredSpectrum",
    "MDReport",
    "NBodyCalculator",
    "Relaxation",
    "SolidProperties",
    "cg_fingerprint",
    "explain_energy",
    "find_model",
    "infrared_spectrum",
    "load_model",
    "plot_energy_parts",
    "plot_equation_of_state",
    "plot_infrared",
    "read_metadata",
    "reference_record",
    "reference_topology",
    "relax",
    "run_md",
    "save_model",
    "shipped_models",
    "solid_properties",
    "stop_on_uncertainty",
    "with_reference",
]

# They load ``ase.io`` and scipy, which forces do not need
__getattr__ = imported_later(__name__, {
    "MDReport": "dynamics", "run_md": "dynamics", "SolidProperties": "solids", "solid_properties": "solids",
    "plot_equation_of_state": "solids", "InfraredSpectrum": "infrared", "infrared_spectrum": "infrared",
    "plot_infrared": "infrared",
})  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
