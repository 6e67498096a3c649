"""Terms of the energy beside the network: isolated atoms, a user's own; and an energy taken apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from ase.data import atomic_numbers, chemical_symbols
from jaxtyping import Float
from torch import Tensor

from nbody_pyg.hierarchy.levels import Hierarchy
from nbody_pyg.nn.custom import class_name, imported_class
from nbody_pyg.nn.exact_buffers import Float64Buffers
from nbody_pyg.nn.term import EnergyTerm, Structure

__all__ = ["AtomicReference", "EnergyParts", "EnergyTerm", "Structure"]

#: Of elements by number or symbol. The keys of a mapping must match exactly for a type checker.
Energies = Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float]


class AtomicReference(EnergyTerm, Float64Buffers):
    r"""Energies of isolated atoms: a term of the energy that does not depend on positions, in float64.

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

    species: tuple[int, ...]
    numbers: Tensor
    values: Tensor
    _float64 = ("values",)

    def __init__(self, energies: Energies) -> None:
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
        self.species = tuple(numbers)
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.long))
        self.register_buffer("values", torch.tensor([table[n] for n in numbers], dtype=torch.float64))

    @property
    def energies(self) -> dict[int, float]:
        """Atomic number to energy (eV), in full precision."""
        return dict(zip(self.numbers.tolist(), self.values.tolist(), strict=True))

    def forward(self, structure: Structure) -> Float[Tensor, " atoms"]:
        """Reference energy of each atom, float64."""
        return self.values[structure.slots(self.species, self.numbers, "the reference energies")]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.species = tuple(self.numbers.tolist())

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


class EnergyParts(NamedTuple):
    """An energy taken apart; everything sums to the energy of the potential.

    ===============  ==========================  ============================================================
    field            shape, unit                 meaning
    ===============  ==========================  ============================================================
    ``hierarchy``                                positions and members of the parts
    ``levels``       {level: [num_parts]}, eV    interaction energy that the network reads off each part
    ``repulsion``    [num_atoms], eV             half of the repulsion of each of the atom's close pairs
    ``reference``    [num_atoms], eV             energy of the isolated atom
    ``terms``        [num_atoms], eV             sum of the user's terms
    ===============  ==========================  ============================================================

    float64. With a network in float64 the sum is exact to round-off; with one in float32 it differs by the
    rounding of its own sum.
    """

    hierarchy: Hierarchy
    levels: dict[int, Tensor]
    repulsion: Tensor
    reference: Tensor
    terms: Tensor

    @property
    def atoms(self) -> Float[Tensor, " atoms"]:
        """What belongs to the atoms beside the network."""
        return self.repulsion + self.reference + self.terms

    def total(self) -> Float[Tensor, " graphs"]:
        """Energy of each system."""
        graphs = self.hierarchy.num_graphs
        whole = self.reference.new_zeros(graphs).index_add(0, self.hierarchy[0].batch, self.atoms)
        for k, values in self.levels.items():
            whole = whole.index_add(0, self.hierarchy[k].batch, values)
        return whole


def describe_terms(terms: Iterable[EnergyTerm]) -> list[dict[str, Any]]:
    """Class ("module:name") and arguments of each term, ready for JSON.

    Raises: ValueError: a class that is not at the top of an importable module.
    """
    return [{"class": class_name(type(term), "a term of the energy"), "config": term.config()} for term in terms]


def build_terms(described: Sequence[Mapping[str, Any]]) -> list[EnergyTerm]:
    """The terms that :func:`describe_terms` described, with fresh weights.

    Raises: ValueError: a class that no imported module defines, or that is no term.
    """
    terms = []
    for one in described:
        found = imported_class(one["class"], EnergyTerm, "a term of the energy")
        terms.append(found(**one["config"]))
    return terms
