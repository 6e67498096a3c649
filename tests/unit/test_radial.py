"""Windows, softened directions and radial bases: values, derivatives, smoothness, errors."""

from __future__ import annotations

import math

import pytest
import torch

from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.radial import SOFT_LENGTH, BesselBasis, InversePowers, smooth_cutoff, soften, vector_window


def _derivatives(function, r: torch.Tensor, count: int) -> list[torch.Tensor]:
    r = r.clone().requires_grad_(True)
    values = [function(r)]
    for _ in range(count):
        values.append(torch.autograd.grad(values[-1].sum(), r, create_graph=True)[0])
    return [v.detach() for v in values]


def test_the_window_is_the_polynomial_of_its_docstring():
    r = torch.linspace(0.0, 5.0, 50, dtype=torch.float64)
    x = r / 5.0
    expected = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    torch.testing.assert_close(smooth_cutoff(r, 5.0), expected, rtol=0, atol=1e-14)
    assert smooth_cutoff(torch.zeros(1), 5.0).item() == 1.0
    assert not smooth_cutoff(torch.tensor([5.0, 5.1, 80.0]), 5.0).any()
    assert (torch.diff(expected) <= 0).all(), "it only falls"


def test_the_window_of_exponent_3_is_the_quintic_step_downwards():
    r = torch.linspace(0.0, 6.0, 50, dtype=torch.float64)
    t = (r / 5.0).clamp(max=1.0)
    expected = 1 - t**3 * (10 - 15 * t + 6 * t**2)
    torch.testing.assert_close(smooth_cutoff(r, 5.0, 3), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("exponent", [3, 4, 5, 6])
def test_the_window_leaves_with_two_derivatives_and_not_with_three(exponent):
    # The polynomial is triple zero at the cutoff: value, slope and curvature go to zero as h^3, h^2, h
    below = torch.tensor([5.0 - 1e-5], dtype=torch.float64)
    value, slope, curvature, third = _derivatives(lambda r: smooth_cutoff(r, 5.0, exponent), below, 3)
    assert abs(value) < 1e-13 and abs(slope) < 1e-8 and abs(curvature) < 1e-3
    assert third.abs() > 0.1, "C2, as stated, and no more"
    above = _derivatives(lambda r: smooth_cutoff(r, 5.0, exponent), torch.tensor([5.0 + 1e-9], dtype=torch.float64), 2)
    assert not torch.stack(above).any()


@pytest.mark.skipif("c" not in available_backends(), reason="no C compiler")
@pytest.mark.parametrize("exponent", [3, 5, 6])
def test_the_compiled_window_is_the_window(exponent, generator):
    """Values, slopes and curvatures, inside, outside and where a part sits on its parent."""
    vec = 2 * torch.randn(20, 3, dtype=torch.float64, generator=generator)
    vec[0] = 0.0
    found = []
    for name in ("c", "torch"):
        set_backend(name)
        v = vec.clone().requires_grad_(True)
        value = vector_window(v, 3.0, exponent)
        (slope,) = torch.autograd.grad((value * torch.arange(20)).sum(), v, create_graph=True)
        (bend,) = torch.autograd.grad((slope * vec.roll(1, 0)).sum(), v)
        found.append((value.detach(), slope.detach(), bend))
    set_backend("auto")
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)
        assert compiled.abs().max() > 0.1


@pytest.mark.parametrize("exponent", [2, 13, 3.5, True, "3"])
def test_a_window_needs_a_known_exponent(exponent):
    with pytest.raises(ValueError, match="exponent must be an integer from 3 to 12, got"):
        smooth_cutoff(torch.ones(1), 5.0, exponent)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, math.nan, math.inf])
def test_a_window_needs_a_positive_length(cutoff):
    with pytest.raises(ValueError, match=r"cutoff must be a positive finite length in angstrom, got .*; try 5\.0"):
        smooth_cutoff(torch.ones(1), cutoff)


def test_softened_vectors(generator):
    vec = torch.randn(20, 3, dtype=torch.float64, generator=generator) * 3
    u, rho = soften(vec)
    torch.testing.assert_close(rho, (vec.norm(dim=1) ** 2 + SOFT_LENGTH**2).sqrt(), rtol=0, atol=1e-14)
    torch.testing.assert_close(u * rho[:, None], vec, rtol=0, atol=1e-13)
    assert (u.norm(dim=1) < 1).all()
    far, _ = soften(1e4 * vec)
    torch.testing.assert_close(far.norm(dim=1), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-6)


def test_softened_vectors_are_smooth_where_a_part_sits_on_its_parent():
    vec = torch.zeros(1, 3, dtype=torch.float64)
    u, rho = soften(vec)
    assert not u.any() and rho.item() == SOFT_LENGTH
    for pick in (lambda v: soften(v)[0].sum(), lambda v: soften(v)[1].sum()):
        jacobian = torch.autograd.functional.jacobian(pick, vec)
        hessian = torch.autograd.functional.hessian(pick, vec)
        assert torch.isfinite(jacobian).all() and torch.isfinite(hessian).all()
    assert torch.autograd.gradcheck(soften, (vec.requires_grad_(True),))
    assert torch.autograd.gradgradcheck(soften, (vec,))


def test_bessel_functions_are_the_spherical_bessel_functions():
    r = torch.linspace(0.3, 4.9, 40, dtype=torch.float64)
    basis = BesselBasis(6, 5.0)(r)
    n = torch.arange(1, 7, dtype=torch.float64)
    j0 = torch.special.spherical_bessel_j0(n * math.pi * r[:, None] / 5.0)
    # sqrt(2) sin(n pi x) / (x / 0.3) = 0.3 sqrt(2) n pi j0(n pi x)
    torch.testing.assert_close(basis, 0.3 * math.sqrt(2) * n * math.pi * j0, rtol=0, atol=1e-12)
    assert BesselBasis(6, 5.0)(r.float()).dtype == torch.float32
    assert "num_basis=6, radius=5.0" in repr(BesselBasis(6, 5.0))


def test_inverse_powers_are_inverse_powers():
    r = torch.linspace(0.5, 9.0, 30, dtype=torch.float64)
    powers = InversePowers(3, 5.0)(r)
    assert powers.shape == (30, 4)
    for s in range(4):
        torch.testing.assert_close(powers[:, s], r**-s, rtol=1e-14, atol=0)
    assert InversePowers(3).num_basis == 4 and "max_power=3" in repr(InversePowers(3))


@pytest.mark.parametrize("basis", [BesselBasis(4, 5.0), InversePowers(3, 5.0)], ids=["bessel", "powers"])
def test_bases_have_two_derivatives(basis, generator):
    r = 0.5 + 4 * torch.rand(5, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(basis, (r.requires_grad_(True),))
    assert torch.autograd.gradgradcheck(basis, (r,))


def test_errors_of_the_bases():
    with pytest.raises(ValueError, match="num_basis must be at least 1, got 0; try 8"):
        BesselBasis(0, 5.0)
    for radius in (0.0, -2.0, math.inf):
        with pytest.raises(ValueError, match="radius must be a positive finite length in angstrom"):
            BesselBasis(4, radius)
        with pytest.raises(ValueError, match="radius must be a positive finite length in angstrom"):
            InversePowers(3, radius)
    with pytest.raises(ValueError, match="max_power must be at least 0, got -1; the paper's S, try 3"):
        InversePowers(-1)
