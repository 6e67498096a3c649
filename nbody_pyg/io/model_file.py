"""One file per model: safetensors for the weights, JSON for everything else; no pickle.

The SHA-256 in the JSON covers the whole JSON and the name, dtype, shape and bytes of every tensor. A file is checked
before anything is built from it or printed unescaped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.io.checkpoint import is_checkpoint
from nbody_pyg.io.description import potential_config, potential_from_config
from nbody_pyg.io.fingerprint import cg_fingerprint
from nbody_pyg.io.sizes import check_sizes
from nbody_pyg.io.upgrades import FORMAT_VERSION, present_weights, up_to_date
from nbody_pyg.messages import nearest, printable, short
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.renamed import FORMER_ARGUMENTS, present_names
from nbody_pyg.system import DEFAULT_STATE, PRECISIONS

_KEY = "nbody_pyg"
_PACKAGES = ("nbody_pyg", "torch", "torch_geometric", "e3nn")
_NUMBER = (int, float)
_UNITS = {"energy": "eV", "length": "angstrom", "forces": "eV/angstrom", "stress": "eV/angstrom^3"}
#: Entries of every header and their types; further entries describe the model.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "model": dict,
    "e0": (dict, type(None)),
    "scale": _NUMBER,
    "dtype": str,
    "species": (list, type(None)),
    "units": dict,
    "num_parameters": int,
    "cg_fingerprint": str,
    "versions": dict,
    "sha256": str,
    "metadata": dict,
}
#: First format whose checksum covers the settings.
SEALED = 4
_log = logging.getLogger("nbody_pyg")
#: Models that come with the package, each NAME.nbody.
SHIPPED = Path(__file__).parents[1] / "models_shipped"


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.nbody"))


def find_model(name_or_path: str | Path) -> Path:
    """The file of a model: the path itself, or the shipped model of that name where no such file exists.

    Raises: FileNotFoundError: a bare name that is neither a file nor a shipped model.
    """
    path, names = Path(name_or_path), shipped_models()
    if path.is_file() or len(path.parts) != 1 or path.suffix or (path.exists() and path.name not in names):
        return path
    if path.name not in names:
        hint = f"; of the shipped models {nearest(path.name, names)}" if names else ""
        raise FileNotFoundError(f"no model file at {path}, and no shipped model of that name{hint}")
    return SHIPPED / f"{path.name}.nbody"


def save_model(
    potential: Potential | PropertyModel, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a potential (or a model of properties) into one file, atomically (temporary file, then rename).

    The ancestor of a fine-tuned model is added to the metadata.

    Args:
        metadata: further entries for JSON: training settings, data, errors. Numbers that are not finite become null,
            because JSON does not have them.
    Raises: TypeError: metadata that JSON cannot hold. ValueError: weights that are not finite.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in potential.state_dict().items()}
    described = potential_config(potential)
    _check_finite(tensors, described["model"]["config"] is None)
    header = {
        "format_version": FORMAT_VERSION,
        **described,
        **_summary(potential),
        "units": _UNITS,
        "cg_fingerprint": cg_fingerprint(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "metadata": _without_infinity({**_ancestor(potential), **(metadata or {})}),
    }
    header = json.loads(json.dumps(header))  # as a reader gets it
    header["sha256"] = checksum(header, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})


def _ancestor(potential: Potential | PropertyModel) -> dict[str, Any]:
    return {} if potential.ancestor is None else {"ancestor": dict(potential.ancestor)}


def load_model(
    path: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> Potential | PropertyModel:
    """Read a potential, or a model of properties, ready for evaluation.

    Args:
        path: a file, or the name of a model that comes with the package (:func:`shipped_models`).
        model: the network, if it is not one of ours, built as when the file was written.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, truncated or damaged, written by a newer version, settings or weights that do not
        match a network, or another convention of the Clebsch-Gordan coefficients.
    """
    name, path = Path(path).name, find_model(path)
    header, tensors = _read(path)
    theirs = header["versions"]
    if model is None and header["cg_fingerprint"] != cg_fingerprint():
        theirs = printable(theirs.get("e3nn", "of an unknown version"))
        raise ValueError(
            f"{path} was written with e3nn {theirs}, whose Clebsch-Gordan coefficients differ from "
            f"those of e3nn {_version('e3nn')} installed here, so that its energies would be wrong; "
            f"install e3nn=={theirs}"
        )
    if header["format_version"] < SEALED:
        _log.warning(
            "%s has format %d, whose checksum does not cover the settings of the network; load it and save it again "
            "with nbody_pyg.deploy.save_model for one that does",
            *(path, header["format_version"]),
        )
    try:
        described, tensors = up_to_date(header), present_weights(tensors)
        potential = potential_from_config(described, model)
        _check_weights(potential, tensors, foreign=model is not None)
        potential.load_state_dict(tensors)
        built = json.loads(json.dumps({**potential_config(potential), **_summary(potential)}))
        given = {k: v for k, v in described.items() if k not in set(_ENTRIES) - set(built)}
        _check_same(given, built)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} does not hold settings and weights of one network: {_said(error)}; use the version of nbody_pyg "
            f"that wrote it ({printable(theirs.get('nbody_pyg'))}), or get a fresh copy"
        ) from error
    found = header["metadata"].get("ancestor")
    potential.ancestor = found if isinstance(found, dict) else None
    potential.origin = {"name": name, "sha256": header["sha256"]}
    return potential.to(device).eval()


def load_potential(path: str | Path, device: torch.device | str = "cpu") -> Potential:
    """Read a potential with :func:`load_model`.

    Raises: ValueError: a model of other properties, or as :func:`load_model`; FileNotFoundError.
    """
    return require_potential(load_model(path, device=device), f" ({path})")


def require_potential(model: nn.Module, origin: str = "") -> Potential:
    """Return the model; ``origin`` is added to the message.

    Raises: ValueError: a model of other properties than energies.
    """
    if not isinstance(model, Potential):
        raise ValueError(
            f"potential must give energies and forces, got a {type(model).__name__} for other properties{origin}; "
            "train one on energies (data.qm9 U0, or frames with energy and forces)"
        )
    return model


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Everything in a model file except the weights, which are checked as in :func:`load_model`; no network is built.

    Raises: FileNotFoundError, ValueError: as :func:`load_model`.
    """
    return _read(find_model(path))[0]


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header without its entry "sha256", and over name, dtype, shape and bytes of all tensors."""
    content = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{json.dumps(name)} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, checked as far as possible without building the network."""
    if not path.is_file():
        inside = path / "model.nbody"
        hint = f"; the model of this run is {inside}" if inside.is_file() else ""
        raise FileNotFoundError(f"no model file at {path}{hint}")
    if is_checkpoint(path):
        raise ValueError(
            f"{path} is a checkpoint of a training (or another file of torch.save), no model file; the model of a run "
            "is model.nbody in its folder, which nbody train writes at its end (go on with --output.resume true)"
        )
    try:
        return _read_checked(path)
    except RecursionError as error:
        raise ValueError(
            f"{path} is no readable model file, its header is nested too deeply; get a fresh copy"
        ) from error


def _read_checked(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError(f"{path} is a safetensors file, but was not written by nbody_pyg")
            header = _parsed(text, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except (PermissionError, RecursionError):
        raise
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} is no readable model file, it is truncated or damaged ({_said(error)}); get a fresh copy"
        ) from error
    old = header["format_version"] < SEALED
    if header.get("sha256") != (_digest_of_tensors(tensors) if old else checksum(header, tensors)):
        what = "its weights do" if old else "its content does"
        raise ValueError(f"{path} is damaged: {what} not match the checksum; get a fresh copy")
    try:
        _check_header(header)
        _check_finite(tensors, header["model"]["config"] is None)
        if header["model"]["class"] == "NBodyNet" and header["model"]["config"] is not None:
            prefix = "model."
            shapes = {n.removeprefix(prefix): tuple(t.shape) for n, t in tensors.items() if n.startswith(prefix)}
            config = present_names(header["model"]["config"], FORMER_ARGUMENTS, stacklevel=0)
            check_sizes(config, present_weights(shapes))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} holds no model that can be used: {_said(error)}; get a fresh copy") from error
    return header, tensors


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """The header, of a format that this version reads."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("the header is no dictionary")
    except ValueError as error:
        raise ValueError(
            f"{path} is no readable model file, it is truncated or damaged ({_said(error)}); get a fresh copy"
        ) from error
    version = header.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"{path} must have a format version from 1 to {FORMAT_VERSION}, got {short(version)}; it is "
            "damaged, or was not written by nbody_pyg: get a fresh copy"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {short(version)}, this nbody_pyg {_version('nbody_pyg')} "
            f"reads up to {FORMAT_VERSION}; upgrade nbody_pyg"
        )
    # Before format 4, errors of a training could be NaN
    checked = header if version >= 4 else {k: v for k, v in header.items() if k != "metadata"}
    if not _all_of(checked, lambda value: not isinstance(value, float) or math.isfinite(value)):
        raise ValueError(f"{path} holds NaN or infinite numbers in its settings; get a fresh copy")
    return header


def _check_header(header: Mapping[str, Any]) -> None:
    for name, kind in _ENTRIES.items():
        if name not in header:
            raise ValueError(f"the entry {name} is missing")
        if not isinstance(header[name], kind) or isinstance(header[name], bool):
            raise ValueError(f"the entry {name} is {short(header[name])}, which is of a wrong type")
    described = header["model"]
    if not {"class", "config"} <= set(described) or not isinstance(described["class"], str):
        raise ValueError(f"the entry model must hold class and config, got {short(described)}")
    if not isinstance(described["config"], (dict, type(None))):
        raise ValueError(f"the config of the network is {short(described['config'])}, which is of a wrong type")
    if header["dtype"] not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {short(header['dtype'])}")
    elements = [*(header["species"] or []), *map(_element, header["e0"] or {})]
    if not all(type(number) is int and 0 <= number < 119 for number in elements):
        raise ValueError(f"elements must be atomic numbers between 0 and 118, got {short(elements)}")
    if not all(type(value) in _NUMBER for value in (header["e0"] or {}).values()):
        raise ValueError(f"e0 must hold numbers, got {short(header['e0'])}")
    if header["units"] != _UNITS:
        raise ValueError(f"units must be {_UNITS}, got {short(header['units'])}")
    if not all(isinstance(value, str) for value in header["versions"].values()):
        raise ValueError("versions must be texts")
    _check_assumed(described)
    shown = {name: value for name, value in header.items() if name != "metadata"}
    if not _all_of(shown, lambda value: not isinstance(value, str) or value.isprintable()):
        raise ValueError("its settings hold characters that cannot be printed")


def _check_assumed(described: Mapping[str, Any]) -> None:
    """Reject a stored charge or spin of all training frames that is impossible, or that is an input of the network."""
    assumed, taken = described.get("assumed", {}), (described["config"] or {}).get("inputs") or ()
    known = isinstance(assumed, dict) and set(assumed) <= set(DEFAULT_STATE)
    if not known or not all(type(value) in _NUMBER and abs(value) < 1e6 for value in assumed.values()):
        raise ValueError(f"assumed must hold a charge or spin, got {short(assumed)}")
    if (spin := assumed.get("spin", 1)) < 1 or spin != int(spin):
        raise ValueError(f"the assumed spin must be a multiplicity 2S + 1, got {spin}")
    if twice := sorted(set(assumed).intersection(taken)):
        raise ValueError(f"{twice[0]} cannot be both an input of the network and assumed")


def _element(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 4 else key


def _all_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether something holds for all keys and values, at every depth."""
    if isinstance(value, dict):
        return all(holds(key) and _all_of(inner, holds) for key, inner in value.items())
    if isinstance(value, list):
        return all(_all_of(inner, holds) for inner in value)
    return holds(value)


def _check_finite(tensors: Mapping[str, Tensor], foreign: bool) -> None:
    """Reject weights that are not finite; foreign networks may have an infinite constant, such as a mask."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((~tensor.isnan() if foreign else tensor.isfinite()).all()):
            raise ValueError(f"weights must be finite, but {printable(name)} holds NaN or infinite numbers")


def _check_weights(potential: nn.Module, tensors: Mapping[str, Tensor], foreign: bool) -> None:
    """Reject tensors whose names, shapes or dtypes differ from those of the network."""
    expected = potential.state_dict()
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"weights do not fit the network: missing {missing[:3]}")
    if unexpected := sorted(set(tensors) - set(expected)):
        raise ValueError(f"weights do not fit the network: unexpected {unexpected[:3]}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        cast = foreign and tensor.is_floating_point() and wanted.is_floating_point()
        if tensor.shape != wanted.shape or (tensor.dtype != wanted.dtype and not cast):
            raise ValueError(
                f"weights do not fit the network: {name} has shape {list(tensor.shape)} and {tensor.dtype}, not "
                f"{list(wanted.shape)} and {wanted.dtype}"
            )


def _check_same(given: Any, built: Any, where: str = "") -> None:
    """Reject settings that differ from those of the model built from them: unknown keys, changed values."""
    if isinstance(given, dict) and isinstance(built, dict):
        for key, value in given.items():
            if key not in built:
                raise ValueError(f"unknown key {where}{key}")
            _check_same(value, built[key], f"{where}{key}.")
    elif given != built or isinstance(given, bool) != isinstance(built, bool):
        raise ValueError(f"{where[:-1]} is {short(given)}, but the network has {short(built)}")


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(error: Exception) -> str:
    """Text of an error for a message: a key by name, control characters escaped."""
    text = f"missing entry {error}" if isinstance(error, KeyError) else str(error)
    return printable(text.strip()[:500])


def _summary(potential: Potential | PropertyModel) -> dict[str, Any]:
    species = None if potential.species is None else list(potential.species)
    return {"species": species, "num_parameters": sum(p.numel() for p in potential.parameters())}


def _version(package: str) -> str:
    if package == "nbody_pyg":
        from nbody_pyg import __version__

        return __version__
    return importlib.metadata.version(package)


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of formats 1 to 3."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
