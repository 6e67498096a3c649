"""The native evaluator: a potential as one generated C program, without Python and torch inside.

==========================  ===================================================================================
:func:`why_not`             reason why a potential cannot be one, or None
:class:`NativeEvaluator`    energies, forces and virial in this process, compiled at the first use
:func:`export_c`            a folder with source, header, weights and an example, for other programs
==========================  ===================================================================================
"""

from nbody_pyg.native.binding import CompiledModel, Edges, Result
from nbody_pyg.native.evaluator import NativeEvaluator
from nbody_pyg.native.export import export_c
from nbody_pyg.native.program import Program, write_program
from nbody_pyg.native.support import why_not, why_not_here

__all__ = [
    "CompiledModel",
    "Edges",
    "NativeEvaluator",
    "Program",
    "Result",
    "export_c",
    "why_not",
    "why_not_here",
    "write_program",
]
