"""Types of several multiplicities, others for each level: covariance, weights, compiled code, all that uses them."""

from __future__ import annotations

import pytest
import torch
from ase import Atoms
from e3nn import o3
from torch import nn

from comparison import assert_fused_is_forward, assert_physics
from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator, load_model, save_model
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.kernels import available_backends, set_backend
from nbody_pyg.nn.edges import EdgeFeatures, sum_into
from nbody_pyg.nn.gates import DensityGate, EnteredGate, OneBodyGate, ProductGate
from nbody_pyg.nn.interaction import ChannelGroups, Interaction, SoftNorm
from nbody_pyg.nn.irreps import channel_groups, level_types, state_shape, state_type
from nbody_pyg.nn.linear import IrrepsLinear, RowLinear
from nbody_pyg.runtime.compiled import compile_potential
from nbody_pyg.testing import (
    assert_conservative,
    assert_equivariant,
    random_molecule,
)
from nbody_pyg.training import TrainingConfig, fit
from nbody_pyg.training.config import load_config
from nbody_pyg.training.prepare import explicit

SPECIES = [1, 6, 8]
SCHEMES = {
    "shells": NestedShells((3.0, 4.0)),
    "bonds": BondTree(3.0),
    "survivors": SmoothSurvivors(),
    "labels": FromAssignment(part_cutoffs=(8.0,)),
}
WIDE, NARROW = "6x0e + 4x1o + 2x2e", "3x0e + 3x1o + 1x2e"
#: Types by level, some of one multiplicity, so that each kind of step leads from and to both kinds.
TYPES = {
    "shells": {"shell 1": WIDE, "shell 2": NARROW},
    "bonds": {"atoms": WIDE, "groups": "3x0e + 3x1o + 3x2e", "pieces": NARROW, "molecules": "5x0e + 2x1o + 2x2e"},
    "survivors": {"atoms": WIDE, "survivors 1": NARROW, "survivors 2": "4x0e + 4x1o + 4x2e"},
    "labels": {"atoms": "4x0e + 4x1o + 4x2e", "parts": WIDE},
}
E0 = {1: -1.0, 6: -2.0, 8: -3.0}


def network(scheme: str, irreps=None, **options) -> NBodyNet:
    torch.manual_seed(0)
    options = {"correlation": 3} | options
    return NBodyNet(SPECIES, SCHEMES[scheme], irreps=irreps or TYPES[scheme], **options).double()


def potential(*arguments, **options) -> Potential:
    return Potential(network(*arguments, **options), E0, scale=0.1).double()


def as_data(z: torch.Tensor, pos: torch.Tensor) -> AtomicData:
    return AtomicData(z=z, pos=pos, labels=torch.arange(len(z)) // 3)


@pytest.fixture
def ethanol(molecules):
    return as_data(*molecules["ethanol"])


def levels_of(net: NBodyNet):
    def levels(z, pos, batch):
        return [x for _, x in net.representations(as_data(z, pos))]

    return levels


# ------------------------------------------------------------------ covariance
@pytest.mark.parametrize("preset", ["practical", pytest.param("strict", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_level_is_covariant(scheme, preset):
    net = network(scheme, preset=preset, irreps_out="0e + 1o + 2e")
    if preset == "strict":  # products as large as after training
        for gate in (m for m in net.modules() if isinstance(m, ProductGate)):
            for weight in gate.products.parameters():
                weight.data.mul_(10.0)
    system = random_molecule(9, SPECIES)
    found = net.representations(as_data(system.z, system.pos))
    types = [irreps for irreps, _ in found]
    assert [str(one) for one in types] == [str(o3.Irreps(one)) for one in TYPES[scheme].values()]
    for irreps, x in found:
        assert x.shape[1] == irreps.dim and all(x[:, part].abs().max() > 1e-9 for part in irreps.slices())
    assert assert_equivariant(levels_of(net), irreps_out=types, systems=[system]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parity", "irreps", "target"),
    [
        ("both", "4x0e + 2x0o + 1x1e + 3x1o", "0e + 0o + 1e + 1o"),
        ("ignored", "4x0e + 2x1e + 1x2e", "0e + 1e + 2e"),
        ("natural", "4x0e + 2x2e", "0e + 2e"),
    ],
)
def test_symmetries(parity, irreps, target):
    net = network("bonds", irreps, parity=parity, irreps_out=target)
    system = random_molecule(9, SPECIES)
    types = [irreps for irreps, _ in net.representations(as_data(system.z, system.pos))]
    assert types == [o3.Irreps(irreps)] * 4
    settings = {"improper": parity != "ignored", "allow_zero": parity == "both"}
    assert assert_equivariant(levels_of(net), irreps_out=types, systems=[system], **settings) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", ["shells", *(pytest.param(s, marks=pytest.mark.slow) for s in ("bonds", "survivors"))]
)
def test_physics(scheme):
    assert_physics(potential(scheme), step=2e-4)


# ------------------------------------------------------------------ weights
def test_weights_of_the_linear_maps():
    """Proposition 1: a covariant linear map from tau to tau' has sum over l of tau_l tau'_l weights."""
    first, second = o3.Irreps("12x0e + 6x1o + 3x2e"), o3.Irreps("8x0e + 5x1o + 2x2e")
    wanted = sum(a * b for (a, _), (b, _) in zip(first, second, strict=True))
    assert wanted == 12 * 8 + 6 * 5 + 3 * 2

    def count(maps):
        return sum(weight.numel() for one in maps for weight in one.weights)

    net = network("shells", {"shell 1": str(first), "shell 2": str(second)}, irreps_out="0e + 1o + 2e")
    layer = net.interactions[1]
    assert isinstance(layer, ChannelGroups) and len(layer.layers) == 3
    for maps in ([one.gate.enter for one in layer.layers], [one.self_linear for one in layer.layers],
                 [one.residual_linear for one in layer.layers]):  # fmt: skip
        assert all(one.irreps_in == first for one in maps) and count(maps) == wanted
    assert count([IrrepsLinear(first, second)]) == wanted


def test_a_linear_map_from_several_multiplicities():
    first, second = o3.Irreps("5x0e + 3x1o + 2x2e"), o3.Irreps("4x0e + 4x1o + 4x2e + 4x3o")
    rows, flat = RowLinear(first, second, partial=True).double(), IrrepsLinear(first, "4x0e + 4x1o + 4x2e").double()
    flat.load_state_dict(rows.state_dict())
    x = torch.randn(7, *state_shape(first), dtype=torch.float64, requires_grad=True)
    assert x.shape == (7, first.dim, 1)
    results = []
    for backend in available_backends():
        set_backend(backend)
        try:
            results.append(rows(x))
        finally:
            set_backend("auto")
    for found in results:
        assert found.shape == (7, 16, 4) and found[:, 9:].abs().max() == 0
        torch.testing.assert_close(found[:, :9].flatten(1), flat(x.squeeze(2)), rtol=0, atol=1e-12)
    assert torch.autograd.gradgradcheck(rows, (x,)) and results[0].abs().min(dim=0).values[:9].max() > 1e-3


def test_one_multiplicity_is_the_short_form(ethanol):
    torch.manual_seed(0)
    short = NBodyNet(SPECIES, SCHEMES["bonds"], channels=4, lmax=1).double()
    torch.manual_seed(0)
    long = NBodyNet(SPECIES, SCHEMES["bonds"], irreps="4x0e + 4x1o").double()
    assert list(short.state_dict()) == list(long.state_dict())
    assert torch.equal(short(ethanol), long(ethanol)) and short(ethanol).abs() > 1e-6
    assert repr(short) == repr(long) and short.config()["channels"] == 4 and "irreps" not in short.config()
    assert long.config()["irreps"] == "4x0e + 4x1o" and "channels" not in long.config()


# ------------------------------------------------------------------ the code that runs
@pytest.mark.slow
@pytest.mark.skipif("c" not in available_backends(), reason="no C compiler: there is no other path")
@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
def test_the_compiled_layer_is_the_forward_with_both_derivatives(scheme, preset, ethanol):
    least = len(network(scheme).steps) - 3  # steps down are gates, not layers
    assert_fused_is_forward(lambda: potential(scheme, preset=preset), least, ethanol)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
def test_what_is_replaced_or_hooked_counts(scheme, ethanol):
    net = network(scheme)
    wanted = net(ethanol)

    def fail(*_, **__):
        raise RuntimeError("on purpose")

    for kind in (ChannelGroups, Interaction, EnteredGate, OneBodyGate, DensityGate, RowLinear, ProductGate, SoftNorm):
        found = [module for module in net.modules() if type(module) is kind]
        assert found, f"no {kind.__name__} in the network"
        for module in found:
            module.forward = fail
            with pytest.raises(RuntimeError, match="on purpose"):
                net(ethanol)
            del module.forward
    calls = []
    gates = [module for module in net.modules() if isinstance(module, (EnteredGate, DensityGate))]
    for gate in gates:
        gate.register_forward_hook(lambda gate, _, out: calls.append(gate))
    torch.testing.assert_close(net(ethanol), wanted, rtol=0, atol=1e-10)
    assert {id(gate) for gate in calls} == {id(gate) for gate in gates}
    gates[0].register_forward_hook(lambda gate, _, out: 2.0 * out)
    assert (net(ethanol) - wanted).abs() > 1e-9


# ------------------------------------------------------------------ what is done with a network
class OverlapGate(nn.Module):
    """A gate of one's own: sources act along their direction."""

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, *, num_basis: int, avg_num_neighbors: float):
        super().__init__()
        self.rows, self.scale = state_shape(irreps_out)[0], avg_num_neighbors**-0.5
        self.radial = nn.Parameter(torch.randn(num_basis, irreps_in[0].mul) * num_basis**-0.5)

    def forward(self, x: torch.Tensor, edges: EdgeFeatures) -> torch.Tensor:
        source, target = edges.index
        weight = x[source, 0] * (edges.radial @ self.radial) * self.scale
        sent = edges.harmonics[:, : self.rows].unsqueeze(2) * weight.unsqueeze(1)
        return sum_into(sent, target, edges.num_targets)


class Flat(OverlapGate):
    """Returns scalars only, which torch would add to every component."""

    def forward(self, x: torch.Tensor, edges: EdgeFeatures) -> torch.Tensor:
        return super().forward(x, edges)[:, :1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
def test_own_gates(scheme, ethanol, tmp_path):
    model = potential(scheme, gate=OverlapGate)
    gates = [module for module in model.modules() if isinstance(module, OverlapGate)]
    groups = [channel_groups(model.model.level_types[step.level]) for step in model.model.steps]
    assert len(gates) == sum(len(one) for one in groups) > len(groups)
    assert assert_equivariant(model) < 1e-10
    assert_conservative(model, step=2e-4)
    save_model(model, tmp_path / "own.nbody")
    assert torch.equal(load_model(tmp_path / "own.nbody")(ethanol)["energy"], model(ethanol)["energy"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pair", "up", "down"])
def test_a_result_of_the_wrong_shape_is_refused(kind, ethanol):
    with pytest.raises(ValueError, match=r"Flat must return states of shape \[\d+, \d+, \d\]"):
        network("bonds", WIDE, gate={kind: Flat})(ethanol)


LONG_RANGE = {"method": "direct", "dipoles": True}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
@pytest.mark.parametrize("options", [{}, {"long_range": LONG_RANGE, "inputs": ["charge", "spin"]}], ids=["", "charged"])
def test_everything_else_works(scheme, options, ethanol, tmp_path):
    model = potential(scheme, **options)
    net = model.model
    if options:
        with torch.no_grad():  # they start at zero
            for weight in (net.long_range.local, net.long_range.local_states.weight):
                weight.normal_(std=0.1)
        ethanol.charge, ethanol.spin = torch.tensor([1.0]), torch.tensor([2])
    assert assert_equivariant(model) < 1e-10
    wanted = model(ethanol)
    assert wanted["forces"].abs().max() > 1e-6
    parts = net.energies(net.hierarchy(ethanol))
    torch.testing.assert_close(sum(part.sum() for part in parts.values()), net(ethanol)[0], rtol=0, atol=1e-10)
    explained = ExplainableNet(net)
    torch.testing.assert_close(explained(*explained.graph(ethanol), data=ethanol)[0], net(ethanol), rtol=0, atol=1e-10)
    again = NBodyNet.from_config(net.config()).double()
    assert again.config() == net.config() and repr(again) == repr(net)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(ethanol), net(ethanol))
    save_model(model, tmp_path / "types.nbody")
    loaded = load_model(tmp_path / "types.nbody")
    assert torch.equal(loaded(ethanol)["forces"], wanted["forces"])
    if not options:
        compiled = compile_potential(model, backend="eager")
        torch.testing.assert_close(compiled(ethanol.z, ethanol.pos)["forces"], wanted["forces"], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_reset_draws_weights_anew():
    net, before = network("bonds", WIDE), network("bonds", WIDE)
    torch.manual_seed(1)
    net.reset_parameters()
    assert sum(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True)) < 30
    torch.manual_seed(0)
    net.reset_parameters()
    assert all(torch.equal(a, b.to(a)) for a, b in zip(net.parameters(), before.float().parameters(), strict=True))


def test_train_save_load_and_run(ethanol, tmp_path):
    atoms, frames = Atoms(ethanol.z.numpy(), ethanol.pos.numpy()), []
    for seed in range(6):
        moved = atoms.copy()
        moved.rattle(0.03, seed=seed)
        frames.append(AtomicData.from_ase(moved))
        frames[-1].energy = torch.tensor([-20.0 + 0.1 * seed], dtype=torch.float64)
        frames[-1].forces = torch.full((len(atoms), 3), 0.01 * seed, dtype=torch.float64)
    model = potential("shells")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = TrainingConfig(max_steps=4, batch_size=2, dtype="float64")
    fit(model, frames[:4], frames[4:], settings, tmp_path / "run", show_progress=False)
    changed = [n for n, w in model.named_parameters() if not torch.equal(w, before[n])]
    assert sum(".enter." in name for name in changed) >= 2 and sum(".self_linear." in name for name in changed) >= 2
    atoms.calc = NBodyCalculator(model)
    assert abs(atoms.get_forces()).max() > 1e-6


@pytest.mark.slow
def test_configurations():
    words = ["--data.embedded", "ethanol", "--training.max_steps", "2", "--model.scheme", "{name: BondTree}"]
    for given in (WIDE, TYPES["bonds"]):
        config = load_config(overrides=[*words, "--model.irreps", str(given).replace("'", "")])
        assert config.model.arguments == {"irreps": given}
        written = explicit(config.model)
        assert written.arguments["irreps"] == given and "channels" not in written.arguments
    short = ["--model.channels", "8", "--model.lmax", "1"]
    config = load_config(overrides=[*words, *short])
    assert explicit(config.model).arguments["channels"] == 8 and "irreps" not in explicit(config.model).arguments
    both = load_config(overrides=[*words, *short, "--model.irreps", WIDE])
    with pytest.raises(ValueError, match="irreps must stand alone"):
        explicit(both.model)
    unset = ["--model.channels", "null", "--model.lmax", "null", "--model.irreps", WIDE]
    assert explicit(load_config(overrides=[*words, *unset]).model).arguments["irreps"] == WIDE


# ------------------------------------------------------------------ types
def test_groups_of_channels():
    assert [str(one) for one in channel_groups(o3.Irreps("48x0e + 32x1o + 16x2e"))] == [
        "16x0e+16x1o+16x2e", "16x0e+16x1o", "16x0e"
    ]  # fmt: skip
    irreps = o3.Irreps("7x0e + 2x0o + 3x1e + 7x1o")
    groups = channel_groups(irreps)
    assert all(state_shape(one)[1] == one[0].mul for one in groups)
    assert {ir: sum(one.count(ir) for one in groups) for _, ir in irreps} == {ir: mul for mul, ir in irreps}
    assert str(state_type("2x1o + 3x0e + 4x0e")) == "7x0e+2x1o" and state_shape(o3.Irreps("5x0e")) == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"irreps": WIDE, "channels": 32}, "irreps must stand alone, got .* channels 32"),
        ({"irreps": WIDE, "lmax": 2}, "irreps must stand alone, got .* lmax 2; .* leave them out"),
        ({"irreps": {"atoms": WIDE}}, r"irreps must give a type to each of the levels \['atoms', 'groups', .*'atoms'"),
        ({"irreps": {"shell 1": WIDE}}, "irreps must give a type to each of the levels"),
        ({"irreps": "3x0e + 4x1o"}, "irreps must have at least as many 0e .* raise the multiplicity of 0e"),
        ({"irreps": ""}, "irreps must have at least as many 0e"),
        ({"irreps": "4x0e + 4x1e"}, r"irreps must have fragments of parity 'natural' \(0e, 1o\), got 1e"),
        ({"irreps": "4x0e + 4x1o", "parity": "ignored"}, r"parity 'ignored' \(0e, 1e\), got 1o"),
        ({"irreps": "vectors"}, "irreps must be a type such as '32x0e \\+ 16x1o', got 'vectors'"),
        ({"irreps": 3}, "irreps must be a type such as"),
        ({"irreps": "4x0e + 2x1o", "irreps_out": "2e"}, "no path leads to 2e"),
    ],
)
def test_wrong_types(arguments, message):
    with pytest.raises(ValueError, match=message):
        NBodyNet(SPECIES, SCHEMES["bonds"], **arguments)


def test_types_of_levels():
    names = {0: "atoms", 1: "groups"}
    assert level_types(WIDE, names) == dict.fromkeys(names, o3.Irreps(WIDE))
    assert level_types({"groups": NARROW, "atoms": WIDE}, names) == {0: o3.Irreps(WIDE), 1: o3.Irreps(NARROW)}
    net = network("bonds")
    assert {net.scheme.levels[k].name: one for k, one in net.level_types.items()} == {
        name: o3.Irreps(one) for name, one in TYPES["bonds"].items()
    }
