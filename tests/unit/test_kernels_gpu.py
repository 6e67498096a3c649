"""GPU kernels against plain torch, in Triton's interpreter: values, derivatives, odd sizes, what can go wrong."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import sys

import pytest
import torch

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.kernels import available_backends, backend, set_backend
from nbody_pyg.kernels.gpu import build, grid, one_body
from nbody_pyg.kernels.gpu.edge_source import apart, groups_of
from nbody_pyg.kernels.gpu.order import EdgeOrder, edge_order
from nbody_pyg.nn.edges import EdgeEmbedding, EdgeFeatures
from nbody_pyg.nn.gates import DensityGate, OneBodyGate
from nbody_pyg.nn.irreps import hidden_irreps, num_rows
from nbody_pyg.nn.products import ChannelwiseProduct
from nbody_pyg.potential import Potential
from nbody_pyg.radial import BesselBasis, InversePowers, vector_window

pytestmark = pytest.mark.skipif(
    not build.available() or not build.interpreted(), reason="Triton is not installed, or a GPU runs it for real"
)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _backend_is_left_alone():
    yield
    set_backend("auto")


def _randn(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _edges(generator, sources, targets, count, lmax, num_basis=2) -> EdgeFeatures:
    index = torch.stack([torch.randint(max(n, 1), (count,), generator=generator) for n in (sources, targets)])
    return EdgeFeatures(index, _randn(generator, count, (lmax + 1) ** 2), _randn(generator, count, num_basis), targets)


def _results(call, inputs, parameters, name):
    """Value, first derivatives, derivatives of those."""
    set_backend(name)
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    every = [*leaves, *parameters]
    out = call(*leaves)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).requires_grad_(True)
    first = torch.autograd.grad(out, every, seed, create_graph=True)
    seeds = [torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view_as(g) for g in first]
    second = torch.autograd.grad(first, [seed, *every], seeds, allow_unused=True, materialize_grads=True)
    return [out, *first, *second]


def _assert_same(call, inputs, parameters=()):
    parameters = list(parameters)
    plain, found = (_results(call, inputs, parameters, name) for name in ("torch", "triton"))
    assert plain[0].numel() == 0 or plain[0].abs().max() > 0
    for n, (a, b) in enumerate(zip(plain, found, strict=True)):
        scale = max(1.0, float(a.detach().abs().max())) if a.numel() else 1.0
        torch.testing.assert_close(b / scale, a / scale, **EXACT, msg=lambda m, n=n: f"result {n}: {m}")


def _one_body(irreps, lmax, edges, parity="natural", channels=3):
    gate = OneBodyGate(irreps, irreps, lmax, edges.radial.shape[1], 3.0, parity).double()

    def call(x, harmonics, radial):
        return gate(x, EdgeFeatures(edges.index, harmonics, radial, edges.num_targets))

    return gate, call


def _same_edge_products(parity, lmax, channels, generator):
    irreps = hidden_irreps(channels, lmax, parity)
    edges = _edges(generator, 4, 3, 4 if lmax < 2 else 2, lmax, 2 if lmax < 2 else 1)
    gate, call = _one_body(irreps, lmax, edges, parity)
    _assert_same(call, [_randn(generator, 4, num_rows(irreps), channels), *edges[1:3]], gate.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("parity", "lmax", "channels"), [("natural", 0, 1), ("natural", 1, 33)])
def test_edge_products_equal_plain_torch(parity, lmax, channels, generator):
    _same_edge_products(parity, lmax, channels, generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parity", "lmax", "channels"),
    [("natural", 2, 3), ("natural", 3, 5), ("ignored", 2, 40), ("both", 1, 3), ("natural", 2, 64)],
)
def test_edge_products_of_large_types_equal_plain_torch(parity, lmax, channels, generator):
    _same_edge_products(parity, lmax, channels, generator)


@pytest.mark.parametrize(("lmax", "channels"), [(0, 1), (1, 33), (2, 5), pytest.param(3, 5, marks=pytest.mark.slow)])
def test_node_products_equal_plain_torch(lmax, channels, generator):
    irreps = hidden_irreps(channels, lmax)
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    shape = (2, num_rows(irreps), channels)
    _assert_same(product, [_randn(generator, *shape), _randn(generator, *shape)], product.parameters())


@pytest.mark.parametrize(("lmax", "num_species", "num_basis"), [(0, 1, 1), (2, 3, 5), (3, 90, 8)])
def test_densities_equal_plain_torch(lmax, num_species, num_basis, generator):
    gate = DensityGate(num_species, num_basis, hidden_irreps(3, lmax), 3.0).double()
    edges = _edges(generator, 4, 3, 9, lmax, num_basis)
    species = torch.tensor([0, num_species - 1, 0, num_species // 2])

    def call(harmonics, radial):
        return gate(species, EdgeFeatures(edges.index, harmonics, radial, 3))

    _assert_same(call, list(edges[1:3]), gate.parameters())


def test_features_of_edges_and_windows_equal_plain_torch(generator):
    vec, window = 2 * _randn(generator, 9, 3), torch.rand(9, dtype=torch.float64, generator=generator)
    vec[0] = 0.0  # a part on its parent
    index = torch.zeros(2, 9, dtype=torch.long)
    for basis in (BesselBasis(5, 5.0), InversePowers(3, 5.0)):
        for lmax in (0, 2, 3):
            embedding = EdgeEmbedding(lmax, basis).double()
            _assert_same(lambda v, w, e=embedding: torch.cat(e(index, v, w, 1)[1:3], dim=1), [vec, window])
    for exponent in (3, 4, 6):
        _assert_same(lambda v, p=exponent: vector_window(v, 3.0, p), [vec])


@pytest.mark.parametrize(("nodes", "targets", "count"), [(1, 1, 0), (1, 3, 2), (0, 0, 0), (4, 2, 0)])
def test_no_edges_one_node_no_node(nodes, targets, count, generator):
    irreps = hidden_irreps(3, 1)
    edges, x = _edges(generator, nodes, targets, count, 1), _randn(generator, nodes, 4, 3)
    gate, call = _one_body(irreps, 1, edges)
    plain, found = (_results(call, [x, *edges[1:3]], list(gate.parameters()), name) for name in ("torch", "triton"))
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(b, a, **EXACT)
    density, product = DensityGate(2, 2, irreps).double(), ChannelwiseProduct(irreps, irreps, irreps).double()
    species = torch.zeros(nodes, dtype=torch.long)
    for other in (lambda: density(species, edges), lambda: product(x, x)):
        values = []
        for name in ("torch", "triton"):
            set_backend(name)
            values.append(other())
        torch.testing.assert_close(values[1], values[0], **EXACT)


def test_inputs_that_are_not_contiguous(generator):
    irreps = hidden_irreps(3, 1)
    edges = _edges(generator, 5, 5, 3, 1)
    gate = OneBodyGate(irreps, irreps, 1, 2).double()
    _assert_same(
        lambda a, h, r: gate(a[:, ::2], EdgeFeatures(edges.index.flip(0), h.flip(0), r.T.contiguous().T, 5)),
        [_randn(generator, 5, 8, 3), edges.harmonics, edges.radial],
    )
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    _assert_same(
        lambda a, b: product(a.permute(2, 1, 0), b[:, ::2]), [_randn(generator, 3, 4, 2), _randn(generator, 2, 8, 3)]
    )


@pytest.mark.slow
def test_first_and_second_derivatives_against_finite_differences(generator):
    irreps = hidden_irreps(2, 1)
    edges = _edges(generator, 3, 2, 4, 1)
    gate, density = OneBodyGate(irreps, irreps, 1, 2).double(), DensityGate(2, 2, irreps).double().gpu
    product, species = ChannelwiseProduct(irreps, irreps, irreps).double().gpu, torch.tensor([0, 1, 1])
    cases = [
        (
            lambda x, h, r, w: gate.gpu(x, h, r, w, edges.index, 2),
            [(3, 4, 2), (4, 4), (4, 2), tuple(gate.radial_weight.shape)],
        ),
        (lambda h, r: density(h, r, species, edges.index, 2), [(4, 4), (4, 2)]),
        (product, [(2, 4, 2), (2, 4, 2)]),
    ]
    for call, shapes in cases:
        inputs = [_randn(generator, *shape).requires_grad_(True) for shape in shapes]
        assert call(*inputs).abs().max() > 0
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.slow
def test_shared_edges_and_long_sums_change_no_number(generator, monkeypatch):
    """Edges of one node on several programs, weights loaded in the loop, many groups and chunks."""
    irreps = hidden_irreps(2, 1)
    monkeypatch.setattr("nbody_pyg.kernels.gpu.edge_source.MAX_WEIGHTS", 1)
    monkeypatch.setattr(one_body, "_SHORTEST", 2)
    edges = _edges(generator, 1, 1, 4, 1)
    gate, call = _one_body(irreps, 1, edges)
    assert apart(gate.gpu.groups) and gate.gpu.together == 1, "every group is a kernel of its own"
    assert grid.parts_of_a_node(1, 1, 4) == 2, "the case is not what it says"
    _assert_same(call, [_randn(generator, 1, 4, 2), *edges[1:3]], gate.parameters())
    assert "w0_0 = " in gate.gpu.program.source


def test_groups_hold_every_path_once_and_fit(generator):
    for lmax, count in ((1, 2), (2, 3), (3, 7)):
        gate = OneBodyGate(hidden_irreps(2, lmax), hidden_irreps(2, lmax), lmax, 8)
        terms = gate.gpu.product.terms
        groups = groups_of(terms, 8)
        assert len(groups) == count
        assert sorted(p for group in groups for p in group) == list(range(len(gate.paths)))
        for group in groups:
            rows = {t.row for t in terms if t.path in group}
            assert len(group) == 1 or (len(group) * 8 <= 32 and len(rows) <= 24)


def test_the_same_numbers_every_time(generator):
    irreps = hidden_irreps(3, 1)
    edges = _edges(generator, 2, 1, 4, 1, 1)
    gate, call = _one_body(irreps, 1, edges)
    inputs = [_randn(generator, 2, 4, 3), *edges[1:3]]
    set_backend("triton")
    leaves = [x.requires_grad_(True) for x in inputs]
    runs = []
    for _ in range(2):
        out = call(*leaves)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, gate.radial_weight])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
def test_a_network_has_the_energies_forces_and_gradients_of_plain_torch(molecules):
    z, pos = (values[[0, 1, 5]] for values in molecules["methanol"])
    model = NBodyNet([1, 6, 8], NestedShells((1.5, 1.5)), channels=2, lmax=1, correlation=2, num_basis=1).double()
    potential, results = Potential(model), []
    for name in ("torch", "triton"):
        set_backend(name)
        potential.zero_grad()
        found = potential(z, pos, create_graph=True)
        (found["energy"].sum() + found["forces"].square().sum()).backward()
        gradients = [p.grad.clone() for p in potential.parameters()]
        results.append([found["energy"].detach(), found["forces"].detach(), *gradients])
    assert results[0][1].abs().max() > 1e-3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


def test_no_gradients_of_weights_in_a_pass_for_forces(generator, monkeypatch):
    irreps = hidden_irreps(3, 1)
    edges = _edges(generator, 4, 3, 5, 1)
    gate, _ = _one_body(irreps, 1, edges)
    set_backend("triton")
    x = _randn(generator, 4, 4, 3).requires_grad_(True)
    value = gate.gpu(x, edges.harmonics, edges.radial, gate.radial_weight, edges.index, 3).sum()
    monkeypatch.setattr(gate.gpu, "_weights", lambda *_: pytest.fail("nobody asked for gradients of weights"))
    assert torch.autograd.grad(value, x)[0].abs().max() > 0


def test_a_third_derivative_is_an_error(generator):
    irreps = hidden_irreps(2, 1)
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    x = _randn(generator, 2, 4, 2).requires_grad_(True)
    set_backend("triton")
    value = product(x, x).square().sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value, x, create_graph=True)
        value = value.square().sum()
    with pytest.raises(RuntimeError, match=r"two derivatives, but a third was asked for; .*set_backend\('torch'\)"):
        torch.autograd.grad(value, x)


def test_wrong_types_and_shapes_never_reach_a_kernel(generator):
    set_backend("triton")
    irreps = hidden_irreps(3, 1)
    product, gate = ChannelwiseProduct(irreps, irreps, irreps).double().gpu, OneBodyGate(irreps, irreps, 1, 2).double()
    x, edges = _randn(generator, 2, 4, 3), _edges(generator, 2, 2, 4, 1)
    with pytest.raises(TypeError, match="y must have the dtype of the other operands"):
        product(x, x.float())
    with pytest.raises(ValueError, match=r"y must have shape \[2, 4, 3\], got \[2, 3, 3\]"):
        product(x, x[:, :3])
    with pytest.raises(TypeError, match="index must have the dtype"):
        gate(x, edges._replace(index=edges.index.int()))
    with pytest.raises(ValueError, match="radial must have shape"):
        gate(x, edges._replace(radial=edges.radial[:, :1]))
    with pytest.raises(ValueError, match=r"index\[0\] \(sources\) must lie between 0 and 1, got 7 to 7"):
        gate(x, edges._replace(index=torch.full_like(edges.index, 7)))
    density = DensityGate(2, 2, irreps).double()
    with pytest.raises(ValueError, match="species must lie between 0 and 1, got 0 to 5"):
        density(torch.tensor([0, 5]), edges)


def test_the_order_of_edges_is_made_once_and_lives_as_long_as_the_edges():
    index = torch.tensor([[2, 0, 1, 0], [1, 0, 1, 2]])
    order = edge_order(index, 3, 3)
    by_target, by_source = order.by(1), order.by(0)
    assert by_target.ptr.tolist() == [0, 1, 3, 4] and by_target.edge.tolist() == [1, 0, 2, 3]
    assert by_source.ptr.tolist() == [0, 2, 3, 4] and by_source.target.tolist() == [0, 2, 1, 1]
    assert edge_order(index, 3, 3) is order and order.by(1) is by_target
    assert edge_order(index, 4, 3) is not order, "another number of nodes has other pointers"
    assert edge_order(index.clone(), 3, 3) is not order
    last = edge_order(index, 3, 3)
    index[1, 0] = 2  # changed in place
    assert edge_order(index, 3, 3) is not last
    with pytest.raises(ValueError, match="index must hold at most 2147483647 edges"):
        EdgeOrder(torch.zeros(2, 1, dtype=torch.long).expand(2, 2**31), 1, 1)


def test_which_backend_runs(monkeypatch):
    plain, cuda = torch.zeros(1), torch.empty(1, device="meta")
    assert backend(plain) != "triton" and "triton" not in available_backends(), "only when asked for, without a GPU"
    set_backend("triton")
    assert backend(plain) == "triton" and backend() == "triton"
    assert backend(plain.bfloat16()) == "torch" and backend(cuda) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backend(plain) == "torch", "a GPU kernel cannot take a CPU tensor"
    monkeypatch.setattr(sys.modules["nbody_pyg.kernels.backend"], "available", lambda: False)
    assert backend(plain) == "torch"
    with pytest.raises(ValueError, match="backend 'triton' needs Triton and it is not installed; pip install triton"):
        set_backend("triton")


def test_generated_code_is_kept_in_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path))
    source = "@triton.jit\ndef nothing(x):\n    pass\n"
    module = build.load.__wrapped__(source)
    assert "def nothing" in inspect.getsource(module.nothing.fn), "Triton has to find the source"
    assert not list(tmp_path.iterdir()), "code in a file could be somebody else's"
    sys.modules.pop(module.__name__)
    monkeypatch.setattr(build, "available", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed; pip install triton, or use"):
        build.load.__wrapped__(source)


def test_programs_are_copied_and_pickled_with_their_model():
    irreps = hidden_irreps(2, 1)
    product = ChannelwiseProduct(irreps, irreps, irreps)
    assert copy.deepcopy(product).gpu.program is product.gpu.program
    again = pickle.loads(pickle.dumps(product.gpu.program))
    assert again.source == product.gpu.program.source
    assert os.environ["TRITON_INTERPRET"] == "1"
