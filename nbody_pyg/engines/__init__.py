"""Adapters to other simulation programs; each module imports its program at its first use.

=====================  ==========================================================
module                 program
=====================  ==========================================================
``engines.lammps``     LAMMPS, by ``fix external`` (one rank)
``engines.openmm``     OpenMM, by ``PythonForce``; ML/MM with OpenMM-ML
``engines.ipi``        i-PI, by ``ffdirect``; all beads in one call
``engines.torchsim``   TorchSim, by ``ModelInterface``
=====================  ==========================================================

docs/engines.md has a script for each. ASE and its sockets need no adapter.
"""
