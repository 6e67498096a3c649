"""Layers for anybody's PyG network: NBodyConv, pooling, InteractionGraph, transforms by name."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.transforms as T
from e3nn import o3
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import SchNet, global_add_pool
from torch_geometric.nn.pool.select import SelectOutput

from nbody_pyg import AtomicData, BondTree, FromAssignment, NBodyNet, NestedShells
from nbody_pyg.geometry import neighbour_list
from nbody_pyg.nn import InteractionGraph, NBodyConnect, NBodyConv, NBodyPooling, NBodyReduce, NBodySelect
from nbody_pyg.testing import rotate_features

TYPES = [
    ("8x0e", "4x0e + 4x1o", 1),
    pytest.param("4x0e + 3x1o", "2x0e + 5x1o + 1x2e", 3, marks=pytest.mark.slow),  # a minute of compiling
    ("2x0e + 2x1o", "3x0e + 2x1e", 1),
]


@pytest.mark.parametrize(("irreps_in", "irreps_out", "body_order"), TYPES)
def test_conv_is_covariant_and_masks_change_its_path_only(irreps_in, irreps_out, body_order, molecules, rotation):
    torch.manual_seed(0)
    _, pos = molecules["chiral"]
    conv = NBodyConv(irreps_in, irreps_out, cutoff=4.0, body_order=body_order).double().requires_grad_(False)
    edges, _ = neighbour_list(pos, 4.0)
    x = torch.randn(len(pos), conv.irreps_in.dim, dtype=torch.float64)
    out = conv(x, edges, pos)
    assert out.shape == (len(pos), conv.irreps_out.dim) and float(out.abs().min(0).values.max()) > 1e-4
    again = conv(rotate_features(x, irreps_in, rotation), edges, pos @ rotation.T + 3.0)
    torch.testing.assert_close(again, rotate_features(out, irreps_out, rotation), rtol=0, atol=1e-10)
    order = torch.randperm(edges.shape[1])
    torch.testing.assert_close(conv(x, edges[:, order], pos), out, rtol=0, atol=1e-12)
    conv.explain, conv._apply_sigmoid = True, False
    conv._edge_mask = torch.ones(edges.shape[1], dtype=torch.float64)
    torch.testing.assert_close(conv(x, edges, pos), out, rtol=0, atol=1e-12)
    conv._edge_mask = torch.zeros_like(conv._edge_mask)
    assert float((conv(x, edges, pos) - out).abs().max()) > 1e-3


def test_conv_between_two_kinds_of_nodes_and_periodic_images():
    torch.manual_seed(1)
    conv = NBodyConv("2x0e", "2x0e + 1x1o", cutoff=3.0).double()
    x, pos = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    centres = torch.tensor([[0.1, 0.2, 0.0], [1.0, -0.5, 0.4]], dtype=torch.float64)
    edges = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 1, 1]])
    out = conv((x, None), edges, (pos, centres))
    assert out.shape == (2, 5)
    alone = conv((x[:2], None), edges[:, :2], (pos[:2], centres[:1]))
    torch.testing.assert_close(out[:1], alone, rtol=0, atol=1e-12)
    # An atom and its images: the same as a copy that stands there
    cell = torch.diag(torch.tensor([2.5, 9.0, 9.0], dtype=torch.float64))[None]
    index, shift = neighbour_list(pos[:1], 3.0, cell=cell, pbc=torch.tensor([[True, False, False]]))
    images = conv(x[:1], index, pos[:1], shift, cell)
    row = pos[:1] + torch.tensor([[0.0, 0, 0], [2.5, 0, 0], [-2.5, 0, 0]])
    copies = conv(x[[0, 0, 0]], torch.tensor([[1, 2], [0, 0]]), row)
    torch.testing.assert_close(images, copies[:1], rtol=0, atol=1e-12)


def test_conv_has_second_derivatives_and_refuses_what_it_cannot(molecules):
    _, pos = molecules["methanol"]
    conv = NBodyConv("2x0e", "1x0e", cutoff=4.0).double()
    edges, _ = neighbour_list(pos, 4.0)
    x = torch.randn(len(pos), 2, dtype=torch.float64)

    def energy(pos):
        return conv(x, edges, pos).square().sum()

    pos = pos.requires_grad_(True)
    torch.autograd.gradgradcheck(energy, (pos,))
    with pytest.raises(ValueError, match="no path leads to 1e"):
        NBodyConv("2x0e", "1x1e")
    with pytest.raises(ValueError, match="x must have 2 components"):
        conv(x[:, :1], edges, pos)


def test_moments_are_the_multipoles_and_translate():
    """With charges, the unmixed moments are charge, dipole and quadrupole about the part's centre."""
    torch.manual_seed(2)
    charge, pos = torch.randn(6, 1).double(), torch.randn(6, 3).double()
    select = SelectOutput(torch.arange(6), 6, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    reduce = NBodyReduce("0e", "0e + 1o + 2e", order=2, length=1.0).double()
    assert reduce.product.irreps_out == o3.Irreps("0e + 1o + 2e")

    def moments(centres):
        return reduce.moments(charge, select, pos - centres[select.cluster_index])

    zero = torch.zeros(2, 3, dtype=torch.float64)
    found = moments(zero)
    for part in range(2):
        q, r = charge[3 * part : 3 * part + 3], pos[3 * part : 3 * part + 3]
        harmonics = o3.spherical_harmonics([0, 1, 2], r, normalize=False, normalization="component")
        torch.testing.assert_close(found[part], (q * harmonics).sum(0), rtol=0, atol=1e-12)
    step = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64).expand(2, 3)
    shifted = moments(step)
    torch.testing.assert_close(shifted[:, :1], found[:, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted[:, 1:4], found[:, 1:4] - 3**0.5 * step * found[:, :1], rtol=0, atol=1e-12)
    assert float((shifted[:, 4:] - found[:, 4:]).abs().max()) > 0.1


def test_connect_joins_overlapping_parts():
    #  parts {0, 1}, {1, 2}, {3}; edges 0-3 and 1-2
    select = SelectOutput(torch.tensor([0, 1, 1, 2, 3]), 4, torch.tensor([0, 0, 1, 1, 2]), 3,
                          torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0]))  # fmt: skip
    edges = torch.tensor([[0, 3, 1, 2], [3, 0, 2, 1]])
    attr = torch.tensor([[4.0], [4.0], [8.0], [8.0]])
    out = NBodyConnect()(select, edges, attr, torch.tensor([0, 0, 0, 0]))
    assert out.edge_index.tolist() == [[0, 0, 1, 2], [1, 2, 0, 0]]
    # 0-1: only the edge 1-2 counts, with weight 0.5 from part 0 and 0.5 or 1.0 in part 1
    assert out.edge_attr.flatten().tolist() == [8.0, 4.0, 8.0, 4.0]
    assert out.batch.tolist() == [0, 0, 0]
    bare = NBodyConnect(shared=False)(SelectOutput(torch.arange(4), 4, torch.tensor([0, 0, 1, 1]), 2), edges[:, :0])
    assert bare.edge_index.shape == (2, 0)
    joined = NBodyConnect(shared=False)(SelectOutput(torch.arange(4), 4, torch.tensor([0, 0, 1, 1]), 2), edges)
    assert joined.edge_index.tolist() == [[0, 1], [1, 0]]


class UserNetwork(nn.Module):
    """Somebody's network: a convolution, one level up the hierarchy, a convolution there, a sum."""

    def __init__(self, scheme, **pooling):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.first = NBodyConv("8x0e", "4x0e + 4x1o", cutoff=3.0)
        self.pool = NBodyPooling(scheme, "4x0e + 4x1o", "4x0e + 4x1o", **pooling)
        self.second = NBodyConv("4x0e + 4x1o", "1x0e + 1x1o", cutoff=12.0)

    def forward(self, z, pos, batch):
        edge_index, _ = neighbour_list(pos, 3.0, batch)
        x = self.first(self.embedding(z), edge_index, pos)
        coarse = self.pool(x, edge_index, batch=batch, z=z, pos=pos)
        return global_add_pool(self.second(coarse.x, coarse.edge_index, coarse.pos), coarse.batch)


@pytest.mark.parametrize("scheme", [BondTree(), NestedShells((3.0,))], ids=lambda s: type(s).__name__)
def test_pooling_in_a_network_of_ones_own(scheme, molecules, rotation):
    torch.manual_seed(3)
    model = UserNetwork(scheme).double().requires_grad_(False)
    frames = [Data(z=molecules[name][0], pos=molecules[name][1]) for name in ("methanol", "ethanol", "chiral")]
    batch = next(iter(DataLoader(frames, batch_size=3)))
    pos = batch.pos.clone().requires_grad_(True)
    out = model(batch.z, pos, batch.batch)
    (slope,) = torch.autograd.grad(out[:, 0].sum(), pos, retain_graph=True)
    out = out.detach()
    assert out.shape == (3, 4) and float(out.abs().min()) > 1e-5
    alone = torch.cat([model(f.z, f.pos, torch.zeros_like(f.z)) for f in frames])
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-11)
    again = model(batch.z, batch.pos @ rotation.T, batch.batch)
    torch.testing.assert_close(again, rotate_features(out, "0e + 1o", rotation), rtol=0, atol=1e-10)
    assert float(slope.norm(dim=1).min()) > 1e-6
    torch.testing.assert_close(slope.sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    order = torch.randperm(len(frames[0].z))
    mixed = model(frames[0].z[order], frames[0].pos[order], torch.zeros_like(order))
    torch.testing.assert_close(mixed, out[:1], rtol=0, atol=1e-11)


def test_select_follows_the_scheme_and_its_data(molecules):
    z, pos = molecules["ethanol"]
    data = BondTree()(Data(z=z, pos=pos))
    for level in range(1, len(BondTree().levels)):
        select = NBodySelect(BondTree(), level)
        got, again = select(z, pos), select(data)
        assert got.node_index.equal(again.node_index) and got.cluster_index.equal(again.cluster_index)
        assert got.num_nodes == (len(z) if level == 1 else int(data[f"num_parts_{level - 1}"]))
        assert got.num_clusters == int(data[f"num_parts_{level}"])
    shells = NBodySelect(NestedShells((3.0,)))
    weight = shells(z, pos.clone().requires_grad_(True)).weight
    assert weight.requires_grad and float(weight.detach().min()) < 0.9 < float(weight.detach().max()) == 1.0
    # What it selects is a scheme again
    scheme = FromAssignment.from_select(NBodySelect(BondTree())(z, pos))
    assert scheme.topology(z, pos).num_parts[1].tolist() == data.num_parts_1.tolist()
    with pytest.raises(ValueError, match=r"level must lie in 1\.\."):
        NBodySelect(BondTree(), 9)
    pooling = NBodyPooling(BondTree(), "1x0e", "1x0e", level=2)
    with pytest.raises(ValueError, match="x must have one row for each of the"):
        pooling(torch.ones(len(z), 1), torch.zeros(2, 0, dtype=torch.long), z=z, pos=pos)


def test_schnet_runs_on_the_complete_graph(molecules):
    torch.manual_seed(4)
    model = SchNet(16, 16, 2, 8, cutoff=4.0, interaction_graph=InteractionGraph(4.0)).double()
    z, pos = molecules["chiral"]
    edges, length = InteractionGraph(4.0)(pos)
    expected, _ = neighbour_list(pos, 4.0)
    assert edges.equal(expected)
    torch.testing.assert_close(length, (pos[edges[0]] - pos[edges[1]]).norm(dim=1), rtol=0, atol=1e-14)
    out = model(z, pos)
    order = torch.randperm(len(z))
    torch.testing.assert_close(model(z[order], pos[order]), out, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="cutoff must be a positive length"):
        InteractionGraph(0.0)


def test_schemes_are_transforms_in_a_composition_and_by_name(molecules):
    from torch_geometric.data.datapipes import DatasetAdapter

    z, pos = molecules["ethanol"]
    raw = Data(z=z, pos=pos)
    scheme = NestedShells((4.0, 4.0))
    composed = T.Compose([T.Center(), scheme])(raw)
    assert isinstance(composed, AtomicData) and "num_parts_1" in composed and "num_parts_1" not in raw
    assert float(composed.pos.mean(0).abs().max()) < 1e-12 < float(raw.pos.mean(0).abs().max())
    for name, kind, arguments in (
        ("nbody_nested_shells", NestedShells, {"radii": (4.0, 4.0)}),
        ("nbody_bond_tree", BondTree, {}),
        ("nbody_from_assignment", FromAssignment, {"labels": [0, 0, 1, 0, 0, 0, 0, 0, 1]}),
    ):
        (found,) = list(getattr(DatasetAdapter([raw]), name)(**arguments))
        expected = kind(**arguments)(raw)
        assert found.scheme == expected.scheme and found.child_1.equal(expected.child_1)
    model = NBodyNet([1, 6, 8], scheme, channels=4).double()
    batch = next(iter(DataLoader([scheme(raw), scheme(raw)], batch_size=2)))
    torch.testing.assert_close(model(batch), model(batch.z, batch.pos, batch.batch), rtol=0, atol=1e-12)
