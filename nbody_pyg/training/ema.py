"""Exponential moving average of the weights: what is validated, tested and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class WeightEMA(Callback):
    r"""Average the weights over the last steps; validation and the final model use the average.

    .. math:: \bar w \leftarrow \bar w + (1 - \beta_n)(w - \bar w), \qquad
              \beta_n = \min(\beta, \tfrac{1 + n}{10 + n})

    The growing decay keeps the random initial weights out of short runs. Lightning's own callback loops over
    parameters in Python, and averages or copies every buffer at every step; this one makes one call.

    A checkpoint holds the average as ``state_dict`` (so that loading it gives the model that was validated)
    and the weights of the optimizer as ``training_state``, from which training goes on.

    Args:
        decay: :math:`\beta` in [0, 1); 0 switches averaging off.
    Raises: ValueError: decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.99):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self._steps = decay, 0
        self._weights: list[torch.Tensor] = []
        self._average: list[torch.Tensor] = []
        self._loaded: list[torch.Tensor] = []
        self._swapped = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        members = [p for p in module.parameters() if p.requires_grad]
        average = [a.to(module.device) for a in self._loaded or (p.detach().clone() for p in members)]
        flat = getattr(module, "flat", None)
        self._weights = [p.detach() for p in members] if flat is None else [flat.values]
        self._average = average if flat is None else [flat.pack(average)]
        self._loaded = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        torch._foreach_lerp_(self._average, self._weights, 1.0 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        kept = [w.clone() for w in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        self._average, self._swapped = kept, not self._swapped

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights, as it does in validation."""
        swaps = bool(self._weights) and not self._swapped
        if swaps:
            self._swap()
        try:
            yield
        finally:
            if swaps:
                self._swap()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._weights and not self._swapped:
            self._swap()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._swapped:
            self._swap()

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the average in the module.

        Lightning has brought the module home to the CPU by now: its parameters are no longer the tensors kept here.
        """
        # What was loaded is still there where no step was left to take.
        average = self._pieces(module) if self._weights else self._loaded
        if average:
            members = [p for p in module.parameters() if p.requires_grad]
            for parameter, value in zip(members, average, strict=True):
                parameter.copy_(value)
            self._weights = self._loaded = []

    def _pieces(self, module: LightningModule) -> list[torch.Tensor]:
        """What is kept here, in the shapes of the parameters."""
        flat = getattr(module, "flat", None)
        return self._average if flat is None else flat.views(self._average[0])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._weights:
            return
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        state = checkpoint["state_dict"]
        exchanged = {**state, **{name: w.clone() for name, w in zip(names, self._pieces(module), strict=True)}}
        # Inside validation the module holds the average, and we hold the weights of the optimizer.
        average, weights = (state, exchanged) if self._swapped else (exchanged, state)
        checkpoint["state_dict"], checkpoint["training_state"] = average, weights

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "training_state" not in checkpoint:
            return
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        self._loaded = [checkpoint["state_dict"][name].detach().clone() for name in names]
        # Lightning has loaded the average into the module: training goes on from the other weights.
        module.load_state_dict(checkpoint["training_state"])
