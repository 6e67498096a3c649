"""i-PI: a driver for its ``ffdirect`` force field; all beads of a path integral are one evaluation.

The driver is named in the input by the file :data:`DRIVER_FILE`; :func:`ffdirect` writes that part of the input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from ase import Atoms
from ase.io import read

from nbody_pyg.data import electronic_state_of
from nbody_pyg.engines.batched import BatchedEvaluator
from nbody_pyg.io.model_file import find_model
from nbody_pyg.potential import Potential
from nbody_pyg.units import BOHR, HARTREE

#: The file that ``<pes_path>`` names.
DRIVER_FILE = Path(__file__).with_name("ipi_driver.py")

#: Energy, forces [N, 3], virial [3, 3] (all in atomic units) and extras of one structure.
Result = tuple[float, np.ndarray, np.ndarray, str]


class IPIDriver:
    r"""The driver that i-PI calls, in atomic units.

    .. math:: W = -\sigma V

    is the virial that it returns; zero if no direction is periodic.

    Args:
        model: a model file, or a potential.
        template: a structure file, or ASE's atoms: elements, periodic directions, charge and spin. i-PI always has a
            cell; it is ignored in directions that are not periodic here.
        device: device of the computation.
        dtype: "float32" or "float64"; by default that of the model.
        skin: extra radius of the neighbour search, angstrom.
        verbosity: of i-PI; without effect.
    Raises: ValueError: another dtype, positions of another number of atoms, a model that keeps bonds
        (:class:`~nbody_pyg.engines.batched.BatchedEvaluator`).
    """

    def __init__(
        self,
        model: Potential | str | Path,
        template: Atoms | str | Path,
        device: str = "cpu",
        dtype: str | None = None,
        skin: float = 0.5,
        verbosity: Any = None,
    ) -> None:
        if dtype not in (None, "float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', or be left out, got {dtype!r}")
        atoms = template if isinstance(template, Atoms) else read(template)
        assert isinstance(atoms, Atoms)  # the last structure of a file
        self.evaluator = BatchedEvaluator(model, device, None if dtype is None else getattr(torch, dtype), skin)
        self.num_atoms = len(atoms)
        self._numbers, self._pbc = torch.as_tensor(atoms.numbers), torch.as_tensor(atoms.pbc)
        self._state = {key: electronic_state_of(atoms).get(key) for key in ("charge", "spin")}
        self._batches: dict[int, dict[str, Any]] = {}

    def __call__(
        self, cell: np.ndarray | list[np.ndarray], pos: np.ndarray | list[np.ndarray]
    ) -> Result | list[Result]:
        """Results of one structure, or of a list of them.

        Args:
            cell: [3, 3], bohr, **columns** are lattice vectors; or a list.
            pos: [N, 3], bohr; or a list.
        """
        if isinstance(pos, list):
            return self._evaluate(np.array(cell), np.array(pos))
        return self._evaluate(np.asarray(cell)[None], np.asarray(pos)[None])[0]

    def _evaluate(self, cells: np.ndarray, positions: np.ndarray) -> list[Result]:
        count, periodic = len(positions), bool(self._pbc.any())
        if positions.shape[1:] != (self.num_atoms, 3):
            raise ValueError(
                f"positions must be those of the {self.num_atoms} atoms of the template, got {positions.shape[1]}; "
                "give the structure that i-PI starts from as template"
            )
        device = self.evaluator.device
        pos = torch.as_tensor(positions.reshape(-1, 3) * BOHR, dtype=torch.float64, device=device)
        rows = cells.transpose(0, 2, 1) * BOHR
        cell = torch.as_tensor(rows, dtype=torch.float64, device=device) if periodic else None
        found = self.evaluator(pos=pos, cell=cell, stress=periodic, **self._batch(count))
        energies = found["energy"].double().cpu().numpy() / HARTREE
        forces = found["forces"].double().cpu().numpy().reshape(count, -1, 3) * (BOHR / HARTREE)
        virials = np.zeros((count, 3, 3))
        if periodic:
            volumes = np.abs(np.linalg.det(rows))[:, None, None]
            virials = -found["stress"].double().cpu().numpy() * volumes / HARTREE
        return [(float(e), f, v, "") for e, f, v in zip(energies, forces, virials, strict=True)]

    def _batch(self, count: int) -> dict[str, Any]:
        """What a batch of this many copies of the template always has."""
        if count not in self._batches:
            device = self.evaluator.device
            found: dict[str, Any] = {
                "z": self._numbers.repeat(count).to(device),
                "batch": torch.arange(count, device=device).repeat_interleave(self.num_atoms),
                "pbc": self._pbc.expand(count, 3).to(device) if bool(self._pbc.any()) else None,
            }
            for key, value in self._state.items():
                found[key] = None if value is None else value.expand(count).to(device)
            self._batches[count] = found
        return self._batches[count]


def ffdirect(
    model: str | Path, template: str | Path, beads: int = 1, *, name: str = "nbody", **options: str | float
) -> str:
    """The ``<ffdirect>`` element of i-PI's input (i-PI 3.2 or newer).

    Args:
        model: a model file, or the name of a shipped model.
        template: a structure file, see :class:`IPIDriver`.
        beads: structures of one evaluation: the number of beads. It must divide the number of structures that i-PI
            evaluates at each step; with several replicas or systems leave it 1.
        name: name of the force field, for ``<force forcefield="...">``.
        options: device, dtype and skin of :class:`IPIDriver`.
    Raises: ValueError: a path with characters that i-PI's lists of parameters do not allow. FileNotFoundError: a bare
        name that is neither a file nor a shipped model.
    """
    pars = {"model": str(find_model(model).resolve()), "template": str(Path(template).resolve()), **options}
    for key, value in pars.items():
        if set(str(value)) & set(",:{}"):
            raise ValueError(f"{key} must have none of the characters , : {{ }}, got {value!r}; rename or move it")
    listed = ", ".join(f"{key}: {value}" for key, value in pars.items())
    return (
        f'<ffdirect name="{escape(name)}" pbc="false">\n'
        f"  <pes>custom</pes>\n"
        f"  <pes_path>{escape(str(DRIVER_FILE))}</pes_path>\n"
        f"  <parameters>{{{escape(listed)}}}</parameters>\n"
        f"  <batch_size>{beads}</batch_size>\n"
        f"</ffdirect>\n"
    )
