"""Types, layouts, couplings, exact tables, and the solid harmonics, against e3nn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from e3nn import o3

from nbody_pyg.kernels import use_backend
from nbody_pyg.nn.harmonics import SolidHarmonics
from nbody_pyg.nn.irreps import (
    PARITIES,
    ConstantTables,
    clebsch_gordan,
    coupling_paths,
    equal_multiplicity,
    from_mul_ir,
    harmonic_irreps,
    hidden_irreps,
    num_rows,
    require_reachable,
    row_slices,
    to_mul_ir,
)
from nbody_pyg.nn.products import ChannelwiseProduct
from nbody_pyg.testing import wigner_matrix


def test_hidden_types():
    assert hidden_irreps(4, 2) == o3.Irreps("4x0e+4x1o+4x2e")
    assert hidden_irreps(4, 2, "ignored") == o3.Irreps("4x0e+4x1e+4x2e")
    assert hidden_irreps(2, 1, "both") == o3.Irreps("2x0e+2x0o+2x1e+2x1o")
    assert num_rows(hidden_irreps(7, 3)) == 16
    assert row_slices(hidden_irreps(7, 2)) == [slice(0, 1), slice(1, 4), slice(4, 9)]
    assert harmonic_irreps(2, "both") == o3.Irreps("0e+1o+2e")


def test_errors_of_types():
    with pytest.raises(ValueError, match="channels must be at least 1, got 0; try 32"):
        hidden_irreps(0, 2)
    with pytest.raises(ValueError, match="lmax must be at least 0, got -1; try 2"):
        hidden_irreps(4, -1)
    with pytest.raises(ValueError, match="parity must be one of natural, both, ignored, got 'E3'; try 'natural'"):
        hidden_irreps(1, 1, "E3")
    with pytest.raises(
        ValueError, match=r"irreps must have one multiplicity .* got 2x0e\+3x1o; map it with IrrepsLinear"
    ):
        equal_multiplicity(o3.Irreps("2x0e+3x1o"))
    with pytest.raises(ValueError, match="no path leads to 2o; raise lmax"):
        require_reachable(o3.Irreps("0e+2o"), {o3.Irrep("0e")}, "this map")


@pytest.mark.parametrize("irreps", ["3x0e", "2x0e+5x1o+1x2e", "4x0e+4x0o+4x1e+4x1o", ""])
def test_layouts_convert_and_convert_back(irreps, generator):
    irreps = o3.Irreps(irreps)
    x = torch.randn(6, irreps.dim, dtype=torch.float64, generator=generator)
    assert torch.equal(from_mul_ir(to_mul_ir(x, irreps), irreps), x)
    for (mul, ir), part in zip(irreps, irreps.slices(), strict=True):
        inside = x[:, part].reshape(6, ir.dim, mul)
        theirs = to_mul_ir(x, irreps)[:, part].reshape(6, mul, ir.dim)
        assert torch.equal(theirs, inside.transpose(1, 2))
    with pytest.raises(ValueError, match=r"x must have .* components for"):
        to_mul_ir(torch.zeros(2, irreps.dim + 1), irreps)


def test_couplings_are_e3nn_wigner_3j_with_unit_variance():
    for l1 in range(4):
        for l2 in range(4):
            for l3 in range(abs(l1 - l2), l1 + l2 + 1):
                table = clebsch_gordan(l1, l2, l3)
                assert table.dtype == torch.float64
                expected = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1)
                torch.testing.assert_close(table, expected, rtol=0, atol=1e-14)
                # Rows are orthonormal: products of unit variance have unit variance
                gram = torch.einsum("abm,abn->mn", table, table)
                torch.testing.assert_close(gram, torch.eye(2 * l3 + 1, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parity", PARITIES)
def test_paths_are_those_that_are_left_after_what_repeats_or_vanishes(parity, generator):
    irreps = hidden_irreps(1, 2, parity)
    every = coupling_paths(irreps, irreps, irreps)
    few = coupling_paths(irreps, irreps, irreps, symmetric=True)
    x = torch.randn(1, num_rows(irreps), dtype=torch.float64, generator=generator)
    rows = row_slices(irreps)

    def value(path):
        l1, l2 = irreps[path.first].ir.l, irreps[path.second].ir.l
        return torch.einsum(
            "a,b,abm->m", x[0, rows[path.first]], x[0, rows[path.second]], clebsch_gordan(l1, l2, path.ir.l)
        )

    assert all(value(path).abs().max() > 1e-3 for path in few), "what is kept does not vanish"
    left_out = [path for path in every if path not in few]
    assert left_out, "something is left out"
    for path in left_out:
        mirrored = [p for p in few if (p.first, p.second, p.ir) == (path.second, path.first, path.ir)]
        if path.first == path.second:
            assert not mirrored
            torch.testing.assert_close(value(path), torch.zeros_like(value(path)), rtol=0, atol=1e-14)
        else:
            same, other = value(mirrored[0]), value(path)
            assert min((same - other).abs().max(), (same + other).abs().max()) < 1e-13


@pytest.mark.parametrize("lmax", range(6))
def test_solid_harmonics_are_those_of_e3nn(lmax, generator):
    vec = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    expected = o3.spherical_harmonics(list(range(lmax + 1)), vec, normalize=False, normalization="component")
    module = SolidHarmonics(lmax).double()
    torch.testing.assert_close(module(vec), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert module.irreps_out == o3.Irreps.spherical_harmonics(lmax)
    assert module(vec[:0]).shape == (0, (lmax + 1) ** 2)
    assert f"lmax={lmax}" in repr(module)


def test_solid_harmonics_have_the_norm_and_turn(rotation, generator):
    vec = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    module = SolidHarmonics(3).double()
    values, turned = module(vec), module(vec @ rotation.T)
    for l in range(4):
        block = slice(l * l, (l + 1) ** 2)
        norm = values[:, block].square().sum(1)
        torch.testing.assert_close(norm, (2 * l + 1) * vec.norm(dim=1) ** (2 * l), rtol=1e-12, atol=0)
        matrix = wigner_matrix(o3.Irrep(l, (-1) ** l), rotation)
        torch.testing.assert_close(turned[:, block], values[:, block] @ matrix.T, rtol=0, atol=1e-10)


def test_solid_harmonics_are_smooth_at_the_origin():
    vec = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    module = SolidHarmonics(3).double()
    assert torch.autograd.gradcheck(module, (vec,)) and torch.autograd.gradgradcheck(module, (vec,))


class _Plain(torch.nn.Module):
    """The same module as e3nn would keep it: tables rounded once and cast after."""

    def __init__(self, module: ConstantTables) -> None:
        super().__init__()
        self.register_buffer("coupling", module.coupling.float().clone())


def test_tables_are_exact_after_a_detour_through_float32():
    irreps = hidden_irreps(3, 3)
    product = ChannelwiseProduct(irreps, irreps, irreps)
    exact = product._exact["coupling"]
    assert product.coupling.dtype == torch.float32
    for moved in (product.double(), product.float().double(), copy.deepcopy(product).half().double()):
        assert torch.equal(moved.coupling, exact)
    rounded = _Plain(product).double().coupling
    assert float((rounded - exact).abs().max()) > 1e-9, "without care the rounding of float32 stays"
    assert "coupling" not in product.state_dict(), "tables are no part of a model file"
    assert torch.equal(product.float().coupling, exact.float())


def test_equivariance_of_a_product_that_was_built_in_float32_is_that_of_float64(random_rotation, generator):
    irreps = hidden_irreps(3, 3)
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    rotation = random_rotation(-1)
    matrix = torch.block_diag(*[wigner_matrix(ir, rotation) for _, ir in irreps])
    x, y = torch.randn(2, 5, 16, 3, dtype=torch.float64, generator=generator)
    with torch.no_grad(), use_backend("torch"):  # the table itself, which plain torch uses
        plain, turned = product(x, y), product(matrix @ x, matrix @ y)
    error = (turned - matrix @ plain).abs().max() / plain.abs().max()
    assert error < 2e-14
