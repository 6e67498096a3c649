"""Relaxation of many structures at once, each to its own minimum."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from nbody_pyg.data import AtomicData
from nbody_pyg.deploy.reference import bond_changes
from nbody_pyg.hierarchy import Topology, TopologyCache
from nbody_pyg.potential import Potential

_MEMORY = 30
# The step of a structure without history: the inverse of a stiff bond, angstrom^2/eV.
_FIRST_STEP = 1.0 / 70.0
_SKIN = 0.3


@dataclass(frozen=True)
class Relaxation:
    """Structures after relaxation, in the order in which they came.

    ================  ==========================  ==================================================
    field             shape, unit                 meaning
    ================  ==========================  ==================================================
    ``frames``                                    AtomicData with positions, ``energy`` and ``forces``
    ``energy``        [structures], eV            at the end; ``start_energy`` at the start
    ``largest``       [structures], eV/A          length of the largest force at the end
    ``steps``         [structures]                steps taken
    ``converged``     [structures], bool          whether ``largest`` is below the bound
    ``bond_changes``  one text or None each       how the bonds found at the end differ from those used
    ================  ==========================  ==================================================
    """

    frames: list[AtomicData]
    energy: Tensor
    start_energy: Tensor
    largest: Tensor
    steps: Tensor
    converged: Tensor
    bond_changes: tuple[str | None, ...] = ()


class _LBFGS:
    r"""Limited-memory BFGS for a batch: one history per structure, none of them knows of the others.

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
            # A pair along which the energy curves downwards would turn the step uphill.
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
        """Go on with some structures only: ``atoms`` and ``graphs`` are masks, ``batch`` numbers them anew."""
        self.history = [(s[atoms], y[atoms], rho[graphs]) for s, y, rho in self.history]
        self.last = None if self.last is None else (self.last[0][atoms], self.last[1][atoms])
        self.batch, self.num_graphs = batch, int(graphs.sum())


class _Active:
    """The structures that still move, as one batch of tensors in float64."""

    def __init__(self, potential: Potential, frames: list[AtomicData], parts: list[Topology] | None) -> None:
        self.potential, self.scheme = potential, getattr(potential.model, "scheme", None)
        # The parts that a structure starts with stay its parts; they are independent of the other structures.
        self.parted = None
        if parts is not None:
            self.parted = [tree.store(copy.copy(frame)) for tree, frame in zip(parts, frames, strict=True)]
        batch = Batch.from_data_list(frames)
        self.number = torch.arange(batch.num_graphs, device=batch.pos.device)
        self.z, self.batch = batch.z, batch.batch
        self.pos = batch.pos.double()
        self.cell, self.pbc = batch.get("cell"), batch.get("pbc")
        self.charge, self.charges = batch.get("charge"), batch.get("charges")
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
        topology = None
        if self.lists is not None:
            topology = self.lists(self.z, self.pos, self.batch, self.cell, self.pbc)
        out = self.potential(
            self.z, self.pos, self.batch, cell=self.cell, pbc=self.pbc, topology=topology,
            charge=self.charge, charges=self.charges,
        )  # fmt: skip
        return out["energy"], out["forces"].double()

    def keep(self, graphs: Tensor) -> Tensor:
        """Drop structures; returns the mask of the atoms that stay."""
        atoms = graphs[self.batch]
        new = torch.cumsum(graphs, 0) - 1
        self.batch = new[self.batch[atoms]]
        self.z, self.pos = self.z[atoms], self.pos[atoms]
        self.cell = None if self.cell is None else self.cell[graphs]
        self.pbc = None if self.pbc is None else self.pbc[graphs]
        self.charge = None if self.charge is None else self.charge[graphs]
        self.charges = None if self.charges is None else self.charges[atoms]
        self.number = self.number[graphs]
        self._renew()
        return atoms


def relax(
    potential: Potential,
    frames: Sequence[Data],
    *,
    fmax: float = 0.01,
    max_steps: int = 500,
    longest_step: float = 0.2,
    batch_size: int = 64,
    report: Callable[[int, int], None] | None = None,
) -> Relaxation:
    """Move every structure to a minimum of its energy; cells stay as they are.

    L-BFGS with one history per structure, all of them evaluated as one batch: the steps of a structure are those
    that it would take alone, and the same as those of ``ase.optimize.LBFGS``. What has converged leaves the batch.

    Parts (bonds) are those at the start, from first to last: those that a scheme has stored on the frame
    (:func:`~nbody_pyg.deploy.with_reference`), else those found there. Where others are found at the end, a warning
    says so.

    Args:
        potential: in the precision in which to relax; float64 for forces below 1e-3.
        frames: structures with ``z`` and ``pos``; all periodic (with ``cell``) or all open. ``charge`` or ``charges``
            count where a structure has them; one without is neutral.
        fmax: a structure has converged when no force is longer (eV/angstrom).
        max_steps: of each structure.
        longest_step: of any atom in one step, angstrom.
        batch_size: structures at a time.
        report: called with the numbers of converged and of all structures, after every step.
    Raises: ValueError: no structures, periodic beside open ones, or fmax, max_steps or longest_step not positive.
    """
    for name, value in (("fmax", fmax), ("max_steps", max_steps), ("longest_step", longest_step)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not len(frames):
        raise ValueError("frames holds no structure to relax")
    _check_periodicity(frames)
    parts = [
        _relax_batch(potential, frames[i : i + batch_size], fmax, max_steps, longest_step, report)
        for i in range(0, len(frames), batch_size)
    ]
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("energy", "start_energy", "largest", "steps", "converged")
    }
    changes = tuple(text for part in parts for text in part.bond_changes)
    if changed := [number for number, text in enumerate(changes) if text is not None]:
        warnings.warn(
            f"bonds found after the relaxation of structure {changed[0]} differ from those that its energy uses, which "
            f"are those of the start ({changes[changed[0]]}); {len(changed)} of {len(changes)} structures changed so",
            stacklevel=2,
        )
    return Relaxation([frame for part in parts for frame in part.frames], **tensors, bond_changes=changes)


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


def _alike(frames: Sequence[AtomicData]) -> list[AtomicData]:
    """The same structures with the same keys: PyG's collate takes those of the first frame, and drops all others."""
    periodic = _periodic(frames[0])
    charge, charges = (any(frame.get(key) is not None for frame in frames) for key in ("charge", "charges"))
    out = []
    for frame in frames:
        keys = {"z": frame.z, "pos": frame.pos}
        if periodic:
            keys["cell"] = frame.cell
            keys["pbc"] = (frame.cell != 0).any(dim=-1) if frame.get("pbc") is None else frame.pbc
        total, own = frame.get("charge"), frame.get("charges")
        if total is None:
            total = frame.pos.new_zeros(1) if own is None else own.sum().reshape(1)
        if charge:
            keys["charge"] = total
        if charges:
            keys["charges"] = total.expand(len(frame.z)) / len(frame.z) if own is None else own
        out.append(AtomicData(**keys))
    return out


def _relax_batch(
    potential: Potential,
    frames: Sequence[Data],
    fmax: float,
    max_steps: int,
    longest_step: float,
    report: Callable[[int, int], None] | None,
) -> Relaxation:
    keys = ("z", "pos", "cell", "pbc", "charge", "charges")
    plain = [AtomicData.from_data(Data(**{k: frame[k] for k in keys if frame.get(k) is not None})) for frame in frames]
    scheme, parts = getattr(potential.model, "scheme", None), None
    if scheme is not None and scheme.keeps_parts:
        parts = [scheme.read(f if f.get("num_parts_1") is not None else scheme(f)) for f in frames]
    active = _Active(potential, _alike(plain), parts)
    optimizer = _LBFGS(active.batch, len(frames), longest_step)
    count = len(frames)
    device = active.pos.device
    energies, starts, largest = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(3))
    steps = torch.zeros(count, dtype=torch.long, device=device)
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(max_steps + 1):
        energy, forces = active.evaluate()
        force = energy.new_zeros(len(energy)).scatter_reduce(0, active.batch, forces.norm(dim=1), "amax")
        starts = energy.clone() if step == 0 else starts
        energies[active.number], largest[active.number], steps[active.number] = energy, force, step
        done = (force <= fmax) | (step == max_steps)
        for graph in done.nonzero().flatten().tolist():
            own = active.batch == graph
            ends[int(active.number[graph])] = (active.pos[own], forces[own])
        if report is not None:
            report(len(ends), count)
        if bool(done.all()):
            break
        # The step comes first, so that the history of those that stay is whole.
        moved = active.pos + optimizer.step(active.pos, forces)
        if bool(done.any()):
            atoms = active.keep(~done)
            optimizer.keep(atoms, active.batch, ~done)
            moved = moved[atoms]
        active.pos = moved
    for number, frame in enumerate(plain):
        frame.pos, frame.forces = ends[number]
        frame.energy = energies[number : number + 1].clone()
    changes = tuple(
        bond_changes(scheme, tree, *(frame.get(key) for key in ("z", "pos", "cell", "pbc")))
        for tree, frame in zip(parts or [None] * count, plain, strict=True)
    )
    return Relaxation(plain, energies, starts, largest, steps, largest <= fmax, changes)
