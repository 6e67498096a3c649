"""Geometry of atoms: complete neighbour lists, edge vectors, strain and norms that are safe at zero.

Conventions (the same everywhere in the library): ``index[0]`` is the source, ``index[1]`` the target;
``vec = pos[source] - pos[target] + shift @ cell``; the rows of ``cell`` are the lattice vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nbody_pyg.data import implied_pbc
from nbody_pyg.kernels.autograd_flags import has_values
from nbody_pyg.required import required

# Two atoms nearer than this (angstrom) are an error in the input, not a geometry.
COINCIDENT = 1e-6
# Above this number of candidate pairs in one graph the cell list of vesin is faster than trying all of them
# (measured on one core: about 200 atoms of a molecule, about 10 atoms of a crystal).
_MAX_DENSE_OPEN = 40_000
_MAX_DENSE_PERIODIC = 3_000
# Largest number of candidates tested together, for any backend, to limit memory.
_DENSE_CHUNK = 10_000_000
_BIN_CHUNK = 2_000_000
# More pairs than this (about 10 GB) indicate wrong units.
_MAX_PAIRS = 100_000_000
# Inverse condition of a cell (volume over the product of edge lengths) under which it counts as singular.
_SINGULAR = 1e-8


def has_volume(cell: Float[Tensor, "*graphs 3 3"]) -> bool:
    """Whether some cell has a volume, unlike those of some slabs and wires; a stress is defined only then."""
    return bool(torch.linalg.det(cell.double()).abs().max() > _SINGULAR)


# --------------------------------------------------------------------------------------------------
# Checks of the input, shared with the potential
# --------------------------------------------------------------------------------------------------
def check_batch(batch: Tensor | None, num_nodes: int, device: torch.device) -> tuple[Tensor, int]:
    """Return ``(batch, num_graphs)``; zeros when ``batch`` is None.

    Raises:
        ValueError: wrong length, not sorted or negative.
        TypeError: not an integer tensor.
    """
    if batch is None:
        return torch.zeros(num_nodes, dtype=torch.long, device=device), 1
    if not isinstance(batch, Tensor):
        raise TypeError(f"batch must be an integer tensor, got a {type(batch).__name__}; make one with torch.as_tensor")
    if batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise TypeError(f"batch must be an integer tensor, got {batch.dtype}; cast it with batch.long()")
    if batch.dim() != 1 or batch.shape[0] != num_nodes:
        raise ValueError(
            f"batch must have shape [{num_nodes}], one graph number per atom, got {list(batch.shape)}; "
            "pass the batch vector that belongs to these positions"
        )
    if batch.device != device:
        raise ValueError(f"batch must be on the device of pos, {device}, got {batch.device}; move it with .to(device)")
    if num_nodes == 0:
        return batch.long(), 0
    if bool((batch[1:] < batch[:-1]).any()) or int(batch[0]) < 0:
        raise ValueError(
            "batch must be sorted in ascending order and start at 0 or above, and it is not; "
            "put the atoms of each graph together (torch_geometric.data.Batch.from_data_list does so)"
        )
    return batch.long(), int(batch[-1]) + 1


def check_batch_size(batch_size: int | None, found: int) -> int:
    """The number of graphs: as given, or those that the atoms name where it is None.

    Raises: TypeError, ValueError: no whole number, or less than the atoms name.
    """
    if batch_size is None:
        return found
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be a whole number of graphs, got {batch_size!r}")
    if batch_size < found:
        raise ValueError(f"batch_size must be at least {found}, the number of graphs in batch, got {batch_size!r}")
    return batch_size


def check_atoms(z: Tensor, pos: Tensor, values: bool = True) -> Int[Tensor, " atoms"]:
    """The atomic numbers as int64, for positions [num_atoms, 3] on the same device.

    Args:
        values: also look at the values.

    Raises: TypeError: no tensors, numbers that are no integers, positions that are not floating. ValueError: wrong
        shapes, lengths that differ, two devices; positions that are not finite, numbers beyond 118.
    """
    named: dict[str, Any] = {"z": z, "pos": pos}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            given = "None" if value is None else f"a {type(value).__name__}"
            raise TypeError(f"{name} must be a tensor, got {given}; make one with torch.as_tensor")
    if z.is_floating_point() or z.is_complex() or z.dtype == torch.bool:
        raise TypeError(f"z must hold integers (atomic numbers), got {z.dtype}; cast it with z.long()")
    if z.device != pos.device:
        raise ValueError(
            f"z and pos must be on one device, got {z.device} and {pos.device}; move them with .to(device)"
        )
    check_positions(pos, values=False)
    if z.dim() != 1 or z.shape[0] != pos.shape[0]:
        raise ValueError(f"z must have shape [{pos.shape[0]}], one atomic number per row of pos, got {list(z.shape)}")
    # One question, since each waits for a GPU
    if values and not bool(torch.isfinite(pos).all() & ((z >= 0) & (z <= 118)).all()):
        check_positions(pos)
        wrong = z[(z < 0) | (z > 118)].tolist()
        raise ValueError(f"z must hold atomic numbers up to 118, got {_some(wrong)}; 0 is the smallest")
    return z.long()


def check_positions(pos: Tensor, values: bool = True) -> None:
    """Raise unless ``pos`` is a floating tensor [num_nodes, 3], with ``values`` a finite one."""
    if not pos.is_floating_point():
        raise TypeError(f"pos must be a floating tensor, got {pos.dtype}; cast it with pos.to(torch.float64)")
    if pos.dim() != 2 or pos.shape[1] != 3:
        raise ValueError(f"pos must have shape [num_atoms, 3], got {list(pos.shape)}; give x, y and z of each")
    if values and not bool(torch.isfinite(pos).all()):
        bad = (~torch.isfinite(pos)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"pos must be finite, but atom(s) {_some(bad)} have NaN or infinite coordinates; "
            "remove these frames, or look for the step at which the simulation blew up"
        )


def check_cell(
    cell: Tensor | None, pbc: Tensor | Sequence[bool] | bool | None, num_graphs: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return cell [B, 3, 3] in the dtype of ``like`` and pbc [B, 3], or ``(cell, None)`` without periodicity.

    A cell without ``pbc`` is periodic along each of its non-zero vectors. One cell is shared by all graphs.

    Raises:
        ValueError: wrong shapes, pbc without a cell, a singular cell along periodic directions.
    """
    if cell is not None:
        cell = torch.as_tensor(cell, device=like.device).to(like.dtype)
        if cell.shape[-2:] != (3, 3) or cell.dim() not in (2, 3):
            raise ValueError(f"cell must have shape [num_graphs, 3, 3] or [3, 3], got {list(cell.shape)}")
        if not bool(torch.isfinite(cell).all()):
            raise ValueError("cell must be finite, but it holds NaN or infinite entries; check how it was read")
        cell = cell.reshape(-1, 3, 3)
        if cell.shape[0] == 1 and num_graphs != 1:
            cell = cell.expand(num_graphs, 3, 3)
        if cell.shape[0] != num_graphs:
            raise ValueError(
                f"cell must hold one 3x3 matrix for each of the {num_graphs} graphs, got {cell.shape[0]}; "
                "store it on each Data as [1, 3, 3]"
            )
    if pbc is None:
        if cell is None:
            return None, None
        pbc = implied_pbc(cell)
    pbc = torch.as_tensor(pbc, dtype=torch.bool, device=like.device)
    if pbc.dim() == 0:
        pbc = pbc.expand(1, 3)
    if pbc.shape[-1] != 3 or pbc.dim() > 2:
        raise ValueError(f"pbc must be a bool or have shape [num_graphs, 3] or [3], got {list(pbc.shape)}")
    pbc = pbc.reshape(-1, 3)
    if pbc.shape[0] == 1 and num_graphs != 1:
        pbc = pbc.expand(num_graphs, 3)
    if pbc.shape[0] != num_graphs:
        raise ValueError(
            f"pbc must hold one row for each of the {num_graphs} graphs, got {pbc.shape[0]}; "
            "store it on each Data as [1, 3]"
        )
    if not bool(pbc.any()):
        return cell, None
    if cell is None:
        raise ValueError(f"pbc is {_some(pbc.tolist())} but cell is None; pass cell [num_graphs, 3, 3]")
    return cell, pbc


def _some(items: Sequence[Any], limit: int = 5) -> str:
    text = ", ".join(str(item) for item in items[:limit])
    return text + (f", ... ({len(items)} in all)" if len(items) > limit else "")


# --------------------------------------------------------------------------------------------------
# Lattice helpers
# --------------------------------------------------------------------------------------------------
def complete_cell(cell: Float[Tensor, "graphs 3 3"], pbc: Bool[Tensor, "graphs 3"]) -> Tensor:
    """Replace the vectors of the non-periodic directions by unit vectors normal to the periodic ones.

    The result is invertible whenever the periodic vectors are independent, so a slab, a wire or a zero cell
    with ``pbc=False`` needs no special case afterwards.

    Raises:
        ValueError: the periodic vectors of a graph are zero or linearly dependent.
    """
    cell = cell.detach().to(torch.float64)
    full = torch.where(pbc.unsqueeze(-1), cell, torch.zeros_like(cell))
    for graph, axes in enumerate(pbc.tolist()):
        if not all(axes) and any(axes):
            # The right singular vectors of vanishing singular value span the normal space.
            normal = torch.linalg.svd(full[graph]).Vh[sum(axes) :]
            full[graph, [k for k in range(3) if not axes[k]]] = normal
        elif not any(axes):
            full[graph] = torch.eye(3, dtype=torch.float64, device=cell.device)
    length = full.norm(dim=-1).prod(dim=-1)
    flat = torch.linalg.det(full).abs() <= _SINGULAR * length
    bad = (flat | ~torch.isfinite(length)).nonzero().flatten().tolist()
    if bad:
        graph = bad[0]
        raise ValueError(
            f"cell of graph {graph} is singular along its periodic directions: cell = "
            f"{cell[graph].tolist()}, pbc = {pbc[graph].tolist()}; give linearly independent lattice vectors "
            "or set pbc to False along the directions that do not repeat"
        )
    return full


def _heights(full: Tensor) -> Tensor:
    """Distances between opposite faces of each cell, [B, 3]."""
    heights: Tensor = 1.0 / torch.linalg.inv(full).norm(dim=-2)
    return heights


def _reduce(full: Tensor, pbc: Tensor) -> tuple[Tensor, Tensor]:
    """Short vectors of the same lattices, and the integers U of ``short = U @ full``, [B, 3, 3] both."""
    short, steps = full.clone(), torch.eye(3, dtype=full.dtype, device=full.device).expand_as(full).clone()
    # Each step shortens a vector, so that this ends; the bound is for ties that rounding turns round and round
    for _ in range(1000):
        changed = False
        for i, j in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
            count = torch.round((short[:, i] * short[:, j]).sum(-1) / short[:, j].square().sum(-1))
            count = torch.where(pbc[:, i] & pbc[:, j], count, torch.zeros_like(count)).unsqueeze(-1)
            short[:, i] -= count * short[:, j]
            steps[:, i] -= count * steps[:, j]
            changed |= bool(count.any())
        if not changed:
            break
    return short, steps


def nearest_images(
    vec: Float[Tensor, "edges 3"],
    graph: Int[Tensor, " edges"],
    cell: Float[Tensor, "graphs 3 3"],
    pbc: Bool[Tensor, "graphs 3"],
    clear: float = 1.05,
) -> tuple[Float[Tensor, "edges 3"], Float[Tensor, " edges"]]:
    r"""Lattice shifts n for which ``vec + n @ cell`` is shortest, and how much longer the next image is.

    Exact in every cell, however skewed or small: vectors are rounded in a basis of short lattice vectors, and where
    another image could be within ``clear`` times that length, all that could are tried.

    Args:
        clear: ratio above which the next image is not looked at.

    Returns:
        ``(shift, ratio)``: shifts in float64, and the length of the next image over that of the nearest; infinite
        where it is above ``clear``.
    """
    full = complete_cell(cell, pbc)
    short, steps = _reduce(full, pbc)
    inverse = torch.linalg.inv(short)
    vec, axes = vec.detach().double(), pbc[graph]
    count = -torch.round(torch.bmm(vec.unsqueeze(1), inverse[graph]).squeeze(1)).masked_fill(~axes, 0.0)
    near = vec + torch.bmm(count.unsqueeze(1), short[graph]).squeeze(1)
    # A lattice vector of length L has at most L / height steps along each axis
    heights = torch.where(pbc, 1.0 / inverse.norm(dim=-2), torch.full_like(full[:, 0], torch.inf))
    reach = torch.floor((1.0 + clear) * near.norm(dim=1, keepdim=True) / heights[graph])
    ratio = torch.full_like(near[:, 0], torch.inf)
    crowded = (reach >= 1.0).any(dim=1).nonzero().flatten()
    if len(crowded):
        grid = torch.cartesian_prod(
            *(torch.arange(-n, n + 1.0, dtype=vec.dtype, device=vec.device) for n in reach.amax(0).tolist())
        )
        for part in crowded.split(max(1, _DENSE_CHUNK // len(grid))):
            lattice = grid @ short[graph[part]]
            allowed = ((grid == 0) | axes[part].unsqueeze(1)).all(dim=-1)
            length = (near[part].unsqueeze(1) + lattice).norm(dim=-1).masked_fill(~allowed, torch.inf)
            value, which = length.topk(2, dim=1, largest=False)
            count[part] += grid[which[:, 0]]
            ratio[part] = value[:, 1] / value[:, 0].clamp(min=COINCIDENT)
    ratio = ratio.masked_fill(ratio > clear, torch.inf)
    return torch.bmm(count.unsqueeze(1), steps[graph]).squeeze(1), ratio


# --------------------------------------------------------------------------------------------------
# The neighbour list
# --------------------------------------------------------------------------------------------------
def neighbour_list(
    pos: Float[Tensor, "atoms 3"],
    cutoff: float,
    batch: Int[Tensor, " atoms"] | None = None,
    cell: Float[Tensor, "*graphs 3 3"] | None = None,
    pbc: Bool[Tensor, "*graphs 3"] | Sequence[bool] | bool | None = None,
    *,
    backend: str = "auto",
    allow_coincident: bool = False,
) -> tuple[Int[Tensor, "2 edges"], Float[Tensor, "edges 3"]]:
    r"""All ordered pairs of atoms, and of atoms and periodic images, nearer than ``cutoff``.

    .. math:: \{(j, i, n) : |r_j - r_i + n C| < r_\mathrm{cut}\} \setminus \{(i, i, 0)\}

    The list is complete (no cap on the number of neighbours), holds both directions, and is sorted by
    target, then source, then shift, so that it is the same for each backend. An atom sees its own images when
    the cell is smaller than the cutoff. Positions may lie outside the cell, cells may be skewed, periodicity
    may be mixed. The list holds integers: no gradient flows through it; see :func:`edge_vectors`.

    ==========  =======================================  ==================================================
    argument    shape, unit                              meaning
    ==========  =======================================  ==================================================
    ``pos``     [num_atoms, 3], angstrom                 any float; distances are taken in float64
    ``cutoff``  angstrom                                 pairs at exactly this distance are left out
    ``batch``   [num_atoms], sorted                      graph of each atom; None for one graph
    ``cell``    [num_graphs, 3, 3] or [3, 3], angstrom   rows are the lattice vectors
    ``pbc``     [num_graphs, 3], [3] or bool             None: periodic along each non-zero cell vector
    ==========  =======================================  ==================================================

    Args:
        backend: ``"torch"`` tries all pairs and images, and above ten million of them those in neighbouring bins, on
            the device of ``pos``; ``"vesin"`` is a cell list of linear cost on the CPU, which leaves shapes that it
            cannot take to torch; ``"auto"`` takes the faster one by the number of candidate pairs.
        allow_coincident: keep pairs nearer than 1e-6 angstrom instead of refusing them. For centres of parts,
            which may fall on one point; atoms never should.

    Returns:
        ``(index, shift)``: sources and targets [2, num_edges]; lattice shifts [num_edges, 3], integers in the
        dtype of ``pos`` (zeros without periodicity).

    Raises:
        ValueError: cutoff not positive, NaN or infinite positions, coincident atoms, a singular cell, wrong
            shapes, batch not sorted, a cell so small for the cutoff that the list would not fit into memory.
        TypeError: positions that are not floating, a batch that is not integer.
    """
    if not (isinstance(cutoff, (int, float)) and math.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"cutoff must be a positive, finite number (angstrom), got {cutoff!r}; use e.g. 5.0")
    if backend not in ("auto", "torch", "vesin"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'vesin', got {backend!r}")
    check_positions(pos)
    num_graphs_cell = 1 if cell is None or cell.dim() == 2 else cell.shape[0]
    graph, num_graphs = check_batch(batch, pos.shape[0], pos.device)
    num_graphs = max(num_graphs, num_graphs_cell)
    cell, pbc = check_cell(cell, pbc, num_graphs, pos)
    where, cutoff = pos.detach().to(torch.float64), float(cutoff)
    count = torch.bincount(graph, minlength=num_graphs) if batch is not None else graph.new_tensor([len(pos)])
    candidates, full = (count * count).double(), None
    if pbc is not None:
        full = complete_cell(required(cell), pbc)
        heights = _heights(full)
        _refuse_huge(count, cutoff, heights, pbc)
        images = torch.ceil(cutoff / heights + 1e-6).long().masked_fill(~pbc, 0)
        candidates = candidates * (2.0 * images + 1.0).prod(dim=-1)
    if backend == "vesin" or (backend == "auto" and _prefer_cell_list(candidates, pbc is not None)):
        index, shift, square = _cell_list(where, cutoff, count, full, pbc)
    elif float(candidates.sum()) > _DENSE_CHUNK:
        if pbc is None:
            full = torch.eye(3, dtype=where.dtype, device=where.device).expand(num_graphs, 3, 3)
            pbc = torch.zeros(num_graphs, 3, dtype=torch.bool, device=where.device)
        index, shift, square = _binned(where, cutoff, graph, count, required(full), pbc)
    elif pbc is None:
        index, shift, square = _dense_open(where, cutoff, graph, count)
    else:
        index, shift, square = _dense_periodic(where, cutoff, graph, count, required(full), pbc, images)
    if not allow_coincident:
        _refuse_coincident(index, shift, square, graph)
    return index, shift.to(pos.dtype)


def _prefer_cell_list(candidates: Tensor, periodic: bool) -> bool:
    if candidates.device.type != "cpu":
        # A round trip to the CPU costs more than trying a few million pairs.
        return float(candidates.sum()) > _DENSE_CHUNK
    largest = _MAX_DENSE_PERIODIC if periodic else _MAX_DENSE_OPEN
    return float(candidates.max()) > largest or float(candidates.sum()) > _DENSE_CHUNK


def _refuse_huge(count: Tensor, cutoff: float, heights: Tensor, pbc: Tensor) -> None:
    """Raise ValueError where the images of the atoms alone are more pairs than fit into memory."""
    images = torch.where(pbc, cutoff / heights, torch.ones_like(heights)).clamp(min=1.0).prod(dim=-1)
    pairs = count * images
    if bool((pairs > _MAX_PAIRS).any()):
        graph = int(pairs.argmax())
        number, faces = float(pairs[graph]), ", ".join(f"{h:.3g}" for h in heights[graph].tolist())
        raise ValueError(
            f"cell of graph {graph} is too small for a cutoff of {cutoff:g} angstrom: its {int(count[graph])} atom(s) "
            f"have some {number:.1e} pairs with their own images alone ({number / 1e7:.0f} GB), as its faces are "
            f"{faces} angstrom apart; check the units of the cell, or take another choice of lattice vectors"
        )


def _refuse_coincident(index: Tensor, shift: Tensor, square: Tensor, graph: Tensor) -> None:
    near = square < COINCIDENT**2
    if bool(near.any()):
        edge = int(near.nonzero()[0])
        source, target = sorted(index[:, edge].tolist())
        image = f" (periodic image {[int(s) for s in shift[edge].tolist()]})" if bool(shift[edge].any()) else ""
        raise ValueError(
            f"pos must not hold coincident atoms, but atoms {source} and {target}{image} of graph "
            f"{int(graph[target])} are {float(square[edge]) ** 0.5:.1e} angstrom apart "
            f"(limit {COINCIDENT:g}), one of {int(near.sum()) // 2 or 1} such pair(s); "
            "remove duplicates, or check the cell and the units of pos"
        )


def _dense_open(pos: Tensor, cutoff: float, graph: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs within each graph: sum of N_b^2 candidates, already in sorted order."""
    if count.shape[0] == 1:
        vec = pos.unsqueeze(0) - pos.unsqueeze(1)  # [target, source]
        square = (vec * vec).sum(dim=-1)
        near = square < cutoff * cutoff
        near.fill_diagonal_(False)
        target, source = near.nonzero(as_tuple=True)
        square = square[target, source]
    else:
        first = torch.cumsum(count, 0) - count
        target, place = ragged(count[graph])
        source = first[graph[target]] + place
        vec = pos[source] - pos[target]
        square = (vec * vec).sum(dim=-1)
        near = (square < cutoff * cutoff) & (source != target)
        source, target, square = source[near], target[near], square[near]
    return torch.stack([source, target]), pos.new_zeros(source.shape[0], 3), square


def _wrap(pos: Tensor, graph: Tensor, full: Tensor, pbc: Tensor) -> tuple[Tensor, Tensor]:
    """Positions moved into the cell along the periodic directions, and the lattice shifts taken off."""
    fraction = torch.bmm(pos.unsqueeze(1), torch.linalg.inv(full)[graph]).squeeze(1)
    offset = torch.where(pbc[graph], torch.floor(fraction), torch.zeros_like(fraction))
    return pos - torch.bmm(offset.unsqueeze(1), full[graph]).squeeze(1), offset


def _dense_periodic(
    pos: Tensor, cutoff: float, graph: Tensor, count: Tensor, full: Tensor, pbc: Tensor, images: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs and all images that can reach, already in sorted order."""
    wrapped, offset = _wrap(pos, graph, full, pbc)
    side = 2 * images + 1
    per_graph = side.prod(dim=-1)
    first = torch.cumsum(count, 0) - count
    width = (count * per_graph)[graph]  # candidates of each target
    target, local = ragged(width)
    b = graph[target]
    source = first[b] + local // per_graph[b]
    step = _unravel(local % per_graph[b], side[b]) - images[b]
    return _near(wrapped, offset, full, b, source, target, step.to(pos.dtype), cutoff)


def _binned(
    pos: Tensor, cutoff: float, graph: Tensor, count: Tensor, full: Tensor, pbc: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs from bins a little wider than the cutoff and the bins around; linear cost, in pieces of bounded memory.

    Only bins with atoms are known, so that there may be any number of them: cells of any shape, atoms anywhere.
    """
    wrapped, offset = _wrap(pos, graph, full, pbc)
    heights, wide = _heights(full), cutoff * (1.0 + 1e-6)
    # Bins along a lattice vector; a direction that does not repeat has bins without end
    bins = torch.where(pbc, torch.floor(heights / wide).clamp(min=1.0), heights / wide)
    reach = torch.where(pbc, torch.ceil(cutoff * bins / heights + 5e-7), torch.ones_like(bins)).long()
    fraction = torch.bmm(wrapped.unsqueeze(1), torch.linalg.inv(full)[graph]).squeeze(1)
    place = torch.floor(fraction * bins[graph]).clamp(-(2.0**52), 2.0**52)
    place = torch.where(pbc[graph], torch.minimum(place.clamp(min=0.0), bins[graph] - 1.0), place).long()
    # The number of a bin is found axis by axis among those that exist: products of all would overflow
    number, known = graph, []
    for axis in range(3):
        values, rank = torch.unique(place[:, axis], return_inverse=True)
        pairs, number = torch.unique(number * len(values) + rank, return_inverse=True)
        known.append((values, pairs))
    order = torch.argsort(number, stable=True)
    size = torch.bincount(number)
    first = torch.cumsum(size, 0) - size
    side, wraps, many = 2 * reach + 1, bins.long().clamp(min=1), pbc.long()
    width = side.prod(dim=-1)[graph]  # bins around each target
    found = []
    for start in range(0, int(width.sum()), _BIN_CHUNK):
        target, local = ragged(width, start, start + _BIN_CHUNK)
        b = graph[target]
        there = place[target] + _unravel(local, side[b]) - reach[b]
        step = torch.div(there, wraps[b], rounding_mode="floor") * many[b]
        there = there - step * wraps[b]
        bin_, exists = b, torch.ones_like(b, dtype=torch.bool)
        for axis, (values, pairs) in enumerate(known):
            rank = torch.searchsorted(values, there[:, axis].contiguous()).clamp(max=len(values) - 1)
            exists &= values[rank] == there[:, axis]
            pair = bin_ * len(values) + rank
            bin_ = torch.searchsorted(pairs, pair).clamp(max=len(pairs) - 1)
            exists &= pairs[bin_] == pair
        target, b, bin_, step = target[exists], b[exists], bin_[exists], step[exists].to(pos.dtype)
        amount = size[bin_]
        for begin in range(0, int(amount.sum()), _BIN_CHUNK):
            row, local = ragged(amount, begin, begin + _BIN_CHUNK)
            source = order[first[bin_[row]] + local]
            found.append(_near(wrapped, offset, full, b[row], source, target[row], step[row], cutoff))
    if not found:
        return torch.zeros(2, 0, dtype=torch.long, device=pos.device), pos.new_zeros(0, 3), pos.new_zeros(0)
    index, shift, square = (torch.cat(part, dim=-1) for part in zip(*[(i, s.t(), d) for i, s, d in found], strict=True))
    sequence = torch.arange(index.shape[1], device=pos.device)
    for key in (shift[2], shift[1], shift[0], index[1] * len(pos) + index[0]):
        sequence = sequence[torch.argsort(key[sequence], stable=True)]
    return index[:, sequence], shift[:, sequence].t(), square[sequence]


def ragged(width: Int[Tensor, " rows"], start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Entries ``start`` to ``end`` of the list 0 0 0 1 1 2 ..., number i ``width[i]`` times, and the place of each.

    >>> ragged(torch.tensor([2, 0, 3]))
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    ends = torch.cumsum(width, 0)
    total = int(ends[-1]) if len(ends) else 0
    flat = torch.arange(start, total if end is None else min(end, total), device=width.device)
    row = torch.searchsorted(ends, flat, right=True)
    return row, flat - (ends - width)[row]


def _unravel(number: Tensor, side: Tensor) -> Tensor:
    """Numbers as places in boxes of ``side`` [_, 3], the last axis fastest."""
    n1, n2 = side[:, 1], side[:, 2]
    return torch.stack([number // (n1 * n2), number // n2 % n1, number % n2], dim=1)


def _near(
    wrapped: Tensor,
    offset: Tensor,
    full: Tensor,
    graph: Tensor,
    source: Tensor,
    target: Tensor,
    step: Tensor,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those candidates that are nearer than the cutoff."""
    vec = wrapped[source] - wrapped[target] + torch.bmm(step.unsqueeze(1), full[graph]).squeeze(1)
    square = (vec * vec).sum(dim=-1)
    near = (square < cutoff * cutoff) & ((source != target) | (step != 0).any(dim=-1))
    source, target = source[near], target[near]
    return torch.stack([source, target]), step[near] - offset[source] + offset[target], square[near]


def _cell_list(
    pos: Tensor, cutoff: float, count: Tensor, full: Tensor | None, pbc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of vesin per graph, on the CPU; sorted afterwards. Shapes that vesin cannot take are left to torch."""
    from vesin import NeighborList

    search = NeighborList(cutoff=cutoff, full_list=True)
    if pbc is None or full is None:
        pbc = torch.zeros(len(count), 3, dtype=torch.bool)
        full = torch.eye(3, dtype=pos.dtype).expand(len(count), 3, 3)
    pos_, full, pbc = pos.cpu(), full.cpu(), pbc.cpu()
    sources, targets, shifts, distances = [], [], [], []
    start = 0
    for b, size in enumerate(count.tolist()):
        if size == 0:
            continue
        part, one = pos_[start : start + size], torch.zeros(size, dtype=torch.long)
        wrapped, offset = _wrap(part, one, full[b : b + 1], pbc[b : b + 1])
        points, moved = wrapped.numpy(), offset.numpy().astype(np.int64)
        box, periodic = full[b].numpy().copy(), bool(pbc[b].any())
        for axis in (~pbc[b]).nonzero().flatten().tolist():
            # A non-periodic direction becomes a vector so long that no image along it is within reach:
            # correct with every version of vesin, also those that know only all or nothing.
            along = points @ box[axis]
            box[axis] *= 2.0 * (along.max() - along.min()) + 2.0 * cutoff + 1.0
        if _too_long_for_vesin(box, cutoff):
            index, shift, square = _binned(part, cutoff, one, torch.tensor([size]), full[b : b + 1], pbc[b : b + 1])
            sources.append(index[0].numpy() + start)
            targets.append(index[1].numpy() + start)
            shifts.append(shift.numpy().astype(np.int64))
            distances.append(square.sqrt().numpy())
            start += size
            continue
        i, j, s, d = search.compute(
            points=points, box=box if periodic else np.zeros((3, 3)), periodic=periodic, quantities="ijSd"
        )
        i, j = i.astype(np.int64), j.astype(np.int64)
        s = s.astype(np.int64)
        if moved.any():
            s += moved[i] - moved[j]
        inside = d < cutoff
        order = np.lexsort((s[:, 2], s[:, 1], s[:, 0], j, i))
        order = order[inside[order]]
        targets.append(i[order] + start)
        sources.append(j[order] + start)
        shifts.append(s[order])
        distances.append(d[order])
        start += size
    if not sources:
        return torch.zeros(2, 0, dtype=torch.long, device=pos.device), pos.new_zeros(0, 3), pos.new_zeros(0)
    index = torch.from_numpy(np.stack([np.concatenate(sources), np.concatenate(targets)]))
    shift = torch.from_numpy(np.concatenate(shifts)).to(torch.float64)
    square = torch.from_numpy(np.concatenate(distances)) ** 2
    return index.to(pos.device), shift.to(pos.device), square.to(pos.device)


def _too_long_for_vesin(box: np.ndarray, cutoff: float) -> bool:
    """Whether vesin might end the process on a box that is far longer one way than another.

    vesin 0.6 cuts a box into at most 100,000 bins. Where there would be more it takes fewer along each axis, in
    proportion, and the number along a short axis can become 0, by which it divides.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        bins = np.maximum(1.0 / np.linalg.norm(np.linalg.inv(box), axis=0) / cutoff, 1.0)
        total = float(np.prod(bins + 1.0))
        return not (total < 50_000 or bins.min() * (100_000 / total) ** (1 / 3) >= 4.0)


# --------------------------------------------------------------------------------------------------
# Differentiable geometry
# --------------------------------------------------------------------------------------------------
def edge_vectors(
    pos: Float[Tensor, "atoms 3"],
    index: Int[Tensor, "2 edges"],
    shift: Float[Tensor, "edges 3"] | None = None,
    cell: Float[Tensor, "*graphs 3 3"] | None = None,
    batch: Int[Tensor, " atoms"] | None = None,
) -> Float[Tensor, "edges 3"]:
    """Vectors ``pos[source] - pos[target] + shift @ cell``, from target to source, with gradients.

    Without ``cell`` the shifts must be zero, as :func:`neighbour_list` returns them for open systems.
    ``batch`` is needed only when there is more than one cell.

    Smoothness: linear in ``pos`` and ``cell``.
    Raises: ValueError: shifts other than zero without ``cell``; several cells without ``batch``.
    """
    check_shift(shift, cell)
    vec = pos.index_select(0, index[0]) - pos.index_select(0, index[1])
    if shift is None or cell is None:
        return vec
    shift = shift.to(vec.dtype)
    cell = cell.reshape(-1, 3, 3).to(vec.dtype)
    if cell.shape[0] == 1:
        return vec + shift @ cell[0]
    if batch is None:
        raise ValueError(f"batch must be given with {cell.shape[0]} cells; pass the graph number of each atom")
    return vec + torch.bmm(shift.unsqueeze(1), cell[batch[index[1]]]).squeeze(1)


def check_shift(shift: Tensor | None, cell: Tensor | None) -> None:
    """Raise ValueError for lattice shifts other than zero without a cell, unless a tracer holds them."""
    if shift is not None and cell is None and has_values(shift) and bool(shift.any()):
        edge = int(shift.any(dim=1).nonzero()[0])
        raise ValueError(
            f"cell must be given with lattice shifts, got None and the shift {shift[edge].tolist()} of edge {edge}; "
            "pass the cell with which neighbour_list found them"
        )


def rounded_positions(
    pos: Float[Tensor, "atoms 3"], batch: Int[Tensor, " atoms"], dtype: torch.dtype
) -> Float[Tensor, "atoms 3"]:
    """Positions in ``dtype``, with gradients; where digits are lost, from the mean of each graph.

    For models that subtract positions themselves. Rounding a position keeps seven digits of its
    distance from the origin: a molecule that lies far away loses its shape.
    """
    if torch.finfo(dtype).eps <= torch.finfo(pos.dtype).eps:
        return pos.to(dtype)
    count = torch.bincount(batch)
    mean = pos.new_zeros(count.shape[0], 3).index_add(0, batch, pos) / count.clamp(min=1).unsqueeze(-1)
    return (pos - mean.index_select(0, batch)).to(dtype)


def safe_norm(vec: Float[Tensor, "*shape dim"], dim: int = -1, keepdim: bool = False) -> Tensor:
    """Euclidean norm whose first and second derivatives are zero, not NaN, at the zero vector.

    Smoothness: C-infinity away from zero; at zero the value is 0 and every derivative is taken as 0.
    """
    square = (vec * vec).sum(dim=dim, keepdim=keepdim)
    zero = square == 0
    # The second `where` alone would still multiply 0 by an infinite derivative of the square root.
    root = torch.sqrt(torch.where(zero, torch.ones_like(square), square))
    return torch.where(zero, torch.zeros_like(square), root)


def apply_strain(
    pos: Float[Tensor, "atoms 3"],
    cell: Float[Tensor, "graphs 3 3"] | None,
    batch: Int[Tensor, " atoms"] | None,
    strain: Float[Tensor, "graphs 3 3"],
) -> tuple[Float[Tensor, "atoms 3"], Float[Tensor, "graphs 3 3"] | None]:
    r"""Deform positions and cell by a symmetric strain.

    .. math:: r' = r (1 + \epsilon), \quad C' = C (1 + \epsilon), \quad \epsilon = (s + s^T) / 2

    The derivative of the energy by ``strain`` at zero, over the volume, is the stress (ASE's sign).
    """
    symmetric = 0.5 * (strain + strain.transpose(-1, -2))
    if symmetric.shape[0] == 1:
        moved = pos + pos @ symmetric[0]
    else:
        if batch is None:
            raise ValueError(f"batch must be given with {symmetric.shape[0]} strains, one per graph")
        moved = pos + torch.bmm(pos.unsqueeze(1), symmetric[batch]).squeeze(1)
    return moved, None if cell is None else cell + torch.bmm(cell, symmetric.expand(cell.shape[0], 3, 3))
