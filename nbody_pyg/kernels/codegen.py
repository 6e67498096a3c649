r"""C source of the three products and their derivatives, written out term by term from a coupling table.

Every product is linear in each factor, so its derivatives are sums of products of the same kind; each function below
computes everything for one autograd node in a single pass. Channels are the vector lanes. The functions are:

================  ===========================================================================================
product_*         channelwise product of two node states: out_r = sum c x_i y_j
one_body_*        edge product: out_r(target) += w_p sum c Y_m x_i(source) with w_p = sum B_b W_bp in registers
density_*         outer product of harmonics and radial functions summed into slots
================  ===========================================================================================

with ``forward``, ``backward`` and ``double`` (the derivative of backward) of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nbody_pyg.kernels import threads
from nbody_pyg.kernels.threads import Argument, in_blocks

_PRELUDE = """
#include <stdint.h>
typedef {real} real;
/* Bytes and number of the vector registers: gcc keeps a wider vector in memory, which costs a factor of ten. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define VECTOR_REGISTERS 32
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define VECTOR_REGISTERS 16
#else
#define VECTOR_BYTES 16
#define VECTOR_REGISTERS 16
#endif
#if defined(__ARM_NEON)
#undef VECTOR_REGISTERS
#define VECTOR_REGISTERS 32
#endif
enum {{ WIDTH = VECTOR_BYTES / sizeof(real) }};
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
#if VECTOR_BYTES > 16
typedef real half __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(real)), may_alias));
#endif
#if VECTOR_BYTES > 32
typedef real quarter __attribute__((vector_size(VECTOR_BYTES / 4), aligned(sizeof(real)), may_alias));
#endif
static inline real vec_total(vec v) {{ real s = 0; for (int k = 0; k < WIDTH; k++) s += v[k]; return s; }}
"""

# Channels that fill no whole vector: one masked vector where the processor has such loads, else numbers one by one.
_TAIL = """
#if defined(__AVX__)
#include <immintrin.h>
typedef vec tail;
#define tail_total vec_total
#define TAIL_LOOP if (c < C)
#define TAIL_LOAD(p) tail_load(p, used)
#define TAIL_STORE(p, v) tail_store(p, used, v)
#if defined(__AVX512F__)
typedef unsigned lanes;
#define TAIL_LANES(n) ((1u << (n)) - 1)
static inline tail tail_load(const real* p, lanes used) {
  return sizeof(real) == 4 ? (tail)_mm512_maskz_loadu_ps(used, p) : (tail)_mm512_maskz_loadu_pd(used, p); }
static inline void tail_store(real* p, lanes used, tail v) {
  if (sizeof(real) == 4) _mm512_mask_storeu_ps(p, used, (__m512)v); else _mm512_mask_storeu_pd(p, used, (__m512d)v); }
#else
typedef __m256i lanes;
static inline lanes TAIL_LANES(int64_t n) {
  static const int32_t bits[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(bits + 8 - n * (int64_t)(sizeof(real) / 4))); }
static inline tail tail_load(const real* p, lanes used) {
  return sizeof(real) == 4 ? (tail)_mm256_maskload_ps((const float*)p, used)
                           : (tail)_mm256_maskload_pd((const double*)p, used); }
static inline void tail_store(real* p, lanes used, tail v) {
  if (sizeof(real) == 4) _mm256_maskstore_ps((float*)p, used, (__m256)v);
  else _mm256_maskstore_pd((double*)p, used, (__m256d)v); }
#endif
#else
typedef real tail;
typedef int lanes;
#define tail_total(v) (v)
#define TAIL_LOOP for (; c < C; c++)
#define TAIL_LANES(n) 0
#define TAIL_LOAD(p) (*(p))
#define TAIL_STORE(p, v) (*(p) = (v))
#endif
"""


#: Lines of code for one kind of number: "vec", a whole vector of channels, or "tail", the channels that are left.
Body = Callable[[str], list[str]]


class Term(NamedTuple):
    """One non-zero coefficient: out[row] += value * first[i] * second[j], row belonging to ``path``."""

    row: int
    i: int
    j: int
    path: int
    value: float


class EdgeProduct(NamedTuple):
    """The coupling table of an edge product, and its sizes; in ``terms`` i counts source rows and j harmonics."""

    terms: list[Term]
    rows_in: int
    harmonics: int
    rows_out: int
    paths: int
    basis: int


#: Smallest blocks for a thread (:mod:`nbody_pyg.kernels.threads`): about ten microseconds of work.
_NODES, _EDGES, _DENSITY_EDGES = 32, 512, 2048
_CHANNELS = Argument("int64_t", "C")


def prelude(dtype: str, source: str = "") -> str:
    """What must stand before a source: types and functions that it shares with others; ``dtype`` is "float" or "double"."""
    return _PRELUDE.format(real=dtype) + (_TAIL if "TAIL_LOOP" in source else "") + threads.PRELUDE


def _number(value: float) -> str:
    return f"((real){value!r})"


def _weighted(pairs: list[tuple[float, str]]) -> str:
    return " + ".join(f"{_number(value)} * {name}" for value, name in pairs)


def _over_channels(body: Body, tail: bool) -> list[str]:
    """Loop over whole vectors of channels; with ``tail`` also over the rest."""
    lines = ["    int64_t c = 0;", "    for (; c + WIDTH <= C; c += WIDTH) {", *body("vec"), "    }"]
    return [*lines, "    TAIL_LOOP { const lanes used = TAIL_LANES(C - c);", *body("tail"), "    }"] if tail else lines


def _get(kind: str, address: str) -> str:
    """The values at an address."""
    return f"*(const vec*)({address})" if kind == "vec" else f"TAIL_LOAD({address})"


def _put(kind: str, address: str, value: str, add: bool = False) -> str:
    """A statement that stores values at an address."""
    if kind == "vec":
        return f"*(vec*)({address}) {'+=' if add else '='} {value};"
    return f"TAIL_STORE({address}, {f'{_get(kind, address)} + ' if add else ''}{value});"


def _load(kind: str, name: str, pointer: str, rows: Iterable[int]) -> list[str]:
    return [f"        const {kind} {name}{r} = {_get(kind, f'{pointer} + {r} * C + c')};" for r in rows]


def _store(kind: str, pointer: str, row: int, value: str, add: bool = False) -> str:
    return f"        {_put(kind, f'{pointer} + {row} * C + c', value, add)}"


def _zero(kind: str, names: Iterable[str]) -> list[str]:
    return [f"        {kind} {name} = ({kind}){{0}};" for name in names]


def product_source(
    terms: list[Term], rows1: int, rows2: int, rows_out: int, tail: bool = True, second: bool = True
) -> str:
    """Functions of the channelwise product for one coupling table; without ``second`` no second derivatives."""
    by_pair: dict[tuple[int, int], list[Term]] = defaultdict(list)
    for term in terms:
        by_pair[term.i, term.j].append(term)
    used1, used2 = sorted({t.i for t in terms}), sorted({t.j for t in terms})
    rows = range(rows_out)

    def forward(kind: str) -> list[str]:
        lines = _load(kind, "x", "x", used1) + _load(kind, "y", "y", used2) + _zero(kind, [f"o{r}" for r in rows])
        for (i, j), group in by_pair.items():
            lines.append(f"        {{ const {kind} t = x{i} * y{j};")
            lines += [f"          o{t.row} += {_number(t.value)} * t;" for t in group] + ["        }"]
        return lines + [_store(kind, "out", r, f"o{r}") for r in rows]

    def gradients(kind: str, double: bool) -> list[str]:
        lines = _load(kind, "x", "x", used1) + _load(kind, "y", "y", used2) + _load(kind, "g", "g", rows)
        if double:
            lines += _load(kind, "a", "a", used1) + _load(kind, "b", "b", used2) + _zero(kind, [f"o{r}" for r in rows])
        lines += _zero(kind, [f"p{i}" for i in range(rows1)] + [f"q{j}" for j in range(rows2)])
        first, second = ("b", "a") if double else ("y", "x")
        for (i, j), group in by_pair.items():
            lines.append(f"        {{ const {kind} s = {_weighted([(t.value, f'g{t.row}') for t in group])};")
            lines.append(f"          p{i} += s * {first}{j}; q{j} += s * {second}{i};")
            if double:
                lines.append(f"          const {kind} t = a{i} * y{j} + x{i} * b{j};")
                lines += [f"          o{t.row} += {_number(t.value)} * t;" for t in group]
            lines.append("        }")
        lines += [_store(kind, "gx", i, f"p{i}") for i in range(rows1)]
        lines += [_store(kind, "gy", j, f"q{j}") for j in range(rows2)]
        return lines + ([_store(kind, "gg", r, f"o{r}") for r in rows] if double else [])

    def function(name: str, pointers: list[tuple[str, int]], outputs: set[str], body: Body) -> str:
        arguments = ", ".join(f"{'' if p in outputs else 'const '}real* restrict {p}" for p, _ in pointers)
        lines = [f"void {name}_rows(int64_t N, int64_t C, {arguments}) {{", "  for (int64_t n = 0; n < N; n++) {"]
        lines += _over_channels(body, tail)
        lines += ["    " + " ".join(f"{p} += {size} * C;" for p, size in pointers), "  }", "}"]
        arrays = [Argument("real*" if p in outputs else "const real*", p, f"{size} * C") for p, size in pointers]
        return "\n".join(lines) + "\n" + in_blocks(name, "N", [_CHANNELS, *arrays], _NODES)

    x, y, g, out = ("x", rows1), ("y", rows2), ("g", rows_out), ("out", rows_out)
    gx, gy, gg, a, b = ("gx", rows1), ("gy", rows2), ("gg", rows_out), ("a", rows1), ("b", rows2)
    functions = [
        function("product_forward", [x, y, out], {"out"}, forward),
        function("product_backward", [g, x, y, gx, gy], {"gx", "gy"}, lambda kind: gradients(kind, False)),
    ]
    if second:
        pointers = [g, x, y, a, b, gg, gx, gy]
        functions.append(function("product_double", pointers, {"gg", "gx", "gy"}, lambda kind: gradients(kind, True)))
    return "\n".join(functions)


def one_body_source(product: EdgeProduct, tail: bool = True, second: bool = True) -> str:
    """Functions of the edge product; without ``second`` no second derivatives.

    The radial weight of a path and channel is computed from the ``basis`` functions of the edge where it is needed.
    Stored in memory, it would be most of the memory traffic of the product.
    """
    terms, rows_in, harmonics, rows_out, paths, basis = product
    entries: dict[tuple[int, int], list[Term]] = defaultdict(list)
    for term in terms:
        entries[term.row, term.i].append(term)
    number = {key: k for k, key in enumerate(entries)}
    by_row: dict[int, list[int]] = defaultdict(list)
    for row, i in entries:
        by_row[row].append(i)
    rows_of_path = {p: sorted({t.row for t in terms if t.path == p}) for p in range(paths)}
    used = sorted({t.i for t in terms})

    def matrix(name: str, source: str) -> list[str]:
        # The coupling contracted with this edge's harmonics, once for all channels.
        lines = [f"    real {name}[{len(entries)}];"]
        for key, group in entries.items():
            lines.append(f"    {name}[{number[key]}] = {_weighted([(t.value, f'{source}[{t.j}]') for t in group])};")
        return lines

    def dot(name: str, state: str, row: int) -> str:
        return " + ".join(f"{name}[{number[row, i]}] * {state}{i}" for i in by_row[row])

    def at(pointer: str, p: int) -> str:
        return f"{pointer} + (b * {paths} + {p}) * C + c"

    def radial(kind: str, name: str, functions: str, p: int, pointer: str = "W") -> str:
        return f"for (int b = 0; b < {basis}; b++) {name} += {functions}[b] * {_get(kind, at(pointer, p))};"

    def forward(kind: str) -> list[str]:
        lines = _load(kind, "x", "xe", used)
        for p in range(paths):
            lines.append(f"        {{ {kind} w0 = ({kind}){{0}}; {radial(kind, 'w0', 'Be', p)}")
            lines += [_store(kind, "oe", r, f"w0 * ({dot('M', 'x', r)})", add=True) for r in rows_of_path[p]]
            lines.append("        }")
        return lines

    def backward(kind: str) -> list[str]:
        sums = f"b{kind[0]}"
        lines = _load(kind, "x", "xe", used) + _zero(kind, [f"p{i}" for i in used])
        for p in range(paths):
            lines.append(f"        {{ {kind} w0 = ({kind}){{0}}, s = ({kind}){{0}}; {radial(kind, 'w0', 'Be', p)}")
            for r in rows_of_path[p]:
                g0 = _get(kind, f"ge + {r} * C + c")
                lines.append(f"        {{ const {kind} g0 = {g0}; const {kind} h = w0 * g0;")
                lines.append(f"          s += g0 * ({dot('M', 'x', r)});")
                lines += [f"          p{i} += M[{number[r, i]}] * h;" for i in by_row[r]]
                lines += _harmonic_gradient(kind, entries, r, by_row[r], ["h * x{i}"])
                lines.append("        }")
            lines.append(f"        for (int b = 0; b < {basis}; b++) {sums}[b] += s * {_get(kind, at('W', p))};")
            weights = _put(kind, at("gW", p), "Be[b] * s", add=True)
            lines.append(f"        if (gW) for (int b = 0; b < {basis}; b++) {weights} }}")
        return lines + [_store(kind, "gxe", i, f"p{i}", add=True) for i in used]

    def double(kind: str) -> list[str]:
        sums = f"b{kind[0]}"
        lines = _load(kind, "x", "xe", used) + _load(kind, "a", "ae", used) + _zero(kind, [f"p{i}" for i in used])
        for p in range(paths):
            lines.append(f"        {{ {kind} w0 = ({kind}){{0}}, k0 = w0, s = w0, s0 = w0;")
            lines.append(f"          {radial(kind, 'w0', 'Be', p)} {radial(kind, 'k0', 'De', p)}")
            lines.append(f"          if (U) {radial(kind, 'k0', 'Be', p, 'U')}")
            for r in rows_of_path[p]:
                lines.append(f"        {{ const {kind} g0 = {_get(kind, f'ge + {r} * C + c')};")
                lines.append(f"          const {kind} h = w0 * g0, d = k0 * g0, y = {dot('M', 'x', r)};")
                lines.append(f"          const {kind} z = {dot('M', 'a', r)} + {dot('N', 'x', r)};")
                lines.append("          s += g0 * z; s0 += g0 * y;")
                lines.append(_store(kind, "oe", r, "w0 * z + k0 * y", add=True))
                lines += [f"          p{i} += N[{number[r, i]}] * h + M[{number[r, i]}] * d;" for i in by_row[r]]
                lines += _harmonic_gradient(kind, entries, r, by_row[r], ["h * a{i} + d * x{i}"])
                lines.append("        }")
            lines.append(f"        for (int b = 0; b < {basis}; b++) {{ {sums}[b] += s * {_get(kind, at('W', p))};")
            lines.append(f"          {_put(kind, at('gW', p), 'Be[b] * s + De[b] * s0', add=True)} }}")
            lines.append(
                f"        if (U) for (int b = 0; b < {basis}; b++) {sums}[b] += s0 * {_get(kind, at('U', p))}; }}"
            )
        return lines + [_store(kind, "gxe", i, f"p{i}", add=True) for i in used]

    def function(name: str, arguments: list[Argument], setup: list[str], body: Body, finish: list[str]) -> str:
        declared = ", ".join(f"{a.type} restrict {a.name}" for a in arguments)
        lines = [f"static void {name}_rows(int64_t E, int64_t C, const int64_t* restrict source, ",
                 f"    const int64_t* restrict target, {declared}) {{", "  for (int64_t e = 0; e < E; e++) {"] + setup  # fmt: skip
        inner = "\n".join(lines + _over_channels(body, tail) + finish + ["  }", "}"])
        ends = [Argument("const int64_t*", end, "1") for end in ("source", "target")]
        return inner + "\n" + in_blocks(name, "E", [_CHANNELS, *ends, *arguments], _EDGES)

    kinds = ("vec", "tail") if tail else ("vec",)
    size_in, size_out = f"{rows_in} * C", f"{rows_out} * C"
    state = [f"    const real *xe = x + source[e] * {size_in}, *Be = B + e * {basis}, *Ye = Y + e * {harmonics};"]
    grads = [f"    const real *ge = g + target[e] * {size_out};", f"    real *gxe = gx + source[e] * {size_in};",
             *(f"    {kind} b{kind[0]}[{basis}] = {{0}};" for kind in kinds),
             *(f"    {kind} y{kind[0]}{m} = ({kind}){{0}};" for kind in kinds for m in range(harmonics))]  # fmt: skip

    def total(name: str) -> str:
        return " + ".join(f"{kind}_total({name.replace('?', kind[0])})" for kind in kinds)

    finish = [f"    gY[e * {harmonics} + {m}] = {total(f'y?{m}')};" for m in range(harmonics)]
    finish.append(f"    for (int b = 0; b < {basis}; b++) gB[e * {basis} + b] = {total('b?[b]')};")

    def given(*names: tuple[str, str]) -> list[Argument]:
        return [Argument("const real*", name, step) for name, step in names]

    per_edge = (("Y", str(harmonics)), ("B", str(basis)))
    common = given(("x", ""), *per_edge, ("W", ""))
    result = Argument("real*", "out", total=size_out, node="target[e]")
    results = [Argument("real*", "gx", total=size_in, node="source[e]")]
    results += [Argument("real*", f"g{name}", step) for name, step in per_edge]
    results.append(Argument("real*", "gW", total=f"{basis * paths} * C"))
    cotangents_given = given(("a", ""), ("n", str(harmonics)), ("d", str(basis)), ("U", ""))
    out = f"    real *oe = out + target[e] * {size_out};"
    cotangents = f"    const real *ae = a + source[e] * {size_in}, *Ne = n + e * {harmonics}, *De = d + e * {basis};"
    functions = [
        function("one_body_forward", [*common, result], [*state, out, *matrix("M", "Ye")], forward, []),
        function("one_body_backward", [*given(("g", "")), *common, *results],
                 state + grads + matrix("M", "Ye"), backward, finish),
    ]  # fmt: skip
    if second:
        arguments = [*given(("g", "")), *common, *cotangents_given, result, *results]
        setup = state + grads + [out, cotangents] + matrix("M", "Ye") + matrix("N", "Ne")
        functions.append(function("one_body_double", arguments, setup, double, finish))
    return "\n".join(functions)


def _harmonic_gradient(
    kind: str, entries: dict[tuple[int, int], list[Term]], row: int, columns: list[int], forms: list[str]
) -> list[str]:
    """Accumulate the gradient of the harmonics of one output row; those of whole vectors and of the tail are kept apart."""
    sums, lines = f"y{kind[0]}", []
    for i in columns:
        lines.append(f"          {{ const {kind} t = {' + '.join(form.format(i=i) for form in forms)};")
        lines += [f"            {sums}{t.j} += {_number(t.value)} * t;" for t in entries[row, i]]
        lines.append("          }")
    return lines


def density_source(harmonics: int, basis: int, num_species: int, second: bool = True) -> str:
    """Functions of the density: out[target, m, species, b] += Y[e, m] * B[e, b], slot = target * species + its number."""
    slot, y, b = (Argument(f"const {kind}*", name, step) for kind, name, step in (
        ("int64_t", "slot", "1"), ("real", "Y", "M"), ("real", "B", "K")))  # fmt: skip
    g, a, d = (Argument("const real*", name, step) for name, step in (("g", ""), ("a", "M"), ("d", "K")))
    out = Argument("real*", "out", total="M * Q", node="slot[e] / S")
    edges = [Argument("real*", "gY", "M"), Argument("real*", "gB", "K")]
    wrappers = [
        in_blocks("density_forward", "E", [slot, y, b, out], _DENSITY_EDGES),
        in_blocks("density_backward", "E", [slot, g, y, b, *edges], _DENSITY_EDGES),
    ]
    if second:
        wrappers.append(in_blocks("density_double", "E", [slot, g, y, b, a, d, out, *edges], _DENSITY_EDGES))
    return f"""
enum {{ M = {harmonics}, K = {basis}, S = {num_species}, Q = S * K }};
#define AT(slot) ((slot) / S * (M * Q) + (slot) % S * K)
static void density_forward_rows(int64_t E, const int64_t* restrict slot, const real* restrict Y, const real* restrict B, real* restrict out) {{
  for (int64_t e = 0; e < E; e++) {{
    real* o = out + AT(slot[e]);
    for (int m = 0; m < M; m++) for (int b = 0; b < K; b++) o[m * Q + b] += Y[e * M + m] * B[e * K + b];
  }}
}}
static void density_backward_rows(int64_t E, const int64_t* restrict slot, const real* restrict g, const real* restrict Y, const real* restrict B,
    real* restrict gY, real* restrict gB) {{
  for (int64_t e = 0; e < E; e++) {{
    const real* h = g + AT(slot[e]);
    real sum[K];
    for (int b = 0; b < K; b++) sum[b] = 0;
    for (int m = 0; m < M; m++) {{
      real s = 0;
      for (int b = 0; b < K; b++) {{ s += h[m * Q + b] * B[e * K + b]; sum[b] += h[m * Q + b] * Y[e * M + m]; }}
      gY[e * M + m] = s;
    }}
    for (int b = 0; b < K; b++) gB[e * K + b] = sum[b];
  }}
}}
{_DENSITY_DOUBLE if second else ""}{"".join(wrappers)}"""


_DENSITY_DOUBLE = """static void density_double_rows(int64_t E, const int64_t* restrict slot, const real* restrict g, const real* restrict Y, const real* restrict B,
    const real* restrict a, const real* restrict d, real* restrict out, real* restrict gY, real* restrict gB) {
  for (int64_t e = 0; e < E; e++) {
    const real* h = g + AT(slot[e]);
    real* o = out + AT(slot[e]);
    real sum[K];
    for (int b = 0; b < K; b++) sum[b] = 0;
    for (int m = 0; m < M; m++) {
      real s = 0;
      for (int b = 0; b < K; b++) {
        o[m * Q + b] += a[e * M + m] * B[e * K + b] + Y[e * M + m] * d[e * K + b];
        s += h[m * Q + b] * d[e * K + b];
        sum[b] += h[m * Q + b] * a[e * M + m];
      }
      gY[e * M + m] = s;
    }
    for (int b = 0; b < K; b++) gB[e * K + b] = sum[b];
  }
}
"""
