"""Carries points out: each in a process of its own, none twice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from nbody_pyg.compare.peer import MissingPeer
from nbody_pyg.compare.point import Point, run_point


class Stopped(Exception):
    """A signal ended a run; ``status`` is the exit status that says so."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped by signal {status - 128}; the same command goes on from there")
        self.status = status


class Runner:
    """Point -> record, from the folder where it is already there.

    A run that a signal stopped goes on from its checkpoint; one that was killed outright starts again.

    Args:
        out: folder of the comparison; results lie in ``out/points``.
        python: interpreter of the environment of a model, where it is not this one. Our package is found
            there through PYTHONPATH.
        isolate: a new process for every run. Peers change global settings, and a long-lived process slows down.
        note: called with one line at a time.
    """

    def __init__(
        self, out: str | Path, python: Mapping[str, str] | None = None, isolate: bool = True,
        note: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.folder, self.python, self.isolate, self.note = Path(out) / "points", dict(python or {}), isolate, note

    def __call__(self, point: Point) -> dict[str, Any]:
        """The record of a point.

        Raises: MissingPeer: the model's package is not installed; Stopped: by a signal; RuntimeError: the
            process ended otherwise.
        """
        folder = self.folder / point.folder
        if (folder / "record.json").is_file():
            self.note(f"{point}: there already")
            return json.loads((folder / "record.json").read_text())
        folder.mkdir(parents=True, exist_ok=True)
        self.note(f"{point}{': goes on' if (folder / 'last.ckpt').is_file() else ''}")
        if self.isolate or point.model in self.python:
            record = self._in_process(point, folder)
        else:
            record = run_point(point, folder, self._indent)
            if record["status"] == "interrupted":
                raise Stopped(128 + record["signal"])
            (folder / "record.json").write_text(json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8")
        for name in ("last.ckpt", "best.ckpt"):  # as large as the model, and of no use any more
            (folder / name).unlink(missing_ok=True)
        self.note(f"  {summary(record)}")
        return record

    def _indent(self, line: str) -> None:
        self.note(f"  {line}")

    def _in_process(self, point: Point, folder: Path) -> dict[str, Any]:
        spec = folder / "point.json"
        spec.write_text(json.dumps(dataclasses.asdict(point), indent=1) + "\n", encoding="utf-8")
        root = Path(importlib.util.find_spec("nbody_pyg").origin).parents[1]
        threads = str(point.training.get("threads", 1))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        }  # fmt: skip
        python = self.python.get(point.model, sys.executable)
        command = [python, "-W", "ignore", "-m", "nbody_pyg.compare.point", str(spec), str(folder)]
        with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
            try:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            except OSError as error:
                raise ValueError(f"python: cannot run {python!r} for {point.model}: {error}") from error
            last = self._follow(process)
            errors.seek(0)
            tail = errors.read().splitlines()[-12:]
        status = process.returncode
        if status == 3:
            raise MissingPeer(last.removeprefix("missing: "))
        if status < 0:  # before the training could answer the signal
            status = 128 - status
        if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise Stopped(status)
        if status != 0 or not (folder / "record.json").is_file():
            raise RuntimeError(f"{point}: the process ended with status {status}:\n" + "\n".join(tail))
        return json.loads((folder / "record.json").read_text())

    def _follow(self, process: subprocess.Popen) -> str:
        """Print what the process says, hand signals on to it, and return its last line."""

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, forward) if _in_main_thread() else None
        last = ""
        try:
            for line in process.stdout:
                last = line.rstrip("\n")
                self._indent(last)
            process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the process as well: let it write its checkpoint
            process.wait()
            raise Stopped(128 + signal.SIGINT) from None
        finally:
            if process.poll() is None:
                process.terminate()
            process.stdout.close()
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        return last


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def summary(record: Mapping[str, Any]) -> str:
    """One line about a finished run."""
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    parts = [f"{record['steps']} steps, {1000 * record['cpu_seconds'] / max(record['steps'], 1):.1f} ms each"]
    for name, errors in {"val": record["val"], **record["test"]}.items():
        if "forces_mae" in errors:
            parts.append(f"{name} E {errors['energy_mae']:.2f} meV F {errors['forces_mae']:.2f} meV/A")
    return ", ".join(parts)
