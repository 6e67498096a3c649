"""Gates: each against a literal sum over edges, pairs or tuples with e3nn's coefficients, on every
backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from e3nn import o3

from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.nn.edges import EdgeEmbedding, EdgeFeatures, sum_into
from nbody_pyg.nn.gates import (
    DensityGate,
    FullGate,
    OneBodyGate,
    PairGate,
    ProductGate,
)
from nbody_pyg.nn.irreps import hidden_irreps, num_rows, row_slices, to_mul_ir
from nbody_pyg.radial import InversePowers
from nbody_pyg.testing import wigner_matrix

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=available_backends())
def backend(request):
    set_backend(request.param)
    yield request.param
    set_backend("auto")


def _edges(generator, sources=5, targets=4, count=11, lmax=3, num_basis=3, vec=None) -> EdgeFeatures:
    index = torch.stack([
        torch.randint(sources, (count,), generator=generator),
        torch.randint(targets, (count,), generator=generator).sort().values,
    ])  # fmt: skip
    vec = torch.randn(count, 3, dtype=torch.float64, generator=generator) if vec is None else vec
    window = torch.rand(count, dtype=torch.float64, generator=generator)
    return EdgeEmbedding(lmax, InversePowers(num_basis - 1, 5.0)).double()(index, vec, window, targets)


def _state(irreps: o3.Irreps, nodes: int, generator) -> torch.Tensor:
    return torch.randn(nodes, num_rows(irreps), irreps[0].mul, dtype=torch.float64, generator=generator)


def _couple(x, y, l1, l2, l3):
    """CG of two fragments [2l+1] or [2l+1, channels], e3nn's coefficients at unit variance."""
    w3j = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1)
    return torch.einsum("ac,bc,abm->mc", x, y, w3j)


def _mix(mix, paths, values):
    """W^l on a dict {path number: [2l+1, channels]} -> rows of irreps_out."""
    rows, weights = [], list(mix.weights)
    for _, ir in mix.irreps_out:
        numbers = [n for n, path in enumerate(paths) if path.ir == ir]
        if numbers:
            rows.append(torch.cat([values[n] for n in numbers], dim=1) @ weights.pop(0))
        else:
            rows.append(torch.zeros(ir.dim, mix.channels_out, dtype=torch.float64))
    return torch.cat(rows)


def _literal_one_body(gate: OneBodyGate, x, edges: EdgeFeatures) -> torch.Tensor:
    """One edge and one path after another."""
    slices = row_slices(gate.irreps_in)
    radial = gate.radial_weight.view(-1, len(gate.paths), gate.channels)
    out = []
    for target in range(edges.num_targets):
        sums = {n: torch.zeros(p.ir.dim, gate.channels, dtype=torch.float64) for n, p in enumerate(gate.paths)}
        for e in range(edges.index.shape[1]):
            if edges.index[1, e] != target:
                continue
            psi = x[edges.index[0, e]]
            for n, path in enumerate(gate.paths):
                l1, l2 = gate.irreps_in[path.first].ir.l, path.second
                y = edges.harmonics[e, l2 * l2 : (l2 + 1) ** 2, None].expand(-1, gate.channels)
                r = sum(edges.radial[e, b] * radial[b, n] for b in range(len(radial)))
                sums[n] = sums[n] + _couple(psi[slices[path.first]], y, l1, l2, path.ir.l) * r * gate.scale
        out.append(_mix(gate.mix, gate.paths, sums))
    return torch.stack(out)


ONE_BODY = [
    ("3x0e", "3x0e+3x1o+3x2e", 2, "natural"),
    ("3x0e+3x1o+3x2e", "4x0e+4x1o+4x2e", 2, "natural"),
    ("2x0e+2x0o+2x1e+2x1o", "2x0e+2x0o+2x1e+2x1o", 1, "both"),
    ("2x0e+2x1e", "2x2e+2x1e", 2, "ignored"),
    ("5x0e+5x1o", "5x1o", 0, "natural"),  # zeroth order: distances only
]


@pytest.mark.slow
@pytest.mark.parametrize(("irreps_in", "irreps_out", "order", "parity"), ONE_BODY)
def test_one_body_gate_is_the_sum_over_its_edges(irreps_in, irreps_out, order, parity, backend, generator):
    irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
    gate = OneBodyGate(irreps_in, irreps_out, order, 3, avg_num_neighbors=7.0, parity=parity).double()
    edges, x = _edges(generator), _state(irreps_in, 5, generator)
    got, expected = gate(x, edges), _literal_one_body(gate, x, edges)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize(("irreps_in", "irreps_out", "order", "parity"), ONE_BODY[:3])
def test_one_body_gate_is_e3nn_uvu_and_index_add(irreps_in, irreps_out, order, parity, generator):
    irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
    gate = OneBodyGate(irreps_in, irreps_out, order, 3, avg_num_neighbors=7.0, parity=parity).double()
    edges, x = _edges(generator), _state(irreps_in, 5, generator)
    c, harmonics = gate.channels, o3.Irreps([(1, (l, (-1) ** l)) for l in range(order + 1)])
    middle = o3.Irreps([(c, path.ir) for path in gate.paths])
    instructions = [(p.first, p.second, k, "uvu", True) for k, p in enumerate(gate.paths)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        product = o3.TensorProduct(irreps_in, harmonics, middle, instructions, shared_weights=False)
    finally:
        torch.set_default_dtype(before)
    source, target = edges.index
    weights = edges.radial @ gate.radial_weight * gate.scale
    messages = product(to_mul_ir(x.flatten(1), irreps_in)[source], edges.harmonics[:, : (order + 1) ** 2], weights)
    summed = messages.new_zeros(edges.num_targets, middle.dim).index_add(0, target, messages)
    blocks, mixers = [], list(gate.mix.weights)
    for mul, ir in irreps_out:
        parts = [
            summed[:, s].unflatten(1, (c, ir.dim)) for (_, i), s in zip(middle, middle.slices(), strict=True) if i == ir
        ]
        blocks.append(torch.einsum("nkm,kc->ncm", torch.cat(parts, 1), mixers.pop(0)).reshape(-1, mul * ir.dim))
    got = to_mul_ir(gate(x, edges).flatten(1), irreps_out)
    torch.testing.assert_close(got, torch.cat(blocks, 1), **EXACT)


@pytest.mark.parametrize("irreps_out", ["6x0e+6x1o+6x2e", "6x1o", "5x2e+5x0e"])
def test_density_gate_is_a_one_body_gate_on_the_embedding_of_the_element(irreps_out, backend, generator):
    irreps_out = o3.Irreps(irreps_out)
    species, num_basis = torch.tensor([0, 2, 1, 0, 2]), 3
    density = DensityGate(3, num_basis, irreps_out, avg_num_neighbors=5.0).double()
    edges, channels = _edges(generator, num_basis=num_basis), irreps_out[0].mul
    got = density(species, edges)
    # One channel for each element: the embedding is a row of the unit matrix
    one_hot = torch.eye(3, dtype=torch.float64)[species].unsqueeze(1)
    expected = torch.zeros_like(got)
    for b in range(num_basis):
        gate = OneBodyGate(o3.Irreps("3x0e"), irreps_out, max(irreps_out.ls), num_basis, 5.0).double()
        with torch.no_grad():
            gate.radial_weight.zero_()
            gate.radial_weight[b] = 1.0
            for path in range(len(irreps_out)):
                weight = density.weights[path].view(3, num_basis, channels)[:, b]
                gate.mix.weights[path].copy_(weight)
        expected = expected + gate(one_hot, edges)
    assert got.shape == (4, num_rows(irreps_out), channels) and got.abs().max() > 0.1
    torch.testing.assert_close(got, expected, **EXACT)


def test_pair_gate_is_the_double_sum_over_pairs(backend, generator):
    """W^l CG(psi_i x psi_j x Y(r_ij)) R(r_ij), one ordered pair after another."""
    irreps = hidden_irreps(3, 2)
    gate = PairGate(irreps, irreps, order=2, num_basis=3, avg_num_neighbors=4.0).double()
    parts = 4
    index = torch.tensor([(j, i) for i in range(parts) for j in range(parts) if i != j]).T.contiguous()
    vec = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    edges = EdgeEmbedding(2, InversePowers(2, 5.0)).double()(index, vec, torch.ones(12, dtype=torch.float64), parts)
    x, rows = _state(irreps, parts, generator), row_slices(irreps)
    expected = torch.zeros(parts, 9, 3, dtype=torch.float64)
    for e, (_, i) in enumerate(index.T.tolist()):
        # The message of this pair alone, coupled with the state of i
        single = EdgeFeatures(index[:, e : e + 1], edges.harmonics[e : e + 1], edges.radial[e : e + 1], parts)
        message = _literal_one_body(gate.gather, x, single)[i]
        values = {
            n: _couple(
                x[i, rows[p.first]],
                message[rows[p.second]],
                irreps[p.first].ir.l,
                irreps[p.second].ir.l,
                p.ir.l,
            )
            for n, p in enumerate(gate.product.paths)
        }
        expected[i] += _mix(gate.product.mix, gate.product.paths, values)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(gate(x, edges), expected, **EXACT)


@pytest.mark.parametrize("irreps_out", ["2x0e+2x1o+2x2e", "2x0e", "2x1o", "2x2e+2x0e"])
def test_product_gate_is_the_sum_over_tuples_of_children(irreps_out, backend, generator):
    """A is a sum over children, so the term of degree k is a sum over k-tuples of children (P8, k-body)."""
    irreps, irreps_out, children = hidden_irreps(2, 2), o3.Irreps(irreps_out), 3
    gate = ProductGate(irreps, irreps_out, correlation=3).double()
    child, rows = torch.randn(children, 9, 2, dtype=torch.float64, generator=generator), row_slices(irreps)

    def product(layer, x, y):
        values = {
            n: _couple(x[rows[p.first]], y[rows[p.second]], irreps[p.first].ir.l, irreps[p.second].ir.l, p.ir.l)
            for n, p in enumerate(layer.paths)
        }
        return _mix(layer.mix, layer.paths, values)

    keep = torch.cat([torch.arange(9)[rows[list(irreps).index((2, ir))]] for _, ir in irreps_out])
    linear = gate.linear(child)
    expected = linear.sum(0)
    second, third = gate.products
    for i, j in itertools.product(range(children), repeat=2):
        # The couplings of degree two are kept for i <= j in degree only: symmetrise over the pair of children
        pair = 0.5 * (product(second, child[i], child[j]) + product(second, child[j], child[i]))
        expected = expected + pair[keep]
        for k in range(children):
            expected = expected + product(third, pair, child[k])
    got = gate(child.sum(0, keepdim=True))[0]
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(got, expected, **EXACT)


def test_product_gate_of_order_one_is_linear_and_has_no_products(generator):
    irreps = hidden_irreps(2, 1)
    gate = ProductGate(irreps, irreps, correlation=1).double()
    x = _state(irreps, 3, generator)
    torch.testing.assert_close(gate(2 * x), 2 * gate(x), **EXACT)
    assert len(gate.products) == 0


def test_gain_scales_the_products_only(generator):
    irreps = hidden_irreps(2, 1)
    plain, small = ProductGate(irreps, irreps, 2), ProductGate(irreps, irreps, 2, gain=0.1)
    small.load_state_dict({k: v * (0.1 if "products" in k else 1.0) for k, v in plain.state_dict().items()})
    assert small.products[0].mix.weights[0].std() < 0.2 * plain.linear.weights[0].std() + 0.1
    x = _state(irreps, 3, generator)
    products = plain.double()(x) - plain.linear(x)
    torch.testing.assert_close(small.double()(x) - small.linear(x), 0.1 * products, rtol=0, atol=1e-6)


def test_full_gate_contains_the_channelwise_gate(generator):
    """Weights of the full gate on the diagonal of channels make it the one-body gate."""
    irreps, num_basis = o3.Irreps("2x0e+2x1o"), 3
    gate = OneBodyGate(irreps, irreps, 2, num_basis, avg_num_neighbors=3.0).double()
    full = FullGate(irreps, irreps, 2, num_basis, avg_num_neighbors=3.0).double()
    radial = gate.radial_weight.view(num_basis, len(gate.paths), 2)
    with torch.no_grad():
        for b, linear in enumerate(full.linears):
            for k, (_, ir) in enumerate(irreps):
                numbers = [n for n, path in enumerate(gate.paths) if path.ir == ir]
                mix = gate.mix.weights[k].view(len(numbers), 2, 2)
                blocks = []
                for n, (_, got) in enumerate(full.product.irreps_out):
                    if got == ir:
                        i, j = full.product._pairs[n]
                        path = next(q for q in numbers if (gate.paths[q].first, gate.paths[q].second) == (i, j))
                        blocks.append(radial[b, path, :, None] * mix[numbers.index(path)])
                linear.weights[k].copy_(torch.cat(blocks))
    edges, x = _edges(generator, lmax=2), _state(irreps, 5, generator)
    got, expected = full(x.flatten(1), edges), gate(x, edges).flatten(1)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("parity", ["natural", "both", "ignored"])
@pytest.mark.parametrize("kind", ["one-body", "pair", "density", "product"])
def test_gates_turn(kind, parity, backend, rotation, generator):
    if parity == "ignored":  # it knows no reflections
        rotation = rotation * torch.linalg.det(rotation).sign()
    lmax, parts = 2 if parity == "natural" else 1, 5  # larger types only take longer to compile
    irreps = hidden_irreps(3, lmax, parity)
    matrix = torch.block_diag(*[wigner_matrix(ir, rotation) for _, ir in irreps])
    vec = torch.randn(11, 3, dtype=torch.float64, generator=generator)
    x = _state(irreps, parts, generator)
    gate = {
        "one-body": lambda: OneBodyGate(irreps, irreps, lmax, 3, parity=parity),
        "pair": lambda: PairGate(irreps, irreps, lmax, 3, parity=parity),
        "density": lambda: DensityGate(
            2, 3, hidden_irreps(3, lmax, "ignored" if parity == "ignored" else "natural"), parity=parity
        ),
        "product": lambda: ProductGate(irreps, irreps, 3),
    }[kind]().double()

    def call(rotated: bool):
        edges = _edges(torch.Generator().manual_seed(3), parts, parts, vec=vec @ rotation.T if rotated else vec)
        state = matrix @ x if rotated else x
        if kind == "density":
            return gate(torch.tensor([0, 1, 1, 0, 1]), edges)
        return gate(state) if kind == "product" else gate(state, edges)

    out, turned = call(False), call(True)
    if kind == "density":
        matrix = torch.block_diag(*[wigner_matrix(ir, rotation) for _, ir in gate.irreps_out])
    assert out.abs().amax((0, 2)).min() > 1e-6
    torch.testing.assert_close(turned, matrix @ out, **EXACT)


@pytest.mark.parametrize("kind", ["one-body", "pair", "density"])
def test_no_edges_and_one_part(kind, backend, generator):
    irreps = hidden_irreps(3, 1)
    gate = {
        "one-body": OneBodyGate(irreps, irreps, 1, 3),
        "pair": PairGate(irreps, irreps, 1, 3),
        "density": DensityGate(2, 3, irreps),
    }[kind].double()
    first = torch.tensor([1]) if kind == "density" else _state(irreps, 1, generator)
    empty = EdgeFeatures(
        torch.zeros(2, 0, dtype=torch.long),
        torch.zeros(0, 4, dtype=torch.float64),
        torch.zeros(0, 3, dtype=torch.float64),
        1,
    )
    assert torch.equal(gate(first, empty), torch.zeros(1, 4, 3, dtype=torch.float64))
    # Its own child, at distance zero: only the scalars get a message
    itself = EdgeEmbedding(1, InversePowers(2, 5.0)).double()(
        torch.zeros(2, 1, dtype=torch.long),
        torch.zeros(1, 3, dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        1,
    )
    out = gate(first, itself)
    assert torch.isfinite(out).all() and out[:, 0].abs().min() > 0


def test_order_of_the_edges_does_not_matter(backend, generator):
    irreps = hidden_irreps(3, 2)
    gate = OneBodyGate(irreps, irreps, 2, 3).double()
    edges, x = _edges(generator), _state(irreps, 5, generator)
    order = torch.randperm(11, generator=generator)
    shuffled = EdgeFeatures(edges.index[:, order], edges.harmonics[order], edges.radial[order], edges.num_targets)
    torch.testing.assert_close(gate(x, shuffled), gate(x, edges), rtol=0, atol=1e-12)


def test_sums_have_derivatives_of_every_order(generator):
    messages = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.tensor([0, 0, 2, 1])
    call = lambda m: sum_into(m**3, target, 3)  # noqa: E731
    assert torch.autograd.gradcheck(call, (messages,)) and torch.autograd.gradgradcheck(call, (messages,))
    assert sum_into(messages, target, 4).shape == (4, 3)


def test_embedding_multiplies_by_the_window_of_the_hierarchy(generator):
    vec = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    index, window = (
        torch.zeros(2, 5, dtype=torch.long),
        torch.rand(5, dtype=torch.float64, generator=generator),
    )
    embedding = EdgeEmbedding(2, InversePowers(2, 5.0)).double()
    edges, bare = embedding(index, vec, window, 1), embedding(index, vec, torch.ones_like(window), 1)
    torch.testing.assert_close(edges.radial, bare.radial * window[:, None], rtol=0, atol=0)
    assert torch.equal(edges.harmonics, bare.harmonics)


def test_errors():
    irreps = hidden_irreps(3, 1)
    with pytest.raises(ValueError, match="a gate of order 0 on 3x0e gives 0e, but no path leads to 1o; raise lmax"):
        OneBodyGate(o3.Irreps("3x0e"), irreps, 0, 3)
    with pytest.raises(ValueError, match="a density of bare atoms gives 0e, 1o, but no path leads to 1e"):
        DensityGate(2, 3, o3.Irreps("3x0e+3x1e"))
    with pytest.raises(ValueError, match="correlation must be at least 1, got 0; 2 or 3 is usual"):
        ProductGate(irreps, irreps, 0)
    with pytest.raises(
        ValueError, match="irreps_out must be some of the fragments of irreps_in, got 3x2e of 3x0e\\+3x1o"
    ):
        ProductGate(irreps, o3.Irreps("3x2e"), 2)
    with pytest.raises(ValueError, match="irreps must have one multiplicity"):
        OneBodyGate(o3.Irreps("2x0e+3x1o"), irreps, 1, 3)
    for gate in (OneBodyGate(irreps, irreps, 1, 3), DensityGate(2, 3, irreps)):
        assert "3x0e+3x1o" in repr(gate)


def test_the_old_name_of_an_argument_warns():
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match="degree is now called avg_num_neighbors"):
        old = OneBodyGate("2x0e", "2x0e+2x1o", 1, 3, degree=4.0)
    torch.manual_seed(0)
    new = OneBodyGate("2x0e", "2x0e+2x1o", 1, 3, avg_num_neighbors=4.0)
    assert old.scale == new.scale == 0.5 and torch.equal(old.radial_weight, new.radial_weight)
    with pytest.raises(TypeError, match="degree is the old name of avg_num_neighbors"):
        OneBodyGate("2x0e", "2x0e+2x1o", 1, 3, degree=4.0, avg_num_neighbors=4.0)
