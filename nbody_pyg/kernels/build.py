"""Compile generated C once, keep it, load it through ctypes: a plain C interface, no headers of torch or Python."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = (
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-w",
)


#: Short sources hold loops, which only full effort unrolls into registers; long ones are straight lines already,
#: and the longest would take minutes.
_SHORT, _LONG = 30_000, 250_000


def _flags(source: str) -> tuple[str, ...]:
    effort = "-O3" if len(source) < _SHORT else "-O2" if len(source) < _LONG else "-O1"
    return (effort, *_FLAGS)


@functools.lru_cache(maxsize=1)
def compiler() -> str | None:
    """Path of the C compiler: the environment's CC, or the first of cc, gcc, clang; None where there is none."""
    candidates = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled products are kept: NBODY_CACHE, else the user's cache folder."""
    base = os.environ.get("NBODY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nbody_pyg"
    return Path(base) / "kernels"


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """What -march=native depends on, so that a cache shared between machines is never wrong."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return "unknown"


@functools.cache
def load(source: str) -> ctypes.CDLL:
    """Shared library of a C source, compiled at the first use.

    A cached file that cannot be loaded (cut off, from another system) is built anew once.

    Raises: RuntimeError: no compiler, the compiler failed (its message is included), or the cache folder
        cannot be written.
    """
    cc = compiler()
    if cc is None:
        raise RuntimeError("no C compiler found; install gcc or clang, set CC, or use set_backend('torch')")
    key = hashlib.sha256("\0".join([source, cc, _machine(), *_flags(source)]).encode()).hexdigest()[:24]
    library = cache_folder() / f"{key}.so"
    if library.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(library))
    try:
        _compile(cc, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RuntimeError(
            f"the compiled products could not be kept in {cache_folder()}: {error}; set NBODY_CACHE to a folder that "
            "can be written and holds programs, or use set_backend('torch')"
        ) from error


def _compile(cc: str, source: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        code, built = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        code.write_text(source)
        command = [cc, *_flags(source), str(code), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"the C compiler failed: {' '.join(command)}\n{done.stderr[-2000:]}\n"
                "Set CC to a working C compiler, or use set_backend('torch')."
            )
        os.replace(built, library)  # several processes may build at once: the last one wins, all are equal
