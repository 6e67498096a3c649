"""BatchedEvaluator: many structures in one evaluation of a potential, step after step."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from nbody_pyg.hierarchy import TopologyCache
from nbody_pyg.io.model_file import load_potential, require_potential
from nbody_pyg.potential import Potential


class BatchedEvaluator:
    """Energies, forces and stresses of a batch of structures, which move from call to call.

    Neighbour lists with a skin are kept as long as atoms, batch and periodic directions stay the same.

    Args:
        model: a potential, or a model file.
        device: device of the computation.
        dtype: torch.float32 or torch.float64; by default that of the model.
        skin: extra radius of the neighbour search, angstrom.
    Raises: ValueError: a scheme that keeps parts (BondTree), whose bonds would change with the positions; use the ASE
        calculator, which keeps them.
    """

    def __init__(
        self,
        model: Potential | str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        skin: float = 0.5,
    ) -> None:
        loaded = load_potential(model) if isinstance(model, (str, Path)) else copy.deepcopy(require_potential(model))
        self.potential = loaded.to(device).eval()
        if dtype is not None:
            self.potential.to(dtype)
        self.device = torch.device(device)
        scheme = self.potential.scheme
        if scheme is not None and scheme.keeps_parts:
            raise ValueError(
                f"model must have parts that follow from the positions, got {type(scheme).__name__}, which keeps bonds "
                "along a trajectory; use a model with NestedShells or SmoothSurvivors, or NBodyCalculator through ASE"
            )
        self._lists = None if scheme is None else TopologyCache(scheme, skin)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return self.potential.dtype or torch.float64

    def __call__(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
        *,
        charge: Tensor | None = None,
        spin: Tensor | None = None,
        forces: bool = True,
        stress: bool = False,
    ) -> dict[str, Tensor]:
        """Energies [B] (eV), forces [N, 3] (eV/angstrom) and stress [B, 3, 3] (eV/angstrom^3, ASE's sign).

        Args:
            z, pos, batch: atomic numbers [N], positions [N, 3] (angstrom), graph of each atom [N].
            cell, pbc: cells [B, 3, 3] (angstrom, rows are lattice vectors) and periodic directions [B, 3].
            charge, spin: total charge (e) and multiplicity of each graph [B].
            forces, stress: what is computed beside the energies; the stress needs periodic cells.
        """
        system = self.potential.system(z, pos, batch, cell=cell, pbc=pbc, charge=charge, spin=spin)
        if self._lists is not None:
            system = system.replace(topology=self._lists(system))
        return self.potential.evaluate(system, forces=forces, stress=stress)
