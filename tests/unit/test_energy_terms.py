"""Terms of the energy: each forward runs, they sum to the energy, and one of one's own is a term like any other."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

import factories
from comparison import assert_same_results
from factories import StandIn
from nbody_pyg import BondTree, EnergyTerm, NestedShells, Potential
from nbody_pyg.datasets import fit_atomic_energies, fit_reference, load_embedded
from nbody_pyg.deploy import NBodyCalculator, explain_energy, load_model, relax, run_md, save_model
from nbody_pyg.energy import Structure
from nbody_pyg.geometry import neighbour_list
from nbody_pyg.kernels.autograd_flags import tracing
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.potential import parameter_gradients
from nbody_pyg.radial import smooth_cutoff
from nbody_pyg.runtime.compiled import compile_potential
from nbody_pyg.runtime.cuda_graphs import CapturedPotential, CapturedStep
from nbody_pyg.system import System
from nbody_pyg.testing import assert_conservative, assert_equivariant, assert_extensive, assert_smooth, check_potential
from nbody_pyg.training import TrainingConfig, fit

E0 = {1: -13.6, 6: -1030.0, 8: -2040.0}


class Dispersion(EnergyTerm):
    """-c6 / (r^6 + r0^6), with a learned c6."""

    def __init__(self, cutoff: float = 6.0, radius: float = 2.0) -> None:
        super().__init__()
        self.cutoff, self.radius = cutoff, radius
        self.c6 = nn.Parameter(torch.tensor(20.0))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.c6, 20.0)

    def forward(self, structure: Structure) -> Tensor:
        index, vec = structure.pairs(self.cutoff)
        r = vec.norm(dim=-1)
        energy = -self.c6 / (r**6 + self.radius**6) * smooth_cutoff(r, self.cutoff)
        return energy.new_zeros(structure.z.shape).index_add(0, index[1], 0.5 * energy)


class Well(EnergyTerm):
    """A harmonic well around the mean position of each graph; nothing is learned, no pairs."""

    def forward(self, structure: Structure) -> Tensor:
        pos, size = structure.pos, structure.system.num_graphs
        count = pos.new_zeros(size).index_add(0, structure.batch, torch.ones_like(pos[:, 0]))
        mean = pos.new_zeros(size, 3).index_add(0, structure.batch, pos) / count.unsqueeze(-1)
        return 0.05 * (pos - mean.index_select(0, structure.batch)).square().sum(-1)


def potential(*terms: EnergyTerm, scheme=None, repulsion="auto") -> Potential:
    net = factories.net(scheme or NestedShells((3.0, 3.0)), seed=1)
    return Potential(net, E0, 0.7, repulsion, terms).double()


@pytest.fixture
def squeezed(ethanol):
    """Every bond feels the repulsion."""
    frame = ethanol.clone()
    frame.pos = 0.6 * frame.pos
    return frame


TERMS = {"network": lambda p: p.model, "repulsion": lambda p: p.repulsion, "atoms": lambda p: p.reference,
         "own": lambda p: p.terms[0]}  # fmt: skip
CALLS = {
    "forward": lambda p, frame: p(frame),
    "training": lambda p, frame: p(frame, create_graph=True),
    "hessian": lambda p, frame: p.hessian(frame),
    "captured": lambda p, frame: [f(frame) for f in [CapturedPotential(p, recorder=StandIn())] * 3],
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("term", TERMS)
def test_the_forward_of_every_term_runs(term, call, squeezed, monkeypatch):
    """Hooks fire, and a forward that raises is seen."""
    model, seen = potential(Dispersion()), []
    module = TERMS[term](model)
    with module.register_forward_hook(lambda *_: seen.append(1)):
        CALLS[call](model, squeezed)
    assert seen
    monkeypatch.setattr(module, "forward", lambda *_: (_ for _ in ()).throw(LookupError("called")))
    with pytest.raises(LookupError, match="called"):
        CALLS[call](model, squeezed)


@pytest.mark.parametrize("scheme", [NestedShells((3.0, 3.0)), BondTree(3.0, 4.0, 5.0)], ids=["shells", "tree"])
def test_the_parts_sum_to_the_energy(scheme, squeezed):
    plain, model = potential(scheme=scheme), potential(Dispersion(), Well(), scheme=scheme)
    batch = Batch.from_data_list([squeezed, squeezed])
    found, parts = model(batch), model.energies(batch)
    assert float(parts.terms.abs().max()) > 1e-3 and float(parts.repulsion.abs().max()) > 1e-3
    torch.testing.assert_close(parts.total(), found["energy"], rtol=0, atol=1e-9)
    added = found["energy"] - plain(batch)["energy"]
    torch.testing.assert_close(added.sum(), parts.terms.sum(), rtol=0, atol=1e-9)
    explained = explain_energy(model, squeezed)
    assert explained.total == pytest.approx(float(found["energy"][0]), abs=1e-9)
    assert sum(explained.by_level.values()) == pytest.approx(explained.total, abs=1e-9)
    assert float(explained.on_atoms().sum()) == pytest.approx(float(found["interaction_energy"][0]), abs=1e-9)
    assert float(explained.minus(explained).terms.abs().max()) == 0.0


def structure(model: Potential, data) -> Structure:
    return model.network.structure(model.system(data))


@pytest.mark.slow
def test_derivatives_are_those_of_the_sum(squeezed):
    model = potential(Dispersion(), Well())
    systems = [(squeezed.z, squeezed.pos), (squeezed.z[:6], squeezed.pos[:6])]
    assert_conservative(model, systems=systems)
    assert_equivariant(model, systems=systems)
    assert_extensive(potential(Dispersion()), systems=systems)
    assert assert_smooth(potential(Dispersion(3.0))) > 1.5
    vector = torch.randn(squeezed.pos.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = model.hessian_vector_product(vector, squeezed)
    torch.testing.assert_close(product.flatten(), model.hessian(squeezed) @ vector.flatten(), rtol=0, atol=1e-9)
    h = 1e-5
    ends = [model(squeezed.z, squeezed.pos + sign * h * vector)["forces"] for sign in (1, -1)]
    torch.testing.assert_close(product, (ends[1] - ends[0]) / (2 * h), rtol=0, atol=1e-4 * float(product.abs().max()))


def test_terms_without_weights_need_no_second_derivative(squeezed):
    """They are differentiated apart; results and gradients are those of the sum differentiated as one."""
    model, results = potential(Dispersion(), Well()), []
    parameters = list(model.parameters())
    assert any(p is model.terms[0].c6 for p in parameters)
    for pos in (squeezed.pos, squeezed.pos.clone().requires_grad_()):
        found = model(squeezed.z, pos, create_graph=True)
        loss = found["forces"].square().sum() + found["interaction_energy"].sum()
        results.append((found, parameter_gradients(loss, parameters)))
    assert_same_results(*({k: v.detach() for k, v in found.items()} for found, _ in results))
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-8)
    assert float(results[0][1][-1].abs()) > 1e-6


def test_terms_without_weights_are_differentiated_by_the_cell(squeezed):
    cell = (7.0 * torch.eye(3, dtype=torch.float64)).unsqueeze(0).requires_grad_(True)
    system = potential(Well()).system(squeezed.z, squeezed.pos, cell=cell, pbc=True)
    assert system.cell.requires_grad

    class Held(EnergyTerm):
        def forward(self, structure: Structure) -> Tensor:
            return structure.system.cell[0, 0, 0] * structure.z.double()

    model = potential(Held())

    def slope(forces: bool) -> Tensor:
        energy = model.evaluate(system, forces=forces, create_graph=True)["energy"]
        return torch.autograd.grad(energy.sum(), cell)[0]

    expected = slope(False)
    assert expected[0, 0, 0] > 0.5 * squeezed.z.sum()
    torch.testing.assert_close(slope(True), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_trained_saved_loaded_and_run(tmp_path):
    frames = load_embedded("ethanol")[:6]
    model = potential(Dispersion(5.0))
    fit(model, frames, [], TrainingConfig(max_steps=3, batch_size=3, dtype="float64"), tmp_path / "run")
    assert abs(float(model.terms[0].c6.detach()) - 20.0) > 1e-6
    save_model(model, tmp_path / "own.nbody")
    loaded = load_model(tmp_path / "own.nbody")
    assert loaded.terms[0].cutoff == 5.0 and loaded.terms[0].c6 == model.terms[0].c6
    assert_same_results(loaded(frames[0]), model(frames[0]), 0.0)
    atoms = frames[0].to_ase()
    atoms.calc = NBodyCalculator(loaded)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert atoms.get_potential_energy() == pytest.approx(float(model(frames[0])["energy"]), abs=1e-8)
    assert float(run_md(atoms, 5, timestep=0.2, temperature=100.0).largest_jump) < 5.0
    assert float(relax(model, frames[:2], max_steps=3).start_energy[0]) == float(model(frames[0])["energy"])
    loaded.reset_parameters()
    assert loaded.terms[0].c6 == 20.0
    found = check_potential(loaded, frames[:2], only=("symmetry", "derivatives")).checks
    assert len(found) > 5 and all(line.passed for line in found)


def test_a_file_imports_nothing(tmp_path, monkeypatch):
    module = type(sys)("somebodys_terms")
    module.Own = own = type("Own", (Dispersion,), {"__module__": "somebodys_terms", "__qualname__": "Own"})
    monkeypatch.setitem(sys.modules, "somebodys_terms", module)
    save_model(potential(own()), tmp_path / "own.nbody")
    assert type(load_model(tmp_path / "own.nbody").terms[0]) is own
    module.Own = nn.Identity
    with pytest.raises(ValueError, match="a term of the energy 'somebodys_terms:Own' is not known"):
        load_model(tmp_path / "own.nbody")
    monkeypatch.delitem(sys.modules, "somebodys_terms")
    with pytest.raises(ValueError, match="import 'somebodys_terms' first"):
        load_model(tmp_path / "own.nbody")
    local = type("Local", (Dispersion,), {})
    with pytest.raises(ValueError, match="a class at the top of a module"):
        save_model(potential(local()), tmp_path / "other.nbody")

    class Forgets(EnergyTerm):
        def __init__(self, strength: float) -> None:
            super().__init__()

    with pytest.raises(ValueError, match="Forgets must keep its argument 'strength' as an attribute"):
        Forgets(1.0).config()


@pytest.mark.slow
@pytest.mark.parametrize(("cutoff", "reach"), [(2.5, {"C-H": 1.4}), (6.0, {"C-C": 3.5})], ids=["edges", "lists"])
def test_recorded_programs_hold_all_terms(cutoff, reach):
    frames = load_embedded("ethanol")[:6]
    model = potential(Dispersion(cutoff), Well(), repulsion=ZBLRepulsion([1, 6, 8], reach))
    scheme, wanted_numbers = model.scheme, list(model.parameters())
    compiled = {mode: compile_potential(model, mode, backend="eager") for mode in ("md", "training")}
    captured = CapturedPotential(model, recorder=StandIn())
    step = CapturedStep(model, lambda found, _: found["forces"].square().mean() + found["energy"].std(),
                        recorder=StandIn())  # fmt: skip
    for count in (4, 4, 4, 5):
        batch = Batch.from_data_list([scheme(frame) for frame in frames[:count]])
        wanted = model(batch)
        assert_same_results(compiled["md"](batch), wanted)
        assert_same_results(captured(batch), wanted)
        both = [f(batch, create_graph=True) for f in (compiled["training"], model)]
        losses = [found["forces"].square().sum() for found in both]
        for a, b in zip(*(parameter_gradients(loss, wanted_numbers) for loss in losses), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
        model.zero_grad()
        step(batch, {}).backward()
        gradient = float(model.terms[0].c6.grad)
        loss = model(batch, create_graph=True)
        loss = loss["forces"].square().mean() + loss["energy"].std()
        assert gradient == pytest.approx(float(parameter_gradients(loss, [model.terms[0].c6])[0]), abs=1e-9)
    for recorded in (*compiled.values(), captured, step):
        assert recorded.failure is None
    assert compiled["md"].compiled_calls == 4 and captured.replays > 0 and step.replays > 0


@pytest.mark.slow
def test_elements_are_looked_up_once_by_compiled_programs(ethanol, monkeypatch):
    model, calls = potential(), []
    number = model.model._number
    monkeypatch.setattr(model.model, "_number", lambda z: calls.append(1) or number(z))
    compiled = compile_potential(model, backend="eager")
    for _ in range(3):
        calls.clear()
        found = compiled(ethanol)
    assert len(calls) == 1 and compiled.compiled_calls == 3
    assert_same_results(found, model(ethanol))


def test_a_term_that_knows_fewer_elements_runs_in_eager_mode(ethanol):
    model = potential(repulsion=None)
    model.reference = Potential(model.model, {1: -13.6, 6: -1030.0}).reference
    compiled = compile_potential(model, backend="eager")
    with pytest.raises(ValueError, match=r"z must hold elements of the reference energies \(H, C\), got O"):
        compiled(ethanol)
    known = ethanol.z != 8
    assert_same_results(compiled(ethanol.z[known], ethanol.pos[known]), model(ethanol.z[known], ethanol.pos[known]))
    assert compiled.compiled_calls == 0 and compiled.failure is None


def test_pairs_are_all_within_the_cutoff(ethanol):
    model = potential(scheme=NestedShells((3.0, 3.0)))
    there = structure(model, ethanol)
    for cutoff in (2.0, 3.0, 5.0):
        index, vec = there.pairs(cutoff)
        assert there.pairs(cutoff)[0] is index  # found once
        wanted, _ = neighbour_list(ethanol.pos, cutoff)
        assert {tuple(e) for e in index.t().tolist()} == {tuple(e) for e in wanted.t().tolist()}
        torch.testing.assert_close(vec, ethanol.pos.double()[index[0]] - ethanol.pos.double()[index[1]])
    recorded = structure(model, ethanol)
    with tracing():
        _, vec = recorded.pairs(2.0)
        assert vec.norm(dim=-1).max() == pytest.approx(2.0, abs=1e-4) and len(vec) > len(there.pairs(2.0)[1])
        with pytest.raises(RuntimeError, match="asks for pairs within 5, which must be its attribute 'cutoff'"):
            recorded.pairs(5.0)


def test_errors(ethanol):
    with pytest.raises(TypeError, match="terms must be of classes that derive from EnergyTerm, got Linear"):
        potential(nn.Linear(1, 1))

    class PerGraph(EnergyTerm):
        def forward(self, structure):
            return structure.pos.sum().reshape(1)

    with pytest.raises(ValueError, match=r"PerGraph must return one energy per atom, \[9\], got \[1\]"):
        potential(PerGraph())(ethanol)
    with pytest.raises(NotImplementedError, match=r"EnergyTerm must define forward\(structure\)"):
        potential(EnergyTerm())(ethanol)


def test_terms_work_with_any_model(ethanol):
    model = Potential(factories.Springs(), E0, 2.0, terms=[Dispersion()])
    found = model(ethanol)
    system = System.from_data(ethanol)
    added = Dispersion().double()(Structure(system)).sum().detach()
    assert float(found["energy"] - Potential(factories.Springs(), E0, 2.0)(ethanol)["energy"]) == pytest.approx(
        float(added), abs=1e-9
    )
    assert float(added) < -1e-3


def test_another_model_can_take_the_place_of_the_first(ethanol):
    model, other = potential(), factories.net(seed=5)
    before = model(ethanol)["interaction_energy"]
    model.model = other
    assert model.network.model is other and model.scheme is other.scheme
    torch.testing.assert_close(model(ethanol)["interaction_energy"], 0.7 * other(ethanol), rtol=0, atol=1e-10)
    assert float((model(ethanol)["interaction_energy"] - before).abs()) > 1e-3


def test_old_names_still_work(ethanol):
    model = potential()
    with pytest.warns(DeprecationWarning, match="training is now called create_graph"):
        assert model(ethanol, training=True)["forces"].requires_grad
    with pytest.warns(DeprecationWarning, match="fit_reference is now called fit_atomic_energies"):
        found = fit_reference(load_embedded("ethanol")[:6])
    assert found == fit_atomic_energies(load_embedded("ethanol")[:6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ethanol, create_graph=True)
