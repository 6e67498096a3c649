"""What several tests compare in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nbody_pyg import Potential
from nbody_pyg.kernels import use_backend
from nbody_pyg.nn.interaction import Interaction
from nbody_pyg.system import System
from nbody_pyg.testing import (
    assert_batch_independent,
    assert_conservative,
    assert_equivariant,
    assert_extensive,
    assert_permutation_invariant,
)


def torch_results(model: Potential, system: System) -> dict[str, Tensor]:
    """Results of plain torch, without compiled products, with the energies of the atoms."""
    with use_backend("torch"):
        found = model.evaluate(system, stress=system.pbc is not None)
        parts = model.energies(system)
    own = [values for values in parts.levels.values() if len(values) == len(system.z)]
    found["energies"] = torch.stack(own).sum(0) + parts.atoms
    del found["interaction_energy"]
    return found


def assert_same_results(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Two results of a potential agree in names and numbers, and have forces that are not zero."""
    assert set(found) == set(wanted)
    assert wanted["forces"].abs().max() > 1e-3
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_physics(potential: Potential, step: float = 1e-3) -> None:
    """Symmetry, forces that are the slope of the energy (differences over ``step`` angstrom), and size consistency."""
    assert assert_equivariant(potential) < 1e-10
    assert_permutation_invariant(potential)
    assert_conservative(potential, step=step)
    assert_extensive(potential)
    assert_batch_independent(potential)


def assert_fused_is_forward(make: Callable[[], Potential], least: int, *system: Any) -> None:
    """The compiled update of each layer gives what ``forward`` gives, with both derivatives, to 1e-10.

    Args:
        make: makes the same potential each time.
        least: layers that it has at least, all of which have a compiled update.
        system: what the potential is called with.
    """
    results = []
    for plain in (False, True):
        model = make()
        like = next(model.model.parameters())
        layers = [layer for layer in model.modules() if isinstance(layer, Interaction)]
        assert len(layers) >= least and all(layer._is_fused(like) for layer in layers)
        if plain:
            for layer in layers:
                layer.norm.register_forward_hook(lambda *_: None)
            assert not any(layer._is_fused(like) for layer in layers)
        found = model(*system, create_graph=True)
        (found["forces"].square().sum() + found["energy"].sum()).backward()
        results.append([found["energy"], found["forces"], *(p.grad for p in model.parameters() if p.grad is not None)])
    fused, forward = results
    assert len(fused) == len(forward) > 20
    for a, b in zip(fused, forward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert fused[1].abs().max() > 1e-6
