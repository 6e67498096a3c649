"""Put a trained model into the package under a name: python datasets/ship_model.py RUN/model.nbody organic

The file holds the weights, the settings and errors of the training, and what users must know: level of theory, licence,
where it is described. Paths of the machine on which it was trained are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nbody_pyg.deploy import load_model, read_metadata, save_model
from nbody_pyg.io.model_file import SHIPPED

LARGEST = 5_000_000  # bytes
ABOUT = {
    "organic": {
        "level_of_theory": "GFN2-xTB, gas phase, singlets",
        "elements": "H C N O F P S Cl Br I",
        "licence": "MIT",
        "description": "docs/organic.md",
    }
}
KEPT = ("steps", "epochs", "cpu_seconds", "weights", "num_frames", "errors", "errors_unit")


def metadata_of(path: str | Path, name: str) -> dict[str, Any]:
    """Metadata of the shipped file."""
    found = read_metadata(path)["metadata"]
    config = {section: dict(values) for section, values in found["config"].items()}
    paths = {"data": ("train", "val", "test", "root"), "output": ("folder",), "finetune": ("init", "replay")}
    for section, keys in paths.items():
        config[section] = {key: value for key, value in config.get(section, {}).items() if key not in keys}
    return {**ABOUT[name], "config": config, **{key: found[key] for key in KEPT}}


def main(argv: list[str] | None = None) -> int:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model file of a finished run")
    parser.add_argument("name", choices=sorted(ABOUT))
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder (default: that of the package)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.nbody"
    new = path.with_suffix(".part")
    save_model(load_model(args.model), new, metadata_of(args.model, args.name))
    if new.stat().st_size > LARGEST:
        new.unlink()
        raise SystemExit(f"{path} would have more than {LARGEST:,} bytes; train a smaller network")
    new.replace(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
