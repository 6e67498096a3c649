"""The layers of a network as the native program has them: sizes, generated functions and weights of each shell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from nbody_pyg.hierarchy import NestedShells
from nbody_pyg.kernels import codegen
from nbody_pyg.kernels.edges import feature_source, window_source
from nbody_pyg.kernels.update_source import Update, update_source, workspace_size
from nbody_pyg.models import NBodyNet
from nbody_pyg.native.pieces import Pieces
from nbody_pyg.nn.interaction import Interaction
from nbody_pyg.nn.products import ChannelwiseProduct
from nbody_pyg.nn.readout import LinearReadout, MLPReadout
from nbody_pyg.required import required


@dataclass(frozen=True)
class Shell:
    """One shell of a network: its layer, its readout, and the features of its edges.

    ==============  ============================================================
    field           meaning
    ==============  ============================================================
    ``number``      1 for the first shell
    ``radius``      angstrom
    ``exponent``    of the window
    ``radial``      arguments that describe the basis of radial functions
    ``polynomials`` the harmonics, as polynomials of the direction
    ``layer``       from the states of the shell below to those of this one
    ``readout``     from these states to energies
    ``species``     number of elements
    ``softening``   length below which distances are softened, angstrom
    ``transfers``   whether latent charges move along its edges
    ==============  ============================================================
    """

    number: int
    radius: float
    exponent: int
    radial: dict[str, Any]
    polynomials: tuple[Any, ...]
    layer: Interaction
    readout: LinearReadout
    species: int
    softening: float
    transfers: bool

    @property
    def update(self) -> Update:
        """Everything after the sums over edges."""
        return required(self.layer.kernel).update

    @property
    def basis(self) -> int:
        return int(self.radial["num_basis"])

    @property
    def hidden(self) -> int:
        """Width of the network of the readout; 0 if it has none."""
        network: Any = self.readout.network if isinstance(self.readout, MLPReadout) else None
        return 0 if network is None else int(network[0].out_features)

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers per edge or per atom of the arrays of the program."""
        update, gate = self.update, self.layer.gate
        state = update.rows * update.channels
        return {
            "harmonics": len(self.polynomials),
            "basis": self.basis,
            "density": update.inputs[0],
            "message": 0 if gate is None else update.inputs[1],
            "before": update.inputs[-1] if self.layer.self_linear is not None else 0,
            "sums": state,
            "kept": max(len(update.products) - 1, 0) * state,
            "state": update.rows_out * update.channels,
        }

    @property
    def workspace(self) -> int:
        """Numbers that the update needs for each thread."""
        return workspace_size(self.update, self.species)

    def functions(self, pieces: Pieces) -> dict[str, int]:
        """Add the functions of this shell; returns the number of the piece of each kind."""
        layer = self.layer
        found = {
            "window": pieces.add(window_source(self.exponent, second=False)),
            "features": pieces.add(feature_source(self.polynomials, soft=self.softening, second=False, **self.radial)),
            "density": pieces.add(
                codegen.density_source(len(self.polynomials), self.basis, self.species, second=False)
            ),
        }
        if layer.gate is not None:
            found["one_body"] = pieces.add(layer.gate.kernel.source(second=False))
        calls = [
            f"#define product{k}_{what} product_{what}_rows_{pieces.add(product.kernel.source(second=False))}\n"
            for k, product in enumerate(_products(layer), start=2)
            for what in ("forward", "backward")
        ]
        update = update_source(self.update, self.species, linked=False, second=False)
        found["update"] = pieces.add("".join(calls) + update)
        return found

    def weights(self) -> dict[str, list[Tensor]]:
        """Weights by kind, in the order of the program; the constant factors of the gates are multiplied in."""
        layer, density, gate = self.layer, required(self.layer.density), self.layer.gate
        matrices = [w.double() * density.scale for w in density.weights]
        maps: list[Any] = [
            None if gate is None else gate.mix,
            layer.self_linear,
            layer.residual_linear,
            layer.products.linear,
        ]
        maps += [product.mix for product in layer.products.products]
        matrices += [w.double() for m in maps if m is not None for w in m.weights]
        found = {
            "matrices": matrices,
            "radial": [] if gate is None else [gate.radial_weight.double() * gate.scale],
            "scale": [] if layer.scale is None else [layer.scale.weight.double()],
            "bias": [] if layer.bias is None else [layer.bias.double()],
            "readout": [self.readout.linear.weights[0].double()],
        }
        if self.hidden:
            first, _, last = cast(Any, self.readout).network
            found["readout"] += [first.weight.double().t(), first.bias.double(), last.weight.double()]
        return found


def shells_of(model: NBodyNet) -> list[Shell]:
    """The shells of a network, from the smallest neighbourhood on."""
    found, scheme = [], cast(NestedShells, model.scheme)
    layers: Iterable[Any] = model.interactions
    embeddings: Any = model.embeddings
    readouts: Any = model.readouts
    moved = model.long_range is not None and model.long_range.charges.num_basis > 0
    for step, layer in zip(model.steps, layers, strict=True):
        embedding = embeddings[str(step.edges)]
        degree = max(ir.l for _, ir in layer.irreps)
        polynomials = embedding.harmonics.polynomials()[: (degree + 1) ** 2]
        found.append(
            Shell(
                number=step.level,
                radius=scheme.radii[step.level - 1],
                exponent=scheme.exponent,
                radial=embedding.radial.compiled(),
                polynomials=tuple(polynomials),
                layer=layer,
                readout=readouts[str(step.level)],
                species=len(model.species),
                softening=embedding.softening,
                transfers=moved and step.level == 1,
            )
        )
    return found


def _products(layer: Interaction) -> list[ChannelwiseProduct]:
    products: Any = layer.products.products
    return list(products)
