"""Relaxation of many structures at once, each to its own minimum."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from nbody_pyg.data import AtomicData, has_hierarchy, implied_pbc
from nbody_pyg.datasets.readers import without_labels
from nbody_pyg.deploy.reference import bond_changes, with_reference
from nbody_pyg.geometry import has_volume
from nbody_pyg.hierarchy import Topology, TopologyCache
from nbody_pyg.messages import check_choice
from nbody_pyg.network import check_states, model_frames
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
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
    ``largest``       [structures], eV/A          length of the largest force at the end that may move an atom; with
                                                  ``cell`` also of the rows of the force on the cell
    ``steps``         [structures]                steps taken
    ``converged``     [structures], bool          whether ``largest`` is below the bound; not where it is not finite
    ``bond_changes``  one text or None each       how the bonds found at the end differ from those used
    ================  ==========================  ==================================================

    AtomicData keeps all keys except hierarchies and other labels; Atoms keep constraints, info and arrays, and have
    energy, forces and (with ``cell``) stress in a SinglePointCalculator. Forces are those of the potential, also on
    fixed atoms.
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


class _Cells:
    r"""Cells as further coordinates of an optimizer, in the form of ASE's ``FrechetCellFilter``.

    .. math:: r_i = F q_i, \qquad C = C_0 F^T, \qquad F = \exp L, \qquad
              f_{q_i} = F^T f_i, \qquad f_L = -\frac1N \frac{\partial (E + pV)}{\partial L}

    The rows of an optimizer are q, and then N times L, three rows for each structure. L is symmetric, so a cell is
    not turned, and strains periodic directions only. ``isotropic``: L is a multiple of the unit matrix of these.

    Args:
        system: structures with cells.
        isotropic: keep the shape.
        pressure: p, eV/angstrom^3.
    """

    def __init__(self, system: System, isotropic: bool, pressure: float) -> None:
        cell, pbc = required(system.cell).double(), required(system.pbc)
        self.start = cell
        # Projector on the span of the periodic lattice vectors
        rows = cell * pbc.unsqueeze(2)
        u, values, _ = torch.linalg.svd(rows.transpose(1, 2))
        span = u * (values > 1e-8).unsqueeze(1)
        self.projector = span @ span.transpose(1, 2)
        self.isotropic, self.pressure = isotropic, pressure
        self.log = torch.zeros_like(cell)
        self.grown = torch.eye(3, dtype=cell.dtype, device=cell.device).expand_as(cell)  # F = exp L
        self.atoms = torch.bincount(system.batch, minlength=len(cell)).double().reshape(-1, 1, 1)

    def rows(self, pos: Tensor, batch: Tensor) -> Tensor:
        """The coordinates, [atoms + 3 structures, 3]."""
        inner = torch.linalg.solve(self.grown[batch], pos.unsqueeze(2)).squeeze(2)
        return torch.cat([inner, (self.atoms * self.log).reshape(-1, 3)])

    def forces(self, forces: Tensor, stress: Tensor, cell: Tensor, batch: Tensor) -> Tensor:
        """The forces on the coordinates. ``stress`` is that of the potential, eV/angstrom^3."""
        volume = torch.linalg.det(cell.double()).abs().reshape(-1, 1, 1)
        unit = torch.eye(3, dtype=volume.dtype, device=volume.device)
        strain = volume * (stress.double() + self.pressure * unit)  # derivative by a strain of the structure as it is
        strain = self.projector @ (0.5 * (strain + strain.transpose(1, 2))) @ self.projector
        # The derivative of exp L by L in its eigenvectors: divided differences of the exponential
        values, u = torch.linalg.eigh(self.log)
        gap = values.unsqueeze(2) - values.unsqueeze(1)
        near = gap.abs() < 1e-6
        middle = (0.5 * (values.unsqueeze(2) + values.unsqueeze(1))).exp()
        rise = values.exp().unsqueeze(2) - values.exp().unsqueeze(1)
        divided = torch.where(near, middle, rise / torch.where(near, 1.0, gap))
        by_log = u @ (divided * (u.transpose(1, 2) @ strain @ torch.linalg.inv(self.grown) @ u)) @ u.transpose(1, 2)
        by_log = 0.5 * (by_log + by_log.transpose(1, 2))
        if self.isotropic:
            trace = (by_log * self.projector).sum((1, 2)) / self.projector.sum((1, 2)).clamp(min=1.0)
            by_log = trace.reshape(-1, 1, 1) * self.projector
        on_atoms = torch.bmm(forces.unsqueeze(1), self.grown[batch]).squeeze(1)
        return torch.cat([on_atoms, (-by_log / self.atoms).reshape(-1, 3)])

    def move(self, rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and cells of other coordinates."""
        size = len(batch)
        self.log = rows[size:].reshape(-1, 3, 3) / self.atoms
        self.grown = torch.linalg.matrix_exp(self.log)
        turned = self.grown.transpose(1, 2)
        return torch.bmm(rows[:size].unsqueeze(1), turned[batch]).squeeze(1), self.start @ turned

    def keep(self, graphs: Tensor) -> None:
        """Continue with some structures only."""
        self.start, self.log, self.grown = self.start[graphs], self.log[graphs], self.grown[graphs]
        self.projector, self.atoms = self.projector[graphs], self.atoms[graphs]


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

    def evaluate(self, stress: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        system = self.system
        if self.lists is not None:
            system = system.replace(topology=self.lists(system))
        out = self.potential(system, compute_stress=stress)
        return out["energy"], out["forces"].double(), out["stress"].double() if stress else None

    def move(self, pos: Tensor, cell: Tensor | None) -> None:
        """Continue from other positions, and other cells if they are given."""
        self.system = self.system.replace(pos=pos, **({} if cell is None else {"cell": cell}))

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
    cell: bool | str = False,
    pressure: float = 0.0,
) -> Relaxation:
    """Move every structure to a minimum of its energy; with ``cell`` also the cells.

    L-BFGS with one history per structure, all of them evaluated as one batch: the steps of a structure are the same as
    alone, and the same as those of ``ase.optimize.LBFGS``. Structures that have converged leave the batch, and so do
    those whose energy or forces are not finite.

    Parts (bonds) are those at the start, for all steps: those that a scheme has stored on the frame
    (:func:`~nbody_pyg.deploy.with_reference`), else those found there. If others are found at the end, a warning is
    given.

    Args:
        potential: in the precision in which to relax; float64 for forces below 1e-3.
        frames: structures with ``z`` and ``pos``, or ASE's Atoms, periodic (with ``cell``) or open. ``charge``,
            ``charges`` and ``spin`` are used if a structure has them; one without is a neutral singlet. Fixed
            coordinates are given by FixAtoms and FixCartesian of Atoms, or by a key ``fixed`` of AtomicData: bool,
            [atoms] or [atoms, 3]; convergence is judged on the forces on free coordinates.
        fmax: a structure has converged when no force is longer (eV/angstrom).
        max_steps: largest number of steps of each structure.
        longest_step: largest displacement of an atom in one step, angstrom.
        batch_size: structures per batch.
        report: called with the numbers of converged and of all structures, after every step.
        reference: model file whose reference molecule gives the bonds of the structures that are this molecule.
        cell: relax cells too: True or "full" their lengths and angles, "isotropic" their size only. Directions that are
            not periodic are not strained, and open structures relax as without it. The coordinates and the bound
            ``fmax`` are those of ASE's ``FrechetCellFilter``.
        pressure: of the surroundings, eV/angstrom^3 (multiply GPa by ``ase.units.GPa``); needs ``cell``.
    Raises: ValueError: no structures, positions that are not finite, a charge or spin
    that the model cannot use, an unsupported constraint, or fmax, max_steps, longest_step or batch_size
        not positive.
    """
    numbers = {"fmax": fmax, "max_steps": max_steps, "longest_step": longest_step, "batch_size": batch_size}
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not len(frames):
        raise ValueError("frames holds no structure to relax")
    kind = check_choice("cell", "full" if cell is True else cell or "fixed", ("fixed", "full", "isotropic"))
    if not math.isfinite(pressure):
        raise ValueError(f"pressure must be finite, got {pressure}")
    if pressure and kind == "fixed":
        raise ValueError(f"pressure must be 0 where cells are fixed, got {pressure}; pass cell=True as well")
    data: Sequence[Data] = [as_data(frame, number) for number, frame in enumerate(frames)]
    periodic = _periodicity(data, kind != "fixed")
    if reference is not None:
        data = with_reference(data, reference, potential.scheme)
    check_states(potential.model, data)  # frames of a batch do not have their number
    settings = _Settings(fmax, max_steps, longest_step, kind, pressure)
    found: dict[int, tuple[Relaxation, int]] = {}
    batches = [list(rows) for _, rows in itertools.groupby(range(len(data)), lambda number: periodic[number])]
    for batch in (rows[i : i + batch_size] for rows in batches for i in range(0, len(rows), batch_size)):
        part = _relax_batch(potential, [data[number] for number in batch], settings, report, stop)
        found |= {number: (part, place) for place, number in enumerate(batch)}
        if stop is not None and stop():
            break
    tensors = {
        name: torch.stack([getattr(part, name)[place] for part, place in found.values()])
        for name in ("energy", "start_energy", "largest", "steps", "converged")
    }
    changes = tuple(part.bond_changes[place] for part, place in found.values())
    if changed := [number for number, text in enumerate(changes) if text is not None]:
        warnings.warn(
            f"bonds found after the relaxation of structure {changed[0]} differ from those that its energy uses, which "
            f"were kept from the start ({changes[changed[0]]}); {len(changed)} of {len(changes)} structures changed so",
            stacklevel=2,
        )
    ended: list[Any] = [part.frames[place] for part, place in found.values()]
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
        results = {"energy": float(after.energy), "forces": after.forces.detach().cpu().numpy()}
        if after.get("stress") is not None:
            atoms.set_cell(after.cell[0].detach().cpu().numpy(), scale_atoms=False)
            results["stress"] = full_3x3_to_voigt_6_stress(after.stress[0].detach().cpu().numpy())
        atoms.calc = SinglePointCalculator(atoms, **results)
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


def _periodicity(frames: Sequence[Data], strained: bool) -> list[bool]:
    """Whether each frame is periodic. Raises: ValueError: one is, and has no cell, or ``strained`` and no volume."""
    periodic = [_periodic(frame) for frame in frames]
    for number, frame in enumerate(frames):
        if periodic[number] and frame.get("cell") is None:
            raise ValueError(f"frames must have a cell where pbc is set, got frame {number} without; give it a cell")
        if periodic[number] and strained and not has_volume(torch.as_tensor(frame.cell)):
            raise ValueError(
                f"cells that are relaxed must have a volume, got frame {number} with "
                f"{torch.as_tensor(frame.cell).reshape(3, 3).tolist()}; give it a vector along each direction, also "
                "along one that is not periodic, which keeps its length"
            )
    return periodic


def _alike(model: nn.Module, frames: Sequence[AtomicData]) -> list[AtomicData]:
    """The same structures with the same keys: PyG's collate takes those of the first frame, and drops all others."""
    periodic = _periodic(frames[0])
    out = []
    for frame in model_frames(model, frames):
        keys = {"z": frame.z, "pos": frame.pos}
        if periodic:
            keys["cell"] = frame.cell
            keys["pbc"] = implied_pbc(frame.cell) if frame.get("pbc") is None else frame.pbc
        keys |= {key: frame[key] for key in ("charge", "charges", "spin") if frame.get(key) is not None}
        out.append(AtomicData(**keys))
    return out


@dataclass(frozen=True)
class _Settings:
    fmax: float
    max_steps: int
    longest_step: float
    cell: str
    pressure: float


def _rows(batch: Tensor, num_graphs: int, cells: _Cells | None) -> Tensor:
    """The structure of each row of an optimizer."""
    if cells is None:
        return batch
    return torch.cat([batch, torch.arange(num_graphs, device=batch.device).repeat_interleave(3)])


def _relax_batch(
    potential: Potential,
    frames: Sequence[Data],
    settings: _Settings,
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
    cells = None
    if settings.cell != "fixed" and _periodic(frames[0]):
        cells = _Cells(active.system, settings.cell == "isotropic", settings.pressure)
    count = len(frames)
    optimizer = _LBFGS(_rows(active.system.batch, count, cells), count, settings.longest_step)
    device = active.system.pos.device
    energies, starts, largest = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(3))
    steps = torch.zeros(count, dtype=torch.long, device=device)
    ends: dict[int, dict[str, Tensor]] = {}
    for step in range(settings.max_steps + 1):
        energy, forces, stress = active.evaluate(cells is not None)
        moving = forces if active.free is None else forces * active.free
        batch, pos, cell = active.system.batch, active.system.pos, active.system.cell
        if cells is not None:
            moving = cells.forces(moving, required(stress), required(cell), batch)
        force = energy.new_zeros(len(energy)).scatter_reduce(0, optimizer.batch, moving.norm(dim=1), "amax")
        starts = energy.clone() if step == 0 else starts
        energies[active.number], largest[active.number], steps[active.number] = energy, force, step
        finite = torch.isfinite(force) & torch.isfinite(energy)
        done = (force <= settings.fmax) | ~finite | (step == settings.max_steps or (stop is not None and stop()))
        for graph in done.nonzero().flatten().tolist():
            own = batch == graph
            end = {"pos": pos[own], "forces": forces[own]}
            if cells is not None:
                end |= {"cell": required(cell)[graph : graph + 1], "stress": required(stress)[graph : graph + 1]}
            ends[int(active.number[graph])] = end
        if report is not None:
            report(len(ends), count)
        if bool(done.all()):
            break
        # The step comes first, so that the history of those that stay is whole.
        rows = pos if cells is None else cells.rows(pos, batch)
        moved = rows + optimizer.step(rows, moving)
        if bool(done.any()):
            stay = ~done[optimizer.batch]
            active.keep(~done)
            if cells is not None:
                cells.keep(~done)
            optimizer.keep(stay, _rows(active.system.batch, int((~done).sum()), cells), ~done)
            moved = moved[stay]
        active.move(*((moved, None) if cells is None else cells.move(moved, active.system.batch)))
    for number, frame in enumerate(plain):
        for key, value in ends[number].items():
            frame[key] = value
        frame.energy = energies[number : number + 1].clone()
    changes = tuple(
        None if tree is None else bond_changes(scheme, tree, System.from_data(frame))
        for tree, frame in zip(parts or itertools.repeat(None, count), plain, strict=True)
    )
    converged = (largest <= settings.fmax) & torch.isfinite(energies)
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
