"""System: the atoms of one graph or of a batch, checked once, on entry to the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch_geometric.data import Data
from torch_geometric.data.data import BaseData

from nbody_pyg.data import AtomicData, count_graphs, require_atoms
from nbody_pyg.geometry import (
    apply_strain,
    check_atoms,
    check_batch,
    check_batch_size,
    check_cell,
    neighbour_list,
)
from nbody_pyg.kernels.autograd_flags import below_func, has_values, inside_func, outside_func
from nbody_pyg.required import required

Result = TypeVar("Result")

#: Precisions in which a potential can be evaluated.
PRECISIONS: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
#: Charge and spin of a system, and their defaults: a neutral singlet.
DEFAULT_STATE: Mapping[str, float] = {"charge": 0.0, "spin": 1.0}


@dataclass(frozen=True, eq=False)
class Species:
    """Numbers of the elements of some atoms among those of a model, found once for an evaluation."""

    elements: tuple[int, ...]
    index: Tensor


@dataclass(frozen=True, eq=False)
class System:
    """Atoms with their cell and state: one graph, or a batch of graphs of which some may hold no atom.

    ====================  ===================  ==============================================================
    field                 shape, unit          meaning
    ====================  ===================  ==============================================================
    ``z``                 [N] long             atomic numbers
    ``pos``               [N, 3], angstrom     positions, in the precision in which they came
    ``batch``             [N] long             graph of each atom, ascending
    ``num_graphs``        int                  number of graphs
    ``cell``              [B, 3, 3] or None    rows are lattice vectors; None where nothing is periodic
    ``pbc``               [B, 3] or None       periodic directions; None where there are none
    ``total_charge``      [B] or None          e; the sum of the formal charges where only they are known
    ``formal_charges``    [N] or None          e
    ``spin``              [B] or None          multiplicity 2S + 1
    ``given``                                  what a scheme reads beside the atoms, such as bonds or labels
    ``topology``          Topology or None     parts and edges, if they are known already
    ``species``           Species or None      numbers of the elements among those of the model that asks
    ``x``                 [N, dim] or None     inputs of the atoms in e3nn's mul_ir order, for networks with node inputs
    ====================  ===================  ==============================================================

    The constructor checks nothing: it is for what is computed from a checked system. The border is :meth:`from_data`,
    :meth:`from_tensors` and :meth:`from_ase`.
    """

    z: Integer[Tensor, " atoms"]
    pos: Float[Tensor, "atoms 3"]
    batch: Int[Tensor, " atoms"]
    num_graphs: int
    cell: Float[Tensor, "graphs 3 3"] | None = None
    pbc: Tensor | None = None
    total_charge: Float[Tensor, " graphs"] | None = None
    formal_charges: Float[Tensor, " atoms"] | None = None
    spin: Float[Tensor, " graphs"] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    topology: Any = None
    species: Species | None = None
    x: Float[Tensor, "atoms dim"] | None = None

    # ------------------------------------------------------------------ the border
    @classmethod
    def from_tensors(
        cls,
        z: Tensor,
        pos: Tensor,
        batch: Tensor | None = None,
        cell: Tensor | None = None,
        pbc: Tensor | bool | None = None,
        *,
        charge: Tensor | float | None = None,
        charges: Tensor | None = None,
        spin: Tensor | int | None = None,
        topology: Any = None,
        batch_size: int | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> System:
        """Check tensors. Values are looked at unless a tracer holds them, which has to bring a topology.

        Raises:
            TypeError: z or batch not integer, pos not floating.
            ValueError: wrong shapes, lengths that differ, two devices; positions that are not finite, numbers beyond
                118, a batch that is not sorted, a cell without volume along periodic directions; charges or spins that
                are not finite, or contradict each other.
        """
        known = isinstance(pos, Tensor) and has_values(pos)
        z = check_atoms(z, pos, values=known)
        if batch is None and topology is not None:
            batch, found = topology.batch(0), topology.num_graphs
        elif known:
            batch, found = check_batch(batch, z.shape[0], z.device)
            found = found if topology is None else max(found, topology.num_graphs)
        else:
            batch = torch.zeros_like(z) if batch is None else batch
            found = (batch_size or 1) if topology is None else topology.num_graphs
        size = check_batch_size(batch_size, found) if known else found
        if known:
            cell, directions = check_cell(cell, pbc, size, pos)
            cell = None if directions is None else cell  # around an open system it means nothing
        else:
            cell = None if cell is None else cell.reshape(-1, 3, 3)
            directions = None if pbc is None else torch.as_tensor(pbc)
        total = total_charge(batch, size, charge, charges, pos)
        formal = None if charges is None else charges.to(pos)
        multiplicity = spin_multiplicity(spin, size, pos)
        return cls(z, pos, batch, size, cell, directions, total, formal, multiplicity, given or {}, topology)

    @classmethod
    def from_data(cls, data: Data, topology: Any = None, batch_size: int | None = None) -> System:
        """Check a Data or Batch; a hierarchy that is stored there, or bonds, are read by ``Scheme.system``.

        Raises: TypeError, ValueError: no Data, a key that is missing, and as for :meth:`from_tensors`.
        """
        require_atoms(data)
        state = {key: data.get(key) for key in ("charge", "charges", "spin")}
        atoms = (data.get(key) for key in ("z", "pos", "batch", "cell", "pbc"))
        size = count_graphs(data) if batch_size is None else batch_size
        return cls.from_tensors(*atoms, **state, topology=topology, batch_size=size)

    @classmethod
    def from_ase(cls, atoms: Any, device: torch.device | str = "cpu") -> System:
        """Check `ase.Atoms`, in float64; charges and spin from where docs/conventions.md says."""
        return cls.from_data(AtomicData.from_ase(atoms, labels=False).to(device))

    @classmethod
    def of(
        cls,
        z: System | Data | Tensor | None,
        pos: Tensor | None = None,
        batch: Tensor | None = None,
        *,
        read: Callable[..., System] | None = None,
        **given: Any,
    ) -> System:
        """A system as it is, a Data as ``read`` understands it, or tensors: what models accept in the first place.

        Args:
            read: ``read(data, topology, batch_size)``; :meth:`from_data` where it is None.
            given: as for :meth:`from_tensors`.
        """
        if isinstance(z, System):
            return z if given.get("topology") is None else z.replace(topology=given["topology"])
        if not isinstance(z, BaseData) and (pos is not None or isinstance(z, Tensor)):
            return cls.from_tensors(z, pos, batch, **given)  # type: ignore[arg-type]  # it refuses None
        if any(value is not None for value in (pos, batch, given.get("cell"), given.get("pbc"))):
            raise TypeError("pos, batch, cell and pbc come from the Data; pass either a Data or tensors")
        return (read or cls.from_data)(z, given.get("topology"), given.get("batch_size"))

    # ------------------------------------------------------------------ other systems from this one
    def replace(self, **fields: Any) -> System:
        """The same system with some fields replaced, unchecked."""
        return dataclasses.replace(self, **fields)

    def strained(self, strain: Float[Tensor, "graphs 3 3"]) -> System:
        """Positions and cell under a strain of each graph, with gradients."""
        pos, cell = apply_strain(self.pos, self.cell, self.batch, strain)
        return self.replace(pos=pos, cell=cell)

    def detached(self) -> System:
        """The same system without gradients; itself if it has none."""
        if not (self.pos.requires_grad or (self.cell is not None and self.cell.requires_grad)):
            return self
        return self.replace(pos=self.pos.detach(), cell=None if self.cell is None else self.cell.detach())

    def searched(self, search: Callable[[System], Result]) -> Result:
        """What a search finds for the system without gradients: lists and parts, which have none.

        It runs outside of the derivatives of ``torch.func``, whose tensors numpy and vesin cannot read.
        """
        if inside_func():
            values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            values |= {"given": dict(self.given), "species": None, "topology": None}
            if all(below_func(value) is not None for value in tree_leaves(values) if isinstance(value, Tensor)):
                with outside_func():
                    plain = tree_map_only(Tensor, lambda value: required(below_func(value)).detach(), values)
                    return search(System(**plain))
        return search(self.detached())

    def select(self, graphs: Tensor) -> System:
        """The graphs of a mask [B], renumbered; without topology and given inputs, which number the atoms."""
        atoms, number = graphs[self.batch], torch.cumsum(graphs, 0) - 1

        def among(mask: Tensor, value: Tensor | None) -> Tensor | None:
            return None if value is None else value[mask]

        return System(
            self.z[atoms],
            self.pos[atoms],
            number[self.batch[atoms]],
            int(graphs.sum()),
            among(graphs, self.cell),
            among(graphs, self.pbc),
            among(graphs, self.total_charge),
            among(atoms, self.formal_charges),
            among(graphs, self.spin),
            x=among(atoms, self.x),
        )

    def to(self, device: torch.device | str) -> System:
        """The same system on another device."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.replace(**{key: value.to(device) for key, value in values.items() if isinstance(value, Tensor)})

    # ------------------------------------------------------------------ properties
    @property
    def num_atoms(self) -> Int[Tensor, " graphs"]:
        """Atoms of each graph."""
        return torch.bincount(self.batch, minlength=self.num_graphs)

    @property
    def periodic(self) -> Tensor | None:
        """Graphs with a periodic direction, [B]; None when there are none."""
        return None if self.pbc is None else self.pbc.any(dim=1)

    def without_gaps(self) -> System:
        """Itself.

        Raises: ValueError: a graph without atoms.
        """
        if self.z.shape[0] == 0:
            raise ValueError("pos must hold at least one atom, got none; remove empty frames")
        missing = (self.num_atoms == 0).nonzero().flatten().tolist() if self.num_graphs > 1 else []
        if missing:
            raise ValueError(
                f"batch must number the graphs without gaps, but graph {missing[0]} has no atom; "
                "use compose(), which takes graphs without atoms"
            )
        return self

    def index_among(self, elements: tuple[int, ...]) -> Int[Tensor, " atoms"] | None:
        """Numbers of the elements of the atoms among ``elements``, where they were found for these before."""
        known = self.species
        return known.index if known is not None and known.elements == elements else None

    def pairs(self, pos: Tensor, batch: Tensor, cutoff: float, parts: bool) -> tuple[Tensor, Tensor | None]:
        """Neighbours among centres; shifts only for periodic systems. Centres of parts may coincide."""
        index, shift = neighbour_list(pos, cutoff, batch, self.cell, self.pbc, allow_coincident=parts)
        return index, shift if self.pbc is not None else None

    def __repr__(self) -> str:
        periodic = "" if self.pbc is None else ", periodic"
        return f"System({self.z.shape[0]} atoms, graphs={self.num_graphs}{periodic})"


def total_charge(
    batch: Int[Tensor, " atoms"],
    num_graphs: int,
    charge: Tensor | float | None,
    charges: Float[Tensor, " atoms"] | None,
    like: Tensor,
) -> Float[Tensor, " graphs"] | None:
    """Total charge of each graph, e: as given, or the sum of the formal charges; None where nothing is given.

    ``charge`` holds one number for each graph, of any shape and type.

    Raises: ValueError: a wrong number of values, one that is not finite, or a total that differs from the sum of
        ``charges``.
    """
    total = None if charge is None else _one_for_each_graph("charge", charge, num_graphs, like)
    if charges is None:
        return total
    if tuple(charges.shape) != (batch.shape[0],):
        raise ValueError(f"charges must have shape [{batch.shape[0]}], one for each atom, got {list(charges.shape)}")
    charges = charges.to(like)
    summed = charges.new_zeros(num_graphs).index_add(0, batch, charges)
    if has_values(charges):
        if not bool(torch.isfinite(charges).all()):
            raise ValueError("charges must be finite, got NaN or infinity; leave the key out where they are not known")
        if total is not None and bool((summed - total).abs().max() > 1e-3):
            wrong = int((summed - total).abs().argmax())
            raise ValueError(
                f"charges must add up to charge in every graph, got {float(summed[wrong]):g} and "
                f"{float(total[wrong]):g} in graph {wrong}; give one of the two"
            )
    return summed if total is None else total


def spin_multiplicity(spin: Tensor | int | None, num_graphs: int, like: Tensor) -> Float[Tensor, " graphs"] | None:
    """Spin multiplicity 2S + 1 of each graph; None where it is not given.

    Raises: ValueError: a wrong number of values, or one that is no whole number from 1 on.
    """
    if spin is None:
        return None
    found = _one_for_each_graph("spin", spin, num_graphs, like)
    if has_values(found) and bool(((found < 1) | (found != found.round())).any()):
        wrong = int(((found < 1) | (found != found.round())).nonzero()[0])
        raise ValueError(
            f"spin must be the multiplicity 2S + 1, a whole number from 1 (singlet) on, got {float(found[wrong]):g} "
            f"in graph {wrong}"
        )
    return found


def _one_for_each_graph(name: str, value: Tensor | float, num_graphs: int, like: Tensor) -> Float[Tensor, " graphs"]:
    value = torch.as_tensor(value).reshape(-1).to(like)
    if value.shape[0] != num_graphs:
        raise ValueError(f"{name} must have one value for each of {num_graphs} graphs, got {value.shape[0]}")
    if has_values(value) and not bool(torch.isfinite(value).all()):
        wrong = int((~torch.isfinite(value)).nonzero()[0])
        raise ValueError(
            f"{name} must be finite, got {float(value[wrong])} in graph {wrong}; leave out a key that is not known"
        )
    return value
