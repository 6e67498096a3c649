"""Radial functions: smooth windows and bases of functions of a distance.

The hierarchy applies the windows, because all cutoffs belong to it. A basis only has a length scale, so a gate can be
used on another edge set without changing the cutoff of its messages.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nbody_pyg.geometry import safe_norm
from nbody_pyg.kernels.backend import dispatch
from nbody_pyg.kernels.edges import window_kernel
from nbody_pyg.kernels.gpu.features import window_program

#: Default length (angstrom) below which distances are softened, see :func:`soften`.
SOFT_LENGTH = 0.5


#: Exponents that windows may have: from 3 on the curvature at coincident points is zero.
EXPONENTS = range(3, 13)


def smooth_cutoff(r: Float[Tensor, " edges"], cutoff: float, exponent: int = 6) -> Float[Tensor, " edges"]:
    r"""Polynomial window that is 1 at 0 and goes to 0 at ``cutoff`` with two continuous derivatives.

    .. math:: f(x) = 1 - \tfrac{(p+1)(p+2)}{2} x^p + p (p+2)\, x^{p+1} - \tfrac{p (p+1)}{2} x^{p+2}, \quad
              x = r / r_c, \quad f(x \ge 1) = 0

    Source: the envelope of DimeNet (arXiv:2003.03123). A large p keeps the weight of neighbours near 1 almost up to the
    cutoff. p = 3, which is 1 minus the quintic step, decays from the start, so near atoms have a larger weight.

    Args:
        r: distances, angstrom.
        cutoff: radius at which the window ends, angstrom, > 0.
        exponent: p, one of :data:`EXPONENTS`.

    Smoothness: C2 at the cutoff, C-infinity inside, and at least C2 in the vector at 0.
    Raises: ValueError: ``cutoff`` is not a positive finite number, or an unknown exponent.
    """
    if not (math.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"cutoff must be a positive finite length in angstrom, got {cutoff!r}; try 5.0")
    p = check_exponent(exponent)
    x = (r / cutoff).clamp(max=1.0)
    return 1.0 + x**p * (x * p * (p + 2 - 0.5 * (p + 1) * x) - 0.5 * (p + 1) * (p + 2))


def check_exponent(exponent: int) -> int:
    """The exponent of a window. Raises: ValueError: it is not one of :data:`EXPONENTS`."""
    if isinstance(exponent, bool) or exponent not in EXPONENTS:
        raise ValueError(f"exponent must be an integer from 3 to 12, got {exponent!r}; 3 fades early, 6 late")
    return int(exponent)


def vector_window(vec: Float[Tensor, "edges 3"], cutoff: float, exponent: int = 6) -> Float[Tensor, " edges"]:
    """:func:`smooth_cutoff` of the length of some vectors, in one step where a compiled backend runs."""
    if torch.compiler.is_dynamo_compiling():
        return smooth_cutoff(safe_norm(vec), cutoff, exponent)
    compiled = window_kernel(cutoff, exponent), window_program(cutoff, exponent)
    window: Tensor = dispatch((vec,), *compiled, lambda vec: smooth_cutoff(safe_norm(vec), cutoff, exponent))
    return window


def quintic_step(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""From 0 at t = 0 to 1 at t = 1, constant outside, with two continuous derivatives.

    .. math:: S(t) = t^3 (10 - 15 t + 6 t^2), \qquad 1 - S(t) = S(1 - t)

    Use :math:`S(1 - t)` for a step downwards: it has full relative precision where it vanishes.
    """
    t = t.clamp(0.0, 1.0)
    return t * t * t * (10.0 + t * (6.0 * t - 15.0))


def plateau_window(r: Float[Tensor, " edges"], inner: float, outer: float) -> Float[Tensor, " edges"]:
    r"""Window that is exactly 1 up to ``inner`` and exactly 0 from ``outer`` on.

    .. math:: f = S\Big(\frac{r_2 - r}{r_2 - r_1}\Big)

    with the step S of :func:`quintic_step`.

    Args:
        r: distances, angstrom.
        inner: radius at which it starts to decay, angstrom.
        outer: radius at which it is 0, angstrom, > ``inner``.

    Smoothness: C2. Raises: ValueError: not 0 <= ``inner`` < ``outer``.
    """
    if not 0 <= inner < outer < math.inf:
        raise ValueError(f"inner and outer must satisfy 0 <= inner < outer, got {inner!r} and {outer!r}; try 3.5, 5.0")
    return quintic_step((outer - r) / (outer - inner))


def check_softening(length: float) -> float:
    """The length a of :func:`soften`. Raises: ValueError: it is not positive and finite."""
    if isinstance(length, bool) or not isinstance(length, (int, float)) or not 0 < length < math.inf:
        raise ValueError(
            f"softening must be a positive finite length in the unit of the positions, got {length!r}; take a tenth "
            "of a typical distance of neighbours"
        )
    return float(length)


def soften(
    vec: Float[Tensor, "edges 3"], length: float = SOFT_LENGTH
) -> tuple[Float[Tensor, "edges 3"], Float[Tensor, " edges"]]:
    r"""Softened direction and distance of edge vectors, smooth everywhere including coincident points.

    .. math:: \rho = \sqrt{r^2 + a^2}, \qquad u = \mathbf r / \rho

    A part may sit exactly on its parent (a group with one atom, the centre of a ring), where :math:`\mathbf r/r`
    has no value. Solid harmonics of :math:`u` vanish there for every degree above 0, as they must.

    Args:
        length: a, in the unit of ``vec``; 0.5 by default.

    Returns: (u, rho).
    Smoothness: C-infinity. Equivariance: u turns with the vector, rho is invariant.
    """
    rho = (vec.square().sum(-1) + length**2).sqrt()
    return vec / rho.unsqueeze(-1), rho


class BesselBasis(nn.Module):
    r"""Spherical Bessel functions of order 0 on a sphere of radius ``radius``.

    .. math:: B_n(r) = \sqrt 2\, \sin(n \pi r / R) \, / \, (r / R_0), \qquad n = 1 .. N, \quad R_0 = 0.3 R

    Source: DimeNet (arXiv:2003.03123), here with values of order one at bonding distances; the window is applied
    by the hierarchy, not here.

    ==========  ===============  =================
    symbol      code             shape, unit
    ==========  ===============  =================
    r           ``r``            (edges,) angstrom
    B           result           (edges, num_basis)
    ==========  ===============  =================

    Args:
        num_basis: number N of functions.
        radius: length R, angstrom.

    Smoothness: C-infinity for r > 0, which softened distances ensure.
    Raises: ValueError: ``num_basis`` < 1 or ``radius`` <= 0.
    """

    def __init__(self, num_basis: int = 8, radius: float = 5.0) -> None:
        super().__init__()
        _check_basis(num_basis, radius)
        self.num_basis, self.radius = num_basis, float(radius)

    def compiled(self) -> dict[str, str | int | float]:
        """Arguments that describe this basis to :class:`~nbody_pyg.kernels.edges.FeatureKernel`."""
        scale = 0.3 * math.sqrt(2.0) * self.radius
        return {
            "basis": "bessel",
            "num_basis": self.num_basis,
            "scale": scale,
            "frequency": math.pi / self.radius,
        }

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, "edges num_basis"]:
        x = (r / self.radius).unsqueeze(-1)
        frequency = torch.arange(1, self.num_basis + 1, device=r.device).to(r.dtype) * math.pi
        return torch.sin(x * frequency) * (0.3 * math.sqrt(2.0) / x)

    def extra_repr(self) -> str:
        return f"num_basis={self.num_basis}, radius={self.radius}"


class InversePowers(nn.Module):
    r"""The inverse powers of the paper's order (P, Q, S): :math:`(R_0 / r)^s` for s = 0 .. S, R_0 = 1 angstrom.

    Source: arXiv:1803.01588, order of an aggregation rule; departure: distances are softened (see :func:`soften`)
    so that coincident centres stay finite.

    Args:
        max_power: S, the highest inverse power, >= 0.
        radius: not used by the powers; bases share their arguments.

    Smoothness: C-infinity for r > 0, which softened distances ensure.
    Raises: ValueError: ``max_power`` < 0 or ``radius`` <= 0.
    """

    def __init__(self, max_power: int = 3, radius: float = 5.0) -> None:
        super().__init__()
        if max_power < 0:
            raise ValueError(f"max_power must be at least 0, got {max_power!r}; the paper's S, try 3")
        _check_basis(max_power + 1, radius)
        self.num_basis, self.radius = max_power + 1, float(radius)

    def compiled(self) -> dict[str, str | int | float]:
        """Arguments that describe this basis to :class:`~nbody_pyg.kernels.edges.FeatureKernel`."""
        return {"basis": "powers", "num_basis": self.num_basis, "scale": 1.0}

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, "edges num_basis"]:
        inverse = 1.0 / r
        return torch.stack([inverse**s for s in range(self.num_basis)], dim=-1)

    def extra_repr(self) -> str:
        return f"max_power={self.num_basis - 1}, radius={self.radius}"


def _check_basis(num_basis: int, radius: float) -> None:
    if num_basis < 1:
        raise ValueError(f"num_basis must be at least 1, got {num_basis!r}; try 8")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be a positive finite length in angstrom, got {radius!r}; try 5.0")
