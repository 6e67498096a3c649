"""AtomicData: one atomic system, its labels and its hierarchy, as a PyG `Data` that batches right."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

# Keys that a composition scheme writes; the number is the level.
_INDEX_KEY = re.compile(r"^(child|pair)_(\d+)$")
_CENTRE_KEY = re.compile(r"^centre_(\d+)$")
_HIERARCHY_KEY = re.compile(
    r"^(child|pair|child_shift|pair_shift|num_parts|centre)_\d+$|^(bonds|scheme|hierarchy_mark)$"
)
# Shapes of one value per graph: they carry a leading 1, so that batching stacks instead of mixing rows.
_GRAPH_SHAPES: dict[str, tuple[int, ...]] = {
    "energy": (1,),
    "charge": (1,),
    "cell": (1, 3, 3),
    "pbc": (1, 3),
    "stress": (1, 3, 3),
    "dipole": (1, 3),
    "polarizability": (1, 3, 3),
}
_ATOM_SHAPES: dict[str, tuple[int, ...]] = {"z": (), "pos": (3,), "forces": (3,), "energies": (), "charges": ()}


class AtomicData(Data):
    r"""One molecule or unit cell. Units: eV, angstrom, e.

    ==================  ====================  ==========================================================
    key                 shape                 meaning
    ==================  ====================  ==========================================================
    ``z``               [N] long              atomic numbers
    ``pos``             [N, 3]                positions, angstrom
    ``cell``            [1, 3, 3]             rows are the lattice vectors, angstrom (optional)
    ``pbc``             [1, 3] bool           periodic directions (optional)
    ``energy``          [1]                   total energy, eV
    ``energies``        [N]                   energy of each atom, eV (rare)
    ``forces``          [N, 3]                minus the gradient of the energy, eV/angstrom
    ``stress``          [1, 3, 3]             dE/d(strain)/V, eV/angstrom^3, ASE's sign
    ``dipole``          [1, 3]                e angstrom
    ``polarizability``  [1, 3, 3]
    ``charge``          [1]                   total charge, e
    ``charges``         [N]                   formal charges of the atoms, e (optional)
    ``num_parts_k``     [1] long              number of parts at level k >= 1 of the hierarchy
    ``child_k``         [2, E] long           row 0: part at level k - 1, row 1: its parent at level k
    ``pair_k``          [2, P] long           ordered neighbours at level k
    ``child_shift_k``   [E, 3]                lattice shifts of the children, only for periodic systems
    ``pair_shift_k``    [P, 3]                lattice shifts of the pairs, only for periodic systems
    ``centre_k``        [n] long              part of level k - 1 on which each part of level k sits (some schemes)
    ``bonds``           [2, M] long           covalent bonds, both directions (only where a scheme uses them)
    ``scheme``          str                   the scheme that wrote the hierarchy
    ``hierarchy_mark``  [1, 4] long           for which atoms and positions it did so
    ==================  ====================  ==========================================================

    The hierarchy keys are written by the schemes of :mod:`nbody_pyg.hierarchy`. Their names avoid the words
    ("index", "batch", "face") by which PyG would shift them by the number of atoms.

    Args:
        keys: any of these, and any others, as keyword arguments; nothing is checked (see :meth:`from_data`).

    Example:
        >>> data = AtomicData(z=torch.tensor([8, 1, 1]), pos=torch.randn(3, 3))
        >>> data.num_nodes
        3
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        match = _INDEX_KEY.match(key)
        if (centre := _CENTRE_KEY.match(key)) is not None:
            return self._num_parts(int(centre.group(1)) - 1)
        if match is None:
            return self.num_nodes if key == "bonds" else super().__inc__(key, value, *args, **kwargs)
        level = int(match.group(2))
        own = self._num_parts(level)
        return own if match.group(1) == "pair" else torch.tensor([[self._num_parts(level - 1)], [own]])

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        if _INDEX_KEY.match(key) or key == "bonds":
            return 1
        return super().__cat_dim__(key, value, *args, **kwargs)

    def _num_parts(self, level: int) -> int:
        return self.num_nodes if level == 0 else int(self[f"num_parts_{level}"].sum())

    def without_hierarchy(self) -> AtomicData:
        """A shallow copy without any key that a scheme wrote (bonds included)."""
        out = self.__class__()
        for key, value in self.to_dict().items():
            if not _HIERARCHY_KEY.match(key):
                out[key] = value
        return out

    @classmethod
    def from_data(cls, data: Data) -> AtomicData:
        """Turn any PyG `Data` with ``z`` and ``pos`` into AtomicData; tensors are shared, all keys are kept.

        Labels of one value per graph get their leading 1 (``energy`` of shape [] becomes [1], ``cell`` of
        shape [3, 3] becomes [1, 3, 3]). An AtomicData comes back as a shallow copy.

        Raises:
            ValueError: ``z`` or ``pos`` is missing, or a key has the wrong shape.
            TypeError: ``data`` is a Batch (transform its graphs one by one, or pass it to a scheme).
        """
        if isinstance(data, Batch):
            raise TypeError("data must be a single graph, got a Batch; use data.to_data_list()")
        for key in ("z", "pos"):
            if not isinstance(data.get(key), Tensor):
                raise ValueError(f"data must have the tensor {key!r}, but its keys are {sorted(data.keys())}")
        out = cls()
        for key, value in data.to_dict().items():
            out[key] = _with_graph_shape(key, value) if key in _GRAPH_SHAPES else value
        out.check()
        return out

    def check(self) -> None:
        """Raise ValueError or TypeError unless every known key has the shape of the table above."""
        num_atoms = self.z.shape[0]
        if self.z.is_floating_point():
            raise TypeError(f"z must hold integers (atomic numbers), got {self.z.dtype}; cast it with z.long()")
        for key, tail in _ATOM_SHAPES.items():
            value = self.get(key)
            if isinstance(value, Tensor) and tuple(value.shape) != (num_atoms, *tail):
                want = [num_atoms, *tail]
                raise ValueError(f"{key} must have shape {want} for {num_atoms} atoms, got {list(value.shape)}")
        for key, shape in _GRAPH_SHAPES.items():
            value = self.get(key)
            if isinstance(value, Tensor) and tuple(value.shape) != shape:
                raise ValueError(
                    f"{key} must have shape {list(shape)}, got {list(value.shape)}; rename the key if it "
                    "means something else"
                )

    @classmethod
    def from_ase(cls, atoms: Any, labels: bool = True) -> AtomicData:
        """Build from `ase.Atoms`, in float64.

        Args:
            atoms: the system. Its cell is kept only if at least one direction is periodic.
            labels: also take energy, forces, stress and dipole that its calculator has already computed
                (nothing is computed here).
        """
        out = cls(
            z=torch.as_tensor(atoms.get_atomic_numbers(), dtype=torch.long),
            pos=torch.as_tensor(atoms.get_positions(), dtype=torch.float64),
        )
        if atoms.pbc.any():
            out.cell = torch.as_tensor(atoms.cell.array.copy(), dtype=torch.float64).reshape(1, 3, 3)
            out.pbc = torch.as_tensor(atoms.pbc.copy(), dtype=torch.bool).reshape(1, 3)
        results = dict(getattr(atoms.calc, "results", {})) if labels else {}
        for key in ("energy", "forces", "stress", "dipole", "energies"):
            if results.get(key) is not None:
                value = torch.as_tensor(results[key], dtype=torch.float64)
                if key == "stress" and value.numel() == 6:
                    value = value[[0, 5, 4, 5, 1, 3, 4, 3, 2]]  # Voigt order xx, yy, zz, yz, xz, xy
                out[key] = value.reshape(_GRAPH_SHAPES.get(key, value.shape))
        out.check()
        return out

    def to_ase(self) -> Any:
        """`ase.Atoms` with the labels in a SinglePointCalculator (ASE's units are ours)."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        lattice: dict[str, Any] = {}
        if self.get("cell") is not None:
            pbc = self.get("pbc")
            lattice = {"cell": self.cell[0].detach().cpu().numpy()}
            lattice["pbc"] = True if pbc is None else pbc[0].cpu().numpy()
        atoms = Atoms(numbers=self.z.cpu().numpy(), positions=self.pos.detach().cpu().numpy(), **lattice)
        results: dict[str, Any] = {}
        for key in ("energy", "forces", "stress", "dipole", "energies"):
            value = self.get(key)
            if value is None:
                continue
            array = value.detach().cpu().double().numpy()
            if key == "energy":
                results[key] = float(array[0])
            elif key == "stress":
                results[key] = array[0].reshape(9)[[0, 4, 8, 5, 2, 1]]
            else:
                results[key] = array.reshape(-1) if key == "dipole" else array
        if results:
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms


def _with_graph_shape(key: str, value: Any) -> Any:
    """Add the leading 1 that batching needs; numbers become tensors."""
    shape = _GRAPH_SHAPES[key]
    if not isinstance(value, Tensor):
        if value is None:
            return None
        value = torch.as_tensor(value, dtype=torch.bool if key == "pbc" else torch.float64)
    # Anything else, such as charges of atoms under the name of the total one, is refused by `check`.
    return value.reshape(shape) if value.numel() == math.prod(shape) else value


# PyG reloads processed datasets with weights_only=True, which refuses classes that are not registered.
torch.serialization.add_safe_globals([AtomicData])
