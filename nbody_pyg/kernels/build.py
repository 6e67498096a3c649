"""Compile generated C once, cache it, load it with ctypes: a plain C interface without headers of torch or Python.

Loading a library runs code, so only files of the user are loaded. Libraries are cached in a folder that no other user
can write to, and their names contain the SHA-256 of the file. A file that does not match its name (cut, damaged,
foreign) is never loaded but built again. Without such a folder, each process builds libraries in a private temporary
folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nbody_pyg.required import required

R = TypeVar("R")
#: Work that yields while a compiler runs, with its result.
Steps = Generator[None, None, R]

_FLAGS = (
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-w",
)

#: Short sources have loops, which only the highest optimisation level unrolls into registers. Long ones are already
#: unrolled, and the longest would take minutes.
_SHORT, _LONG = 30_000, 250_000
#: Timeouts of the compiler, seconds: for a function of one line, and for any source.
_PROBE_TIMEOUT, _TIMEOUT = 60.0, 900.0
#: Seconds between two looks at the running compilers.
_POLL = 0.005
_PROBE = "int nbody_probe(void) { return 1; }"
_OPENMP = "-fopenmp"
_OPENMP_PROBE = """int nbody_sum(int n) {
  int total = 0;
  #pragma omp parallel for reduction(+ : total) num_threads(n)
  for (int i = 0; i < n; i++) total += i;
  return total; }"""

_log = logging.getLogger("nbody_pyg")
_libraries: dict[tuple[str, str | None], ctypes.CDLL | str] = {}  # by source and effort: the library, or the error
_said: set[str] = set()
_lock = threading.RLock()  # held while something is compiled or loaded


def _fresh_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a child forked while another thread compiles must not wait for it
    os.register_at_fork(after_in_child=_fresh_lock)


def one_at_a_time(function: Callable[..., R]) -> Callable[..., R]:
    """Decorator: while one thread is in it, or in another of these functions, others wait."""

    @functools.wraps(function)
    def alone(*arguments: Any) -> R:
        with _lock:
            return function(*arguments)

    return alone


def _flags(source: str, effort: str | None) -> tuple[str, ...]:
    by_length = "-O3" if len(source) < _SHORT else "-O2" if len(source) < _LONG else "-O1"
    threads = source == _OPENMP_PROBE or (source != _PROBE and no_threads() is None)
    return (effort or by_length, *_FLAGS, *([_OPENMP] if threads else []), *_given_flags())


def _given_flags() -> list[str]:
    """Those of the environment, after ours, so that they win."""
    given = os.environ.get("NBODY_CFLAGS", "")
    try:
        return shlex.split(given)
    except ValueError as error:  # an unclosed quotation mark
        raise RuntimeError(f"NBODY_CFLAGS={given} cannot be read ({error}); correct it") from error


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, ...] | None:
    """The C compiler and its arguments: the environment's CC, or the first of cc, gcc, clang; None if there is none."""
    candidates = [os.environ["CC"]] if os.environ.get("CC", "").strip() else ["cc", "gcc", "clang"]
    for candidate in candidates:
        with contextlib.suppress(ValueError):  # an unclosed quotation mark
            program, *arguments = shlex.split(candidate)
            if found := shutil.which(program):
                return (os.path.abspath(found), *arguments)
    return None


def cache_folder() -> Path:
    """Cache folder of compiled products: NBODY_CACHE, else in the user's cache folder.

    Raises: RuntimeError: neither is set, and the user has no home folder.
    """
    if given := os.environ.get("NBODY_CACHE"):
        base = Path(given).expanduser()
    elif given := os.environ.get("XDG_CACHE_HOME"):
        base = Path(given) / "nbody_pyg"
    else:
        base = Path.home() / ".cache" / "nbody_pyg"
    return base.absolute() / "kernels"


def trusted(path: Path) -> str | None:
    """Reason why code must not be loaded from a file or folder, because another user could have written it; or None.

    It and every folder above it must belong to the user or to root and must not be writable for others, unless others
    cannot rename or remove its files, as in /tmp. What does not exist yet will belong to the user.
    """
    if not hasattr(os, "getuid"):  # no Unix permissions
        return None
    path = Path(os.path.realpath(path))
    for place in (path, *path.parents):
        if place == path and not place.exists():
            continue
        found = place.stat()
        if found.st_uid not in (0, os.getuid()) and (place == path or found.st_uid != _unknown_owner()):
            return f"{place} belongs to another user (number {found.st_uid})"
        shared = found.st_mode & (stat.S_IWOTH | (0 if _own_group(found.st_gid) else stat.S_IWGRP))
        if shared and (place == path or not found.st_mode & stat.S_ISVTX):
            return f"{place} can be written by others (mode {stat.S_IMODE(found.st_mode):o}; chmod go-w {place})"
    return None


@functools.cache
def _unknown_owner() -> int | None:
    """The owner that a container shows for files of unknown owners, such as root of the host."""
    try:
        everybody = int(Path("/proc/self/uid_map").read_text().split()[2]) >= 2**32 - 1
        return None if everybody else int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _own_group(number: int) -> bool:
    """Whether a group is the private group of the user: it has the user's name and no other member."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def own_cache() -> Path:
    """The cache folder, created if missing, if it is safe.

    Raises: RuntimeError, OSError: it is not; the message gives the reason.
    """
    folder = Path(os.path.realpath(cache_folder()))
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    if missing and (problem := trusted(missing[-1])):
        raise RuntimeError(problem)
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)
    if problem := trusted(folder):
        raise RuntimeError(problem)
    return folder


def warn_once(about: str, text: str) -> None:
    """A RuntimeWarning, once per process for each subject."""
    if about not in _said:
        _said.add(about)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """Everything that -march=native depends on, so that machines can share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return "unknown"


def load(source: str, effort: str | None = None) -> ctypes.CDLL:
    """Shared library of a C source, compiled at the first use; safe for concurrent threads and processes.

    Args:
        effort: optimisation level such as "-O3"; None: one that depends on the length of the source.
    Raises: RuntimeError: no compiler, the compiler failed (its message is included), or there is no folder from which
        libraries can be loaded. It is not tried again.
    """
    found = _libraries.get((source, effort))
    if found is None:
        load_all([source], effort)
        found = _libraries[source, effort]
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@one_at_a_time
def load_all(sources: Iterable[str], effort: str | None = None) -> None:
    """Load several sources; as many are compiled at once as this process may use cores.

    It does not raise if one fails: :func:`load` of that source does, without another try.
    """
    waiting = sorted((source for source in dict.fromkeys(sources) if (source, effort) not in _libraries), key=len)
    running: dict[str, Steps[ctypes.CDLL]] = {}
    with contextlib.ExitStack() as stack:  # an interrupt ends all compilers
        while waiting or running:
            while waiting and len(running) < _num_cores():  # the longest first
                source = waiting.pop()
                running[source] = stack.enter_context(contextlib.closing(_load(source, effort)))
            for source, steps in list(running.items()):
                try:
                    next(steps)
                    continue
                except StopIteration as end:
                    _libraries[source, effort] = end.value
                except (RuntimeError, OSError) as error:
                    _libraries[source, effort] = str(error)
                del running[source]
            if running:
                time.sleep(_POLL)


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def broken() -> str | None:
    """Reason why nothing can be compiled and loaded here, tested with a function of one line, or None."""
    try:
        load(_PROBE)
    except RuntimeError as error:
        return str(error)
    return None


def no_threads() -> str | None:
    """Reason why compiled functions run in one thread here, tested with a function of one loop, or None.

    Some compilers do not have OpenMP, or its library.
    """
    try:
        load(_OPENMP_PROBE)
    except RuntimeError as error:
        return str(error)
    return None


def forget() -> None:
    """Forget compiler, folders and libraries, as in a new process; for tests."""
    with _lock:
        compiler.cache_clear()
        _libraries.clear()
        _said.clear()


def _load(source: str, effort: str | None) -> Steps[ctypes.CDLL]:
    command = compiler()
    if command is None:
        given = f"CC={os.environ['CC']} is no program" if os.environ.get("CC") else "no C compiler was found"
        raise RuntimeError(f"{given}; install gcc or clang, set CC, or use set_backend('torch')")
    key = hashlib.sha256("\0".join([source, *command, _machine(), *_flags(source, effort)]).encode()).hexdigest()[:24]
    folder, problem = None, None
    try:
        folder = own_cache()
    except (RuntimeError, OSError) as error:
        problem = str(error)
    code = None if folder is None else _kept(folder, key)
    if code is None:
        if source not in (_PROBE, _OPENMP_PROBE):
            load(_PROBE)  # the next lines find out whether it works
            _announce(folder)
        timeout = _PROBE_TIMEOUT if source in (_PROBE, _OPENMP_PROBE) else _TIMEOUT
        code = yield from _compile([*command, *_flags(source, effort)], source, timeout)
        if folder is not None:
            try:
                _keep(folder, key, code)
            except OSError as error:
                problem = str(error)
    if problem is None:
        try:
            return ctypes.CDLL(str(_path(required(folder), key, code)))
        except OSError as error:  # for example a file system mounted noexec
            problem = str(error)
    library = _load_once(code, problem)
    warn_once(
        "cache",
        f"compiled products cannot be kept ({problem}), so that every process compiles them anew; set NBODY_CACHE to a "
        "folder that you alone can write and from which programs may be run",
    )
    return library


def _announce(folder: Path | None) -> None:
    if "compiling" not in _said:
        _said.add("compiling")
        kept = folder is not None and os.access(folder, os.W_OK)
        where = f"once for this kind of network; kept in {folder}" if kept else "for this process alone"
        _log.warning("Compiling products of the network (about ten seconds), %s", where)


def _path(folder: Path, key: str, code: bytes) -> Path:
    return folder / f"{key}-{hashlib.sha256(code).hexdigest()}.so"


def _kept(folder: Path, key: str) -> bytes | None:
    """Content of the cached library with this key, if it matches its name; else None."""
    for path in folder.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError):
            # Not a pipe, whose reading would not end
            if path.is_file() and trusted(path) is None and path == _path(folder, key, code := path.read_bytes()):
                return code
            path.unlink()
    return None


def _keep(folder: Path, key: str, code: bytes) -> None:
    """Write a library atomically: several processes may do so at once."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o700)
        os.replace(name, _path(folder, key, code))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A private temporary folder; in the cache folder if there is no folder for temporary files."""
    problems = []
    for parent in (tempfile.gettempdir, own_cache):
        try:
            found = tempfile.TemporaryDirectory(prefix=".build-", dir=parent(), ignore_cleanup_errors=True)
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
            continue
        with found as name:
            if problem := trusted(Path(name)):
                problems.append(problem)
                continue
            yield Path(name)
            return
    raise RuntimeError(
        f"there is no folder to compile in: {'; '.join(problems)}; set TMPDIR to a folder that you alone can write, or "
        "use set_backend('torch')"
    )


def _load_once(code: bytes, problem: str) -> ctypes.CDLL:
    """Load a library that is not cached: its file can be removed after loading."""
    try:
        with _private_folder() as folder:
            path = folder / "kernel.so"
            path.write_bytes(code)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"compiled products could not be loaded, neither from the cache folder ({problem}) nor from a temporary one "
            f"({error}); set NBODY_CACHE or TMPDIR to a folder that you alone can write and from which programs may be "
            "run, or use set_backend('torch')"
        ) from error


def _compile(command: Sequence[str], source: str, timeout: float) -> Steps[bytes]:
    with _private_folder() as folder:
        code, built, log = folder / "kernel.c", folder / "kernel.so", folder / "errors.txt"
        code.write_text(source)
        words = [*command, str(code), "-o", str(built), "-lm"]
        cure = "set CC to a working C compiler, or use set_backend('torch')"
        try:
            # Into a file, because children of a killed compiler would keep a pipe open.
            with log.open("wb") as errors:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True,
                    env=os.environ | {"TMPDIR": str(folder)},
                )  # fmt: skip
                end = time.monotonic() + timeout
                try:
                    while (status := process.poll()) is None:
                        if time.monotonic() > end:
                            raise subprocess.TimeoutExpired(words, timeout)
                        yield
                except BaseException:  # also GeneratorExit, of a caller that was interrupted
                    with contextlib.suppress(OSError):
                        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
                    process.wait()
                    raise
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the C compiler did not end in {timeout:g} s: {shlex.join(words)}; {cure}") from error
        except OSError as error:
            raise RuntimeError(f"the C compiler could not be started: {error}; {cure}") from error
        if status != 0 or not built.is_file():
            said = log.read_text(errors="replace")[-2000:].strip()
            raise RuntimeError(
                f"the C compiler failed (exit status {status}): {shlex.join(words)}\n{said}\n{cure[0].upper()}{cure[1:]}."
            )
        return built.read_bytes()
