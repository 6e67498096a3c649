"""The products on a GPU: Triton kernels written out from the coupling tables, one lane for each channel.

Nothing here is a tensor operation of its own: every kernel has the arguments and the results of the C function
beside it (:mod:`nbody_pyg.kernels.codegen`). No sum uses atomics, so that results repeat bit for bit.
"""
