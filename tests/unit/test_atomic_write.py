"""A full disk or a kill while saving leaves the last good file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.atomic_write import atomic_write, write_json, write_text
from nbody_pyg.cli import main
from nbody_pyg.datasets import load_embedded
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.io import model_file
from nbody_pyg.training import TrainingConfig, fit


def potential(seed: int = 0) -> Potential:
    torch.manual_seed(seed)
    return Potential(NBodyNet([1, 6, 8], NestedShells((3.0,)), channels=2, lmax=1))


def full_disk(path, text="some bytes"):
    with open(path, "w") as file:  # what was written before the disk was full
        file.write(text)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_leaves_the_old_model_and_no_rest(tmp_path, monkeypatch):
    save_model(potential(0), tmp_path / "m.nbody")
    before = (tmp_path / "m.nbody").read_bytes()
    monkeypatch.setattr(model_file, "save_file", lambda tensors, path, metadata: full_disk(path))
    with pytest.raises(OSError, match="No space left on device"):
        save_model(potential(1), tmp_path / "m.nbody")
    assert (tmp_path / "m.nbody").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.nbody"]


def test_a_full_disk_while_training_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    frames = load_embedded("ethanol")[:8]
    settings = TrainingConfig(max_steps=2, batch_size=4, validate_every=2)
    fit(potential(), frames, frames[:2], settings, tmp_path, show_progress=False)
    before = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda content, path: full_disk(path))
    longer = TrainingConfig(max_steps=4, batch_size=4, validate_every=2)
    with pytest.raises(OSError, match="No space left on device"):
        fit(potential(), frames, frames[:2], longer, tmp_path, tmp_path / "last.ckpt", show_progress=False)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2


@pytest.mark.slow
def test_the_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_file, "save_file", lambda tensors, path, metadata: full_disk(path))
    words = ["--data.embedded", "ethanol", "--data.num_train", "4", "--data.num_val", "2", "--training.max_steps", "1"]
    words += ["--model.channels", "2", "--output.folder", str(tmp_path), "--output.plot", "false"]
    monkeypatch.setattr("nbody_pyg.training.prepare.load_embedded", lambda *a: load_embedded("ethanol")[:8])
    assert main(["train", *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("nbody train: error: ") and "No space left on device" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_kill_while_saving_leaves_the_old_model(tmp_path):
    path = tmp_path / "m.nbody"
    save_model(potential(0), path)
    before = path.read_bytes()
    file = sys.modules["nbody_pyg.atomic_write"].__file__
    script = textwrap.dedent(f"""
        import os, runpy, signal
        module = runpy.run_path({file!r})  # without torch, whose import takes seconds
        with module["atomic_write"]({str(path)!r}) as temporary:
            temporary.write_bytes(b"half of a model")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    load_model(path)
    assert len(list(tmp_path.iterdir())) == 2, "a kill cannot clean up, but what is left is not the model"
    save_model(potential(1), path)
    assert path.read_bytes() != before


def test_written_whole_replaces_and_cleans_up(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert temporary != path
        assert path.read_text() == text

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_text("three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask_whatever_wrote_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(potential(), tmp_path / "m.nbody")  # whose writer makes files for their owner alone
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {oct(mode)}
    (tmp_path / "a.txt").chmod(0o640)
    write_text(tmp_path / "a.txt", "new text")
    assert oct((tmp_path / "a.txt").stat().st_mode & 0o777) == oct(0o640), "a file keeps the permissions it was given"


def test_links_are_followed_and_devices_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "file.json")
    write_json(tmp_path / "link.json", {"a": [1.5, "µ"]})
    assert (tmp_path / "link.json").is_symlink() and '"a"' in (tmp_path / "real" / "file.json").read_text("utf-8")
    write_text("/dev/null", "text")
    assert not os.path.isfile("/dev/null")
    with atomic_write(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path, "writers add a suffix that is missing"
        with atomic_write(tmp_path / "plot.png") as other:
            other.write_bytes(b"2")
        temporary.write_bytes(b"1")
    assert (tmp_path / "plot.png").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 3


def test_an_error_of_the_system_names_the_file(tmp_path):
    """Not the temporary one, and also where the system names none, as for a full disk."""
    for name in (None, "temporary"):
        with pytest.raises(OSError, match="No space left") as error, atomic_write(tmp_path / "a.txt") as temporary:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name and str(temporary))
        assert error.value.filename == str(tmp_path / "a.txt") and not list(tmp_path.iterdir())
