"""Runs points: each in a separate process, none twice."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from nbody_pyg.atomic_write import write_json
from nbody_pyg.compare.errors import listed
from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point, WrongData, data_files, failed_record, plain, run_point
from nbody_pyg.compare.report import read_record
from nbody_pyg.interrupt import signal_name
from nbody_pyg.required import required

# Seconds for a process to write its checkpoint after SIGTERM.
_GRACE = 30.0
# A peer's own environment may have an older Python, which knows no option against imports from the folder it is in.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import runpy; runpy.run_module({!r}, run_name='__main__')"
)


class Stopped(Exception):
    """A signal ended the comparison; ``status`` is the exit status for it."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"stopped by {signal_name(status - 128)}; the same command goes on from there. Finished runs are kept, "
            "and --report shows them"
        )
        self.status = status


class Runner:
    """Point -> record, from the folder where it is already there.

    A run stopped by a signal resumes from its checkpoint; one that was killed starts again. A run that ends
    with an error, is killed, or takes longer than ``timeout`` has the status "failed" with the reason in its record;
    the next comparison tries it again.

    Args:
        out: folder of the comparison; results lie in ``out/points``.
        python: interpreter of the environment of a model, where it is not this one. Our package is found
            there through PYTHONPATH.
        isolate: a new process for every run. Peers change global settings, and a long-lived process slows down.
        note: called with one line at a time.
        timeout: seconds by the clock that a process may take; by default 600 and 20 times the budget, or a day where
            the run is limited by steps. Not without ``isolate``.
    """

    def __init__(
        self, out: str | Path, python: Mapping[str, str] | None = None, isolate: bool = True,
        note: Callable[[str], None] = print, timeout: float | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.python, self.isolate, self.note = Path(out) / "points", dict(python or {}), isolate, note
        self.timeout = timeout
        self._signalled = False

    def __call__(self, point: Point) -> dict[str, Any]:
        """The record of a point.

        Raises: MissingPeer: the model's package is not installed; WrongData: the frames cannot be read; Stopped: by a
            signal; ValueError: the interpreter of a model cannot be run.
        """
        folder = self.folder / point.folder
        if (found := self._finished(point, folder / "record.json")) is not None:
            self.note(f"{point}: there already")
            return found
        folder.mkdir(parents=True, exist_ok=True)
        self.note(f"{point}{': goes on' if (folder / 'last.ckpt').is_file() else ''}")
        isolated = self.isolate or point.model in self.python
        record = self._in_process(point, folder) if isolated else self._here(point, folder)
        if record.get("died"):
            write_json(folder / "failed.json", record, default=float)
        else:
            (folder / "failed.json").unlink(missing_ok=True)
            for name in ("last.ckpt", "best.ckpt"):  # as large as the model, and of no use any more
                (folder / name).unlink(missing_ok=True)
        self.note(f"  {summary(record)}")
        return record

    def _finished(self, point: Point, path: Path) -> dict[str, Any] | None:
        """The record that is there, if it is whole and of this very run."""
        if not path.is_file():
            return None
        try:
            record = read_record(path)
        except ValueError as error:
            path.replace(path.with_name("damaged.json"))
            self.note(f"{error}; it is kept as damaged.json, and the run is done again")
            return None
        if plain(Point(**record["point"]).settings) != plain(point.settings):
            self.note(f"{path} is of another run; {_aside(path)}, and the run is done again")
            return None
        now = data_files(point.config(path.parent).data)
        changed = [name for name, content in record.get("files", {}).items() if now.get(name, content) != content]
        if changed:
            self.note(f"{point}: {', '.join(changed)} has changed since; {_aside(path)}, and the run is done again")
            return None
        return record

    def _indent(self, line: str) -> None:
        self.note(f"  {line}")

    def _here(self, point: Point, folder: Path) -> dict[str, Any]:
        try:
            record = run_point(point, folder, self._indent)
        except (MissingPeer, WrongData):
            raise
        except Exception as error:  # an error in one model must not stop the others
            (folder / "errors.txt").write_text(traceback.format_exc(), encoding="utf-8")
            return self._died(point, f"{type(error).__name__}: {error}", folder)
        if record["status"] == "interrupted":
            raise Stopped(128 + record["signal"])
        write_json(folder / "record.json", record, default=float)
        return record

    def _died(self, point: Point, reason: str, folder: Path) -> dict[str, Any]:
        words = "".join(c for c in " ".join(reason.split()) if c.isprintable())
        errors = folder / "errors.txt"
        more = f" (more in {errors})" if errors.is_file() and errors.stat().st_size else ""
        return failed_record(point, f"{words[:300]}{more}") | {"died": True}

    def _in_process(self, point: Point, folder: Path) -> dict[str, Any]:
        spec = folder / "point.json"
        write_json(spec, dataclasses.asdict(point))
        root = Path(__file__).parents[2]
        threads = str(point.training.get("threads", 1))
        # An empty entry would be the folder that we are in, and a tqdm.py in it would be run in place of tqdm.
        given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), *given]), "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        }  # fmt: skip
        python = self.python.get(point.model, sys.executable)
        command = [python, "-W", "ignore", "-c", _START.format("nbody_pyg.compare.point"), str(spec), str(folder)]
        limit = self.timeout or _patience(point)
        with (folder / "errors.txt").open("w+", encoding="utf-8", errors="replace") as errors:
            try:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment
                )
            except OSError as error:
                raise ValueError(f"python: cannot run {python!r} for {point.model}: {error}") from error
            last, in_time = self._follow(process, time.monotonic() + limit)
            errors.seek(0)
            tail = [line for line in errors.read().splitlines() if line.strip()]
        status = process.returncode
        if not in_time:
            return self._died(point, f"not ready after {limit:g} s, and ended; --timeout allows more", folder)
        if status == 3 and last.startswith("missing: "):
            raise MissingPeer(last.removeprefix("missing: "))
        if status == 4 and last.startswith("data: "):
            raise WrongData(last.removeprefix("data: "))
        number = -status if status < 0 else status - 128
        if number in (signal.SIGINT, signal.SIGTERM) and self._signalled:
            raise Stopped(128 + number)
        if status < 0 or number in (signal.SIGINT, signal.SIGTERM):
            hint = "; is there memory enough?" if number == signal.SIGKILL else ""
            return self._died(point, f"the process was ended by {signal_name(number)}{hint}", folder)
        if status != 0:
            return self._died(point, f"{tail[-1] if tail else 'an error'} (status {status})", folder)
        try:
            return read_record(folder / "record.json")
        except (OSError, ValueError) as error:
            return self._died(point, f"the process left no record ({error})", folder)

    def _follow(self, process: subprocess.Popen[str], deadline: float) -> tuple[str, bool]:
        """Print what the process says, hand signals on to it; returns its last line, and whether it ended in time."""

        def forward(number: int, frame: FrameType | None) -> None:
            self._signalled = True
            process.send_signal(signal.SIGTERM)

        lines: queue.Queue[str] = queue.Queue()  # a SimpleQueue waits for ever if a signal outlasts its timeout

        def read() -> None:  # beside: a process that it has started may keep the pipe open for ever
            with required(process.stdout) as pipe:
                for line in pipe:
                    lines.put(line)

        reader = threading.Thread(target=read, daemon=True)
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, forward) if in_main else None
        last, in_time = "", True
        try:
            reader.start()
            while _speaks(process, reader, lines):
                try:
                    last = lines.get(timeout=0.1).rstrip("\n")
                    self._indent(last)
                except queue.Empty:
                    pass
                if time.monotonic() > deadline and process.poll() is None:
                    in_time = False
                    _end(process)
        except KeyboardInterrupt:  # the terminal sent it to the process too, which writes its checkpoint
            self._signalled = True
            _end(process, asked=True)
            raise Stopped(128 + signal.SIGINT) from None
        finally:
            if process.poll() is None:
                _end(process)
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        return last, in_time


def _speaks(process: subprocess.Popen[str], reader: threading.Thread, lines: queue.Queue[str]) -> bool:
    """Whether more lines may come; after the end of the process, those that are left in the pipe, but not for long."""
    if process.poll() is None or not lines.empty():
        return True
    reader.join(1.0)
    return not lines.empty()


def _end(process: subprocess.Popen[str], asked: bool = False) -> None:
    """Let a process end by itself, then by SIGTERM, then by SIGKILL."""
    for number in (None if asked else signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            process.send_signal(number)
        try:
            process.wait(_GRACE)
            return
        except subprocess.TimeoutExpired:
            continue


def _patience(point: Point) -> float:
    seconds = point.training.get("budget_seconds")
    return 86_400.0 if seconds is None else 600.0 + 20.0 * float(seconds)


def _aside(path: Path) -> str:
    """Move a record that holds no longer, which reports would show if the next run fails; says where it is now."""
    path.replace(path.with_name("outdated.json"))
    return "its record is kept as outdated.json"


def summary(record: Mapping[str, Any]) -> str:
    """One line about a finished run."""
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    parts = [f"{record['steps']} steps, {1000 * record['cpu_seconds'] / max(record['steps'], 1):.1f} ms each"]
    for name, errors in {"val": record["val"], **record["test"]}.items():
        if errors:
            parts.append(f"{name} {listed(errors, fewer=0)}")
    return ", ".join(parts)
