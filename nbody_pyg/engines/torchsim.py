"""TorchSim: a model as its ``ModelInterface``; many systems are one evaluation. TorchSim needs Python 3.12 or newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.engines.batched import BatchedEvaluator
from nbody_pyg.engines.installed import require_engine
from nbody_pyg.potential import Potential


def torchsim_model(
    model: Potential | str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    compute_stress: bool = True,
    skin: float = 0.5,
) -> Any:
    """A ``torch_sim.models.interface.ModelInterface`` of a model.

    ===========  ==============  ==================================================
    output       shape           unit
    ===========  ==============  ==================================================
    ``energy``   [systems]       eV
    ``forces``   [atoms, 3]      eV/angstrom
    ``stress``   [systems, 3, 3] eV/angstrom^3; left out if no direction is periodic
    ===========  ==============  ==================================================

    All are detached, in the precision of the positions. ``charge`` and ``spin`` of the state are used if it has them.

    Args:
        model: a potential, or a model file.
        device: device of the computation.
        dtype: torch.float32 or torch.float64; by default that of the model.
        compute_stress: whether the stress is computed; needed for a changing cell.
        skin: extra radius of the neighbour search, angstrom.
    Raises: ImportError: TorchSim is missing. ValueError: a model that keeps bonds
        (:class:`~nbody_pyg.engines.batched.BatchedEvaluator`).
    """
    interface = require_engine("torch_sim.models.interface", "torchsim")

    class NBodyModel(interface.ModelInterface):  # type: ignore[misc,name-defined]  # an optional package
        """The model; weights are in ``evaluator.potential``."""

        def __init__(self) -> None:
            super().__init__()
            self.evaluator = BatchedEvaluator(model, device, dtype, skin)
            self._device, self._dtype = self.evaluator.device, self.evaluator.dtype
            self._compute_forces, self._compute_stress = True, compute_stress

        @property
        def compute_stress(self) -> bool:
            return bool(self._compute_stress)

        @compute_stress.setter
        def compute_stress(self, value: bool) -> None:
            self._compute_stress = value

        @property
        def compute_forces(self) -> bool:
            return bool(self._compute_forces)

        @compute_forces.setter
        def compute_forces(self, value: bool) -> None:
            self._compute_forces = value

        def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
            """Energies, and forces and stresses if they are computed."""
            count, pbc = int(state.n_systems), state.pbc.reshape(-1, 3)
            periodic = bool(pbc.any())
            wanted = {"forces": self._compute_forces, "stress": self._compute_stress and periodic}
            found = self.evaluator(
                state.atomic_numbers.long(),
                state.positions.detach(),
                state.system_idx,
                state.row_vector_cell.detach() if periodic else None,
                pbc.expand(count, 3) if periodic else None,
                charge=_of_systems(state, "charge"),
                spin=_of_systems(state, "spin"),
                **wanted,
            )
            given = ["energy", *(key for key, value in wanted.items() if value)]
            return {key: found[key].to(state.positions.dtype) for key in given}

    return NBodyModel()


def _of_systems(state: Any, name: str) -> Tensor | None:
    """A value of each system that the state may have."""
    value = getattr(state, name, None)
    return value if isinstance(value, Tensor) and value.numel() == state.n_systems else None
