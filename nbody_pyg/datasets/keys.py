"""Which key of a file holds a label: chosen once for all frames, so that levels of theory are not mixed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from nbody_pyg.datasets.frames import LABEL_SHAPES, shaped_label
from nbody_pyg.messages import nearest
from nbody_pyg.units import Units

# Labels of which a file may hold several levels of theory, and those that are derivatives of one energy.
LEVELLED = ("energy", "forces", "stress", "dipole", "polarizability")
_OF_ONE_ENERGY = ("energy", "forces", "stress")
#: Labels whose key a user can name, and those that have an argument of their own for it, such as ``energy_key``.
LABELS = ("energy", "forces", "stress", "virial", "dipole", "polarizability", "charge", "spin")
SHORT_FORMS = ("energy", "forces", "stress", "dipole")
_UNITS = {"energy": "eV per atom", "forces": "eV/A", "stress": "eV/A^3", "dipole": "e A", "polarizability": ""}

Stores = Mapping[str, Mapping[str, Any]]


def stores_of(atoms: Atoms) -> dict[str, Mapping[str, Any]]:
    """The three places of ASE where a label can be."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return {
        "info": {str(key): value for key, value in atoms.info.items()},
        "arrays": {key: value for key, value in atoms.arrays.items() if key not in ("numbers", "positions")},
        "results": {key: value for key, value in results.items() if value is not None},
    }


class KeySurvey:
    """Which keys hold each label in the frames of a file, collected part by part so that no frame must be kept.

    For each label of a level of theory the chosen key is the first of ``known`` that stands in every frame with this
    label. Keys that hold the same values wherever both stand are one level.

    Args:
        known: the keys of each label, in the order of preference.
        given: the keys that the user named, for some labels; see :func:`named_keys`.
        units: units of the file.
        name: of the file, for messages.
    """

    def __init__(self, known: Mapping[str, Sequence[str]], given: Mapping[str, str], units: Units, name: str) -> None:
        self.known, self.given, self.units, self.name = known, given, units, name
        self.total = 0
        self.available: set[str] = set()
        # Keys that seem to belong to one that the user named: my_forces beside my_energy
        self._mates: dict[str, str] = {}
        for label, other in (("energy", "forces"), ("forces", "energy")):
            mate = given.get(label, "").replace(label, other)
            if other not in given and mate != given.get(label, "") and mate not in known[other]:
                self._mates[other] = mate
        self._names = {
            label: tuple(
                dict.fromkeys([*known[label], *given_keys(label, given), *filter(None, [self._mates.get(label)])])
            )
            for label in LEVELLED
        }
        # Label -> keys of a frame with values -> number of such frames
        self._together: dict[str, Counter[frozenset[str]]] = {label: Counter() for label in LEVELLED}
        # Label -> two keys whose values differ -> first such frame, largest difference (energies: per atom)
        self._apart: dict[str, dict[frozenset[str], tuple[int, float]]] = {label: {} for label in LEVELLED}

    def add(self, systems: Sequence[Atoms], stores: Sequence[Stores]) -> None:
        """Take in further frames; ``stores`` is what :func:`stores_of` gives of each."""
        for atoms, places in zip(systems, stores, strict=True):
            self.available.update(key for place in places.values() for key in place)
            for label in LEVELLED:
                values = self._values(atoms, places, label)
                if values:
                    self._together[label][frozenset(values)] += 1
                for one, other in itertools.combinations(values, 2):
                    far = _distance(values[one], values[other])
                    if far is not None:
                        pair, far = frozenset((one, other)), far / (len(atoms) if label == "energy" else 1)
                        first, largest = self._apart[label].get(pair, (self.total, 0.0))
                        self._apart[label][pair] = (first, max(far, largest))
            self.total += 1

    def _values(self, atoms: Atoms, places: Stores, label: str) -> dict[str, np.ndarray]:
        """Key -> value, where there is one; a virial as the stress that it stands for."""
        found: dict[str, np.ndarray] = {}
        for key in self._names[label]:
            value = next((place[key] for place in places.values() if key in place), None)
            if value is None:
                continue
            try:
                shaped = shaped_label(value, label, len(atoms), "").numpy()
            except ValueError:
                shaped = np.full(1, np.inf)  # differs from all; refused with its frame where it is read
            if np.isnan(shaped).all():
                continue
            if is_virial(key, self.given):
                volume = volume_of(atoms)
                if not volume:
                    continue  # a molecule: a virial without a volume is no stress
                units = self.units
                shaped = -shaped / (volume * units.length_factor**3) * (units.energy_factor / units.stress_factor)
            found[key] = shaped
        return found

    def choose(self) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """The keys to read each label from, and notes about what was not taken.

        Raises: ValueError: a named key is in no frame; a label stands under one key in some frames and under another,
            with other values, in others; energy and forces stand under keys of two families; stress and virial
            contradict each other.
        """
        for label, key in self.given.items():
            if key not in self.available:
                word = f"{label}_key" if label in SHORT_FORMS else f"the key of {label},"
                raise ValueError(
                    f"{word} {key!r} is in no frame of {self.name}; {nearest(key, sorted(self.available))}"
                )
        keys = {label: given_keys(label, self.given) or tuple(names) for label, names in self.known.items()}
        found = {label: self._present(label) for label in LEVELLED}
        notes = []
        for label, present in found.items():
            if own := given_keys(label, self.given):
                if len(own) > 1 and (number := self._differ(label, *own)) is not None:
                    raise ValueError(_contradiction(number, self.name, *own))
                continue
            if not present:
                continue
            keys[label] = self._covering(label, present)
            for key in present:
                apart = [self._differ(label, key, one) for one in keys[label] if one != key]
                number = min((n for n in apart if n is not None), default=None)
                if key in keys[label] or number is None:
                    continue
                if label == "stress" and _family(key) == _family(keys[label][0]):
                    raise ValueError(_contradiction(number, self.name, keys[label][0], key))
                notes.append(self._other_values(label, keys[label], key))
        self._check_families(keys, found, notes)
        for other, mate in self._mates.items():
            label = "forces" if other == "energy" else "energy"
            if found[other] and self._differ(other, mate, keys[other][0]) is not None:
                raise ValueError(
                    f"{label} of {self.name} is read from {self.given[label]!r}, and {other} would be from "
                    f"{keys[other][0]!r}, but {mate!r} holds others, which seem to belong to it; give {other}_key"
                )
        return keys, notes

    def count(self, label: str, *keys: str) -> int:
        """Frames with this label under one of the keys."""
        return sum(frames for names, frames in self._together[label].items() if names.intersection(keys))

    def _present(self, label: str) -> list[str]:
        return [key for key in self.known[label] if self.count(label, key)]

    def _differ(self, label: str, one: str, other: str) -> int | None:
        """The first frame in which both keys have values that differ by more than rounding."""
        found = self._apart[label].get(frozenset((one, other)))
        return None if found is None else found[0]

    def _other_values(self, label: str, chosen: Sequence[str], key: str) -> str:
        far = max(self._apart[label].get(frozenset((key, one)), (0, 0.0))[1] for one in chosen)
        size = f", up to {far * self.units.factor(label):.3g} {_UNITS[label]} apart" if np.isfinite(far) else ""
        note = f"{self.name}: {label} is read from {chosen[0]!r}; {key!r} holds other values{size}"
        if label == "energy" and {key, chosen[0]} == {"energy", "free_energy"}:
            note += "; with smearing, forces are derivatives of the free energy"
        return note

    def _covering(self, label: str, present: Sequence[str]) -> tuple[str, ...]:
        """The one key of all frames with a label; of stresses and virials of one family several that do not differ."""
        labelled = self.count(label, *present)
        for place, key in enumerate(present):
            better = present[:place]
            if self.count(label, key) == labelled and all(self._differ(label, key, one) is None for one in better):
                return (key,)
        for family in ("REF_", "") if label == "stress" else ():
            members = tuple(key for key in present if _family(key) == family)
            if self.count(label, *members) != labelled:
                continue
            for one, other in itertools.combinations(members, 2):
                if (number := self._differ(label, one, other)) is not None:
                    raise ValueError(_contradiction(number, self.name, one, other))
            return members
        counts = ", ".join(f"{key!r} in {self.count(label, key)}" for key in present)
        raise ValueError(
            f"{label} stands under several keys in the {self.total} frames of {self.name} ({counts}), which may be "
            f"several levels of theory; choose one with {label}_key, or give every frame the same key"
        )

    def _check_families(
        self, keys: dict[str, tuple[str, ...]], found: Mapping[str, Sequence[str]], notes: list[str]
    ) -> None:
        """Energy, forces and stress of one family; a stress of another one is left out, forces are an error."""
        energies, given = found["energy"], self.given
        foreign = [f"{label} from {given[label]!r}" for label in ("energy", "forces")
                   if label in given and given[label] not in self.known[label]]  # fmt: skip
        if foreign and found["stress"] and not given_keys("stress", given):
            notes.append(
                f"{self.name}: {' and '.join(foreign)}, as named, but stress from {keys['stress'][0]!r}; if that is "
                "another level of theory, name its key too, or set training.stress_weight to 0"
            )
        if not energies or ("energy" in given and given["energy"] not in energies):
            return
        own = keys["energy"][0]
        for label in _OF_ONE_ENERGY[1:]:
            if given_keys(label, given) or not found[label] or _family(keys[label][0]) == _family(own):
                continue
            # The same energies under a key of the other family show that both are one level of theory.
            other = _family(keys[label][0])
            if any(
                _family(key) == other and self._differ("energy", key, own) is None
                and any({key, own} <= names for names in self._together["energy"])
                for key in energies
            ):  # fmt: skip
                continue
            key, both = keys[label][0], f"energy of {self.name} is read from {own!r}"
            if label == "forces":
                raise ValueError(
                    f"{both} and forces from {key!r}, which may be two levels of theory; choose with energy_key and "
                    "forces_key"
                )
            keys[label] = ()
            notes.append(
                f"{both}; {label} under {key!r}, maybe of another level of theory, is left out without {label}_key"
            )


def named_keys(keys: Mapping[str, str] | None, **short: str | None) -> dict[str, str]:
    """The keys that a user named: ``{label: key in the file}``, with the short forms ``energy_key`` and so on.

    Raises: ValueError: an unknown label, or one that is named twice.
    """
    given = {str(label): str(key) for label, key in (keys or {}).items()}
    for label in given:
        if label not in LABELS:
            raise ValueError(f"keys must name labels ({', '.join(LABELS)}), got {label!r}; {nearest(label, LABELS)}")
    for name, key in short.items():
        label = name.removesuffix("_key")
        if key and given.setdefault(label, key) != key:
            raise ValueError(
                f"{name} {key!r} and keys[{label!r}] {given[label]!r} contradict each other; leave one out"
            )
    return given


def given_keys(label: str, given: Mapping[str, str]) -> tuple[str, ...]:
    """The keys that the user named for a label; of the stress also that of the virial."""
    names = ("stress", "virial") if label == "stress" else (label,)
    return tuple(given[name] for name in names if name in given)


def _contradiction(number: int, name: str, one: str, other: str) -> str:
    return (
        f"frame {number} of {name}: {one} and {other} contradict each other: the stress must be minus the virial over "
        "the volume, positive when the system pulls inwards; choose with stress_key, or name the unit of the stress in "
        "units"
    )


def is_virial(key: str, given: Mapping[str, str]) -> bool:
    """Whether a key of the stress holds a virial: by its name, or because the user says so."""
    return key == given.get("virial") or "virial" in key.lower()


def volume_of(atoms: Atoms) -> float:
    """Volume of a periodic system in the unit of its file; 0 for others."""
    return float(atoms.cell.volume) if atoms.pbc.any() else 0.0


def _distance(a: np.ndarray, b: np.ndarray) -> float | None:
    """The largest difference of two values, None where they differ by no more than rounding."""
    rtol = 1e-3 if a.shape[-2:] == (3, 3) else 1e-8
    if a.shape != b.shape:
        return np.inf
    if np.allclose(a, b, rtol=rtol, atol=1e-5, equal_nan=True):
        return None
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())


def _family(key: str) -> str:
    return "REF_" if key.startswith("REF_") else ""


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
