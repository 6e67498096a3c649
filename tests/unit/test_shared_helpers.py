"""What the tests share: comparisons reject what differs, factories repeat, and a script is loaded without a trace."""

from __future__ import annotations

import sys

import pytest
import torch

import factories
from comparison import assert_same_results
from loading import load_script
from nbody_pyg import NestedShells


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
