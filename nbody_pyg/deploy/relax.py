"""Relaxation of many structures at once, each to its own minimum."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from nbody_pyg.data import AtomicData, has_hierarchy
from nbody_pyg.datasets.readers import without_labels
from nbody_pyg.deploy.reference import bond_changes, with_reference
from nbody_pyg.hierarchy import Topology, TopologyCache
from nbody_pyg.network import check_states, model_frames
from nbody_pyg.potential import Potential
from nbody_pyg.system import System

_MEMORY = 30
# Step of a structure without history: the inverse stiffness of a stiff bond, angstrom^2/eV.
_FIRST_STEP = 1.0 / 70.0
_SKIN = 0.3
# Labels of the previous positions.
_STALE = frozenset({"energy", "energies", "forces", "stress", "dipole", "polarizability"})


@dataclass(frozen=True)
class Relaxation:
    """Structures after relaxation, in the order of the input.

    ================  ==========================  ==================================================
    field             shape, unit                 meaning
    ================  ==========================  ==================================================
    ``frames``                                    the input with final positions, energy and forces
    ``energy``        [structures], eV            at the end; ``start_energy`` at the start
    ``largest``       [structures], eV/A          length of the largest force at the end that may move an atom
    ``steps``         [structures]                steps taken
    ``converged``     [structures], bool          whether ``largest`` is below the bound; not where it is not finite
    ``bond_changes``  one text or None each       how the bonds found at the end differ from those used
    ================  ==========================  ==================================================

    AtomicData keeps all keys except hierarchies and other labels; Atoms keep constraints, info and arrays, and have
    energy and forces in a SinglePointCalculator. Forces are those of the potential, also on fixed atoms.
    """

    frames: list[AtomicData | Atoms]
    energy: Tensor
    start_energy: Tensor
    largest: Tensor
    steps: Tensor
    converged: Tensor
    bond_changes: tuple[str | None, ...] = ()


class _LBFGS:
    r"""Limited-memory BFGS for a batch: structures are independent, each with its own history.

    .. math:: p = -H g, \qquad s_k = r_{k+1} - r_k, \quad y_k = g_{k+1} - g_k, \quad \rho_k = 1 / (y_k \cdot s_k)

    by the two-loop recursion (Nocedal 1980), without line search: a step whose longest displacement exceeds
    ``longest`` is scaled down to it.
    """

    def __init__(self, batch: Tensor, num_graphs: int, longest: float) -> None:
        self.batch, self.num_graphs, self.longest = batch, num_graphs, longest
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return a.new_zeros(self.num_graphs).index_add(0, self.batch, (a * b).sum(dim=1))

    def step(self, pos: Tensor, forces: Tensor) -> Tensor:
        """Displacements [atoms, 3]."""
        if self.last is not None:
            s, y = pos - self.last[0], self.last[1] - forces
            curvature = self._dot(s, y)
            # A pair with negative curvature would turn the step uphill.
            useful = curvature > 1e-12
            rho = torch.where(useful, 1.0 / torch.where(useful, curvature, torch.ones_like(curvature)), 0.0)
            self.history = [*self.history[-_MEMORY + 1 :], (s, y, rho)]
        self.last = (pos, forces)
        q, factors = -forces, []
        for s, y, rho in reversed(self.history):
            a = rho * self._dot(s, q)
            factors.append(a)
            q = q - a[self.batch, None] * y
        z = _FIRST_STEP * q
        for (s, y, rho), a in zip(self.history, reversed(factors), strict=True):
            z = z + s * (a - rho * self._dot(y, z))[self.batch, None]
        length = z.norm(dim=1)
        longest = z.new_zeros(self.num_graphs).scatter_reduce(0, self.batch, length, "amax")
        return -z * (self.longest / longest.clamp(min=self.longest))[self.batch, None]

    def keep(self, atoms: Tensor, batch: Tensor, graphs: Tensor) -> None:
        """Continue with some structures only: ``atoms`` and ``graphs`` are masks, ``batch`` renumbers them."""
        self.history = [(s[atoms], y[atoms], rho[graphs]) for s, y, rho in self.history]
        self.last = None if self.last is None else (self.last[0][atoms], self.last[1][atoms])
        self.batch, self.num_graphs = batch, int(graphs.sum())


class _Active:
    """The structures that still move, as one batch in float64."""

    def __init__(
        self,
        potential: Potential,
        frames: list[AtomicData],
        parts: list[Topology] | None,
        free: Tensor | None = None,
    ) -> None:
        self.free = free
        self.potential, self.scheme = potential, potential.scheme
        # A structure keeps its initial parts; they are independent of the other structures.
        self.parted = None
        if parts is not None:
            self.parted = [tree.store(copy.copy(frame)) for tree, frame in zip(parts, frames, strict=True)]
        self.system = System.from_data(Batch.from_data_list(frames))
        self.system = self.system.replace(pos=self.system.pos.double())
        self.number = torch.arange(len(frames), device=self.system.pos.device)
        self._renew()

    def _renew(self) -> None:
        self.lists = None
        if self.scheme is not None:
            parts = None
            if self.parted is not None:
                own = [self.parted[number] for number in self.number.tolist()]
                parts = Topology.from_data(Batch.from_data_list(own))
            self.lists = TopologyCache(self.scheme, _SKIN, start=lambda z, pbc: parts)

    def evaluate(self) -> tuple[Tensor, Tensor]:
        system = self.system
        if self.lists is not None:
            system = system.replace(topology=self.lists(system))
        out = self.potential(system)
        return out["energy"], out["forces"].double()

    def move(self, pos: Tensor) -> None:
        """Continue from other positions."""
        self.system = self.system.replace(pos=pos)

    def keep(self, graphs: Tensor) -> Tensor:
        """Remove structures; returns the mask of the remaining atoms."""
        atoms = graphs[self.system.batch]
        self.system = self.system.select(graphs)
        self.free = None if self.free is None else self.free[atoms]
        self.number = self.number[graphs]
        self._renew()
        return atoms


def relax(
    potential: Potential,
    frames: Sequence[Data | Atoms],
    *,
    fmax: float = 0.01,
    max_steps: int = 500,
    longest_step: float = 0.2,
    batch_size: int = 64,
    report: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    reference: str | Path | None = None,
) -> Relaxation:
    """Move every structure to a minimum of its energy; cells are fixed.

    L-BFGS with one history per structure, all of them evaluated as one batch: the steps of a structure are the same as
    alone, and the same as those of ``ase.optimize.LBFGS``. Structures that have converged leave the batch, and so do
    those whose energy or forces are not finite.

    Parts (bonds) are those at the start, for all steps: those that a scheme has stored on the frame
    (:func:`~nbody_pyg.deploy.with_reference`), else those found there. If others are found at the end, a warning is
    given.

    Args:
        potential: in the precision in which to relax; float64 for forces below 1e-3.
        frames: structures with ``z`` and ``pos``, or ASE's Atoms; all periodic (with ``cell``) or all open. ``charge``,
            ``charges`` and ``spin`` are used if a structure has them; one without is a neutral singlet. Fixed
            coordinates are given by FixAtoms and FixCartesian of Atoms, or by a key ``fixed`` of AtomicData: bool,
            [atoms] or [atoms, 3]; convergence is judged on the forces on free coordinates.
        fmax: a structure has converged when no force is longer (eV/angstrom).
        max_steps: largest number of steps of each structure.
        longest_step: largest displacement of an atom in one step, angstrom.
        batch_size: structures per batch.
        report: called with the numbers of converged and of all structures, after every step.
        reference: model file whose reference molecule gives the bonds of the structures that are this molecule.
    Raises: ValueError: no structures, periodic together with open ones, positions that are not finite, a charge or spin
    that the model cannot use, an unsupported constraint, or fmax, max_steps, longest_step or batch_size
        not positive.
    """
    numbers = {"fmax": fmax, "max_steps": max_steps, "longest_step": longest_step, "batch_size": batch_size}
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not len(frames):
        raise ValueError("frames holds no structure to relax")
    data: Sequence[Data] = [as_data(frame, number) for number, frame in enumerate(frames)]
    _check_periodicity(data)
    if reference is not None:
        data = with_reference(data, reference, potential.scheme)
    check_states(potential.model, data)  # frames of a batch do not have their number
    parts = []
    for i in range(0, len(data), batch_size):
        parts.append(_relax_batch(potential, data[i : i + batch_size], fmax, max_steps, longest_step, report, stop))
        if stop is not None and stop():
            break
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("energy", "start_energy", "largest", "steps", "converged")
    }
    changes = tuple(text for part in parts for text in part.bond_changes)
    if changed := [number for number, text in enumerate(changes) if text is not None]:
        warnings.warn(
            f"bonds found after the relaxation of structure {changed[0]} differ from those that its energy uses, which "
            f"were kept from the start ({changes[changed[0]]}); {len(changed)} of {len(changes)} structures changed so",
            stacklevel=2,
        )
    ended: list[Any] = [frame for part in parts for frame in part.frames]
    back = [as_it_came(frame, after) for frame, after in zip(frames, ended, strict=False)]
    return Relaxation(back, **tensors, bond_changes=changes)


def as_data(frame: Data | Atoms, number: int) -> Data:
    """A checked structure, with its fixed coordinates under ``fixed``."""
    if isinstance(frame, Atoms):
        atoms, frame = frame, AtomicData.from_ase(frame, labels=False)
        if atoms.constraints or "constraints_left_out" in atoms.info:
            frame.fixed = _held(atoms, number)
    fixed, size = frame.get("fixed"), len(frame.pos)
    if fixed is not None and (fixed.dtype != torch.bool or tuple(fixed.shape) not in ((size,), (size, 3))):
        raise ValueError(
            f"fixed of frame {number} must be bool of shape [{size}] or [{size}, 3], "
            f"got {fixed.dtype} {list(fixed.shape)}"
        )
    if not bool(torch.isfinite(frame.pos).all()):
        raise ValueError(f"positions must be finite, got frame {number} with others")
    return frame


def _held(atoms: Atoms, number: int) -> Tensor:
    """Mask of the coordinates that the constraints of the atoms fix, [atoms, 3]."""
    if left_out := atoms.info.get("constraints_left_out"):
        raise ValueError(
            f"structure {number} was written without its constraints ({left_out}), which extended xyz does not hold; "
            "take a file that has them, or remove constraints_left_out from it to go on without"
        )
    fixed = torch.zeros(len(atoms), 3, dtype=torch.bool)
    if atoms.constraints:  # imports scipy (half a second), which other structures do not need
        from ase.constraints import FixAtoms, FixCartesian
    for constraint in atoms.constraints:
        if not isinstance(constraint, (FixAtoms, FixCartesian)):
            raise ValueError(
                f"constraints must be FixAtoms or FixCartesian, got {type(constraint).__name__} (frame {number}); "
                "relax that structure by an optimizer of ASE, or take the constraint away"
            )
        mask = [True] * 3 if isinstance(constraint, FixAtoms) else constraint.mask
        fixed[torch.as_tensor(constraint.index)] |= torch.as_tensor(mask, dtype=torch.bool)
    return fixed


def as_it_came(frame: Data | Atoms, after: AtomicData) -> AtomicData | Atoms:
    """The structure at its new positions, with all data that are still valid."""
    if isinstance(frame, Atoms):
        atoms = without_labels(frame)
        atoms.set_positions(after.pos.detach().cpu().numpy(), apply_constraint=False)
        forces = after.forces.detach().cpu().numpy()
        atoms.calc = SinglePointCalculator(atoms, energy=float(after.energy), forces=forces)
        return atoms
    kept = AtomicData()
    for key, value in frame.to_dict().items():
        if key not in _STALE:
            kept[key] = value
    kept = kept.without_hierarchy()
    for key, value in after.to_dict().items():
        kept[key] = value
    return kept


def _periodic(frame: Data) -> bool:
    cell, pbc = frame.get("cell"), frame.get("pbc")
    # As everywhere: a cell without pbc is periodic.
    given = cell if pbc is None else pbc
    return given is not None and bool(torch.as_tensor(given).any())


def _check_periodicity(frames: Sequence[Data]) -> None:
    periodic = [_periodic(frame) for frame in frames]
    if any(periodic) and not all(periodic):
        raise ValueError(
            f"frames must be all periodic or all open, got frame {periodic.index(True)} periodic and frame "
            f"{periodic.index(False)} open; relax them in two calls"
        )
    for number, frame in enumerate(frames):
        if periodic[number] and frame.get("cell") is None:
            raise ValueError(f"frames must have a cell where pbc is set, got frame {number} without; give it a cell")


def _alike(model: nn.Module, frames: Sequence[AtomicData]) -> list[AtomicData]:
    """The same structures with the same keys: PyG's collate takes those of the first frame, and drops all others."""
    periodic = _periodic(frames[0])
    out = []
    for frame in model_frames(model, frames):
        keys = {"z": frame.z, "pos": frame.pos}
        if periodic:
            keys["cell"] = frame.cell
            keys["pbc"] = (frame.cell != 0).any(dim=-1) if frame.get("pbc") is None else frame.pbc
        keys |= {key: frame[key] for key in ("charge", "charges", "spin") if frame.get(key) is not None}
        out.append(AtomicData(**keys))
    return out


def _relax_batch(
    potential: Potential,
    frames: Sequence[Data],
    fmax: float,
    max_steps: int,
    longest_step: float,
    report: Callable[[int, int], None] | None,
    stop: Callable[[], bool] | None,
) -> Relaxation:
    keys = ("z", "pos", "cell", "pbc", "charge", "charges", "spin")
    plain = [AtomicData.from_data(Data(**{k: frame[k] for k in keys if frame.get(k) is not None})) for frame in frames]
    scheme = potential.scheme
    parts: list[Topology] | None = None
    if scheme is not None and scheme.keeps_parts:
        parts = [scheme.read(f if has_hierarchy(f) else scheme(f)) for f in frames]
    active = _Active(potential, _alike(potential.model, plain), parts, _free(frames))
    optimizer = _LBFGS(active.system.batch, len(frames), longest_step)
    count = len(frames)
    device = active.system.pos.device
    energies, starts, largest = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(3))
    steps = torch.zeros(count, dtype=torch.long, device=device)
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(max_steps + 1):
        energy, forces = active.evaluate()
        moving = forces if active.free is None else forces * active.free
        batch, pos = active.system.batch, active.system.pos
        force = energy.new_zeros(len(energy)).scatter_reduce(0, batch, moving.norm(dim=1), "amax")
        starts = energy.clone() if step == 0 else starts
        energies[active.number], largest[active.number], steps[active.number] = energy, force, step
        finite = torch.isfinite(force) & torch.isfinite(energy)
        done = (force <= fmax) | ~finite | (step == max_steps or (stop is not None and stop()))
        for graph in done.nonzero().flatten().tolist():
            own = batch == graph
            ends[int(active.number[graph])] = (pos[own], forces[own])
        if report is not None:
            report(len(ends), count)
        if bool(done.all()):
            break
        # The step comes first, so that the history of those that stay is whole.
        moved = pos + optimizer.step(pos, moving)
        if bool(done.any()):
            atoms = active.keep(~done)
            optimizer.keep(atoms, active.system.batch, ~done)
            moved = moved[atoms]
        active.move(moved)
    for number, frame in enumerate(plain):
        frame.pos, frame.forces = ends[number]
        frame.energy = energies[number : number + 1].clone()
    changes = tuple(
        None if tree is None else bond_changes(scheme, tree, System.from_data(frame))
        for tree, frame in zip(parts or itertools.repeat(None, count), plain, strict=True)
    )
    converged = (largest <= fmax) & torch.isfinite(energies)
    return Relaxation([*plain], energies, starts, largest, steps, converged, changes)


def _free(frames: Sequence[Data]) -> Tensor | None:
    """1 for coordinates that may move and 0 for others, [atoms, 3]; None where all may."""
    if all(frame.get("fixed") is None for frame in frames):
        return None
    out = []
    for frame in frames:
        fixed = frame.get("fixed")
        free = torch.ones_like(frame.pos, dtype=torch.float64)
        if fixed is not None:
            free = free * ~(fixed if fixed.dim() == 2 else fixed[:, None])
        out.append(free)
    return torch.cat(out)
