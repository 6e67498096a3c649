"""NBodyNet as an object: arguments, inputs, configuration, copies, errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from ase.build import molecule as build_molecule
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import SchNet

import factories
from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import load_embedded
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.hierarchy import SmoothSurvivors
from nbody_pyg.io.upgrades import up_to_date
from nbody_pyg.models import compute_avg_num_neighbors
from nbody_pyg.nn import (
    ChannelwiseProduct,
    DensityGate,
    FullGate,
    InteractionGraph,
    IrrepsLinear,
    NBodyConv,
    NBodyPooling,
    NBodyReduce,
    NBodySelect,
    OneBodyGate,
    PairGate,
    ProductGate,
    hidden_irreps,
)
from nbody_pyg.properties import Property, PropertyModel, Statistics, property_irreps
from nbody_pyg.testing import assert_equivariant, rotate_features
from nbody_pyg.training.config import ModelConfig
from nbody_pyg.training.prepare import explicit

SCHEMES = [
    BondTree(4.0),
    NestedShells((3.0, 2.0)),
    FromAssignment(labels=[0, 0, 1, 1, 1, 0], part_cutoffs=(6.0,)),
]


def _net(scheme=None, **options) -> NBodyNet:
    return factories.net(scheme or NestedShells(), seed=None, **({"channels": 3} | options))


@pytest.mark.parametrize("scheme", SCHEMES, ids=["tree", "shells", "labels"])
def test_all_ways_to_call_it_agree(scheme, molecules):
    z, pos = molecules["methanol"]
    net, data = _net(scheme), AtomicData(z=z, pos=pos)
    with torch.no_grad():
        expected = net(z, pos)
        assert expected.shape == (1,) and expected.dtype == torch.float64 and expected.abs() > 1e-6
        others = [
            net(z, pos, torch.zeros(6, dtype=torch.long)),
            net(data),
            net(scheme(data)),  # with the hierarchy that the transform stores
            net(z, pos, topology=scheme.topology(z, pos)),
        ]
        for other in others:
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-12)
        batch = next(iter(DataLoader([scheme(data), scheme(AtomicData(z=z, pos=1.1 * pos))], batch_size=2)))
        both = net(batch)
        torch.testing.assert_close(both, torch.cat([expected, net(z, 1.1 * pos)]), rtol=0, atol=1e-12)


def test_bonds_and_labels_that_come_with_the_data_are_used(molecules):
    z, pos = molecules["methanol"]
    net = _net(BondTree(4.0))
    bonds = torch.tensor([[0, 0, 0, 1], [2, 3, 4, 5]])  # without the bond C-O: two molecules
    with torch.no_grad():
        cut, whole = net(AtomicData(z=z, pos=pos, bonds=bonds)), net(AtomicData(z=z, pos=pos))
        by_transform = net(net.scheme(AtomicData(z=z, pos=pos, bonds=bonds)))
    assert (cut - whole).abs() > 1e-6
    torch.testing.assert_close(cut, by_transform, rtol=0, atol=1e-12)
    labelled = _net(FromAssignment(part_cutoffs=(6.0,)))
    with torch.no_grad():
        one, other = (labelled(AtomicData(z=z, pos=pos, labels=torch.tensor(l))) for l in ([0] * 6, [0, 0, 0, 1, 1, 1]))
    assert (one - other).abs() > 1e-6


def test_contributions_sum_to_the_value(molecules):
    z, pos = molecules["ethanol"]
    for scheme in SCHEMES[:2]:
        net = _net(scheme)
        with torch.no_grad():
            net.shift.copy_(torch.randn(3, 1))
            parts = net.energies(net.hierarchy(z, pos))
            torch.testing.assert_close(sum(v.sum() for v in parts.values()), net(z, pos)[0], rtol=0, atol=1e-12)
        assert all(v.dim() == 1 for v in parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("parity", ["natural", "both", "ignored"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=["tree", "shells", "labels"])
def test_configuration_and_weights_come_back(scheme, parity, preset, molecules):
    z, pos = molecules["methanol"]
    degrees = {"child_1": 7.0} if isinstance(scheme, NestedShells) else {"pair_0": 7.0}
    net = _net(scheme, preset=preset, parity=parity, avg_num_neighbors=degrees, correlation=2)
    config = json.loads(json.dumps(net.config()))
    again = NBodyNet.from_config(config).double()
    again.load_state_dict(net.state_dict())
    assert again.config() == net.config() and repr(again) == repr(net)
    with torch.no_grad():
        assert torch.equal(again(z, pos), net(z, pos))
        assert torch.equal(copy.deepcopy(net)(z, pos), net(z, pos))


def test_presets():
    assert NBodyNet.strict([1], channels=2).preset == "strict"
    assert NBodyNet.strict([1], channels=2).num_basis == 4, "s = 0 .. 3"
    assert NBodyNet.strict([1], channels=2, num_basis=2).num_basis == 2
    assert NBodyNet.practical([1], channels=2).preset == "practical"
    assert isinstance(NBodyNet([1], channels=2).scheme, NestedShells)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [BondTree(), NestedShells()], ids=["tree", "shells"])
def test_a_fresh_network_starts_in_range_however_deep_it_is(scheme):
    """Forces in the size of eV per angstrom: products of products, over ten steps of a tree, do not tower up."""
    frame = scheme(load_embedded("alanine_dipeptide")[0])
    for seed in range(3):
        torch.manual_seed(seed)
        potential = Potential(
            NBodyNet([1, 6, 7, 8], scheme, channels=16, avg_num_neighbors=compute_avg_num_neighbors(scheme, [frame]))
        )
        size = potential(frame)["forces"].square().mean().sqrt()
        assert 0.1 < size < 6.0, f"seed {seed}: {size}"


def test_options_change_the_network(molecules):
    z, pos = molecules["ethanol"]
    sizes = {
        name: sum(p.numel() for p in _net(BondTree(4.0), **options).parameters())
        for name, options in {
            "plain": {},
            "up": {"sweeps": "up"},
            "layers": {"num_layers": 3},
            "basis": {"num_basis": 4},
            "order": {"correlation": 2},
        }.items()
    }
    assert sizes["up"] < sizes["plain"] < sizes["layers"] and sizes["basis"] < sizes["plain"] > sizes["order"]
    net = _net(BondTree(4.0))
    other = _net(BondTree(4.0), avg_num_neighbors={"pair_0": 100.0})
    other.load_state_dict(net.state_dict())
    assert not torch.equal(net(z, pos), other(z, pos))


def test_dtypes(molecules):
    z, pos = molecules["ethanol"]
    net = _net(NestedShells((4.0, 3.0)))
    with torch.no_grad():
        exact = net(z, pos)
        single = copy.deepcopy(net).float()
        low = single(z, pos)  # positions are cast to the dtype of the weights
    assert single.dtype == low.dtype == torch.float32
    assert 0 < float((low - exact).abs()) < 1e-4 * max(1.0, float(exact.abs()))
    with torch.no_grad():
        torch.testing.assert_close(_double_of(single)(z, pos), exact, rtol=1e-5, atol=1e-5)


def _double_of(net):
    return copy.deepcopy(net).double()


def test_species_are_sorted_and_unknown_ones_named(molecules):
    z, pos = molecules["methanol"]
    assert NBodyNet([8, 1, 6, 1], channels=2).species == (1, 6, 8)
    with pytest.raises(
        ValueError, match=r"z must hold elements of this model \(H, C\), got O \(8\); train a model with them"
    ):
        NBodyNet([1, 6], channels=2)(z, pos)
    for wrong in (0, -1, 119):
        odd = z.clone()
        odd[0] = wrong
        with pytest.raises(ValueError, match=r"z must hold (elements of this model|atomic numbers up to 118)"):
            _net()(odd, pos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"species": []}, r"species must be atomic numbers between 1 and 118 \(or 0 for points\), got"),
        ({"species": [-1, 6]}, r"species must be atomic numbers between 1 and 118 \(or 0 for points\), got"),
        ({"preset": "fast"}, "preset must be one of practical, strict, got 'fast'; try 'practical'"),
        ({"readout": "both"}, "readout must be one of sum, root, nodes, got 'both'; did you mean root?"),
        ({"parity": "e3"}, "parity must be one of natural, both, ignored, got 'e3'; try 'natural'"),
        ({"sweeps": "down"}, "sweeps must be one of up, up-down, got 'down'; did you mean up-down"),
        ({"irreps_out": "1e"}, "irreps_out must be reachable: .* no path leads to 1e; raise lmax"),
        ({"irreps_out": "3o"}, "irreps_out must be reachable: .* no path leads to 3o; raise lmax"),
        ({"irreps_out": ""}, "irreps_out must name at least one component, got ''; try '0e'"),
        ({"irreps_out": "0x0e"}, "irreps_out must name at least one component, got '0x0e'"),
        ({"channels": 0}, "channels must be at least 1, got 0; try 32"),
        ({"lmax": -1}, "lmax must be at least 0, got -1; try 2"),
        ({"correlation": 0}, "correlation must be at least 1, got 0; 2 or 3 is usual"),
        ({"num_basis": 0}, "num_basis must be at least 1, got 0; try 8"),
        ({"num_basis": 2.5}, "num_basis must be a whole number, got 2.5"),
        ({"channels": "8"}, "channels must be a whole number, got '8'"),
        ({"lmax": True}, "lmax must be a whole number, got True"),
        ({"avg_num_neighbors": [1.0]}, r"avg_num_neighbors must be a mapping such as .*, got \[1.0\]"),
        ({"inputs": 3}, "inputs must be some of charge, spin, each once, got 3"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        NBodyNet(**({"species": [1, 6, 8], "channels": 2} | arguments))


def test_a_hierarchy_of_another_scheme_is_refused(molecules):
    z, pos = molecules["methanol"]
    with pytest.raises(ValueError, match=r"data must hold the hierarchy of .* apply the scheme of the model"):
        _net(NestedShells((3.0, 2.0)))(NestedShells((4.0, 2.0))(AtomicData(z=z, pos=pos)))


def test_typical_degrees_are_means_over_frames(molecules):
    frames = [AtomicData(z=z, pos=pos) for z, pos in molecules.values()]
    scheme = NestedShells((100.0, 0.1))
    degrees = compute_avg_num_neighbors(scheme, frames)
    sizes = torch.tensor([len(f.z) for f in frames]).double()
    assert degrees["child_1"] == pytest.approx(float((sizes**2).sum() / sizes.sum())), "everyone is a child of everyone"
    assert degrees["child_2"] == 1.0, "only itself"
    assert degrees["child_3"] == pytest.approx(float(sizes.mean())), "all atoms of a system below its root"
    assert compute_avg_num_neighbors(scheme, [scheme(f) for f in frames]) == degrees, "stored hierarchies are read"


@pytest.mark.slow
def test_scalar_networks_and_single_channels(molecules):
    z, pos = molecules["methanol"]
    for options in (
        {"lmax": 0},
        {"channels": 1, "lmax": 2},
        {"correlation": 1},
        {"num_basis": 1},
        {"correlation": 5},
    ):
        leaf = pos.clone().requires_grad_(True)
        energy = _net(NestedShells((4.0, 3.0)), **options)(z, leaf)
        (force,) = torch.autograd.grad(energy.sum(), leaf)
        assert torch.isfinite(force).all() and force.abs().max() > 1e-8
        torch.testing.assert_close(force.sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_an_untrained_network_is_of_order_one(molecules):
    """Weights that keep the size of states: no overflow at the start of training."""
    z, pos = molecules["ethanol"]
    for scheme in (BondTree(), NestedShells((5.0, 5.0)), NestedShells((4.0, 4.0, 4.0))):
        torch.manual_seed(0)
        energy = float(NBodyNet([1, 6, 8], scheme, channels=16)(z, pos).detach())
        assert 1e-4 < abs(energy) < 1e4


# ------------------------------------------------------------------ presets
def _in_every_way(scheme, **options) -> list[NBodyNet]:
    """The strict network, made in each way that there is."""
    first = NBodyNet([1, 6, 8], scheme, channels=3, preset="strict", **options)
    config = {key: value for key, value in first.config().items() if key != "num_basis" or key in options}
    chosen = {"channels": 3} | options
    trained = explicit(ModelConfig("strict", scheme.config(), arguments=chosen))
    return [
        first,
        NBodyNet.strict([1, 6, 8], scheme, channels=3, **options),
        NBodyNet.from_config(config),
        NBodyNet.from_config(first.config()),
        NBodyNet([1, 6, 8], scheme, preset=trained.preset, **trained.arguments),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_basis": 6}, {"num_basis": 8}], ids=["default", "6", "8"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=["tree", "shells", "labels"])
def test_the_strict_preset_has_one_meaning(scheme, options):
    nets = _in_every_way(scheme, **options)
    assert nets[0].num_basis == options.get("num_basis", 4)
    assert len({repr(net.config()) for net in nets}) == 1
    chosen = explicit(ModelConfig())
    settings = NBodyNet([1]).config()
    assert chosen.scheme == settings["scheme"] and chosen.preset == settings["preset"]
    assert chosen.arguments == {key: settings[key] for key in chosen.arguments} and "num_basis" in chosen.arguments
    assert NBodyNet.practical([1]).config() == NBodyNet([1]).config() == NBodyNet([1], preset="practical").config()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES[:2], NestedShells((4.0, 4.0, 4.0)), SmoothSurvivors()], ids=str)
def test_the_strict_preset_starts_in_range(scheme, molecules):
    z, pos = molecules["ethanol"]
    for seed in range(3):
        torch.manual_seed(seed)
        energy = NBodyNet([1, 6, 8], scheme, channels=8, preset="strict").double()(z, pos).detach()
        assert 1e-4 < float(energy.abs()) < 50.0


# ------------------------------------------------------------------ resets
RESETS = {
    "tree": lambda: NBodyNet([1, 6, 8], BondTree(), channels=3, correlation=3),
    "strict": lambda: NBodyNet.strict([1, 6, 8], NestedShells(), channels=3),
    "full": lambda: NBodyNet([1, 6], BondTree(), channels=2, parity="both", irreps_out="2x0e + 1o + 1e"),
    "charges": lambda: NBodyNet([1, 6, 8], BondTree(), channels=3, long_range={"method": "direct", "dipoles": True}),
    "far": lambda: NBodyNet([1, 6], BondTree(), channels=3, long_range={"method": "hierarchy", "trained": True}),
    "potential": lambda: Potential(NBodyNet([1, 6, 8], channels=3), {1: -1.0, 6: -2.0, 8: -3.0}, scale=2.0),
    "property": lambda: PropertyModel(NBodyNet([1, 6], channels=3, irreps_out="0e + 1o"), [Property("d", "dipole")]),
    "explained": lambda: ExplainableNet(NBodyNet([1, 6, 8], channels=3)),
    "conv": lambda: NBodyConv("16x0e", "16x0e + 8x1o", 5.0, correlation=2),
    "pooling": lambda: NBodyPooling(BondTree(), "4x0e", "4x0e + 2x1o"),
    "reduce": lambda: NBodyReduce("4x0e", "4x0e + 2x1o"),
    "linear": lambda: IrrepsLinear("4x0e + 2x1o", "3x0e + 1o", bias=True),
    "product": lambda: ChannelwiseProduct(hidden_irreps(3, 1), hidden_irreps(3, 1), hidden_irreps(3, 1)),
    "products": lambda: ProductGate(hidden_irreps(3, 1), hidden_irreps(3, 1), 3, gain=0.3),
    "density": lambda: DensityGate(3, 8, hidden_irreps(3, 1)),
    "one body": lambda: OneBodyGate(hidden_irreps(3, 1), hidden_irreps(3, 1), 1, 8),
    "pair": lambda: PairGate(hidden_irreps(3, 1), hidden_irreps(3, 1), 1, 8),
    "gate": lambda: FullGate("2x0e", "2x0e + 1o", 1, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESETS)
def test_a_reset_leaves_nothing_of_what_was_learned(name):
    """Filled with 7, then reset: every weight, of the whole and of each part, as in one that is built now."""
    module = RESETS[name]().double()
    for part in module.modules():
        ours = type(part).__module__.startswith("nbody_pyg") and next(part.parameters(), None) is not None
        assert not ours or callable(part.reset_parameters), type(part)
    for weight in module.parameters():
        torch.nn.init.constant_(weight, 7.0)
    before = {key: id(weight) for key, weight in module.named_parameters()}
    torch.manual_seed(5)
    module.reset_parameters()
    torch.manual_seed(5)
    fresh = RESETS[name]().double().state_dict()
    found = module.state_dict()
    assert found.keys() == fresh.keys() and sum(t.numel() for t in fresh.values()) > 5
    for key, value in fresh.items():
        assert torch.equal(found[key], value), key
    assert not any(bool((weight == 7.0).any()) for weight in module.parameters())
    assert before == {key: id(weight) for key, weight in module.named_parameters()}, "optimizers keep their weights"


def test_a_copy_and_a_subclass_can_be_reset():
    class Narrow(NBodyConv):
        def __init__(self, channels: int) -> None:
            super().__init__(f"{channels}x0e", f"{channels}x0e")
            self.head = torch.nn.Linear(channels, 1)

    module = copy.deepcopy(Narrow(3))
    for weight in module.parameters():
        torch.nn.init.constant_(weight, 7.0)
    module.reset_parameters()
    assert not any(bool((weight == 7.0).any()) for weight in module.parameters())

    class Given(NBodyConv):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__("2x0e", "2x0e")
            self.head = head

    module = copy.deepcopy(Given(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))))
    for weight in module.parameters():
        torch.nn.init.constant_(weight, 7.0)
    module.reset_parameters()
    assert not any(bool((weight == 7.0).any()) for weight in module.parameters())

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match=r"Foreign holds weights but has no reset_parameters"):
        Potential(Foreign()).reset_parameters()


# ------------------------------------------------------------------ order of components
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("irreps", ["2x1o", "2x0e + 3x1o + 2x2e", "0e + 2x1o + 0e", "2x1o + 0e"])
@pytest.mark.parametrize("scheme", [BondTree(4.0), NestedShells((3.0, 3.0))], ids=["tree", "shells"])
def test_targets_come_in_the_order_of_e3nn(scheme, irreps, preset, molecules, rotation):
    torch.manual_seed(0)
    net = NBodyNet([1, 6, 8], scheme, channels=3, irreps_out=irreps, preset=preset).double().requires_grad_(False)
    assert assert_equivariant(net) < 1e-10
    z, pos = molecules["ethanol"]
    hierarchy = net.hierarchy(z, pos)
    turned = net.hierarchy(z, pos @ rotation.T)
    for level, value in net.values(hierarchy).items():
        expected = rotate_features(value, irreps, rotation)
        torch.testing.assert_close(net.values(turned)[level], expected, rtol=0, atol=1e-10)
    assert float(net(z, pos).abs().min()) > 1e-6
    with pytest.raises(AssertionError, match="under"):
        assert_equivariant(net, irreps, layout="ir_mul")


# ------------------------------------------------------------------ graphs without atoms
EMPTIES = [BondTree(4.0), NestedShells((3.0, 3.0)), SmoothSurvivors(), FromAssignment()]


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True], ids=["built", "stored"])
@pytest.mark.parametrize("long_range", [None, "direct"])
@pytest.mark.parametrize("scheme", EMPTIES, ids=lambda s: type(s).__name__)
def test_graphs_without_atoms_have_no_energy(scheme, long_range, stored, molecules):
    z, pos = molecules["methanol"]
    labels = torch.tensor([0, 1, 0, 0, 0, 1])
    full, empty = Data(z=z, pos=pos, labels=labels), Data(z=z[:0], pos=pos[:0], labels=labels[:0])
    net = _net(scheme, long_range=long_range).requires_grad_(False)
    potential = Potential(net, {1: -1.0, 6: -2.0, 8: -3.0})
    alone = potential(full)
    assert net(full).abs() > 1e-6
    for kinds in ("f..", "..f", "f.f", ".f.f.", ".", ".."):
        frames = [full if kind == "f" else empty for kind in kinds]
        batch = Batch.from_data_list([scheme(frame) for frame in frames] if stored else frames)
        there = torch.tensor([kind == "f" for kind in kinds], dtype=torch.float64)
        torch.testing.assert_close(net(batch), there * net(full), rtol=0, atol=1e-12)
        found = potential(batch)
        torch.testing.assert_close(found["energy"], there * alone["energy"], rtol=0, atol=1e-12)
        assert found["forces"].shape == batch.pos.shape
        torch.testing.assert_close(found["forces"], alone["forces"].repeat(kinds.count("f"), 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(potential.energies(batch).total(), found["energy"], rtol=0, atol=1e-12)
        assert net.hierarchy(batch).validate().num_graphs == len(kinds)
    if long_range is None:  # the root is read as well
        net = _net(scheme, readout="root").requires_grad_(False)
        batch = Batch.from_data_list([empty, full, empty])
        torch.testing.assert_close(net(batch)[1:2], net(full), rtol=0, atol=1e-12)
        assert net(full).abs() > 1e-6 and not net(batch)[::2].any()


def test_graphs_without_atoms_may_be_counted_by_batch_size(molecules):
    z, pos = molecules["methanol"]
    net = _net().requires_grad_(False)
    potential, batch = Potential(net), torch.ones_like(z)
    for found in (net(z, pos, batch, batch_size=4), potential(z, pos, batch, batch_size=4)["interaction_energy"]):
        assert found.shape == (4,) and found[1].abs() > 1e-6 and not found[[0, 2, 3]].any()
    assert torch.equal(net(z[:0], pos[:0], batch[:0], batch_size=2), torch.zeros(2, dtype=torch.float64))
    for call in (net, potential):
        with pytest.raises(ValueError, match="batch_size must be at least 2, the number of graphs in batch, got 1"):
            call(z, pos, batch, batch_size=1)
        with pytest.raises(TypeError, match="batch_size must be a whole number of graphs, got '3'"):
            call(z, pos, batch, batch_size="3")
    # A model that counts the graphs by the last atom
    schnet = Potential(SchNet(8, 8, 1, 8, cutoff=4.0, interaction_graph=InteractionGraph(4.0)).double())
    none = schnet(z[:0], pos[:0], batch_size=2, create_graph=True)
    assert none["energy"].tolist() == [0.0, 0.0] and none["forces"].shape == (0, 3)
    found = schnet(z, pos, batch, batch_size=4)["energy"]
    assert found.shape == (4,) and found[1].abs() > 1e-6 and not found[[0, 2, 3]].any()


@pytest.mark.parametrize("long_range", [None, "ewald"])
@pytest.mark.parametrize("scheme", EMPTIES[:3], ids=lambda s: type(s).__name__)
def test_cells_without_atoms(scheme, long_range, molecules):
    z, pos = molecules["methanol"]
    cell, pbc = torch.eye(3, dtype=torch.float64)[None] * 11.0, torch.ones(1, 3, dtype=torch.bool)
    full, empty = Data(z=z, pos=pos, cell=cell, pbc=pbc), Data(z=z[:0], pos=pos[:0], cell=cell, pbc=pbc)
    potential = Potential(_net(scheme, long_range=long_range).requires_grad_(False))
    alone = potential(full, compute_stress=True)
    for frames in ([empty, full, empty], [scheme(frame) for frame in (empty, full, empty)]):
        found = potential(Batch.from_data_list(frames), compute_stress=True)
        assert found["energy"][1].abs() > 1e-6
        torch.testing.assert_close(found["energy"][1:2], alone["energy"], rtol=0, atol=1e-12)
        torch.testing.assert_close(found["stress"][1:2], alone["stress"], rtol=0, atol=1e-12)
        assert not found["energy"][::2].any() and not found["stress"][::2].any()
    # A cell around open molecules stays without a meaning
    frames = [Data(z=f.z, pos=f.pos, cell=0.2 * cell, pbc=~pbc) for f in (empty, full, empty)]
    open_ones = Potential(_net(scheme).requires_grad_(False))
    found = open_ones(Batch.from_data_list(frames))["energy"][1:2]
    torch.testing.assert_close(found, open_ones(z, pos)["energy"], rtol=0, atol=1e-12)


def test_a_property_of_nothing_is_its_mean():
    frame = load_embedded("ethanol")[0]
    wanted = [Property("gap", "intensive"), Property("dipole", "dipole")]
    model = PropertyModel(_net(irreps_out=str(property_irreps(wanted))), wanted, {"gap": Statistics(mean=2.0)})
    empty = Data(z=frame.z[:0], pos=frame.pos[:0])
    found = model(Batch.from_data_list([empty, Data(z=frame.z, pos=frame.pos), empty]))
    assert found["gap"][::2].tolist() == [2.0, 2.0] and not found["dipole"][::2].any()
    assert (found["gap"][1] - 2.0).abs() > 1e-9 and float(found["dipole"][1].detach().norm()) > 1e-9


# ------------------------------------------------------------------ what is given
def _wrong_inputs() -> list:
    z, pos = torch.tensor([6, 8, 1, 1]), torch.randn(4, 3, dtype=torch.float64)

    def data(**keys):
        return Data(**({"z": z, "pos": pos} | keys))

    hetero = HeteroData()
    hetero["atom"].z, hetero["atom"].pos = z, pos
    return [
        (data(z=None), ValueError, r"data must hold 'z' \(atomic numbers and positions\), but its keys are \['pos'\]"),
        (data(pos=None), ValueError, "data must hold 'pos'"),
        (Data(), ValueError, "data must hold 'z' and 'pos'"),
        (hetero, TypeError, "data must be a Data or a Batch, got a HeteroData; build a Data"),
        (data(z=z.tolist()), TypeError, "z must be a tensor, got a list; make one with torch.as_tensor"),
        (data(pos=pos.numpy()), TypeError, "pos must be a tensor, got a ndarray"),
        (data(z=z.double()), TypeError, "z must hold integers"),
        (data(z=z > 1), TypeError, "z must hold integers"),
        (data(z=0 * z), ValueError, r"z must hold elements of this model \(H, C, O\), got no element \(0\)"),
        (data(z=z + 192), ValueError, "z must hold"),
        (data(z=-z), ValueError, "z must hold"),
        (data(z=z[:3]), ValueError, r"z must have shape \[4\], one atomic number per row of pos, got \[3\]"),
        (data(z=z[:, None]), ValueError, r"z must have shape \[4\]"),
        (data(pos=pos[:, :2]), ValueError, r"pos must have shape \[num_atoms, 3\], got \[4, 2\]"),
        (data(pos=pos.long()), TypeError, "pos must be a floating tensor"),
        (data(pos=pos / 0), ValueError, "pos must be finite"),
        (data(pos=pos.to("meta")), ValueError, "z and pos must be on one device, got cpu and meta"),
        (data(batch=torch.zeros(4)), TypeError, "batch must be an integer tensor"),
        (data(batch=[0, 0, 0, 0]), TypeError, "batch must be an integer tensor, got a list"),
        (data(batch=torch.zeros(3, dtype=torch.long)), ValueError, r"batch must have shape \[4\]"),
        (data(batch=torch.tensor([0, 1, 0, 1])), ValueError, "batch must be sorted"),
        (data(num_parts_1=torch.tensor([3])), ValueError, "data has the key 'num_parts_1', .* rename the key"),
        (data(bonds=5), ValueError, r"bonds must be integers of shape \[2, num_bonds\], got 5; .*bonds_key"),
        ([z, pos], TypeError, "data must be a Data or a Batch, got a list; or pass z and pos as tensors"),
        (None, TypeError, "data must be a Data or a Batch, got a NoneType"),
        (build_molecule("CH3OH"), TypeError, "data must be a Data or a Batch, got a Atoms; use AtomicData.from_ase"),
    ]


#: What others than the network say to the same mistake.
_WORDS = {
    r"z must have shape \[4\], one atomic number per row of pos, got \[3\]": r"must have shape",
    r"pos must have shape \[num_atoms, 3\], got \[4, 2\]": r"pos must have shape \[(num_atoms|4), 3\]",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(_wrong_inputs())))
def test_wrong_input_is_named(case):
    given, error, message = _wrong_inputs()[case]
    net = _net(BondTree(4.0))
    calls = [net, Potential(net), NBodySelect(net.scheme), net.scheme]
    if "elements of this model" in message:
        calls = calls[:2]
    for call in calls:
        with pytest.raises(error, match=message if call is net else _WORDS.get(message, message)):
            call(given)


def test_data_and_tensors_exclude_each_other(molecules):
    z, pos = molecules["methanol"]
    for call in (_net(), Potential(_net())):
        with pytest.raises(TypeError, match="pos, batch, cell and pbc come from the Data"):
            call(Data(z=z, pos=pos), pos)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_every_integer_names_elements(dtype, molecules):
    z, pos = molecules["methanol"]
    net = _net(BondTree(4.0)).requires_grad_(False)
    assert torch.equal(net(z.to(dtype), pos), net(z, pos)) and net(z, pos).abs() > 1e-6
    assert torch.equal(Potential(net)(z.to(dtype), pos)["energy"], Potential(net)(z, pos)["energy"])
    assert torch.equal(net(net.scheme(Data(z=z.to(dtype), pos=pos))), net(z, pos))


def test_og_is_not_whatever_lies_beyond():
    with pytest.raises(ValueError, match="z must hold atomic numbers up to 118, got 200"):
        NBodyNet([1, 118], channels=2)(torch.tensor([1, 200]), torch.eye(3)[:2])


def test_bonds_and_labels_reach_the_model_through_a_potential(molecules):
    z, pos = molecules["methanol"]
    for scheme, keys in ((BondTree(4.0), {"bonds": torch.tensor([[0, 0], [2, 3]])}),
                         (FromAssignment(), {"labels": torch.tensor([0, 0, 0, 1, 1, 1])})):  # fmt: skip
        net = _net(scheme).requires_grad_(False)
        data = Data(z=z, pos=pos, **keys)
        found = Potential(net, repulsion=None)(data)["energy"]
        torch.testing.assert_close(found, net(data), rtol=0, atol=1e-12)
        torch.testing.assert_close(found, net(scheme(data)), rtol=0, atol=1e-12)
        if scheme is not FromAssignment and "bonds" in keys:
            assert (found - net(z, pos)).abs() > 1e-6


def test_options_without_a_meaning_are_refused():
    for scheme in (NestedShells(), FromAssignment(labels=[0, 1], cutoff=None)):
        with pytest.raises(ValueError, match=r"num_layers counts visits .* so that 3 would do nothing; leave it out"):
            NBodyNet([1, 6], scheme, channels=2, num_layers=3)
        # Files may hold such a number from before
        config = NBodyNet([1, 6], scheme, channels=2).config()
        assert (
            NBodyNet.from_config(
                up_to_date({"model": {"class": "NBodyNet", "config": config | {"num_layers": 3}}})["model"]["config"]
            ).config()
            == config
        )
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_layers must be a whole number, 1 or more"):
            NBodyNet([1, 6], BondTree(), channels=2, num_layers=wrong)
    with pytest.raises(ValueError, match=r"avg_num_neighbors must name edge sets of NestedShells.* got 'pair_0'"):
        NBodyNet([1, 6], channels=2, avg_num_neighbors={"pair_0": 3.0})
    with pytest.raises(ValueError, match=r"avg_num_neighbors\['child_1'\] must be a positive number"):
        NBodyNet([1, 6], channels=2, avg_num_neighbors={"child_1": 0.0})
    with pytest.raises(TypeError, match=r"scheme must be a composition scheme such as BondTree\(\), got 'BondTree'"):
        NBodyNet([1, 6], "BondTree")


def test_neutral_networks_have_the_values_of_neutral_singlets(molecules):
    net = factories.net(inputs=["charge", "spin"], seed=4)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn_like(weight)
    z, pos = molecules["ethanol"]
    net.assumed = {"spin": 3.0}
    neutral = net.neutral()
    assert neutral.assumed == {"spin": 3.0}
    neutral.assumed = net.assumed = {}
    assert neutral.inputs == () and sum(p.numel() for p in neutral.parameters()) < sum(
        p.numel() for p in net.parameters()
    )
    assert abs(net(z, pos).item()) > 1e-3
    assert neutral(z, pos).item() == pytest.approx(net(z, pos).item(), abs=1e-12)
    one = torch.ones(1, dtype=torch.float64)
    assert abs(net(z, pos, charge=one) - net(z, pos)).item() > 1e-3
    with pytest.raises(ValueError, match="charge"):
        neutral(z, pos, charge=one)
    with pytest.raises(ValueError, match="long-range"):
        factories.net(inputs=["charge"], long_range="direct").neutral()
    assert factories.net(seed=4).neutral()(z, pos).item() == pytest.approx(
        factories.net(seed=4)(z, pos).item(), abs=1e-12
    )
