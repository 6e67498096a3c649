"""Energies of both presets on both schemes: symmetry, extensivity, batches, smoothness, small systems."""

from __future__ import annotations

import pytest
import torch

from nbody_pyg import BondTree, NBodyNet, NestedShells
from nbody_pyg.testing import (
    assert_batch_independent,
    assert_equivariant,
    assert_extensive,
    assert_permutation_invariant,
    assert_smooth,
    assert_translation_invariant,
    random_molecule,
)

SPECIES = [1, 6, 8]


def _net(scheme, preset, **options):
    torch.manual_seed(3)
    net = NBodyNet(SPECIES, scheme, preset=preset, **({"channels": 4, "lmax": 1} | options)).double()
    if preset == "strict":
        with torch.no_grad():  # a polynomial of degree 3^depth: start it small
            for name, parameter in net.named_parameters():
                parameter.mul_(0.1 if "radial_weight" in name or "density" in name else 1.0)
    return net


@pytest.fixture(params=["tree-practical", "tree-strict", "shells-practical", "shells-strict"])
def net(request):
    scheme, preset = request.param.split("-")
    return _net(BondTree(4.0, 5.0, 6.0) if scheme == "tree" else NestedShells((3.0, 3.0)), preset)


def _systems(net):
    """The dense default cluster is one molecule to a bond graph; strict polynomials get the small ones
    only."""
    return [random_molecule(n, SPECIES, seed=n) for n in (5, 7, 9)]


def test_rotation_and_inversion(net):
    assert_equivariant(net, systems=_systems(net), num_rotations=2, tolerance=1e-10)


def test_translation(net):
    assert_translation_invariant(net, systems=_systems(net), tolerance=1e-10)


def test_permutation(net):
    assert_permutation_invariant(net, systems=_systems(net), tolerance=1e-10)


def test_permutation_among_many_neighbours():
    """The default systems hold an atom with 47 neighbours."""
    assert_permutation_invariant(_net(NestedShells((5.0,)), "practical"), num_permutations=1, tolerance=1e-8)


def test_batch_split(net):
    assert_batch_independent(net, systems=_systems(net), tolerance=1e-10)


def test_molecules_1000_angstrom_apart(net):
    """As one graph with one root: the sum of the energies, to 1e-9."""
    assert_extensive(net, systems=_systems(net), tolerance=1e-9)


def test_many_far_copies(net, molecules):
    z, pos = molecules["methanol"]
    shifts = torch.tensor([[0, 0, 0], [50, 0, 0], [0, 70, 0], [-60, 40, 90.0]], dtype=torch.float64)
    with torch.no_grad():
        one = net(z, pos)
        four = net(z.repeat(4), (pos + shifts[:, None]).flatten(0, 1))
    assert one.abs() > 1e-6
    torch.testing.assert_close(four, 4 * one, rtol=0, atol=1e-9 * max(1.0, float(one.abs())))


@pytest.mark.parametrize("preset", ["practical", "strict"])
def test_smooth_where_atoms_enter_and_leave_shells(preset):
    net = _net(NestedShells((2.5, 2.0)), preset)
    assert assert_smooth(net, systems=[random_molecule(5, SPECIES)], continuity=2, distance=4.0) > 2.5


@pytest.mark.parametrize("preset", ["practical", "strict"])
def test_smooth_where_pairs_of_a_tree_end(preset, molecules):
    """Two methanols drift apart: pairs of atoms, groups and pieces leave their windows, the children stay."""
    net = _net(BondTree(2.5, 3.0, 4.0), preset)
    z, pos = molecules["methanol"]
    away = torch.tensor([2.0, 2.6, 1.5], dtype=torch.float64)
    pair, far = torch.cat([pos, pos[:, [1, 2, 0]] + away]), torch.cat([pos, pos[:, [1, 2, 0]] + 2.4 * away])
    both = torch.cat([z, z])

    def energy(z, pos, batch):
        copies = int(batch.max()) + 1
        reference = net.scheme.topology(z, pair.repeat(copies, 1), batch)
        return net(z, pos, batch, topology=net.scheme.update(reference, z, pos, batch))

    # Forces of some 100 eV/A, added up in 5 passes: differences below 1e-8 are round-off
    assert assert_smooth(energy, paths=[(both, pair, far)], continuity=2, tolerance=1e-8) > 2.5


def test_the_smooth_test_sees_a_cutoff_without_window(molecules, monkeypatch):
    """Not vacuous: without the windows of the pairs the same path has steps."""
    net = _net(BondTree(2.5, None, None), "practical")
    z, pos = molecules["methanol"]
    away = torch.tensor([2.0, 2.6, 1.5], dtype=torch.float64)
    pair, far = torch.cat([pos, pos + away]), torch.cat([pos, pos + 2.4 * away])
    place = net.scheme.place

    def unwindowed(*arguments, **keywords):
        made = place(*arguments, **keywords)
        object.__setattr__(made[0], "pair_weight", torch.ones_like(made[0].pair_weight))
        return made

    monkeypatch.setattr(net.scheme, "place", unwindowed)
    with pytest.raises(AssertionError, match="not smooth"):
        assert_smooth(lambda z, pos, batch: net(z, pos, batch), paths=[(torch.cat([z, z]), pair, far)])


def test_one_atom(net):
    z, pos = torch.tensor([6]), torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    energy = net(z, pos)
    (gradient,) = torch.autograd.grad(energy.sum(), pos)
    assert energy.shape == (1,) and torch.isfinite(energy).all()
    assert torch.equal(gradient, torch.zeros_like(pos)), "nothing pulls at a lone atom"
    with torch.no_grad():
        torch.testing.assert_close(net(z, pos + 10.0), energy, rtol=1e-12, atol=0)


def test_no_edges_between_far_atoms(net):
    z = torch.tensor([6, 8, 1])
    pos = torch.tensor([[0.0, 0, 0], [30, 0, 0], [0, 40, 0]], dtype=torch.float64, requires_grad=True)
    energy = net(z, pos)
    (gradient,) = torch.autograd.grad(energy.sum(), pos)
    with torch.no_grad():
        alone = sum(net(z[i : i + 1], pos[i : i + 1]) for i in range(3))
    torch.testing.assert_close(energy.detach(), alone, rtol=1e-10, atol=1e-12)
    assert gradient.abs().max() < 1e-12


def test_parts_with_one_atom(molecules):
    """Water beside a helium-like lone oxygen: groups, pieces and molecules of one atom sit on their
    parents."""
    z = torch.tensor([8, 1, 1, 8, 6])
    pos = torch.tensor(
        [[0, 0, 0], [0.96, 0, 0.1], [-0.24, 0.93, 0], [3.5, 0.4, 0.2], [0.3, 4.0, 1.0]], dtype=torch.float64
    )
    net = _net(BondTree(4.5), "practical")
    pos.requires_grad_(True)
    energy = net(z, pos)
    (force,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
    (second,) = torch.autograd.grad(force.square().sum(), pos)
    assert torch.isfinite(force).all() and torch.isfinite(second).all() and force.abs().max() > 1e-6


def test_periodic_systems_are_extensive_and_translate(generator):
    """A cell and its doubled cell, mixed boundaries included."""
    net = _net(NestedShells((3.0, 2.5)), "practical")
    cell = torch.tensor([[[3.5, 0, 0], [0.4, 4.1, 0], [0.2, -0.3, 4.6]]], dtype=torch.float64)
    frac = torch.rand(4, 3, dtype=torch.float64, generator=generator)
    frac[:, 0] = torch.arange(4) / 4
    z, pos = torch.tensor([6, 8, 1, 1]), frac @ cell[0]
    for pbc in ([True, True, True], [True, False, True]):
        system = (z, pos, cell, torch.tensor([pbc]))
        assert_extensive(net, systems=[system], tolerance=1e-9)
        assert_translation_invariant(net, systems=[system], tolerance=1e-9)
        assert_equivariant(net, systems=[system], num_rotations=1, tolerance=1e-9)
