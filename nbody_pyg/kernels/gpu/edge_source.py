r"""Triton source of the edge product and its derivatives.

.. math:: T = \sum_e \sum_r g_{t(e) r}\, w_{p(r)} \sum_i M_{ri}\, x_{s(e) i}, \qquad
          M_{ri} = \sum_j c_{rij} Y_{ej}, \quad w_p = \sum_b B_{eb} W_{bp}

is linear in g, x, Y, B and W; a cotangent of a derivative replaces that factor: a for x, n for Y, d for B,
u for W. With N made from n as M from Y, and k = d W + B u, the functions below, plain or ``double`` (DOUBLE = 1) are

===================  =======================================  ==============================================
function             sums over                                double: derivative of the backward pass
===================  =======================================  ==============================================
one_body_targets     edges of a target: w M x                 w (M a + N x) + k M x
one_body_sources     edges of a source: w M g                 (w N + k M) g
one_body_edges       channels: of the harmonics and radial    the same with a and k in their places
one_body_weights     edges of a chunk: B g M x                B g (M a + N x) + d g M x
===================  =======================================  ==============================================

One program is one warp with a block of channels of one node. Registers are the limit: rows are computed in groups
(paths that lead to one degree), and a group's radial weights stay in registers over the loop over edges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from nbody_pyg.kernels.codegen import EdgeProduct, Term

#: Most radial weights, and most rows, of one group.
MAX_WEIGHTS, MAX_ROWS = 32, 24
#: Most groups in one kernel; with more, each group is a separate kernel. Compile time grows faster than linearly.
MAX_TOGETHER = 3


def groups_of(terms: Sequence[Term], basis: int) -> list[list[int]]:
    """Paths of each group: neighbours in the order of their rows, as many as the registers hold."""
    rows: dict[int, set[int]] = defaultdict(set)
    for term in terms:
        rows[term.path].add(term.row)
    order = sorted(rows, key=lambda path: min(rows[path]))
    groups: list[list[int]] = []
    for path in order:
        last = groups[-1] if groups else []
        same = bool(last) and len(rows[last[-1]]) == len(rows[path])
        fits = (len(last) + 1) * basis <= MAX_WEIGHTS and (len(last) + 1) * len(rows[path]) <= MAX_ROWS
        if same and fits:
            last.append(path)
        else:
            groups.append([path])
    return groups


def apart(groups: int) -> bool:
    """Whether every group is a separate kernel, chosen by the constant GROUP, instead of a branch at run time."""
    return groups > MAX_TOGETHER


class _Emitter:
    """Pieces of code for one coupling table; all code of a function is indented by its caller."""

    def __init__(self, product: EdgeProduct) -> None:
        terms, self.rows_in, self.harmonics, self.rows_out, self.paths, self.basis = product
        self.groups = groups_of(terms, self.basis)
        self.group = "GROUP" if apart(len(self.groups)) else "group"
        self.entries: dict[tuple[int, int], list[Term]] = defaultdict(list)
        for term in terms:
            self.entries[term.row, term.i].append(term)
        self.columns: dict[int, list[int]] = defaultdict(list)
        for row, i in self.entries:
            self.columns[row].append(i)
        self.rows = {p: sorted({t.row for t in terms if t.path == p}) for p in range(self.paths)}
        self.used = sorted({t.i for t in terms})

    # ------------------------------------------------------------------ pieces
    def hoisted(self, group: list[int]) -> bool:
        """Whether the radial weights of a group stay in registers."""
        return len(group) * self.basis <= MAX_WEIGHTS

    def inputs(self, group: list[int]) -> list[int]:
        return sorted({i for p in group for r in self.rows[p] for i in self.columns[r]})

    def weight(self, p: int, b: int, pointer: str = "W") -> str:
        return f"tl.load({pointer} + {b * self.paths + p} * C + c, mask=m, other=0.0)"

    def weights(self, group: list[int]) -> list[str]:
        if not self.hoisted(group):
            return []
        return [f"w{p}_{b} = {self.weight(p, b)}" for p in group for b in range(self.basis)]

    def w(self, p: int, b: int) -> str:
        return f"w{p}_{b}"

    def features(self, double: bool) -> list[str]:
        """Harmonics and radial functions of the edge, one number each for all lanes."""
        pairs = [("Y", "Y", self.harmonics), ("B", "B", self.basis)]
        if double:
            pairs += [("N", "n", self.harmonics), ("D", "d", self.basis)]
        return [
            f"{name}{k} = tl.load({pointer} + e * {size} + {k})" for name, pointer, size in pairs for k in range(size)
        ]

    def matrix(self, group: list[int], name: str, source: str) -> list[str]:
        lines = []
        for p in group:
            for r in self.rows[p]:
                for i in self.columns[r]:
                    total = _sum(f"{t.value!r} * {source}{t.j}" for t in self.entries[r, i])
                    lines.append(f"{name}{r}_{i} = {total}")
        return lines

    def radial(self, p: int, double: bool, group: list[int]) -> list[str]:
        """q = w_p, and k = k_p: the radial weights of one path."""
        load = [] if self.hoisted(group) else [f"w{p}_{b} = {self.weight(p, b)}" for b in range(self.basis)]
        lines = [*load, f"q{p} = " + _sum(f"B{b} * {self.w(p, b)}" for b in range(self.basis))]
        if double:
            lines.append(f"k{p} = " + _sum(f"D{b} * {self.w(p, b)}" for b in range(self.basis)))
            lines.append("if HAS_U:")
            lines += [f"    k{p} += B{b} * {self.weight(p, b, 'u')}" for b in range(self.basis)]
        return lines

    def dot(self, matrix: str, state: str, r: int) -> str:
        return _sum(f"{matrix}{r}_{i} * {state}{i}" for i in self.columns[r])

    def states(self, name: str, pointer: str, node: str, rows: Sequence[int], size: int) -> list[str]:
        return [
            f"{name}{r} = tl.load({pointer} + {node} * ({size} * C) + {r} * C + c, mask=m, other=0.0)" for r in rows
        ]

    # ------------------------------------------------------------------ functions
    def targets(self, double: bool) -> str:
        body = []
        for n, group in enumerate(self.groups):
            rows = [r for p in group for r in self.rows[p]]
            body += [f"if {self.group} == {n}:", *_indent(self.weights(group) + _zeros("o", rows))]
            loop = [*self.features(double), *self.states("x", "x", "node", self.inputs(group), self.rows_in)]
            loop += self.matrix(group, "M", "Y")
            if double:
                loop += self.states("a", "a", "node", self.inputs(group), self.rows_in) + self.matrix(group, "N", "N")
            for p in group:
                loop += self.radial(p, double, group)
                for r in self.rows[p]:
                    if double:
                        both = f"{self.dot('M', 'a', r)} + {self.dot('N', 'x', r)}"
                        loop.append(f"o{r} += q{p} * ({both}) + k{p} * ({self.dot('M', 'x', r)})")
                    else:
                        loop.append(f"o{r} += q{p} * ({self.dot('M', 'x', r)})")
            body += _indent(_loop("source", loop))
            body += _indent([f"tl.store(out + {r} * C + c, o{r}, mask=m)" for r in rows])
        head = ["group = tl.program_id(2)", f"out += (part * nodes + here) * ({self.rows_out} * C)"]
        return _function(f"one_body_targets{'_double' if double else ''}", _arguments("out", double), head + body)

    def sources(self, double: bool) -> str:
        zero, separate = "tl.zeros([CB], out.dtype.element_ty)", self.group == "GROUP"
        store = [
            f"tl.store(out + {i} * C + c, {f'o{i}' if i in self.used else zero}, mask=m)" for i in range(self.rows_in)
        ]
        body = _zeros("o", self.used)
        for n, group in enumerate(self.groups):
            loop = [*self.features(double), *self.matrix(group, "M", "Y")]
            loop += self.matrix(group, "N", "N") if double else []
            for p in group:
                loop += self.radial(p, double, group)
                loop += self.states("g", "g", "node", self.rows[p], self.rows_out)
                for r in self.rows[p]:
                    loop.append(f"h = q{p} * g{r}")
                    loop += [f"f = k{p} * g{r}"] if double else []
                    for i in self.columns[r]:
                        loop.append(f"o{i} += N{r}_{i} * h + M{r}_{i} * f" if double else f"o{i} += M{r}_{i} * h")
            lines = self.weights(group) + _loop("target", loop)
            body += [f"if GROUP == {n}:", *_indent(lines)] if separate else lines
        plane = "(GROUP * split + part)" if separate else "part"
        head = [f"out += ({plane} * nodes + here) * ({self.rows_in} * C)"]
        name = f"one_body_sources{'_double' if double else ''}"
        return _function(name, _arguments("out", double), head + body + store)

    def slopes(self, p: int, double: bool) -> list[str]:
        """s = g.(M x) (double: g.z with z = M a + N x, and v = g.(M x)) of one path."""
        lines = []
        for r in self.rows[p]:
            lines.append(f"y{r} = {self.dot('M', 'x', r)}")
            if double:
                lines.append(f"z{r} = {self.dot('M', 'a', r)} + {self.dot('N', 'x', r)}")
        lines.append(f"s{p} = " + _sum(f"g{r} * {'z' if double else 'y'}{r}" for r in self.rows[p]))
        if double:
            lines.append(f"v{p} = " + _sum(f"g{r} * y{r}" for r in self.rows[p]))
        return lines

    def edges(self, double: bool) -> str:
        body = []
        for n, group in enumerate(self.groups):
            rows, inputs = [r for p in group for r in self.rows[p]], self.inputs(group)
            loop = [*self.features(double), *self.states("x", "x", "node", inputs, self.rows_in)]
            loop += self.matrix(group, "M", "Y")
            if double:
                loop += self.states("a", "a", "node", inputs, self.rows_in) + self.matrix(group, "N", "N")
            loop += [f"G{j} = tl.zeros([CB], out.dtype.element_ty)" for j in range(self.harmonics)]
            loop += [f"R{b} = tl.zeros([CB], out.dtype.element_ty)" for b in range(self.basis)]
            for p in group:
                loop += self.radial(p, double, group) + self.slopes(p, double)
                loop += [f"R{b} += s{p} * {self.w(p, b)}" for b in range(self.basis)]
                if double:
                    loop.append("if HAS_U:")
                    loop += [f"    R{b} += v{p} * {self.weight(p, b, 'u')}" for b in range(self.basis)]
                for r in self.rows[p]:
                    loop.append(f"h = q{p} * g{r}")
                    loop += [f"f = k{p} * g{r}"] if double else []
                    for i in self.columns[r]:
                        loop.append(f"t = h * a{i} + f * x{i}" if double else f"t = h * x{i}")
                        loop += [f"G{t.j} += {t.value!r} * t" for t in self.entries[r, i]]
            loop += [
                f"tl.store(out + (plane * edges + e) * {self.harmonics + self.basis} + {k}, tl.sum({name}, axis=0))"
                for k, name in enumerate(
                    [f"G{j}" for j in range(self.harmonics)] + [f"R{b}" for b in range(self.basis)]
                )
            ]
            first = self.weights(group) + self.states("g", "g", "here", rows, self.rows_out)
            body += [f"if {self.group} == {n}:", *_indent(first + _loop("source", loop))]
        head = [
            "group = tl.program_id(2)",
            f"plane = ({self.group} * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)",
        ]
        return _function(f"one_body_edges{'_double' if double else ''}", _arguments("out, edges", double), head + body)

    def weight_gradients(self, double: bool) -> str:
        body = []
        for n, group in enumerate(self.groups):
            rows, inputs = [r for p in group for r in self.rows[p]], self.inputs(group)
            loop = ["e = tl.load(edge + k).to(tl.int64)", "node = tl.load(source + k).to(tl.int64)"]
            loop += ["goal = tl.load(target + k).to(tl.int64)", *self.features(double)]
            loop += self.states("x", "x", "node", inputs, self.rows_in) + self.matrix(group, "M", "Y")
            if double:
                loop += self.states("a", "a", "node", inputs, self.rows_in) + self.matrix(group, "N", "N")
            loop += self.states("g", "g", "goal", rows, self.rows_out)
            for p in group:
                loop += self.slopes(p, double)
                extra = f" + D{{b}} * v{p}" if double else ""
                loop += [f"o{p}_{b} += B{b} * s{p}" + extra.format(b=b) for b in range(self.basis)]
            names = [f"{p}_{b}" for p in group for b in range(self.basis)]
            store = [
                f"tl.store(out + {b * self.paths + p} * C + c, o{p}_{b}, mask=m)"
                for p in group
                for b in range(self.basis)
            ]
            body += [f"if {self.group} == {n}:", *_indent([*_zeros("o", names), "for k in range(begin, end):"])]
            body += _indent(_indent(loop)) + _indent(store)
        head = [
            "part = tl.program_id(0).to(tl.int64)",
            "c = tl.program_id(1) * CB + tl.arange(0, CB)",
            "m = c < C",
            "group = tl.program_id(2)",
            "begin = part * length",
            "end = tl.minimum(begin + length, edges)",
            f"out += part * ({self.basis * self.paths} * C)",
        ]
        given = "a, n, d, " if double else ""
        arguments = f"out, g, x, Y, B, {given}edge, source, target, edges, length"
        return _define(f"one_body_weights{'_double' if double else ''}", arguments, head + body)


def _sum(parts: Iterable[str]) -> str:
    return " + ".join(parts)


def _indent(lines: Sequence[str]) -> list[str]:
    return ["    " + line for line in lines]


def _zeros(name: str, keys: Iterable[object]) -> list[str]:
    return [f"{name}{key} = tl.zeros([CB], out.dtype.element_ty)" for key in keys]


def _loop(end: str, body: list[str]) -> list[str]:
    """A loop over the edges of this node; ``node`` is the other end. The next edge is loaded one iteration early."""
    lookup = "tl.load({} + {}, mask={}, other=0)"
    return [
        f"e_next = {lookup.format('edge', 'begin', 'begin < end')}",
        f"node_next = {lookup.format(end, 'begin', 'begin < end')}",
        "for k in range(begin, end, split):",
        *_indent(["e = e_next.to(tl.int64)", "node = node_next.to(tl.int64)", "after = k + split"]),
        *_indent([f"e_next = {lookup.format('edge', 'after', 'after < end')}"]),
        *_indent([f"node_next = {lookup.format(end, 'after', 'after < end')}"]),
        *_indent(body),
    ]


def _arguments(out: str, double: bool) -> str:
    return f"{out}, g, x, Y, B, W{', a, n, d, u' if double else ''}, ptr, edge, source, target, nodes, split"


def _define(name: str, arguments: str, body: list[str]) -> str:
    head = f"@triton.jit\ndef {name}({arguments}, C: tl.constexpr, CB: tl.constexpr, HAS_U: tl.constexpr, GROUP: tl.constexpr):"
    return "\n".join([head, *_indent(body), ""])


def _function(name: str, arguments: str, body: list[str]) -> str:
    """A function with one program for each (node and part of its edges, block of channels)."""
    head = [
        "here = (tl.program_id(0) // split).to(tl.int64)",
        "part = (tl.program_id(0) % split).to(tl.int64)",
        "c = tl.program_id(1) * CB + tl.arange(0, CB)",
        "m = c < C",
        "begin = tl.load(ptr + here) + part.to(tl.int32)",
        "end = tl.load(ptr + here + 1)",
    ]
    return _define(name, arguments, head + body)


def one_body_source(product: EdgeProduct) -> str:
    """All functions of one coupling table."""
    emit = _Emitter(product)
    kinds = (emit.targets, emit.sources, emit.edges, emit.weight_gradients)
    return "\n\n".join(kind(double) for kind in kinds for double in (False, True))
