"""torch's tracers, transforms and modes around the library: right numbers, or one sentence that says what to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from factories import net
from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.hierarchy.positions import atomic_masses
from nbody_pyg.kernels import autograd_flags, available_backends, backend, operands, set_backend
from nbody_pyg.nn import FullProduct, IrrepsLinear, NBodyConv, OneBodyGate
from nbody_pyg.nn.edges import EdgeFeatures

EXACT = {"rtol": 0, "atol": 1e-10}
NEIGHBOURS = r"neighbours are found from values .*; pass topology=net.scheme.topology\(z, pos\), or use .*compiled"
POTENTIAL = "a potential looks at values of positions .*; trace its model with topology=..., or use .*compile_potential"
Z = torch.tensor([6, 8, 1, 1, 1])
POS = torch.tensor(
    [[0.0, 0.0, 0.1], [1.2, 0.1, -0.1], [-0.5, 0.9, 0.2], [-0.6, -0.8, 0.4], [-0.3, 0.1, -1.0]], dtype=torch.float64
)


@pytest.fixture(autouse=True)
def _without_the_hook(request):
    """jaxtyping's hook wraps every function that torch's tracers look into here: they stumble over it, not over us."""
    if request.config.getoption("annotations"):
        pytest.skip("torch's tracers cannot look through the hook of --annotations")


class Subject(torch.nn.Module):
    """Something of the library as a function of positions alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        if kind == "layer":
            self.layer = NBodyConv("4x0e", "2x0e + 2x1o", cutoff=4.0).double()
            self.x = torch.randn(5, 4, dtype=torch.float64)
            self.index = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 0, 0, 0, 0, 4, 3]])
        else:
            self.layer = NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=4, lmax=1).double()
            self.topology = self.layer.scheme.topology(Z, POS) if kind == "edges" else None
        self.kind = kind

    def forward(self, pos: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return self.layer(self.x, self.index, pos)
        return self.layer(Z, pos, topology=self.topology)


def fake(subject: Subject) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = subject(mode.from_tensor(POS))
    assert isinstance(found, FakeTensor)
    return torch.empty(found.shape)


def flops(subject: Subject) -> torch.Tensor:
    with FlopCounterMode(display=False) as counter:
        found = subject(POS)
    assert counter.get_total_flops() > 1000
    return found


HOW = {
    "trace": lambda f: torch.jit.trace(f, POS)(POS + 0.0),
    "export": lambda f: torch.export.export(f, (POS,)).module()(POS),
    "make_fx, real": lambda f: make_fx(f)(POS)(POS),
    "make_fx, symbolic": lambda f: make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)(POS)(POS),
    "vmap": lambda f: torch.vmap(f)(torch.stack([1.01 * POS, POS]))[1],
}


@pytest.fixture(autouse=True)
def _backend_is_left_alone():
    yield
    set_backend("auto")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["layer", "edges"])
@pytest.mark.parametrize("how", HOW)
def test_what_is_recorded_or_batched_has_the_same_numbers(how, kind):
    """Plain torch takes the place of compiled code, which nobody could look into; afterwards all is as before."""
    subject = Subject(kind)
    wanted = subject(POS).detach()
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(HOW[how](subject).detach(), wanted, **EXACT)
    assert torch.equal(subject(POS).detach(), wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", HOW)
def test_neighbours_are_not_searched_where_positions_have_no_values(how):
    """``torch.jit.trace`` ended the process; it would keep the neighbours of the example for good."""
    subject = Subject("atoms")
    wanted = subject(POS).detach()
    with pytest.raises(RuntimeError, match=NEIGHBOURS):
        HOW[how](subject)
    with pytest.raises(RuntimeError, match=POTENTIAL):
        HOW[how](lambda pos: Potential(subject.layer)(Z, pos)["forces"]) if how != "export" else fake(
            lambda pos: Potential(subject.layer)(Z, pos)["forces"]
        )
    assert torch.equal(subject(POS).detach(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer", "edges", "atoms"])
def test_derivatives_by_torch_func(kind):
    subject, pos = Subject(kind), POS.clone().requires_grad_(True)
    total = lambda q: subject(q).square().sum()  # noqa: E731
    (slope,) = torch.autograd.grad(total(pos), pos)
    assert slope.abs().max() > 1e-3
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(total)(POS), slope, **EXACT)
    wanted = torch.autograd.functional.hessian(total, POS)
    torch.testing.assert_close(torch.func.hessian(total)(POS), wanted, rtol=0, atol=1e-9)
    weights = {name: p.detach() for name, p in subject.layer.named_parameters()}
    given = (subject.x, subject.index) if kind == "layer" else (Z,)
    call = lambda w: torch.func.functional_call(subject.layer, w, (*given, POS)).square().sum()  # noqa: E731
    found = torch.func.grad(call)(weights)
    for name, wanted in zip(weights, torch.autograd.grad(total(POS), list(subject.layer.parameters())), strict=True):
        torch.testing.assert_close(found[name], wanted, **EXACT)


SCHEMES = {
    "tree": BondTree(3.0, 3.5, 4.0),
    "pieces": ShellsAndPieces((2.5,), 4.0),
    "survivors": SmoothSurvivors((1.5,), (2.4, 4.0)),
    "labels": FromAssignment(labels=[k // 3 for k in range(9)], cutoff=3.0, part_cutoffs=(4.0,)),
}


@pytest.mark.parametrize("cell", [None, 9.0], ids=["open", "cell"])
@pytest.mark.parametrize("name", SCHEMES)
def test_parts_are_found_inside_torch_func(name, cell, molecules):
    """Bonds and labels are followed in numpy, which cannot read the tensors of a transform."""
    z, pos = molecules["ethanol"]
    model, where = net(SCHEMES[name]), {}
    if cell is not None:
        where = {"cell": cell * torch.eye(3, dtype=torch.float64)[None], "pbc": torch.ones(1, 3, dtype=torch.bool)}
    start = pos.clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(model(z, start, **where).sum(), start)
    assert wanted.abs().max() > 1e-3
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda q: model(z, q, **where).sum())(pos), wanted, **EXACT)
    slope = torch.func.grad(lambda q: torch.func.grad(lambda p: model(z, p, **where).sum())(q).square().sum())(pos)
    (first,) = torch.autograd.grad(model(z, start, **where).sum(), start, create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(first.square().sum(), start)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEMES)
def test_which_schemes_run_in_vmap(name, molecules):
    """With a topology, as the table in docs/pyg.md says."""
    z, pos = molecules["ethanol"]
    model = net(SCHEMES[name])
    topology = model.scheme.topology(z, pos)
    many, call = torch.stack([pos, 1.001 * pos]), torch.vmap(lambda q: model(z, q, topology=topology))
    if name == "survivors":
        with pytest.raises(
            RuntimeError, match="vmap: We do not support batching operators that can output dynamic shape"
        ):
            call(many)
        return
    wanted = torch.stack([model(z, q, topology=topology) for q in many])
    torch.testing.assert_close(call(many), wanted, **EXACT)
    assert wanted.abs().min() > 1e-3 and (wanted[0] - wanted[1]).abs() > 1e-6


def test_lists_of_many_atoms_are_found_inside_torch_func():
    """Beyond some two hundred atoms a compiled search takes over."""
    scheme, generator = NestedShells((1.5,)), torch.Generator().manual_seed(1)
    pos = torch.cartesian_prod(*[torch.arange(7.0, dtype=torch.float64)] * 3)
    pos = pos + 0.1 * torch.rand(pos.shape, generator=generator, dtype=torch.float64)
    model, z = net(scheme), torch.tensor([1, 6, 8] * 115)[: len(pos)]
    start = pos.clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(model(z, start).sum(), start)
    found = torch.func.grad(lambda q: model(z, q).sum())(pos)
    torch.testing.assert_close(found, wanted, **EXACT)
    assert wanted.abs().max() > 1e-3


def test_a_potential_inside_torch_func_says_what_to_do():
    potential = Potential(Subject("atoms").layer)
    with pytest.raises(RuntimeError, match=r"not work inside torch.func; transform its model .* or hessian_vector"):
        torch.func.grad(lambda pos: potential(Z, pos)["energy"].sum())(POS)


@pytest.mark.skipif("c" not in available_backends(), reason="no C compiler")
def test_gradients_in_batches_of_what_was_compiled():
    """``is_grads_batched`` and ``vectorize`` map over the backward pass alone."""
    subject = Subject("layer")
    total = lambda q: subject(q).square().sum()  # noqa: E731
    with pytest.raises(TypeError, match=r"numbers in memory.*set_backend\('torch'\) before the forward pass"):
        torch.autograd.functional.hessian(total, POS, vectorize=True)
    wanted = torch.autograd.functional.hessian(total, POS)
    set_backend("torch")
    torch.testing.assert_close(torch.autograd.functional.hessian(total, POS, vectorize=True), wanted, **EXACT)


@pytest.mark.parametrize("kind", ["layer", "edges", "atoms"])
def test_modes_that_count_or_change_precision(kind):
    subject = Subject(kind)
    wanted = subject(POS).detach()
    torch.testing.assert_close(flops(subject).detach(), wanted, **EXACT)
    low = subject.float()
    low = low(POS.float()) if kind != "layer" else low.layer(low.x.float(), low.index, POS.float())
    assert low.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if kind == "layer":
            found = subject.layer(subject.x.float(), subject.index, POS.float())
            half = subject.layer(subject.x.bfloat16(), subject.index, POS.float())
            assert half.dtype == torch.float32 and (half - low).abs().max() < 0.1 * low.abs().max()
        else:
            found = subject(POS.float())
    assert found.dtype == torch.float32 and torch.equal(found, low)
    if kind == "edges":
        assert fake(subject).shape == wanted.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch to itself
@pytest.mark.parametrize("kind", ["layer", "atoms", "potential", "linear", "product", "gate"])
def test_compile_breaks_its_graph_at_a_layer(kind):
    """Also where it is one of several in a user's module, in front of other work and behind it."""
    torch.manual_seed(0)
    if kind == "linear":
        layer, given = IrrepsLinear("4x0e + 2x1o", "2x0e + 1x1o").double(), torch.randn(5, 10, dtype=torch.float64)
    elif kind == "product":
        product, given = FullProduct("2x0e + 1x1o", "1x0e + 1x1o").double(), torch.randn(5, 9, dtype=torch.float64)
        layer = lambda x: product(x[:, :5], x[:, 5:])  # noqa: E731
    elif kind == "gate":
        gate, given = OneBodyGate("2x0e + 2x1o", "2x0e + 2x1o", 1, 3).double(), torch.randn(4, 4, 2).double()
        edges = EdgeFeatures(
            torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.rand(3, 4).double(), torch.rand(3, 3).double(), 4
        )
        layer = lambda x: gate(x, edges)  # noqa: E731
    else:
        subject, given = Subject("atoms" if kind == "potential" else kind), POS
        layer = (lambda pos: Potential(subject.layer)(Z, pos)["forces"]) if kind == "potential" else subject
    call = lambda x: layer(x * 1.5) * 2.0  # noqa: E731
    wanted = call(given).detach()
    torch._dynamo.reset()
    found = torch.compile(call, backend="eager")(given).detach()
    torch._dynamo.reset()
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_whole_graph_is_refused_with_a_reason():
    subject = Subject("layer")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"leave fullgraph off, or compile the whole potential with nbody_pyg"):
        torch.compile(subject, backend="eager", fullgraph=True)(POS)
    torch._dynamo.reset()


def test_symbolic_tracing_and_tensors_without_numbers():
    net = Subject("atoms").layer
    with pytest.raises(TypeError, match=r"torch.fx.symbolic_trace cannot follow NBodyNet, .* use torch.export"):
        torch.fx.symbolic_trace(net)
    with pytest.raises(TypeError, match=r"torch.fx.symbolic_trace cannot follow NBodyConv"):
        torch.fx.symbolic_trace(Subject("layer").layer)
    with pytest.raises(RuntimeError, match=NEIGHBOURS):
        net.to("meta")(Z.to("meta"), POS.to("meta"))


@pytest.mark.slow
def test_a_network_that_is_built_on_the_meta_device_spoils_no_other():
    """Tables of coefficients are shared by all networks."""
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        NBodyNet([1, 6], BondTree(3.1, 4.1, 5.1), channels=3, lmax=3)
    net = NBodyNet([1, 6], BondTree(3.1, 4.1, 5.1), channels=3, lmax=3).double()
    assert torch.isfinite(net(torch.tensor([6, 1, 1, 1, 1]), POS)).all()
    with FakeTensorMode():
        atomic_masses(torch.tensor([1]))
    assert type(atomic_masses(torch.tensor([1]))) is torch.Tensor


def test_a_topology_keeps_nothing_of_a_tracer():
    net = Subject("atoms").layer
    topology = net.scheme.topology(Z, POS)
    fresh = dataclasses.replace(topology)
    assert fresh.size(1) == topology.size(1)
    make_fx(lambda pos: net(Z, pos, topology=fresh), tracing_mode="symbolic", _allow_non_fake_inputs=True)(POS)
    torch.testing.assert_close(net(Z, POS, topology=fresh), net(Z, POS, topology=topology), rtol=0, atol=0)


def test_which_tensors_compiled_code_may_see():
    """Addresses are given of what is there, in the type, size and place that compiled code takes."""
    x = torch.arange(6.0).view(2, 3)
    assert operands.addresses([x, None], [6, 2], [torch.float32] * 2) == [x.data_ptr(), None]
    assert operands.addresses([x[:0]], [0], [torch.float32])[0] in (0, x.data_ptr())
    for wrong in (x.double(), x[:1], x.T, x[:1].expand(2, 3), x.int()):
        with pytest.raises(ValueError, match=r"take 6 numbers of torch.float32 on one device here, without gaps, got"):
            operands.addresses([wrong], [6], [torch.float32])
    with FakeTensorMode() as mode:
        none = [torch.empty(2, 3, device="meta"), mode.from_tensor(x)]
    for wrong in none:
        with pytest.raises(TypeError, match=r"need tensors with numbers in memory, got a .*set_backend\('torch'\)"):
            operands.addresses([wrong], [6], [torch.float32])

    def mapped(row):
        with pytest.raises(TypeError, match="numbers in memory"):
            operands.addresses([row], [3], [torch.float32])
        assert backend(row) == "torch" and not autograd_flags.has_values(row)
        return row

    torch.vmap(mapped)(x)
    assert (
        autograd_flags.has_values(x)
        and not autograd_flags.has_values(x.to("meta"))
        and not autograd_flags.is_transformed()
    )
