"""One folder, one run: a lock on the folder, and the files of earlier runs moved out of the way."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # no module of this name there


class RunFolder:
    """The folder of a run, locked while the object is entered.

    The system releases the lock when its process ends for any reason, so a killed run leaves no lock. Without lock
    support (Windows, some network file systems) the folder is used without one.

    Args:
        path: the folder; it is created on entering.
        active: whether this process writes; the further processes of a distributed run do not, and take no lock.
    Raises: ValueError: another run uses the folder.
    """

    def __init__(self, path: str | Path, active: bool = True):
        self.path, self.active = Path(path), active
        self._lock: IO[str] | None = None
        self._made = False

    def __enter__(self) -> RunFolder:
        if self.active:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take() if fcntl is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._lock.name)  # before the lock is released, so that no other process uses it
            self._lock.close()
            self._lock = None
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)  # only an empty folder; one with files stays

    def _take(self) -> IO[str] | None:
        path = self.path / ".lock"
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "just started"
                file.close()
                raise ValueError(
                    f"another run ({holder}) trains in {self.path} now; wait for it, stop it, or choose another folder"
                ) from None
            except OSError:  # a file system without locks
                file.close()
                return None
            # The previous owner may have removed the file between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
            file.close()

    def move_away(self, names: Iterable[str]) -> Path | None:
        """Move those of the files that exist into the next free folder ``before-N``, which is returned."""
        found = [name for name in names if self.active and (self.path / name).exists()]
        if not found:
            return None
        number = 1
        while (target := self.path / f"before-{number}").exists():
            number += 1
        target.mkdir()
        for name in found:
            os.replace(self.path / name, target / name)
        return target
