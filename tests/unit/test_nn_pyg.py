"""Layers for anybody's PyG network: NBodyConv, pooling, InteractionGraph, transforms by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_geometric.transforms as T
from e3nn import o3
from torch import nn
from torch_geometric import EdgeIndex
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import SchNet, global_add_pool
from torch_geometric.nn.pool.select import SelectOutput
from torch_geometric.profile import count_parameters

from nbody_pyg import AtomicData, BondTree, FromAssignment, NBodyNet, NestedShells
from nbody_pyg.geometry import neighbour_list
from nbody_pyg.nn import InteractionGraph, NBodyConnect, NBodyConv, NBodyPooling, NBodyReduce, NBodySelect
from nbody_pyg.testing import rotate_features

TYPES = [
    ("8x0e", "4x0e + 4x1o", 1),
    pytest.param("4x0e + 3x1o", "2x0e + 5x1o + 1x2e", 3, marks=pytest.mark.slow),  # a minute of compiling
    ("2x0e + 2x1o", "3x0e + 2x1e", 1),
]


@pytest.mark.parametrize(("irreps_in", "irreps_out", "correlation"), TYPES)
def test_conv_is_covariant_and_masks_change_its_path_only(irreps_in, irreps_out, correlation, molecules, rotation):
    torch.manual_seed(0)
    _, pos = molecules["chiral"]
    conv = NBodyConv(irreps_in, irreps_out, cutoff=4.0, correlation=correlation).double().requires_grad_(False)
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


# ------------------------------------------------------------------ conventions of PyG's own layers
@pytest.fixture
def layer():
    """A layer in float64, with states, edges, positions and its result."""
    torch.manual_seed(5)
    conv = NBodyConv("4x0e + 2x1o", "3x0e + 2x1o", cutoff=3.0).double().requires_grad_(False)
    x, pos = torch.randn(6, 10).double(), torch.randn(6, 3).double()
    edges, _ = neighbour_list(pos, 3.0)
    out = conv(x, edges, pos)
    assert float(out.abs().min(0).values.max()) > 1e-4
    return conv, x, edges, pos, out


def test_hooks_fire_and_may_change_what_passes(layer):
    conv, x, edges, pos, out = layer
    fired, handles = [], []
    for step in ("propagate", "message", "aggregate"):
        for kind in ("forward_pre_hook", "forward_hook"):
            register = getattr(conv, f"register_{step}_{kind}")
            handles.append(register(lambda *given, what=(step, kind): fired.append(what)))
    torch.testing.assert_close(conv(x, edges, pos), out, rtol=0, atol=1e-12)
    assert len(fired) == len(set(fired)) == 6
    handles.append(conv.register_message_forward_hook(lambda module, given, messages: 0.0 * messages))
    bare = conv(x, edges[:, :0], pos)
    torch.testing.assert_close(conv(x, edges, pos), bare, rtol=0, atol=1e-12)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(conv(x, edges, pos), out, rtol=0, atol=1e-12)
    assert float((out - bare).abs().max()) > 1e-3
    for step in ("edge_update", "message_and_aggregate"):
        for kind in ("forward_pre_hook", "forward_hook"):
            with pytest.raises(NotImplementedError, match="register it on propagate, message or aggregate"):
                getattr(conv, f"register_{step}_{kind}")(print)


def test_a_subclass_may_change_the_messages(layer):
    conv, x, edges, pos, out = layer

    class Twice(NBodyConv):
        def message(self, x_j, harmonics, radial):
            return 2.0 * super().message(x_j, harmonics, radial)

    twice = Twice("4x0e + 2x1o", "3x0e + 2x1o", cutoff=3.0).double().requires_grad_(False)
    twice.load_state_dict(conv.state_dict())
    bare = conv(x, edges[:, :0], pos)
    torch.testing.assert_close(twice(x, edges, pos), 2.0 * out - bare, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_edges_in_every_form_of_pyg(layer):
    conv, x, edges, pos, out = layer
    ones = torch.ones(edges.shape[1])
    transposed = torch.sparse_coo_tensor(edges.flip(0), ones, (6, 6)).coalesce()
    forms = [edges.int(), EdgeIndex(edges, sparse_size=(6, 6)), transposed, transposed.to_sparse_csr()]
    for form in forms:
        torch.testing.assert_close(conv(x, form, pos), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv(x, edges, pos, size=(6, 6)), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv((x, x), edges, (pos, pos)), out, rtol=0, atol=1e-12)
    # An isolated node keeps what it has
    few = edges[:, edges[1] != 2]
    torch.testing.assert_close(conv(x, few, pos)[2], conv(x, edges[:, :0], pos)[2], rtol=0, atol=1e-12)
    assert conv(x[:0], edges[:, :0], pos[:0]).shape == (0, 9)
    assert count_parameters(conv.requires_grad_(True)) == sum(p.numel() for p in conv.parameters())


def test_positions_of_another_dtype_are_subtracted_in_it(layer):
    conv, x, edges, pos, out = layer
    single = copy.deepcopy(conv).float()
    far = pos + torch.tensor([1000.0, -2000.0, 500.0])
    near, moved = single(x.float(), edges, pos), single(x.float(), edges, far)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, near, rtol=0, atol=1e-5)
    torch.testing.assert_close(near.double(), out, rtol=0, atol=1e-4)


def test_two_kinds_of_nodes_in_a_cell():
    """Sources seen through the boundary: as copies of them that stand there."""
    torch.manual_seed(6)
    conv = NBodyConv("2x0e", "2x0e + 1x1o", cutoff=3.0).double().requires_grad_(False)
    x, pos = torch.randn(2, 2).double(), torch.tensor([[0.1, 0.0, 0.2], [0.3, 1.0, 0.0]], dtype=torch.float64)
    centre = torch.tensor([[4.0, 0.3, 0.1]], dtype=torch.float64)
    cell, edges = torch.eye(3, dtype=torch.float64)[None] * 5.0, torch.tensor([[0, 1], [0, 0]])
    shift = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    found = conv((x, None), edges, (pos, centre), shift, cell)
    expected = conv((x, None), edges, (pos + torch.tensor([5.0, 0, 0]), centre))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float(found.abs().min()) > 1e-6


def _wrong_for_a_layer() -> list:
    x, pos = torch.randn(6, 10).double(), torch.randn(6, 3).double()
    edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 5]])
    wide = torch.cat([pos, pos[:, :1]], 1)
    cell = torch.eye(3, dtype=torch.float64)
    return [
        ((x, edges, pos[:, :2]), {}, ValueError, r"pos must have shape \[num_nodes, 3\], got \[6, 2\]"),
        ((x, edges, pos[:, :1]), {}, ValueError, r"pos must have shape \[num_nodes, 3\], got \[6, 1\]"),
        ((x, edges, wide), {}, ValueError, r"pos must have shape \[num_nodes, 3\], got \[6, 4\]"),
        ((x, edges, (pos, pos[:, :2])), {}, ValueError, r"pos must have shape \[num_nodes, 3\], got \[6, 2\]"),
        ((x, edges, pos.long()), {}, TypeError, "pos must be a floating tensor"),
        ((x, edges, pos / 0), {}, ValueError, "pos must be finite"),
        ((x, edges, pos.to("meta")), {}, ValueError, "x, pos and the weights must be on one device"),
        ((x, edges.to("meta"), pos), {}, ValueError, "edge_index must be on the device of pos"),
        ((x, edges, None), {}, TypeError, "pos must be a tensor or a pair of tensors, got a NoneType"),
        ((x, edges, (pos,)), {}, TypeError, r"pos must be a tensor or the pair \(sources, targets\), got 1 entries"),
        ((x.float(), edges, pos), {}, TypeError, "x must have the dtype of the weights, torch.float64"),
        ((x[None], edges, pos), {}, ValueError, r"got \[1, 6, 10\]; several graphs go into one Batch"),
        ((x[:, :4], edges, pos), {}, ValueError, r"x must have 10 components \(4x0e\+2x1o\)"),
        ((x[:4], edges, pos), {}, ValueError, "x and pos must have a row for each source node, got 4 and 6"),
        (((x, x[:4]), edges, (pos, pos)), {}, ValueError, "a row for each target node, got 4 and 6"),
        ((x.tolist(), edges, pos), {}, TypeError, "x must be a tensor or the pair"),
        ((x, pos, edges), {}, ValueError, "pos must have shape"),
        ((x, edges.double(), pos), {}, TypeError, r"edge_index must hold integers.* conv\(x, edge_index, pos\)"),
        ((x, edges.tolist(), pos), {}, TypeError, r"edge_index must be a tensor \[2, edges\], got a list"),
        ((x, edges.t(), pos), {}, ValueError, r"edge_index must have shape \[2, edges\], got \[4, 2\]; transpose it"),
        ((x, edges - 1, pos), {}, ValueError, "edge_index must name source nodes 0 to 5 in row 0, got -1 to 2"),
        ((x, edges + 1, pos), {}, ValueError, "edge_index must name target nodes 0 to 5 in row 1, got 1 to 6"),
        ((x, edges, pos), {"size": (6, 5)}, ValueError, r"size must be \(6, 6\)"),
        ((x, edges, pos), {"cell": cell}, ValueError, "shift must be given with cell"),
        (
            (x, edges, pos),
            {"shift": pos[:4].round()},
            ValueError,
            r"cell must be given with lattice shifts, got None and",
        ),
        ((x, edges, pos), {"shift": pos[:2], "cell": cell}, ValueError, r"shift must have shape \[4, 3\]"),
        ((x, edges, pos), {"shift": pos[:4], "cell": cell.expand(2, 3, 3)}, ValueError, "with 2 cells"),
    ]


def test_shifts_of_zero_need_no_cell(layer):
    """``neighbour_list`` gives them for open systems."""
    conv, x, edges, pos, out = layer
    assert torch.equal(conv(x, edges, pos, torch.zeros(edges.shape[1], 3)), out)


@pytest.mark.parametrize("case", range(len(_wrong_for_a_layer())))
def test_a_layer_names_what_is_wrong_before_it_computes(case, layer):
    given, named, error, message = _wrong_for_a_layer()[case]
    with pytest.raises(error, match=message):
        layer[0](*given, **named)


def test_connect_takes_features_of_any_shape():
    select = SelectOutput(torch.arange(4), 4, torch.tensor([0, 0, 1, 1]), 2)
    edges = torch.tensor([[0, 2, 1, 3], [2, 0, 3, 1]])
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for attr in (flat, flat[:, None], flat[:, None, None].expand(4, 2, 3), flat.double()):
        found = NBodyConnect()(select, edges, attr)
        assert found.edge_index.tolist() == [[0, 1], [1, 0]]
        assert found.edge_attr.shape == (2, *attr.shape[1:]) and found.edge_attr.dtype == attr.dtype
        assert found.edge_attr.reshape(2, -1)[:, 0].tolist() == [2.0, 3.0]  # means of 1, 3 and of 2, 4
    assert NBodyConnect(shared=False)(select, edges[:, :0], flat[:0]).edge_attr.shape == (0,)
    with pytest.raises(ValueError, match=r"edge_attr must have a row for each of the 4 edges, got \[3\]"):
        NBodyConnect()(select, edges, flat[:3])


def test_pooling_takes_its_arguments_in_the_order_of_pyg(molecules):
    z, pos = molecules["ethanol"]
    edges, _ = neighbour_list(pos, 3.0)
    x, attr = torch.randn(len(z), 1), torch.ones(edges.shape[1])
    pool = NBodyPooling(BondTree(), "1x0e", "2x0e + 1x1o")  # float32 states, float64 positions
    x_out, edge_index, edge_attr, batch, *_ = found = pool(x, edges, attr, torch.zeros_like(z), z=z, pos=pos)
    assert x_out.shape == (3, 5) and edge_attr.shape == (edge_index.shape[1],) and batch.tolist() == [0, 0, 0]
    assert found._fields[:4] == ("x", "edge_index", "edge_attr", "batch") and x_out.dtype == torch.float32
    torch.testing.assert_close(pool(x, edges, z=Data(z=z, pos=pos)).x, x_out, rtol=0, atol=0)
    with pytest.raises(TypeError, match="pos must be given by name"):
        pool(x, edges, z, pos)
    with pytest.raises(TypeError, match="pos, batch, cell and pbc come from the Data"):
        pool(x, edges, batch=torch.zeros_like(z), z=Data(z=z, pos=pos))
