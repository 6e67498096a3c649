"""The training loss: energies, forces and stress in one dimensionless number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbody_pyg.messages import check_choice


def _mse(error: Tensor, width: float) -> Tensor:
    return error.square().mean()


def _huber(error: Tensor, width: float) -> Tensor:
    # 2 x PyTorch's Huber loss: equal to the square for small errors, so that weights have the same meaning.
    return 2.0 * torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=width)


def _norm(error: Tensor, width: float) -> Tensor:
    """Mean length of the error vectors (rotation invariant L1), with a finite gradient at 0."""
    rows = error.reshape(error.shape[0], -1)
    return (rows.square().mean(dim=1) + width**2 * 1e-6).sqrt().mean() * width


PENALTIES: dict[str, Callable[[Tensor, float], Tensor]] = {"mse": _mse, "huber": _huber, "norm": _norm}


def penalized(error: Tensor, penalty: str, width: float) -> Float[Tensor, ""]:
    """Penalty of the errors; 0 if there are none, because an empty mean is NaN."""
    # The empty sum is differentiable, so a batch without labels is a valid step with zero gradients.
    return PENALTIES[penalty](error, width) if error.numel() else error.sum()


@dataclass(frozen=True)
class EnergyForceLoss:
    r"""Weighted penalties of forces, interaction energy and stress over the variance of the forces.

    .. math:: L = \frac{1}{\sigma_F^2} \Big[ w_F \langle d(F - F^*) \rangle + w_E \langle d(E - E^*) \rangle
              + w_S \langle d(\tfrac{V}{N} (\sigma - \sigma^*)) \rangle \Big]
              + w_Q \langle (Q - Q^*)^2 \rangle, \qquad d(x) = x^2

    E is the interaction energy: E0 is subtracted from the label in float64, before any cast.

    ======================  ==================  ==================================================
    symbol                  code                unit
    ======================  ==================  ==================================================
    :math:`F`               forces              eV/angstrom; mean over atoms and components
    :math:`E`               energy              eV per molecule (or per atom: ``energy_per="atom"``)
    :math:`\sigma V/N`      stress              eV per atom
    :math:`Q`               charges             e; sum of latent charges, of each channel of a molecule
    :math:`\sigma_F^2`      ``force_variance``  (eV/angstrom)^2, mean square of the training forces
    :math:`w_F`             ``force_weight``    1
    :math:`w_E, w_S`        ``energy_weight``   angstrom^-2
    :math:`w_Q`             ``charge_weight``   e^-2
    ======================  ==================  ==================================================

    Args:
        penalty: ``mse`` as above; ``huber``, quadratic up to 1 standard deviation of the forces and linear
            beyond it; ``norm``, the length of the error (times the standard deviation).
    Raises: ValueError: unknown penalty, ``energy_per`` neither molecule nor atom, non-positive variance,
        negative weight, all weights zero.
    """

    force_variance: float = 1.0
    force_weight: float = 1.0
    energy_weight: float = 0.05
    stress_weight: float = 0.0
    energy_per: str = "molecule"
    penalty: str = "mse"
    charge_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice("penalty", self.penalty, PENALTIES)
        if self.energy_per not in ("molecule", "atom"):
            raise ValueError(f"energy_per must be 'molecule' or 'atom', got {self.energy_per!r}")
        if not self.force_variance > 0:
            raise ValueError(
                f"force_variance must be positive, got {self.force_variance}: are all training forces zero?"
            )
        weights = (self.force_weight, self.energy_weight, self.stress_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights must not be negative, and one must be positive, got {weights}")

    def __call__(
        self,
        energy_error: Float[Tensor, " energies"] | None,
        force_error: Float[Tensor, "atoms 3"] | None,
        virial_error: Float[Tensor, "stresses 3 3"] | None = None,
        num_atoms: Int[Tensor, " energies"] | None = None,
        factors: Mapping[str, float] | None = None,
        charge_error: Float[Tensor, "molecules channels"] | None = None,
    ) -> Float[Tensor, ""]:
        """Errors are prediction minus label; a NaN marks a missing label and has to be removed before.

        A term without labels is 0.

        Args:
            factors: factors of the means over ``energy``, ``forces`` and ``stress`` if labels are missing: number of
                known labels of this batch over their average number in a batch; 1 by default.
        """
        factors = factors or {}
        width = self.force_variance**0.5
        loss: Tensor | float = 0.0
        if force_error is not None and self.force_weight:
            loss = loss + self.force_weight * factors.get("forces", 1.0) * penalized(force_error, self.penalty, width)
        if energy_error is not None and self.energy_weight:
            if self.energy_per == "atom" and num_atoms is not None:
                energy_error = energy_error / num_atoms
            loss = loss + self.energy_weight * factors.get("energy", 1.0) * penalized(energy_error, self.penalty, width)
        if virial_error is not None and self.stress_weight:
            loss = loss + self.stress_weight * factors.get("stress", 1.0) * penalized(virial_error, self.penalty, width)
        if not isinstance(loss, Tensor):
            raise ValueError("no term of the loss has both a label and a positive weight")
        loss = loss / self.force_variance
        return loss if charge_error is None else loss + self.charge_weight * charge_error.square().mean()
