"""From energy to forces, stress and Hessian products: the only module that calls ``autograd.grad``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.energy import AtomicReference, Energies, EnergyParts, EnergyTerm, Structure
from nbody_pyg.hierarchy import Scheme, Topology
from nbody_pyg.kernels.autograd_flags import has_values, in_own_precision, opaque_to_compile
from nbody_pyg.network import Lists, Network, network_of
from nbody_pyg.nn.exact_buffers import Float64Buffers
from nbody_pyg.nn.irreps import reset
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.renamed import renamed
from nbody_pyg.required import required
from nbody_pyg.system import System

__all__ = ["AtomicReference", "EnergyParts", "Potential", "parameter_gradients", "position_jacobian"]


class Potential(Float64Buffers):
    r"""Energy, forces and stress of any model that returns one energy per graph, and of the terms added to it.

    .. math::
        E = \sum_i E_0(z_i) + s\, E_\theta(z, r) + \sum_{i<j} V_{z_i z_j}(r_{ij}) + \sum_t E_t(z, r), \qquad
        F_i = -\frac{\partial E}{\partial r_i}, \qquad
        \sigma = \frac{1}{V}
            \Big[\frac{\partial}{\partial \epsilon} E(r(1+\epsilon), C(1+\epsilon))\Big]_{\epsilon=0}

    with a symmetric strain; the sign of the stress is ASE's (positive when the system pulls inwards). V is the
    repulsion of nuclei nearer than a bond, :class:`~nbody_pyg.nn.repulsion.ZBLRepulsion`. :math:`E_t` are your terms.
    :meth:`evaluate` sums all terms and is the only place that differentiates the energy.

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
        scale: factor of the output of the model.
        repulsion: "zbl", your own repulsion module, or None; "auto" is "zbl" for an :class:`NBodyNet` of the
            practical preset that gives energies, and None for every other model. Training sets the range of the
            repulsion from its frames: ``ZBLRepulsion.from_frames``.
        terms: further terms of the energy, each an :class:`~nbody_pyg.energy.EnergyTerm` (docs/extending.md).

    Positions may have any floating dtype. An :class:`NBodyNet` subtracts them in float64 and rounds the vectors, so its
    results do not depend on the origin. Any other model subtracts positions itself. If its weights have a lower
    precision than the positions, it gets positions relative to the mean of each graph; this does not change a
    translation-invariant model.

    Smoothness: that of the model; the repulsion has two continuous derivatives at its end.
    Cost: one forward and one backward pass of the model; forces and stress share the backward pass.

    Raises:
        TypeError, ValueError: see :meth:`forward`.
    """

    scale: Tensor
    _float64 = ("scale",)

    def __init__(
        self,
        model: nn.Module,
        reference: AtomicReference | Energies | None = None,
        scale: float = 1.0,
        repulsion: ZBLRepulsion | str | None = "auto",
        terms: Iterable[EnergyTerm] = (),
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
        terms = list(terms)
        if wrong := [type(term).__name__ for term in terms if not isinstance(term, EnergyTerm)]:
            raise TypeError(f"terms must be of classes that derive from EnergyTerm, got {wrong[0]}")
        self.model, self._network = model, network_of(model)
        self.reference = reference
        self.repulsion = self._repulsion(repulsion)
        self.terms: Any = nn.ModuleList(terms)  # of EnergyTerm
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float64))
        #: Name and checksum of the file that it was read from, and of the model that its training started from.
        self.origin: Mapping[str, Any] | None = None
        self.ancestor: Mapping[str, Any] | None = None

    def _repulsion(self, repulsion: ZBLRepulsion | str | None) -> ZBLRepulsion | None:
        if repulsion == "auto":
            repulsion = "zbl" if self.network.wants_repulsion else None
        if repulsion == "zbl":
            if self.network.species is None:
                raise ValueError(
                    f"repulsion 'zbl' needs the elements, which {type(self.model).__name__} does not name in an "
                    "attribute 'species'; pass ZBLRepulsion([1, 6, 8]) with yours"
                )
            return ZBLRepulsion(self.network.species)
        if repulsion is not None and not isinstance(repulsion, ZBLRepulsion):
            raise ValueError(f"repulsion must be 'auto', 'zbl', None or a ZBLRepulsion, got {repulsion!r}")
        return repulsion

    def reset_parameters(self) -> None:
        """Initialise all weights again. Reference energies, scale and repulsion belong to the data and are kept."""
        for module in (self.model, *self.terms):
            reset(module)

    @property
    def network(self) -> Network:
        """The model with its optional attributes."""
        if self._network.model is not self.model:  # the model was replaced
            self._network = network_of(self.model)
        return self._network

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating dtype of the model's parameters (or buffers); None when it has neither."""
        return self.network.dtype

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the model, or None."""
        return self.network.scheme

    @property
    def species(self) -> tuple[int, ...] | None:
        """Atomic numbers that the model knows, else those with a reference energy, else None."""
        known = self.network.species
        return self.reference.species if known is None and self.reference is not None else known

    def interactions(self) -> Iterator[EnergyTerm]:
        """The terms beside the network that depend on positions: the repulsion and the user's terms."""
        if self.repulsion is not None:
            yield self.repulsion
        yield from self.terms

    @renamed(training="create_graph")
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
        create_graph: bool = False,
    ) -> dict[str, Tensor]:
        """Evaluate atoms given as tensors, or as a PyG ``Data`` or ``Batch`` in the first argument, or as a System.

        Works inside ``torch.no_grad()``. A topology that the model's scheme stored on the data is used.

        Args:
            charge: total charge of each graph, e; None: neutral, or the value of the training data.
            charges: formal charges of the atoms, e; models without this input use their sum.
            spin: multiplicity 2S + 1 of each graph; None: a singlet, or the value of the training data.
            batch_size: number of graphs, needed if the last ones have no atoms (a Batch has it). The energy of a graph
                without atoms is 0.
            compute_forces: add ``forces``.
            compute_stress: add ``stress``; needs a periodic cell.
            create_graph: keep the graph of every result, so that a loss on forces can be differentiated again.
                Without it, results are detached and memory is that of one backward pass.

        Raises:
            TypeError: z or batch not integer, pos not floating, pos given together with a Data.
            ValueError: wrong shapes, lengths that differ, NaN positions, batch not sorted, an element without
                a reference energy, a periodic cell with a model that has no ``cell`` argument, a charge or spin that
                the model cannot use, stress without a cell, an output that is not one energy per graph.
            RuntimeError: forces or stress under ``torch.inference_mode()``.
        """
        state = {"charge": charge, "charges": charges, "spin": spin}
        given = {"cell": cell, "pbc": pbc, "topology": topology, "batch_size": batch_size, **state}
        system = self.system(z, pos, batch, **given)
        return self.evaluate(system, forces=compute_forces, stress=compute_stress, create_graph=create_graph)

    @in_own_precision
    def evaluate(
        self,
        system: System,
        *,
        forces: bool = True,
        stress: bool = False,
        create_graph: bool = False,
        directions: Float[Tensor, "directions atoms 3"] | None = None,
        lists: Lists | None = None,
    ) -> dict[str, Tensor]:
        """The energy of a system and its derivatives.

        All derivatives with respect to positions are computed here. It reads no value of a tensor while a program is
        recorded, so nothing is checked then.

        Args:
            system: as :meth:`system` gives it.
            forces, stress, create_graph: as for :meth:`forward`.
            directions: add ``hessian_products``, [directions, atoms, 3]: products of the Hessian with these vectors.
            lists: neighbour lists of terms that exist already, by cutoff.
        """
        dtype, second = self.dtype or system.pos.dtype, directions is not None
        derivative = forces or stress or second
        if derivative:
            _refuse_modes()
        with torch.set_grad_enabled(derivative or (create_graph and torch.is_grad_enabled())):
            # Terms without weights need a graph only where the caller goes on to differentiate by what they depend on
            given = (system.pos, system.cell, system.total_charge, system.formal_charges, system.spin)
            followed = second or any(t is not None and t.requires_grad for t in given)
            apart = derivative and create_graph and not followed
            if derivative and (second or not system.pos.requires_grad):
                system = system.replace(pos=system.pos.detach().requires_grad_(True))
            inputs, moved = [system.pos], system
            if stress:
                volume = volumes(system).to(system.pos.dtype)
                inputs.append(torch.zeros_like(required(system.cell), dtype=system.pos.dtype).requires_grad_(True))
                moved = system.strained(inputs[1])
            structure = self.network.structure(moved, lists)
            energy = self.network.energy(structure)
            energy, fixed = energy * self.scale.to(energy.dtype), []
            for term in self.interactions():
                value = structure.per_graph(_energies(term, structure).to(energy.dtype))
                if apart and not any(p.requires_grad for p in term.parameters()):
                    fixed.append(value)
                else:
                    energy = energy + value
            slopes = _gradient(energy.sum(), inputs, create_graph or second) if derivative else ()
            for value in fixed:
                if value.requires_grad:
                    added = _gradient(value.sum(), inputs, retain_graph=True)
                    slopes = [slope + more for slope, more in zip(slopes, added, strict=True)]
                energy = energy + value.detach()
            results = {"interaction_energy": energy}
            if forces:
                results["forces"] = -slopes[0].to(dtype)
            if stress:
                results["stress"] = (slopes[1] / volume.reshape(-1, 1, 1)).to(dtype)
            if directions is not None:
                rows = [_gradient((slopes[0] * v).sum(), inputs[:1], retain_graph=True)[0] for v in directions]
                results["hessian_products"] = torch.stack(rows).to(dtype)
            results["energy"] = energy.to(torch.float64)
            if self.reference is not None:
                results["energy"] = results["energy"] + structure.per_graph(_energies(self.reference, structure))
        return results if create_graph else {key: value.detach() for key, value in results.items()}

    @torch.no_grad()
    def energies(
        self,
        z: Integer[Tensor, " atoms"] | Data | System,
        pos: Float[Tensor, "atoms 3"] | None = None,
        batch: Int[Tensor, " atoms"] | None = None,
        **given: Any,
    ) -> EnergyParts:
        """Contribution of each part of the hierarchy to the energy; see :class:`EnergyParts`.

        Args:
            given: cell, pbc, topology, charge, charges, spin and batch_size, as for :meth:`forward`.

        Raises: ValueError: the model does not provide them, for example because it is not an :class:`NBodyNet`.
        """
        structure = self.network.structure(self.system(z, pos, batch, **given))
        parts = self.network.parts(structure)
        levels = {k: (value * self.scale.to(value.dtype)).double() for k, value in parts.items()}

        def summed(terms: Iterable[EnergyTerm | None]) -> Tensor:
            found = [_energies(term, structure).double() for term in terms if term is not None]
            return sum(found, torch.zeros_like(structure.batch, dtype=torch.float64))

        return EnergyParts(
            required(structure.hierarchy),
            levels,
            summed([self.repulsion]),
            summed([self.reference]),
            summed(self.terms),
        )

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

        Costs about two evaluations of the forces, for any number of atoms. Unit: eV/A^2 times that of
        ``vector``.

        Args:
            given: cell, pbc, topology, charge, charges, spin and batch_size, as for :meth:`forward`.
        """
        system = self.system(z, pos, batch, **given)
        if vector.shape != system.pos.shape:
            raise ValueError(f"vector must have the shape of pos {list(system.pos.shape)}, got {list(vector.shape)}")
        found = self.evaluate(system, forces=False, directions=vector.to(system.pos.dtype).unsqueeze(0))
        return found["hessian_products"][0]

    def hessian(
        self, z: Tensor | Data | System, pos: Tensor | None = None, **given: Any
    ) -> Float[Tensor, "coordinates coordinates"]:
        """Second derivatives of the energy of one system, [3 num_atoms, 3 num_atoms], eV/A^2.

        Built row by row from one graph: it needs the memory of one force evaluation with its graph, not of 3N.

        Args:
            given: cell, pbc, topology, charge, charges and spin, as for :meth:`forward`.
        """
        system = self.system(z, pos, **given)
        if system.num_graphs != 1:
            raise ValueError(
                f"hessian takes one system, got a batch of {system.num_graphs}; loop over the graphs, or "
                "use hessian_vector_product, which takes batches"
            )
        size = system.pos.numel()
        directions = torch.eye(size, dtype=system.pos.dtype, device=system.pos.device).reshape(size, -1, 3)
        return self.evaluate(system, forces=False, directions=directions)["hessian_products"].reshape(size, size)

    # ----------------------------------------------------------------------------------------------
    def system(
        self, z: Tensor | Data | System, pos: Tensor | None = None, batch: Tensor | None = None, **given: Any
    ) -> System:
        """The checked system of a call, with the charge and spin that the model uses; nothing is differentiated here.

        Args:
            given: cell, pbc, topology, charge, charges, spin and batch_size, as for :meth:`forward`.
        """
        system = System.of(z, pos, batch, read=self.network.read, **given)
        if not has_values(system.pos):
            raise RuntimeError(
                "a potential looks at values of positions and differentiates by them, which tracers, torch.vmap, fake "
                "and meta tensors do not allow; trace its model with topology=..., or use compiled.compile_potential"
            )
        stated = isinstance(z, (System, Data)) or given.get("batch_size") is not None
        if system.num_graphs == 0 or (len(system.z) == 0 and not stated):
            raise ValueError("z holds no atom; give at least one, or batch_size, the number of graphs without atoms")
        if system.pbc is not None and "cell" not in self.network.keywords:
            raise ValueError(
                f"{type(self.model).__name__} has no argument 'cell', so it cannot treat a periodic system; "
                "set pbc to False for molecules, or use a model with forward(z, pos, batch, *, cell, pbc)"
            )
        system = self.network.known(_usable(system))
        if system.given and system.topology is None and "topology" in self.network.keywords:
            system = system.replace(topology=required(self.scheme).compose(system))  # of bonds or labels of the data
        return system


def _energies(term: EnergyTerm, structure: Structure) -> Float[Tensor, " atoms"]:
    """The output of a term.

    Raises: ValueError: its shape is not one energy per atom.
    """
    energies = term(structure)
    if not isinstance(energies, Tensor) or energies.shape != structure.z.shape:
        shape = list(energies.shape) if isinstance(energies, Tensor) else type(energies).__name__
        raise ValueError(
            f"{type(term).__name__} must return one energy per atom, [{len(structure.z)}], got {shape}; give each atom "
            "of a pair half of its energy"
        )
    return energies


def volumes(system: System) -> Float[Tensor, " graphs"]:
    """Volume of each cell, float64.

    Raises: ValueError: a system without a cell, or a cell without volume.
    """
    volume: Tensor | None = None
    if system.cell is not None:
        # The triple product: a decomposition of the cell may wait for the GPU
        cell = system.cell.detach().double()
        volume = (cell[:, 0] * torch.linalg.cross(cell[:, 1], cell[:, 2])).sum(dim=-1).abs()
    if volume is None or (has_values(volume) and bool((volume <= 1e-8).any())):
        raise ValueError(
            "compute_stress needs a periodic cell with a volume for every graph; give cell and pbc "
            "(three independent lattice vectors, also for slabs), or set compute_stress=False"
        )
    return volume


def parameter_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss; unlike ``loss.backward()`` it does not change ``.grad`` and calls no hooks."""
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)


def position_jacobian(values: Tensor, pos: Float[Tensor, "atoms 3"]) -> Tensor:
    """Derivative of every component of some values with respect to positions, [*values.shape, atoms, 3]."""
    _refuse_modes()
    rows = [_gradient(value, [pos], retain_graph=True)[0] for value in values.reshape(-1)]
    return torch.stack(rows).reshape(*values.shape, *pos.shape)


def _gradient(
    value: Tensor, inputs: list[Tensor], create_graph: bool = False, retain_graph: bool = False
) -> Sequence[Tensor]:
    """Derivative of a scalar; zeros, not None, where it does not depend on an input (an isolated atom)."""
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
            "or use create_graph=True and backward(), hessian() or hessian_vector_product()"
        )


def _usable(system: System) -> System:
    """Tensors made under inference mode cannot be saved for a backward pass; their copies can."""
    if torch.is_inference_mode_enabled():
        return system
    tensors = {name: getattr(system, name) for name in ("z", "pos", "batch", "cell")}
    made = {name: t.clone() for name, t in tensors.items() if t is not None and t.is_inference()}
    return system.replace(**made) if made else system
