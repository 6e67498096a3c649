"""SmoothSurvivors: partition of unity, exact support, symmetry, smoothness, far copies, cells, ties."""

from __future__ import annotations

import functools

import pytest
import torch
from torch_geometric.data import Batch

import factories
from nbody_pyg import AtomicData, NBodyNet, NestedShells, SmoothSurvivors
from nbody_pyg.geometry import edge_vectors
from nbody_pyg.hierarchy import EdgeSet, FromAssignment, Scheme, Topology, thinning
from nbody_pyg.hierarchy.thinning import share_out, thin
from nbody_pyg.potential import Potential
from nbody_pyg.radial import plateau_window, quintic_step
from nbody_pyg.system import System
from nbody_pyg.testing import (
    assert_batch_independent,
    assert_conservative,
    assert_equivariant,
    assert_extensive,
    assert_permutation_invariant,
    assert_separable,
    assert_size_transfer,
    assert_smooth,
    assert_translation_invariant,
)

F64 = torch.float64
SPECIES = [1, 6, 8]
#: Small radii, so that clusters of some dozen atoms have several parts on two levels.
SMALL = {"radii": (2.0, 3.5), "cutoffs": (3.2, 5.0, 8.0)}


def _fluid(count: int, seed: int = 0, density: float = 0.08) -> System:
    """Atoms at random, none nearer than 1.3 angstrom to another."""
    generator = torch.Generator().manual_seed(seed)
    side, pos = (count / density) ** (1 / 3), torch.zeros(0, 3, dtype=F64)
    while len(pos) < count:
        new = torch.rand(1, 3, generator=generator, dtype=F64) * side
        if len(pos) == 0 or (pos - new).norm(dim=1).min() > 1.3:
            pos = torch.cat([pos, new])
    return System.from_tensors(torch.tensor(SPECIES)[torch.arange(count) % 3], pos)


_net = functools.partial(factories.net, species=SPECIES, seed=3, lmax=2)


@pytest.fixture(scope="module")
def fluid() -> System:
    return _fluid(60)


@pytest.fixture(scope="module", params=["atom", pytest.param("mean", marks=pytest.mark.slow)])
def both(request) -> SmoothSurvivors:
    """Parts on atoms, and on means."""
    return SmoothSurvivors(**SMALL, centre=request.param)


@pytest.fixture(scope="module")
def scheme() -> SmoothSurvivors:
    return SmoothSurvivors(**SMALL)


@pytest.fixture(scope="module")
def net(scheme) -> NBodyNet:
    return _net(scheme)


# ------------------------------------------------------------------------------- weights
def test_windows_are_c2():
    t = torch.linspace(-0.5, 1.5, 4001, dtype=F64)
    second = torch.diff(quintic_step(t), n=2) / (t[1] - t[0]) ** 2
    assert torch.diff(second).abs().max() < 0.05, "the curvature has no step"
    r = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0], dtype=F64)
    torch.testing.assert_close(plateau_window(r, 1.0, 2.0), torch.tensor([1, 1, 0.5, 0, 0], dtype=F64))


def test_higher_priority_wins_and_equals_survive_together():
    index = torch.tensor([[0, 1], [1, 0]])
    r, one = torch.tensor([1.0, 1.0], dtype=F64), torch.ones(2, dtype=F64)
    assert thin(torch.tensor([5.0, 1.0], dtype=F64), one, index, r, 3.0, 2, 1.0).tolist() == [1.0, 0.0]
    assert thin(torch.tensor([2.0, 2.0], dtype=F64), one, index, r, 3.0, 2, 1.0).tolist() == [1.0, 1.0]
    assert thin(torch.tensor([5.0, 1.0], dtype=F64), one, index, 3 * r, 3.0, 2, 1.0).tolist() == [1.0, 1.0]


def test_chains_of_priorities_alternate():
    """9 > 8 > 7 ...: each kept node frees the one after the next, as in Luby's algorithm."""
    n = 7
    chain = torch.arange(n - 1)
    index = torch.cat([torch.stack([chain, chain + 1]), torch.stack([chain + 1, chain])], dim=1)
    priority, one = torch.arange(n, 0, -1).to(F64) * 2.0, torch.ones(n, dtype=F64)
    survival = thin(priority, one, index, torch.ones(index.shape[1], dtype=F64), 2.0, rounds=4, width=1.0)
    assert survival.tolist() == [1, 0, 1, 0, 1, 0, 1]
    few = thin(priority, one, index, torch.ones(index.shape[1], dtype=F64), 2.0, rounds=1, width=1.0)
    assert few.tolist() == [1, 0, 0, 0, 0, 0, 0]
    share = share_out(few, one, index, torch.ones(index.shape[1], dtype=F64), 2.0)
    assert share.alone.tolist() == [0, 0, 1, 1, 1, 1, 1], "what nobody reaches stays on its own"
    assert share.existence.tolist() == [1, 0, 1, 1, 1, 1, 1]


def _steepest(scheme: SmoothSurvivors, system: System, paths: int, points: int = 81) -> float:
    """The largest change of a weight per angstrom of the atom that moves most, on straight paths of all atoms."""
    generator, steepest = torch.Generator().manual_seed(7), 0.0
    along = torch.linspace(0.0, 1.0, points, dtype=F64)[:, None, None]
    batch = torch.arange(points).repeat_interleave(len(system.z))
    for _ in range(paths):
        move = 0.12 * torch.randn(system.pos.shape, generator=generator, dtype=F64)
        pos = (system.pos + along * move).reshape(-1, 3)
        z = system.z.repeat(points)
        hierarchy = scheme.hierarchy(scheme.topology(z, pos, batch, every=True), z, pos)
        for level in hierarchy.levels[1:3]:
            change = level.weight.reshape(points, -1).diff(dim=0).abs().max()
            steepest = max(steepest, float(change) * (points - 1) / float(move.norm(dim=1).max()))
    return steepest


def test_weights_change_gently(fluid, monkeypatch):
    """Rounds and levels multiply slopes: steps that decide where they need not make centres vanish at once."""
    scheme = SmoothSurvivors((3.0, 6.0), (5.0, 9.0, None))
    gentle = _steepest(scheme, fluid, paths=2)
    assert 1.0 < gentle < 100.0
    monkeypatch.setattr(thinning, "quintic_step", lambda t: quintic_step(quintic_step(t)))
    assert _steepest(scheme, fluid, paths=2) > 150.0, "steps taken twice are noticed"


def test_wider_contests_leave_more_parts(fluid):
    few, many = (
        scheme.topology(fluid.z, fluid.pos).size(1)
        for scheme in (SmoothSurvivors((3.0,), (5.0, None), width=width) for width in (0.5, 10.0))
    )
    assert 5 < few < many < 60


def test_partition_of_unity_and_conservation(both):
    scheme = both
    system = _fluid(200, seed=4)
    topology = scheme.topology(system.z, system.pos).validate()
    hierarchy = scheme.hierarchy(topology, system.z, system.pos).validate()
    content = torch.randn(200, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    fractional = 0
    for k in (1, 2):
        level, below = hierarchy[k], hierarchy[k - 1]
        child, parent = level.child_index
        whole = torch.zeros(below.num_parts, dtype=F64).index_add(0, child, level.child_weight)
        torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-14)
        pooled = torch.zeros(level.num_parts, 3, dtype=F64)
        pooled = pooled.index_add(0, parent, level.pool_weight[:, None] * content[child])
        before, after = (below.weight[:, None] * content).sum(0), (level.weight[:, None] * pooled).sum(0)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
        content = pooled
        fractional += int(((level.weight > 0.01) & (level.weight < 0.99)).sum())
        assert level.num_parts < 0.9 * below.num_parts, "it makes coarser"
    assert fractional > 3, "some parts exist in part only, or this test says little"


def test_survivors_keep_their_distance_and_reach_everyone():
    system, radius = _fluid(300, seed=1), 3.0
    scheme = SmoothSurvivors((radius,), (5.0, None))
    level = scheme.hierarchy(scheme.topology(system.z, system.pos), system.z, system.pos)[1]
    whole = level.pos[level.weight > 0.99]
    close = (torch.pdist(whole) < 0.69 * radius).sum()
    assert len(whole) > 50 and close < 0.1 * len(whole), "only those of nearly equal priority"
    assert torch.cdist(system.pos, level.pos).min(dim=1).values.max() < 1.35 * radius


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_candidates_of_weight_zero_change_nothing(both, seed):
    """Energy, forces and their derivative are those of the full list of candidates, bit for bit or to round-off."""
    scheme, net = both, _net(both)
    system = _fluid(50, seed=10 + seed)
    found = []
    for every in (False, True):
        topology = scheme.topology(system.z, system.pos, every=every).validate()
        pos = system.pos.clone().requires_grad_(True)
        energy = net(system.z, pos, topology=topology)
        (slope,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), pos)
        found.append((topology, energy.detach(), slope.detach(), curve))
    assert found[1][0].size(2) == 50 > found[0][0].size(2)
    assert found[1][0].child_index[1].shape[1] > found[0][0].child_index[1].shape[1]
    for exact, full in zip(*(f[1:] for f in found), strict=True):
        torch.testing.assert_close(full, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
        assert exact.abs().max() > 1e-3


# ------------------------------------------------------------------------------- symmetry of every level
def _transformed(system: System, rotation, permutation, away) -> System:
    return System.from_tensors(system.z[permutation], (system.pos @ rotation.T + away)[permutation])


def test_every_level_is_covariant(both, fluid, rotation, generator):
    permutation = torch.randperm(60, generator=generator)
    away = torch.randn(3, dtype=F64, generator=generator)
    turned = _transformed(fluid, rotation, permutation, away)
    before, after = (both.hierarchy(both.topology(s.z, s.pos), s.z, s.pos) for s in (fluid, turned))
    for k in range(4):
        one, other = before[k], after[k]
        image = one.pos @ rotation.T + away
        match = torch.cdist(image, other.pos).argmin(dim=1)
        assert one.num_parts == other.num_parts and len(match.unique()) == len(match)
        torch.testing.assert_close(other.pos[match], image, rtol=0, atol=1e-12)
        torch.testing.assert_close(other.weight[match], one.weight, rtol=0, atol=1e-12)
        if k == 0:
            place = torch.cdist(image, other.pos).argmin(dim=1)
            continue
        dense = [
            torch.zeros(a.num_parts, b.num_parts, dtype=F64) for a, b in ((before[k - 1], one), (after[k - 1], other))
        ]
        for matrix, level in zip(dense, (one, other), strict=True):
            matrix[tuple(level.child_index)] = level.child_weight
        torch.testing.assert_close(dense[1][place][:, match], dense[0], rtol=0, atol=1e-12)
        place = match


@pytest.mark.slow
def test_energy_is_invariant(both, fluid):
    """Relative to energies of some eV and forces of some 10 eV/A."""
    net, systems, tolerance = _net(both), [fluid, _fluid(30, seed=2)], 1e-12
    assert assert_equivariant(net, systems=systems, num_rotations=1, tolerance=tolerance) > 0
    assert_translation_invariant(net, systems=systems, tolerance=tolerance)
    assert_permutation_invariant(net, systems=systems, num_permutations=1, tolerance=tolerance)
    assert_batch_independent(net, systems=systems, tolerance=tolerance)
    # A shorter step than usual: third derivatives at the ends of narrow windows are large
    assert_conservative(net, systems=[_fluid(14, seed=5)], step=1e-5, tolerance=2e-6)


# ------------------------------------------------------------------------------- smoothness
def _drag() -> tuple:
    """One atom goes through a cluster, past several centres, at no less than 1.2 angstrom from any atom."""
    system = _fluid(24, seed=7, density=0.05)
    end = system.pos.clone()
    centre = system.pos.mean(dim=0)
    far = int((system.pos - centre).norm(dim=1).argmax())
    end[far] = system.pos[far] + (system.pos[far] - centre) * 1.2
    return system.z, system.pos, end


@pytest.mark.slow
def test_smooth_through_changes_of_the_hierarchy(both):
    assert (
        assert_smooth(_net(both, channels=2), paths=[_drag()], continuity=2, through_changes=True, tolerance=1e-8) > 2.5
    )


class _Hard(FromAssignment):
    """Clusters of the nearest of a few atoms, searched anew at all positions: what the library refuses as a default."""

    def build(self, system):
        pos, batch = system.pos, system.batch
        centres = torch.arange(0, int((batch == 0).sum()), 8)
        found = [torch.cdist(pos[batch == b], pos[batch == b][centres]).argmin(dim=1) for b in batch.unique()]
        return super().build(system, labels=torch.cat(found))

    def inputs(self, data):
        return {}


def test_hard_clusters_are_not_smooth():
    with pytest.raises(AssertionError, match="energy not smooth near"):
        assert_smooth(_net(_Hard(cutoff=3.2, part_cutoffs=(5.0,))), paths=[_drag()], through_changes=True)


def test_a_path_without_changes_is_vacuous():
    z, pos, _ = _drag()
    with pytest.raises(AssertionError, match="no part and no child of the hierarchy changes"):
        assert_smooth(_net(SmoothSurvivors(**SMALL)), paths=[(z, pos, pos + 1e-5 * pos)], through_changes=True)


# ------------------------------------------------------------------------------- separability
def test_far_systems_know_nothing_of_each_other(net):
    systems = [_fluid(20, seed=s) for s in (1, 2)]
    assert assert_separable(net, systems=systems, tolerance=1e-11) < 1e-9
    assert_extensive(net, systems=systems, tolerance=1e-9)
    assert_size_transfer(net, systems=systems[:1], counts=(5,), tolerance=1e-10)


@pytest.mark.slow
def test_cells_are_exact(net):
    """A repeated cell has twice the energy, however small the cell: images compete and pool like other atoms."""
    cell = torch.tensor([[[4.5, 0, 0], [0.4, 5.1, 0], [0.2, -0.3, 4.8]]], dtype=F64)
    system = _fluid(8, seed=3)
    inside = (system.pos / system.pos.max()) @ cell[0] * 0.85
    for pbc in ([True, True, True], [True, False, True]):
        one = System.from_tensors(system.z, inside, cell=cell, pbc=torch.tensor([pbc]))
        assert_extensive(net, systems=[one], tolerance=1e-9)
        assert_translation_invariant(net, systems=[one], tolerance=1e-9)
        assert_equivariant(net, systems=[one], num_rotations=1, tolerance=1e-9)
    topology = net.scheme.topology(system.z, inside, None, cell, torch.tensor([[True] * 3])).validate()
    assert (topology.child_shift[1] != 0).any(), "parts reach across the boundary"


def test_matched_pairs_of_environments():
    """What lies beyond all local cutoffs: the hierarchy tells two far fields apart, the flat network cannot."""
    near, far = _fluid(12, seed=1), _fluid(12, seed=2)
    away = torch.tensor([16.0, 0.0, 0.0], dtype=F64)
    turned = (far.pos - far.pos.mean(0)) @ torch.tensor([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=F64) + far.pos.mean(0)
    z = torch.cat([near.z, far.z])
    scheme = SmoothSurvivors((2.0, 3.5), (3.2, 5.0, 24.0))
    found = {}
    for name, own in (("survivors", scheme), ("flat", NestedShells((3.2, 3.2)))):
        potential = Potential(_net(own))
        one, other = (potential(z, torch.cat([near.pos, b + away]))["forces"][:12] for b in (far.pos, turned))
        found[name] = float((one - other).abs().max())
        assert one.abs().max() > 1e-3
    assert torch.cdist(near.pos, far.pos + away).min() > 6.4, "beyond two layers of the flat network"
    assert found["flat"] < 1e-12 and found["survivors"] > 1e-6


# ------------------------------------------------------------------------------- ties
def _cube() -> System:
    return System.from_tensors(torch.tensor([6] * 8), torch.cartesian_prod(*[torch.tensor([0.0, 1.6], dtype=F64)] * 3))


def _benzene() -> System:
    angle = torch.arange(6, dtype=F64) * torch.pi / 3
    ring = torch.stack([angle.cos(), angle.sin(), torch.zeros(6, dtype=F64)], dim=1)
    return System.from_tensors(torch.tensor([6] * 6 + [1] * 6), torch.cat([1.39 * ring, 2.48 * ring]))


@pytest.mark.parametrize("system", [_cube(), _benzene()], ids=["cube", "benzene"])
def test_symmetric_molecules_keep_orbits_whole(system):
    scheme = SmoothSurvivors()
    hierarchy = scheme.hierarchy(scheme.topology(system.z, system.pos).validate(), system.z, system.pos).validate()
    for k in (1, 2):
        weight = hierarchy[k].weight
        assert len(weight) in (6, 8), "the hydrogens of benzene join its carbons, the rest stays together"
        torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-12)
    pos = system.pos.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(_net(scheme)(system.z, pos).sum(), pos, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), pos)
    assert slope.isfinite().all() and curve.isfinite().all() and slope.abs().max() > 1e-6
    torch.testing.assert_close(slope[:6].norm(dim=1), slope[:1].norm(dim=1).expand(6), rtol=1e-9, atol=1e-12)


def test_crystals_keep_everyone_and_noise_thins_them():
    cell = 3 * 3.0 * torch.eye(3, dtype=F64)[None]
    pos = torch.cartesian_prod(*[torch.arange(3, dtype=F64)] * 3) * 3.0
    z, pbc = torch.full((27,), 6), torch.tensor([[True] * 3])
    exact, noisy = (SmoothSurvivors((4.0,), (5.5, None), noise=noise) for noise in (0.0, 100.0))
    assert exact.topology(z, pos, None, cell, pbc).size(1) == 27
    topology = noisy.topology(z, pos, None, cell, pbc).validate()
    assert topology.size(1) < 15
    level = noisy.hierarchy(topology, z, pos, cell)[1]
    whole = torch.zeros(27, dtype=F64).index_add(0, level.child_index[0], level.child_weight)
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_atoms(scheme, net, count):
    z = torch.tensor([6, 8, 1][:count])
    pos = torch.tensor([[0.0, 0, 0], [1.2, 0, 0.3], [0.1, 9.0, 0]], dtype=F64)[:count].requires_grad_(True)
    topology = scheme.topology(z, pos.detach()).validate()
    energy = net(z, pos, topology=topology)
    (slope,) = torch.autograd.grad(energy.sum(), pos)
    assert energy.isfinite().all() and slope.isfinite().all()
    assert topology.size(1) == {1: 1, 2: 1, 3: 2}[count]


# ------------------------------------------------------------------------------- as a transform
def test_stored_and_batched_as_alone(net, scheme):
    frames = [AtomicData(z=s.z, pos=s.pos) for s in (_fluid(20, 1), _fluid(35, 2), _fluid(12, 3))]
    stored = [scheme(frame) for frame in frames]
    batch = Batch.from_data_list(stored)
    together = Topology.from_data(batch).validate()
    whole = scheme(Batch.from_data_list(frames))
    for k in (1, 2):
        assert torch.equal(together.centre[k], Topology.from_data(whole).centre[k])
        assert torch.equal(together.child_index[k], Topology.from_data(whole).child_index[k])
    with torch.no_grad():
        alone = torch.cat([net(frame) for frame in frames])
        torch.testing.assert_close(net(batch), alone, rtol=0, atol=1e-11)
        torch.testing.assert_close(net(stored[1]), alone[1:2], rtol=0, atol=1e-11)
    assert not {k for k in stored[0].without_hierarchy().to_dict() if "_" in k}
    moved = together.to("cpu")
    assert torch.equal(moved.centre[2], together.centre[2])


@pytest.mark.slow
def test_float32_agrees_with_float64(scheme, fluid):
    net = _net(scheme)
    potential, single = Potential(net), Potential(_net(scheme).float())
    out, low = potential(fluid.z, fluid.pos), single(fluid.z, fluid.pos.float())
    scale = float(out["forces"].abs().max())
    assert (low["forces"] - out["forces"]).abs().max() < 1e-4 * scale and scale > 1e-3
    level = scheme.hierarchy(scheme.topology(fluid.z, fluid.pos), fluid.z, fluid.pos.float())[1]
    assert level.pos.dtype == level.child_weight.dtype == level.pool_weight.dtype == torch.float32


def test_stress_of_a_cell(scheme):
    """The strain derivative, by differences."""
    cell = 6.5 * torch.eye(3, dtype=F64)[None]
    system, net = _fluid(18, seed=5), _net(scheme)
    potential, pbc = Potential(net), torch.tensor([[True] * 3])
    stress = potential(system.z, system.pos, cell=cell, pbc=pbc, compute_stress=True)["stress"][0]
    step, strain = 1e-4, torch.zeros(3, 3, dtype=F64)
    strain[0, 1] = strain[1, 0] = 0.5
    energies = []
    for sign in (1.0, -1.0):
        stretch = torch.eye(3, dtype=F64) + sign * step * strain
        with torch.no_grad():
            energies.append(float(net(system.z, system.pos @ stretch, cell=cell @ stretch, pbc=pbc)))
    numeric = (energies[0] - energies[1]) / (2 * step) / 6.5**3
    assert abs(float(stress[0, 1]) - numeric) < 1e-5 * max(1.0, abs(numeric)) and abs(numeric) > 1e-6


def test_config_round_trip_and_repr():
    scheme = SmoothSurvivors((2.5, 5.0), (4.0, 8.0, None), "mean", rounds=3, noise=1.0, width=3.0)
    again = Scheme.from_config(scheme.config())
    assert repr(again) == repr(scheme) and again.levels == scheme.levels
    assert [spec.name for spec in scheme.levels] == ["atoms", "survivors 1", "survivors 2", "root"]
    assert scheme.levels[2].pair_radius is None


def test_own_priorities(fluid):
    class Heavy(SmoothSurvivors):
        def priority(self, z, batch, index, vec):
            return 10.0 * (z == 1).to(vec.dtype) + torch.arange(len(z)).to(vec.dtype) * 1e-3

    scheme = Heavy(**SMALL)
    topology = scheme.topology(fluid.z, fluid.pos)
    near = edge_vectors(fluid.pos, topology.pair_index[0]).norm(dim=1) < 1.4
    source, target = topology.pair_index[0][:, near]
    loses = target[(fluid.z[source] == 1) & (fluid.z[target] != 1)]
    assert len(loses) and not set(loses.tolist()) & set(topology.centre[1].tolist()), "a hydrogen nearby wins"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radii": ()}, "radii must list at least one radius"),
        ({"radii": (6.0, 3.0)}, "radii must grow from level to level"),
        ({"radii": (3.0,), "cutoffs": (5.0,)}, r"cutoffs must list one radius for atoms .*\(2 in all\)"),
        ({"radii": (4.0, 6.0)}, r"cutoffs\[0\] must be at least 1.35 radii\[0\] = 5.4"),
        ({"radii": (3.0, 6.0), "cutoffs": (5.0, None, 18.0)}, r"cutoffs\[1\] must be a positive finite length"),
        ({"centre": "origin"}, "centre must be one of atom, mean"),
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"width": 0.0}, "width must be a positive finite difference of priorities, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmoothSurvivors(**arguments)


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [
        ({}, (4.5, 9.0)),
        ({"cutoffs": (5.0, 9.0, None)}, (4.5, 8.1)),
        ({"centre": "mean", "cutoffs": (5.0, 9.0, 18.0)}, (6.075, 12.15)),
        ({"cutoffs": (5.0, 40.0, 50.0)}, (20.0, 25.0)),
        ({"lengths": [3.0, 6.0]}, (3.0, 6.0)),
    ],
)
def test_lengths_of_radial_functions(arguments, lengths):
    """Half the cutoff of the pairs, and no less than the reach of a part; the support of the members is the reach."""
    scheme = SmoothSurvivors(**arguments)
    assert scheme.lengths == pytest.approx(lengths, abs=1e-12)
    assert [scheme.edge_sets[EdgeSet("child", k)] for k in (1, 2)] == pytest.approx(lengths, abs=1e-12)
    assert scheme.levels[1].child_radius == SmoothSurvivors(centre=scheme.centre).levels[1].child_radius
    assert Scheme.from_config(scheme.config()).lengths == scheme.lengths


@pytest.mark.parametrize(("lengths", "error"), [((3.0,), ValueError), (4.0, ValueError), ((3.0, -1.0), ValueError)])
def test_wrong_lengths(lengths, error):
    with pytest.raises(error, match=r"lengths"):
        SmoothSurvivors(lengths=lengths)


def test_lengths_change_the_states(fluid):
    """They are arguments of the network: another length is another energy."""
    usual, short = (_net(scheme=SmoothSurvivors(**SMALL, lengths=lengths)) for lengths in (None, (2.0, 3.0)))
    short.load_state_dict(usual.state_dict())
    assert (usual(fluid.z, fluid.pos) - short(fluid.z, fluid.pos)).abs().max() > 1e-6
