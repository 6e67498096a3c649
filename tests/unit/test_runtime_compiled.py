"""compile_potential: the recorded program is the potential, for every size, and eager mode is always there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from comparison import assert_same_results
from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import NBodyCalculator
from nbody_pyg.kernels import autograd_flags
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.potential import parameter_gradients
from nbody_pyg.runtime.compiled import compile_potential
from nbody_pyg.training import TrainingConfig, fit


def network(scheme=None, **arguments) -> Potential:
    torch.manual_seed(2)
    net = NBodyNet([1, 6, 8], scheme or NestedShells((3.0, 3.0)), channels=4, lmax=1, **arguments)
    # Beyond the bonds: the repulsion is added outside of the program.
    repulsion = ZBLRepulsion([1, 6, 8], {"C-H": 1.4, "C-C": 1.8})
    return Potential(net, {1: -13.0, 6: -1030.0, 8: -2040.0}, 0.7, repulsion).double()


@pytest.fixture(scope="module")
def frames():
    return load_embedded("ethanol")[:6]


def batch_of(frames, scheme, count: int) -> Batch:
    return Batch.from_data_list([scheme(frame) for frame in frames[:count]])


SHELLS, TREE, PIECES = NestedShells((3.0, 3.0)), BondTree(3.0, 4.0, 5.0), ShellsAndPieces((3.0, 3.5), 5.0)
# The compiler takes half a minute for each
COMPILED = pytest.mark.parametrize("scheme", [SHELLS, PIECES], ids=["shells", "pieces"])


@pytest.mark.parametrize(
    ("scheme", "mode"),
    [
        (SHELLS, "training"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((SHELLS, "md"), (TREE, "training"), (PIECES, "md"), (PIECES, "training"))
        ),
    ],
    ids=["shells", "shells md", "tree", "pieces md", "pieces"],
)
def test_recorded_once_right_for_every_size(frames, mode, scheme):
    """Values and, in training, gradients of all parameters by the operators' own derivatives."""
    potential, training = network(scheme), mode == "training"
    compiled = compile_potential(potential, mode, backend="eager")
    parameters = list(potential.parameters())
    for count in (4, 5, 6):
        batch = batch_of(frames, potential.model.scheme, count)
        found, wanted = compiled(batch, create_graph=training), potential(batch, create_graph=training)
        assert wanted["forces"].abs().max() > 1e-3
        assert_same_results(found, wanted)
        if training:
            losses = [r["forces"].square().sum() + r["interaction_energy"].square().sum() for r in (found, wanted)]
            for a, b in zip(*(parameter_gradients(loss, parameters) for loss in losses), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert compiled.calls == compiled.compiled_calls == 3 and compiled.failure is None
    with torch.no_grad():
        parameters[0].mul_(1.5)
    assert_same_results(compiled(batch, create_graph=training), potential(batch, create_graph=training))


@pytest.mark.slow
def test_batches_of_another_kind_run_in_eager_mode(frames):
    """And nothing is left behind: neither settings of torch nor of the products."""
    before = {k: v for k, v in vars(torch._dynamo.config).items() if isinstance(v, (bool, int))}
    potential = network()
    compiled = compile_potential(potential, backend="eager")
    for count in (4, 1):
        batch = batch_of(frames, potential.model.scheme, count)
        assert_same_results(compiled(batch), potential(batch))
    assert compiled.calls == 2 and compiled.compiled_calls == 1
    assert set(compiled(batch, create_graph=True)) == {"energy", "forces", "interaction_energy"}
    assert compiled.compiled_calls == 1
    bad = batch.clone()
    bad.z[0] = 9
    with pytest.raises(ValueError, match="z must hold elements of this model"):
        compiled(bad)
    assert before == {k: v for k, v in vars(torch._dynamo.config).items() if isinstance(v, (bool, int))}
    assert not autograd_flags.is_recording() and not autograd_flags.is_tracing() and not autograd_flags.is_dry()


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "searched"])
def test_survivors_run_in_eager_mode_without_an_attempt(frames, stored):
    """Their weights have as many terms as differ from zero, which no program can follow."""
    potential = network(SmoothSurvivors((2.0, 3.5), cutoffs=(3.2, 5.0, 8.0)))
    compiled = compile_potential(potential, backend="eager")
    batch = batch_of(frames, potential.model.scheme if stored else lambda frame: frame, 4)
    for _ in range(2):  # a warning would be an error
        found, wanted = compiled(batch), potential(batch)
        assert wanted["forces"].abs().max() > 1e-3
        assert_same_results(found, wanted)
    assert compiled.failure is None and (compiled.calls, compiled.compiled_calls) == (2, 0)


@pytest.mark.slow
def test_stress_of_a_periodic_system():
    from ase.build import bulk

    atoms = bulk("C", "diamond", a=3.7, cubic=True)
    atoms.rattle(0.05, seed=1)
    results = []
    for compile in (False, True):
        calculator = NBodyCalculator(network(), skin=0.4, engine="torch")
        if compile:
            calculator._evaluate = compile_potential(calculator.potential, backend="eager")
        copy = atoms.copy()
        copy.calc = calculator
        results.append((copy.get_stress(), copy.get_forces(), copy.get_potential_energy()))
    assert calculator._evaluate.failure is None and calculator._evaluate.compiled_calls > 0
    for found, wanted in zip(*results, strict=True):
        assert np.abs(found - wanted).max() < 1e-9 < np.abs(wanted).max()


def test_a_wrong_program_is_noticed(frames, monkeypatch):
    """The comparison sees wrong forces, warns once, and gives the right ones."""
    potential = network()
    compiled = compile_potential(potential, backend="eager")
    batch = batch_of(frames, potential.model.scheme, 4)
    wrong = "nbody_pyg.runtime.compiled._Program.__call__"
    monkeypatch.setattr(wrong, lambda *_: potential(batch) | {"forces": 1.01 * potential(batch)["forces"]})
    with pytest.warns(RuntimeWarning, match=r"compiling the potential failed \(ArithmeticError: results differ"):
        assert_same_results(compiled(batch), potential(batch))
    assert_same_results(compiled(batch), potential(batch))  # a second warning would be an error
    assert compiled.compiled_calls == 0


def test_a_compiler_that_fails_is_no_disaster(frames, monkeypatch):
    potential = network()

    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("nbody_pyg.runtime.compiled._Program._trace", fail)
    compiled = compile_potential(potential)
    batch = batch_of(frames, potential.model.scheme, 4)
    with pytest.warns(RuntimeWarning, match="no compiler here"):
        assert_same_results(compiled(batch), potential(batch))


@pytest.mark.slow
def test_training_takes_the_same_steps(frames, tmp_path, monkeypatch):
    """training.compile: the same weights at the end, through the compiled program."""
    made = []

    def eagerly(potential, mode):
        made.append(compile_potential(potential, mode, backend="eager"))
        return made[-1]

    monkeypatch.setattr("nbody_pyg.training.task.compile_potential", eagerly)
    weights = []
    for compile in (False, True):
        potential = network()
        chosen = [potential.model.scheme(frame) for frame in frames]
        config = TrainingConfig(max_steps=2, batch_size=6, dtype="float64", optimizer="adam", compile=compile)
        fit(potential, chosen, [], config, tmp_path / str(compile))
        weights.append(torch.cat([p.detach().flatten() for p in potential.parameters()]))
    assert len(made) == 1 and made[0].compiled_calls == 2 and made[0].failure is None
    torch.testing.assert_close(*weights, rtol=0, atol=1e-8)
    assert (weights[0] - torch.cat([p.detach().flatten() for p in network().parameters()])).abs().max() > 1e-5


def test_errors(frames):
    with pytest.raises(ValueError, match="mode must be one of md, training, got 'fast'"):
        compile_potential(network(), "fast")
    with pytest.raises(TypeError, match="potential must hold an NBodyNet to be compiled, got a Linear"):
        compile_potential(Potential(torch.nn.Linear(1, 1)))
    potential = network()
    batch = batch_of(frames, potential.model.scheme, 4)
    batch.child_1[0, 0] = 999
    with pytest.raises(ValueError, match=r"child_index\[1\]\[0\] must lie between"):
        compile_potential(potential, backend="eager")(batch)


@pytest.mark.slow
def test_a_size_that_became_a_constant_is_noticed(frames, monkeypatch):
    """Tracing turns ``int(size)`` into a constant; run on another system, its kernels would write out of bounds."""
    potential = network()
    actual = Potential.evaluate

    def cut(self, system, **options):
        return actual(self, system.replace(pos=system.pos[: int(system.pos.shape[0])]), **options)

    monkeypatch.setattr(Potential, "evaluate", cut)
    with pytest.warns(RuntimeWarning, match=r"the size 36 of tensor 0 became a constant"):
        compile_potential(potential, backend="eager")(batch_of(frames, potential.model.scheme, 4))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["md", "training"])
@COMPILED
def test_with_the_real_compiler(frames, mode, scheme):
    potential, training = network(scheme).float(), mode == "training"
    compiled = compile_potential(potential, mode)
    for count in (4, 5, 6):
        batch = batch_of(frames, scheme, count)
        found, wanted = compiled(batch, create_graph=training), potential(batch, create_graph=training)
        torch.testing.assert_close(found["forces"], wanted["forces"], rtol=1e-4, atol=1e-5)
    assert compiled.failure is None and compiled.compiled_calls == 3
