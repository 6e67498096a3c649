"""Where a command may write: over results only with ``--overwrite``, and never over its inputs."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase

from nbody_pyg.cli.reserved import first_free, reserve_file, reserve_folder
from nbody_pyg.required import required


def output_file(
    given: str | None, default: str | None, overwrite: bool, inputs: Iterable[str | None], option: str = "--out"
) -> Path:
    """The file to write to. A new one is created at once, so that no other command takes its name.

    Args:
        given: path from the command line. If None, ``default``; a number is added if that exists.
        overwrite: an existing file may be replaced.
        inputs: paths that the command reads; those that are not files are ignored.
        option: command line option of the file, for messages.
    Raises: ValueError: the file exists, is read by the same command, or is a folder. PermissionError: it cannot be
        written.
    """
    if given is None and not overwrite:
        return first_free(Path(required(default)), reserve_file)
    path = Path(given if given is not None else required(default))
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}")
    if any(_same(path, name) for name in inputs):
        raise ValueError(f"{option} must not be an input of this command, got {path}; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not overwrite:
        try:
            return reserve_file(path)
        except FileExistsError:
            raise ValueError(
                f"{path} exists; replace it with --overwrite, or choose another file with {option}"
            ) from None
    if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))  # now rather than after the work
    return path


def output_plot(given: str | None, overwrite: bool, inputs: Iterable[str | None]) -> Path | None:
    """The file of ``--plot``, PNG if it has no suffix; None if it is not given.

    Raises: ValueError: see :func:`output_file`; an unsupported format.
    """
    if given is None:
        return None
    path = Path(given) if Path(given).suffix or Path(given).is_dir() else Path(given).with_suffix(".png")
    if path.suffix and path.suffix[1:] not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"--plot must end in one of {', '.join(sorted(known))}, got {given}")
    return output_file(str(path), None, overwrite, inputs, "--plot")


def output_folder(
    given: str | None, default: str, overwrite: bool, inputs: Iterable[str | None], names: Sequence[str],
    cure: str = "replace it with --overwrite, or choose another folder with --out",
) -> Path:  # fmt: skip
    """The folder to write into; other files in it are not touched. A default one is created at once, so that no other
    command takes its name.

    Args:
        given: path from the command line. If None, ``default``; a number is added if that exists.
        overwrite: results may be replaced.
        inputs: paths that the command reads.
        names: patterns of the files that will be written.
        cure: advice in the message if there are results.
    Raises: ValueError: the folder holds results or inputs of the command, or is a file.
    """
    if given is None and not overwrite:
        return first_free(Path(default), reserve_folder)
    path = Path(given) if given is not None else Path(default)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out must be a folder, got the file {path}")
    for name in inputs:
        file = Path(name or "")
        inside = file.is_file() and file.parent.resolve() == path.resolve()
        if inside and any(fnmatch.fnmatch(file.name, pattern) for pattern in names):
            raise ValueError(f"--out must not hold {file}, an input that would be replaced; choose another folder")
    if not overwrite and (held := _held(path, names)) is not None:
        raise ValueError(f"{held} exists; {cure}")
    return path


def latest(default: str, name: str) -> Path:
    """Of the default folder and its numbered siblings, that whose file of this name is newest; else the default."""
    numbered = re.compile(rf"{re.escape(default)}(-[1-9]\d*)?")
    found = [folder / name for folder in Path().glob(f"{default}*") if numbered.fullmatch(folder.name)]
    found = [file for file in found if file.is_file()]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else Path(default)


def _held(folder: Path, names: Sequence[str]) -> Path | None:
    return next((path for name in names for path in sorted(folder.glob(name))), None)


def _same(path: Path, name: str | None) -> bool:
    return name is not None and path.exists() and Path(name).exists() and path.samefile(name)
