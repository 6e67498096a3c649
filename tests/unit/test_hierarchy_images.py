"""Parts in a cell: images follow from distances, not from how atoms and lattice vectors were written down."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import factories
from nbody_pyg import BondTree, FromAssignment, NestedShells, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.geometry import nearest_images

#: Other lattice vectors of the same lattice.
BASES = {
    "same": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "sheared": [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
    "skewed": [[1, 0, 0], [2, 1, 0], [-1, 3, 1]],
    "far": [[1, 4, 0], [0, 1, 0], [7, 0, 1]],
    "mirrored": [[0, 1, 0], [1, 0, 0], [3, -2, 1]],
}


def _water(generator) -> torch.Tensor:
    one = torch.tensor([[0, 0, 0], [0.9572, 0, 0], [-0.24, 0.9266, 0]], dtype=torch.float64)
    return one @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]


def waters(generator, edge: float = 6.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four molecules of water in a triclinic cell."""
    cell = edge * torch.tensor([[1, 0, 0], [0.1, 1, 0], [-0.2, 0.15, 1]], dtype=torch.float64)
    sites = torch.tensor([[0.1, 0.1, 0.1], [0.6, 0.1, 0.55], [0.1, 0.6, 0.6], [0.6, 0.6, 0.1]], dtype=torch.float64)
    pos = torch.cat([_water(generator) + site @ cell for site in sites])
    return torch.tensor([8, 1, 1] * 4), pos, cell


def chain(generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A zigzag of six carbons in a cell that is shorter than it, stacked askew so that images do not touch."""
    steps = torch.arange(6, dtype=torch.float64)
    pos = torch.stack([1.25 * steps, 0.85 * (steps % 2), 0.2 * steps.square() / 5], dim=1)
    pos = torch.cat([pos, pos[2:3] + torch.tensor([[0.3, -0.4, 1.0]])])
    cell = torch.tensor([[5.0, 3.4, 0.0], [0.0, 7.0, 0.5], [0.4, 0.0, 6.0]], dtype=torch.float64)
    return torch.tensor([6] * 6 + [1]), pos, cell


SCHEMES = {
    "tree": BondTree(3.5, 4.0, 6.0),
    "pieces": ShellsAndPieces((3.0, 3.5), 6.0),
    "labels": FromAssignment(
        labels=[[2 * (i // 3) + (i % 3 == 2), i // 3] for i in range(12)], cutoff=3.5, part_cutoffs=(4.0, 6.0)
    ),
    "parts": FromAssignment(parts=[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [1, 0]], part_cutoffs=(4.0,)),
    "shells": NestedShells((3.0, 3.5)),
    "survivors": SmoothSurvivors((2.6,), (3.6, 5.0)),
}


potential = functools.partial(factories.potential, e0={1: -1.0, 6: -2.0, 8: -3.0}, seed=2)


def assert_same(model, system, changes, pbc) -> None:
    """Energy, forces and, in a full cell, stress of all versions of one infinite system agree."""
    z, pos, cell = system
    stress = bool(pbc.all())
    wanted = model(z, pos, cell=cell[None], pbc=pbc, compute_stress=stress)
    assert wanted["forces"].abs().max() > 1e-2 and wanted["interaction_energy"].abs().max() > 1e-2
    for new_pos, new_cell in changes:
        found = model(z, new_pos, cell=new_cell[None], pbc=pbc, compute_stress=stress)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("periodic", ["xyz", "xy", "z"])
def test_energies_do_not_depend_on_how_a_crystal_is_written(name, periodic, generator):
    """Atoms moved by lattice vectors, all of them shifted, and other vectors of the same lattice."""
    z, pos, cell = waters(generator)
    pbc = torch.tensor([[axis in periodic for axis in "xyz"]])
    model = potential(SCHEMES[name])
    changes = [(pos + torch.tensor([1.3, -40.0, 2.2]), cell)]
    for _ in range(2):
        moved = torch.randint(-3, 4, pos.shape, generator=generator).double() * pbc
        changes.append((pos + moved @ cell, cell))
    for basis in BASES.values():
        turned = torch.eye(3, dtype=torch.float64)
        axes = pbc[0].nonzero().flatten()
        turned[axes[:, None], axes] = torch.tensor(basis, dtype=torch.float64)[axes[:, None], axes]
        other = turned @ cell
        changes += [(pos, other), (pos + moved @ cell, other)]
    assert_same(model, (z, pos, cell), changes, pbc)


@pytest.mark.parametrize("name", ["tree", "labels", "shells"])
def test_a_batch_of_cells_and_molecules(name, generator):
    """Other lattice vectors, other periodicity and none, in one batch."""
    z, pos, cell = waters(generator)
    model, cells, periodic, places = potential(SCHEMES[name]), [], [], []
    for basis, axes in (("same", "xyz"), ("skewed", "xyz"), ("sheared", "z"), ("far", "")):
        cells.append(torch.tensor(BASES[basis], dtype=torch.float64) @ cell)
        periodic.append(torch.tensor([axis in axes for axis in "xyz"]))
        moved = torch.randint(-1, 2, pos.shape, generator=generator).double() * periodic[-1]
        places.append(pos + moved @ cells[-1])
    cells, periodic = torch.stack(cells), torch.stack(periodic)
    batch = torch.arange(4).repeat_interleave(len(z))
    found = model(z.repeat(4), torch.cat(places), batch, cell=cells, pbc=periodic)
    for graph, place in enumerate(places):
        lattice = {"cell": cells[graph : graph + 1], "pbc": periodic[graph : graph + 1]} if graph < 3 else {}
        alone = model(z, place, **lattice)
        torch.testing.assert_close(found["energy"][graph : graph + 1], alone["energy"], rtol=0, atol=1e-9)
        torch.testing.assert_close(found["forces"][batch == graph], alone["forces"], rtol=0, atol=1e-9)
        assert alone["forces"].abs().max() > 1e-2
    assert torch.unique(found["energy"].round(decimals=6)).numel() == 3, "the first two are one crystal"


@pytest.mark.parametrize(
    "scheme",
    [
        BondTree(3.0, 4.0, 5.0),
        FromAssignment(labels=[[i // 2, 0] for i in range(7)], cutoff=3.0, part_cutoffs=(4.0, 5.0)),
    ],
    ids=["tree", "labels"],
)
def test_a_molecule_longer_than_its_cell(scheme, generator):
    z, pos, cell = chain(generator)
    assert (pos[5] - pos[0]).norm() > cell[0].norm()
    pbc = torch.ones(1, 3, dtype=torch.bool)
    changes = []
    for basis in BASES.values():
        moved = torch.randint(-2, 3, pos.shape, generator=generator).double() @ cell
        changes.append((pos + moved, torch.tensor(basis, dtype=torch.float64) @ cell))
    assert_same(potential(scheme), (z, pos, cell), changes, pbc)
    # Inside of the molecule the cell changes nothing
    inside, outside = (
        scheme.hierarchy(scheme.topology(z, p, cell=c, pbc=b), z, p, c)
        for p, c, b in ((changes[3][0], changes[3][1][None], pbc), (pos, None, None))
    )
    for k in (1, 2):
        torch.testing.assert_close(inside[k].child_vec, outside[k].child_vec, rtol=0, atol=1e-10)
        assert outside[k].child_vec.abs().max() > 0.3


@pytest.mark.parametrize("move", range(3))
def test_a_stretched_bond_that_is_kept_is_found_in_any_image(move, generator):
    """Update of a kept tree, as molecular dynamics does it: a bond far beyond the covalent radii, then wrapped."""
    z, pos, cell = waters(generator)
    cell, pbc = cell[None], torch.ones(1, 3, dtype=torch.bool)
    scheme = SCHEMES["tree"]
    tree, model = scheme.topology(z, pos, cell=cell, pbc=pbc), potential(scheme)
    pos[1] = pos[0] + 1.9 * (pos[1] - pos[0])
    assert not torch.equal(scheme.topology(z, pos, cell=cell, pbc=pbc).bonds, tree.bonds)
    moved = pos.clone()
    moved[1] += cell[0, move] - 2 * cell[0, (move + 1) % 3]
    wanted, found = (
        model(z, p, cell=cell, pbc=pbc, topology=scheme.update(tree, z, p, None, cell, pbc)) for p in (pos, moved)
    )
    for key in ("energy", "forces"):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-9)


def test_a_bond_as_long_as_its_image_is_refused(generator):
    z, pos, cell = waters(generator)
    cell, pbc = cell[None], torch.ones(1, 3, dtype=torch.bool)
    scheme = SCHEMES["tree"]
    tree = scheme.topology(z, pos, cell=cell, pbc=pbc)
    pos[1] = pos[0] + 0.5 * cell[0, 0] + 0.01
    with pytest.raises(ValueError, match="which image of atom 1 atom 0 is bonded to: two are about equally far"):
        scheme.update(tree, z, pos, None, cell, pbc)


def test_a_polymer_through_the_cell_is_refused():
    """Bonds that are all short, and close a way around the cell; given ones and those of an atom to itself as well."""
    z = torch.tensor([6, 6, 6, 6])
    pos = torch.tensor([[0, 0, 0], [1.2, 0.6, 0], [2.5, 0, 0.2], [3.7, 0.6, 0]], dtype=torch.float64)
    cell = torch.diag(torch.tensor([5.0, 9.0, 9.0], dtype=torch.float64))[None]
    pbc = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"bonds through atoms \d and \d form a network without end.*NestedShells"):
        BondTree().topology(z, pos, cell=cell, pbc=pbc)
    ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    with pytest.raises(ValueError, match="network without end"):
        BondTree().topology(z, pos, cell=cell, pbc=pbc, bonds=ring)
    open_chain = BondTree().topology(z, pos, cell=cell, pbc=pbc, bonds=ring[:, :3])
    assert open_chain.size(3) == 1
    with pytest.raises(ValueError, match="atom 2 is bonded to an image of itself"):
        BondTree().topology(z, pos, cell=cell, pbc=pbc, bonds=torch.tensor([[0, 2], [1, 2]]))
    with pytest.raises(ValueError, match=r"part 0 of level 1 \(atoms 0, 1, 2, 3\) must hold together in one place"):
        FromAssignment(labels=[0, 0, 0, 0]).topology(z, pos, cell=cell, pbc=pbc)


def test_nearest_images_against_trying_them_all(generator):
    """Skewed, flat and small cells, mixed periodicity."""
    tried = torch.tensor(list(itertools.product(range(-9, 10), repeat=3)), dtype=torch.float64)
    ratios = []
    for seed in range(12):
        cell = 0.4 * torch.randn(1, 3, 3, dtype=torch.float64, generator=generator) + 2.0 * torch.eye(3)
        if seed % 3 == 0:
            cell[0, 1] += cell[0, 0]
        pbc = torch.tensor([[True, seed % 4 != 1, seed % 4 < 2]])
        vec = 1.5 * torch.randn(20, 3, dtype=torch.float64, generator=generator)
        shift, ratio = nearest_images(vec, torch.zeros(20, dtype=torch.long), cell, pbc)
        assert torch.equal(shift * ~pbc, torch.zeros_like(shift)) and torch.equal(shift, shift.round())
        lattice = (tried * pbc).unique(dim=0) @ cell[0]
        length = (vec[:, None] + lattice).norm(dim=-1).sort(dim=1).values[:, :2]
        torch.testing.assert_close((vec + shift @ cell[0]).norm(dim=1), length[:, 0], rtol=0, atol=1e-10)
        wanted = length[:, 1] / length[:, 0]
        torch.testing.assert_close(ratio, wanted.masked_fill(wanted > 1.05, torch.inf), rtol=0, atol=1e-9)
        ratios.append(ratio)
    assert 3 < int(torch.cat(ratios).isfinite().sum()) < 200


def test_the_comparison_rejects_an_energy_that_knows_the_cell():
    z, pos, cell = torch.tensor([6, 1, 8, 1]), torch.rand(4, 3, dtype=torch.float64), 5 * torch.eye(3).double()
    pbc = torch.ones(1, 3, dtype=torch.bool)
    moved = (pos + cell[0], cell)

    def model(z, pos, cell, pbc, compute_stress, mutant=0.0):
        energy = (pos - pos.mean(0)).square().sum().reshape(1) + mutant * pos.sum()
        return {"interaction_energy": energy, "forces": pos - pos.mean(0), "stress": cell}

    assert_same(model, (z, pos, cell), [moved], pbc)
    with pytest.raises(AssertionError, match="interaction_energy"):
        assert_same(functools.partial(model, mutant=1e-4), (z, pos, cell), [moved], pbc)
