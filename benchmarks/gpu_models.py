"""Edge features, whole models and training steps on a GPU: eager, and replayed from CUDA graphs where that works.

``graphs`` does so through :mod:`nbody_pyg.runtime.cuda_graphs`, as a simulation and a training would; the other
sections capture the bare call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from cuda_timing import captured
from models import OURS, Runner
from peers import Missing, Timed, build
from report import show
from systems import System, molecules, water
from torch import Tensor
from torch_geometric.data import Batch, Data

from nbody_pyg.hierarchy import TopologyCache
from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.kernels import set_backend
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.potential import Potential
from nbody_pyg.radial import BesselBasis, vector_window
from nbody_pyg.runtime.cuda_graphs import CapturedPotential, CapturedStep
from nbody_pyg.training.loss import EnergyForceLoss

#: Of what graphs replay, relative to the largest number: float32 with sums in any order.
TOLERANCE = 2e-4


# ------------------------------------------------------------------------------------- to the device
def moved(value: Any, device: torch.device) -> Any:
    """A tensor, a topology, or a dict of tensors on another device; all else as it is."""
    if isinstance(value, (Tensor, Topology)):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(inner, device) for key, inner in value.items()}
    return value


def runner_on(name: str, system: System, device: torch.device) -> Runner:
    """A model with its edges on the device; built on the CPU, where its tables are made."""
    peer: Timed = build(name, system).to(device)
    for key, value in list(vars(peer).items()):
        if not key.startswith("_"):
            setattr(peer, key, moved(value, device))
    runner = Runner(peer, System(*(moved(value, device) for value in system)))
    runner.potential.to(device)
    runner.energy, runner.forces = runner.energy.to(device), runner.forces.to(device)
    return runner


def attempt(call: Callable[[], float]) -> tuple[float | None, str | None]:
    """Seconds, or why there are none."""
    try:
        return call(), None
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


# ------------------------------------------------------------------------------------- features
def features(run) -> list[dict]:
    """Harmonics, radial functions and windows of the edges, plain torch and our kernels."""
    records, rows = [], []
    for edges in run.args.edges:
        embedding = EdgeEmbedding(2, BesselBasis(8, 5.0)).to(run.device)
        vec = (2 * torch.randn(edges, 3, device=run.device)).requires_grad_(True)
        index = torch.zeros(2, edges, dtype=torch.long, device=run.device)

        def call(embedding=embedding, vec=vec, index=index) -> Tensor:
            window = vector_window(vec, 5.0)
            made = embedding(index, vec, window, 1)
            return made.harmonics.sum() + made.radial.sum()

        def slope(call=call, vec=vec) -> Tensor:
            return torch.autograd.grad(call(), vec)[0]

        def double(call=call, vec=vec) -> Tensor:
            (first,) = torch.autograd.grad(call(), vec, create_graph=True)
            return torch.autograd.grad(first.square().sum(), vec)[0]

        for name in ("torch", "triton"):
            set_backend(name)
            times = {key: run.time(stage) for key, stage in (("forward", call), ("first", slope), ("second", double))}
            records.append({"edges": edges, "path": name, **times})
            rows.append([edges, name, *(1e3 * t for t in times.values())])
    set_backend("auto")
    show("features of edges, lmax 2, 8 radial functions, with the window",
         ["edges", "path", "fwd ms", "fwd+bwd ms", "fwd+bwd+dbl ms"], rows)  # fmt: skip
    return records


# ------------------------------------------------------------------------------------- models
def _times(run, name: str, system: System, task: str, backends: list[str]) -> list[dict]:
    records = []
    for backend in backends:
        set_backend(backend)
        record: dict[str, Any] = {"model": name, "backend": backend, "atoms": system.num_atoms, "task": task}
        try:
            runner = runner_on(name, system, run.device)
        except Missing as error:
            return [record | {"missing": str(error)}]

        def step(runner: Runner = runner) -> None:
            runner.potential.zero_grad(set_to_none=True)
            runner.backward()

        call = runner.evaluate if task == "E+F" else step
        record["seconds"], record["error"] = attempt(lambda call=call: run.time(call))
        if run.cuda and record["error"] is None:
            record["graph_seconds"], record["graph_error"] = attempt(lambda call=call: run.time(captured(call)))
        records.append(record)
    set_backend("auto")
    return records


def _table(title: str, records: list[dict]) -> None:
    rows = []
    for r in records:
        seconds = r.get("seconds")
        rows.append([
            r["model"], r["backend"], r["atoms"], 1e3 * seconds if seconds else None,
            1e3 * r["graph_seconds"] if r.get("graph_seconds") else None,
            1e6 * seconds / r["atoms"] if seconds else None,
        ])  # fmt: skip
    show(title, ["model", "backend", "atoms", "eager ms", "CUDA graph ms", "eager us/atom"], rows)
    for r in records:
        for key in ("missing", "error", "graph_error"):
            if r.get(key):
                print(f"  {r['model']}, {r['atoms']} atoms, {key.replace('_', ' ')}: {r[key]}")


def _own(run, name: str) -> list[str]:
    return run.args.backends if name == OURS else ["auto"]


def models(run) -> list[dict]:
    """E+F of one molecule and of droplets of water."""
    systems = [molecules(1)] + [water(count) for count in run.args.waters]
    records: list[dict] = []
    for system in systems:
        for name in run.args.models:
            if run.left > 0:
                records += _times(run, name, system, "E+F", _own(run, name))
    _table("energy and forces, float32", records)
    return records


def training(run) -> list[dict]:
    """Loss on forces and energies and its backward pass, without the optimizer."""
    records: list[dict] = []
    for count in run.args.batches:
        for name in run.args.models:
            if run.left > 0:
                records += _times(run, name, molecules(count), "step", _own(run, name))
    _table("training step without optimizer, float32, molecules of 22 atoms", records)
    return records


# ------------------------------------------------------------------------------------- the library's graphs
def _deviation(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of a list of tensors, relative to the largest number of each."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True) if b.any())


def _potential(system: System, device: torch.device) -> Potential:
    """Our network as a potential of its own, built on the CPU, where its tables are made."""
    return Potential(build(OURS, system).model).to(device)


def _dynamics(run, system: System) -> dict[str, Any]:
    """Steps of a simulation, neighbours within a skin included, eager and replayed."""
    potential = _potential(system, run.device)
    z, pos, batch = (moved(tensor, run.device) for tensor in (system.z, system.pos.float(), system.batch))
    places = [pos + 0.02 * torch.randn_like(pos) for _ in range(8)]
    captured = CapturedPotential(potential)
    calls = {}
    for name, evaluate in (("eager", potential), ("graph", captured)):
        lists = TopologyCache(potential.model.scheme, skin=1.0, trim=name == "eager")

        def step(pos: Tensor, evaluate=evaluate, lists=lists) -> list[Tensor]:
            found = evaluate(z, pos, batch, topology=lists(z, pos, batch))
            return [found["interaction_energy"], found["forces"]]

        calls[name] = step
    return _record(run, "md", system.num_atoms, calls, places, captured)


def _steps(run, count: int) -> dict[str, Any]:
    """Losses and their gradients, without the optimizer, eager and replayed."""
    system = molecules(count)
    potential, loss = _potential(system, run.device), EnergyForceLoss()
    frames = [
        potential.model.scheme(Data(z=system.z[of], pos=system.pos[of].float()))
        for of in (system.batch == graph for graph in range(count))
    ]
    data = Batch.from_data_list(frames).to(run.device)
    # One list of edges for all places, so that all share a graph: unsigned hierarchies are used as they are
    del data["scheme"], data["hierarchy_mark"]
    labels = {"energy": torch.randn(count, device=run.device), "forces": torch.randn_like(data.pos)}
    places = [data.pos + 0.02 * torch.randn_like(data.pos) for _ in range(8)]

    def errors(found: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        return loss(found["interaction_energy"] - labels["energy"], found["forces"] - labels["forces"])

    captured = CapturedStep(potential, errors)
    values = {"graph": captured, "eager": lambda data, labels: errors(potential(data, create_graph=True), labels)}
    calls = {}
    for name in ("eager", "graph"):

        def step(pos: Tensor, value=values[name]) -> list[Tensor]:
            potential.zero_grad()
            data.pos = pos
            found = value(data, labels)
            found.backward()
            return [found.detach(), *(p.grad for p in potential.parameters() if p.grad is not None)]

        calls[name] = step
    return _record(run, "step", system.num_atoms, calls, places, captured)


def _record(
    run,
    task: str,
    atoms: int,
    calls: dict[str, Callable],
    places: list[Tensor],
    captured: CapturedPotential | CapturedStep,
) -> dict[str, Any]:
    """Compare a call with its captured form at all places, then time both there.

    Raises: AssertionError: they differ, or nothing was captured.
    """
    error = max(_deviation(calls["graph"](pos), calls["eager"](pos)) for pos in places)
    if captured.failure is not None or captured.replays == 0 or not error <= TOLERANCE:
        raise AssertionError(f"{task}, {atoms} atoms: {captured.replays} replays, error {error}, {captured.failure}")
    record = {"task": task, "atoms": atoms, "error": error}
    for name, call in calls.items():
        cycle = itertools.cycle(places)
        record[f"{name}_s"] = run.time(lambda call=call, cycle=cycle: call(next(cycle)))
    return record | {"captures": captured.captures, "replays": captured.replays}


def graphs(run) -> list[dict]:
    """Steps of dynamics and of training through the library's CUDA graphs: as in eager mode, and how fast."""
    if run.device.type != CapturedPotential(_potential(molecules(1), run.device)).recorder.device_type:
        print("graphs: CUDA graphs need a GPU, left out\n")
        return []
    systems = [molecules(1)] + [water(count) for count in run.args.waters]
    records = [_dynamics(run, system) for system in systems if run.left > 0]
    records += [_steps(run, count) for count in run.args.batches if run.left > 0]
    rows = [[r["task"], r["atoms"], 1e3 * r["eager_s"], 1e3 * r["graph_s"], r["eager_s"] / r["graph_s"],
             f"{r['error']:.1e}", r["captures"]] for r in records]  # fmt: skip
    show("CUDA graphs of the library, float32: md with neighbour lists and all checks, step without optimizer",
         ["task", "atoms", "eager ms", "graph ms", "times faster", "deviation", "captures"], rows)  # fmt: skip
    return records
