"""One folder, one run: a lock, and the files of earlier runs kept apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest

from nbody_pyg.training import folder as module
from nbody_pyg.training.folder import RunFolder


def test_a_folder_in_use_is_refused_and_free_afterwards(tmp_path):
    with RunFolder(tmp_path / "r"):
        with pytest.raises(ValueError, match=rf"another run \(process {os.getpid()} on .*\) trains in .*/r now; wait"):
            RunFolder(tmp_path / "r").__enter__()
        with RunFolder(tmp_path / "r", active=False), RunFolder(tmp_path / "other"):
            pass
        (tmp_path / "r/metrics.csv").touch()
    with RunFolder(tmp_path / "r"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["r"], "a folder that stayed empty goes again"
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["metrics.csv"]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = textwrap.dedent(f"""
        import os, runpy, signal
        RunFolder = runpy.run_path({module.__file__!r})["RunFolder"]  # without torch, whose import takes seconds
        RunFolder({str(tmp_path)!r}).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    subprocess.run([sys.executable, "-c", script], check=False)
    assert re.fullmatch(r"process \d+ on .+\n", (tmp_path / ".lock").read_text())
    with RunFolder(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_no_locks_where_the_system_has_none(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuses)
    with RunFolder(tmp_path), RunFolder(tmp_path):
        pass
    monkeypatch.setattr(module, "fcntl", None)
    with RunFolder(tmp_path), RunFolder(tmp_path):
        pass


def test_earlier_files_are_moved_and_numbered(tmp_path):
    with RunFolder(tmp_path) as run:
        for number in (1, 2):
            for name in ("a", "b", "mine"):
                (tmp_path / name).write_text(f"{name} {number}")
            assert run.move_away(("a", "b", "c")) == tmp_path / f"before-{number}"
            assert {p.name for p in (tmp_path / f"before-{number}").iterdir()} == {"a", "b"}
            assert (tmp_path / f"before-{number}/a").read_text() == f"a {number}"
        assert run.move_away(("a", "b", "c")) is None and (tmp_path / "mine").is_file()
    (tmp_path / "a").touch()
    assert RunFolder(tmp_path, active=False).move_away(("a",)) is None and (tmp_path / "a").is_file()
