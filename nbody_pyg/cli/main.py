"""Entry point: parses the command, runs it, and turns user errors into one clear line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_DESCRIPTION = """\
Covariant hierarchical N-body networks for atoms.

  nbody train configs/embedded.yaml                 train a potential, test it, keep it in one file
  nbody evaluate runs/embedded/model.nbody my.xyz   errors, parity plot, predictions
  nbody info runs/embedded/model.nbody              what is in a model file
  nbody check runs/embedded/model.nbody             is its physics right? a table and a verdict
  nbody md runs/embedded/model.nbody start.xyz      molecular dynamics
  nbody relax runs/embedded/model.nbody my.xyz      minima of many structures at once
  nbody energies runs/embedded/model.nbody my.xyz   which part of a molecule holds which energy
  nbody hierarchy molecule.xyz --scheme BondTree    build, check and draw a hierarchy
  nbody compare --models nbody painn --budget 300   the same training for other models, one table

Units: eV, angstrom, fs; tables in meV and meV/A."""

_EXIT = """\
exit status: 0 done; 1 error in the input; 2 wrong arguments; 3 a check failed, or uncertainty stopped
the dynamics; 143 or 130 stopped by SIGTERM or Ctrl-C after writing last.ckpt (go on with --output.resume true)"""


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options, with help."""
    parser = argparse.ArgumentParser(
        prog="nbody", description=_DESCRIPTION, epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # Its words are keys of the configuration, which argparse does not know: see _train_words.
    train = commands.add_parser("train", add_help=False, help="train a potential from a YAML file")
    train.add_argument("words", nargs=argparse.REMAINDER)

    compare = commands.add_parser("compare", add_help=False, help="our network beside its peers, or its variants")
    compare.add_argument("words", nargs=argparse.REMAINDER)

    evaluate = commands.add_parser("evaluate", help="errors of models on labelled frames")
    evaluate.add_argument("model", help="model file")
    evaluate.add_argument(
        "data", nargs="+",
        help="files of frames, embedded sets as ethanol:test_300K, or more model files (*.nbody) to compare",
    )  # fmt: skip
    evaluate.add_argument("--out", default=None, help="folder for parity.png, predictions and errors.json")
    evaluate.add_argument("--batch-size", type=int, default=20, help="frames at a time (default: 20)")
    evaluate.add_argument("--units", default=None, help="units of the files, e.g. 'kcal/mol'")
    evaluate.add_argument("--energy-key", default=None, help="key of the energy in the files")
    evaluate.add_argument("--forces-key", default=None, help="key of the forces in the files")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    evaluate.add_argument("--no-plot", action="store_true", help="no parity plot")

    info = commands.add_parser("info", help="what is in a model file")
    info.add_argument("model", nargs="?", help="model file; without it, what this machine runs models with")
    info.add_argument("--json", action="store_true", help="everything, as JSON")

    check = commands.add_parser("check", help="test the physics of a trained model")
    check.add_argument("model", help="model file")
    check.add_argument(
        "--frames", default=None, help="structures: a file, or an embedded set (default: the model's own)"
    )
    check.add_argument(
        "--nve-steps", type=int, default=1000, help="of the run at constant energy; 0: none (default: 1000)"
    )
    check.add_argument(
        "--only", nargs="+", default=[], metavar="SECTION",
        help="symmetry, derivatives, additivity, smoothness, short_range, precision, dynamics (default: all)",
    )  # fmt: skip
    check.add_argument("--timestep", type=float, default=0.5, help="fs (default: 0.5)")
    check.add_argument("--temperature", type=float, default=300.0, help="K (default: 300)")
    check.add_argument("--seed", type=int, default=0, help="of rotations, samples and velocities (default: 0)")
    check.add_argument("--json", default=None, metavar="FILE", help="write every line there too")

    md = commands.add_parser("md", help="molecular dynamics with ASE")
    md.add_argument("model", help="model file")
    md.add_argument("start", help="first structure: any file that ASE reads (the last frame is taken)")
    md.add_argument("--ensemble", choices=("nve", "langevin"), default="nve", help="default: nve")
    md.add_argument("--steps", type=int, default=2000, help="default: 2000")
    md.add_argument("--timestep", type=float, default=0.5, help="fs (default: 0.5)")
    md.add_argument("--temperature", type=float, default=300.0, help="K (default: 300)")
    md.add_argument("--friction", type=float, default=0.01, help="1/fs, Langevin only (default: 0.01)")
    md.add_argument("--every", type=int, default=10, help="steps between samples (default: 10)")
    md.add_argument("--seed", type=int, default=0, help="of velocities and thermostat (default: 0)")
    md.add_argument("--dtype", choices=("float32", "float64"), default=None, help="default: the model's")
    md.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    md.add_argument("--compile", action="store_true", help="compile the model at the first step: faster small systems")
    md.add_argument("--cuda-graphs", action="store_true", help="replay steps from CUDA graphs; needs --device cuda")
    md.add_argument("--committee", nargs="+", default=[], metavar="MODEL", help="further models: forces are their mean")
    md.add_argument("--max-forces-std", type=float, default=None, metavar="EV_PER_A",
                    help="stop when the committee disagrees by more on the force on an atom, eV/A")  # fmt: skip
    md.add_argument("--out", default="md", help="folder for md.log, trajectory.xyz, energy.png (default: md)")

    relax = commands.add_parser("relax", help="relax many structures at once")
    relax.add_argument("model", help="model file")
    relax.add_argument("frames", help="any file that ASE reads, or an embedded set as ethanol:test_300K")
    relax.add_argument("--fmax", type=float, default=0.01, help="largest force at the end, eV/A (default: 0.01)")
    relax.add_argument("--steps", type=int, default=500, help="at most, of each structure (default: 500)")
    relax.add_argument("--batch-size", type=int, default=64, help="structures at a time (default: 64)")
    relax.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="default: float64")
    relax.add_argument("--out", default="relaxed.xyz", help="extended xyz (default: relaxed.xyz)")

    energies = commands.add_parser("energies", help="energy of each part of the hierarchy of a structure")
    energies.add_argument("model", help="model file")
    energies.add_argument("file", help="any file that ASE reads, or an embedded set as ethanol")
    energies.add_argument("--index", type=int, default=0, help="frame of the file (default: 0)")
    energies.add_argument("--minus", type=int, default=None, metavar="INDEX", help="show differences to this frame")
    energies.add_argument("--level", default=None, help="name or number of the level to list and to draw")
    energies.add_argument("--plot", default=None, metavar="PNG", help="draw it into this file")

    hierarchy = commands.add_parser("hierarchy", help="build, check and draw the hierarchy of a structure")
    hierarchy.add_argument("file", help="any file that ASE reads, or a molecule of the embedded sets")
    hierarchy.add_argument("--scheme", default="BondTree", help="name of a scheme (default: BondTree)")
    hierarchy.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the scheme, e.g. cutoff=4",
    )
    hierarchy.add_argument("--model", default=None, help="take the scheme of this model file")
    hierarchy.add_argument("--index", type=int, default=0, help="frame of the file (default: 0)")
    hierarchy.add_argument("--plot", default=None, metavar="PNG", help="draw it into this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse reads options of the first parser only up to the command, and would refuse dotted keys.
    place = next((n for n, word in enumerate(words[:2]) if word in ("train", "compare")), len(words))
    args = build_parser().parse_args([*words[: place + 1]])
    try:
        return _run(args, words[place + 1 :])
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"nbody {args.command}: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        return 0
    except (OSError, TypeError) as error:  # no space left, no permission; a value of a wrong kind
        if args.debug:
            raise
        print(f"nbody {args.command}: error: {error}", file=sys.stderr)
        return 1


def _train_words(words: Sequence[str]) -> tuple[str | None, list[str], bool]:
    """The words after ``train`` as (configuration file, overrides, help wanted)."""
    files: list[str] = []
    overrides: list[str] = []
    wants_help, rest = False, list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
        elif word.startswith("-"):
            overrides.append(word)
            if "=" not in word and rest:
                overrides.append(rest.pop(0))
        else:
            files.append(word)
    if len(files) > 1:
        raise ValueError(f"train takes one configuration file, got {' and '.join(files)}")
    return files[0] if files else None, overrides, wants_help


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    # Imported when needed: torch takes seconds, --help should not.
    if args.command == "train":
        from nbody_pyg.cli.train import train

        return train(*_train_words(rest))
    if args.command == "compare":
        from nbody_pyg.cli.compare import compare

        # A list may follow an option, so that only the first word can be the file.
        path = rest.pop(0) if rest and not rest[0].startswith("-") else None
        return compare(path, [w for w in rest if w not in ("-h", "--help")], "-h" in rest or "--help" in rest)
    if args.command == "evaluate":
        from nbody_pyg.cli.evaluate import evaluate

        return evaluate(args)
    if args.command == "info":
        from nbody_pyg.cli.info import info

        return info(args)
    if args.command == "check":
        from nbody_pyg.cli.check import check

        return check(args)
    if args.command == "relax":
        from nbody_pyg.cli.relax import relax

        return relax(args)
    if args.command == "energies":
        from nbody_pyg.cli.energies import energies

        return energies(args)
    if args.command == "md":
        from nbody_pyg.cli.md import md

        return md(args)
    from nbody_pyg.cli.hierarchy import hierarchy

    return hierarchy(args)
