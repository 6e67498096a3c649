"""Total charge and spin multiplicity as inputs: zero for a neutral singlet, extensive, felt by the forces, refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch_geometric.data import Batch, Data

from nbody_pyg import (
    AtomicData,
    BondTree,
    FromAssignment,
    NBodyNet,
    NestedShells,
    Potential,
    ShellsAndPieces,
    SmoothSurvivors,
)
from nbody_pyg.data import complete_states
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.network import check_states, learn_state, model_frames
from nbody_pyg.nn.electronic import ElectronicEmbedding
from nbody_pyg.properties import Property, PropertyModel, property_irreps
from nbody_pyg.runtime.compiled import compile_potential
from nbody_pyg.testing import (
    assert_batch_independent,
    assert_conservative,
    assert_equivariant,
    assert_extensive,
    assert_permutation_invariant,
    check_potential,
)

SCHEMES = {
    "shell": NestedShells((3.5,)),
    "shells": NestedShells((3.5, 4.5)),
    "bonds": BondTree(3.5),
    "pieces": ShellsAndPieces((3.5,), 6.0),
    "survivors": SmoothSurvivors(),
    "labels": FromAssignment(labels=[0, 0, 0, 1, 1, 1, 2, 2, 2], cutoff=3.5, part_cutoffs=(5.0,)),
    "no pairs": FromAssignment(labels=[0, 0, 0, 1, 1, 1, 2, 2, 2], cutoff=None, part_cutoffs=(None,)),
}
CHARGED = {"charge": torch.tensor([1.0]), "spin": torch.tensor([2])}
SMALL = {"channels": 4, "lmax": 1, "correlation": 2}


def net(scheme=SCHEMES["shell"], inputs=("charge", "spin"), seed=0, preset=NBodyNet.practical, **options) -> NBodyNet:
    torch.manual_seed(seed)
    return preset([1, 6, 8], scheme, inputs=inputs, **SMALL, **options).double()


def potential(*arguments, **options) -> Potential:
    return Potential(net(*arguments, **options), repulsion=None)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [NBodyNet.practical, NBodyNet.strict], ids=["practical", "strict"])
@pytest.mark.parametrize("name", SCHEMES)
def test_neutral_singlets_keep_their_energies_and_forces_feel_the_rest(name, preset, ethanol):
    model, plain = potential(SCHEMES[name], preset=preset), potential(SCHEMES[name], inputs=None, preset=preset)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and any("electrons" in key for key in missing.missing_keys)
    expected, neutral = plain(ethanol), model(ethanol)
    assert expected["forces"].abs().max() > 1e-4
    for key in ("energy", "forces"):
        torch.testing.assert_close(
            neutral[key], expected[key], rtol=0, atol=1e-10 * float(1 + expected[key].abs().max())
        )
    zero = model(Data(**ethanol.to_dict(), charge=torch.zeros(1), spin=torch.ones(1)))
    torch.testing.assert_close(zero["energy"], neutral["energy"], rtol=0, atol=0)
    states = ({}, {"charge": 1}, {"charge": -1}, {"charge": 2.0}, {"spin": 2}, {"spin": 3})
    found = [model(Data(**ethanol.to_dict(), **state)) for state in states]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert abs(float(one["energy"] - other["energy"])) > 1e-6
            assert float((one["forces"] - other["forces"]).abs().max()) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shells", pytest.param("bonds", marks=pytest.mark.slow), "survivors"])
def test_physics_of_charged_systems(name, molecules):
    model = potential(SCHEMES[name])
    with torch.no_grad():
        model.model.electrons.spread.uniform_(-1.0, 1.0)
        model.model.electrons.offset.normal_()
    frames = [AtomicData(z=z, pos=pos, **CHARGED) for z, pos in (molecules[n] for n in ("ethanol", "methanol"))]
    frames.append(AtomicData(z=frames[0].z, pos=frames[0].pos + 0.05 * torch.randn_like(frames[0].pos)))
    assert_equivariant(model, systems=frames)
    assert_permutation_invariant(model, systems=frames)
    assert_batch_independent(model, systems=frames)
    assert_extensive(model, systems=frames)
    assert_conservative(model, systems=frames[:2], step=5e-4)
    parts = model.energies(frames[0])
    assert abs(float(parts.total()) - float(model(frames[0])["energy"])) < 1e-10
    assert abs(float(parts.total()) - float(model.energies(frames[2]).total())) > 1e-6


def test_extensivity_is_seen_to_fail_where_the_charge_is_not_multiplied(molecules):
    z, pos = molecules["ethanol"]
    model = potential()
    both = {"z": z.repeat(2), "pos": torch.cat([pos, pos + 500.0])}
    one = float(model(AtomicData(z=z, pos=pos, charge=torch.ones(1)))["energy"])
    assert float(model(AtomicData(**both, charge=2 * torch.ones(1)))["energy"]) == pytest.approx(2 * one, abs=1e-9)
    assert abs(float(model(AtomicData(**both, charge=torch.ones(1)))["energy"]) - 2 * one) > 1e-3


def test_shares_add_up_and_follow_the_elements():
    torch.manual_seed(0)
    layer = ElectronicEmbedding(["spin", "charge"], 3, 4).double()
    assert layer.inputs == ("charge", "spin")
    torch.nn.init.normal_(layer.spread)
    species, batch = torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 0, 0, 2, 2])
    charge, spin = torch.tensor([2.0, 0.0, -1.0]).double(), torch.tensor([1.0, 1.0, 3.0]).double()
    shares = layer.shares(species, batch, charge, spin)
    sums = torch.zeros(3, 2).double().index_add(0, batch, shares)
    torch.testing.assert_close(sums, torch.stack([charge, spin - 1.0], dim=1))
    assert shares[0, 0] != shares[1, 0] and shares[3, 0] == shares[4, 0]
    assert not layer(torch.zeros_like(shares), species).any() and layer(shares, species).abs().min() > 0
    layer(layer.shares(species, batch, charge, spin), species).sum().backward()
    assert bool(layer.spread.grad.isfinite().all()) and layer.vectors.grad.abs().max() > 0
    before = copy.deepcopy(layer.state_dict())
    torch.nn.init.ones_(layer.offset)
    layer.reset_parameters()
    assert not layer.offset.any() and not layer.spread.any() and not torch.equal(layer.vectors, before["vectors"])


def test_long_range_spreads_the_total_by_the_same_rule(ethanol):
    """One rule for the embedding and for latent charges: that of the elements, even at the start."""
    model = net(long_range="direct")
    seen = []
    model.long_range.charges.register_forward_hook(lambda module, given, result: seen.append(given[2]))
    model(ethanol.z, ethanol.pos, charge=torch.tensor([9.0]))
    torch.testing.assert_close(seen[-1], torch.ones(9).double())
    torch.nn.init.normal_(model.electrons.spread)
    model(ethanol.z, ethanol.pos, charge=torch.tensor([9.0]))
    species = model.species_of[ethanol.z]
    expected = model.electrons.shares(species, torch.zeros_like(species), torch.tensor([9.0]).double(), None)[:, 0]
    torch.testing.assert_close(seen[-1], expected)
    assert float(seen[-1].detach().std()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("charges", [False, True], ids=["total", "formal"])
@pytest.mark.parametrize("inputs", [("charge",), None], ids=["with", "without"])
def test_long_range_in_single_precision(inputs, charges, ethanol):
    """Positions stay in double precision, and shares of the charge have that of the weights."""
    model = potential(SCHEMES["shells"], inputs, long_range="direct")
    given = {"charge": torch.tensor([1.0])}
    if charges:
        given = {"charges": torch.eye(len(ethanol.z), dtype=torch.float64)[2]}
    wanted = model(ethanol.z, ethanol.pos, **given)
    found = model.float()(ethanol.z, ethanol.pos + 1e4, **given)
    assert {found[key].dtype for key in ("interaction_energy", "forces")} == {torch.float32}
    for key in ("energy", "forces"):
        torch.testing.assert_close(found[key].double(), wanted[key], rtol=0, atol=1e-4)
    assert wanted["forces"].abs().max() > 0.1 and abs(wanted["energy"] - model(ethanol)["energy"]) > 0.1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.float32, torch.float64])
def test_batches_of_every_form_of_a_charge(shape, dtype, ethanol):
    model = potential(inputs=("charge",))
    charges = [1, 0, -1]
    frames = [Data(z=ethanol.z, pos=ethanol.pos, charge=torch.full(shape, q, dtype=dtype)) for q in charges]
    expected = [float(model(ethanol.z, ethanol.pos, charge=torch.tensor([float(q)]))["energy"]) for q in charges]
    found = model(Batch.from_data_list(frames))["energy"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(model(frames[0])["energy"]) == pytest.approx(expected[0], abs=1e-10)
    numbers = Batch.from_data_list([Data(z=ethanol.z, pos=ethanol.pos, charge=q) for q in charges])
    torch.testing.assert_close(model(numbers)["energy"], found, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("charge", torch.tensor([1.0, 0.0]), "charge must have one value for each of 1 graphs, got 2"),
        ("charge", torch.tensor([float("nan")]), "charge must be finite, got nan in graph 0"),
        ("charge", torch.tensor([float("inf")]), "charge must be finite"),
        ("charges", torch.zeros(3), r"charges must have shape \[9\]"),
        ("charges", torch.full((9,), float("nan")), "charges must be finite"),
        ("spin", torch.tensor([0]), "spin must be the multiplicity 2S"),
        ("spin", torch.tensor([1.5]), "spin must be the multiplicity 2S"),
        ("spin", torch.tensor([1, 1]), "spin must have one value for each of 1 graphs"),
    ],
)
@pytest.mark.parametrize("inputs", [("charge", "spin"), None], ids=["with", "without"])
def test_wrong_states_are_errors_for_every_model(key, value, message, inputs, ethanol):
    data = Data(z=ethanol.z, pos=ethanol.pos, **{key: value})
    for model in (net(inputs=inputs), potential(inputs=inputs)):
        with pytest.raises(ValueError, match=message):
            model(data)


@pytest.mark.parametrize(
    "state", [{"charge": torch.tensor([1.0])}, {"spin": torch.tensor([2])}], ids=["charge", "spin"]
)
def test_what_a_model_cannot_use_is_refused_but_for_what_it_was_trained_at(state, ethanol, tmp_path):
    (key,) = state
    data, other = Data(**ethanol.to_dict(), **state), Data(**ethanol.to_dict(), **{key: torch.tensor([3.0])})
    model = potential(inputs=None)
    wanted = Property("dipole", "dipole")
    dipole = NBodyNet([1, 6, 8], SCHEMES["shell"], irreps_out=str(property_irreps([wanted])), **SMALL)
    for caller in (model, model.model, model.energies, model.hessian, PropertyModel(dipole, [wanted])):
        with pytest.raises(ValueError, match=f"{key} is ., but the model has no input for it and knows {key} . only"):
            caller(data)
    learn_state(model.model, [data, data])
    assert model.model.assumed == {key: float(state[key])}
    save_model(model, tmp_path / "m.nbody")
    again = load_model(tmp_path / "m.nbody")
    expected = float(again(ethanol)["energy"])
    assert float(again(data)["energy"]) == expected and torch.equal(again.model(data), again.model(ethanol))
    with pytest.raises(ValueError, match=f"{key} is 3, but the model has no input for it and knows {key} ."):
        again(other)
    default = Data(**ethanol.to_dict(), **{key: torch.tensor([1.0 if key == "spin" else 0.0])})
    with pytest.raises(ValueError, match=f"frame 1 of x.xyz: {key} is"):
        check_states(again.model, [data, default], "x.xyz")
    with pytest.raises(ValueError, match=f"{key} must be the same in all training frames"):
        learn_state(again.model, [data, data, other])
    learn_state(again.model, [default, ethanol])
    assert again.model.assumed == {}


def test_models_from_elsewhere(ethanol):
    class Local(torch.nn.Module):
        def forward(self, z, pos, batch):
            return torch.cdist(pos, pos).sum().reshape(1)

    class Charged(Local):
        def forward(self, z, pos, batch, charge=None):
            return super().forward(z, pos, batch) * (1.0 if charge is None else 1.0 + charge)

    data = Data(**ethanol.to_dict(), charge=torch.tensor([2.0]))
    neutral = float(Potential(Local())(ethanol)["energy"])
    with pytest.raises(ValueError, match="charge is 2, but the model has no input for it"):
        Potential(Local())(data)
    assert float(Potential(Charged())(data)["energy"]) == pytest.approx(3.0 * neutral)
    # Formal charges that cancel say nothing about the total
    zwitterion = Data(**ethanol.to_dict(), charges=torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0, 0]))
    assert float(Potential(Local())(zwitterion)["energy"]) == neutral


def test_formal_charges_count_by_their_sum(ethanol):
    model, formal = potential(), torch.tensor([1.0, -2, 0, 0, 0, 0, 0, 0, 0])
    found = model(Data(**ethanol.to_dict(), charges=formal))
    expected = model(ethanol.z, ethanol.pos, charge=torch.tensor([-1.0]))
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=0, atol=1e-10)
    assert abs(float(found["energy"] - model(ethanol)["energy"])) > 1e-6


@pytest.mark.parametrize("key", ["charge", "spin"])
def test_a_batch_that_lost_an_input_is_refused(key, ethanol):
    """PyG takes the keys of the first data: the charge of the second would be gone, and its energy that of another."""
    plain = {k: v for k, v in ethanol.to_dict().items() if k in ("z", "pos")}
    known = {"charge": torch.tensor([1.0]), "spin": torch.tensor([2.0])}
    lost = Batch.from_data_list([Data(**plain), Data(**plain, **known)])
    model, network = potential(inputs=(key,)), net(inputs=(key,))
    gap = PropertyModel(net(inputs=(key,), irreps_out=property_irreps([Property("gap")])), [Property("gap")])
    for forward in (model, network, gap):
        with pytest.raises(ValueError, match=f"a batch of 2 graphs must hold '{key}', on which the model depends"):
            forward(lost)
    one, other = (network(Data(**plain, **state)).item() for state in ({}, {key: known[key]}))
    assert abs(one) > 1e-3 and abs(one - other) > 1e-6
    whole = Batch.from_data_list(complete_states([Data(**plain), Data(**plain)], (key,)))
    torch.testing.assert_close(network(whole), torch.tensor([one, one], dtype=torch.float64), rtol=0, atol=1e-10)
    assert potential(inputs=None)(lost)["energy"].shape == (2,)


def test_frames_get_the_same_keys(ethanol):
    some = [Data(**ethanol.to_dict(), charge=1), Data(**ethanol.to_dict(), charges=-torch.ones(9)), ethanol]
    model = potential()
    batch = Batch.from_data_list(model_frames(model.model, some))
    expected = [float(model(frame)["energy"]) for frame in some]
    torch.testing.assert_close(model(batch)["energy"], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert batch.charge.tolist() == [1.0, -9.0, 0.0] and len(set(expected)) == 3
    silent = model_frames(model.model, [ethanol, ethanol])
    assert all(frame.charge.tolist() == [0.0] and frame.spin.tolist() == [1.0] for frame in silent)
    plain = potential(inputs=None)
    plain.model.assumed = {"charge": 1.0}
    assert "charge" not in model_frames(plain.model, [some[0], ethanol])[0]


@pytest.mark.parametrize("key", ["charge", "spin"])
def test_hessians_and_explanations_take_the_state(key, ethanol):
    model, given = potential(), {key: torch.tensor([2.0])}
    data = Data(**ethanol.to_dict(), **given)
    neutral, hessian = model.hessian(ethanol), model.hessian(data)
    assert (hessian - neutral).abs().max() > 1e-6
    torch.testing.assert_close(model.hessian(ethanol.z, ethanol.pos, **given), hessian, rtol=0, atol=1e-10)
    vector = torch.randn(9, 3).double()
    product = model.hessian_vector_product(vector, ethanol.z, ethanol.pos, **given)
    torch.testing.assert_close(product.flatten(), hessian @ vector.flatten(), rtol=0, atol=1e-9)
    explained = ExplainableNet(model.model)
    value = float(explained(*explained.graph(data), data).detach())
    assert value == pytest.approx(float(model.model(data).detach()), abs=1e-10)
    assert abs(value - float(model.model(ethanol).detach())) > 1e-6
    (_, charged), *_ = model.model.representations(data)
    assert (charged - model.model.representations(ethanol)[0][1]).abs().max() > 1e-6


def test_properties_depend_on_the_charge(ethanol):
    wanted = [Property("dipole", "dipole"), Property("gap", "extensive")]
    torch.manual_seed(0)
    network = NBodyNet([1, 6, 8], SCHEMES["shells"], irreps_out=str(property_irreps(wanted)), inputs="charge", **SMALL)
    model = PropertyModel(network.double(), wanted)
    neutral, cation = model(ethanol), model(Data(**ethanol.to_dict(), charge=torch.ones(1)))
    for name in ("dipole", "gap"):
        assert (neutral[name] - cation[name]).abs().max() > 1e-6


@pytest.mark.slow
def test_programs_leave_charged_systems_to_eager_mode(ethanol):
    model = potential()
    program = compile_potential(model, backend="aot_eager")
    program(ethanol)
    for data in (ethanol, Data(**ethanol.to_dict(), charge=torch.ones(1)), Data(**ethanol.to_dict(), spin=3)):
        found, expected = program(data), model(data)
        for key in ("energy", "forces"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-9)
    assert program.failure is None and program.compiled_calls == 2


def test_configuration_comes_back(ethanol):
    model = net(inputs=("spin", "charge"))
    assert model.config()["inputs"] == ["charge", "spin"] and model.used == {"charge", "spin"}
    again = NBodyNet.from_config(model.config()).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ethanol.z, ethanol.pos, **CHARGED), model(ethanol.z, ethanol.pos, **CHARGED))
    assert net(inputs=None).config()["inputs"] is None and net(inputs=()).config()["inputs"] is None
    assert not net(inputs=None).used and net(inputs=None, long_range="direct").used == {"charge"}
    with pytest.raises(ValueError, match="inputs must be some of charge, spin, each once, got"):
        net(inputs=("charge", "dipole"))


@pytest.mark.slow
def test_check_tests_charged_systems_as_charged(ethanol):
    model = potential(SCHEMES["shells"])
    data = AtomicData(z=ethanol.z, pos=ethanol.pos, **CHARGED)
    seen = []
    model.model.electrons.register_forward_hook(lambda module, given, result: seen.append(bool(given[0].any())))
    sections = ("symmetry", "derivatives", "additivity", "smoothness", "precision")
    found = check_potential(model, [data], only=sections)
    assert found.failures == [] and len(found.checks) > 8
    assert sum(seen) > 0.6 * len(seen), "all but random molecules and isolated atoms are charged"
    model = potential(inputs=None)
    with pytest.raises(ValueError, match="frame 0 of frames: charge is 1, but the model has no input for it"):
        check_potential(model, [data], only=("symmetry",))
    model.model.assumed = {"charge": 1.0, "spin": 2.0}
    assert check_potential(model, [data], only=("symmetry", "dynamics"), nve_steps=5)["rotations"].passed


@pytest.mark.parametrize("parity", ["natural", "ignored", "both"])
def test_backends_agree_for_every_parity(parity, ethanol):
    """The first states are scalars only, so that their gates and maps leave rows of the result out."""
    model, data = potential(parity=parity), Data(**ethanol.to_dict(), charge=torch.ones(1))
    assert_equivariant(model, systems=[data], improper=parity != "ignored")
    found = []
    try:
        for name in [name for name in available_backends() if name in ("torch", "c")]:
            set_backend(name)
            result = model(data, create_graph=True)
            (result["forces"].square().sum() + result["energy"].sum()).backward()
            slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.cat([result["energy"], result["forces"].flatten(), *slopes]).detach())
            model.zero_grad()
    finally:
        set_backend("auto")
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-10)
