"""Properties: each readout against its formula, covariance, statistics, training, files."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from nbody_pyg import AtomicData, BondTree, NBodyNet, NestedShells, Potential
from nbody_pyg.deploy import NBodyCalculator, load_model, read_metadata, save_model
from nbody_pyg.hierarchy.positions import atomic_masses
from nbody_pyg.properties import Property, PropertyModel, Statistics, fit_statistics, property_irreps
from nbody_pyg.training import TrainingConfig, fit
from nbody_pyg.training.property_task import PropertyMeter, evaluate_properties

ALL = [
    Property("mu", "dipole_norm", "D"),
    Property("alpha", "extensive", "a0^3"),
    Property("tensor", "polarizability"),
    Property("gap", "intensive", "eV"),
    Property("dipole", "dipole", "e*angstrom"),
    Property("spread", "r2", "a0^2"),
]


def model_of(properties, scheme, **arguments) -> PropertyModel:
    irreps = str(property_irreps(properties))
    net = NBodyNet([1, 6, 7, 8, 9], scheme, channels=4, irreps_out=irreps, **arguments)
    return PropertyModel(net, properties).double().requires_grad_(False)


@pytest.fixture
def batch(molecules):
    frames = [Data(z=z, pos=pos) for z, pos in molecules.values()]
    return next(iter(DataLoader(frames, batch_size=len(frames))))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [NestedShells((3.0, 3.0)), BondTree()], ids=lambda s: type(s).__name__)
def test_readouts_are_covariant_and_batch(scheme, batch, molecules, rotation):
    model = model_of(ALL, scheme)
    out = model(batch)
    shapes = {"mu": (3,), "alpha": (3,), "tensor": (3, 3, 3), "gap": (3,), "dipole": (3, 3), "spread": (3,)}
    assert {name: tuple(value.shape) for name, value in out.items()} == shapes
    assert all(value.dtype == torch.float64 and float(value.abs().min()) > 1e-9 for value in out.values())
    turned = batch.clone()
    turned.pos = batch.pos @ rotation.T + torch.tensor([3.0, -2.0, 5.0])
    again = model(turned)
    expected = out | {"dipole": out["dipole"] @ rotation.T, "tensor": rotation @ out["tensor"] @ rotation.T}
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-10)
    torch.testing.assert_close(out["tensor"], out["tensor"].mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(out["mu"], out["mu"].abs(), rtol=0, atol=0)
    for number, (z, pos) in enumerate(molecules.values()):
        alone = model(Data(z=z, pos=pos))
        for name, value in out.items():
            torch.testing.assert_close(alone[name][0], value[number], rtol=0, atol=1e-11)


def test_readouts_are_their_formulas(molecules):
    """Against sums over atoms, from the values that the network itself gives every part."""
    z, pos = molecules["chiral"]
    model = model_of([Property("d", "dipole"), Property("s", "r2"), Property("g", "intensive")], NestedShells((3.0,)))
    data = Data(z=z, pos=pos)
    (value,) = model.model.values(model.model.hierarchy(data)).values()
    mass = atomic_masses(z, torch.float64)[:, None]
    arm = pos - (mass * pos).sum(0) / mass.sum()
    out = model(data)
    # Four scalars, in the order of the properties, then the vector
    expected = (value[:, :1] * arm + value[:, 4:]).sum(0)
    torch.testing.assert_close(out["d"][0], expected, rtol=0, atol=1e-12)
    expected = (value[:, 1] + value[:, 2] * arm.square().sum(1)).sum()
    torch.testing.assert_close(out["s"][0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out["g"][0], value[:, 3].mean(), rtol=0, atol=1e-12)


def test_statistics_are_added_in_float64_and_fitted_exactly(molecules):
    rng = np.random.default_rng(3)
    frames = []
    for _ in range(30):
        z = torch.from_numpy(rng.choice([1, 6, 8], size=rng.integers(3, 8)))
        pos = torch.from_numpy(rng.normal(size=(len(z), 3)) * 2)
        mass = atomic_masses(z, torch.float64)[:, None]
        square = (pos - (mass * pos).sum(0) / mass.sum()).square().sum(1)
        frame = AtomicData(z=z, pos=pos)
        frame.total = (z.double() * -300.0).sum().reshape(1)
        frame.r2 = (0.5 * z + 2.0 * z * square).sum().reshape(1)
        frame.gap = torch.tensor([5.0 + 0.1 * len(z)], dtype=torch.float64)
        frames.append(frame)
    total = fit_statistics(frames, Property("total"))
    assert total.elements == pytest.approx({1: -300.0, 6: -1800.0, 8: -2400.0}, abs=1e-7)
    spread = fit_statistics(frames, Property("r2", "r2"))
    assert spread.spread == pytest.approx({1: 2.0, 6: 12.0, 8: 16.0}, abs=1e-7)
    assert spread.elements == pytest.approx({1: 0.5, 6: 3.0, 8: 4.0}, abs=1e-5)
    gap = fit_statistics(frames, Property("gap", "intensive"))
    assert gap.mean == pytest.approx(np.mean([float(f.gap) for f in frames])) and gap.elements is None

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, z, pos, batch):
            return self.weight.expand(int(batch[-1]) + 1, 1)

    model = PropertyModel(Zero(), [Property("total")], {"total": total})  # float32, energies of thousands
    found = evaluate_properties(model, frames)
    assert found.errors["total_mae"] < 1e-7
    with pytest.raises(ValueError, match=r"z holds \[9\], which the training set did not have"):
        model(Data(z=torch.tensor([9]), pos=torch.zeros(1, 3)))


def test_meter_gives_mae_and_r2():
    label = torch.randn(50, 3, dtype=torch.float64)
    found = label + 0.1 * torch.randn(50, 3, dtype=torch.float64)
    meter = PropertyMeter([Property("dipole", "dipole")])
    for half in (slice(0, 20), slice(20, 50)):
        meter.update({"dipole": found[half]}, {"dipole": label[half]})
    errors = meter.compute()
    assert errors["dipole_mae"] == pytest.approx(float((found - label).abs().mean()))
    total = float((label - label.mean(0)).square().sum())
    assert errors["dipole_r2"] == pytest.approx(1 - float((found - label).square().sum()) / total)


def labelled(scheme, count=24):
    """Molecules whose dipole is that of charges by element: +0.2 e on H, a share of minus that on C."""
    rng, frames = np.random.default_rng(4), []
    for _ in range(count):
        z = torch.tensor([6, 1, 1, 1, 6][: rng.integers(4, 6)])
        pos = torch.from_numpy(rng.normal(size=(len(z), 3)) * 1.2)
        charge = torch.where(z == 1, 0.2, -0.6 / int((z == 6).sum())).double()
        frame = AtomicData(z=z, pos=pos, dipole=(charge[:, None] * pos).sum(0, keepdim=True))
        frame.gap = torch.tensor([float(len(z))], dtype=torch.float64)
        frames.append(scheme(frame))
    return frames


@pytest.mark.slow
def test_the_trainer_learns_vectors_and_scalars_at_once(tmp_path):
    scheme = NestedShells((4.0,))
    frames = labelled(scheme)
    wanted = [Property("dipole", "dipole", "e*angstrom"), Property("gap", "intensive", "eV", 0.5)]
    statistics = {p.name: fit_statistics(frames, p) for p in wanted}
    torch.manual_seed(0)
    net = NBodyNet([1, 6], scheme, channels=4, irreps_out=str(property_irreps(wanted)))
    model = PropertyModel(net, wanted, statistics)
    before = evaluate_properties(model, frames[:20]).errors
    settings = TrainingConfig(max_steps=150, batch_size=5, log_every=10, validate_every=30, warmup_steps=5)
    result = fit(model, frames[:20], frames[20:], settings, tmp_path, show_progress=False)
    errors = evaluate_properties(model, frames[:20]).errors
    assert errors["dipole_mae"] < 0.3 * before["dipole_mae"] and errors["dipole_r2"] > 0.8
    assert errors["gap_mae"] < 0.5 * before["gap_mae"]
    assert result.monitor == "dipole_mae" and result.best_step > 0
    assert result.best_score == pytest.approx(evaluate_properties(model, frames[20:]).errors["dipole_mae"], rel=0.5)
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "dipole_mae" in head and "gap_mae" in head
    # The file gives the same model back, and says that it is no potential
    save_model(model, tmp_path / "model.nbody", {"note": 1})
    again = load_model(tmp_path / "model.nbody")
    assert read_metadata(tmp_path / "model.nbody")["property"]["properties"][0]["unit"] == "e*angstrom"
    for name, value in model(frames[0]).items():
        assert again(frames[0])[name].equal(value)
    with pytest.raises(ValueError, match="potential must give energies and forces, got a PropertyModel"):
        NBodyCalculator(tmp_path / "model.nbody")


@pytest.mark.parametrize("readout", ["intensive", "extensive"])
def test_statistics_pass_over_missing_labels(readout):
    frames, wanted = labelled(NestedShells((4.0,)), 6), Property("gap", readout, "eV")
    whole = fit_statistics(frames[1:], wanted)
    frames[0].gap[:] = float("nan")
    assert fit_statistics(frames, wanted) == whole
    with pytest.raises(ValueError, match="must hold 'gap' for one molecule at least"):
        fit_statistics(frames[:1], wanted)


def test_batches_without_labels_of_a_property_are_stepped_through(tmp_path):
    scheme = NestedShells((4.0,))
    frames = labelled(scheme, 6)
    wanted = [Property("dipole", "dipole", "e*angstrom"), Property("gap", "intensive", "eV")]
    statistics = {p.name: fit_statistics(frames, p) for p in wanted}
    for frame in frames[:3]:
        frame.dipole[:] = float("nan")
    frames[0].gap[:] = float("nan")
    net = NBodyNet([1, 6], scheme, channels=4, irreps_out=str(property_irreps(wanted)))
    model = PropertyModel(net, wanted, statistics)
    settings = TrainingConfig(max_steps=12, batch_size=1, log_every=2, warmup_steps=2, dtype="float64")
    fit(model, frames, (), settings, tmp_path, show_progress=False)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [float(row["dipole_mae"]) for row in rows if row["dipole_mae"]]
    assert 0 < len(found) < len(rows) == 6 and 0 < min(found) <= max(found) < 1e3
    assert all(p.isfinite().all() for p in model.parameters())


def test_statistics_of_a_single_frame():
    (frame,) = labelled(NestedShells((4.0,)), 1)
    assert fit_statistics([frame], Property("gap", "intensive")) == Statistics(float(frame.gap), 1.0)


def test_the_root_reads_what_is_not_additive(molecules):
    wanted = [Property("homo", "root", "eV")]
    net = NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=4, readout="root").double()
    model = PropertyModel(net, wanted, {"homo": Statistics(-6.0, 0.5)})
    z, pos = molecules["ethanol"]
    (alone,) = model(Data(z=z, pos=pos))["homo"].tolist()
    assert alone == pytest.approx(-6.0 + 0.5 * float(net(z, pos).detach())) and alone != -6.0
    with pytest.raises(ValueError, match="readout 'root' needs a network with readout='root'"):
        PropertyModel(net, [Property("homo", "intensive")])


def test_mistakes_are_named(molecules):
    net = NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=4, irreps_out="0e + 1o")
    with pytest.raises(ValueError, match="readout of mu must be one of extensive, intensive"):
        Property("mu", "vector")
    with pytest.raises(ValueError, match="weight of mu must be positive"):
        Property("mu", weight=0)
    with pytest.raises(ValueError, match="properties must have names of their own"):
        PropertyModel(net, [Property("a", "dipole"), Property("a")])
    with pytest.raises(ValueError, match="model must have irreps_out='1x0e'"):
        PropertyModel(net, [Property("a")])
    with pytest.raises(ValueError, match="Linear gives one number per graph"):
        PropertyModel(nn.Linear(1, 1), [Property("a", "dipole")])
    z, pos = molecules["ethanol"]
    cell, pbc = 10 * torch.eye(3)[None], torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="a cell has no centre of mass"):
        PropertyModel(net, [Property("d", "dipole")])(Data(z=z, pos=pos, cell=cell, pbc=pbc))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        Potential("model")


@pytest.mark.slow
def test_vectors_and_tensors_of_several_properties_are_told_apart(molecules, rotation):
    """Two of each in one network: e3nn's order has one after the other, and every one turns as a whole."""
    torch.manual_seed(3)
    wanted = [Property("d1", "dipole"), Property("p1", "polarizability"), Property("d2", "dipole"), Property("e"),
              Property("p2", "polarizability"), Property("r", "r2")]  # fmt: skip
    assert str(property_irreps(wanted)) == "7x0e+2x1o+2x2e"
    z, pos = molecules["ethanol"]
    model = model_of(wanted, BondTree())
    out, turned = model(Data(z=z, pos=pos)), model(Data(z=z, pos=pos @ rotation.T))
    for name, value in out.items():
        expected = value
        if name[0] == "d":
            expected = value @ rotation.T
        if name[0] == "p":
            expected = rotation @ value @ rotation.T
        torch.testing.assert_close(turned[name], expected, rtol=0, atol=1e-10)
        assert float(value.norm()) > 1e-6
    assert float((out["d1"] - out["d2"]).norm()) > 1e-3 < float((out["p1"] - out["p2"]).norm())


def test_values_of_old_files_stay_what_they_were():
    """Numbers of version 0.1.0, whose networks gave their components in another order; the properties did not."""
    wanted = [
        Property("d1", "dipole"),
        Property("d2", "dipole"),
        Property("p1", "polarizability"),
        Property("p2", "polarizability"),
    ]
    model = model_of(wanted, NestedShells((3.0,)))
    for number, weight in enumerate(model.parameters()):
        place = torch.arange(weight.numel(), dtype=torch.float64).view_as(weight)
        weight.copy_(0.3 * torch.cos(0.7 * place + 0.3 * number))
    z = torch.tensor([6, 8, 1, 1, 1])
    pos = torch.tensor([[0.0, 0.1, 0.0], [1.1, -0.2, 0.3], [-0.5, 0.9, 0.2], [-0.4, -0.5, 0.8], [-0.3, -0.2, -1.0]])
    out = model(Data(z=z, pos=pos.double()))
    expected = {
        "d1": [-2.0319792126, 0.2880247444, -0.3499825729],
        "d2": [1.5039352335, -0.2175571711, 0.2633835759],
        "p1": [1.7437032106, -0.001038499, 0.0019530293],
        "p2": [0.0278644827, -0.0006503701, 0.0012294066],
    }
    for name, numbers in expected.items():
        found = out[name].flatten()[:3]
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["origin", "centre", "at one place"])
def test_dipoles_of_ions_are_about_the_centre_of_mass(molecules, case):
    """Labels about the origin of the coordinates follow the places of the ions and are refused."""
    generator = torch.Generator().manual_seed(0)
    z, pos = molecules["methanol"]
    mass = atomic_masses(z)
    frames = []
    for _ in range(8):
        where = pos + (
            5.0 if case == "at one place" else 5.0 * torch.randn(3, generator=generator, dtype=torch.float64)
        )
        dipole = 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)
        if case != "centre":
            dipole = dipole + 2.0 * (mass @ where) / mass.sum()
        frames.append(AtomicData(z=z, pos=where, charge=torch.tensor([2.0]), dipole=dipole[None]))
    wanted = Property("dipole", "dipole")
    if case == "origin":
        with pytest.raises(ValueError, match=r"dipole of ions must be about their centre of mass.* take that off"):
            fit_statistics(frames, wanted)
    else:
        assert fit_statistics(frames, wanted).scale > 0.1
