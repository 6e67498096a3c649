"""nbody learn: a potential from few labels, by active learning."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from nbody_pyg.active import LearnConfig, from_smiles, plot_rounds, rounds_table
from nbody_pyg.active import learn as run
from nbody_pyg.atomic_write import atomic_write, write_text
from nbody_pyg.cli.frames import read_atoms
from nbody_pyg.training.folder import RunFolder


def learn(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(LearnConfig)}
    config = LearnConfig(**given)
    folder = Path(args.out)
    if folder.exists() and any(folder.iterdir()) and not args.resume:
        raise ValueError(f"{folder} holds files; continue its run with --resume, or choose another folder with --out")
    starts = read_atoms(args.start) if Path(args.start).exists() else from_smiles(args.start, 4, config.seed)
    with RunFolder(folder):
        rounds = run(starts, folder, config, note=lambda line: print(line, flush=True))
    table = rounds_table(rounds)
    write_text(folder / "rounds.txt", table + "\n")
    plot_rounds(rounds, folder / "learning.png")
    with atomic_write(folder / "model.nbody") as temporary:
        shutil.copyfile(folder / "model-0.nbody", temporary)
    print(f"\n{table}\n\nerror and uncertainty: of the vectors of force, root mean square, calibrated on validation")
    print(f"structures that no member was trained on\n\nmodel      {folder / 'model.nbody'}")
    print(f"committee  {', '.join(str(folder / f'model-{k}.nbody') for k in range(config.members))}")
    print(f"labels     {folder / 'labelled.xyz'}\nplot       {folder / 'learning.png'}")
    print(f"\nnow: nbody check {folder / 'model.nbody'}")
    return 0
