"""The products on a GPU: Triton kernels generated from the coupling tables, one lane for each channel.

Every kernel has the arguments and results of the corresponding C function (:mod:`nbody_pyg.kernels.codegen`). No sum
uses atomics, so results are reproducible bit for bit.
"""
