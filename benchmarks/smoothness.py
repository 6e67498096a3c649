"""Energy and forces while an atom is dragged through a cluster: smooth survivors beside hard nearest-centre clusters.

    python benchmarks/smoothness.py

The same network (untrained, float64) on two schemes. ``survivors`` is SmoothSurvivors; ``hard`` gives every atom the
label of the nearest of some fixed centre atoms, anew at every position, which FromAssignment allows but does not
promise to be smooth. The path is scanned with steps of 0.01 angstrom, then again around the places of the largest
second differences with 0.001 and 0.0001. Of a smooth energy max |d2E| / h^2 converges to the largest curvature; a step
makes it grow as h^-2. The largest change of a force per step falls as h where forces are continuous. Several clusters,
one for each seed: where two atoms are nearly equal, weights change fast, and one path may miss it. Prints a table,
writes JSON and a plot beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from report import arguments, show, start, write
from torch import Tensor

from nbody_pyg import FromAssignment, NBodyNet, SmoothSurvivors
from nbody_pyg.potential import Potential

SPECIES = (1, 6, 8)
#: Geometries evaluated at once hold about this many atoms.
_CHUNK = 1500
Line = Callable[[Tensor], tuple[Tensor, Tensor]]


def cluster(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms at random, and a straight path of 6 angstrom for the first, which comes no nearer than 1.2 to any other."""
    generator = torch.Generator().manual_seed(seed)
    side, pos = (count / 0.06) ** (1 / 3), torch.zeros(0, 3, dtype=torch.float64)
    while len(pos) < count:
        new = torch.rand(1, 3, generator=generator, dtype=torch.float64) * side
        if len(pos) == 0 or (pos - new).norm(dim=1).min() > 1.4:
            pos = torch.cat([pos, new])
    while True:
        ends = torch.rand(2, 3, generator=generator, dtype=torch.float64) * side
        along = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
        where = ends[0] + torch.linspace(0, 6, 61, dtype=torch.float64)[:, None] * along
        if torch.cdist(where, pos[1:]).min() > 1.2 and (where[-1] - side / 2).abs().max() < side / 2:
            break
    pos[0] = ends[0]
    direction = torch.zeros_like(pos)
    direction[0] = along
    return torch.tensor(SPECIES)[torch.arange(count) % 3], pos, direction


def survivors(z: Tensor, pos: Tensor, direction: Tensor, channels: int) -> Line:
    scheme = SmoothSurvivors((2.5, 5.0), (4.0, 7.0, 12.0))
    return _line(_network(scheme, channels), z, pos, direction, lambda z, r, batch: scheme.topology(z, r, batch))


def hard(z: Tensor, pos: Tensor, direction: Tensor, channels: int) -> Line:
    scheme, centres = FromAssignment(cutoff=4.0, part_cutoffs=(7.0,)), torch.arange(3, len(z), 7)

    def topology(z: Tensor, where: Tensor, batch: Tensor) -> Any:
        each = where.reshape(-1, len(pos), 3)
        labels = torch.cdist(each, each[:, centres]).argmin(dim=2).flatten()
        return scheme.topology(z, where, batch, labels=labels)

    return _line(_network(scheme, channels), z, pos, direction, topology)


def _network(scheme: Any, channels: int) -> Potential:
    torch.manual_seed(0)
    return Potential(NBodyNet(SPECIES, scheme, channels=channels, lmax=2, correlation=3)).double()


def _line(potential: Potential, z: Tensor, pos: Tensor, direction: Tensor, topology: Callable[..., Any]) -> Line:
    """Energies and forces at some places of the path."""

    def evaluate(places: Tensor) -> tuple[Tensor, Tensor]:
        energies, forces = [], []
        for part in places.split(max(1, _CHUNK // len(z))):
            where = (pos + part[:, None, None] * direction).reshape(-1, 3)
            batch = torch.arange(len(part)).repeat_interleave(len(z))
            many = z.repeat(len(part))
            out = potential(many, where, batch, topology=topology(many, where, batch))
            energies.append(out["interaction_energy"])
            forces.append(out["forces"].reshape(len(part), -1))
        return torch.cat(energies), torch.cat(forces)

    return evaluate


def ladder(
    line: Line, length: float, steps: list[float], places: int = 5
) -> tuple[list[dict[str, float]], Tensor, Tensor]:
    """Largest second differences and force changes at each step; the scan at the first step."""
    grid = torch.arange(0.0, length + 0.5 * steps[0], steps[0], dtype=torch.float64)
    energy, force = line(grid)
    found, windows, peaks = [], [(grid, energy, force)], []
    for n, h in enumerate(steps):
        if n > 0:
            windows = [(w, *line(w)) for w in (centre + h * torch.arange(-15, 16).double() for centre in peaks)]
        second = torch.cat([e.diff(n=2).abs() for _, e, _ in windows])
        change = torch.cat([f.diff(dim=0).abs().amax(dim=1) for _, _, f in windows])
        at = torch.cat([w[1:-1] for w, _, _ in windows])
        jump = torch.cat([e.diff().abs() for _, e, _ in windows])
        found.append(
            {
                "h": h,
                "curvature": float(second.max()) / h**2,
                "force_change": float(change.max()),
                "step": float(jump.max()),
            }
        )
        peaks = []
        for place in second.argsort(descending=True):
            if all(abs(float(at[place]) - p) > 10 * h for p in peaks):
                peaks.append(float(at[place]))
            if len(peaks) == places:
                break
    return found, grid, energy


def plot(results: dict[str, list[Any]], path: Any) -> None:
    """The energy along the first path, and the second differences of all."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    colours = {"survivors": "tab:blue", "hard": "tab:red"}
    for name, paths in results.items():
        for n, (found, grid, energy) in enumerate(paths):
            label = name if n == 0 else None
            if n == 0:
                axes[0].plot(grid, energy - energy.mean(), color=colours[name], label=label, lw=1.2)
            h, curvature = zip(*((row["h"], row["curvature"]) for row in found), strict=True)
            axes[1].loglog(h, curvature, "o-", color=colours[name], label=label, lw=1.2, ms=4)
    axes[0].set(xlabel="displacement (angstrom)", ylabel="energy minus mean (eV)", title="one atom dragged through")
    axes[1].set(xlabel="step h (angstrom)", ylabel="max |d²E| / h² (eV/angstrom²)", title="second differences")
    axes[1].invert_xaxis()
    for axis in axes:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=160)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "smoothness.json")
    parser.add_argument("--atoms", type=int, default=60)
    parser.add_argument("--length", type=float, default=6.0, help="of the path, angstrom")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="one path each")
    args = parser.parse_args(argv)
    results: dict[str, list[Any]] = {"survivors": [], "hard": []}
    with start():
        for seed in args.seeds:
            z, pos, direction = cluster(args.atoms, seed)
            for name, build in (("survivors", survivors), ("hard", hard)):
                line = build(z, pos, direction, args.channels)
                results[name].append(ladder(line, args.length, [1e-2, 1e-3, 1e-4]))
    rows = [
        [name, seed, f"{row['h']:.0e}", row["curvature"], 1e3 * row["step"], row["force_change"]]
        for name, paths in results.items()
        for seed, (found, _, _) in zip(args.seeds, paths, strict=True)
        for row in found
    ]
    show("one atom, 6 angstrom", ["scheme", "seed", "h (A)", "max |d2E|/h^2", "max |dE| meV", "max |dF| eV/A"], rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture = args.out.with_suffix(".png")
    plot(results, picture)
    write(args.out, {"results": {name: [found for found, _, _ in paths] for name, paths in results.items()}})
    print(f"plot in {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
