"""NBodyNet: from atoms, through the levels of a hierarchy, to energies and covariant properties."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from ase.data import chemical_symbols
from e3nn import o3
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.data import has_hierarchy, no_elements, points, refuse_unstated, require_atoms
from nbody_pyg.hierarchy import EdgeSet, Hierarchy, NestedShells, Scheme, Topology
from nbody_pyg.kernels.autograd_flags import has_values, in_own_precision, is_tracing, opaque_to_compile
from nbody_pyg.kernels.edges import FeatureKernel
from nbody_pyg.kernels.library import compile_together
from nbody_pyg.kernels.ops import DensityKernel, OneBodyKernel, ProductKernel
from nbody_pyg.kernels.update import UpdateKernel
from nbody_pyg.longrange import LongRange, LongRangeConfig, charge_shares
from nbody_pyg.messages import check_choice, short
from nbody_pyg.nn.custom import GateFactory, checked_state, gate_factories, gate_names
from nbody_pyg.nn.edges import EdgeEmbedding, EdgeFeatures, sum_into
from nbody_pyg.nn.electronic import ElectronicEmbedding, check_inputs, refuse_unused
from nbody_pyg.nn.inner_cutoff import InnerCutoff
from nbody_pyg.nn.interaction import ChannelGroups, Interaction, InteractionConfig, SoftNorm, add_to_scalars, one_gate
from nbody_pyg.nn.irreps import (
    PARITIES,
    Resettable,
    channel_groups,
    from_mul_ir,
    harmonic_irreps,
    hidden_irreps,
    level_types,
    require_reachable,
    to_mul_ir,
)
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.nn.readout import LinearReadout, MLPReadout
from nbody_pyg.radial import SOFT_LENGTH, BesselBasis, InversePowers, check_softening
from nbody_pyg.renamed import FORMER_ARGUMENTS, former, renamed
from nbody_pyg.required import required
from nbody_pyg.system import Species, System

#: Presets and their numbers of radial functions. Strict has the powers s = 0 .. 3 of the paper; higher ones overflow.
PRESETS: Mapping[str, int] = {"practical": 8, "strict": 4}
SWEEPS = ("up", "up-down")
READOUTS = ("sum", "root", "nodes")
#: Layers on the atoms.
NUM_LAYERS = 2
#: Typical number of sources per target if the caller gives none.
_NUM_NEIGHBORS = {"pair": 12.0, "child": 3.0}
#: Operations with compiled code of one network. Linear maps share theirs.
_KERNELS = (DensityKernel, FeatureKernel, OneBodyKernel, ProductKernel, UpdateKernel)


class Step(NamedTuple):
    """One visit of a level: along its ``pair`` edges, ``up`` from its children, or ``down`` from its parents."""

    kind: str
    level: int

    @property
    def edges(self) -> EdgeSet:
        """The edge set of the step; child edges are numbered by the level of the parents."""
        return EdgeSet("pair" if self.kind == "pair" else "child", self.level + (self.kind == "down"))


class NBodyNet(Resettable):
    r"""Covariant hierarchical N-body network.

    .. math:: \psi_i = \Phi\big(\{\psi_c, \mathbf r_c - \mathbf r_i\}_{c \in \mathrm{children}(i)}\big), \qquad
              E = \sum_{k} \sum_{i \in \mathrm{level}\ k} g_i\, \epsilon_k(\psi_i)

    Every part of every level has a covariant state. States are combined in products, decomposed with Clebsch-Gordan
    coefficients, and mixed within each degree (:mod:`nbody_pyg.nn.gates`). The network passes messages up the levels,
    between neighbours within a level if the scheme has pairs, and down again; a readout gives a value for every part.
    There are two presets:

    * ``practical``: Bessel radial functions, a small network on the scalars of the readout, residual states;
    * ``strict``: polynomial in the states, with softened inverse powers of the distance and no activation.

    ===================  ===========================  ==========================================
    symbol               code                         shape, unit
    ===================  ===========================  ==========================================
    z                    ``z``                        (atoms,) atomic numbers
    r                    ``pos``                      (atoms, 3) angstrom
    x                    ``x``                        (atoms, node_inputs.dim), with ``node_inputs`` only
    E                    result                       (graphs,) for a scalar target; else (graphs, dim)
    ===================  ===========================  ==========================================

    Args:
        species: atomic numbers that the network knows. 0 is the number of points that are no atoms; None: all points
            are such, and ``z`` may be left out.
        scheme: composition scheme; the default is two nested shells, of 3.5 and 5 angstrom.
        channels: multiplicity of every fragment; None: 32, unless ``irreps`` is given.
        lmax: highest degree; None: 2, unless ``irreps`` is given.
        correlation: highest power of a summed state in one interaction.
        preset: "practical" or "strict".
        irreps_out: type of the target in e3nn's notation: "0e" energy, "1o" dipole, "0e + 2e" polarizability.
        readout: "sum" adds up a value over the parts of all levels below the root, so it is extensive; "root" reads the
            root only, which is not additive; "nodes" gives a value for every atom, (atoms,) or (atoms, dim).
        gate: your class of gates for every step of the hierarchy, or a mapping from "pair", "up" and "down" to classes
            (:class:`~nbody_pyg.nn.custom.GateFactory`; docs/extending.md). Atoms then start from a learned
            vector of their element. A model file holds the name of the class, which must be imported before loading.
        irreps: type of the states, instead of ``channels`` and ``lmax``: one for all levels, such as
            "48x0e + 32x1o + 16x2e", or a mapping from the names of the levels (those of ``scheme.levels``) to types. No
            fragment may have a larger multiplicity than the scalars. Channels with the same fragments form a group with
            its own products; the linear maps mix all groups (:class:`~nbody_pyg.nn.interaction.ChannelGroups`).
        num_layers: layers on the atoms, if they have pairs; the readout "root" uses only the first.
        num_basis: number of radial functions; None: 8, with the strict preset 4.
        parity: parities of the fragments: "natural", "both" or "ignored" (:data:`~nbody_pyg.nn.irreps.PARITIES`).
        sweeps: "up-down", where atoms have pairs and the readout is "sum", or "up".
        avg_num_neighbors: typical number of sources per target by edge set, such as {"pair_0": 12.0, "child_1": 3.0}
            (:func:`compute_avg_num_neighbors`).
        long_range: energy of latent charges at any distance: None, the name of a method, or settings
            (:class:`~nbody_pyg.longrange.charges.LongRangeConfig`).
        inputs: further inputs: "charge", the total charge, and "spin", the multiplicity
            (:class:`~nbody_pyg.nn.electronic.ElectronicEmbedding`).
        node_inputs: type of further inputs of every atom, such as "0e + 1o" for a charge and a velocity. They are
            ``data.x`` in e3nn's mul_ir order.
        softening: length below which distances are softened, in the unit of the positions
            (:func:`~nbody_pyg.radial.soften`).
        inner_cutoff: lengths (angstrom) by pairs of elements, such as ``{"C-H": 0.95}``, below which the states no
            longer follow the distance of two atoms (:class:`~nbody_pyg.nn.inner_cutoff.InnerCutoff`); None: they always
            do. Training takes them from the data where there is a repulsion of nuclei.

    The attribute ``assumed`` holds charge and spin of the training data of a network without these inputs, unless it is
    a neutral singlet; training sets it.

    Equivariance: O(3) (with parity "ignored" only rotations), translation, permutation.
    Smoothness: that of the scheme. Cost: linear in the number of edges.
    Raises: ValueError: unknown preset, readout or parity, a type that no path reaches, ``irreps`` together with
    ``channels`` or ``lmax``, node inputs without effect, a scheme with no way down to the atoms for readout "nodes"; in
    forward: an unknown element, a charge or spin without an input for it, ``x`` missing or of another shape.

    Example:
        >>> NBodyNet([1, 6, 8], channels=8)
        NBodyNet(H C O, NestedShells(radii=[3.5, 5.0], exponent=3), practical, 8x0e+8x1o+8x2e -> 1x0e, 7251 parameters)
    """

    species_of: Tensor

    @renamed(**FORMER_ARGUMENTS)
    def __init__(
        self,
        species: Sequence[int] | None,
        scheme: Scheme | None = None,
        channels: int | None = None,
        lmax: int | None = None,
        correlation: int = 4,
        preset: str = "practical",
        irreps_out: str | o3.Irreps = "0e",
        readout: str = "sum",
        gate: GateFactory | str | Mapping[str, GateFactory | str] | None = None,
        irreps: str | o3.Irreps | Mapping[str, str | o3.Irreps] | None = None,
        *,
        num_layers: int = NUM_LAYERS,
        num_basis: int | None = None,
        parity: str = "natural",
        sweeps: str = "up-down",
        avg_num_neighbors: Mapping[str, float] | None = None,
        long_range: str | Mapping[str, Any] | LongRangeConfig | None = None,
        inputs: str | Sequence[str] | None = None,
        node_inputs: str | o3.Irreps | None = None,
        softening: float = SOFT_LENGTH,
        inner_cutoff: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.scheme = NestedShells() if scheme is None else scheme
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"scheme must be a composition scheme such as BondTree(), got {scheme!r}")
        self.species = (0,) if species is None else _check_species(species)
        if 0 in self.species and self.scheme.reads_elements:
            raise ValueError(
                f"scheme must not need elements where points are no atoms (species None or 0), got {self.scheme!r}; "
                "use NestedShells, SmoothSurvivors or FromAssignment"
            )
        self.preset = check_choice("preset", preset, tuple(PRESETS))
        self.readout = check_choice("readout", readout, READOUTS)
        self.gates = gate_factories(gate)
        self.parity = check_choice("parity", parity, PARITIES)
        self.sweeps = check_choice("sweeps", sweeps, SWEEPS)
        self.long_range_config = None if long_range is None else LongRangeConfig.parse(long_range)
        #: Which of charge and spin are inputs of the network.
        self.inputs = check_inputs(inputs) if inputs else ()
        self.assumed: dict[str, float] = {}
        self.softening = check_softening(softening)
        self.inner_cutoff = None if inner_cutoff is None else self._check_inner(inner_cutoff)
        self._check_way_down()
        self.num_layers = self._check_layers(num_layers)
        self.avg_num_neighbors = self._check_neighbors(avg_num_neighbors)
        self.correlation = _whole("correlation", correlation)
        self.num_basis = _whole("num_basis", PRESETS[preset] if num_basis is None else num_basis)
        self.steps = self._plan()
        self.level_types, self._size = self._read_types(channels, lmax, irreps)
        self.channels: int | None = self._size.get("channels")
        self.lmax = max(ir.l for one in self.level_types.values() for _, ir in one)
        self.irreps_out = o3.Irreps(irreps_out)
        if self.irreps_out.dim == 0:
            raise ValueError(f"irreps_out must name at least one component, got {str(irreps_out)!r}; try '0e'")
        for one in self.level_types.values():
            require_reachable(self.irreps_out, {ir for _, ir in one}, f"a network of type {one}")
        self.node_inputs = None if node_inputs is None else self._check_node_inputs(node_inputs)
        table = torch.full((120,), -1, dtype=torch.long)  # the last entry is for numbers that are not elements
        table[torch.tensor(self.species)] = torch.arange(len(self.species))
        self.register_buffer("species_of", table, persistent=False)
        self._build()

    # ------------------------------------------------------------------ construction
    def _check_layers(self, layers: int) -> int:
        """The number of layers. Raises: ValueError: it does not apply to the scheme."""
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"num_layers must be a whole number, 1 or more, got {layers!r}; try 2")
        if layers != NUM_LAYERS and self.scheme.levels[0].pair_radius is None:
            raise ValueError(
                f"num_layers counts visits of the atoms along their pairs, of which {self.scheme!r} has none, so that "
                f"{layers} would do nothing; leave it out, and make the network deeper by further levels of the "
                "scheme, e.g. NestedShells((3.5, 5.0, 5.0))"
            )
        return layers

    def _check_way_down(self) -> None:
        """Raise ValueError if the value of an atom could not depend on the levels above it."""
        pairs = self.scheme.levels[0].pair_radius is not None
        if self.readout == "nodes" and not self.scheme.centred and not (pairs and self.sweeps == "up-down"):
            raise ValueError(
                f"readout 'nodes' needs a way down to the atoms, which {self.scheme!r} with sweeps {self.sweeps!r} has "
                "not; give the scheme pairs of atoms and leave sweeps out, or use NestedShells"
            )

    def _check_inner(self, lengths: Mapping[str, float]) -> InnerCutoff:
        """The limit of the edge vectors. Raises: ValueError, TypeError: it does not apply to points or these pairs."""
        if not isinstance(lengths, Mapping):
            raise TypeError(f"inner_cutoff must be a mapping such as {{'C-H': 0.95}}, got {lengths!r}")
        if 0 in self.species:
            raise ValueError("inner_cutoff belongs to pairs of elements, and points that are no atoms have none")
        return InnerCutoff(self.species, lengths)

    def _check_node_inputs(self, given: str | o3.Irreps) -> o3.Irreps:
        """The type of the node inputs. Raises: ValueError: a fragment that cannot change any state."""
        irreps = o3.Irreps(given)
        known = {ir for one in self.level_types.values() for _, ir in one}
        for _, ir in irreps:
            made = {end for _, harmonic in harmonic_irreps(self.lmax, self.parity) for end in ir * harmonic}
            if not made & known:
                raise ValueError(
                    f"node_inputs must have fragments that change states of type {self.irreps}, got {ir} in {irreps}; "
                    "take parity='both' for inputs of any parity (with 'ignored' all are written even)"
                )
        if irreps.dim == 0:
            raise ValueError(f"node_inputs must name at least one component, got {str(given)!r}; try '0e + 1o'")
        return irreps

    def _check_neighbors(self, given: Mapping[str, float] | None) -> dict[str, float]:
        """Numbers of neighbours by edge set. Raises: ValueError: unknown sets, or numbers that are not positive."""
        if not isinstance(given, Mapping | None):
            raise ValueError(f"avg_num_neighbors must be a mapping such as {{'pair_0': 12.0}}, got {given!r}")
        known = [str(edges) for edges in self.scheme.edge_sets]
        for name, number in (given or {}).items():
            if name not in known:
                raise ValueError(
                    f"avg_num_neighbors must name edge sets of {self.scheme!r}, {sorted(known)}, got {name!r}"
                )
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
                raise ValueError(
                    f"avg_num_neighbors[{name!r}] must be a positive number of sources per target, got {number!r}"
                )
        return dict(given or {})

    def _read_types(
        self,
        channels: int | None,
        lmax: int | None,
        irreps: str | o3.Irreps | Mapping[str, str | o3.Irreps] | None,
    ) -> tuple[dict[int, o3.Irreps], dict[str, Any]]:
        """The type of every level in use, and the arguments that describe it."""
        visited = sorted({step.level for step in self.steps}) or [0]
        if irreps is None:
            channels = _whole("channels", 32 if channels is None else channels)
            lmax = _whole("lmax", 2 if lmax is None else lmax)
            types = dict.fromkeys(visited, hidden_irreps(channels, lmax, self.parity))
            return types, {"channels": channels, "lmax": lmax}
        if channels is not None or lmax is not None:
            raise ValueError(
                f"irreps must stand alone, got irreps {irreps!r} with channels {channels!r} and lmax {lmax!r}; "
                "channels and lmax are short for a type with one multiplicity, leave them out"
            )
        types = level_types(irreps, {k: self.scheme.levels[k].name for k in visited}, self.parity)
        return types, {
            "irreps": {name: str(one) for name, one in irreps.items()} if isinstance(irreps, Mapping) else str(irreps)
        }

    @property
    def irreps(self) -> o3.Irreps:
        """Type of the lowest level, and of all levels if they have one type; otherwise see ``level_types``."""
        return self.level_types[min(self.level_types)]

    def _build(self) -> None:
        num_basis, radii = self.num_basis, self.scheme.edge_sets
        self.embeddings, self.interactions = nn.ModuleDict(), nn.ModuleList()
        last_visit = {step.level: n for n, step in enumerate(self.steps)}
        types: dict[int, o3.Irreps] = {}
        config = self.long_range_config
        if config is not None and (not self._shifts() or self.irreps_out.dim != 1):
            raise ValueError(
                f"long_range is an extensive energy, but the readout is {self.readout!r} of {self.irreps_out}; "
                "leave it out"
            )
        dipoles = config is not None and config.dipoles
        highest = max(int(dipoles), *(ir.l for _, ir in self.irreps_out))
        start = self.irreps[0].mul
        self.electrons = None
        if self.inputs:
            energies = self._shifts() and self.irreps_out.dim == 1
            self.electrons = ElectronicEmbedding(self.inputs, len(self.species), start, offset=energies)
        self.elements = None
        self.bound = None
        if "down" in self.gates:
            # A user's gate may be of any degree in the states, and steps down follow each other
            self.bound = SoftNorm() if self.preset == "practical" else nn.Identity()
        self.embed_nodes = None
        if self.gates or self.node_inputs is not None:
            self.elements = nn.Parameter(torch.randn(len(self.species), start))
        if self.inputs or self.gates or self.node_inputs is not None:
            given = {o3.Irrep("0e")} | {ir for _, ir in self.node_inputs or ()}
            types[0] = o3.Irreps([(start, ir) for ir in sorted(given, key=lambda ir: (ir.l, -ir.p))])  # initial states
        if self.node_inputs is not None:
            taken = {ir for _, ir in self.node_inputs}
            self.embed_nodes = IrrepsLinear(self.node_inputs, o3.Irreps([(m, ir) for m, ir in types[0] if ir in taken]))
            self._starts_with_scalars = o3.Irrep("0e") in taken
        for n, step in enumerate(self.steps):
            if (name := str(step.edges)) not in self.embeddings:
                radius = radii[step.edges]
                basis = (
                    InversePowers(num_basis - 1, radius) if self.preset == "strict" else BesselBasis(num_basis, radius)
                )
                self.embeddings[name] = EdgeEmbedding(self.lmax, basis, self.parity, self.softening)
            sends_again = any(self._source(later) == step.level for later in self.steps[n + 1 :])
            final = last_visit[step.level] == n and not sends_again
            most = highest if final and step.kind != "down" else self.lmax
            self.interactions.append(self._interaction(step, types, most))
            types[step.level] = _up_to(most, self.level_types[step.level])
        self._types = {level: irreps for level, irreps in types.items() if level in last_visit}
        types = self._types
        readout = LinearReadout if self.preset == "strict" else MLPReadout
        self.readouts = nn.ModuleDict({str(k): readout(types[k], self.irreps_out) for k in self._read_levels()})
        num_scalars = self.irreps_out.count(o3.Irrep("0e"))
        self.shift = nn.Parameter(torch.zeros(len(self.species), num_scalars)) if self._shifts() else None
        self.long_range = None
        if config is not None:
            self._atom_level = max((k for k in types if self._centred(k)), default=None)
            self._atom_step = next((s for s in self.steps if self._between_atoms(s)), None)
            irreps = None if self._atom_level is None else types[self._atom_level]
            functions = num_basis if self._atom_step else 0
            self.long_range = LongRange(config, self.scheme, len(self.species), irreps, functions)
        kernels = [getattr(module, "kernel", None) for module in self.modules()]
        compile_together(kernel.library for kernel in kernels if isinstance(kernel, _KERNELS))

    def _between_atoms(self, step: Step) -> bool:
        """Whether the edges of a step join parts that each represent one atom, in both directions."""
        return step.kind != "down" and self._centred(step.level) and self._centred(self._source(step))

    def _plan(self) -> list[Step]:
        """The order in which levels are visited."""
        pairs = [spec.pair_radius is not None for spec in self.scheme.levels]
        top = len(pairs) - 1 if self.readout == "root" else len(pairs) - 2
        passes = self.num_layers - 1 if pairs[0] else 0
        steps = [Step("pair", 0)] if pairs[0] else []
        for k in range(1, top + 1):
            steps += [Step("up", k)] + ([Step("pair", k)] if pairs[k] else [])
        # Shells need no way down: their lower levels are the same atoms with less context.
        if self.sweeps == "up-down" and pairs[0] and self.readout != "root":
            steps += [Step("down", k) for k in range(top - 1, -1, -1)]
        return steps + [Step("pair", 0)] * passes

    def _source(self, step: Step) -> int:
        return step.level + {"pair": 0, "up": -1, "down": 1}[step.kind]

    def _interaction(self, step: Step, types: dict[int, o3.Irreps], most: int) -> nn.Module:
        """The layer of a step, of which fragments up to degree ``most`` are kept; one for each group of channels."""
        source, groups = types.get(self._source(step)), channel_groups(self.level_types[step.level])
        if len(groups) == 1 and (source is None or len(channel_groups(source)) == 1):
            return self._layer(step, types, groups[0], most)
        layers = []
        for group in groups:
            lmax = max(ir.l for _, ir in group)
            entered = source and o3.Irreps([(group[0].mul, ir) for _, ir in _up_to(lmax, source)])
            layers.append(self._layer(step, types, group, most, entered))
        if len(layers) == 1:
            return layers[0]
        return ChannelGroups(nn.ModuleList(layers), [_up_to(most, group) for group in groups])

    def _layer(
        self, step: Step, types: dict[int, o3.Irreps], irreps: o3.Irreps, most: int, entered: o3.Irreps | None = None
    ) -> nn.Module:
        """The layer of a step for a type of one multiplicity."""
        config = InteractionConfig(
            num_species=len(self.species),
            num_basis=self.num_basis,
            correlation=self.correlation,
            parity=self.parity,
            practical=self.preset == "practical",
            gain=self._gain(),
        )
        neighbors = float(self.avg_num_neighbors.get(str(step.edges), _NUM_NEIGHBORS[step.edges.kind]))
        gate, source = self.gates.get(step.kind), types.get(self._source(step))
        if step.kind == "down":
            return one_gate(config, source, irreps, 1.0, gate, entered)
        return Interaction(
            config,
            irreps,
            source,
            types.get(step.level) if step.kind == "pair" else self._inherited(step, types),
            _up_to(most, irreps),
            entered=entered,
            source_has_species=self._centred(self._source(step)),
            target_has_species=self._centred(step.level),
            avg_num_neighbors=neighbors,
            gate=gate,
        )

    def _gain(self) -> float:
        """Initial size of products: repeated products must not overflow, in the strict preset without any norm."""
        depth = sum(step.kind != "down" for step in self.steps)
        return (1.0 if self.preset == "practical" else 0.01) * 2.0 / max(depth, 2)

    def _centred(self, level: int) -> bool:
        """Whether each part of a level represents one atom, in the order of the atoms."""
        return level < self.scheme.centred_levels

    def _inherited(self, step: Step, types: dict[int, o3.Irreps]) -> o3.Irreps | None:
        """A shell continues the state of the smaller shell around the same atom."""
        return types.get(step.level - 1) if self._centred(step.level) else None

    def _read_levels(self) -> list[int]:
        if self.readout == "root":
            return [len(self.scheme.levels) - 1]
        return [k for k in sorted(self._types) if self.readout == "sum" or self._centred(k)]

    def _shifts(self) -> bool:
        return self.readout == "sum" and self.irreps_out.count(o3.Irrep("0e")) == self.irreps_out.dim

    # ------------------------------------------------------------------ evaluation
    def forward(
        self,
        z: Integer[Tensor, " atoms"] | Data | System | Hierarchy | None,
        pos: Float[Tensor, "atoms 3"] | None = None,
        batch: Int[Tensor, " atoms"] | None = None,
        *,
        cell: Float[Tensor, "graphs 3 3"] | None = None,
        pbc: Tensor | None = None,
        topology: Topology | None = None,
        charge: Float[Tensor, " graphs"] | None = None,
        charges: Float[Tensor, " atoms"] | None = None,
        spin: Tensor | None = None,
        batch_size: int | None = None,
        x: Float[Tensor, "atoms components"] | None = None,
    ) -> Float[Tensor, " values *dim"]:
        """Value of each system: energies without those of isolated atoms, eV, or the target of ``irreps_out``.

        With the readout "nodes" it is the value of each atom, (atoms, dim).

        The first argument may also be a ``Data``, a ``Batch``, a :class:`~nbody_pyg.system.System`, or the result of
        :meth:`hierarchy`. A topology that a transform stored on the data is used; otherwise it is built.
        ``charge`` is the total charge of each graph, e (0 if it is not
        given), ``charges`` the formal charges of the atoms, if they are known, and ``spin`` the multiplicity 2S + 1 of
        each graph (1 if it is not given). ``batch_size`` is the number of graphs, needed if the last ones have no atoms
        (a Batch has it); the value of a graph without atoms is 0. ``x`` are the node inputs, if the network has them.
        """
        if isinstance(z, Hierarchy):
            return self.total(z)
        state = {"charge": charge, "charges": charges, "spin": spin}
        given = {"cell": cell, "pbc": pbc, "topology": topology, "batch_size": batch_size, **state}
        return self.total(self.hierarchy(z, pos, batch, x=x, **given))

    @property
    def used(self) -> frozenset[str]:
        """Which of charge and spin the value depends on: the inputs, and the given charge of long-range energies."""
        placed = self.long_range_config is not None and self.long_range_config.takes_charge
        return frozenset(self.inputs) | ({"charge"} if placed else set())

    @opaque_to_compile
    @in_own_precision
    def total(self, hierarchy: Hierarchy) -> Float[Tensor, " values *dim"]:
        """Value of each system of a hierarchy: the sum of those of its parts; see :meth:`values`.

        With the readout "nodes" the value of each atom: the sum over the levels.
        """
        values = self.values(hierarchy)
        if self.readout == "nodes":
            total = reduce(torch.add, values.values())
        else:
            sums = (sum_into(v, hierarchy[k].batch, hierarchy.num_graphs) for k, v in values.items())
            total = reduce(torch.add, sums)
        return total.squeeze(-1) if self.irreps_out.dim == 1 else total

    @opaque_to_compile
    @in_own_precision
    def hierarchy(
        self,
        z: Tensor | Data | System | None,
        pos: Tensor | None = None,
        batch: Tensor | None = None,
        **given: Any,
    ) -> Hierarchy:
        """The hierarchy that :meth:`forward` would use for these atoms; arguments as there."""
        if isinstance(pos, torch.fx.Proxy):
            raise TypeError("pos must be a tensor; torch.fx.symbolic_trace cannot follow a network, torch.export can")
        if z is None and self.species == (0,) and isinstance(pos, Tensor):
            z = no_elements(pos)
        x = given.pop("x", None)
        system = System.of(z, pos, batch, read=self.read, **given)
        system = self._with_node_inputs(system, system.x if x is None else x)
        if system.topology is None and not has_values(system.pos):
            raise RuntimeError(
                "neighbours are found from values of positions, which tracers, torch.vmap, fake and meta tensors lack; "
                "pass topology=net.scheme.topology(z, pos), or use nbody_pyg.runtime.compiled.compile_potential"
            )
        if not is_tracing():
            refuse_unused(self.used, self.assumed, {"charge": system.total_charge, "spin": system.spin})
        # Reports an unknown element before its mass is looked up
        system = system.replace(species=Species(self.species, self._species_index(system)))
        topology = self.scheme.compose(system) if system.topology is None else system.topology
        return self.scheme.place(topology, system.replace(pos=system.pos.double()), dtype=self.dtype)

    def read(self, data: Data, topology: Topology | None = None, batch_size: int | None = None) -> System:
        """The checked system of a Data or Batch, in the form that the network uses."""
        data = points(data) if self.species == (0,) else data
        require_atoms(data)
        refuse_unstated(data, self.inputs)
        system = self.scheme.system(data, topology, batch_size)
        return system if self.node_inputs is None else system.replace(x=data.get("x"))

    def _with_node_inputs(self, system: System, x: Any) -> System:
        """The system with its node inputs in the precision of the network.

        Raises: ValueError: inputs that are missing, of another shape, or that the network does not have.
        """
        if self.node_inputs is None:
            if x is not None:
                raise ValueError("x must be left out, since the network has no node_inputs; build one with node_inputs")
            return system
        wanted = (system.pos.shape[0], self.node_inputs.dim)
        if not isinstance(x, Tensor) or tuple(x.shape) != wanted or not x.is_floating_point():
            found = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x must be a floating tensor {list(wanted)}, the node inputs {self.node_inputs} of each atom in "
                f"mul_ir order, got {found}; set data.x, or pass x="
            )
        if has_values(x) and not bool(x.isfinite().all()):
            odd = (~x.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"x must be finite, but atom(s) {short(odd)} have NaN or infinite node inputs; correct data.x"
            )
        return system.replace(x=x.to(self.dtype))

    def states(self, hierarchy: Hierarchy) -> dict[int, Float[Tensor, "parts rows channels"]]:
        """State of every part, by level; levels that the network does not use are left out.

        A state whose fragments have several multiplicities has all its components as rows of one channel.
        """
        species = self._species_index(hierarchy.system)
        return self._states(hierarchy, species, {}, self._shares(hierarchy, species))

    def _shares(self, hierarchy: Hierarchy, species: Int[Tensor, " atoms"]) -> Float[Tensor, "atoms inputs"] | None:
        """Shares of the atoms in charge and spin, if the network has these inputs."""
        if self.electrons is None:
            return None
        system = hierarchy.system
        return self.electrons.shares(species, hierarchy[0].batch, system.total_charge, system.spin)

    def _states(
        self,
        hierarchy: Hierarchy,
        species: Int[Tensor, " atoms"],
        features: dict[tuple[EdgeSet, bool], EdgeFeatures],
        shares: Float[Tensor, "atoms inputs"] | None,
    ) -> dict[int, Tensor]:
        states: dict[int, Tensor] = {}
        if self.electrons is not None:
            states[0] = self.electrons(shares, species)
        if self.elements is not None:
            start = self.elements.index_select(0, species).unsqueeze(1)
            states[0] = states[0] + start if 0 in states else start
        if self.embed_nodes is not None:
            x = from_mul_ir(required(hierarchy.system.x), required(self.node_inputs))
            x = self.embed_nodes(x).view(x.shape[0], -1, states[0].shape[2])
            if self._starts_with_scalars:
                states[0] = add_to_scalars(x, states[0].squeeze(1))
            else:
                states[0] = torch.cat([states[0], x], dim=1)
        for step, interaction in zip(self.steps, self.interactions, strict=True):
            edges = self._edges(step, hierarchy, features)
            source = states.get(self._source(step))
            if step.kind == "down":
                sent = interaction(source, edges)
                if self.bound is not None:
                    sent = self.bound(checked_state(sent, interaction, edges.num_targets, self.level_types[step.level]))
                states[step.level] = states[step.level] + sent
                continue
            target = states.get(step.level)
            if step.kind == "up" and self._centred(step.level):
                target = states.get(step.level - 1)
            states[step.level] = interaction(
                source,
                target,
                edges,
                species if self._centred(self._source(step)) else None,
                species if self._centred(step.level) else None,
            )
        return {level: states[level] for level in self._types}

    def energies(self, hierarchy: Hierarchy) -> dict[int, Float[Tensor, " parts"]]:
        """Contribution of every part of every level to a scalar target; they sum to the value exactly."""
        return {k: value.squeeze(-1) for k, value in self.values(hierarchy).items()}

    def representations(self, data: Data) -> list[tuple[o3.Irreps, Tensor]]:
        """(type, states in e3nn's mul_ir layout) of every level in use, for tests of covariance."""
        states = self.states(self.hierarchy(data))
        return [(self._types[k], to_mul_ir(x.flatten(1), self._types[k])) for k, x in sorted(states.items())]

    def values(self, hierarchy: Hierarchy) -> dict[int, Float[Tensor, "parts dim"]]:
        """Value of every part of every level that has a readout, of type ``irreps_out``, weighted by g.

        With ``long_range`` the values of the atoms include the energy of the latent charges. Charges, spins and
        periodic images are those of the system of the hierarchy.
        """
        species = self._species_index(hierarchy.system)
        features: dict[tuple[EdgeSet, bool], EdgeFeatures] = {}
        shares = self._shares(hierarchy, species)
        states = self._states(hierarchy, species, features, shares)
        values = {}
        for name, readout in self.readouts.items():
            k = int(name)
            values[k] = readout(states[k]) * hierarchy[k].weight.unsqueeze(-1)
        if self.shift is not None:
            atoms = self.shift.index_select(0, species)
            if shares is not None and self.electrons is not None and self.electrons.offset is not None:
                atoms = atoms + self.electrons.energy(shares, species).unsqueeze(-1)
            values[0] = values[0] + atoms if 0 in values else atoms
        if self.long_range is not None:
            x = None if self._atom_level is None else states[self._atom_level]
            edges = None if self._atom_step is None else self._edges(self._atom_step, hierarchy, features)
            # Both use the learned weights of the elements, if there are any
            weight = None
            if self.electrons is not None and "charge" in self.electrons.inputs:
                weight = self.electrons.weight(species)[:, 0]
            level, system = hierarchy[0], hierarchy.system
            like = level.pos.to(self.dtype)
            given = (
                (system.total_charge, system.formal_charges) if self.long_range.config.takes_charge else (None, None)
            )
            share = charge_shares(level.batch, *given, like, weight)
            values[0] = values[0] + self.long_range(x, species, share, edges, hierarchy).unsqueeze(-1)
        return values

    def _edges(
        self, step: Step, hierarchy: Hierarchy, features: dict[tuple[EdgeSet, bool], EdgeFeatures]
    ) -> EdgeFeatures:
        """Edge features, computed once for equal edge sets; the way down reverses those of the way up."""
        edges = hierarchy.same.get(step.edges, step.edges)
        key = (edges, step.kind == "down")
        if key not in features:
            level = hierarchy[edges.level]
            index, vec, window = level.edges(edges.kind)
            if step.kind == "up" and level.pool_weight is not None:
                window = level.pool_weight
            if self.inner_cutoff is not None and self._between_atoms(step):
                limited = self.inner_cutoff(index, vec, self._species_index(hierarchy.system))
                if limited is not vec:
                    vec, window = limited, self.scheme.edge_window(edges, limited)
                    window = window * hierarchy.masks[edges] if edges in hierarchy.masks else window
            if step.kind == "down":
                index, vec = required(index).flip(0), -required(vec)
            features[key] = self.embeddings[str(step.edges)](index, vec, window, hierarchy[step.level].num_parts)
        return features[key]

    def check_species(self, z: Integer[Tensor, " atoms"]) -> Int[Tensor, " atoms"]:
        """Number of the element of each atom. Raises ValueError for an element that the network does not know."""
        return self._number(z)

    def _species_index(self, system: System) -> Int[Tensor, " atoms"]:
        """Number of the element of each atom, looked up unless the system has it."""
        known = system.index_among(self.species)
        return self._number(system.z) if known is None else known

    def _number(self, z: Tensor) -> Tensor:
        index = self.species_of[z.clamp(0, 119)]
        if has_values(index) and bool((index < 0).any()):
            unknown = sorted(set(z[index < 0].tolist()))
            names = ", ".join(f"{chemical_symbols[n] if 0 < n < 119 else 'no element'} ({n})" for n in unknown)
            known = ", ".join(chemical_symbols[n] for n in self.species)
            raise ValueError(f"z must hold elements of this model ({known}), got {names}; train a model with them")
        return index

    # ------------------------------------------------------------------ description
    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the weights. Vectors between atoms are cast to it, not positions."""
        return next(self.parameters()).dtype

    @classmethod
    def practical(cls, species: Sequence[int], scheme: Scheme | None = None, **arguments: Any) -> NBodyNet:
        """The preset for potentials: learned radial functions, residual states, a network in the readout."""
        return cls(species, scheme, preset="practical", **arguments)

    @classmethod
    def strict(cls, species: Sequence[int], scheme: Scheme | None = None, **arguments: Any) -> NBodyNet:
        """The paper's setting: polynomial in the states, inverse powers, no activation, no residual."""
        return cls(species, scheme, preset="strict", **arguments)

    def config(self) -> dict[str, Any]:
        """Everything that :meth:`from_config` needs, ready for JSON."""
        return {
            "species": list(self.species),
            "scheme": self.scheme.config(),
            **self._size,
            "correlation": self.correlation,
            "preset": self.preset,
            "irreps_out": str(self.irreps_out),
            "readout": self.readout,
            **({"gate": gate_names(self.gates)} if self.gates else {}),
            "num_layers": self.num_layers,
            "num_basis": self.num_basis,
            "parity": self.parity,
            "sweeps": self.sweeps,
            "avg_num_neighbors": self.avg_num_neighbors or None,
            "long_range": None if self.long_range_config is None else self.long_range_config.to_dict(),
            "inputs": list(self.inputs) or None,
            **({} if self.node_inputs is None else {"node_inputs": str(self.node_inputs)}),
            **({} if self.softening == SOFT_LENGTH else {"softening": self.softening}),
            **({} if self.inner_cutoff is None else {"inner_cutoff": self.inner_cutoff.lengths}),
        }

    def remade(self, **changes: Any) -> NBodyNet:
        """A network with the arguments of this one but for some changes, with fresh weights; it draws no global random
        numbers."""
        with torch.random.fork_rng(devices=[]):
            made = NBodyNet.from_config(self.config() | changes).to(self.species_of.device, self.dtype)
        made.assumed = dict(self.assumed)
        return made

    @property
    def has_neutral_form(self) -> bool:
        """Whether nothing but the inputs charge and spin gives the atoms initial states or depends on the charge."""
        return not self.gates and self.node_inputs is None and self.long_range is None

    def neutral(self) -> NBodyNet:
        """A network without the inputs charge and spin that has the values of this one for neutral singlets.

        There the :class:`~nbody_pyg.nn.electronic.ElectronicEmbedding` is zero, and so are all messages from it. The
        weights are copies. It is cheaper, and refuses charges.

        Raises: ValueError: a network in which these inputs are not the only initial states (own gates, node inputs), or
        with long-range energies, which depend on the charge (:attr:`has_neutral_form`).
        """
        if not self.has_neutral_form:
            what = "long-range energies" if self.long_range is not None else "gates of its own or node inputs"
            raise ValueError(
                f"network must have no other inputs than charge and spin, but it has {what}; use it as it is"
            )
        made, given = self.remade(inputs=None), self.state_dict()
        made.load_state_dict({name: given[name] for name in made.state_dict()})
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NBodyNet:
        """Build the network that :meth:`config` described, with fresh weights."""
        arguments = dict(config)
        return cls(arguments.pop("species"), Scheme.from_config(arguments.pop("scheme")), **arguments)

    def __repr__(self) -> str:
        names = " ".join(chemical_symbols[n] for n in self.species)
        size = sum(p.numel() for p in self.parameters())
        types = " / ".join(dict.fromkeys(map(str, self.level_types.values())))
        return f"NBodyNet({names}, {self.scheme!r}, {self.preset}, {types} -> {self.irreps_out}, {size} parameters)"


def network_arguments() -> dict[str, Any]:
    """Arguments of :class:`NBodyNet` below its presets, and their defaults.

    A user's gate is a class, which a configuration cannot hold, and not among them; neither are node inputs, which
    frames of atoms do not have.
    """
    hidden = {"species", "scheme", "preset", "gate", "node_inputs"}
    known = list(inspect.signature(NBodyNet.__init__).parameters.values())[1:]
    return {one.name: one.default for one in known if one.name not in hidden}


def compute_avg_num_neighbors(scheme: Scheme, frames: Iterable[Data]) -> dict[str, float]:
    """Mean number of sources per target of every edge set over some frames, as a network takes it."""
    edges: dict[str, int] = {}
    targets: dict[str, int] = {}
    for frame in frames:
        topology = scheme.read(frame if has_hierarchy(frame) else scheme(frame))
        for k in range(topology.num_levels):
            for kind in ("child", "pair"):
                index, _ = topology.edges(kind, k)
                if index is not None:
                    name = str(EdgeSet(kind, k))
                    edges[name] = edges.get(name, 0) + index.shape[1]
                    targets[name] = targets.get(name, 0) + topology.size(k)
    return {name: max(edges[name] / targets[name], 1.0) for name in edges}


edge_degrees = former("edge_degrees", compute_avg_num_neighbors)


def _up_to(lmax: int, irreps: o3.Irreps) -> o3.Irreps:
    """The fragments up to a degree."""
    return o3.Irreps([(mul, ir) for mul, ir in irreps if ir.l <= lmax])


def _whole(name: str, value: Any) -> int:
    """An argument that is a count. Raises: ValueError: it is not a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _check_species(species: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted({int(n) for n in species}))
    if not found or found[0] < 0 or found[-1] > 118:
        raise ValueError(
            f"species must be atomic numbers between 1 and 118 (or 0 for points), got {list(species)}; e.g. [1, 6, 8]"
        )
    return found
