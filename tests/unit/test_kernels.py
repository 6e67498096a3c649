"""Compiled products against plain torch: values, first and second derivatives, odd sizes, and what can go
wrong."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.kernels import available_backends, backend, build, set_backend, use_backend
from nbody_pyg.kernels.edges import window_kernel
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.linear import Block, LinearKernel
from nbody_pyg.kernels.operands import Several
from nbody_pyg.nn import NBodyConv
from nbody_pyg.nn.edges import EdgeEmbedding, EdgeFeatures
from nbody_pyg.nn.gates import DensityGate, OneBodyGate, ProductGate
from nbody_pyg.nn.interaction import Interaction, InteractionConfig
from nbody_pyg.nn.irreps import hidden_irreps, num_rows
from nbody_pyg.nn.linear import RowLinear, blockwise_linear
from nbody_pyg.nn.products import ChannelwiseProduct
from nbody_pyg.radial import BesselBasis, InversePowers

needs_c = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _backend_is_left_alone():
    yield
    set_backend("auto")


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """A build module that remembers nothing, with a cache of its own; forgets again afterwards."""
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path / "cache"))
    build.forget()
    yield tmp_path / "cache" / "kernels"
    monkeypatch.undo()
    build.forget()


def _randn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def _edges(generator, sources, targets, count, lmax, dtype=torch.float64, num_basis=3) -> EdgeFeatures:
    index = torch.stack([torch.randint(max(n, 1), (count,), generator=generator) for n in (sources, targets)])
    return EdgeFeatures(
        index,
        _randn(generator, count, (lmax + 1) ** 2, dtype=dtype),
        _randn(generator, count, num_basis, dtype=dtype),
        targets,
    )


def _both(call, inputs, parameters=()):
    """Values, gradients and the derivative of the gradients on each backend."""
    results = []
    for name in ("torch", "c"):
        set_backend(name)
        leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
        every = [*leaves, *parameters]
        out = call(*leaves)
        seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        first = torch.autograd.grad(out, every, seed, create_graph=True)
        seeds = [torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view_as(g) for g in first]
        second = torch.autograd.grad(first, every, seeds, allow_unused=True, materialize_grads=True)
        results.append([out, *first, *second])
    return results


def _assert_both(call, inputs, parameters=(), **tolerance):
    plain, compiled = _both(call, inputs, list(parameters))
    assert plain[0].numel() == 0 or plain[0].abs().max() > 0
    for n, (a, b) in enumerate(zip(plain, compiled, strict=True)):
        scale = max(1.0, float(a.detach().abs().max())) if a.numel() else 1.0
        torch.testing.assert_close(b / scale, a / scale, **(tolerance or EXACT), msg=lambda m, n=n: f"result {n}: {m}")


TYPES = [("natural", 0), ("natural", 1), ("natural", 2), ("ignored", 1), ("both", 1)]
CHANNELS = [1, 3, 19, 32]


@needs_c
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("parity", "lmax"), TYPES)
def test_every_product_is_the_same_on_both_backends(parity, lmax, channels, generator):
    irreps = hidden_irreps(channels, lmax, parity)
    rows = num_rows(irreps)
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    _assert_both(product, [_randn(generator, 4, rows, channels) for _ in range(2)], product.parameters())
    gate = OneBodyGate(irreps, irreps, lmax, 3, avg_num_neighbors=3.0, parity=parity).double()
    edges = _edges(generator, 4, 3, 7, lmax)

    def one_body(x, harmonics, radial):
        return gate(x, EdgeFeatures(edges.index, harmonics, radial, 3))

    _assert_both(one_body, [_randn(generator, 4, rows, channels), edges.harmonics, edges.radial], gate.parameters())
    density = DensityGate(
        2, 3, hidden_irreps(channels, lmax, "ignored" if parity == "ignored" else "natural"), 3.0, parity
    ).double()
    species = torch.tensor([0, 1, 1, 0])
    _assert_both(
        lambda harmonics, radial: density(species, EdgeFeatures(edges.index, harmonics, radial, 3)),
        [edges.harmonics, edges.radial],
        density.parameters(),
    )
    linear = RowLinear(irreps, hidden_irreps(channels + 2, lmax, parity)).double()
    _assert_both(linear, [_randn(generator, 4, rows, channels)], linear.parameters())


@needs_c
@pytest.mark.slow
@pytest.mark.parametrize(("parity", "lmax"), [("natural", 3), ("ignored", 3), ("both", 2)])
def test_large_types_are_the_same_on_both_backends(parity, lmax, generator):
    test_every_product_is_the_same_on_both_backends(parity, lmax, 5, generator)


@needs_c
@pytest.mark.parametrize(("nodes", "targets", "count"), [(1, 1, 0), (1, 1, 1), (1, 3, 2), (0, 0, 0), (4, 2, 0)])
def test_no_edges_one_node_no_node(nodes, targets, count, generator):
    irreps = hidden_irreps(3, 1)
    x, edges = _randn(generator, nodes, 4, 3), _edges(generator, nodes, targets, count, 1)
    gate, product = (
        OneBodyGate(irreps, irreps, 1, 3).double(),
        ChannelwiseProduct(irreps, irreps, irreps).double(),
    )
    density, linear = DensityGate(2, 3, irreps).double(), RowLinear(irreps, irreps).double()
    for call in (
        lambda: gate(x, edges),
        lambda: density(torch.zeros(nodes, dtype=torch.long), edges),
        lambda: product(x, x),
        lambda: linear(x),
    ):
        values = []
        for name in ("torch", "c"):
            set_backend(name)
            values.append(call())
        torch.testing.assert_close(values[1], values[0], **EXACT)


@needs_c
def test_inputs_that_are_not_contiguous(generator):
    irreps = hidden_irreps(19, 1)
    product, linear = ChannelwiseProduct(irreps, irreps, irreps).double(), RowLinear(irreps, irreps).double()
    x = _randn(generator, 19, 4, 5).permute(2, 1, 0)
    wide = _randn(generator, 5, 8, 19)[:, ::2]
    assert not x.is_contiguous() and not wide.is_contiguous()
    _assert_both(
        lambda a, b: product(a.permute(2, 1, 0), b[:, ::2]),
        [_randn(generator, 19, 4, 5), _randn(generator, 5, 8, 19)],
    )
    _assert_both(lambda a: linear(a.permute(2, 1, 0)), [_randn(generator, 19, 4, 5)])
    gate, edges = OneBodyGate(irreps, irreps, 1, 3).double(), _edges(generator, 5, 5, 6, 1)
    _assert_both(
        lambda a, h, r: gate(a[:, ::2], EdgeFeatures(edges.index.flip(0), h.flip(0), r.T.contiguous().T, 5)),
        [_randn(generator, 5, 8, 19), edges.harmonics, edges.radial],
    )


@needs_c
def test_first_and_second_derivatives_against_finite_differences(generator):
    set_backend("c")
    irreps = hidden_irreps(2, 1)
    check = {"fast_mode": False, "atol": 1e-6}
    product = ChannelwiseProduct(irreps, irreps, irreps).double().kernel
    gate = OneBodyGate(irreps, irreps, 1, 2).double()
    edges = _edges(generator, 3, 2, 4, 1, num_basis=2)
    density = DensityGate(2, 2, irreps).double().kernel
    species = torch.tensor([0, 1, 1])
    linear = LinearKernel([Block(0, 3, 1, 2, 2), Block(1, 0, 3, 2, 2)], 4, 2, 4, 2)
    cases = [
        (lambda x, y: product(x, y), [(2, 4, 2), (2, 4, 2)]),
        (
            lambda x, h, r, w: gate.kernel(x, h, r, w, edges.index, 2),
            [(3, 4, 2), (4, 4), (4, 2), tuple(gate.radial_weight.shape)],
        ),
        (lambda h, r: density(h, r, species, edges.index, 2), [(4, 4), (4, 2)]),
        (lambda x, a, b: linear(x, a, b), [(2, 4, 2), (2, 2), (2, 2)]),
    ]  # fmt: skip
    for call, shapes in cases:
        inputs = [_randn(generator, *shape).requires_grad_(True) for shape in shapes]
        assert call(*inputs).abs().max() > 0
        assert torch.autograd.gradcheck(call, inputs, **check)
        assert torch.autograd.gradgradcheck(call, inputs, **check)


@needs_c
def test_edge_features_and_windows_are_the_same_on_both_backends(generator):
    vec = 2 * _randn(generator, 9, 3)
    vec[0] = 0.0  # a part on its parent
    index, window = (
        torch.zeros(2, 9, dtype=torch.long),
        torch.rand(9, dtype=torch.float64, generator=generator),
    )
    for basis in (BesselBasis(5, 5.0), InversePowers(3, 5.0)):
        for lmax in (0, 2, 3):
            embedding = EdgeEmbedding(lmax, basis).double()
            _assert_both(lambda v, w, e=embedding: torch.cat(e(index, v, w, 1)[1:3], dim=1), [vec, window])
    z, pos = torch.tensor([6, 8, 1, 1, 1]), _randn(generator, 5, 3)
    scheme = NestedShells((3.0,))
    topology = scheme.topology(z, pos)
    _assert_both(lambda p: scheme.hierarchy(topology, z, p)[1].child_weight, [pos])


@needs_c
def test_no_gradients_of_weights_in_a_pass_for_forces(generator, monkeypatch):
    """Forces first, without gradients of weights; then the loss, with them."""
    irreps = hidden_irreps(3, 1)
    gate = ProductGate(irreps, irreps, 2).double()
    x = _randn(generator, 4, 4, 3)
    made, results = [], []
    outer = LinearKernel._outer
    monkeypatch.setattr(LinearKernel, "_outer", lambda *arguments: made.append(1) or outer(*arguments))
    for name in ("torch", "c"):
        set_backend(name)
        leaf = x.clone().requires_grad_(True)
        energy = gate(leaf).square().sum()
        (force,) = torch.autograd.grad(energy, leaf, create_graph=True)
        assert not made
        results.append([force, *torch.autograd.grad(force.square().sum() + energy, [leaf, *gate.parameters()])])
    assert made
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, **EXACT)


@needs_c
@pytest.mark.parametrize("how", ["backward", "backward of some", "grad of leaves", "grad of others"])
def test_gradients_of_weights_are_made_for_whoever_asks(generator, how):
    """By the engine's own list of what is wanted, not by what a caller says of the process."""
    irreps = hidden_irreps(3, 1)
    gate, edges, x = (
        OneBodyGate(irreps, irreps, 1, 3).double(),
        _edges(generator, 4, 4, 7, 1),
        _randn(generator, 4, 4, 3),
    )
    results = []
    for name in ("torch", "c"):
        set_backend(name)
        leaf = x.clone().requires_grad_(True)
        weights = list(gate.parameters())
        gate.zero_grad()
        if how == "grad of others":
            weights = [w * 1.0 for w in weights]
            value = torch.func.functional_call(
                gate, dict(zip(dict(gate.named_parameters()), weights, strict=True)), (leaf, edges)
            )
            found = torch.autograd.grad(value.sum(), [leaf, *weights])
        elif how == "grad of leaves":
            found = torch.autograd.grad(gate(leaf, edges).sum(), [leaf, *weights])
        else:
            chosen = [leaf, *weights] if how == "backward" else [leaf, weights[-1]]
            gate(leaf, edges).sum().backward(inputs=None if how == "backward" else chosen)
            found = [t.grad for t in chosen]
        results.append(found)
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, **EXACT)


@needs_c
def test_a_third_derivative_is_an_error_and_torch_has_it(generator):
    irreps = hidden_irreps(2, 1)
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    x = _randn(generator, 2, 4, 2).requires_grad_(True)

    def third():
        value = product(x, x).square().sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            value = value.square().sum()
        return torch.autograd.grad(value, x)[0]

    set_backend("torch")
    assert torch.isfinite(third()).all()
    set_backend("c")
    with pytest.raises(
        RuntimeError, match=r"two derivatives, but a third was asked for; call .*set_backend\('torch'\)"
    ):
        third()


@pytest.mark.slow
@needs_c
def test_float32_has_the_error_of_float32(generator):
    irreps = hidden_irreps(19, 2)
    gate, edges, x = (
        OneBodyGate(irreps, irreps, 2, 3),
        _edges(generator, 5, 5, 30, 2),
        _randn(generator, 5, 9, 19),
    )
    single = EdgeFeatures(edges.index, edges.harmonics.float(), edges.radial.float(), 5)
    set_backend("c")
    with torch.no_grad():
        low, high = gate(x.float(), single), copy.deepcopy(gate).double()(x, edges)
    assert low.dtype == torch.float32
    error = float((low - high).abs().max() / high.abs().max())
    assert 1e-9 < error < 1e-5


@needs_c
def test_wrong_types_and_shapes_never_reach_compiled_code(generator):
    set_backend("c")
    irreps = hidden_irreps(3, 1)
    product, linear = ChannelwiseProduct(irreps, irreps, irreps).double().kernel, RowLinear(irreps, irreps)
    x = _randn(generator, 2, 4, 3)
    with pytest.raises(
        TypeError, match=r"y must have the dtype of the other operands, torch.float64, got torch.float32"
    ):
        product(x, x.float())
    with pytest.raises(ValueError, match=r"y must have shape \[2, 4, 3\], got \[2, 3, 3\]; check the irreps and edges"):
        product(x, x[:, :3])
    with pytest.raises(TypeError, match="weight must have the dtype of the other operands"):
        linear(x)
    gate, edges = OneBodyGate(irreps, irreps, 1, 3).double(), _edges(generator, 2, 2, 4, 1)
    with pytest.raises(TypeError, match="index must have the dtype"):
        gate(x, edges._replace(index=edges.index.int()))
    with pytest.raises(ValueError, match="radial must have shape"):
        gate(x, edges._replace(radial=edges.radial[:, :2]))


@needs_c
def test_every_tensor_of_every_call_is_checked(molecules, monkeypatch):
    """Also in backward passes: a tensor too short, of another type or with gaps never reaches compiled code."""
    calls, call = {}, Library.call

    def recorded(library, name, dtype, *arguments):
        calls[name] = (library, dtype, arguments)
        call(library, name, dtype, *arguments)

    monkeypatch.setattr(Library, "call", recorded)
    set_backend("c")
    z, pos = molecules["ethanol"]
    net, linear = NBodyNet([1, 6, 8], NestedShells((4.0, 3.0)), channels=3, lmax=1).double(), RowLinear("3x0e", "3x0e")
    leaf, x = pos.clone().requires_grad_(True), torch.randn(2, 1, 3, requires_grad=True)
    for value, source in ((net(z, leaf).sum(), leaf), (linear(x).square().sum(), x)):
        (slope,) = torch.autograd.grad(value, source, create_graph=True)
        slope.square().sum().backward()
    kinds = ("product", "one_body", "density", "features", "window", "update")
    wanted = {f"{kind}_{what}" for kind in kinds[1:] for what in ("forward", "backward", "double")}
    assert wanted <= set(calls) and {"linear_apply", "linear_transposed", "linear_outer"} <= set(calls)
    refused = 0
    for name, (library, dtype, arguments) in calls.items():
        for place, value in enumerate(arguments):
            several = isinstance(value, Several)
            for number, tensor in enumerate(value.tensors if several else [value]):
                if not isinstance(tensor, torch.Tensor) or tensor.numel() < 2:
                    continue
                other = torch.float16 if tensor.is_floating_point() else torch.int32
                for wrong in (tensor.flatten()[1:], tensor.to(other), tensor.flatten().repeat_interleave(2)[::2]):
                    given = list(arguments)
                    given[place] = wrong
                    if several:
                        tensors = [*value.tensors[:number], wrong, *value.tensors[number + 1 :]]
                        given[place] = value._replace(tensors=tensors)
                    with pytest.raises(ValueError, match=r"compiled products take \d+ numbers of torch"):
                        call(library, name, dtype, *given)
                    refused += 1
    assert refused > 300


@needs_c
@pytest.mark.parametrize("name", ["torch", "c"])
@pytest.mark.parametrize("width", [0, 1, 2, 4])
def test_positions_have_three_components(name, width, generator):
    """Planar positions are usual in PyG; compiled code read and wrote past their ends."""
    set_backend(name)
    conv, index = NBodyConv("4x0e", "1x0e", cutoff=5.0), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    x, pos = torch.randn(4, 4, generator=generator), torch.rand(4, width, generator=generator)
    with pytest.raises(ValueError, match=rf"pos must have shape \[num_nodes, 3\], got \[4, {width}\]; put a column"):
        conv(x, index, pos)
    with pytest.raises(ValueError, match=r"pos must have shape"):
        conv((x, None), index, (torch.rand(4, 3), pos))
    if name == "c":
        kernel = EdgeEmbedding(1, BesselBasis(3, 5.0)).kernel
        with pytest.raises(ValueError, match=rf"vec must have shape \[4, 3\], got \[4, {width}\]"):
            kernel(pos, torch.ones(4))
        with pytest.raises(ValueError, match=rf"vec must have shape \[4, 3\], got \[4, {width}\]"):
            window_kernel(5.0, 6)(pos)


@needs_c
def test_gradients_of_factors_and_constants_alone(generator):
    """Fine-tuning that freezes all matrices: nothing else asks for gradients of weights."""
    irreps = hidden_irreps(3, 1)
    layer = Interaction(
        InteractionConfig(2, 3, 2, "natural", True), irreps, irreps, irreps, target_has_species=True
    ).double()
    edges, x = _edges(generator, 4, 4, 7, 1), _randn(generator, 4, 4, 3)
    species, free = torch.tensor([0, 1, 1, 0]), [layer.scale.weight, layer.bias]
    for parameter in layer.parameters():
        parameter.requires_grad_(any(parameter is p for p in free))
    results = []
    for name in ("torch", "c"):
        set_backend(name)
        value = layer(x, x, edges, species, species).square().sum()
        results.append(torch.autograd.grad(value, free))
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, **EXACT)


def test_which_backend_runs():
    assert available_backends()[-1] == "torch"
    set_backend("torch")
    assert backend() == "torch"
    set_backend("auto")
    assert backend(torch.zeros(1)) == available_backends()[0]
    assert backend(torch.zeros(1, dtype=torch.bfloat16)) == "torch"
    assert backend(torch.zeros(1, device="meta")) == "torch"
    with pytest.raises(ValueError, match="backend must be one of auto, c, triton, torch, got 'cuda'; try 'auto'"):
        set_backend("cuda")


def test_the_choice_of_a_backend_ends_with_its_block_and_stays_in_its_thread():
    outside = backend()
    with use_backend("torch"):
        assert backend() == "torch"
        with ThreadPoolExecutor(1) as other:
            assert other.submit(backend).result() == available_backends()[0]
            other.submit(set_backend, "torch").result()
        with use_backend("auto"):
            assert backend() == available_backends()[0]
        assert backend() == "torch"
    assert backend() == outside == available_backends()[0]
    match = "backend must be one of auto, c, triton, torch, got 'cuda'"
    with pytest.raises(ValueError, match=match), use_backend("cuda"):
        pass


def test_the_environment_chooses_the_backend():
    code = "from nbody_pyg.kernels import backend; print(backend())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NBODY_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "torch"


@needs_c
def test_copies_and_state_dicts(generator):
    irreps = hidden_irreps(3, 1)
    gate, x = ProductGate(irreps, irreps, 3), torch.randn(4, 4, 3, generator=generator)
    set_backend("c")
    with torch.no_grad():
        expected = gate(x)
        twin = copy.deepcopy(gate)
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        fresh = ProductGate(irreps, irreps, 3)
        assert not torch.equal(fresh(x), expected)
        fresh.load_state_dict(gate.state_dict())
        torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)
    assert all(value.is_floating_point() for value in gate.state_dict().values()), "weights only"


@needs_c
def test_a_network_is_the_same_on_both_backends(molecules):
    z, pos = molecules["ethanol"]
    net, results = NBodyNet([1, 6, 8], NestedShells((4.0, 3.0)), channels=5).double(), []
    for name in ("torch", "c"):
        set_backend(name)
        leaf = pos.clone().requires_grad_(True)
        energy = net(z, leaf)
        (force,) = torch.autograd.grad(energy.sum(), leaf, create_graph=True)
        weights = torch.autograd.grad(force.square().sum() + energy.sum(), list(net.parameters()))
        results.append([energy.detach(), force.detach(), *weights])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


def test_rows_of_no_block_are_zero(generator):
    """A fragment that no path reaches: filled, on every backend, also in the derivatives."""
    kernel = LinearKernel([Block(0, 4, 1, 3, 2)], 4, 3, 5, 2)
    weight, x = _randn(generator, 3, 2), _randn(generator, 2, 4, 3)
    for name in available_backends():
        set_backend(name)
        leaf = x.clone().requires_grad_(True)
        out = blockwise_linear(kernel, leaf, weight)
        assert not out[:, :4].any() and out[:, 4].all()
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert gradient[:, 0].all() and not gradient[:, 1:].any()


@needs_c
@pytest.mark.parametrize(("row", "wrong"), [(0, 7), (0, -1), (1, 5)])
def test_edges_that_point_nowhere_are_refused(row, wrong):
    gate = OneBodyGate(hidden_irreps(2, 1), hidden_irreps(2, 1), 1, 2).double()
    index = torch.randint(0, 5, (2, 6))
    index[row, 3] = wrong
    edges = EdgeFeatures(index, torch.randn(6, 4).double(), torch.randn(6, 2).double(), 5)
    set_backend("c")
    with pytest.raises(ValueError, match=rf"index\[{row}\].* must lie between 0 and 4, got .*; check the edges"):
        gate(torch.randn(5, 4, 2).double(), edges)
    density = DensityGate(3, 2, hidden_irreps(2, 1)).double()
    if row == 1:
        with pytest.raises(ValueError, match=r"slot .* must lie between 0 and 14"):
            density(torch.zeros(5, dtype=torch.long), edges)


@needs_c
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_comparison_of_backends_rejects_a_difference(order, generator):
    """A value, a gradient and a second derivative that are off on one of the backends alone."""

    def call(x):
        off = 1e-6 if backend(x) == "c" else 0.0
        return (x.square() * x).sum() + off * (x - x.detach()).pow(order).sum()

    x = _randn(generator, 5)
    _assert_both(lambda x: x.square() * x, [x])
    with pytest.raises(AssertionError, match=f"result {order}"):
        _assert_both(call, [x])
    with pytest.raises(AssertionError):
        _assert_both(lambda x: 0.0 * x.square() * x, [x])
