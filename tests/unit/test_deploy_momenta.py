"""Drawn momenta and the degrees of freedom that thermostats and temperatures count."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from nbody_pyg.deploy import run_md
from nbody_pyg.deploy.ensembles import integrator
from nbody_pyg.deploy.momenta import degrees_of_freedom, draw_momenta, kelvin

METHANOL, LINE, PAIR, ATOM, CELL = (
    molecule("CH3OH"), molecule("CO2"), molecule("N2"), Atoms("Ar"), bulk("Si"),
)  # fmt: skip
BATHS = ("bussi", "nose-hoover")


def angular(atoms: Atoms) -> np.ndarray:
    return np.cross(atoms.positions - atoms.get_center_of_mass(), atoms.get_momenta()).sum(axis=0)


@pytest.mark.parametrize(
    ("atoms", "freedom"),
    [(METHANOL, 12), (LINE, 4), (PAIR, 1), (ATOM, 3), (CELL, 3)],
    ids=["molecule", "linear", "diatomic", "atom", "cell"],
)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_drawn_momenta_leave_each_motion_its_thermal_energy(atoms, freedom, shift):
    """The energy of translation and rotation is not given to the other motions."""
    atoms, rng, energies = atoms.copy(), np.random.default_rng(0), []
    atoms.positions += shift
    for _ in range(400):
        draw_momenta(atoms, 300.0, rng)
        energies.append(atoms.get_kinetic_energy())
        if len(atoms) > 1:
            assert np.abs(atoms.get_momenta().sum(axis=0)).max() < 1e-10
            assert atoms.pbc.any() or np.abs(angular(atoms)).max() < 1e-8
        assert degrees_of_freedom(atoms, "nve") == freedom
    mean, spread = 0.5 * freedom * units.kB * 300.0, np.sqrt(0.5 * freedom / 400) * units.kB * 300.0
    assert abs(np.mean(energies) - mean) < 4 * spread


def test_motions_that_are_there_count():
    atoms = METHANOL.copy()
    draw_momenta(atoms, 300.0, np.random.default_rng(0))
    still = atoms.get_momenta()
    assert [degrees_of_freedom(atoms, kind) for kind in ("nve", "bussi", "nose-hoover", "langevin")] == [12, 12, 12, 18]
    moving = 0.05 * atoms.get_masses()[:, None] * [1.0, 0.0, 0.0]
    atoms.set_momenta(still + moving)
    assert degrees_of_freedom(atoms, "nve") == 15
    turning = (
        0.05 * atoms.get_masses()[:, None] * np.cross([0.0, 0.0, 1.0], atoms.positions - atoms.get_center_of_mass())
    )
    atoms.set_momenta(still + turning)
    assert degrees_of_freedom(atoms, "nve") == 15
    atoms.set_momenta(still + turning + moving)
    assert degrees_of_freedom(atoms, "nve") == 18
    atoms.set_constraint(FixAtoms([0]))
    assert degrees_of_freedom(atoms, "nve") == 15
    atoms.set_momenta(0.0 * still)
    assert degrees_of_freedom(atoms, "nve") == 15, "the held atom takes up momentum"


class Spring(Calculator):
    """Springs between all atoms, at their first distances."""

    implemented_properties = ("energy", "forces")

    def __init__(self, atoms: Atoms):
        super().__init__()
        self.first = atoms.get_all_distances()

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        vectors = self.atoms.positions[:, None] - self.atoms.positions[None]
        lengths = np.linalg.norm(vectors, axis=-1) + np.eye(len(vectors))
        off = (lengths - self.first) * (1 - np.eye(len(vectors)))
        pull = -20.0 * (off / lengths)[..., None] * vectors
        self.results = {"energy": 5.0 * (off**2).sum(), "forces": pull.sum(axis=1)}


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", [*BATHS, "nve", "langevin"])
def test_motion_inside_a_molecule_has_the_temperature(ensemble):
    """Of 3 N - 6 degrees of freedom, also where a thermostat scales all momenta, and at constant energy."""
    atoms = METHANOL.copy()
    atoms.calc = Spring(atoms)
    run_md(atoms, 400, ensemble="langevin", temperature=300.0, friction=0.05, seed=1)
    given = atoms.get_momenta()
    draw_momenta(atoms, 300.0, np.random.default_rng(2))
    assert np.abs(atoms.get_momenta() - given).max() > 0.1
    found = []

    def seen(atoms: Atoms) -> None:
        found.append(kelvin(atoms, 18 if ensemble == "langevin" else 12))

    report = run_md(
        atoms, 6000, ensemble=ensemble, temperature=300.0, friction=0.05, thermostat_time=10.0, seed=3,
        sample_every=1, stop=seen, velocities="given",
    )  # fmt: skip
    np.testing.assert_allclose(report.temperature, found, rtol=1e-12)
    if ensemble != "nve":  # whose energy is that of its first momenta
        assert abs(report.temperature[500:].mean() - 300.0) < 35.0


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["nose-hoover", "npt", "npt-full"])
def test_a_small_cell_has_the_temperature_and_keeps_what_is_conserved(ensemble):
    """Of 9 degrees of freedom; a thermostat that counts all 12 would give 80 K."""
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=9.0, smooth=True)
    rng = np.random.default_rng(0)
    draw_momenta(atoms, 60.0, rng)
    freedom = degrees_of_freedom(atoms, ensemble)
    assert freedom == 9
    dyn = integrator(
        ensemble, atoms, timestep=2.0, temperature=60.0, friction=0.01, pressure=1.0, thermostat_time=100.0,
        barostat_time=500.0, freedom=freedom, rng=rng,
    )  # fmt: skip
    seen = [(dyn.get_conserved_energy(), kelvin(atoms, freedom)) for _ in dyn.irun(1200)]
    conserved, temperatures = np.array(seen).T
    assert np.ptp(conserved) < 1e-4 and abs(temperatures[300:].mean() - 60.0) < 8.0
