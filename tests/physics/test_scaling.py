"""How work grows with the number of atoms: counted, not timed, so that the exponent is the same on every machine.

Systems are rods of molecules that grow at one end. In a rod the surface grows with the volume, so that the exponent
is that of the method at a few hundred atoms already.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import factories
from nbody_pyg import BondTree, FromAssignment, NestedShells, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.multipoles import FastMultipole, direct_potential
from nbody_pyg.system import System

SPACING, LONGEST = 3.1, 2048
SCHEMES = {
    "shells": NestedShells((3.5, 5.0)),
    "survivors": SmoothSurvivors(),
    "bonds": BondTree(),
    "pieces": ShellsAndPieces(),
}


class Work(TorchDispatchMode):
    """Counts what torch's operations do, of forward and backward passes alike: elements written, products summed.

    Views write nothing. Both are integers that no machine, clock or number of threads changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = out if isinstance(out, (tuple, list)) else [out]
            self.elements += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def work(call) -> Work:
    """What a call does, once it has done all that is done once and kept."""
    with Work():
        call()
    with Work() as counted:
        call()
    return counted


def assert_grows(sizes, counts, power: float, tolerance: float = 0.1) -> None:
    """The counts grow with this power of the sizes, from each size to the next."""
    assert min(counts) > 0, "nothing was counted"
    for (small, large), (before, after) in zip(pairwise(sizes), pairwise(counts), strict=True):
        found = math.log(after / before) / math.log(large / small)
        assert abs(found - power) < tolerance, f"from {small} to {large} the power is {found:.3f}, not {power}"


def rod(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Molecules of water, each turned its own way, on a lattice of length x 2 x 2."""
    generator = torch.Generator().manual_seed(0)
    water = torch.tensor([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]], dtype=torch.float64)
    grid = torch.cartesian_prod(torch.arange(length), torch.arange(2), torch.arange(2)).double() * SPACING
    # A short rod is the beginning of a long one
    turns = torch.linalg.qr(torch.randn(LONGEST, 3, 3, dtype=torch.float64, generator=generator))[0][: len(grid)]
    pos = grid.unsqueeze(1) + water @ turns
    return torch.tensor([8, 1, 1]).repeat(len(grid)), pos.reshape(-1, 3)


potential = functools.partial(factories.potential, species=[1, 8], channels=2, correlation=3, num_basis=3)


def halves(size: int, finest: int, levels: int) -> torch.Tensor:
    """Labels of nested parts, [size, levels]: each level joins two parts of the one below."""
    first = torch.arange(size) // finest
    return torch.stack([first // 2**k for k in range(levels)], dim=1)


def long_range_work(method: str, length: int, levels: int) -> tuple[int, Work]:
    """Number of atoms, and what energy and forces take beyond those of the same network without long range."""
    z, pos = rod(length)
    labels = halves(len(z), 12, levels)
    cutoffs = tuple(2.5 * SPACING * 2**k for k in range(levels))
    scheme = FromAssignment(labels=labels.tolist(), cutoff=4.0, part_cutoffs=cutoffs)
    options = {"method": method} | ({"lmax": 2} if method == "hierarchy" else {})
    with_it, without = potential(scheme, long_range=options), potential(scheme)
    found, local = work(lambda: with_it(z, pos)), work(lambda: without(z, pos))
    found.elements -= local.elements
    found.flops -= local.flops
    return len(z), found


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_energy_and_forces_of_local_schemes_are_linear(name):
    model, rods = potential(SCHEMES[name]), [rod(length) for length in (32, 64, 128)]
    found = [work(lambda z=z, pos=pos: model(z, pos)) for z, pos in rods]
    sizes = [len(z) for z, _ in rods]
    assert_grows(sizes, [w.elements for w in found], 1.0)
    assert_grows(sizes, [w.flops for w in found], 1.0)


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_and_edges_of_local_schemes_are_linear(name):
    """Neighbour search is C++ that no counter sees: here is what it finds."""
    rods = [rod(length) for length in (64, 256)]
    found = [SCHEMES[name].compose(System.from_tensors(z, pos)) for z, pos in rods]
    sizes = [len(z) for z, _ in rods]
    for level in range(found[0].num_levels):
        for index in ("child_index", "pair_index"):
            edges = [getattr(topology, index)[level] for topology in found]
            if edges[0] is not None and edges[0].shape[1]:
                assert_grows(sizes, [e.shape[1] for e in edges], 1.0)
    for level in range(found[0].num_levels - 1):
        assert_grows(sizes, [topology.size(level) for topology in found], 1.0)


@pytest.mark.slow
def test_long_range_through_a_hierarchy_is_linear():
    """The hierarchy grows with the rod: its highest level with pairs, where all parts meet, keeps its size."""
    sizes, found = zip(*(long_range_work("hierarchy", 64 * 2**k, 5 + k) for k in range(2)), strict=True)
    assert_grows(sizes, [w.elements for w in found], 1.0)
    assert_grows(sizes, [w.flops for w in found], 1.0)


@pytest.mark.slow
def test_long_range_by_the_direct_sum_is_quadratic():
    sizes, found = zip(*(long_range_work("direct", length, 2) for length in (16, 32, 64)), strict=True)
    assert_grows(sizes, [w.elements for w in found], 2.0)


@pytest.mark.slow
def test_fast_multipole_is_linear_and_the_direct_sum_quadratic():
    sizes, fast, direct = [], [], []
    for k in range(3):
        _, pos = rod(32 * 2**k)
        size = len(pos)
        charges = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        labels, method = halves(size, 12, 4 + k), FastMultipole(2, 1.5)
        exact = direct_potential(charges, pos)
        assert (method.potential(charges, pos, labels) - exact).norm() < 1e-2 * exact.norm()
        sizes.append(size)
        fast.append(work(lambda c=charges, p=pos, b=labels, m=method: m.potential(c, p, b)))
        direct.append(work(lambda c=charges, p=pos: direct_potential(c, p)))
    assert_grows(sizes, [w.elements for w in fast], 1.0)
    assert_grows(sizes, [w.flops for w in fast], 1.0)
    assert_grows(sizes, [w.elements for w in direct], 2.0)


def test_the_count_sees_a_table_of_all_pairs():
    """One mask over all pairs beside linear work is enough."""
    sizes, model, found = [], potential(SCHEMES["shells"]), []
    for length in (64, 128):
        z, pos = rod(length)

        def with_a_mask(z=z, pos=pos):
            for _ in range(16):
                torch.cdist(pos, pos) < 5.0  # noqa: B015
            model(z, pos)

        sizes.append(len(z))
        found.append(work(with_a_mask))
    with pytest.raises(AssertionError, match=r"from 768 to 1536 the power is 1\.[2-9]"):
        assert_grows(sizes, [w.elements for w in found], 1.0)


@pytest.mark.parametrize("counts", [[10, 10, 10], [10, 24, 48], [10, 20, 80], [0, 0, 0], [10, 40, 160]])
def test_other_powers_are_rejected(counts):
    assert_grows([1, 2, 4], [10, 20, 41], 1.0)
    with pytest.raises(AssertionError):
        assert_grows([1, 2, 4], counts, 1.0)
