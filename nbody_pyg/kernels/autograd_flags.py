"""Flags for custom autograd functions: whether this thread records a graph, and which gradients are needed.

Nothing is shared between threads: flags belong to the context of the caller, and the autograd engine is asked which
gradients it needs.
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

#: Replacement of operations; None if they run unchanged.
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
    """Context in which a graph is recorded: values of tensors must not be read."""
    return _set(_tracing, True)


@contextlib.contextmanager
def recording(instead: Callable[..., Any]) -> Iterator[None]:
    """Context in which ``instead(operation, sizes, tensors)`` replaces an operation of compiled code."""
    with tracing(), _set(_recorder, instead):
        yield


def is_recording() -> bool:
    """Whether compiled products become operators of a graph that the library records itself."""
    return _recorder.get() is not None


def dry_run() -> contextlib.AbstractContextManager[None]:
    """Context in which compiled functions are not called, so that a product only gives the shapes of its results."""
    return _set(_dry, True)


def is_dry() -> bool:
    """Whether compiled functions are skipped now."""
    return _dry.get()


def recorder() -> Callable[..., Any] | None:
    """Replacement of operations in this context, or None."""
    return _recorder.get()


def is_transformed() -> bool:
    """Whether torch or the caller intercepts every operation of this thread, to trace, batch or count it.

    It would not see compiled code. (``torch.compiler.is_compiling()`` is also true for other threads.)
    """
    if torch.compiler.is_dynamo_compiling():  # checked first, because dynamo cannot trace the next lines
        return True
    return _recorder.get() is None and (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def is_tracing() -> bool:
    """Whether values of tensors must not be read, because this library or torch records a graph."""
    return is_transformed() or _tracing.get()


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor can be read: it is not a tracer's or fake tensor, nor one of ``torch.vmap``."""
    if torch.compiler.is_dynamo_compiling() or _tracing.get() or tensor.is_meta:
        return False
    if not is_transformed():
        return True
    key, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    recorded = torch._C._get_tracing_state() is not None or mode(key.PROXY) is not None or mode(key.FAKE) is not None
    return not recorded and not torch._C._functorch.is_batchedtensor(tensor)


def inside_func() -> bool:
    """Whether a transform of ``torch.func`` is under way."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def outside_func() -> contextlib.AbstractContextManager[Any]:
    """Context without the transforms of ``torch.func``, for tensors that :func:`below_func` found."""
    # Here, because it is no public part of torch, and only torch.func needs it
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def below_func(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor whose derivatives ``torch.func`` takes; None where ``torch.vmap`` or another transform hides it."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if torch._C._functorch.is_functorch_wrapped_tensor(tensor) else tensor


_REASON = (
    "nbody_pyg runs its own compiled kernels here, which torch.compile cannot look into; leave fullgraph off, or compile "
    "the whole potential with nbody_pyg.compiled.compile_potential"
)


def opaque_to_compile(function: Function) -> Function:
    """Decorate a function that ``torch.compile`` does not trace: it breaks its graph there and continues after it."""
    known = inspect.signature(torch.compiler.disable).parameters
    opaque: Function = torch.compiler.disable(function, **({"reason": _REASON} if "reason" in known else {}))
    return opaque


# Not part of torch's interface. Without it all gradients are computed, which is slower but correct
_will_execute = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def gradients_wanted(edges: Iterable[tuple[Any, int]]) -> bool:
    """Whether the current backward pass needs a gradient along one of these edges of its graph.

    Edges are some of ``ctx.next_functions``: one for each tensor that a function was called with, in that order.
    ``ctx.needs_input_grad`` says only that a tensor requires a gradient, as weights do also in a pass for forces alone.
    """
    for node, _ in edges:
        if node is not None:
            try:
                if _will_execute(node):
                    return True
            except RuntimeError:  # a leaf passed to autograd.grad, for which the engine gives no answer
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
            """Tensors that other layers computed in lower precision."""
            low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
            return value.to(dtype) if low else value

        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            arguments, keywords = tree_map(widened, (arguments, keywords))
            return forward(self, *arguments, **keywords)

    return wrapper  # type: ignore[return-value]  # of the same signature


def constant_table(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorate a function that computes a table of constants, to cache its result.

    A table computed under a tracer or a mode holds its tensors and is not cached. Cached tables do not depend on the
    caller's default device, ``inference_mode`` or gradients.
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
    """A re-entrant lock that is released in a copy, after pickling, and in a process forked while it was held."""

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
