"""The products that are timed, in every implementation, on the same numbers; what each must cost at least."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from e3nn import get_optimization_defaults, o3, set_optimization_defaults
from torch import Tensor, nn

from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.nn.edges import EdgeFeatures, sum_into
from nbody_pyg.nn.gates import DensityGate, OneBodyGate
from nbody_pyg.nn.irreps import harmonic_irreps, hidden_irreps, num_rows
from nbody_pyg.nn.products import ChannelwiseProduct, path_row_order

NUM_BASIS, NUM_SPECIES = 8, 4
#: How e3nn is built: eager (its default on torch from 2.10) and TorchScript.
E3NN = {"e3nn": "eager", "e3nn TorchScript": "script"}


class Layout(NamedTuple):
    """From our order of numbers to that of a path, and back; done outside of what is timed."""

    there: Callable[[Tensor], Tensor] = lambda t: t
    back: Callable[[Tensor], Tensor] = lambda t: t


PLAIN = Layout()


class Path:
    """One implementation of a product, with its inputs as leaves in its own layout.

    Args:
        call: takes the inputs, then the parameters.
        inputs: what depends on positions; ``layouts`` has one entry for each.
        parameters: leaves; paths may share them.
        out: layout of the result.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        inputs: list[Tensor],
        parameters: list[Tensor],
        layouts: list[Layout] | None = None,
        out: Layout = PLAIN,
    ) -> None:
        self.call, self.layouts, self.out = call, layouts or [PLAIN] * len(inputs), out
        self.inputs = [l.there(t).contiguous().requires_grad_() for l, t in zip(self.layouts, inputs, strict=True)]
        self.parameters = [p.requires_grad_() for p in parameters]
        self.every = self.inputs + self.parameters

    def bind(self, cotangent: Tensor, seeds: list[Tensor]) -> Path:
        """Fix the cotangents: of the result, and of the first derivatives."""
        self.cotangent = self.out.there(cotangent).contiguous().requires_grad_()
        self.seeds = [l.there(t).contiguous() for l, t in zip(self.layouts, seeds, strict=True)]
        return self

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.call(*self.every)

    def first(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.call(*self.every), self.every, self.cotangent.detach())

    def second(self) -> tuple[Tensor, ...]:
        out = self.call(*self.every)
        slopes = torch.autograd.grad(out, self.inputs, self.cotangent, create_graph=True)
        loss = sum((s * seed).sum() for s, seed in zip(slopes, self.seeds, strict=True))
        return torch.autograd.grad(loss, [self.cotangent, *self.every])

    def numbers(self, with_parameters: bool) -> list[Tensor]:
        """Result, first and second derivatives in our layout."""

        def plain(gradients: tuple[Tensor, ...]) -> list[Tensor]:
            count = len(self.inputs)
            states = [l.back(t) for l, t in zip(self.layouts, gradients[:count], strict=True)]
            return states + (list(gradients[count:]) if with_parameters else [])

        second = self.second()
        return [self.out.back(self.forward()), *plain(self.first()), self.out.back(second[0]), *plain(second[1:])]


class Problem(NamedTuple):
    """Paths to the same numbers, e3nn first; what they cost at least."""

    paths: dict[str, Path]
    flop: float
    bytes: float
    same_parameters: bool = True
    index: Tensor | None = None

    def errors(self) -> dict[str, float]:
        """Largest deviation of each path from e3nn, over the largest number of that tensor."""
        numbers = {name: path.numbers(self.same_parameters) for name, path in self.paths.items()}
        reference = numbers["e3nn"]
        if not all(bool(t.abs().max() > 0) for t in reference):
            raise AssertionError("the reference is zero somewhere: nothing would be compared")
        return {
            name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, reference, strict=True))
            for name, found in numbers.items()
        }


def slot_layout(order: list[tuple[int, int]], dims: list[int], channels: int) -> Layout:
    """Between our (nodes, rows, channels) and e3nn's slots of (channel, component).

    Args:
        order: (slot, component) of each of our rows.
        dims: number of components of each slot.
    """
    starts = list(itertools.accumulate([dim * channels for dim in dims], initial=0))
    take = torch.tensor([starts[s] + c * dims[s] + m for s, m in order for c in range(channels)])
    back = torch.argsort(take)
    return Layout(
        lambda t: t.flatten(1).index_select(1, back),
        lambda t: t.index_select(1, take).view(len(t), len(order), channels),
    )


def state_layout(irreps: o3.Irreps) -> Layout:
    """A state of one multiplicity: one slot for each fragment."""
    dims = [ir.dim for _, ir in irreps]
    order = [(slot, m) for slot, dim in enumerate(dims) for m in range(dim)]
    return slot_layout(order, dims, irreps[0].mul)


@contextlib.contextmanager
def e3nn_settings(mode: str) -> Iterator[None]:
    """Build e3nn's modules in float64 (their coefficients keep the precision they are born with)."""
    before, dtype = get_optimization_defaults(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    set_optimization_defaults(jit_mode=mode)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        set_optimization_defaults(jit_mode=before["jit_mode"])


def tensor_product(irreps1, irreps2, paths, mode: str, kind: str, dtype: torch.dtype) -> o3.TensorProduct:
    """e3nn's product with one slot for each path; weights, where it has some, are given with every call."""
    channels = irreps1[0].mul
    slots = o3.Irreps([(channels, path.ir) for path in paths])
    steps = [(path.first, path.second, n, kind, kind == "uvu") for n, path in enumerate(paths)]

    def make() -> o3.TensorProduct:
        with e3nn_settings(mode):
            return o3.TensorProduct(
                irreps1, irreps2, slots, steps, irrep_normalization="component", path_normalization="none",
                internal_weights=False, shared_weights=False,
            )  # fmt: skip

    return placed(make, dtype)


def placed(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module built on the CPU, where all coefficients are made, then moved to where the problem lives.

    That is torch's default device: the GPU benchmark builds its problems under ``with torch.device("cuda")``.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        module = make()
    return module.to(device=device, dtype=dtype)


#: Backends of ours to time; None for all that run here on the CPU.
chosen: list[str] | None = None


def own_backends() -> list[str]:
    return [name for name in reversed(available_backends()) if name != "triton"] if chosen is None else chosen


def on(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run on one of our backends."""

    def run(*arguments: Tensor) -> Tensor:
        set_backend(name)
        return call(*arguments)

    return run


def finish(paths: dict[str, Path], generator: torch.Generator) -> dict[str, Path]:
    first = next(path for name, path in paths.items() if not name.startswith("e3nn"))
    with torch.no_grad():
        out = first.forward()
    like = [out, *first.inputs]
    cotangent, *seeds = (torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in like)
    return {name: path.bind(cotangent, seeds) for name, path in paths.items()}


# ------------------------------------------------------------------------------------- the problems
def random_edges(nodes: int, edges: int, lmax: int, dtype: torch.dtype, generator: torch.Generator) -> EdgeFeatures:
    """Edges sorted by target, with harmonics of random directions and random radial functions."""
    target = torch.arange(edges) * nodes // edges
    source = torch.randint(nodes, (edges,), generator=generator)
    vec = torch.randn(edges, 3, dtype=torch.float64, generator=generator)
    harmonics = o3.spherical_harmonics(list(range(lmax + 1)), vec, True, "component").to(dtype)
    radial = torch.randn(edges, NUM_BASIS, dtype=torch.float64, generator=generator).to(dtype)
    return EdgeFeatures(torch.stack([source, target]), harmonics, radial, nodes)


def edge_product(nodes: int, edges: int, channels: int, lmax: int, dtype: torch.dtype) -> Problem:
    """OneBodyGate before its W^l: sum over edges of CG(x_j, Y) times radial weights ``radial @ W``."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    irreps, harmonic = hidden_irreps(channels, lmax), harmonic_irreps(lmax)
    gate = placed(lambda: OneBodyGate(irreps, irreps, lmax, NUM_BASIS), dtype)
    gate.mix = nn.Identity()
    features = random_edges(nodes, edges, lmax, dtype, generator)
    source, target = features.index
    x = torch.randn(nodes, num_rows(irreps), channels, dtype=torch.float64, generator=generator).to(dtype)
    order = path_row_order(gate.paths)

    def ours(x: Tensor, harmonics: Tensor, radial: Tensor, *_: Tensor) -> Tensor:
        return gate(x, EdgeFeatures(features.index, harmonics, radial, nodes))

    table = gate.coupling.view(-1, len(order), num_rows(irreps))

    def einsum(x: Tensor, harmonics: Tensor, radial: Tensor, weight: Tensor) -> Tensor:
        weights = (radial @ weight).view(edges, len(gate.paths), channels).index_select(1, gate.path_of_row)
        messages = torch.einsum("ey,yoi,eic,eoc->eoc", harmonics, table, x.index_select(0, source), weights)
        return sum_into(messages, target, nodes)

    inputs, parameters = [x, features.harmonics, features.radial], [gate.radial_weight]
    paths = {}
    for name, mode in E3NN.items():
        product = tensor_product(irreps, harmonic, gate.paths, mode, "uvu", dtype)

        def theirs(x, harmonics, radial, weight, product=product):
            return sum_into(product(x.index_select(0, source), harmonics, radial @ weight), target, nodes)

        layouts = [state_layout(irreps), PLAIN, PLAIN]
        out = slot_layout(order, [path.ir.dim for path in gate.paths], channels)
        paths[name] = Path(theirs, inputs, parameters, layouts, out)
    paths["dense einsum"] = Path(einsum, inputs, parameters)
    for name in own_backends():
        paths[f"nbody_pyg {name}"] = Path(on(name, ours), inputs, parameters)

    # M[row, i] = sum_j CG * Y_j once per edge, then out[row] += w[path] * M x for every channel
    pairs, nonzero = int((table != 0).any(0).sum()), int((table != 0).sum())
    radial_flop = 2 * NUM_BASIS * len(gate.paths) * channels
    flop = edges * (channels * (2 * pairs + len(order)) + 2 * nonzero + radial_flop)
    moved = edges * (4 * (table.shape[0] + NUM_BASIS) + 16) + 4 * nodes * channels * (num_rows(irreps) + len(order))
    return Problem(finish(paths, generator), flop, moved, index=features.index)


def density(nodes: int, edges: int, channels: int, lmax: int, dtype: torch.dtype) -> Problem:
    """DensityGate with its W^l; for the others a product per edge with an embedding of the element."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    irreps, harmonic = hidden_irreps(channels, lmax), harmonic_irreps(lmax)
    gate = placed(lambda: DensityGate(NUM_SPECIES, NUM_BASIS, irreps), dtype)
    features = random_edges(nodes, edges, lmax, dtype, generator)
    source, target = features.index
    species = torch.randint(NUM_SPECIES, (nodes,), generator=generator)
    embedding = torch.randn(NUM_SPECIES, channels, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(NUM_BASIS, (lmax + 1) * channels, dtype=torch.float64, generator=generator).to(dtype)
    by_degree = weight.view(NUM_BASIS, lmax + 1, channels)
    with torch.no_grad():  # the same function, in the terms of our gate
        for l, own in enumerate(gate.weights):
            own.copy_((embedding.unsqueeze(1) * by_degree[:, l]).flatten(0, 1))

    def ours(harmonics: Tensor, radial: Tensor, *_: Tensor) -> Tensor:
        return gate(species, EdgeFeatures(features.index, harmonics, radial, nodes))

    degree = torch.tensor([l for l in range(lmax + 1) for _ in range(2 * l + 1)])

    def einsum(harmonics: Tensor, radial: Tensor, embedding: Tensor, weight: Tensor) -> Tensor:
        weights = (radial @ weight).view(edges, lmax + 1, channels).index_select(1, degree)
        state = embedding.index_select(0, species).index_select(0, source)
        return sum_into(torch.einsum("em,emc,ec->emc", harmonics, weights, state), target, nodes)

    inputs = [features.harmonics, features.radial]
    scalars = o3.Irreps([(channels, (0, 1))])
    steps = placed(lambda: OneBodyGate(scalars, irreps, lmax, NUM_BASIS), dtype).paths
    paths = {}
    for name, mode in E3NN.items():
        product = tensor_product(scalars, harmonic, steps, mode, "uvu", dtype)

        def theirs(harmonics, radial, embedding, weight, product=product):
            state = embedding.index_select(0, species).index_select(0, source)
            return sum_into(product(state, harmonics, radial @ weight), target, nodes)

        paths[name] = Path(theirs, inputs, [embedding, weight], out=state_layout(irreps))
    paths["einsum per edge"] = Path(einsum, inputs, [embedding, weight])
    for name in own_backends():
        paths[f"nbody_pyg {name}"] = Path(on(name, ours), inputs, list(gate.weights))
    rows, fan_in = (lmax + 1) ** 2, NUM_SPECIES * NUM_BASIS
    flop = 2 * edges * rows * NUM_BASIS + 2 * nodes * rows * fan_in * channels
    moved = edges * (4 * (rows + NUM_BASIS) + 16) + 4 * nodes * rows * channels + 4 * (lmax + 1) * fan_in * channels
    return Problem(finish(paths, generator), flop, moved, same_parameters=False)


def node_product(nodes: int, edges: int, channels: int, lmax: int, dtype: torch.dtype) -> Problem:
    """ChannelwiseProduct of two states with the W^l after it; e3nn's 'uuu' product and o3.Linear."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    irreps = hidden_irreps(channels, lmax)
    gate = placed(lambda: ChannelwiseProduct(irreps, irreps, irreps), dtype)
    x, y = (
        torch.randn(nodes, num_rows(irreps), channels, dtype=torch.float64, generator=generator).to(dtype)
        for _ in range(2)
    )
    weights = list(gate.mix.weights)

    def ours(x: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        return gate(x, y)

    rows1 = num_rows(irreps)
    order = path_row_order(gate.paths)
    table = gate.coupling.view(len(order), rows1, rows1)
    dims = [ir.dim for _, ir in irreps]

    def einsum(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        product = torch.einsum("oij,nic,njc->noc", table, x, y)
        sizes = [dim * len(w) // channels for dim, w in zip(dims, weights, strict=True)]
        blocks = product.split(sizes, dim=1)
        parts = [b.reshape(nodes, d, -1) @ w for b, d, w in zip(blocks, dims, weights, strict=True)]
        return torch.cat(parts, dim=1)

    paths = {}
    for name, mode in E3NN.items():
        product = tensor_product(irreps, irreps, gate.paths, mode, "uuu", dtype)
        linear = placed(functools.partial(_e3nn_linear, product.irreps_out, irreps, mode), dtype)
        arrange = linear_weights(linear)

        def theirs(x, y, *weights, product=product, linear=linear, arrange=arrange):
            return linear(product(x, y), arrange(weights))

        layouts = [state_layout(irreps)] * 2
        paths[name] = Path(theirs, [x, y], weights, layouts, state_layout(irreps))
    paths["dense einsum"] = Path(einsum, [x, y], weights)
    for name in own_backends():
        paths[f"nbody_pyg {name}"] = Path(on(name, ours), [x, y], weights)
    pairs, nonzero = int((table != 0).any(0).sum()), int((table != 0).sum())
    mixing = 2 * sum(dim * w.numel() for dim, w in zip(dims, weights, strict=True))
    flop = nodes * (channels * (pairs + 2 * nonzero) + mixing)
    moved = 4 * nodes * channels * 3 * rows1 + 4 * sum(w.numel() for w in weights)
    return Problem(finish(paths, generator), flop, moved)


def _e3nn_linear(irreps_in: o3.Irreps, irreps_out: o3.Irreps, mode: str) -> o3.Linear:
    with e3nn_settings(mode):
        return o3.Linear(irreps_in, irreps_out, shared_weights=True, internal_weights=False)


def linear_weights(linear: o3.Linear) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Our matrices, one per degree, as e3nn's flat weights: its blocks are ours, times the root of the fan-in."""
    fan_in = {i.i_out: 0 for i in linear.instructions}
    for step in linear.instructions:
        fan_in[step.i_out] += step.path_shape[0]

    def arrange(weights: tuple[Tensor, ...]) -> Tensor:
        used, flat = dict.fromkeys(fan_in, 0), []
        for step in linear.instructions:
            start, size = used[step.i_out], step.path_shape[0]
            flat.append(weights[step.i_out][start : start + size].flatten() * fan_in[step.i_out] ** 0.5)
            used[step.i_out] += size
        return torch.cat(flat)

    return arrange


PROBLEMS = {"edge product": edge_product, "density": density, "node product": node_product}
