"""Compiled products are loaded only from where nobody else can put code, whole; where they cannot, plain torch runs."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import pickle
import random
import shlex
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from nbody_pyg import NBodyNet, NestedShells
from nbody_pyg.kernels import available_backends, backend, build, set_backend
from nbody_pyg.kernels.backend import _forced, _from_environment

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")
SOURCE = "int answer(void) { return 42; }"
as_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="gives files to another user")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A build module that remembers nothing, with a cache of its own; forgets again afterwards."""
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path / "cache"))
    _forced.set(None)
    _from_environment.cache_clear()
    build.forget()
    yield tmp_path / "cache" / "kernels"
    monkeypatch.undo()
    build.forget()
    _from_environment.cache_clear()
    set_backend("auto")


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled, beside the probe."""
    done, run = Compilations(), build._compile

    def watched(command, source, timeout):
        done.append(source)
        done.running += 1
        done.at_once = max(done.at_once, done.running)
        try:
            return (yield from run(command, source, timeout))
        finally:
            done.running -= 1

    monkeypatch.setattr(build, "_compile", watched)
    return done


class Compilations(list):
    """The compiled sources, and how many were compiled at the same time."""

    running = at_once = 0


def answer() -> int:
    """Load as a new process would, without a warning."""
    build.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return build.load(SOURCE).answer()


def kept(cache: Path) -> Path:
    (file,) = (p for p in cache.iterdir() if ctypes.CDLL(str(p))._handle and hasattr(ctypes.CDLL(str(p)), "answer"))
    return file


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def network() -> NBodyNet:
    torch.manual_seed(0)
    return NBodyNet([1, 8], NestedShells((3.0,)), channels=2, lmax=1).double()


def energy(net: NBodyNet | None = None) -> torch.Tensor:
    net = network() if net is None else net
    pos = torch.tensor([[0.0, 0, 0], [0.96, 0, 0], [-0.2, 0.9, 0.3], [0.1, 0.5, 2.1]], dtype=torch.float64)
    with torch.no_grad():
        return net(torch.tensor([8, 1, 1, 8]), pos)


# -- what is kept ------------------------------------------------------------------------------------------
def test_compiled_code_is_kept_and_used_again(cache, compilations):
    assert answer() == 42 and compilations
    assert {p.suffix for p in cache.iterdir()} == {".so"}, "no temporary file is left"
    assert cache.stat().st_mode & 0o777 == 0o700
    compilations.clear()
    assert answer() == 42 and not compilations


@pytest.mark.parametrize(
    "damage",
    [
        lambda code: code[: len(code) // 2],
        lambda code: code[: len(code) // 2] + bytes(len(code) - len(code) // 2),
        lambda code: b"",
        lambda code: b"\x7fELF cut off",
        lambda code: code + b"x",
        lambda code: code[:5000] + bytes([code[5000] ^ 1]) + code[5001:],
    ],
    ids=["half", "zero tail", "empty", "garbage", "longer", "one bit"],
)
def test_a_damaged_library_is_built_anew(cache, compilations, damage):
    assert answer() == 42
    file = kept(cache)
    code = file.read_bytes()
    file.unlink()  # this process has it mapped: a new file, not new content
    file.write_bytes(damage(code))
    file.chmod(0o700)
    compilations.clear()
    assert answer() == 42 and compilations and file.read_bytes() == code


def test_a_pipe_in_place_of_a_library_is_not_waited_for(cache, compilations):
    assert answer() == 42
    file = kept(cache)
    file.unlink()
    os.mkfifo(file)
    compilations.clear()
    assert answer() == 42 and compilations and file.is_file()


def fuzzed(cache: Path, flips: int, truncations: int) -> dict[str, int]:
    """Damage a kept library in many ways; what a new process would get each time, by kind."""
    answer()
    file = kept(cache)
    code, rng, found = file.read_bytes(), random.Random(5), {"built anew": 0, "wrong": 0}
    key = file.name.split("-")[0]
    for number in range(flips + truncations):
        bad = bytearray(code)
        if number < flips:
            bad[rng.randrange(len(code))] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.randrange(len(code)) :]
        file.unlink(missing_ok=True)
        file.write_bytes(bad)
        file.chmod(0o700)
        taken = build._kept(cache, key)
        found["built anew" if taken is None and not file.exists() else "wrong"] += 1
    return found


def test_no_damaged_library_is_loaded(cache):
    assert fuzzed(cache, 60, 20) == {"built anew": 80, "wrong": 0}


@pytest.mark.slow
def test_no_damaged_library_is_loaded_of_many(cache):
    assert fuzzed(cache, 1000, 200) == {"built anew": 1200, "wrong": 0}


def test_a_compiler_killed_half_way_leaves_nothing_that_is_loaded(cache, tmp_path, compilations):
    cc = script(tmp_path / "cc", 'while [ "$1" != -o ]; do shift; done; printf "\\177ELF half" > "$2"; kill -9 $PPID')
    code = f"from nbody_pyg.kernels import build; build.load({SOURCE!r})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CC": cc}, capture_output=True, check=False)
    assert done.returncode == -9
    assert answer() == 42 and SOURCE in compilations


def test_threads_that_ask_at_once_compile_once(cache, compilations):
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(build.load(SOURCE).answer())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [42] * 6 and compilations.count(SOURCE) == 1


@pytest.mark.slow
def test_processes_that_build_at_once(cache):
    code = f"from nbody_pyg.kernels import build; print(build.load({SOURCE!r}).answer())"
    several = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in several] == ["42", "42"]
    assert {p.suffix for p in cache.iterdir()} == {".so"}


def test_the_first_compilation_is_announced_once(cache, caplog):
    with caplog.at_level(logging.WARNING, "nbody_pyg"):
        build.load(SOURCE)
        build.load("int other(void) { return 1; }")
    assert [r.getMessage() for r in caplog.records] == [
        f"Compiling products of the network (about ten seconds), once for this kind of network; kept in {cache}"
    ]
    caplog.clear()
    assert answer() == 42 and not caplog.records


# -- several at once -----------------------------------------------------------------------------------------
SEVERAL = [f"int number(void) {{ return {n}; }}" for n in range(5)]


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_several_sources_are_compiled_at_once(cache, compilations, monkeypatch, cores):
    monkeypatch.setattr(build, "_num_cores", lambda: cores)
    build.load_all([*SEVERAL, SEVERAL[0]])
    assert sorted(s for s in compilations if s in SEVERAL) == SEVERAL, "each once"
    assert compilations.at_once == min(cores, 5)
    for _ in range(2):
        compilations.clear()
        assert [build.load(source).number() for source in SEVERAL] == [0, 1, 2, 3, 4] and not compilations
        build.forget()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are not bound to cores")
def test_no_more_at_once_than_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7})
    assert build._num_cores() == 3


def test_the_sources_of_a_network_are_compiled_at_once(cache, compilations, monkeypatch):
    monkeypatch.setattr(build, "_num_cores", lambda: 8)
    monkeypatch.setenv("NBODY_CFLAGS", "-O0")
    set_backend("torch")
    expected = energy()
    set_backend("auto")
    net = network()
    torch.testing.assert_close(energy(net), expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 0
    assert compilations.at_once >= 4 and len(compilations) == len(set(compilations))
    together = net.interactions[0].kernel.library._together
    assert len(together) > 5 and all(one._loaded[torch.float64] for one in together), "none is compiled in vain"


def test_a_copy_and_a_pickled_network_are_compiled_at_once():
    net = network()
    for made in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        interaction = made.interactions[0]
        update, density = interaction.kernel.library, interaction.density.kernel.library
        assert update._together == density._together and {update, density} < set(update._together)


def special(tmp_path: Path, text: str, then: str) -> str:
    """A compiler that does something else for sources with a text."""
    return script(
        tmp_path / "cc",
        f"""for word; do case "$word" in *.c) file=$word;; esac; done
if grep -q {text} "$file"; then {then}; fi
exec {shlex.join(build.compiler())} "$@\"""",
    )


def test_one_source_that_does_not_compile_leaves_plain_torch_with_one_warning(cache, monkeypatch, tmp_path):
    set_backend("torch")
    expected = energy()
    set_backend("auto")
    tries = tmp_path / "tries"
    monkeypatch.setenv("NBODY_CFLAGS", "-O0")
    monkeypatch.setenv("CC", special(tmp_path, "density_forward", f"echo once >> {tries}; echo no density >&2; exit 1"))
    build.forget()
    with pytest.warns(RuntimeWarning, match=r"(?s)plain torch runs .*compiler failed.*no density") as seen:
        found = energy()
    assert len(seen) == 1 and len(tries.read_text().splitlines()) == 1 and expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_an_interrupt_ends_all_compilers(cache, monkeypatch, tmp_path):
    (tmp_path / "build").mkdir(mode=0o700)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "build"))
    monkeypatch.setattr(build, "_num_cores", lambda: 2)
    started = tmp_path / "started"
    monkeypatch.setenv("CC", special(tmp_path, "number", f"echo $$ >> {started}; exec sleep 1000"))
    build.forget()
    build.broken(), build.no_threads()
    wait = time.sleep

    def interrupted(seconds):
        wait(seconds)
        if started.exists() and len(started.read_text().splitlines()) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(build.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.load_all(SEVERAL)
    monkeypatch.setattr(build.time, "sleep", wait)
    for process in map(int, started.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not list((tmp_path / "build").iterdir())
    monkeypatch.delenv("CC")
    assert answer() == 42, "the lock is free"


# -- whose code it is ----------------------------------------------------------------------------------------
def spoiled(cache: Path, mode: int | None, owner: int | None, where: str) -> None:
    place = {"folder": cache, "above": cache.parent, "file": kept(cache)}[where]
    if mode is not None:
        place.chmod(mode)
    if owner is not None:
        os.chown(place, owner, owner)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "above"])
@pytest.mark.parametrize(
    ("mode", "owner"),
    [
        (0o777, None),
        (0o770, 0) if os.name == "posix" and os.getuid() else (0o707, None),
        pytest.param(0o700, 12345, marks=as_root),
        pytest.param(None, 65534, marks=as_root),
    ],
)
def test_a_folder_of_others_is_not_used(cache, compilations, where, mode, owner):
    answer()
    spoiled(cache, mode, owner, where)
    before = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    build.forget()
    compilations.clear()
    with pytest.warns(RuntimeWarning, match=r"cannot be kept \(.*(written by others|another user).*set NBODY_CACHE to"):
        assert build.load(SOURCE).answer() == 42
    assert SOURCE in compilations and before == {p: p.stat().st_mtime_ns for p in cache.iterdir()}


def test_a_folder_where_others_cannot_rename_is_fine(cache, compilations):
    answer()
    cache.parent.chmod(0o1777)  # like /tmp
    compilations.clear()
    assert answer() == 42 and not compilations


def test_a_new_folder_where_others_cannot_rename_is_made(cache, compilations):
    cache.parent.parent.chmod(0o1777)
    assert answer() == 42 and kept(cache) and compilations
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700


def test_no_folder_is_made_where_others_can_rename_it(cache):
    cache.parent.parent.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"cannot be kept \(.*can be written by others"):
        assert build.load(SOURCE).answer() == 42
    assert not cache.parent.exists()


@pytest.mark.parametrize(("mode", "owner"), [(0o777, None), pytest.param(None, 12345, marks=as_root)])
def test_a_file_of_others_is_built_anew(cache, compilations, mode, owner):
    answer()
    spoiled(cache, mode, owner, "file")
    compilations.clear()
    assert answer() == 42 and compilations
    assert build.trusted(kept(cache)) is None


# -- where it cannot be kept, or compiled --------------------------------------------------------------------
def no_home(monkeypatch, tmp_path):
    for name in ("NBODY_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )


def under_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path / "file"))


def full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_keep", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))


def no_programs(monkeypatch, tmp_path):
    real = ctypes.CDLL

    def mapped(name):
        if str(tmp_path / "cache") in name:
            raise OSError("failed to map segment from shared object")
        return real(name)

    monkeypatch.setattr(ctypes, "CDLL", mapped)


@pytest.mark.parametrize("why", [no_home, under_a_file, full_disk, no_programs])
def test_without_a_cache_a_private_folder_is_used_with_one_warning(cache, monkeypatch, tmp_path, why):
    why(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning, match=r"(?s)compiled products cannot be kept \(.+\).*set NBODY_CACHE to a"):
        assert build.load(SOURCE).answer() == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load("int other(void) { return 7; }").other() == 7
        assert available_backends()[0] == "c"


def test_a_folder_for_temporary_files_that_cannot_be_used(cache, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc")
    assert answer() == 42


COMPILERS = {
    "fails": ("echo no such flag >&2; exit 1", r"the C compiler failed \(exit status 1\).*no such flag"),
    "makes nothing": ("exit 0", r"the C compiler failed"),
    "hangs": ("sleep 1000 & sleep 1000", r"the C compiler did not end in 0\.5 s"),
    "makes garbage": ('while [ "$1" != -o ]; do shift; done; echo garbage > "$2"', r"could not be loaded"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_a_broken_compiler_leaves_plain_torch_with_one_warning(cache, monkeypatch, tmp_path, kind):
    text, reason = COMPILERS[kind]
    set_backend("torch")
    expected = energy()
    set_backend("auto")
    tries = tmp_path / "tries"
    monkeypatch.setenv("CC", script(tmp_path / "cc", f"echo once >> {tries}\n{text}"))
    monkeypatch.setattr(build, "_PROBE_TIMEOUT", 0.5)
    build.forget()
    with pytest.warns(RuntimeWarning, match=rf"(?s)plain torch runs .*{reason}.*set_backend\('torch'\)") as seen:
        found = energy()
    assert len(seen) == 1 and expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    done = len(tries.read_text().splitlines())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy()
    assert len(tries.read_text().splitlines()) == done, "what failed once is not tried at every call"
    assert available_backends() == ["torch"] and backend() == "torch"
    with pytest.raises(ValueError, match=rf"(?s)backend 'c' cannot run here: .*{reason}"):
        set_backend("c")


@pytest.mark.parametrize(
    ("cc", "reason"), [("no-such-compiler", "CC=no-such-compiler is no"), ("gcc 'x", "CC=gcc 'x is")]
)
def test_a_compiler_that_does_not_exist(cache, monkeypatch, cc, reason):
    monkeypatch.setenv("CC", cc)
    build.forget()
    assert build.compiler() is None and available_backends() == ["torch"]
    with pytest.warns(RuntimeWarning, match=rf"plain torch runs .*: {reason} .*; install gcc or clang, set CC"):
        energy()
    with pytest.raises(ValueError, match=rf"backend 'c' cannot run here: {reason}"):
        set_backend("c")


def test_the_compiler_may_have_arguments(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", f"env NBODY_TEST=1 {build.compiler()[0]} -DUNUSED='a b'")
    build.forget()
    assert build.compiler()[1:] == ("NBODY_TEST=1", build.compiler.__wrapped__()[2], "-DUNUSED=a b")
    assert answer() == 42 and available_backends()[0] == "c"


def test_the_arguments_of_the_environment_win(cache, monkeypatch, compilations):
    source = "int level(void) { return NBODY_LEVEL * 10 + __OPTIMIZE__; }"
    monkeypatch.setenv("NBODY_CFLAGS", "-DNBODY_LEVEL=4 -O1 -O0 -O1")
    assert build.load(source, "-O3").level() == 41
    monkeypatch.setenv("NBODY_CFLAGS", "-DNBODY_LEVEL=5")
    build.forget()
    assert build.load(source, "-O3").level() == 51, "libraries of other arguments are not taken"
    monkeypatch.setenv("NBODY_CFLAGS", "-O1 'x")
    build.forget()
    with pytest.raises(RuntimeError, match="NBODY_CFLAGS=-O1 'x cannot be read"):
        build.load(source)


@pytest.mark.parametrize(("value", "match"), [("pytorch", "must be one of auto, c, triton, torch, got 'pytorch'"),
                                              ("c", "'c' cannot run here: CC=nothing is no program")])  # fmt: skip
def test_a_backend_of_the_environment_that_cannot_be(cache, monkeypatch, value, match):
    monkeypatch.setenv("NBODY_BACKEND", value)
    monkeypatch.setenv("CC", "nothing")
    build.forget()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"NBODY_BACKEND {match}"):
            backend(torch.zeros(1))


@pytest.mark.parametrize(("value", "name"), [("torch", "torch"), ("", "c"), ("c", "c"), ("auto", "c")])
def test_the_environment_chooses_the_backend(cache, monkeypatch, value, name):
    monkeypatch.setenv("NBODY_BACKEND", value)
    assert backend(torch.zeros(1)) == name


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"NBODY_CACHE": "~/a", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/h/a/kernels"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/nbody_pyg/kernels"),
        ({"NBODY_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/nbody_pyg/kernels"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, folder):
    for name in ("NBODY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(build.cache_folder()) == folder
