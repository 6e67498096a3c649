"""The channelwise product of node states on a GPU: source and launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor

from nbody_pyg.kernels.codegen import Term
from nbody_pyg.kernels.gpu.build import Program
from nbody_pyg.kernels.gpu.grid import channel_block, warps
from nbody_pyg.kernels.ops import ProductOperation

#: More coefficients than this would take minutes to compile.
MAX_TERMS = 2000


def product_source(terms: Sequence[Term], rows1: int, rows2: int, rows_out: int) -> str:
    """out_r = sum c x_i y_j, its two gradients, and the derivative of those; one program is one node.

    Memory bandwidth is the limit, so rows of the result are computed one after the other and little is kept in
    registers.
    """
    by_row: dict[int, list[Term]] = defaultdict(list)
    for term in terms:
        by_row[term.row].append(term)
    used1, used2 = sorted({t.i for t in terms}), sorted({t.j for t in terms})

    def load(name: str, pointer: str, rows: Iterable[int], size: int) -> list[str]:
        return [f"{name}{r} = tl.load({pointer} + n * ({size} * C) + {r} * C + c, mask=m, other=0.0)" for r in rows]

    def store(pointer: str, row: int, size: int, value: str) -> str:
        return f"tl.store({pointer} + n * ({size} * C) + {row} * C + c, {value}, mask=m)"

    def function(name: str, arguments: str, body: list[str]) -> str:
        head = [f"@triton.jit\ndef product_{name}({arguments}, C: tl.constexpr, CB: tl.constexpr):",
                "n = tl.program_id(0).to(tl.int64)",
                "c = tl.program_id(1) * CB + tl.arange(0, CB)", "m = c < C"]  # fmt: skip
        return "\n    ".join(head + body) + "\n"

    zero = "tl.zeros([CB], x.dtype.element_ty)"
    states = load("x", "x", used1, rows1) + load("y", "y", used2, rows2)
    forward = list(states)
    for r in range(rows_out):
        total = " + ".join(f"{t.value!r} * (x{t.i} * y{t.j})" for t in by_row[r]) or zero
        forward.append(store("out", r, rows_out, total))

    def gradients(double: bool) -> list[str]:
        lines = list(states)
        if double:
            lines += load("a", "a", used1, rows1) + load("b", "b", used2, rows2)
        lines += [f"p{i} = {zero}" for i in range(rows1)] + [f"q{j} = {zero}" for j in range(rows2)]
        first, second = ("b", "a") if double else ("y", "x")
        for r in range(rows_out):
            lines += load("g", "g", [r], rows_out)
            for t in by_row[r]:
                lines.append(f"s = {t.value!r} * g{r}")
                lines += [f"p{t.i} += s * {first}{t.j}", f"q{t.j} += s * {second}{t.i}"]
            if double:
                parts = (f"{t.value!r} * (a{t.i} * y{t.j} + x{t.i} * b{t.j})" for t in by_row[r])
                lines.append(store("gg", r, rows_out, " + ".join(parts) or zero))
        lines += [store("gx", i, rows1, f"p{i}") for i in range(rows1)]
        return lines + [store("gy", j, rows2, f"q{j}") for j in range(rows2)]

    return "\n\n".join([
        function("forward", "x, y, out", forward),
        function("backward", "g, x, y, gx, gy", gradients(False)),
        function("double", "g, x, y, a, b, gg, gx, gy", gradients(True)),
    ])  # fmt: skip


class ProductProgram(ProductOperation):
    """The product in Triton, with the arguments of :class:`nbody_pyg.kernels.ops.ProductKernel`."""

    recordable = False

    def __init__(self, terms: Sequence[Term], rows1: int, rows2: int, rows_out: int, channels: int) -> None:
        super().__init__(rows1, rows2, rows_out, channels)
        self.too_long = len(terms) > MAX_TERMS
        self.program = Program(product_source, terms, rows1, rows2, rows_out)

    def _call(self, name: str, *tensors: Tensor) -> None:
        block = channel_block(self.channels, tensors[0].element_size())
        grid = (tensors[0].shape[0], -(-self.channels // block))
        self.program.launch(name, grid, *tensors, C=self.channels, CB=block, num_warps=warps(block))
