"""compile_potential: energy and forces as one compiled program, opt-in and checked against eager mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import Lock
from nbody_pyg.kernels.opaque import opaque_products
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import Potential
from nbody_pyg.renamed import renamed
from nbody_pyg.required import required
from nbody_pyg.runtime.static_eval import Layout, check_edges, check_same, evaluate, flatten, reason_of, recordable
from nbody_pyg.system import Species

MODES = ("md", "training")
#: While torch records a program, compiled programs cannot run in other threads of the process.
_COMPILER = Lock()


class CompiledPotential:
    r"""A potential whose evaluation is traced once, compiled by torch, and then run without Python.

    :meth:`~nbody_pyg.potential.Potential.evaluate`, with all its terms, is recorded as one graph of
    any number of atoms and edges (``make_fx``), in which the compiled products are single operators, and compiled by
    ``torch.compile``. For the first batch and the first batch of another size, the results are compared with eager
    mode: energies, forces, stress, and in mode "training" the gradients of all parameters. If tracing, compiling or the
    comparison fails, one warning gives the reason, and everything runs in eager mode from then on. No global setting of
    torch is changed. Threads may share a compiled potential; a process compiles and runs one program at a time.

    It is called like the potential. Batches that differ in kind from the first one (in their optional tensors, in sizes
    that are 0 or 1, in sizes that are equal) run in eager mode, and so does a potential whose model or terms were
    replaced. So do, without a warning, calls without forces,
    charges, terms that do not know all elements of the network, and networks with long range or on
    :class:`~nbody_pyg.hierarchy.SmoothSurvivors` (whose number of terms depends on the positions).

    Args:
        potential: the potential to compile; its model must be an :class:`~nbody_pyg.models.NBodyNet`. Its parameters
            are read at every call, so training works.
        mode: "md": no gradients of parameters; "training": results that a loss can be differentiated through. Calls
            with another value of ``create_graph`` run in eager mode.
        backend: of ``torch.compile``, e.g. "inductor" or "aot_eager".

    Smoothness: that of the potential. Cost: a minute or more for the first call.
    Raises: ValueError: an unknown mode. TypeError: another model than NBodyNet.
    """

    def __init__(self, potential: Potential, mode: str = "md", backend: str = "inductor") -> None:
        if mode not in MODES:
            raise ValueError(
                f"mode must be one of {', '.join(MODES)}, got {mode!r}; 'md' for forces, 'training' to fit"
            )
        if not isinstance(potential.model, NBodyNet):
            raise TypeError(f"potential must hold an NBodyNet to be compiled, got a {type(potential.model).__name__}")
        self.potential, self.mode, self.backend = potential, mode, backend
        self.failure: str | None = None
        self.calls = self.compiled_calls = 0
        self._programs: dict[tuple[Any, ...], _Program] = {}

    @renamed(training="create_graph")
    def __call__(self, *arguments: Any, create_graph: bool = False, **keywords: Any) -> dict[str, Tensor]:
        """Results of the potential for the same arguments."""
        forces = keywords.pop("compute_forces", True)
        stress = keywords.pop("compute_stress", False)
        flags = {"create_graph": create_graph, "compute_forces": forces, "compute_stress": stress}
        eager: Callable[[], dict[str, Tensor]] = partial(self.potential, *arguments, **flags, **keywords)
        with _COMPILER:
            self.calls += 1
        if self.failure is not None or create_graph != (self.mode == "training") or not forces:
            return eager()
        system = recordable(self.potential, stress, *arguments, **keywords)
        if system is None:
            return eager()
        # The program checks nothing and uses the numbers of the elements from here
        model = self.potential.model
        assert isinstance(model, NBodyNet)
        system = system.replace(species=Species(model.species, model.check_species(system.z)))
        tensors, layout = flatten(self.potential, system, stress)
        check_edges(system.topology)
        with _COMPILER:
            program = None if self.failure is not None else self._program(tensors, layout)
            if program is not None:
                try:
                    return self._run(program, tensors, eager)
                except Exception as error:  # a compiler may raise any error; eager mode always works
                    self._give_up(reason_of(error))
        return eager()

    def _program(self, tensors: Sequence[Tensor], layout: Layout) -> _Program | None:
        sizes = [size for tensor in tensors for size in tensor.shape]
        # Sizes of 0 and 1 broadcast, and equal sizes become one symbol: such a graph is correct for its kind only.
        kind = tuple(size if size < 2 else 2 + sizes.index(size) for size in sizes)
        key = (layout, kind, tensors[0].dtype, tensors[0].device)
        if not self._programs:
            self._programs[key] = _Program(self.potential, layout, self.mode == "training", self.backend)
        return self._programs.get(key)

    def _run(
        self, program: _Program, tensors: list[Tensor], eager: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        sizes = [tuple(tensor.shape) for tensor in tensors]
        known = sizes == program.seen or program.checks == 2
        # Eager mode first, so that cached tables are not made of a tracer's tensors
        wanted = None if known else eager()
        results = program(tensors)
        if not known:
            trained = [p for p in self.potential.parameters() if p.requires_grad] if program.training else []
            check_same(results, required(wanted), trained, required(self.potential.dtype))
            program.seen, program.checks = sizes, program.checks + 1
            # The comparison freed the graph of the results
            results = program(tensors)
        self.compiled_calls += 1
        return results

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        self._programs.clear()
        warnings.warn(f"compiling the potential failed ({reason}); it runs in eager mode", RuntimeWarning, stacklevel=3)

    def __repr__(self) -> str:
        state = "eager" if self.failure else f"{len(self._programs)} programs"
        return f"CompiledPotential({self.mode}, {state})"


def compile_potential(potential: Potential, mode: str = "md", backend: str = "inductor") -> CompiledPotential:
    """The potential as a compiled program; see :class:`CompiledPotential`."""
    return CompiledPotential(potential, mode, backend)


class _Program:
    """One traced and compiled evaluation: from a list of tensors to the results of the potential."""

    def __init__(self, potential: Potential, layout: Layout, training: bool, backend: str) -> None:
        self.potential, self.layout, self.training, self.backend = potential, layout, training, backend
        self.seen: list[tuple[int, ...]] | None = None
        self.checks = 0
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        if self._compiled is None:
            self._compiled = torch.compile(self._trace(tensors), dynamic=True, backend=self.backend)
        with torch.set_grad_enabled(self.training):
            return dict(zip(self.layout.results, self._compiled(*tensors), strict=True))

    def _trace(self, tensors: list[Tensor]) -> torch.fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        def run(*given: Tensor) -> list[Tensor]:
            return evaluate(self.potential, self.layout, self.training, given)

        # Parameters are constants of the graph; their sizes stay constant too
        with opaque_products():
            graph = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tensors)
        _check_sizes_are_free(graph, tensors)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


def _check_sizes_are_free(graph: torch.fx.GraphModule, tensors: Sequence[Tensor]) -> None:
    """If tracing made a size constant, kernels would write past the end of the tensors of other systems."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    for number, (node, tensor) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), tensors, strict=True)):
        for size, recorded in zip(tensor.shape, node.meta["val"].shape, strict=True):
            # Sizes below 2 are constants to a tracer; vectors have 3 components, edges 2 ends
            if size > 3 and is_concrete_int(recorded):
                raise ArithmeticError(f"the size {size} of tensor {number} became a constant of the recorded program")
