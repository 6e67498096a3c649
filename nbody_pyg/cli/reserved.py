"""Names taken for results before they are there, so that another command at the same time takes other ones."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_NAMES: list[Path] = []


def reserve_file(path: Path) -> Path:
    """Create an empty file. Raises: FileExistsError: the name is taken."""
    os.close(os.open(os.path.realpath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    _NAMES.append(path)
    return path


def reserve_folder(path: Path) -> Path:
    """Create a folder. Raises: FileExistsError: the name is taken."""
    path.mkdir()
    _NAMES.append(path)
    return path


def first_free(path: Path, reserve: Callable[[Path], Path]) -> Path:
    """Reserve a name, with the first number that is free if it is taken: md, md-1, md-2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        name = path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        with contextlib.suppress(FileExistsError):
            return reserve(name)
    raise AssertionError("the numbers do not end")


@contextlib.contextmanager
def unused_removed() -> Iterator[None]:
    """Remove at the end what was reserved in this context and is still empty."""
    first = len(_NAMES)
    try:
        yield
    finally:
        for path in _NAMES[first:]:
            with contextlib.suppress(OSError):
                if path.is_dir():
                    path.rmdir()  # only an empty folder; one with files stays
                elif path.stat().st_size == 0:
                    path.unlink()
        del _NAMES[first:]
