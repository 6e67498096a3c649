"""The native evaluator beside torch: a step of dynamics through the calculator, and energy and forces of water.

    python benchmarks/native.py

The default network, not trained, so its forces are made small; velocity Verlet of ASE at 0.5 fs, lists with a skin of
0.5 angstrom. The engines run in turn.
"""

from __future__ import annotations

from ase import Atoms
from md import stepper
from peers import SPECIES
from report import arguments, show, start, write
from systems import molecules, water
from timing import interleave, on_the_clock

from nbody_pyg import NBodyNet, Potential
from nbody_pyg.deploy import NBodyCalculator

HEAD = ["what", "atoms", "dtype", "engine", "ms", "min", "microseconds per atom", "x torch"]
THREADS = ["threads", "engine", "dtype", "ms on the clock", "times faster than one thread"]
ENGINES = ("torch", "native")


def main(argv: list[str] | None = None) -> int:
    """Time both engines, print tables, write JSON."""
    parser = arguments(__doc__, "native.json")
    parser.add_argument("--water", type=int, default=334, help="molecules of the droplet")
    parser.add_argument("--threads", type=int, default=2, help="threads of the second table; 1: no such table")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the second table")
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU seconds for each comparison")
    args = parser.parse_args(argv)
    rows, shared = [], []
    with start():
        potential = Potential(NBodyNet(SPECIES))
        potential.scale.fill_(1e-3)
        small, large = molecules(1), water(args.water)
        for dtype in ("float32", "float64"):
            steps = {e: stepper(potential, small, engine=e, dtype=dtype)[0] for e in ENGINES}
            forces = {e: evaluation(potential, large, e, dtype) for e in ENGINES}
            for what, system, calls in (("MD step", small, steps), ("E+F", large, forces)):
                times = interleave(calls, args.seconds)
                for engine in ENGINES:
                    t = times[engine]
                    each = 1e6 * t.median / system.num_atoms
                    rows.append([
                        what, system.num_atoms, dtype, engine, f"{1e3 * t.median:.2f}", f"{1e3 * t.minimum:.2f}",
                        f"{each:.1f}", f"{t.over(times['torch']):.2f}",
                    ])  # fmt: skip
            if args.threads > 1:
                for engine in ENGINES:
                    one, several = on_the_clock(forces[engine], args.threads, args.rounds)
                    shared.append([args.threads, engine, dtype, f"{1e3 * several:.1f}", f"{one / several:.2f}"])
    show("CPU time, one thread", HEAD, rows)
    if shared:
        show(f"E+F of {large.num_atoms} atoms, wall-clock time; the other cores must be idle", THREADS, shared)
    found = {name: [dict(zip(head, row, strict=True)) for row in table]
             for name, head, table in (("engines", HEAD, rows), ("threads", THREADS, shared))}  # fmt: skip
    write(args.out, {"results": found})
    return 0


def evaluation(potential, system, engine: str, dtype: str):
    """Energy and forces of atoms that move a little, with kept neighbour lists."""
    atoms = Atoms(system.z.numpy(), system.pos.double().numpy())
    atoms.calc = NBodyCalculator(potential, engine=engine, dtype=dtype)
    moves = [1e-4, -1e-4]

    def run() -> None:
        atoms.positions += moves[0]
        moves.reverse()
        atoms.get_forces()

    return run


if __name__ == "__main__":
    raise SystemExit(main())
