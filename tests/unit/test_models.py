"""NBodyNet as an object: arguments, inputs, configuration, copies, errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch_geometric.loader import DataLoader

from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import embedded
from nbody_pyg.models import edge_degrees

SCHEMES = [
    BondTree(4.0),
    NestedShells((3.0, 2.0)),
    FromAssignment(labels=[0, 0, 1, 1, 1, 0], part_cutoffs=(6.0,)),
]


def _net(scheme=None, **options) -> NBodyNet:
    return NBodyNet([1, 6, 8], scheme, **({"channels": 3, "lmax": 1} | options)).double()


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


@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("symmetry", ["o3", "o3-full", "so3"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=["tree", "shells", "labels"])
def test_configuration_and_weights_come_back(scheme, symmetry, preset, molecules):
    z, pos = molecules["methanol"]
    net = _net(scheme, preset=preset, symmetry=symmetry, degrees={"pair_0": 7.0}, body_order=2)
    config = json.loads(json.dumps(net.config()))
    again = NBodyNet.from_config(config).double()
    again.load_state_dict(net.state_dict())
    assert again.config() == net.config() and repr(again) == repr(net)
    with torch.no_grad():
        assert torch.equal(again(z, pos), net(z, pos))
        assert torch.equal(copy.deepcopy(net)(z, pos), net(z, pos))


def test_presets():
    assert NBodyNet.strict([1], channels=2).preset == "strict"
    assert NBodyNet.strict([1], channels=2).options["num_basis"] == 4, "s = 0 .. 3"
    assert NBodyNet.strict([1], channels=2, num_basis=2).options["num_basis"] == 2
    assert NBodyNet.practical([1], channels=2).preset == "practical"
    assert isinstance(NBodyNet([1], channels=2).scheme, NestedShells)


@pytest.mark.parametrize("scheme", [BondTree(), NestedShells()], ids=["tree", "shells"])
def test_a_fresh_network_starts_in_range_however_deep_it_is(scheme):
    """Forces in the size of eV per angstrom: products of products, over ten steps of a tree, do not tower up."""
    frame = scheme(embedded("alanine_dipeptide")[0])
    for seed in range(3):
        torch.manual_seed(seed)
        potential = Potential(NBodyNet([1, 6, 7, 8], scheme, channels=16, degrees=edge_degrees(scheme, [frame])))
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
            "order": {"body_order": 2},
        }.items()
    }
    assert sizes["up"] < sizes["plain"] < sizes["layers"] and sizes["basis"] < sizes["plain"] > sizes["order"]
    net = _net(BondTree(4.0))
    other = _net(BondTree(4.0), degrees={"pair_0": 100.0})
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
        with pytest.raises(ValueError, match="z must hold elements of this model"):
            _net()(odd, pos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"species": []}, "species must be atomic numbers between 1 and 118, got"),
        ({"species": [0, 6]}, "species must be atomic numbers between 1 and 118, got"),
        ({"preset": "fast"}, "preset must be one of practical, strict, got 'fast'; try 'practical'"),
        ({"target": "both"}, "target must be one of extensive, intensive, got 'both'; try 'extensive'"),
        ({"cutoff": 5.0}, r"options must be among .*, got \['cutoff'\]; check the spelling"),
        ({"symmetry": "e3"}, "symmetry must be one of o3, o3-full, so3, got 'e3'; try 'o3'"),
        ({"sweeps": "down"}, "sweeps must be one of up, up-down, got 'down'; try 'up'"),
        ({"irreps_out": "1e"}, "irreps_out must be reachable: .* no path leads to 1e; raise lmax"),
        ({"irreps_out": "3o"}, "irreps_out must be reachable: .* no path leads to 3o; raise lmax"),
        ({"channels": 0}, "channels must be at least 1, got 0; try 32"),
        ({"lmax": -1}, "lmax must be at least 0, got -1; try 2"),
        ({"body_order": 0}, "body_order must be at least 1, got 0; 2 or 3 is usual"),
        ({"num_basis": 0}, "num_basis must be at least 1, got 0; try 8"),
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
    degrees = edge_degrees(scheme, frames)
    sizes = torch.tensor([len(f.z) for f in frames]).double()
    assert degrees["child_1"] == pytest.approx(float((sizes**2).sum() / sizes.sum())), "everyone is a child of everyone"
    assert degrees["child_2"] == 1.0, "only itself"
    assert degrees["child_3"] == pytest.approx(float(sizes.mean())), "all atoms of a system below its root"
    assert edge_degrees(scheme, [scheme(f) for f in frames]) == degrees, "stored hierarchies are read"


def test_scalar_networks_and_single_channels(molecules):
    z, pos = molecules["methanol"]
    for options in (
        {"lmax": 0},
        {"channels": 1, "lmax": 2},
        {"body_order": 1},
        {"num_basis": 1},
        {"body_order": 5},
    ):
        leaf = pos.clone().requires_grad_(True)
        energy = _net(NestedShells((4.0, 3.0)), **options)(z, leaf)
        (force,) = torch.autograd.grad(energy.sum(), leaf)
        assert torch.isfinite(force).all() and force.abs().max() > 1e-8
        torch.testing.assert_close(force.sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_an_untrained_network_is_of_order_one(molecules):
    """Weights that keep the size of states: no overflow at the start of training."""
    z, pos = molecules["ethanol"]
    for scheme in (BondTree(), NestedShells((5.0, 5.0)), NestedShells((4.0, 4.0, 4.0))):
        torch.manual_seed(0)
        energy = float(NBodyNet([1, 6, 8], scheme, channels=16)(z, pos).detach())
        assert 1e-4 < abs(energy) < 1e4
