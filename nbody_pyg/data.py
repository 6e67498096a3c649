"""AtomicData: one atomic system, its labels and its hierarchy, as a PyG `Data` that batches right."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Collection, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.data.storage import GlobalStorage

# Keys that a composition scheme writes; the number is the level.
_INDEX_KEY = re.compile(r"^(child|pair)_(\d+)$")
_CENTRE_KEY = re.compile(r"^centre_(\d+)$")
_TOPOLOGY_KEY = re.compile(r"^(child|pair|child_shift|pair_shift|num_parts|centre)_\d+$|^hierarchy_mark$")
#: Places of the nine components of a symmetric tensor in Voigt order: xx, yy, zz, yz, xz, xy.
VOIGT = [0, 5, 4, 5, 1, 3, 4, 3, 2]
# Shapes of one value per graph: they carry a leading 1, so that batching stacks instead of mixing rows.
_GRAPH_SHAPES: dict[str, tuple[int, ...]] = {
    "energy": (1,),
    "charge": (1,),
    "spin": (1,),
    "cell": (1, 3, 3),
    "pbc": (1, 3),
    "stress": (1, 3, 3),
    "dipole": (1, 3),
    "polarizability": (1, 3, 3),
}
_ATOM_SHAPES: dict[str, tuple[int, ...]] = {"z": (), "pos": (3,), "forces": (3,), "energies": (), "charges": ()}


def implied_pbc(cell: Float[Tensor, "*graphs 3 3"]) -> Bool[Tensor, "*graphs 3"]:
    """Periodic directions of a cell without ``pbc``: each of its non-zero vectors."""
    return (cell.detach() != 0).any(dim=-1)


def is_topology_key(key: str) -> bool:
    """Whether a scheme writes parts and edges under this key."""
    return _TOPOLOGY_KEY.match(key) is not None


def has_hierarchy(data: Data) -> bool:
    """Whether a scheme has stored parts and edges on the data.

    Raises: ValueError: keys that a scheme would write, but that are no hierarchy.
    """
    if data.get("num_parts_1") is None:
        return False
    if data.get("child_1") is None:
        raise ValueError(
            "data has the key 'num_parts_1', under which schemes store how many parts there are, but no 'child_1', so "
            "it is no hierarchy; rename the key"
        )
    return True


def elements_of(frames: Iterable[Data]) -> list[int]:
    """Atomic numbers that occur in the frames, in order."""
    return sorted({number for frame in frames for number in frame.z.unique().tolist()})


def require_atoms(data: Any) -> None:
    """Raise unless these are data with ``z`` and ``pos``.

    Raises: TypeError: anything else than a Data or Batch. ValueError: a key that is missing.
    """
    if not isinstance(data, Data):
        name = type(data).__name__
        cure = {"HeteroData": "build a Data from the z and pos of its atoms", "Atoms": "use AtomicData.from_ase"}
        raise TypeError(
            f"data must be a Data or a Batch, got a {name}; {cure.get(name, 'or pass z and pos as tensors')}"
        )
    missing = [key for key in ("z", "pos") if data.get(key) is None]
    if missing:
        raise ValueError(
            f"data must hold {' and '.join(map(repr, missing))} (atomic numbers and positions), but its keys are "
            f"{sorted(data.keys())}; set data.{missing[0]}"
        )


def no_elements(pos: Tensor) -> Tensor:
    """The numbers of points that are no atoms: 0."""
    return torch.zeros(pos.shape[:1], dtype=torch.long, device=pos.device)


def points(data: Any) -> Any:
    """Data whose points are no atoms: a shallow copy with ``z`` = 0 where there is none; anything else as it is."""
    if isinstance(data, Data) and data.get("z") is None and isinstance(data.get("pos"), Tensor):
        data = copy.copy(data)
        data.z = no_elements(data.pos)
    return data


def count_graphs(data: Data) -> int | None:
    """Graphs of a Data or Batch, those without atoms too; None where only ``batch`` tells."""
    if isinstance(data, Batch):
        return int(data.num_graphs)
    if data.get("ptr") is not None:
        return len(data.ptr) - 1
    return 1 if data.get("batch") is None else None


# Keys that change results: if one is lost in a batch the results are wrong, while a lost label raises an error.
_INPUT_KEYS = ("charge", "charges", "spin", "cell", "pbc", "bonds")


def refuse_unstated(data: Data, inputs: Collection[str]) -> None:
    """Raise where a batch does not hold a key that a model depends on; of a single graph it is taken to be the default.

    PyG uses the keys of the first graph, so keys of the others may be lost.

    Raises: ValueError: naming the key and the cure.
    """
    if isinstance(data, Batch) and data.num_graphs > 1:
        for key in inputs:
            if data.get(key) is None and (key != "charge" or data.get("charges") is None):
                raise ValueError(
                    f"a batch of {data.num_graphs} graphs must hold {key!r}, on which the model depends; set it on "
                    "every graph before they are put together (nbody_pyg.data.complete_states does so)"
                )


def _must_agree(key: str) -> bool:
    """Whether all data of a batch must have a key where one has it: results are wrong where it is lost."""
    return is_topology_key(key) or key == "scheme" or key in _INPUT_KEYS


def _cure(key: str) -> str:
    """What is wrong where only some data of a batch have the key, and what helps."""
    if is_topology_key(key) or key == "scheme":
        return (
            ": no scheme was applied to it, or another one (or that of an earlier version) than to the rest of its "
            "batch; apply one scheme to all data of a batch, or to none"
        )
    rule = "; where others of a batch have one all must have it, for PyG takes the keys of the first"
    if key == "bonds":
        return f"{rule} (a BondTree that is applied to each adds the bonds that it finds)"
    return f"{rule} (nbody_pyg.data.complete_states adds charge, charges and spin)"


class MissingKey(ValueError, KeyError):
    """A key that other data of a batch have and these do not; a KeyError, as for any other key."""

    __str__ = Exception.__str__


class _Storage(GlobalStorage):  # type: ignore[misc]  # PyG has no py.typed
    """The keys of one system. PyG's collate asks every system of a batch for the keys of the first."""

    def __getitem__(self, key: str) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError:
            if _must_agree(key):
                raise MissingKey(f"data has no {key!r}{_cure(key)}") from None
            raise


# What a collate that is under way has read: the batch that it fills, and the data so far.
_collate: ContextVar[tuple[weakref.ref[Data], list[AtomicData]] | None] = ContextVar("nbody_collate", default=None)


class AtomicData(Data):  # type: ignore[misc]  # PyG has no py.typed
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
    ``charge``          [1]                   total charge, e (optional; neutral without it)
    ``charges``         [N]                   formal charges of the atoms, e (optional)
    ``spin``            [1]                   spin multiplicity 2S + 1 (optional; a singlet without it)
    ``num_parts_k``     [1] long              number of parts at level k >= 1 of the hierarchy
    ``child_k``         [2, E] long           row 0: part at level k - 1, row 1: its parent at level k
    ``pair_k``          [2, P] long           ordered neighbours at level k
    ``child_shift_k``   [E, 3]                lattice shifts of the children, only where there is a cell
    ``pair_shift_k``    [P, 3]                lattice shifts of the pairs, only where there is a cell
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

    z: Tensor
    pos: Tensor

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.__dict__["_store"] = _Storage(_parent=self)
        for key, value in keys.items():
            setattr(self, key, value)

    def stores_as(self, data: Data) -> AtomicData:
        """PyG's collate calls this on the batch that it fills, then reads ``stores`` of the data, then of the batch."""
        _collate.set((weakref.ref(self), []))
        filled: AtomicData = super().stores_as(data)
        return filled

    @property
    def stores(self) -> list[Any]:
        if (under_way := _collate.get()) is not None:
            batch, read = under_way[0](), under_way[1]
            if batch is self or batch is None:  # read from here on, or given up
                _collate.set(None)
            else:
                read.append(self)
            if batch is self:
                _refuse_lost(read)
        stores: list[Any] = super().stores
        return stores

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        ours = self._is_index(key, value)
        if ours and (centre := _CENTRE_KEY.match(key)) is not None:
            return self._num_parts(int(centre.group(1)) - 1)
        match = _INDEX_KEY.match(key) if ours else None
        if match is None:
            return self.num_nodes if ours else super().__inc__(key, value, *args, **kwargs)
        level = int(match.group(2))
        own = self._num_parts(level)
        return own if match.group(1) == "pair" else torch.tensor([[self._num_parts(level - 1)], [own]])

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_index(key, value) and value.dim() == 2:
            return 1
        return super().__cat_dim__(key, value, *args, **kwargs)

    def _is_index(self, key: str, value: Any) -> bool:
        """Whether a key numbers atoms or parts. Others may use the same names for something else."""
        if not isinstance(value, Tensor) or value.is_floating_point():
            return False
        if key == "bonds":
            return value.dim() == 2 and value.shape[0] == 2
        known = _INDEX_KEY.match(key) or _CENTRE_KEY.match(key)
        return known is not None and ("scheme" in self._store or "num_parts_1" in self._store)

    def _num_parts(self, level: int) -> int:
        return self.num_nodes if level == 0 else int(self[f"num_parts_{level}"].sum())

    def without_hierarchy(self) -> AtomicData:
        """A shallow copy without any key that a scheme wrote (bonds included)."""
        out = self.__class__()
        for key, value in self.to_dict().items():
            if not is_topology_key(key) and key not in ("bonds", "scheme"):
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
        require_atoms(data)
        for key in ("z", "pos"):
            if not isinstance(data[key], Tensor):
                raise TypeError(
                    f"{key} must be a tensor, got a {type(data[key]).__name__}; make one with torch.as_tensor"
                )
        out = cls()
        for key, value in data.to_dict().items():
            out[key] = _with_graph_shape(key, value) if key in _GRAPH_SHAPES else value
        out.check()
        return out

    def check(self) -> None:
        """Raise ValueError or TypeError unless every known key has the shape of the table above."""
        num_atoms = self.z.shape[0]
        if self.z.is_floating_point() or self.z.is_complex() or self.z.dtype == torch.bool:
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
    def from_ase(
        cls, atoms: Any, labels: bool = True, *, where: str = "atoms", sources: dict[str, str] | None = None
    ) -> AtomicData:
        """Build from `ase.Atoms`, in float64.

        Args:
            atoms: the system. Its cell is kept only if at least one direction is periodic.
            labels: also take energy, forces, stress and dipole that its calculator has already computed
                (nothing is computed here).
            where: how messages call the system.
            sources: takes the key in which charge, charges and spin were found.

        Charges and spin come from where :func:`electronic_state_of` finds them.
        """
        out = cls(
            z=torch.as_tensor(atoms.get_atomic_numbers(), dtype=torch.long),
            pos=torch.as_tensor(atoms.get_positions(), dtype=torch.float64),
        )
        if atoms.pbc.any():
            out.cell = torch.as_tensor(atoms.cell.array.copy(), dtype=torch.float64).reshape(1, 3, 3)
            out.pbc = torch.as_tensor(atoms.pbc.copy(), dtype=torch.bool).reshape(1, 3)
        for key, value in electronic_state_of(atoms, where, sources).items():
            out[key] = value
        results = dict(getattr(atoms.calc, "results", {})) if labels else {}
        for key in ("energy", "forces", "stress", "dipole", "energies"):
            if results.get(key) is not None:
                value = torch.as_tensor(results[key], dtype=torch.float64)
                if key == "stress" and value.numel() == 6:
                    value = value[VOIGT]
                out[key] = value.reshape(_GRAPH_SHAPES.get(key, value.shape))
        out.check()
        return out

    def to_ase(self) -> Any:
        """`ase.Atoms` with the labels in a SinglePointCalculator (ASE's units are ours).

        Charges and spin stand where :meth:`from_ase` finds them: ``info["charge"]``, ``info["spin"]``, and the formal
        charges of the atoms as initial charges, or in the array ``formal_charges`` where they are no whole numbers.
        """
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        lattice: dict[str, Any] = {}
        if self.get("cell") is not None:
            pbc = self.get("pbc")
            lattice = {"cell": self.cell[0].detach().cpu().numpy()}
            lattice["pbc"] = (implied_pbc(self.cell) if pbc is None else pbc)[0].cpu().numpy()
        atoms = Atoms(numbers=self.z.cpu().numpy(), positions=self.pos.detach().cpu().numpy(), **lattice)
        for key in ("charge", "spin"):
            if self.get(key) is not None:
                number = float(torch.as_tensor(self[key]).reshape(-1)[0])
                atoms.info[key] = int(number) if number.is_integer() else number
        if self.get("charges") is not None:
            formal = self.charges.detach().cpu().double().numpy()
            if _are_whole(formal) and formal.any():
                atoms.set_initial_charges(formal)
            else:
                atoms.set_array("formal_charges", formal)
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


#: Keys of the total charge and the multiplicity in ``atoms.info``; all that are present must agree.
STATE_KEYS: dict[str, tuple[str, ...]] = {
    "charge": ("charge", "total_charge"),
    "spin": ("spin", "multiplicity", "spin_multiplicity", "total_spin"),
}
# Partial charges are printed with some digits each: how far their sum may lie from the total charge, e.
_ROUNDING = 0.05


def electronic_state_of(atoms: Any, where: str = "atoms", sources: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Total ``charge`` [1], formal ``charges`` [N] and ``spin`` multiplicity [1] of `ase.Atoms`, as far as it says.

    All reading of them is done here; see docs/conventions.md for the rules.

    Args:
        atoms: the structure.
        where: how messages call it.
        sources: takes the key in which each was found.

    Raises: ValueError: a value that is no finite number, a multiplicity that is no whole number from 1 on, keys that
        contradict each other, charges of atoms that do not add up to the total charge, or that are neither whole
        numbers nor add up to one.
    """
    found: dict[str, Tensor] = {}
    sources = {} if sources is None else sources
    for name, keys in STATE_KEYS.items():
        values = {
            key: _number(atoms.info[key], f"{where}: info[{key!r}]") for key in keys if atoms.info.get(key) is not None
        }
        if not values:
            continue
        (first, value), *others = values.items()
        for key, other in others:
            if abs(other - value) > 1e-6:
                raise ValueError(
                    f"{where}: info[{first!r}] is {value:g}, but info[{key!r}] is {other:g}; keep one of the two"
                )
        if name == "spin" and (value < 1 or value != round(value)):
            raise ValueError(
                f"{where}: info[{first!r}] must be the spin multiplicity 2S + 1, a whole number from 1 (singlet) on, "
                f"got {value:g}; convert it, or remove the key"
            )
        found[name] = torch.tensor([value], dtype=torch.float64)
        sources[name] = f"info[{first!r}]"
    total = float(found["charge"]) if "charge" in found else None
    for key in ("formal_charges", "initial_charges"):
        charges = _charges_of_atoms(atoms, key, where)
        if charges is None:
            continue
        formal = key == "formal_charges" or _are_whole(charges)
        total = _total_of(charges, formal, total, f"{where}: {key}")
        if formal and "charges" not in found:
            found["charges"] = torch.as_tensor(charges)
            sources["charges"] = f"arrays[{key!r}]"
        elif "charge" not in found and "charges" not in found and total:
            found["charge"], sources["charge"] = torch.tensor([total], dtype=torch.float64), f"arrays[{key!r}]"
    _check_computed(atoms, total or 0.0, where)
    return found


def _number(value: Any, what: str) -> float:
    try:
        array = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.size != 1 or isinstance(value, (bool, np.bool_)) or not np.isfinite(array).all():
        raise ValueError(f"{what} must be one finite number, got {value!r}; correct it, or remove the key")
    return float(array[0])


def _charges_of_atoms(atoms: Any, key: str, where: str) -> np.ndarray | None:
    """Charges of an array; None if there is none, or for initial charges that are all zero (ASE's default)."""
    if not atoms.has(key):
        return None
    try:
        charges = np.array(atoms.get_array(key), dtype=np.float64)
    except (TypeError, ValueError):
        charges = np.zeros(0)
    if charges.shape != (len(atoms),) or not np.isfinite(charges).all():
        raise ValueError(f"{where}: {key} must hold one finite number for each of {len(atoms)} atoms; remove the array")
    return None if key == "initial_charges" and not charges.any() else charges


def _are_whole(charges: np.ndarray) -> bool:
    return bool((np.abs(charges - np.round(charges)) < 1e-6).all())


def _total_of(charges: np.ndarray, formal: bool, total: float | None, what: str) -> float:
    """Total charge by the charges of atoms, which must agree with one that is known."""
    summed = float(charges.sum())
    if total is not None:
        if abs(summed - total) > (1e-6 * max(len(charges), 1) if formal else _ROUNDING):
            raise ValueError(
                f"{what} add up to {summed:g} e, but the total charge is {total:g}; correct one of them, or remove the "
                "charges of the atoms"
            )
        return total
    if not formal and abs(summed - round(summed)) > _ROUNDING:
        raise ValueError(
            f"{what} are no whole numbers, so no formal charges, and add up to {summed:g} e, so to no total charge; "
            "set atoms.info['charge'], or remove them"
        )
    return summed if formal else float(round(summed))


def _check_computed(atoms: Any, total: float, where: str) -> None:
    """Charges among the results of a calculator are results, not inputs; they must not be used as the structure's
    charges."""
    charges = getattr(atoms.calc, "results", {}).get("charges")
    if charges is None:
        return
    charges = np.asarray(charges, dtype=np.float64)
    if charges.shape != (len(atoms),) or not np.isfinite(charges).all() or not charges.any():
        return
    summed = float(charges.sum())
    if _are_whole(charges) and not atoms.has("initial_charges") and not atoms.has("formal_charges"):
        raise ValueError(
            f"{where}: the charges of the atoms are whole numbers, as formal charges are, but stand where results of a "
            "calculation do (ASE puts columns 'charge' and 'charges' there), which no model is given; name the column "
            "initial_charges, or remove it"
        )
    if abs(summed - total) > 0.5 and abs(summed - round(summed)) < _ROUNDING:
        raise ValueError(
            f"{where}: the computed charges of the atoms add up to {summed:g} e, but the total charge is {total:g}; "
            "set atoms.info['charge'], or remove the charges"
        )


def complete_states(frames: Sequence[Data], inputs: Collection[str] = ()) -> Sequence[Data]:
    """The same frames with the same keys among ``charge``, ``charges`` and ``spin``: PyG batches the keys of the first.

    ``inputs`` are those that all must have, whether or not a frame has one. Where some frames say something, those that
    do not become neutral, and singlets. Where some have formal charges, the others share their total charge evenly.
    """
    keys = [{key for key in ("charge", "charges", "spin") if frame.get(key) is not None} for frame in frames]
    wanted = set(inputs).union(*keys)
    if "charges" in wanted and any("charges" not in found for found in keys):
        wanted.add("charge")
    one = [key for key in ("charge", "spin") if key in wanted]
    alike = all(getattr(frame.get(key), "shape", None) == (1,) for frame in frames for key in one)
    if alike and all(found == wanted for found in keys):
        return frames
    out = []
    for frame, found in zip(frames, keys, strict=True):
        frame = copy.copy(frame)
        for key in one:
            default = torch.tensor([0.0 if key == "charge" else 1.0], dtype=torch.float64)
            if key == "charge" and key not in found and "charges" in found:
                default = frame.charges.double().sum().reshape(1)
            value = torch.as_tensor(frame[key]) if key in found else default
            frame[key] = value.reshape(1) if value.numel() == 1 else value  # a wrong number is refused in the batch
        if "charges" in wanted - found:
            frame.charges = frame.charge.double().expand(len(frame.z)) / len(frame.z)
        out.append(frame)
    return out


def _refuse_lost(frames: Sequence[Data]) -> None:
    """Raise where a later frame has a hierarchy or an input that the first has not: a batch would be without it."""
    first = set(frames[0].keys()) if frames else set()
    for number, frame in enumerate(frames):
        lost = sorted(filter(_must_agree, set(frame.keys()) - first), key=lambda key: (key in _INPUT_KEYS, key))
        if lost:
            raise MissingKey(
                f"data {number} of a batch has {lost[0]!r}, which PyG would drop, for data 0 has no "
                f"{lost[0]!r}{_cure(lost[0])}"
            )


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
torch.serialization.add_safe_globals([AtomicData, _Storage])
