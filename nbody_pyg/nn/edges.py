"""Features of a set of edges, shared by all gates on it, and the sum over edges."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.kernels.backend import dispatch
from nbody_pyg.kernels.edges import FeatureKernel
from nbody_pyg.kernels.gpu.features import FeatureProgram
from nbody_pyg.nn.as_written import AsWritten, written
from nbody_pyg.nn.harmonics import SolidHarmonics
from nbody_pyg.nn.irreps import Resettable
from nbody_pyg.radial import SOFT_LENGTH, BesselBasis, InversePowers, soften


class EdgeFeatures(NamedTuple):
    """Features of an edge set for the gates on it.

    ==============  =====================================================================
    field           shape
    ==============  =====================================================================
    index           (2, edges): source, target
    harmonics       (edges, (lmax+1)^2): solid harmonics of the softened direction
    radial          (edges, num_basis): radial basis times the window of the hierarchy
    num_targets     number of receiving parts
    ==============  =====================================================================
    """

    index: Tensor  # type: ignore[assignment]  # takes the place of tuple.index
    harmonics: Tensor
    radial: Tensor
    num_targets: int


class EdgeEmbedding(Resettable):
    """Edge vectors and windows to :class:`EdgeFeatures`; gates on the same edges share one.

    Args:
        lmax: highest degree of the harmonics.
        radial: basis of functions of the distance (:mod:`nbody_pyg.radial`).
        parity: "natural", "both" or "ignored".
    """

    def __init__(self, lmax: int, radial: nn.Module, parity: str = "natural") -> None:
        super().__init__()
        self.harmonics = SolidHarmonics(lmax, parity)
        self.radial = radial
        self._as_written = AsWritten(self, _KNOWN)
        self.kernel: FeatureKernel | None = None
        self.gpu: FeatureProgram | None = None
        # Compiled backends do not know a user's basis
        if self._as_written() and isinstance(radial, (BesselBasis, InversePowers)):
            known: dict[str, Any] = radial.compiled()
            polynomials = self.harmonics.polynomials()
            self.kernel = FeatureKernel(polynomials, soft=SOFT_LENGTH, **known)
            self.gpu = FeatureProgram(polynomials, soft=SOFT_LENGTH, **known)

    def forward(
        self,
        index: Int[Tensor, "2 edges"],
        vec: Float[Tensor, "edges 3"],
        window: Float[Tensor, " edges"],
        num_targets: int,
    ) -> EdgeFeatures:
        compiled = (self.kernel, self.gpu) if self._as_written() else (None, None)
        harmonics, radial = dispatch((vec, window), *compiled, self._plain)
        return EdgeFeatures(index, harmonics, radial, num_targets)

    def _plain(self, vec: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        direction, rho = soften(vec)
        return self.harmonics(direction), self.radial(rho) * window.unsqueeze(-1)


# Classes that the compiled features replace
_KNOWN = written(EdgeEmbedding, SolidHarmonics, BesselBasis, InversePowers)


def sum_into(messages: Float[Tensor, " edges *shape"], target: Int[Tensor, " edges"], num_targets: int) -> Tensor:
    """Sum messages at their targets; index_add has derivatives of every order, segment reductions do not."""
    return messages.new_zeros(num_targets, *messages.shape[1:]).index_add(0, target, messages)
