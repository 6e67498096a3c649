"""Scheme: base class of composition schemes, from indices (topology) to smooth levels (hierarchy)."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, overload

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import BaseTransform

from nbody_pyg.data import AtomicData, has_hierarchy, is_topology_key, points, require_atoms
from nbody_pyg.geometry import edge_vectors
from nbody_pyg.hierarchy.levels import EdgeSet, Hierarchy, Level
from nbody_pyg.hierarchy.mark import (
    ATOMS,
    EARLIER_KEPT,
    FOUND,
    FOUND_BONDS,
    INPUTS,
    KEPT,
    KIND,
    MARK,
    found_bonds,
    mark_of,
)
from nbody_pyg.hierarchy.positions import child_vectors, tree_positions
from nbody_pyg.hierarchy.topology import Topology, stored_levels
from nbody_pyg.radial import vector_window
from nbody_pyg.required import required
from nbody_pyg.system import System


@dataclass(frozen=True)
class LevelSpec:
    """Name and length scales (angstrom) of a level, from which radial functions are sized.

    Args:
        name: what its parts are, e.g. ``"groups"``.
        child_radius: reach of the edges to its children; None at level 0. A typical length, not a cutoff, if the
            children are fixed by bonds or labels.
        pair_radius: cutoff of the pairs on this level; None if it has none.
    """

    name: str
    child_radius: float | None = None
    pair_radius: float | None = None


class Scheme(BaseTransform):  # type: ignore[misc]  # PyG has no py.typed
    """A composition scheme: builds the hierarchy of a system, as a PyG transform.

    Two steps separate indices from gradients. :meth:`compose` computes the parts and their children (no gradient; the
    transform stores this on the data); :meth:`place` computes positions, edge vectors and
    windows from it, in every forward pass, with gradients. :meth:`topology`, :meth:`update` and :meth:`hierarchy` are
    the same for tensors.

    A new scheme sets the class attributes, ``self.levels``, keeps its arguments as attributes of the same
    name, and writes :meth:`build`; positions and windows have defaults.

    Class attributes:
        symmetry: group under which the scheme is equivariant.
        continuity: smoothness of the energy of a smooth model on it.
        centred: every part below the root represents one atom, in the order of the atoms.
        reads_elements: the parts follow from the elements, so points that are no atoms have none.
        bonds_key: key of given bonds on the data that determine parts, or None; may be set on the instance.
    """

    symmetry: ClassVar[str]
    continuity: ClassVar[str]
    centred: ClassVar[bool] = False
    reads_elements: ClassVar[bool] = False
    bonds_key: str | None = None
    levels: tuple[LevelSpec, ...]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        adapt_overrides(cls)

    @property
    def centred_levels(self) -> int:
        """Number of levels, from the lowest, whose parts each represent one atom, in the order of the atoms."""
        return len(self.levels) - 1 if self.centred else 1

    # ------------------------------------------------------------------ for tensors
    def topology(
        self,
        z: Integer[Tensor, " atoms"],
        pos: Float[Tensor, "atoms 3"],
        batch: Int[Tensor, " atoms"] | None = None,
        cell: Float[Tensor, "*graphs 3 3"] | None = None,
        pbc: Tensor | None = None,
        **given: Any,
    ) -> Topology:
        """The topology of one graph or a batch (``batch`` sorted); it has no gradient.

        Args:
            given: further inputs of the scheme (bonds, labels), see :meth:`inputs`.
        """
        return self.compose(System.from_tensors(z, pos, batch, cell, pbc, given=given).without_gaps())

    def update(
        self,
        topology: Topology,
        z: Integer[Tensor, " atoms"],
        pos: Float[Tensor, "atoms 3"],
        batch: Int[Tensor, " atoms"] | None = None,
        cell: Float[Tensor, "*graphs 3 3"] | None = None,
        pbc: Tensor | None = None,
    ) -> Topology:
        """The topology at new positions of the same atoms; where children are fixed, only pairs change."""
        system = System.from_tensors(z, pos, batch, cell, pbc)
        return system.searched(lambda plain: self.rebuild(topology, plain))

    def hierarchy(
        self,
        topology: Topology,
        z: Integer[Tensor, " atoms"],
        pos: Float[Tensor, "atoms 3"],
        cell: Float[Tensor, "*graphs 3 3"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Hierarchy:
        """As :meth:`place`, for tensors, which are not checked."""
        cell = None if cell is None else cell.reshape(-1, 3, 3)
        return self.place(topology, System(z, pos, topology.batch(0), topology.num_graphs, cell), dtype)

    # ------------------------------------------------------------------ integers
    def system(self, data: Data, topology: Topology | None = None, batch_size: int | None = None) -> System:
        """The checked system of a Data or Batch, with the topology stored on it or with what :meth:`inputs` reads."""
        system = System.from_data(data, topology, batch_size)
        if topology is not None:
            return system
        if has_hierarchy(data):
            return system.replace(topology=self.read(data))
        return system.replace(given=self.inputs(data))

    def compose(self, system: System) -> Topology:
        """The topology of a system; graphs without atoms have no parts at any level. It has no gradient."""
        return system.searched(self._compose)

    def _compose(self, system: System) -> Topology:
        if system.num_graphs == 1 and len(system.z):
            return self.build(system, **system.given)
        present = system.num_atoms > 0
        if len(system.z) and bool(present.all()):
            return self.build(system, **system.given)
        if not len(system.z):
            return self._without_atoms(system.num_graphs, system.pos, system.periodic)
        return self.build(system.select(present), **system.given).among(present)

    def build(self, system: System, *_: Any, **given: Any) -> Topology:
        """The method that a scheme implements: the topology of graphs that all have atoms.

        Args:
            given: the result of :meth:`inputs`.
        """
        raise NotImplementedError

    def _without_atoms(self, num_graphs: int, like: Tensor, periodic: Tensor | None) -> Topology:
        """The topology of graphs without atoms, with the same entries as that of other graphs."""
        none = torch.zeros(2, 0, dtype=torch.long, device=like.device)
        shift = None if periodic is None else like.new_zeros(0, 3)
        pairs = [none if spec.pair_radius is not None else None for spec in self.levels]
        counts = torch.zeros(num_graphs, dtype=torch.long, device=like.device)
        above = len(self.levels) - 1
        return Topology(
            (counts,) * (above + 1),
            (None, *[none] * above),
            tuple(pairs),
            (None, *[shift] * above),
            tuple(None if index is None else shift for index in pairs),
            periodic=periodic,
        )

    def rebuild(self, topology: Topology, system: System) -> Topology:
        """The topology at new positions of the same atoms; where children are fixed, only pairs change."""
        return self.compose(system)

    @property
    def keeps_parts(self) -> bool:
        """Whether :meth:`rebuild` keeps parts (groups of bonded atoms, labels) that may differ at other positions."""
        return type(self).rebuild is not Scheme.rebuild

    def holds(self, topology: Topology, system: System) -> bool:
        """Whether :meth:`build` would find the parts of ``topology`` at these positions; edges are not compared.

        For parts that depend on positions by another rule than :meth:`list_radii`, such as bonds.
        """
        return True

    def list_radii(self) -> tuple[tuple[float | None, float | None], ...]:
        """Radii (angstrom) for searching the children and the pairs of every level; None if they are not searched."""
        return tuple((None, spec.pair_radius) for spec in self.levels)

    def widened(self, skin: float) -> Scheme | None:
        """A copy whose lists reach further by ``skin`` (angstrom), or None if lists cannot be kept.

        With a copy, :class:`~nbody_pyg.hierarchy.TopologyCache` searches once for many steps of a trajectory. Only
        schemes whose topology depends on positions only through :meth:`list_radii` and :meth:`holds` may return one.
        """
        return None

    @property
    def edge_sets(self) -> dict[EdgeSet, float]:
        """Every set of edges, with its length scale (angstrom)."""
        child = {EdgeSet("child", k): spec.child_radius for k, spec in enumerate(self.levels) if k > 0}
        pair = {EdgeSet("pair", k): spec.pair_radius for k, spec in enumerate(self.levels)}
        return {edges: radius for edges, radius in (child | pair).items() if radius is not None}

    @property
    def same_edges(self) -> Mapping[EdgeSet, EdgeSet]:
        """Edge sets that equal an earlier one in indices, vectors and weights; by default none.

        Their features are computed only once.
        """
        return {}

    # ------------------------------------------------------------------ tensors with gradients
    def positions(self, topology: Topology, system: System) -> list[Float[Tensor, "_ 3"]]:
        """Positions of every level, with gradients; the system is in float64. By default mass-weighted means."""
        return tree_positions(topology, system)

    def child_weight(self, level: int, vec: Float[Tensor, "edges 3"]) -> Float[Tensor, " edges"]:
        """Membership weight of the child edges of a level; the default is full membership."""
        return vec.new_ones(vec.shape[0])

    def place(self, topology: Topology, system: System, dtype: torch.dtype | None = None) -> Hierarchy:
        """Positions, vectors and weights of every level, differentiable in positions and cell of the system.

        Positions of parts and all differences are taken in float64, and vectors are rounded to ``dtype`` afterwards:
        the distance of a system from the origin does not reduce the precision. Positions keep the dtype of those of the
        system. Levels
        that share positions and edges share vectors.

        The position of the root of a periodic graph has no meaning (it would depend on which image of an atom
        was given), so the vectors from it to its children are zero there; it still holds the mean as given.

        Args:
            dtype: of vectors and weights; None for that of the positions.
        """
        self._check_levels(topology, system)
        given = system.pos
        dtype = given.dtype if dtype is None else dtype
        cell = None if system.cell is None else system.cell.double()
        pos = given.double()
        centres = self.positions(topology, system.replace(pos=pos, cell=cell))
        levels: list[Level] = []
        same = self.same_edges
        for k, here in enumerate(centres):
            batch = topology.batch(k)
            child = child_vec = child_weight = pair_vec = pair_weight = None
            if k > 0:
                earlier = same.get(EdgeSet("child", k))
                if earlier is not None:
                    like = levels[earlier.level]
                    child, child_vec, child_weight = like.child_index, like.child_vec, like.child_weight
                else:
                    child, shift = required(topology.child_index[k]), topology.child_shift[k]
                    child_vec = child_vectors(centres[k - 1], here, child, shift, cell, batch).to(dtype)
                    if k == topology.num_levels - 1 and topology.periodic is not None:
                        open_graph = ~topology.periodic.index_select(0, batch.index_select(0, child[1]))
                        child_vec = child_vec * open_graph.unsqueeze(-1).to(child_vec.dtype)
                    child_weight = self.edge_window(EdgeSet("child", k), child_vec)
            if (pair := topology.pair_index[k]) is not None:
                pair_vec = edge_vectors(here, pair, topology.pair_shift[k], cell, batch).to(dtype)
                pair_weight = self.edge_window(EdgeSet("pair", k), pair_vec)
            own = given if here is pos else here.to(given.dtype)
            weight = here.new_ones(here.shape[0], dtype=dtype)
            levels.append(
                Level(own, weight, batch, child, child_vec, child_weight, pair, pair_vec, pair_weight)
            )  # fmt: skip
        return Hierarchy(tuple(levels), system, same)

    def edge_window(self, edges: EdgeSet, vec: Float[Tensor, "edges 3"]) -> Float[Tensor, " edges"]:
        """Window of edges that are as long as some vectors."""
        if edges.kind == "child":
            return self.child_weight(edges.level, vec)
        return vector_window(vec, required(self.levels[edges.level].pair_radius))

    def _check_levels(self, topology: Topology, system: System) -> None:
        """Raise ValueError unless the topology has the levels and pairs of this scheme, and the system its cell."""
        wanted = [spec.pair_radius is not None for spec in self.levels]
        if [index is not None for index in topology.pair_index] != wanted:
            raise ValueError(
                f"topology must have {len(wanted)} levels, with pairs at levels "
                f"{[k for k, pairs in enumerate(wanted) if pairs]}, for {self!r}, got "
                f"{topology!r}, which another scheme made; apply this scheme"
            )
        if topology.periodic is not None and system.cell is None:
            raise ValueError(
                "cell must be given with the topology of a periodic system, got None; pass the cell, and pbc, with "
                "which it was made"
            )

    def with_pairs(self, tree: Topology, system: System) -> Topology:
        """``tree`` with the pairs of every level whose spec has a ``pair_radius``, at these positions."""
        cell = None if system.cell is None else system.cell.double()
        centres = self.positions(tree, system.replace(pos=system.pos.double(), cell=cell))
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for k, spec in enumerate(self.levels):
            radius, centre = spec.pair_radius, centres[k]
            pair = shift = None
            if radius is not None:
                pair, shift = system.pairs(centre, tree.batch(k), radius, k > 0)
            found.append((pair, None if shift is None else shift.to(system.pos.dtype)))
        pairs, shifts = zip(*found, strict=True)
        return Topology(tree.num_parts, tree.child_index, pairs, tree.child_shift, shifts, tree.bonds, system.periodic)

    @property
    def atom_key(self) -> str | None:
        """Key of the labels of atoms on the data that determine parts, or None."""
        return None

    def inputs(self, data: Data) -> dict[str, Any]:
        """Further keyword arguments of :meth:`build` that a scheme reads from the data (bonds, labels)."""
        return {}

    def forward(self, data: Data) -> Data:
        """Transform: the data as :class:`AtomicData` with the topology stored on it. A Batch stays one.

        Points without ``z`` are no atoms; they get the number 0, unless the scheme needs elements.

        Raises: ValueError, TypeError: no atoms to build from, or user keys with names that the topology uses.
        """
        data = data if self.reads_elements else points(data)
        require_atoms(data)
        fresh = not has_hierarchy(data)
        if fresh:
            taken = [key for key in sorted(data.keys()) if is_topology_key(key) or key == "scheme"]
            if taken:
                raise ValueError(
                    f"data has the key {taken[0]!r} of its own, under which {type(self).__name__} would store its "
                    "parts; rename it"
                )
        out = data if isinstance(data, Batch) else AtomicData.from_data(data)
        given = self.inputs(out)
        topology = self.compose(System.from_data(out).replace(given=given))
        if fresh and topology.bonds is not None and self.bonds_key != "bonds" and "bonds" in data:
            raise ValueError(
                f"data has the key 'bonds' of its own, under which {type(self).__name__} would store those it used; "
                "rename it"
            )
        return self.store(topology, out, kept="bonds" in given)

    def store(self, topology: Topology, data: Data, kept: bool = False) -> Data:
        """Write ``topology`` on ``data`` in place, signed with the name and arguments of this scheme.

        Args:
            kept: the parts were given (bonds, a reference frame) and are kept when positions change.
        """
        if bool(found_bonds(data).any()):
            del data["bonds"]  # those of earlier positions, or of another scheme
        topology.store(data)
        signed = self.signature
        data["scheme"] = [signed] * topology.num_graphs if isinstance(data, Batch) else signed
        kind = KEPT if kept else FOUND if topology.bonds is None else FOUND_BONDS
        data[MARK] = mark_of(data, kind, self.atom_key, self.bonds_key)
        return data

    def read(self, data: Data) -> Topology:
        """The topology stored on ``data``, which must belong to this scheme with these arguments; cheap, for every
        step.

        It belongs to the atoms, positions, cell, bonds and labels with which it was stored. If these have changed
        since, it is built again by :meth:`compose`. Parts that were given or shared are kept, and only what depends on
        positions is computed again (:meth:`rebuild`). Costs about 30 small integer operations, O(atoms).

        Raises:
            ValueError: no hierarchy, or that of another scheme or of other radii (its windows would not end where the
                neighbour lists end, and the energy would jump); parts that were given or shared for
                other atoms, or for atoms in another order.
        """
        signed = data.get("scheme")
        for found in {signed} if isinstance(signed, str) else set(signed or ()):
            if found != self.signature:
                raise ValueError(
                    f"data must hold the hierarchy of {self!r}, but holds that of {found}; apply the "
                    "scheme of the model to the data (model.scheme is a transform)"
                )
        mark = data.get(MARK)
        if mark is None:
            if signed is not None:
                warnings.warn(
                    "the hierarchy on the data was stored by an earlier version, which did not note its positions; "
                    "it is used unchecked. Apply the scheme again (delete processed files of a dataset)",
                    stacklevel=2,
                )
            return Topology.from_data(data)
        now = mark_of(data, mark[:, KIND], self.atom_key, self.bonds_key)
        if any(key is not None and data.get(key) is None for key in (self.atom_key, self.bonds_key)):
            now[:, INPUTS] = mark[:, INPUTS]  # missing labels or bonds count as unchanged
        return Topology.from_data(data) if torch.equal(now, mark) else self._renewed(data, mark, now)

    def _renewed(self, data: Data, mark: Tensor, now: Tensor) -> Topology:
        """The topology of data that changed since their topology was stored."""
        stored_levels(data.to_dict())  # keys that were batched wrongly also differ from their mark
        if bool((mark[:, KIND] < FOUND).any()):
            self._refuse_earlier(mark)
        kept = mark[:, KIND] == KEPT
        other = (kept & (mark[:, ATOMS] != now[:, ATOMS])).nonzero().flatten().tolist()
        if other:
            raise ValueError(
                f"data must hold the atoms for which its parts were given or shared, but graph {other[0]} has others, "
                "or in another order; apply the scheme (or share_topology) after whatever removes or reorders atoms"
            )
        if not bool(kept.any()) or not torch.equal(mark[:, INPUTS], now[:, INPUTS]):
            return self.compose(System.from_data(data).replace(given=self.inputs(data)))
        if not bool(kept.all()):
            raise ValueError(
                "positions have changed since hierarchies were stored, in a batch in which some have parts that were "
                "given or shared, and others have not; apply the scheme after whatever changes positions"
            )
        topology, system = Topology.from_data(data), System.from_data(data).detached()
        self.check_kept(topology, system)
        return self.rebuild(topology, system)

    @staticmethod
    def _refuse_earlier(mark: Tensor) -> None:
        """Warn that hierarchies with marks of an earlier version are built again; raise if their parts were kept."""
        which = "the hierarchy on the data was stored by an earlier version, whose mark misses some changes of atoms"
        if bool((mark[:, KIND] == EARLIER_KEPT).any()):
            raise ValueError(
                f"{which}, and its parts were given or shared; apply the scheme (or share_topology) again (delete "
                "processed files of a dataset)"
            )
        warnings.warn(
            f"{which}, so it is built anew in every step. Apply the scheme again (delete processed files of a dataset)",
            stacklevel=4,
        )

    def check_kept(self, topology: Topology, system: System) -> None:
        """Raise ValueError if kept parts are implausible at these positions; by default never."""

    @cached_property
    def signature(self) -> str:
        """Name and arguments in one line, the signature of stored hierarchies."""
        arguments = {k: v for k, v in self.config().items() if k != "name"}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"

    def config(self) -> dict[str, Any]:
        """Name and arguments, ready for JSON; see :meth:`from_config`."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        values = {name: getattr(self, name) for name in names}
        return {"name": type(self).__name__} | {key: _plain(value) for key, value in values.items()}

    @staticmethod
    def from_config(config: dict[str, Any]) -> Scheme:
        """Build the scheme that :meth:`config` described; every imported subclass of Scheme is known.

        Raises:
            ValueError: unknown name.
            TypeError: arguments that the scheme does not take.
        """
        known: dict[str, type[Scheme]] = {cls.__name__: cls for cls in _subclasses(Scheme)}
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "name"}
        name = config.get("name")
        if name not in known:
            raise ValueError(f"name must be one of the schemes {sorted(known)}, got {name!r}; import its module first")
        return known[name](**arguments)

    def __repr__(self) -> str:
        return self.signature


def adapt_overrides(cls: type[Scheme]) -> None:
    """Adapt a scheme written for tensors, before 0.3, to systems; warns once per class."""
    for old, new in (("topology", "build"), ("update", "rebuild"), ("hierarchy", "place")):
        if old not in vars(cls) or new in vars(cls):
            continue
        hint = f"{cls.__name__} overrides {old}(), for tensors; write {new}() instead, which is given a System"
        if getattr(cls, new) is not getattr(Scheme, new):
            raise TypeError(f"{hint}, as the scheme that it derives from does")
        warnings.warn(f"{hint}; {old}() will no longer be asked in version 0.5", DeprecationWarning, stacklevel=4)
        setattr(cls, new, _ADAPTERS[new])


def _build(self: Scheme, system: System, **given: Any) -> Topology:
    return self.topology(system.z, system.pos, system.batch, system.cell, system.pbc, **given)


def _rebuild(self: Scheme, topology: Topology, system: System) -> Topology:
    return self.update(topology, system.z, system.pos, system.batch, system.cell, system.pbc)


def _place(self: Scheme, topology: Topology, system: System, dtype: torch.dtype | None = None) -> Hierarchy:
    levels = self.hierarchy(topology, system.z, system.pos, system.cell, dtype=dtype).levels
    return Hierarchy(levels, system)


_ADAPTERS = {"build": _build, "rebuild": _rebuild, "place": _place}


def __getattr__(name: str) -> Any:
    if name != "AtomsInput":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "AtomsInput is now nbody_pyg.system.System, and goes in version 0.5: build() of a scheme is given one, so that "
        "there is nothing to check",
        DeprecationWarning,
        stacklevel=2,
    )

    class AtomsInput(System):
        @classmethod
        def check(cls, *atoms: Any) -> System:
            return System.from_tensors(*atoms).without_gaps().detached()

    return AtomsInput


def _subclasses(cls: type[Scheme]) -> list[type[Scheme]]:
    return [sub for direct in cls.__subclasses__() for sub in (direct, *_subclasses(direct))]


def _plain(value: Any) -> Any:
    """Tuples as lists, the way JSON gives them back."""
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def widen_pairs(scheme: Scheme, skin: float) -> Scheme:
    """A copy of a scheme whose pairs reach further by ``skin``; children stay."""
    wide = copy.copy(scheme)
    wide.levels = tuple(
        spec if spec.pair_radius is None else replace(spec, pair_radius=spec.pair_radius + skin)
        for spec in scheme.levels
    )
    return wide


@overload
def check_radius(name: str, value: float | None) -> float: ...
@overload
def check_radius(name: str, value: float | None, optional: bool) -> float | None: ...
def check_radius(name: str, value: float | None, optional: bool = False) -> float | None:
    """A positive finite length, or None if the level may have no pairs."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite length in angstrom, got {value!r}; try 5.0")
    return float(value)
