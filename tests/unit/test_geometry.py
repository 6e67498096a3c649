from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nbody_pyg import geometry
from nbody_pyg.geometry import apply_strain, complete_cell, edge_vectors, neighbour_list, safe_norm

F64 = torch.float64
BACKENDS = ("torch", "vesin")


def as_set(index: Tensor, shift: Tensor) -> list[tuple[int, ...]]:
    """Edges as (target, source, shift), in the order of the list."""
    return [tuple(int(v) for v in row) for row in torch.cat([index.flip(0).T, shift.long()], dim=1)]


def brute_force(pos: Tensor, cutoff: float, cell: Tensor, pbc: Tensor, reach: int) -> list[tuple[int, ...]]:
    """Every image within ``reach`` cells, one by one."""
    ranges = [range(-reach, reach + 1) if flag else (0,) for flag in pbc.tolist()]
    found = []
    for i, j in itertools.product(range(len(pos)), repeat=2):
        for n in itertools.product(*ranges):
            vec = pos[j] - pos[i] + torch.tensor(n, dtype=F64) @ cell
            if (i != j or any(n)) and vec.norm() < cutoff:
                found.append((i, j, *n))
    return sorted(found)


def random_case(seed: int, size: int | None = None):
    rng = np.random.default_rng(seed)
    size = size or int(rng.integers(1, 7))
    while True:
        cell = rng.normal(size=(3, 3)) * 2.0 + np.eye(3) * 3.0
        if abs(np.linalg.det(cell)) > 10.0:
            break
    pos = rng.normal(size=(size, 3)) * 5.0  # many of them outside the cell
    pbc = rng.integers(0, 2, size=3).astype(bool)
    cutoff = float(rng.uniform(1.0, 5.0))
    return torch.tensor(pos), cutoff, torch.tensor(cell), torch.tensor(pbc)


# ---------------------------------------------------------------------------------- completeness
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_ase_on_skewed_cells_and_mixed_periodicity(backend, seed):
    pos, cutoff, cell, pbc = random_case(seed)
    atoms = Atoms("H" * len(pos), positions=pos.numpy(), cell=cell.numpy(), pbc=pbc.numpy())
    i, j, shifts = neighbor_list("ijS", atoms, cutoff)
    expected = sorted((int(a), int(b), *map(int, s)) for a, b, s in zip(i, j, shifts, strict=True))
    index, shift = neighbour_list(pos, cutoff, cell=cell[None], pbc=pbc[None], backend=backend)
    assert as_set(index, shift) == expected
    vec = edge_vectors(pos, index, shift, cell[None])
    assert (vec.norm(dim=1) < cutoff).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pbc", list(itertools.product([True, False], repeat=3)))
def test_agrees_with_an_enumeration_of_images(backend, pbc):
    rng = np.random.default_rng(7)
    cell = torch.tensor([[2.1, 0.0, 0.0], [1.4, 2.0, 0.0], [-0.6, 0.5, 2.5]], dtype=F64)
    pos = torch.tensor(rng.random((3, 3))) @ cell
    pbc = torch.tensor(pbc)
    expected = brute_force(pos, 3.4, cell, pbc, reach=5)
    assert len(expected) > (60 if pbc.all() else 0)
    assert as_set(*neighbour_list(pos, 3.4, cell=cell, pbc=pbc, backend=backend)) == expected


def test_one_atom_of_fcc_sees_its_own_images():
    atoms = bulk("Cu", "fcc", a=3.6)
    pos, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    for backend in BACKENDS:
        index, shift = neighbour_list(pos, 6.0, cell=cell, pbc=True, backend=backend)
        distance = edge_vectors(pos, index, shift, cell).norm(dim=1)
        shells, counts = torch.unique((distance * 1e6).round(), return_counts=True)
        assert counts.tolist() == [12, 6, 24, 12, 24]
        np.testing.assert_allclose(shells / 1e6, 3.6 * np.sqrt([0.5, 1.0, 1.5, 2.0, 2.5]), atol=1e-5)


def test_no_cap_on_the_number_of_neighbours():
    pos = torch.rand(150, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2.0
    index, _ = neighbour_list(pos, 10.0)
    assert index.shape[1] == 150 * 149
    assert (torch.bincount(index[1]) == 149).all()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000), st.lists(st.integers(-3, 3), min_size=3, max_size=3))
def test_lattice_translations_of_an_atom_change_shifts_only(seed, steps):
    pos, cutoff, cell, pbc = random_case(seed, size=4)
    moved = pos.clone()
    moved[1] += (torch.tensor(steps, dtype=F64) * pbc) @ cell
    vectors = []
    for where in (pos, moved):
        index, shift = neighbour_list(where, cutoff, cell=cell, pbc=pbc)
        vec = edge_vectors(where, index, shift, cell)
        rows = torch.cat([index.T.to(F64), vec], dim=1).mul(1e6).round().tolist()
        vectors.append(sorted(rows))
    torch.testing.assert_close(torch.tensor(vectors[0]), torch.tensor(vectors[1]), rtol=0, atol=2.0)


def test_both_directions_are_there():
    pos, _, cell, _ = random_case(3, size=6)
    index, shift = neighbour_list(pos, 5.0, cell=cell, pbc=torch.tensor([True, True, False]))
    edges = {(int(a), int(b), *map(int, s)) for (a, b), s in zip(index.T, shift, strict=True)}
    assert edges
    assert {(b, a, -x, -y, -z) for a, b, x, y, z in edges} == edges


@pytest.mark.parametrize("periodic", [False, True])
def test_sorted_by_target_and_the_same_for_both_backends(periodic):
    generator = torch.Generator().manual_seed(1)
    pos = torch.rand(40, 3, dtype=F64, generator=generator) * 7.0
    kwargs = {"cell": torch.eye(3, dtype=F64) * 7.0, "pbc": True} if periodic else {}
    lists = [neighbour_list(pos, 3.0, backend=b, **kwargs) for b in BACKENDS]
    assert lists[0][0].shape[1] > 100
    for one, two in zip(*lists, strict=True):
        assert torch.equal(one, two)
    edges = as_set(*lists[0])
    assert edges == sorted(edges)


def test_large_systems_agree_with_the_plain_path():
    pos = torch.rand(400, 3, dtype=F64, generator=torch.Generator().manual_seed(2)) * 15.0
    for one, two in zip(neighbour_list(pos, 3.0), neighbour_list(pos, 3.0, backend="torch"), strict=True):
        assert torch.equal(one, two)


def test_chunks_give_the_same_list(monkeypatch):
    pos, _, cell, _ = random_case(5, size=6)
    whole = neighbour_list(pos, 5.0, cell=cell, pbc=True, backend="torch")
    open_list = neighbour_list(pos, 9.0, backend="torch")
    monkeypatch.setattr(geometry, "_DENSE_CHUNK", 10)
    for one, two in zip(whole, neighbour_list(pos, 5.0, cell=cell, pbc=True, backend="torch"), strict=True):
        assert torch.equal(one, two)
    assert open_list[0].shape[1] > 0
    for one, two in zip(open_list, neighbour_list(pos, 9.0, backend="torch"), strict=True):
        assert torch.equal(one, two)


# ----------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_batch_of_open_systems_is_the_union(backend):
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 1, 9, 3]
    parts = [torch.randn(n, 3, dtype=F64, generator=generator) * 1.5 for n in sizes]
    batch = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    index, shift = neighbour_list(torch.cat(parts), 2.5, batch, backend=backend)
    expected, start = [], 0
    for part in parts:
        expected.append(neighbour_list(part, 2.5)[0] + start)
        start += len(part)
    assert torch.equal(index, torch.cat(expected, dim=1))
    assert index.shape[1] > 20
    assert shift.shape == (index.shape[1], 3)
    assert not shift.any()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_batch_of_cells_with_different_periodicity_is_the_union(backend):
    cases = [random_case(seed, size) for seed, size in ((11, 3), (12, 5), (13, 2), (14, 4))]
    cell = torch.stack([c[2] for c in cases])
    pbc = torch.stack([c[3] for c in cases])
    pbc[2] = False
    pbc[1] = True
    cell[2] = 0.0
    sizes = torch.tensor([len(c[0]) for c in cases])
    batch = torch.repeat_interleave(torch.arange(4), sizes)
    pos = torch.cat([c[0] for c in cases])
    index, shift = neighbour_list(pos, 4.5, batch, cell, pbc, backend=backend)
    rows, start = [], 0
    for b, case in enumerate(cases):
        part_index, part_shift = neighbour_list(case[0], 4.5, cell=cell[b], pbc=pbc[b])
        rows += [(i + start, j + start, *s) for i, j, *s in as_set(part_index, part_shift)]
        start += len(case[0])
    assert len(rows) > 30
    assert as_set(index, shift) == rows
    vec = edge_vectors(pos, index, shift, cell, batch)
    assert (vec.norm(dim=1) < 4.5).all()


def test_shifts_without_a_cell_are_refused():
    """Without the cell the vectors would be those between the given images."""
    pos, _, cell, _ = random_case(4, size=4)
    index, shift = neighbour_list(pos, 4.0, cell=cell, pbc=True)
    assert (edge_vectors(pos, index, shift, cell).norm(dim=1) < 4.0).all() and len(shift) > 10
    with pytest.raises(
        ValueError, match=r"cell must be given with lattice shifts, got None and the shift \[.*\] of edge"
    ):
        edge_vectors(pos, index, shift)
    index, shift = neighbour_list(pos, 40.0)
    assert torch.equal(edge_vectors(pos, index, shift), edge_vectors(pos, index)) and len(shift) == 12


def test_shared_cell_and_single_cell_shapes():
    pos, _, cell, _ = random_case(4, size=3)
    alone = neighbour_list(pos, 4.0, cell=cell, pbc=True)
    assert torch.equal(neighbour_list(pos, 4.0, cell=cell[None], pbc=torch.ones(1, 3, dtype=torch.bool))[0], alone[0])
    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    twice = neighbour_list(torch.cat([pos, pos]), 4.0, batch, cell, True)
    assert torch.equal(twice[0], torch.cat([alone[0], alone[0] + 3], dim=1))


# ------------------------------------------------------------------------------- special systems
def test_no_atom_one_atom_and_no_edges():
    for pos in (torch.zeros(0, 3), torch.zeros(1, 3), torch.eye(3) * 100.0):
        for kwargs in ({}, {"cell": torch.eye(3) * 300.0, "pbc": True}):
            for backend in ("auto", *BACKENDS):
                index, shift = neighbour_list(pos, 5.0, backend=backend, **kwargs)
                assert index.shape == (2, 0)
                assert index.dtype == torch.long
                assert shift.shape == (0, 3)
                assert shift.dtype == torch.float32
                assert edge_vectors(pos, index, shift).shape == (0, 3)


def test_zero_cell_without_periodicity_is_an_open_system():
    pos = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = neighbour_list(pos, 3.0)
    for pbc in (False, None, torch.zeros(1, 3, dtype=torch.bool)):
        assert torch.equal(neighbour_list(pos, 3.0, cell=torch.zeros(1, 3, 3), pbc=pbc)[0], expected[0])


def test_cell_without_pbc_repeats_along_its_vectors():
    pos = torch.zeros(1, 3, dtype=F64)
    cell = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
    assert neighbour_list(pos, 2.5, cell=cell)[1].tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_float32_positions_and_gradients_are_no_obstacle():
    pos = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    index, shift = neighbour_list(pos, 2.0)
    assert not shift.requires_grad
    vec = edge_vectors(pos, index, shift)
    assert vec.dtype == torch.float32
    assert vec.requires_grad
    with torch.inference_mode():
        assert torch.equal(neighbour_list(pos, 2.0)[0], index)


# ------------------------------------------------------------------------------------------ errors
def bad_calls():
    pos = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    nan, inf = pos.clone(), pos.clone()
    nan[2, 0], inf[4, 1] = float("nan"), float("inf")
    flat = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], dtype=F64)
    eye = torch.eye(3, dtype=F64) * 5
    two = torch.tensor([0, 0, 1, 1, 1])
    return [
        (
            (pos, 0.0),
            {},
            ValueError,
            r"cutoff must be a positive, finite number .* got 0\.0; use e\.g\. 5\.0",
        ),
        ((pos, -1.0), {}, ValueError, r"cutoff must be a positive.* got -1\.0"),
        ((pos, float("nan")), {}, ValueError, "cutoff must be a positive.* got nan"),
        ((nan, 2.0), {}, ValueError, r"pos must be finite, but atom\(s\) 2 have NaN or infinite"),
        ((inf, 2.0), {}, ValueError, r"pos must be finite, but atom\(s\) 4 have NaN or infinite"),
        ((pos.long(), 2.0), {}, TypeError, r"pos must be a floating tensor, got torch\.int64"),
        ((pos.T, 2.0), {}, ValueError, r"pos must have shape \[num_atoms, 3\], got \[3, 5\]"),
        ((pos, 2.0, two.flip(0)), {}, ValueError, "batch must be sorted"),
        ((pos, 2.0, two - 1), {}, ValueError, "batch must be sorted in ascending order and start at 0"),
        ((pos, 2.0, two[:3]), {}, ValueError, r"batch must have shape \[5\], .* got \[3\]"),
        ((pos, 2.0, two.float()), {}, TypeError, r"batch must be an integer tensor, got torch\.float32"),
        ((pos, 2.0), {"pbc": True}, ValueError, "pbc is .* but cell is None; pass cell"),
        (
            (pos, 2.0),
            {"cell": flat, "pbc": True},
            ValueError,
            "cell of graph 0 is singular along its periodic",
        ),
        ((pos, 2.0), {"cell": eye * 0, "pbc": True}, ValueError, "cell of graph 0 is singular"),
        ((pos, 2.0), {"cell": eye * float("nan"), "pbc": True}, ValueError, "cell must be finite"),
        ((pos, 2.0), {"cell": eye[:2], "pbc": True}, ValueError, r"cell must have shape .* got \[2, 3\]"),
        ((pos, 2.0, two), {"cell": eye.repeat(3, 1, 1)[:, :, :2]}, ValueError, "cell must have shape"),
        ((pos, 2.0), {"cell": eye, "pbc": [True, False]}, ValueError, r"pbc must be a bool .* got \[2\]"),
        (
            (pos, 2.0),
            {"backend": "scipy"},
            ValueError,
            "backend must be 'auto', 'torch' or 'vesin', got 'scipy'",
        ),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_bad_input_is_named(case):
    args, kwargs, error, message = bad_calls()[case]
    with pytest.raises(error, match=message):
        neighbour_list(*args, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coincident_atoms_are_named(backend):
    pos = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    pos[5] = pos[3] + 1e-8
    batch = torch.tensor([0, 0, 1, 1, 1, 1])
    message = r"coincident atoms, but atoms 3 and 5 of graph 1 are .* angstrom apart \(limit 1e-06\), one of 1 such"
    with pytest.raises(ValueError, match=message):
        neighbour_list(pos, 2.0, batch, backend=backend)
    index, _ = neighbour_list(pos, 2.0, batch, backend=backend, allow_coincident=True)
    assert ((index[0] == 3) & (index[1] == 5)).any()
    cell = torch.eye(3, dtype=F64) * 4.0
    pos[5] = pos[3] + cell[0]
    with pytest.raises(ValueError, match=r"atoms 3 and 5 \(periodic image \[-?1, 0, 0\]\)"):
        neighbour_list(pos, 2.0, cell=cell, pbc=True, backend=backend)


# -------------------------------------------------------------------------- differentiable parts
def test_edge_vectors_point_from_target_to_source():
    pos = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=F64)
    index = torch.tensor([[1], [0]])
    assert edge_vectors(pos, index).tolist() == [[1.0, 2.0, 3.0]]
    shift, cell = torch.tensor([[0.0, 1.0, 0.0]]), torch.diag(torch.tensor([4.0, 5.0, 6.0])).to(F64)
    assert edge_vectors(pos, index, shift, cell).tolist() == [[1.0, 7.0, 3.0]]
    with pytest.raises(ValueError, match="batch must be given with 2 cells"):
        edge_vectors(pos, index, shift, cell.repeat(2, 1, 1))


def test_edge_vectors_have_gradients_through_positions_and_cells():
    pos, _, cell, _ = random_case(9, size=4)
    batch = torch.tensor([0, 0, 1, 1])
    cells = torch.stack([cell, cell + 0.3]).requires_grad_(True)
    index, shift = neighbour_list(pos, 4.0, batch, cells, True)
    assert index.shape[1] > 10
    pos.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p, c: edge_vectors(p, index, shift, c, batch), (pos, cells))


def test_safe_norm_is_the_norm_and_twice_differentiable():
    vec = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    torch.testing.assert_close(safe_norm(vec), vec.norm(dim=-1), rtol=0, atol=1e-15)
    assert safe_norm(vec, dim=0, keepdim=True).shape == (1, 3)
    assert torch.autograd.gradcheck(safe_norm, vec)
    assert torch.autograd.gradgradcheck(safe_norm, vec)


def test_safe_norm_has_finite_derivatives_at_zero():
    vec = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype=F64, requires_grad=True)
    norm = safe_norm(vec)
    assert norm.tolist() == [0.0, 5.0]
    (first,) = torch.autograd.grad(norm.sum(), vec, create_graph=True)
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]], dtype=F64)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-15)
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), vec)
    assert torch.isfinite(second).all()
    assert (second[0] == 0).all()


def test_strain_acts_on_positions_and_cell_symmetrically():
    pos, _, cell, _ = random_case(1, size=4)
    batch = torch.tensor([0, 0, 1, 1])
    cells = torch.stack([cell, 2 * cell])
    strain = torch.randn(2, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.1
    moved, stretched = apply_strain(pos, cells, batch, strain)
    for b in range(2):
        deform = torch.eye(3, dtype=F64) + 0.5 * (strain[b] + strain[b].T)
        torch.testing.assert_close(moved[batch == b], pos[batch == b] @ deform, rtol=0, atol=1e-14)
        torch.testing.assert_close(stretched[b], cells[b] @ deform, rtol=0, atol=1e-14)
    alone, none = apply_strain(pos[:2], None, None, strain[:1])
    torch.testing.assert_close(alone, moved[:2], rtol=0, atol=1e-14)
    assert none is None
    with pytest.raises(ValueError, match="batch must be given with 2 strains"):
        apply_strain(pos, cells, None, strain)


def test_completed_cells_keep_periodic_vectors_and_are_invertible():
    _, _, cell, _ = random_case(2)
    for flags in itertools.product([True, False], repeat=3):
        pbc = torch.tensor(flags)
        full = complete_cell(cell[None], pbc[None])[0]
        assert torch.equal(full[pbc], cell[pbc])
        assert torch.linalg.det(full).abs() > 1e-3
        normal = full[~pbc]
        torch.testing.assert_close(normal @ normal.T, torch.eye(len(normal), dtype=F64), rtol=0, atol=1e-12)
        assert (normal @ cell[pbc].T).abs().max().item() < 1e-12 if pbc.any() and len(normal) else True


# ---------------------------------------------------------------------------------- cells of odd shapes
def every_image(pos: np.ndarray, cutoff: float, cell: np.ndarray, pbc: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every pair by itself, with the range of images that its own distance allows."""
    full = complete_cell(torch.tensor(cell)[None], torch.tensor(pbc)[None])[0].numpy()
    inverse, found = np.linalg.inv(full), {}
    reach = cutoff * np.linalg.norm(inverse, axis=0) + 1e-3
    for i, j in itertools.product(range(len(pos)), repeat=2):
        apart = (pos[j] - pos[i]) @ inverse
        ranges = [
            np.arange(np.ceil(-a - r), np.floor(-a + r) + 1) if flag else np.zeros(1)
            for a, r, flag in zip(apart, reach, pbc, strict=True)
        ]
        steps = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)
        length = np.linalg.norm(pos[j] - pos[i] + steps @ full, axis=1)
        for n, d in zip(steps, length, strict=True):
            if d < cutoff and (i != j or n.any()):
                found[i, j, *map(int, n)] = d
    return found


def odd_case(seed: int):
    """Thin, long, tiny, huge and skewed cells, mixed periodicity, atoms far outside."""
    rng = np.random.default_rng(seed)
    cutoff = float(rng.uniform(2.0, 6.0))
    lengths = rng.choice([0.4, 1.5, 5.0, 30.0, 3e3, 1e6], size=3) * rng.uniform(0.8, 1.2, size=3)
    # Not too many images in all
    while np.prod(np.maximum(cutoff / lengths, 1.0)) > 60.0:
        lengths[lengths.argmin()] *= 3.0
    cell = np.diag(lengths) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for i, j in ((0, 1), (1, 2), (2, 0)):
        if rng.random() < 0.5 and lengths[j] < 50.0:
            cell[i] += rng.integers(-3, 4) * cell[j] * 0.7
    pos = rng.uniform(-3.0, 3.0, size=(int(rng.integers(2, 7)), 3))
    far = rng.integers(len(pos))
    pos[far] += rng.choice([0.0, 50.0, 1e4, 1e6]) * rng.normal(size=3)
    pos[rng.integers(len(pos))] += rng.integers(-9, 10, size=3) @ cell
    pos = np.concatenate([pos, pos[:1] + 0.9])  # one pair at least
    return pos, cutoff, cell, rng.integers(0, 2, size=3).astype(bool) | (rng.random() < 0.3)


@pytest.mark.parametrize("seed", range(60))
def test_odd_cells_agree_with_brute_force_in_every_way(seed, monkeypatch):
    pos, cutoff, cell, pbc = odd_case(seed)
    expected = every_image(pos, cutoff, cell, pbc)
    # Pairs at the cutoff itself may go either way by rounding
    sharp = {pair for pair, d in expected.items() if d < cutoff - 1e-6}
    for backend, chunk in (("torch", 10_000_000), ("torch", 0), ("vesin", 10_000_000)):
        monkeypatch.setattr(geometry, "_DENSE_CHUNK", chunk)
        monkeypatch.setattr(geometry, "_BIN_CHUNK", 2_000_000 if seed % 2 else 7)
        index, shift = neighbour_list(
            torch.tensor(pos),
            cutoff,
            cell=torch.tensor(cell),
            pbc=torch.tensor(pbc),
            backend=backend,
            allow_coincident=True,
        )
        found = as_set(index, shift)
        assert found == sorted(found), "sorted by target, source and shift"
        assert len(found) == len(set(found)) and sharp <= set(found) <= set(expected), (backend, chunk)
    assert expected


SHAPES = {
    "slab and an atom thrown off": ([10, 10, 10], (True, True, False), [0, 0, 1e6]),
    "sheet": ([3000, 3000, 5], (True, True, True), [0, 0, 0]),
    "wire": ([10, 10, 1e6], (True, True, True), [0, 0, 0]),
    "wire that repeats along itself": ([10, 10, 3e5], (False, False, True), [0, 0, 1e5]),
    "molecule and an atom thrown off": ([0, 0, 0], (False, False, False), [0, 0, 1e7]),
    "very far": ([0, 0, 0], (False, False, False), [1e12, 1e9, 1e6]),
    "further": ([0, 0, 0], (False, False, False), [1e300, 0, 0]),
    "wide sheet": ([1e6, 1e6, 5], (True, True, True), [1e5, 1e5, 0]),
    "huge": ([1e6, 1e6, 1e6], (True, True, True), [1e5, 1e5, 0]),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_that_end_the_process_in_vesin(kind, monkeypatch):
    lengths, pbc, thrown = SHAPES[kind]
    rng = np.random.default_rng(3)
    pos = rng.random((130, 3)) * 5.0
    pos[-1] += thrown
    given = {"cell": torch.diag(torch.tensor(lengths, dtype=F64)), "pbc": torch.tensor(pbc)} if any(pbc) else {}
    index, shift = neighbour_list(torch.tensor(pos), 3.0, **given, backend="vesin")
    assert index.shape[1] > 3_000
    for chunk in (10_000_000, 0):
        monkeypatch.setattr(geometry, "_DENSE_CHUNK", chunk)
        other = neighbour_list(torch.tensor(pos), 3.0, **given, backend="torch")
        assert torch.equal(other[0], index) and torch.equal(other[1], shift)


def test_batches_of_odd_cells(monkeypatch):
    cases = [odd_case(seed) for seed in (1, 2, 3, 5)]
    pbc = torch.tensor(np.stack([case[3] for case in cases]))
    batch = torch.tensor([b for b, case in enumerate(cases) for _ in case[0]])
    pos = torch.tensor(np.concatenate([case[0] for case in cases]))
    cell = torch.tensor(np.stack([case[2] for case in cases]))
    lists = []
    for backend, chunk in (("torch", 10_000_000), ("torch", 0), ("vesin", 0)):
        monkeypatch.setattr(geometry, "_DENSE_CHUNK", chunk)
        lists.append(neighbour_list(pos, 3.0, batch, cell, pbc, backend=backend, allow_coincident=True))
    assert lists[0][0].shape[1] > 20
    for index, shift in lists[1:]:
        assert torch.equal(index, lists[0][0]) and torch.equal(shift, lists[0][1])


@pytest.mark.parametrize("backend", ["auto", "torch", "vesin"])
def test_a_cell_whose_list_would_not_fit_into_memory(backend):
    pos, cell = torch.zeros(1, 3, dtype=F64), torch.eye(3, dtype=F64) * 1e-3
    with pytest.raises(
        ValueError, match=r"cell of graph 0 is too small .* 1 atom\(s\) have some 1\.2e\+11 pairs .*units"
    ):
        neighbour_list(pos, 5.0, cell=cell, pbc=True, backend=backend)
