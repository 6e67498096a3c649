"""The configuration of a run: frozen dataclasses, read from one YAML file and dotted overrides."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from nbody_pyg.atomic_write import write_text
from nbody_pyg.datasets.keys import named_keys
from nbody_pyg.io.checkpoint import with_defaults
from nbody_pyg.messages import check_choice, nearest
from nbody_pyg.properties import Property
from nbody_pyg.renamed import FORMER_ARGUMENTS, present_names
from nbody_pyg.training.loggers import LOGGERS
from nbody_pyg.training.settings import NO_INIT, FineTuneConfig, TrainingConfig, setting


@dataclass(frozen=True)
class DataConfig:
    """Where frames come from: exactly one of ``embedded``, ``rmd17``, ``qm9`` and ``train``."""

    embedded: str | None = setting(None, "a molecule of the embedded sets: ethanol, alanine_dipeptide")
    rmd17: str | None = setting(None, "a molecule of revised MD17, read from files under root")
    qm9: list[str] | str | None = setting(  # noqa: RUF009
        None, "a target of QM9 (U0, mu, alpha, homo, ...), a list of targets, or all (of the usual twelve); dipole: "
        "the vectors of the RI-MP2 set"
    )  # fmt: skip
    family: str = setting("dimenet", "split of QM9: dimenet (110,000 molecules for training) or cormorant (100,000)")
    root: str | None = setting(None, "folder of the files of rMD17 or QM9 (default of QM9: the package qm9pack)")
    split: int = setting(1, "number of the published rMD17 split")
    train: list[str] | str | None = setting(  # noqa: RUF009
        None, "training frames (extxyz, npz, anything ASE reads): a file, a folder, a pattern such as 'run*/a.xyz', "
        "or a list of them; HDF5 files of datasets/make_pretraining.py are read a few at a time"
    )  # fmt: skip
    val: list[str] | str | None = setting(  # noqa: RUF009
        None, "validation frames, as for train; by default num_val frames of train"
    )  # fmt: skip
    test: dict[str, str] | str | None = setting(None, "test frames, or {name: file}")  # noqa: RUF009
    file_format: str | None = setting(None, "ASE's name of the file format, if the file names do not show it")
    num_train: int | None = setting(None, "number of training frames (default: all remaining ones)")
    num_val: int | None = setting(None, "number of validation frames (default: 50, at most a tenth)")
    num_test: int | None = setting(None, "number of test molecules of QM9 (default: all of the split)")
    split_seed: int = setting(0, "seed of the random split into training and validation")
    units: str | None = setting(None, "units of the files, e.g. 'kcal/mol' or 'Ha, bohr'")
    keys: dict[str, str] | None = setting(  # noqa: RUF009
        None, "keys of labels in the files, e.g. '{energy: dft_energy, forces: dft_forces}'; labels: energy, forces, "
        "stress, virial, dipole, polarizability, charge, spin"
    )  # fmt: skip
    energy_key: str | None = setting(None, "short for keys: {energy: ...}")
    forces_key: str | None = setting(None, "short for keys: {forces: ...}")
    stress_key: str | None = setting(None, "short for keys: {stress: ...}")
    drop_unconverged: bool | None = setting(
        None, "leave out frames whose electronic structure did not converge (default: keep them, with a note)"
    )  # fmt: skip
    one_molecule: bool | None = setting(
        None, "all frames hold one molecule in one order of atoms, and share the hierarchy of the first "
        "(default: true for embedded and rmd17)"
    )  # fmt: skip
    files_in_memory: int | None = setting(
        None, "HDF5 files held at once, of data.train that does not fit into memory (default: 8)"
    )  # fmt: skip
    e0: dict[str, float] | str = setting("lstsq", "lstsq, mean, isolated, atomref (of QM9), or {element: eV}")  # noqa: RUF009

    def __post_init__(self) -> None:
        given = [name for name in ("embedded", "rmd17", "qm9", "train") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"data needs exactly one of embedded, rmd17, qm9 and train, got {given or 'none'}")
        if self.root is None and (self.rmd17 is not None or self.qm9 == "dipole"):
            wanted = "data.rmd17" if self.rmd17 is not None else "data.qm9 'dipole'"
            raise ValueError(f"{wanted} needs data.root, the folder of its files")
        for name in ("val", "test"):
            if getattr(self, name) is not None and self.train is None:
                raise ValueError(f"data.{name} goes with data.train; data.{given[0]} brings its own frames")
        named_keys(self.keys, energy_key=self.energy_key, forces_key=self.forces_key, stress_key=self.stress_key)
        if self.val is not None and self.num_val:
            raise ValueError(
                f"data.val names the validation frames, so that data.num_val must not be given, got {self.num_val}; "
                "leave one of them out"
            )

    @property
    def shares_hierarchy(self) -> bool:
        """Whether bonds are taken from the first frame, so that a stretched bond causes no step in the energy."""
        one = self.train is None and self.qm9 is None
        return one if self.one_molecule is None else self.one_molecule


#: Limits of a run, and the default ones: CPU seconds, and passes over few frames.
LIMIT_KEYS = frozenset(f"training.{name}" for name in ("budget_seconds", "wall_seconds", "max_epochs", "max_steps"))
LIMITS = {"budget_seconds": 600.0, "max_epochs": 250}
# Values in a YAML text.
_LARGEST_YAML = 100_000
REPULSIONS = ("auto", "zbl", "none")


@dataclass(frozen=True)
class ModelConfig:
    """Preset, scheme and the arguments that are passed to the constructor of NBodyNet."""

    preset: str = "practical"
    scheme: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "NestedShells"})
    scale: float | str = "forces"
    repulsion: str = "auto"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.repulsion not in REPULSIONS:
            raise ValueError(f"model.repulsion must be one of {', '.join(REPULSIONS)}, got {self.repulsion!r}")


@dataclass(frozen=True)
class OutputConfig:
    """Output of a run."""

    folder: str = setting(
        "runs/nbody", "folder of model.nbody, config.yaml, metrics.csv and checkpoints; earlier ones go to before-N"
    )  # fmt: skip
    resume: bool = setting(
        False, "resume from last.ckpt in the folder; may change limits, intervals, lr, weight decay and output"
    )  # fmt: skip
    weights: str = setting("best", "which weights to keep: best of the validation, or last")
    plot: bool = setting(True, "draw parity plots of the test sets, their errors, and the learning curve")
    logger: str | None = setting(None, "further log: tensorboard (in the folder) or wandb")

    def __post_init__(self) -> None:
        if self.weights not in ("best", "last"):
            raise ValueError(f"output.weights must be 'best' or 'last', got {self.weights!r}")
        if self.logger is not None:
            check_choice("output.logger", self.logger, LOGGERS)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    output: OutputConfig
    target: tuple[Property, ...] = ()
    finetune: FineTuneConfig = dataclasses.field(default_factory=FineTuneConfig)
    #: Dotted keys that the user set; nbody_pyg.training.defaults chooses others from the data.
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The nested form of the YAML file; reading it back gives an equal Config."""
        out = {name: dataclasses.asdict(getattr(self, name)) for name in ("data", "training", "output")}
        model = {"preset": self.model.preset, "scheme": dict(self.model.scheme), "scale": self.model.scale}
        model["repulsion"] = self.model.repulsion
        target = {p.name: {"readout": p.readout, "unit": p.unit, "weight": p.weight} for p in self.target}
        whole = {"data": out["data"], "model": {**model, **self.model.arguments}, **out}
        whole |= {"target": target} if target else {}
        # Runs that start from random weights have no such section, as those of earlier versions
        return whole | ({"finetune": dataclasses.asdict(self.finetune)} if self.finetune.init is not None else {})

    def text(self) -> str:
        """The YAML file."""
        text: str = yaml.safe_dump(_plain(self.to_dict()), sort_keys=False)
        return text

    def save(self, path: str | Path) -> None:
        """Write the YAML file atomically."""
        write_text(path, self.text())


_SECTIONS = {"data": DataConfig, "training": TrainingConfig, "output": OutputConfig, "finetune": FineTuneConfig}
_MODEL_KEYS = {
    "preset": "practical (for potentials) or strict (polynomial, as in the paper)",
    "scheme": "composition scheme, e.g. {name: BondTree, cutoff: 5.0}; see --model.scheme.<argument>",
    "repulsion": "repulsion of nuclei at short range: zbl, none, or auto (zbl for the practical preset)",
    "scale": "factor of the network's output: forces (their root mean square; without them the spread of the energies "
    "per atom) or a number",
}
_ARGUMENT_HELP = {
    "channels": "multiplicity of every fragment of the states (32, unless irreps is given)",
    "lmax": "highest degree of the states (2, unless irreps is given)",
    "irreps": "type of the states, e.g. 48x0e + 32x1o + 16x2e, or one for each level by its name",
}


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The nested form of a run of an older version, with the defaults of settings that it did not have."""
    return {**stored, **{name: with_defaults(stored[name], kind) for name, kind in _SECTIONS.items() if name in stored}}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``--section.key value`` overrides.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key (the message suggests the nearest one), a value of the wrong type, or
            values that contradict each other.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_tree(path, f"sections ({', '.join([*_SECTIONS, 'model'])})")
    given = _parse_overrides(overrides)
    switch_scheme(tree, dict(given))
    for key, value in given:
        insert(tree, key, value)
    return parse_config(tree)


def switch_scheme(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """A scheme given on the command line replaces the whole scheme of the file."""
    model, name = tree.get("model"), overrides.get("model.scheme.name")
    scheme = model.get("scheme") if isinstance(model, dict) else None
    if name is not None and isinstance(scheme, Mapping) and scheme.get("name", "NestedShells") != name:
        tree["model"] = {**tree["model"], "scheme": {}}


def parse_config(tree: Mapping[str, Any]) -> Config:
    """A Config from the nested form of the YAML file.

    Raises: ValueError: see :func:`load_config`.
    """
    if isinstance(tree.get("model"), Mapping):
        try:
            tree = {**tree, "model": present_names(tree["model"], FORMER_ARGUMENTS)}
        except TypeError as error:
            raise ValueError(f"section model: {error}") from error
    _check_keys(tree)
    named = _named_keys(tree)
    parser = config_parser()
    tree = {section: _typed_section(section, values) for section, values in tree.items()}
    target = _properties(tree.pop("target", None) or {})
    try:
        parsed = parser.parse_object({k: v for k, v in tree.items() if v is not None})
    except jsonargparse.ArgumentError as error:
        raise ValueError(_in_one_sentence(str(error), tree)) from error
    values = {name: parsed[name].as_dict() for name in (*_SECTIONS, "model")}
    model = values.pop("model")
    given = set(tree.get("model") or {})
    chosen = {k: _jsonable(v) for k, v in model.items() if k in given and k not in _MODEL_KEYS}
    scheme = {"name": "NestedShells"} | dict(model["scheme"] or {})
    return Config(
        data=DataConfig(**values["data"]),
        model=ModelConfig(model["preset"], scheme, model["scale"], str(model["repulsion"] or "none").lower(), chosen),
        training=TrainingConfig(**_limited(values["training"], named)),
        output=OutputConfig(**values["output"]),
        target=target,
        finetune=_finetune(values["finetune"], named),
        given=named,
    )


def _limited(values: Mapping[str, Any], named: frozenset[str]) -> dict[str, Any]:
    """The section ``training`` with default limits if none are given."""
    return dict(values) | (LIMITS if named.isdisjoint(LIMIT_KEYS) else {})


def _finetune(values: Mapping[str, Any], named: frozenset[str]) -> FineTuneConfig:
    others = sorted(key for key in named if key.startswith("finetune.") and key != "finetune.init")
    values = dict(values) | ({"init": None} if values["init"] == NO_INIT else {})
    if values["init"] is None and others:
        raise ValueError(f"{others[0]} is for a run that starts from a model; give it by --init, or leave it out")
    return FineTuneConfig(**values)


def _named_keys(tree: Mapping[str, Any], prefix: str = "") -> frozenset[str]:
    """Dotted names of all values of a nested form, and of the mappings around them."""
    found = set()
    for key, value in tree.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found |= _named_keys(value, f"{prefix}{key}.")
    return frozenset(found)


#: Keys of files or folders, in which ~ and $HOME are expanded.
_FILE_KEYS = {"data": ("root", "train", "val", "test"), "output": ("folder",), "finetune": ("init", "replay")}
_MODEL_TYPES: dict[str, Any] = {"preset": str, "scheme": dict, "scale": float | str, "repulsion": str | None}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values",
          list: "a list"}  # fmt: skip


def expand_path(text: str) -> str:
    """The path with ~ and variables such as $HOME expanded, unless a file has that literal name."""
    return text if os.path.exists(text) else os.path.expandvars(os.path.expanduser(text))


def _admits(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, dict[str, str] as dict; Any allows all."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(kind) or kind for kind in kinds)


def _hint(section: str, key: str) -> Any:
    return typing.get_type_hints(_SECTIONS[section]).get(key, Any) if section in _SECTIONS else Any


def _typed_section(section: str, values: Any) -> Any:
    """The values of a section, with integers and names converted and paths expanded."""
    if not isinstance(values, Mapping) or section not in (*_SECTIONS, "model"):
        return values
    whole = {name for name, default in model_arguments().items() if type(default) is int} if section == "model" else ()
    whole = {*whole, "channels", "lmax", "num_basis"} if whole else whole  # None by default
    out = {}
    for key, value in values.items():
        value = typed(value, int if key in whole else _hint(section, key))
        if section == "data" and key == "test" and isinstance(value, list):
            value = _by_name(value)
        elif (
            isinstance(value, list) and list not in _admits(_hint(section, key)) and str in _admits(_hint(section, key))
        ):
            what = "file" if section != "output" and key in _FILE_KEYS.get(section, ()) else "name"
            raise ValueError(f"{section}.{key} must be one {what}, got the list {value}; give one, or join the files")
        if key in _FILE_KEYS.get(section, ()) and value is not None:
            named = isinstance(value, Mapping)
            if isinstance(value, list):
                value = [expand_path(str(v)) for v in value]
            else:
                value = {k: expand_path(str(v)) for k, v in value.items()} if named else expand_path(str(value))
        out[key] = value
    return out


def typed(value: Any, hint: Any) -> Any:
    """A value read as YAML, converted to the expected type: 1e4 to an integer, 2024 to a name."""
    admitted = _admits(hint)
    if int in admitted and bool not in admitted and isinstance(value, (str, float)):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    if str in admitted and type(value) is int and int not in admitted and float not in admitted:
        return str(value)
    return value


def _typed_text(text: str, where: str, hint: Any) -> Any:
    """A value of the command line; it is not parsed as YAML if a name is expected."""
    admitted = _admits(hint)
    if str not in admitted:
        return parse_value(text, where)
    if not {float, int, dict, list} & set(admitted) and not text.startswith("["):
        return None if type(None) in admitted and text in ("null", "") else text
    value = parse_value(text, where)
    return text if not isinstance(value, (*{k for k in admitted if isinstance(k, type)}, list)) else value


def _by_name(files: Sequence[Any]) -> dict[str, str]:
    """Test sets of a list of files, by the names of the files."""
    named = {Path(str(file)).stem: str(file) for file in files}
    if len(named) < len(files):
        raise ValueError(f"data.test must list files of different names, got {list(files)}; name them: {{hot: a.xyz}}")
    return named


def _in_one_sentence(message: str, tree: Mapping[str, Any]) -> str:
    """Our message for jsonargparse's error about a wrong type."""
    found = re.search(r'"([\w.]+)"', message)
    section, _, key = (found.group(1) if found else "").partition(".")
    hint = _hint(section, key) if section in _SECTIONS else _MODEL_TYPES.get(key) if section == "model" else None
    if hint is None or not isinstance(tree.get(section), Mapping):
        return " ".join(message.split())
    kinds = [_WORDS[kind] for kind in _admits(hint) if kind in _WORDS]
    return f"{section}.{key} must be {' or '.join(kinds)}, got {tree[section].get(key)!r}"


def _properties(section: Mapping[str, Any]) -> tuple[Property, ...]:
    """The section ``target``: {label: {readout, unit, weight}}."""
    known = [f.name for f in dataclasses.fields(Property) if f.name != "name"]
    found = []
    for name, values in section.items():
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(f"target.{name} must hold keys and values, got {values!r}; e.g. {{readout: dipole}}")
        for key in values:
            if key not in known:
                raise ValueError(f"unknown key target.{name}.{key}; {nearest(key, known, f'target.{name}.')}")
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"target.{name}.weight must be a number, got {weight!r}")
        found.append(Property(str(name), str(values.get("readout", "extensive")), str(values.get("unit", "")), weight))
    return tuple(found)


def config_parser() -> jsonargparse.ArgumentParser:
    """The typed keys of a configuration with their defaults and help."""
    parser = jsonargparse.ArgumentParser(
        prog="nbody train", usage="nbody train [CONFIG.yaml] [--SECTION.KEY VALUE ...]",
        exit_on_error=False, add_help=False,
        description="Every key of the YAML file is an option: training.lr in the file is --training.lr here. Radii and "
        "exponent of NestedShells, lmax, channels, e0, weights of the loss, batch size and limits are chosen from the "
        "data where they are not given; each is printed with its reason.",
    )  # fmt: skip
    for section, kind in _SECTIONS.items():
        group = parser.add_argument_group(section, (kind.__doc__ or "").strip().splitlines()[0])
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            group.add_argument(
                f"--{section}.{field.name}", type=hints[field.name], default=field.default,
                help=field.metadata["help"],
            )  # fmt: skip
    group = parser.add_argument_group("model", "the network; further keys are arguments of NBodyNet")
    for name, default in {"preset": "practical", "scheme": None, "scale": "forces", "repulsion": "auto"}.items():
        group.add_argument(f"--model.{name}", type=_MODEL_TYPES[name], default=default, help=_MODEL_KEYS[name])
    for name, default in model_arguments().items():
        # The constructor checks types and raises the errors.
        help = _ARGUMENT_HELP.get(name, "argument of NBodyNet")
        group.add_argument(f"--model.{name}", type=Any, default=default, help=help)
    return parser


def model_arguments() -> dict[str, Any]:
    """Names and defaults of the keys of the model section, taken from NBodyNet."""
    from nbody_pyg.models import network_arguments

    return network_arguments()


def scheme_arguments(name: str) -> list[str]:
    """Arguments of a composition scheme."""
    from nbody_pyg import hierarchy
    from nbody_pyg.hierarchy import Scheme

    known = {n: c for n, c in vars(hierarchy).items() if isinstance(c, type) and issubclass(c, Scheme)}
    known.pop("Scheme", None)
    if name not in known:
        raise ValueError(f"unknown scheme {name!r} in model.scheme.name; {nearest(name, known)}")
    return list(inspect.signature(known[name].__init__).parameters)[1:]


def _check_keys(tree: Mapping[str, Any]) -> None:
    """Reject an unknown key, and suggest the nearest known one."""
    known = {name: [f.name for f in dataclasses.fields(kind)] for name, kind in _SECTIONS.items()}
    known["model"] = [*_MODEL_KEYS, *model_arguments()]
    for section, values in tree.items():
        if section not in known:
            if section == "target":
                if not isinstance(values, Mapping | None):
                    raise ValueError(f"section target must hold labels and their readouts, got {values!r}")
                continue
            raise ValueError(f"unknown section {section!r}; {nearest(section, [*known, 'target'])}")
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ValueError(f"section {section} must hold keys and values, got {values!r}")
        for key in values:
            if key not in known[section]:
                raise ValueError(f"unknown key {section}.{key}; {nearest(key, known[section], f'{section}.')}")
    scheme = (tree.get("model") or {}).get("scheme") or {}
    if not isinstance(scheme, Mapping):
        raise ValueError(f"model.scheme must hold a name and arguments, got {scheme!r}; e.g. {{name: BondTree}}")
    arguments = scheme_arguments(scheme.get("name", "NestedShells"))
    for key in scheme:
        if key not in (*arguments, "name"):
            raise ValueError(f"unknown key model.scheme.{key}; {nearest(key, [*arguments, 'name'], 'model.scheme.')}")


def read_options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``--a.b value value`` and ``--a.b=value`` as (key, words); first, under an empty key, the words before any
    option."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            found.append((key, [text] if equals else []))
        else:
            found[-1][1].append(word)
    return found


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """``--section.key value`` as (key, value read as YAML)."""
    (_, loose), *options = read_options(words)
    out = []
    for key, texts in options:
        key = "finetune.init" if key == "init" else key
        section, dot, name = key.partition(".")
        loose += texts[1:] if dot else [f"--{key}"]
        if dot and not texts:
            raise ValueError(f"--{key} needs a value")
        out += [(key, _typed_text(text, f"--{key}", _hint(section, name))) for text in texts[:1]]
    if loose:
        raise ValueError(f"cannot read {loose[0]!r}; overrides look like --training.lr 0.01")
    return out


def read_tree(path: str | Path, holds: str) -> dict[str, Any]:
    """The nested form of a YAML file; ``holds`` describes its content in messages.

    Raises: FileNotFoundError: no such file; ValueError: not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    tree = parse_yaml(Path(path).read_bytes(), str(path)) or {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold {holds}, got {tree!r}")
    return tree


def parse_value(text: str, where: str) -> Any:
    """A value of the command line, read as YAML, except that 1e-3 is a number here.

    Raises: ValueError: not YAML.
    """
    value = parse_yaml(text, where)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return text
    return value


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The content of a YAML text; ``where`` is its place in messages.

    Raises: ValueError: not YAML, with a message of one line; a duplicate key; aliases that refer to themselves or
    expand to many values.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, where, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is no YAML: {reason}; indent by spaces, close brackets and quotes") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply for a configuration") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_size(node: yaml.Node, where: str, sizes: dict[int, int]) -> int:
    """Number of values under a node, with aliases expanded; rejects duplicate keys."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if not size:
            raise ValueError(f"{where} has an alias that refers to itself, line {node.start_mark.line + 1}")
        return size
    sizes[id(node)] = 0  # until it is known
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            parts += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (word := (key.tag, key.value)) in seen:
                    raise ValueError(
                        f"{where} holds the key {key.value!r} twice, the second time in line "
                        f"{key.start_mark.line + 1}; keep one of them"
                    )
                seen.add(word)
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size = 1 + sum(_check_size(part, where, sizes) for part in parts)
    if size > _LARGEST_YAML:
        raise ValueError(f"{where} holds more than {_LARGEST_YAML} values, its aliases written out: no configuration")
    sizes[id(node)] = size
    return size


def insert(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put the value of ``section.key`` into the nested form, and create missing sections."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def _jsonable(value: Any) -> Any:
    return dict(vars(value)) if isinstance(value, jsonargparse.Namespace) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
