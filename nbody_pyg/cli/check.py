"""nbody check: test the physics of a trained model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nbody_pyg.atomic_write import write_json
from nbody_pyg.cli.frames import read_structures
from nbody_pyg.cli.outputs import output_file
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import read_metadata
from nbody_pyg.io.model_file import load_potential
from nbody_pyg.testing import Check, check_potential

#: Exit status when a check failed; 1 is an error in the input, 2 wrong arguments.
FAILED = 3


def check(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(1)
    record = None
    if args.json:
        record = output_file(args.json, None, args.overwrite, [args.model, args.frames], "--json")
    metadata = read_metadata(args.model)["metadata"]
    potential = load_potential(args.model)
    frames, origin = _frames(args, metadata)
    print(f"{potential.model!r}\nstructures: {origin}\n")
    print(f"{'':44} {'measured':>10}  {'':9} {'bound':>8}", flush=True)
    found = check_potential(
        potential, frames, metadata=metadata, nve_steps=args.nve_steps, timestep=args.timestep,
        temperature=args.temperature, report=_line, only=args.only, seed=args.seed,
    )  # fmt: skip
    count = sum(line.passed is not None for line in found.checks)
    if found.passed:
        print(f"\nPASS: {count} checks")
    else:
        print(f"\nFAIL: {len(found.failures)} of {count} checks")
        for line in found.failures:
            print(f"  {line.name}: {line.note}")
    if record is not None:
        write_json(record, {"model": args.model, **found.to_dict()})
        print(f"written to {record}")
    return 0 if found.passed else FAILED


def _line(line: Check) -> None:
    verdict = {True: "pass", False: "FAIL", None: "note"}[line.passed]
    note = "" if line.passed is False or not line.note else f"   {line.note}"
    print(f"{verdict}  {line.name:38} {line.figure:>10.3g}  {line.unit:9} {line.bound:>8}{note}", flush=True)


def _frames(args: argparse.Namespace, metadata: dict[str, Any]) -> tuple[list[AtomicData] | None, str]:
    """Structures to test on: those given, else the one stored in the model file, else None."""
    if args.frames is not None:
        frames = read_structures(args.frames)
        step = max(1, len(frames) // 3)
        return frames[::step][:3], f"{args.frames} (every {step}th of {len(frames)})"
    sample = metadata.get("sample") or metadata.get("reference")
    if sample is None:
        return None, "random molecules; give structures of your application with --frames"
    frame = AtomicData(z=torch.tensor(sample["z"]), pos=torch.tensor(sample["pos"], dtype=torch.float64))
    if sample.get("cell") is not None:
        frame.cell = torch.tensor(sample["cell"], dtype=torch.float64).reshape(1, 3, 3)
        frame.pbc = torch.tensor(sample["pbc"]).reshape(1, 3)
    for key in ("charge", "charges", "spin"):
        if key in sample:
            frame[key] = torch.tensor(sample[key], dtype=torch.float64)
    return [frame], "the training frame stored in the model file; choose others with --frames"
