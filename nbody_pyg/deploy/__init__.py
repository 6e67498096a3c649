"""Deployment: the model file, the ASE calculator and molecular dynamics."""

from nbody_pyg.deploy.calculator import NBodyCalculator
from nbody_pyg.deploy.dynamics import MDReport, run_md
from nbody_pyg.deploy.fingerprint import cg_fingerprint
from nbody_pyg.deploy.model_file import FORMAT_VERSION, load_model, read_metadata, save_model
from nbody_pyg.deploy.reference import reference_topology, with_reference

__all__ = [
    "FORMAT_VERSION",
    "MDReport",
    "NBodyCalculator",
    "cg_fingerprint",
    "load_model",
    "read_metadata",
    "reference_topology",
    "run_md",
    "save_model",
    "with_reference",
]
