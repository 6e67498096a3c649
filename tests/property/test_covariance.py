"""Property-based: random types, group elements, relabellings and batches; and the dtype ladder."""

from __future__ import annotations

import copy

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st

from nbody_pyg import BondTree, NBodyNet, NestedShells
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.gates import OneBodyGate
from nbody_pyg.nn.irreps import from_mul_ir, hidden_irreps, num_rows, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.nn.products import FullProduct
from nbody_pyg.radial import BesselBasis
from nbody_pyg.testing import random_molecule, rotate_features, wigner_matrix

irreps_of = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 3), st.sampled_from([1, -1])), min_size=1, max_size=4
).map(lambda items: o3.Irreps([(mul, (l, p)) for mul, l, p in items]))
seeds = st.integers(0, 2**31)


def _rotation(seed: int) -> torch.Tensor:
    """Uniform over O(3), determinants of both signs."""
    q, r = torch.linalg.qr(_randn(seed, 3, 3))
    return q * torch.diagonal(r).sign()


def _randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(a, b, tolerance=1e-10):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())) if a.numel() else True


@given(irreps_of, seeds)
def test_wigner_matrices_are_a_representation(irreps, seed):
    g, h = _rotation(seed), _rotation(seed + 1)
    for _, ir in irreps:
        product = wigner_matrix(ir, g) @ wigner_matrix(ir, h)
        _close(product, wigner_matrix(ir, g @ h))
        _close(wigner_matrix(ir, g) @ wigner_matrix(ir, g).T, torch.eye(ir.dim, dtype=torch.float64))


@given(irreps_of, irreps_of, seeds)
def test_full_products_are_covariant(irreps1, irreps2, seed):
    product, g = FullProduct(irreps1, irreps2, lmax=3).double(), _rotation(seed)
    x, y = _randn(seed + 1, 3, irreps1.dim), _randn(seed + 2, 3, irreps2.dim)
    turned = product(*(rotate_features(t, i, g, "ir_mul") for t, i in ((x, irreps1), (y, irreps2))))
    _close(turned, rotate_features(product(x, y), product.irreps_out, g, "ir_mul"))


@given(irreps_of, st.integers(1, 4), seeds)
def test_linear_maps_are_covariant_and_layouts_convert(irreps, channels, seed):
    out = o3.Irreps([(channels, ir) for _, ir in irreps])
    linear, g, x = IrrepsLinear(irreps, out, bias=True).double(), _rotation(seed), _randn(seed, 4, irreps.dim)
    _close(linear(rotate_features(x, irreps, g, "ir_mul")), rotate_features(linear(x), out, g, "ir_mul"))
    assert torch.equal(from_mul_ir(to_mul_ir(x, irreps), irreps), x)
    _close(
        rotate_features(to_mul_ir(x, irreps), irreps, g),
        to_mul_ir(rotate_features(x, irreps, g, "ir_mul"), irreps),
    )


_GATES: dict = {}


@settings(max_examples=15)
@given(st.sampled_from([("natural", 2), ("ignored", 1), ("both", 1)]), st.integers(0, 12), st.integers(1, 4), seeds)
def test_one_body_gates_are_covariant_and_blind_to_order(kind, count, parts, seed):
    parity, lmax = kind
    if kind not in _GATES:
        irreps = hidden_irreps(3, lmax, parity)
        _GATES[kind] = irreps, OneBodyGate(irreps, irreps, lmax, 4, parity=parity).double()
    irreps, gate = _GATES[kind]
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(parts, (2, count), generator=generator)
    vec, window, x = (
        _randn(seed, count, 3),
        torch.rand(count, generator=generator).double(),
        _randn(seed, parts, num_rows(irreps), 3),
    )
    embedding, g = EdgeEmbedding(lmax, BesselBasis(4, 5.0), parity).double(), _rotation(seed)
    if parity == "ignored":
        g = g * torch.linalg.det(g).sign()
    matrix = torch.block_diag(*[wigner_matrix(ir, g) for _, ir in irreps])
    out = gate(x, embedding(index, vec, window, parts))
    _close(gate(matrix @ x, embedding(index, vec @ g.T, window, parts)), matrix @ out)
    order = torch.randperm(count, generator=generator)
    _close(gate(x, embedding(index[:, order].contiguous(), vec[order], window[order], parts)), out)


def _networks():
    torch.manual_seed(2)
    schemes = (BondTree(4.0), NestedShells((3.0, 2.5)))
    return [NBodyNet([1, 6, 8], scheme, channels=3, lmax=1).double() for scheme in schemes]


NETWORKS = _networks()


@settings(max_examples=10)
@given(st.sampled_from([0, 1]), st.integers(1, 8), seeds)
def test_energies_do_not_see_rotation_translation_and_names(which, num_atoms, seed):
    net, system = NETWORKS[which], random_molecule(num_atoms, seed=seed)
    order = torch.randperm(num_atoms, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        energy = net(system.z, system.pos)
        moved = system.pos @ _rotation(seed).T + 5 * _randn(seed, 3)
        _close(net(system.z[order], moved[order]), energy)


@settings(max_examples=8)
@given(st.sampled_from([0, 1]), st.lists(st.integers(1, 6), min_size=2, max_size=5), seeds)
def test_a_batch_is_its_systems(which, sizes, seed):
    net, systems = NETWORKS[which], [random_molecule(n, seed=seed + k) for k, n in enumerate(sizes)]
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    with torch.no_grad():
        together = net(torch.cat([s.z for s in systems]), torch.cat([s.pos for s in systems]), batch)
        _close(together, torch.cat([net(s.z, s.pos) for s in systems]))


@pytest.mark.slow
def test_the_error_of_rotation_falls_with_the_dtype():
    """The dtype ladder: what is left is round-off of the dtype at hand, not of a table kept in float32."""
    system, g = random_molecule(7), _rotation(5)
    for net in NETWORKS:
        errors = {}
        for dtype in (torch.float32, torch.float64):
            moved = copy.deepcopy(net).float().to(dtype)  # float32 first: constants must recover
            with torch.no_grad():
                a, b = (moved(system.z, pos.to(dtype)) for pos in (system.pos, system.pos @ g.T))
            errors[dtype] = float(((a - b) / a).abs())
        assert errors[torch.float32] < 1e-4
        assert errors[torch.float64] < 1e-12
