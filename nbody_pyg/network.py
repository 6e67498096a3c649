"""What a potential knows about its model: from NBodyNet itself, or from the signature and attributes of another
model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.data import complete_states, has_hierarchy, require_atoms
from nbody_pyg.geometry import rounded_positions
from nbody_pyg.hierarchy import Scheme, Topology
from nbody_pyg.models import NBodyNet
from nbody_pyg.nn.electronic import refuse_unused
from nbody_pyg.nn.term import Structure
from nbody_pyg.required import required
from nbody_pyg.system import DEFAULT_STATE, System, spin_multiplicity, total_charge

#: Arguments that a model's forward may have beside z, pos and batch.
MODEL_INPUTS = ("cell", "pbc", "topology", "charge", "charges", "spin", "batch_size")

Lists = Mapping[float, tuple[Tensor, Tensor | None]]


class Network:
    """A model of any kind, ``model(z, pos, batch, **inputs)``, as a potential and a model of properties use it.

    Optional attributes of the model are looked up here, once: ``scheme`` (builds its topology), ``species`` (the
    elements that it knows), ``config()`` (its arguments), ``property_readout`` (the readout of
    :class:`~nbody_pyg.properties.Property` whose value it computes). ``assumed`` holds the charge and spin of all its
    training frames.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        names = inspect.signature(model.forward).parameters
        free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
        self.keywords = frozenset(k for k in MODEL_INPUTS if k in names or (free and k != "batch_size"))
        self.scheme: Scheme | None = getattr(model, "scheme", None)
        species = getattr(model, "species", None)
        self.species = None if species is None else tuple(int(n) for n in species)
        #: The readout of a property that its output is; None where it does not say.
        self.property_readout: str | None = getattr(model, "property_readout", None)
        #: Inputs of charge and spin that every frame must state.
        self.inputs: tuple[str, ...] = ()
        #: Whether atoms act on each other at any distance; whether a repulsion of nuclei is added by default.
        self.long_range = self.wants_repulsion = False

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating dtype of the weights (or buffers); None if there are none."""
        for tensors in (self.model.parameters, self.model.buffers):  # the first weight decides, at every step
            for tensor in tensors():
                if tensor.is_floating_point():
                    return tensor.dtype
        return None

    @property
    def used(self) -> frozenset[str]:
        """Which of charge and spin the output depends on."""
        return self.keywords & {"charge", "spin"}

    @property
    def assumed(self) -> Mapping[str, float]:
        """Charge and spin of all training frames, for a model without inputs for them."""
        return getattr(self.model, "assumed", {})

    def config(self) -> dict[str, Any] | None:
        """Arguments that build the same model, if it provides them."""
        config = getattr(self.model, "config", None)
        return config() if callable(config) else None

    def read(self, data: Data, topology: Topology | None = None, batch_size: int | None = None) -> System:
        """The checked system of a Data, with the topology stored there if the model uses one."""
        if topology is None and "topology" in self.keywords:
            if self.scheme is not None:  # rejects a topology that another scheme stored
                return self.scheme.system(data, None, batch_size)
            require_atoms(data)
            topology = Topology.from_data(data) if has_hierarchy(data) else None
        return System.from_data(data, topology, batch_size)

    def known(self, system: System) -> System:
        """The system with the charge and spin that the model uses.

        Raises: ValueError: a value that the model has no input for and that differs from its training data.
        """
        charge, spin, used = system.total_charge, system.spin, self.used
        if charge is None and spin is None:
            return system
        refuse_unused(used, self.assumed, {"charge": charge, "spin": spin})
        return system.replace(
            total_charge=charge if "charge" in used else None,
            formal_charges=system.formal_charges if "charge" in used and "charges" in self.keywords else None,
            spin=spin if "spin" in used else None,
        )

    def structure(self, system: System, lists: Lists | None = None) -> Structure:
        """The input from which the energy of a system is computed."""
        return Structure(system, None, self.scheme, self.dtype, lists)

    def energy(self, structure: Structure) -> Float[Tensor, " graphs"]:
        """Energy of each graph, the output of the model.

        Raises: ValueError: the output has another shape.
        """
        system, dtype = structure.system, self.dtype
        pos = system.pos if dtype is None else rounded_positions(system.pos, system.batch, dtype)
        numbers = {"cell": system.cell, "charge": system.total_charge, "charges": system.formal_charges,
                   "spin": system.spin}  # fmt: skip
        given: dict[str, Any] = {k: None if v is None else v.to(pos.dtype) for k, v in numbers.items()}
        given |= {"pbc": system.pbc, "topology": system.topology, "batch_size": system.num_graphs}
        keywords = {k: v for k, v in given.items() if v is not None and k in self.keywords}
        return self._checked(self.model(system.z, pos, system.batch, **keywords), system)

    def parts(self, structure: Structure) -> dict[int, Tensor]:
        """Energy of each part, by level.

        Raises: ValueError: the model does not provide it.
        """
        raise ValueError(
            f"{type(self.model).__name__} gives one energy per system and nothing below it; energies of parts "
            "need an NBodyNet"
        )

    def _checked(self, output: Any, system: System) -> Float[Tensor, " graphs"]:
        num_graphs = system.num_graphs
        if isinstance(output, (tuple, list)):
            output = output[0]
        short = isinstance(output, Tensor) and output.dim() > 0 and output.shape[0] < num_graphs
        if short and output.shape[0] == (int(system.batch[-1]) + 1 if len(system.batch) else 0):
            # Other models do not know graphs after that of the last atom
            output = torch.cat([output, output.new_zeros(num_graphs - output.shape[0], *output.shape[1:])])
        if not isinstance(output, Tensor) or output.shape not in ((num_graphs,), (num_graphs, 1)):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.model).__name__} must return one energy per graph, [{num_graphs}] or "
                f"[{num_graphs}, 1], got {shape}; sum the atoms of each graph with its batch vector"
            )
        return output.reshape(num_graphs)


class OwnNetwork(Network):
    """An :class:`~nbody_pyg.models.NBodyNet`, which subtracts positions in float64 and provides the energies of
    parts."""

    model: NBodyNet

    def __init__(self, model: NBodyNet) -> None:
        super().__init__(model)
        self.inputs, self.long_range = model.inputs, model.long_range is not None
        energies = str(model.irreps_out) == "1x0e" and model.readout == "sum"
        self.wants_repulsion = energies and model.preset == "practical" and 0 not in model.species

    @property
    def used(self) -> frozenset[str]:
        return self.model.used

    def read(self, data: Data, topology: Topology | None = None, batch_size: int | None = None) -> System:
        return self.model.read(data, topology, batch_size)

    def known(self, system: System) -> System:
        system = super().known(system)  # in the precision in which the network subtracts
        return system if system.pos.dtype == torch.float64 else system.replace(pos=system.pos.double())

    def structure(self, system: System, lists: Lists | None = None) -> Structure:
        hierarchy = self.model.hierarchy(system)
        return Structure(hierarchy.system, hierarchy, self.scheme, self.model.dtype, lists)

    def energy(self, structure: Structure) -> Float[Tensor, " graphs"]:
        return self._checked(self.model(structure.hierarchy), structure.system)

    def parts(self, structure: Structure) -> dict[int, Tensor]:
        return self.model.energies(required(structure.hierarchy))


def network_of(model: nn.Module) -> Network:
    """The model as a potential sees it."""
    return OwnNetwork(model) if isinstance(model, NBodyNet) else Network(model)


def check_states(model: nn.Module, frames: Iterable[Data], name: str = "frames") -> None:
    """Raise unless the model can use charge and spin of every frame.

    Raises: ValueError: an impossible value, or one that the model has no input for and that differs from its training
    data; the message names the frame.
    """
    network = network_of(model)
    for number, frame in enumerate(frames):
        try:
            refuse_unused(network.used, network.assumed, _state_of(frame))
        except ValueError as error:
            raise ValueError(f"frame {number} of {name}: {error}") from None


def model_frames(model: nn.Module, frames: Sequence[Data], name: str = "frames") -> Sequence[Data]:
    """The frames with those of the keys ``charge``, ``charges`` and ``spin`` that the model uses, in all frames or in
    none.

    Raises: ValueError: as for :func:`check_states`.
    """
    check_states(model, frames, name)
    given, network = frames, network_of(model)
    kept = network.used | ({"charges"} if "charge" in network.used and "charges" in network.keywords else set())
    dropped = [key for key in ("charge", "charges", "spin") if key not in kept]
    if any(frame.get(key) is not None for frame in frames for key in dropped):
        frames = [copy.copy(frame) for frame in frames]
        for frame in frames:
            if "charges" in dropped and "charge" in kept and frame.get("charge") is None and "charges" in frame:
                frame.charge = frame.charges.double().sum().reshape(1)
            for key in dropped:
                if key in frame:
                    del frame[key]
    frames = complete_states(frames, network.inputs)
    # Keep Frames, because messages name the file and the numbers in it
    return given.replaced(frames) if frames is not given and hasattr(given, "replaced") else frames


def _state_of(frame: Data) -> dict[str, Tensor | None]:
    """Charge and spin of one frame, checked, float64; None for what it does not have."""
    charge, charges, spin = (frame.get(key) for key in ("charge", "charges", "spin"))
    like, batch = torch.zeros(0, dtype=torch.float64), torch.zeros(len(frame.z), dtype=torch.long)
    return {"charge": total_charge(batch, 1, charge, charges, like), "spin": spin_multiplicity(spin, 1, like)}


def frame_states(frames: Iterable[Data]) -> dict[str, list[float]]:
    """Charge and spin of every frame, each only if some frame has it; the others are neutral, or singlets.

    Raises: ValueError: a wrong number of values, or an impossible value.
    """
    found: dict[str, list[float]] = {}
    for number, frame in enumerate(frames):
        try:
            state = _state_of(frame)
        except ValueError as error:
            raise ValueError(f"frame {number}: {error}") from None
        for key, value in state.items():
            if value is not None:
                # A sum of thirds may be a whole number
                found.setdefault(key, [DEFAULT_STATE[key]] * number).append(round(float(value), 6))
        for key, values in found.items():
            if len(values) == number:
                values.append(DEFAULT_STATE[key])
    return found


def without_ions(frames: Sequence[Data]) -> Sequence[Data]:
    """The frames without charged single atoms, which do not tell the energy of an isolated atom."""
    if (charges := frame_states(frames).get("charge")) is None:
        return frames
    return [frame for frame, charge in zip(frames, charges, strict=True) if charge == 0 or len(frame.z) > 1]


def learn_state(model: nn.Module, frames: Iterable[Data]) -> None:
    """Check that a model can be trained on the charges and spins of some frames. Common values that the model has no
    input for are stored as ``model.assumed``.

    Raises: ValueError: frames differ in a value that the model has no input for; the message names two.
    """
    network = network_of(model)
    used, assumed = network.used, dict(network.assumed)
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
    model.assumed = assumed  # type: ignore[assignment]  # on whatever module
