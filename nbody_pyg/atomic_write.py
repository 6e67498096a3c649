"""Files that are written whole or not at all, also when the disk is full or the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def atomic_write(path: str | Path, temporary: str | Path | None = None) -> Iterator[Path]:
    """Give the name of a temporary file beside ``path`` to write to; then make it ``path``.

    The content is on the disk before it takes the name, and the name before this returns, so that at every moment
    ``path`` is either the old file or the new one. When writing fails, the temporary file goes and the old one stays.
    The file has the permissions of the one that it replaces, or those that the umask gives, whatever wrote it. A link
    is followed; what is no regular file (``/dev/stdout``) is written to directly.

    Args:
        path: where the file shall be.
        temporary: name of the temporary file; by default a hidden one with the same suffix, new for each call.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    if temporary is None:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    temporary = Path(temporary)
    try:
        mode = _create(temporary)
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
        yield temporary
        _flush(temporary)
        with contextlib.suppress(OSError):  # not every file system has permissions
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk has no name, and nobody knows that of the temporary file
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        _flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; see :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write a value as indented JSON, whole or not at all; see :func:`atomic_write`.

    Args:
        options: further arguments of ``json.dumps``.
    """
    write_text(path, json.dumps(value, indent=1, **options) + "\n")


def save_figure(figure: Figure, path: Path, **options: Any) -> Path:
    """Draw a matplotlib figure into a file, whole or not at all; returns its name."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], **options)
    return path


def _create(path: Path) -> int:
    """Make an empty file as ``open`` would, and return its permissions: the umask cannot be asked for safely."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
