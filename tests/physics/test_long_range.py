"""Latent charges and their energy: conservation, separability, the fast multipole method against the direct sum."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from ase import Atoms

import factories
from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator
from nbody_pyg.longrange.charges import LatentCharges, LongRangeConfig
from nbody_pyg.longrange.coulomb import DirectField, HierarchyField
from nbody_pyg.testing import assert_batch_independent, assert_conservative, assert_equivariant
from nbody_pyg.units import COULOMB

FULL = {"dipoles": True, "elements": False, "width": 0.4}
OWN = {"states": True, "transfers": False}
SMALL = {"channels": 3, "lmax": 1, "correlation": 2, "num_basis": 4}


def _net(scheme=None, long_range="direct", seed=3, **options) -> NBodyNet:
    return factories.net(scheme, [1, 6, 7, 8, 9], seed=seed, long_range=long_range, **(SMALL | options))


def _charges(net, z, pos, charge=None, charges=None):
    """Moments of the atoms as the network computes them."""
    found = []
    handle = net.long_range.charges.register_forward_hook(lambda module, args, out: found.append(out))
    try:
        with torch.no_grad():
            net(z, pos, charge=charge, charges=charges)
    finally:
        handle.remove()
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [NestedShells((4.0, 3.0)), BondTree(4.0)], ids=["shells", "tree"])
def test_charge_is_conserved(scheme, molecules):
    z, pos = molecules["chiral"]
    net = _net(scheme, FULL)
    neutral = _charges(net, z, pos)[:, 0]
    assert neutral.abs().max() > 1e-3, "atoms exchange charge"
    assert neutral.sum(0).abs().max() < 1e-13
    for given in ({"charge": torch.tensor([-2.0])}, {"charges": torch.tensor([-2.0, 0, 0, 1, -1, 0, 0, 0])}):
        ion = _charges(net, z, pos, **given)[:, 0]
        torch.testing.assert_close(ion.sum(0), torch.tensor([-2.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(ion[:, 1], neutral[:, 1])


@pytest.mark.parametrize(
    "long_range",
    [
        pytest.param(FULL, marks=pytest.mark.slow, id="direct"),
        pytest.param(FULL | {"method": "hierarchy", "lmax": 3}, marks=pytest.mark.slow, id="hierarchy"),
        pytest.param(FULL | OWN, id="states"),
    ],
)
def test_symmetries_and_forces(long_range):
    potential = Potential(_net(BondTree(3.0, 4.0, 6.0), long_range))
    assert_equivariant(potential)
    assert_batch_independent(potential)
    assert_conservative(potential)


def _clusters(generator):
    """Twelve groups of five atoms in a box of 25 angstrom."""
    centre = 25.0 * torch.rand(12, 3, dtype=torch.float64, generator=generator)
    pos = centre.repeat_interleave(5, 0) + 0.7 * torch.randn(60, 3, dtype=torch.float64, generator=generator)
    labels = torch.arange(60) // 5
    return torch.tensor([6, 1, 8, 1, 1]).repeat(12), pos, torch.stack([labels, labels // 3], dim=1)


def test_untrained_network_is_a_fast_multipole_method(generator):
    """Energy through two levels of parts against the sum over all pairs; one set of weights."""
    z, pos, labels = _clusters(generator)
    scheme = FromAssignment(labels=labels.tolist(), cutoff=4.0, part_cutoffs=(11.0, 26.0))
    direct = _net(scheme, FULL)
    with torch.no_grad():
        exact, local = direct(z, pos), _without(direct)(z, pos)
    assert (exact - local).abs() > 1e-2
    errors = []
    for lmax in (1, 2, 4, 6):
        net = _net(scheme, FULL | {"method": "hierarchy", "lmax": lmax})
        net.load_state_dict(direct.state_dict())
        with torch.no_grad():
            errors.append(float((net(z, pos) - exact).abs() / (exact - local).abs()))
    assert errors[0] > 1e-6, "far groups meet as multipoles"
    assert errors[-1] < 0.02 * errors[0] and errors[-1] < 1e-4, errors


def test_field_through_the_hierarchy_converges(generator):
    """Field at every atom, monopoles and dipoles; every pair counted once, also inside the windows."""
    z, pos, labels = _clusters(generator)
    scheme = FromAssignment(labels=labels.tolist(), cutoff=4.0, part_cutoffs=(11.0, 26.0))
    hierarchy = scheme.hierarchy(scheme.topology(z, pos), z, pos)
    distance = hierarchy[1].pair_vec.norm(dim=1)
    assert ((distance > 0.7 * 11.0) & (distance < 11.0)).any(), "some groups lie where the window falls"
    moments = torch.randn(60, 4, 2, dtype=torch.float64, generator=generator)
    exact = DirectField(1, 0.5)(moments, hierarchy)
    errors = [
        float((HierarchyField(scheme, 1, lmax, 0.5)(moments, hierarchy) - exact).norm() / exact.norm())
        for lmax in (1, 2, 4, 6, 8)
    ]
    assert errors[0] > 1e-3 and errors[-1] < 1e-4, errors
    assert all(after < 0.5 * before for before, after in pairwise(errors)), errors


@pytest.fixture(scope="module")
def gas():
    """150 unit charges of both signs, 0.05 per cubic angstrom, with their hierarchy of survivors."""
    generator = torch.Generator().manual_seed(0)
    scheme = SmoothSurvivors((2.5,), (4.5, 10.0))
    pos = (150 / 0.05) ** (1 / 3) * torch.rand(150, 3, dtype=torch.float64, generator=generator)
    z, charges = torch.full((150,), 6), torch.randn(150, 1, 1, dtype=torch.float64, generator=generator).sign()
    return scheme, z, pos, charges


def test_survivors_carry_the_field_and_keep_it_smooth(gas):
    """Centres that exist in part and share their atoms: every pair still counts once."""
    scheme, z, pos, charges = gas
    hierarchy = scheme.hierarchy(scheme.topology(z, pos), z, pos)
    partly = (hierarchy[1].weight > 0.01) & (hierarchy[1].weight < 0.99)
    assert partly.sum() > 5 and hierarchy[1].num_parts < 120
    exact = DirectField(0, 0.3)(charges, hierarchy)
    errors = [
        float((HierarchyField(scheme, 0, lmax, 0.3)(charges, hierarchy) - exact).norm() / exact.norm())
        for lmax in (0, 2, 4)
    ]
    assert errors[0] > 1e-2 and errors[1] < 0.1 * errors[0] and errors[2] < 0.2 * errors[1], errors


def test_survivors_cross_boundaries_without_a_step(gas):
    """Second differences of the energy converge while an atom crosses boundaries of parts."""
    scheme, z, pos, charges = gas
    field, path = HierarchyField(scheme, 0, 1, 0.3), torch.tensor([1.0, 0.4, -0.3], dtype=torch.float64)

    def energy(x):
        moved = pos.clone()
        moved[3] += x * path
        hierarchy = scheme.hierarchy(scheme.topology(z, moved), z, moved)
        return float(0.5 * (charges * field(charges, hierarchy)).sum())

    curvature = []
    for step in (1e-3, 1e-4):
        values = [[energy(x + k * step) for k in (-1, 0, 1)] for x in torch.linspace(0.5, 1.5, 5).tolist()]
        curvature.append([(low - 2 * mid + high) / step**2 for low, mid, high in values])
    coarse, fine = torch.tensor(curvature)
    assert fine.abs().max() > 1e-2
    assert (coarse - fine).abs().max() < 1e-2 * fine.abs().max()


def _without(net):
    """The same network with its long-range energy switched off."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for weight in other.long_range.parameters():
            weight.zero_()
    return other


def test_nothing_changes_where_it_is_off(molecules):
    z, pos = molecules["ethanol"]
    torch.manual_seed(7)
    plain = NBodyNet([1, 6, 8], BondTree(4.0), **SMALL).double()
    assert plain.long_range is None and plain.config()["long_range"] is None
    assert not [key for key in plain.state_dict() if "long_range" in key]
    torch.manual_seed(7)
    charged = NBodyNet([1, 6, 8], BondTree(4.0), long_range="direct", **SMALL).double()
    shared = {k: v for k, v in charged.state_dict().items() if not k.startswith("long_range")}
    assert shared.keys() == plain.state_dict().keys() and all(
        torch.equal(v, plain.state_dict()[k]) for k, v in shared.items()
    )
    with torch.no_grad():
        assert (charged(z, pos) - plain(z, pos)).abs() > 1e-6
        charged.long_range.strength.zero_()
        torch.testing.assert_close(charged(z, pos), plain(z, pos), rtol=0, atol=1e-12)


def _apart(first, second, distance):
    (z1, pos1), (z2, pos2) = first, second
    shift = distance * torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64) / 3.0
    return torch.cat([z1, z2]), torch.cat([pos1, pos2 + shift])


@pytest.mark.parametrize("scheme", [NestedShells((4.0, 3.0)), BondTree(4.0)], ids=["shells", "tree"])
def test_neutral_molecules_do_not_see_each_other_from_afar(scheme, molecules):
    """Energy and forces of A by B at 1,000 and 10,000 angstrom; n far copies have n times the energy.

    Both have latent dipoles, of about 0.3 e angstrom, so what is left at 1,000 angstrom is their tail 1/r^3.
    """
    a, b = molecules["methanol"], molecules["chiral"]
    potential = Potential(_net(scheme, FULL))
    alone, other = potential(*a), potential(*b)
    assert alone["forces"].abs().max() > 1e-2
    for distance, tolerance in ((1e3, 2e-8), (1e4, 1e-10)):
        both = potential(*_apart(a, b, distance))
        expected = torch.cat([alone["forces"], other["forces"]])
        torch.testing.assert_close(both["forces"], expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(both["energy"], alone["energy"] + other["energy"], rtol=0, atol=tolerance)
    z, pos = a
    for n in (2, 3, 5):
        places = 3000.0 * torch.arange(n, dtype=torch.float64)[:, None, None] * torch.tensor([0.6, 0.0, 0.8]).double()
        copies = potential(z.repeat(n), (pos + places).reshape(-1, 3))
        torch.testing.assert_close(copies["energy"], n * alone["energy"], rtol=0, atol=1e-9)


def test_tails_are_those_of_charges_and_of_dipoles(molecules):
    """Charged fragments interact as 1/r with the product of their charges, neutral ones as 1/r^3."""
    a, b = molecules["methanol"], molecules["chiral"]
    net = _net(NestedShells((4.0,)), FULL)

    def interaction(distance, formal=None):
        z, pos = _apart(a, b, distance)
        parts = [None, None, None] if formal is None else [formal, formal[:6], formal[6:]]
        with torch.no_grad():
            whole = net(z, pos, charges=parts[0])
            return float(whole - net(*a, charges=parts[1]) - net(*b, charges=parts[2]))

    formal = torch.zeros(14, dtype=torch.float64)
    formal[1], formal[6] = 1.0, -2.0
    for distance in (1e3, 1e4):
        assert interaction(distance, formal) * distance == pytest.approx(-2.0 * COULOMB, rel=30.0 / distance)
    # Large, so that a difference of energies does not drown in rounding
    with torch.no_grad():
        net.long_range.strength.mul_(1e6)
    assert interaction(400.0) * 400.0**3 == pytest.approx(interaction(200.0) * 200.0**3, rel=0.05)
    assert abs(interaction(200.0)) > 1e-4


def test_charges_from_states_belong_to_the_fragment(molecules):
    """A fragment has its charges wherever it is, the tail is that of their sums, and no charge can be given."""
    a, b = molecules["methanol"], molecules["chiral"]
    net = _net(NestedShells((4.0, 3.0)), OWN)
    assert net.used == frozenset()
    for one in (a, b):
        alone = _charges(net, *one)
        assert (alone[one[0] == 1].std(0) > 1e-6).all(), "surroundings change the charge of an element"
        with pytest.raises(ValueError, match="charge is -2, but the model has no input for it"):
            net(*one, charge=torch.tensor([-2.0]))
        both = _charges(net, *_apart(a, b, 30.0))
        torch.testing.assert_close(both[:6] if one is a else both[6:], alone, rtol=0, atol=1e-13)
    first, second = (_charges(net, *one)[:, 0].sum(0) for one in (a, b))
    strength = torch.tensor([1.0, -1.0], dtype=torch.float64)
    tail = COULOMB * float((strength * first * second).sum())
    with torch.no_grad():
        far = [float(net(*_apart(a, b, distance))) for distance in (1e3, 2e3)]
    assert abs(tail) > 0.1
    assert (far[0] - far[1]) * 2e3 == pytest.approx(tail, rel=0.02)


@pytest.mark.parametrize("coulomb", [True, False])
def test_far_ions_keep_coulombs_law_where_it_is_held(coulomb, molecules):
    """Whatever training does to the strengths."""
    a, b = molecules["methanol"], molecules["chiral"]
    net = _net(NestedShells((4.0,)), {**FULL, "coulomb": coulomb})
    formal = torch.zeros(14, dtype=torch.float64)
    formal[1], formal[6] = 1.0, -2.0
    with torch.no_grad():
        net.long_range.strength.mul_(1.05)
        far, near = (net(*_apart(a, b, distance), charges=formal) for distance in (1e4, 1e3))
    expected = -2.0 * COULOMB * (1e-4 - 1e-3) * (1.0 if coulomb else 1.05)
    assert float(far - near) == pytest.approx(expected, rel=5e-3)
    assert net.config()["long_range"]["coulomb"] is coulomb


@pytest.mark.parametrize("option", ["elements", "states"])
def test_charges_in_no_unit_have_no_coulomb_constant(option):
    with pytest.raises(ValueError, match="coulomb must be off with elements or states"):
        LongRangeConfig(coulomb=True, **{option: True})


def test_matched_pairs_are_told_apart(molecules):
    """Equal surroundings within the cutoff, another far field: forces differ; the flat network returns equal ones."""
    probe, (z2, pos2) = molecules["ethanol"], molecules["methanol"]
    turned = pos2[:, [1, 0, 2]] * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    for long_range, equal in ((FULL, False), (None, True)):
        potential = Potential(_net(NestedShells((4.0, 4.0)), long_range))
        first, second = (
            potential(*_apart(probe, (z2, pos), 20.0))["forces"][: len(probe[0])] for pos in (pos2, turned)
        )
        difference = (first - second).abs().max()
        assert difference < 1e-12 if equal else difference > 1e-7


def test_energy_is_finite_and_smooth_where_atoms_meet():
    net = _net(NestedShells((4.0,)), {"elements": True, "transfers": False})
    r = torch.tensor([0.0, 1e-6, 1e-3, 2e-3], dtype=torch.float64)
    z = torch.tensor([6, 8])
    own = net.long_range.charges.own[[1, 3]].detach()
    field = net.long_range.field
    for x in r:
        pos = torch.stack([torch.zeros(3), torch.tensor([0.0, float(x), 0.0])]).double().requires_grad_(True)
        hierarchy = net.scheme.hierarchy(net.scheme.topology(z, torch.eye(2, 3).double()), z, pos)
        energy = (own * field(own.unsqueeze(1), hierarchy)[:, 0]).sum()
        (slope,) = torch.autograd.grad(energy, pos)
        assert torch.isfinite(energy) and slope.abs().max() < 10 * x + 1e-12
    assert energy.abs() > 1e-3


@pytest.mark.slow
def test_configuration_comes_back_and_potentials_pass_the_charge(molecules):
    z, pos = molecules["methanol"]
    net = _net(BondTree(4.0, 6.0, 9.0), FULL | {"method": "hierarchy", "lmax": 2, "trained": True})
    again = NBodyNet.from_config(json.loads(json.dumps(net.config()))).double()
    again.load_state_dict(net.state_dict())
    charge, potential = torch.tensor([1.0], dtype=torch.float64), Potential(net)
    with torch.no_grad():
        expected, neutral = again(z, pos, charge=charge), again(z, pos)
    assert (expected - neutral).abs() > 1e-3
    data = AtomicData(z=z, pos=pos, charge=charge)
    for got in (potential(z, pos, charge=charge), potential(data), potential(net.scheme(data))):
        torch.testing.assert_close(got["interaction_energy"], expected)
    torch.testing.assert_close(potential(z, pos)["interaction_energy"], neutral)
    formal = torch.tensor([0.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    by_atom = potential(AtomicData(z=z, pos=pos, charges=formal))["interaction_energy"]
    torch.testing.assert_close(by_atom, potential(z, pos, charges=formal)["interaction_energy"])
    assert (by_atom - expected).abs() > 1e-4
    torch.testing.assert_close(
        copy.deepcopy(potential).float()(data)["energy"], potential(data)["energy"], rtol=1e-4, atol=1e-3
    )


def test_the_calculator_takes_charges_from_ase(molecules):
    z, pos = molecules["methanol"]
    potential = Potential(_net(NestedShells((4.0,)), FULL))
    atoms = Atoms(numbers=z.numpy(), positions=pos.numpy())
    found = []
    for change in ("nothing", "total", "formal"):
        if change == "total":
            atoms.info["charge"] = 1
        if change == "formal":
            atoms.info.clear()  # beside another total charge they would be a contradiction
            atoms.set_initial_charges([0, -1, 0, 0, 0, 0])
        atoms.calc = NBodyCalculator(potential)
        found.append(atoms.get_potential_energy())
        assert atoms.get_potential_energies().sum() == pytest.approx(found[-1], abs=1e-9)
    formal = torch.tensor([0.0, -1, 0, 0, 0, 0], dtype=torch.float64)
    for got, given in zip(found, ({}, {"charge": torch.ones(1)}, {"charges": formal}), strict=True):
        assert got == pytest.approx(float(potential(z, pos, **given)["energy"]), abs=1e-9)
    assert len({round(energy, 6) for energy in found}) == 3


def test_settings_say_what_is_wrong(molecules):
    z, pos = molecules["methanol"]
    for given, message in [
        ({"chanels": 2}, r"long_range must hold some of .* got \['chanels'\]"),
        ("fast", "method must be one of direct, hierarchy, ewald, got 'fast'"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"width": 0.0}, r"width must be a positive length in angstrom, got 0\.0"),
        ({"lmax": 9}, "lmax must be an integer from 0 to 8, got 9"),
        ({"coulomb": True, "elements": True}, "coulomb must be off with elements"),
        ({"method": "ewald", "dipoles": True}, "dipoles must be off with method 'ewald'"),
    ]:
        with pytest.raises(ValueError, match=message):
            LongRangeConfig.parse(given)
    with pytest.raises(ValueError, match=r"needs parts with pairs, but level 1 of the scheme, 'shell 1', has no"):
        _net(NestedShells((4.0,)), "hierarchy")
    with pytest.raises(ValueError, match=r"cutoffs\[1\] of SmoothSurvivors must be at least 11\.57 angstrom"):
        _net(SmoothSurvivors((3.0,), (5.0, 9.0)), "hierarchy")
    with pytest.raises(ValueError, match="long_range is an extensive energy, but the readout is 'sum' of 1x1o"):
        _net(NestedShells((4.0,)), "direct", irreps_out="1o")
    with pytest.raises(ValueError, match="dipoles must come from vectors 1o"):
        LatentCharges(LongRangeConfig(dipoles=True), 2)
    net = _net(NestedShells((4.0,)))
    with pytest.raises(ValueError, match="charge must have one value for each of 1 graphs, got 2"):
        net(z, pos, charge=torch.zeros(2))
    with pytest.raises(ValueError, match=r"charges must have shape \[6\]"):
        net(z, pos, charges=torch.zeros(5))
    with pytest.raises(ValueError, match="charges must add up to charge in every graph, got 0 and 1 in graph 0"):
        net(z, pos, charge=torch.ones(1), charges=torch.zeros(6))
    cell, pbc = 20.0 * torch.eye(3).double().unsqueeze(0), torch.tensor([[True, True, True]])
    with pytest.raises(ValueError, match="pbc must be off for long_range method 'direct'"):
        net(z, pos, cell=cell, pbc=pbc)
