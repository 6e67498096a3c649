"""nbody relax: relax many structures at once."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from nbody_pyg.cli.frames import read_atoms, write_atoms
from nbody_pyg.cli.outputs import output_file
from nbody_pyg.cli.tables import table
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import relax as relax_frames
from nbody_pyg.deploy.relax import as_data, as_it_came
from nbody_pyg.interrupt import GracefulStop
from nbody_pyg.io.model_file import load_potential
from nbody_pyg.units import GIGAPASCAL

#: Exit status when a structure did not converge.
NOT_CONVERGED = 3
_MOST_ROWS = 30


def relax(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    out = output_file(args.out, "relaxed.xyz", args.overwrite, [args.model, args.frames])
    structures = read_atoms(args.frames)
    frames = [as_data(atoms, number) for number, atoms in enumerate(structures)]
    potential = load_potential(args.model).to(getattr(torch, args.dtype))
    with GracefulStop() as interrupt:
        found = relax_frames(
            potential, frames, fmax=args.fmax, max_steps=args.steps, batch_size=args.batch_size,
            reference=args.model, cell=args.cell, pressure=args.pressure * GIGAPASCAL,
            stop=lambda: interrupt.received is not None,
        )  # fmt: skip
    after = [frame for frame in found.frames if isinstance(frame, AtomicData)]  # as `frames` are
    relaxed = [as_it_came(atoms, frame) for atoms, frame in zip(structures, after, strict=False)]
    rows: list[tuple[Any, ...]] = []
    for number, frame in enumerate(after[:_MOST_ROWS]):
        moved = (frame.pos - frames[number].pos).norm(dim=1).max()
        gained = float(found.energy[number] - found.start_energy[number])
        largest = float(found.largest[number])
        verdict = "yes" if found.converged[number] else "NO" if math.isfinite(largest) else "NO: forces are not finite"
        volume = None if frame.get("stress") is None else float(torch.linalg.det(frame.cell[0]).abs())
        rows.append((number, int(found.steps[number]), float(found.energy[number]), gained,
                     f"{largest:.4f}", float(moved), volume, verdict))  # fmt: skip
    head = ["structure", "steps", "energy eV", "change eV", "largest force eV/A", "moved A", "volume A^3", "converged"]
    if all(row[-2] is None for row in rows):
        head, rows = [*head[:-2], head[-1]], [(*row[:-2], row[-1]) for row in rows]
    print(table(head, rows))
    if len(found.frames) > _MOST_ROWS:
        print(f"... and {len(found.frames) - _MOST_ROWS} more")
    write_atoms(out, relaxed)
    missing = (~found.converged).nonzero().flatten().tolist()
    print(f"\n{len(found.frames) - len(missing)} of {len(frames)} converged; written to {out}")
    if missing:
        more = "" if len(missing) <= _MOST_ROWS else f" and {len(missing) - _MOST_ROWS} more"
        print(f"not converged: {', '.join(map(str, missing[:_MOST_ROWS]))}{more}")
    if (status := interrupt.status) is not None:
        print(f"stopped {interrupt.reason}: {len(found.frames)} of {len(frames)} structures are in the file")
        return status
    return NOT_CONVERGED if missing else 0
