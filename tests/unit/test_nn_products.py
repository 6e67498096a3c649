"""Full and channelwise products against e3nn's tensor products, on every backend."""

from __future__ import annotations

import contextlib

import pytest
import torch
from e3nn import o3

from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.nn.irreps import hidden_irreps, to_mul_ir
from nbody_pyg.nn.products import ChannelwiseProduct, FullProduct
from nbody_pyg.testing import assert_equivariant


@pytest.fixture(params=available_backends())
def backend(request):
    set_backend(request.param)
    yield request.param
    set_backend("auto")


@contextlib.contextmanager
def float64_by_default():
    """e3nn rounds its coefficients to the default dtype when a product is built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("irreps1", "irreps2"),
    [("2x0e+1x1o", "1x0e+3x1o"), ("2x1o+1x2e", "1x1o+1x3o"), ("1x0o+2x1e", "2x1o+1x0e")],
)
def test_full_product_is_that_of_e3nn(irreps1, irreps2, generator):
    ours = FullProduct(irreps1, irreps2).double()
    with float64_by_default():
        theirs = o3.FullTensorProduct(irreps1, irreps2)
    x = torch.randn(4, ours.irreps1.dim, dtype=torch.float64, generator=generator)
    y = torch.randn(4, ours.irreps2.dim, dtype=torch.float64, generator=generator)
    expected = theirs(to_mul_ir(x, ours.irreps1), to_mul_ir(y, ours.irreps2))
    got = to_mul_ir(ours(x, y), ours.irreps_out)
    # e3nn sorts equal degrees by parity in another order; blocks keep their order within one irrep
    blocks = [got[:, part] for part in ours.irreps_out.slices()]
    order = sorted(range(len(blocks)), key=lambda k: (ours.irreps_out[k].ir, k))
    assert o3.Irreps([ours.irreps_out[k] for k in order]).simplify() == theirs.irreps_out.simplify()
    torch.testing.assert_close(torch.cat([blocks[k] for k in order], 1), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 0.1


def test_full_product_is_truncated_and_sized_as_the_paper_says():
    # tau1 tau2 fragments on every path
    product = FullProduct("2x0e+3x1o", "4x0e+5x1o")
    assert product.irreps_out.count("0e") == 2 * 4 + 3 * 5
    assert product.irreps_out.count("1o") == 2 * 5 + 3 * 4
    assert product.irreps_out.count("1e") == product.irreps_out.count("2e") == 15
    assert max(ir.l for _, ir in FullProduct("1o", "1o", lmax=1).irreps_out) == 1
    assert FullProduct("1o", "0e", lmax=0)(torch.ones(3, 3), torch.ones(3, 1)).shape == (3, 0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((4, 6), (4, 4), r"x must have shape \[4, 5\] \(2x0e\+1x1o\), got \[4, 6\]; check the irreps"),
        ((4, 5), (4, 3), r"y must have shape \[4, 4\] \(1x0e\+1x1o\), got \[4, 3\]"),
        ((4, 5), (1, 4), r"y must have shape \[4, 4\]"),
        ((5,), (5, 4), r"x must have shape \[5, 5\]"),
    ],
)
def test_full_product_of_other_shapes(x, y, message):
    with pytest.raises(ValueError, match=message):
        FullProduct("2x0e+1x1o", "1x0e+1x1o")(torch.ones(x), torch.ones(y))


def test_full_product_turns(rotation):
    product = FullProduct("2x0e+1x1o+1x2e", "1x1o+2x2e", lmax=3)
    worst = assert_equivariant(
        product, product.irreps_out, [product.irreps1, product.irreps2], layout="ir_mul", tolerance=1e-10
    )
    assert worst < 1e-12


def _e3nn_channelwise(product: ChannelwiseProduct, x, y):
    """Mode 'uuu' for every path, then W^l, in e3nn's layout; returns mul_ir."""
    channels = product.irreps1[0].mul
    irreps_paths = o3.Irreps([(channels, path.ir) for path in product.paths])
    instructions = [(p.first, p.second, k, "uuu", False) for k, p in enumerate(product.paths)]
    with float64_by_default():
        theirs = o3.TensorProduct(product.irreps1, product.irreps2, irreps_paths, instructions)
    values = theirs(to_mul_ir(x.flatten(1), product.irreps1), to_mul_ir(y.flatten(1), product.irreps2))
    blocks, weights = [], list(product.mix.weights)
    for mul, ir in product.irreps_out:
        numbers = [k for k, path in enumerate(product.paths) if path.ir == ir]
        if not numbers:
            blocks.append(values.new_zeros(len(x), mul * ir.dim))
            continue
        parts = [values[:, irreps_paths.slices()[k]].reshape(-1, channels, ir.dim) for k in numbers]
        mixed = torch.einsum("nkm,kc->ncm", torch.cat(parts, 1), weights.pop(0))
        blocks.append(mixed.reshape(len(x), -1))
    return torch.cat(blocks, 1)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("irreps1", "irreps2", "irreps_out"),
    [
        ("5x0e+5x1o+5x2e", "5x0e+5x1o+5x2e", "5x0e+5x1o+5x2e"),
        ("3x0e+3x0o+3x1e+3x1o", "3x0e+3x0o+3x1e+3x1o", "2x0e+2x0o+2x1e+2x1o"),
        ("4x1o+4x2e", "4x1o+4x2e", "7x3o"),
        ("2x0e+2x1o", "2x0e+2x1o", "2x0e+2x3o+2x1o"),  # 3o: no path leads there
    ],
)
def test_channelwise_product_is_that_of_e3nn(irreps1, irreps2, irreps_out, symmetric, backend, generator):
    types = [o3.Irreps(irreps) for irreps in (irreps1, irreps2, irreps_out)]
    product = ChannelwiseProduct(*types, symmetric=symmetric).double()
    rows, channels = sum(ir.dim for _, ir in product.irreps1), product.irreps1[0].mul
    x, y = torch.randn(2, 6, rows, channels, dtype=torch.float64, generator=generator)
    y = x if symmetric else y
    got, expected = product(x, y), _e3nn_channelwise(product, x, y)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(to_mul_ir(got.flatten(1), product.irreps_out), expected, rtol=0, atol=1e-10)
    if "3o" in irreps_out and len(product.irreps_out) == 3:
        assert not got[:, 1:8].any()


def test_a_product_of_two_linear_maps_holds_the_fully_connected_product(generator):
    """P11: channelwise products between linear maps are sums of rank-one terms of the full weights."""
    theirs_in = o3.Irreps("1x0e+1x1o")
    with float64_by_default():
        theirs = o3.FullyConnectedTensorProduct(theirs_in, theirs_in, "1x0e+1x1o")
    x, y = torch.randn(2, 4, 4, dtype=torch.float64, generator=generator)
    # With one channel on either side the full product needs no map before: 4 paths to 0e and 1o,
    # one weight each
    ours = ChannelwiseProduct(theirs_in, theirs_in, theirs_in).double()
    paths = [(p.first, p.second, p.ir) for p in ours.paths]
    with torch.no_grad():
        for n, instruction in enumerate(theirs.instructions):
            ir = theirs.irreps_out[instruction.i_out].ir
            same = [p for p in paths if p[2] == ir]
            block = next(k for k, (_, out) in enumerate(ours.irreps_out) if out == ir)
            weight = theirs.weight_view_for_instruction(n).reshape(())
            scale = instruction.path_weight / ir.dim**0.5
            ours.mix.weights[block][same.index((instruction.i_in1, instruction.i_in2, ir))] = weight * scale
    got = ours(x.unsqueeze(-1), y.unsqueeze(-1)).flatten(1)
    torch.testing.assert_close(got, theirs(x, y), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("parity", ["natural", "both", "ignored"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_channelwise_product_turns(parity, symmetric, backend):
    # Types with both parities compile in a tenth of the time at degree 1
    irreps = hidden_irreps(3, 1 if parity == "both" else 2, parity)
    product = ChannelwiseProduct(irreps, irreps, irreps, symmetric=symmetric)

    def call(x, y):
        shaped = [t.unflatten(1, (-1, 3)) for t in (x, y)]
        return product.double()(shaped[0], shaped[0] if symmetric else shaped[1]).flatten(1)

    worst = assert_equivariant(
        call, irreps, [irreps, irreps], layout="ir_mul", improper=parity != "ignored", allow_zero=symmetric
    )
    assert worst < 1e-11


def test_errors():
    with pytest.raises(
        ValueError, match="irreps2 must have the multiplicity of irreps1, got 2x0e and 3x0e; use IrrepsLinear"
    ):
        ChannelwiseProduct(o3.Irreps("2x0e"), o3.Irreps("3x0e"), o3.Irreps("2x0e"))
    assert "2x0e x 2x0e -> 2x0e, 1 paths" in repr(ChannelwiseProduct(*[o3.Irreps("2x0e")] * 3))
