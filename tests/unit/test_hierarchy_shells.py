"""NestedShells and FromAssignment: windows, overlap, labels, cells; and what every scheme shares."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from nbody_pyg import NBodyNet
from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import BondTree, FromAssignment, LevelSpec, NestedShells, Scheme, Topology
from nbody_pyg.radial import smooth_cutoff

# With jaxtyping's import hook on, wrong types never reach the checks whose messages are tested here
own_checks = pytest.mark.skipif(
    any("jaxtyping-packages" in argument for argument in sys.argv), reason="the import hook refuses it first"
)

SCHEMES = [BondTree(), NestedShells((2.0, 4.0)), FromAssignment(part_cutoffs=(6.0, None))]


def _frame(molecule, **keys) -> AtomicData:
    z, pos = molecule
    atoms = torch.arange(len(z))
    labels = torch.stack([atoms // 2 + 3, (atoms // 4) * 5], dim=1)
    return AtomicData(z=z, pos=pos, labels=labels, **keys)


@pytest.mark.parametrize("exponent", [3, 6])
def test_shells_have_every_neighbour_and_the_atom_itself(molecule, exponent):
    z, pos = molecule
    scheme = NestedShells((1.7, 3.0), exponent)
    topology = scheme.topology(z, pos).validate()
    hierarchy = scheme.hierarchy(topology, z, pos).validate()
    distance = torch.cdist(pos, pos)
    for k, radius in ((1, 1.7), (2, 3.0)):
        expected = (distance < radius).nonzero().flip(1).t()
        assert torch.equal(topology.child_index[k], expected), "sorted by parent, then child"
        child, parent = expected
        torch.testing.assert_close(hierarchy[k].child_vec, pos[child] - pos[parent], rtol=0, atol=1e-12)
        window = smooth_cutoff(distance[child, parent], radius, exponent)
        torch.testing.assert_close(hierarchy[k].child_weight, window, rtol=0, atol=1e-10)
        assert torch.equal(hierarchy[k].child_weight[child == parent], torch.ones(len(z), dtype=torch.float64))
        assert torch.equal(hierarchy[k].pos, pos), "a part sits on its central atom"
        assert hierarchy[k].pair_index is None
    assert hierarchy.root.child_index.tolist() == [list(range(len(z))), [0] * len(z)]
    assert torch.equal(hierarchy.root.child_weight, torch.ones(len(z), dtype=torch.float64))
    atom, part = topology.parts(2)
    reach = ((distance < 3.0).double() @ (distance < 1.7).double()) > 0
    assert torch.equal(reach.nonzero().t(), torch.stack([part, atom]))


def test_shells_of_one_atom_and_of_far_atoms():
    z, pos = torch.tensor([1, 2]), torch.tensor([[0.0, 0, 0], [50, 0, 0]], dtype=torch.float64)
    for n in (1, 2):
        topology = NestedShells((3.0,)).topology(z[:n], pos[:n]).validate()
        assert topology.child_index[1].tolist() == [list(range(n))] * 2
        hierarchy = NestedShells((3.0,)).hierarchy(topology, z[:n], pos[:n]).validate()
        assert not hierarchy[1].child_vec.any()


def test_shells_are_smooth_where_an_atom_enters():
    z, scheme = torch.tensor([6, 6, 8, 1]), NestedShells((2.0,))
    base = torch.tensor([[0.0, 0, 0], [0, 1.4, 0.2], [0.3, 0, 1.3], [1.9, 0.1, 0.1]], dtype=torch.float64)

    def total(x):
        pos = base.clone()
        pos[3, 0] = x
        hierarchy = scheme.hierarchy(scheme.topology(z, pos), z, pos)
        return (hierarchy[1].child_weight * hierarchy[1].child_vec.square().sum(-1)).sum()

    bounds = []
    for h in (1e-2, 1e-3, 1e-4):
        # Across the radius, where the number of edges changes
        edge = (4.0 - 0.02) ** 0.5
        second = [total(edge + s * h + h) - 2 * total(edge + s * h) + total(edge + s * h - h) for s in (-1, 0, 1)]
        bounds.append(max(abs(v) for v in second) / h**2)
    assert bounds[2] < 2 * bounds[0] + 1e-3, f"second differences diverge: {bounds}"


def test_shells_in_a_cell_smaller_than_the_radius():
    z = torch.tensor([14, 14])
    pos = torch.tensor([[0.1, 0.2, 0.3], [1.5, 1.4, 1.6]], dtype=torch.float64)
    cell = torch.tensor([[[2.7, 0.2, 0], [0, 2.9, 0.3], [0.1, 0, 3.1]]], dtype=torch.float64)
    pbc = torch.tensor([[True, True, True]])
    scheme = NestedShells((4.0,))
    big_z, big_pos = (
        z.repeat(27),
        torch.cat(
            [pos + torch.tensor([a, b, c]).double() @ cell[0] for a in range(3) for b in range(3) for c in range(3)]
        ),
    )
    small = scheme.hierarchy(scheme.topology(z, pos, cell=cell, pbc=pbc).validate(), z, pos, cell)
    big = scheme.hierarchy(scheme.topology(big_z, big_pos, cell=3 * cell, pbc=pbc).validate(), big_z, big_pos, 3 * cell)
    assert small[1].child_index.shape[1] > 2 * len(z)
    torch.testing.assert_close(27 * small[1].child_weight.sum(), big[1].child_weight.sum(), rtol=1e-12, atol=0)
    moved = pos + torch.tensor([[3.0, -1, 0], [0, 2, 2]]).double() @ cell[0]
    other = scheme.hierarchy(scheme.topology(z, moved, cell=cell, pbc=pbc), z, moved, cell)
    torch.testing.assert_close(other[1].child_weight.sum(), small[1].child_weight.sum(), rtol=1e-12, atol=0)
    assert not other.root.child_vec.any()


def test_far_molecules_give_the_union_of_the_single_shells(molecules):
    scheme = NestedShells((2.0, 4.0))
    (z1, r1), (z2, r2) = molecules["chiral"], molecules["ethanol"]
    far = torch.tensor([1000.0, -30.0, 7.0], dtype=torch.float64)
    z, pos = torch.cat([z1, z2]), torch.cat([r1, r2 + far])
    both = scheme.hierarchy(scheme.topology(z, pos), z, pos)
    one = scheme.hierarchy(scheme.topology(z1, r1), z1, r1)
    two = scheme.hierarchy(scheme.topology(z2, r2), z2, r2)
    for k in (1, 2):
        index = torch.cat([one[k].child_index, two[k].child_index + len(z1)], dim=1)
        assert torch.equal(both[k].child_index, index)
        for name in ("child_vec", "child_weight"):
            single = torch.cat([getattr(one[k], name), getattr(two[k], name)])
            torch.testing.assert_close(getattr(both[k], name), single, rtol=0, atol=1e-9)


def test_labels_make_nested_parts(molecule):
    scheme = SCHEMES[2]
    frame = scheme(_frame(molecule))
    topology = Topology.from_data(frame).validate()
    n = len(molecule[0])
    assert [topology.size(k) for k in range(4)] == [n, (n + 1) // 2, (n + 3) // 4, 1]
    atom, part = topology.parts(1)
    assert torch.equal(part, atom // 2)
    hierarchy = scheme.hierarchy(topology, *molecule).validate()
    assert hierarchy[1].pair_index.shape[1] > 0
    assert hierarchy[2].pair_index is None
    moved = scheme.update(topology, molecule[0], molecule[1] * 4.0)
    assert torch.equal(moved.child_index[1], topology.child_index[1])
    assert moved.pair_index[0].shape[1] < topology.pair_index[0].shape[1]


def test_equal_labels_in_different_graphs_are_different_parts(molecules):
    scheme = FromAssignment(part_cutoffs=(None, None))
    frames = [_frame(molecule) for molecule in molecules.values()]
    built = Topology.from_data(scheme(Batch.from_data_list(frames))).validate()
    collated = Topology.from_data(Batch.from_data_list([scheme(frame) for frame in frames]))
    for k in range(1, 4):
        assert torch.equal(built.child_index[k], collated.child_index[k])


def test_overlapping_parts_count_each_atom_once(molecules):
    z, pos = molecules["ethanol"]
    scheme = FromAssignment(parts=[[0, 1, 3, 4, 5, 6, 7], [0, 2, 3, 4, 8]])
    topology = scheme.topology(z, pos).validate()
    assert topology.parts(2).shape[1] == 9
    hierarchy = scheme.hierarchy(topology, z, pos).validate()
    from ase import Atoms

    centre = torch.as_tensor(Atoms(z.numpy(), pos.numpy()).get_center_of_mass())
    torch.testing.assert_close(hierarchy.root.pos[0], centre, rtol=0, atol=1e-10)
    batch = torch.tensor([0] * 9 + [1] * 9)
    two = scheme.topology(z.repeat(2), pos.repeat(2, 1), batch).validate()
    assert two.child_index[1][:, -1].tolist() == [17, 3]
    assert torch.autograd.gradcheck(
        lambda r: tuple(level.pos for level in scheme.hierarchy(topology, z, r)),
        (pos.requires_grad_(),),
        atol=1e-7,
    )


def test_the_clusters_of_a_pyg_select_output(molecules):
    from torch_geometric.nn.pool.select import SelectOutput

    z, pos = molecules["methanol"]
    select = SelectOutput(torch.arange(6), 6, torch.tensor([0, 1, 0, 0, 0, 1]), 2)
    scheme = FromAssignment.from_select(select)
    assert scheme.parts == ((0, 2, 3, 4), (1, 5))
    scheme.topology(z, pos).validate()
    dropped = SelectOutput(torch.arange(5), 6, torch.tensor([0, 1, 0, 0, 0]), 2)
    with pytest.raises(ValueError, match="dropped atom 5"):
        FromAssignment.from_select(dropped)
    weighted = SelectOutput(torch.arange(6), 6, torch.zeros(6, dtype=torch.long), 1, weight=torch.rand(6))
    with pytest.raises(ValueError, match="must have no weight"):
        FromAssignment.from_select(weighted)


@own_checks
@pytest.mark.parametrize(
    ("scheme", "labels", "message"),
    [
        (FromAssignment(), None, "data must have labels under 'labels'"),
        (FromAssignment(), torch.zeros(5, dtype=torch.long), r"integers of shape \[6, 1\]"),
        (FromAssignment(), torch.zeros(6), "labels must be integers"),
        (FromAssignment(), torch.tensor([0, 0, -1, 0, 0, 0]), "negative, but atom 2"),
        (
            FromAssignment(part_cutoffs=(None, None)),
            torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0], [1, 1], [1, 1]]),
            "nested, finest first, but the part of atom 0 in column 0",
        ),
        (FromAssignment(labels=[0, 1]), None, "labels are for 2 atoms, but graph 0 has 6"),
        (FromAssignment(parts=[[0, 1], [3, 4, 5]]), None, r"atom 2 \(graph 0\) has no parent"),
    ],
)
def test_labels_are_checked(molecules, scheme, labels, message):
    z, pos = molecules["methanol"]
    data = Data(z=z, pos=pos) if labels is None else Data(z=z, pos=pos, labels=labels)
    with pytest.raises(ValueError, match=message):
        scheme(data)


def test_labels_from_data_cannot_be_guessed_later(molecules):
    with pytest.raises(ValueError, match="labels must be given"):
        FromAssignment().topology(*molecules["methanol"])
    with pytest.raises(ValueError, match="must not both be given"):
        FromAssignment(labels=[0], parts=[[0]])
    with pytest.raises(ValueError, match="part_cutoffs must list one radius"):
        FromAssignment(part_cutoffs=())
    with pytest.raises(ValueError, match="must have length 1"):
        FromAssignment(parts=[[0]], part_cutoffs=(1.0, 2.0))


def test_labelled_parts_are_put_together_in_a_cell(molecules, generator):
    z, pos = molecules["ethanol"]
    cell = torch.tensor([[[9.0, 0, 0], [2.0, 8.0, 0], [0, 1.0, 10.0]]], dtype=torch.float64)
    pbc = torch.tensor([[True, True, True]])
    for scheme in (
        FromAssignment(labels=[0, 1, 2, 0, 0, 1, 1, 1, 2]),
        FromAssignment(parts=[[0, 1, 3, 4, 5, 6, 7], [0, 2, 3, 4, 8]]),
    ):
        outside = scheme.hierarchy(scheme.topology(z, pos), z, pos)
        image = torch.randint(-2, 3, (len(z), 3), generator=generator).double()
        moved = pos + image @ cell[0] + torch.tensor([4.0, 3.0, 1.0]).double()
        topology = scheme.topology(z, moved, cell=cell, pbc=pbc).validate()
        inside = scheme.hierarchy(topology, z, moved, cell).validate()
        torch.testing.assert_close(inside[1].child_vec, outside[1].child_vec, rtol=0, atol=1e-10)
        assert inside[1].child_vec.abs().max() > 0.1


def test_a_hierarchy_of_another_scheme_is_refused(molecules):
    z, pos = molecules["ethanol"]
    frame = BondTree(cutoff=4.0)(AtomicData(z=z, pos=pos))
    assert BondTree(cutoff=4.0).read(frame).num_levels == 5
    for data in (
        frame,
        Batch.from_data_list([frame, frame]),
        BondTree(cutoff=4.0)(Batch.from_data_list([frame])),
    ):
        with pytest.raises(ValueError, match=r"must hold the hierarchy of BondTree\(cutoff=5.0.*holds that of"):
            BondTree(cutoff=5.0).read(data)
    topology = Topology.from_data(frame)
    for scheme in (NestedShells(), BondTree(group_cutoff=None)):
        with pytest.raises(ValueError, match=r"levels, with pairs at levels .* which another scheme made"):
            scheme.hierarchy(topology, z, pos)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: type(scheme).__name__)
class TestEveryScheme:
    def test_it_is_a_transform_that_leaves_its_input(self, scheme, molecule):
        data = Data(**_frame(molecule).to_dict(), y=torch.zeros(1, 19))
        out = scheme(data)
        assert isinstance(out, AtomicData)
        assert out.y.shape == (1, 19)
        assert "child_1" not in data
        assert "child_1" in out
        Topology.from_data(out).validate()

    def test_it_batches_graphs_of_different_sizes(self, scheme, molecules):
        frames = [_frame(molecule) for molecule in molecules.values()]
        one = torch.zeros(1, 3, dtype=torch.float64)
        frames.insert(1, _frame((torch.tensor([9]), one)))
        frames.append(_frame((torch.tensor([1]), one + 3.0)))
        stored = [scheme(frame) for frame in frames]
        batch = next(iter(DataLoader(stored, batch_size=len(stored))))
        topology = Topology.from_data(batch).validate()
        assert topology.num_graphs == len(frames)
        both = scheme.hierarchy(topology, batch.z, batch.pos).validate()
        singles = [scheme.hierarchy(Topology.from_data(s), s.z, s.pos).validate() for s in stored]
        for k, level in enumerate(both):
            for name in ("pos", "weight", "child_vec", "child_weight", "pair_vec", "pair_weight"):
                values = [getattr(single[k], name) for single in singles]
                if values[0] is not None:
                    torch.testing.assert_close(getattr(level, name), torch.cat(values), rtol=0, atol=1e-12)

    def test_it_turns_and_moves_with_the_molecule(self, scheme, molecule, rotation):
        z, pos = molecule
        frame = scheme(_frame(molecule))
        turned = scheme(_frame((z, pos @ rotation.T + 2.0)))
        one = scheme.hierarchy(Topology.from_data(frame), z, pos)
        two = scheme.hierarchy(Topology.from_data(turned), z, turned.pos)
        for before, after in zip(one, two, strict=True):
            torch.testing.assert_close(after.pos, before.pos @ rotation.T + 2.0, rtol=0, atol=1e-10)
            for name in ("child", "pair"):
                if getattr(before, f"{name}_vec") is not None:
                    assert torch.equal(getattr(after, f"{name}_index"), getattr(before, f"{name}_index"))
                    vec = getattr(before, f"{name}_vec") @ rotation.T
                    torch.testing.assert_close(getattr(after, f"{name}_vec"), vec, rtol=0, atol=1e-10)
                    weight = f"{name}_weight"
                    torch.testing.assert_close(getattr(after, weight), getattr(before, weight), rtol=0, atol=1e-10)

    def test_second_derivatives_are_finite(self, scheme, molecule):
        z, pos = molecule
        topology = Topology.from_data(scheme(_frame(molecule)))

        def scalar(r):
            total = 0.0
            for level in scheme.hierarchy(topology, z, r):
                for kind in ("child", "pair"):
                    if (vec := getattr(level, f"{kind}_vec")) is not None:
                        total = total + (vec.square().sum(-1) * getattr(level, f"{kind}_weight")).sum()
            return total

        hessian = torch.autograd.functional.hessian(scalar, pos)
        assert torch.isfinite(hessian).all()
        assert hessian.abs().max() > 0.1

    def test_its_config_goes_through_json(self, scheme):
        config = json.loads(json.dumps(scheme.config()))
        again = Scheme.from_config(config)
        assert type(again) is type(scheme)
        assert again.config() == config
        assert again.levels == scheme.levels

    def test_it_says_its_symmetry_and_continuity(self, scheme):
        assert scheme.symmetry
        assert scheme.continuity
        assert scheme.levels[-1].name == "root"

    def test_float32_stays_float32(self, scheme, molecule):
        z, pos = molecule
        frame = scheme(_frame((z, pos.float())))
        for level in scheme.hierarchy(Topology.from_data(frame), z, pos.float()):
            for value in vars(level).values():
                assert value is None or not value.is_floating_point() or value.dtype == torch.float32


@own_checks
@pytest.mark.parametrize(
    ("z", "pos", "batch", "message"),
    [
        (torch.ones(3, dtype=torch.long), torch.randn(4, 3), None, r"z must have shape \[4\]"),
        (torch.ones(4), torch.randn(4, 3), None, "z must hold integers"),
        (torch.ones(0, dtype=torch.long), torch.randn(0, 3), None, "at least one atom"),
        (
            torch.ones(4, dtype=torch.long),
            torch.randn(4, 3),
            torch.tensor([0, 0, 2, 2]),
            "graph 1 has no atom",
        ),
        (
            torch.ones(4, dtype=torch.long),
            torch.randn(4, 3),
            torch.tensor([0, 1, 0, 1]),
            "batch must be sorted",
        ),
        (torch.ones(4, dtype=torch.long), torch.full((4, 3), torch.nan), None, "pos must be finite"),
        (torch.ones(2, dtype=torch.long), torch.zeros(2, 3), None, "coincident atoms"),
    ],
)
def test_input_is_checked(z, pos, batch, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NestedShells().topology(z, pos, batch)


@own_checks
def test_radii_are_checked():
    with pytest.raises(ValueError, match="radii must list at least one radius"):
        NestedShells(())
    with pytest.raises(ValueError, match="radii must list at least one radius"):
        NestedShells(5.0)
    with pytest.raises(ValueError, match=r"radii\[1\] must be a positive finite length"):
        NestedShells((5.0, 0.0))


class _Pairs(Scheme):
    """A scheme of one's own: the root with all atoms, and nothing else."""

    symmetry, continuity = "E(3)", "smooth"

    def __init__(self, size: float = 2.0) -> None:
        self.size = size
        self.levels = (LevelSpec("atoms"), LevelSpec("root", size))

    def build(self, system):
        count = system.num_atoms
        return Topology(
            (count, torch.ones_like(count)), (None, torch.stack([torch.arange(len(system.z)), system.batch]))
        )


def test_a_scheme_of_ones_own_works_and_is_found_by_name(molecule):
    scheme = Scheme.from_config(_Pairs(3.0).config())
    frame = scheme(_frame(molecule))
    assert len(scheme.hierarchy(Topology.from_data(frame).validate(), *molecule).validate()) == 2
    with pytest.raises(ValueError, match=r"name must be one of the schemes.*'Nothing'"):
        Scheme.from_config({"name": "Nothing"})


class DifferentWindows(NestedShells):
    """A subclass with a window for each shell, as users may write it."""

    def child_weight(self, level, vec):
        return super().child_weight(level, vec) * level


def test_windows_of_a_subclass_count_for_shells_of_one_radius(generator):
    z, pos = torch.tensor([6, 1, 8, 1, 6]), 1.5 * torch.randn(5, 3, dtype=torch.float64, generator=generator)
    assert NestedShells((4.0, 4.0)).same_edges and not DifferentWindows((4.0, 4.0)).same_edges
    torch.manual_seed(0)
    nets = [
        NBodyNet([1, 6, 8], kind((4.0, 4.0)), channels=4, lmax=1).double() for kind in (NestedShells, DifferentWindows)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    values = [net(z, pos).detach() for net in nets]
    assert (values[0] - values[1]).abs() > 1e-6
