"""CUDA graphs: one launch replays an evaluation, or a loss and its gradients, for sizes that occurred before."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.kernels.autograd_flags import Lock, locked, tracing
from nbody_pyg.kernels.gpu.order import renew_orders
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import Potential, parameter_gradients
from nbody_pyg.renamed import renamed
from nbody_pyg.required import required
from nbody_pyg.runtime.static_eval import check_edges, check_same, evaluate, flatten, reason_of, recordable
from nbody_pyg.system import System

#: Number of times that sizes must occur before a graph is captured, and number of sizes that are remembered.
_SIGHTINGS, _REMEMBERED = 2, 64
#: Replays of a graph that are compared with eager mode, beside the first one with other edges.
_CHECKS = 2

Run = Callable[[], list[Tensor]]


class Recorder(Protocol):
    """Records a function without arguments, to run it again on the new contents of its input tensors."""

    device_type: str

    def capture(self, run: Run, device: torch.device) -> Run:
        """A function that runs ``run`` again, and returns its results in the same tensors every time."""
        ...


class CudaRecorder:
    """Records CUDA graphs. Calls ``run`` a few times first; the last time, synchronising with the GPU is an error."""

    device_type = "cuda"

    def capture(self, run: Run, device: torch.device) -> Run:
        """See :class:`Recorder`."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles kernels, fills tables
                run()
                with _waiting_is_an_error():
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = run()

        def replay() -> list[Tensor]:
            graph.replay()
            return results

        return replay


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Outside of a capture such an error does no harm; inside, it may leave the stream unusable.

    The setting belongs to the process, so it is not changed while other threads run, which may synchronise.
    """
    if threading.active_count() > 1:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Graph:
    """One captured function of some tensors, with its own copies of them and their last sources."""

    def __init__(
        self, recorder: Recorder, tensors: Sequence[Tensor], run: Callable[[list[Tensor]], list[Tensor]], model: Any
    ) -> None:
        self._static = [tensor.detach().clone() for tensor in tensors]
        self._last = [_Content(tensor) for tensor in tensors]
        # The graph refers to weights by address; the reference keeps that memory from being reused
        self._weights = [(p, p.detach()) for p in (*model.parameters(), *model.buffers())]
        self._replay = recorder.capture(lambda: run(self._static), tensors[0].device)
        self.checks, self.checked_other_edges = 0, False

    def fresh(self, tensors: Sequence[Tensor]) -> list[int]:
        """Numbers of the tensors that are new since the last replay, or were changed since."""
        pairs = enumerate(zip(self._last, tensors, strict=True))
        return [n for n, (last, tensor) in pairs if not last.is_that_of(tensor)]

    def outdated(self) -> bool:
        """Whether a weight has moved in memory; the graph sees weights that are changed in place."""
        return any(p.data_ptr() != kept.data_ptr() for p, kept in self._weights)

    def __call__(self, tensors: Sequence[Tensor], fresh: Sequence[int]) -> list[Tensor]:
        for n in fresh:
            self._static[n].copy_(tensors[n].detach())
            renew_orders(self._static[n])
            self._last[n] = _Content(tensors[n])
        return [result.clone() for result in self._replay()]


class _Content:
    """The content of a tensor at some time. Keeps the tensor, so that its memory is not reused."""

    def __init__(self, tensor: Tensor) -> None:
        # Inference tensors do not count their changes
        self._tensor, self._version = tensor, None if tensor.is_inference() else tensor._version

    def is_that_of(self, tensor: Tensor) -> bool:
        return tensor is self._tensor and self._version is not None and tensor._version == self._version


class _Captured:
    """Graphs by kind of input: the last ones used are kept; after a failure everything runs in eager mode."""

    def __init__(self, potential: Potential, max_graphs: int = 4, recorder: Recorder | None = None) -> None:
        if not isinstance(potential.model, NBodyNet):
            raise TypeError(f"potential must hold an NBodyNet to be captured, got a {type(potential.model).__name__}")
        if isinstance(max_graphs, bool) or not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs must be a whole number, 1 or more, got {max_graphs!r}; try 4")
        self.potential, self.max_graphs, self.recorder = potential, max_graphs, recorder or CudaRecorder()
        self.failure: str | None = None
        self.calls = self.replays = self.captures = 0
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._sightings: OrderedDict[Hashable, int] = OrderedDict()
        self._lock = Lock()

    def _system(self, stress: bool, *arguments: Any, **keywords: Any) -> System | None:
        """The checked system; None where it has to run in eager mode."""
        with self._lock:
            self.calls += 1
        if self.failure is not None or torch.is_inference_mode_enabled():
            return None
        system = recordable(self.potential, stress, *arguments, **keywords)
        here = system is not None and system.pos.device.type == self.recorder.device_type
        return system if here else None

    @locked  # all threads share the tensors of a graph
    def _results(
        self,
        kind: Hashable,
        tensors: list[Tensor],
        system: System,
        run: Callable[[list[Tensor]], list[Tensor]],
        finish: Callable[[list[Tensor]], dict[str, Tensor]],
        eager: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor] | None:
        """``finish`` applied to the results of a graph of ``run``; None if this has to run in eager mode."""
        key = (kind, tensors[0].device, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        graph = self._graphs.get(key)
        if graph is None and not self._seen_often(key):
            return None
        if graph is not None and graph.outdated():
            del self._graphs[key]
            graph = None
        fresh = [] if graph is None else graph.fresh(tensors)
        # A recorded graph checks nothing
        if graph is None or any(tensors[n] is system.z for n in fresh):
            model = self.potential.model
            assert isinstance(model, NBodyNet)
            model.check_species(system.z)
        other_edges = any(tensors[n].dim() == 2 and tensors[n].dtype == torch.long for n in fresh)
        if graph is None or other_edges:
            check_edges(system.topology)
        trusted = graph is not None and graph.checks >= _CHECKS and (graph.checked_other_edges or not other_edges)
        wanted = None if trusted else eager()
        try:
            if graph is None:
                graph = self._capture(key, tensors, run)
            self._graphs.move_to_end(key)
            found = graph(tensors, fresh)
        except Exception as error:  # a capture may raise any error; eager mode always works
            self._give_up(reason_of(error))
            return None
        results = finish(found)
        if wanted is not None:
            try:
                self._compare(results, wanted, required(self.potential.dtype))
            except ArithmeticError as error:
                self._give_up(reason_of(error))
                return None
            graph.checks += 1
            graph.checked_other_edges |= other_edges
        self.replays += 1
        return results

    def _seen_often(self, key: Hashable) -> bool:
        count = self._sightings.pop(key, 0) + 1
        self._sightings[key] = count
        if len(self._sightings) > _REMEMBERED:
            self._sightings.popitem(last=False)
        return count >= _SIGHTINGS

    def _capture(self, key: Hashable, tensors: list[Tensor], run: Callable[[list[Tensor]], list[Tensor]]) -> _Graph:
        while len(self._graphs) >= self.max_graphs:
            forgotten, _ = self._graphs.popitem(last=False)
            self._sightings.pop(forgotten, None)

        def recorded(static: list[Tensor]) -> list[Tensor]:
            with tracing():  # no value is read
                return run(static)

        graph = self._graphs[key] = _Graph(self.recorder, tensors, recorded, self.potential)
        self.captures += 1
        return graph

    def _compare(self, found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
        check_same(found, wanted, [], dtype)

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        self._graphs.clear()
        text = f"capturing a CUDA graph failed ({reason}); it runs in eager mode"
        warnings.warn(text, RuntimeWarning, stacklevel=4)

    def __repr__(self) -> str:
        state = "eager" if self.failure else f"{len(self._graphs)} graphs"
        return f"{type(self).__name__}({state})"


class CapturedPotential(_Captured):
    r"""A potential whose evaluations are captured as CUDA graphs: energy, forces and stress in one launch.

    Evaluations of one kind (shapes and types of all tensors, the optional ones that are there, stress or not) share a
    graph, which is captured when a kind occurs for the second time. Later calls copy new values into the tensors of the
    graph, replay it, and return copies of its results; an index tensor that is the same object as in the last
    replay is not copied. A :class:`~nbody_pyg.hierarchy.TopologyCache` with ``trim=False`` gives the same objects from
    one search for neighbours to the next. The first two replays of a graph, and the first with other edges, are
    compared with eager mode. If a capture or a comparison fails, one warning gives the reason, and everything runs in
    eager mode from then on.

    It is called like the potential. These run in eager mode without a warning: tensors on the CPU, ``create_graph``,
    no forces, charges, terms that do not know all elements of the network, and networks with long range or on
    :class:`~nbody_pyg.hierarchy.SmoothSurvivors` (whose number of terms depends on the positions).

    ``calls``, ``replays`` and ``captures`` are counters; ``failure`` is the reason why graphs were given up, or None.

    Args:
        potential: its model must be an :class:`~nbody_pyg.models.NBodyNet`. Weights may be changed in place; if
            parameters move in memory, graphs are captured again.
        max_graphs: number of graphs that are kept, the last used ones; each needs the memory of one evaluation.
        recorder: what records; by default CUDA graphs of torch.

    Smoothness: that of the potential. Cost: a capture costs about five evaluations.
    Raises: ValueError: ``max_graphs`` below 1. TypeError: another model than NBodyNet.
    """

    @renamed(training="create_graph")
    def __call__(
        self,
        *arguments: Any,
        create_graph: bool = False,
        compute_forces: bool = True,
        compute_stress: bool = False,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """Results of the potential for the same arguments."""
        flags = {"create_graph": create_graph, "compute_forces": compute_forces, "compute_stress": compute_stress}
        eager: Callable[[], dict[str, Tensor]] = partial(self.potential, *arguments, **flags, **keywords)
        system = self._system(compute_stress, *arguments, **keywords)
        if system is None or create_graph or not compute_forces:
            return eager()
        tensors, layout = flatten(self.potential, system, compute_stress)
        results = self._results(
            layout,
            tensors,
            system,
            run=lambda static: evaluate(self.potential, layout, False, static),
            finish=lambda found: dict(zip(layout.results, found, strict=True)),
            eager=eager,
        )
        return eager() if results is None else results


class CapturedStep(_Captured):
    r"""Evaluation, loss and its gradients for all parameters, captured as CUDA graphs for batches of fixed sizes.

    .. math:: L(\theta) = \mathrm{loss}(E_\theta, F_\theta, \sigma_\theta;\ \mathrm{labels}), \qquad
              g = \partial L / \partial \theta

    A call returns the loss; ``backward()`` on it accumulates the gradients in the parameters as usual, so optimizers,
    clipping and several losses in a row work::

        step = CapturedStep(potential, lambda found, labels: (found["forces"] - labels["forces"]).square().mean())
        for batch in loader:
            optimizer.zero_grad()
            step(batch, {"forces": batch.forces}).backward()
            optimizer.step()

    Graphs are captured, compared with eager mode (losses and gradients), kept and given up as in
    :class:`CapturedPotential`. Batches must have the same numbers of atoms, parts and edges to share a graph: molecules
    of one kind that lie within the radii of the hierarchy do.

    Args:
        potential: its model must be an :class:`~nbody_pyg.models.NBodyNet`. Gradients are those of the parameters that
            require one when the step is made.
        loss: ``loss(results, labels)``, a scalar, with the results of the potential for ``create_graph=True``. It must
            not read values of tensors, and no shape may depend on them (so no mask of missing labels). Everything else
            that it reads is fixed by the capture. Pass everything that varies in ``labels``.
        max_graphs: number of graphs that are kept, the last used ones; each needs the memory of one step.
        recorder: what records; by default CUDA graphs of torch.

    Smoothness: that of the potential. Cost: a capture costs about five steps.
    Raises: ValueError: ``max_graphs`` below 1, no parameter to train, a loss that is not a scalar. TypeError: another
    model than NBodyNet, a label that is not a tensor.
    """

    def __init__(
        self,
        potential: Potential,
        loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
        max_graphs: int = 4,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(potential, max_graphs, recorder)
        self.loss, self._parameters = loss, [p for p in potential.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("potential must have a parameter that requires a gradient, got none; unfreeze some")

    def __call__(self, batch: Data, labels: Mapping[str, Tensor], compute_stress: bool = False) -> Tensor:
        """The loss, a scalar on which ``backward()`` can be called."""
        for name, label in labels.items():
            if not isinstance(label, Tensor):
                raise TypeError(f"labels[{name!r}] must be a tensor, got {type(label).__name__}; use torch.as_tensor")
        labels = {name: labels[name].detach() for name in sorted(labels)}
        system = self._system(compute_stress, batch)
        if system is None:
            return self._eager(batch, labels, compute_stress)
        tensors, layout = flatten(self.potential, system, compute_stress)
        count = len(tensors)

        def run(static: list[Tensor]) -> list[Tensor]:
            results = dict(zip(layout.results, evaluate(self.potential, layout, True, static[:count]), strict=True))
            value = self._value(results, dict(zip(labels, static[count:], strict=True)))
            return [value.detach(), self._gradient(value)]

        def eager() -> dict[str, Tensor]:
            value = self._eager(batch, labels, compute_stress)
            return {"loss": value.detach(), "gradient": self._gradient(value)}

        results = self._results(
            (layout, *labels),
            [*tensors, *labels.values()],
            system,
            run=run,
            finish=lambda found: dict(zip(("loss", "gradient"), found, strict=True)),
            eager=eager,
        )
        if results is None:
            return self._eager(batch, labels, compute_stress)
        loss: Tensor = _Loss.apply(results["loss"], results["gradient"], *self._parameters)  # type: ignore[no-untyped-call]  # torch's
        return loss

    def _compare(self, found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Compared for each parameter, because the gradients of some are small."""
        shapes = [parameter.shape for parameter in self._parameters]
        first, second = (
            {"loss": results["loss"]} | {str(n): g for n, g in enumerate(_pieces(results["gradient"], shapes))}
            for results in (found, wanted)
        )
        check_same(first, second, [], dtype)

    def _eager(self, batch: Data, labels: dict[str, Tensor], stress: bool) -> Tensor:
        return self._value(self.potential(batch, compute_stress=stress, create_graph=True), labels)

    def _value(self, results: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        value = self.loss(results, labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a tensor of one number, got {found}; take its mean or sum")
        return value.reshape(())

    def _gradient(self, value: Tensor) -> Tensor:
        """The gradients of all parameters, one after the other in one tensor."""
        return torch.cat([gradient.flatten() for gradient in parameter_gradients(value, self._parameters)])


class _Loss(torch.autograd.Function):
    """A loss whose gradients are already computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.shapes = [parameter.shape for parameter in parameters]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, *_pieces(cotangent * gradient, ctx.shapes)


def _pieces(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
