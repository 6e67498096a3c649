"""Checkpoint files with a checksum, which is verified before anything is read from them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbody_pyg.atomic_write import atomic_write
from nbody_pyg.io.upgrades import present_config, present_weights

# A checkpoint is a zip file, which ends with an empty comment. The checksum of everything before it is stored as the
# comment, so torch.load can still read the file.
_WORD = b"nbody_pyg sha256 "
_SEAL = len(_WORD) + 64
_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_KEYS = frozenset({"state_dict", "global_step", "hyper_parameters", "callbacks", "run", "cpu_seconds"})


def seal(path: str | Path) -> None:
    """Add a checksum over every byte to a file that torch.save has written."""
    with Path(path).open("r+b") as file:
        file.seek(-22, io.SEEK_END)
        end = file.read()
        if not end.startswith(_ZIP_END) or end[-2:] != b"\0\0":
            raise AssertionError("torch.save ended its file in another way than a zip file without a comment")
        file.seek(-2, io.SEEK_END)
        file.write(_SEAL.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, io.SEEK_END)
        file.write(_WORD + digest.encode())


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint with its checksum atomically."""
    with atomic_write(path, path.with_name(f".{path.name}.tmp")) as temporary:
        torch.save(content, temporary)
        seal(temporary)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file begins as a checkpoint does (or any other file of torch.save)."""
    with Path(path).open("rb") as file:
        return file.read(4) == _ZIP


def _is_whole(content: bytes) -> bool:
    return content[-_SEAL:] == _WORD + hashlib.sha256(content[:-_SEAL]).hexdigest().encode()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: tensors and plain values, no code.

    Raises: FileNotFoundError: no such file; ValueError: a model file, a truncated or changed file, or one of a version
    without checksums.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = path.read_bytes()
    if not _is_whole(content):
        if content[8:10] == b'{"':
            raise ValueError(f"{path} is a model file; training goes on from a checkpoint, as last.ckpt of its run")
        what = (
            "is empty" if not content else "is cut, damaged, or no checkpoint of this version (its checksum is wrong)"
        )
        others = [p for p in (path.with_name("best.ckpt"), path.with_name("last.ckpt")) if p != path and p.is_file()]
        cure = f"copy {others[0].name} over it to go on from there, or " if others else ""
        raise ValueError(f"{path} {what}; {cure}start anew without output.resume")
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise many kinds of errors
        raise ValueError(f"{path} holds more than tensors and plain values: no checkpoint of this library") from error
    if missing := _KEYS.difference(found if isinstance(found, dict) else ()):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: no checkpoint of this library")
    # Checkpoints of earlier versions, written with Lightning, have one entry for our callbacks.
    checkpoint: dict[str, Any] = found | {"callbacks": found["callbacks"].get("CallbackGroup", found["callbacks"])}
    for key in ("state_dict", "training_state"):
        if key in checkpoint:
            checkpoint[key] = present_weights(checkpoint[key])
    if checkpoint.get("config") is not None:
        checkpoint["config"] = present_config(checkpoint["config"])
    return checkpoint


def random_state() -> dict[str, Any]:
    """The state of every global generator, as tensors and plain values."""
    state: Any = np.random.get_state()  # noqa: NPY002 (the global one is meant)
    kind, keys, position, has_gauss, gauss = state
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the result of :func:`random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def changes(stored: Mapping[str, Any], given: Mapping[str, Any], free: Collection[str] = (), prefix: str = "") -> str:
    """Differences of two nested dictionaries, as ``a.b is 1 there, 2 here; ...``; empty if there are none.

    Args:
        stored, given: the values of the checkpoint and the present ones; a key that is missing counts as None.
        free: names of keys (dotted), or of their sections, that may differ.
    """
    words = []
    for key in [*stored, *(k for k in given if k not in stored)]:
        name, old, new = f"{prefix}{key}", stored.get(key), given.get(key)
        if name in free:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            words.append(changes(old, new, free, f"{name}."))
        elif not _equal(old, new):
            words.append(f"{name} is {_plain(old)} there, {_plain(new)} here")
    return "; ".join(word for word in words if word)


def with_defaults(stored: Mapping[str, Any] | None, kind: type) -> dict[str, Any]:
    """Stored fields of a dataclass, with the defaults of fields that an older version did not have."""
    fields = dataclasses.fields(kind)
    known = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return known | dict(stored or {})


def _equal(old: Any, new: Any) -> bool:
    # Least squares give the same numbers on other machines only up to rounding.
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    return math.isclose(old, new, rel_tol=1e-9) if numbers else _plain(old) == _plain(new)


def _plain(value: Any) -> str:
    """A value as in a file, tuples as lists."""
    return json.dumps(value, sort_keys=True, default=str)
