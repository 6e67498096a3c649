"""What goes on in this thread now, and which gradients a backward pass is for.

Nothing here is shared between threads: what a caller says counts in its own context, and what a derivative is for is
asked of the engine that computes it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

#: What runs in place of an operation; None where operations run as they are.
_recorder: ContextVar[Callable[..., Any] | None] = ContextVar("recorder", default=None)
_tracing: ContextVar[bool] = ContextVar("tracing", default=False)
_dry: ContextVar[bool] = ContextVar("dry", default=False)


Function = TypeVar("Function", bound=Callable[..., Any])


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def tracing() -> contextlib.AbstractContextManager[None]:
    """Inside, a graph is recorded: values of tensors must not be asked for."""
    return _set(_tracing, True)


@contextlib.contextmanager
def recording(instead: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``instead(operation, sizes, tensors)`` takes the place of an operation of compiled code."""
    with tracing(), _set(_recorder, instead):
        yield


def is_recording() -> bool:
    """Whether compiled products become operators of a graph that the library records itself."""
    return _recorder.get() is not None


def dry_run() -> contextlib.AbstractContextManager[None]:
    """Inside, compiled functions are not called: what remains of a product is the shapes of its results."""
    return _set(_dry, True)


def is_dry() -> bool:
    """Whether compiled functions are left out now."""
    return _dry.get()


def recorder() -> Callable[..., Any] | None:
    """What runs in place of an operation here, if anything does."""
    return _recorder.get()


def is_transformed() -> bool:
    """Whether torch or the caller takes part in every operation of this thread: it traces, batches or counts.

    Compiled code would be invisible to it. (``torch.compiler.is_compiling()`` tells of other threads, too.)
    """
    if torch.compiler.is_dynamo_compiling():  # first: it cannot follow what comes next
        return True
    return _recorder.get() is None and (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def is_tracing() -> bool:
    """Whether values of tensors must not be asked for, because a graph is recorded by us or by torch."""
    return is_transformed() or _tracing.get()


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the numbers of a tensor may be looked at: it is no tracer's, no fake and none of ``torch.vmap``."""
    if torch.compiler.is_dynamo_compiling() or _tracing.get() or tensor.is_meta:
        return False
    if not is_transformed():
        return True
    key, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    recorded = torch._C._get_tracing_state() is not None or mode(key.PROXY) is not None or mode(key.FAKE) is not None
    return not recorded and not torch._C._functorch.is_batchedtensor(tensor)


_REASON = (
    "nbody_pyg runs its own compiled kernels here, which torch.compile cannot look into; leave fullgraph off, or compile "
    "the whole potential with nbody_pyg.compiled.compile_potential"
)


def opaque_to_compile(function: Function) -> Function:
    """Decorate what ``torch.compile`` leaves as it is: it breaks its graph there and goes on behind it."""
    known = inspect.signature(torch.compiler.disable).parameters
    opaque: Function = torch.compiler.disable(function, **({"reason": _REASON} if "reason" in known else {}))
    return opaque


# Not part of torch's interface: where it is missing all gradients are computed, which takes longer and is never wrong
_will_execute = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def gradients_wanted(edges: Iterable[tuple[Any, int]]) -> bool:
    """Whether the backward pass that runs now uses a gradient that goes along one of these edges of its graph.

    Edges are some of ``ctx.next_functions``: one for each tensor that a function was called with, in that order.
    ``ctx.needs_input_grad`` says only that a tensor requires a gradient, as weights do also in a pass for forces alone.
    """
    for node, _ in edges:
        if node is not None:
            try:
                if _will_execute(node):
                    return True
            except RuntimeError:  # a leaf that was named in autograd.grad: of those the engine does not say
                return True
    return False


def in_own_precision(forward: Function) -> Function:
    """Decorate a method of a module that runs in the precision of its weights, also inside ``torch.autocast``.

    Raises: TypeError: when called by ``torch.fx.symbolic_trace``.
    """

    @functools.wraps(forward)
    def wrapper(self: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if arguments and isinstance(arguments[0], torch.fx.Proxy):
            raise TypeError(
                f"torch.fx.symbolic_trace cannot follow {type(self).__name__}, whose operations depend on its input; use "
                "torch.export, or nbody_pyg.compiled.compile_potential"
            )
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return forward(self, *arguments, **keywords)
        dtype = next((p.dtype for p in self.parameters()), torch.float32)

        def widened(value: Any) -> Any:
            """What other layers have made of lower precision."""
            low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
            return value.to(dtype) if low else value

        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            arguments, keywords = tree_map(widened, (arguments, keywords))
            return forward(self, *arguments, **keywords)

    return wrapper  # type: ignore[return-value]  # of the same signature


def constant_table(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorate a function that makes a table of constants: it is made once and kept.

    What is made while a tracer or a mode takes part holds its tensors; it is made for that call alone. What is kept
    does not depend on the caller's default device, ``inference_mode`` or gradients.
    """
    kept: dict[tuple[Any, ...], torch.Tensor] = {}

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> torch.Tensor:
        if is_transformed():
            return function(*arguments)
        if arguments not in kept:
            if is_recording():
                return function(*arguments)
            with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
                kept[arguments] = function(*arguments)
        return kept[arguments]

    return wrapper


class Lock:
    """A re-entrant lock, free in a copy, after pickling, and in a process that was forked while it was held."""

    def __init__(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._process, self._lock = os.getpid(), threading.RLock()
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: Any) -> Lock:
        return Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


def locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that one thread at a time may run, under the :class:`Lock` of its object, ``_lock``."""

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **keywords)

    return wrapper
