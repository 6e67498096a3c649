"""The compiled update of a part against the same steps in plain torch: values, first and second derivatives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from nbody_pyg.kernels import build, set_backend
from nbody_pyg.nn.edges import EdgeFeatures
from nbody_pyg.nn.interaction import Interaction, InteractionConfig
from nbody_pyg.nn.irreps import hidden_irreps, num_rows

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")

NUM_SPECIES, NUM_BASIS = 3, 4


@pytest.fixture(autouse=True)
def _backend_is_left_alone():
    yield
    set_backend("auto")


def _interaction(channels, lmax, correlation, parity="natural", practical=True, scalars=False, state=True, **options):
    """An interaction in float64 with all weights away from their start."""
    torch.manual_seed(3)
    irreps = hidden_irreps(channels, lmax, parity)
    irreps_out = hidden_irreps(channels, 0, parity) if scalars else irreps
    config = InteractionConfig(NUM_SPECIES, NUM_BASIS, correlation, parity, practical)
    layer = Interaction(config, irreps, irreps if state else None, irreps if state else None, irreps_out, **options)
    layer.double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return layer


class _Case:
    """One input of an interaction, and all that can be differentiated."""

    def __init__(self, layer: Interaction, state: bool, nodes: int = 21, edges: int = 60) -> None:
        irreps, double = layer.irreps, torch.float64
        self.layer, self.nodes = layer, nodes
        self.index = torch.randint(max(nodes, 1), (2, edges))
        self.species = torch.randint(NUM_SPECIES, (nodes,))
        lmax = max(ir.l for _, ir in irreps)
        shapes = {"harmonics": (edges, (lmax + 1) ** 2), "radial": (edges, NUM_BASIS)}
        if state:
            shapes |= dict.fromkeys(("source", "target"), (nodes, num_rows(irreps), irreps[0].mul))
        self.leaves = {name: torch.randn(shape, dtype=double, requires_grad=True) for name, shape in shapes.items()}

    def __call__(self) -> torch.Tensor:
        x, centred = self.leaves, self.layer.scale is not None
        edges = EdgeFeatures(self.index, x["harmonics"], x["radial"], self.nodes)
        species = self.species if centred else None
        return self.layer(x.get("source"), x.get("target"), edges, self.species, species)

    def derivatives(self, weights_too: bool) -> list[torch.Tensor]:
        """Result, first derivatives, and derivatives of a function of these by everything."""
        leaves, weights = list(self.leaves.values()), list(self.layer.parameters())
        out = self()
        seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).requires_grad_(True)
        if weights_too:
            first = torch.autograd.grad(out, leaves + weights, seed, create_graph=True)
            loss = 0
        else:  # what a force loss does
            first = torch.autograd.grad(out, leaves, seed, create_graph=True)
            loss = out.square().sum()
        for n, gradient in enumerate(first):
            loss = loss + (gradient * torch.linspace(-1, n, gradient.numel(), dtype=out.dtype).view_as(gradient)).sum()
        second = torch.autograd.grad(loss, [*leaves, *weights, seed], allow_unused=True, materialize_grads=True)
        return [out, *first, *second]


def _worst(case: _Case, weights_too: bool) -> float:
    results = []
    for name in ("torch", "c"):
        set_backend(name)
        results.append([t.detach() for t in case.derivatives(weights_too)])
    plain, compiled = results
    assert plain[0].numel() == 0 or plain[0].abs().max() > 0
    pairs = [(a, b) for a, b in zip(plain, compiled, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)


CASES = {
    "first layer": {
        "channels": 5,
        "lmax": 1,
        "correlation": 3,
        "state": False,
        "source_has_species": True,
        "target_has_species": True,
    },
    "second layer": {
        "channels": 19,
        "lmax": 2,
        "correlation": 3,
        "source_has_species": True,
        "target_has_species": True,
    },
    "scalars out": {
        "channels": 16,
        "lmax": 1,
        "correlation": 3,
        "source_has_species": True,
        "target_has_species": True,
        "scalars": True,
    },
    "no product": {"channels": 5, "lmax": 1, "correlation": 1, "source_has_species": True, "target_has_species": True},
    "one product": {"channels": 5, "lmax": 1, "correlation": 2},
    "four bodies": {"channels": 3, "lmax": 1, "correlation": 4, "source_has_species": True, "target_has_species": True},
    "strict": {"channels": 16, "lmax": 1, "correlation": 3, "practical": False},
    "rotations only": {
        "channels": 3,
        "lmax": 1,
        "correlation": 4,
        "practical": False,
        "parity": "ignored",
        "scalars": True,
    },
    "both parities": {"channels": 3, "lmax": 1, "correlation": 3, "source_has_species": True, "parity": "both"},
}


@pytest.mark.parametrize("weights_too", [False, True], ids=["force loss", "all derivatives"])
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_update_is_that_of_plain_torch(name, weights_too):
    case = _Case(_interaction(**CASES[name]), CASES[name].get("state", True))
    assert _worst(case, weights_too) < 1e-10


@pytest.mark.parametrize("nodes", [0, 1, 33])
def test_tiles_that_are_empty_short_or_more_than_one(nodes):
    layer = _interaction(channels=16, lmax=1, correlation=3, source_has_species=True, target_has_species=True)
    assert _worst(_Case(layer, True, nodes, edges=4 if nodes else 0), weights_too=False) < 1e-10


def test_a_wrong_derivative_would_be_seen(monkeypatch):
    """The comparison fails where the compiled norm lacks a part of its second derivative."""
    from nbody_pyg.kernels import update_source

    monkeypatch.setattr(update_source._Writer, "_norm_twice", lambda self: [
        "clear(da, nodes * A); through_norm(nodes, a, rho, dn, da); memcpy(dsum, da, nodes * A * sizeof(real));"
    ])  # fmt: skip
    layer = _interaction(channels=3, lmax=1, correlation=2)
    assert _worst(_Case(layer, True), weights_too=False) > 1e-6


def test_a_third_derivative_is_an_error():
    set_backend("c")
    case = _Case(_interaction(channels=3, lmax=1, correlation=2), True)
    x = case.leaves["source"]
    (first,) = torch.autograd.grad(case().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a third was asked for"):
        torch.autograd.grad(second.sum(), x)


def test_wrong_operands_are_named():
    set_backend("c")
    layer = _interaction(channels=3, lmax=1, correlation=2, source_has_species=True, target_has_species=True)
    case = _Case(layer, True)
    matrices = layer._matrices()
    inputs = [torch.randn(4, size, dtype=torch.float64) for size in layer.kernel.update.inputs]
    species = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input must have shape"):
        layer.kernel([x[:, 1:] for x in inputs], species, matrices, layer.scale.weight, layer.bias)
    with pytest.raises(TypeError, match="weight must have the dtype of the other operands"):
        layer.kernel(inputs, species, [w.float() for w in matrices], layer.scale.weight, layer.bias)
    with pytest.raises(ValueError, match="species must lie between 0 and 2, got 0 to 3"):
        layer.kernel(inputs, species + torch.arange(4), matrices, layer.scale.weight, layer.bias)
    assert case().abs().max() > 0


def test_copies_and_pickles_compute_the_same():
    layer = _interaction(channels=3, lmax=1, correlation=2)
    case = _Case(layer, True)
    expected = case()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        case.layer = twin
        torch.testing.assert_close(case(), expected, rtol=0, atol=0)
    case.layer = twin
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(2)
    assert not torch.equal(case(), expected)
