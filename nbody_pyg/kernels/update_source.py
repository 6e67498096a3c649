r"""C source of the update of a part: everything between the sums over edges and the new state, in one pass.

With :math:`x_i` the inputs of a part (density, messages, old state), all maps W, V, L, M blockwise and linear, and
:math:`P_k` channelwise products:

.. math::
    a = s_z \sum_i W_i x_i, \qquad n = \rho\, a, \qquad \rho = (1 + \mathrm{mean}\, a^2)^{-1/2}, \qquad
    q_1 = n, \quad q_k = M_k P_k(q_{k-1}, n), \qquad
    o = L n + \sum_{k \ge 2} q_k + \sum_i V_i x_i + b_z

The derivative of the backward pass with respect to its inputs is the derivative of :math:`\langle g, \dot o \rangle`,
where
:math:`\dot o` is the change of the result along the cotangents :math:`\dot x_i` (a forward pass of tangents), taken
in reverse. In the code a dot over a symbol is written ``t``, a bar (cotangent) ``c``, and the derivative of that scalar
with respect to a variable ``d``. Parts are processed in tiles that fit into the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nbody_pyg.kernels.panels import LINKED, ROWS


class Block(NamedTuple):
    """One degree: ``dim`` components per node, ``size_in`` numbers each at row ``row_in`` give ``size_out`` at ``row_out``.

    Rows are counted in channels of the input and of the result.
    """

    row_in: int
    row_out: int
    dim: int
    size_in: int
    size_out: int


@dataclass(frozen=True)
class Map:
    """A blockwise linear map between states of these sizes (numbers per node, channels)."""

    blocks: tuple[Block, ...]
    size_in: int
    channels_in: int
    size_out: int
    channels_out: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(b.size_in, b.size_out) for b in self.blocks]

    @property
    def rows_in(self) -> int:
        return self.size_in // self.channels_in


@dataclass(frozen=True)
class Product:
    """A product with ``rows`` path rows and the map that follows it."""

    rows: int
    mix: Map


@dataclass(frozen=True)
class Update:
    """What an update is made of.

    ===============  ==========================================================================================
    field            meaning
    ===============  ==========================================================================================
    rows, channels   of the summed state a
    rows_out         of the result; its channels are those of a
    inputs           numbers per node of each input
    gather           one map W_i per input, or None
    carry            one map V_i per input, or None
    linear           L
    products         P_k and M_k, k = 2, 3, ...; all but the last map into ``rows``, the last into ``rows_out``
    keep             rows of the state that are in the result
    degree_of_row    block of ``rows`` that a row belongs to, where there are factors s_z; empty: none
    norm, bias       whether there are a norm and constants b_z
    ===============  ==========================================================================================
    """

    rows: int
    channels: int
    rows_out: int
    inputs: tuple[int, ...]
    gather: tuple[Map | None, ...]
    carry: tuple[Map | None, ...]
    linear: Map
    products: tuple[Product, ...]
    keep: tuple[int, ...]
    degree_of_row: tuple[int, ...] = ()
    norm: bool = True
    bias: bool = True
    maps: list[Map] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        chain = [product.mix for product in self.products]
        self.maps.extend(m for m in (*self.gather, *self.carry, self.linear, *chain) if m is not None)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices, in the order in which they are passed."""
        return [shape for m in self.maps for shape in m.shapes]

    @property
    def tile(self) -> int:
        """Parts per tile: the widest product of a tile takes about 64 kB in float32."""
        widest = max([product.rows for product in self.products] + [self.rows]) * self.channels
        return max(1, min(32, 16384 // widest))


#: Smallest block of parts for a thread.
_GRAIN = 32
#: Functions from the library of a product, with the number of their arrays.
PRODUCT_FUNCTIONS = {"forward": 3, "backward": 5, "double": 8}

_TYPES = """
#include <math.h>
#include <string.h>
typedef struct { int64_t start_in, start_out, dim, K, D; } Block;
static real dot(const real* a, const real* b, int64_t n) {
  vec s = {0}; int64_t i = 0; real t = 0;
  for (; i + WIDTH <= n; i += WIDTH) s += *(const vec*)(a + i) * *(const vec*)(b + i);
  for (; i < n; i++) t += a[i] * b[i];
  return t + vec_total(s);
}
/* y += f x */
static void add(real* y, real f, const real* x, int64_t n) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) *(vec*)(y + i) += f * *(const vec*)(x + i);
  for (; i < n; i++) y[i] += f * x[i];
}
/* y += f x */
static void add_product(real* y, const real* f, const real* x, int64_t n) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) *(vec*)(y + i) += *(const vec*)(f + i) * *(const vec*)(x + i);
  for (; i < n; i++) y[i] += f[i] * x[i];
}
static void clear(real* x, int64_t n) { memset(x, 0, n * sizeof(real)); }
#define ROWS(p, x, stride, size) const real* p[TILE * q.dim]; rows_of(p, x, stride, size, q.dim, nodes);
#define EACH_BLOCK for (int64_t b = 0; b < count; b++) { const Block q = block[b]; \\
  ROWS(in, x + q.start_in, xs, q.K) ROWS(out, z + q.start_out, zs, q.D)
static void apply(int64_t nodes, int64_t count, const Block* block, const real* const* W, const real* x, int64_t xs, real* z, int64_t zs) {
  EACH_BLOCK rows_apply(nodes * q.dim, q.K, q.D, in, W[b], (real* const*)out); }
}
static void back(int64_t nodes, int64_t count, const Block* block, real* const* T, real* x, int64_t xs, const real* z, int64_t zs) {
  EACH_BLOCK rows_apply(nodes * q.dim, q.D, q.K, out, T[b], (real* const*)in); }
}
static void outer(int64_t nodes, int64_t count, const Block* block, real* const* W, const real* x, int64_t xs, const real* z, int64_t zs) {
  EACH_BLOCK rows_outer(nodes * q.dim, q.K, q.D, in, out, W[b]); }
}
"""

_SUMS = """
/* First part of a block. Blocks are whole tiles: the bits of a result depend on which parts go through together. */
static int64_t start(int64_t b, int64_t blocks, int64_t N) {
  const int64_t first = (N + TILE - 1) / TILE * b / blocks * TILE;
  return first < N ? first : N;
}
/* Gradients of weights of one block of parts, in memory that starts at ``room``; returns what comes behind. */
typedef struct { real* W[MATRICES]; real *s, *bias; } Sums;
static real* fresh_sums(Sums* own, real* room) {
  real* p = room;
  for (int i = 0; i < MATRICES; i++) { own->W[i] = p; p += sizes[i]; }
  own->s = p; p += SCALES; own->bias = p; p += BIASES;
  clear(room, p - room);
  return p;
}
"""

_SCALE = """
/* y += s_z x, for the species of each node */
static void scale(int64_t nodes, const int64_t* species, const real* s, const real* x, real* y) {
  for (int64_t n = 0; n < nodes; n++) for (int64_t r = 0; r < R; r++)
    add_product(y + n * A + r * C, s + (species[n] * DEGREES + degree[r]) * C, x + n * A + r * C, C);
}
/* derivative by s: += x y */
static void scale_outer(int64_t nodes, const int64_t* species, real* s, const real* x, const real* y) {
  for (int64_t n = 0; n < nodes; n++) for (int64_t r = 0; r < R; r++)
    add_product(s + (species[n] * DEGREES + degree[r]) * C, x + n * A + r * C, y + n * A + r * C, C);
}
"""


def update_source(update: Update, num_species: int, linked: bool = True, second: bool = True) -> str:
    """Functions ``update_forward``, ``update_backward`` and ``update_double``, see the module docstring.

    Without ``linked``, the code around it defines ``rows_apply``, ``rows_outer`` and the functions ``productK_forward`` and
    ``productK_backward`` of each product; without ``second`` there is no ``update_double``.
    """
    return _Writer(update, num_species).source(linked, second)


class _Writer:
    def __init__(self, update: Update, num_species: int) -> None:
        self.u, self.num_species = update, num_species
        self.last = len(update.products) + 1  # degree of the last product
        self.first_weight: dict[int, int] = {}
        count = 0
        for number, m in enumerate(update.maps):
            self.first_weight[number] = count
            count += len(m.blocks)
        self.num_matrices = count
        # Positions in update.maps, in the order of its __post_init__
        numbers = iter(range(len(update.maps)))
        self.gather = [None if m is None else next(numbers) for m in update.gather]
        self.carry = [None if m is None else next(numbers) for m in update.carry]
        self.linear = next(numbers)
        self.mix = {k: next(numbers) for k in range(2, self.last + 1)}

    # ------------------------------------------------------------------ pieces
    def _arguments(self, number: int) -> str:
        m = self.u.maps[number]
        return f"nodes, {len(m.blocks)}, blocks{number}"

    def apply(self, number: int, x: str, z: str) -> str:
        m, w = self.u.maps[number], self.first_weight[number]
        return f"apply({self._arguments(number)}, W + {w}, {x}, {m.size_in}, {z}, {m.size_out});"

    def back(self, number: int, x: str, z: str) -> str:
        m, w = self.u.maps[number], self.first_weight[number]
        return f"back({self._arguments(number)}, T + {w}, {x}, {m.size_in}, {z}, {m.size_out});"

    def outer(self, number: int, x: str, z: str) -> str:
        m, w = self.u.maps[number], self.first_weight[number]
        return f"outer({self._arguments(number)}, gW + {w}, {x}, {m.size_in}, {z}, {m.size_out});"

    def product(self, k: int, what: str, *pointers: str) -> str:
        return f"product{k}_{what}(nodes, C, {', '.join(pointers)});"

    def state(self, k: int) -> str:
        """The factor q_k of the next product: n itself for k = 1, kept by the forward pass for the others."""
        return "n" if k == 1 else f"(Q + ({k - 2} * N + first) * A)"

    def keep(self, source: str, target: str, spread: bool = False) -> str:
        """Add rows of a full state to a result, or with ``spread`` the other way round."""
        if self.u.keep == tuple(range(len(self.u.keep))):  # leading rows: one stretch
            return (
                f"for (int64_t i = 0; i < nodes; i++) add({target} + i * {'A' if spread else 'O'}, 1, "
                f"{source} + i * {'O' if spread else 'A'}, O);"
            )
        at = "keep[r]", "r"
        to, of = at if spread else at[::-1]
        return (
            f"for (int64_t i = 0; i < nodes; i++) for (int64_t r = 0; r < O / C; r++) add({target} + i * "
            f"{'A' if spread else 'O'} + {to} * C, 1, {source} + i * {'O' if spread else 'A'} + {of} * C, C);"
        )

    # ------------------------------------------------------------------ functions
    def source(self, linked: bool, second: bool) -> str:
        u = self.u
        degrees = max(u.degree_of_row, default=-1) + 1
        tables = [
            f"static const Block blocks{i}[] = {{"
            + ", ".join(
                f"{{{b.row_in * m.channels_in}, {b.row_out * m.channels_out}, {b.dim}, {b.size_in}, {b.size_out}}}"
                for b in m.blocks
            )
            + "};"
            for i, m in enumerate(u.maps)
        ]
        sizes = ", ".join(str(a * b) for a, b in u.shapes)
        head = [
            f"enum {{ R = {u.rows}, C = {u.channels}, A = R * C, O = {u.rows_out} * C, TILE = {u.tile}, "
            f"DEGREES = {degrees}, LINKS = {2 + 3 * len(u.products)}, MATRICES = {self.num_matrices}, "
            f"SCALES = {self.num_species * degrees} * C, BIASES = {self.num_species} * C, GRAIN = {_GRAIN}, "
            f"WORK = {self.workspace()} }};",
            f"static const int64_t sizes[] = {{{sizes}}}, keep[] = {{{', '.join(map(str, u.keep))}}};",
            f"static const int64_t degree[] = {{{', '.join(map(str, u.degree_of_row)) or '0'}}};",
        ]
        products = [
            f"#define product{k}_{what} ((void (*)(int64_t, int64_t{', real*' * pointers}))linked[{3 * k - 4 + n}])"
            for k in range(2, self.last + 1)
            for n, (what, pointers) in enumerate(PRODUCT_FUNCTIONS.items())
        ]
        body = [self.prepare(), self.forward(), self.backward(), *([self.double()] if second else [])]
        head += [LINKED, *products] if linked else [ROWS]
        return "\n".join([*head, _TYPES, _SUMS, *tables, _SCALE if degrees else "", *body])

    def prepare(self) -> str:
        """a and n of a tile, and the transposed matrices."""
        scaled = "scale(nodes, species, s, sum, a);" if self.u.degree_of_row else "add(a, 1, sum, nodes * A);"
        norm = "rho[i] = 1 / sqrt(1 + dot(a + i * A, a + i * A, A) / A);" if self.u.norm else "rho[i] = 1;"
        transposes = [
            f"transpose({a}, {b}, W[{i}], T[{i}] = work); work += {a * b};" for i, (a, b) in enumerate(self.u.shapes)
        ]
        return f"""
static void normalize(int64_t nodes, const int64_t* species, const real* s, const real* sum, real* a, real* rho, real* n) {{
  clear(a, nodes * A); {scaled} clear(n, nodes * A);
  for (int64_t i = 0; i < nodes; i++) {{ {norm} add(n + i * A, rho[i], a + i * A, A); }}
}}
static real* turn(const real* const* W, real** T, real* work) {{
  {" ".join(transposes)}
  return work;
}}
/* cotangent of a from that of n; for tangents the same map, which is symmetric */
static void through_norm(int64_t nodes, const real* a, const real* rho, const real* cn, real* ca) {{
  for (int64_t i = 0; i < nodes; i++) {{
    add(ca + i * A, rho[i], cn + i * A, A);
    {"const real f = rho[i] * rho[i] * rho[i] / A; add(ca + i * A, -f * dot(a + i * A, cn + i * A, A), a + i * A, A);" if self.u.norm else ""}
  }}
}}"""

    def _function(self, name: str, arguments: list[str], buffers: dict[str, str], lines: list[str], turn: bool) -> str:
        """One pass over tiles, divided among threads; ``buffers`` are parts of the workspace of each.

        Gradients of weights are sums over parts: blocks of parts have separate sums, which are added in order.
        """
        setup = [f"  real* {name} = work; work += TILE * {size};" for name, size in buffers.items()]
        given = ["const int64_t* all_species", "const real* const* X", "const real* const* W", "const real* s",
                 "const real* bias", "real* work", *arguments]  # fmt: skip
        turned = ["real* const* T"] if turn else []
        body = "\n".join([
            f"static void {name}_rows(int64_t begin, int64_t end, int64_t N, {', '.join([*turned, *given])}) {{",
            *setup,
            "  for (int64_t first = begin; first < end; first += TILE) {",
            "    const int64_t nodes = end - first < TILE ? end - first : TILE, *species = all_species + first;",
            *[f"    const real* x{i} = X[{i}] + first * {size};" for i, size in enumerate(self.u.inputs)],
            *[f"    {line}" for line in lines],
            "  }", "}",
        ])  # fmt: skip
        names = [text.rpartition(" ")[2].lstrip("*") for text in [*turned, *given]]
        sums = {"gW", "gs", "gbias"}.intersection(names)
        weigh = "gW != 0" if sums else "0"
        inside = [{"work": "mine", "gW": "own.W", "gs": "own.s", "gbias": "own.bias"}.get(n, n) for n in names]
        add = "".join(
            f" if ({n}) add_up({n}, own.{n[1:]}, {size});"
            for n, size in (("gs", "SCALES"), ("gbias", "BIASES"))
            if n in sums
        )
        # Threads share the transposed matrices, which lie before the memory of the first one
        transposes = "real* T[MATRICES]; work = turn(W, T, work);" if turn else ""
        return f"""{body}
void {name}(int64_t threads, int64_t N, int64_t workers, {", ".join(given)}) {{
  const int64_t blocks = blocks_of(N, GRAIN), weigh = {weigh};
  {transposes}
  if (blocks < 2 || (workers < 2 && !weigh)) {{ {name}_rows(0, N, N, {", ".join(names)}); return; }}
  if (!weigh) {{
    #pragma omp parallel for schedule(static) num_threads(team(workers, blocks))
    for (int64_t b = 0; b < blocks; b++) {{
      real* mine = work + omp_get_thread_num() * WORK;
      {name}_rows(start(b, blocks, N), start(b + 1, blocks, N), N, {", ".join("mine" if n == "work" else n for n in names)});
    }}
    return;
  }}
  {self._summed(name, inside, add) if sums else ""}
}}"""

    def _summed(self, name: str, arguments: list[str], add: str) -> str:
        return f"""#pragma omp parallel for ordered schedule(static, 1) num_threads(team(workers, blocks))
  for (int64_t b = 0; b < blocks; b++) {{
    real* mine = work + omp_get_thread_num() * WORK;
    Sums own;
    mine = fresh_sums(&own, mine);
    {name}_rows(start(b, blocks, N), start(b + 1, blocks, N), N, {", ".join(arguments)});
    #pragma omp ordered
    {{ for (int i = 0; i < MATRICES; i++) add_up(gW[i], own.W[i], sizes[i]);{add} }}
  }}"""

    @property
    def _wide(self) -> str:
        return str(max([p.rows for p in self.u.products], default=1) * self.u.channels)

    def _rows(self, k: int) -> str:
        """Numbers per node of the product P_k."""
        return f"{self.u.products[k - 2].rows} * C"

    def forward(self) -> str:
        u = self.u
        lines = ["real *sum = sums + first * A, *o = out + first * O;", "clear(sum, nodes * A); clear(o, nodes * O);"]
        lines += [self.apply(m, f"x{i}", "sum") for i, m in enumerate(self.gather) if m is not None]
        lines += ["normalize(nodes, species, s, sum, a, rho, n);", self.apply(self.linear, "n", "o")]
        for k in range(2, self.last + 1):
            lines.append(self.product(k, "forward", self.state(k - 1), "n", "p"))
            if k == self.last:
                lines.append(self.apply(self.mix[k], "p", "o"))
            else:
                q = self.state(k)
                lines += [f"clear({q}, nodes * A);", self.apply(self.mix[k], "p", q), self.keep(q, "o")]
        lines += [self.apply(m, f"x{i}", "o") for i, m in enumerate(self.carry) if m is not None]
        if u.bias:
            lines.append("for (int64_t i = 0; i < nodes; i++) add(o + i * O, 1, bias + species[i] * C, C);")
        buffers = {"rho": "1", "a": "A", "n": "A", "p": self._wide}
        return self._function("update_forward", ["real* sums", "real* Q", "real* out"], buffers, lines, turn=False)

    def _reverse(self, weights: bool) -> list[str]:
        """Cotangents of the plain forward pass: cn of n, cp_k of P_k, cq_k of q_k; with ``weights`` also of the M_k."""
        lines = ["clear(cn, nodes * A);", self.back(self.linear, "cn", "g")]
        for k in range(self.last, 1, -1):
            cotangent = "g" if k == self.last else f"cq{k}"
            lines += [f"clear(cp{k}, nodes * {self._rows(k)});", self.back(self.mix[k], f"cp{k}", cotangent)]
            if weights:
                lines.append(f"if (gW) {{ {self.product(k, 'forward', self.state(k - 1), 'n', 'p')}")
                lines.append(f"  {self.outer(self.mix[k], 'p', cotangent)} }}")
            first = "u" if k == 2 else f"cq{k - 1}"
            lines.append(self.product(k, "backward", f"cp{k}", self.state(k - 1), "n", first, "v"))
            lines.append("add(cn, 1, v, nodes * A);")
            lines.append("add(cn, 1, u, nodes * A);" if k == 2 else self.keep("g", first, spread=True))
        lines += ["clear(ca, nodes * A); through_norm(nodes, a, rho, cn, ca);"]
        scaled = "clear(csum, nodes * A); scale(nodes, species, s, ca, csum);"
        return [*lines, scaled if self.u.degree_of_row else "memcpy(csum, ca, nodes * A * sizeof(real));"]

    def _reverse_buffers(self) -> dict[str, str]:
        names = {"rho": "1", "a": "A", "n": "A", "u": "A", "v": "A", "cn": "A", "ca": "A", "csum": "A", "p": self._wide}
        for k in range(2, self.last + 1):
            names[f"cp{k}"] = self._rows(k)
            if k < self.last:
                names[f"cq{k}"] = "A"
        return names

    def _to_inputs(self, sum_cotangent: str, carried: str | None) -> list[str]:
        lines = []
        for i, (size, gather, carry) in enumerate(zip(self.u.inputs, self.gather, self.carry, strict=True)):
            lines.append(f"real* gx{i} = gX[{i}] + first * {size}; clear(gx{i}, nodes * {size});")
            if gather is not None:
                lines.append(self.back(gather, f"gx{i}", sum_cotangent))
            if carry is not None and carried:
                lines.append(self.back(carry, f"gx{i}", carried))
        return lines

    def backward(self) -> str:
        lines = [
            "const real *sum = sums + first * A, *g = g_all + first * O;",
            "normalize(nodes, species, s, sum, a, rho, n);",
        ]
        lines += self._reverse(weights=True) + self._to_inputs("csum", "g") + ["if (gW) {"]
        for i, (gather, carry) in enumerate(zip(self.gather, self.carry, strict=True)):
            lines += [f"  {self.outer(gather, f'x{i}', 'csum')}"] if gather is not None else []
            lines += [f"  {self.outer(carry, f'x{i}', 'g')}"] if carry is not None else []
        lines.append(f"  {self.outer(self.linear, 'n', 'g')}")
        if self.u.degree_of_row:
            lines.append("  scale_outer(nodes, species, gs, sum, ca);")
        if self.u.bias:
            lines.append("  for (int64_t i = 0; i < nodes; i++) add(gbias + species[i] * C, 1, g + i * O, C);")
        lines.append("}")
        arguments = ["const real* sums", "const real* Q", "const real* g_all", "real* const* gX", "real* const* gW",
                     "real* gs", "real* gbias"]  # fmt: skip
        return self._function("update_backward", arguments, self._reverse_buffers(), lines, turn=True)

    def double(self) -> str:
        u = self.u
        lines = [
            "const real *sum = sums + first * A, *g = g_all + first * O; real* o = gg + first * O;",
            "normalize(nodes, species, s, sum, a, rho, n);", *self._reverse(weights=False),
            # Tangents forward: dot sum, dot a, dot n
            "clear(tsum, nodes * A); clear(o, nodes * O);",
        ]  # fmt: skip
        for i, size in enumerate(u.inputs):
            lines.append(f"if (U[{i}]) {{ const real* t{i} = U[{i}] + first * {size};")
            if (gather := self.gather[i]) is not None:
                lines.append(f"  {self.apply(gather, f't{i}', 'tsum')}")
                lines.append(f"  if (gW) {self.outer(gather, f't{i}', 'csum')}")
            if (carry := self.carry[i]) is not None:
                lines.append(f"  {self.apply(carry, f't{i}', 'o')}")
                lines.append(f"  if (gW) {self.outer(carry, f't{i}', 'g')}")
            lines.append("}")
        scaled = "scale(nodes, species, s, tsum, ta);" if u.degree_of_row else "add(ta, 1, tsum, nodes * A);"
        lines += [f"clear(ta, nodes * A); {scaled} clear(tn, nodes * A); through_norm(nodes, a, rho, ta, tn);"]
        lines += [self.apply(self.linear, "tn", "o"), f"if (gW) {self.outer(self.linear, 'tn', 'g')}"]
        lines.append("clear(dn, nodes * A);")
        # dot P_k and, from the same pass, derivatives by the factors of P_k
        for k in range(2, self.last + 1):
            before = "tn" if k == 2 else f"tq{k - 1}"
            of_first = "u" if k == 2 else f"dq{k - 1}"
            cotangent = "g" if k == self.last else f"cq{k}"
            lines.append(self.product(k, "double", f"cp{k}", self.state(k - 1), "n", before, "tn", "p", of_first, "v"))
            lines += ["add(dn, 1, v, nodes * A);"] + (["add(dn, 1, u, nodes * A);"] if k == 2 else [])
            lines.append(f"if (gW) {self.outer(self.mix[k], 'p', cotangent)}")
            if k == self.last:
                lines.append(self.apply(self.mix[k], "p", "o"))
            else:
                lines += [f"clear(tq{k}, nodes * A);", self.apply(self.mix[k], "p", f"tq{k}"), self.keep(f"tq{k}", "o")]
        # Derivatives by q_k go back through M_k and P_k
        for k in range(self.last - 1, 1, -1):
            lines.append(f"if (gW) {{ {self.product(k, 'forward', self.state(k - 1), 'n', 'p')}")
            lines.append(f"  {self.outer(self.mix[k], 'p', f'dq{k}')} }}")
            lines += [f"clear(p, nodes * {self._rows(k)});", self.back(self.mix[k], "p", f"dq{k}")]
            lines.append(self.product(k, "backward", "p", self.state(k - 1), "n", "u", "v"))
            lines += ["add(dn, 1, v, nodes * A);", f"add({'dn' if k == 2 else f'dq{k - 1}'}, 1, u, nodes * A);"]
        lines += self._norm_twice() + self._to_inputs("dsum", None) + ["if (gW) {"]
        lines += [f"  {self.outer(m, f'x{i}', 'dsum')}" for i, m in enumerate(self.gather) if m is not None]
        if u.degree_of_row:
            lines.append("  scale_outer(nodes, species, gs, sum, da); scale_outer(nodes, species, gs, tsum, ca);")
        lines.append("}")
        buffers = self._reverse_buffers() | dict.fromkeys(("tsum", "ta", "tn", "dn", "da", "dsum"), "A")
        for k in range(2, self.last):
            buffers |= {f"tq{k}": "A", f"dq{k}": "A"}
        arguments = ["const real* sums", "const real* Q", "const real* g_all", "const real* const* U", "real* gg",
                     "real* const* gX", "real* const* gW", "real* gs"]  # fmt: skip
        return self._function("update_double", arguments, buffers, lines, turn=True)

    def _norm_twice(self) -> list[str]:
        r"""Derivative by a: of n, and of :math:`F = \rho\, u - \rho^3 w v / A` with u = cn . ta, v = cn . a, w = a . ta."""
        lines = ["clear(da, nodes * A); through_norm(nodes, a, rho, dn, da);"]
        if self.u.norm:
            lines += [
                "for (int64_t i = 0; i < nodes; i++) {",
                "  const real *ai = a + i * A, *ti = ta + i * A, *ci = cn + i * A, f = rho[i] * rho[i] * rho[i] / A;",
                "  const real u = dot(ci, ti, A), v = dot(ci, ai, A), w = dot(ai, ti, A);",
                "  add(da + i * A, f * (3 * rho[i] * rho[i] * w * v / A - u), ai, A);",
                "  add(da + i * A, -f * v, ti, A); add(da + i * A, -f * w, ci, A);",
                "}",
            ]
        scaled = "clear(dsum, nodes * A); scale(nodes, species, s, da, dsum);"
        return [*lines, scaled if self.u.degree_of_row else "memcpy(dsum, da, nodes * A * sizeof(real));"]

    def workspace(self) -> int:
        """Size of ``work`` for each thread: that of ``update_double``, which needs the most.

        These are its tiles, the gradients of the weights of a block, and the matrices, transposed, which only the first
        thread has.
        """
        u, total = self.u, 2 * sum(a * b for a, b in self.u.shapes)
        total += self.num_species * (max(u.degree_of_row, default=-1) + 2) * u.channels
        sizes = self._reverse_buffers() | dict.fromkeys(("tsum", "ta", "tn", "dn", "da", "dsum"), "A")
        for k in range(2, self.last):
            sizes |= {f"tq{k}": "A", f"dq{k}": "A"}
        numbers = {"1": 1, "A": u.rows * u.channels, self._wide: int(self._wide)}
        numbers |= {self._rows(k): u.products[k - 2].rows * u.channels for k in range(2, self.last + 1)}
        return total + u.tile * sum(numbers[size] for size in sizes.values())


def workspace_size(update: Update, num_species: int) -> int:
    """Numbers of working memory that the functions of :func:`update_source` need for each thread."""
    return _Writer(update, num_species).workspace()


def threads_of(threads: int, nodes: int) -> int:
    """How many threads these functions use for so many parts."""
    return max(1, min(threads, nodes // _GRAIN))
