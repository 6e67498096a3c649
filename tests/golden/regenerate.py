"""Make wigner_3j.json: coupling coefficients up to degree 2 in closed form, from Cartesian tensors with
sympy.

In the real basis a fragment of degree 1 is a vector (x, y, z), one of degree 2 a symmetric traceless matrix
sum_m q_m T_m, in e3nn's order xz, xy, y^2, yz, z^2 - x^2. Every coupling is then the only invariant
contraction of
its three tensors, normalised to one; what is left is a sign, which is convention: SIGNS holds those of e3nn
0.6.0.

Run ``python tests/golden/regenerate.py`` from the project; the values change only if a convention is
changed here.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import sympy

#: Signs of e3nn 0.6.0 relative to the contractions below, where they are not +1.
SIGNS: dict[tuple[int, int, int], int] = {(2, 1, 2): -1}


def basis(l: int) -> list[sympy.Matrix | sympy.Integer]:
    """Orthonormal Cartesian tensors of one degree."""
    if l == 0:
        return [sympy.Integer(1)]
    if l == 1:
        return [sympy.Matrix([int(i == k) for i in range(3)]) for k in range(3)]
    half, sixth = 1 / sympy.sqrt(2), 1 / sympy.sqrt(6)

    def symmetric(i, j):
        return sympy.Matrix(3, 3, lambda a, b: half if {a, b} == {i, j} else 0)

    return [
        symmetric(0, 2),
        symmetric(0, 1),
        sympy.diag(-sixth, 2 * sixth, -sixth),
        symmetric(1, 2),
        sympy.diag(-half, 0, half),
    ]


def contraction(ls: tuple[int, int, int], a, b, c):
    """The invariant of three tensors of these degrees."""
    ordered = sorted(zip(ls, (a, b, c), strict=True), key=lambda pair: pair[0])
    degrees = tuple(l for l, _ in ordered)
    if degrees == (0, 0, 0):
        return sympy.Integer(1)
    if degrees[0] == 0:
        return (ordered[1][1].T * ordered[2][1]).trace()
    if degrees == (1, 1, 1):
        return sympy.Matrix.hstack(a, b, c).det()
    if degrees == (1, 1, 2):
        return (ordered[0][1].T * ordered[2][1] * ordered[1][1])[0]
    if degrees == (1, 2, 2):
        commutator = ordered[1][1] * ordered[2][1] - ordered[2][1] * ordered[1][1]
        v = ordered[0][1]
        return sum(v[k] * commutator[(k + 1) % 3, (k + 2) % 3] for k in range(3))
    return (a * b * c).trace() + (a * c * b).trace()


def coupling(l1: int, l2: int, l3: int) -> list[list[list[float]]]:
    values = [[[contraction((l1, l2, l3), a, b, c) for c in basis(l3)] for b in basis(l2)] for a in basis(l1)]
    flat = [v for plane in values for row in plane for v in row]
    norm = sympy.sqrt(sum(v**2 for v in flat)) * SIGNS.get((l1, l2, l3), 1)
    return [[[float(sympy.N(v / norm, 17)) for v in row] for row in plane] for plane in values]


def table() -> dict[str, list]:
    keys = [k for k in itertools.product(range(3), repeat=3) if abs(k[0] - k[1]) <= k[2] <= k[0] + k[1]]
    return {",".join(map(str, key)): coupling(*key) for key in keys}


if __name__ == "__main__":
    path = Path(__file__).with_name("wigner_3j.json")
    path.write_text(json.dumps(table()) + "\n")
    print(f"wrote {path.name}")
