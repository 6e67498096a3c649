"""Covariant layers: types, linear maps, products, gates, readouts."""

from nbody_pyg.nn.conv import NBodyConv
from nbody_pyg.nn.gates import DensityGate, FullGate, OneBodyGate, PairGate, ProductGate
from nbody_pyg.nn.graph import InteractionGraph
from nbody_pyg.nn.interaction import SoftNorm
from nbody_pyg.nn.irreps import from_mul_ir, hidden_irreps, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.nn.pool import NBodyConnect, NBodyPooling, NBodyReduce, NBodySelect
from nbody_pyg.nn.products import ChannelwiseProduct, FullProduct

__all__ = [
    "ChannelwiseProduct",
    "DensityGate",
    "FullGate",
    "FullProduct",
    "InteractionGraph",
    "IrrepsLinear",
    "NBodyConnect",
    "NBodyConv",
    "NBodyPooling",
    "NBodyReduce",
    "NBodySelect",
    "OneBodyGate",
    "PairGate",
    "ProductGate",
    "SoftNorm",
    "from_mul_ir",
    "hidden_irreps",
    "to_mul_ir",
]
