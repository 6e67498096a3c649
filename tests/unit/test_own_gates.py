"""A gate of one's own in every step of every hierarchy: covariant, trained, saved, loaded, run."""

from __future__ import annotations

import sys

import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from e3nn import o3
from torch import nn

from comparison import assert_physics
from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator, load_model, save_model
from nbody_pyg.explain import ExplainableNet
from nbody_pyg.nn.edges import EdgeFeatures, sum_into
from nbody_pyg.nn.gates import OneBodyGate
from nbody_pyg.nn.linear import RowLinear
from nbody_pyg.runtime.compiled import compile_potential
from nbody_pyg.testing import (
    assert_equivariant,
    random_molecule,
)
from nbody_pyg.training import TrainingConfig, fit


class OverlapGate(nn.Module):
    """Sources act along their direction, as strongly as they overlap with all that acts on the same target."""

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, *, num_basis: int, avg_num_neighbors: float):
        super().__init__()
        channels, self.scale = irreps_in[0].mul, avg_num_neighbors**-0.5
        self.near = nn.Parameter(torch.randn(num_basis, channels) * num_basis**-0.5)
        self.radial = nn.Parameter(torch.randn(num_basis, channels) * num_basis**-0.5)
        self.mix = RowLinear(irreps_out, irreps_out)

    def forward(self, x: torch.Tensor, edges: EdgeFeatures) -> torch.Tensor:
        source, target = edges.index
        sent = x[source] * (edges.radial @ self.near).unsqueeze(1) * self.scale
        total = sum_into(sent, target, edges.num_targets)
        overlap = (x[source] * total[target]).mean(dim=1)
        weight = overlap * (edges.radial @ self.radial) * self.scale
        return self.mix(sum_into(edges.harmonics.unsqueeze(2) * weight.unsqueeze(1), target, edges.num_targets))


class Flat(OverlapGate):
    """Returns scalars only, which torch would add to every component."""

    def forward(self, x: torch.Tensor, edges: EdgeFeatures) -> torch.Tensor:
        return super().forward(x, edges)[:, :1]


class Learned(OneBodyGate):
    """That of the library, called as a factory is."""

    def __init__(self, irreps_in, irreps_out, *, num_basis, avg_num_neighbors):
        super().__init__(irreps_in, irreps_out, irreps_out.lmax, num_basis, avg_num_neighbors, partial=True)


SCHEMES = {
    "shells": NestedShells((3.0, 4.0)),
    "bonds": BondTree(3.0),
    "pieces": ShellsAndPieces((3.0, 3.5), 6.0),
    "survivors": SmoothSurvivors(),
    "labels": FromAssignment(labels=[0, 0, 0, 1, 1, 1, 2, 2, 2], cutoff=3.0, part_cutoffs=(6.0,)),
}


def network(scheme="bonds", gate=OverlapGate, seed=0, preset="practical", **options) -> NBodyNet:
    torch.manual_seed(seed)
    options = {"channels": 4, "lmax": 1, "correlation": 2} | options
    return NBodyNet([1, 6, 8], SCHEMES[scheme], preset=preset, gate=gate, **options).double()


def potential(*arguments, **options) -> Potential:
    return Potential(network(*arguments, **options), {1: -1.0, 6: -2.0, 8: -3.0}, scale=0.1).double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_has_the_gate(scheme, ethanol):
    net = network(scheme)
    gates = [layer if isinstance(layer, OverlapGate) else layer.gate for layer in net.interactions]
    assert len(gates) == len(net.steps) >= 2 and all(isinstance(gate, OverlapGate) for gate in gates)
    calls = []
    for gate in gates:
        gate.register_forward_hook(lambda gate, _, out: calls.append((gate, float(out.detach().abs().max()))))
    net(ethanol)
    assert [id(gate) for gate, _ in calls] == [id(gate) for gate in gates]
    assert sum(size > 1e-9 for _, size in calls) >= 2  # some levels of a small molecule have no edges


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
def test_physics(scheme):
    assert_physics(potential(scheme))


@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
def test_every_level_is_covariant(scheme):
    net = network(scheme, lmax=2)
    system = random_molecule(9, net.species)
    types = [irreps for irreps, _ in net.representations(AtomicData(z=system.z, pos=system.pos))]

    def levels(z, pos, batch):
        return [x for _, x in net.representations(AtomicData(z=z, pos=pos))]

    assert assert_equivariant(levels, irreps_out=types, systems=[system]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["shells", "bonds", "survivors"])
def test_train_save_load_and_run(scheme, molecules, tmp_path):
    z, pos = molecules["ethanol"]
    atoms, frames = Atoms(z.numpy(), pos.numpy()), []
    for seed in range(6):
        moved = atoms.copy()
        moved.rattle(0.03, seed=seed)
        frames.append(AtomicData.from_ase(moved))
        frames[-1].energy = torch.tensor([-20.0 + 0.1 * seed], dtype=torch.float64)
        frames[-1].forces = torch.full((len(atoms), 3), 0.01 * seed, dtype=torch.float64)
    model = potential(scheme)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = TrainingConfig(max_steps=4, batch_size=2, dtype="float64")
    fit(model, frames[:4], frames[4:], settings, tmp_path / "run", show_progress=False)
    changed = [n for n, w in model.named_parameters() if not torch.equal(w, before[n])]
    assert sum(".near" in name for name in changed) >= 2 and "model.elements" in changed
    save_model(model, tmp_path / "own.nbody")
    loaded = load_model(tmp_path / "own.nbody")
    wanted, found = model(frames[0]), loaded(frames[0])
    assert all(torch.equal(wanted[key], found[key]) for key in wanted) and wanted["forces"].abs().max() > 1e-6
    atoms.calc = NBodyCalculator(loaded)
    start = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.2 * units.fs).run(10)
    assert abs(atoms.get_total_energy() - start) < 1e-3 and abs(atoms.get_kinetic_energy()) > 0


def test_a_file_imports_nothing(ethanol, tmp_path, monkeypatch):
    module = type(sys)("somebodys_gates")
    own = type("Own", (OverlapGate,), {"__module__": "somebodys_gates", "__qualname__": "Own"})
    module.Own = own
    monkeypatch.setitem(sys.modules, "somebodys_gates", module)
    save_model(potential(gate={"pair": own}), tmp_path / "own.nbody")
    assert load_model(tmp_path / "own.nbody").model.gates == {"pair": own}
    monkeypatch.delitem(sys.modules, "somebodys_gates")
    with pytest.raises(ValueError, match="no module that was imported defines such a class; import "):
        load_model(tmp_path / "own.nbody")
    module.Own = print
    monkeypatch.setitem(sys.modules, "somebodys_gates", module)
    with pytest.raises(ValueError, match="is not known"):
        load_model(tmp_path / "own.nbody")
    with pytest.raises(ValueError, match="a class at the top of a module"):
        save_model(potential(gate=lambda *a, **k: OverlapGate(*a, **k)), tmp_path / "other.nbody")
    assert not (tmp_path / "other.nbody").exists()


def test_one_for_a_kind_of_step(ethanol):
    net = network(gate={"up": Learned, "down": OverlapGate})
    kinds = {step.kind: layer for step, layer in zip(net.steps, net.interactions, strict=True)}
    assert isinstance(kinds["up"].gate, Learned) and kinds["up"].density is None
    assert isinstance(kinds["down"], OverlapGate) and type(kinds["pair"].gate) is OneBodyGate
    assert kinds["pair"].density is not None and net(ethanol).abs().min() > 1e-6
    again = NBodyNet.from_config(net.config())
    assert again.gates == net.gates and list(again.state_dict()) == list(net.state_dict())


@pytest.mark.slow
def test_everything_else_works(ethanol):
    model = potential("bonds")
    compiled = compile_potential(model, backend="eager")
    torch.testing.assert_close(compiled(ethanol.z, ethanol.pos)["forces"], model(ethanol)["forces"], rtol=0, atol=1e-10)
    parts = model.model.energies(model.model.hierarchy(ethanol))
    torch.testing.assert_close(sum(e.sum() for e in parts.values()), model.model(ethanol)[0], rtol=0, atol=1e-10)
    explained = ExplainableNet(model.model).double()
    x, edge_index = explained.graph(ethanol)
    torch.testing.assert_close(explained(x, edge_index, data=ethanol)[0], model.model(ethanol), rtol=0, atol=1e-10)
    strict = network("shells", preset="strict")
    assert strict(ethanol).abs() > 1e-8


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (3, TypeError, "gate must be a class of gates"),
        (nn.Identity(), TypeError, "not one gate"),
        ({"sideways": OverlapGate}, ValueError, "some of \\('pair', 'up', 'down'\\)"),
        ({}, ValueError, "gate must be a class of gates"),
        ("os:system", ValueError, "is not known"),
        ("nowhere", ValueError, "is not known"),
    ],
)
def test_wrong_gates(gate, error, message):
    with pytest.raises(error, match=message):
        network(gate=gate)


@pytest.mark.parametrize("kind", ["pair", "up", "down"])
def test_a_result_that_torch_would_broadcast_is_refused(kind, ethanol):
    with pytest.raises(ValueError, match=r"Flat must return states of shape \[\d+, 4, 4\]"):
        network(gate={kind: Flat})(ethanol)
