"""Which key of a file holds a label: chosen once for all frames, so that levels of theory are not mixed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from nbody_pyg.datasets.frames import LABEL_SHAPES, shaped_label
from nbody_pyg.units import Units

# Labels of which a file may hold several levels of theory, and those that are derivatives of one energy.
LEVELLED = ("energy", "forces", "stress", "dipole", "polarizability")
_OF_ONE_ENERGY = ("energy", "forces", "stress")

Stores = Mapping[str, Mapping[str, Any]]


def stores_of(atoms: Atoms) -> dict[str, Mapping[str, Any]]:
    """The three places of ASE where a label can be."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return {
        "info": {str(key): value for key, value in atoms.info.items()},
        "arrays": {key: value for key, value in atoms.arrays.items() if key not in ("numbers", "positions")},
        "results": {key: value for key, value in results.items() if value is not None},
    }


def choose_keys(
    systems: Sequence[Atoms],
    stores: Sequence[Stores],
    known: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
    units: Units,
    name: str,
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The keys to read each label from, and notes about what was not taken.

    For each label of a level of theory it is the first key of ``known`` that stands in every frame with this label.
    Keys that hold the same values wherever both stand are one level.

    Args:
        systems: the frames of a file.
        stores: of each frame, what :func:`stores_of` gives.
        known: the keys of each label, in the order of preference.
        given: the key that the user named, for some labels.
        units: units of the file.
        name: of the file, for messages.

    Raises: ValueError: a label stands under one key in some frames and under another, with other values, in others;
        energy and forces stand under keys of two families; stress and virial contradict each other.
    """
    keys = {label: (given[label],) if label in given else tuple(names) for label, names in known.items()}
    found = {label: _found(systems, stores, label, known[label], units) for label in LEVELLED}
    notes = []
    for label, values in found.items():
        if label in given or not values:
            continue
        keys[label] = _covering(values, label, len(systems), name)
        chosen = {number: value for key in reversed(keys[label]) for number, value in values[key].items()}
        for key, others in values.items():
            number = None if key in keys[label] else _differ(chosen, others)
            if number is None:
                continue
            if label == "stress" and _family(key) == _family(keys[label][0]):
                raise ValueError(_contradiction(number, name, keys[label][0], key))
            notes.append(f"{name}: {label} is read from {keys[label][0]!r}; {key!r} holds other values")
    _check_families(keys, found, given, name, notes)
    for label, other in (("energy", "forces"), ("forces", "energy")):
        mate = given.get(label, "").replace(label, other)
        if other in given or mate == given.get(label, "") or mate in known[other]:
            continue
        mates = _found(systems, stores, other, [mate], units).get(mate)
        if mates and found[other] and _differ(mates, found[other][keys[other][0]]) is not None:
            raise ValueError(
                f"{label} of {name} is read from {given[label]!r}, and {other} would be from {keys[other][0]!r}, but "
                f"{mate!r} holds others, which seem to belong to it; give {other}_key"
            )
    return keys, notes


def _contradiction(number: int, name: str, one: str, other: str) -> str:
    return (
        f"frame {number} of {name}: {one} and {other} contradict each other: the stress must be minus the virial over "
        "the volume, positive when the system pulls inwards; choose with stress_key"
    )


def _found(
    systems: Sequence[Atoms], stores: Sequence[Stores], label: str, names: Sequence[str], units: Units
) -> dict[str, dict[int, np.ndarray]]:
    """Key -> frame -> value, where there is one; a virial as the stress that it stands for."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for key in names:
        for number, places in enumerate(stores):
            value = next((place[key] for place in places.values() if key in place), None)
            if value is None:
                continue
            try:
                shaped = shaped_label(value, label, len(systems[number]), "").numpy()
            except ValueError:
                shaped = np.full(1, np.inf)  # differs from all; refused with its frame where it is read
            if np.isnan(shaped).all():
                continue
            if is_virial(key):
                volume = volume_of(systems[number])
                if not volume:
                    continue  # a molecule: a virial without a volume is no stress
                shaped = -shaped / (volume * units.length_factor**3) * (units.energy_factor / units.stress_factor)
            found.setdefault(key, {})[number] = shaped
    return found


def is_virial(key: str) -> bool:
    """Whether a key of the stress holds a virial."""
    return "virial" in key.lower()


def volume_of(atoms: Atoms) -> float:
    """Volume of a periodic system in the unit of its file; 0 for others."""
    return float(atoms.cell.volume) if atoms.pbc.any() else 0.0


def _covering(values: Mapping[str, Mapping[int, np.ndarray]], label: str, total: int, name: str) -> tuple[str, ...]:
    """The one key of all frames with a label; of stresses and virials of one family several, which do not differ."""
    labelled = set().union(*values.values())
    for place, (key, own) in enumerate(values.items()):
        better = list(values.values())[:place]
        if len(own) == len(labelled) and all(_differ(own, other) is None for other in better):
            return (key,)
    for family in ("REF_", "") if label == "stress" else ():
        members = tuple(key for key in values if _family(key) == family)
        if set().union(*(values[key] for key in members)) != labelled:
            continue
        for one, other in itertools.combinations(members, 2):
            if (number := _differ(values[one], values[other])) is not None:
                raise ValueError(_contradiction(number, name, one, other))
        return members
    counts = ", ".join(f"{key!r} in {len(own)}" for key, own in values.items())
    raise ValueError(
        f"{label} stands under several keys in the {total} frames of {name} ({counts}), which may be several levels "
        f"of theory; choose one with {label}_key, or give every frame the same key"
    )


def _differ(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> int | None:
    """The first frame in which both have a value and the values differ by more than rounding."""
    for number in sorted(one.keys() & other.keys()):
        a, b = one[number], other[number]
        rtol = 1e-3 if a.shape[-2:] == (3, 3) else 1e-8
        if a.shape != b.shape or not np.allclose(a, b, rtol=rtol, atol=1e-5, equal_nan=True):
            return number
    return None


def _family(key: str) -> str:
    return "REF_" if key.startswith("REF_") else ""


def _check_families(
    keys: dict[str, tuple[str, ...]],
    found: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]],
    given: Mapping[str, str],
    name: str,
    notes: list[str],
) -> None:
    """Energy, forces and stress of one family; a stress of another one is left out, forces are an error."""
    energies = found["energy"]
    if not energies or ("energy" in given and given["energy"] not in energies):
        return
    own = keys["energy"][0]
    for label in _OF_ONE_ENERGY[1:]:
        if label in given or not found[label] or _family(keys[label][0]) == _family(own):
            continue
        # The same energies under a key of the other family show that both are one level of theory.
        other = _family(keys[label][0])
        if any(_family(k) == other and _differ(v, energies[own]) is None and v.keys() & energies[own].keys()
               for k, v in energies.items()):  # fmt: skip
            continue
        key, both = keys[label][0], f"energy of {name} is read from {own!r}"
        if label == "forces":
            raise ValueError(
                f"{both} and forces from {key!r}, which may be two levels of theory; choose with energy_key and "
                "forces_key"
            )
        keys[label] = ()
        notes.append(
            f"{both}; {label} under {key!r}, maybe of another level of theory, is left out without {label}_key"
        )


def levels_apart(sources: Mapping[str, Mapping[str, Sequence[str]]]) -> str | None:
    """What is wrong where files of one run have a label under keys of two families, else None.

    Args:
        sources: title of each file, such as ``"train"`` -> label -> where it was read from.
    """
    for label in _OF_ONE_ENERGY:
        kinds = {title: _kind(labels[label][0]) for title, labels in sources.items() if labels.get(label)}
        if len(set(kinds.values()) - {None}) > 1:
            words = ", ".join(f"{sources[title][label][0]} in {title}" for title in kinds)
            return f"{label} is read from {words}, which may be several levels of theory; choose one with {label}_key"
    return None


def _kind(source: str) -> str | None:
    """Family of a place such as ``info['REF_energy']``; None for a key that ASE files do not have by default."""
    key = source.partition("'")[2].rstrip("']") or source
    plain = key.removeprefix("REF_")
    if plain not in (*LABEL_SHAPES, "free_energy", "force", "virial", "virials"):
        return None
    return _family(key) + ("free_energy" if plain == "free_energy" else "")
