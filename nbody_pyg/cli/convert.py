"""nbody convert: write frames of any files as HDF5 files that training reads a few at a time."""

from __future__ import annotations

import argparse
import functools

from nbody_pyg.datasets.convert import ConvertConfig
from nbody_pyg.datasets.convert import convert as convert_files
from nbody_pyg.datasets.units import SPLITS


def convert(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    config = ConvertConfig(
        args.keys, args.units, args.file_format, args.drop_unconverged, args.num_val, args.num_test, args.seed,
        args.frames_per_file,
    )  # fmt: skip
    tell = functools.partial(print, flush=True)
    table = convert_files(args.data, args.out, config, val=args.val, test=args.test, tell=tell)
    totals = {row.source: row.total for row in table.rows}
    counts = ", ".join(f"{totals[split]} {split}" for split in SPLITS if split in totals)
    print(f"{table}\n\nwritten to {args.out}: {counts} frames; nbody train --data.train {args.out}")
    return 0
