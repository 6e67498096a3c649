"""torch_geometric.explain on our networks and on networks with our layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import global_add_pool

from nbody_pyg import BondTree, NBodyNet, NestedShells, SmoothSurvivors
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.geometry import neighbour_list
from nbody_pyg.nn import NBodyConv

SETTINGS = {
    "explanation_type": "model",
    "node_mask_type": "object",
    "edge_mask_type": "object",
    "model_config": {"mode": "regression", "task_level": "graph", "return_type": "raw"},
}


class SmallNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = NBodyConv("10x0e", "4x0e + 4x1o"), NBodyConv("4x0e + 4x1o", "1x0e")

    def forward(self, x, edge_index, pos, batch):
        x = self.first(x, edge_index, pos)
        return global_add_pool(self.second(x, edge_index, pos), batch)


def test_a_network_of_our_convolutions_is_explained(molecules):
    torch.manual_seed(0)
    z, pos = molecules["ethanol"]
    x = nn.functional.one_hot(z, 10).double()
    edges, _ = neighbour_list(pos, 5.0)
    explainer = Explainer(SmallNetwork().double(), GNNExplainer(epochs=20, lr=0.1), **SETTINGS)
    found = explainer(x, edges, pos=pos, batch=torch.zeros_like(z))
    assert found.node_mask.shape == (9, 1) and found.edge_mask.shape == (edges.shape[1],)
    assert bool((found.node_mask > 0).all()) and bool((found.edge_mask > 0).all())
    assert float(found.edge_mask.std()) > 1e-3 and float(found.node_mask.std()) > 1e-3


SURVIVORS = SmoothSurvivors((2.0, 3.5), cutoffs=(3.2, 5.0, 8.0))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [NestedShells((4.0, 4.0)), BondTree(), SURVIVORS], ids=lambda s: type(s).__name__)
def test_every_part_and_membership_of_a_hierarchy_is_explained(scheme, molecules):
    torch.manual_seed(1)
    z, pos = molecules["ethanol"]
    data = scheme(Data(z=z, pos=pos))
    model = NBodyNet([1, 6, 8], scheme, channels=4).double()
    net = ExplainableNet(model)
    x, edges = net.graph(data)
    levels = net.parts(data)
    assert x.shape == (len(levels), 1) and int(levels[-1]) == len(scheme.levels) - 1
    torch.testing.assert_close(net(x, edges, data).flatten(), model(data), rtol=0, atol=1e-12)
    found = Explainer(net, GNNExplainer(epochs=15, lr=0.1), **SETTINGS)(x, edges, data=data)
    # The root is read by no extensive network; every other part counts, and so does every way to it
    below = levels < levels[-1]
    assert bool((found.node_mask[below] > 0).all())
    used = levels[edges[1]] < levels[-1]
    assert bool((found.edge_mask[used] > 0).all()) and not bool(found.edge_mask[~used].any())
    assert float(found.edge_mask[used].std()) > 1e-3
    # The masks are taken off again
    torch.testing.assert_close(net(x, edges, data).flatten(), model(data), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", ["nothing", "atoms", "memberships"])
def test_masks_act_on_the_way_up_to_survivors(masked, molecules):
    """Survivors that no atom reaches know nothing of the elements."""
    torch.manual_seed(2)
    z, pos = molecules["ethanol"]
    data = SURVIVORS(Data(z=z, pos=pos))
    model = NBodyNet([1, 6, 8], SURVIVORS, channels=4).double()
    net, hierarchy = ExplainableNet(model), model.hierarchy(data)
    x, edges = net.graph(data)
    levels = net.parts(data)
    if masked == "atoms":
        x[levels == 0] = 0.0
    elif masked == "memberships":  # as an explainer sets them
        membership = net.memberships["child_1"]
        mask = (levels[edges[0]] == levels[edges[1]]).double()
        membership.explain, membership._edge_mask, membership._apply_sigmoid = True, mask, False
    model.total = lambda changed: torch.cat([value for k, value in model.values(changed).items() if k > 0])
    found = []
    for elements in (z, z.flip(0)):  # the weights of survivors stay those of the molecule
        model.hierarchy = lambda _, z=elements: dataclasses.replace(
            hierarchy, system=hierarchy.system.replace(z=z, species=None)
        )
        found.append(net(x, edges, data))
    difference = (found[0] - found[1]).abs().max()
    assert found[0].abs().max() > 1e-3 and (difference > 1e-3 if masked == "nothing" else difference < 1e-12)


@pytest.mark.parametrize("scheme", [NestedShells((4.0,)), BondTree()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("masked", ["nothing", "atoms", "memberships"])
def test_masks_act_where_an_inner_cutoff_limits_vectors(scheme, masked, molecules):
    """Only the window is computed again: with a limit below all distances the values are the same."""
    z, pos = molecules["ethanol"]
    data = scheme(Data(z=z, pos=pos))
    values = []
    for length in (0.2, 1.5):
        torch.manual_seed(3)
        model = NBodyNet([1, 6, 8], scheme, channels=4, inner_cutoff={"C-H": length, "C-O": length}).double()
        net = ExplainableNet(model)
        x, edges = net.graph(data)
        levels, mask = net.parts(data), torch.ones(edges.shape[1], dtype=torch.float64)
        if masked == "atoms":
            x[levels == 0] = 0.0
        elif masked == "memberships":
            mask[levels[edges[0]] == 0] = 0.0
        for membership in net.memberships.values():  # as an explainer sets them
            membership.explain, membership._edge_mask, membership._apply_sigmoid = True, mask, False
        values.append(net(x, edges, data).flatten())
        if masked == "nothing":
            torch.testing.assert_close(values[-1], model(data), rtol=0, atol=1e-12)
    assert values[0].abs() > 1e-4 and ((values[0] - values[1]).abs() > 1e-4) == (masked == "nothing")
    if masked != "nothing":  # what the edges of the atoms bring is all that differs
        torch.testing.assert_close(*values, rtol=0, atol=1e-12)


def test_a_missing_part_takes_its_share_away(molecules):
    z, pos = molecules["methanol"]
    scheme = NestedShells((4.0, 4.0))
    model = NBodyNet([1, 6, 8], scheme, channels=4).double()
    net, data = ExplainableNet(model), scheme(Data(z=z, pos=pos))
    x, edges = net.graph(data)
    whole = net(x, edges, data)
    # A far atom counts for nothing else: taking it away is taking its own value
    far = Data(z=torch.cat([z, z[:1]]), pos=torch.cat([pos, pos[:1] + 100.0]))
    x, edges = net.graph(far)
    first = torch.cumsum(torch.tensor([0, 7, 7]), 0)
    x[first + 6] = 0.0
    torch.testing.assert_close(net(x, edges, far), whole, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="must be those of graph"):
        net(x[1:], edges, far)
    with pytest.raises(TypeError, match="model must be an NBodyNet"):
        ExplainableNet(nn.Linear(1, 1))
