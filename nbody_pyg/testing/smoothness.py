"""Assertion on the continuity of energies and forces along paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbody_pyg.required import required
from nbody_pyg.system import System
from nbody_pyg.testing.subject import Subject
from nbody_pyg.testing.systems import network_behind, prepare_systems, random_like


def assert_smooth(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    paths: Sequence[tuple[Tensor, Tensor, Tensor]] | None = None,
    continuity: int = 1,
    step: float = 0.02,
    distance: float = 8.0,
    tolerance: float = 1e-10,
    frozen_topology: bool = False,
    through_changes: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""Assert that energy and forces are continuous along paths on which atoms cross every cutoff.

    Sixth differences of the energy along a path vanish as :math:`h^{k+2}` at a point where the (k+1)-th
    derivative jumps: :math:`h^0` at a step of the energy, :math:`h^1` at a kink (a step of the force),
    :math:`h^2` where only the curvature jumps, :math:`h^3` at the end of a window with two continuous
    derivatives. The largest ones are searched on the whole path, then again around them at a quarter of the
    step, until they fall below ``tolerance`` or the order is plain. Forces are treated in the same way, one
    order lower, so that forces that are no gradient are covered too.

    Args:
        systems: starting geometries: in each, one atom is pulled out by ``distance``, and, on a second path,
            the whole system is stretched to three times its size.
        paths: (z, start, end) instead: straight lines from start [N, 3] to end [N, 3].
        continuity: derivatives of the energy that must be continuous: 1 for continuous forces, 2 for
            continuous curvature.
        step: first grid spacing, angstrom of the fastest atom.
        tolerance: eV (eV/A for forces); steps smaller than this are not looked for.
        frozen_topology: keep the parts that the model's scheme finds at the start of each path. For schemes
            that follow from bonds, which promise smoothness only while the bonds stay as they are.
        through_changes: fail also where the parts of the model's scheme, or their children, stay the same along
            every path: then nothing has been tested that a dynamic hierarchy promises.

    Returns:
        The lowest order seen, in terms of the energy: about 3 for windows with two continuous derivatives,
        infinity when every difference fell below the tolerance at once.

    Raises:
        AssertionError: with the place on the path, the size of the step and the order.
    """
    if paths is None:
        drawn = prepare_systems(model, systems, seed, dtype, sizes=(5, 7))
        if any(s.cell is not None for s in drawn):
            raise ValueError("systems must be open for the default paths; pass paths=[(z, start, end)]")
        paths = [path for i, s in enumerate(drawn) for path in _default_paths(s, distance, seed + i)]
        # The paths of a system are two, and have its charge
        states = [s for s in drawn for _ in range(2)]
    else:
        states = [System.from_tensors(z, start) for z, start, _ in paths]
    subject = Subject(model, dtype)
    if through_changes:
        _require_changes(model, paths, dtype)
    lowest = math.inf
    for number, (z, start, end) in enumerate(paths):
        start, end = start.to(dtype), end.to(dtype)
        length = float((end - start).norm(dim=1).max())
        if not length > 0:
            raise ValueError(f"paths[{number}] starts where it ends; give two different geometries")
        subject.start = (z, start) if frozen_topology else None
        system = states[number].replace(pos=start)
        line = _Line(subject, system, (end - start) / length, length)
        lowest = min(lowest, _scan(line, f"assert_smooth: path {number}", continuity, step, tolerance))
    return lowest


class NotSmooth(AssertionError):
    """What :func:`assert_smooth` raises; ``order`` is the order that its message tells, in terms of the energy."""

    def __init__(self, order: float, message: str) -> None:
        super().__init__(message)
        self.order = order


def _default_paths(system: System, distance: float, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    centre = system.pos.mean(dim=0)
    # The outermost atom leaves outwards, so that it meets no other atom on its way.
    atom = int((system.pos - centre).norm(dim=1).argmax())
    direction = system.pos[atom] - centre
    direction = direction / direction.norm() + 0.2 * random_like(direction, generator)
    pulled = system.pos.clone()
    pulled[atom] += direction / direction.norm() * distance
    stretched = centre + 3.0 * (system.pos - centre)
    return [(system.z, system.pos, pulled), (system.z, system.pos, stretched)]


def _require_changes(model: Any, paths: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Raise unless parts or children change on some path (pairs do on every path that crosses a cutoff)."""
    network = network_behind(model)
    scheme = None if network is None else network.scheme
    if scheme is None:
        raise ValueError("through_changes needs a model with a scheme; set it to False for others")
    for z, start, end in paths:
        first = None
        for t in torch.linspace(0.0, 1.0, 65, dtype=dtype):
            topology = scheme.topology(z, start.to(dtype) + t * (end - start).to(dtype))
            own = [*topology.num_parts, *(c for c in topology.child_index if c is not None)]
            first = first or own
            if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(own, first, strict=True)):
                return
    raise AssertionError(
        "assert_smooth: no part and no child of the hierarchy changes along any path, so the test of its changes is "
        "vacuous; take longer paths, or a scheme that follows the positions"
    )


@dataclass(frozen=True)
class _Line:
    """Energy and forces as functions of the distance travelled by the fastest atom."""

    subject: Subject
    start: System
    direction: Tensor
    length: float

    def __call__(self, where: Tensor) -> tuple[Tensor | None, Tensor | None]:
        systems = [self.start.replace(pos=self.start.pos + float(t) * self.direction) for t in where]
        energies, forces = self.subject.many(systems)
        columns = energies.reshape(len(where), -1) if energies.numel() else None
        return columns, torch.stack(forces).flatten(1) if forces else None


def _differences(values: Tensor) -> Tensor:
    """Largest sixth difference over the columns, at each inner grid point."""
    return torch.diff(values, n=6, dim=0).abs().amax(dim=1)


def _scan(line: _Line, name: str, continuity: int, step: float, tolerance: float) -> float:
    count = max(16, math.ceil(line.length / step) + 1)
    grid = torch.linspace(0.0, line.length, count, dtype=torch.float64)
    energies, forces = line(grid)
    signal = required(forces if energies is None else energies)
    if not float((signal.amax(dim=0) - signal.amin(dim=0)).max()) > 1e-6:
        raise AssertionError(f"{name}: the output is constant along the path, so the test is vacuous")
    lowest = math.inf
    for what, values, order in (("energy", energies, continuity), ("forces", forces, continuity - 1)):
        if values is None:
            continue
        column = 0 if what == "energy" else 1
        # A sixth difference amplifies round-off by up to 64.
        floor = max(tolerance, 64 * 1e-14 * float(values.abs().max()))
        for place in _peaks(_differences(values), number=4):
            found = _zoom(line, column, float(grid[place + 3]), float(grid[1] - grid[0]), floor)
            lowest = min(lowest, found.order + continuity - order)
            if found.order < order + 0.5:
                raise NotSmooth(
                    found.order + continuity - order,
                    f"{name}: {what} not smooth near {found.place:.6f} of {line.length:.3f} angstrom: "
                    f"differences over {found.step:.1e} angstrom are still {found.size:.3e} and fall as "
                    f"h^{found.order:.2f} (a step: 0, a kink: 1); continuity {order} needs {order + 1}",
                )
    return lowest


def _peaks(values: Tensor, number: int) -> list[int]:
    """Places of the largest local maxima within a stencil on either side.

    A singular point is one even where a steep but smooth part of the path has larger differences elsewhere.
    """
    around = torch.nn.functional.max_pool1d(values.reshape(1, 1, -1), 15, stride=1, padding=7).flatten()
    places = ((values == around) & (values > 0)).nonzero().flatten()
    return places[values[places].argsort(descending=True)][:number].tolist()


@dataclass(frozen=True)
class _Found:
    order: float
    size: float
    step: float
    place: float


def _zoom(line: _Line, column: int, centre: float, step: float, floor: float) -> _Found:
    """Follow the largest sixth difference around a point while the step shrinks by four, four times."""
    sizes: list[float] = []
    steps: list[float] = []
    for _ in range(5):
        # Nine steps either side: stencils then cover 1.5 steps of the level on which the place was read.
        middle = min(max(centre, 9 * step), max(line.length - 9 * step, 9 * step))
        grid = middle + step * torch.arange(-9.0, 10.0, dtype=torch.float64)
        differences = _differences(required(line(grid)[column]))
        top = int(differences.argmax())
        centre = float(grid[top + 3])
        sizes.append(float(differences[top]))
        steps.append(step)
        if not math.isfinite(sizes[-1]):
            return _Found(-1.0, sizes[-1], step, centre)
        if sizes[-1] < floor:
            break
        step /= 4
    # The first level need not resolve the function yet, and below the floor is round-off.
    last = len(sizes) - 1 if sizes[-1] >= floor else len(sizes) - 2
    order = math.inf
    if last >= 3:  # with less the singularity, if it is one, is too small for an order
        order = math.log(sizes[1] / sizes[last]) / math.log(steps[1] / steps[last])
    return _Found(order, sizes[last], steps[last], centre)
