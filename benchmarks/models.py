"""Energy and forces, and training steps, of NBodyNet beside its peers.

    python benchmarks/models.py

Three systems: one molecule (alanine dipeptide, 22 atoms), a batch of five, a droplet of about 1,000 atoms of water.
Every model runs in float32 on one thread behind the same Potential; edges, topologies and labels are handed in, so
that neighbour search and loading are not timed. Training steps: loss of forces and energies, backward pass; and the
same with clipping and Adam on one flat tensor (for NBodyNet also SOAP, its default).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers import PEERS, Missing, Timed, build
from report import arguments, show, start, write
from systems import System, molecules, water
from timing import Timing, interleave, peak_memory
from torch import Tensor

from nbody_pyg.potential import Potential
from nbody_pyg.training.flat import FlatParameters
from nbody_pyg.training.loss import EnergyForceLoss
from nbody_pyg.training.optim import build_optimizer

#: So small that the weights stay what they are, however many steps are timed.
_RATE = 1e-7
OURS = "NBodyNet"


class Runner:
    """A model on one system, as the functions that are timed."""

    def __init__(self, model: Timed, system: System) -> None:
        self.potential, self.system = Potential(model), system
        generator = torch.Generator().manual_seed(0)
        self.energy = torch.randn(system.num_graphs, dtype=torch.float64, generator=generator)
        self.forces = torch.randn(system.num_atoms, 3, generator=generator)
        self.loss = EnergyForceLoss()
        self.num_parameters = sum(p.numel() for p in model.parameters())

    def evaluate(self) -> dict[str, Tensor]:
        """Energy and forces as a simulation asks for them."""
        return self.potential(self.system.z, self.system.pos, self.system.batch)

    def backward(self) -> None:
        """One step without the update."""
        result = self.potential(self.system.z, self.system.pos, self.system.batch, create_graph=True)
        error = (result["energy"] - self.energy).to(self.forces.dtype)
        self.loss(error, result["forces"] - self.forces).backward()

    def step(self, optimizer: str) -> Callable[[], None]:
        """One whole step with the named optimizer, as the trainer does it."""
        self.potential.zero_grad()
        flat = FlatParameters(self.potential)
        rule = build_optimizer(optimizer, self.potential, _RATE, flat=flat)

        def run() -> None:
            flat.zero_grad()
            self.backward()
            flat.clip_grad_norm(10.0)
            rule.step()

        return run


def build_system(name: str, args) -> System:
    if name == "droplet":
        return water(args.waters)
    return molecules(args.batch if name == "batch" else 1)


def runners(system: System, names: list[str], missing: dict[str, str]) -> dict[str, Runner]:
    """Those models that run here; the others go to ``missing`` with the reason."""
    found = {}
    for name in names:
        try:
            found[name] = Runner(build(name, system), system)
            result = found[name].evaluate()
        except Missing as error:
            missing[name] = str(error)
            continue
        if not bool(result["forces"].isfinite().all() & (result["forces"].abs().max() > 0)):
            raise AssertionError(f"{name} gives no finite forces")
    return found


def measure(
    found: dict[str, Runner], training: bool, seconds: float, rounds: tuple[int, int]
) -> dict[str, dict[str, Timing]]:
    """Task -> model -> times."""
    times = {"E+F": interleave({name: runner.evaluate for name, runner in found.items()}, seconds, rounds)}
    if not training:
        return times
    calls = {name: runner.backward for name, runner in found.items()}
    times["step without optimizer"] = interleave(calls, seconds, rounds)
    # From here on the weights are views of flat tensors; our second optimizer needs a network of its own.
    calls = {name: runner.step("adam") for name, runner in found.items()}
    if OURS in found:
        system = found[OURS].system
        calls[f"{OURS}, SOAP"] = Runner(build(OURS, system), system).step("soap")
    times["step with optimizer"] = interleave(calls, seconds, rounds)
    return times


def print_times(title: str, times: dict[str, dict[str, Timing]], sizes: dict[str, int], memory: dict) -> None:
    head, rows = ["model", "parameters"], []
    for task in times:
        head += [f"{task} ms", "min", f"x {OURS}"]
    head.append("memory MB")
    names = list(dict.fromkeys(name for found in times.values() for name in found))
    for name in names:
        row: list[Any] = [name, sizes.get(name, sizes.get(name.split(",")[0]))]
        for found in times.values():
            timing = found.get(name)
            if timing is None:
                row += [None] * 3
                continue
            ours = found.get(OURS)
            row += [1e3 * timing.median, 1e3 * timing.minimum, None if ours is None else timing.over(ours)]
        used = memory.get(name)
        rows.append([*row, None if used is None else used / 1e6])
    show(title, head, rows)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "models.json")
    parser.add_argument("--models", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument(
        "--systems", nargs="+", choices=["molecule", "batch", "droplet"], default=["molecule", "batch", "droplet"]
    )
    parser.add_argument("--batch", type=int, default=5, help="molecules in the batch")
    parser.add_argument("--waters", type=int, default=334, help="molecules in the droplet")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time for each system and task")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at least, whatever the time")
    args = parser.parse_args(argv)
    missing: dict[str, str] = {}
    records = []
    with start():
        for name in args.systems:
            system = build_system(name, args)
            found = runners(system, args.models, missing)
            if not found:
                continue
            edges = next(iter(found.values())).potential.model.index
            count = int((edges[0] != edges[1]).sum())
            training = name != "droplet"
            memory = {
                model: peak_memory(runner.backward if training else runner.evaluate) for model, runner in found.items()
            }
            times = measure(found, training, args.seconds, (args.rounds, max(args.rounds, 101)))
            sizes = {model: runner.num_parameters for model, runner in found.items()}
            title = (
                f"{name}: {system.num_graphs} graphs, {system.num_atoms} atoms, {count} edges within 5 A; memory of "
                + ("a training step" if training else "E+F")
            )
            print_times(title, times, sizes, memory)
            records.append(
                {
                    "system": name, "atoms": system.num_atoms, "graphs": system.num_graphs, "edges": count,
                    "parameters": sizes, "memory_bytes": memory,
                    "times": {task: {m: t.as_dict() for m, t in group.items()} for task, group in times.items()},
                }
            )  # fmt: skip
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    write(args.out, {"results": records, "missing": missing})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
