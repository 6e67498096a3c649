"""Autograd around the compiled products: forward, backward and its derivative, each one call into C.

A third derivative is not offered here (the plain torch backend has it); asking for one is an error, not a wrong number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbody_pyg.kernels import codegen
from nbody_pyg.kernels.codegen import Term
from nbody_pyg.kernels.derivatives import last_derivative
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import check_index, check_operands, check_range
from nbody_pyg.kernels.scope import apply, gradients_wanted

#: A vector holds at most this many channels (64 bytes of float32).
LANES = 16


class ProductKernel:
    """Channelwise product of node states for one coupling table, see :func:`codegen.product_source`."""

    def __init__(self, terms: list[Term], rows1: int, rows2: int, rows_out: int, channels: int) -> None:
        self.rows1, self.rows2, self.rows_out, self.channels = rows1, rows2, rows_out, channels
        tail = channels % LANES != 0
        x, y, out = (f"reals:{rows}*N*C" for rows in (rows1, rows2, rows_out))
        signatures = {
            "product_forward": f"N C {x} {y} {out}",
            "product_backward": f"N C {out} {x} {y} {x} {y}",
            "product_double": f"N C {out} {x} {y} {x} {y} {out} {x} {y}",
        }
        self.library = Library(codegen.product_source(terms, rows1, rows2, rows_out, tail), signatures)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        nodes, channels = x.shape[0], self.channels
        check_operands(x.dtype, x.device, x=(x, (nodes, self.rows1, channels)), y=(y, (nodes, self.rows2, channels)))
        # Made contiguous here, not in ``forward``: a copy that is saved there has no graph of its own
        return apply(_Product, x.contiguous(), y.contiguous(), self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, kernel: ProductKernel) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.kernel = kernel
        nodes, _, channels = x.shape
        out = x.new_empty(nodes, kernel.rows_out, channels)
        kernel.library.call("product_forward", x.dtype, nodes, channels, x, y, out)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        return *apply(_ProductBackward, g, *ctx.saved_tensors, ctx.kernel), None


class _ProductBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, y: Tensor, kernel: ProductKernel):
        g = g.contiguous()
        ctx.save_for_backward(g, x, y)
        ctx.kernel = kernel
        gx, gy = torch.empty_like(x), torch.empty_like(y)
        tensors = (g, x, y, gx, gy)
        kernel.library.call("product_backward", x.dtype, x.shape[0], x.shape[2], *tensors)
        return gx, gy

    @staticmethod
    @last_derivative
    def backward(ctx, a: Tensor, b: Tensor):
        g, x, y = ctx.saved_tensors
        gg, gx, gy = torch.empty_like(g), torch.empty_like(x), torch.empty_like(y)
        tensors = (g, x, y, a.contiguous(), b.contiguous(), gg, gx, gy)
        ctx.kernel.library.call("product_double", x.dtype, x.shape[0], x.shape[2], *tensors)
        return gg, gx, gy, None


class OneBodyKernel:
    """Edge product of source states, harmonics and radial functions, see :func:`codegen.one_body_source`."""

    def __init__(
        self,
        terms: list[Term],
        rows_in: int,
        harmonics: int,
        rows_out: int,
        paths: int,
        basis: int,
        channels: int,
    ) -> None:
        self.rows_in, self.rows_out, self.harmonics = rows_in, rows_out, harmonics
        self.paths, self.basis, self.channels = paths, basis, channels
        tail = channels % LANES != 0
        source = codegen.one_body_source(terms, rows_in, harmonics, rows_out, paths, basis, tail)
        x, out, weight = f"reals:{rows_in}*S*C", f"reals:{rows_out}*T*C", f"{basis * paths}*C"
        edges = f"reals:{harmonics}*E reals:{basis}*E"
        sizes, factors = "E C (S) (T) longs:E longs:E", f"{x} {edges} reals:{weight}"
        signatures = {
            "one_body_forward": f"{sizes} {factors} {out}",
            "one_body_backward": f"{sizes} {out} {factors} {x} {edges} reals?:{weight}",
            "one_body_double": f"{sizes} {out} {factors} {x} {edges} reals?:{weight} {out} {factors}",
        }
        self.library = Library(source, signatures)

    def __call__(
        self, x: Tensor, harmonics: Tensor, radial: Tensor, weight: Tensor, index: Tensor, num_targets: int
    ) -> Tensor:
        """Sum over edges, radial weights ``radial @ weight``: (targets, rows_out, channels)."""
        edges, channels = index.shape[1], self.channels
        check_operands(
            x.dtype,
            x.device,
            x=(x, (x.shape[0], self.rows_in, channels)),
            harmonics=(harmonics, (edges, self.harmonics)),
            radial=(radial, (edges, self.basis)),
            weight=(weight, (self.basis, self.paths * channels)),
        )
        check_index(x.device, index=(index, (2, edges)))
        check_range("index[0] (sources)", index[0], x.shape[0])
        check_range("index[1] (targets)", index[1], num_targets)
        factors = [t.contiguous() for t in (x, harmonics, radial, weight)]
        return apply(_OneBody, *factors, index.contiguous(), num_targets, self)


def _sizes(index: Tensor, x: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Numbers of edges, channels, sources and targets."""
    return index.shape[1], x.shape[2], x.shape[0], out.shape[0]


class _OneBody(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, harmonics, radial, weight, index, num_targets: int, kernel: OneBodyKernel) -> Tensor:
        factors = (x, harmonics, radial, weight)
        ctx.save_for_backward(*factors, index)
        ctx.kernel = kernel
        out = x.new_zeros(num_targets, kernel.rows_out, x.shape[2])
        tensors = (index[0], index[1], *factors, out)
        kernel.library.call("one_body_forward", x.dtype, *_sizes(index, x, out), *tensors)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        weigh = gradients_wanted(ctx.next_functions[3:4])  # of the weight
        return *apply(_OneBodyBackward, g, *ctx.saved_tensors, weigh, ctx.kernel), None, None, None


class _OneBodyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x, harmonics, radial, weight, index, weigh: bool, kernel: OneBodyKernel):
        g = g.contiguous()
        ctx.save_for_backward(g, x, harmonics, radial, weight, index)
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        gx, gy, gb = torch.zeros_like(x), torch.empty_like(harmonics), torch.empty_like(radial)
        gw = torch.zeros_like(weight) if weigh else None
        tensors = (index[0], index[1], g, x, harmonics, radial, weight, gx, gy, gb, gw)
        kernel.library.call("one_body_backward", x.dtype, *_sizes(index, x, g), *tensors)
        return gx, gy, gb, gw

    @staticmethod
    @last_derivative
    def backward(ctx, *cotangents: Tensor | None):
        g, x, harmonics, radial, weight, index = ctx.saved_tensors
        factors = (x, harmonics, radial)
        a, n, d = (
            torch.zeros_like(like) if given is None else given.contiguous()
            for given, like in zip(cotangents[:3], factors, strict=True)
        )
        u = None if cotangents[3] is None else cotangents[3].contiguous()
        gg, gx, gw = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(weight)
        gy, gb = torch.empty_like(harmonics), torch.empty_like(radial)
        tensors = (index[0], index[1], g, *factors, weight, a, n, d, u, gg, gx, gy, gb, gw)
        ctx.kernel.library.call("one_body_double", x.dtype, *_sizes(index, x, g), *tensors)
        return gg, gx, gy, gb, gw, None, None, None


class DensityKernel:
    """Harmonics times radial functions summed into slots, see :func:`codegen.density_source`."""

    def __init__(self, harmonics: int, basis: int, num_species: int) -> None:
        self.shape, self.num_species = (harmonics, basis), num_species
        edges, out = f"reals:{harmonics}*E reals:{basis}*E", f"reals:{harmonics * num_species * basis}*T"
        signatures = {
            "density_forward": f"E (T) longs:E {edges} {out}",
            "density_backward": f"E (T) longs:E {out} {edges} {edges}",
            "density_double": f"E (T) longs:E {out} {edges} {edges} {out} {edges}",
        }
        self.library = Library(codegen.density_source(harmonics, basis, num_species), signatures)

    def __call__(self, harmonics: Tensor, radial: Tensor, slot: Tensor, num_targets: int) -> Tensor:
        """Sum over edges, slot = target * species + species of the source: (targets, harmonics, species * basis)."""
        edges, (rows, basis) = slot.shape[0], self.shape
        given = {"radial": (radial, (edges, basis)), "harmonics": (harmonics, (edges, rows))}
        check_operands(radial.dtype, radial.device, **given)
        check_index(radial.device, slot=(slot, (edges,)))
        check_range("slot (target * species + species of the source)", slot, num_targets * self.num_species)
        return apply(_Density, harmonics.contiguous(), radial.contiguous(), slot.contiguous(), num_targets, self)


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx, harmonics, radial, slot, num_targets: int, kernel: DensityKernel) -> Tensor:
        ctx.save_for_backward(harmonics, radial, slot)
        ctx.kernel = kernel
        rows, basis = kernel.shape
        out = harmonics.new_zeros(num_targets, rows, kernel.num_species * basis)
        tensors = (slot, harmonics, radial, out)
        kernel.library.call("density_forward", out.dtype, slot.shape[0], num_targets, *tensors)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        return *apply(_DensityBackward, g, *ctx.saved_tensors, ctx.kernel), None, None, None


class _DensityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, harmonics, radial, slot, kernel: DensityKernel):
        g = g.contiguous()
        ctx.save_for_backward(g, harmonics, radial, slot)
        ctx.kernel = kernel
        gy, gb = torch.empty_like(harmonics), torch.empty_like(radial)
        tensors = (slot, g, harmonics, radial, gy, gb)
        kernel.library.call("density_backward", g.dtype, slot.shape[0], g.shape[0], *tensors)
        return gy, gb

    @staticmethod
    @last_derivative
    def backward(ctx, a: Tensor, d: Tensor):
        g, harmonics, radial, slot = ctx.saved_tensors
        gg, gy, gb = torch.zeros_like(g), torch.empty_like(harmonics), torch.empty_like(radial)
        tensors = (slot, g, harmonics, radial, a.contiguous(), d.contiguous(), gg, gy, gb)
        ctx.kernel.library.call("density_double", g.dtype, slot.shape[0], g.shape[0], *tensors)
        return gg, gy, gb, None, None
