"""From energy to forces, stress and Hessian products: the only module that calls ``autograd.grad``."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from ase.data import atomic_numbers, chemical_symbols
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.data import complete_states, has_hierarchy, require_atoms
from nbody_pyg.geometry import apply_strain, edge_vectors, neighbour_list, rounded_positions
from nbody_pyg.hierarchy.levels import Hierarchy
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.kernels.scope import has_values, in_own_precision, opaque_to_compile
from nbody_pyg.models import NBodyNet
from nbody_pyg.nn.charges import refuse_unused
from nbody_pyg.nn.exact import Float64Buffers
from nbody_pyg.nn.irreps import reset
from nbody_pyg.nn.repulsion import ZBLRepulsion, short_edges
from nbody_pyg.system import DEFAULT_STATE, System, spin_multiplicity, total_charge

#: Arguments that a model's forward may have beside z, pos and batch.
MODEL_INPUTS = ("cell", "pbc", "topology", "charge", "charges", "spin", "batch_size")


class AtomicReference(Float64Buffers):
    r"""Energies of isolated atoms, summed per graph in float64.

    .. math:: E^{ref}_b = \sum_{i \in b} E_0(z_i)

    ==============  =======================  ==================
    symbol          code                     shape, unit
    ==============  =======================  ==================
    :math:`E_0`     ``values``               [num_species], eV
    :math:`z`       ``numbers``              [num_species]
    ==============  =======================  ==================

    Args:
        energies: one energy (eV) for each element, by atomic number or symbol: ``{1: -13.6, "O": -2041.8}``.

    Raises:
        ValueError: no element, an unknown symbol, an element given twice, an energy that is not finite; when
            called, an element without a reference energy.

    Example:
        >>> AtomicReference({"H": -13.6, 8: -2041.8})
        AtomicReference(H=-13.6, O=-2041.8 eV)
    """

    _float64 = ("values",)

    def __init__(self, energies: Mapping[int | str, float]) -> None:
        super().__init__()
        if not energies:
            raise ValueError("energies must name at least one element, got none; pass e.g. {'H': -13.6}")
        table: dict[int, float] = {}
        for key, value in energies.items():
            number = _atomic_number(key)
            if number in table:
                raise ValueError(f"energies names {chemical_symbols[number]} twice; keep one of the entries")
            if not math.isfinite(float(value)):
                raise ValueError(f"energies[{key!r}] must be finite (eV), got {value!r}")
            table[number] = float(value)
        numbers = sorted(table)
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.long))
        self.register_buffer("values", torch.tensor([table[n] for n in numbers], dtype=torch.float64))

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that have a reference energy, ascending."""
        return tuple(self.numbers.tolist())

    @property
    def energies(self) -> dict[int, float]:
        """Atomic number to energy (eV), in full precision."""
        return dict(zip(self.numbers.tolist(), self.values.tolist(), strict=True))

    def forward(self, system: System) -> Float[Tensor, " graphs"]:
        """Sum of the reference energies of each graph, float64."""
        return self.energy(system)

    def energy(self, system: System) -> Float[Tensor, " graphs"]:
        """Sum of the reference energies of each graph, float64."""
        energies = self.atoms(system)
        return energies.new_zeros(system.num_graphs).index_add(0, system.batch, energies)

    def atoms(self, system: System) -> Float[Tensor, " atoms"]:
        """Reference energy of each atom, float64."""
        z, known = system.z, system.species
        if known is not None and known.elements == self.species:
            return self.values[known.index]
        slot = torch.searchsorted(self.numbers, z).clamp(max=len(self.numbers) - 1)
        unknown = self.numbers[slot] != z
        if bool(unknown.any()):
            missing = sorted(set(z[unknown].tolist()))
            raise ValueError(
                f"z holds {_elements(missing)} without a reference energy; known are "
                f"{_elements(self.species)}: give E0 of the missing element, or leave these systems out"
            )
        return self.values[slot]

    def extra_repr(self) -> str:
        parts = ", ".join(f"{chemical_symbols[n]}={e:g}" for n, e in self.energies.items())
        return f"{parts} eV"


def _atomic_number(key: int | str) -> int:
    if isinstance(key, str) and not key.isdigit():
        if key not in atomic_numbers:
            raise ValueError(f"energies names {key!r}, which is no element symbol; use e.g. 'O' or 8")
        return atomic_numbers[key]
    number = int(key)
    if not 0 < number < len(chemical_symbols):
        raise ValueError(f"energies names atomic number {number}, which must lie in 1..118")
    return number


def _elements(numbers: Iterable[int]) -> str:
    def symbol(n: int) -> str:
        return chemical_symbols[n] if 0 < n < len(chemical_symbols) else "no element"

    return ", ".join(f"{symbol(n)} ({n})" for n in numbers)


class EnergyParts(NamedTuple):
    """An energy taken apart; everything sums to the energy of the potential.

    ===============  ==========================  ============================================================
    field            shape, unit                 meaning
    ===============  ==========================  ============================================================
    ``hierarchy``                                positions and members of the parts
    ``levels``       {level: [num_parts]}, eV    interaction energy that the network reads off each part
    ``repulsion``    [num_atoms], eV             half of the repulsion of each of the atom's close pairs
    ``reference``    [num_atoms], eV             energy of the isolated atom
    ===============  ==========================  ============================================================

    float64. With a network in float64 the sum is exact to round-off; with one in float32 it differs by the
    rounding of its own sum.
    """

    hierarchy: Hierarchy
    levels: dict[int, Tensor]
    repulsion: Tensor
    reference: Tensor

    def total(self) -> Float[Tensor, " graphs"]:
        """Energy of each system."""
        graphs = self.hierarchy.num_graphs
        whole = self.reference.new_zeros(graphs).index_add(0, self.hierarchy[0].batch, self.reference + self.repulsion)
        for k, values in self.levels.items():
            whole = whole.index_add(0, self.hierarchy[k].batch, values)
        return whole


class Potential(Float64Buffers):
    r"""Energy, forces and stress of any model that returns one energy per graph.

    .. math::
        E = \sum_i E_0(z_i) + s\, E_\theta(z, r) + \sum_{i<j} V_{z_i z_j}(r_{ij}), \qquad
        F_i = -\frac{\partial E}{\partial r_i}, \qquad
        \sigma = \frac{1}{V}
            \Big[\frac{\partial}{\partial \epsilon} E(r(1+\epsilon), C(1+\epsilon))\Big]_{\epsilon=0}

    with a symmetric strain; the sign of the stress is ASE's (positive when the system pulls inwards). V is the
    repulsion of nuclei nearer than a bond, :class:`~nbody_pyg.nn.repulsion.ZBLRepulsion`.

    ========================  =======================  =====================================================
    key of the result         shape, unit              dtype
    ========================  =======================  =====================================================
    ``energy``                [num_graphs], eV         float64; E_0 is added in float64
    ``interaction_energy``    [num_graphs], eV         that of the model; without E_0
    ``forces``                [num_atoms, 3], eV/A     that of the model; zeros where nothing interacts
    ``stress``                [num_graphs, 3, 3],      that of the model; only with ``compute_stress``
                              eV/A^3
    ========================  =======================  =====================================================

    Args:
        model: ``model(z, pos, batch)`` returning [num_graphs] or [num_graphs, 1], or a tuple that starts with
            it, as PyG's SchNet, DimeNet++ and ViSNet do. Arguments named ``cell``, ``pbc``,
            ``topology``, ``charge``, ``charges`` and ``spin`` are filled when the model's forward has them.
        reference: energies of the isolated atoms, as a module or as the dict that makes one, or None.
        scale: multiplies the output of the model.
        repulsion: "zbl", a repulsion of one's own, or None; "auto" is "zbl" for an :class:`NBodyNet` of the
            practical preset that gives energies, and None for every other model. Training takes the reach of the
            repulsion from its frames: ``ZBLRepulsion.from_frames``.

    Positions come in any floating dtype. An :class:`NBodyNet` subtracts them in float64 and rounds the vectors, so that
    its results do not depend on where a system lies. Any other model subtracts by itself: where its weights are
    narrower than the positions it is given them from the mean of each graph, which changes nothing for a model that
    knows no place in space.

    Smoothness: that of the model; the repulsion has two continuous derivatives where it ends.
    Cost: one forward and one backward pass of the model; forces and stress share the backward pass.

    Raises:
        TypeError, ValueError: see :meth:`forward`.
    """

    _float64 = ("scale",)

    def __init__(
        self,
        model: nn.Module,
        reference: AtomicReference | Mapping[int | str, float] | None = None,
        scale: float = 1.0,
        repulsion: ZBLRepulsion | str | None = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, Potential):
            raise TypeError("model is already a Potential; pass its .model, or use it as it is")
        if isinstance(reference, Mapping):
            reference = AtomicReference(reference)
        if reference is not None and not isinstance(reference, AtomicReference):
            raise TypeError(f"reference must be an AtomicReference, a dict or None, got {type(reference).__name__}")
        if not math.isfinite(float(scale)) or float(scale) == 0.0:
            raise ValueError(f"scale must be finite and not zero, got {scale!r}; 1.0 leaves the model as it is")
        self.model = model
        self.reference = reference
        self.repulsion = _repulsion(repulsion, model)
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float64))
        self._keywords = model_keywords(model)
        self._own = isinstance(model, NBodyNet)

    def reset_parameters(self) -> None:
        """Draw the weights of the model anew. Reference energies, scale and repulsion are of the data, and stay."""
        reset(self.model)

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating dtype of the model's parameters (or buffers); None when it has neither."""
        # A chain, not a tuple: the first weight decides, and this runs at every step.
        for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return None

    @opaque_to_compile
    @in_own_precision
    def forward(
        self,
        z: Integer[Tensor, " atoms"] | Data | System,
        pos: Float[Tensor, "atoms 3"] | None = None,
        batch: Int[Tensor, " atoms"] | None = None,
        *,
        cell: Float[Tensor, "*graphs 3 3"] | None = None,
        pbc: Bool[Tensor, "*graphs 3"] | bool | None = None,
        topology: Topology | None = None,
        charge: Float[Tensor, " graphs"] | None = None,
        charges: Float[Tensor, " atoms"] | None = None,
        spin: Tensor | None = None,
        batch_size: int | None = None,
        compute_forces: bool = True,
        compute_stress: bool = False,
        training: bool = False,
    ) -> dict[str, Tensor]:
        """Evaluate atoms given as tensors, or as a PyG ``Data`` or ``Batch`` in the first argument, or as a System.

        Works inside ``torch.no_grad()``. A topology that the model's scheme stored on the data is used.

        Args:
            charge: total charge of each graph, e; None is neutral, or what the model was trained at.
            charges: formal charges of the atoms, e; of models that take none only their sum counts.
            spin: multiplicity 2S + 1 of each graph; None is a singlet, or what the model was trained at.
            batch_size: number of graphs, where the last ones may hold no atom (a Batch knows it). The energy of a graph
                without atoms is 0.
            compute_forces: add ``forces``.
            compute_stress: add ``stress``; needs a periodic cell.
            training: keep the graph of every result, so that a loss on forces can be differentiated again.
                Without it, results are detached and memory is that of one backward pass.

        Raises:
            TypeError: z or batch not integer, pos not floating, pos given beside a Data.
            ValueError: wrong shapes, lengths that differ, NaN positions, batch not sorted, an element without
                a reference energy, a periodic cell with a model that has no ``cell`` argument, a charge or spin that
                the model cannot use, stress without a cell, an output that is not one energy per graph.
            RuntimeError: forces or stress under ``torch.inference_mode()``.
        """
        state = {"charge": charge, "charges": charges, "spin": spin}
        given = {"cell": cell, "pbc": pbc, "topology": topology, "batch_size": batch_size, **state}
        system = self.system(z, pos, batch, **given)
        dtype = self.dtype or system.pos.dtype
        derivative = compute_forces or compute_stress
        if derivative:
            _refuse_modes()
        with torch.set_grad_enabled(derivative or (training and torch.is_grad_enabled())):
            # The repulsion has no weights: unless the caller goes on to differentiate by positions, its forces
            # need no graph, and a loss on them no second backward pass.
            follow = training and system.pos.requires_grad
            if derivative and not system.pos.requires_grad:
                system = system.replace(pos=system.pos.detach().requires_grad_(True))
            inputs, moved = [system.pos], system
            if compute_stress:
                strain, volume = self._strain(system)
                inputs.append(strain)
                moved = system.strained(strain)
            interaction, place = self._interaction(moved, repel=follow)
            results = {"interaction_energy": interaction}
            if derivative:
                gradients = _gradient(interaction.sum(), inputs, create_graph=training)
                if compute_forces:
                    results["forces"] = -gradients[0].to(dtype)
                if compute_stress:
                    results["stress"] = (gradients[1] / volume.reshape(-1, 1, 1)).to(dtype)
            if not follow:
                self.add_repulsion(results, place)
            results["energy"] = self._with_reference(results["interaction_energy"], place)
        return results if training else {key: value.detach() for key, value in results.items()}

    def _with_reference(self, interaction: Tensor, place: System | Hierarchy) -> Float[Tensor, " graphs"]:
        """Interaction energies and those of the isolated atoms, float64."""
        energy = interaction.to(torch.float64)
        if self.reference is not None:
            energy = energy + self.reference.energy(place.system if isinstance(place, Hierarchy) else place)
        return energy

    @torch.no_grad()
    def energies(
        self,
        z: Integer[Tensor, " atoms"] | Data | System,
        pos: Float[Tensor, "atoms 3"] | None = None,
        batch: Int[Tensor, " atoms"] | None = None,
        **given: Any,
    ) -> EnergyParts:
        """What each part of the hierarchy contributes to the energy; see :class:`EnergyParts`.

        Args:
            given: cell, pbc, topology, charge, charges, spin and batch_size, as for :meth:`forward`.

        Raises: ValueError: a model that does not say, such as one that is not an :class:`NBodyNet`.
        """
        if not hasattr(self.model, "hierarchy") or not hasattr(self.model, "energies"):
            raise ValueError(
                f"{type(self.model).__name__} gives one energy per system and nothing below it; energies of parts "
                "need a model with hierarchy() and energies(), such as NBodyNet"
            )
        system = self.system(z, pos, batch, **given)
        hierarchy = self.model.hierarchy(system)
        system = hierarchy.system
        found = self.model.energies(hierarchy)
        levels = {k: (value * self.scale.to(value.dtype)).double() for k, value in found.items()}
        repulsion = reference = torch.zeros(len(system.z), dtype=torch.float64, device=system.z.device)
        if self.repulsion is not None:
            index, vec = self._short_edges(hierarchy)
            repulsion = self.repulsion.energy(system, index, vec.to(self.dtype or vec.dtype)).double()
        if self.reference is not None:
            reference = self.reference.atoms(system)
        return EnergyParts(hierarchy, levels, repulsion, reference)

    def hessian_vector_product(
        self,
        vector: Float[Tensor, "atoms 3"],
        z: Tensor | Data | System,
        pos: Tensor | None = None,
        batch: Tensor | None = None,
        **given: Any,
    ) -> Float[Tensor, "atoms 3"]:
        r"""Product of the Hessian with a displacement.

        .. math:: (H v)_i = \sum_j \frac{\partial^2 E}{\partial r_i \partial r_j} v_j

        Costs about two evaluations of the forces, whatever the number of atoms. Unit: eV/A^2 times that of
        ``vector``.

        Args:
            given: cell, pbc, topology, charge, charges, spin and batch_size, as for :meth:`forward`.
        """
        _refuse_modes()
        system = self.system(z, pos, batch, **given)
        if vector.shape != system.pos.shape:
            raise ValueError(f"vector must have the shape of pos {list(system.pos.shape)}, got {list(vector.shape)}")
        with torch.enable_grad():
            pos, slope = self._slope(system)
            (product,) = _gradient((slope * vector.to(slope.dtype)).sum(), [pos], create_graph=False)
        return product.detach().to(self.dtype or pos.dtype)

    def _slope(self, system: System) -> tuple[Tensor, Tensor]:
        """Positions, and the derivative of the energy by them, to be differentiated again."""
        pos = system.pos.detach().requires_grad_(True)
        interaction, _ = self._interaction(system.replace(pos=pos), repel=True)
        return pos, _gradient(interaction.sum(), [pos], create_graph=True)[0]

    def hessian(
        self, z: Tensor | Data | System, pos: Tensor | None = None, **given: Any
    ) -> Float[Tensor, "coordinates coordinates"]:
        """Second derivatives of the energy of one system, [3 num_atoms, 3 num_atoms], eV/A^2.

        Built row by row from one graph: memory of a force evaluation with its graph, not of 3N of them.

        Args:
            given: cell, pbc, topology, charge, charges and spin, as for :meth:`forward`.
        """
        _refuse_modes()
        system = self.system(z, pos, **given)
        if system.num_graphs != 1:
            raise ValueError(
                f"hessian takes one system, got a batch of {system.num_graphs}; loop over the graphs, or "
                "use hessian_vector_product, which takes batches"
            )
        with torch.enable_grad():
            pos, slope = self._slope(system)
            rows = [_gradient(s, [pos], create_graph=False, retain_graph=True)[0] for s in slope.flatten()]
        return torch.stack(rows).reshape(pos.numel(), pos.numel()).detach().to(self.dtype or pos.dtype)

    # ----------------------------------------------------------------------------------------------
    def system(
        self, z: Tensor | Data | System, pos: Tensor | None = None, batch: Tensor | None = None, **given: Any
    ) -> System:
        """The checked system of a call, with what the model uses of charge and spin; nothing is differentiated here.

        Args:
            given: cell, pbc, topology, charge, charges, spin and batch_size, as for :meth:`forward`.
        """
        system = System.of(z, pos, batch, read=self.model.read if self._own else self._read, **given)
        if not has_values(system.pos):
            raise RuntimeError(
                "a potential looks at values of positions and differentiates by them, which tracers, torch.vmap, fake "
                "and meta tensors do not allow; trace its model with topology=..., or use accelerate.compile_potential"
            )
        stated = isinstance(z, (System, Data)) or given.get("batch_size") is not None
        if system.num_graphs == 0 or (len(system.z) == 0 and not stated):
            raise ValueError("z holds no atom; give at least one, or batch_size, the number of graphs without atoms")
        if system.pbc is not None and "cell" not in self._keywords:
            raise ValueError(
                f"{type(self.model).__name__} has no argument 'cell', so it cannot treat a periodic system; "
                "set pbc to False for molecules, or use a model with forward(z, pos, batch, *, cell, pbc)"
            )
        system = known_state(self.model, self._keywords, _usable(system))
        if self._own and system.pos.dtype != torch.float64:
            system = system.replace(pos=system.pos.double())  # the model subtracts before it rounds
        if system.given and system.topology is None and "topology" in self._keywords:
            system = system.replace(topology=self.model.scheme.compose(system))  # of bonds or labels of the data
        return system

    def _read(self, data: Data, topology: Topology | None = None, batch_size: int | None = None) -> System:
        """The system of a Data, with the topology stored there where the model takes one."""
        scheme = getattr(self.model, "scheme", None)
        if topology is not None or "topology" not in self._keywords:
            return System.from_data(data, topology, batch_size)
        if scheme is not None:  # it refuses what another scheme has stored
            return scheme.system(data, None, batch_size)
        require_atoms(data)
        return System.from_data(data, Topology.from_data(data) if has_hierarchy(data) else None, batch_size)

    def _strain(self, system: System) -> tuple[Tensor, Tensor]:
        """A strain of zero for each graph, and the volumes."""
        volume = None if system.cell is None else torch.linalg.det(system.cell.detach().double()).abs()
        if volume is None or bool((volume <= 1e-8).any()):
            raise ValueError(
                "compute_stress needs a periodic cell with a volume for every graph; give cell and pbc "
                "(three independent lattice vectors, also for slabs), or set compute_stress=False"
            )
        strain = system.pos.new_zeros(system.num_graphs, 3, 3).requires_grad_(True)
        return strain, volume.to(system.pos.dtype)

    def _interaction(self, system: System, repel: bool) -> tuple[Tensor, System | Hierarchy]:
        """Scaled output of the model, [num_graphs], and where the atoms are for the terms that are added to it.

        With ``repel`` it holds the repulsion, and is differentiable as a whole.
        """
        place: System | Hierarchy = self.model.hierarchy(system) if self._own else system
        output = self.model(place) if self._own else self._foreign(system)
        num_graphs = system.num_graphs
        if isinstance(output, (tuple, list)):
            output = output[0]
        short = isinstance(output, Tensor) and output.dim() > 0 and output.shape[0] < num_graphs
        if short and output.shape[0] == (int(system.batch[-1]) + 1 if len(system.batch) else 0):
            # Other models see no graph beyond that of the last atom
            output = torch.cat([output, output.new_zeros(num_graphs - output.shape[0], *output.shape[1:])])
        if not isinstance(output, Tensor) or output.shape not in ((num_graphs,), (num_graphs, 1)):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.model).__name__} must return one energy per graph, [{num_graphs}] or "
                f"[{num_graphs}, 1], got {shape}; sum the atoms of each graph with its batch vector"
            )
        interaction = output.reshape(num_graphs) * self.scale.to(output.dtype)
        if repel and self.repulsion is not None:
            index, vec = self._short_edges(place)
            energy = self.repulsion.energy(system, index, vec.to(interaction.dtype))
            interaction = interaction.index_add(0, system.batch, energy)
        return interaction, place

    def _foreign(self, system: System) -> Any:
        """Output of a model of another kind, in whose precision it gets all numbers."""
        dtype, pos = self.dtype or system.pos.dtype, system.pos
        if self.dtype is not None:
            pos = rounded_positions(pos, system.batch, dtype)

        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(dtype)

        given = {
            "cell": cast(system.cell),
            "pbc": system.pbc,
            "topology": system.topology,
            "charge": cast(system.total_charge),
            "charges": cast(system.formal_charges),
            "spin": cast(system.spin),
            "batch_size": system.num_graphs,
        }
        keywords = {k: v for k, v in given.items() if v is not None and k in self._keywords}
        return self.model(system.z, pos, system.batch, **keywords)

    def _short_edges(self, place: System | Hierarchy) -> tuple[Tensor, Tensor]:
        """Edges with every pair within reach of the repulsion, and vectors: those at hand, or a list of its own."""
        system = place.system if isinstance(place, Hierarchy) else place
        held = short_edges(getattr(self.model, "scheme", None), self.repulsion.longest)
        if held is not None:
            kind, level = held
            if isinstance(place, Hierarchy):
                return getattr(place[level], f"{kind}_index"), getattr(place[level], f"{kind}_vec")
            if system.topology is not None:
                names = (f"{kind}_index", f"{kind}_shift")
                index, shift = (getattr(system.topology, name)[level] for name in names)
                return index, edge_vectors(system.pos, index, shift, system.cell, system.batch)
        still = system.detached()
        index, shift = neighbour_list(still.pos, self.repulsion.longest, still.batch, still.cell, still.pbc)
        return index, edge_vectors(system.pos, index, shift, system.cell, system.batch)

    @torch.no_grad()
    def add_repulsion(self, results: dict[str, Tensor], place: System | Hierarchy) -> None:
        """Add the repulsion to the results of the model on a checked system, by its explicit derivative, in place."""
        if self.repulsion is None:
            return
        system = place.system if isinstance(place, Hierarchy) else place
        index, vec = self._short_edges(place)
        energy = results["interaction_energy"]
        near = self.repulsion.contacts(system, index, vec.to(energy.dtype))
        if near.energy.shape[0] == 0:
            return
        target, batch = near.index[1], system.batch
        pull = near.slope.unsqueeze(-1) * near.vec / near.vec.norm(dim=-1, keepdim=True)
        with torch.enable_grad():  # the part of the model keeps its graph
            results["interaction_energy"] = energy.index_add(0, batch[target], 0.5 * near.energy)
            if "forces" in results:
                results["forces"] = results["forces"].index_add(0, target, pull)
        if "stress" in results:
            virial = torch.einsum("ea,eb->eab", 0.5 * pull, near.vec)
            volume = torch.linalg.det(system.cell.double()).abs().to(energy.dtype).reshape(-1, 1, 1)
            stress = torch.zeros_like(results["stress"]).index_add(0, batch[target], virial) / volume
            with torch.enable_grad():
                results["stress"] = results["stress"] + stress


def model_keywords(model: nn.Module) -> frozenset[str]:
    """Which of :data:`MODEL_INPUTS` the forward of a model takes."""
    names = inspect.signature(model.forward).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    return frozenset(k for k in MODEL_INPUTS if k in names or (free and k != "batch_size"))


def used_state(model: nn.Module, keywords: frozenset[str] | None = None) -> frozenset[str]:
    """Which of charge and spin a model depends on: an :class:`NBodyNet` says so, of others their arguments do."""
    if isinstance(model, NBodyNet):
        return model.used
    keywords = model_keywords(model) if keywords is None else keywords
    return frozenset(key for key in ("charge", "spin") if key in keywords)


def known_state(model: nn.Module, keywords: frozenset[str], system: System) -> System:
    """The system with what the model uses of its charge and spin.

    Raises: ValueError: a state that the model cannot use and was not trained at.
    """
    charge, spin = system.total_charge, system.spin
    if charge is None and spin is None:
        return system
    used = used_state(model, keywords)
    refuse_unused(used, getattr(model, "assumed", {}), {"charge": charge, "spin": spin})
    return system.replace(
        total_charge=charge if "charge" in used else None,
        formal_charges=system.formal_charges if "charge" in used and "charges" in keywords else None,
        spin=spin if "spin" in used else None,
    )


def check_states(model: nn.Module, frames: Iterable[Data], name: str = "frames") -> None:
    """Raise unless the model knows charge and spin of every frame.

    Raises: ValueError: a state that cannot be, or that the model cannot use and was not trained at, naming the frame.
    """
    used, assumed = used_state(model), getattr(model, "assumed", {})
    for number, frame in enumerate(frames):
        try:
            refuse_unused(used, assumed, _state_of(frame))
        except ValueError as error:
            raise ValueError(f"frame {number} of {name}: {error}") from None


def model_frames(model: nn.Module, frames: Sequence[Data], name: str = "frames") -> Sequence[Data]:
    """The frames with those of the keys ``charge``, ``charges`` and ``spin`` that the model uses, in all or in none.

    Raises: ValueError: as for :func:`check_states`.
    """
    check_states(model, frames, name)
    given, used = frames, used_state(model)
    kept = used | ({"charges"} if "charge" in used and "charges" in model_keywords(model) else set())
    dropped = [key for key in ("charge", "charges", "spin") if key not in kept]
    if any(frame.get(key) is not None for frame in frames for key in dropped):
        frames = [copy.copy(frame) for frame in frames]
        for frame in frames:
            if "charges" in dropped and "charge" in kept and frame.get("charge") is None and "charges" in frame:
                frame.charge = frame.charges.double().sum().reshape(1)
            for key in dropped:
                if key in frame:
                    del frame[key]
    frames = complete_states(frames, model.inputs if isinstance(model, NBodyNet) else ())
    # Frames of a file stay so: messages name the file and the numbers in it
    return given.replaced(frames) if frames is not given and hasattr(given, "replaced") else frames


def _state_of(frame: Data) -> dict[str, Tensor | None]:
    """Charge and spin of one frame, checked, float64; None for what it does not say."""
    charge, charges, spin = (frame.get(key) for key in ("charge", "charges", "spin"))
    like, batch = torch.zeros(0, dtype=torch.float64), torch.zeros(len(frame.z), dtype=torch.long)
    return {"charge": total_charge(batch, 1, charge, charges, like), "spin": spin_multiplicity(spin, 1, like)}


def frame_states(frames: Iterable[Data]) -> dict[str, list[float]]:
    """Charge and spin of every frame, each only where some frame says it; the others are neutral, or singlets.

    Raises: ValueError: a wrong number of values, or one that cannot be.
    """
    found: dict[str, list[float]] = {}
    for number, frame in enumerate(frames):
        try:
            state = _state_of(frame)
        except ValueError as error:
            raise ValueError(f"frame {number}: {error}") from None
        for key, value in state.items():
            if value is not None:
                # A sum of thirds is whole
                found.setdefault(key, [DEFAULT_STATE[key]] * number).append(round(float(value), 6))
        for key, values in found.items():
            if len(values) == number:
                values.append(DEFAULT_STATE[key])
    return found


def learn_state(model: nn.Module, frames: Iterable[Data]) -> None:
    """Check that a model can be trained on the charges and spins of some frames, and keep as ``model.assumed`` what all
    of them have and the model has no input for.

    Raises: ValueError: frames that differ in what the model has no input for, naming two of them.
    """
    used, assumed = used_state(model), dict(getattr(model, "assumed", {}))
    for key, values in frame_states(frames).items():
        odd = next((n for n, value in enumerate(values) if value != values[0]), None)
        if key not in used and odd is not None:
            raise ValueError(
                f"{key} must be the same in all training frames, for the model has no input for it, got "
                f"{values[0]:g} in frame 0 and {values[odd]:g} in frame {odd}; build an NBodyNet with inputs=[{key!r}] "
                "(`nbody train` does so by itself), or train on frames of one kind"
            )
        assumed.pop(key, None)
        if key not in used and values[0] != DEFAULT_STATE[key]:
            assumed[key] = values[0]
    model.assumed = assumed


def _repulsion(repulsion: ZBLRepulsion | str | None, model: nn.Module) -> ZBLRepulsion | None:
    if repulsion == "auto":
        energies = str(getattr(model, "irreps_out", "")) == "1x0e" and getattr(model, "target", "") == "extensive"
        repulsion = "zbl" if energies and getattr(model, "preset", "") == "practical" else None
    if repulsion == "zbl":
        species = getattr(model, "species", None)
        if species is None:
            raise ValueError(
                f"repulsion 'zbl' needs the elements, which {type(model).__name__} does not name in an attribute "
                "'species'; pass ZBLRepulsion([1, 6, 8]) with yours"
            )
        return ZBLRepulsion(species)
    if repulsion is not None and not isinstance(repulsion, ZBLRepulsion):
        raise ValueError(f"repulsion must be 'auto', 'zbl', None or a ZBLRepulsion, got {repulsion!r}")
    return repulsion


def derivatives(
    energy: Callable[[Tensor, Tensor | None], Tensor],
    pos: Tensor,
    cell: Tensor | None,
    batch: Tensor,
    stress: bool,
    create_graph: bool,
) -> list[Tensor]:
    """Energies, forces and, where asked for, stress of ``energy(pos, cell)``; asks for no value: it can be traced."""
    with torch.enable_grad():
        pos = pos.detach().requires_grad_(True)
        inputs = [pos]
        if stress:
            inputs.append(torch.zeros_like(cell).requires_grad_(True))
            moved, bent = apply_strain(pos, cell, batch, inputs[1])
        value = energy(moved, bent) if stress else energy(pos, cell)
        slopes = _gradient(value.sum(), inputs, create_graph=create_graph)
    found = [value, -slopes[0].to(value.dtype)]
    if stress:
        # The triple product: a decomposition of the cell may wait for the GPU
        volume = (cell[:, 0] * torch.linalg.cross(cell[:, 1], cell[:, 2])).sum(dim=-1).abs()
        found.append((slopes[1] / volume.reshape(-1, 1, 1)).to(value.dtype))
    return found


def parameter_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss; unlike ``loss.backward()`` it leaves ``.grad`` alone and calls no hook."""
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)


def _gradient(
    value: Tensor, inputs: list[Tensor], create_graph: bool, retain_graph: bool | None = None
) -> tuple[Tensor, ...]:
    """Derivative of a scalar; zeros, not None, where it does not depend on an input (an atom on its own)."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(
        value,
        inputs,
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        materialize_grads=True,
    )


def _refuse_modes() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "forces and stress need derivatives, which torch.inference_mode() forbids for good; use "
            "torch.no_grad() instead (with Lightning, inference_mode=False in its Trainer)"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a potential differentiates by itself, which does not work inside torch.func; transform its model instead, "
            "or use training=True and backward(), hessian() or hessian_vector_product()"
        )


def _usable(system: System) -> System:
    """Tensors made under inference mode cannot be saved for a backward pass; their copies can."""
    if torch.is_inference_mode_enabled():
        return system
    tensors = {name: getattr(system, name) for name in ("z", "pos", "batch", "cell")}
    made = {name: t.clone() for name, t in tensors.items() if t is not None and t.is_inference()}
    return system.replace(**made) if made else system
