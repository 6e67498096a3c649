"""Translation gates: two blocks side by side, factors that can be trained, pairs handed down."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from e3nn import o3

from nbody_pyg.multipoles import all_pairs, direct_potential, l2l, m2l, m2m
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.translation import AcrossGate, BlockState, DownGate, Translation, UpGate, join_pairs, merge_pairs
from nbody_pyg.radial import BesselBasis

IRREPS = o3.Irreps("3x0e+3x1o")


def _edges(generator):
    index = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]])
    vec = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    window = torch.rand(4, dtype=torch.float64, generator=generator)
    return Translation(index, vec, window, 2)


@pytest.mark.parametrize(("gate", "function"), [(UpGate, m2m), (AcrossGate, m2l), (DownGate, l2l)])
def test_both_blocks_pass_side_by_side(gate, function, generator):
    edges = _edges(generator)
    features = EdgeEmbedding(1, BesselBasis(4, 5.0)).double()(edges.index, edges.vec, edges.window, 2)
    both = gate(2, IRREPS, num_basis=4).double()
    learned = torch.randn(4, 4, 3, dtype=torch.float64, generator=generator)
    reserved = torch.randn(4, 9, 2, dtype=torch.float64, generator=generator)
    result = both(BlockState(learned, reserved), edges, features)
    assert result.learned.abs().max() > 1e-3 and result.reserved.abs().max() > 1e-3
    torch.testing.assert_close(result.learned, both.gate(learned, features))
    torch.testing.assert_close(result.reserved, function(reserved, edges.vec, edges.index, 2, None, edges.window))
    only = gate(2)(BlockState(None, reserved), edges)
    assert only.learned is None
    torch.testing.assert_close(only.reserved, result.reserved)


def test_analytic_weights_are_constants_unless_they_are_trained(generator):
    edges = _edges(generator)
    reserved = torch.randn(4, 9, 2, dtype=torch.float64, generator=generator)
    for gate in (UpGate, AcrossGate, DownGate):
        assert not list(gate(2).parameters())
        trained = gate(2, trained=True).double()
        torch.testing.assert_close(trained.translate(reserved, edges), gate(2).translate(reserved, edges))
        trained.translate(reserved, edges).square().sum().backward()
        slope = trained.factors.grad
        # M2M couples l2 <= l only, L2L l2 >= l, M2L all
        wanted = {UpGate: torch.ones(3, 3).tril(), DownGate: torch.ones(3, 3).triu(), AcrossGate: torch.ones(3, 3)}
        assert torch.equal(slope.abs() > 1e-12, wanted[gate] > 0)
    with torch.no_grad():
        trained.factors.zero_()
    assert trained.translate(reserved, edges).abs().max() == 0
    assert repr(AcrossGate(3, lmax_in=1, trained=True)) == "AcrossGate(lmax=1 -> 3, trained)"


def test_untrained_gates_are_a_fast_multipole_method(generator):
    """Up, across, down over two boxes: potentials of the far charges, with an error that falls with lmax."""
    near = torch.rand(8, 3, dtype=torch.float64, generator=generator)
    pos = torch.cat([near, near + torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)])
    charges = torch.randn(16, 1, dtype=torch.float64, generator=generator)
    box = torch.arange(16) // 8
    centre = torch.stack([pos[:8].mean(0), pos[8:].mean(0)])
    within = direct_potential(charges, pos, box)
    expected = direct_potential(charges, pos) - within
    errors = []
    for lmax in (1, 3, 5, 7):
        up = Translation(torch.stack([torch.arange(16), box]), pos - centre[box], None, 2)
        pairs = all_pairs(2)
        across = Translation(pairs, centre[pairs[0]] - centre[pairs[1]], None, 2)
        state = UpGate(lmax, lmax_in=0)(BlockState(None, charges.unsqueeze(1)), up)
        state = AcrossGate(lmax)(state, across)
        state = DownGate(0, lmax_in=lmax)(state, up.reversed(16))
        errors.append(float((state.reserved[:, 0] - expected).abs().max() / expected.abs().max()))
    assert errors[0] > 1e-4 and errors[-1] < 1e-5
    assert all(after < 0.3 * before for before, after in pairwise(errors)), errors


def test_pairs_of_children_carry_the_weight_of_their_parents(generator):
    """Soft memberships: n_ij = sum_AB p_iA p_jB w_AB, by matrices."""
    memberships = torch.rand(7, 4, dtype=torch.float64, generator=generator) * (
        torch.rand(7, 4, generator=generator) > 0.4
    )
    window = torch.rand(4, 4, dtype=torch.float64, generator=generator) * (torch.rand(4, 4, generator=generator) > 0.5)
    child_index, pairs = memberships.nonzero().t(), window.nonzero().t()
    weights = memberships[child_index[0], child_index[1]], window[pairs[0], pairs[1]]
    index, weight = join_pairs(pairs, weights[1], child_index, weights[0], (7, 4))
    got = torch.zeros(7, 7, dtype=torch.float64).index_put((index[0], index[1]), weight)
    expected = (memberships @ window @ memberships.T).fill_diagonal_(0)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected)
    index, weight = merge_pairs(torch.tensor([[0, 1, 0, 2], [1, 0, 1, 2]]), torch.tensor([1.0, 2.0, 4.0, 8.0]), 3)
    assert index.tolist() == [[1, 0], [0, 1]] and weight.tolist() == [2.0, 5.0]


def test_errors(generator):
    edges = _edges(generator)
    reserved = torch.zeros(4, 9, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="state must fit the gate, which has no learned block, but the state has one"):
        UpGate(2)(BlockState(torch.zeros(4, 4, 3), reserved), edges)
    with pytest.raises(ValueError, match="which has a learned block, but the state has none"):
        UpGate(2, IRREPS)(BlockState(None, reserved), edges)
    with pytest.raises(ValueError, match="reserved block of degree 3, got 2; set lmax_in"):
        UpGate(3)(BlockState(None, reserved), edges)
    with pytest.raises(ValueError, match=r"factors must have shape \[3, 3\]"):
        m2m(reserved, edges.vec, edges.index, 2, factors=torch.ones(2, 3))
