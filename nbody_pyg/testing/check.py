"""check_potential: the physics of a trained potential, measured, compared with bounds, and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator, reference_topology
from nbody_pyg.deploy.reference import bond_changes
from nbody_pyg.hierarchy import BondTree
from nbody_pyg.network import check_states
from nbody_pyg.potential import Potential
from nbody_pyg.required import required
from nbody_pyg.system import System
from nbody_pyg.testing.physics import assert_extensive, finite_differences
from nbody_pyg.testing.short_range import Push, push_dimers, push_in_structures
from nbody_pyg.testing.smoothness import NotSmooth, assert_smooth
from nbody_pyg.testing.subject import Subject
from nbody_pyg.testing.symmetry import (
    assert_batch_independent,
    assert_equivariant,
    assert_permutation_invariant,
    assert_translation_invariant,
)
from nbody_pyg.testing.systems import in_precision, open_cluster, prepare_systems, random_molecule, state_of, turn


@dataclass(frozen=True)
class Check:
    """One line of the verdict: what was measured, the figure, the bound, and whether it was kept.

    ``passed`` is None if there is nothing to judge; ``note`` gives the reason, or the meaning of a failure.
    """

    name: str
    figure: float
    unit: str
    bound: str
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class CheckReport:
    """All lines; :attr:`passed` when none of them failed."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; figures that are not finite become words."""
        rows = [asdict(check) for check in self.checks]
        for row in rows:
            row["figure"] = row["figure"] if math.isfinite(row["figure"]) else str(row["figure"])
        return {"passed": self.passed, "checks": rows}

    def __getitem__(self, name: str) -> Check:
        """The line of this name; KeyError where there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)


SECTIONS = ("symmetry", "derivatives", "additivity", "smoothness", "short_range", "precision", "dynamics")
_MEANING = {
    "rotations": "the energy depends on how the system lies in space, as with a coordinate used on its own",
    "reflections": "mirror images have different energies",
    "permutation": "the numbering of the atoms changes the result; look for a cap on the number of neighbours",
    "translation": "moving the whole system changes the result",
    "batches": "systems in one batch see each other",
    "forces = -dE/dr": "the forces are not the gradient of the energy: dynamics will not conserve energy",
    "symmetric Jacobian": "the force field is not conservative: work around a closed path is not zero",
    "stress = dE/d(strain)/V": "the stress is not the derivative of the energy",
    "extensivity": "systems far apart act on each other, or their energies do not add",
    "smoothness": "energy or forces jump along a path: a cutoff without a window, or parts that change in steps",
    "isolated atoms": "an atom on its own does not have the energy of its reference",
    "short range": "two atoms attract each other inside the bond length; dynamics can fall into this hole",
    "NVE drift": "the total energy is not kept; look at the lines above, or take a smaller timestep",
    "float32 forces": "single precision is not enough for this model; run it in float64",
    "float32 energy": "single precision is not enough for this model; run it in float64",
}


def check_potential(
    potential: Potential,
    frames: Sequence[Any] | None = None,
    *,
    metadata: dict[str, Any] | None = None,
    nve_steps: int = 1000,
    timestep: float = 0.5,
    temperature: float = 300.0,
    report: Callable[[Check], None] | None = None,
    only: Sequence[str] = (),
    seed: int = 0,
) -> CheckReport:
    """Measure the physics of a potential on some structures.

    Symmetry, derivatives, extensivity and smoothness are tested in float64, charged structures with their charges and
    spins. Periodic structures are tested as they are, and cut into open, neutral clusters where a test pulls atoms
    apart or pushes them together.

    Args:
        potential: the trained potential.
        frames: structures (Data, System or (z, pos)) like those it will be used on; without any, random molecules of
            its elements, which are far from anything it was trained on.
        metadata: what the model file says: origin of E0, and the molecule whose hierarchy it shares.
        nve_steps, timestep, temperature: of the run with conserved energy; fs, K. No steps: no run.
        only: sections to run: symmetry, derivatives, additivity, smoothness, short_range, precision, dynamics; all
            when empty.
        report: called with each line as soon as it is there.
        seed: of all random choices.

    Raises: ValueError: an unknown section, or frames without any structure.
    """
    if unknown := sorted(set(only) - set(SECTIONS)):
        raise ValueError(f"only must name sections among {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    examiner = _Examiner(potential, frames, metadata or {}, (nve_steps, timestep, temperature), seed)
    checks = []
    for check in examiner.checks([name for name in SECTIONS if not only or name in only]):
        if check.passed is False and not check.note:
            name = check.name.split(",")[0]
            check = replace(check, note=next((m for k, m in _MEANING.items() if name.startswith(k)), ""))
        checks.append(check)
        if report is not None:
            report(check)
    return CheckReport(tuple(checks))


def _below(name: str, figure: float, unit: str, bound: float) -> Check:
    # NaN is not below anything.
    return Check(name, figure, unit, f"< {bound:g}", bool(figure < bound))


def _measured(name: str, unit: str, bound: float, measure: Callable[[], float]) -> Check:
    """A check by one of the assertions, whose tolerance is switched off so that it returns its figure."""
    try:
        return _below(name, measure(), unit, bound)
    except AssertionError as error:  # NaN, or an output that depends on nothing
        return Check(name, math.nan, unit, f"< {bound:g}", False, str(error))


class _Examiner:
    """The measurements, in the order of the table."""

    def __init__(
        self,
        potential: Potential,
        frames: Sequence[Any] | None,
        metadata: dict[str, Any],
        nve: tuple[int, float, float],
        seed: int,
    ) -> None:
        self.potential, self.metadata, self.nve, self.seed = potential, metadata, nve, seed
        self.subject = Subject(potential, torch.float64)
        if frames is not None:
            check_states(potential.model, (frame for frame in frames if isinstance(frame, Data)))
        prepared = prepare_systems(potential, frames, seed, torch.float64)[:3]
        self.systems = [self._bonded(self._used(system)) for system in prepared]
        self.own = frames is not None
        self.species = potential.species or tuple(self.systems[0].z.unique().tolist())
        self.open = [open_cluster(s) if s.cell is not None else s for s in self.systems]
        self.generator = torch.Generator().manual_seed(seed)

    def _used(self, system: System) -> System:
        """Without what the model has no input for: random molecules are in the state that it knows."""
        used = self.potential.network.used
        unused = ["spin"] * ("spin" not in used) + ["total_charge", "formal_charges"] * ("charge" not in used)
        return system.replace(**dict.fromkeys(unused))

    def _bonded(self, system: System) -> System:
        """With the bonds of the model's reference molecule, where others would be found."""
        scheme = self.potential.scheme
        if not isinstance(scheme, BondTree):
            return system
        tree = reference_topology(self.metadata, scheme, system.z.tolist(), system.cell is not None)
        if tree is None or bond_changes(scheme, tree, system) is None:
            return system
        return system.replace(given={"bonds": tree.bonds})

    def checks(self, sections: Sequence[str]) -> Iterator[Check]:
        for section in sections:
            yield from getattr(self, f"_{section}")()

    # ------------------------------------------------------------------ symmetry
    def _symmetry(self) -> Iterator[Check]:
        # Elements that the model knows, so that symmetry is not tested on planar molecules only.
        other = random_molecule(8, self.species[:4], self.seed)
        systems = [*self.systems[:2], other]
        given: dict[str, Any] = {"systems": systems, "tolerance": math.inf, "seed": self.seed}
        yield _measured(
            "rotations", "eV, eV/A", 1e-8, lambda: assert_equivariant(self.potential, improper=False, **given)
        )
        yield _below("reflections", self._reflection(systems), "eV, eV/A", 1e-8)
        yield _measured("permutation", "eV, eV/A", 1e-8, lambda: assert_permutation_invariant(self.potential, **given))
        yield _measured("translation", "eV, eV/A", 1e-8, lambda: assert_translation_invariant(self.potential, **given))
        batch = [*self.open[:2], other]
        yield _measured(
            "batches", "eV, eV/A", 1e-8,
            lambda: assert_batch_independent(self.potential, **{**given, "systems": batch}),
        )  # fmt: skip

    def _reflection(self, systems: Sequence[System]) -> float:
        # In a plane that no axis lies in.
        normal = torch.tensor([2.0, 3.0, 6.0], dtype=torch.float64) / 7.0
        mirror = torch.eye(3, dtype=torch.float64) - 2.0 * torch.outer(normal, normal)
        worst = 0.0
        for system in systems:
            energy, forces = self.subject([system])
            got, turned = self.subject([turn(system, mirror)])
            worst = max(
                worst,
                float((got - energy).abs().max()),
                float((required(turned) - required(forces) @ mirror).abs().max()),
            )
        return worst

    # ------------------------------------------------------------------ derivatives
    def _derivatives(self) -> Iterator[Check]:
        slope = skew = 0.0
        for system in self.systems[:2]:
            _, forces = self.subject([system])
            found = finite_differences(self.subject, system, required(forces), 1e-3, self.generator)
            slope = max(slope, float((found.forces - required(found.numeric)).abs().max()) / found.scale)
            # The norm of the antisymmetric part over that of the whole, as in published benchmarks.
            part = found.jacobian - found.jacobian.T
            skew = max(skew, float(part.norm() / (2.0 * found.jacobian.norm())))
        yield _below("forces = -dE/dr", slope, "relative", 1e-5)
        yield _below("symmetric Jacobian", skew, "relative", 1e-5)
        for system in self.systems:
            if system.cell is not None and self._volume(system):
                yield _below("stress = dE/d(strain)/V", self._stress_error(system), "relative", 1e-5)
                break

    def _volume(self, system: System) -> bool:
        return system.pbc is None or bool(torch.as_tensor(system.pbc).all())

    def _stress_error(self, system: System, step: float = 1e-4) -> float:
        (z, pos, _), keywords = self.subject.arguments([system])
        keywords["pbc"] = self._pbc(system)
        stress = required(self.subject.potential)(z, pos, **keywords, compute_stress=True)["stress"][0]
        cell = required(system.cell)
        volume = float(torch.linalg.det(cell.reshape(3, 3)).abs())
        worst = 0.0
        for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
            energies = []
            for factor in (-2.0, -1.0, 1.0, 2.0):
                strain = torch.eye(3, dtype=torch.float64)
                strain[a, b] += 0.5 * factor * step
                strain[b, a] += 0.5 * factor * step
                moved = system.replace(pos=system.pos @ strain, cell=cell @ strain)
                energies.append(self.subject([moved], forces=False)[0][0])
            weights = torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=torch.float64) / (12.0 * step)
            worst = max(worst, abs(float((weights * torch.stack(energies)).sum()) / volume - float(stress[a, b])))
        return worst / max(float(stress.abs().max()), 1e-6)

    @staticmethod
    def _pbc(system: System) -> Tensor | bool:
        return True if system.pbc is None else torch.as_tensor(system.pbc).reshape(1, 3)

    # ------------------------------------------------------------------ additivity and smoothness
    def _additivity(self) -> Iterator[Check]:
        systems = self.systems[:1] if self.systems[0].cell is not None else self.systems[:2]
        long_range = self.potential.network.long_range
        if long_range and any(state_of(s)[0] for s in systems):
            note = "ions act on each other at any distance in a model with long_range"
            yield Check("extensivity", math.nan, "eV, eV/A", "none", None, note)
        else:
            yield _measured(
                "extensivity", "eV, eV/A", 1e-7,
                lambda: assert_extensive(self.potential, systems=systems, tolerance=math.inf, seed=self.seed),
            )  # fmt: skip
        alone = [System.from_tensors(torch.tensor([n]), torch.zeros(1, 3, dtype=torch.float64)) for n in self.species]
        largest = max(float(self.subject([s])[0].abs().max()) for s in alone)
        forces = max(float(required(self.subject([s])[1]).abs().max()) for s in alone)
        yield _below("force on an isolated atom", forces, "eV/A", 1e-10)
        source = ((self.metadata.get("config") or {}).get("data") or {}).get("e0")
        if source == "isolated" or isinstance(source, dict):
            yield _below("isolated atoms", largest, "eV from E0", 1e-3)
        else:
            note = "E0 was fitted, not given: the data do not say what an atom on its own has"
            yield Check("isolated atoms", largest, "eV from E0", "none", None, note)

    def _smoothness(self) -> Iterator[Check]:
        scheme = self.potential.scheme
        # Fixed parts promise smoothness while they stay as they are.
        fixed = scheme is not None and scheme.keeps_parts
        try:
            order = assert_smooth(
                self.potential, systems=self.open[:2], frozen_topology=fixed, seed=self.seed, distance=7.0
            )
        except NotSmooth as error:
            yield Check("smoothness", error.order, "order", "> 1.5", False, f"{_MEANING['smoothness']}: {error}")
        except AssertionError as error:
            yield Check("smoothness", math.nan, "order", "> 1.5", False, str(error))
        else:
            note = "differences of E and F along pulls fall as h^order"
            yield Check("smoothness", order, "order", "> 1.5", True, note)

    # ------------------------------------------------------------------ short range and precision
    def _short_range(self) -> Iterator[Check]:
        for push in push_dimers(self.subject, self.species):
            yield self._wall(push, f"short range {push.pair}, alone")
        if self.own:
            for push in push_in_structures(self.subject, self.open):
                yield self._wall(push, f"short range {push.pair}, in a structure")

    @staticmethod
    def _wall(push: Push, name: str) -> Check:
        note = f"{push.height:.0f} eV from {push.start:.2f} to 0.3 A"
        if push.weakest <= 0:
            note = f"{_MEANING['short range']}: at {push.place:.2f} A, {push.hole:.2f} eV deep"
        return Check(name, push.weakest, "eV/A", "> 0", push.weakest > 0, note)

    def _precision(self) -> Iterator[Check]:
        single = Subject(self.potential, torch.float32)
        forces = energy = 0.0
        for system in self.systems:
            exact, slopes = self.subject([system])
            low = in_precision(system, torch.float32)
            got, rough = single([low])
            # Rounding the positions is no error of the model: they are rounded for both.
            exact, slopes = self.subject([in_precision(low, torch.float64)])
            energy = max(energy, 1e3 * float((got.double() - exact).abs().max()) / len(system.z))
            forces = max(forces, 1e3 * float((required(rough).double() - required(slopes)).abs().max()))
        yield _below("float32 energy", energy, "meV/atom", 0.1)
        yield _below("float32 forces", forces, "meV/A", 1.0)

    def _dynamics(self) -> Iterator[Check]:
        steps, timestep, temperature = self.nve
        if steps <= 0:
            return
        from nbody_pyg.deploy import run_md  # half a second, which no other check needs

        system = self.systems[0]
        state = {"charge": system.total_charge, "charges": system.formal_charges, "spin": system.spin}
        frame = AtomicData(z=system.z, pos=system.pos, cell=system.cell, pbc=system.pbc, **state)
        atoms = frame.to_ase()
        atoms.calc = NBodyCalculator(self.potential)
        atoms.calc.metadata = self.metadata
        # The structure is at no temperature yet: some steps for it to take up its velocities.
        common: dict[str, Any] = {
            "timestep": timestep,
            "temperature": temperature,
            "seed": self.seed,
            "sample_every": 5,
        }
        run_md(atoms, max(steps // 5, 1), ensemble="langevin", friction=0.02, **common)
        found = run_md(atoms, steps, **common)
        if found.stopped is not None:
            change = 1e3 * float(np.ptp(found.total)) / found.num_atoms if len(found.total) else 0.0
            note = f"{_MEANING['NVE drift']}; {found.stopped}"
            yield Check("NVE drift", change, "meV/atom", "< 0.3", False, note)
            return
        picoseconds = float(found.time[-1])
        note = f"{picoseconds:.2f} ps at {found.temperature.mean():.0f} K, fluctuation {found.fluctuation:.3f} meV/atom"
        half = len(found.total) // 2
        change = 1e3 * float(found.total[half:].mean() - found.total[:half].mean()) / found.num_atoms
        check = _below("NVE drift", abs(change), "meV/atom", 0.3)
        yield replace(check, note=f"{_MEANING['NVE drift']}; {note}" if check.passed is False else note)
        yield _below("NVE largest jump", found.largest_jump, "meV/atom", 5.0)
