"""Assertions on rotations, permutations, translations and batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from nbody_pyg.models import NBodyNet
from nbody_pyg.required import required
from nbody_pyg.system import System
from nbody_pyg.testing.subject import Subject, compare, prepare, require_signal
from nbody_pyg.testing.systems import collate, prepare_systems, random_like, reordered, require_volume, turn


def _rotations(count: int, improper: bool, seed: int) -> Iterator[Tensor]:
    """Random rotations; each also times the inversion, and the inversion on its own, when improper."""
    generator = torch.Generator().manual_seed(seed)
    if improper:
        yield -torch.eye(3, dtype=torch.float64)
    for _ in range(count):
        q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        q = q * torch.diagonal(r).sign()
        q = q * torch.linalg.det(q).sign()
        yield q
        if improper:
            yield -q


def wigner_matrix(irrep: str | o3.Irrep, rotation: Tensor) -> Tensor:
    """Matrix of a (proper or improper) rotation on one irrep, exact to round-off in float64.

    Fitted to e3nn's spherical harmonics: e3nn's own ``D_from_matrix`` goes through Euler angles and a float32
    table, which leaves errors of 1e-7 (measured), more than the tolerances of these tests.
    """
    irrep = o3.Irrep(irrep)
    sign = torch.linalg.det(rotation).sign()
    proper = (rotation * sign).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(8 * irrep.dim, 3, generator=generator, dtype=torch.float64)
    before = o3.spherical_harmonics(irrep.l, points, normalize=True)
    after = o3.spherical_harmonics(irrep.l, points @ proper.T, normalize=True)
    matrix: Tensor = torch.linalg.lstsq(before, after).solution.T
    return matrix if sign > 0 else matrix * int(irrep.p)


def rotate_features(x: Tensor, irreps: str | o3.Irreps, rotation: Tensor, layout: str = "mul_ir") -> Tensor:
    """Apply a rotation to features [..., irreps.dim]; ``layout="ir_mul"`` for channels last."""
    if layout not in ("mul_ir", "ir_mul"):
        raise ValueError(f"layout must be 'mul_ir' (e3nn) or 'ir_mul' (channels last), got {layout!r}")
    irreps = o3.Irreps(irreps)
    if x.shape[-1] != irreps.dim:
        raise ValueError(f"x must have {irreps.dim} components for irreps {irreps}, got {x.shape[-1]}")
    blocks = []
    for (mul, irrep), part in zip(irreps, irreps.slices(), strict=True):
        matrix = wigner_matrix(irrep, rotation).to(x)
        block = x[..., part]
        if layout == "mul_ir":
            block = block.reshape(*x.shape[:-1], mul, irrep.dim) @ matrix.T
        else:
            block = matrix @ block.reshape(*x.shape[:-1], irrep.dim, mul)
        blocks.append(block.reshape(*x.shape[:-1], mul * irrep.dim))
    return torch.cat(blocks, dim=-1) if blocks else x


def assert_equivariant(
    model: Any,
    irreps_out: Any = None,
    irreps_in: Any = None,
    *,
    systems: Sequence[Any] | None = None,
    inputs: Sequence[Tensor] | None = None,
    num_rotations: int = 4,
    improper: bool = True,
    layout: str = "mul_ir",
    allow_zero: bool = False,
    tolerance: float = 1e-10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""Assert :math:`f(D_{in}(R)\,x) = D_{out}(R) f(x)` for rotations, the inversion and their products.

    Three uses:

    - a potential (no irreps): the energy must be invariant, the forces must turn with the molecule;
    - a function of atoms, ``f(z, pos, batch) -> [rows, irreps_out.dim]`` (``irreps_out`` only): positions
      turn, the output must transform as stated, e.g. ``"1x1o"`` for dipoles, or a list for a list of outputs (an
      :class:`~nbody_pyg.models.NBodyNet` states the type of its target itself);
    - a function of features (``irreps_in`` too, one entry per argument): ``f(x, ...)``, e.g. a gate.

    Args:
        systems: geometries; None for random ones.
        inputs: features for ``irreps_in``, ``[rows, dim]`` each; None for random ones.
        improper: False tests SO(3) only.
        layout: order of the features, ``"mul_ir"`` as in e3nn, or ``"ir_mul"`` with channels last.
        allow_zero: accept outputs with a block that is zero for every input.

    Returns:
        The largest error seen.

    Raises:
        AssertionError: with the error, the index and the rotation; or the output is zero or constant.
        ValueError: planar systems, shapes that do not fit the irreps.
    """
    rotations = list(_rotations(num_rotations, improper, seed))
    if irreps_out is None and isinstance(model, NBodyNet) and str(model.irreps_out) != "1x0e":
        irreps_out = model.irreps_out
    if irreps_in is not None:
        call = _feature_call(model, irreps_in, inputs, layout, seed, dtype)
        return _check_outputs(call, irreps_out, rotations, layout, allow_zero, tolerance)
    drawn = prepare_systems(model, systems, seed, dtype)
    require_volume(drawn)
    if irreps_out is not None:
        function = copy.deepcopy(model).to(dtype).eval() if isinstance(model, nn.Module) else model
        worst = 0.0
        for system in drawn:
            call = _system_call(function, system)
            worst = max(worst, _check_outputs(call, irreps_out, rotations, layout, allow_zero, tolerance))
        return worst
    subject = Subject(model, dtype)
    require_signal(subject, drawn, "assert_equivariant", seed)
    worst = 0.0
    for number, system in enumerate(drawn):
        energy, forces = subject([system])
        for rotation in rotations:
            expected = None if forces is None else forces @ rotation.to(forces).T
            where = f"assert_equivariant: system {number}, {_name(rotation)}"
            worst = max(worst, subject.compare([turn(system, rotation)], energy, expected, tolerance, where))
    return worst


def _name(rotation: Tensor) -> str:
    kind = "improper rotation" if torch.linalg.det(rotation) < 0 else "rotation"
    return f"{kind} {[[round(v, 3) for v in row] for row in rotation.tolist()]}"


def _as_list(value: Any) -> list[Any]:
    """A list or tuple as it is, anything else as its only entry; Irreps are tuples but one entry."""
    return list(value) if isinstance(value, (list, tuple)) and not isinstance(value, o3.Irreps) else [value]


def _system_call(function: Callable[..., Any], system: System) -> Callable[[Tensor], list[Tensor]]:
    def call(rotation: Tensor) -> list[Tensor]:
        arguments, keywords = collate([turn(system, rotation)])
        return [out.detach() for out in _as_list(function(*arguments, **keywords))]

    return call


def _feature_call(
    model: Any, irreps_in: Any, inputs: Sequence[Tensor] | None, layout: str, seed: int, dtype: torch.dtype
) -> Callable[[Tensor], list[Tensor]]:
    types = [o3.Irreps(i) for i in _as_list(irreps_in)]
    if inputs is None:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(7, t.dim, generator=generator, dtype=torch.float64).to(dtype) for t in types]
    if len(inputs) != len(types):
        raise ValueError(f"inputs must hold {len(types)} tensors, one per entry of irreps_in, got {len(inputs)}")
    function = copy.deepcopy(model).to(dtype).eval() if isinstance(model, nn.Module) else model

    def call(rotation: Tensor) -> list[Tensor]:
        turned = [rotate_features(x, t, rotation, layout) for x, t in zip(inputs, types, strict=True)]
        return [out.detach() for out in _as_list(function(*turned))]

    return call


def _check_outputs(
    call: Callable[[Tensor], list[Tensor]],
    irreps_out: Any,
    rotations: Sequence[Tensor],
    layout: str,
    allow_zero: bool,
    tolerance: float,
) -> float:
    plain = call(torch.eye(3, dtype=torch.float64))
    types = [o3.Irreps(i) for i in _as_list(irreps_out)]
    if len(types) != len(plain):
        raise ValueError(f"irreps_out has {len(types)} entries but the model returns {len(plain)} tensors")
    for number, (out, irreps) in enumerate(zip(plain, types, strict=True)):
        if out.shape[-1] != irreps.dim:
            raise ValueError(f"output {number} must have {irreps.dim} components ({irreps}), got {list(out.shape)}")
        for (mul, irrep), part in zip(irreps, irreps.slices(), strict=True):
            if not allow_zero and mul and not float(out[..., part].abs().max()) > 100 * tolerance:
                raise AssertionError(
                    f"assert_equivariant: block {mul}x{irrep} of output {number} is zero, so the test is "
                    "vacuous; check the initialisation, or pass allow_zero=True"
                )
    worst = 0.0
    for rotation in rotations:
        for number, (got, out, irreps) in enumerate(zip(call(rotation), plain, types, strict=True)):
            what = f"assert_equivariant: output {number} ({irreps}) under {_name(rotation)}"
            expected = rotate_features(out, irreps, rotation, layout)
            worst = max(worst, compare(got, expected, tolerance, what))
    return worst


def assert_permutation_invariant(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    num_permutations: int = 3,
    tolerance: float = 1e-10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Assert that renaming the atoms leaves the energy as it is and renames the forces.

    One of the default systems has 47 neighbours around each atom: a list that is cut at 32 fails.

    Returns the largest error; raises AssertionError with the error and the atom.
    """
    drawn, subject = prepare(model, systems, "assert_permutation_invariant", seed, dtype, dense=True)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for number, system in enumerate(drawn):
        energy, forces = subject([system])
        for _ in range(num_permutations):
            order = torch.randperm(system.z.shape[0], generator=generator).to(system.z.device)
            expected = None if forces is None else forces[order]
            where = f"assert_permutation_invariant: system {number} ({system.z.shape[0]} atoms)"
            worst = max(worst, subject.compare([reordered(system, order)], energy, expected, tolerance, where))
    return worst


def assert_translation_invariant(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    distances: Sequence[float] = (0.37, 8.0, 60.0),
    tolerance: float = 1e-10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Assert that moving the whole system by ``distances`` (angstrom) changes neither energy nor forces.

    In periodic systems, also that moving a single atom by a lattice vector changes nothing.

    Returns the largest error; raises AssertionError with the error and the atom.
    """
    drawn, subject = prepare(model, systems, "assert_translation_invariant", seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for number, system in enumerate(drawn):
        energy, forces = subject([system])
        moves = []
        for distance in distances:
            direction = random_like(system.pos[:1], generator)
            moves.append((f"moved by {distance} angstrom", direction / direction.norm() * distance))
        if system.cell is not None:
            lattice = torch.zeros_like(system.pos)
            steps = torch.tensor([2.0, -1.0, 3.0]).to(lattice)
            axes = torch.ones(3, dtype=torch.bool) if system.pbc is None else torch.as_tensor(system.pbc).reshape(3)
            lattice[-1] = (steps * axes.to(steps)) @ system.cell.reshape(3, 3)
            moves.append(("last atom moved by lattice vectors", lattice))
        for name, move in moves:
            moved = system.replace(pos=system.pos + move)
            where = f"assert_translation_invariant: system {number} {name}"
            worst = max(worst, subject.compare([moved], energy, forces, tolerance, where))
    return worst


def assert_batch_independent(
    model: Any,
    *,
    systems: Sequence[Any] | None = None,
    tolerance: float = 1e-10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Assert that a system has the same energy and forces alone, in a batch, and in a batch in another order.

    The systems have different sizes. Returns the largest error; raises AssertionError with error and system.
    """
    drawn, subject = prepare(model, systems, "assert_batch_independent", seed, dtype)
    if len(drawn) < 2:
        raise ValueError("systems must hold at least two geometries to make a batch of")
    alone = [subject([s]) for s in drawn]
    worst = 0.0
    for order in (list(range(len(drawn))), list(range(len(drawn)))[::-1], [0, 0, *range(1, len(drawn))]):
        energies = torch.cat([alone[i][0] for i in order])
        forces = None if alone[0][1] is None else torch.cat([required(alone[i][1]) for i in order])
        where = f"assert_batch_independent: systems {order} as one batch"
        worst = max(worst, subject.compare([drawn[i] for i in order], energies, forces, tolerance, where))
    return worst
