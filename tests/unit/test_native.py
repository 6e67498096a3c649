"""The native evaluator: the numbers of plain torch from one generated C program, and what it refuses."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.build import molecule as ase_molecule
from torch import Tensor, nn

from comparison import torch_results
from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential
from nbody_pyg.deploy import Committee, NBodyCalculator, save_model
from nbody_pyg.energy import AtomicReference, EnergyTerm
from nbody_pyg.kernels import build, use_backend
from nbody_pyg.native import CompiledModel, Edges, NativeEvaluator, export_c, why_not, write_program
from nbody_pyg.native.export import example_atoms
from nbody_pyg.native.pieces import Pieces
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.system import System

pytestmark = pytest.mark.skipif(build.broken() is not None, reason="no C compiler")

SPECIES, E0 = (1, 6, 8), {1: -13.6, 6: -1030.5, 8: -2041.8}


@pytest.fixture(autouse=True)
def _threads_as_before():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def potential(
    scheme=None, channels: int = 4, lmax: int = 1, scale: float = 1.3, repulsion="auto", **options
) -> Potential:
    """A small potential in float64, whose weights are all random: none starts at zero or one."""
    torch.manual_seed(0)
    model = NBodyNet(SPECIES, scheme or NestedShells((3.0, 4.0)), channels, lmax, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return Potential(model, E0, scale, repulsion).double()


def ethanol(seed: int = 0) -> Atoms:
    atoms = ase_molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=seed)
    return atoms


def crystal() -> Atoms:
    """A triclinic cell of four atoms of three elements, smaller than the shells."""
    cell = [[3.1, 0.0, 0.0], [0.9, 2.9, 0.0], [-0.5, 0.7, 3.3]]
    scaled = [[0.0, 0.0, 0.0], [0.45, 0.55, 0.1], [0.6, 0.1, 0.5], [0.1, 0.5, 0.65]]
    return Atoms("CHOH", scaled_positions=scaled, cell=cell, pbc=True)


def assert_same(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], least: float = 1e-2, tolerance=1e-10
) -> None:
    """Equal results, relative to the largest number of a kind if that is above 1.

    ``least`` is the size that the largest force and stress of an interacting structure have.
    """
    assert set(found) == set(wanted) and {"energy", "energies", "forces"} <= set(wanted)
    assert wanted["energy"].abs().min() > 1e-2
    for key in {"forces", "stress"} & set(wanted):
        assert wanted[key].abs().max() > least or least == 0, key
    for key, value in wanted.items():
        bound = tolerance * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[key], value, rtol=0, atol=bound, msg=lambda text, key=key: f"{key}: {text}")


def assert_native_is_torch(model: Potential, atoms: Atoms, reference: Potential | None = None, least=1e-3) -> None:
    """The native program of a potential gives the results of plain torch, here or for another potential."""
    system = model.system(System.from_ase(atoms))
    found = NativeEvaluator(model)(system, compute_stress=bool(atoms.pbc.any()))
    assert_same(found, torch_results(reference or model, system), least)


# ---------------------------------------------------------------------- the helpers reject mutants
def mutants() -> dict[str, Callable[[Potential], object]]:
    """Small changes of a potential."""
    return {
        "weight": lambda m: m.model.interactions[1].gate.mix.weights[0].data[0, 0].add_(1e-6),
        "radial weight": lambda m: m.model.interactions[1].gate.radial_weight.data[0, 0].add_(1e-6),
        "constant": lambda m: m.model.interactions[0].bias.data[0, 0].add_(1e-6),
        "neighbours": lambda m: setattr(
            m.model.interactions[1].gate, "scale", m.model.interactions[1].gate.scale * 1.00001
        ),
        "scale": lambda m: m.scale.add_(1e-6),
        "isolated": lambda m: m.reference.values.add_(1e-6),
        "repulsion": lambda m: m.repulsion.end.mul_(1 + 1e-5),
        "readout": lambda m: m.model.readouts["1"].network[0].bias.data[0].add_(1e-6),
    }


@pytest.mark.slow
@pytest.mark.parametrize("change", mutants())
def test_helpers_reject_mutants(change):
    model, atoms = potential(), crystal()
    atoms.positions[1] = atoms.positions[0] + [0.5, 0.4, 0.1]  # where the repulsion fades
    assert_native_is_torch(model, atoms)
    mutant = copy.deepcopy(model)
    mutants()[change](mutant)
    with pytest.raises(AssertionError):
        assert_native_is_torch(model, atoms, mutant)


@pytest.mark.parametrize("key", ["energy", "energies", "forces", "stress"])
def test_comparison_rejects_small_changes(key):
    model = potential()
    wanted = torch_results(model, model.system(System.from_ase(crystal())))
    assert_same(wanted, wanted)
    with pytest.raises(AssertionError):
        assert_same(wanted | {key: wanted[key] * (1 + 1e-6)}, wanted)
    with pytest.raises(AssertionError):
        assert_same(wanted | {key: -wanted[key]}, wanted)
    with pytest.raises(AssertionError):
        assert_same({k: v for k, v in wanted.items() if k != key}, wanted)
    zeros = {k: torch.zeros_like(v) for k, v in wanted.items()}
    with pytest.raises(AssertionError):
        assert_same(zeros, zeros)


# ---------------------------------------------------------------------- architectures
FEW = [
    ("practical", 0, 2), ("practical", 1, 3), ("practical", 2, 4), ("practical", 3, 2), ("practical", 1, 1),
    ("strict", 0, 4), ("strict", 1, 2), ("strict", 2, 3),
]  # fmt: skip
ALL = [(preset, lmax, k) for preset in ("practical", "strict") for lmax in range(4) for k in (2, 3, 4)]


@pytest.mark.parametrize(
    ("preset", "lmax", "correlation"),
    [*FEW, *[pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in FEW]],
)
def test_architectures(preset, lmax, correlation):
    # Whole vectors of channels need half the code
    model = potential(channels=16 if lmax > 1 else 4, preset=preset, lmax=lmax, correlation=correlation)
    assert_native_is_torch(model, ethanol())
    assert_native_is_torch(model, crystal())


@pytest.mark.slow
@pytest.mark.parametrize("parity", ["both", "ignored"])
def test_parities(parity):
    assert_native_is_torch(potential(parity=parity), ethanol())


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 20])
def test_channels_that_are_no_whole_vectors(channels):
    assert_native_is_torch(potential(channels=channels), ethanol())


@pytest.mark.slow
@pytest.mark.parametrize(("radii", "exponent"), [((4.0,), 3), ((4.0, 4.0), 3), ((4.5, 2.5), 6), ((2.5, 3.0, 4.0), 12)])
def test_shells(radii, exponent):
    model = potential(NestedShells(radii, exponent), lmax=0 if len(radii) == 3 else 1)
    assert_native_is_torch(model, ethanol())
    assert_native_is_torch(model, crystal())


def test_softening():
    assert_native_is_torch(potential(softening=0.2), ethanol())


def test_a_type_for_each_level():
    types = {"shell 1": "3x0e + 3x1o", "shell 2": "5x0e"}
    torch.manual_seed(0)
    assert_native_is_torch(Potential(NBodyNet(SPECIES, NestedShells((3.0, 4.0)), irreps=types), E0).double(), ethanol())


def test_given_numbers_of_neighbours_and_no_energies_of_isolated_atoms():
    model = potential(avg_num_neighbors={"child_1": 5.0, "child_2": 17.0})
    model.reference = None
    assert_native_is_torch(model, ethanol())


# ---------------------------------------------------------------------- structures
def structures() -> dict[str, Atoms]:
    small = bulk("C", "fcc", a=2.5)
    slab = fcc111("C", (2, 2, 2), a=3.4, vacuum=6.0)
    slab.symbols[1] = "O"
    slab.rattle(0.1, seed=1)
    mixed = ethanol()
    mixed += Atoms("O", positions=[[30.0, 0.0, 0.0]])
    close = ethanol()
    close.positions[3] = close.positions[0] + [0.3, -0.2, 0.25]
    return {
        "one cell, many images": small, "slab": slab, "with an isolated atom": mixed, "close atoms": close,
        "triclinic": crystal(), "ethanol": ethanol(3),
    }  # fmt: skip


@pytest.mark.parametrize("name", structures())
def test_structures(name):
    assert_native_is_torch(potential(), structures()[name], least=0 if "one cell" in name else 1e-3)


def test_repulsion_acts_where_atoms_are_close():
    atoms, model = structures()["close atoms"], potential()
    model.repulsion = ZBLRepulsion([1, 6, 7, 8], {"C-H": 0.9})  # knows more elements than the network
    without = potential(repulsion=None)
    assert_native_is_torch(model, atoms)
    with pytest.raises(AssertionError):
        assert_native_is_torch(model, atoms, without)


@pytest.mark.slow
@pytest.mark.parametrize("repulsion", ["auto", None])
@pytest.mark.parametrize("name", ["close atoms", "ethanol", "triclinic"])
def test_inner_cutoffs(name, repulsion):
    lengths = {"H-C": 1.25, "C-C": 1.9, "H-H": 2.0}
    model = potential(inner_cutoff=lengths, repulsion=repulsion)
    assert_native_is_torch(model, structures()[name])
    with pytest.raises(AssertionError):
        assert_native_is_torch(model, structures()[name], potential(repulsion=repulsion))


@pytest.mark.parametrize(
    "atoms", [Atoms("O"), Atoms("OCHH", 20.0 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]))]
)
def test_atoms_without_neighbours(atoms):
    model = potential()
    system = model.system(System.from_ase(atoms))
    found, wanted = NativeEvaluator(model)(system), torch_results(model, system)
    assert_same(found, wanted, least=0)
    assert found["forces"].abs().max() < 1e-12 and found["energies"].abs().min() > 1


def test_float32():
    model, atoms = potential().float(), crystal()
    system = model.system(System.from_ase(atoms))
    found = NativeEvaluator(model)(system, compute_stress=True)
    assert_same(found, torch_results(model.double(), system), tolerance=2e-4)
    with pytest.raises(AssertionError):  # it did run in float32
        assert_same(found, torch_results(model, system))


def test_energies_alone():
    model, system = potential(), System.from_ase(ethanol())
    found = NativeEvaluator(model)(system, compute_forces=False)
    assert set(found) == {"energy", "energies"}
    torch.testing.assert_close(found["energy"], model(system)["energy"], rtol=0, atol=1e-9)


def test_threads_give_the_same_bits():
    """Enough atoms and edges that every function is divided."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(8)] * 3), axis=-1).reshape(-1, 3) * 1.5
    symbols = rng.choice(["H", "C", "O"], size=len(grid))
    atoms = Atoms(symbols, grid + rng.normal(scale=0.1, size=grid.shape), cell=[12.0] * 3, pbc=True)
    model, results = potential(), []
    evaluator, system = NativeEvaluator(model), model.system(System.from_ase(atoms))
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(evaluator(system, compute_stress=True))
    assert results[0]["forces"].abs().max() > 1e-2
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())
    assert_same(results[0], torch_results(model, system), tolerance=1e-9)


def test_memory_is_linear_in_the_edges():
    """Chains of twice the atoms need twice the memory beside the weights, and less needs no more."""
    model, held = potential(), []
    program = CompiledModel(write_program(model), torch.float64)
    empty = program.memory
    for count in (500, 1000, 2000, 100):
        positions = np.zeros((count, 3))
        positions[:, 0] = 1.5 * np.arange(count)
        near = [(i, i + k) for k in (-2, -1, 1, 2) for i in range(count) if 0 <= i + k < count]
        receiver, source = np.array(near).T
        program.compute(np.full(count, 6), [Edges(receiver, source, positions[source] - positions[receiver])] * 2)
        held.append(program.memory - empty)
    assert 1.9 < held[1] / held[0] < 2.1 and 1.9 < held[2] / held[1] < 2.1 and held[3] == held[2]


# ---------------------------------------------------------------------- edges
def all_pairs(positions: np.ndarray) -> Edges:
    """Edges between all atoms, in a random order."""
    receiver, source = np.nonzero(~np.eye(len(positions), dtype=bool))
    mixed = np.random.default_rng(0).permutation(len(source))
    receiver, source = receiver[mixed], source[mixed]
    return Edges(receiver, source, positions[source] - positions[receiver])


def test_edges_beyond_the_radii_are_left_out_and_any_order_will_do():
    model, atoms = potential(), ethanol()
    system = model.system(System.from_ase(atoms))
    program = CompiledModel(write_program(model), torch.float64)
    result = program.compute(atoms.numbers, [all_pairs(atoms.positions)] * 2)
    wanted = torch_results(model, system)
    np.testing.assert_allclose(result.forces, wanted["forces"].numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.energies, wanted["energies"].numpy(), rtol=0, atol=1e-9)
    assert np.abs(result.forces).max() > 1e-2 and len(all_pairs(atoms.positions).source) == 72


@pytest.mark.parametrize("seed", [0, 1])
def test_ghosts(seed):
    """Two domains with ghosts up to the sum of the radii: energies and forces add up to those of the whole."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, [14.0, 5.0, 5.0], size=(40, 3))
    numbers = rng.choice(SPECIES, size=40)
    model = potential(NestedShells((2.0, 2.5)))
    program, reach = CompiledModel(write_program(model), torch.float64), 4.5
    whole = program.compute(numbers, [all_pairs(positions)] * 2)
    assert np.abs(whole.forces).max() > 1e-2
    forces, energies, virial = np.zeros((40, 3)), np.zeros(40), np.zeros((3, 3))
    for local in (positions[:, 0] < 7.0, positions[:, 0] >= 7.0):
        border = positions[:, 0] < 7.0 + reach if local[np.argmin(positions[:, 0])] else positions[:, 0] > 7.0 - reach
        atoms = np.concatenate([rng.permutation(np.nonzero(local)[0]), rng.permutation(np.nonzero(border & ~local)[0])])
        count = int(local.sum())
        assert count < len(atoms) < 40
        result = program.compute(numbers[atoms], [all_pairs(positions[atoms])] * 2, num_local=count)
        energies[atoms[:count]] = result.energies
        np.add.at(forces, atoms, result.forces)
        virial += result.virial
    np.testing.assert_allclose(energies, whole.energies, rtol=0, atol=1e-9)
    np.testing.assert_allclose(forces, whole.forces, rtol=0, atol=1e-10)
    np.testing.assert_allclose(virial, whole.virial, rtol=0, atol=1e-9)


def test_wrong_edges():
    model, atoms = potential(), ethanol()
    program, edges = CompiledModel(write_program(model), torch.float64), all_pairs(atoms.positions)
    with pytest.raises(ValueError, match="edges must hold those of each of the 2 shells, got 1"):
        program.compute(atoms.numbers, [edges])
    with pytest.raises(ValueError, match="edges must have receivers and sources"):
        program.compute(atoms.numbers, [edges._replace(vector=edges.vector[1:])] * 2)
    with pytest.raises(ValueError, match="an edge names an atom beyond num_atoms"):
        program.compute(atoms.numbers, [edges._replace(source=edges.source + 1)] * 2)
    with pytest.raises(ValueError, match="an edge names an atom beyond num_atoms"):
        program.compute(atoms.numbers, [edges._replace(receiver=edges.receiver - 1)] * 2)
    with pytest.raises(ValueError, match="a vector of an edge is NaN"):
        program.compute(atoms.numbers, [edges._replace(vector=edges.vector * np.nan)] * 2)
    with pytest.raises(ValueError, match="z holds an element that the model does not know"):
        program.compute(atoms.numbers + 1, [edges] * 2)
    with pytest.raises(ValueError, match="num_local must lie in 0"):
        program.compute(atoms.numbers, [edges] * 2, num_local=100)
    assert program.compute(atoms.numbers, [edges] * 2).energies.shape == (9,)  # as good as before


def test_one_structure_and_its_cell():
    model = potential()
    evaluator = NativeEvaluator(model)
    pos = torch.tensor(ethanol().positions)
    with pytest.raises(ValueError, match="atoms must be one structure, got a batch of 2"):
        evaluator(torch.tensor(ethanol().numbers), pos, torch.tensor([0] * 5 + [1] * 4))
    with pytest.raises(ValueError, match="compute_stress needs a periodic cell with a volume"):
        evaluator(System.from_ase(ethanol()), compute_stress=True)


# ---------------------------------------------------------------------- what it refuses
class Spring(EnergyTerm):
    def forward(self, structure):
        return structure.pos.square().sum(-1)


class OwnShells(NestedShells):
    pass


class OwnPotential(Potential):
    pass


def hooked() -> Potential:
    model = potential()
    model.model.interactions[0].norm.register_forward_hook(lambda *_: None)
    return model


def replaced() -> Potential:
    model = potential()
    model.model.readouts["1"].network[1] = nn.Tanh()
    return model


def patched() -> Potential:
    model = potential()
    model.model.values = model.model.values
    return model


REFUSED = {
    "the scheme is BondTree": lambda: potential(BondTree()),
    "the scheme is OwnShells": lambda: potential(OwnShells((3.0,))),
    "long-range energies by the method 'ewald'": lambda: potential(long_range="ewald"),
    "the latent charges of the network have dipoles": lambda: potential(long_range={"dipoles": True}),
    "the network has the node inputs 1x1o": lambda: Potential(NBodyNet(SPECIES, channels=4, lmax=1, node_inputs="1o")),
    "the network gives 1x1o": lambda: Potential(NBodyNet(SPECIES, channels=4, lmax=1, irreps_out="1o")),
    r"readout 'root'": lambda: Potential(NBodyNet(SPECIES, channels=4, lmax=1, readout="root")),
    "states have several multiplicities": lambda: Potential(NBodyNet(SPECIES, irreps="4x0e + 2x1o")),
    "the weights are in torch.bfloat16": lambda: Potential(NBodyNet(SPECIES, channels=4, lmax=1)).bfloat16(),
    "a term of its own, Spring": lambda: Potential(NBodyNet(SPECIES, channels=4, lmax=1), terms=[Spring()]),
    "the potential is a OwnPotential": lambda: OwnPotential(NBodyNet(SPECIES, channels=4, lmax=1)),
    "the model is a Linear": lambda: Potential(nn.Linear(3, 1)),
    "a layer was replaced, changed or hooked": hooked,
    "a module was replaced, changed or hooked": replaced,
    "a method of the potential was replaced": patched,
    "the repulsion reaches 9 angstrom": lambda: potential(repulsion=ZBLRepulsion(SPECIES, {"C-C": 9.0})),
    "the repulsion does not know": lambda: potential(repulsion=ZBLRepulsion([1, 6])),
    "energies of isolated atoms do not hold": lambda: Potential(NBodyNet(SPECIES, channels=4, lmax=1), {1: -13.6}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_the_reason(reason):
    model = REFUSED[reason]()
    assert re.search(reason, why_not(model))
    with pytest.raises(ValueError, match=reason):
        write_program(model)
    with pytest.raises(ValueError, match=reason):
        NativeEvaluator(model)
    if isinstance(model.model, NBodyNet) and model.model.readout == "sum" and model.model.irreps_out.dim == 1:
        with pytest.raises(ValueError, match=f"engine 'native' cannot evaluate this potential: .*{reason}"):
            NBodyCalculator(model, engine="native")
        calculator = NBodyCalculator(model)
        assert calculator.engine == "torch" and re.search(reason, calculator.engine_reason)


def test_inputs_of_charge_and_spin():
    """A neutral singlet runs in the native program, others in torch."""
    model = potential(inputs=["charge", "spin"])
    assert_native_is_torch(model, ethanol())
    evaluator, calculator = NativeEvaluator(model), NBodyCalculator(model)
    charged = ethanol()
    charged.info["charge"] = 1.0
    system = model.system(System.from_ase(charged))
    with pytest.raises(ValueError, match="neutral singlet"):
        evaluator(system)
    with pytest.raises(ValueError, match="neutral singlets only"):
        NBodyCalculator(model, engine="native").get_potential_energy(charged)
    neutral = ethanol()
    energies = []
    for atoms, engine in ((neutral, "native"), (charged, "torch"), (neutral, "native")):
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        assert abs(energies[-1] - float(model(System.from_ase(atoms))["energy"])) < 1e-9
        assert calculator.engine == engine and (calculator.engine_reason is None) == (engine == "native")
    assert energies[0] == energies[2] and abs(energies[1] - energies[0]) > 1e-3


def test_the_charge_of_all_training_frames_is_no_input():
    """A model of anions without an input for it runs in the native program, and refuses other charges."""
    model, atoms = potential(), ethanol()
    model.model.assumed = {"charge": -1.0}
    atoms.info["charge"] = -1.0
    atoms.calc = NBodyCalculator(model, engine="native")
    energy = atoms.get_potential_energy()
    assert abs(energy - float(model(System.from_ase(atoms))["energy"])) < 1e-9 and abs(energy) > 1
    atoms.info["charge"] = 1.0
    with pytest.raises(ValueError, match="charge"):
        atoms.get_potential_energy()


def test_own_gates_are_refused():
    from nbody_pyg.nn.gates import OneBodyGate

    def gate(irreps_in, irreps_out, **given):
        return OneBodyGate(irreps_in, irreps_out, 1, given["num_basis"], partial=True)

    assert why_not(Potential(NBodyNet(SPECIES, channels=4, lmax=1, gate=gate))) == "the network has gates of its own"


# ---------------------------------------------------------------------- the calculator
def results_of(atoms: Atoms, calculator: NBodyCalculator) -> dict[str, Tensor]:
    atoms = atoms.copy()
    atoms.calc = calculator
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    found["energies"] = atoms.get_potential_energies()
    if atoms.pbc.any():
        found["stress"] = atoms.get_stress()
    return {key: torch.as_tensor(value) for key, value in found.items()}


def test_calculator_gives_the_results_of_torch():
    model = potential()
    native, plain = NBodyCalculator(model, engine="native"), NBodyCalculator(model, engine="torch")
    assert (native.engine, native.engine_reason) == ("native", None)
    assert (plain.engine, plain.engine_reason) == ("torch", "engine='torch'")
    atoms = crystal()
    for step in range(4):
        assert_same(results_of(atoms, native), results_of(atoms, plain), least=1e-3)
        atoms.rattle(0.02, seed=step)
        atoms.set_cell(atoms.cell.array * 1.002, scale_atoms=True)
    assert native.topologies.rebuilds < native.topologies.calls
    assert_same(results_of(ethanol(), native), results_of(ethanol(), plain))
    assert NBodyCalculator(model).engine == "native"


def test_calculator_errors():
    model = potential()
    with pytest.raises(ValueError, match="engine must be one of auto, native, torch, got 'natve'; did you mean native"):
        NBodyCalculator(model, engine="natve")
    with pytest.raises(ValueError, match=r"engine 'native' cannot .*compile=True"):
        NBodyCalculator(model, engine="native", compile=True)
    with use_backend("torch"):
        assert NBodyCalculator(model).engine_reason == "the backend of the products is 'torch'"
    atoms, calculator = ethanol(), NBodyCalculator(model)
    atoms.info["charge"] = 1
    with pytest.raises(ValueError, match="model has no input"):
        results_of(atoms, calculator)


def test_changes_of_the_potential_have_their_effect():
    calculator, atoms = NBodyCalculator(potential(), dtype="float64"), ethanol()
    before = results_of(atoms, calculator)
    with torch.no_grad():
        next(calculator.potential.model.interactions[0].parameters()).mul_(1.1)
    calculator.reset()
    after = results_of(atoms, calculator)
    assert calculator.engine == "native" and abs(after["energy"] - before["energy"]) > 1e-6
    seen = []
    calculator.potential.model.readouts["1"].register_forward_hook(lambda *_: seen.append(1))
    calculator.reset()
    assert_same(results_of(atoms, calculator), after)
    assert seen and calculator.engine == "torch" and "hooked" in calculator.engine_reason
    strict = NBodyCalculator(potential(), engine="native")
    strict.potential.model.readouts["1"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"engine 'native' cannot .*hooked"):
        results_of(atoms, strict)


def _assigned(model: Potential) -> None:
    changed = {name: value * 1.1 if "readouts" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)


#: Ways to change numbers of a potential; torch's counters see only the first.
CHANGES = {
    "in place": lambda model: model.get_parameter("model.shift").detach().add_(1.0),
    "data": lambda model: model.get_parameter("model.shift").data.add_(1.0),
    "transposed data": lambda model: [p.data.t().mul_(1.1) for p in model.parameters() if p.dim() == 2],
    "new data": lambda model: setattr(p := model.get_parameter("model.shift"), "data", p.data + 1.0),
    "assigned": _assigned,
    "new parameter": lambda model: setattr(model.model, "shift", torch.nn.Parameter(model.model.shift.detach() + 1.0)),
    "strides": lambda model: setattr(model.model, "shift", torch.nn.Parameter(torch.ones(1, 1).double().expand(3, 1))),
    "scale": lambda model: model.scale.data.mul_(1.5),
    "E0": lambda model: model.reference.values.data.add_(1.0),
    "end of the repulsion": lambda model: model.repulsion.end.data.mul_(0.95),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", CHANGES)
def test_every_change_of_the_numbers_is_seen(way):
    model, atoms = Potential(potential().model, {1: -13.0, 6: -38.0, 8: -75.0}).double(), ethanol()
    atoms.positions[3] = atoms.positions[0] + [0.4, -0.3, 0.35]  # where the repulsion acts
    evaluator, system = NativeEvaluator(model), model.system(System.from_ase(atoms))
    program, before = evaluator.model(), float(evaluator(system)["energy"])
    for _ in range(2):  # the second time from other strides
        with torch.no_grad():
            CHANGES[way](model)
        assert_same(evaluator(system), torch_results(model, system), tolerance=1e-9)
        kept = evaluator.model()
        assert kept is not program and abs(float(evaluator(system)["energy"]) - before) > 1e-3
        assert evaluator.model() is kept, "nothing has changed since"


def test_an_evaluator_refuses_a_potential_with_other_modules():
    model = potential()
    evaluator, system = NativeEvaluator(model), model.system(System.from_ase(ethanol()))
    evaluator(system)
    model.repulsion = None
    with pytest.raises(ValueError, match="can no longer be a native program: a module was replaced; make another"):
        evaluator(system)
    assert_same(NativeEvaluator(model)(system), torch_results(model, system))


@pytest.mark.parametrize("change", ["a term", "a method", "no repulsion", "another scale"])
def test_changes_beside_the_weights(change):
    calculator, atoms = NBodyCalculator(potential()), ethanol()
    atoms.positions[3] = atoms.positions[0] + [0.4, -0.3, 0.35]  # where the repulsion acts
    before, model = results_of(atoms, calculator), calculator.potential
    if change == "a term":
        model.terms.append(Spring())
    elif change == "a method":
        model.evaluate = lambda system, **given: Potential.evaluate(
            model, system.replace(pos=system.pos * 0.9), **given
        )
    elif change == "no repulsion":
        model.repulsion = None
    else:
        model.scale = model.scale * 2
    calculator.reset()
    atoms.calc = calculator
    assert calculator.engine == "native" and abs(atoms.get_potential_energy() - float(before["energy"])) > 1e-3
    assert calculator.engine == ("native" if change == "another scale" else "torch")


def test_torch_runs_where_the_program_does_not_compile(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    atoms, model = ethanol(), potential()
    monkeypatch.setattr("nbody_pyg.native.evaluator.CompiledModel", broken)
    monkeypatch.setattr(build, "_said", set())
    calculator = NBodyCalculator(model)
    with pytest.warns(RuntimeWarning, match="torch runs instead of the native program"):
        found = results_of(atoms, calculator)
    assert calculator.engine == "torch" and "no such instruction" in calculator.engine_reason
    assert_same(found, results_of(atoms, NBodyCalculator(model, engine="torch")))


@pytest.mark.slow
def test_copies_and_committees():
    model, atoms = potential(), ethanol()
    calculator = NBodyCalculator(model)
    found = results_of(atoms, calculator)
    again = copy.deepcopy(NativeEvaluator(calculator.potential))
    torch.testing.assert_close(again(System.from_ase(atoms))["forces"], found["forces"], rtol=0, atol=1e-12)
    committee = Committee([model, potential(lmax=0)])
    assert [member.engine for member in committee.members] == ["native", "native"]
    atoms.calc = committee
    other = results_of(atoms, NBodyCalculator(potential(lmax=0), engine="torch"))
    mean = (found["forces"] + other["forces"]) / 2
    torch.testing.assert_close(torch.as_tensor(atoms.get_forces()), mean, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- export
def compiled_example(folder, *flags: str) -> str:
    words = [*build.compiler(), "-O1", "-w", *flags, "example.c", "nbody_model.c", "-lm", "-o", "example"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    return subprocess.run(["./example"], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["practical", "strict"])
def test_exported_example_prints_the_energy(tmp_path, preset):
    model = potential(preset=preset)
    paths = export_c(model, tmp_path / "c")
    assert [path.name for path in paths] == [
        "nbody_model.c",
        "nbody_model.h",
        "nbody_model.weights",
        "example.c",
        "Makefile",
    ]
    assert len(paths[3].read_text().splitlines()) <= 40
    z, positions = example_atoms(model)
    wanted = model(torch.tensor(z), torch.tensor(positions, dtype=torch.float64))
    printed = compiled_example(tmp_path / "c")
    assert float(re.search(r"energy (\S+) eV", printed)[1]) == pytest.approx(float(wanted["energy"]), abs=2e-9)
    forces = np.array([line.split("force")[1].split()[:3] for line in printed.splitlines()[:-1]], dtype=float)
    np.testing.assert_allclose(forces, wanted["forces"].numpy(), atol=2e-6)
    assert np.abs(forces).max() > 1e-2
    single = compiled_example(tmp_path / "c", "-DNBODY_REAL=float")
    assert single != printed and float(re.search(r"energy (\S+) eV", single)[1]) == pytest.approx(
        float(wanted["energy"]), abs=1e-2
    )


@pytest.mark.slow
def test_damaged_and_foreign_weights_are_refused(tmp_path):
    export_c(potential(), tmp_path / "a")
    export_c(potential(lmax=0), tmp_path / "b")
    compiled_example(tmp_path / "a")
    path = tmp_path / "a" / "nbody_model.weights"
    good = path.read_bytes()
    changed = bytearray(good)
    changed[-3] ^= 1
    cases = {
        "the weights belong to another program": (tmp_path / "b" / "nbody_model.weights").read_bytes(),
        "no file of weights, or it is damaged": bytes(changed),
        "or it is damaged": good[:-8],
        "it is damaged": good + b"x",
        "no file of weights": b"",
    }
    for message, content in cases.items():
        path.write_bytes(content)
        run = subprocess.run(["./example"], cwd=tmp_path / "a", capture_output=True, text=True, check=False)
        assert run.returncode == 1 and message in run.stderr
    path.unlink()
    run = subprocess.run(["./example"], cwd=tmp_path / "a", capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "cannot be opened" in run.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_header_is_c_plus_plus_too(tmp_path):
    export_c(potential(), tmp_path)
    (tmp_path / "main.cpp").write_text('#include "nbody_model.h"\nint main() { return nbody_num_shells() - 2; }\n')
    subprocess.run([*build.compiler(), "-O0", "-w", "-c", "nbody_model.c"], cwd=tmp_path, check=True)
    subprocess.run(["c++", "main.cpp", "nbody_model.o", "-lm", "-o", "main"], cwd=tmp_path, check=True)
    assert subprocess.run(["./main"], cwd=tmp_path, check=False).returncode == 0


def test_programs_depend_on_the_architecture_alone():
    first, second = write_program(potential()), write_program(potential(scale=2.0))
    assert first.source == second.source and first.fingerprint == second.fingerprint
    assert not torch.equal(first.numbers, second.numbers)
    assert write_program(potential(lmax=0)).fingerprint != first.fingerprint
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64, got torch.float16"):
        write_program(potential(), torch.float16)


# ---------------------------------------------------------------------- commands
@pytest.mark.slow
def test_commands(tmp_path, capsys, monkeypatch):
    from nbody_pyg.cli.main import main

    monkeypatch.chdir(tmp_path)
    save_model(potential(), "shells.nbody")
    save_model(potential(BondTree()), "tree.nbody")
    ethanol().write("start.xyz")
    assert main(["export", "shells.nbody", "--to", "c", "--dtype", "float32"]) == 0
    assert "written to exported: nbody_model.c" in capsys.readouterr().out
    assert "NBODY_REAL float\n" in (tmp_path / "exported" / "nbody_model.c").read_text()
    assert main(["export", "shells.nbody", "--out", "exported"]) == 1
    assert "exists; replace it with --overwrite" in capsys.readouterr().err
    assert main(["export", "tree.nbody"]) == 1
    assert "cannot be a native program: the scheme is BondTree" in capsys.readouterr().err
    for model, engine, line in (
        ("shells.nbody", "auto", "engine: native\n"),
        ("shells.nbody", "torch", "engine: torch (engine='torch')\n"),
        ("tree.nbody", "auto", "engine: torch (the scheme is BondTree, not NestedShells)\n"),
    ):
        assert main(["md", model, "start.xyz", "--steps", "3", "--engine", engine]) in (0, 3)
        assert line in capsys.readouterr().out
    assert main(["md", "tree.nbody", "start.xyz", "--engine", "native"]) == 1
    assert "engine 'native' cannot evaluate this potential: the scheme is BondTree" in capsys.readouterr().err
    assert main(["info", "shells.nbody"]) == 0
    assert re.search(r"engine here +native\n", capsys.readouterr().out)
    assert main(["info", "tree.nbody"]) == 0
    assert "torch (the scheme is BondTree, not NestedShells)" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "native, for energies on NestedShells" in capsys.readouterr().out


# ---------------------------------------------------------------------- pieces
def test_pieces_rename_what_they_define():
    pieces = Pieces()
    source = """
enum { A = 2, B = A * 2 };
#define TWICE(x) ((x) * A)
typedef struct { int a; } Block;
static const int table[] = {A, B};
static inline double helper(double A_like) { return TWICE(A_like) + table[0]; }
void run(double* x) { Block b = {B}; *x = helper(*x) + b.a + sqrt(2.0); }
"""
    assert pieces.add(source) == 1 and pieces.add(source) == 1 and pieces.add(source.replace("A = 2", "A = 3")) == 2
    text = pieces.source()
    for name in ("A_1", "B_2", "TWICE_1", "Block_2", "table_1", "helper_2", "static void run_1"):
        assert name in text
    assert "A_like" in text and "sqrt(2.0)" in text and not re.search(r"\b(A|B|TWICE|Block|table|helper|run)\b", text)


def test_energies_of_isolated_atoms_in_another_order():
    model = potential()
    model.reference = AtomicReference({8: -2.0, 92: -5.0, 1: -1.0, 6: -3.0}).double()
    assert_native_is_torch(model, ethanol())
