"""Interfaces of the multipole algebra: derivatives, dtypes, kernels that stay finite, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import gamma, gammainc

from nbody_pyg.multipoles import (
    FastMultipole,
    all_pairs,
    direct_potential,
    gaussian_factors,
    irregular_harmonics,
    l2l,
    m2l,
    m2m,
    p2m,
    regular_harmonics,
)
from nbody_pyg.multipoles.damping import boys

INDEX = torch.tensor([[0, 1, 1], [0, 0, 1]])


def _inputs(lmax=2):
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(2, (lmax + 1) ** 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    vec = torch.randn(3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64, generator=generator, requires_grad=True)
    return values, vec, weight


@pytest.mark.parametrize("translate", [m2m, m2l, l2l])
def test_first_and_second_derivatives(translate):
    values, vec, weight = _inputs()

    def call(values, vec, weight):
        return translate(values, vec, INDEX, 2, 1, weight)

    assert torch.autograd.gradcheck(call, (values, vec, weight))
    assert torch.autograd.gradgradcheck(call, (values, vec, weight))


def test_p2m_is_smooth_at_the_centre():
    vec = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    charges = torch.ones(2, 1, dtype=torch.float64)

    def call(vec):
        return p2m(charges, vec, INDEX, 2, 3)

    assert torch.autograd.gradcheck(call, vec) and torch.autograd.gradgradcheck(call, vec)
    (slope,) = torch.autograd.grad(call(vec)[..., 0].square().sum() + call(vec)[0, 1, 0], vec)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0.5


def test_boys_functions_on_both_sides_of_the_switch():
    t = torch.tensor([0.0, 1e-9, 0.3, 0.99, 1.01, 4.0, 9.9, 10.1, 12.0, 40.0, 900.0], dtype=torch.float64)
    n, positive = np.arange(5) + 0.5, t[1:, None].numpy()
    expected = torch.from_numpy(gamma(n) * gammainc(n, positive) / (2 * positive**n))
    for order in range(4):  # the switch between series and recursion moves with the order
        torch.testing.assert_close(boys(t, order)[1:], expected[:, : order + 1], rtol=1e-13, atol=0)
    got = boys(t, 4)
    torch.testing.assert_close(got[1:], expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(got[0], torch.from_numpy(0.5 / n), rtol=1e-14, atol=0)


def test_smeared_kernel_is_erf_and_becomes_bare():
    r = torch.tensor([1e-3, 0.2, 1.0, 3.0, 7.0], dtype=torch.float64)
    factors = gaussian_factors(r.square(), 2, 0.5)
    torch.testing.assert_close(factors[:, 0], torch.erf(r / 1.0) / r, rtol=1e-13, atol=0)
    slope = (torch.erf(r) / r - 2 / math.sqrt(math.pi) * torch.exp(-r.square())) / r.square()  # -g'/r
    torch.testing.assert_close(factors[1:, 1], slope[1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(factors[-1], r[-1] ** -torch.tensor([1.0, 3.0, 5.0]).double(), rtol=1e-14, atol=0)
    vec = torch.tensor([[0.3, -4.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(irregular_harmonics(vec, 4, 0.5), irregular_harmonics(vec, 4), rtol=1e-13, atol=0)
    at_zero = irregular_harmonics(torch.zeros(1, 3, dtype=torch.float64), 2, 0.5)
    torch.testing.assert_close(at_zero[0, 0], torch.tensor(2 / math.sqrt(math.pi)).double(), rtol=1e-7, atol=0)
    assert at_zero[0, 1:].abs().max() == 0


def test_smeared_kernel_has_derivatives_at_zero():
    vec = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.2, -0.4], [3.0, 1.0, 3.2]], dtype=torch.float64, requires_grad=True)

    def call(vec):
        return irregular_harmonics(vec, 3, 0.5)

    assert torch.autograd.gradcheck(call, vec) and torch.autograd.gradgradcheck(call, vec)


def test_width_enters_m2l_and_the_direct_sum():
    values, vec, _ = _inputs(0)
    near = m2l(values, 0.1 * vec, INDEX, 2, width=0.5)
    assert (near - m2l(values, 0.1 * vec, INDEX, 2)).abs().max() > 1
    pos, charges = torch.tensor([[0.0, 0, 0], [0, 0, 1.0]]).double(), torch.tensor([1.0, -2.0]).double()
    torch.testing.assert_close(direct_potential(charges, pos), torch.tensor([-2.0, 1.0]).double())
    smeared = direct_potential(charges, pos, width=0.5)
    torch.testing.assert_close(smeared, math.erf(1.0) * torch.tensor([-2.0, 1.0]).double(), rtol=1e-12, atol=0)


def test_single_precision_and_weights():
    values, vec, weight = _inputs(4)
    for translate in (m2m, m2l, l2l):
        exact = translate(values, vec, INDEX, 2, weight=weight)
        single = translate(values.float(), vec.float(), INDEX, 2, weight=weight.float())
        assert single.dtype == torch.float32
        assert 0 < (single - exact).abs().max() < 1e-5 * exact.abs().max()
        by_hand = sum(
            w * translate(values, vec[e : e + 1], INDEX[:, e : e + 1], 2) for e, w in enumerate(weight.unbind())
        )
        torch.testing.assert_close(exact, by_hand)
    far = irregular_harmonics(torch.tensor([[1e4, 0.0, 0.0]]), 16)
    assert torch.isfinite(far).all()


def test_tables_made_under_inference_mode_can_be_trained_with():
    values, vec, _ = _inputs(3)
    with torch.inference_mode():
        m2m(values.float(), vec.float(), INDEX, 2)
    moved = m2m(values.float(), vec.float(), INDEX, 2)
    moved.sum().backward()
    assert values.grad.abs().max() > 0


def test_all_pairs_of_a_batch():
    index = all_pairs(torch.tensor([0, 0, 1, 2, 2]))
    assert index.tolist() == [[1, 0, 4, 3], [0, 1, 3, 4]]
    charges, pos = torch.ones(4), torch.eye(4, 3)
    apart = direct_potential(charges, pos, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(apart, torch.tensor([0.5**0.5, 0.5**0.5, 1.0, 1.0]))


def test_errors_name_argument_rule_and_cure():
    values, vec, _ = _inputs()
    with pytest.raises(
        ValueError, match=r"values must have shape \[nodes, \(lmax \+ 1\)\^2, channels\].*view\(-1, 1, 1\)"
    ):
        m2m(values[:, :5], vec, INDEX, 2)
    with pytest.raises(ValueError, match="lmax must be an integer from 0 to 8, got 9"):
        m2l(values, vec, INDEX, 2, 9)
    with pytest.raises(ValueError, match=r"lmax must lie in 0 \.\. 16, got 17"):
        regular_harmonics(vec, 17)
    with pytest.raises(ValueError, match=r"width must be a positive length in angstrom, got 0\.0"):
        irregular_harmonics(vec, 1, 0.0)
    with pytest.raises(ValueError, match=r"separation must be above 1, got 1\.0"):
        FastMultipole(2, 1.0)
    pos, charges = torch.rand(4, 3), torch.ones(4)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \[4\]"):
        FastMultipole(2).potential(charges, pos, torch.zeros(4))
    with pytest.raises(ValueError, match="labels must be nested, finest first, but column 1"):
        FastMultipole(2).potential(charges, pos, torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]]))
    assert repr(FastMultipole(3)) == "FastMultipole(lmax=3, separation=1.5)"
