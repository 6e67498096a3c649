"""Atomic writing of files, also when the disk is full or the process is killed."""

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
    """Yield the name of a temporary file next to ``path`` to write to; then rename it to ``path``.

    Content and name are flushed to disk in this order, so at every moment ``path`` is either the old or the new file.
    If writing fails, the temporary file is removed and the old file is kept. The file gets the permissions of the one
    that it replaces, or those of the umask. Links are followed; a path that is not a regular file (``/dev/stdout``) is
    written to directly.

    Args:
        path: the file to write.
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
        with contextlib.suppress(OSError):  # some file systems have no permissions
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)  # name the file of the user, not the temporary one
        raise
    with contextlib.suppress(OSError):  # some systems cannot open a folder
        _flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 atomically; see :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write a value as indented JSON atomically; see :func:`atomic_write`.

    Args:
        options: further arguments of ``json.dumps``.
    """
    write_text(path, json.dumps(value, indent=1, **options) + "\n")


def save_figure(figure: Figure, path: Path, **options: Any) -> Path:
    """Save a matplotlib figure atomically; returns the path."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], **options)
    return path


def _create(path: Path) -> int:
    """Create an empty file and return its permissions, because the umask cannot be read safely."""
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
