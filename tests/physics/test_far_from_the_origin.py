"""Single precision: where a system lies costs no digits, because differences are taken before anything is rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule as ase_molecule
from torch import nn
from torch_geometric.data import Batch, Data

from nbody_pyg import BondTree, FromAssignment, NBodyNet, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import Committee, NBodyCalculator, relax, run_md
from nbody_pyg.geometry import rounded_positions
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.properties import Property, PropertyModel, property_irreps
from nbody_pyg.runtime.compiled import CompiledPotential
from nbody_pyg.runtime.cuda_graphs import CapturedPotential, CapturedStep

FAR = torch.tensor([1.0, 0.7, -0.3], dtype=torch.float64)
SCHEMES = {
    "shells": NestedShells((2.5, 3.5)),
    "tree": BondTree(3.0, 4.0, 5.0),
    "pieces": ShellsAndPieces((2.5, 3.5), 5.0),
    "labels": FromAssignment(labels=[i // 3 for i in range(9)], cutoff=3.0, part_cutoffs=(4.0,)),
    "survivors": SmoothSurvivors((1.8,), (2.5, 5.0)),
}


def potential(scheme=None, **options) -> Potential:
    torch.manual_seed(1)
    net = NBodyNet([1, 6, 8], scheme or NestedShells((3.5,)), channels=4, lmax=1, **options)
    if net.long_range is not None:
        with torch.no_grad():  # zero at the start
            net.long_range.local.normal_(std=0.1)
    # A reach far beyond bonds, so that the repulsion acts
    return Potential(net, {1: -1.0, 6: -2.0, 8: -3.0}, repulsion=ZBLRepulsion([1, 6, 8], {"C-H": 1.4, "C-C": 1.8}))


def close(found: dict, wanted: dict) -> None:
    """Equal to some units in the last place of float32."""
    assert set(wanted) - {"energy"} <= set(found) <= set(wanted)  # the sum of both parts is too large to compare
    for key, value in found.items():
        scale = max(1.0, float(wanted[key].abs().max()))
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=2e-6 * scale)
    assert wanted["interaction_energy"].abs().max() > 1e-3
    assert "forces" not in wanted or wanted["forces"].abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("name", SCHEMES)
def test_molecules(name, distance, molecules):
    z, pos = molecules["ethanol"]
    model = potential(SCHEMES[name])
    wanted = model(z, pos)
    assert wanted["forces"].dtype == wanted["interaction_energy"].dtype == torch.float32
    # A double of these positions, 1e-10 angstrom at the farthest, is all that may differ
    close(model(z, pos + distance * FAR), wanted)
    # As a part of a system that reaches from here to there
    both = model(torch.cat([z, z]), torch.cat([pos, pos + distance * FAR]), torch.tensor([0] * 9 + [1] * 9))
    close({"interaction_energy": both["interaction_energy"][1:], "forces": both["forces"][9:]}, wanted)
    hessian = model.hessian(z, pos + distance * FAR)
    torch.testing.assert_close(hessian, model.hessian(z, pos), rtol=0, atol=2e-3)
    assert hessian.dtype == torch.float32 and hessian.abs().max() > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shells", "tree"])
def test_two_molecules_of_one_graph_far_apart(name, molecules):
    """No centre helps here: both ends must keep their digits."""
    (z, pos), model = molecules["ethanol"], potential(SCHEMES[name])
    one = model(z, pos)
    two = model(torch.cat([z, z]), torch.cat([pos, pos + 1e6 * FAR]))
    close({"interaction_energy": two["interaction_energy"] / 2, "forces": two["forces"][9:]},
          {key: one[key] for key in ("interaction_energy", "forces")})  # fmt: skip


@pytest.mark.parametrize("name", ["shells", "tree", "survivors"])
@pytest.mark.parametrize("far", ["shifted", "unwrapped"])
def test_cells(name, far, molecules):
    z, pos = molecules["ethanol"]
    cell = torch.tensor([[[7.0, 0, 0], [0.6, 6.0, 0], [-0.4, 0.3, 6.5]]], dtype=torch.float64)
    model, pbc = potential(SCHEMES[name]), torch.ones(1, 3, dtype=torch.bool)
    wanted = model(z, pos, cell=cell, pbc=pbc, compute_stress=True)
    moved = pos + 1e6 * FAR
    if far == "unwrapped":  # as after a long run: every atom in another image
        steps = torch.arange(27).reshape(9, 3) % 7 - 3.0
        moved = pos + (1e5 * steps).double() @ cell[0]
    found = model(z, moved, cell=cell, pbc=pbc, compute_stress=True)
    close(found, wanted)
    assert wanted["stress"].abs().max() > 1e-4 and wanted["stress"].dtype == torch.float32


@pytest.mark.parametrize("method", ["direct", "hierarchy"])
def test_long_range(method, molecules):
    z, pos = molecules["ethanol"]
    model = potential(SCHEMES["tree"], long_range={"method": method, "elements": True})
    close(model(z, pos + 1e6 * FAR), model(z, pos))


def test_ewald_sums(molecules):
    pytest.importorskip("torchpme")
    z, pos = molecules["ethanol"]
    cell, pbc = 8.0 * torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.bool)
    model = potential(long_range={"method": "ewald", "elements": True})
    close(model(z, pos + 1e6 * FAR, cell=cell, pbc=pbc, compute_stress=True),
          model(z, pos, cell=cell, pbc=pbc, compute_stress=True))  # fmt: skip


def test_positions_in_single_precision(molecules):
    """On a grid that float32 holds far out too, nothing is rounded: the means of parts keep their digits."""
    z, pos = molecules["ethanol"]
    pos = (torch.round(pos * 256) / 256).float()
    for name in ("shells", "tree", "labels"):
        model = potential(SCHEMES[name])
        wanted = model(z, pos)
        far = pos + torch.tensor([4096.0, -1024.0, 2048.0])
        assert torch.equal(far.double() - pos.double(), torch.tensor([4096.0, -1024, 2048]).double().expand(9, 3))
        close(model(z, far), wanted)


class Pairs(nn.Module):
    """A model of somebody else: a small network of every distance within a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, z, pos, batch, cell=None):
        same = (batch[:, None] == batch) & ~torch.eye(len(z), dtype=torch.bool)
        i, j = same.nonzero().t()
        value = self.layers((pos[i] - pos[j]).norm(dim=1, keepdim=True)).squeeze(1)
        return value.new_zeros(int(batch[-1]) + 1).index_add(0, batch[i], value)


def test_models_of_others(molecules):
    """They subtract by themselves, and get positions from the mean of each graph."""
    z, pos = molecules["ethanol"]
    model = Potential(Pairs())
    batch = torch.tensor([0] * 9 + [1] * 9)
    both = torch.cat([pos, 0.97 * pos])
    wanted = model(torch.cat([z, z]), both, batch)
    close(model(torch.cat([z, z]), both + 1e6 * FAR, batch), wanted)
    apart = both + 1e6 * FAR * batch[:, None]
    close(model(torch.cat([z, z]), apart, batch), wanted)
    cell = 20.0 * torch.eye(3, dtype=torch.float64)[None]
    near, far = (
        model(z, p, cell=cell, pbc=torch.ones(1, 3, dtype=torch.bool), compute_stress=True)
        for p in (pos, pos + 1e6 * FAR)
    )
    close(far, near)
    # Without a cast nothing is moved: a model may look at where atoms are
    assert torch.equal(rounded_positions(pos, batch[:9], torch.float64), pos)


@pytest.mark.slow
def test_properties(molecules):
    z, pos = molecules["ethanol"]
    wanted = [Property("dipole", "dipole", "e*angstrom")]
    torch.manual_seed(0)
    net = NBodyNet([1, 6, 8], SCHEMES["tree"], channels=4, irreps_out=str(property_irreps(wanted)))
    model = PropertyModel(net, wanted)
    near, far = (model(AtomicData(z=z, pos=p))["dipole"] for p in (pos, pos + 1e6 * FAR))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-5)
    assert near.abs().max() > 1e-2


class Replayed:
    """Stands in for CUDA graphs."""

    device_type = "cpu"

    def capture(self, run, device):
        return run


@pytest.mark.parametrize("kind", ["captured", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compiled_and_captured(kind, molecules):
    z, pos = molecules["ethanol"]
    model = potential()
    captured = kind == "captured"
    call = CapturedPotential(model, recorder=Replayed()) if captured else CompiledPotential(model, backend="aot_eager")
    wanted = model(z, pos)
    for distance in (0.0, 0.0, 1e4, 1e6, 1e6):
        close(call(z, pos + distance * FAR), wanted)
    assert call.failure is None and (call.replays == 4 if captured else call.compiled_calls == 5)


def test_training(molecules):
    """Losses and gradients of weights, eager and captured."""
    z, pos = molecules["ethanol"]
    model = potential()
    step = CapturedStep(model, lambda found, labels: (found["forces"] - labels["forces"]).square().mean(),
                        recorder=Replayed())  # fmt: skip
    gradients = []
    for distance in (0.0, 0.0, 0.0, 1e6, 1e6):
        batch = Batch.from_data_list([AtomicData(z=z, pos=pos + distance * FAR)])
        for loss in (
            step(batch, {"forces": torch.zeros(9, 3)}),
            model(batch, create_graph=True)["forces"].square().mean(),
        ):
            model.zero_grad()
            loss.backward()
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.model.parameters()]
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert step.replays > 1 and gradients[0].abs().max() > 1e-2
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=3e-6 * float(gradients[0].abs().max()))


@pytest.mark.slow
def test_deployment():
    """The ASE calculator, a committee, a relaxation and a run."""
    torch.manual_seed(0)
    models = [potential(SCHEMES["tree"]), potential()]
    near, far = ase_molecule("CH3CH2OH"), ase_molecule("CH3CH2OH")
    far.positions += 1e5 * FAR.numpy()
    for make in (lambda: NBodyCalculator(models[0]), lambda: Committee(models)):
        for atoms in (near, far):
            atoms.calc = make()
        assert np.abs(far.get_forces() - near.get_forces()).max() < 2e-6 * np.abs(near.get_forces()).max() + 2e-6
        assert np.abs(near.get_forces()).max() > 0.1
        assert far.get_potential_energy() == pytest.approx(near.get_potential_energy(), abs=2e-5)
    frames = [AtomicData.from_ase(atoms, labels=False) for atoms in (near, far)]
    found = [relax(models[1], [frame], fmax=1e-3, max_steps=3) for frame in frames]
    torch.testing.assert_close(found[1].energy, found[0].energy, rtol=0, atol=1e-3)
    moved = [f.frames[0].pos - frame.pos for f, frame in zip(found, frames, strict=True)]
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-3)
    assert moved[0].abs().max() > 1e-2
    totals = []
    for atoms in (near, far):
        atoms.calc = NBodyCalculator(models[1])
        atoms.set_momenta(np.zeros((9, 3)) + 1e-3 * np.arange(27).reshape(9, 3))
        totals.append(run_md(atoms, 4, timestep=0.1, sample_every=1).total)
    assert np.abs(totals[0] - totals[1]).max() < 1e-3


def test_a_dataset_in_double_precision_stays_so(molecules):
    """Potential takes Data as it is: nothing on the way rounds positions."""
    z, pos = molecules["ethanol"]
    model = potential()
    data = Data(z=z, pos=pos + 1e6 * FAR)
    close(model(model.model.scheme(data)), model(z, pos))
    assert model.model.hierarchy(data)[0].pos.dtype == torch.float64
    assert model.model.hierarchy(data)[1].child_vec.dtype == torch.float32


@pytest.mark.parametrize("change", [{"forces": 1e-4}, {"interaction_energy": 1e-4}, {"forces": float("nan")}])
def test_the_comparison_rejects_a_difference(change, molecules):
    z, pos = molecules["ethanol"]
    wanted = {key: value.detach().clone() for key, value in potential()(z, pos).items()}
    close(wanted, wanted)
    with pytest.raises(AssertionError):
        close(wanted | {key: wanted[key] + by for key, by in change.items()}, wanted)
    with pytest.raises(AssertionError):
        close({key: value for key, value in wanted.items() if key not in change}, wanted)
    with pytest.raises(AssertionError):
        close(*[{key: torch.zeros_like(value) for key, value in wanted.items()}] * 2)
