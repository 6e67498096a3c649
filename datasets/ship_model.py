"""Put a trained model into the package under a name: python datasets/ship_model.py RUN/model.nbody organic

The file holds the weights, the settings and errors of the training, and what users must know: level of theory, licence,
where it is described. Paths of the machine on which it was trained are left out.

With ``--units FOLDER``, the files of the training, the model only repels below the distances that it was trained on:
inner cutoffs and repulsion are raised to 0.95 and 0.9 times the shortest distance of each pair of elements, one in a
thousand of the frames, and at most 19, left out. ``--reach H-S=1.13`` raises the repulsion of a pair to a length
(angstrom), and its inner cutoff with it, where ``nbody check`` finds a hole because few frames are that short.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from nbody_pyg.datasets import UnitFiles
from nbody_pyg.deploy import load_model, read_metadata, save_model
from nbody_pyg.io.model_file import SHIPPED
from nbody_pyg.nn.inner_cutoff import INNER_FACTOR
from nbody_pyg.nn.repulsion import SEEN_FACTOR, ZBLRepulsion
from nbody_pyg.potential import Potential
from nbody_pyg.training.stream import shortest_in_units

LARGEST = 5_000_000  # bytes
ABOUT = {
    "organic": {
        "level_of_theory": "GFN2-xTB, gas phase, singlets",
        "elements": "H C N O F P S Cl Br I",
        "licence": "MIT",
        "description": "docs/organic.md",
    }
}
KEPT = ("steps", "epochs", "cpu_seconds", "weights", "num_frames", "sample", "errors", "errors_unit")


def metadata_of(path: str | Path, name: str) -> dict[str, Any]:
    """Metadata of the shipped file."""
    found = read_metadata(path)["metadata"]
    config = {section: dict(values) for section, values in found["config"].items()}
    paths = {"data": ("train", "val", "test", "root"), "output": ("folder",), "finetune": ("init", "replay")}
    for section, keys in paths.items():
        config[section] = {key: value for key, value in config.get(section, {}).items() if key not in keys}
    return {**ABOUT[name], "config": config, **{key: found[key] for key in KEPT}}


def repelling(potential: Potential, shortest: dict[str, float]) -> Potential:
    """The same model with longer inner cutoffs and a longer repulsion, where they are below these distances."""
    model, repulsion = potential.model, potential.repulsion
    lengths = {k: max(v, INNER_FACTOR * shortest.get(k, 0.0)) for k, v in model.inner_cutoff.lengths.items()}
    reach = {k: max(v, SEEN_FACTOR * shortest.get(k, 0.0)) for k, v in repulsion.reach.items()}
    network = model.remade(inner_cutoff={k: round(v, 4) for k, v in lengths.items()})
    network.load_state_dict(model.state_dict())
    repulsion = ZBLRepulsion(repulsion.species, {k: round(v, 4) for k, v in reach.items()})
    out = Potential(network, potential.reference, float(potential.scale), repulsion)
    out.ancestor = potential.ancestor
    return out.to(model.dtype)


def lengths_of(words: list[str], parser: argparse.ArgumentParser, potential: Potential) -> dict[str, float]:
    """The lengths of ``--reach``, by pairs. Ends the program for a pair that the model has not, or no length."""
    found = {}
    for word in words:
        name, _, length = word.partition("=")
        if name not in potential.repulsion.reach or not re.fullmatch(r"\d+(\.\d+)?", length):
            known = ", ".join(potential.repulsion.reach)
            parser.error(f"--reach must be PAIR=LENGTH with a pair of the model ({known}), got {word!r}")
        found[name] = float(length)
    return found


def main(argv: list[str] | None = None) -> int:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model file of a finished run")
    parser.add_argument("name", choices=sorted(ABOUT))
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder (default: that of the package)")
    parser.add_argument("--units", type=Path, help="folder of the training frames, for the short range")
    parser.add_argument("--reach", nargs="*", default=[], metavar="PAIR=LENGTH", help="longer repulsion of pairs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.nbody"
    new = path.with_suffix(".part")
    model = load_model(args.model)
    longer = lengths_of(args.reach, parser, model)
    if args.units is not None or longer:
        shortest = {} if args.units is None else shortest_in_units(UnitFiles(sorted(args.units.glob("*.h5"))))
        model = repelling(model, shortest | {name: length / SEEN_FACTOR for name, length in longer.items()})
    save_model(model, new, metadata_of(args.model, args.name))
    if new.stat().st_size > LARGEST:
        new.unlink()
        raise SystemExit(f"{path} would have more than {LARGEST:,} bytes; train a smaller network")
    new.replace(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
