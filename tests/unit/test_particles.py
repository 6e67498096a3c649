"""Points that are no atoms: node inputs, values of nodes, softening, and the charged particles that are simulated."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from e3nn.nn import Gate
from torch import nn
from torch_geometric.data import Batch, Data

from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, SmoothSurvivors
from nbody_pyg.datasets import charged_particles
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.geometry import neighbour_list
from nbody_pyg.kernels import set_backend
from nbody_pyg.nn import NBodyConv, NBodyPooling, SoftNorm
from nbody_pyg.properties import Property, PropertyModel
from nbody_pyg.testing import rotate_features

PAIRS = FromAssignment(parts=list(itertools.combinations(range(5), 2)), cutoff=9.0, part_cutoffs=(None,))
TYPE = "0e + 1o"
SCHEMES = [NestedShells((9.0, 9.0)), PAIRS, SmoothSurvivors((1.0,), cutoffs=(9.0, 9.0))]
BY_NAME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)


def _net(scheme=SCHEMES[0], **options):
    torch.manual_seed(0)
    given = {"channels": 4, "lmax": 1, "correlation": 2} | {"readout": "nodes", "irreps_out": "1o", "node_inputs": TYPE}
    return NBodyNet(None, scheme, **(given | options)).double().requires_grad_(False)


@pytest.fixture(scope="module")
def frames():
    return charged_particles(3, seed=5, steps_before=200, steps_between=50)


@BY_NAME
def test_vectors_of_nodes_turn_with_positions_and_inputs(scheme, frames, rotation):
    net, data = _net(scheme), frames[0]
    out = net(data)
    assert out.shape == (5, 3) and float(out.norm(dim=1).min()) > 1e-3
    turned = copy.copy(data)
    turned.pos, turned.x = data.pos @ rotation.T + 2.0, rotate_features(data.x, "0e + 1o", rotation)
    torch.testing.assert_close(net(turned), out @ rotation.T, rtol=0, atol=1e-10)


@BY_NAME
def test_nodes_keep_their_order_and_graphs_their_own(scheme, frames):
    net = _net(scheme)
    alone = [net(frame) for frame in frames]
    torch.testing.assert_close(net(Batch.from_data_list(frames)), torch.cat(alone), rtol=0, atol=1e-12)
    stored = Batch.from_data_list([scheme(frame) for frame in frames])
    assert not stored.z.any()
    torch.testing.assert_close(net(stored), torch.cat(alone), rtol=0, atol=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = Data(pos=frames[0].pos[order], x=frames[0].x[order])
    torch.testing.assert_close(net(mixed), alone[0][order], rtol=0, atol=1e-10)
    torch.testing.assert_close(net(None, mixed.pos, x=mixed.x), net(mixed), rtol=0, atol=0)


@BY_NAME
def test_every_input_changes_every_node(scheme, frames):
    net, data = _net(scheme), frames[0]
    for column in range(4):
        x = data.x.clone()
        x[0, column] += 0.5
        assert float((net(None, data.pos, x=x) - net(data)).norm(dim=1).min()) > 1e-6


@pytest.mark.slow
def test_values_of_graphs_of_any_type_from_node_inputs(frames, rotation):
    data = frames[0]
    for options in ({"readout": "sum"}, {"readout": "root"}, {"preset": "strict"}, {"parity": "both"}):
        net = _net(**({"irreps_out": "0e + 1o"} | options))
        x = data.x[:, -net.node_inputs.dim :]
        out = net(None, data.pos, x=x)
        again = net(None, data.pos @ rotation.T, x=rotate_features(x, net.node_inputs, rotation))
        assert float(out.abs().min()) > 0
        scale = float(out.abs().max().clamp(min=1.0))
        torch.testing.assert_close(again, rotate_features(out, "0e + 1o", rotation), rtol=0, atol=1e-10 * scale)


def test_config_and_model_file_keep_inputs_and_softening(frames, tmp_path):
    net = _net(irreps_out="0e", readout="sum", softening=0.1)
    config = json.loads(json.dumps(net.config()))
    assert config["node_inputs"] == "1x0e+1x1o" and config["softening"] == 0.1 and config["species"] == [0]
    again = NBodyNet.from_config(config).double()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(frames[0]), net(frames[0]), rtol=0, atol=0)
    assert not {"node_inputs", "softening"} & set(_net(node_inputs=None, irreps_out="0e").config())
    model = PropertyModel(net, [Property("energy")])
    save_model(model, tmp_path / "p.nbody")
    found = load_model(tmp_path / "p.nbody")(Batch.from_data_list(frames))["energy"]
    torch.testing.assert_close(found, model(Batch.from_data_list(frames))["energy"], rtol=0, atol=0)


def test_softening_is_the_same_on_every_backend_and_changes_near_points(frames):
    data = Data(pos=0.1 * frames[0].pos, x=frames[0].x)
    near, usual = _net(softening=0.05), _net()
    near.load_state_dict(usual.state_dict())
    out = near(data)
    assert float((out - usual(data)).abs().max()) > 1e-3
    try:
        set_backend("torch")
        torch.testing.assert_close(near(data), out, rtol=0, atol=1e-10)
    finally:
        set_backend("auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node_inputs": "1e", "parity": "natural", "lmax": 0, "irreps_out": "0e"}, "must have fragments that change"),
        ({"node_inputs": "1o", "parity": "ignored", "irreps_out": "1e"}, "all are written even"),
        ({"node_inputs": "0x0e"}, "at least one component"),
        ({"softening": 0.0}, "softening must be a positive"),
        ({"scheme": BondTree()}, "scheme must not need elements"),
        ({"scheme": PAIRS, "sweeps": "up"}, "way down to the atoms"),
        ({"scheme": FromAssignment(parts=[[0, 1, 2, 3, 4]], cutoff=None)}, "way down to the atoms"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _net(**options)


def test_inputs_that_do_not_fit_are_refused(frames):
    data, net = frames[0], _net()
    for x in (None, data.x[:, :3], data.x.long()):
        with pytest.raises(ValueError, match=r"x must be a floating tensor \[5, 4\], the node inputs 1x0e\+1x1o"):
            net(None, data.pos, x=x)
    for odd in (float("nan"), float("inf")):
        x = data.x.clone()
        x[3, 1] = odd
        with pytest.raises(ValueError, match=r"x must be finite, but atom\(s\) \[3\] have NaN or infinite node inputs"):
            net(None, data.pos, x=x)
    with pytest.raises(ValueError, match="the network has no node_inputs"):
        _net(node_inputs=None, irreps_out="0e")(None, data.pos, x=data.x)
    with pytest.raises(ValueError, match="got 'nodes'"):
        PropertyModel(_net(irreps_out="0e"), [Property("energy")])
    with pytest.raises(ValueError, match="one energy per graph"):
        Potential(_net(irreps_out="0e"), repulsion=None)(data)
    assert Potential(_net(irreps_out="0e", readout="sum", preset="practical")).repulsion is None
    with pytest.raises(ValueError, match="data must hold 'z'"):
        NBodyNet([1, 6])(Data(pos=data.pos))


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [1, 2, 3])
def test_states_keep_their_size_in_a_stack_of_layers(correlation):
    torch.manual_seed(0)
    pos, x = 1.5 * torch.randn(30, 3), torch.randn(30, 64)
    edges, _ = neighbour_list(pos, 5.0)
    with torch.no_grad():
        for _ in range(6):
            x = NBodyConv("16x0e + 16x1o", "16x0e + 16x1o", correlation=correlation)(x, edges, pos)
            # Without products there is nothing to bound
            assert 0.1 < float(x.std()) < (20.0 if correlation == 1 else 10.0)


@pytest.mark.slow
def test_a_stack_with_the_gate_of_e3nn_is_covariant(rotation):
    torch.manual_seed(0)
    gate = Gate("8x0e", [torch.nn.functional.silu], "8x0e", [torch.sigmoid], "8x1o")
    layers = nn.ModuleList([NBodyConv("1x0e + 1x1o", gate.irreps_in, 3.0, softening=0.1), gate, SoftNorm()])
    layers.append(NBodyConv(gate.irreps_out, "1x1o", 3.0, correlation=2, softening=0.1))
    layers.double().requires_grad_(False)
    pos, x = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    edges, _ = neighbour_list(pos, 3.0)

    def run(x, pos):
        for layer in layers:
            x = layer(x, edges, pos) if isinstance(layer, NBodyConv) else layer(x)
        return x

    out = run(x, pos)
    assert float(out.norm(dim=1).min()) > 1e-3
    again = run(rotate_features(x, "0e + 1o", rotation), pos @ rotation.T)
    torch.testing.assert_close(again, out @ rotation.T, rtol=0, atol=1e-10)


def test_points_without_numbers_are_pooled():
    torch.manual_seed(0)
    pos, x = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    edges, _ = neighbour_list(pos, 3.0)
    pool = NBodyPooling(SmoothSurvivors((2.0,), cutoffs=(3.0, 3.0), width=0.1), "2x0e", "2x0e + 1x1o").double()
    found, known = pool(x, edges, pos=pos), pool(x, edges, z=torch.zeros(8, dtype=torch.long), pos=pos)
    assert 1 < found.x.shape[0] < 8 and float(found.x.detach().abs().max()) > 0
    torch.testing.assert_close(found.x, known.x, rtol=0, atol=0)
    torch.testing.assert_close(pool(x, edges, z=Data(pos=pos)).x, known.x, rtol=0, atol=0)


def test_particles_follow_their_equations():
    """Against a plain loop over pairs; momentum is conserved; a system does not depend on the others."""
    steps = {"steps_before": 30, "steps_between": 20}
    (first, second), longer = charged_particles(2, seed=7, **steps), charged_particles(3, seed=7, **steps)
    assert torch.equal(second.pos, longer[1].pos) and torch.equal(second.y, longer[1].y)
    assert set(first.x[:, 0].abs().tolist()) == {1.0} and not torch.equal(first.pos, second.pos)
    assert not torch.equal(charged_particles(1, seed=8, **steps)[0].pos, first.pos)
    q, r, v = first.x[:, 0].numpy(), first.pos.numpy().copy(), first.x[:, 1:].numpy().copy()
    for _ in range(20):
        force = np.zeros_like(r)
        for i, j in itertools.permutations(range(5), 2):
            force[i] += q[i] * q[j] * (r[i] - r[j]) / np.linalg.norm(r[i] - r[j]) ** 3
        v += 0.001 * force
        r += 0.001 * v
    np.testing.assert_allclose(first.y.numpy(), r, rtol=0, atol=1e-12)
    step = charged_particles(1, seed=7, steps_before=50, steps_between=1)[0]
    torch.testing.assert_close(step.x[:, 1:].sum(0), first.x[:, 1:].sum(0), rtol=0, atol=1e-12)
    wide = charged_particles(1, seed=1, num_particles=20, num_clusters=4, **steps)[0]
    assert wide.pos.shape == (20, 3) and float(wide.pos.std()) > 2 * float(first.pos.std())
    with pytest.raises(ValueError, match="steps_before must not be negative, got -1"):
        charged_particles(1, seed=0, steps_before=-1)


@pytest.mark.slow
def test_networks_of_points_are_compiled_exported_and_differentiated_by_their_inputs(frames, request):
    if request.config.getoption("annotations"):
        pytest.skip("torch's tracers cannot look through the hook of --annotations")
    net, data = _net(NestedShells((9.0,))), frames[0]
    z = torch.zeros(5, dtype=torch.long)
    topology = net.scheme.topology(z, data.pos)
    wanted = net(z, data.pos, topology=topology, x=data.x)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pos, x):
            return self.net(z, pos, topology=topology, x=x)

    exported = torch.export.export(Alone(), (data.pos, data.x)).module()
    torch.testing.assert_close(exported(data.pos, data.x), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.compile(net)(data), wanted, rtol=0, atol=1e-12)
    slopes = torch.func.jacrev(lambda x: net(z, data.pos, topology=topology, x=x))(data.x)
    assert slopes.shape == (5, 3, 5, 4) and float(slopes.abs().amax((0, 1)).min()) > 1e-6
