"""Make the set of charged particles: 3,000 systems for training, 2,000 for validation and 2,000 for the test.

Run ``python datasets/make_particles.py`` (about 5 CPU seconds). The sizes are those of the benchmark of EGNN; the
equations are those of :func:`nbody_pyg.datasets.charged_particles`. Every split has its own seed. Each file holds
``pos`` [systems, particles, 3], ``x`` [systems, particles, 4] (charge and velocity) and ``y`` [systems, particles, 3]
(positions 1,000 steps later), all float64 and without units.

With ``--bound`` they are those of :func:`nbody_pyg.datasets.charged_clusters`: 1,000, 300 and 300 systems of ten bound
clusters of ten particles (about a CPU minute). ``y`` are positions 250 steps later, ``alone`` [systems, particles, 3]
the same without forces between clusters, and ``labels`` [systems, particles] the numbers of the clusters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from nbody_pyg.datasets import charged_clusters, charged_particles

#: Seed of each split.
SEEDS = {"train": 43, "val": 44, "test": 45}
#: Particles, clusters and numbers of systems; with bound clusters.
FREE, BOUND = (5, 1, [3000, 2000, 2000]), (100, 10, [1000, 300, 300])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("datasets/particles"), help="folder (%(default)s)")
    parser.add_argument("--bound", action="store_true", help="springs bind the particles of a cluster")
    parser.add_argument("--particles", type=int, help="in every system (5; bound: 100)")
    parser.add_argument("--clusters", type=int, help="in every system (1; bound: 10); if not bound, where they start")
    parser.add_argument("--systems", type=int, nargs=3, metavar=tuple(SEEDS),
                        help="in each split (3000 2000 2000; bound: 1000 300 300)")  # fmt: skip
    args = parser.parse_args(argv)
    given = (args.particles, args.clusters, args.systems)
    defaults = BOUND if args.bound else FREE
    particles, clusters, systems = (d if g is None else g for g, d in zip(given, defaults, strict=True))
    if args.bound and particles % clusters:
        parser.error(f"--particles must be a multiple of --clusters, got {particles} and {clusters}")
    args.out.mkdir(parents=True, exist_ok=True)
    for (name, seed), number in zip(SEEDS.items(), systems, strict=True):
        if args.bound:
            frames = charged_clusters(number, seed, clusters, particles // clusters)
        else:
            frames = charged_particles(number, seed, particles, num_clusters=clusters)
        keys = ("pos", "x", "y", *(["alone", "labels"] if args.bound else []))
        np.savez_compressed(args.out / f"{name}.npz", **{k: np.stack([f[k].numpy() for f in frames]) for k in keys})
        print(f"{args.out / name}.npz: {number} systems of {particles} particles, seed {seed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
