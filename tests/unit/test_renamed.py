"""Old public names give what the new ones give, with a warning that names the new one."""

from __future__ import annotations

import importlib

import pytest

from nbody_pyg import datasets

MODULES = {
    "accelerate": ("compiled", ("CompiledPotential", "compile_potential")),
    "graphs": ("cuda_graphs", ("CapturedPotential", "CapturedStep")),
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
