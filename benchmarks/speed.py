"""Molecular dynamics beside NEP, SNAP, ReaxFF, GFN2-xTB, NequIP and MACE: CPU time of a step for each atom.

    python benchmarks/speed.py

Molecules of 9 to 64 atoms and periodic boxes of water. Each potential runs in a process of its own on one thread;
they make blocks of steps in turn, round after round. For a potential that is not installed the table says how to
install it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

from ase import Atoms
from contestants import CONTESTANTS, OURS, serve
from report import arguments, show, start, write
from systems import box, molecule, molecules
from timing import Timing

#: Steps in a block: neighbour lists with a skin are searched about once in it. A block has fewer steps if it would
#: last longer than so many seconds.
_STEPS, _LONGEST = 20, 4.0
HEAD = ["potential", "MD us per atom", "min", f"x {OURS}", "E+F us per atom", "note"]
#: 9, 22, 42 and 64 atoms.
MOLECULES = ("ethanol", "alanine_dipeptide", "Ac-Ala3-NHMe", "Ac-Ala-Val-Ala-Val-NHMe")


class Failed(Exception):
    """A contestant is not installed, or cannot run; the message is the reason."""


class Process:
    """A contestant in its process."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name), daemon=True)
        self._process.start()
        other.close()

    def ask(self, question: Any) -> Any:
        """Raises: Failed: the contestant cannot answer."""
        try:
            self._connection.send(question)
            answer = self._connection.recv()
        except (EOFError, OSError):
            answer = "its process ended"
        if isinstance(answer, str):
            raise Failed(answer)
        return answer

    def time(self, task: str, count: int) -> float:
        """CPU seconds of so many steps."""
        return self.ask((task, count))

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._connection.send(None)
        self._process.join()


def system(name: str) -> Atoms:
    """A molecule, or a number of molecules of water in a box."""
    if name.isdecimal():
        return box(int(name))
    if name in ("ethanol", "alanine_dipeptide"):
        found = molecules(1, name)
        return Atoms(found.z.numpy(), found.pos.numpy())
    return molecule(name)


def measure(name: str, processes: dict[str, Process], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """A record of each contestant for one system: times of its tasks, or the reason why there are none."""
    atoms = system(name)
    found: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Callable[[int], float]]] = {"MD": {}, "E+F": {}}
    for peer, process in processes.items():
        if CONTESTANTS[peer].periodic or not atoms.pbc.any():
            found[peer] = {"system": name, "atoms": len(atoms), "potential": peer}
            try:
                for task in process.ask(atoms):
                    tasks[task][peer] = partial(process.time, task)
            except Failed as error:
                found[peer]["failed"] = str(error)
    for task, runs in tasks.items():
        for peer, result in interleave(runs, seconds, rounds).items():
            found[peer][task if isinstance(result, Timing) else "failed"] = result
    return list(found.values())


def interleave(runs: dict[str, Callable[[int], float]], seconds: float, rounds: int) -> dict[str, Timing | str]:
    """Blocks of steps in turn, for so many seconds and at least so many rounds: times of a step, or why it failed."""
    steps: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, Timing | str] = {}
    spent, done = 0.0, 0
    while samples and (done < rounds or spent < seconds):
        names = list(samples)
        for name in names[done % len(names) :] + names[: done % len(names)]:  # nobody is always first
            try:
                if name not in steps:
                    runs[name](1)  # may compile
                    steps[name] = max(1, min(_STEPS, int(_LONGEST / max(runs[name](1), 1e-6))))
                took = runs[name](steps[name])
            except Failed as error:
                found[name] = str(error)
                del samples[name]
                continue
            samples[name].append(took / steps[name])
            spent += took
        done += 1
    return found | {name: Timing(tuple(values)) for name, values in samples.items()}


def row(record: dict[str, Any], ours: Timing | None) -> list[Any]:
    """A line of the table."""
    steps, forces, each = record.get("MD"), record.get("E+F"), 1e6 / record["atoms"]
    return [
        record["potential"],
        steps and each * steps.median,
        steps and each * steps.minimum,
        steps and ours and steps.over(ours),
        forces and each * forces.median,
        record.get("failed"),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "speed.json")
    parser.add_argument("--molecules", nargs="*", choices=MOLECULES, default=list(MOLECULES))
    parser.add_argument("--waters", type=int, nargs="*", default=[64, 334, 1000], help="molecules in each box")
    parser.add_argument("--potentials", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU time for each system and task")
    parser.add_argument("--rounds", type=int, default=3, help="rounds at least, whatever the time")
    args = parser.parse_args(argv)
    records = []
    processes = {name: Process(name) for name in args.potentials}
    with start():
        for name in [*args.molecules, *map(str, args.waters)]:
            found = measure(name, processes, args.seconds, args.rounds)
            ours = next((record.get("MD") for record in found if record["potential"] == OURS), None)
            words = name if name in MOLECULES else f"box of {name} molecules of water"
            show(f"{words}, {found[0]['atoms']} atoms", HEAD, [row(record, ours) for record in found])
            records += found
    for process in processes.values():
        process.stop()
    plain = [{k: v.as_dict() if isinstance(v, Timing) else v for k, v in r.items()} for r in records]
    write(args.out, {"results": plain})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
