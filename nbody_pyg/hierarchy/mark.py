"""Checksums of the atoms, positions, cell, bonds and labels of a stored hierarchy, compared on reading."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data

#: Key of the mark on the data.
MARK = "hierarchy_mark"
#: Kinds of parts in a mark: computed from positions; given or shared, and kept; computed from bonds, which are stored
#: as well.
FOUND, KEPT, FOUND_BONDS = 0, 1, 2
#: Columns of a mark.
ATOMS, PLACE, INPUTS, KIND = range(4)
# An odd number whose multiples spread small differences over all bits
_SPREAD = -7046029254386353131


def mark_of(data: Data, kind: int | Tensor, atom_key: str | None = None) -> Int[Tensor, "graphs 4"]:
    """A mark of each graph: checksums of its atoms in their order, of positions and cell, and of bonds and labels.

    They are sums of integers over the bits of all numbers, the same for a single graph and in a batch, on every device.

    Args:
        kind: of the parts, the last column.
        atom_key: key of labels of the atoms, where parts follow from them.
    """
    pos, batch = data["pos"], data.get("batch")
    number, first = torch.arange(pos.shape[0], device=pos.device), _first(data)
    if batch is not None:
        number = number - first[batch]
    odd = 6 * number.unsqueeze(1) + torch.tensor([1, 3, 5], device=pos.device)
    atom = (data["z"].long() + 1) * _SPREAD * odd[:, ATOMS]
    columns = [atom, (_bits(pos) * odd).sum(dim=1)]
    labels = None if atom_key is None else data.get(atom_key)
    if labels is not None:
        table = labels.flatten(1) if labels.dim() > 1 else labels.unsqueeze(1)
        mixed = _mixed((table.long() + 1) * odd[:, :1])
        columns.append((mixed * (2 * torch.arange(mixed.shape[1], device=pos.device) + 1)).sum(dim=1))
    else:
        columns.append(torch.zeros_like(atom))
    found = _sums(torch.stack(columns, dim=1), batch, len(first))
    for key in ("cell", "pbc"):
        if isinstance(data.get(key), Tensor):
            bits = _bits(data[key]).reshape(len(first), -1)
            found[:, PLACE] += (bits * (2 * torch.arange(bits.shape[1], device=pos.device) + 1)).sum(dim=1)
    last = torch.as_tensor(kind, dtype=torch.long, device=pos.device).expand(len(first))
    found[:, INPUTS] += bonds_mark(data) * (last != FOUND)
    return torch.cat([found, last.unsqueeze(1)], dim=1)


def bonds_mark(data: Data) -> Int[Tensor, " graphs"]:
    """A checksum of the stored bonds of each graph, independent of their order; 0 if there are none."""
    bonds, batch, first = data.get("bonds"), data.get("batch"), _first(data)
    if not isinstance(bonds, Tensor) or bonds.numel() == 0 or bonds.is_floating_point():  # or a user's key of this name
        return torch.zeros_like(first)
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
    found: Tensor = mark[:, KIND] == FOUND_BONDS
    whole = bonds.numel() == 0 or int(bonds.max()) < data["pos"].shape[0]
    if whole and batch is not None:
        whole = torch.equal(batch[bonds[0]], batch[bonds[1]])
    if whole:
        found &= mark[:, INPUTS] == bonds_mark(data)
    return found


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


def _bits(values: Tensor) -> Tensor:
    """The bits of numbers in float64, mixed, as integers; 0 and -0 are the same."""
    return _mixed((values.detach().double() + 0.0).contiguous().view(torch.long))


def _mixed(bits: Tensor) -> Tensor:
    bits = bits * _SPREAD
    return bits ^ (bits >> 31)
