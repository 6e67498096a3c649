"""Properties beside energies: scalars, dipoles and polarizabilities, each with its own readout."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.data import elements_of
from nbody_pyg.geometry import safe_norm
from nbody_pyg.hierarchy import Hierarchy, Scheme
from nbody_pyg.hierarchy.positions import atomic_masses
from nbody_pyg.models import NBodyNet
from nbody_pyg.network import Network, network_of
from nbody_pyg.nn.edges import sum_into
from nbody_pyg.nn.irreps import clebsch_gordan, reset
from nbody_pyg.potential import position_jacobian
from nbody_pyg.system import System

#: Readout -> (scalars, vectors, tensors of degree 2) that it uses from every part, and the shape of its value.
READOUTS: Mapping[str, tuple[tuple[int, int, int], tuple[int, ...]]] = {
    "extensive": ((1, 0, 0), ()),
    "intensive": ((1, 0, 0), ()),
    "root": ((1, 0, 0), ()),
    "dipole": ((1, 1, 0), (3,)),
    "dipole_norm": ((1, 1, 0), ()),
    "r2": ((2, 0, 0), ()),
    "polarizability": ((1, 0, 1), (3, 3)),
}


@dataclass(frozen=True)
class Property:
    r"""A property to learn: key of the label, readout, unit, and weight in the loss.

    ====================  ==============================================================  ==============
    ``readout``           value, from the outputs of part i                                 type of a part
    ====================  ==============================================================  ==============
    ``extensive``         :math:`\sum_i a_i`                                              0e
    ``intensive``         :math:`\frac1N \sum_i a_i`, the mean over the atoms             0e
    ``root``              :math:`a` of the root, which is not additive                    0e
    ``dipole``            :math:`\sum_i q_i (r_i - r_0) + \mu_i`                          0e + 1o
    ``dipole_norm``       the length of that                                              0e + 1o
    ``r2``                :math:`\sum_i a_i + q_i |r_i - r_0|^2`                          2x0e
    ``polarizability``    :math:`\sum_i a_i 1 + A_i`, A symmetric and traceless           0e + 2e
    ====================  ==============================================================  ==============

    with :math:`r_0` the centre of mass. (A dipole about it does not depend on the origin for an ion either.)

    Args:
        name: key of the label on the frames, of shape [1], [1, 3] or [1, 3, 3].
        readout: one of the table.
        unit: of the label, for tables; nothing is converted.
        weight: in the loss, if several properties are learned together.

    Raises: ValueError: unknown readout, a weight that is not positive.
    """

    name: str
    readout: str = "extensive"
    unit: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise ValueError(f"readout of {self.name} must be one of {', '.join(READOUTS)}, got {self.readout!r}")
        if not self.weight > 0:
            raise ValueError(f"weight of {self.name} must be positive, got {self.weight!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value of one system."""
        return READOUTS[self.readout][1]


def property_irreps(properties: Sequence[Property]) -> o3.Irreps:
    """The ``irreps_out`` of a network that provides the inputs of all these readouts.

    >>> property_irreps([Property("dipole", "dipole"), Property("alpha")])
    2x0e+1x1o
    """
    counts = [sum(READOUTS[p.readout][0][l] for p in properties) for l in range(3)]
    return o3.Irreps([(n, ir) for n, ir in zip(counts, ("0e", "1o", "2e"), strict=True) if n])


@dataclass(frozen=True)
class Statistics:
    """What is subtracted from a label before it is learned (a mean, a value per element), and the scale of the rest.

    ``spread`` (for "r2") is a value per element for each squared distance from the centre of mass.
    """

    mean: float = 0.0
    scale: float = 1.0
    elements: Mapping[int, float] | None = None
    spread: Mapping[int, float] | None = None


class PropertyModel(nn.Module):
    r"""A network that learns properties; the counterpart of :class:`~nbody_pyg.potential.Potential` for energies.

    .. math:: y = \bar y + \sum_i y_0(z_i) + s\, \mathrm{readout}(\{\psi_i\})

    Mean, values per element and scale are kept and added in float64.

    Args:
        model: an :class:`~nbody_pyg.models.NBodyNet` of type :func:`property_irreps`; or any
            ``model(z, pos, batch)`` that returns one number per graph, for one scalar property. Its readout is
            "extensive" or "intensive", or that of the model's attribute ``property_readout``; the number is taken as it
            comes.
        properties: what it learns.
        statistics: by the name of the property; none if its label is learned unchanged.

    Raises: ValueError: a network of another type, two properties of one name, a readout that the model cannot provide;
    in forward: a periodic system for a readout with distances from the centre of mass, a charge or spin that the model
    cannot use.

    Example:
        >>> wanted = [Property("dipole", "dipole", "e*angstrom")]
        >>> model = PropertyModel(NBodyNet([1, 6], channels=4, irreps_out=str(property_irreps(wanted))), wanted)
    """

    def __init__(
        self,
        model: nn.Module,
        properties: Sequence[Property],
        statistics: Mapping[str, Statistics] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.properties = model, tuple(properties)
        names = [p.name for p in self.properties]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"properties must have names of their own, got {names or 'none'}")
        self.statistics = {name: (statistics or {}).get(name, Statistics()) for name in names}
        #: Name and checksum of the file that it was read from, and of the model that its training started from.
        self.origin: Mapping[str, Any] | None = None
        self.ancestor: Mapping[str, Any] | None = None
        if isinstance(model, NBodyNet):
            wanted = property_irreps(self.properties)
            if model.irreps_out != wanted:
                raise ValueError(f"model must have irreps_out={str(wanted)!r} for {names}, got {model.irreps_out}")
            if model.readout == "nodes":
                raise ValueError(
                    "model must have the readout 'sum' or 'root' for properties of whole systems, got 'nodes'; train a "
                    "network of node values in a loop of your own (docs/pyg.md)"
                )
            roots = {p.readout == "root" for p in self.properties}
            if roots != {model.readout == "root"}:
                raise ValueError(
                    "readout 'root' needs a network with readout='root', and the others one with 'sum'; "
                    f"got {[p.readout for p in self.properties]} and {model.readout!r}"
                )
        else:
            own = self.network.property_readout
            given = ("extensive", "intensive") if own is None else (own,)
            if len(names) > 1 or self.properties[0].readout not in given or self.properties[0].shape:
                raise ValueError(
                    f"{type(model).__name__} gives one number per graph, so one property with readout "
                    f"{' or '.join(map(repr, given))} (taken as it comes), got {[p.readout for p in self.properties]}; "
                    "use an NBodyNet, or name the readout that the model computes in its attribute property_readout"
                )

    def reset_parameters(self) -> None:
        """Initialise the weights of the network again. The statistics belong to the data and are kept."""
        reset(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def network(self) -> Network:
        """The model with its optional attributes."""
        return network_of(self.model)

    @property
    def species(self) -> tuple[int, ...] | None:
        """Atomic numbers that the network knows, or None."""
        return self.network.species

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the network, or None."""
        return self.network.scheme

    def forward(self, data: Data) -> dict[str, Tensor]:
        """Value of each property, float64, (graphs, *shape)."""
        own, network = self.model if isinstance(self.model, NBodyNet) else None, self.network
        system = network.known(network.read(data))
        centre = self._centre(system)
        if own is None:
            raw = {self.properties[0].name: network.energy(network.structure(system))}
        else:
            raw = self._from_network(own, system, centre)
        return {p.name: self._restored(p, raw[p.name], system, centre) for p in self.properties}

    def jacobian(self, data: Data, name: str) -> Tensor:
        """Derivatives of a property with respect to positions, (graphs, *shape, atoms, 3), its unit per angstrom.

        Cost: one forward pass, and one backward pass for each component of each graph.

        Raises: ValueError: no property of this name.
        """
        if name not in self.statistics:
            raise ValueError(f"name must be one of {', '.join(self.statistics)}, got {name!r}")
        data = copy.copy(data)
        data.pos = data.pos.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            return position_jacobian(self(data)[name], data.pos).detach()

    # ------------------------------------------------------------------ readouts
    def _from_network(self, model: NBodyNet, system: System, centre: Tensor) -> dict[str, Tensor]:
        hierarchy = model.hierarchy(system)
        values, counts = model.values(hierarchy), [0, 0, 0]
        size, num_atoms = system.num_graphs, system.num_atoms.unsqueeze(-1)
        n0 = model.irreps_out.count(o3.Irrep("0e"))
        n1 = model.irreps_out.count(o3.Irrep("1o"))
        out = {}
        for p in self.properties:
            total = torch.zeros(())
            (k0, k1, k2), _ = READOUTS[p.readout]
            for level, value in values.items():
                # mul_ir: the scalars, then vector after vector, tensor after tensor; at most one of each in a readout
                a = value[:, counts[0] : counts[0] + k0]
                v = value[:, n0 + 3 * counts[1] :][:, : 3 * k1]
                t = value[:, n0 + 3 * n1 + 5 * counts[2] :][:, : 5 * k2]
                total = total + self._sum(p.readout, hierarchy, level, a, v, t, centre)
            counts = [counts[0] + k0, counts[1] + k1, counts[2] + k2]
            if p.readout == "intensive":
                total = total / num_atoms.clamp(min=1).to(total.dtype)
            if p.readout == "dipole_norm":
                total = safe_norm(total).unsqueeze(-1)
            out[p.name] = total.reshape(size, *p.shape)
        return out

    @staticmethod
    def _sum(readout: str, hierarchy: Hierarchy, level: int, a: Tensor, v: Tensor, t: Tensor, centre: Tensor) -> Tensor:
        """Contribution of the parts of a level to each graph."""
        here = hierarchy[level]
        if readout in ("dipole", "dipole_norm"):
            each = a * (here.pos - centre[here.batch]).to(a.dtype) + v
        elif readout == "r2":
            square = (here.pos - centre[here.batch]).to(a.dtype).square().sum(-1, keepdim=True)
            each = a[:, :1] + a[:, 1:] * square
        elif readout == "polarizability":
            table = clebsch_gordan(1, 1, 2).to(a)
            trace = a * torch.eye(3).to(a).reshape(1, 9)
            each = trace + (t @ table.reshape(9, 5).t())
        else:
            each = a
        return sum_into(each, here.batch, hierarchy.num_graphs)

    def _centre(self, system: System) -> Tensor:
        """Centre of mass of each graph, float64."""
        if system.pbc is not None and any(p.readout in _PLACED for p in self.properties):
            raise ValueError(f"data must not be periodic for {sorted(_PLACED)}: a cell has no centre of mass")
        return centre_of_mass(system.z, system.pos.double(), system.batch, system.num_graphs)

    def _restored(self, p: Property, raw: Tensor, system: System, centre: Tensor) -> Tensor:
        """Scale, mean and the values of the elements, in float64."""
        known = self.statistics[p.name]
        value = raw.double() * known.scale + known.mean
        if known.elements is not None:
            value = value + sum_into(_table(known.elements, system.z), system.batch, system.num_graphs)
        if known.spread is not None:
            square = (system.pos.double() - centre[system.batch]).square().sum(-1)
            spread = _table(known.spread, system.z) * square
            value = value + sum_into(spread, system.batch, system.num_graphs)
        return value

    # ------------------------------------------------------------------ description
    def config(self) -> dict[str, Any]:
        """Properties and statistics, ready for JSON; :meth:`from_config` with the network gives the model back."""
        return {
            "properties": [asdict(p) for p in self.properties],
            "statistics": {name: _jsonable(asdict(found)) for name, found in self.statistics.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: nn.Module) -> PropertyModel:
        """The model that :meth:`config` described, around ``model``."""
        statistics = {}
        for name, found in config["statistics"].items():
            tables = {k: found[k] and {int(z): v for z, v in found[k].items()} for k in ("elements", "spread")}
            statistics[name] = Statistics(found["mean"], found["scale"], **tables)
        return cls(model, [Property(**p) for p in config["properties"]], statistics)

    def extra_repr(self) -> str:
        return ", ".join(f"{p.name} ({p.readout}{', ' + p.unit if p.unit else ''})" for p in self.properties)


#: Spread of the dipoles of ions, e angstrom, from which on it is asked whether they follow the places of the ions.
_FAR_DIPOLE = 1.0
_PLACED = frozenset({"dipole", "dipole_norm", "r2"})


def centre_of_mass(z: Tensor, pos: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
    """Centre of mass of each graph, (graphs, 3), in the dtype of the positions; zero where a graph has no atoms."""
    mass = atomic_masses(z, pos.dtype).unsqueeze(-1)
    whole = sum_into(mass, batch, num_graphs)
    return sum_into(mass * pos, batch, num_graphs) / torch.where(whole > 0, whole, torch.ones_like(whole))


def _table(values: Mapping[int, float], z: Tensor) -> Tensor:
    """Value of each atom, float64."""
    table = torch.full((119,), float("nan"), dtype=torch.float64)
    table[list(values)] = torch.tensor(list(values.values()), dtype=torch.float64)
    found = table.to(z.device)[z]
    if bool(found.isnan().any()):
        raise ValueError(f"z holds {sorted(set(z[found.isnan()].tolist()))}, which the training set did not have")
    return found


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {k: {str(z): e for z, e in v.items()} if isinstance(v, dict) else v for k, v in values.items()}


def _centre_of_mass(frame: Data) -> Float[Tensor, "3"]:
    mass = atomic_masses(frame.z, torch.float64).unsqueeze(-1)
    centre: Tensor = (mass * frame.pos).sum(0) / mass.sum()
    return centre


def _check_origin(frames: Sequence[Data], name: str) -> None:
    """Raise ValueError if dipoles of ions follow the places of the ions: they are about the origin of coordinates."""
    ions = [frame for frame in frames if frame.get("charge") is not None and float(frame.charge) != 0.0]
    if not ions:
        return
    label = torch.stack([frame[name].double().reshape(3) for frame in ions])
    moved = torch.stack([float(frame.charge) * _centre_of_mass(frame) for frame in ions])
    # Spreads, because a dipole may well point from the origin to an ion that stays where it is
    given, about = (float(d.var(dim=0, correction=0).sum().sqrt()) for d in (label, label - moved))
    if given > _FAR_DIPOLE and about < 0.5 * given:
        raise ValueError(
            f"{name} of ions must be about their centre of mass, but follows their places: its spread is {given:.2f} e "
            f"angstrom, {about:.2f} with charge times centre of mass taken off; take that off"
        )


def fit_statistics(frames: Sequence[Data], wanted: Property) -> Statistics:
    """Mean, values per element (float64 least squares) and scale of a label over the training frames.

    Extensive properties get a value per element, "r2" also one per element and squared distance, intensive ones
    a mean; vectors and tensors only a scale. Frames whose label is missing (NaN) do not count.

    Raises: ValueError: no frame has the label, or dipoles of ions are about another origin than the centre of mass.
    """
    frames = [frame for frame in frames if not bool(frame[wanted.name].isnan().any())]
    if not frames:
        raise ValueError(f"frames must hold {wanted.name!r} for one molecule at least, all are missing (NaN)")
    if wanted.readout == "dipole":
        _check_origin(frames, wanted.name)
    label = torch.cat([frame[wanted.name].double().reshape(1, *wanted.shape) for frame in frames])
    if wanted.readout in ("intensive", "root"):
        return Statistics(float(label.mean()), float(label.std(correction=0)) or 1.0)
    if wanted.readout not in ("extensive", "r2"):
        return Statistics(0.0, float(label.square().mean().sqrt()) or 1.0)
    species = elements_of(frames)
    rows = []
    for frame in frames:
        which = (frame.z.unsqueeze(-1) == torch.tensor(species)).double()
        row = [which.sum(0)]
        if wanted.readout == "r2":
            arm = frame.pos.double() - _centre_of_mass(frame)
            row.append((which * arm.square().sum(-1, keepdim=True)).sum(0))
        rows.append(torch.cat(row))
    design = torch.stack(rows)
    # Least norm, so that elements that the compositions do not determine get moderate values.
    solution = torch.linalg.lstsq(design, label.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    scale = float((label - design @ solution).std(correction=0)) or 1.0
    parts = solution.split(len(species))
    tables = [dict(zip(species, part.tolist(), strict=True)) for part in parts]
    return Statistics(0.0, scale, tables[0], tables[1] if len(tables) > 1 else None)
