"""P6-P8: the strict preset against a slow, literal evaluation of its definition.

Only weights, couplings' names and integers of the topology are read from the library. Positions of parts,
windows,
softened inverse powers, tensor products with e3nn's Wigner 3j, sums over children, pairs and species are
written out
here in loops. A state is a dict from irrep to the matrix F_l [2l+1, channels].
"""

from __future__ import annotations

import math

import pytest
import torch
from ase.data import atomic_masses
from e3nn import o3

from nbody_pyg import BondTree, NBodyNet, NestedShells
from nbody_pyg.kernels import available_backends, set_backend

SOFT = 0.5  # angstrom, stated in the documentation of the softened distance
_TABLES: dict = {}


@pytest.fixture(params=available_backends())
def backend(request):
    set_backend(request.param)
    yield request.param
    set_backend("auto")


def couple(x, y, l1, l2, l3):
    """CG decomposition of the tensor product of two fragments, channel by channel."""
    if (l1, l2, l3) not in _TABLES:
        _TABLES[l1, l2, l3] = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1)
    return torch.einsum("ac,bc,abm->mc", x, y, _TABLES[l1, l2, l3])


def window(r, cutoff, exponent=6):
    x = r / cutoff
    value = {3: 1 - 10 * x**3 + 15 * x**4 - 6 * x**5, 6: 1 - 28 * x**6 + 48 * x**7 - 21 * x**8}[exponent]
    return value if r < cutoff else torch.zeros_like(r)


def add(*states):
    total: dict = {}
    for state in states:
        for ir, value in state.items():
            total[ir] = total[ir] + value if ir in total else value
    return total


class Edge:
    """One child and its parent, or one ordered pair."""

    def __init__(self, source: int, target: int, vec: torch.Tensor, weight: torch.Tensor, lmax: int, powers: int):
        rho = (vec.square().sum() + SOFT**2).sqrt()
        self.source, self.target = source, target
        self.y = [
            o3.spherical_harmonics(l, vec / rho, normalize=False, normalization="component")[:, None]
            for l in range(lmax + 1)
        ]
        # r^-s for s = 0 .. S, times the window of the hierarchy
        self.radial = [weight * rho**-s for s in range(powers)]


class Literal:
    """The same function as a strict NBodyNet, from its definition."""

    def __init__(self, net: NBodyNet) -> None:
        self.net, self.channels = net, net.channels

    # ------------------------------------------------------------- positions, edges
    def positions(self, topology, z, pos):
        if isinstance(self.net.scheme, NestedShells):
            return [pos] * topology.num_levels
        members, out = [[i] for i in range(len(z))], [list(pos)]
        for k in range(1, topology.num_levels):
            child, parent = topology.child_index[k].tolist()
            up = [
                sorted(m for c, p in zip(child, parent, strict=True) if p == i for m in members[c])
                for i in range(max(parent) + 1)
            ]
            mass = [[float(atomic_masses[int(z[m])]) for m in part] for part in up]
            out.append(
                [
                    sum(w * pos[m] for w, m in zip(ws, part, strict=True)) / sum(ws)
                    for ws, part in zip(mass, up, strict=True)
                ]
            )
            members = up
        return out

    def edges(self, step, topology, centres):
        k, net = step.level, self.net
        upper = int(step.edges[-1])
        index = topology.pair_index[k] if step.kind == "pair" else topology.child_index[upper]
        found = []
        for a, b in index.T.tolist():
            if step.kind == "pair":
                vec, cutoff = centres[k][a] - centres[k][b], net.scheme.levels[k].pair_radius
                weight = window(vec.norm(), cutoff)
            else:
                vec, weight = centres[upper - 1][a] - centres[upper][b], torch.ones((), dtype=torch.float64)
                if isinstance(net.scheme, NestedShells):
                    weight = window(vec.norm(), net.scheme.radii[upper - 1], net.scheme.exponent)
                if step.kind == "down":
                    a, b, vec = b, a, -vec
            found.append(Edge(a, b, vec, weight, net.lmax, net.num_basis))
        return found

    # ------------------------------------------------------------- gates
    def density(self, gate, species, edges, target):
        """sum_j w_ij W^l_(z_j, s) r_ij^-s Y_l(r_ij)"""
        total: dict = {}
        for edge in edges:
            if edge.target != target:
                continue
            # A density of bare atoms has natural parity; other fragments get none of it
            natural = [ir for _, ir in gate.irreps_out if ir.p == (-1) ** ir.l or self.net.parity == "ignored"]
            for k, ir in enumerate(natural):
                table = gate.weights[k].view(gate.num_species, -1, self.channels)[int(species[edge.source])]
                weight = sum(r * table[s] for s, r in enumerate(edge.radial)) * gate.scale
                total = add(total, {ir: edge.y[ir.l] * weight})
        return total

    def one_body(self, gate, states, edges, target):
        """W^l sum_c CG(psi_c x Y(r_c)) r_c^-s"""
        weights = gate.radial_weight.view(-1, len(gate.paths), gate.channels)
        sums = {n: torch.zeros(p.ir.dim, self.channels, dtype=torch.float64) for n, p in enumerate(gate.paths)}
        for edge in edges:
            if edge.target != target:
                continue
            for n, path in enumerate(gate.paths):
                psi, l1 = states[edge.source][gate.irreps_in[path.first].ir], gate.irreps_in[path.first].ir.l
                product = couple(psi, edge.y[path.second].expand(-1, self.channels), l1, path.second, path.ir.l)
                radial = sum(r * weights[s, n] for s, r in enumerate(edge.radial)) * gate.scale
                sums[n] = sums[n] + product * radial
        return self.mix(gate.mix, gate.paths, sums)

    def product(self, layer, a, b):
        values = {}
        for n, path in enumerate(layer.paths):
            ir1, ir2 = layer.irreps1[path.first].ir, layer.irreps2[path.second].ir
            values[n] = couple(a[ir1], b[ir2], ir1.l, ir2.l, path.ir.l)
        return self.mix(layer.mix, layer.paths, values)

    def mix(self, mix, paths, values):
        """W^l over all paths and channels that give the degree l"""
        out, weights = {}, list(mix.weights)
        for _, ir in mix.irreps_out:
            parts = [values[n] for n, path in enumerate(paths) if path.ir == ir]
            zero = torch.zeros(ir.dim, mix.channels_out, dtype=torch.float64)
            out[ir] = torch.cat(parts, dim=1) @ weights.pop(0) if parts else zero
        return out

    def linear(self, layer, state):
        return {ir: state[ir] @ weight for (_, ir), weight in zip(layer.irreps_out, layer.weights, strict=True)}

    # ------------------------------------------------------------- the network
    def interaction(self, layer, step, states, targets, edges, species, count):
        net, out = self.net, []
        for i in range(count):
            a = {ir: torch.zeros(ir.dim, self.channels, dtype=torch.float64) for _, ir in net.irreps}
            if layer.density is not None:
                a = add(a, self.density(layer.density, species, edges, i))
            if layer.gate is not None:
                a = add(a, self.one_body(layer.gate, states, edges, i))
            if layer.self_linear is not None:
                a = add(a, self.linear(layer.self_linear, targets[i]))
            if layer.scale is not None:
                factors = layer.scale.weight[int(species[i])]
                a = {ir: a[ir] * factors[k] for k, (_, ir) in enumerate(net.irreps)}
            # W1 A + W2 CG(A A) + W3 CG(W2 CG(A A) A) + ...
            new, power = self.linear(layer.products.linear, a), a
            for product in layer.products.products:
                power = self.product(product, power, a)
                new = add(new, {ir: power[ir] for _, ir in layer.irreps_out})
            if layer.bias is not None:
                scalar = o3.Irrep("0e")
                new = {**new, scalar: new[scalar] + layer.bias[int(species[i])]}
            out.append(new)
        return out

    def __call__(self, z, pos):
        net = self.net
        topology = net.scheme.topology(z, pos)
        centres, species = self.positions(topology, z, pos), net.species_of[z]
        states: dict = {}
        for step, layer in zip(net.steps, net.interactions, strict=True):
            edges, k = self.edges(step, topology, centres), step.level
            source = states.get(net._source(step))
            if step.kind == "down":
                sent = [self.one_body(layer, source, edges, i) for i in range(topology.size(k))]
                states[k] = [add(old, new) for old, new in zip(states[k], sent, strict=True)]
                continue
            targets = states.get(k)
            if step.kind == "up" and net._centred(k):
                targets = states.get(k - 1)
            states[k] = self.interaction(layer, step, source, targets, edges, species, topology.size(k))
        energy = 0.0
        for name, readout in net.readouts.items():
            for state in states[int(name)]:
                energy = energy + (state[o3.Irrep("0e")] @ readout.linear.weights[0]).sum()
        return energy + net.shift[species].sum(), states


def _net(scheme, **options):
    torch.manual_seed(5)
    net = NBodyNet.strict([1, 6, 7, 8, 9], scheme=scheme, **({"channels": 2, "lmax": 1} | options)).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("bias", "shift")) or "scale" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # they start at zero or one
    return net


def _two_methanols(molecules):
    z, pos = molecules["methanol"]
    turned = pos[:, [1, 2, 0]] + torch.tensor([2.9, 1.8, 0.7], dtype=torch.float64)
    return torch.cat([z, z]), torch.cat([pos, turned])


@pytest.mark.parametrize(
    ("scheme", "options", "name"),
    [
        (NestedShells((2.5, 3.0)), {"lmax": 2}, "methanol"),
        pytest.param(NestedShells((3.0, 3.0, 2.0)), {"parity": "both"}, "chiral", marks=pytest.mark.slow),
        (NestedShells((3.0, 2.0)), {"parity": "ignored", "correlation": 2}, "methanol"),
        (BondTree(3.0), {"lmax": 2}, "methanol"),
        pytest.param(BondTree(2.5, 4.0, 5.0), {"parity": "both"}, "chiral", marks=pytest.mark.slow),
        (BondTree(2.0), {}, "two methanols"),  # pairs of pieces
        pytest.param(BondTree(3.0, None, None), {"correlation": 4, "sweeps": "up"}, "ethanol", marks=pytest.mark.slow),
    ],
    ids=["shells", "shells-full", "shells-ignored", "tree", "tree-full", "tree-pieces", "tree-up"],
)
def test_strict_network_is_its_definition(scheme, options, name, molecules, backend):
    z, pos = _two_methanols(molecules) if name == "two methanols" else molecules[name]
    net = _net(scheme, **options)
    with torch.no_grad():
        expected, states = Literal(net)(z, pos)
        hierarchy = net.hierarchy(z, pos)
        got = net.states(hierarchy)
        energy = net(z, pos)
    assert sorted(got) == sorted(states)
    for k, nodes in states.items():
        rows = torch.stack([torch.cat([node[ir] for _, ir in net._types[k]]) for node in nodes])
        scale = float(rows.abs().max())
        assert scale > 1e-3 and torch.isfinite(rows).all()
        assert torch.allclose(got[k], rows, rtol=0, atol=1e-10 * max(1.0, scale)), f"level {k}"
    assert abs(float(expected)) > 1e-3
    assert abs(float(energy - expected)) < 1e-10 * max(1.0, abs(float(expected)))


def test_the_literal_evaluation_notices_each_weight(molecules):
    """Not vacuous: perturbing any weight of the network moves its energy."""
    z, pos = _two_methanols(molecules)
    net = _net(BondTree(3.0))
    energy = net(z, pos).sum()
    gradients = torch.autograd.grad(energy, list(net.parameters()), allow_unused=True)
    dead = [name for (name, _), g in zip(net.named_parameters(), gradients, strict=True) if g is None or not g.any()]
    assert not dead
