"""P4, P5, P9, P10: how states and targets transform, which linear maps are covariant, what is polynomial."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from e3nn import o3
from torch import nn

from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, ShellsAndPieces
from nbody_pyg.data import AtomicData
from nbody_pyg.kernels import set_backend
from nbody_pyg.nn.gates import ProductGate
from nbody_pyg.nn.interaction import Interaction
from nbody_pyg.nn.linear import IrrepsLinear
from nbody_pyg.testing import assert_conservative, assert_equivariant, random_molecule, wigner_matrix

SCHEMES = {
    "tree": BondTree(4.0),
    "pieces": ShellsAndPieces((3.0, 3.0), 6.0),
    "shells": NestedShells((3.0, 3.0, 3.0)),
    "labels": FromAssignment(part_cutoffs=(8.0,)),
}
SPECIES = [1, 6, 8]


def _net(scheme: str, parity: str = "natural", preset: str = "practical", **options) -> NBodyNet:
    torch.manual_seed(11)
    # Every degree in the target, so that every level keeps every degree. Types with both parities are large:
    # degree 1 tests them as well and compiles in a tenth of the time.
    target = {"natural": "0e+1o+2e", "both": "0e+0o+1e+1o", "ignored": "0e+1e"}[parity]
    options = {"channels": 3, "irreps_out": target, "lmax": 2 if parity == "natural" else 1} | options
    return _tamed(NBodyNet(SPECIES, SCHEMES[scheme], preset=preset, parity=parity, **options).double())


def _tamed(net: NBodyNet) -> NBodyNet:
    """Products as large as after training, and weights that keep every A at size one: nothing else bounds a
    polynomial of degree 3^depth."""
    if net.preset == "strict":
        for gate in net.modules():
            if isinstance(gate, ProductGate):
                for weight in gate.products.parameters():
                    weight.data.mul_(10.0)
        system = random_molecule(7, net.species)
        for layer in net.interactions:
            size: list[float] = []
            spot = layer.norm if isinstance(layer, Interaction) else layer
            hook = spot.register_forward_hook(
                lambda _, __, out, size=size: size.append(float(out.detach().abs().max()))
            )
            with torch.no_grad():
                net(_data(system))
                linear = [layer.density, layer.gate, layer.self_linear] if isinstance(layer, Interaction) else [layer]
                for weight in [w for m in linear if m is not None for w in getattr(m, "mix", m).weights]:
                    weight.div_(max(size[0], 1e-3))
            hook.remove()
    return net


def _levels(net: NBodyNet):
    """States of every level as a function of atoms; parts of given labels go by atom, three to a part."""

    def call(z, pos, batch):
        labels = torch.arange(len(z)) // 3
        return [x for _, x in net.representations(AtomicData(z=z, pos=pos, labels=labels))]

    system = random_molecule(7, SPECIES)
    return call, [irreps for irreps, _ in net.representations(_data(system))]


def _data(system):
    return AtomicData(z=system.z, pos=system.pos, labels=torch.arange(len(system.z)) // 3)


@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("parity", ["natural", pytest.param("both", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_level_and_degree_is_covariant(scheme, parity, preset):
    """P4, for rotations, the inversion and their products; every block must be different from zero."""
    net = _net(scheme, parity, preset)
    call, types = _levels(net)
    # Atoms have no state of their own below shells, and the root has none
    assert len(types) == len(net.scheme.levels) - (2 if scheme in ("shells", "pieces") else 1)
    assert all({ir for _, ir in irreps} == {ir for _, ir in net.irreps} for irreps in types), "no degree is missing"
    # The first parts see bare atoms only, from which no pseudoscalar can be made
    full = parity == "both"
    worst = assert_equivariant(call, types, systems=[random_molecule(7, SPECIES)], num_rotations=2, allow_zero=full)
    assert worst < 1e-10
    system = random_molecule(7, SPECIES)
    top = call(system.z, system.pos, torch.zeros(7, dtype=torch.long))[-1]
    assert all(top[:, part].abs().max() > 1e-9 for part in types[-1].slices())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_without_parity_it_is_covariant_to_rotations_and_separates_mirror_images(scheme):
    net = _net(scheme, "ignored")
    call, types = _levels(net)
    assert assert_equivariant(call, types, systems=[random_molecule(7, SPECIES)], improper=False) < 1e-10
    with pytest.raises(AssertionError, match="improper rotation"):
        assert_equivariant(call, types, systems=[random_molecule(7, SPECIES)], improper=True)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("scheme", [BondTree(4.0), NestedShells((3.0, 3.0))], ids=["tree", "shells"])
def test_energies_of_mirror_images(scheme, preset, molecules, random_rotation):
    z, pos = molecules["chiral"]
    species = sorted(set(z.tolist()))
    differences = {}
    for parity in ("natural", "both", "ignored"):
        net = _tamed(NBodyNet(species, scheme, channels=4, lmax=1, preset=preset, parity=parity).double())
        with torch.no_grad():
            energy, mirror, turned = net(z, pos), net(z, -pos), net(z, pos @ random_rotation(1).T)
        torch.testing.assert_close(turned, energy, rtol=1e-10, atol=1e-10)
        differences[parity] = float((mirror - energy).abs() / energy.abs())
    assert differences["natural"] < 1e-10 and differences["both"] < 1e-10
    assert differences["ignored"] > 1e-9, "an achiral network cannot tell left from right; this one must"
    # An achiral molecule has one energy, whatever the network
    flat = pos * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(z, flat), net(z, -flat), rtol=1e-10, atol=1e-10)


def test_pseudoscalars_change_sign(molecules):
    z, pos = molecules["chiral"]
    net = NBodyNet(
        sorted(set(z.tolist())),
        NestedShells((3.0, 3.0)),
        channels=4,
        lmax=1,
        parity="both",
        irreps_out="0o",
    )
    with torch.no_grad():
        left, right = net.double()(z, pos), net(z, -pos)
    assert left.abs() > 1e-8
    torch.testing.assert_close(left, -right, rtol=1e-9, atol=1e-12)


def test_proposition_1(generator):
    """P5: the maps that commute with every rotation and the inversion are those of IrrepsLinear, and no
    more."""
    irreps_in, irreps_out = o3.Irreps("2x0e+1x0o+2x1o+1x1e+1x2e"), o3.Irreps("1x0e+1x0o+3x1o+2x2e")
    rows = []
    for k in range(4):
        q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
        q = q * torch.linalg.det(q) * (-1) ** k
        before, after = (
            torch.block_diag(*[wigner_matrix(ir, q) for mul, ir in irreps for _ in range(mul)])
            for irreps in (irreps_in, irreps_out)
        )
        eye_in, eye_out = torch.eye(irreps_in.dim), torch.eye(irreps_out.dim)
        # after @ M - M @ before = 0, for M written row by row
        rows.append(torch.kron(after, eye_in.double()) - torch.kron(eye_out.double(), before.T.contiguous()))
    values = np.linalg.svd(torch.cat(rows).numpy(), compute_uv=False)
    null_space = int((values < 1e-9).sum())
    assert values[values > 1e-9].min() > 1e-3, "a clear gap"
    linear = IrrepsLinear(irreps_in, irreps_out)
    weights = sum(p.numel() for p in linear.parameters())
    assert null_space == weights == 2 * 1 + 1 * 1 + 2 * 3 + 1 * 2


def test_bias_anywhere_but_on_scalars_would_break_covariance(rotation):
    linear = IrrepsLinear("2x0e+2x1o", "2x0e+2x1o+1x0e", bias=True)
    with torch.no_grad():
        linear.bias.normal_()
    assert linear.bias.numel() == 3
    assert assert_equivariant(linear, linear.irreps_out, [linear.irreps_in], layout="ir_mul") < 1e-12


class _Recorder:
    """Inputs of every interaction of a network, one forward pass."""

    def __init__(self, net: NBodyNet) -> None:
        self.calls = []
        for layer in net.interactions:
            layer.register_forward_hook(lambda layer, inputs, out: self.calls.append((layer, inputs)))


def _differences(function, order: int):
    """Largest n-th and (n+1)-th forward differences of a function along a line, relative to its values."""
    values = torch.stack([function(1.0 + 0.25 * k).flatten() for k in range(order + 6)])
    scale = values.abs().max()
    return [float(torch.diff(values, n=n, dim=0).abs().max() / scale) for n in (order, order + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["tree", "shells"])
@pytest.mark.parametrize("correlation", [2, 3])
def test_strict_is_polynomial_in_the_states(scheme, correlation):
    """P9: along psi -> lambda psi each interaction is a polynomial of degree correlation in lambda, not
    more."""
    net = _net(scheme, preset="strict", correlation=correlation)
    system, recorder = random_molecule(7, SPECIES), None
    recorder = _Recorder(net)
    with torch.no_grad():
        net(system.z, system.pos)
        calls, tested = list(recorder.calls), 0
        for layer, inputs in calls:
            source, target, *rest = inputs
            if not isinstance(layer, Interaction) or (source is None and target is None):
                continue

            def scaled(factor, layer=layer, source=source, target=target, rest=rest):
                parts = [None if x is None else factor * x for x in (source, target)]
                return layer(*parts, *rest)

            highest, beyond = _differences(scaled, correlation)
            assert beyond < 1e-10, f"{layer} is no polynomial of degree {correlation}"
            assert highest > 1e-8, "the degree is reached, so the test sees the products"
            tested += 1
    assert tested >= 2


def test_practical_is_not_polynomial():
    """The same test sees SoftNorm, so that it is not vacuous."""
    net = _net("tree", preset="practical")
    system, recorder = random_molecule(7, SPECIES), _Recorder(net)
    with torch.no_grad():
        net(system.z, system.pos)
        layer, (source, target, *rest) = next(c for c in recorder.calls if c[1][0] is not None and c[1][1] is not None)
        beyond = _differences(lambda f: layer(f * source, f * target, *rest), 3)[1]
    assert beyond > 1e-6


@pytest.mark.slow
def test_strict_has_no_activation_and_no_norm():
    allowed = {"NBodyNet", "ModuleList", "ModuleDict", "ParameterList", "Identity", "EdgeEmbedding",
    "SolidHarmonics",
               "InversePowers", "Interaction", "DensityGate", "OneBodyGate", "PathLinear", "RowLinear",
               "SpeciesScale",
               "ProductGate", "ChannelwiseProduct", "LinearReadout", "IrrepsLinear"}  # fmt: skip
    for scheme in SCHEMES:
        for parity in ("natural", "both", "ignored"):
            found = {type(module).__name__ for module in _net(scheme, parity, "strict").modules()}
            assert found <= allowed, f"{found - allowed} in a strict network"
    assert any(isinstance(m, nn.SiLU) for m in _net("tree", preset="practical").modules())


@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("scheme", ["tree", "shells"])
def test_forces_are_the_gradient(scheme, preset):
    """P10: finite differences of fourth order, and a symmetric Jacobian."""
    net = _net(scheme, preset=preset, irreps_out="0e")
    # A smooth family of energies: the tree of the undisturbed molecule, at the displaced positions
    worst = assert_conservative(_frozen(net, system := random_molecule(6, SPECIES)), systems=[system])
    assert worst < 1e-6


def _frozen(net: NBodyNet, system):
    """The network on the children of one reference, recomputing pairs."""

    def energy(z, pos, batch):
        copies = int(batch.max()) + 1
        reference = net.scheme.topology(z, system.pos.repeat(copies, 1), batch)
        return net(z, pos, batch, topology=net.scheme.update(reference, z, pos, batch))

    return energy


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["practical", "strict"])
@pytest.mark.parametrize("scheme", ["tree", "shells"])
@pytest.mark.parametrize("irreps_out", ["1o", "0e+2e", "2x0e+1x1o"])
def test_targets_of_any_type_are_covariant(irreps_out, scheme, preset):
    """P10: dipole, polarizability and mixtures, summed over the parts of a system."""
    net = _net(scheme, preset=preset, irreps_out=irreps_out)
    assert assert_equivariant(net, irreps_out, num_rotations=2) < 1e-10


def test_a_polarizability_turns_as_a_tensor(rotation):
    """The 0e+2e target, written as a symmetric matrix, turns as R A R^T."""
    net = _net("shells", irreps_out="0e+2e")
    change = o3.ReducedTensorProducts("ij=ji", i="1o").change_of_basis.double()
    system = random_molecule(6, SPECIES)

    def tensor(pos):
        with torch.no_grad():
            return torch.einsum("gz,zij->gij", net(system.z, pos), change)[0]

    before, after = tensor(system.pos), tensor(system.pos @ rotation.T)
    assert (before - before.trace() / 3 * torch.eye(3, dtype=torch.float64)).abs().max() > 1e-3
    torch.testing.assert_close(after, rotation @ before @ rotation.T, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["tree", "shells", "labels"])
def test_an_intensive_target_is_read_off_the_root(scheme):
    net = _net(scheme, irreps_out="0e+1o", readout="root")
    call, types = _levels(net)
    assert list(net.readouts) == [str(len(net.scheme.levels) - 1)]
    system = random_molecule(7, SPECIES)
    data = _data(system)
    out = net(data)
    assert out.shape == (1, 4)
    root = assert_equivariant(call, types, systems=[system], num_rotations=2)
    assert root < 1e-10
    target = lambda z, pos, batch: net(AtomicData(z=z, pos=pos, labels=data.labels))  # noqa: E731
    assert assert_equivariant(target, "0e+1o", systems=[system], num_rotations=2) < 1e-10


def test_an_intensive_root_is_not_additive_and_the_extensive_sum_is():
    system = random_molecule(6, SPECIES)
    far = torch.cat([system.pos, system.pos + 1000.0]), torch.cat([system.z, system.z])
    extensive, intensive = (
        _net("shells", irreps_out="0e"),
        _net("shells", irreps_out="0e", readout="root"),
    )
    with torch.no_grad():
        for net, additive in ((extensive, True), (intensive, False)):
            one, two = net(system.z, system.pos), net(far[1], far[0])
            assert bool((two - 2 * one).abs() < 1e-9) == additive


@pytest.mark.slow
def test_backends_agree_on_states_of_every_level():
    system = random_molecule(7, SPECIES)
    for scheme in SCHEMES:
        for parity in ("natural", "both", "ignored"):
            net, states = _net(scheme, parity), {}
            for backend in ("torch", "auto"):
                set_backend(backend)
                try:
                    with torch.no_grad():
                        states[backend] = net.representations(_data(system))
                finally:
                    set_backend("auto")
            for (_, a), (_, b) in zip(states["torch"], states["auto"], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, float(a.abs().max())))


def test_a_copy_is_independent():
    net = _net("tree")
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(bool(p.any()) for p in net.parameters() if p.dim() == 2 and p.shape[0] > 3)
