"""Edge features, whole models and training steps on a GPU: eager, and replayed from CUDA graphs where that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cuda_timing import captured
from models import OURS, Runner
from peers import Missing, Timed, build
from report import show
from systems import System, molecules, water
from torch import Tensor

from nbody_pyg.hierarchy.topology import Topology
from nbody_pyg.kernels import set_backend
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.radial import BesselBasis, vector_window


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
