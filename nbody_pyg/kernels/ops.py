"""The compiled products in C: each value and each derivative is one call."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nbody_pyg.kernels import codegen
from nbody_pyg.kernels.codegen import EdgeProduct, Term
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import check_index, check_operands, check_range
from nbody_pyg.kernels.operation import Operands, Operation, Tensors, filled

#: A vector holds at most this many channels (64 bytes of float32).
LANES = 16


class ProductOperation(Operation):
    """Channelwise product of node states for one coupling table; backends bring :meth:`_call`."""

    num_inputs = 2

    def __init__(self, rows1: int, rows2: int, rows_out: int, channels: int) -> None:
        self.rows1, self.rows2, self.rows_out, self.channels = rows1, rows2, rows_out, channels

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        nodes, channels = x.shape[0], self.channels
        check_operands(x.dtype, x.device, x=(x, (nodes, self.rows1, channels)), y=(y, (nodes, self.rows2, channels)))
        product: Tensor = self.run(x.contiguous(), y.contiguous())
        return product

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        x, y = operands.inputs
        out = x.new_empty(x.shape[0], self.rows_out, self.channels)
        self._call("product_forward", x, y, out)
        return (out,), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        found = [torch.empty_like(x) for x in operands.inputs]
        self._call("product_backward", *g, *operands.inputs, *found)
        return found

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        found = [torch.empty_like(t) for t in (*g, *operands.inputs)]
        self._call("product_double", *g, *operands.inputs, *filled(c, operands.inputs), *found)
        return found

    @abstractmethod
    def _call(self, name: str, *tensors: Tensor) -> None:
        """Run the compiled function of this name."""


class ProductKernel(ProductOperation):
    """The product in C, see :func:`codegen.product_source`."""

    def __init__(self, terms: list[Term], rows1: int, rows2: int, rows_out: int, channels: int) -> None:
        super().__init__(rows1, rows2, rows_out, channels)
        tail = channels % LANES != 0
        x, y, out = (f"reals:{rows}*N*C" for rows in (rows1, rows2, rows_out))
        signatures = {
            "product_forward": f"N C {x} {y} {out}",
            "product_backward": f"N C {out} {x} {y} {x} {y}",
            "product_double": f"N C {out} {x} {y} {x} {y} {out} {x} {y}",
        }
        signatures |= {f"{name}_rows": "" for name in signatures}  # for other kernels, by address
        #: Of the source; its argument ``second`` leaves the second derivatives out.
        self.source = functools.partial(codegen.product_source, terms, rows1, rows2, rows_out, tail)
        self.library = Library(self.source(), signatures)

    def _call(self, name: str, *tensors: Tensor) -> None:
        self.library.call(name, tensors[0].dtype, tensors[0].shape[0], self.channels, *tensors)


class OneBodyOperation(Operation):
    """Edge product of source states, harmonics and radial functions for one coupling table."""

    num_inputs = 4
    weights = range(3, 4)

    def __init__(self, product: EdgeProduct, channels: int) -> None:
        self.product, self.channels = product, channels

    def check(self, x: Tensor, harmonics: Tensor, radial: Tensor, weight: Tensor, index: Tensor) -> None:
        """Raise unless types, shapes and devices fit; see :func:`check_operands`."""
        p, edges, channels = self.product, index.shape[1], self.channels
        check_operands(
            x.dtype,
            x.device,
            x=(x, (x.shape[0], p.rows_in, channels)),
            harmonics=(harmonics, (edges, p.harmonics)),
            radial=(radial, (edges, p.basis)),
            weight=(weight, (p.basis, p.paths * channels)),
        )
        check_index(x.device, index=(index, (2, edges)))


class OneBodyKernel(OneBodyOperation):
    """The edge product in C, see :func:`codegen.one_body_source`."""

    def __init__(self, product: EdgeProduct, channels: int) -> None:
        super().__init__(product, channels)
        _, rows_in, harmonics, rows_out, paths, basis = product
        #: Of the source; its argument ``second`` leaves the second derivatives out.
        self.source = functools.partial(codegen.one_body_source, product, channels % LANES != 0)
        x, out, weight = f"reals:{rows_in}*S*C", f"reals:{rows_out}*T*C", f"{basis * paths}*C"
        edges = f"reals:{harmonics}*E reals:{basis}*E"
        sizes, factors = "E C (S) (T) longs:E longs:E", f"{x} {edges} reals:{weight}"
        signatures = {
            "one_body_forward": f"{sizes} {factors} {out}",
            "one_body_backward": f"{sizes} {out} {factors} {x} {edges} reals?:{weight}",
            "one_body_double": f"{sizes} {out} {factors} {x} {edges} reals?:{weight} {out} {factors}",
        }
        self.library = Library(self.source(), signatures)

    def __call__(
        self, x: Tensor, harmonics: Tensor, radial: Tensor, weight: Tensor, index: Tensor, num_targets: int
    ) -> Tensor:
        """Sum over edges, radial weights ``radial @ weight``: (targets, rows_out, channels)."""
        self.check(x, harmonics, radial, weight, index)
        check_range("index[0] (sources)", index[0], x.shape[0])
        check_range("index[1] (targets)", index[1], num_targets)
        total: Tensor = self.run(*[t.contiguous() for t in (x, harmonics, radial, weight, index)], sizes=(num_targets,))
        return total

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        x, (targets,) = operands.inputs[0], operands.sizes
        out = x.new_zeros(targets, self.product.rows_out, self.channels)
        self._call("one_body_forward", operands, targets, *operands.inputs, out)
        return (out,), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        x, harmonics, radial, weight = operands.inputs
        gx, gy, gb = torch.zeros_like(x), torch.empty_like(harmonics), torch.empty_like(radial)
        gw = torch.zeros_like(weight) if wanted[3] else None
        self._call("one_body_backward", operands, g[0].shape[0], *g, *operands.inputs, gx, gy, gb, gw)
        return gx, gy, gb, gw

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        x, harmonics, radial, weight = operands.inputs
        of_weight = None if c[3] is None else c[3].contiguous()
        cotangents = (*filled(c[:3], operands.inputs[:3]), of_weight)
        gg, gx, gw = torch.zeros_like(g[0]), torch.zeros_like(x), torch.zeros_like(weight)
        gy, gb = torch.empty_like(harmonics), torch.empty_like(radial)
        found = (gg, gx, gy, gb, gw)
        self._call("one_body_double", operands, g[0].shape[0], *g, *operands.inputs, *cotangents, *found)
        return found

    def _call(self, name: str, operands: Operands, num_targets: int, *tensors: Tensor | None) -> None:
        x, (index,) = operands.inputs[0], operands.constants
        sizes = (index.shape[1], self.channels, x.shape[0], num_targets)
        self.library.call(name, x.dtype, *sizes, index[0], index[1], *tensors)


class DensityKernel(Operation):
    """Harmonics times radial functions summed into slots, see :func:`codegen.density_source`."""

    num_inputs = 2

    def __init__(self, harmonics: int, basis: int, num_species: int) -> None:
        self.shape, self.num_species = (harmonics, basis), num_species
        edges, out = f"reals:{harmonics}*E reals:{basis}*E", f"reals:{harmonics * num_species * basis}*T"
        signatures = {
            "density_forward": f"E (T) longs:E {edges} {out}",
            "density_backward": f"E (T) longs:E {out} {edges} {edges}",
            "density_double": f"E (T) longs:E {out} {edges} {edges} {out} {edges}",
        }
        self.library = Library(codegen.density_source(harmonics, basis, num_species), signatures)

    def __call__(self, harmonics: Tensor, radial: Tensor, species: Tensor, index: Tensor, num_targets: int) -> Tensor:
        """Sum over edges: (targets, harmonics, species * basis)."""
        edges, (rows, basis) = index.shape[1], self.shape
        given = {"radial": (radial, (edges, basis)), "harmonics": (harmonics, (edges, rows))}
        check_operands(radial.dtype, radial.device, **given)
        check_index(radial.device, index=(index, (2, edges)), species=(species, (species.shape[0],)))
        check_range("index[0] (sources)", index[0], species.shape[0])
        slot = index[1] * self.num_species + species[index[0]]
        check_range("slot (target * species + species of the source)", slot, num_targets * self.num_species)
        density: Tensor = self.run(harmonics.contiguous(), radial.contiguous(), slot, sizes=(num_targets,))
        return density

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        (rows, basis), (targets,) = self.shape, operands.sizes
        out = operands.inputs[0].new_zeros(targets, rows, self.num_species * basis)
        self._call("density_forward", operands, targets, *operands.inputs, out)
        return (out,), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        found = [torch.empty_like(x) for x in operands.inputs]
        self._call("density_backward", operands, g[0].shape[0], *g, *operands.inputs, *found)
        return found

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        found = [torch.zeros_like(g[0]), *[torch.empty_like(x) for x in operands.inputs]]
        cotangents = filled(c, operands.inputs)
        self._call("density_double", operands, g[0].shape[0], *g, *operands.inputs, *cotangents, *found)
        return found

    def _call(self, name: str, operands: Operands, num_targets: int, *tensors: Tensor) -> None:
        (slot,) = operands.constants
        self.library.call(name, tensors[0].dtype, slot.shape[0], num_targets, slot, *tensors)
