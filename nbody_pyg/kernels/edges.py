r"""Compiled features of edges: solid harmonics, radial functions and windows with two derivatives.

A feature is a function of one vector, so the backward pass and its derivative are written by hand once:
with :math:`\rho = \sqrt{r^2 + a^2}`, :math:`u = \mathbf r / \rho`, any function f(u, rho) has

.. math:: \partial f / \partial \mathbf r = (f_u - u\,(u \cdot f_u)) / \rho + f_\rho\, u

The harmonics are polynomials in u, whose derivatives are polynomials again. All arithmetic of one edge is in double
precision for any dtype of the tensors; the extra cost is negligible.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.operands import check_operands
from nbody_pyg.kernels.operation import Operands, Operation, Tensors, filled
from nbody_pyg.kernels.threads import Argument, in_blocks

#: Smallest block of edges for a thread.
_GRAIN = 1024
#: A polynomial in x, y, z: exponents to coefficient.
Polynomial = dict[tuple[int, int, int], float]

_BASES = {
    # value f, derivatives f1, f2 of the basis functions at rho
    "bessel": """
      const double k = {frequency!r}, t = {scale!r} / rho, s1 = sin(k * rho), c1 = cos(k * rho);
      double s = s1, c = c1;
      for (int b = 0; b < K; b++) {{
        const double w = (b + 1) * k;
        f[b] = t * s; f1[b] = t * (w * c - s / rho); f2[b] = t * (-w * w * s - 2 * w * c / rho + 2 * s / (rho * rho));
        const double next = s * c1 + c * s1; c = c * c1 - s * s1; s = next;
      }}""",
    "powers": """
      double p = {scale!r};
      for (int b = 0; b < K; b++) {{
        f[b] = p; f1[b] = -b * p / rho; f2[b] = b * (b + 1) * p / (rho * rho); p /= rho;
      }}""",
}

_FEATURES = """
#include <math.h>
enum {{ M = {rows}, K = {basis} }};
static inline void radial(double rho, double* f, double* f1, double* f2) {{{radial}
}}
#define EDGE \\
  const double X = v[3*e], Y = v[3*e+1], Z = v[3*e+2], rho = sqrt(X*X + Y*Y + Z*Z + {soft2!r}); \\
  const double x = X / rho, y = Y / rho, z = Z / rho, w = window[e]; \\
  double f[K], f1[K], f2[K]; radial(rho, f, f1, f2); (void)w;
#define CHAIN(ux, uy, uz, ur, out) do {{ \\
  const double along = x * (ux) + y * (uy) + z * (uz); \\
  (out)[0] = ((ux) - x * along) / rho + (ur) * x; (out)[1] = ((uy) - y * along) / rho + (ur) * y; \\
  (out)[2] = ((uz) - z * along) / rho + (ur) * z; }} while (0)
{polynomials}
static void features_forward_rows(int64_t E, const real* v, const real* window, real* H, real* R) {{
  for (int64_t e = 0; e < E; e++) {{ EDGE
    double h[M]; values(x, y, z, h);
    for (int m = 0; m < M; m++) H[e*M+m] = h[m];
    for (int b = 0; b < K; b++) R[e*K+b] = w * f[b];
  }}
}}
static void features_backward_rows(int64_t E, const real* v, const real* window, const real* gH, const real* gR, real* gv, real* gw) {{
  for (int64_t e = 0; e < E; e++) {{ EDGE
    double g[3], unused[3], slope = 0, value = 0;
    gradient(x, y, z, gH + e*M, 0, 0, 0, g, unused);
    for (int b = 0; b < K; b++) {{ slope += gR[e*K+b] * w * f1[b]; value += gR[e*K+b] * f[b]; }}
    double out[3]; CHAIN(g[0], g[1], g[2], slope, out);
    for (int i = 0; i < 3; i++) gv[3*e+i] = out[i];
    gw[e] = value;
  }}
}}
"""

_FEATURES_DOUBLE = """/* cotangents: c of gv, d of gw */
static void features_double_rows(int64_t E, const real* v, const real* window, const real* gH, const real* gR, const real* c, const real* d,
    real* oH, real* oR, real* ov, real* ow) {
  for (int64_t e = 0; e < E; e++) { EDGE
    const double cx = c[3*e], cy = c[3*e+1], cz = c[3*e+2], q = x * cx + y * cy + z * cz;
    const double tx = (cx - x * q) / rho, ty = (cy - y * q) / rho, tz = (cz - z * q) / rho;
    double h[M]; along(x, y, z, tx, ty, tz, h);
    for (int m = 0; m < M; m++) oH[e*M+m] = h[m];
    double slope = 0, bend = 0, plain = 0;
    for (int b = 0; b < K; b++) {
      const double r = gR[e*K+b];
      oR[e*K+b] = w * f1[b] * q + d[e] * f[b];
      plain += r * f1[b]; bend += r * f2[b];
    }
    slope = w * plain;
    ow[e] = plain * q;
    double g[3], t[3];
    gradient(x, y, z, gH + e*M, tx, ty, tz, g, t);
    const double gu = g[0] * x + g[1] * y + g[2] * z, gt = g[0] * tx + g[1] * ty + g[2] * tz;
    double out[3];
    CHAIN(t[0] - (g[0] * q + gu * cx) / rho + slope * cx, t[1] - (g[1] * q + gu * cy) / rho + slope * cy,
          t[2] - (g[2] * q + gu * cz) / rho + slope * cz, -gt / rho + w * bend * q + d[e] * plain, out);
    for (int i = 0; i < 3; i++) ov[3*e+i] = out[i];
  }
}
"""

_WINDOW = """
#include <math.h>
/* a constant, so that loops over powers unroll */
enum { p = EXPONENT };
/* f = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2) and its derivatives divided by r: s = f'/r, s1 = s'/r */
static inline double power(double x, int n) {
  double value = 1; for (int i = 0; i < (n < 0 ? -n : n); i++) value *= x;
  return n < 0 ? 1 / value : value; }
#define EDGE \\
  const double X = v[3*e], Y = v[3*e+1], Z = v[3*e+2], r = sqrt(X*X + Y*Y + Z*Z), x = r / cutoff, i2 = 1 / (cutoff * cutoff); \\
  const double K = -0.5 * p * (p + 1) * (p + 2); (void)i2; (void)K;
#define SLOPE (x < 1 ? K * power(x, p - 2) * (1 - x) * (1 - x) * i2 : 0)
static void window_forward_rows(int64_t E, double cutoff, const real* v, real* f) {
  for (int64_t e = 0; e < E; e++) { EDGE
    f[e] = x < 1 ? 1 + power(x, p) * (x * p * (p + 2 - 0.5 * (p + 1) * x) - 0.5 * (p + 1) * (p + 2)) : 0; }
}
static void window_backward_rows(int64_t E, double cutoff, const real* v, const real* g, real* gv) {
  for (int64_t e = 0; e < E; e++) { EDGE
    const double s = g[e] * SLOPE;
    gv[3*e] = s * X; gv[3*e+1] = s * Y; gv[3*e+2] = s * Z; }
}
"""

_WINDOW_DOUBLE = """static void window_double_rows(int64_t E, double cutoff, const real* v, const real* g, const real* c, real* gg, real* gv) {
  for (int64_t e = 0; e < E; e++) { EDGE
    const double s = SLOPE, q = X * c[3*e] + Y * c[3*e+1] + Z * c[3*e+2];
    /* at x = 0 what it is multiplied by vanishes faster */
    const double s1 = x < 1 && x > 0 ? K * power(x, p - 4) * (1 - x) * (p - 2 - p * x) * i2 * i2 : 0;
    gg[e] = s * q;
    gv[3*e] = g[e] * (s * c[3*e] + q * s1 * X); gv[3*e+1] = g[e] * (s * c[3*e+1] + q * s1 * Y);
    gv[3*e+2] = g[e] * (s * c[3*e+2] + q * s1 * Z); }
}
"""


def _wrappers(name: str, leading: Sequence[Argument], *functions: str) -> str:
    """Functions of a feature, forward, backward and perhaps double; each argument is given as "name*numbers per edge", results in brackets."""
    text = ""
    for what, arguments in zip(("forward", "backward", "double"), functions, strict=False):
        arrays = []
        for word in arguments.split():
            array, step = word.strip("()").split("*")
            arrays.append(Argument("real*" if word.startswith("(") else "const real*", array, step))
        text += in_blocks(f"{name}_{what}", "E", [*leading, *arrays], _GRAIN)
    return text


def monomial(exponents: tuple[int, int, int]) -> str:
    """Text of a product of powers of x, y, z."""
    factors = [name for name, power in zip("xyz", exponents, strict=True) for _ in range(power)]
    return " * ".join(factors) or "1"


def derivative(polynomial: Polynomial, axis: int) -> Polynomial:
    """Derivative with respect to x (0), y (1) or z (2)."""
    result: Polynomial = {}
    for powers, value in polynomial.items():
        if powers[axis]:
            x, y, z = (p - (k == axis) for k, p in enumerate(powers))
            result[x, y, z] = result.get((x, y, z), 0.0) + value * powers[axis]
    return result


def expression(polynomial: Polynomial, names: dict[tuple[int, int, int], str]) -> str:
    """Text of a polynomial; its monomials have these names."""
    return " + ".join(f"{value!r} * {names[powers]}" for powers, value in sorted(polynomial.items())) or "0"


def harmonic_source(polynomials: Sequence[Polynomial]) -> str:
    """C functions of some polynomials: values; the slopes along t; gradient of g.Y and its derivative along t."""
    every = sorted({powers for polynomial in polynomials for powers in polynomial})
    lower = {p for poly in polynomials for a in range(3) for p in derivative(poly, a)}
    names = {p: f"m{''.join(map(str, p))}" for p in sorted({*every, *lower, (0, 0, 0)})}
    monomials = " ".join(f"const double {name} = {monomial(p)}; (void){name};" for p, name in names.items())
    values = " ".join(f"h[{k}] = {expression(poly, names)};" for k, poly in enumerate(polynomials))
    slopes = " ".join(
        f"h[{k}] = "
        + " + ".join(f"t{name} * ({expression(derivative(poly, a), names)})" for a, name in enumerate("xyz"))
        + ";"
        for k, poly in enumerate(polynomials)
    )
    # First combine all harmonics into one polynomial with coefficients G, so that it is differentiated only once.
    combine = " ".join(
        f"const double G{n} = "
        + " + ".join(f"{poly[p]!r} * g[{k}]" for k, poly in enumerate(polynomials) if p in poly)
        + ";"
        for n, p in enumerate(every)
    )

    def combined(axes: Sequence[int]) -> str:
        terms = []
        for n, powers in enumerate(every):
            polynomial: Polynomial = {powers: 1.0}
            for axis in axes:
                polynomial = derivative(polynomial, axis)
            terms += [f"{value!r} * G{n} * {names[p]}" for p, value in polynomial.items()]
        return " + ".join(terms) or "0"

    first = " ".join(f"out[{a}] = {combined([a])};" for a in range(3))
    second = " ".join(
        f"bent[{a}] = " + " + ".join(f"t{name} * ({combined([a, b])})" for b, name in enumerate("xyz")) + ";"
        for a in range(3)
    )
    arguments = "double x, double y, double z"
    return f"""
static inline void values({arguments}, double* h) {{ {monomials} {values} }}
static inline void along({arguments}, double tx, double ty, double tz, double* h) {{ {monomials} {slopes} }}
static inline void gradient({arguments}, const real* g, double tx, double ty, double tz, double* out, double* bent) {{
  {monomials} {combine} {first} {second} }}
"""


def feature_source(
    polynomials: Sequence[Polynomial],
    basis: str,
    num_basis: int,
    soft: float,
    scale: float,
    frequency: float = 0.0,
    second: bool = True,
) -> str:
    """C functions of :class:`FeatureKernel`, whose arguments these are; without ``second`` no second derivatives."""
    source = _FEATURES.format(
        rows=len(polynomials),
        basis=num_basis,
        soft2=soft * soft,
        radial=_BASES[basis].format(scale=scale, frequency=frequency),
        polynomials=harmonic_source(polynomials),
    )
    functions = ["v*3 window*1 (H*M) (R*K)", "v*3 window*1 gH*M gR*K (gv*3) (gw*1)"]
    if second:
        source += _FEATURES_DOUBLE
        functions.append("v*3 window*1 gH*M gR*K c*3 d*1 (oH*M) (oR*K) (ov*3) (ow*1)")
    return source + _wrappers("features", [], *functions)


def window_source(exponent: int, second: bool = True) -> str:
    """C functions of :class:`WindowKernel`; without ``second`` no second derivatives."""
    source, functions = _WINDOW, ["v*3 (f*1)", "v*3 g*1 (gv*3)"]
    if second:
        source += _WINDOW_DOUBLE
        functions.append("v*3 g*1 c*3 (gg*1) (gv*3)")
    return source.replace("EXPONENT", str(exponent)) + _wrappers("window", [Argument("double", "cutoff")], *functions)


class FeatureOperation(Operation):
    """Edge vectors and windows to (harmonics, window times radial functions); backends bring :meth:`_call`."""

    num_inputs = num_results = 2

    def __init__(self, rows: int, num_basis: int) -> None:
        self.rows, self.num_basis = rows, num_basis

    def __call__(self, vec: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        edges = vec.shape[0]
        check_operands(vec.dtype, vec.device, vec=(vec, (edges, 3)), window=(window, (edges,)))
        features: tuple[Tensor, Tensor] = self.run(vec.contiguous(), window.contiguous())
        return features

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        vec, edges = operands.inputs[0], operands.inputs[0].shape[0]
        results = vec.new_empty(edges, self.rows), vec.new_empty(edges, self.num_basis)
        self._call("features_forward", *operands.inputs, *results)
        return results, ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        found = [torch.empty_like(x) for x in operands.inputs]
        self._call("features_backward", *operands.inputs, *g, *found)
        return found

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        found = [torch.empty_like(t) for t in (*g, *operands.inputs)]
        self._call("features_double", *operands.inputs, *g, *filled(c, operands.inputs), *found)
        return found

    @abstractmethod
    def _call(self, name: str, *tensors: Tensor) -> None:
        """Run the compiled function of this name."""


class FeatureKernel(FeatureOperation):
    """Edge vectors and windows to (harmonics, window times radial functions).

    Args:
        polynomials: the harmonics as polynomials of the softened direction.
        basis: "bessel" (scale sin(n frequency rho) / rho) or "powers" (scale rho^-s).
        num_basis: number of radial functions.
        soft: softening length a, angstrom.
        scale, frequency: numbers of the basis.
    """

    def __init__(
        self,
        polynomials: Sequence[Polynomial],
        basis: str,
        num_basis: int,
        soft: float,
        scale: float,
        frequency: float = 0.0,
    ) -> None:
        super().__init__(len(polynomials), num_basis)
        source = feature_source(polynomials, basis, num_basis, soft, scale, frequency)
        inputs, results = "reals:3*E reals:E", f"reals:{self.rows}*E reals:{num_basis}*E"
        signatures = {
            "features_forward": f"E {inputs} {results}",
            "features_backward": f"E {inputs} {results} {inputs}",
            "features_double": f"E {inputs} {results} {inputs} {results} {inputs}",
        }
        self.library = Library(source, signatures)

    def _call(self, name: str, *tensors: Tensor) -> None:
        self.library.call(name, tensors[0].dtype, tensors[0].shape[0], *tensors)


class WindowOperation(Operation):
    """The window of :func:`nbody_pyg.radial.smooth_cutoff` as a function of the vector; backends bring :meth:`_call`."""

    num_inputs = 1

    def __call__(self, vec: Tensor) -> Tensor:
        check_operands(vec.dtype, vec.device, vec=(vec, (vec.shape[0], 3)))
        window: Tensor = self.run(vec.contiguous())
        return window

    def value(self, operands: Operands) -> tuple[tuple[Tensor, ...], Tensors]:
        (vec,) = operands.inputs
        out = vec.new_empty(vec.shape[0])
        self._call("window_forward", vec, out)
        return (out,), ()

    def gradients(self, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        (vec,) = operands.inputs
        gv = torch.empty_like(vec)
        self._call("window_backward", vec, *g, gv)
        return (gv,)

    def twice(self, c: Tensors, g: Sequence[Tensor], operands: Operands, wanted: Sequence[bool]) -> Tensors:
        (vec,) = operands.inputs
        found = torch.empty_like(g[0]), torch.empty_like(vec)
        self._call("window_double", vec, *g, *filled(c, (vec,)), *found)
        return found

    @abstractmethod
    def _call(self, name: str, *tensors: Tensor) -> None:
        """Run the compiled function of this name."""


class WindowKernel(WindowOperation):
    """The window in C."""

    def __init__(self, cutoff: float, exponent: int = 6) -> None:
        self.cutoff = float(cutoff)
        signatures = {
            "window_forward": "E double reals:3*E reals:E",
            "window_backward": "E double reals:3*E reals:E reals:3*E",
            "window_double": "E double reals:3*E reals:E reals:3*E reals:E reals:3*E",
        }
        self.library = Library(window_source(exponent), signatures)

    def _call(self, name: str, *tensors: Tensor) -> None:
        self.library.call(name, tensors[0].dtype, tensors[0].shape[0], self.cutoff, *tensors)


#: One window for each cutoff and exponent.
window_kernel = functools.lru_cache(maxsize=256)(WindowKernel)
