"""Soap: fewer steps than Adam where rows and columns are badly scaled, exact resumption, odd parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nbody_pyg.training import soap
from nbody_pyg.training.soap import Soap


def _problem(seed: int = 0):
    """min |A W B - C|^2 with condition numbers of 100 in rows and columns, in a hidden basis."""
    generator = torch.Generator().manual_seed(seed)

    def stretched(n):
        q, r = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
        return q @ torch.diag(torch.logspace(0, -2, n)) @ r

    a, b = stretched(8), stretched(6)
    solution = torch.randn(8, 6, generator=generator)
    target = a @ solution @ b
    weight = nn.Parameter(torch.zeros(8, 6))
    return weight, lambda: (a @ weight @ b - target).square().mean() / target.square().mean()


def _steps_to(optimizer, loss, tolerance: float, most: int) -> int:
    for step in range(most):
        optimizer.zero_grad()
        value = loss()
        if value < tolerance:
            return step
        value.backward()
        optimizer.step()
    return most


@pytest.mark.slow
def test_needs_far_fewer_steps_than_adam():
    counts = {}
    for name, make in (("soap", Soap), ("adam", torch.optim.Adam)):
        counts[name] = []
        for lr in (1e-2, 3e-2, 1e-1):
            weight, loss = _problem()
            counts[name].append(_steps_to(make([weight], lr=lr), loss, 1e-5, 3000))
    assert min(counts["soap"]) < 3000, "it converges"
    # Each at its best learning rate
    assert min(counts["soap"]) < 0.6 * min(counts["adam"]), counts


def _run(optimizer, parameters, losses, steps, skip=None):
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss() for k, loss in enumerate(losses) if (k, step) != skip).backward()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_is_deterministic_and_resumes_exactly():
    problems = [_problem(k) for k in range(3)]
    bias = nn.Parameter(torch.ones(5))
    parameters = [w for w, _ in problems] + [bias]
    losses = [loss for _, loss in problems] + [lambda: (bias - torch.arange(5.0)).square().sum()]
    start = [p.detach().clone() for p in parameters]

    def reset(values):
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)

    first = _run(Soap(parameters, lr=0.02), parameters, losses, 27)
    reset(start)
    again = _run(Soap(parameters, lr=0.02), parameters, losses, 27)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    reset(start)
    optimizer = Soap(parameters, lr=0.02)
    _run(optimizer, parameters, losses, 13)  # between two refreshes of the basis
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = Soap(parameters, lr=1.0)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 0.02
    assert all(torch.equal(a, b) for a, b in zip(first, _run(resumed, parameters, losses, 14), strict=True))


def test_weights_of_one_shape_do_not_mix():
    """Several matrices in one batch are trained as each would be alone."""
    problems = [_problem(k) for k in range(3)]
    together = _run(Soap([w for w, _ in problems], lr=0.02), [w for w, _ in problems], [l for _, l in problems], 15)
    for k, expected in enumerate(together):
        weight, loss = _problem(k)
        (alone,) = _run(Soap([weight], lr=0.02), [weight], [loss], 15)
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


def test_vectors_and_thin_and_large_matrices_go_the_way_of_adam():
    shapes = [(7,), (), (4, 1), (3, 2, 2), (9, 10)]
    torch.manual_seed(1)
    values = [torch.randn(shape) for shape in shapes]
    runs = []
    for make in (
        lambda p: Soap(p, lr=0.01, betas=(0.9, 0.98), max_size=8),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.98)),
    ):
        parameters = [nn.Parameter(v.clone()) for v in values]
        runs.append(_run(make(parameters), parameters, [lambda p=p: (p**4).sum() for p in parameters], 20))
    for a, b, v in zip(*runs, values, strict=True):
        assert not torch.equal(a, v)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_long_side_is_left_as_it_is():
    """Only the short side of a long matrix is turned: the step is that of the same rows in any order."""
    torch.manual_seed(5)
    value, target = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    order = torch.randperm(9)
    runs = []
    for rows in (torch.arange(9), order):
        weight = nn.Parameter(value[rows].clone())
        optimizer = Soap([weight], lr=0.02, max_size=8)

        def loss(w=weight, rows=rows):
            return ((w - target[rows]) * torch.tensor([1.0, 3.0, 9.0])).square().sum()

        (trained,) = _run(optimizer, [weight], [loss], 20)
        assert "columns_basis" in optimizer.state[weight]
        assert "rows_basis" not in optimizer.state[weight]
        runs.append(trained)
    # Steps are divided by small roots, which makes rounding larger, on every processor in another way
    torch.testing.assert_close(runs[0][order], runs[1], rtol=1e-7, atol=1e-8)
    assert (runs[0] - target).square().sum() < (value - target).square().sum()


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_gradient_that_is_missing_in_one_step(missing):
    """The weight without one stays; the others, which share a batch with it, are trained as ever."""
    problems = [_problem(k) for k in range(3)]
    bias = nn.Parameter(torch.ones(5))
    parameters = [w for w, _ in problems] + [bias, nn.Parameter(torch.ones(2))]
    losses = [loss for _, loss in problems] + [lambda: (bias - torch.arange(5.0)).square().sum()]
    optimizer = Soap(parameters, lr=0.02, weight_decay=0.1)
    before = _run(optimizer, parameters, losses, 5)
    after = _run(optimizer, parameters, losses, 1, skip=(missing, 0))
    for k in range(4):
        assert torch.equal(before[k], after[k]) == (k == missing)
    assert torch.equal(after[4], torch.ones(2)), "never a gradient, never a change"
    _run(optimizer, parameters, losses, 5)
    assert all(torch.isfinite(p).all() for p in parameters)


def test_no_gradient_at_all_and_a_closure():
    weight, loss = _problem()
    optimizer = Soap([weight], lr=0.02)
    optimizer.step()
    assert not weight.any() and not optimizer.state

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    assert optimizer.step(closure).item() == pytest.approx(1.0)
    assert weight.any()


def test_decay_and_learning_rate():
    weight = nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = Soap([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), 2.0 * (1 - 0.05)))


def test_from_a_module_and_errors():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    optimizer = Soap.from_module(module, lr=1e-3, weight_decay=0.1)
    assert optimizer.param_groups[0]["params"] == [module.weight]
    for wrong in ({"lr": 0.0}, {"betas": (0.9, 1.0)}, {"frequency": 0}, {"shampoo_beta": -0.1}):
        with pytest.raises(ValueError, match="lr and frequency must be positive and decays in"):
            Soap(module.parameters(), **wrong)


def test_eigenvectors_where_lapack_fails_in_single_precision(monkeypatch):
    """Seen on the first gradient of a network on a tree of bonds: 176 rows, 48 eigenvalues that are not zero."""
    exact = torch.linalg.eigh

    def failing(gram):
        if gram.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return exact(gram)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    half = torch.randn(2, 5, 3)
    gram = half @ half.mT
    vectors = soap._eigenvectors(gram)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5).expand(2, 5, 5), rtol=0, atol=1e-5)
    turned = vectors.mT @ gram @ vectors
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.randn(4, 3)
    Soap([weight], lr=0.1).step()
    assert bool(weight.isfinite().all())


def test_a_gradient_that_vanishes_early_does_not_blow_up_the_next_step():
    """As of ideal crystals, whose forces are zero: the basis turns, and the squares in it have seen no gradient."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 6))
    optimizer = Soap([weight], lr=0.1)
    sizes = []
    for scale in (1.0, 1e-14, 1e-14, 1.0):
        before = weight.detach().clone()
        weight.grad = scale * torch.randn(8, 6, generator=generator)
        optimizer.step()
        sizes.append(float((weight.detach() - before).norm()))
    assert 0 < max(sizes) <= 0.1 * 2.0 * 48**0.5 + 1e-6, sizes
