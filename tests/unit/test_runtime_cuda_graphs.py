"""CUDA graphs without a GPU: a stand-in records a function and runs it again into the same tensors.

It shows that the library copies, counts, checks, keeps and gives up as it should; not that CUDA can capture the model.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor
from torch_geometric.data import Batch, Data

from comparison import assert_same_results
from factories import StandIn
from nbody_pyg import AtomicReference, BondTree, NBodyNet, NestedShells, Potential, SmoothSurvivors
from nbody_pyg.cli.main import main
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import NBodyCalculator, save_model
from nbody_pyg.hierarchy import TopologyCache
from nbody_pyg.kernels import autograd_flags, set_backend
from nbody_pyg.kernels.gpu import build
from nbody_pyg.kernels.gpu.order import EdgeOrder, edge_order, renew_orders
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.runtime import cuda_graphs
from nbody_pyg.runtime.cuda_graphs import CapturedPotential, CapturedStep

SHELLS, TREE = NestedShells((3.0, 3.0)), BondTree(3.0, 4.0, 5.0)
SCHEMES = pytest.mark.parametrize("scheme", [SHELLS, TREE], ids=["shells", "tree"])


class Frozen(StandIn):
    """A recorder that is wrong: it gives what it gave when it recorded."""

    def capture(self, run, device):
        results = [result.clone() for result in run()]
        return lambda: results


def network(scheme=SHELLS, **arguments) -> Potential:
    torch.manual_seed(2)
    net = NBodyNet([1, 6, 8], scheme, channels=4, lmax=1, **arguments)
    # Beyond the bonds: the repulsion is added outside of the graph
    return Potential(net, {1: -13.0, 6: -1030.0, 8: -2040.0}, 0.7, ZBLRepulsion([1, 6, 8], {"C-H": 1.4})).double()


@pytest.fixture(scope="module")
def frame():
    return load_embedded("ethanol")[0]


def moved(frame, step: int) -> dict[str, Tensor]:
    """Arguments at slightly other positions."""
    noise = torch.randn(frame.pos.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return {"z": frame.z, "pos": frame.pos.double() + 0.01 * noise, "batch": torch.zeros_like(frame.z)}


# ---------------------------------------------------------------------------------------- evaluations
@SCHEMES
def test_replays_are_the_potential(frame, scheme):
    """Captured when seen for the second time; results are copies that later replays leave alone."""
    potential, recorder = network(scheme), StandIn()
    if scheme is TREE:  # the results are those of the graph, with nothing added
        potential.repulsion = None
    captured = CapturedPotential(potential, recorder=recorder)
    topology = scheme.topology(**moved(frame, 0))
    kept = []
    for step in range(6):
        found = captured(**moved(frame, step), topology=topology)
        kept.append((found, {key: value.clone() for key, value in found.items()}))
        assert_same_results(found, potential(**moved(frame, step), topology=topology))
        assert not any(value.requires_grad for value in found.values())
    for found, before in kept:
        assert_same_results(found, before)
    assert (kept[1][0]["forces"] - kept[5][0]["forces"]).abs().max() > 1e-3
    assert (captured.calls, captured.captures, captured.replays, captured.failure) == (6, 1, 5, None)
    assert recorder.captured == 1 and recorder.replayed == 5 and not autograd_flags.is_tracing()


@pytest.mark.parametrize("change", ["reference", "repulsion", "model"])
def test_other_modules_in_a_potential_are_seen(frame, change):
    potential = network()
    captured = CapturedPotential(potential, recorder=StandIn())
    topology = SHELLS.topology(**moved(frame, 0))
    before = [captured(**moved(frame, 0), topology=topology)["energy"] for _ in range(3)][-1]
    other = {
        "reference": AtomicReference({1: -1.0, 6: -2.0, 8: -3.0}),
        "repulsion": ZBLRepulsion([1, 6, 8], {"C-H": 1.8}),
        "model": NBodyNet([1, 6, 8], SHELLS, channels=4, lmax=1).double(),
    }
    setattr(potential, change, other[change])
    for _ in range(3):
        found = captured(**moved(frame, 0), topology=topology)
        assert_same_results(found, potential(**moved(frame, 0), topology=topology))
        assert (found["energy"] - before).abs() > 1e-4
    assert (captured.captures, captured.failure) == (2, None)


def test_index_tensors_are_copied_only_when_they_are_others(frame, monkeypatch):
    copies: list[int] = []
    call = cuda_graphs._Graph.__call__

    def counted(self, tensors, fresh):
        copies.append(len(fresh))
        return call(self, tensors, fresh)

    monkeypatch.setattr(cuda_graphs._Graph, "__call__", counted)
    potential = network()
    captured = CapturedPotential(potential, recorder=StandIn())
    topology = SHELLS.topology(**moved(frame, 0))
    batch = torch.zeros_like(frame.z)
    for step in range(5):
        given = moved(frame, step) | {"batch": batch}
        assert_same_results(captured(**given, topology=topology), potential(**given, topology=topology))
    # Everything is copied when the graph is made; after that the positions alone
    assert copies == [0, 1, 1, 1]
    # The same object with other entries: edges in another order
    edges = topology.child_index[1]
    before = edges.clone()
    edges.copy_(edges.flip(1))
    assert not torch.equal(edges, before)
    found = captured(**given, topology=topology)
    assert copies[-1] == 2
    assert_same_results(found, potential(**given, topology=topology))


def test_other_edges_of_the_same_number(frame):
    """Atoms in another order: all that is equal is the shapes. The first replay with other edges is compared."""
    potential = network()
    captured = CapturedPotential(potential, recorder=StandIn())
    order = torch.randperm(len(frame.z), generator=torch.Generator().manual_seed(1))
    topology = SHELLS.topology(**moved(frame, 0))
    for step in range(4):
        captured(**moved(frame, step), topology=topology)
    (graph,) = captured._graphs.values()
    assert graph.checks == 2 and not graph.checked_other_edges
    turned = {key: value[order] for key, value in moved(frame, 4).items()}
    assert_same_results(captured(**turned), potential(**turned))
    assert captured.captures == 1 and captured.replays == 4
    assert graph.checks == 3 and graph.checked_other_edges
    turned["z"] = torch.where(turned["z"] == 8, 9, turned["z"])
    with pytest.raises(ValueError, match="z must hold elements of this model"):
        captured(**turned)
    assert captured.failure is None


def test_edges_that_lead_nowhere_are_refused(frame):
    captured = CapturedPotential(network(), recorder=StandIn())
    topology = SHELLS.topology(**moved(frame, 0))
    for step in range(4):
        captured(**moved(frame, step), topology=topology)
    topology.child_index[1][0, 0] = 99
    with pytest.raises(ValueError, match=r"child_index\[1\]\[0\] must lie between"):
        captured(**moved(frame, 0), topology=topology)


def test_the_graphs_used_last_are_kept(frame):
    potential, recorder = network(), StandIn()
    captured = CapturedPotential(potential, max_graphs=2, recorder=recorder)
    sizes = [9, 8, 7]

    def evaluate(size: int) -> None:
        given = {key: value[:size] for key, value in moved(frame, size).items()}
        assert_same_results(captured(**given), potential(**given))

    for size in sizes:
        evaluate(size)
    assert captured.captures == 0
    for size in [9, 8, 9, 7]:  # 8 is the one not used for longest
        evaluate(size)
    assert captured.captures == 3 and len(captured._graphs) == 2
    evaluate(9)
    assert captured.captures == 3
    evaluate(8)  # seen anew: once in eager mode
    assert captured.captures == 3
    evaluate(8)
    assert captured.captures == 4 and captured.failure is None


def test_what_is_seen_once_is_not_remembered_for_ever(frame):
    captured = CapturedPotential(network(), recorder=StandIn())
    for size in range(200):
        captured._seen_often(size)
    assert len(captured._sightings) <= 64


def test_weights_are_read_at_every_replay(frame):
    """In place they are seen by the graph; where they lie elsewhere, it is captured anew."""
    potential = network()
    captured = CapturedPotential(potential, recorder=StandIn())
    for step in range(3):
        before = captured(**moved(frame, step))
    weight = next(potential.parameters())
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.1)
    found = captured(**moved(frame, 2))
    assert_same_results(found, potential(**moved(frame, 2)))
    assert (found["forces"] - before["forces"]).abs().max() > 1e-6 and captured.captures == 1
    weight.data = weight.data * 1.5
    assert_same_results(captured(**moved(frame, 2)), potential(**moved(frame, 2)))
    assert captured.captures == 2


def test_what_runs_in_eager_mode(frame):
    potential, recorder = network(), StandIn()
    captured = CapturedPotential(potential, recorder=recorder)
    for _ in range(3):
        assert captured(**moved(frame, 0), create_graph=True)["forces"].requires_grad
        assert set(captured(**moved(frame, 0), compute_forces=False)) == {"energy", "interaction_energy"}
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            captured(**moved(frame, 0))
    # By default graphs are those of a GPU: nothing happens to tensors on the CPU
    on_cpu = CapturedPotential(potential)
    for step in range(3):
        assert_same_results(on_cpu(**moved(frame, step)), potential(**moved(frame, step)))
    assert recorder.captured == captured.replays == on_cpu.replays == 0 and on_cpu.failure is None


def test_survivors_run_in_eager_mode_without_an_attempt(frame):
    """Evaluations and steps: their weights have as many terms as differ from zero, which no graph can follow."""
    scheme, recorder = SmoothSurvivors((2.0, 3.5), cutoffs=(3.2, 5.0, 8.0)), StandIn()
    potential = network(scheme)
    captured = CapturedPotential(potential, recorder=recorder)
    step = CapturedStep(potential, forces_and_energies, recorder=recorder)
    (batch, labels), *_ = batches(scheme, count=1)
    for topology in (None, scheme.topology(**moved(frame, 0))):
        for _ in range(3):  # a warning would be an error
            found = captured(**moved(frame, 0), topology=topology)
            assert_same_results(found, potential(**moved(frame, 0), topology=topology))
            assert float(step(batch, labels).detach()) > 1e-3
    assert captured.failure is step.failure is None and recorder.captured == captured.replays == step.replays == 0


# ---------------------------------------------------------------------------------------- failures
def test_a_wrong_replay_is_noticed(frame):
    """The recorder gives old results: right for the call that captured, wrong for the next one."""
    potential = network()
    captured = CapturedPotential(potential, recorder=Frozen())
    for step in range(2):
        assert_same_results(captured(**moved(frame, step)), potential(**moved(frame, step)))
    with pytest.warns(RuntimeWarning, match=r"CUDA graph failed \(ArithmeticError: results differ from eager mode"):
        assert_same_results(captured(**moved(frame, 2)), potential(**moved(frame, 2)))
    assert_same_results(captured(**moved(frame, 3)), potential(**moved(frame, 3)))  # a second warning would be an error
    assert captured.replays == 1 and not captured._graphs and repr(captured) == "CapturedPotential(eager)"


def test_edges_that_are_not_copied_are_noticed(frame, monkeypatch):
    potential = network()
    captured = CapturedPotential(potential, recorder=StandIn())
    topology = SHELLS.topology(**moved(frame, 0))
    for step in range(4):
        captured(**moved(frame, step), topology=topology)
    call = cuda_graphs._Graph.__call__
    monkeypatch.setattr(cuda_graphs._Graph, "__call__", lambda self, t, fresh: call(self, t, fresh[:1]))
    order = torch.arange(len(frame.z)).flip(0)
    turned = {key: value[order] for key, value in moved(frame, 4).items()}
    with pytest.warns(RuntimeWarning, match="results differ from eager mode"):
        assert_same_results(captured(**turned), potential(**turned))


def test_a_capture_that_fails_is_no_disaster(frame):
    class Failing(StandIn):
        def capture(self, run, device):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    potential = network()
    captured = CapturedPotential(potential, recorder=Failing())
    captured(**moved(frame, 0))
    with pytest.warns(RuntimeWarning, match=r"\(RuntimeError: operation not permitted when stream is capturing\)"):
        assert_same_results(captured(**moved(frame, 1)), potential(**moved(frame, 1)))
    assert_same_results(captured(**moved(frame, 2)), potential(**moved(frame, 2)))
    assert captured.captures == 0 and captured.failure.startswith("RuntimeError")


def test_errors():
    with pytest.raises(TypeError, match="potential must hold an NBodyNet to be captured, got a Linear"):
        CapturedPotential(Potential(torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="max_graphs must be a whole number, 1 or more, got 0; try 4"):
        CapturedPotential(network(), max_graphs=0)
    with pytest.raises(ValueError, match="potential must have a parameter that requires a gradient"):
        CapturedStep(network().requires_grad_(False), forces_and_energies)


# ---------------------------------------------------------------------------------------- dynamics
@pytest.mark.slow
@pytest.mark.parametrize("periodic", [False, True], ids=["open", "cell"])
@pytest.mark.parametrize("scheme", [NestedShells((2.0, 3.0)), TREE], ids=["shells", "tree"])
def test_untrimmed_lists_give_the_same_energies(frame, scheme, periodic):
    """Edges beyond the radius have windows of zero, and stay the same tensors until the next search."""
    potential = network(scheme)
    given = moved(frame, 0)
    z, pos = given["z"], given["pos"]
    cell, pbc = (7.0 * torch.eye(3).double()[None], torch.ones(1, 3, dtype=torch.bool)) if periodic else (None, None)
    exact, whole = TopologyCache(scheme, skin=0.6), TopologyCache(scheme, skin=0.6, trim=False)
    seen, same = [], 0
    for step in range(12):
        pos = pos + 0.05 * torch.randn(pos.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        wanted, found = exact(z, pos, None, cell, pbc), whole(z, pos, None, cell, pbc)
        arguments = {"z": z, "pos": pos, "cell": cell, "pbc": pbc, "compute_stress": periodic}
        assert_same_results(potential(**arguments, topology=found), potential(**arguments, topology=wanted))
        same += bool(seen) and found is seen[-1]
        seen.append(found)
        edges = [[0 if i is None else i.shape[1] for i in (*t.child_index, *t.pair_index)] for t in (found, wanted)]
        assert all(a >= b for a, b in zip(*edges, strict=True)) and edges[0] != edges[1]
    assert 1 < whole.rebuilds == exact.rebuilds < 12 and same == 12 - whole.rebuilds


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", StandIn)


@pytest.mark.slow
def test_dynamics_of_a_crystal(stand_in):
    """The option of the calculator: energies, forces and stress along a trajectory with searches in between."""
    atoms = bulk("C", "diamond", a=3.7, cubic=True)
    atoms.rattle(0.05, seed=1)
    results = {}
    for replays in (False, True):
        copy = atoms.copy()
        copy.calc = calculator = NBodyCalculator(network(), skin=0.4, cuda_graphs=replays)
        steps, generator = [], np.random.default_rng(1)
        for step in range(12):
            copy.positions += 0.05 * generator.normal(size=copy.positions.shape)
            if step > 8:
                copy.set_cell(copy.cell * 1.001, scale_atoms=True)
            steps.append((copy.get_potential_energy(), copy.get_forces(), copy.get_stress()))
        results[replays] = [np.array(column) for column in zip(*steps, strict=True)]
    captured = calculator._evaluate
    assert captured.failure is None and captured.captures >= 1 and captured.replays >= 6
    assert calculator.topologies.rebuilds > 1
    for found, wanted in zip(results[True], results[False], strict=True):
        assert np.abs(found - wanted).max() < 1e-9 < np.abs(wanted).max()


def test_options_say_that_graphs_need_a_gpu(tmp_path, frame, capsys):
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU, got device 'cpu'; pass device='cuda'"):
        NBodyCalculator(network(), cuda_graphs=True)
    with pytest.raises(ValueError, match="compile and cuda_graphs must not both be True"):
        NBodyCalculator(network(), cuda_graphs=True, compile=True)
    save_model(network(), tmp_path / "a.nbody")
    start = tmp_path / "start.xyz"
    Atoms(frame.z.numpy(), frame.pos.numpy()).write(start)
    status = main(["md", str(tmp_path / "a.nbody"), str(start), "--cuda-graphs", "--out", str(tmp_path / "md")])
    assert status != 0 and "cuda_graphs needs a GPU" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- training steps
def forces_and_energies(results: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    energy = (results["energy"] - labels["energy"]).to(results["forces"].dtype)
    return (results["forces"] - labels["forces"]).square().mean() + 0.05 * energy.square().mean()


def batches(scheme, count: int = 6):
    """Batches of three frames that share their numbers of edges: all atoms lie within the radii."""
    frames = [scheme(frame) for frame in load_embedded("ethanol")[: 3 * count]]
    for start in range(0, len(frames), 3):
        batch = Batch.from_data_list(frames[start : start + 3])
        yield batch, {"forces": batch.forces, "energy": batch.energy}


WIDE = pytest.mark.parametrize("scheme", [NestedShells((9.0, 9.0)), BondTree(9.0, 9.0, 9.0)], ids=["shells", "tree"])


@pytest.mark.slow
@WIDE
def test_steps_are_those_of_eager_mode(scheme):
    """Losses, gradients, and weights after several updates, through the repulsion and the reference energies."""
    weights = []
    for recorder in (None, StandIn()):
        potential = network(scheme)
        optimizer = torch.optim.Adam(potential.parameters(), lr=1e-2)
        step = CapturedStep(potential, forces_and_energies, recorder=recorder)
        for batch, labels in batches(scheme):
            optimizer.zero_grad()
            loss = step(batch, labels)
            loss.backward()
            wanted = forces_and_energies(potential(batch, create_graph=True), labels)
            gradients = torch.autograd.grad(wanted, list(potential.parameters()), allow_unused=True)
            torch.testing.assert_close(loss.detach(), wanted.detach(), rtol=1e-10, atol=0)
            assert max(g.abs().max() for g in gradients if g is not None) > 1e-3
            for p, g in zip(potential.parameters(), gradients, strict=True):
                found = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(found, torch.zeros_like(p) if g is None else g, rtol=1e-9, atol=1e-9)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in potential.parameters()]))
    assert (step.calls, step.captures, step.replays, step.failure) == (6, 1, 5, None)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-8)


def test_gradients_add_up_and_outlive_the_next_step():
    scheme = NestedShells((9.0,))
    potential = network(scheme)
    step = CapturedStep(potential, forces_and_energies, recorder=StandIn())
    given = list(batches(scheme))
    for batch, labels in given[:2]:
        step(batch, labels)
    losses = [step(batch, labels) for batch, labels in given[2:4]]
    (losses[0] + 2.0 * losses[1]).backward()
    found = [None if p.grad is None else p.grad.clone() for p in potential.parameters()]
    potential.zero_grad()
    first, second = (forces_and_energies(potential(b, create_graph=True), labels) for b, labels in given[2:4])
    (first + 2.0 * second).backward()
    assert step.replays == 3 and (losses[0] - losses[1]).detach().abs() > 1e-6
    for p, g in zip(potential.parameters(), found, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(g, p.grad, rtol=1e-9, atol=1e-9)


def test_stress_in_a_loss():
    atoms = bulk("C", "diamond", a=3.7, cubic=True)
    potential = network()
    pos = torch.from_numpy(atoms.positions)
    cell, z = torch.from_numpy(atoms.cell.array)[None], torch.from_numpy(atoms.numbers).long()

    def loss(results: dict, labels: dict) -> Tensor:
        return (results["stress"] - labels["stress"]).square().sum() + results["forces"].square().sum()

    step = CapturedStep(potential, loss, recorder=StandIn())
    pos = pos + 0.1 * torch.randn(pos.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number in range(4):
        data = SHELLS(Data(z=z, pos=pos + 1e-3 * number, cell=cell, pbc=torch.ones(1, 3, dtype=torch.bool)))
        labels = {"stress": torch.full((1, 3, 3), 0.1 * number, dtype=torch.float64)}
        potential.zero_grad()
        value = step(data, labels, compute_stress=True)
        wanted = loss(potential(data, create_graph=True, compute_stress=True), labels)
        torch.testing.assert_close(value.detach(), wanted.detach(), rtol=1e-10, atol=0)
    assert step.replays == 3 and step.failure is None and wanted.detach() > 1e-3


def test_wrong_gradients_are_noticed(monkeypatch):
    """The recorded function gives gradients that are 1% off."""
    scheme = NestedShells((9.0,))
    potential = network(scheme)
    given = list(batches(scheme, 4))
    step = CapturedStep(potential, forces_and_energies, recorder=StandIn())
    right = CapturedStep._gradient
    wrong = lambda self, value: right(self, value) * (1.01 if autograd_flags.is_tracing() else 1.0)  # noqa: E731
    monkeypatch.setattr(CapturedStep, "_gradient", wrong)
    step(*given[0])
    with pytest.warns(RuntimeWarning, match="results differ from eager mode by 1.0e-02"):
        loss = step(*given[1])
    wanted = forces_and_energies(potential(given[1][0], create_graph=True), given[1][1])
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    assert step(*given[2]).requires_grad and step.replays == 0


def test_errors_of_a_step():
    scheme = NestedShells((9.0,))
    batch, labels = next(batches(scheme))
    with pytest.raises(TypeError, match=r"labels\['forces'\] must be a tensor, got float"):
        CapturedStep(network(scheme), forces_and_energies)(batch, {"forces": 1.0})
    with pytest.raises(ValueError, match=r"loss must return a tensor of one number, got \[27, 3\]"):
        CapturedStep(network(scheme), lambda results, labels: results["forces"])(batch, labels)


# ---------------------------------------------------------------------------------------- orders of edges on a GPU
def test_orders_are_renewed_in_place():
    """Graphs read the sorted edges of the GPU kernels by address."""
    generator = torch.Generator().manual_seed(0)
    index, other = (torch.randint(5, (2, 30), generator=generator) for _ in range(2))
    orders = [edge_order(index, 5, 5), edge_order(index, 6, 7)]
    before = [(rows, [t.clone() for t in rows]) for order in orders for rows in (order.by(0), order.by(1))]
    index.copy_(other)
    renew_orders(index)
    assert edge_order(index, 5, 5) is orders[0] and edge_order(index, 6, 7) is orders[1]
    fresh = [EdgeOrder(other, 5, 5), EdgeOrder(other, 6, 7)]
    wanted = [rows for order in fresh for rows in (order.by(0), order.by(1))]
    for (rows, old), new in zip(before, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows, new, strict=True))
        assert not torch.equal(rows.edge, old[1])
    assert all(torch.equal(a, b) for a, b in zip(orders[0].ends, fresh[0].ends, strict=True))
    renew_orders(other.clone())  # nothing is known of it


@pytest.mark.slow
@pytest.mark.skipif(
    not build.available() or not build.interpreted(), reason="Triton is not installed, or runs for real"
)
@pytest.mark.parametrize("mutant", [False, True], ids=["", "mutant"])
def test_gpu_kernels_follow_other_edges(frame, monkeypatch, mutant):
    """In Triton's interpreter. The mutant believes that the orders of the old edges are those of the new ones."""
    if mutant:
        monkeypatch.setattr(EdgeOrder, "renew", lambda self, index: None)
    set_backend("triton")
    try:
        frame = {key: value[:4] for key, value in moved(frame, 0).items()}
        torch.manual_seed(0)
        net = NBodyNet([1, 6, 8], NestedShells((9.0, 9.0)), channels=1, lmax=0, correlation=1, num_basis=2)
        potential = Potential(net, repulsion=None).double()
        captured = CapturedPotential(potential, recorder=StandIn())
        for _ in range(2):
            captured(**frame)
        topology = net.scheme.topology(**frame)
        topology.child_index[1].copy_(topology.child_index[1].flip(1))  # the same edges in another order
        if mutant:
            with pytest.warns(RuntimeWarning, match="results differ from eager mode"):
                captured(**frame, topology=topology)
            return
        assert_same_results(captured(**frame, topology=topology), potential(**frame, topology=topology))
        assert captured.failure is None and captured.replays == 2
    finally:
        set_backend("auto")
