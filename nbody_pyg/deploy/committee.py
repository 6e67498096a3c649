"""Committee: several models of one potential energy, and their standard deviation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import all_changes

from nbody_pyg.deploy.calculator import NBodyCalculator, SharedCalculator
from nbody_pyg.kernels.autograd_flags import locked
from nbody_pyg.potential import Potential
from nbody_pyg.required import required


class Committee(SharedCalculator):
    r"""Mean of several potentials as an ASE calculator, with the standard deviation among them.

    .. math:: \bar F = \frac{1}{M} \sum_m F_m, \qquad
              \sigma_i = \Big( \frac{1}{M - 1} \sum_m |F_{m,i} - \bar F_i|^2 \Big)^{1/2}

    ====================  ====================  ============================================================
    key of ``results``    shape, unit           meaning
    ====================  ====================  ============================================================
    ``energy``            eV                    mean; likewise ``free_energy``, ``forces``, ``stress``
    ``energies``          [N], eV               mean, if asked for and every member has it
    ``energy_std``        eV                    standard deviation over the members
    ``forces_std``        [N], eV/A             :math:`\sigma_i` of each atom
    ``stress_std``        [6], eV/A^3           only if the stress is computed
    ====================  ====================  ============================================================

    The mean energy has the mean forces as its gradient, so a committee conserves energy as its members do. Members
    differ in their seed or their training frames. Their standard deviation indicates unreliable forces, but is not an
    error bar.

    Args:
        members: at least two potentials, or paths of model files.
        options: further arguments of each :class:`NBodyCalculator` (device, dtype, skin).
    Raises: ValueError: fewer than two members, or members that know different elements. PropertyNotImplementedError:
        ``energies`` of members whose parts are not centred on atoms.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc]  # ASE has no ClassVar there
        "energy", "free_energy", "forces", "stress", "energies", "energy_std", "forces_std", "stress_std",
    ]  # fmt: skip

    def __init__(self, members: Sequence[Potential | str | Path], **options: Any):
        super().__init__()
        if isinstance(members, (str, Path)) or len(members) < 2:
            raise ValueError(f"members must list at least two potentials or model files, got {members!r}")
        self.members = [NBodyCalculator(member, **options) for member in members]
        known = {m.potential.species or () for m in self.members}
        if len(known) > 1:
            raise ValueError(f"members must know the same elements, got {sorted(known)}; train them on the same data")
        self._share_lists()

    def _share_lists(self) -> None:
        """Members with one scheme and one reference molecule search for neighbours once."""
        first: dict[tuple[str, str], NBodyCalculator] = {}
        for member in self.members:
            if member.topologies is not None:
                key = (required(member.scheme).signature, str(member.metadata.get("reference")))
                member.topologies = first.setdefault(key, member).topologies

    @locked
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        wanted = ["energy", "forces"]
        wanted += ["stress"] if any(name.startswith("stress") for name in properties) else []
        wanted += ["energies"] if "energies" in properties else []
        found = []
        for member in self.members:
            member.calculate(self.atoms, wanted, all_changes)
            found.append(member.results)
        energy = np.array([result["energy"] for result in found])
        forces = np.stack([result["forces"] for result in found])
        self.results = {
            "energy": float(energy.mean()),
            "free_energy": float(energy.mean()),
            "energy_std": float(energy.std(ddof=1)),
            "forces": forces.mean(axis=0),
            "forces_std": np.sqrt(forces.var(axis=0, ddof=1).sum(axis=1)),
        }
        if all("stress" in result for result in found):  # members whose stress was asked for once give it always
            stress = np.stack([result["stress"] for result in found])
            self.results |= {"stress": stress.mean(axis=0), "stress_std": stress.std(axis=0, ddof=1)}
        if "energies" in wanted:
            self.results["energies"] = np.mean([result["energies"] for result in found], axis=0)

    @contextlib.contextmanager
    def fixed_bonds(self, atoms: Atoms) -> Iterator[None]:
        """Context in which parts (bonds) are fixed to those that a structure has now; see :class:`NBodyCalculator`."""
        with contextlib.ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.fixed_bonds(atoms))
            try:
                yield
            finally:
                if self.atoms is None or self.bond_changes(self.atoms) is not None:
                    self.reset()

    def bond_changes(self, atoms: Atoms) -> str | None:
        """How the bonds found in a structure differ from those that some member uses; None if they do not."""
        return next((text for member in self.members if (text := member.bond_changes(atoms))), None)

    @property
    def bonds_from(self) -> str | None:
        """Source of the bonds; see :class:`NBodyCalculator`."""
        return next((member.bonds_from for member in self.members if member.bonds_from), None)

    def forget(self) -> None:
        """Build the hierarchies again at the next call."""
        for member in self.members:
            member.forget()

    @property
    def device(self) -> torch.device:
        return self.members[0].device


def stop_on_uncertainty(limit: float) -> Callable[[Atoms], str | None]:
    """A ``stop`` function for :func:`run_md`: stops when the ``forces_std`` of an atom exceeds ``limit`` (eV/A).

    Raises: ValueError: limit not positive; when called, atoms whose calculator is not a committee.
    """
    if not limit > 0:
        raise ValueError(f"limit of the standard deviation of forces must be positive (eV/angstrom), got {limit}")

    def stop(atoms: Atoms) -> str | None:
        if "forces_std" not in getattr(atoms.calc, "implemented_properties", ()):
            raise ValueError("a limit on the uncertainty needs a committee; set atoms.calc = Committee([...])")
        spread = atoms.calc.get_property("forces_std", atoms)
        atom = int(np.argmax(spread))
        atoms.info["forces_std"] = float(spread[atom])
        if spread[atom] <= limit:
            return None
        return (
            f"the members disagree on the force on atom {atom} ({atoms.symbols[atom]}) by {spread[atom]:.3f} eV/A, "
            f"more than {limit:g}: the structure is unlike the training data; label it and train again"
        )

    return stop
