"""What a stored hierarchy was made for: a mark of atoms, positions and cell, compared wherever it is read."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data

#: Key of the mark on the data.
MARK = "hierarchy_mark"
#: What a mark says of the parts: they follow from positions; they were given or shared, and stay; they follow from
#: positions by bonds, which are stored as well.
FOUND, KEPT, FOUND_BONDS = 0, 1, 2
# An odd number whose multiples spread small differences over all bits
_SPREAD = -7046029254386353131


def mark_of(data: Data, kind: int | Tensor) -> Int[Tensor, "graphs 3"]:
    """For each graph a number for its atoms in their order, one for positions and cell, and the kind of its parts.

    Sums of integers over the bits of all numbers: the same for a graph on its own and in a batch, on every device.
    """
    pos, batch, ptr = data["pos"], data.get("batch"), data.get("ptr")
    number = torch.arange(pos.shape[0], device=pos.device)
    if batch is not None:
        graphs = int(batch[-1]) + 1 if ptr is None else len(ptr) - 1
        first = torch.searchsorted(batch, torch.arange(graphs, device=batch.device)) if ptr is None else ptr
        number = number - first[batch]
    odd = 6 * number.unsqueeze(1) + torch.tensor([1, 3, 5], device=pos.device)
    place = (_bits(pos) * odd).sum(dim=1)
    atom = (data["z"].long() + 1) * _SPREAD * odd[:, 0]
    found = torch.stack([atom, place], dim=1)
    if batch is None:
        found = found.sum(dim=0, keepdim=True)
    else:
        found = found.new_zeros(graphs, 2).index_add(0, batch, found)
    lattice = [data[key] for key in ("cell", "pbc") if isinstance(data.get(key), Tensor)]
    for values in lattice:
        bits = _bits(values).reshape(found.shape[0], -1)
        found[:, 1] += (bits * (2 * torch.arange(bits.shape[1], device=pos.device) + 1)).sum(dim=1)
    last = torch.as_tensor(kind, dtype=torch.long, device=pos.device).expand(found.shape[0]).unsqueeze(1)
    return torch.cat([found, last], dim=1)


def _bits(values: Tensor) -> Tensor:
    """The bits of numbers in float64, mixed, as integers; 0 and -0 are the same."""
    bits = (values.detach().double() + 0.0).contiguous().view(torch.long) * _SPREAD
    return bits ^ (bits >> 31)
