"""Twelve levels, and all that is done with levels by their number: "child_10" is not "child_0"."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch

from nbody_pyg import AtomicData, FromAssignment, NBodyNet, NestedShells, Potential, SmoothSurvivors
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.hierarchy import EdgeSet, Hierarchy
from nbody_pyg.models import Step, compute_avg_num_neighbors
from nbody_pyg.testing import assert_conservative, assert_equivariant, assert_extensive, random_molecule

#: One part less on each level: of twelve atoms the first two are one part, then the first three, and so on.
NESTED = [[max(atom - level, 0) for level in range(1, 11)] for atom in range(12)]

SCHEMES = {
    "shells": NestedShells(tuple(2.5 + 0.2 * number for number in range(12))),
    "assignment": FromAssignment(labels=NESTED, cutoff=3.0, part_cutoffs=tuple(3.0 + number for number in range(10))),
    "survivors": SmoothSurvivors(
        radii=tuple(2.0 * 1.3**number for number in range(10)), cutoffs=tuple(3.0 * 1.3**number for number in range(11))
    ),
}


def system() -> AtomicData:
    found = random_molecule(12, [1, 6, 8])
    return AtomicData(z=found.z, pos=found.pos)


def network(name: str) -> NBodyNet:
    torch.manual_seed(0)
    return NBodyNet([1, 6, 8], SCHEMES[name], channels=2, lmax=1, correlation=2, num_basis=4).double()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_twelve_levels(name, tmp_path):
    net, data = network(name), system()
    hierarchy = net.hierarchy(data)
    assert isinstance(hierarchy, Hierarchy) and len(list(hierarchy)) >= 12
    value = net(data)
    assert value.abs().min() > 1e-6
    states = net.states(hierarchy)
    assert set(states) >= set(range(1, 11)) and all(state.abs().max() > 1e-9 for state in states.values())
    parts = net.energies(hierarchy)
    torch.testing.assert_close(sum(part.sum() for part in parts.values()), value[0], rtol=0, atol=1e-10)

    stored = net.scheme(system())
    torch.testing.assert_close(net(stored), value, rtol=0, atol=1e-10)
    batch = Batch.from_data_list([stored, net.scheme(system()), stored])
    torch.testing.assert_close(net(batch), value.expand(3), rtol=0, atol=1e-10)
    again = batch.to_data_list()[1]
    assert torch.equal(again.child_10, stored.child_10) and again.child_10.shape[1] > 0

    found = compute_avg_num_neighbors(net.scheme, [stored])
    wanted = {str(step.edges) for step in net.steps}
    assert wanted <= set(found) and "child_10" in wanted
    options = {
        key: value for key, value in net.config().items() if key not in ("species", "scheme", "avg_num_neighbors")
    }
    other = NBodyNet([1, 6, 8], net.scheme, **options, avg_num_neighbors={"child_10": 7.0}).double()
    other.load_state_dict(net.state_dict())
    assert (other(data) - value).abs().max() > 1e-9

    explained = ExplainableNet(net)
    torch.testing.assert_close(explained(*explained.graph(data), data=data)[0], value, rtol=0, atol=1e-10)
    save_model(Potential(net, {1: -1.0, 6: -2.0, 8: -3.0}), tmp_path / "deep.nbody")
    loaded = load_model(tmp_path / "deep.nbody").model
    torch.testing.assert_close(loaded(data), value, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shells", "survivors"])
def test_physics(name):
    potential = Potential(network(name), {1: -1.0, 6: -2.0, 8: -3.0}).double()
    assert assert_equivariant(potential) < 1e-10
    assert_conservative(potential)
    assert_extensive(potential)


def test_edge_sets():
    scheme = SCHEMES["survivors"]
    assert scheme.edge_sets[EdgeSet("child", 10)] == scheme.lengths[9]
    assert set(scheme.edge_sets) == {EdgeSet("child", k) for k in range(1, 12)} | {
        EdgeSet("pair", k) for k in range(11)
    }
    assert Step("down", 3).edges == Step("up", 4).edges == EdgeSet("child", 4) and str(EdgeSet("child", 4)) == "child_4"
    assert not scheme.same_edges and not SCHEMES["shells"].same_edges


def test_shells_of_one_radius_share_their_edges():
    """As the scheme declares, whether or not their tensors are the same; masks are those of each shell."""
    scheme = NestedShells((3.0, 4.0, 3.0, 3.0))
    assert scheme.same_edges == {EdgeSet("child", k): EdgeSet("child", 1) for k in (3, 4)}
    torch.manual_seed(0)
    net, data = NBodyNet([1, 6, 8], scheme, channels=2, lmax=1, correlation=2, num_basis=4).double(), system()
    calls = []
    for name, embedding in net.embeddings.items():
        embedding.register_forward_hook(lambda *_, name=name: calls.append(name))
    value = net(data)
    assert value.abs() > 1e-6 and calls == ["child_1", "child_2"]
    torch.testing.assert_close(net(scheme(data)), value, rtol=0, atol=1e-12)
    explained = ExplainableNet(net)
    x, edges = explained.graph(data)
    calls.clear()
    torch.testing.assert_close(explained(x, edges, data=data)[0], value, rtol=0, atol=1e-10)
    assert calls == ["child_1", "child_2", "child_3", "child_4"]
    without = x.clone()
    without[2 * len(data.z)] = 0.5  # a part of the second shell, which sends to the third
    assert (explained(without, edges, data=data)[0] - value).abs() > 1e-9
