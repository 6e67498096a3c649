r"""Features of edges and windows on a GPU: one launch each for the values and for each derivative.

The formulae are those of :mod:`nbody_pyg.kernels.edges`; every lane is one edge. Arithmetic has the precision of the
tensors (double precision is slow on most GPUs).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from nbody_pyg.kernels.edges import (
    FeatureOperation,
    Polynomial,
    WindowOperation,
    derivative,
    expression,
    monomial,
)
from nbody_pyg.kernels.gpu.build import Program

_BLOCK, _WARPS = 128, 4


def _function(name: str, arguments: str, body: list[str]) -> str:
    head = [f"@triton.jit\ndef {name}({arguments}, edges, BLOCK: tl.constexpr):",
            "e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)", "m = e < edges"]  # fmt: skip
    return "\n    ".join(head + body) + "\n"


def _load(name: str, pointer: str, size: int, k: int, other: float = 0.0) -> str:
    return f"{name} = tl.load({pointer} + e * {size} + {k}, mask=m, other={other})"


def _store(pointer: str, size: int, k: int, value: str) -> str:
    return f"tl.store({pointer} + e * {size} + {k}, {value}, mask=m)"


def _vector(names: Sequence[str], pointer: str, other: float = 0.0) -> list[str]:
    return [_load(name, pointer, 3, k, other) for k, name in enumerate(names)]


def _chain(ux: str, uy: str, uz: str, ur: str, out: str) -> list[str]:
    """From derivatives by the softened direction and distance to one by the vector."""
    along = [f"ku = {ux}", f"kv = {uy}", f"kw = {uz}", f"kr = {ur}", "al = x * ku + y * kv + z * kw"]
    return along + [
        _store(out, 3, k, f"(k{n} - {v} * al) / rho + kr * {v}")
        for k, (n, v) in enumerate(zip("uvw", "xyz", strict=True))
    ]


class _Harmonics:
    """The polynomials as straight lines in x, y, z."""

    def __init__(self, polynomials: Sequence[Polynomial]) -> None:
        self.polynomials = polynomials
        self.every = sorted({powers for polynomial in polynomials for powers in polynomial})
        lower = {p for poly in polynomials for a in range(3) for p in derivative(poly, a)}
        self.names = {p: f"m{''.join(map(str, p))}" for p in sorted({*self.every, *lower, (0, 0, 0)})}
        self.monomials = [f"{name} = {'one' if p == (0, 0, 0) else monomial(p)}" for p, name in self.names.items()]

    def text(self, polynomial: Polynomial) -> str:
        return expression(polynomial, self.names) if polynomial else "0.0 * one"

    def values(self) -> list[str]:
        return self.monomials + [f"h{k} = {self.text(poly)}" for k, poly in enumerate(self.polynomials)]

    def slopes(self) -> list[str]:
        """Derivatives along t."""
        return self.monomials + [
            f"h{k} = " + " + ".join(f"t{n} * ({self.text(derivative(poly, a))})" for a, n in enumerate("xyz"))
            for k, poly in enumerate(self.polynomials)
        ]

    def gradient(self, bent: bool) -> list[str]:
        """dx, dy, dz: gradient of g.Y; with ``bent`` also bx, by, bz: its derivative along t."""
        lines = list(self.monomials)
        for n, p in enumerate(self.every):
            parts = [f"{poly[p]!r} * g{k}" for k, poly in enumerate(self.polynomials) if p in poly]
            lines.append(f"G{n} = " + " + ".join(parts))
        lines += [f"d{v} = {self._combined([a])}" for a, v in enumerate("xyz")]
        if bent:
            for a, v in enumerate("xyz"):
                parts = [f"t{w} * ({self._combined([a, b])})" for b, w in enumerate("xyz")]
                lines.append(f"b{v} = " + " + ".join(parts))
        return lines

    def _combined(self, axes: Sequence[int]) -> str:
        parts = []
        for n, powers in enumerate(self.every):
            polynomial: Polynomial = {powers: 1.0}
            for axis in axes:
                polynomial = derivative(polynomial, axis)
            parts += [f"{value!r} * G{n} * {self.names[p]}" for p, value in polynomial.items()]
        return " + ".join(parts) or "0.0 * one"


def _radial(basis: str, count: int, scale: float, frequency: float, order: int) -> list[str]:
    """Values f of the basis functions and their first ``order`` derivatives f1, f2 at rho."""
    lines = []
    for b in range(count):
        if basis == "bessel":
            w = (b + 1) * frequency
            if b == 0:
                lines += [f"s1 = tl.sin({w!r} * rho)", f"c1 = tl.cos({w!r} * rho)", "s = s1", "c = c1"]
            else:  # the next multiple of the angle: the slow functions are called once
                lines += ["s0 = s", "s = s0 * c1 + c * s1", "c = c * c1 - s0 * s1"]
            lines.append(f"f_{b} = ({scale!r} / rho) * s")
            if order > 0:
                lines.append(f"f1_{b} = ({scale!r} / rho) * ({w!r} * c - s / rho)")
            if order > 1:
                bend = f"{-w * w!r} * s - {2 * w!r} * c / rho + 2.0 * s / (rho * rho)"
                lines.append(f"f2_{b} = ({scale!r} / rho) * ({bend})")
        else:
            lines.append(f"f_{b} = " + (f"f_{b - 1} / rho" if b else f"{scale!r} * one"))
            lines += [f"f1_{b} = {-float(b)!r} * f_{b} / rho"] if order > 0 else []
            lines += [f"f2_{b} = {float(b * (b + 1))!r} * f_{b} / (rho * rho)"] if order > 1 else []
    return lines


def feature_source(
    polynomials: Sequence[Polynomial], basis: str, num_basis: int, soft: float, scale: float, frequency: float
) -> str:
    """Values, gradients, and their derivative, of harmonics and of window times radial functions."""
    harmonics, rows, bases = _Harmonics(polynomials), len(polynomials), range(num_basis)
    edge = [*_vector(("X", "Y", "Z"), "v"), _load("w", "window", 1, 0),
            f"rho = tl.sqrt(X * X + Y * Y + Z * Z + {soft * soft!r})",
            "x = X / rho", "y = Y / rho", "z = Z / rho", "one = rho / rho"]  # fmt: skip

    def radial(order: int) -> list[str]:
        return _radial(basis, num_basis, scale, frequency, order)

    def total(words: str) -> str:
        return " + ".join(words.format(b=b) for b in bases)

    given = [_load(f"g{k}", "gH", rows, k) for k in range(rows)] + [_load(f"r{b}", "gR", num_basis, b) for b in bases]
    forward = [*edge, *harmonics.values(), *[_store("H", rows, k, f"h{k}") for k in range(rows)], *radial(0)]
    forward += [_store("R", num_basis, b, f"w * f_{b}") for b in bases]
    backward = [*edge, *given, *harmonics.gradient(False), *radial(1), f"slope = w * ({total('r{b} * f1_{b}')})",
                *_chain("dx", "dy", "dz", "slope", "gv"), _store("gw", 1, 0, total("r{b} * f_{b}"))]  # fmt: skip
    double = [*edge, *given, *_vector(("cx", "cy", "cz"), "cv"), _load("D", "cd", 1, 0), "q = x * cx + y * cy + z * cz"]
    double += [f"t{v} = (c{v} - {v} * q) / rho" for v in "xyz"]
    double += [*harmonics.slopes(), *[_store("oH", rows, k, f"h{k}") for k in range(rows)], *radial(2)]
    double += [_store("oR", num_basis, b, f"w * f1_{b} * q + D * f_{b}") for b in bases]
    double += [f"plain = {total('r{b} * f1_{b}')}", f"bend = {total('r{b} * f2_{b}')}", "slope = w * plain"]
    double += [_store("ow", 1, 0, "plain * q"), *harmonics.gradient(True)]
    double += ["gu = dx * x + dy * y + dz * z", "gt = dx * tx + dy * ty + dz * tz"]
    u = [f"b{v} - (d{v} * q + gu * c{v}) / rho + slope * c{v}" for v in "xyz"]
    double += [f"u{k} = {text}" for k, text in enumerate(u)]
    double += _chain("u0", "u1", "u2", "-gt / rho + w * bend * q + D * plain", "ov")
    return "\n\n".join([
        _function("features_forward", "v, window, H, R", forward),
        _function("features_backward", "v, window, gH, gR, gv, gw", backward),
        _function("features_double", "v, window, gH, gR, cv, cd, oH, oR, ov, ow", double),
    ])  # fmt: skip


def window_source(cutoff: float, exponent: int = 6) -> str:
    """f = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), x = r / cutoff; s = f'/r and s1 = s'/r."""
    p, i2 = exponent, 1.0 / cutoff**2
    a, b, c, k = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2, -p * (p + 1) * (p + 2) / 2
    edge = [*_vector(("X", "Y", "Z"), "v"), f"u = tl.sqrt(X * X + Y * Y + Z * Z) * {1.0 / cutoff!r}",
            "inside = u < 1.0", "u = tl.where(inside, u, 1.0 + 0.0 * u)", "d = 1.0 - u"]  # fmt: skip
    slope = f"{k * i2!r} * {_power('u', p - 2)} * d * d"
    # At u = 0 what s1 is multiplied by vanishes faster
    forward = [*edge, f"f = 1.0 + {_power('u', p)} * (u * ({float(b)!r} - {c!r} * u) - {a!r})",
               _store("out", 1, 0, "tl.where(inside, f, 0.0 * u)")]  # fmt: skip
    backward = [*edge, _load("g", "go", 1, 0), f"s = g * ({slope})",
                *[_store("gv", 3, k, f"s * {v}") for k, v in enumerate("XYZ")]]  # fmt: skip
    double = [*edge, _load("g", "go", 1, 0), *_vector(("cx", "cy", "cz"), "cv"), f"s = {slope}",
              "q = X * cx + Y * cy + Z * cz", "n = tl.where(u > 0.0, u, 1.0 + 0.0 * u)",
              f"s1 = {k * i2 * i2!r} * {_power('n', p - 4)} * d * ({p - 2.0!r} - {float(p)!r} * u)",
              "s1 = tl.where(u > 0.0, s1, 0.0 * u)",
              _store("gg", 1, 0, "s * q"),
              *[_store("gv", 3, k, f"g * (s * c{v.lower()} + q * s1 * {v})") for k, v in enumerate("XYZ")]]  # fmt: skip
    return "\n\n".join([
        _function("window_forward", "v, out", forward),
        _function("window_backward", "v, go, gv", backward),
        _function("window_double", "v, go, cv, gg, gv", double),
    ])  # fmt: skip


def _power(name: str, n: int) -> str:
    """Text of an integer power."""
    product = "(" + (" * ".join([name] * abs(n)) or "1.0") + ")"
    return product if n >= 0 else f"(1.0 / {product})"


def _launch(program: Program, name: str, tensors: Sequence[Tensor]) -> None:
    count = tensors[0].shape[0]
    program.launch(name, (-(-count // _BLOCK),), *tensors, count, BLOCK=_BLOCK, num_warps=_WARPS)


class FeatureProgram(FeatureOperation):
    """The features in Triton, with the arguments of :class:`nbody_pyg.kernels.edges.FeatureKernel`."""

    recordable = False

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
        self.program = Program(feature_source, polynomials, basis, num_basis, soft, scale, frequency)

    def _call(self, name: str, *tensors: Tensor) -> None:
        _launch(self.program, name, tensors)


class WindowProgram(WindowOperation):
    """The window in Triton, with the arguments of :class:`nbody_pyg.kernels.edges.WindowKernel`."""

    recordable = False

    def __init__(self, cutoff: float, exponent: int = 6) -> None:
        self.program = Program(window_source, cutoff, exponent)

    def _call(self, name: str, *tensors: Tensor) -> None:
        _launch(self.program, name, tensors)


#: One window for each cutoff and exponent.
window_program = functools.lru_cache(maxsize=256)(WindowProgram)
