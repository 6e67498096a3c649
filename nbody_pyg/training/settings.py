"""TrainingConfig and FineTuneConfig: all settings of training, in frozen dataclasses."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nbody_pyg.messages import check_choice


def setting(default: Any, text: str) -> Any:
    """A dataclass field with the line that ``--help`` prints."""
    return dataclasses.field(default=default, metadata={"help": text})


#: Settings that a resumed run may change: its limits, log, device, and the size of further steps. Everything else
#: (frames, model, loss, order of the frames) must be unchanged.
RESUMABLE = frozenset({
    "budget_seconds", "wall_seconds", "checkpoint_seconds", "max_epochs", "max_steps", "validate_every", "log_every",
    "threads", "device", "compile",
    "lr", "weight_decay", "warmup_steps", "constant_fraction", "clip_norm",
})  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The run ends at the first limit that is reached; at least one limit is needed.

    Raises: ValueError: no limit, or a value outside its range.
    """

    budget_seconds: float | None = setting(None, "CPU seconds of training (process time); validation is free")
    wall_seconds: float | None = setting(None, "wall-clock seconds of training, validation included")
    max_epochs: int | None = setting(None, "limit in passes over the training frames")
    max_steps: int | None = setting(None, "limit in optimizer steps")
    batch_size: int = setting(5, "molecules per step (and process)")
    batch_atoms: int | None = setting(
        None, "atoms per step (and process), for frames that are read from HDF5 files (default: batch_size mean frames)"
    )  # fmt: skip
    optimizer: str = setting("soap", "soap, adam (AMSGrad), adamw, or a class of nbody_pyg.training.optim")
    lr: float = setting(1e-2, "learning rate after the warm-up")
    weight_decay: float = setting(0.0, "weight decay of the optimizer")
    warmup_steps: int = setting(50, "steps of linear warm-up")
    constant_fraction: float = setting(0.3, "share of the run at full learning rate before the cosine to 0")
    clip_norm: float | None = setting(10.0, "largest norm of the gradient; null switches clipping off")
    ema_decay: float = setting(0.99, "decay of the averaged weights, which are validated and saved; 0: none")
    force_weight: float = setting(1.0, "weight of the force term")
    energy_weight: float = setting(0.05, "weight of the energy term, angstrom^-2")
    stress_weight: float = setting(0.0, "weight of the stress term, angstrom^-2")
    energy_per: str = setting("molecule", "energy errors count per 'molecule' or per 'atom'")
    charge_weight: float = setting(
        0.05, "weight, e^-2, with which the sum of latent charges that the network finds itself (long_range states) "
        "is trained towards the charge of the system"
    )  # fmt: skip
    penalty: str = setting("mse", "mse, huber or norm")
    validate_every: int = setting(500, "steps between two validations")
    checkpoint_seconds: float = setting(300.0, "wall-clock seconds after which last.ckpt is written again")
    log_every: int = setting(50, "steps between two rows of the log")
    seed: int = setting(0, "seed of the weights and of the order of the frames")
    dtype: str = setting("float32", "precision of the model: float32 or float64")
    threads: int = setting(1, "CPU threads of a process")
    device: str = setting("cpu", "cpu, cuda or auto")
    compile: bool = setting(False, "compile the model; the first steps are slow; needs a C++ compiler")
    processes: int = setting(1, "processes of distributed training (gloo on CPU, nccl on GPU)")

    def __post_init__(self) -> None:
        limits = (self.budget_seconds, self.wall_seconds, self.max_epochs, self.max_steps)
        if all(limit is None for limit in limits):
            raise ValueError("training needs a limit: set budget_seconds, wall_seconds, max_epochs or max_steps")
        positive = (
            "budget_seconds",
            "wall_seconds",
            "checkpoint_seconds",
            "max_epochs",
            "max_steps",
            "batch_size",
            "batch_atoms",
            "lr",
            "clip_norm",
        )
        for name in (*positive, "validate_every", "log_every", "threads", "processes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (math.isfinite(value) or name == "clip_norm")):
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("weight_decay", "warmup_steps", "force_weight", "energy_weight", "stress_weight", "charge_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be zero or positive, got {value}")
        for name, below in (("constant_fraction", 1.0), ("ema_decay", math.nextafter(1.0, 0.0))):
            value = getattr(self, name)
            if not 0 <= value <= below:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        from nbody_pyg.training.loss import PENALTIES
        from nbody_pyg.training.optim import optimizer_names

        check_choice("optimizer", self.optimizer, optimizer_names())
        check_choice("penalty", self.penalty, PENALTIES)
        check_choice("energy_per", self.energy_per, ("molecule", "atom"))
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {self.dtype!r}")
        if self.device not in ("cpu", "cuda", "auto"):
            raise ValueError(f"device must be 'cpu', 'cuda' or 'auto', got {self.device!r}")


#: What may be trained of a model, beside parts by their names.
PARTS = ("all", "readouts", "adapters")


#: Value of ``finetune.init`` for random weights.
NO_INIT = "none"


@dataclass(frozen=True)
class FineTuneConfig:
    """How to start from a trained model. The result is an ordinary model that remembers it.

    Raises: ValueError: no part, a rank below one, a negative anchor or number of frames, a number of replayed frames
    without files.
    """

    init: str | None = setting(
        None, "model file, or name of a shipped model, to start from; --init is short for it; none: random weights "
        "(if it is not given, few frames of organic molecules start from the shipped model with the nearest forces)"
    )  # fmt: skip
    parts: list[str] | str = setting(  # noqa: RUF009
        "all", "what is trained: all; readouts; adapters (low-rank changes of the maps W^l of all interactions, "
        "with readouts and the values of elements); or names such as [readouts, interactions.1]"
    )  # fmt: skip
    rank: int = setting(8, "rank of the adapters")
    anchor: float = setting(0.0, "pull towards the first weights per step, in units of the learning rate (L2-SP)")
    replay: list[str] | str | None = setting(  # noqa: RUF009
        None, "frames of the first training to train on as well, as for data.train; their energies get the new E0"
    )  # fmt: skip
    replay_frames: int | None = setting(None, "number of replayed frames, drawn at random (default: as many as train)")
    keep_elements: bool = setting(False, "keep elements that no training frame has, with the E0 of init")
    keep_inputs: bool = setting(
        False, "keep the inputs charge and spin although all training frames are neutral singlets (as with replay)"
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"finetune.parts must name what is trained, got {self.parts!r}; try 'all'")
        if len(self.parts) == 1:  # a list of one name is that name
            object.__setattr__(self, "parts", self.parts[0])
        if self.rank < 1:
            raise ValueError(f"finetune.rank must be 1 or more, got {self.rank}")
        if not 0 <= self.anchor < math.inf:
            raise ValueError(f"finetune.anchor must be zero or positive, got {self.anchor}")
        if self.replay_frames is not None and (self.replay is None or self.replay_frames < 1):
            raise ValueError(
                f"finetune.replay_frames must be positive and go with finetune.replay, got {self.replay_frames} and "
                f"{self.replay!r}"
            )
