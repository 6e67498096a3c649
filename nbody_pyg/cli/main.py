"""Entry point: parse the command, run it, and report a user error in one line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nbody_pyg.active.settings import LearnConfig
from nbody_pyg.cli.arguments import (
    WRONG,
    WrongArgument,
    label_keys,
    not_negative,
    number_not_negative,
    positive,
    positive_number,
    whole,
)
from nbody_pyg.cli.reserved import unused_removed
from nbody_pyg.messages import closest, nearest, printable

_DESCRIPTION = """\
Covariant hierarchical N-body networks for atoms.

  nbody train configs/embedded.yaml                 train and test a potential, write one model file
  nbody convert data/*.xyz --out units              frames that do not fit into memory
  nbody evaluate runs/embedded/model.nbody my.xyz   errors, parity plot, predictions
  nbody info runs/embedded/model.nbody              show the contents of a model file
  nbody check runs/embedded/model.nbody             test the physics of a model
  nbody md runs/embedded/model.nbody start.xyz      molecular dynamics
  nbody relax runs/embedded/model.nbody my.xyz      relax many structures at once
  nbody learn CCO --label gfn2                      active learning: a potential from few labels
  nbody export runs/embedded/model.nbody --to c     source code for programs without Python
  nbody solid runs/si/model.nbody si.cif            cell, bulk modulus and elastic constants of a crystal
  nbody infrared model.nbody start.xyz --dipole d.nbody   vibrations, infrared and Raman spectrum
  nbody energies runs/embedded/model.nbody my.xyz   energy of each part of a molecule
  nbody hierarchy molecule.xyz --scheme BondTree    build, check and draw a hierarchy
  nbody compare --models nbody painn --budget 300   compare with other models

Units: eV, angstrom, fs; tables in meV and meV/A."""

_EXIT = """\
exit status:
  0    success
  1    error in the input
  2    wrong arguments
  3    finished, but a check failed, the dynamics were stopped, structures did not converge, frames were left
       out, or models of a comparison failed
  130  stopped by Ctrl-C, 143 by SIGTERM: results so far are kept; resume training with --output.resume true
  141  the pipe was closed by its reader"""

#: Arguments of any command that name files or folders; ~ and $HOME in them are expanded.
_PATHS = ("model", "data", "start", "frames", "file", "committee", "dipole", "out", "json", "plot", "val", "test")


_KEYS = "keys of labels in the files, e.g. '{energy: dft_energy, forces: dft_forces}'"


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest option when one is unknown."""

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]  # of words only
        args, unknown = self.parse_known_args(words)
        if unknown:
            self.chosen(words).unknown(unknown)
        return args

    def chosen(self, words: Sequence[str]) -> _Parser:
        """The parser of the command among the arguments."""
        commands = self.commands
        return next((commands[word] for word in words if word in commands), self)

    @property
    def commands(self) -> dict[str, _Parser]:
        return {
            name: p for a in self._actions if isinstance(a, argparse._SubParsersAction) for name, p in a.choices.items()
        }

    def unknown(self, words: Sequence[str]) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        near = closest(words[0].split("=")[0], known)
        self.error(f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {near}?" if near else ""))


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting of active learning."""
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": whole,
        "int | None": whole,
        "float": positive_number,
        "float | None": positive_number,
    }
    for field in dataclasses.fields(LearnConfig):
        shown = "" if field.default is None else f" (default: {field.default})"
        kind, option = kinds.get(str(field.type), positive_number), f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"].replace("%", "%%")
        parser.add_argument(option, type=kind, default=field.default, help=text + shown)


def build_parser() -> _Parser:
    """The commands and their options, with help."""
    parser = _Parser(
        prog="nbody", description=_DESCRIPTION, epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # Its options are keys of the configuration, which argparse does not know: see _train_words.
    train = commands.add_parser("train", add_help=False, help="train a potential from a YAML file")
    train.add_argument("words", nargs=argparse.REMAINDER)

    compare = commands.add_parser("compare", add_help=False, help="compare our network with other models or variants")
    compare.add_argument("words", nargs=argparse.REMAINDER)

    convert = commands.add_parser(
        "convert", help="write frames as HDF5 files, for training that does not hold them all"
    )
    convert.add_argument("data", nargs="+", help="training frames: files (anything ASE reads, npz), folders, patterns")
    convert.add_argument("--out", required=True, help="folder of the HDF5 files; a conversion that was stopped goes on")
    convert.add_argument("--val", nargs="+", default=[], help="files of validation frames")
    convert.add_argument("--test", nargs="+", default=[], help="files of test frames")
    convert.add_argument("--num-val", type=not_negative, default=None,
                         help="frames drawn for validation (default: 500, at most a tenth; 0 with --val)")  # fmt: skip
    convert.add_argument("--num-test", type=not_negative, default=0, help="frames drawn for the test (default: 0)")
    convert.add_argument("--seed", type=not_negative, default=0, help="of this draw (default: 0)")
    convert.add_argument("--keys", type=label_keys, default=None, help=_KEYS)
    convert.add_argument("--units", default=None, help="units of the files, e.g. 'kcal/mol' or 'eV, angstrom, kbar'")
    convert.add_argument("--file-format", default=None, help="ASE's name of the format, if file names do not show it")
    convert.add_argument("--drop-unconverged", action="store_true",
                         help="leave out frames whose electronic structure did not converge")  # fmt: skip
    convert.add_argument("--frames-per-file", type=positive, default=1000, help="(default: 1000)")

    evaluate = commands.add_parser("evaluate", help="errors of models on labelled frames")
    evaluate.add_argument("model", help="model file")
    evaluate.add_argument(
        "data", nargs="+",
        help="files of frames, embedded sets such as ethanol:test_300K, or further model files (*.nbody) to compare",
    )  # fmt: skip
    _add_out(
        evaluate, "folder for parity.png, predictions and errors.json (default: evaluate beside the model file; a "
        "number is added if it exists)",
    )  # fmt: skip
    evaluate.add_argument("--batch-size", type=positive, default=20, help="frames per batch (default: 20)")
    evaluate.add_argument("--units", default=None, help="units of the files, e.g. 'kcal/mol' or 'eV, angstrom, kbar'")
    evaluate.add_argument("--keys", type=label_keys, default=None, help=_KEYS)
    evaluate.add_argument("--energy-key", default=None, help="short for --keys '{energy: ...}'")
    evaluate.add_argument("--forces-key", default=None, help="short for --keys '{forces: ...}'")
    evaluate.add_argument("--stress-key", default=None, help="short for --keys '{stress: ...}'")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    evaluate.add_argument("--no-plot", action="store_true", help="no parity plot")

    info = commands.add_parser("info", help="show the contents of a model file")
    info.add_argument("model", nargs="?", help="model file; without it, show the backends of this machine")
    info.add_argument("--json", action="store_true", help="print everything as JSON")

    check = commands.add_parser("check", help="test the physics of a trained model")
    check.add_argument("model", help="model file")
    check.add_argument(
        "--frames", default=None, help="structures: a file or an embedded set (default: the one in the model file)"
    )
    check.add_argument(
        "--nve-steps", type=not_negative, default=1000, help="steps of the NVE test, 0 skips it (default: 1000)"
    )
    check.add_argument(
        "--only", nargs="+", default=[], metavar="SECTION",
        help="symmetry, derivatives, additivity, smoothness, short_range, precision, dynamics (default: all)",
    )  # fmt: skip
    check.add_argument("--timestep", type=positive_number, default=0.5, help="time step, fs (default: 0.5)")
    check.add_argument(
        "--temperature", type=number_not_negative, default=300.0, help="of the NVE test, K (default: 300)"
    )
    check.add_argument("--seed", type=not_negative, default=0, help="of rotations, samples and velocities (default: 0)")
    check.add_argument("--json", default=None, metavar="FILE", help="also write the results to this file")
    _add_overwrite(check)

    md = commands.add_parser("md", help="molecular dynamics with ASE")
    md.add_argument("model", help="model file")
    md.add_argument(
        "start", nargs="?", default=None,
        help="start structure: the last frame of any file that ASE reads; optional with --restart",
    )  # fmt: skip
    md.add_argument(
        "--ensemble", choices=("nve", "langevin", "bussi", "nose-hoover", "npt", "npt-full"), default="nve",
        help="constant energy (nve), temperature (langevin, bussi, nose-hoover), or temperature and pressure with "
        "isotropic changes of the cell (npt) or changes of its shape (npt-full) (default: nve)",
    )  # fmt: skip
    md.add_argument(
        "--steps", type=not_negative, default=2000, help="number of steps; with --restart, further ones (default: 2000)"
    )
    md.add_argument("--timestep", type=positive_number, default=0.5, help="time step, fs (default: 0.5)")
    md.add_argument(
        "--temperature", type=number_not_negative, default=300.0,
        help="of the thermostat and of drawn velocities, K (default: 300)",
    )  # fmt: skip
    md.add_argument(
        "--friction", type=number_not_negative, default=None,
        help="1/fs, only with --ensemble langevin (default: 0.01)",
    )  # fmt: skip
    md.add_argument("--pressure", type=float, default=None, metavar="BAR",
                    help="of npt and npt-full, bar (default: 1)")  # fmt: skip
    md.add_argument("--thermostat-time", type=positive_number, default=None, metavar="FS",
                    help="relaxation time of bussi, nose-hoover, npt and npt-full, fs (default: 100 time "
                    "steps)")  # fmt: skip
    md.add_argument("--barostat-time", type=positive_number, default=None, metavar="FS",
                    help="relaxation time of the cell, fs (default: 1000 time steps)")  # fmt: skip
    md.add_argument("--velocities", choices=("auto", "given", "drawn"), default="auto",
                    help="given: those of the start structure; drawn: random, from --temperature and --seed; auto: "
                    "given if the start structure has velocities, else drawn (default: auto)")  # fmt: skip
    md.add_argument("--max-temperature", type=float, default=None, metavar="K",
                    help="stop when hotter; inf: never (default: 30000, or ten times --temperature)")  # fmt: skip
    md.add_argument("--every", type=positive, default=10, help="steps between samples (default: 10)")
    md.add_argument("--format", choices=("extxyz", "traj", "dcd", "xtc"), default=None,
                    help="of the trajectory; dcd and xtc have positions and cells only and need mdtraj (default: "
                    "extxyz)")  # fmt: skip
    md.add_argument("--seed", type=not_negative, default=0, help="for velocities and thermostat (default: 0)")
    md.add_argument("--dtype", choices=("float32", "float64"), default=None, help="(default: the model's)")
    md.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    md.add_argument("--engine", choices=("auto", "native", "torch"), default="auto",
                    help="native: a generated C program; auto: native where it can compute the model, else torch "
                    "(default: auto)")  # fmt: skip
    md.add_argument("--compile", action="store_true", help="compile the model at the first step; for small systems")
    md.add_argument("--cuda-graphs", action="store_true", help="replay steps as CUDA graphs; needs --device cuda")
    md.add_argument("--committee", nargs="+", default=[], metavar="MODEL",
                    help="further models; forces are the mean over all models")  # fmt: skip
    md.add_argument("--max-forces-std", type=positive_number, default=None, metavar="EV_PER_A",
                    help="stop when the standard deviation of the force on an atom over the committee is "
                    "larger, eV/A")  # fmt: skip
    md.add_argument("--restart", action="store_true",
                    help="continue the run in the folder from its checkpoint, or without one from the last frame; "
                    "frames and log lines are appended")  # fmt: skip
    md.add_argument("--stop-on-bond-change", action="store_true",
                    help="stop at the first sample whose bonds differ from those in use (BondTree)")  # fmt: skip
    _add_out(
        md,
        "folder for md.log, trajectory.xyz, checkpoint.npz, energy.png (default: md; a number is added if it "
        "exists); a file STOP in it ends the run",
    )

    export = commands.add_parser("export", help="write a model as source code for programs without Python")
    export.add_argument("model", help="model file")
    export.add_argument("--to", choices=("c",), default="c", help="language: c (default: c)")
    export.add_argument("--dtype", choices=("float32", "float64"), default=None, help="(default: the model's)")
    _add_out(export, "folder of the source, header, weights and example (default: exported; a number is added if it "
             "exists)")  # fmt: skip

    relax = commands.add_parser("relax", help="relax many structures at once")
    relax.add_argument("model", help="model file")
    relax.add_argument("frames", help="any file that ASE reads, or an embedded set such as ethanol:test_300K")
    relax.add_argument(
        "--fmax", type=positive_number, default=0.01, help="largest force allowed at the end, eV/A (default: 0.01)"
    )
    relax.add_argument(
        "--cell", nargs="?", const="full", default="fixed", choices=("full", "isotropic", "fixed"),
        help="relax cells too: their lengths and angles (full, if no word follows), or their size only (isotropic)",
    )  # fmt: skip
    relax.add_argument("--pressure", type=float, default=0.0, help="on the cells, GPa; needs --cell (default: 0)")
    relax.add_argument("--steps", type=positive, default=500, help="largest number of steps of each (default: 500)")
    relax.add_argument("--batch-size", type=positive, default=64, help="structures per batch (default: 64)")
    relax.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="(default: float64)")
    _add_out(relax, "extended xyz file (default: relaxed.xyz; a number is added if it exists)")

    solid = commands.add_parser("solid", help="cell, equation of state and elastic constants of a crystal")
    solid.add_argument("model", help="model file")
    solid.add_argument("file", help="a crystal in any file that ASE reads")
    solid.add_argument("--index", type=whole, default=0, help="structure of the file (default: 0)")
    solid.add_argument("--fmax", type=positive_number, default=1e-3, help="largest force left, eV/A (default: 0.001)")
    solid.add_argument("--steps", type=positive, default=500, help="largest number of steps (default: 500)")
    solid.add_argument("--range", type=positive_number, default=0.06, help="largest change of volume (default: 0.06)")
    solid.add_argument("--strain", type=positive_number, default=0.005, help="of elastic constants (default: 0.005)")
    _add_out(solid, "folder (default: solid; a number is added if it exists)")

    infrared = commands.add_parser("infrared", help="vibrations, infrared and Raman spectrum of a molecule")
    infrared.add_argument("model", help="model file")
    infrared.add_argument("file", help="a molecule in any file that ASE reads")
    infrared.add_argument("--dipole", default=None, metavar="MODEL",
                          help="model file of dipoles, for intensities (default: none)")  # fmt: skip
    infrared.add_argument("--polarizability", default=None, metavar="MODEL",
                          help="model file of polarizabilities, for Raman activities (default: none)")  # fmt: skip
    infrared.add_argument("--index", type=whole, default=0, help="structure of the file (default: 0)")
    infrared.add_argument(
        "--fmax", type=positive_number, default=1e-4, help="largest force left, eV/A (default: 0.0001)"
    )
    infrared.add_argument("--steps", type=positive, default=1000, help="largest number of steps (default: 1000)")
    infrared.add_argument("--width", type=positive_number, default=10.0,
                          help="of the lines in the plot, full width at half maximum, cm^-1 (default: 10)")  # fmt: skip
    _add_out(infrared, "folder (default: infrared; a number is added if it exists)")

    learn = commands.add_parser("learn", help="active learning: a potential from few labels")
    learn.add_argument("start", help="structures of one molecule or crystal, or a SMILES string")
    _add_settings(learn)
    learn.add_argument("--out", default="learned", help="folder (default: learned)")
    learn.add_argument("--resume", action="store_true", help="continue the run in the folder")

    energies = commands.add_parser("energies", help="energy of each part of the hierarchy of a structure")
    energies.add_argument("model", help="model file")
    energies.add_argument("file", help="any file that ASE reads, or an embedded set such as ethanol")
    energies.add_argument("--index", type=whole, default=0, help="frame of the file (default: 0)")
    energies.add_argument("--minus", type=whole, default=None, metavar="INDEX", help="subtract energies of this frame")
    energies.add_argument("--level", default=None, help="name or number of the level to list and draw")
    energies.add_argument("--plot", default=None, metavar="PNG", help="draw it to this file")
    _add_overwrite(energies)

    hierarchy = commands.add_parser("hierarchy", help="build, check and draw the hierarchy of a structure")
    hierarchy.add_argument("file", help="any file that ASE reads, or a molecule of the embedded sets")
    hierarchy.add_argument("--scheme", default=None, help="composition scheme (default: BondTree)")
    hierarchy.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the scheme, e.g. cutoff=4",
    )
    hierarchy.add_argument("--model", default=None, help="use the scheme of this model file")
    hierarchy.add_argument("--index", type=whole, default=0, help="frame of the file (default: 0)")
    hierarchy.add_argument("--plot", default=None, metavar="PNG", help="draw it to this file")
    _add_overwrite(hierarchy)
    return parser


def _add_out(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", default=None, help=text)
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    if argv is None:
        for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not end the program
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        status = _main(words, command)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that a broken pipe is handled below
        return status
    except KeyboardInterrupt:
        print(f"\nnbody {command}: stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # stdout is redirected, because Python would fail again when it flushes at exit
        if argv is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)


def _main(words: list[str], command: str | None) -> int:
    parser = build_parser()
    if command is None and "--version" in words:
        from nbody_pyg import __version__

        print(f"nbody_pyg {__version__}")
        return 0
    if command is None and not {"-h", "--help"} & set(words):
        print(f"{parser.format_usage()}nbody: error: name a command: {', '.join(parser.commands)}", file=sys.stderr)
        return WRONG
    if command is not None and command not in parser.commands:
        hint = nearest(command, parser.commands)
        print(f"nbody: error: no command {printable(repr(command))}; {hint}", file=sys.stderr)
        return WRONG
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # argparse would refuse the dotted keys of these two.
    place = words.index(command) if command in ("train", "compare") else len(words)
    args = parser.parse_args([*words[: place + 1]])
    try:
        return _run(args, words[place + 1 :])
    except BrokenPipeError:
        raise
    # For example a wrong value, a full disk, missing permission, or a loss that is not finite
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError, MemoryError) as error:
        if debug:
            raise
        print(f"nbody {args.command}: error: {printable(_text(error))}", file=sys.stderr)
        return WRONG if isinstance(error, WrongArgument) else 1


def _text(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _train_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The words after ``train`` as (configuration file, overrides); each override has one value."""
    from nbody_pyg.training.config import expand_path, read_options

    (_, files), *options = read_options(words)
    files += [word for _, values in options for word in values[1:]]
    if len(files) > 1:
        raise ValueError(f"train takes one configuration file, got {' and '.join(files)}")
    return expand_path(files[0]) if files else None, ["=".join([f"--{key}", *values[:1]]) for key, values in options]


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    # Imported when needed, because torch takes seconds and --help should not.
    if args.command in ("train", "compare") and {"-h", "--help"} & set(rest):
        # Written and checked by tests/contract/test_cli_help.py
        print(Path(__file__).with_name(f"{args.command}_help.txt").read_text(encoding="utf-8"), end="")
        return 0
    from nbody_pyg.training.config import expand_path

    for name in _PATHS:
        value = getattr(args, name, None)
        if isinstance(value, (str, list)) and value:
            setattr(args, name, [*map(expand_path, value)] if isinstance(value, list) else expand_path(value))
    if args.command == "train":
        from nbody_pyg.cli.train import train

        return train(*_train_words(rest))
    if args.command == "compare":
        from nbody_pyg.cli.compare import compare

        # A list may follow an option, so only the first word can be the file.
        path = expand_path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
        return compare(path, rest)
    command = importlib.import_module(f"nbody_pyg.cli.{args.command}")
    with unused_removed():
        status: int = getattr(command, args.command)(args)
    return status
