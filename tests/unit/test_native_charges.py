"""Latent charges in the native evaluator: the numbers of plain torch, whole open systems only, and what it refuses."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule as ase_molecule

import factories
from comparison import assert_same_results, torch_results
from nbody_pyg import NestedShells, Potential
from nbody_pyg.deploy import NBodyCalculator, save_model
from nbody_pyg.kernels import build
from nbody_pyg.longrange.charges import LatentCharges
from nbody_pyg.native import CompiledModel, Edges, NativeEvaluator, export_c, why_not, write_program
from nbody_pyg.native.export import example_atoms
from nbody_pyg.system import System

pytestmark = pytest.mark.skipif(build.broken() is not None, reason="no C compiler")

LAMMPS = Path(__file__).parents[2] / "lammps"
SHELLS = NestedShells((3.0, 4.0))
OPTIONS = {
    "transfers": {},
    "coulomb": {"coulomb": True, "width": 0.9},
    "elements": {"elements": True, "transfers": False, "channels": 1},
    "states": {"states": True, "transfers": False},
    "all": {"states": True, "elements": True, "channels": 3},
    "nothing but local terms": {"transfers": False},
}


@pytest.fixture(autouse=True)
def _threads_as_before():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def potential(long_range=OPTIONS["all"], scheme=SHELLS, **options) -> Potential:
    """A small potential of random weights, with a scale and energies of isolated atoms."""
    options = {"lmax": 0, "correlation": 2, "long_range": dict(long_range)} | options  # the compiler is fast
    return factories.potential(scheme, {1: -0.5, 6: -1.5, 8: -2.5}, 1.3, **options)


def methanol(seed: int = 0) -> Atoms:
    """A molecule, and an atom beyond the shells of all others."""
    atoms = ase_molecule("CH3OH") + Atoms("O", positions=[[7.0, 1.0, -2.0]])
    atoms.rattle(0.1, seed=seed)
    return atoms


def system_of(model: Potential, atoms: Atoms, **given) -> System:
    return model.system(System.from_ase(atoms)).replace(**given)


def without_charges(model: Potential) -> Potential:
    """The same potential whose charges have no energy."""
    made = copy.deepcopy(model)
    layer = made.model.long_range
    with torch.no_grad():
        for weight in (layer.strength, layer.local, layer.local_states.weight):
            weight.zero_()
    layer.held.zero_()
    return made


def assert_native_is_torch(model: Potential, atoms: Atoms) -> None:
    assert why_not(model) is None
    system = system_of(model, atoms)
    assert_same_results(NativeEvaluator(model)(system), torch_results(model, system))


# ---------------------------------------------------------------------- numbers
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    model, atoms = potential(OPTIONS[name]), methanol()
    assert_native_is_torch(model, atoms)
    system, plain = system_of(model, atoms), without_charges(model)
    local = torch_results(plain, system)
    assert_same_results(NativeEvaluator(plain)(system), local)
    if name != "nothing but local terms":  # neutral atoms have no energy
        found = NativeEvaluator(model)(system)
        assert abs(float(found["energy"] - local["energy"])) > 1e-4
        assert (found["forces"] - local["forces"]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"lmax": 1, "correlation": 3, "scheme": NestedShells((4.0,))},
        {"scheme": NestedShells((2.5, 3.0, 3.0), 12)},
        {"parity": "both", "lmax": 1},
        {"irreps": {"shell 1": "3x0e + 3x1o", "shell 2": "5x0e"}, "channels": None, "lmax": None},
        {"inner_cutoff": {"C-H": 1.3, "O-H": 1.2, "H-H": 2.0}},
        {"repulsion": None},
        {"preset": "strict", "lmax": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_networks(options):
    atoms = methanol()
    atoms.positions[3] = atoms.positions[0] + [0.3, -0.2, 0.25]  # where repulsion and inner cutoffs act
    assert_native_is_torch(potential(**options), atoms)


@pytest.mark.parametrize("distance", [1e-5, 0.02, 0.35, 0.6, 5.9, 6.1, 40.0])
def test_pairs_at_all_distances(distance):
    """Series, error function and point charges."""
    atoms = Atoms("OHC", [[0, 0, 0], [0, 1.0, 0], [distance, 1.0, 0]])
    assert_native_is_torch(potential(repulsion=None), atoms)


def test_float32():
    model = potential().float()
    system = system_of(model, methanol())
    found = NativeEvaluator(model)(system)
    assert_same_results(found, torch_results(model.double(), system), tolerance=2e-4)
    with pytest.raises(AssertionError):  # it did run in float32
        assert_same_results(found, torch_results(model, system))


def test_energies_alone():
    model = potential()
    system = system_of(model, methanol())
    found, wanted = NativeEvaluator(model)(system, compute_forces=False), torch_results(model, system)
    assert set(found) == {"energy", "energies"}
    torch.testing.assert_close(found["energies"], wanted["energies"], rtol=0, atol=1e-10)


def cluster(count: int) -> Atoms:
    """A cube of ``count`` atoms along each edge, open."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(count)] * 3), axis=-1).reshape(-1, 3) * 1.6
    return Atoms(rng.choice(["H", "C", "O"], size=len(grid)), grid + rng.normal(scale=0.1, size=grid.shape))


def test_threads_give_the_same_bits():
    """Enough atoms and edges that every function is divided."""
    model, results = potential(), []
    evaluator, system = NativeEvaluator(model), system_of(model, cluster(8))
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(evaluator(system))
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())
    assert_same_results(results[0], torch_results(model, system), tolerance=1e-8)


def test_changed_weights_are_used():
    model = potential()
    evaluator, system = NativeEvaluator(model), system_of(model, methanol())
    before = float(evaluator(system)["energy"])
    for name in ("strength", "local_states.weight", "charges.own", "charges.offset", "charges.own_states.weight"):
        with torch.no_grad():
            model.model.long_range.get_parameter(name).mul_(1.1)
        found = evaluator(system)
        assert_same_results(found, torch_results(model, system))
        assert abs(float(found["energy"]) - before) > 1e-6, name
        before = float(found["energy"])


def test_programs_depend_on_the_architecture_alone():
    first, second = write_program(potential()), write_program(potential(seed=1))
    assert first.source == second.source and not torch.equal(first.numbers, second.numbers)
    wide = write_program(potential(OPTIONS["all"] | {"width": 0.8}))
    assert first.source == wide.source and not torch.equal(first.numbers, wide.numbers)
    assert write_program(potential(OPTIONS["states"])).fingerprint != first.fingerprint


# ---------------------------------------------------------------------- the program itself
def all_pairs(positions: np.ndarray) -> Edges:
    receiver, source = np.nonzero(~np.eye(len(positions), dtype=bool))
    return Edges(receiver, source, positions[source] - positions[receiver])


def test_virial():
    """The derivative by strain of an open system follows from its forces, wherever the origin is."""
    atoms, program = methanol(), CompiledModel(write_program(potential()), torch.float64)
    for origin in (0.0, 50.0):
        where = atoms.positions + origin
        found = program.compute(atoms.numbers, [all_pairs(where)] * 2, positions=where)
        np.testing.assert_allclose(found.virial, -atoms.positions.T @ found.forces, rtol=0, atol=1e-9)
        assert np.abs(found.virial).max() > 1e-2


def test_memory_is_linear_in_the_atoms():
    program, held = CompiledModel(write_program(potential()), torch.float64), []
    empty = program.memory
    for count in (500, 1000, 2000):
        positions = np.zeros((count, 3))
        positions[:, 0] = 2.5 * np.arange(count)
        receiver, source = np.array([(i, j) for i in range(count) for j in (i - 1, i + 1) if 0 <= j < count]).T
        edges = Edges(receiver, source, positions[source] - positions[receiver])
        program.compute(np.full(count, 6), [edges] * 2, positions=positions)
        held.append(program.memory - empty)
    assert 1.9 < held[1] / held[0] < 2.1 and 1.9 < held[2] / held[1] < 2.1


def test_parts_of_systems_and_images_are_refused():
    atoms, program = methanol(), CompiledModel(write_program(potential()), torch.float64)
    where = atoms.positions
    edges = [all_pairs(where)] * 2
    with pytest.raises(ValueError, match="latent charges act between all atoms: give the positions of a whole system"):
        program.compute(atoms.numbers, edges)
    with pytest.raises(ValueError, match="latent charges act between all atoms"):
        program.compute(atoms.numbers, edges, num_local=3, positions=where)
    with pytest.raises(ValueError, match=r"positions must have shape \(7, 3\), got \(6, 3\)"):
        program.compute(atoms.numbers, edges, positions=where[1:])
    with pytest.raises(ValueError, match="a position is not finite"):
        program.compute(atoms.numbers, [all_pairs(where[:-1])] * 2, positions=np.vstack([where[:-1], [np.nan] * 3]))
    receiver, source, vector = edges[0]
    image = Edges(np.append(receiver, [0, 1]), np.append(source, [0, 1]), np.vstack([vector, [[0, 0, 2.0]] * 2]))
    with pytest.raises(ValueError, match="takes open systems only"):
        program.compute(atoms.numbers, [image] * 2, positions=where)
    assert program.compute(atoms.numbers, edges, positions=where).energies.shape == (7,)  # as good as before


def test_export(tmp_path):
    model = potential()
    export_c(model, tmp_path)
    words = [*build.compiler(), "-O0", "-w", "example.c", "nbody_model.c", "-lm", "-o", "example"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
    printed = subprocess.run(["./example"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    z, positions = example_atoms(model)
    wanted = model(torch.tensor(z), torch.tensor(positions, dtype=torch.float64))
    assert float(printed.split("energy")[1].split()[0]) == pytest.approx(float(wanted["energy"]), abs=2e-9)


@pytest.mark.slow
@pytest.mark.skipif(None in (shutil.which("c++"), shutil.which("make")), reason="no C++ compiler or make")
def test_the_lammps_plugin_refuses_the_model(tmp_path):
    (tmp_path / "main.cpp").write_text(
        '#include "nbody_library.h"\n#include <iostream>\n#include <stdexcept>\nint main(int, char** given) {\n'
        "  try { NBodyLibrary library(given[1]); std::cout << library.symbols(); }\n"
        "  catch (std::runtime_error& problem) { std::cout << problem.what(); }\n}\n"
    )
    header = Path(build.__file__).parents[1] / "native/c"
    words = ["c++", f"-I{LAMMPS}", f"-I{header}", "main.cpp", LAMMPS / "nbody_library.cpp", "-ldl", "-o", "main"]
    subprocess.run(words, cwd=tmp_path, check=True)
    for long_range, answer in (({}, "the model has latent charges"), (None, "H C O")):
        folder = tmp_path / answer.split()[0]
        export_c(factories.potential(lmax=0, long_range=long_range), folder)
        subprocess.run(["make", "CFLAGS=-O0"], cwd=folder, check=True, capture_output=True)
        run = subprocess.run([tmp_path / "main", folder], capture_output=True, text=True, check=True)
        assert run.stdout.startswith(answer)


# ---------------------------------------------------------------------- systems
def periodic(atoms: Atoms) -> Atoms:
    made = atoms.copy()
    made.set_cell([12.0, 12.0, 12.0])
    made.pbc = True
    return made


def test_periodic_systems_are_refused_as_by_torch():
    model = potential()
    message = "pbc must be off for long_range method 'direct', which does not know periodic images; use 'ewald'"
    for evaluate in (model, NativeEvaluator(model)):
        with pytest.raises(ValueError, match=message):
            evaluate(System.from_ase(periodic(methanol())))
    for engine in ("native", "torch", "auto"):
        with pytest.raises(ValueError, match=message):
            NBodyCalculator(model, engine=engine).get_potential_energy(periodic(methanol()))


def test_given_charges_run_in_torch():
    model, atoms = potential({}), methanol()
    evaluator, neutral = NativeEvaluator(model), system_of(model, atoms)
    formal = torch.zeros(7).double()
    assert evaluator.takes(neutral.replace(total_charge=torch.zeros(1).double(), formal_charges=formal))
    formal[:2] = torch.tensor([1.0, -1.0])
    for charged in (
        neutral.replace(total_charge=torch.ones(1).double()),
        neutral.replace(total_charge=torch.zeros(1).double(), formal_charges=formal),
    ):
        with pytest.raises(ValueError, match="neutral singlet without formal charges"):
            evaluator(charged)
        assert abs(float(model(charged)["energy"] - model(neutral)["energy"])) > 1e-3
    calculator, ion = NBodyCalculator(model), atoms.copy()
    ion.info["charge"] = 1.0
    energies = [calculator.get_potential_energy(one) for one in (atoms, ion, atoms)]
    assert calculator.engine == "native" and energies[0] == energies[2] and abs(energies[1] - energies[0]) > 1e-3
    with pytest.raises(ValueError, match="neutral singlets only, without formal charges"):
        NBodyCalculator(model, engine="native").get_potential_energy(ion)


def test_charges_that_the_network_does_not_use():
    """With ``states`` the given charge has no effect, so the charge of all training frames is as good as none."""
    model, ion = potential(OPTIONS["states"]), methanol()
    model.model.assumed = {"charge": -1.0}
    ion.info["charge"] = -1.0
    energy = NBodyCalculator(model, engine="native").get_potential_energy(ion)
    assert energy == pytest.approx(float(model(System.from_ase(ion))["energy"]), abs=1e-10)


@pytest.mark.parametrize("name", ["transfers", "states"])
def test_inputs_of_charge_and_spin(name):
    model = potential(OPTIONS[name], inputs=["charge", "spin"])
    with torch.no_grad():
        model.model.electrons.spread.normal_()
    assert_native_is_torch(model, methanol())
    charged = system_of(model, methanol(), total_charge=torch.ones(1).double())
    assert not NativeEvaluator(model).takes(charged)


# ---------------------------------------------------------------------- where it runs
def test_calculator_with_lists_that_last():
    """Neighbour lists have a skin, and the pairs of charges need none."""
    model, atoms = potential(), methanol()
    native, plain = NBodyCalculator(model), NBodyCalculator(model, engine="torch", skin=0.0)
    assert (native.engine, native.engine_reason) == ("native", None)
    for step in range(5):
        found = []
        for calculator in (native, plain):
            moved = atoms.copy()
            moved.calc = calculator
            found.append({"energy": moved.get_potential_energy(), "forces": moved.get_forces()})
        found = [{key: torch.as_tensor(value) for key, value in one.items()} for one in found]
        assert_same_results(*found)
        atoms.rattle(0.03, seed=step)
    assert native.engine == "native" and native.topologies.rebuilds < native.topologies.calls


def test_commands(tmp_path, capsys, monkeypatch):
    from nbody_pyg.cli.main import main

    monkeypatch.chdir(tmp_path)
    save_model(potential(), "charges.nbody")
    methanol().write("start.xyz")
    assert main(["info", "charges.nbody"]) == 0
    assert "engine here" in (text := capsys.readouterr().out) and text.split("engine here")[1].split()[0] == "native"
    assert main(["md", "charges.nbody", "start.xyz", "--steps", "3"]) in (0, 3)
    assert "engine: native\n" in capsys.readouterr().out
    assert main(["export", "charges.nbody"]) == 0
    assert "LAMMPS cannot run the model" in capsys.readouterr().out


def test_changed_modules_are_noticed(monkeypatch):
    model = potential()
    model.model.long_range.charges.register_forward_hook(lambda *_: None)
    assert why_not(model) == "a module was replaced, changed or hooked"
    model = potential()
    model.model.long_range._local = lambda *_: None
    assert why_not(model) == "a method of the potential was replaced"
    monkeypatch.setattr(LatentCharges, "_transferred", lambda *_: None)
    assert why_not(potential()) == "LatentCharges._transferred was replaced"
