"""The covariant linear map: Proposition 1, against e3nn's o3.Linear."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3

from nbody_pyg.nn.irreps import from_mul_ir, to_mul_ir
from nbody_pyg.nn.linear import IrrepsLinear, RowLinear

TYPES = [
    ("3x0e + 2x1o + 1x2e", "2x0e + 4x1o + 3x2e"),
    ("2x0e + 1x0o + 3x1e + 2x1o", "5x0o + 1x1o + 1x0e"),
    ("2x0e + 1x1o + 3x0e", "4x0e + 2x1o + 1x1o"),  # one irrep in several blocks, on either side
]


@pytest.mark.parametrize(("irreps_in", "irreps_out"), TYPES)
def test_number_of_weights_is_that_of_proposition_1(irreps_in, irreps_out):
    linear = IrrepsLinear(irreps_in, irreps_out)
    tau, tau_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
    kinds = {ir for _, ir in tau} & {ir for _, ir in tau_out}
    expected = sum(tau.count(ir) * tau_out.count(ir) for ir in kinds)
    assert sum(p.numel() for p in linear.parameters()) == expected
    assert sum(p.numel() for p in IrrepsLinear(irreps_in, irreps_out, bias=True).parameters()) == (
        expected + tau_out.count("0e")
    ), "only 0e may have a bias"
    assert str(tau) in repr(linear) and "->" in repr(linear)


@pytest.mark.parametrize(("irreps_in", "irreps_out"), TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_e3nn_through_the_change_of_layout(irreps_in, irreps_out, bias, generator):
    ours = IrrepsLinear(irreps_in, irreps_out, bias=bias).double()
    theirs = o3.Linear(irreps_in, irreps_out, biases=bias).double()
    with torch.no_grad():
        # e3nn has one weight for each pair of blocks; ours has the pairs of one result stacked
        for k, weight in enumerate(ours.weights):
            pieces = [
                theirs.weight_view_for_instruction(n) * instruction.path_weight
                for n, instruction in enumerate(theirs.instructions)
                if instruction.i_out == k and instruction.i_in >= 0
            ]
            weight.copy_(torch.cat(pieces))
        if bias:
            theirs.bias.copy_(torch.randn(theirs.bias.shape, generator=generator))
            ours.bias.copy_(theirs.bias)
    x = torch.randn(6, theirs.irreps_in.dim, dtype=torch.float64, generator=generator)
    expected = theirs(to_mul_ir(x, ours.irreps_in))
    got = to_mul_ir(ours(x), ours.irreps_out)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(from_mul_ir(to_mul_ir(x, ours.irreps_in), ours.irreps_in)), ours(x), rtol=0, atol=0)


def test_variance_is_kept(generator):
    x = torch.randn(2000, 64 * 9, generator=generator)
    y = IrrepsLinear("64x0e+64x1o+64x2e", "64x0e+64x1o+64x2e")(x).detach()
    assert 0.8 < float(y.square().mean()) < 1.25


def test_no_nodes_and_gradients(generator):
    linear = IrrepsLinear("3x0e+2x1o", "2x0e+1x1o", bias=True).double()
    assert linear(torch.zeros(0, 9, dtype=torch.float64)).shape == (0, 5)
    x = torch.randn(3, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x,)) and torch.autograd.gradgradcheck(linear, (x,))


def test_the_rowwise_map_is_the_same_map(generator):
    irreps, irreps_out = o3.Irreps("4x0e+4x1o+4x2e"), o3.Irreps("3x2e+3x0e")
    rows, flat = RowLinear(irreps, irreps_out).double(), IrrepsLinear(irreps, irreps_out).double()
    with torch.no_grad():
        for a, b in zip(rows.weights, flat.weights, strict=True):
            b.copy_(a)
    x = torch.randn(5, 9, 4, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(rows(x).flatten(1), flat(x.flatten(1)), rtol=0, atol=1e-12)


def test_errors():
    with pytest.raises(
        ValueError,
        match="irreps_out must be reachable: the linear map of 3x0e gives 0e, but no path leads to 1o",
    ):
        IrrepsLinear("3x0e", "3x0e+1x1o")
    with pytest.raises(
        ValueError, match="irreps_in must hold each fragment in one block, got 4x0e\\+4x0e; use IrrepsLinear"
    ):
        RowLinear(o3.Irreps("4x0e+4x0e"), o3.Irreps("4x0e"))
