"""Processes that train together: started by torchrun or here, joined, and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from nbody_pyg.training.settings import TrainingConfig

# Processes started by this one: they run its program from the start, and so reach every fit that it reaches.
_children: list[subprocess.Popen[bytes]] = []
_address = ""


def is_first_process(settings: TrainingConfig | None) -> bool:
    """Whether this is the process that prints and writes, of those that train together."""
    # A job may number its tasks; that concerns only runs of several processes.
    return settings is None or settings.processes == 1 or int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def together(settings: TrainingConfig) -> Iterator[torch.device]:
    """Context in which ``settings.processes`` processes are one group of torch.distributed; yields the device of this
    one.

    Under torchrun they exist already. All end together, and afterwards each is independent again. The first process
    reports for all. If it fails, it ends the others; if another one fails, that one reports the reason.

    Raises: ValueError: torchrun has started another number of processes, or there is no program to start again;
        ChildProcessError: another process has failed.
    """
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", 0)) if settings.processes > 1 else 0
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if settings.processes == 1:
        yield device
        return
    if "RANK" not in os.environ and not _children:
        _start(settings.processes)
    found = len(_children) + 1 if _children else int(os.environ.get("WORLD_SIZE", 1))
    if found != settings.processes:
        raise ValueError(f"training.processes is {settings.processes}, but {found} were started; give the same number")
    if on_gpu:
        torch.cuda.set_device(device)
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), daemon=True).start()
    rank = int(os.environ.get("RANK", 0))
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", _address or "env://", rank=rank, world_size=settings.processes
        )
        yield device
        dist.barrier()  # another fit would find the group ended
    except BaseException as error:
        if rank > 0:
            time.sleep(2.0)  # usually the first process fails with the same error, reports it, and ends this one
            raise
        if isinstance(error, RuntimeError):  # possibly because another process broke the connection
            for child in _children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10.0)
        failed = any(child.poll() for child in _children)
        for child in _children:
            child.kill()
        _children.clear()
        if failed:
            raise ChildProcessError("a process of the training has failed; it says why above") from error
        raise
    finally:
        over.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def _start(count: int) -> None:
    """Start this program ``count - 1`` times more, with the variables that torchrun would set."""
    global _address
    if hasattr(sys, "ps1"):
        raise ValueError("training.processes must be 1 in a notebook or interactive session; write a script for more")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    _address = f"tcp://127.0.0.1:{port}"
    variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in map(str, range(1, count)):
        environment = os.environ | variables | {"RANK": rank, "LOCAL_RANK": rank}
        _children.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment))


def _watch(over: threading.Event) -> None:
    """End this process if it still waits for one that has failed, because NCCL would wait for minutes."""
    while not over.wait(1.0):
        if any(child.poll() for child in _children) and not over.wait(30.0):
            print("a process of the training has failed; it says why above", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
