"""Old public names give what the new ones give, with a warning that names the new one."""

from __future__ import annotations

import importlib

import pytest

from nbody_pyg import NBodyNet, datasets
from nbody_pyg.io.upgrades import present_config, present_weights
from nbody_pyg.nn import OneBodyGate, ProductGate, hidden_irreps
from nbody_pyg.training.config import parse_config

MODULES = {
    "accelerate": ("runtime.compiled", ("CompiledPotential", "compile_potential")),
    "graphs": ("runtime.cuda_graphs", ("CapturedPotential", "CapturedStep")),
    "kernels.scope": ("kernels.autograd_flags", ("is_tracing", "dry_run")),
}


@pytest.mark.parametrize("old", MODULES)
def test_old_modules_hand_their_public_names_on(old):
    new, names = MODULES[old]
    former, module = (importlib.import_module(f"nbody_pyg.{name}") for name in (old, new))
    for name in names:
        with pytest.warns(
            DeprecationWarning, match=rf"nbody_pyg\.{old} is now called nbody_pyg\.{new}; it will go in 0\.4"
        ):
            assert getattr(former, name) is getattr(module, name)
    with pytest.raises(AttributeError, match=rf"module 'nbody_pyg\.{old}' has no attribute 'no_such_name'"):
        former.no_such_name  # noqa: B018


def test_embedded_sets_under_their_old_name():
    with pytest.warns(DeprecationWarning, match="embedded is now called load_embedded"):
        found = datasets.embedded("ethanol")
    assert len(found) == len(datasets.load_embedded("ethanol")) > 0


NETWORK = {
    "body_order": (2, "correlation", 2),
    "target": ("intensive", "readout", "root"),
    "symmetry": ("so3", "parity", "ignored"),
    "degrees": ({"child_1": 7.0}, "avg_num_neighbors", {"child_1": 7.0}),
}


@pytest.mark.parametrize("old", NETWORK)
def test_a_network_takes_its_old_arguments(old):
    value, new, expected = NETWORK[old]
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}; it will go in 0.4") as caught:
        net = NBodyNet([1, 6], channels=2, lmax=1, **{old: value})
    # The line of the caller, but for the decorators of a run with jaxtyping
    assert caught[0].filename == __file__ or "jaxtyping" in caught[0].filename
    assert net.config() == NBodyNet([1, 6], channels=2, lmax=1, **{new: expected}).config()
    assert net.config() != NBodyNet([1, 6], channels=2, lmax=1).config()
    with pytest.raises(TypeError, match=f"{old} is the old name of {new}; give {new} only"):
        NBodyNet([1, 6], **{old: value, new: expected})


def test_a_configuration_takes_the_old_names_of_the_network():
    old = {
        "data": {"embedded": "ethanol"},
        "model": {name: value for name, (value, *_) in NETWORK.items() if name != "target"},
    }
    with pytest.warns(DeprecationWarning, match="it will go in 0.4"):
        found = parse_config(old).model.arguments
    assert found == {new: value for name, (_, new, value) in NETWORK.items() if name != "target"}
    with pytest.raises(ValueError, match="section model: symmetry is the old name of parity; give parity only"):
        parse_config({"model": {"symmetry": "o3", "parity": "both"}})


def test_gates_take_their_old_arguments():
    irreps = hidden_irreps(2, 1, "ignored")
    with pytest.warns(DeprecationWarning, match="symmetry is now called parity"):
        assert hidden_irreps(2, 1, symmetry="so3") == irreps
    with pytest.warns(DeprecationWarning, match="body_order is now called correlation"):
        assert ProductGate(irreps, irreps, body_order=2).correlation == 2
    with pytest.warns(DeprecationWarning, match="symmetry is now called parity"):
        assert OneBodyGate(irreps, irreps, 1, 3, symmetry="so3").irreps_out == irreps


def test_checkpoints_of_before_have_the_present_names():
    state = {f"model.interactions.{k}keep.weights.0": 1.0 for k in ("3.", "3.layers.2.")}
    state |= {"model.interactions.0.carry.weights.1": 2.0, "model.keep.weights.0": 3.0}
    assert present_weights(state) == {
        "model.interactions.3.self_linear.weights.0": 1.0,
        "model.interactions.3.layers.2.self_linear.weights.0": 1.0,
        "model.interactions.0.residual_linear.weights.1": 2.0,
        "model.keep.weights.0": 3.0,
    }
    assert present_weights(present_weights(state)) == present_weights(state)
    config = {"data": {"train": "a.xyz"}, "model": {"body_order": 3, "symmetry": "o3", "channels": 8}}
    assert present_config(config) == {
        "data": {"train": "a.xyz"}, "model": {"correlation": 3, "parity": "natural", "channels": 8}
    }  # fmt: skip
