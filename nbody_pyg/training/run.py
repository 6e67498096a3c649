"""fit: one call from frames and a model to a trained potential."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Data

from nbody_pyg.datasets.units import SAMPLE, UnitFiles
from nbody_pyg.energy import AtomicReference
from nbody_pyg.io.checkpoint import changes, read_checkpoint, with_defaults
from nbody_pyg.io.upgrades import up_to_date
from nbody_pyg.messages import symbols
from nbody_pyg.network import learn_state, model_frames
from nbody_pyg.potential import Potential
from nbody_pyg.properties import PropertyModel
from nbody_pyg.training.callbacks import MetricsCSV, RunProgress
from nbody_pyg.training.finetune import inherit
from nbody_pyg.training.folder import RunFolder
from nbody_pyg.training.labels import NO_FORCES, deciding_metric, force_variance, label_shapes, targets, uniform
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.malloc_tuning import tuned_malloc
from nbody_pyg.training.parts import parts_restored
from nbody_pyg.training.processes import is_first_process, together
from nbody_pyg.training.property_task import PropertyTask
from nbody_pyg.training.settings import RESUMABLE, FineTuneConfig, TrainingConfig
from nbody_pyg.training.stream import StreamLoader
from nbody_pyg.training.task import PotentialTask
from nbody_pyg.training.trainer import Callback, Trainer


@dataclass(frozen=True)
class FitResult:
    """Result of a run; the potential has the averaged weights of its end.

    ``interrupted`` is the number of the signal that ended the run, or None. ``best_score`` and ``best_step``
    describe ``best.ckpt``; infinite and -1 without validation frames. The score is the mean absolute error
    ``monitor``: of the first label that is both trained on and known of validation frames, of forces (meV/angstrom),
    energy (meV), stress (meV/angstrom^3) and the properties, in their units; empty where there is none. ``run`` is the
    identity of the run in all its checkpoints, ``resumed`` the steps at which it was resumed, each with the changed
    settings. ``already_finished``: it was resumed after its end, and nothing was done.
    """

    potential: Potential | PropertyModel
    steps: int
    epochs: int
    cpu_seconds: float
    best_score: float
    best_step: int
    interrupted: int | None
    monitor: str = "forces_mae"
    run: str = ""
    resumed: tuple[dict[str, Any], ...] = ()
    already_finished: bool = False

    @property
    def best_forces_mae(self) -> float:
        """``best_score`` of a run that monitors forces.

        Raises: AttributeError: it monitors another error.
        """
        if self.monitor != "forces_mae":
            raise AttributeError(f"best_forces_mae: this run monitors {self.monitor or 'nothing'}; use best_score")
        return self.best_score


def require_device(settings: TrainingConfig) -> None:
    """Raise ValueError unless the device of the settings exists."""
    if settings.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "training.device is cuda, but torch finds no GPU here; use cpu or auto, or a CUDA build of torch"
        )
    if settings.processes > torch.cuda.device_count():
        raise ValueError(
            f"training.processes is {settings.processes}, but there are {torch.cuda.device_count()} GPUs; each process "
            "needs its own"
        )


def require_elements(potential: Potential | PropertyModel, sets: Mapping[str, Sequence[Data]]) -> None:
    """Raise ValueError if a frame has an element that the model does not know; the message names set and frame."""
    known: Iterable[int] | None = potential.species
    if known is None:
        return
    for name, frames in sets.items():
        for number, frame in enumerate(frames):
            if unknown := sorted(set(frame.z.tolist()).difference(known)):
                raise ValueError(
                    f"frame {number} of {name} holds {symbols(unknown)}, which the model does not know (it knows "
                    f"{symbols(sorted(known))}); add training frames with these elements, or leave that frame out"
                )


def steps_per_epoch(settings: TrainingConfig, num_frames: int) -> int:
    """Steps of one pass over the training frames, divided among the processes."""
    return math.ceil(math.ceil(num_frames / settings.processes) / settings.batch_size)


def _last_step(settings: TrainingConfig, epoch: int) -> int:
    """The step at which the run ends, of ``epoch`` steps per epoch; -1 if only its time is limited."""
    limits = [settings.max_steps, None if settings.max_epochs is None else settings.max_epochs * epoch]
    return min((limit for limit in limits if limit is not None), default=-1)


def is_finished(settings: TrainingConfig, checkpoint: Mapping[str, Any], epoch: int) -> bool:
    """Whether a checkpoint has reached one of the limits of the settings."""
    last, spent = _last_step(settings, epoch), (checkpoint["cpu_seconds"], checkpoint.get("wall_seconds", 0.0))
    limits = zip(spent, (settings.budget_seconds, settings.wall_seconds), strict=True)
    over = any(limit is not None and seconds >= limit for seconds, limit in limits)
    return 0 <= last <= checkpoint["global_step"] or over


def fit(
    potential: Potential | PropertyModel,
    train: Sequence[Data] | UnitFiles,
    val: Sequence[Data] = (),
    settings: TrainingConfig | None = None,
    folder: str | Path = "run",
    resume: str | Path | None = None,
    show_progress: bool = True,
    callbacks: Sequence[Callback] = (),
    init: Potential | PropertyModel | None = None,
    finetune: FineTuneConfig | None = None,
) -> FitResult:
    """Train a potential, or a model of properties, in place.

    Writes ``metrics.csv``, ``last.ckpt`` and (with validation frames) ``best.ckpt`` into ``folder``; ``last.ckpt``
    every ``validate_every`` steps, with or without validation, and every ``checkpoint_seconds`` in between. The folder
    is locked meanwhile. Files of these names that an earlier run left there are moved into ``before-1``, ``before-2``,
    ... first.

    A resumed run gives the same result as one that was not stopped. It may change its limits, intervals, ``threads``,
    ``device``
    and ``compile``, and ``lr``, ``weight_decay``, ``warmup_steps``, ``constant_fraction`` and ``clip_norm``, which are
    used from there on; with another limit the schedule is that of the new one. Training frames may be appended.
    Everything else must be unchanged. A finished run is not changed.

    For a model without inputs for charge and spin, the common values of all training frames are stored as
    ``model.assumed``. Frames need not have every label: missing labels and NaN are left out of the loss and of the
    errors. Periodic and
    open frames may be mixed.

    To fine-tune a trained model, give it as ``init``: the potential gets its weights and its scale, and E0 is fitted to
    what the network leaves over (:func:`~nbody_pyg.training.finetune.inherit`; a potential to start with is
    :func:`~nbody_pyg.training.finetune.tuned_model`). ``finetune`` chooses what is trained, the rank of adapters and
    the anchor; its files are for ``nbody train``. The result remembers name and fingerprint as ``potential.ancestor``.

    Args:
        train, val: frames with labels. If the model has a scheme, store its topology on them (apply the scheme to every
            frame once); otherwise it is searched again at every step. Training frames may stay in HDF5 files
            (:class:`~nbody_pyg.datasets.UnitFiles`), of which a few are in memory at a time.
        resume: a checkpoint to resume from.
        callbacks: further ones, called after ours and before the checkpoint is written.
        init: the model to start from, such as :func:`nbody_pyg.deploy.load_model` gives it.
        finetune: how to start from it; by default all parameters are trained.

    Raises: ValueError: a network of another scheme, type or cutoff than that of ``init``, no frames, a label with a
        positive weight that none of them has, elements that the model does not know, frames that differ in charge or
        spin for a model without this input, a folder in use, a damaged checkpoint, or one of another run (the message
        names what differs); FloatingPointError: see the task.
    """
    if init is None and finetune is not None:
        raise ValueError(f"finetune needs the model to start from, got {finetune!r} without init; give init=")
    if init is not None:
        finetune = finetune or FineTuneConfig()
        e0: str | dict[int, float] = "lstsq"
        stored = None if resume is None else up_to_date(read_checkpoint(resume)["hyper_parameters"]["potential"])
        if stored is not None and stored.get("e0"):  # as fitted by the first run, even if frames were added
            e0 = {int(z): energy for z, energy in stored["e0"].items()}
        heirs = inherit(potential, init, train.sample(count=SAMPLE) if isinstance(train, UnitFiles) else train, e0)
        if stored is not None:
            _restore_reference(potential, stored)
        if show_progress and is_first_process(settings):
            print("\n".join(heirs.lines()))
    with RunFolder(folder, is_first_process(settings)) as run:
        return fit_in(run, potential, train, val, settings, resume, show_progress, callbacks, finetune=finetune)


def _restore_reference(potential: Potential | PropertyModel, stored: Mapping[str, Any]) -> None:
    """Give a model E0, or the statistics of its properties, from its description in a checkpoint of its run."""
    if isinstance(potential, PropertyModel):
        potential.statistics = PropertyModel.from_config(stored["property"], potential.model).statistics
    else:
        e0 = stored["e0"]
        potential.reference = None if e0 is None else AtomicReference({int(z): e for z, e in e0.items()})


#: Files that :func:`fit` writes.
FIT_FILES = ("metrics.csv", "last.ckpt", "best.ckpt")


def fit_in(
    run: RunFolder,
    potential: Potential | PropertyModel,
    train: Sequence[Data] | UnitFiles,
    val: Sequence[Data] = (),
    settings: TrainingConfig | None = None,
    resume: str | Path | None = None,
    show_progress: bool = True,
    callbacks: Sequence[Callback] = (),
    files: Sequence[str] = FIT_FILES,
    finetune: FineTuneConfig | None = None,
    sample: Sequence[Data] | None = None,
) -> FitResult:
    """:func:`fit` in a folder that is already locked; ``files`` are those of a run, moved away before a new one.

    ``sample`` are training frames of ``UnitFiles``, if they were read before.

    A potential to fine-tune already has its weights and E0.
    """
    settings = settings or TrainingConfig(max_epochs=100)
    require_device(settings)
    checkpoint = None if resume is None else read_checkpoint(resume)
    units: UnitFiles | None = None
    if isinstance(train, UnitFiles):
        # Files that were added to a folder are no part of a run that is resumed
        known = None if checkpoint is None else checkpoint["run"]["frames"]["train"].get("files")
        units = train if known is None else train.only(known)
        train = units.sample(count=SAMPLE) if sample is None else sample
    elif settings.batch_atoms is not None:
        raise ValueError(f"batch_atoms is for frames in HDF5 files, got {settings.batch_atoms}; use batch_size")
    require_elements(potential, {"train": train, "val": val})
    learn_state(potential.model, train)
    train, val = model_frames(potential.model, train), model_frames(potential.model, val, "the validation frames")
    note = print if show_progress and run.active else _silent
    if checkpoint is not None:
        _require_same_settings(checkpoint, settings, finetune, potential.ancestor)
    with _threads(settings.threads), parts_restored(potential):
        found = targets(potential, train, val, settings)
        train, val = found.train, found.val
        if checkpoint is None:
            scale = _loss_scale(potential, train, settings)
        else:  # that of the first run, even if frames were added
            scale = checkpoint["hyper_parameters"]["force_variance"]
        kind: type[PotentialTask] = PropertyTask if isinstance(potential, PropertyModel) else PotentialTask
        task = kind(potential, settings, scale, finetune)
        task.shares, task.monitor = found.shares, deciding_metric(potential, val, settings)
        loader = (
            FrameLoader(train, settings.batch_size, shuffle=True, seed=settings.seed)
            if units is None
            else _stream(units, potential, settings, train)
        )
        epoch = len(loader) if units is not None else steps_per_epoch(settings, len(train))
        evaluation = FrameLoader(val, 4 * settings.batch_size) if len(val) else None
        identity: dict[str, Any] = {"id": uuid.uuid4().hex, "resumed": []}
        identity["frames"] = {"train": _described(loader), "val": _described(evaluation)}
        if potential.ancestor is not None:
            identity["ancestor"] = dict(potential.ancestor)
        if checkpoint is not None:
            _require_same(checkpoint, task, identity["frames"], loader)
            if is_finished(settings, checkpoint, epoch):
                note(f"the run is finished: {checkpoint['global_step']} steps; a larger limit lets it go on")
                return _as_it_was(checkpoint, task, epoch)
            identity |= _going_on(checkpoint, settings, loader.num_frames)
            step, words = (identity["resumed"][-1][key] for key in ("step", "changes"))
            note(f"going on from step {step}{': ' if words else ''}{words}")
        same = resume is not None and Path(resume).resolve().parent == run.path.resolve()
        if not same and (target := run.move_away(files)) is not None:
            print(f"the earlier run in {run.path} is now in {target}")  # reported also without progress output
        log = MetricsCSV(run.path / "metrics.csv", settings.log_every, epoch)
        log.columns = (*log.columns, *(metric for _, metric, _ in task.shown if metric not in log.columns))
        progress = [RunProgress(log, settings.log_every)] if show_progress else []
        listening = [log, *progress, *callbacks]
        last = _last_step(settings, epoch)
        with together(settings) as device, tuned_malloc():
            anchor = 0.0 if finetune is None else finetune.anchor
            trainer = Trainer(task, loader, evaluation, run.path, last, identity, listening, device, anchor)
            if checkpoint is not None:
                trainer.load(checkpoint)
                del checkpoint  # which is larger than the model
            trainer.fit()
    potential.eval()
    return FitResult(
        potential,
        steps=trainer.step,
        epochs=trainer.step // epoch,
        cpu_seconds=trainer.clock.elapsed,
        best_score=trainer.best_score,
        best_step=trainer.best_step,
        interrupted=trainer.stop.received,
        monitor=task.monitor or "",
        run=identity["id"],
        resumed=tuple(identity["resumed"]),
    )


def _stream(
    units: UnitFiles,
    potential: Potential | PropertyModel,
    settings: TrainingConfig,
    sample: Sequence[Data],
) -> StreamLoader:
    """The loader of frames in files, with the labels that the sample has."""
    labels = {name: shape for name, shape in label_shapes(potential).items() if name in sample[0]}

    def prepare(frames: Sequence[Data]) -> Sequence[Data]:
        return uniform(model_frames(potential.model, frames, "the training frames"), labels, sample[0])

    mean = max(
        1, round(settings.batch_size * sum(int(a.sum()) for a in units.num_atoms) / sum(map(len, units.num_atoms)))
    )
    atoms = mean if settings.batch_atoms is None else settings.batch_atoms
    return StreamLoader(units, prepare, atoms, seed=settings.seed)


def _silent(text: str) -> None:
    """Print nothing."""


def _going_on(checkpoint: Mapping[str, Any], settings: TrainingConfig, num_frames: int) -> dict[str, Any]:
    """Identity of a resumed run, with the changed settings."""
    before, step = checkpoint["run"], checkpoint["global_step"]
    words = changes(_settings(checkpoint), dataclasses.asdict(settings))
    if new := num_frames - before["frames"]["train"]["count"]:
        words += f"{'; ' if words else ''}{new} new training frames behind those of before"
    return {"id": before["id"], "resumed": [*before["resumed"], {"step": step, "changes": words}]}


def _loss_scale(potential: Potential | PropertyModel, train: Sequence[Data], settings: TrainingConfig) -> float:
    """Divisor of the loss, (eV/angstrom)^2: the variance of the forces, or of the output if they vanish."""
    if isinstance(potential, PropertyModel):
        return 1.0  # each property has its own scale
    variance = force_variance(train)
    if variance > NO_FORCES**2:
        return variance
    if settings.force_weight > 0:
        raise ValueError(
            "the forces of all training frames are zero, so that they say nothing and have no scale; "
            "set training.force_weight to 0, or leave them out"
        )
    return float(potential.scale) ** 2


def _described(loader: FrameLoader | StreamLoader | None) -> dict[str, Any]:
    if loader is None:
        return {"count": 0, "sha256": ""}
    files: dict[str, Any] = {}
    if isinstance(loader, StreamLoader):  # the order of the frames depends on both
        files = {"files": loader.units.names, "in_memory": loader.window, "content": loader.units.content()}
    return {"count": loader.num_frames, "sha256": loader.digest(), **files}


#: Settings of fine-tuning that a resumed run may change: names of files, whose contents are compared.
_FILES = frozenset({"finetune.init", "finetune.replay"})


def _settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return with_defaults(checkpoint["hyper_parameters"]["settings"], TrainingConfig)


def _require_same_settings(
    checkpoint: Mapping[str, Any],
    settings: TrainingConfig,
    finetune: FineTuneConfig | None,
    ancestor: Mapping[str, Any] | None,
) -> None:
    """Raise ValueError if a resumed run changes a setting that must stay the same."""
    stored = checkpoint["hyper_parameters"].get("finetune")
    given = {} if finetune is None else dataclasses.asdict(finetune)
    stored = with_defaults(stored, FineTuneConfig) if stored else {}
    words = [
        changes(stored, given, _FILES, "finetune."),
        changes(_settings(checkpoint), dataclasses.asdict(settings), RESUMABLE),
    ]
    if any(words):
        raise ValueError(
            f"a resumed run must not change these settings: {'; '.join(filter(None, words))}; resume with the old "
            "ones, or start anew"
        )
    old, new = ((found or {}).get("sha256", "none") for found in (checkpoint["run"].get("ancestor"), ancestor))
    if finetune is not None and old != new:
        raise ValueError(
            f"init must be the model that the run started from, checksum {old[:16]}, got one of {new[:16]}; "
            "resume with that file, or start anew"
        )


def _require_same(
    checkpoint: Mapping[str, Any], task: PotentialTask, frames: Mapping[str, Any], train: FrameLoader | StreamLoader
) -> None:
    """Raise ValueError if a resumed run differs from that of the checkpoint in anything that must stay the same."""
    task.require_same_network(checkpoint)
    old, new = checkpoint["run"]["frames"], frames
    count = old["train"]["count"]
    if old["val"] != new["val"]:
        raise ValueError(
            f"validation frames must be those of the run that is resumed: {old['val']['count']} there, "
            f"{new['val']['count']} here, or changed; resume with the same, or start anew"
        )
    found = new["train"]["sha256"] if count == train.num_frames else train.digest(min(count, train.num_frames))
    if (held := old["train"].get("in_memory")) != (holds := new["train"].get("in_memory")):
        raise ValueError(
            f"in_memory must be as in the run that is resumed, {held}, got {holds}: the order of the frames depends on "
            "it; resume with the same, or start anew"
        )
    contents = old["train"].get("content"), new["train"].get("content")  # checkpoints of earlier versions have none
    changed = found != old["train"]["sha256"] or (contents[0] is not None and contents[0] != contents[1])
    if count > train.num_frames or changed:
        raise ValueError(
            f"training frames must be those of the run that is resumed, and new ones stand behind them: {count} there, "
            f"{train.num_frames} here, or changed; resume with the same, or start anew"
        )


def _as_it_was(checkpoint: Mapping[str, Any], task: PotentialTask, epoch: int) -> FitResult:
    """The result of a run that had already finished; the potential gets the averaged weights."""
    task.load_state_dict(checkpoint["state_dict"])
    best = checkpoint["callbacks"]["Checkpoints"]
    steps = checkpoint["global_step"]
    return FitResult(
        task.potential.eval(), steps, steps // epoch, checkpoint["cpu_seconds"], best["best_score"], best["best_step"],
        None, task.monitor or "", checkpoint["run"]["id"], tuple(checkpoint["run"]["resumed"]), True,
    )  # fmt: skip


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
