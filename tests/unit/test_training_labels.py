"""Labels in training: missing ones and their weight, shapes, mixed periodicity, outliers, the choice of the best."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

from factories import Springs
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames
from nbody_pyg.energy import AtomicReference
from nbody_pyg.hierarchy import NestedShells
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import Potential
from nbody_pyg.properties import Property, PropertyModel
from nbody_pyg.training import FrameLoader, TrainingConfig, fit, force_variance
from nbody_pyg.training.config import parse_config
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.labels import aligned, label_shapes, targets, uniform
from nbody_pyg.training.prepare import DataSets, build_potential, load_data, output_scale
from nbody_pyg.training.property_task import PropertyTask, evaluate_properties
from nbody_pyg.training.task import PotentialTask

POTENTIAL = {"energy": (1,), "forces": ("N", 3), "stress": (1, 3, 3)}
COMMON = {"batch_size": 3, "log_every": 2, "validate_every": 6, "dtype": "float64", "max_steps": 6}


def frames(count: int = 12, atoms: int = 4) -> list[AtomicData]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        AtomicData(
            z=torch.tensor([8, 6, 1, 1][:atoms]), pos=random(atoms, 3), energy=random(1), forces=random(atoms, 3)
        )
        for _ in range(count)
    ]


def task(shares: dict[str, float] | None = None, **settings) -> PotentialTask:
    made = PotentialTask(Potential(Springs()), TrainingConfig(dtype="float64", max_steps=1, **settings), 0.7)
    made.shares = shares or {}
    return made


def gradient(made: PotentialTask, batches: list[Batch]) -> float:
    """Of the mean over the batches."""
    made.zero_grad()
    for batch in batches:
        (made.training_step(batch) / len(batches)).backward()
    return float(next(made.parameters()).grad)


# -- shapes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("energy", "forces"),
    [((), (4, 3)), ((1,), (12,)), ((1, 1), (4, 3, 1)), ((1, 1, 1), (1, 4, 3))],
)
def test_labels_of_any_usual_shape_train_alike(energy, forces):
    plain = frames(5)
    odd = [Data(z=f.z, pos=f.pos, energy=f.energy.reshape(energy), forces=f.forces.reshape(forces)) for f in plain]
    expected = gradient(task(), [Batch.from_data_list(plain)])
    assert gradient(task(), [FrameLoader(uniform(odd, POTENTIAL), 5).batch(range(5))]) == expected != 0
    found, right = (evaluate(Potential(Springs()), some).errors for some in (odd, plain))
    assert found == right and right["energy_mae"] > 100 and right["forces_mae"] > 100
    _, errors = task()._errors(
        Batch.from_data_list([Data(z=f.z, pos=f.pos, energy=f.energy.reshape(1, 1)) for f in plain]), True
    )
    assert errors["energy_error"].shape == (5,)


def test_labels_that_do_not_fit_are_refused():
    bad = frames(3)
    bad[1].forces = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"frame 1: forces must have shape \[4, 3\] for 4 atoms, got \[3, 4\]"):
        uniform(bad, POTENTIAL)
    bad[1].forces = torch.ones(4, 3, dtype=torch.float64)
    bad[2].energy = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"frame 2: energy must have shape \[1\]"):
        evaluate(Potential(Springs()), bad)
    with pytest.raises(ValueError, match=r"energy of a batch must have shape \[5\], got \[5, 5\]"):
        aligned(torch.ones(5, 5), torch.ones(5), "energy")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.bfloat16])
def test_whole_and_half_precision_labels(dtype):
    data = frames(3)
    for n, frame in enumerate(data):
        frame.energy = torch.tensor([2 + n], dtype=dtype)
        frame.forces = frame.forces.to(torch.float32)
    made = uniform(data, POTENTIAL)
    assert [float(f.energy) for f in made] == [2.0, 3.0, 4.0] and made[0].energy.dtype == torch.float64
    assert evaluate(Potential(Springs()), data).errors["energy_mae"] > 0


@pytest.mark.parametrize("shape", [(2, 3, 3), (6, 3), (2, 9), (18,), (2, 6), (2, 1, 3, 3)])
def test_the_stress_of_a_batch(shape):
    full = torch.arange(18, dtype=torch.float64).reshape(2, 3, 3)
    full = full + full.mT
    given = full.reshape(2, 9)[:, [0, 4, 8, 5, 2, 1]] if shape == (2, 6) else full.reshape(shape)
    assert torch.equal(aligned(given, torch.zeros(2, 3, 3), "stress"), full)


def test_frames_that_are_uniform_come_back_as_they_are():
    data = frames(4)
    assert uniform(data, POTENTIAL) is data
    named = Frames(data, name="x.xyz").select([3, 1])
    del named[1].forces
    made = uniform(named, POTENTIAL)
    assert isinstance(made, Frames) and made.numbers == (3, 1) and "forces" not in named[1]
    assert made[1].forces.isnan().all() and torch.equal(made[0].forces, data[3].forces)


# -- missing labels -----------------------------------------------------------------------------------------
def partly() -> list[AtomicData]:
    """A third of the frames without forces, a quarter without energies, one atom whose force is not known."""
    data = frames(12)
    for n in (0, 1, 2, 5):
        del data[n].forces
    for n in (1, 3, 4):
        data[n].energy = data[n].energy * math.nan
    data[7].forces[2] = math.nan
    return data


@pytest.mark.parametrize("penalty", ["mse", "huber"])
@pytest.mark.parametrize("order", [range(12), [3, 7, 0, 11, 5, 9, 1, 8, 2, 10, 6, 4]])
def test_missing_labels_do_not_change_the_weight_of_the_others(order, penalty):
    """The mean over the batches of an epoch is the mean over all labels that are known, however they are grouped."""
    settings = TrainingConfig(dtype="float64", max_steps=1, penalty=penalty)
    model = Potential(Springs())
    found = targets(model, partly(), (), settings)
    assert found.shares == {"forces": pytest.approx(31 / 48), "energy": 9 / 12}
    loader = FrameLoader(found.train, 12)
    whole = gradient(task(penalty=penalty), [loader.batch(range(12))])  # plain means over what is known
    parts = [loader.batch(list(order)[n : n + 3]) for n in range(0, 12, 3)]
    assert gradient(task(found.shares, penalty=penalty), parts) == pytest.approx(whole, rel=1e-12)
    assert abs(whole) > 0.1
    # Plain means of each batch would be another number: the test can fail
    assert abs(gradient(task(penalty=penalty), parts) - whole) > 1e-3


def test_missing_properties_do_not_change_the_weight_of_the_others():
    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

        def forward(self, z, pos, batch):
            return self.value * pos.new_zeros(int(batch.max()) + 1).index_add(0, batch, pos.square().sum(-1))

    data = frames(12)
    for n, frame in enumerate(data):
        if n not in (0, 1, 2, 7):
            frame.alpha = torch.tensor([0.5 * n], dtype=torch.float64)

    def make(shares):
        made = PropertyTask(PropertyModel(Count(), [Property("alpha")]), TrainingConfig(dtype="float64", max_steps=1))
        made.shares = shares
        return made

    model = PropertyModel(Count(), [Property("alpha")])
    found = targets(model, data, data[:1], TrainingConfig(max_steps=1))
    assert found.shares == {"alpha": 8 / 12}
    loader = FrameLoader(found.train, 12)
    whole = gradient(make({}), [loader.batch(range(12))])
    parts = [loader.batch(range(n, n + 3)) for n in range(0, 12, 3)]
    assert gradient(make(found.shares), parts) == pytest.approx(whole, rel=1e-12) != 0
    known = [frame for frame in data if "alpha" in frame]
    both, alone = (evaluate_properties(model, some).errors for some in (data, known))
    assert both == pytest.approx(alone, rel=1e-12) and both["alpha_mae"] > 0.1


def test_training_on_partly_labelled_frames(tmp_path, caplog):
    data = partly()
    data[2].energy = data[2].energy * math.nan  # nothing is known of frame 2
    result = fit(Potential(Springs()), data, data[6:], TrainingConfig(**COMMON), tmp_path, show_progress=False)
    assert result.monitor == "forces_mae" and result.best_step > 0
    assert "train: frames 1 and 2 (2 of 12) hold none of forces, energy; the loss leaves them out" in caplog.text
    stiffness = next(result.potential.parameters()).item()
    assert math.isfinite(stiffness) and abs(stiffness - 0.3) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("force", r"'forces' is in none of the 12 frames of train; did you mean force\?.*or set force_weight to 0"),
        ("forces_dft", r"did you mean forces_dft\?.*or set force_weight to 0"),
        (None, r"where it stands, it is NaN.*or set force_weight to 0"),
    ],
)
def test_a_target_that_no_frame_has_is_refused(tmp_path, key, message):
    data = frames(12)
    for frame in data:
        if key is None:
            frame.forces = frame.forces * math.nan
        else:
            frame[key] = frame.forces
            del frame.forces
    with pytest.raises(ValueError, match=message):
        fit(Potential(Springs()), data, (), TrainingConfig(**COMMON), tmp_path)
    settings = TrainingConfig(force_weight=0.0, **COMMON)
    assert fit(Potential(Springs()), data, data, settings, tmp_path, show_progress=False).monitor == "energy_mae"


def test_infinite_labels_are_refused_by_frame(tmp_path):
    data = frames(12)
    data[7].energy = data[7].energy * math.inf
    with pytest.raises(ValueError, match=r"energy must be finite, but frame 7 of x.xyz holds infinite values"):
        fit(Potential(Springs()), Frames(data, name="x.xyz"), (), TrainingConfig(**COMMON), tmp_path)


# -- validation ---------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "monitor"), [(("energy", "forces"), "forces_mae"), (("energy",), "energy_mae"), ((), None)]
)
def test_best_weights_are_chosen_by_the_labels_that_validation_has(tmp_path, labels, monitor):
    val = frames(3)
    for frame in val:
        for label in {"energy", "forces"} - set(labels):
            del frame[label]
    result = fit(Potential(Springs()), frames(), val, TrainingConfig(**COMMON), tmp_path, show_progress=False)
    assert (result.best_step > 0) is bool(labels) and (tmp_path / "best.ckpt").exists() is bool(labels)
    if labels:
        assert result.monitor == monitor and 0 < result.best_score < math.inf


# -- periodic and open systems ------------------------------------------------------------------------------
def mixed() -> list[AtomicData]:
    cell = torch.tensor([[[4.1, 0.0, 0.2], [0.3, 4.4, 0.0], [0.0, 0.4, 4.3]]], dtype=torch.float64)
    whole, slab = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
    data = frames(9)
    for n in (0, 4, 8):
        data[n].cell, data[n].pbc = cell * (1 + 0.02 * n), whole
        data[n].stress = 0.01 * (n + 1) * torch.eye(3, dtype=torch.float64).reshape(1, 3, 3)
    flat = cell.clone()
    flat[0, 2] = 0.0
    data[2].cell, data[2].pbc = flat, slab
    data[5].cell, data[5].pbc = cell, ~whole
    data[6] = AtomicData(z=torch.tensor([8]), pos=torch.zeros(1, 3, dtype=torch.float64), energy=data[6].energy)
    return data


def test_periodic_and_open_frames_in_one_batch():
    torch.manual_seed(0)
    scheme = NestedShells((3.0,))
    model = Potential(NBodyNet([1, 6, 8], scheme, channels=4), {1: -13.6, 6: -1030.5, 8: -2041.8}).double()
    data = [scheme(frame) for frame in mixed()]
    made = uniform(data, label_shapes(model))
    assert "cell" not in data[1] and "child_shift_1" in made[1] and made[1].stress.isnan().all()
    found = evaluate(model, data, batch_size=9)
    for n, frame in enumerate(data):
        alone = model(frame, compute_stress="stress" in frame)
        assert torch.allclose(found.energy[n], alone["energy"][0], rtol=0, atol=1e-9)
        assert torch.allclose(found.forces[n], alone["forces"], rtol=0, atol=1e-10)
        if "stress" in frame:
            assert torch.allclose(found.stress[n], alone["stress"][0], rtol=0, atol=1e-10)
            assert found.stress[n].abs().max() > 1e-6
    assert [bool(s.isnan().all()) for s in found.stress] == [n not in (0, 4, 8) for n in range(9)]
    assert found.errors["stress_mae"] > 0
    trained = PotentialTask(model, TrainingConfig(dtype="float64", max_steps=1, stress_weight=0.1), 1.0)
    trained.shares = targets(model, data, (), trained.settings).shares
    loader = FrameLoader(made, 3)
    for order in (range(9), [1, 3, 7], [6, 2]):  # the last two: nothing with a stress
        trained.zero_grad()
        loss = trained.training_step(loader.batch(order))
        loss.backward()
        gradients = [p.grad for p in trained.parameters() if p.grad is not None]
        assert loss.item() > 0 and all(bool(g.isfinite().all()) for g in gradients)


def test_a_hierarchy_on_some_of_the_frames_only_is_refused():
    data = frames(3)
    data[1] = NestedShells((3.0,))(data[1])
    with pytest.raises(ValueError, match="frame 0 lacks 'child_1', which other frames have"):
        uniform(data, POTENTIAL)


def test_single_atoms_give_e0_wherever_the_split_puts_them():
    def single(number, value):
        pos = torch.zeros(1, 3, dtype=torch.float64)
        return AtomicData(z=torch.tensor([number]), pos=pos, energy=torch.tensor([value], dtype=torch.float64))

    train = [*frames(6), single(1, -13.6)]
    data = DataSets(train, [frames(7)[6], single(6, -1030.5)], {"rest": [single(8, -2041.8), single(7, -1480.0)]})
    config = parse_config({"data": {"train": "x.xyz", "e0": "isolated"}, "training": {"max_steps": 1}})
    with pytest.warns(UserWarning, match="eV per atom are left"):  # the labels of these frames are random
        model = build_potential(config, data)
    assert model.reference.energies == {1: -13.6, 6: -1030.5, 8: -2041.8}


@pytest.mark.parametrize("key", ["units", "energy_key", "forces_key", "stress_key"])
def test_keys_and_units_of_data_that_have_their_own_are_refused(key):
    config = parse_config({"data": {"embedded": "ethanol", key: "eV"}, "training": {"max_steps": 1}})
    with pytest.raises(ValueError, match=rf"data.{key} is for files named by data.train, got 'eV'"):
        load_data(config.data)


# -- outliers -----------------------------------------------------------------------------------------------
def test_one_wild_force_does_not_set_the_scale():
    data = frames(20)
    expected = force_variance([*data[:13], *data[14:]])
    data[13].forces[2, 1] = 1e6
    with pytest.warns(UserWarning, match=r"taken without frame 13 of x.xyz, where they are far beyond"):
        assert force_variance(Frames(data, name="x.xyz")) == pytest.approx(expected, rel=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for frame in data:  # all of them large: the scale is what it is
            frame.forces = frame.forces.sign() * 1e3
        assert force_variance(data) == pytest.approx(1e6)
    np.testing.assert_allclose(force_variance(frames(20)), torch.cat([f.forces for f in frames(20)]).square().mean())


def test_without_forces_the_scale_is_the_spread_of_the_energies_per_atom():
    data = frames(400)
    reference = AtomicReference({8: -3.0, 6: 0.5, 1: 1.0})  # a molecule has -0.5 eV
    for frame in data:
        frame.energy = 4 * (0.3 + 0.02 * frame.energy) - 0.5
    with_forces = output_scale(data, reference)
    assert with_forces == pytest.approx(force_variance(data) ** 0.5, rel=1e-12)
    for frame in data[:200]:
        frame.forces = torch.zeros_like(frame.forces)
    for frame in data[200:]:
        del frame["forces"]
    assert 0.017 < output_scale(data, reference) < 0.023
    assert output_scale(data[200:], reference) == pytest.approx(output_scale(data, reference), rel=0.2)
    usual = output_scale(data, reference)
    data[7].energy = torch.tensor([1e5], dtype=torch.float64)  # one wild energy does not set it
    assert output_scale(data, reference) == pytest.approx(usual, rel=0.05)
    assert output_scale(data[:1], reference) == 1.0  # one frame has no spread
    assert output_scale(data[200:], None) == 1.0
