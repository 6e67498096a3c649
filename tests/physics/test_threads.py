"""Threads that evaluate, train, compile and load at once have the numbers of one thread alone."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.mep import NEB

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.deploy import Committee, NBodyCalculator, save_model
from nbody_pyg.io.model_file import load_potential
from nbody_pyg.kernels import autograd_flags
from nbody_pyg.kernels.opaque import opaque_products
from nbody_pyg.runtime.compiled import compile_potential


def ethanol(seed: int = 0):
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def potential_of(seed: int = 0) -> Potential:
    torch.manual_seed(seed)
    net = NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=4, lmax=1)
    return Potential(net, {1: -13.0, 6: -1030.0, 8: -2040.0}).double()


def tensors_of(atoms) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(atoms.numbers), torch.tensor(atoms.positions)


def step(potential: Potential, z: torch.Tensor, pos: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a loss on energies and forces."""
    potential.zero_grad()
    found = potential(z, pos, create_graph=True)
    (found["forces"].square().sum() + found["interaction_energy"].square().sum()).backward()
    return [p.grad.clone() for p in potential.parameters() if p.grad is not None]


def run_together(seconds: float, *workers: Callable[[], None]) -> list[int]:
    """Repeat every worker in a thread of its own for some time; how often each ran. What one raises is raised here."""
    end, counts, failures = time.monotonic() + seconds, [0] * len(workers), []
    start = threading.Barrier(len(workers))

    def repeat(number: int) -> None:
        try:
            start.wait(60)
            while counts[number] == 0 or (time.monotonic() < end and not failures):
                workers[number]()
                counts[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(n,)) for n in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return counts


def assert_same(found, wanted, what: str) -> None:
    """To the bit where the numbers come from the same operations in the same order."""
    assert len(found) == len(wanted) > 0, f"{what}: {len(found)} results instead of {len(wanted)}"
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b), f"{what} differ by {float((a - b).abs().max()):.1e}"
    assert max(float(b.abs().max()) for b in wanted) > 1e-3, f"{what} are zero"


def stress(seconds: float, evaluators: int, folder, backend: str = "aot_eager") -> list[int]:
    """Evaluate in some threads, train in one, compile in one, save and load in one."""
    shared, trained, atoms = potential_of(), potential_of(1), ethanol()
    z, pos = tensors_of(atoms)
    wanted = {k: v.clone() for k, v in shared(z, pos).items()}
    gradients = step(trained, z, pos)
    calculators = [NBodyCalculator(shared, skin=0.0, engine=engine) for engine in ("torch", "auto")]
    single = [calculator.get_forces(atoms.copy()).copy() for calculator in calculators]
    np.testing.assert_allclose(single[1], wanted["forces"].numpy(), rtol=0, atol=1e-10)
    assert np.array_equal(single[0], wanted["forces"].numpy())
    # Copied in the thread, not made there: torch's random numbers are one row for all threads, and loading a model
    # draws from them.
    unused = potential_of()

    def evaluate() -> None:
        assert_same(list(shared(z, pos).values()), list(wanted.values()), "results")

    def train() -> None:
        assert_same(step(trained, z, pos), gradients, "gradients")

    def compile() -> None:
        compiled = compile_potential(copy.deepcopy(unused), backend=backend)
        for name, value in compiled(z, pos).items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-10)
        assert compiled.failure is None and compiled.compiled_calls == 1

    def load() -> None:
        save_model(shared, folder / "model.nbody")
        assert_same(list(load_potential(folder / "model.nbody")(z, pos).values()), list(wanted.values()), "loaded")

    def calculate() -> None:
        for calculator, forces in zip(calculators, single, strict=True):
            own = atoms.copy()
            own.calc = calculator
            calculator.reset()  # it would answer from its memory, so fast that the others hardly get the interpreter
            assert np.array_equal(own.get_forces(), forces)

    counts = run_together(seconds, *[evaluate] * evaluators, train, compile, load, calculate)
    assert not autograd_flags.is_tracing() and not autograd_flags.is_dry() and not autograd_flags.is_recording()
    return counts


def test_evaluating_training_and_loading_at_once(tmp_path):
    """The compiler's part, which takes long, is :func:`test_a_thread_that_traces_changes_no_other`."""
    shared, trained = potential_of(), potential_of(1)
    z, pos = tensors_of(ethanol())
    wanted, gradients = {k: v.clone() for k, v in shared(z, pos).items()}, step(trained, z, pos)
    save_model(shared, tmp_path / "model.nbody")

    def evaluate() -> None:
        assert_same(list(shared(z, pos).values()), list(wanted.values()), "results")

    def load() -> None:
        found = load_potential(tmp_path / "model.nbody")(z, pos)
        assert_same(list(found.values()), list(wanted.values()), "loaded")

    def train() -> None:
        assert_same(step(trained, z, pos), gradients, "gradients")

    assert min(run_together(1.0, evaluate, evaluate, evaluate, train, load)) >= 2


@pytest.mark.slow
def test_eight_threads_for_a_minute(tmp_path):
    counts = stress(60.0, 8, tmp_path)
    assert min(counts[:8]) >= 20 and min(counts) >= 1, counts


def test_a_thread_that_traces_changes_no_other(tmp_path):
    """Nor one that fails while it traces: what it said of itself is gone with it."""
    shared, other = potential_of(), potential_of(1)
    z, pos = tensors_of(ethanol())
    wanted = {k: v.clone() for k, v in shared(z, pos).items()}
    inside, done = threading.Event(), threading.Event()

    def fail() -> None:
        with opaque_products(), autograd_flags.dry_run():
            assert autograd_flags.is_tracing() and autograd_flags.is_dry() and autograd_flags.is_recording()
            inside.set()
            done.wait(60)
            raise RuntimeError("on purpose")

    def trace() -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert not (autograd_flags.is_tracing() or autograd_flags.is_dry() or autograd_flags.is_recording())

    with ThreadPoolExecutor(1) as pool:
        tracing = pool.submit(trace)
        assert inside.wait(60)
        try:
            assert not (autograd_flags.is_tracing() or autograd_flags.is_dry() or autograd_flags.is_recording())
            assert_same(list(shared(z, pos).values()), list(wanted.values()), "results")
            assert len(step(other, z, pos)) > 10
        finally:
            done.set()
        tracing.result()


def test_a_table_of_a_tracer_is_not_kept():
    """Also not one that was made on the caller's default device or in inference mode."""
    made = []

    @autograd_flags.constant_table
    def table(size: int) -> torch.Tensor:
        made.append(size)
        return torch.ones(size)

    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(table(3), FakeTensor)
    with torch.device("meta"), torch.inference_mode():
        kept = table(3)
    assert type(kept) is torch.Tensor and kept.device.type == "cpu" and not kept.is_inference()
    assert table(3) is kept and made == [3, 3]
    with FakeTensorMode():
        assert isinstance(table(3), FakeTensor)
    assert table(3) is kept


def test_evaluations_in_threads_leave_training_as_it_is():
    """Two evaluations that overlap left every later step without gradients of weights."""
    potential = potential_of()
    z, pos = tensors_of(ethanol())
    before = step(potential, z, pos)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: float(potential(z, pos)["energy"]), range(20)))
    assert_same(step(potential, z, pos), before, "gradients")


@pytest.mark.filterwarnings("ignore:The default method has changed:UserWarning")
def test_images_of_a_band_that_run_in_threads_are_those_of_one():
    """ASE's NEB(parallel=True), and training afterwards on the weights that the calculators were made of."""
    potential = potential_of()
    before = step(potential, *tensors_of(ethanol()))
    bands = []
    for parallel in (False, True):
        images = [ethanol(seed) for seed in range(5)]
        for image in images:
            image.calc = NBodyCalculator(potential, skin=0.0)
        bands.append(NEB(images, parallel=parallel).get_forces())
    assert np.abs(bands[0]).max() > 1e-3 and np.array_equal(*bands)
    assert_same(step(potential, *tensors_of(ethanol())), before, "gradients")


@pytest.mark.parametrize("kind", ["one", "committee"])
def test_one_calculator_for_several_threads(kind):
    """Each thread gets the energy and the forces of its own structure."""
    members = [potential_of(seed) for seed in range(2)]
    calculator = NBodyCalculator(members[0]) if kind == "one" else Committee(members)
    structures = [ethanol(seed) for seed in range(4)] + [molecule("H2O"), molecule("CH4")]
    wanted = []
    for atoms in structures:
        atoms.calc = copy.deepcopy(calculator)
        wanted.append((atoms.get_potential_energy(), atoms.get_forces()))
        atoms.calc = calculator
    assert len({energy for energy, _ in wanted}) == len(structures)

    def worker(atoms, energy, forces):
        def evaluate():
            assert abs(atoms.get_potential_energy() - energy) < 1e-9
            assert np.abs(atoms.get_forces() - forces).max() < 1e-10
            atoms.calc.reset()

        return evaluate

    workers = [worker(atoms, *numbers) for atoms, numbers in zip(structures, wanted, strict=True)]
    assert min(run_together(0.5, *workers)) >= 2


def test_a_lock_is_free_in_copies():
    """Copies and pickles of a calculator that is in use do not wait for it."""
    calculator, atoms = NBodyCalculator(potential_of()), ethanol()
    atoms.calc = calculator
    wanted = atoms.get_potential_energy()
    with calculator._lock:
        copies = [copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))]
        with ThreadPoolExecutor(1) as pool:
            for twin in copies:
                other = ethanol()
                other.calc = twin
                assert pool.submit(other.get_potential_energy).result(timeout=60) == wanted


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: [*t[:-1], 1.001 * t[-1]], lambda t: [0 * x for x in t]])
def test_the_comparison_refuses_others(change):
    right = [torch.ones(2), torch.arange(3.0)]
    assert_same(right, right, "numbers")
    with pytest.raises(AssertionError):
        assert_same(change(right), right, "numbers")
    with pytest.raises(AssertionError, match="numbers are zero"):
        assert_same([0 * right[0]], [0 * right[0]], "numbers")


def test_what_a_worker_raises_is_raised():
    def fail() -> None:
        raise ArithmeticError("wrong")

    with pytest.raises(ArithmeticError, match="wrong"):
        run_together(0.1, lambda: None, fail)


def test_the_comparison_rejects_one_bit():
    one = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_same([one], [one.clone()], "energies")
    with pytest.raises(AssertionError, match="energies differ"):
        assert_same([torch.nextafter(one, 3 * one)], [one], "energies")
    with pytest.raises(AssertionError, match="energies are zero"):
        assert_same([0 * one], [0 * one], "energies")
    for few in ([], [one, one]):
        with pytest.raises(AssertionError, match="results instead of"):
            assert_same(few, [one], "energies")
