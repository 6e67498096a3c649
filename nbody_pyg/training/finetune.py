"""Start from a trained model: its weights for other elements, E0 for another level of theory."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import elements_of
from nbody_pyg.datasets import fit_atomic_energies
from nbody_pyg.datasets.frames import has_label
from nbody_pyg.datasets.reference import is_isolated_atom
from nbody_pyg.energy import AtomicReference, Energies, build_terms, describe_terms
from nbody_pyg.longrange import LongRangeConfig
from nbody_pyg.messages import symbols
from nbody_pyg.models import NBodyNet
from nbody_pyg.network import frame_states, without_ions
from nbody_pyg.nn.inner_cutoff import INNER_FACTOR
from nbody_pyg.nn.repulsion import SEEN_FACTOR, ZBLRepulsion, pair_lengths, shortest_distances, shortest_in_frames
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel, Statistics, fit_statistics
from nbody_pyg.system import DEFAULT_STATE

#: Largest number of frames from which E0 is fitted; more tell no more of a few numbers.
_FRAMES = 500
#: Lengths below which a tuned model only repels, in units of those of a new model: it knows a little more of shorter
#: distances.
_SHORTER = 0.85
#: Lengths of a trained model are rounded, angstrom.
_ROUNDED = 1e-3
#: Latent charges that are added to a trained model start this much smaller than those of a new one.
_SMALL_CHARGES = 0.1
#: Atomic numbers of the noble gases, which end the periods.
_PERIODS = (0, 2, 10, 18, 36, 54, 86, 118)


@dataclass(frozen=True)
class Inheritance:
    """What a model has taken over, and what was changed.

    ``copied`` names for each new element the one whose weights it starts with, ``dropped`` the elements that are no
    longer known; ``old`` and ``new`` hold E0 in eV, None where there is none. ``charges``: latent charges were added.
    """

    name: str
    copied: Mapping[int, int]
    dropped: tuple[int, ...]
    old: Mapping[int, float] | None
    new: Mapping[int, float] | None
    charges: bool = False

    def lines(self) -> list[str]:
        """The same in words."""
        out = [f"init    weights and scale of {self.name}"]
        if self.copied:
            words = ", ".join(
                f"{chemical_symbols[z]} (starts as {chemical_symbols[s]})" for z, s in self.copied.items()
            )
            out.append(f"added   {words}")
        if self.dropped:
            out.append(f"dropped {symbols(self.dropped)}: no training frame has them")
        if self.charges:
            out.append(f"added   latent charges, which {self.name} does not have; they start near zero")
        if self.new is not None:
            was = self.old or {}
            words = ", ".join(
                f"{chemical_symbols[z]} {e:.4f}" + (f" (was {was[z]:.4f})" if z in was else "")
                for z, e in self.new.items()
            )
            out.append(f"E0      refitted to the training frames: {words} eV")
        return out


def nearest_element(number: int, known: Sequence[int]) -> int:
    """The known element most like another one: itself, else of its group, else of the nearest number.

    Groups are counted from the start and from the end of a period; hydrogen has none.

    Example:
        >>> nearest_element(16, [1, 6, 7, 8]), nearest_element(35, [1, 6, 9, 17]), nearest_element(5, [1, 6, 8])
        (8, 17, 6)
    """
    alike = [z for z in known if z == number or (min(z, number) > 1 and _groups(z) & _groups(number))]
    return min(alike or known, key=lambda z: (abs(z - number), z))


def _groups(number: int) -> set[tuple[str, int]]:
    """Places in the period: the first two from its start, the last sixteen from its end."""
    end = next(n for n in _PERIODS if n >= number)
    start = max(n for n in _PERIODS if n < number)
    found = {("start", number - start)} if number - start <= 2 else set()
    return found | ({("end", end - number)} if end - number < 16 and not found else set())


# -- ancestors -------------------------------------------------------------------------------------------------
def ancestor_of(model: Potential | PropertyModel) -> dict[str, Any]:
    """Name and fingerprint of a model, and of its own ancestors: {"name", "sha256"[, "ancestor"]}.

    The fingerprint is the checksum of its file, as ``nbody info`` shows it; of a model that was not read from a file,
    the SHA-256 of its weights.
    """
    found = dict(model.origin) if model.origin is not None else {"name": type(model.model).__name__}
    if "sha256" not in found:
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found["sha256"] = digest.hexdigest()
    return found | ({} if model.ancestor is None else {"ancestor": dict(model.ancestor)})


# -- networks --------------------------------------------------------------------------------------------------
def require_same_architecture(network: NBodyNet, trained: NBodyNet, name: str, cure: str, prefix: str = "") -> None:
    """Raise ValueError if two networks differ in anything but their elements; the message names the argument.

    The first may have latent charges that the second lacks.

    Args:
        name: of the trained model, for the message.
        cure: end of the message.
    """
    given, old = network.config(), trained.remade(species=list(network.species)).config()
    keys = [key for key in [*given, *(k for k in old if k not in given)] if key != "species"]
    same_types = _types(network) == _types(trained)
    for key in keys:
        if key in ("irreps", "channels", "lmax") and same_types:
            continue
        new, was = given.get(key), old.get(key)
        if key == "inner_cutoff" and new and was:
            continue  # the frames decide
        if key == "long_range" and was is None:
            continue  # an energy beside what was trained
        if isinstance(new, Mapping) and isinstance(was, Mapping):
            inner = [k for k in [*new, *(k for k in was if k not in new)] if _json(new.get(k)) != _json(was.get(k))]
            if inner:
                key, new, was = f"{key}.{inner[0]}", new.get(inner[0]), was.get(inner[0])
            else:
                continue
        if _json(new) != _json(was):
            raise ValueError(f"{prefix}{key} must be that of {name}, {was!r}, got {new!r}; {cure}")


def _types(network: NBodyNet) -> dict[int, str]:
    """Type of the states of every level."""
    return {level: str(irreps) for level, irreps in network.level_types.items()}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def carried_weights(network: NBodyNet, source: NBodyNet) -> dict[str, Tensor]:
    """The weights of ``source`` for the elements of ``network``, which has the same architecture.

    Weights that are numbered by elements lose the rows of elements that ``network`` lacks. Those that it adds start as
    copies of the most similar known element (:func:`nearest_element`). Latent charges that only ``network`` has start
    with weights of their own, and their energy near zero.
    """
    rows = torch.tensor([source.species.index(nearest_element(z, source.species)) for z in network.species])
    more = next(z for z in range(1, 119) if z not in source.species)
    probe = source.remade(species=sorted([*source.species, more])).state_dict()
    found = {}
    for name, value in source.state_dict().items():
        sides = [d for d in range(value.dim()) if probe[name].shape[d] != value.shape[d]]
        for side in sides:  # entries of one element stand together
            each = value.unflatten(side, (len(source.species), -1))
            value = each.index_select(side, rows.to(value.device)).flatten(side, side + 1)
        found[name] = value.detach().clone()
    if source.long_range is None and network.long_range is not None:
        own = {f"long_range.{name}": value for name, value in network.long_range.state_dict().items()}
        small = (f"long_range.charges.{name}" for name in ("own", "own_states.weight", "scalars.weight", "offset"))
        found |= own | {name: _SMALL_CHARGES * own[name] for name in small if name in own}
    return found


# -- models ----------------------------------------------------------------------------------------------------
def tuned_model(
    init: Potential | PropertyModel,
    train: Sequence[Data],
    e0: str | Energies = "lstsq",
    keep_elements: bool = False,
    keep_inputs: bool = False,
    shortest: Mapping[str, float] | None = None,
    long_range: str | Mapping[str, Any] | None = None,
) -> tuple[Potential | PropertyModel, Inheritance]:
    r"""A model to fine-tune: the network and the weights of ``init`` for the elements of the training frames.

    E0 is fitted to what the network leaves over, so the start has no error that is the same for all molecules:

    .. math:: \min_{E_0} \sum_f \bigl( E_f - s E_\theta(f) - \sum_z n_{fz} E_0(z) \bigr)^2

    What the compositions leave open stays as it was in ``init``. Scale s and terms of the energy are kept. Repulsion
    and inner cutoffs reach at least to 0.77 and 0.81 times the shortest distances of the frames, because training
    spoils what ``init`` knew of shorter ones. Of a model of properties the values of the elements and the means are
    fitted in the same way.

    Args:
        train: frames with labels; their elements are those of the result.
        e0: "lstsq", "mean", "isolated" or a mapping from elements to eV, as for
            :func:`~nbody_pyg.datasets.fit_atomic_energies`.
        keep_elements: keep further elements of ``init`` as well.
        keep_inputs: keep the inputs charge and spin also where all frames are neutral singlets; otherwise the network
            loses them there (:meth:`~nbody_pyg.models.NBodyNet.neutral`), which makes it faster. So it does where
            all frames have one charge, if the network gets latent charges that find it.
        shortest: the shortest distances (angstrom) of pairs of elements, by symbols (``{"C-H": 1.02}``), if ``train``
            is not all that is trained on; by default those of ``train``. An empty mapping keeps repulsion and inner
            cutoffs.
        long_range: latent charges that an NBodyNet without any gets, as for :class:`~nbody_pyg.NBodyNet`.

    Raises: ValueError: elements that a network which is not ours does not know, or as ``fit_atomic_energies``.
    """
    wanted = set(elements_of(train))
    if not isinstance(init.model, NBodyNet):
        known = init.species
        if known is not None and (new := wanted.difference(known)):
            raise ValueError(
                f"init must know the elements of the frames, but {type(init.model).__name__} lacks "
                f"{symbols(sorted(new))}; only an NBodyNet can get new ones"
            )
        model: Potential | PropertyModel = copy.deepcopy(init)
        species = tuple(sorted(wanted)) if known is None else known
    else:
        species = tuple(sorted(wanted | set(init.model.species) if keep_elements else wanted))
        model = _rebuilt(init, species, train, keep_inputs, shortest, long_range)
    return model, _inherit(model, init, train, e0, species)


def inherit(
    model: Potential | PropertyModel,
    init: Potential | PropertyModel,
    train: Sequence[Data],
    e0: str | Energies = "lstsq",
) -> Inheritance:
    """Give a model the weights and the scale of ``init``, and E0 fitted as in :func:`tuned_model`, in place.

    Raises: ValueError: another kind of model, or another scheme, type, cutoff or other argument; the message names the
    argument and both values.
    """
    if type(model) is not type(init) or type(model.model) is not type(init.model):
        there, here = (f"{type(m).__name__} of a {type(m.model).__name__}" for m in (init, model))
        raise ValueError(f"init must be of the same kind as the model, a {here}, got a {there}; build one like it")
    name = str(ancestor_of(init)["name"])
    if isinstance(model.model, NBodyNet) and isinstance(init.model, NBodyNet):
        cure = "build the network as that one, or let tuned_model(init, frames) do it"
        source = init.model
        if source.inputs and not model.model.inputs and source.has_neutral_form:
            source = source.neutral()
        require_same_architecture(model.model, source, name, cure)
        model.model.load_state_dict(carried_weights(model.model, source))
    elif model is not init:
        model.model.load_state_dict(init.model.state_dict())
    return _inherit(model, init, train, e0, model.species or ())


def _rebuilt(
    init: Potential | PropertyModel,
    species: Sequence[int],
    train: Sequence[Data],
    keep_inputs: bool,
    shortest: Mapping[str, float] | None,
    long_range: str | Mapping[str, Any] | None,
) -> Any:
    """A model as ``init`` for other elements, with its weights; without E0 and statistics."""
    source: Any = init.model
    same: dict[str, float] = {}
    if source.inputs and source.has_neutral_form and not keep_inputs:
        states = {key: set(values) for key, values in frame_states(train).items()}
        finds_charge = long_range is not None and not LongRangeConfig.parse(long_range).takes_charge
        if finds_charge and len(states.get("charge", ())) == 1:
            same["charge"] = states.pop("charge").pop()  # the latent charges have it
        if all(values == {DEFAULT_STATE[key]} for key, values in states.items()):
            source = source.neutral()
        else:
            same = {}
    changes: dict[str, Any] = {"species": sorted(species)}
    if long_range is not None and source.long_range is None:
        changes["long_range"] = long_range
    repulsion = None
    if isinstance(init, Potential) and init.repulsion is not None:
        shortest = shortest_distances(train) if shortest is None else shortest
        reach = pair_lengths("reach", changes["species"], init.repulsion.reach, strict=False)
        repulsion = ZBLRepulsion(species, _limits(reach, shortest, SEEN_FACTOR))
        if source.inner_cutoff is not None:
            lengths = pair_lengths("inner_cutoff", changes["species"], source.inner_cutoff.lengths, strict=False)
            changes["inner_cutoff"] = _limits(lengths, shortest, INNER_FACTOR)
    network = source.remade(**changes)
    network.assumed |= same
    network.load_state_dict(carried_weights(network, source))
    if isinstance(init, PropertyModel):
        statistics = {n: Statistics(0.0, s.scale) for n, s in init.statistics.items()}
        return PropertyModel(network, init.properties, statistics)
    terms = build_terms(describe_terms(init.terms))
    potential = Potential(network, None, float(init.scale), repulsion, terms)
    potential.terms.load_state_dict(init.terms.state_dict())
    return potential.to(source.dtype)


def _limits(known: Mapping[str, float], shortest: Mapping[str, float], factor: float) -> dict[str, float]:
    """Lengths below which a tuned model only repels: those that it had, and at least a part of those of a new model,
    which are ``factor`` times the shortest distances of the frames.

    A length inside which there are frames now is replaced.
    """
    out = dict(known)
    for name in known.keys() & shortest.keys():
        new = factor * shortest[name]
        inside = known[name] > new + _ROUNDED
        out[name] = _SHORTER * new if inside else max(known[name], _SHORTER * new)
    return out


def _inherit(
    model: Potential | PropertyModel,
    init: Potential | PropertyModel,
    train: Sequence[Data],
    e0: str | Energies,
    species: Sequence[int],
) -> Inheritance:
    ancestor = ancestor_of(init)  # before it changes, if it is the same model
    before, had_charges = tuple(init.species or ()), _has_charges(init)
    old = new = None
    if isinstance(model, PropertyModel) and isinstance(init, PropertyModel):
        _refit_statistics(model, init, train)
    elif isinstance(model, Potential) and isinstance(init, Potential):
        old = None if init.reference is None else init.reference.energies
        model.scale.copy_(init.scale)
        kept = {z: e for z, e in (old or {}).items() if z in species}
        new = kept | (_refitted(model, train, init, e0) or {})
        model.reference = AtomicReference(dict(sorted(new.items()))) if set(species) <= set(new) else None
        new = None if model.reference is None else model.reference.energies
    model.ancestor, model.origin = ancestor, None
    copied = {z: nearest_element(z, before) for z in species if before and z not in before}
    charges = _has_charges(model) and not had_charges
    return Inheritance(ancestor["name"], copied, tuple(z for z in before if z not in species), old, new, charges)


def start_for(init: Potential, frames: Sequence[Data]) -> Potential:
    """The model that :func:`tuned_model` makes of ``init`` for some frames, without reference energies."""
    return cast(Potential, _rebuilt(init, elements_of(frames), frames, False, None, None))


def _familiar(frames: Sequence[Data], init: Potential) -> Sequence[Data]:
    """The frames without atoms nearer than the inner cutoffs of ``init``, which does not know such distances: its
    energies there would end up in E0. All frames if the others lack an element."""
    cutoffs = getattr(init.model, "inner_cutoff", None)
    if cutoffs is None:
        return frames
    known = cutoffs.lengths
    kept = [
        frame
        for frame in frames
        if all(float(length.min()) >= known.get(name, 0.0) for name, length in shortest_in_frames(frame).items())
    ]
    return kept if len(kept) < len(frames) and set(elements_of(kept)) == set(elements_of(frames)) else frames


def _has_charges(model: Potential | PropertyModel) -> bool:
    return isinstance(model.model, NBodyNet) and model.model.long_range is not None


@torch.no_grad()
def _refitted(
    potential: Potential, train: Sequence[Data], init: Potential, e0: str | Energies
) -> dict[int, float] | None:
    """E0 of the elements of some frames, eV, from what the interactions of a model made of ``init`` leave over; None
    if no frame has an energy."""
    known = [frame for frame in train if has_label(frame, "energy")]
    if not known:
        return None
    if isinstance(e0, Mapping):
        return fit_atomic_energies(known, e0)
    old = {} if init.reference is None else init.reference.energies
    left = []
    potential.eval()
    for frame in _familiar(_few(known), init):
        energy = potential(frame, compute_forces=False)["interaction_energy"].double().cpu()
        start = sum(old.get(z, 0.0) for z in frame.z.tolist())
        one = copy.copy(frame)
        one.energy = frame.energy.double().reshape(1) - energy.reshape(1) - start
        left.append(one)
    if e0 == "isolated":  # an ion does not tell the energy of an atom
        left = list(without_ions(left))
    change = fit_atomic_energies(left, e0)
    return {z: old.get(z, 0.0) + e for z, e in change.items()}


def _few(frames: Sequence[Data]) -> list[Data]:
    """At most some hundred frames, evenly spaced, and those that bring further elements or are single atoms."""
    kept = frames[:: max(1, -(-len(frames) // _FRAMES))]
    seen = set(elements_of(kept))
    more = []
    for frame in frames if len(kept) < len(frames) else ():
        if not seen.issuperset(frame.z.tolist()) or is_isolated_atom(frame):
            more.append(frame)
            seen.update(frame.z.tolist())
    return [*kept, *more]


@torch.no_grad()
def _refit_statistics(model: PropertyModel, init: PropertyModel, train: Sequence[Data]) -> None:
    """Values of the elements and means of properties, from what the network leaves over; scales are kept."""
    scales = {p.name: init.statistics[p.name].scale for p in init.properties}
    model.statistics = {name: Statistics(0.0, scale) for name, scale in scales.items()}
    model.eval()
    for p in model.properties:
        left = []
        for frame in _few([frame for frame in train if has_label(frame, p.name)]):
            one = copy.copy(frame)
            one[p.name] = frame[p.name].double() - model(frame)[p.name].reshape(frame[p.name].shape)
            left.append(one)
        found = fit_statistics(left, p)
        model.statistics[p.name] = Statistics(found.mean, scales[p.name], found.elements, found.spread)


def replayed(
    potential: Potential,
    init: Potential,
    frames: Sequence[Data],
    count: int | None = None,
    seed: int = 0,
) -> list[Data]:
    r"""Frames of the first training for a model of another level of theory: with energies that have the new E0.

    .. math:: E'_f = E_f - \sum_z n_{fz} E_0^{old}(z) + \sum_z n_{fz} E_0^{new}(z)

    Args:
        potential, init: the model to train and the one that it started from.
        frames: frames at the level of theory of ``init``; those with elements that ``potential`` lacks are left out.
        count: number of frames, drawn at random with ``seed``; None: all.

    Raises: ValueError: no frame is left.
    """
    known, old, new = (potential.species, init.reference, potential.reference)
    fit = [f for f in frames if known is None or set(f.z.tolist()) <= set(known)]
    if not fit:
        raise ValueError(
            f"finetune.replay must hold frames with the elements of the model ({symbols(known or ())}), got "
            f"{len(frames)} frames of others; name other files, or set finetune.keep_elements"
        )
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))
    out = []
    for i in order[: len(fit) if count is None else count].sort().values.tolist():
        frame = copy.copy(fit[i])
        if has_label(frame, "energy"):
            change = sum(
                (new.energies[z] if new is not None else 0.0) - (old.energies[z] if old is not None else 0.0)
                for z in frame.z.tolist()
            )
            frame.energy = frame.energy.double() + change
        out.append(frame)
    return out
