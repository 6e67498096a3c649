"""Make the set of charged particles: 3,000 systems for training, 2,000 for validation and 2,000 for the test.

Run ``python datasets/make_particles.py`` (about 5 CPU seconds). The sizes are those of the benchmark of EGNN; the
equations are those of :func:`nbody_pyg.datasets.charged_particles`. Every split has its own seed. Each file holds
``pos`` [systems, particles, 3], ``x`` [systems, particles, 4] (charge and velocity) and ``y`` [systems, particles, 3]
(positions 1,000 steps later), all float64 and without units.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from nbody_pyg.datasets import charged_particles

#: Seed and number of systems of each split.
SPLITS = {"train": (43, 3000), "val": (44, 2000), "test": (45, 2000)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("datasets/particles"), help="folder (%(default)s)")
    parser.add_argument("--particles", type=int, default=5, help="in every system (%(default)s)")
    parser.add_argument("--clusters", type=int, default=1, help="centres around which they start (%(default)s)")
    parser.add_argument("--systems", type=int, nargs=3, default=[n for _, n in SPLITS.values()],
                        metavar=tuple(SPLITS), help="in each split (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for (name, (seed, _)), number in zip(SPLITS.items(), args.systems, strict=True):
        frames = charged_particles(number, seed, args.particles, num_clusters=args.clusters)
        arrays = {key: np.stack([frame[key].numpy() for frame in frames]) for key in ("pos", "x", "y")}
        np.savez_compressed(args.out / f"{name}.npz", **arrays)
        print(f"{args.out / name}.npz: {number} systems of {args.particles} particles, seed {seed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
