"""Checksums of the atoms, positions, cell, bonds and labels of a stored hierarchy, compared on reading."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data

#: Key of the mark on the data.
MARK = "hierarchy_mark"
#: Kinds of parts in a mark: computed from positions; given or shared, and kept; computed from bonds, which are stored
#: as well. Below ``FOUND`` are the kinds of versions up to 0.2, whose sums did not tell all changes of the atoms.
FOUND, KEPT, FOUND_BONDS = 3, 4, 5
EARLIER_KEPT, EARLIER_FOUND_BONDS = 1, 2
#: Columns of a mark.
ATOMS, PLACE, INPUTS, KIND = range(4)
# Odd numbers whose multiples spread small differences over all bits
_SPREAD, _ROW, _COLUMN = -7046029254386353131, -4417276706812531889, 3935559000370003845


def mark_of(
    data: Data, kind: int | Tensor, atom_key: str | None = None, bonds_key: str | None = None
) -> Int[Tensor, "graphs 4"]:
    """A mark of each graph: checksums of its atoms in their order, of positions and cell, and of bonds and labels.

    They are sums of integers over the bits of all numbers, each mixed with its place, the same for a single graph and
    in a batch, on every device.

    Args:
        kind: of the parts, the last column.
        atom_key: key of labels of the atoms, where parts follow from them.
        bonds_key: key of bonds from which parts follow, beside "bonds".
    """
    pos, batch, first = data["pos"], data.get("batch"), _first(data)
    number = torch.arange(pos.shape[0], device=pos.device)
    if batch is not None:
        number = number - first[batch]
    labels = None if atom_key is None else data.get(atom_key)
    values = [data["z"].long().unsqueeze(1), _bits(pos)]
    if labels is not None:
        values.append((labels if labels.dim() > 1 else labels.unsqueeze(1)).long().flatten(1))
    mixed = _placed(torch.cat(values, dim=1), number)
    columns = [mixed[:, 0], mixed[:, 1:4].sum(dim=1), mixed[:, 4:].sum(dim=1)]
    found = _sums(torch.stack(columns, dim=1), batch, len(first))
    if (lattice := _lattice(data, len(first))) is not None:  # no atom has the number -1
        found[:, PLACE] += (_placed(lattice, -torch.ones_like(first)) * (lattice != 0)).sum(dim=1)
    last = torch.as_tensor(kind, dtype=torch.long, device=pos.device).expand(len(first))
    bonds = bonds_mark(data)
    if bonds_key not in (None, "bonds"):
        bonds = bonds + _COLUMN * bonds_mark(data, bonds_key)
    found[:, INPUTS] += bonds * (last != FOUND)
    return torch.cat([found, last.unsqueeze(1)], dim=1)


def bonds_mark(data: Data, key: str = "bonds") -> Int[Tensor, " graphs"]:
    """A checksum of the stored bonds of each graph, independent of their order; 0 if there are none."""
    bonds, batch, first = data.get(key), data.get("batch"), _first(data)
    if not isinstance(bonds, Tensor) or bonds.numel() == 0 or bonds.is_floating_point() or len(bonds) != 2:
        return torch.zeros_like(first)  # none, or a user's key of this name
    graph = None if batch is None else batch[bonds[0].clamp(max=len(batch) - 1)]
    local = bonds if graph is None else bonds - first[graph]
    return _sums(_mixed(local[0] * 1_000_003 + local[1] + 1).unsqueeze(1), graph, len(first)).squeeze(1)


def found_bonds(data: Data) -> Tensor:
    """Graphs whose stored bonds were found by a scheme, and not replaced since, [B] bool.

    Bonds that point outside of their graph remain after atoms were removed; they do not count as given bonds.
    """
    mark, bonds, batch = data.get(MARK), data.get("bonds"), data.get("batch")
    if mark is None or not isinstance(bonds, Tensor):
        return torch.zeros(len(_first(data)), dtype=torch.bool, device=data["pos"].device)
    found: Tensor = (mark[:, KIND] == FOUND_BONDS) | (mark[:, KIND] == EARLIER_FOUND_BONDS)
    whole = bonds.numel() == 0 or int(bonds.max()) < data["pos"].shape[0]
    if whole and batch is not None:
        whole = torch.equal(batch[bonds[0]], batch[bonds[1]])
    if whole:
        found &= mark[:, INPUTS] == bonds_mark(data)
    return found


def _lattice(data: Data, num_graphs: int) -> Tensor | None:
    """Bits of the vectors of the periodic directions, and of those directions; zeros for what does not repeat."""
    cell, pbc = data.get("cell"), data.get("pbc")
    if not isinstance(cell, Tensor):
        return None
    cell = cell.reshape(num_graphs, 3, 3)
    if isinstance(pbc, Tensor):
        pbc = pbc.bool().reshape(num_graphs, -1, 1).expand(-1, 3, 1)
        cell = torch.cat([torch.where(pbc, cell, torch.zeros_like(cell)), pbc.to(cell.dtype)], dim=2)
    return _bits(cell).flatten(1)


def _first(data: Data) -> Tensor:
    """First atom of each graph."""
    batch: Tensor | None = data.get("batch")
    ptr: Tensor | None = data.get("ptr")
    if ptr is not None:
        return ptr[:-1]
    if batch is None:
        return torch.zeros(1, dtype=torch.long, device=data["pos"].device)
    return torch.searchsorted(batch, torch.arange(int(batch[-1]) + 1, device=batch.device))


def _sums(values: Tensor, graph: Tensor | None, size: int) -> Tensor:
    if graph is None:
        return values.sum(dim=0, keepdim=True)
    return values.new_zeros(size, values.shape[1]).index_add(0, graph, values)


def _placed(values: Int[Tensor, "rows columns"], number: Int[Tensor, " rows"]) -> Int[Tensor, "rows columns"]:
    """Values mixed after their place has been added: sums of products of the two are the same after many exchanges."""
    column = _COLUMN * torch.arange(values.shape[1], device=values.device)
    return _mixed(_mixed(values + (_ROW * number.unsqueeze(1) + column)))


def _bits(values: Tensor) -> Tensor:
    """The bits of numbers in float64 as integers; 0 and -0 are the same."""
    return (values.detach().double() + 0.0).contiguous().view(torch.long)


def _mixed(bits: Tensor) -> Tensor:
    bits = bits * _SPREAD
    return bits ^ (bits >> 31)
