"""Active learning: dynamics with a committee finds the structures that are worth a label.

Members start from a trained model where one knows the atoms; its dynamics give the first structures. A round trains
every member, runs dynamics from labelled structures until the members disagree, and labels what it met there. The loop
ends when no run meets a structure beyond the limit, or when its time is over.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from nbody_pyg.active.labels import calculator
from nbody_pyg.active.settings import AUTO, FIRST, FIRST_TRAINED, VALIDATION, LearnConfig
from nbody_pyg.atomic_write import atomic_write, write_json
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.frames import Frames
from nbody_pyg.deploy.calculator import NBodyCalculator
from nbody_pyg.deploy.committee import Committee
from nbody_pyg.deploy.dynamics import MDReport, run_md
from nbody_pyg.io.model_file import load_potential, require_potential, save_model, shipped_models
from nbody_pyg.messages import short, symbols
from nbody_pyg.network import frame_states
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.system import DEFAULT_STATE
from nbody_pyg.training.config import Config, parse_config
from nbody_pyg.training.defaults import choose_defaults
from nbody_pyg.training.finetune import tuned_model
from nbody_pyg.training.inherited import with_architecture
from nbody_pyg.training.prepare import DataSets, build_potential
from nbody_pyg.training.run import fit
from nbody_pyg.training.settings import NO_INIT

#: Structures with larger forces (eV/angstrom) are no part of what a potential is for.
_LARGEST_FORCE = 40.0
#: Dynamics end where an uncertainty is so many times the limit; structures of one run are at least as far apart as they
#: are if so many times as many as it may give lie at equal distances.
_FAR, _GAPS = 3.0, 4
#: Share of the labels that members after the first are trained on where all start from one model.
_SHARE = 0.8
#: Fewest structures from dynamics that errors are measured on; before, it is done on displaced structures.
_FEW = 4


@dataclass(frozen=True)
class Round:
    """What a round met; errors and uncertainties of forces in eV/angstrom.

    ``error``: root mean square of the force vectors' errors on validation structures; ``uncertainty``: that of the
    calibrated standard deviations there; ``factor``: error over standard deviation, the calibration; ``spearman``: rank
    correlation of both over the atoms; ``new_error``: error on the structures that the round labels, before it learns
    them; ``held``: share of the steps that the runs of dynamics did before they met the limit.
    """

    number: int
    labels: int
    error: float
    energy_per_atom: float
    uncertainty: float
    factor: float
    spearman: float
    limit: float
    held: float
    new_labels: int
    new_error: float | None
    minutes: float


def learn(
    starts: Sequence[Atoms],
    folder: str | Path,
    config: LearnConfig | None = None,
    note: Callable[[str], None] = print,
) -> list[Round]:
    """Learn a potential of these atoms from as few labels as possible.

    The first labels are of structures from the dynamics of the model that the members start from, or, with random
    weights, of small random displacements. From a trained model every round starts again, the first member with all
    labels, the others with random 80 % of them, because members with the same start and the same labels would agree.

    Writes ``labelled.xyz``, ``rounds.json`` and a model of each member, ``model-0.nbody``, ``model-1.nbody``, ... into
    the folder. A folder that holds an unfinished run is continued; labels are never computed twice.

    Args:
        starts: one or more structures of the same atoms.
        note: takes a line after each step.
    Raises: ValueError: no structure, structures of other atoms, charge or spin, wrong settings, a model to start from
        that lacks an element or cannot be tuned, a folder of another run, or a damaged record in it; ImportError: a
        calculator that is not installed; RuntimeError: the calculator labels too few of the first structures.
    """
    config, folder = config or LearnConfig(), Path(folder)
    if not starts:
        raise ValueError("starts must hold a structure, got none")
    if any(a.get_chemical_symbols() != starts[0].get_chemical_symbols() for a in starts):
        raise ValueError("starts must hold structures of the same atoms in one order; learn each molecule by itself")
    state = _state_of(starts)
    config = _decided(config, starts[0], state)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, config, starts[0], state)
    run = _Run(folder, config, state, note)
    with _pool(config.processes) as work:
        if not run.rounds and len(run.labelled) < required(config.first):
            run.begin(work, starts)
        while not run.over:
            run.round(work)
        note(f"training the last models on {len(run.labelled)} labels")
        run.train(work, config.final_seconds)
    write_json(folder / "rounds.json", run.record(finished=True))
    return run.rounds


class _Run:
    """The state of a run, in memory and in its folder."""

    def __init__(self, folder: Path, config: LearnConfig, state: dict[str, float], note: Callable[[str], None]) -> None:
        self.folder, self.config, self.state, self.note = folder, config, state, note
        self.labelled: list[Atoms] = []
        self.rounds: list[Round] = []
        self._began, self._before, self._settled = time.monotonic(), 0.0, False
        if (folder / "labelled.xyz").is_file():
            self.labelled = _read(folder / "labelled.xyz")
        if (folder / "rounds.json").is_file():
            found = _read_json(folder / "rounds.json")
            self.rounds, self._before = [Round(**row) for row in found["rounds"]], found["minutes"]
            self._settled = found["settled"]

    @property
    def minutes(self) -> float:
        return self._before + (time.monotonic() - self._began) / 60

    @property
    def over(self) -> bool:
        return self._settled or len(self.rounds) >= self.config.rounds or self.minutes >= self.config.minutes

    @property
    def models(self) -> list[str]:
        return [str(self.folder / f"model-{member}.nbody") for member in range(self.config.members)]

    def record(self, finished: bool = False) -> dict[str, Any]:
        rounds = [dataclasses.asdict(one) for one in self.rounds]
        return {"rounds": rounds, "minutes": self.minutes, "settled": self._settled, "finished": finished}

    def begin(self, work: Callable[..., Iterator[Any]], starts: Sequence[Atoms]) -> None:
        """The first labels.

        Raises: RuntimeError: the calculator labels too few structures.
        """
        config, count, found, place = self.config, required(self.config.first), [], "near the start"
        if config.init != NO_INIT:
            place = f"from dynamics of {config.init}"
            each = math.ceil(count / config.walkers)
            jobs = [
                (starts[walker % len(starts)], config, each, [config.seed, 998, walker])
                for walker in range(config.walkers)
            ]
            # One of each run in turn, so that none is left out
            found = [atoms for met in zip_longest(*work(_walk, jobs)) for atoms in met if atoms is not None][:count]
        found += _rattled(starts, config, count - len(found))
        new = [atoms for atoms in found if not any(_same(atoms, known) for known in self.labelled)]  # after a stop
        self.note(f"labelling {len(new)} structures {place} with {config.label}")
        self.add(new)
        if len(self.labelled) < 2 * VALIDATION:
            raise RuntimeError(
                f"{config.label} labelled {len(self.labelled)} of {count} structures {place}; check that "
                "it computes the first structure, its charge and its spin"
            )
        elements = sorted(set(self.labelled[0].numbers.tolist()))
        if len(elements) > 1:
            self.note(
                f"reference energies: structures of one composition cannot determine those of {symbols(elements)} one "
                "by one (the fit of the energies is not affected)"
            )

    def validation(self) -> list[int]:
        """Places of the structures that no member is trained on."""
        return list(range(VALIDATION - 1, len(self.labelled), VALIDATION))

    def measured(self) -> list[Atoms]:
        """Validation structures for errors and calibration: those from dynamics, once there are some."""
        known = [self.labelled[place] for place in self.validation()]
        from_dynamics = [atoms for atoms in known if "round" in atoms.info]
        return from_dynamics if len(from_dynamics) >= _FEW else known

    def add(self, structures: Sequence[Atoms]) -> int:
        """Label structures and keep each at once; those that the calculator cannot do are left out."""
        labeller, before = calculator(self.config.label, **self.state), len(self.labelled)
        for atoms in structures:
            try:
                atoms = atoms.copy()
                atoms.calc = labeller
                results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
            except (CalculationFailed, RuntimeError, ValueError, ArithmeticError) as error:
                self.note(f"no label: {type(error).__name__}: {error}")
                continue
            if np.isfinite(results["forces"]).all() and np.abs(results["forces"]).max() < _LARGEST_FORCE:
                labelled = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
                labelled.info.update(self.state)
                if "round" in atoms.info:
                    labelled.info["round"] = atoms.info["round"]
                labelled.calc = SinglePointCalculator(labelled, **results)
                self.labelled = [*self.labelled, labelled]
                with atomic_write(self.folder / "labelled.xyz") as temporary:
                    write(temporary, self.labelled, format="extxyz")
        return len(self.labelled) - before

    def train(self, work: Callable[..., Iterator[Any]], seconds: float) -> None:
        """Train every member, from the trained model or from its last weights."""
        number = len(self.rounds)
        labelled, first = str(self.folder / "labelled.xyz"), self.config.seed + 1000 * number
        jobs = [
            (path, labelled, self.validation(), seconds, first + k, self.config.init, 1.0 if k == 0 else _SHARE)
            for k, path in enumerate(self.models)
        ]
        for _ in work(_train_member, jobs):
            pass

    def round(self, work: Callable[..., Iterator[Any]]) -> None:
        """Train, measure, explore, label."""
        config, number = self.config, len(self.rounds)
        self.train(work, config.train_seconds)
        known = self.measured()
        committee = Committee(self.models)
        spread, error, energy = _compare(committee, known)
        factor = float(np.sqrt(np.mean(error**2) / np.mean(spread**2)))
        forces = np.concatenate([atoms.get_forces() for atoms in self.labelled])
        limit = config.limit or 0.15 * float(np.sqrt((forces**2).sum(1).mean()))
        generator = np.random.default_rng([config.seed, number])
        # Low energies first: a structure that was met far away need not be a good start
        order = np.argsort([atoms.get_potential_energy() for atoms in self.labelled])[: max(8, len(self.labelled) // 2)]
        starts = [self.labelled[int(generator.choice(order))] for _ in range(config.walkers)]
        most = max(1, math.ceil(config.per_round / config.walkers))
        jobs = [
            (self.models, start, config, limit / factor, most, [config.seed, number, walker])
            for walker, start in enumerate(starts)
        ]
        walks = list(work(_explore, jobs))
        met = [atoms for found, _ in walks for atoms in found]
        held = float(np.mean([share for _, share in walks]))
        self._settled = not met and number > 0
        new_error, added = None, 0
        if met:
            for atoms in met:
                atoms.info["round"] = number + 1
            before = len(self.labelled)
            added = self.add(met)
            if added:
                new_error = float(np.sqrt(np.mean(_compare(committee, self.labelled[before:])[1] ** 2)))
        self.rounds.append(Round(
            number=number, labels=len(self.labelled) - added, error=float(np.sqrt(np.mean(error**2))),
            energy_per_atom=energy, uncertainty=factor * float(np.sqrt(np.mean(spread**2))), factor=factor,
            spearman=_spearman(spread, error), limit=limit, held=held, new_labels=added, new_error=new_error,
            minutes=self.minutes,
        ))  # fmt: skip
        write_json(self.folder / "rounds.json", self.record())
        now = self.rounds[-1]
        told = "" if new_error is None else f", error on the new ones {new_error:.3f}"
        self.note(
            f"round {number}: {now.labels} labels, error {now.error:.3f} eV/A (limit {limit:.3f}), rank correlation "
            f"{now.spearman:.2f}, dynamics held {100 * held:.0f} %, {added} new labels{told}; {now.minutes:.1f} min"
        )


def _same(first: Atoms, second: Atoms) -> bool:
    """Whether two structures are one, but for the digits of a file."""
    return len(first) == len(second) and np.allclose(first.positions, second.positions, rtol=0, atol=1e-6)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        said = f"it holds {short(found)}"
    except ValueError as error:
        said = str(error)
    raise ValueError(f"{path} is no record of nbody learn ({said}); begin anew in another folder")


def _state_of(starts: Sequence[Atoms]) -> dict[str, float]:
    """Charge and spin of all structures, as far as they say. Raises: ValueError: they differ."""
    state = frame_states([AtomicData.from_ase(atoms) for atoms in starts])
    for key, values in state.items():
        if len(set(values)) > 1:
            raise ValueError(
                f"starts must hold structures of one {key}, got {sorted(set(values))}; learn each by itself"
            )
    return {key: values[0] for key, values in state.items()}


def _claim(folder: Path, config: LearnConfig, first: Atoms, state: dict[str, float]) -> None:
    """Note whose folder it is. Raises: ValueError: it belongs to a run of other atoms, charge, spin or settings."""
    path, free = folder / "learn.json", ("rounds", "minutes", "processes", "final_seconds")
    mine = {"atoms": first.get_chemical_formula(mode="reduce"), **DEFAULT_STATE, **state, **dataclasses.asdict(config)}
    if not path.is_file():
        if any((folder / name).exists() for name in ("labelled.xyz", "rounds.json", "model-0.nbody")):
            raise ValueError(f"{folder} holds files of another command; choose another folder")
        write_json(path, mine)
        return
    # Runs of earlier versions say nothing of charge and spin, and had no trained model
    theirs = {**DEFAULT_STATE, "init": NO_INIT, **_read_json(path)}
    changed = [key for key in mine if key not in free and theirs.get(key) != mine[key]]
    if changed:
        words = ", ".join(f"{key} is {theirs.get(key)!r} there, {mine[key]!r} here" for key in changed)
        raise ValueError(f"{folder} holds a run with other settings ({words}); repeat them, or choose another folder")


def _decided(config: LearnConfig, atoms: Atoms, state: dict[str, float]) -> LearnConfig:
    """The settings with the model that members start from, or "none", and the number of first labels.

    Raises: ValueError: the given model lacks an element, or cannot be tuned. FileNotFoundError: there is no such model.
    """
    elements, init = set(atoms.numbers.tolist()), config.init
    if init == AUTO:
        names = [] if atoms.pbc.any() or "spin" in state else shipped_models()
        init = next((name for name in names if elements <= set(load_potential(name).species or ())), NO_INIT)
    elif init != NO_INIT:
        model = load_potential(init)
        if lacking := elements.difference(model.species or elements):
            raise ValueError(
                f"init must know the atoms, but {init} lacks {symbols(sorted(lacking))}; choose another model, or "
                f"{NO_INIT} for random weights"
            )
        _tuning(init, model, 1.0, 0)
    first = config.first or (FIRST if init == NO_INIT else FIRST_TRAINED)
    return dataclasses.replace(config, init=init, first=first)


def _rattled(starts: Sequence[Atoms], config: LearnConfig, count: int) -> list[Atoms]:
    """The starts, and displacements of several sizes."""
    generator, out = np.random.default_rng([config.seed, 999]), [atoms.copy() for atoms in starts][:count]
    while len(out) < count:
        atoms = starts[len(out) % len(starts)].copy()
        size = config.rattle * generator.uniform(0.4, 1.6)
        atoms.positions += generator.normal(scale=size, size=atoms.positions.shape)
        out.append(atoms)
    return out


def _read(path: str | Path) -> list[Atoms]:
    found = read(path, ":")
    return [found] if isinstance(found, Atoms) else found


def _frames(structures: Sequence[Atoms]) -> Frames:
    return Frames([AtomicData.from_ase(atoms) for atoms in structures])


def _train_member(job: tuple[str, str, list[int], float, int, str, float]) -> None:
    """Train one member and write it; with random weights its network and settings are chosen in the first round."""
    path, labelled, validation, seconds, seed, init, share = job
    torch.set_num_threads(1)
    frames = _frames(_read(labelled))
    val = frames.select(validation)
    places = [place for place in range(len(frames)) if place not in set(validation)]
    log = Path(path).with_suffix("") / f"{len(frames)}-labels-{seed}"
    with _silent("nbody_pyg.datasets.reference"):  # the same in every round; the run says it once
        if init == NO_INIT:
            first = load_potential(path) if Path(path).is_file() else None
            potential = trained(DataSets(frames.select(places), val), seconds, seed, log, first)
        else:
            kept = np.random.default_rng(seed).permutation(places)[: math.ceil(share * len(places))]
            potential = tuned(DataSets(frames.select(sorted(kept.tolist())), val), seconds, seed, log, init)
    save_model(potential, path, {"labels": len(frames)})


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Without the messages of a logger."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logging.getLogger(logger).addFilter(nothing)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(nothing)


def trained(data: DataSets, seconds: float, seed: int, folder: Path, potential: Potential | None = None) -> Potential:
    """A potential with the settings that ``nbody train`` chooses for these frames, trained for some CPU seconds.

    Args:
        potential: where training goes on from; None: a new network.
    """
    config, _ = choose_defaults(_config(seconds, seed), data)
    if potential is None:
        potential = require_potential(build_potential(config, data))
    fit(potential, data.train, (), config.training, folder, show_progress=False)
    return potential


def tuned(data: DataSets, seconds: float, seed: int, folder: Path, init: str) -> Potential:
    """A potential that ``nbody train --init`` makes of a trained one, with the settings that it chooses."""
    start = load_potential(init)
    config, _ = choose_defaults(_tuning(init, start, seconds, seed), data)
    potential = require_potential(tuned_model(start, data.train, config.data.e0)[0])
    fit(potential, data.train, (), config.training, folder, show_progress=False, init=start, finetune=config.finetune)
    return potential


def _tuning(name: str, init: Potential, seconds: float, seed: int) -> Config:
    return with_architecture(_config(seconds, seed, finetune={"init": name}), init)


def _config(seconds: float, seed: int, **sections: Any) -> Config:
    training = {"budget_seconds": seconds, "seed": seed, "validate_every": 10**6}
    return parse_config({"data": {"train": "in memory"}, "training": training, **sections})


def _walk(job: tuple[Atoms, LearnConfig, int, list[int]]) -> list[Atoms]:
    """Structures at equal times of the dynamics of a trained model; fewer if these stop early."""
    start, config, count, seed = job
    torch.set_num_threads(1)
    atoms = start.copy()
    atoms.calc = NBodyCalculator(config.init)
    met: list[Atoms] = []
    every, step = max(config.steps // count, 1), 0

    def keep(now: Atoms) -> None:
        nonlocal step
        step += 1
        if step % every == 0 and len(met) < count:
            met.append(_bare(now))

    _dynamics(atoms, config, seed, keep)
    return met


def _dynamics(atoms: Atoms, config: LearnConfig, seed: list[int], stop: Callable[[Atoms], str | None]) -> MDReport:
    return run_md(
        atoms, config.steps, ensemble="langevin", timestep=config.timestep, temperature=config.temperature,
        friction=0.02, seed=int(np.random.default_rng(seed).integers(2**31)), sample_every=config.steps, stop=stop,
        velocities="drawn",
    )  # fmt: skip


def _explore(job: tuple[list[str], Atoms, LearnConfig, float, int, list[int]]) -> tuple[list[Atoms], float]:
    """Dynamics until the members disagree; structures to label, and the share of the steps before the first of them.

    Where the uncertainty of a force is beyond the limit, the run goes on for a while, because what follows differs more
    from what is known than the first of these structures does. It ends when it has met enough structures at some
    distance in time, or far beyond the limit.
    """
    models, start, config, limit, most, seed = job
    torch.set_num_threads(1)
    atoms = start.copy()
    atoms.calc = Committee(models)
    met: list[tuple[int, Atoms]] = []
    apart, step = max(config.steps // (_GAPS * most), 1), 0

    def stop(now: Atoms) -> str | None:
        nonlocal step
        step += 1
        spread = float(now.calc.get_property("forces_std", now).max())
        if spread > limit and (not met or step - met[-1][0] >= apart):
            met.append((step, _bare(now)))
        return "uncertain" if len(met) >= most or spread > _FAR * limit else None

    report = _dynamics(atoms, config, seed, stop)
    if report.stopped is not None and not met:
        met.append((step, _bare(atoms)))
    held = met[0][0] - 1 if met else step
    return [structure for _, structure in met], min(1.0, held / config.steps)


def _bare(atoms: Atoms) -> Atoms:
    kept: Atoms = atoms.copy()
    kept.set_momenta(np.zeros((len(kept), 3)))
    return kept


def _compare(committee: Committee, labelled: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray, float]:
    """Standard deviation among the members and error of their mean, of each force; and MAE of the energy per atom."""
    spread, error, energy = [], [], []
    for atoms in labelled:
        now = atoms.copy()
        now.calc = committee
        difference = now.get_forces() - atoms.get_forces()
        spread.append(committee.results["forces_std"])
        error.append(np.sqrt((difference**2).sum(1)))
        energy.append(abs(now.get_potential_energy() - atoms.get_potential_energy()) / len(now))
    return np.concatenate(spread), np.concatenate(error), float(np.mean(energy))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; values without equals."""
    x, y = (np.argsort(np.argsort(values)) - 0.5 * (len(values) - 1) for values in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@contextmanager
def _pool(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map``, in processes of their own unless ``processes`` is 0."""
    if processes == 0:
        yield map
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map
