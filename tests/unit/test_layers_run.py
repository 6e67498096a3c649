"""What a network computes is the forward of its modules: of every gate, product, linear map, norm and basis in it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from comparison import assert_fused_is_forward
from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.kernels import available_backends
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.gates import DensityGate, OneBodyGate, ProductGate
from nbody_pyg.nn.harmonics import SolidHarmonics
from nbody_pyg.nn.interaction import Interaction, SoftNorm, SpeciesScale
from nbody_pyg.nn.linear import IrrepsLinear, RowLinear
from nbody_pyg.nn.products import ChannelwiseProduct, PathLinear
from nbody_pyg.nn.readout import MLPReadout
from nbody_pyg.radial import BesselBasis

SCHEMES = {
    "shells": NestedShells((3.0, 4.0)), "bonds": BondTree(3.0), "survivors": SmoothSurvivors(),
    "pieces": ShellsAndPieces((3.0, 4.0), 6.0),
}  # fmt: skip
KINDS = (
    EdgeEmbedding, SolidHarmonics, BesselBasis, Interaction, DensityGate, OneBodyGate, PathLinear, RowLinear,
    SpeciesScale, SoftNorm, ProductGate, ChannelwiseProduct, MLPReadout, IrrepsLinear,
)  # fmt: skip

pytestmark = pytest.mark.skipif("c" not in available_backends(), reason="no C compiler: there is no other path")


def network(scheme="bonds", **options) -> NBodyNet:
    torch.manual_seed(0)
    return NBodyNet([1, 6, 8], SCHEMES[scheme], **({"channels": 4, "lmax": 1, "correlation": 3} | options)).double()


@pytest.fixture
def ethanol(molecules):
    return molecules["ethanol"]


def used(net: NBodyNet, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in net.modules() if type(module) is kind]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_network_raises_where_the_forward_of_one_of_its_modules_does(scheme, ethanol):
    net = network(scheme)
    wanted = net(*ethanol)

    def fail(*_, **__):
        raise RuntimeError("on purpose")

    tried = 0
    for kind in KINDS:
        found = used(net, kind)
        assert found, f"no {kind.__name__} in the network"
        for module in found:
            module.forward = fail
            with pytest.raises(RuntimeError, match="on purpose"):
                net(*ethanol)
            del module.forward
            tried += 1
    assert tried > 20 and torch.equal(net(*ethanol), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_forward_replaced_on_the_class_is_called(kind, ethanol, monkeypatch):
    net, calls, forward = network(), [], kind.forward
    wanted = net(*ethanol)

    def counted(self, *arguments, **keywords):
        calls.append(self)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(kind, "forward", counted)
    torch.testing.assert_close(net(*ethanol), wanted, rtol=0, atol=1e-10)
    assert {id(module) for module in calls} == {id(module) for module in used(net, kind)}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hooks_fire_on_every_module(scheme, register, ethanol):
    net, calls = network(scheme), set()
    modules = [module for kind in KINDS for module in used(net, kind)]
    wanted = net(*ethanol)
    hooks = [
        getattr(module, f"register_{register}_hook")(lambda module, *_: calls.add(id(module))) for module in modules
    ]
    pos = ethanol[1].clone().requires_grad_(True)
    found = net(ethanol[0], pos)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    found.sum().backward()
    # Nothing flows back through what only the positions or nothing that has a gradient enter
    missed = {type(m).__name__ for m in modules if id(m) not in calls}
    assert not missed - ({"EdgeEmbedding"} if register == "full_backward" else set())
    for hook in hooks:
        hook.remove()
    calls.clear()
    assert torch.equal(net(*ethanol), wanted) and not calls


class Doubled(OneBodyGate):
    def forward(self, x, edges):
        return 2.0 * super().forward(x, edges)


def test_a_subclass_has_its_effect(ethanol):
    net = network("shells")
    wanted = net(*ethanol)
    layer = next(layer for layer in net.interactions if layer.gate is not None)
    with torch.no_grad():
        other = copy.deepcopy(net)
        twin = next(layer for layer in other.interactions if layer.gate is not None)
        for weight in twin.gate.mix.weights:
            weight.mul_(2.0)
    gate = layer.gate
    layer.gate.__class__ = Doubled
    torch.testing.assert_close(net(*ethanol), other(*ethanol), rtol=0, atol=1e-10)
    assert abs(net(*ethanol) - wanted).min() > 1e-6
    layer.gate.__class__ = OneBodyGate
    replaced = Doubled(gate.irreps_in, gate.irreps_out, gate.order, 8, parity="natural", partial=True).double()
    replaced.load_state_dict(gate.state_dict())
    replaced.scale = gate.scale
    layer.gate = replaced
    torch.testing.assert_close(net(*ethanol), other(*ethanol), rtol=0, atol=1e-10)


class Negative(BesselBasis):
    def forward(self, r):
        return -super().forward(r)


def test_a_basis_of_ones_own_has_its_effect(ethanol):
    index = torch.tensor([[0, 1], [1, 0]])
    vec, window = torch.randn(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    plain, own = (EdgeEmbedding(2, basis(8, 5.0)).double()(index, vec, window, 2) for basis in (BesselBasis, Negative))
    torch.testing.assert_close(own.radial, -plain.radial, rtol=0, atol=1e-12)
    assert plain.radial.abs().min() > 1e-6 and torch.allclose(own.harmonics, plain.harmonics, atol=1e-12)


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def test_parametrised_weights_count(ethanol):
    net = network("shells")
    wanted = net(*ethanol)
    layer = net.interactions[-1].products.linear
    with torch.no_grad():
        for weight in layer.weights:
            weight.mul_(2.0)
    for number in range(len(layer.weights)):
        parametrize.register_parametrization(layer.weights, str(number), Halved())
    torch.testing.assert_close(net(*ethanol), wanted, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_compiled_layer_is_the_forward_with_both_derivatives(scheme, preset, ethanol):
    def make() -> Potential:
        return Potential(network(scheme, preset=preset), {1: -1.0, 6: -2.0, 8: -3.0}).double()

    assert_fused_is_forward(make, 1, *ethanol)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_watch_their_own_modules(how, ethanol):
    net = network("shells")
    twin = how(net)
    assert torch.equal(twin(*ethanol), net(*ethanol))
    layers = [next(m for m in one.modules() if isinstance(m, Interaction)) for one in (net, twin)]
    assert all(layer._is_fused(ethanol[1]) for layer in layers)
    layers[1].products.linear.register_forward_hook(lambda *_: None)
    assert [layer._is_fused(ethanol[1]) for layer in layers] == [True, False]


def test_hooks_on_all_modules_of_a_process(ethanol):
    net, calls = network("shells"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        net(*ethanol)
    finally:
        handle.remove()
    assert {OneBodyGate, DensityGate, ProductGate, SoftNorm, BesselBasis} <= set(calls)
