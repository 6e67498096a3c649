"""What the tests share: comparisons reject what differs, factories repeat, and a script is loaded without a trace."""

from __future__ import annotations

import sys

import pytest
import torch

import factories
from comparison import assert_fused_is_forward, assert_physics, assert_same_results
from loading import load_script
from nbody_pyg import NestedShells, Potential
from nbody_pyg.energy import EnergyTerm
from nbody_pyg.nn.interaction import Interaction


@pytest.fixture
def wanted(molecules) -> dict[str, torch.Tensor]:
    return {key: value.detach() for key, value in factories.potential()(*molecules["ethanol"]).items()}


def test_results_that_differ_are_rejected(wanted):
    assert_same_results({key: value.clone() for key, value in wanted.items()}, wanted)
    for key, value in wanted.items():
        for other in (value + 1e-8, value * float("nan"), value.float()):
            with pytest.raises(AssertionError, match=key):
                assert_same_results(wanted | {key: other}, wanted)
    with pytest.raises(AssertionError):
        assert_same_results({"forces": wanted["forces"]}, wanted)
    nothing = {key: torch.zeros_like(value) for key, value in wanted.items()}
    with pytest.raises(AssertionError):
        assert_same_results(nothing, nothing)


class Wall(EnergyTerm):
    """A mutant: energy that depends on where a system lies."""

    def forward(self, structure):
        return 0.1 * structure.pos[:, 0].square()


def test_an_energy_that_depends_on_the_place_is_rejected():
    potential = factories.potential(NestedShells((3.0,)))
    assert_physics(potential)
    with pytest.raises(AssertionError):
        assert_physics(Potential(potential.model, potential.reference, terms=[Wall()]))


def test_a_compiled_layer_that_differs_is_rejected(molecules, monkeypatch):
    def make() -> Potential:
        return factories.potential(NestedShells((3.0, 4.0)))

    assert_fused_is_forward(make, 1, *molecules["ethanol"])
    with pytest.raises(AssertionError):
        assert_fused_is_forward(make, 9, *molecules["ethanol"])
    right = Interaction._fused
    monkeypatch.setattr(Interaction, "_fused", lambda *given: right(*given) * (1 + 1e-7))
    with pytest.raises(AssertionError, match="not close"):
        assert_fused_is_forward(make, 1, *molecules["ethanol"])


def test_the_seed_decides_on_the_weights():
    one, same, other = (factories.net(NestedShells((3.0,)), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_long_range_has_weights():
    net = factories.net(long_range="direct")
    assert net.long_range.local.abs().min() > 0 and net.long_range.local_states.weight.abs().min() > 0


def test_a_script_is_loaded_without_a_trace(tmp_path):
    path = tmp_path / "some_script.py"
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    path.write_text(head + "@dataclass\nclass A:\n    x: int = 3\n")
    assert load_script(path).A().x == 3 and "some_script" not in sys.modules
    path.write_text("raise ValueError(1)")
    with pytest.raises(ValueError, match="1"):
        load_script(path)
    assert "some_script" not in sys.modules
