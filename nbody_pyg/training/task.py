"""PotentialTask: a potential, its loss and its schedule as a LightningModule."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from nbody_pyg.accelerate import compile_potential
from nbody_pyg.potential import Potential
from nbody_pyg.training.build import potential_config, potential_from_config, up_to_date
from nbody_pyg.training.checkpoint import changes, check_seal
from nbody_pyg.training.clock import ProcessClock
from nbody_pyg.training.flat import FlatParameters
from nbody_pyg.training.labels import aligned, has_stress
from nbody_pyg.training.loss import EnergyForceLoss
from nbody_pyg.training.metrics import ErrorMeter, RunningMeans
from nbody_pyg.training.optim import build_optimizer
from nbody_pyg.training.schedule import WarmupCosine
from nbody_pyg.training.settings import TrainingConfig


class PotentialTask(LightningModule):
    """Trains a potential on energies, forces and stress; works for any model that a Potential takes.

    The learning rate follows :class:`WarmupCosine` over the *progress* of the run: the larger of its shares
    of steps, epochs and CPU time (whichever limits are set). When the budget of CPU time is spent, training
    stops after the step at hand. Gradient clipping is done here, so the Trainer needs no
    ``gradient_clip_val``. The Trainer needs ``inference_mode=False``, since forces are derivatives.

    Args:
        potential: what is trained; or the dictionary that a checkpoint holds in its place.
        settings: a TrainingConfig, or its dictionary.
        force_variance: mean square of the components of the training forces, (eV/angstrom)^2.
    Raises:
        FloatingPointError: the loss is not finite; names the step and what to try.
        ValueError: a batch without any label that the loss weighs.
    """

    def __init__(
        self,
        potential: Potential | dict[str, Any],
        settings: TrainingConfig | dict[str, Any],
        force_variance: float = 1.0,
    ):
        super().__init__()
        self.potential = potential_from_config(potential) if isinstance(potential, dict) else potential
        self.settings = s = TrainingConfig(**settings) if isinstance(settings, dict) else settings
        self.potential.to(getattr(torch, s.dtype))
        self.loss = EnergyForceLoss(
            float(force_variance), s.force_weight, s.energy_weight, s.stress_weight, s.energy_per, s.penalty
        )
        self.schedule = WarmupCosine(s.warmup_steps, s.constant_fraction)
        self.clock = ProcessClock()
        self.progress, self._total_steps = 0.0, math.inf
        self.hparams.update(
            potential=potential_config(self.potential),
            settings=dataclasses.asdict(s),
            force_variance=float(force_variance),
        )
        self._hparams_initial = dict(self.hparams)
        self._hparams_name = "kwargs"
        self._compiled = compile_potential(self.potential, "training") if s.compile else None
        self.flat: FlatParameters | None = None
        self._groups: list[dict[str, Any]] = []
        self._chosen: list[dict[str, Any]] = []
        self._meter: ErrorMeter | None = None
        # What is shown of a run, (title, metric, unit), and the metric by which the best weights are chosen.
        self.shown = (("E", "energy_mae", "meV"), ("F", "forces_mae", "meV/A"))
        self.monitor: str | None = "forces_mae" if s.force_weight > 0 else "energy_mae"
        self.running = RunningMeans()
        # Share of the training labels that are known, by label; `fit` sets what is below 1.
        self.shares: dict[str, float] = {}
        self.run = ""  # identity of the run, where it has one

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, *args: Any, weights_only: bool = True, **keywords: Any
    ) -> PotentialTask:
        """As Lightning has it, but without pickles, and a checkpoint with a checksum has to match it.

        Raises: ValueError: it does not, or ``weights_only`` is False.
        """
        if not weights_only:
            raise ValueError("weights_only must be True: a checkpoint holds tensors and plain values, and runs no code")
        check_seal(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, weights_only=True, **keywords)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook here two dozen times per step; the way through nn.Module, which
        # asks whether it is a parameter or a module, takes 0.1 ms of a step.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- loss ----------------------------------------------------------------------------------------------
    def _errors(self, batch: Any, training: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        s = self.settings
        forces = "forces" in batch and (s.force_weight > 0 or not training)
        stress = s.stress_weight > 0 and has_stress(batch)
        evaluate = self._compiled if training and self._compiled is not None else self.potential
        result = evaluate(batch, compute_forces=forces, compute_stress=stress, training=training)
        errors = {}
        if "energy" in batch:
            # Total energies, with E0, differ in float64; only their small difference is cast.
            label = aligned(batch.energy, result["energy"], "energy")
            difference = (result["energy"] - label).to(result["interaction_energy"].dtype)
            errors["energy_error"] = _known(difference, label)
        if forces:
            label = aligned(batch.forces, result["forces"], "forces")
            errors["force_error"] = _known(result["forces"] - label.to(result["forces"].dtype), label)
        if stress:
            volume = torch.linalg.det(batch.cell).abs() / torch.bincount(batch.batch)
            label = aligned(batch.stress, result["stress"], "stress")
            error = result["stress"] - label.to(result["stress"].dtype)
            errors["virial_error"] = _known(error * volume.to(error.dtype).view(-1, 1, 1), label)
        elif s.stress_weight > 0 and "stress" in batch:  # open systems only: nothing, but a term of the loss
            errors["virial_error"] = result["interaction_energy"][:0].reshape(0, 1, 1).expand(0, 3, 3)
        return result, errors

    def _factors(self, errors: dict[str, Tensor], batch: Any) -> dict[str, float]:
        """Known labels of this batch over those that a batch has on average; 1 where none is missing.

        The mean over the known labels of a batch, times this, averages over all batches and processes to the mean over
        all labels: a frame does not count more because its neighbours in the batch have no label.
        """
        if all(share == 1.0 for share in self.shares.values()):
            return {}
        rows = {"energy": ("energy_error", batch.num_graphs), "forces": ("force_error", len(batch.z)),
                "stress": ("virial_error", batch.num_graphs)}  # fmt: skip
        return {
            label: len(errors[key]) / (count * self.shares[label])
            for label, (key, count) in rows.items()
            if key in errors and self.shares.get(label, 1.0) < 1.0
        }

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        _, errors = self._errors(batch, training=True)
        if self.settings.energy_per == "atom" and "energy_error" in errors:
            errors["num_atoms"] = torch.bincount(batch.batch)[~batch.energy.reshape(-1).isnan()]
        loss = self.loss(errors.get("energy_error"), errors.get("force_error"), errors.get("virial_error"),
                         errors.get("num_atoms"), self._factors(errors, batch))  # fmt: skip
        self.running.add(loss, errors.get("energy_error"), errors.get("force_error"))
        # On the CPU the value is at hand; on a GPU asking for it would stall every step.
        if loss.device.type == "cpu" or batch_idx % self.settings.log_every == 0:
            self._check_finite(loss.item())
        return loss

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss became {loss} at step {self.global_step} (learning rate "
                f"{self.optimizers().param_groups[0]['lr']:.3g}); the last checkpoint, if there is one, is still "
                "good. Try a smaller lr, a longer warmup_steps, a smaller clip_norm, or dtype float64; check the labels"
            )

    # -- optimization --------------------------------------------------------------------------------------
    def configure_optimizers(self) -> torch.optim.Optimizer:
        s = self.settings
        # Several processes: the reducer of DDP wants to own the gradients.
        self.flat = FlatParameters(self.potential) if self.trainer.world_size == 1 else None
        optimizer = build_optimizer(s.optimizer, self.potential, s.lr, s.weight_decay, self.flat)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        names = ("initial_lr", "weight_decay")
        self._chosen = [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]
        return optimizer

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self.flat is None:
            optimizer.zero_grad()
        else:
            self.flat.zero_grad()

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Called before every update."""
        limit = self.settings.clip_norm
        if limit is None:
            return
        if self.flat is None:
            gradients = [p for p in self.potential.parameters() if p.grad is not None]
            self.running.norm += torch.nn.utils.clip_grad_norm_(gradients, limit, foreach=True)
        else:
            self.running.norm += self.flat.clip_grad_norm(limit)

    def current_progress(self) -> float:
        """Share of the run that is over, in [0, 1]; the same number on every process."""
        s = self.settings
        shares = [self.global_step / self._total_steps]
        if s.budget_seconds is not None:
            shares.append(self.clock.elapsed / s.budget_seconds)
        progress = min(1.0, max(shares))
        if s.budget_seconds is not None and dist.is_available() and dist.is_initialized():
            # Unequal learning rates would let the processes drift apart.
            shared = torch.tensor([progress], dtype=torch.float64, device=self.device)
            dist.broadcast(shared, src=0)
            progress = float(shared)
        return progress

    def on_train_start(self) -> None:
        self.running.clear()
        self._total_steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
        self._groups = self.optimizers(use_pl_optimizer=False).param_groups
        for group, chosen in zip(self._groups, self._chosen, strict=True):
            group.update(chosen)  # a checkpoint brings the rates of before along
        self.progress = self.current_progress()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.clock.start()
        factor = self.schedule(self.global_step, self.progress)
        for group in self._groups:
            group["lr"] = group["initial_lr"] * factor

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.progress = self.current_progress()
        if self.settings.budget_seconds is not None and self.progress >= 1.0:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        self.clock.pause()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch if batch.pos.device == device else batch.to(device)

    # -- validation and test -------------------------------------------------------------------------------
    def on_validation_start(self) -> None:
        self.clock.pause()

    def on_validation_epoch_start(self) -> None:
        self._meter = ErrorMeter(self.device)

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        with torch.enable_grad():
            result, _ = self._errors(batch, training=False)
        self._meter.update(result, batch)

    def on_validation_epoch_end(self) -> None:
        self._meter.reduce()
        for name, value in self._meter.compute().items():
            self.log(f"val_{name}", value, rank_zero_only=False)
        self._meter = None

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._meter.reduce()
        for name, value in self._meter.compute().items():
            self.log(f"test_{name}", value, rank_zero_only=False)
        self._meter = None

    # -- log and checkpoint --------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cpu_seconds"] = self.clock.elapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises: ValueError: it is of another network; weights alone would fit many."""
        self.require_same_network(checkpoint)
        self.clock = ProcessClock(float(checkpoint.get("cpu_seconds", 0.0)))

    def require_same_network(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError where a checkpoint is of another network, E0, scale, repulsion or precision."""
        stored = checkpoint.get("hyper_parameters", {}).get("potential")
        if not isinstance(stored, Mapping):
            return
        mine, theirs = self.hparams["potential"], dict(stored)
        network = theirs["model"]["config"]
        if network is not None and mine["model"]["config"] is not None:
            theirs["model"] = theirs["model"] | {"config": up_to_date(network)}
        if words := changes(theirs, mine):
            words = words.replace("model.config.", "")
            raise ValueError(f"the checkpoint must be of the same network: {words}; resume with its settings")


# Lightning asks for the signature at every step; it is found at once when it is written down.
PotentialTask.training_step.__signature__ = inspect.signature(PotentialTask.training_step)


def _known(error: Tensor, label: Tensor) -> Tensor:
    """Rows whose label is not missing (NaN). A prediction that is NaN stays, to be noticed."""
    missing = label.isnan()
    if not bool(missing.any()):
        return error
    return error[~missing.flatten(1).any(dim=1)] if error.dim() > 1 else error[~missing]
