r"""C source of small matrix products between strided rows, with accumulators in registers.

The blocks of W^l are a few dozen numbers wide, and their rows (one per node and component) are strided views of
states: too small and too scattered for a BLAS call each. All three contractions add to the result:

=======================  ==================================================
function                 result
=======================  ==================================================
``rows_apply``           Z[r] += X[r] W
``rows_transposed``      X[r] += Z[r] W^T, with W^T given
``rows_outer``           W += sum_r X[r]^T Z[r]
=======================  ==================================================
"""

from __future__ import annotations

from nbody_pyg.kernels.library import Library

#: Rows of accumulators in a panel.
_ROWS = 6
#: Columns of a panel: number of vectors, their type, its fraction of the full width, and the machines that have them.
#: 6 x 4 full vectors fill the registers of AVX-512, 6 x 2 those of AVX2; the narrow ones are for the remaining columns.
_COLUMNS = (
    (4, "vec", 1, "VECTOR_REGISTERS >= 32"),
    (2, "vec", 1, "1"),
    (1, "vec", 1, "1"),
    (1, "half", 2, "VECTOR_BYTES > 16"),
    (1, "quarter", 4, "VECTOR_BYTES > 32"),
)


def _panel(
    name: str, rows: int, columns: tuple[int, str, int, str], arguments: str, loop: str, state: str, x: str, y: str
) -> str:
    """One function: accumulators a (rows x vectors) are read from ``state``, run through the loop, written back."""
    count, kind, _, condition = columns
    vectors = range(count)

    def at(base: str, v: int) -> str:
        return f"*({kind}*)({base} + {v} * WIDTH)"

    grid = [(r, v, at(state.format(r=r), v)) for r in range(rows) for v in vectors]
    load = " ".join(f"const {kind} y{v} = {at(y, v)};" for v in vectors)
    steps = [" ".join(f"a{r}_{v} += x * y{v};" for v in vectors) for r in range(rows)]
    work = " ".join(f"{{ const real x = {x.format(r=r)}; {step} }}" for r, step in enumerate(steps))
    return f"""
#if {condition}
static void {name}_{rows}_{count}{kind}({arguments}) {{
  {" ".join(f"{kind} a{r}_{v} = {place};" for r, v, place in grid)}
  {loop} {{ {load} {work} }}
  {" ".join(f"{place} = a{r}_{v};" for r, v, place in grid)}
}}
#endif"""


def _apply(rows: int, columns: tuple[int, str, int, str]) -> str:
    arguments = "int64_t K, const real* const* in, const real* W, int64_t D, real* const* out, int64_t d"
    loop = "for (int64_t k = 0; k < K; k++)"
    return _panel("apply", rows, columns, arguments, loop, "out[{r}] + d", "in[{r}][k]", "W + k * D")


def _outer(rows: int, columns: tuple[int, str, int, str]) -> str:
    arguments = "int64_t R, const real* const* in, int64_t k, const real* const* out, int64_t d, real* W, int64_t D"
    loop = "for (int64_t r = 0; r < R; r++)"
    return _panel("outer", rows, columns, arguments, loop, "W + {r} * D", "in[r][k + {r}]", "out[r] + d")


def _columns(name: str, arguments: str) -> str:
    """Go over the columns d of up to six rows, in panels as wide as fit."""
    lines = ["int64_t d = 0;"]
    for count, kind, part, condition in _COLUMNS:
        cases = " ".join(f"case {r}: {name}_{r}_{count}{kind}({arguments}); break;" for r in range(1, _ROWS + 1))
        width = f"{count} * WIDTH / {part}"
        lines += [f"#if {condition}", f"for (; d + {width} <= D; d += {width}) switch (rows) {{ {cases} }}", "#endif"]
    return "\n".join(lines)


def panels_source() -> str:
    """``rows_apply`` and ``rows_outer``; needs the types of the prelude."""
    bodies = "".join(f(rows, columns) for f in (_apply, _outer) for rows in range(1, _ROWS + 1) for columns in _COLUMNS)
    return f"""{bodies}
enum {{ PANEL = {_ROWS} }};
void rows_apply(int64_t R, int64_t K, int64_t D, const real* const* in, const real* W, real* const* out) {{
  for (int64_t r = 0; r < R; r += PANEL) {{
    const int64_t rows = R - r < PANEL ? R - r : PANEL;
    {_columns("apply", "K, in + r, W + d, D, out + r, d")}
    for (; d < D; d++) for (int64_t i = r; i < r + rows; i++) {{
      real s = 0;
      for (int64_t k = 0; k < K; k++) s += in[i][k] * W[k * D + d];
      out[i][d] += s;
    }}
  }}
}}
void rows_outer(int64_t R, int64_t K, int64_t D, const real* const* in, const real* const* out, real* W) {{
  for (int64_t k = 0; k < K; k += PANEL) {{
    const int64_t rows = K - k < PANEL ? K - k : PANEL;
    {_columns("outer", "R, in, k, out, d, W + k * D + d, D")}
    for (; d < D; d++) for (int64_t i = k; i < k + rows; i++) {{
      real s = 0;
      for (int64_t r = 0; r < R; r++) s += in[r][i] * out[r][d];
      W[i * D + d] += s;
    }}
  }}
}}
"""


#: A transposed matrix, and the rows of a block in the form that the functions of this module take.
ROWS = """
static void transpose(int64_t K, int64_t D, const real* restrict W, real* restrict T) {
  for (int64_t d0 = 0; d0 < D; d0 += 8) for (int64_t k = 0; k < K; k++)
    for (int64_t d = d0; d < (d0 + 8 < D ? d0 + 8 : D); d++) T[d * K + k] = W[k * D + d];
}
/* Pointers to the rows of one block: component after component, node after node. */
static void rows_of(const real** p, const real* x, int64_t stride, int64_t size, int64_t dim, int64_t nodes) {
  for (int64_t n = 0; n < nodes; n++, x += stride) for (int64_t m = 0; m < dim; m++) *p++ = x + m * size;
}
"""
#: Declarations for calling the functions of this module from another library.
LINKED = (
    """
static void* linked[LINKS];
void link_functions(void* const* addresses) { for (int i = 0; i < LINKS; i++) linked[i] = addresses[i]; }
#define rows_apply ((void (*)(int64_t, int64_t, int64_t, const real* const*, const real*, real* const*))linked[0])
#define rows_outer ((void (*)(int64_t, int64_t, int64_t, const real* const*, const real* const*, real*))linked[1])
"""
    + ROWS
)

# Called by other libraries only, by address
PANELS = Library(panels_source(), {"rows_apply": "", "rows_outer": ""})
#: First entries of the links of a library whose source holds :data:`LINKED`.
LINKS = ((PANELS, "rows_apply"), (PANELS, "rows_outer"))
