"""Files that are written whole or not at all, also when the disk is full or the process is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | Path, temporary: str | Path | None = None) -> Iterator[Path]:
    """Give the name of a temporary file beside ``path`` to write to; then make it ``path``.

    The content is on the disk before it takes the name, and the name before this returns, so that at every moment
    ``path`` is either the old file or the new one. When writing fails, the temporary file goes and the old one stays.

    Args:
        path: where the file shall be.
        temporary: name of the temporary file; by default a hidden one with the number of the process.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp") if temporary is None else Path(temporary)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
