"""What the native evaluator can compute, and the reason where it cannot."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from nbody_pyg.energy import AtomicReference
from nbody_pyg.hierarchy import NestedShells
from nbody_pyg.kernels import backend, build
from nbody_pyg.longrange.charges import LatentCharges
from nbody_pyg.longrange.coulomb import DirectField, LongRange
from nbody_pyg.models import NBodyNet
from nbody_pyg.nn.as_written import AsWritten, written
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.electronic import ElectronicEmbedding
from nbody_pyg.nn.gates import DensityGate, OneBodyGate, ProductGate
from nbody_pyg.nn.harmonics import SolidHarmonics
from nbody_pyg.nn.inner_cutoff import InnerCutoff
from nbody_pyg.nn.interaction import Interaction, SoftNorm, SpeciesScale
from nbody_pyg.nn.linear import IrrepsLinear, RowLinear
from nbody_pyg.nn.products import ChannelwiseProduct, PathLinear
from nbody_pyg.nn.readout import LinearReadout, MLPReadout
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.potential import Potential
from nbody_pyg.radial import BesselBasis, InversePowers

#: Classes whose computation the generated program holds.
KNOWN = written(
    Potential, NBodyNet, EdgeEmbedding, SolidHarmonics, BesselBasis, InversePowers, Interaction, DensityGate,
    OneBodyGate, ProductGate, ChannelwiseProduct, PathLinear, RowLinear, SpeciesScale, SoftNorm, nn.Identity,
    LinearReadout, MLPReadout, IrrepsLinear, nn.Sequential, nn.Linear, nn.SiLU, ZBLRepulsion, AtomicReference,
    InnerCutoff, ElectronicEmbedding, LongRange, LatentCharges, DirectField,
)  # fmt: skip
#: Methods of a potential and of a network beside ``forward`` that evaluation passes through.
_STEPS = {
    Potential: ("evaluate", "system", "energies"),
    NBodyNet: ("total", "values", "states", "_states", "hierarchy", "energies"),
    ZBLRepulsion: ("_pair",),
    LongRange: ("_local", "factors"),
    LatentCharges: ("_transferred",),
}
_WRITTEN = {(kind, name): getattr(kind, name) for kind, names in _STEPS.items() for name in names}
#: Precisions of the program, and the type of its numbers in C.
REALS = {torch.float32: "float", torch.float64: "double"}


def why_not(potential: nn.Module) -> str | None:
    """Reason why the native evaluator cannot compute this potential, or None if it can.

    It computes an :class:`~nbody_pyg.models.NBodyNet` of energies on :class:`~nbody_pyg.hierarchy.NestedShells` with
    one multiplicity per level, latent charges by the method "direct", the repulsion of nuclei, and the energies of
    isolated atoms. A network with the inputs charge and spin is computed for neutral singlets
    (:meth:`~nbody_pyg.models.NBodyNet.neutral`), and one that places given charges on the atoms for systems without.
    """
    if type(potential) is not Potential:
        return f"the potential is a {type(potential).__name__}"
    model = potential.model
    if type(model) is not NBodyNet:
        return f"the model is a {type(model).__name__}, not an NBodyNet"
    return _of_network(model) or _of_terms(potential, model) or _of_modules(potential, model)


def why_not_here() -> str | None:
    """Reason why no native program can be compiled and run in this process, or None."""
    if problem := build.broken():
        return problem
    chosen = backend()
    return None if chosen == "c" else f"the backend of the products is {chosen!r}"


def radii_of(model: NBodyNet) -> tuple[float, ...]:
    """Radii of the shells of a network, angstrom."""
    return model.scheme.radii if isinstance(model.scheme, NestedShells) else ()


def _of_network(model: NBodyNet) -> str | None:
    if type(model.scheme) is not NestedShells:
        return f"the scheme is {type(model.scheme).__name__}, not NestedShells"
    if model.gates:
        return "the network has gates of its own"
    if (long_range := model.long_range_config) is not None:
        if long_range.method != "direct":
            return f"the network has long-range energies by the method {long_range.method!r}"
        if long_range.dipoles:
            return "the latent charges of the network have dipoles"
    if model.node_inputs is not None:
        return f"the network has the node inputs {model.node_inputs}"
    if str(model.irreps_out) != "1x0e" or model.readout != "sum":
        return f"the network gives {model.irreps_out} (readout {model.readout!r}), not an energy"
    if model.dtype not in REALS:
        return f"the weights are in {model.dtype}"
    if wide := [str(one) for one in model.level_types.values() if len({mul for mul, _ in one}) > 1]:
        return f"states have several multiplicities ({wide[0]})"
    return None


def _of_terms(potential: Potential, model: NBodyNet) -> str | None:
    repulsion, reference = potential.repulsion, potential.reference
    if len(potential.terms):
        return f"the energy has a term of its own, {type(potential.terms[0]).__name__}"
    if repulsion is not None:
        if not set(model.species) <= set(repulsion.species):
            return "the repulsion does not know all elements of the network"
        if repulsion.cutoff > max(radii_of(model)):
            return f"the repulsion reaches {repulsion.cutoff:g} angstrom, beyond the shells"
    if reference is not None and not set(model.species) <= set(reference.species):
        return "energies of isolated atoms do not hold all elements of the network"
    return None


def why_no_longer(potential: Potential) -> str | None:
    """Quick form of :func:`why_not` for a potential that had no reason: what modules and hooks do not show."""
    return _of_terms(potential, cast(NBodyNet, potential.model)) or _of_methods(potential)


def _of_modules(potential: Potential, model: NBodyNet) -> str | None:
    layers = list(model.interactions)
    if any(type(layer) is not Interaction or not layer._as_written() for layer in layers):
        return "a layer was replaced, changed or hooked"
    if not AsWritten(potential, KNOWN)():
        return "a module was replaced, changed or hooked"
    return _of_methods(potential)


def _of_methods(potential: Potential) -> str | None:
    for (kind, name), method in _WRITTEN.items():
        if getattr(kind, name) is not method:
            return f"{kind.__name__}.{name} was replaced"
    long_range = cast(NBodyNet, potential.model).long_range
    charges = None if long_range is None else long_range.charges
    for module in (potential, potential.model, potential.repulsion, long_range, charges):
        if any(name in vars(module) for name in _STEPS.get(type(module), ())):
            return "a method of the potential was replaced"
    return None
