"""nbody relax: minima of many structures at once."""

from __future__ import annotations

import argparse

import torch

from nbody_pyg.cli.frames import read_structures, write_structures
from nbody_pyg.cli.tables import table
from nbody_pyg.deploy import relax as relax_frames
from nbody_pyg.deploy import with_reference
from nbody_pyg.deploy.model_file import load_potential

_MOST_ROWS = 30


def relax(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    frames = read_structures(args.frames)
    potential = load_potential(args.model).to(getattr(torch, args.dtype))
    frames = with_reference(frames, args.model, getattr(potential.model, "scheme", None))
    found = relax_frames(potential, frames, fmax=args.fmax, max_steps=args.steps, batch_size=args.batch_size)
    rows = []
    for number, frame in enumerate(found.frames[:_MOST_ROWS]):
        moved = (frame.pos - frames[number].pos).norm(dim=1).max()
        gained = float(found.energy[number] - found.start_energy[number])
        rows.append((number, int(found.steps[number]), float(found.energy[number]), gained,
                     f"{float(found.largest[number]):.4f}", float(moved),
                     "yes" if found.converged[number] else "NO"))  # fmt: skip
    head = ["structure", "steps", "energy eV", "change eV", "largest force eV/A", "moved A", "converged"]
    print(table(head, rows))
    if len(found.frames) > _MOST_ROWS:
        print(f"... and {len(found.frames) - _MOST_ROWS} more")
    write_structures(args.out, found.frames)
    count = int(found.converged.sum())
    print(f"\n{count} of {len(frames)} converged; written to {args.out}")
    return 0
