"""Translation gates: factors that can be trained, pairs handed down."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nbody_pyg.longrange.translation import Translation, TranslationGate, join_pairs, merge_pairs
from nbody_pyg.multipoles import all_pairs, direct_potential, l2l, m2l, m2m


def _edges(generator):
    index = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]])
    vec = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    window = torch.rand(4, dtype=torch.float64, generator=generator)
    return Translation(index, vec, window, 2)


@pytest.mark.parametrize("function", [m2m, m2l, l2l])
def test_analytic_weights_are_constants_unless_they_are_trained(function, generator):
    edges = _edges(generator)
    values = torch.randn(4, 9, 2, dtype=torch.float64, generator=generator)
    constant = TranslationGate(function, 2, 2)
    assert not list(constant.parameters())
    result = constant(values, edges)
    assert result.abs().max() > 1e-3
    torch.testing.assert_close(result, function(values, edges.vec, edges.index, 2, None, edges.window))
    trained = TranslationGate(function, 2, 2, trained=True).double()
    torch.testing.assert_close(trained(values, edges), result)
    trained(values, edges).square().sum().backward()
    # M2M couples l2 <= l only, L2L l2 >= l, M2L all
    wanted = {m2m: torch.ones(3, 3).tril(), l2l: torch.ones(3, 3).triu(), m2l: torch.ones(3, 3)}
    assert torch.equal(trained.factors.grad.abs() > 1e-12, wanted[function] > 0)
    with torch.no_grad():
        trained.factors.zero_()
    assert trained(values, edges).abs().max() == 0


def test_the_repr_names_the_translation():
    assert repr(TranslationGate(m2l, 1, 3, trained=True)) == "TranslationGate(m2l, lmax=1 -> 3, trained)"


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
        moments = TranslationGate(m2m, 0, lmax)(charges.unsqueeze(1), up)
        field = TranslationGate(m2l, lmax, lmax)(moments, across)
        field = TranslationGate(l2l, lmax, 0)(field, up.reversed(16))
        errors.append(float((field[:, 0] - expected).abs().max() / expected.abs().max()))
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


def test_factors_of_a_wrong_shape_are_refused(generator):
    edges = _edges(generator)
    values = torch.zeros(4, 9, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"factors must have shape \[3, 3\]"):
        m2m(values, edges.vec, edges.index, 2, factors=torch.ones(2, 3))
