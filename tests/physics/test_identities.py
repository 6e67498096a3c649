"""Known physics as gates with weights set by hand: multipole translation, dipole-dipole, Coulomb.

Edge features are given directly, with bare distances: softening belongs to the embedding of edges, not to
gates.
"""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3

from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.gates import OneBodyGate, PairGate
from nbody_pyg.nn.harmonics import SolidHarmonics

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=available_backends(), autouse=True)
def backend(request):
    set_backend(request.param)
    yield request.param
    set_backend("auto")


def _features(index, vec, lmax, powers, targets, unit=False) -> EdgeFeatures:
    r = vec.norm(dim=1)
    harmonics = SolidHarmonics(lmax).double()(vec / r[:, None] if unit else vec)
    return EdgeFeatures(index, harmonics, torch.stack([r**-s for s in powers], dim=1), targets)


def _set(gate: OneBodyGate, coefficients) -> None:
    """Radial weight of each path (l1, l2, l) from a table, zero elsewhere; W^l adds the paths up."""
    with torch.no_grad():
        values = [coefficients.get((gate.irreps_in[p.first].ir.l, p.second, p.ir.l), 0.0) for p in gate.paths]
        gate.radial_weight.copy_(torch.tensor([values], dtype=torch.float64))
        for weight in gate.mix.weights:
            weight.fill_(1.0)


def _moments(charges, vec):
    """Charge, dipole, quadrupole in the basis of the solid harmonics: sum_i q_i Y_l(r_i)."""
    return (charges[:, None] * SolidHarmonics(2).double()(vec)).sum(0)


def test_multipole_translation_is_a_gate_of_order_two(generator):
    """M2M (Q = 1, S = 0): monopole P = 0, dipole P = 1, quadrupole P = 2; exact."""
    irreps = o3.Irreps("1x0e+1x1o+1x2e")
    pos = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    charges = torch.randn(9, dtype=torch.float64, generator=generator)
    part = torch.arange(9) // 3
    centres = torch.stack([pos[part == k].mean(0) for k in range(3)])
    children = torch.stack([_moments(charges[part == k], pos[part == k] - centres[k]) for k in range(3)])
    root = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64)
    index = torch.stack([torch.arange(3), torch.zeros(3, dtype=torch.long)])
    edges = _features(index, centres - root, 2, [0], 1)
    gate = OneBodyGate(irreps, irreps, 2, 1).double()
    # Y_2 = sqrt(5/6) CG(Y_1 x Y_1), hence Y_2(a + b) = Y_2(a) + Y_2(b) + 2 sqrt(5/6) CG(Y_1(a) x Y_1(b))
    cross = 2 * math.sqrt(5 / 6)
    _set(
        gate,
        {(0, 0, 0): 1.0, (0, 1, 1): 1.0, (1, 0, 1): 1.0, (0, 2, 2): 1.0, (1, 1, 2): cross, (2, 0, 2): 1.0},
    )
    got, expected = gate(children.unsqueeze(-1), edges)[0, :, 0], _moments(charges, pos - root)
    assert expected.abs().min() > 1e-2
    torch.testing.assert_close(got, expected, **EXACT)
    # One order less gives monopole and dipole, and no quadrupole
    lower = OneBodyGate(irreps, irreps, 1, 1).double()
    _set(lower, {(0, 0, 0): 1.0, (0, 1, 1): 1.0, (1, 0, 1): 1.0, (1, 1, 2): cross, (2, 0, 2): 1.0})
    partial = lower(children.unsqueeze(-1), edges)[0, :, 0]
    torch.testing.assert_close(partial[:4], expected[:4], **EXACT)
    assert (partial[4:] - expected[4:]).abs().max() > 1e-2


def _pairs(n):
    return torch.tensor([(j, i) for i in range(n) for j in range(n) if i != j]).T.contiguous()


@pytest.mark.parametrize("unit", [False, True], ids=["P=2,S=5", "unit-directions,S=3"])
def test_dipole_dipole_energy_is_a_pair_gate(unit, generator):
    """E = sum_{i<j} a.b / r^3 - 3 (a.r)(b.r) / r^5, from psi_i x psi_j x Y_2(r) with a scalar result."""
    n, irreps = 4, o3.Irreps("1x1o")
    pos = 2 * torch.randn(n, 3, dtype=torch.float64, generator=generator)
    dipole = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    index = _pairs(n)
    vec = pos[index[0]] - pos[index[1]]
    gate = PairGate(irreps, o3.Irreps("1x0e"), order=2, num_basis=1).double()
    # CG(a x CG(b x Y_2)) = sqrt(3/2) ((a.r)(b.r) - r^2 a.b / 3): normalised couplings, no fit
    _set(gate.gather, {(1, 2, 1): -math.sqrt(6.0)})
    with torch.no_grad():
        gate.product.mix.weights[0].fill_(0.5)  # every pair is met twice
    energy = gate(dipole.unsqueeze(-1), _features(index, vec, 2, [3 if unit else 5], n, unit)).sum()
    a, b, r = dipole[index[1]], dipole[index[0]], vec.norm(dim=1)
    expected = 0.5 * ((a * b).sum(1) / r**3 - 3 * (a * vec).sum(1) * (b * vec).sum(1) / r**5).sum()
    assert expected.abs() > 1e-3
    torch.testing.assert_close(energy, expected, **EXACT)


def test_coulomb_energy_is_a_pair_gate_of_order_zero(generator):
    """P = 0, Q = 2, S = 1."""
    n = 5
    pos = 2 * torch.randn(n, 3, dtype=torch.float64, generator=generator)
    charge = torch.randn(n, dtype=torch.float64, generator=generator)
    index = _pairs(n)
    vec = pos[index[0]] - pos[index[1]]
    gate = PairGate(o3.Irreps("1x0e"), o3.Irreps("1x0e"), order=0, num_basis=1).double()
    _set(gate.gather, {(0, 0, 0): 1.0})
    with torch.no_grad():
        gate.product.mix.weights[0].fill_(0.5)
    energy = gate(charge.view(n, 1, 1), _features(index, vec, 0, [1], n)).sum()
    expected = sum(charge[i] * charge[j] / (pos[i] - pos[j]).norm() for i in range(n) for j in range(i))
    assert expected.abs() > 1e-3
    torch.testing.assert_close(energy, expected, **EXACT)


def test_charge_dipole_forces_come_from_the_gate(generator):
    """The gradient of the Coulomb gate is Coulomb's law."""
    pos = (2 * torch.randn(3, 3, dtype=torch.float64, generator=generator)).requires_grad_(True)
    charge, index = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64), _pairs(3)
    gate = PairGate(o3.Irreps("1x0e"), o3.Irreps("1x0e"), order=0, num_basis=1).double()
    _set(gate.gather, {(0, 0, 0): 1.0})
    with torch.no_grad():
        gate.product.mix.weights[0].fill_(0.5)
    energy = gate(charge.view(3, 1, 1), _features(index, pos[index[0]] - pos[index[1]], 0, [1], 3)).sum()
    (gradient,) = torch.autograd.grad(energy, pos)
    force = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            if i != j:
                d = (pos[i] - pos[j]).detach()
                force[i] += charge[i] * charge[j] * d / d.norm() ** 3
    torch.testing.assert_close(-gradient, force, **EXACT)
