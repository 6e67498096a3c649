"""The multipole algebra against direct summation, textbooks and e3nn."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from e3nn import o3

from nbody_pyg.multipoles import (
    FastMultipole,
    all_pairs,
    direct_potential,
    irregular_harmonics,
    l2l,
    l2p,
    m2l,
    m2m,
    p2m,
    regular_harmonics,
)
from nbody_pyg.multipoles.coefficients import alpha, block, kappa, stretched_coupling

LMAX = 8


def _randn(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _to_one(n):
    return torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.long)])


def _close(got, expected, relative=1e-13):
    assert expected.abs().max() > 1e-6
    assert (got - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("l", range(9))
def test_harmonics_are_those_of_e3nn(l, generator):
    vec = _randn(generator, 7, 3)
    expected = o3.spherical_harmonics(l, vec, normalize=False, normalization="norm")
    _close(regular_harmonics(vec, l)[:, block(l)], expected)
    _close(irregular_harmonics(vec, l)[:, block(l)], expected / vec.norm(dim=1, keepdim=True) ** (2 * l + 1))


@pytest.mark.parametrize("l", [9, 12, 16])
def test_harmonics_of_high_degree_keep_the_addition_theorem_of_legendre(l, generator):
    """sum_m C_lm(a) C_lm(b) = P_l(a.b), beyond what e3nn tabulates."""
    a, b = (torch.nn.functional.normalize(_randn(generator, 5, 3), dim=1) for _ in range(2))
    got = (regular_harmonics(a, l) * regular_harmonics(b, l))[:, block(l)].sum(1)
    x = (a * b).sum(1)
    below, here = torch.ones_like(x), x
    for n in range(1, l):
        below, here = here, ((2 * n + 1) * x * here - n * below) / (n + 1)
    torch.testing.assert_close(got, here, rtol=0, atol=1e-13)


def test_coupling_is_e3nns_up_to_a_sign():
    for l1, l2 in [(1, 1), (2, 1), (3, 4), (8, 8)]:
        ours, theirs = stretched_coupling(l1, l2), o3.wigner_3j(l1, l2, l1 + l2, dtype=torch.float64)
        ratio = (ours * theirs).sum() * math.sqrt(2 * (l1 + l2) + 1)
        torch.testing.assert_close(ours, ratio.sign() * math.sqrt(2 * (l1 + l2) + 1) * theirs, rtol=0, atol=1e-12)


def test_regular_addition_theorem(generator):
    a, b = _randn(generator, 6, 3), _randn(generator, 6, 3)
    ra, rb, rab = (regular_harmonics(v, LMAX) for v in (a, b, a + b))
    for l in range(LMAX + 1):
        total = 0
        for l1 in range(l + 1):
            coupling = stretched_coupling(l1, l - l1)
            total += alpha(l1, l - l1) * torch.einsum("na,nb,abc->nc", ra[:, block(l1)], rb[:, block(l - l1)], coupling)
        _close(total, rab[:, block(l)])


def test_irregular_addition_theorem(generator):
    """I_L(R + s) = sum_l kappa [R_l(s) x I_(L+l)(R)]_L: the error falls as (s/R)^(l+1)."""
    far, near = _randn(generator, 6, 3), _randn(generator, 6, 3)
    far, near = 10.0 * far / far.norm(dim=1, keepdim=True), near / near.norm(dim=1, keepdim=True)
    regular, irregular = regular_harmonics(near, 12), irregular_harmonics(far, 14)
    for upper in (0, 1, 2):
        expected = irregular_harmonics(far + near, upper)[:, block(upper)]
        total, errors = 0, []
        for l in range(13):
            # <l m, L+l m' | L M>: the stretched coupling with its factors exchanged
            coupling = (-1) ** l * math.sqrt((2 * upper + 1) / (2 * (upper + l) + 1)) * stretched_coupling(l, upper)
            total += kappa(upper, l) * torch.einsum(
                "na,nc,abc->nb", regular[:, block(l)], irregular[:, block(upper + l)], coupling
            )
            errors.append(float((total - expected).abs().max() / expected.abs().max()))
        assert errors[0] > 0.05 and errors[6] < 1e-3 * errors[0] and errors[12] < 1e-7 * errors[0]


def test_m2m_and_l2l_are_exact(generator):
    pos, charges = _randn(generator, 20, 3), _randn(generator, 20, 2)
    first, second = 0.5 * _randn(generator, 1, 3), 0.5 * _randn(generator, 1, 3)
    moments = p2m(charges, pos - first, _to_one(20), 1, LMAX)
    moved = m2m(moments, first - second, _to_one(1), 1)
    # The definition: sums of charges times harmonics
    direct = torch.einsum("jc,jr->rc", charges, regular_harmonics(pos - second, LMAX)).unsqueeze(0)
    _close(moved, direct)
    # A local field is a harmonic polynomial: its values at points do not depend on the centre
    field, points = _randn(generator, 1, 81, 2), 0.5 * _randn(generator, 9, 3)
    down = _to_one(9).flip(0)
    expected = torch.einsum("rc,nr->nc", field[0], regular_harmonics(points - first, LMAX))
    _close(l2p(field, first - points, down, 9), expected)
    _close(l2p(l2l(field, first - second, _to_one(1), 1), second - points, down, 9), expected)


def test_moments_of_a_shift_of_lower_degree_are_a_truncation(generator):
    values, vec = _randn(generator, 3, 25, 2), _randn(generator, 3, 3)
    for translate in (m2m, m2l, l2l):
        whole = translate(values, vec, _to_one(3), 2)
        assert whole.shape == (2, 25, 2) and whole[1].abs().max() == 0
        for lmax in (0, 2):
            _close(translate(values, vec, _to_one(3), 2, lmax)[0], whole[0, : (lmax + 1) ** 2])


def _chain(p, seed):
    """20 charges in a unit box, potential in a unit box 4.5 away, all steps with a shift of centres in between."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.rand(20, 3, dtype=torch.float64, generator=generator)
    charges = torch.randn(20, 1, dtype=torch.float64, generator=generator)
    offset = torch.tensor([4.5, 0.0, 0.0], dtype=torch.float64)
    points = torch.rand(20, 3, dtype=torch.float64, generator=generator) + offset
    own, middle = pos.mean(0, keepdim=True), torch.full((1, 3), 0.5, dtype=torch.float64)
    there, back = middle + offset, points.mean(0, keepdim=True)
    one, down = _to_one(1), _to_one(20).flip(0)
    moments = m2m(p2m(charges, pos - own, _to_one(20), 1, p), own - middle, one, 1)
    field = l2l(m2l(moments, middle - there, one, 1), there - back, one, 1)
    got = l2p(field, back - points, down, 20)
    expected = (charges.T / torch.cdist(points, pos)).sum(1, keepdim=True)
    return float((got - expected).abs().max() / expected.abs().max())


def test_full_chain_converges():
    """Median of 20 draws; an error is relative to the largest potential, so draws that are nearly neutral have more."""
    errors = {p: sorted(_chain(p, seed) for seed in range(20)) for p in (2, 4, 6, 8)}
    for p, order in {2: 1.3e-2, 4: 6.2e-4, 6: 9.9e-6, 8: 8.5e-7}.items():
        assert 1e-3 * order < errors[p][10] < order and errors[p][-1] < 12 * order, errors
    assert all(errors[p + 2][10] < 0.1 * errors[p][10] for p in (2, 4, 6)), errors


def test_multipole_energies_are_the_textbook_formulas(generator):
    """Charge-charge, charge-dipole and dipole-dipole, through M2L at degree 1: nothing is truncated."""
    pos, charges, dipoles = _randn(generator, 2, 3), _randn(generator, 2), _randn(generator, 2, 3)
    pos[1] += 3.0
    values = torch.cat([charges.unsqueeze(1), dipoles], dim=1).unsqueeze(-1)
    index = all_pairs(2)
    field = m2l(values, pos[index[0]] - pos[index[1]], index, 2)
    energy = 0.5 * (values * field).sum()
    r = pos[1] - pos[0]
    d = r.norm()
    (qa, qb), (a, b) = charges, dipoles
    expected = qa * qb / d + (qb * a @ r - qa * b @ r) / d**3 + a @ b / d**3 - 3 * (a @ r) * (b @ r) / d**5
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=0)
    parts = [qa * qb / d, (qb * a @ r - qa * b @ r) / d**3, a @ b / d**3 - 3 * (a @ r) * (b @ r) / d**5]
    assert min(abs(float(part)) for part in parts) > 1e-4


def _wigner(rotation, lmax, generator):
    """Matrix of a rotation on the degrees 0 .. lmax in float64 (e3nn's goes through float32), from e3nn's harmonics."""
    probe = torch.nn.functional.normalize(_randn(generator, 200, 3), dim=1)
    degrees = list(range(lmax + 1))
    before, after = (
        o3.spherical_harmonics(degrees, v, normalize=False, normalization="norm") for v in (probe, probe @ rotation.T)
    )
    return torch.linalg.lstsq(before, after).solution.T


@pytest.mark.parametrize("translate", [m2m, m2l, l2l])
def test_covariance(translate, rotation, generator):
    values, vec = _randn(generator, 6, 25, 2), _randn(generator, 6, 3)
    index, d = torch.stack([torch.arange(6), torch.arange(6) % 2]), _wigner(rotation, 4, generator)
    turned = translate(torch.einsum("ab,nbc->nac", d, values), vec @ rotation.T, index, 2)
    expected = torch.einsum("ab,nbc->nac", d, translate(values, vec, index, 2))
    _close(turned, expected, 1e-12)
    permuted = torch.randperm(6, generator=generator)
    torch.testing.assert_close(
        translate(values, vec[permuted], index[:, permuted], 2),
        translate(values, vec, index, 2),
        rtol=1e-12,
        atol=1e-12,
    )


def _boxed(generator, n=120):
    pos = 4.0 * torch.rand(n, 3, dtype=torch.float64, generator=generator)
    weights = torch.tensor([16, 4, 1])
    fine, coarse = (((pos / size).long() * weights).sum(1) for size in (1.0, 2.0))
    return pos, _randn(generator, n, 2), torch.stack([fine, coarse], dim=1)


def test_fast_multipole_method_converges_to_the_direct_sum(generator):
    pos, charges, labels = _boxed(generator)
    exact = direct_potential(charges, pos)
    naive = (charges.unsqueeze(0) / (torch.cdist(pos, pos) + torch.diag(torch.full((120,), math.inf)))[..., None]).sum(
        1
    )
    _close(exact, naive, 1e-12)
    errors = [
        float((FastMultipole(p, separation=2.0).potential(charges, pos, labels) - exact).norm() / exact.norm())
        for p in (0, 2, 4, 6)
    ]
    assert errors[0] > 1e-3, "far boxes take part"
    assert all(after < 0.3 * before for before, after in pairwise(errors)) and errors[-1] < 1e-3
    one_level = FastMultipole(6, separation=2.0).potential(charges[:, 0], pos, labels[:, 0])
    _close(one_level, exact[:, 0], 1e-3)


def test_fast_multipole_energy_has_forces(generator):
    pos, charges, labels = _boxed(generator, 30)
    pos.requires_grad_(True)
    method = FastMultipole(8, separation=1.5)
    energy = method.energy(charges[:, 0], pos, labels[:, 0])
    (slope,) = torch.autograd.grad(energy, pos)
    r = pos.detach().unsqueeze(0) - pos.detach().unsqueeze(1)
    cube = r.norm(dim=-1).pow(3) + torch.diag(torch.full((30,), math.inf))
    force = -(charges[:, 0].unsqueeze(0) * charges[:, :1]).unsqueeze(-1) * r / cube.unsqueeze(-1)
    _close(-slope, force.sum(1), 1e-4)
