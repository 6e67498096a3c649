"""Reading ASE files: where labels are found, in which order, in which unit, and every error by message."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, read_frames
from nbody_pyg.units import Units

POS = np.array([[0.0, 0.1, 0.2], [0.9, 0.0, -0.3], [-0.4, 0.8, 0.5], [0.2, -0.7, 0.9]])
FORCES = np.linspace(-1.0, 1.2, 12).reshape(4, 3)


def molecule(**results) -> Atoms:
    atoms = Atoms("NH3", positions=POS)
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.fixture
def write(tmp_path):
    """Write systems as extxyz and return the path."""

    def write(systems, name="frames.xyz", **options):
        path = tmp_path / name
        ase.io.write(path, systems, format="extxyz", **options)
        return path

    return write


def test_results_of_the_calculator(write):
    frames = read_frames(write([molecule(energy=-3.25, forces=FORCES), molecule(energy=-3.5, forces=2 * FORCES)]))
    assert len(frames) == 2
    assert frames.sources == {"energy": ("results['energy']",), "forces": ("results['forces']",)}
    assert frames[0].energy.tolist() == [-3.25]
    assert frames[1].forces.dtype == frames[1].pos.dtype == torch.float64
    np.testing.assert_allclose(frames[1].forces.numpy(), 2 * FORCES, atol=1e-8)
    np.testing.assert_allclose(frames[0].pos.numpy(), POS, atol=1e-8)
    assert frames[0].z.tolist() == [7, 1, 1, 1]


def test_info_and_arrays(write):
    atoms = molecule()
    atoms.info["my_e"] = -1.5
    atoms.arrays["my_f"] = FORCES
    path = write([atoms])
    assert "energy" not in read_frames(path)[0]
    frames = read_frames(path, energy_key="my_e", forces_key="my_f")
    assert frames.sources == {"energy": ("info['my_e']",), "forces": ("arrays['my_f']",)}
    assert frames[0].energy.item() == -1.5
    assert float(frames[0].forces.abs().sum()) > 1


def test_reference_keys_come_first_and_user_keys_override(write):
    atoms = molecule(energy=-3.0)
    atoms.info["REF_energy"] = -4.0
    path = write([atoms])
    assert read_frames(path)[0].energy.item() == -4.0
    assert read_frames(path, energy_key="energy")[0].energy.item() == -3.0


def test_units_are_converted(write):
    atoms = molecule(energy=1.0, forces=FORCES)
    frames = read_frames(write([atoms]), units="Ha, bohr")
    units = Units("Ha", "bohr")
    assert frames[0].energy.item() == pytest.approx(27.211386246, abs=1e-8)
    np.testing.assert_allclose(frames[0].forces.numpy(), FORCES * units.forces_factor, atol=1e-6)
    np.testing.assert_allclose(frames[0].pos.numpy(), POS * 0.529177210544, atol=1e-8)


def test_stress_forms_and_virial(write):
    cell = np.array([[4.0, 0.1, 0.0], [0.0, 5.0, 0.2], [0.3, 0.0, 6.0]])
    stress = np.array([[0.1, 0.02, 0.03], [0.02, 0.2, 0.04], [0.03, 0.04, 0.3]])
    voigt = stress.reshape(9)[[0, 4, 8, 5, 2, 1]]
    volume = np.linalg.det(cell)
    systems = []
    for key, value in (
        ("REF_stress", stress.reshape(9)),
        ("results", voigt),
        ("virial", (-volume * stress).reshape(9)),
    ):
        atoms = Atoms("NH3", positions=POS, cell=cell, pbc=[True, True, False])
        if key == "results":
            atoms.calc = SinglePointCalculator(atoms, energy=0.0, stress=value)
        else:
            atoms.info[key] = value
        systems.append(atoms)
    frames = read_frames(write(systems))
    for frame in frames:
        np.testing.assert_allclose(frame.stress.numpy(), stress[None], atol=1e-7)
    assert frames[0].cell.shape == (1, 3, 3)
    assert frames[0].pbc.tolist() == [[True, True, False]]


def test_other_formats_and_slices(tmp_path):
    path = tmp_path / "run.traj"
    ase.io.write(path, [molecule(energy=float(i), forces=FORCES) for i in range(6)])
    frames = read_frames(path, index="1::2")
    assert [frame.energy.item() for frame in frames] == [1.0, 3.0, 5.0]
    assert isinstance(frames[:2], Frames)
    assert frames[:2].sources == frames.sources


def test_constraints_do_not_change_the_forces(tmp_path):
    from ase.constraints import FixAtoms

    atoms = molecule(energy=1.0, forces=FORCES)
    atoms.set_constraint(FixAtoms([0]))
    path = tmp_path / "fixed.traj"
    ase.io.write(path, atoms)
    np.testing.assert_allclose(read_frames(path)[0].forces.numpy(), FORCES)


def test_dipole_and_charge(write):
    atoms = molecule(energy=0.5, dipole=np.array([0.1, -0.2, 0.3]))
    atoms.info["charge"] = -1
    frame = read_frames(write([atoms]))[0]
    np.testing.assert_allclose(frame.dipole.numpy(), [[0.1, -0.2, 0.3]], atol=1e-8)
    assert frame.charge.tolist() == [-1.0]


def test_one_key_with_two_values_is_an_error(tmp_path):
    atoms = molecule(energy=-3.0)
    atoms.info["energy"] = -4.0
    path = tmp_path / "two.traj"
    ase.io.write(path, atoms)
    systems = ase.io.read(path)
    if "energy" not in systems.info:
        pytest.skip("this ASE drops the second value while writing")
    with pytest.raises(ValueError, match=r"'energy' has one value in info and another in results \(they differ by 1\)"):
        read_frames(path)


def test_the_same_value_twice_is_fine(tmp_path):
    atoms = molecule(energy=-3.0)
    atoms.info["energy"] = -3.0
    path = tmp_path / "twice.traj"
    ase.io.write(path, atoms)
    assert read_frames(path)[0].energy.item() == -3.0


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_frames(tmp_path / "nothing.xyz")
    empty = tmp_path / "empty.xyz"
    empty.write_text("")
    with pytest.raises(ValueError, match="holds no frame"):
        read_frames(empty)
    garbage = tmp_path / "garbage.xyz"
    garbage.write_text("three\nlines of\nno meaning\n")
    with pytest.raises(ValueError, match="could not be read by ASE"):
        read_frames(garbage)
    unknown = tmp_path / "file.unknownsuffix"
    unknown.write_text("x\n")
    with pytest.raises(ValueError, match="name its format with file_format"):
        read_frames(unknown)


def test_a_misnamed_key_names_the_nearest(write):
    atoms = molecule()
    atoms.info["dft_energy"] = -1.0
    with pytest.raises(ValueError, match=r"energy_key 'dft_enrgy' is in no frame.*did you mean 'dft_energy'\?"):
        read_frames(write([atoms]), energy_key="dft_enrgy")


def test_wrong_shapes(write):
    atoms = molecule()
    atoms.arrays["f2"] = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"forces under 'f2' must have shape \[4, 3\] for 4 atoms, got \[4, 2\]"):
        read_frames(write([atoms]), forces_key="f2")
    atoms.info["text"] = "hello"
    with pytest.raises(ValueError, match="'text' must hold numbers for energy"):
        read_frames(write([atoms]), energy_key="text")


def test_nan_labels_and_positions(write):
    forces = FORCES.copy()
    forces[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"frame 1 of frames.xyz: forces of atom 2 is nan"):
        read_frames(write([molecule(energy=1.0, forces=FORCES), molecule(energy=1.0, forces=forces)]))
    with pytest.raises(ValueError, match=r"energy is (nan|inf)"):
        read_frames(write([molecule(energy=np.nan)]))
    atoms = molecule(energy=1.0)
    atoms.positions[3] = np.nan
    with pytest.raises(ValueError, match="pos of atom 3 is nan"):
        read_frames(write([atoms]))


def test_frames_without_atoms(write):
    with pytest.raises(ValueError, match=r"frame 1 of frames.xyz has no atoms"):
        read_frames(write([molecule(energy=1.0), Atoms()]))


def test_dummy_atoms_and_bad_arguments(write):
    atoms = Atoms("NXH2", positions=POS)
    with pytest.raises(ValueError, match=r"atomic numbers must lie in 1..118"):
        read_frames(write([atoms]))
    path = write([molecule(energy=1.0)])
    with pytest.raises(ValueError, match="index must be a slice"):
        read_frames(path, index="3")
    with pytest.raises(ValueError, match="unknown energy unit 'kcal/mole'; did you mean"):
        read_frames(path, units="kcal/mole")


def test_select_and_repr():
    systems = [AtomicData(z=torch.tensor([i + 1]), pos=torch.zeros(1, 3)) for i in range(5)]
    frames = Frames(systems, name="x", sources={"energy": ["E"]})
    assert [int(f.z) for f in frames.select(torch.tensor([3, 1]))] == [4, 2]
    assert repr(frames) == "Frames(5 from x; energy)"
    with pytest.raises(ValueError, match=r"indices must lie in 0..4 .*got \[5, -1\]"):
        frames.select([5, 0, -1])
