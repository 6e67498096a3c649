"""Reading ASE files: where labels are found, in which order, in which unit, and every error by message."""

from __future__ import annotations

import gzip

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from damage import damaged_copies
from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, label_audit, read_frames
from nbody_pyg.units import Units, energy_factor

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
    frames = []
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
        frames += read_frames(write([atoms]))
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
    with pytest.raises(ValueError, match="give its name the ending of its format"):
        read_frames(unknown)


def test_a_misnamed_key_names_the_nearest(write):
    atoms = molecule()
    atoms.info["dft_energy"] = -1.0
    with pytest.raises(ValueError, match=r"energy_key 'dft_enrgy' is in no frame.*did you mean dft_energy\?"):
        read_frames(write([atoms]), energy_key="dft_enrgy")


EVERY_KEY = {
    "energy": "e",
    "forces": "f",
    "stress": "s",
    "dipole": "d",
    "polarizability": "p",
    "charge": "q",
    "spin": "m",
}
TENSOR = np.array([[1.0, 0.2, 0.3], [0.2, -2.0, 0.5], [0.3, 0.5, 3.0]])


def test_one_mapping_names_the_keys_of_all_labels(write, tmp_path):
    atoms = molecule(energy=9.0, forces=9 * FORCES)
    atoms.set_cell(np.eye(3) * 9)
    atoms.pbc = True
    atoms.info |= {"e": -1.5, "s": 0.01 * TENSOR, "d": np.array([0.1, 0.2, 0.3]), "p": TENSOR, "q": -1, "m": 2,
                   "charge": 5, "spin": 7, "w": -7.29 * TENSOR}  # fmt: skip
    atoms.arrays["f"] = FORCES
    path = write([atoms])
    frame = (frames := read_frames(path, keys=EVERY_KEY))[0]
    assert [float(frame[key]) for key in ("energy", "charge", "spin")] == [-1.5, -1.0, 2.0]
    for label, values in {"forces": FORCES, "stress": [0.01 * TENSOR], "polarizability": [TENSOR],
                          "dipole": [[0.1, 0.2, 0.3]]}.items():  # fmt: skip
        np.testing.assert_allclose(frame[label].numpy(), values, atol=1e-8)
    assert frames.sources["charge"] == ("info['q']",) and frames.sources["stress"] == ("info['s']",)
    # The virial is minus the stress times the volume, whatever its key is called
    virial = read_frames(path, keys={"virial": "w"})
    np.testing.assert_allclose(virial[0].stress.numpy(), [0.01 * TENSOR], atol=1e-8)
    assert len(read_frames(path, keys={"virial": "w", "stress": "s"})) == 1
    atoms.info["w"] = 7.29 * TENSOR
    with pytest.raises(ValueError, match=r"frame 0 of frames.xyz: s and w contradict each other"):
        read_frames(write([atoms]), keys={"virial": "w", "stress": "s"})
    atoms.info["q"] = np.array([1.0, 2.0])
    with pytest.raises(ValueError, match="must be"):
        read_frames(write([atoms]), keys={"charge": "q"})
    del atoms.info["q"]
    with pytest.raises(ValueError, match=r"the key of charge, 'q' is in no frame of frames.xyz"):
        read_frames(write([atoms]), keys={"charge": "q"})
    with pytest.raises(ValueError, match=r"keys must name labels .*, got 'enrgy'; did you mean energy\?"):
        read_frames(path, keys={"enrgy": "e"})
    with pytest.raises(ValueError, match=r"energy_key 'energy' and keys\['energy'\] 'e' contradict each other"):
        read_frames(path, keys={"energy": "e"}, energy_key="energy")


def test_a_stress_beside_named_keys_of_energy_and_forces_is_told(write):
    atoms = bulk("Si")
    atoms.rattle(0.05, seed=0)
    atoms = atoms * (2, 1, 1)
    atoms.info |= {"dft_energy": -10.0, "stress": np.eye(3) * 0.01}
    atoms.arrays["dft_forces"] = np.array([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]] * 2)
    path, keys = write([atoms]), {"energy": "dft_energy", "forces": "dft_forces"}
    (note,) = read_frames(path, keys=keys).notes
    assert "energy from 'dft_energy' and forces from 'dft_forces', as named, but stress from 'stress'" in note
    assert not read_frames(path, keys=keys | {"stress": "stress"}).notes


def test_charge_and_spin_of_an_npz_are_named_too(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, z=[7, 1, 1, 1], R=POS[None], E=[1.0], e2=[2.0], q=[-1], charge=[3], m=[2])
    frame = read_frames(path, units="eV", keys={"energy": "e2", "charge": "q", "spin": "m"})[0]
    assert [float(frame[key]) for key in ("energy", "charge", "spin")] == [2.0, -1.0, 2.0]
    with pytest.raises(ValueError, match=r"charge_key 'qq' is not in a.npz"):
        read_frames(path, units="eV", keys={"charge": "qq"})
    with pytest.raises(ValueError, match=r"keys must not name virial for a.npz: an npz file is read without it"):
        read_frames(path, units="eV", keys={"virial": "q"})


def test_all_bad_frames_are_named(write):
    systems = [molecule() for _ in range(3)]
    for atoms in systems[1:]:
        atoms.positions[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"frame 1 of frames.xyz: pos .* \(also bad: frame 2\)"):
        read_frames(write(systems))


def test_wrong_shapes(write):
    atoms = molecule()
    atoms.arrays["f2"] = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"arrays\['f2'\]: forces must have shape \[4, 3\] for 4 atoms, got \[4, 2\]"):
        read_frames(write([atoms]), forces_key="f2")
    atoms.info["text"] = "hello"
    with pytest.raises(ValueError, match=r"info\['text'\] must hold numbers for energy"):
        read_frames(write([atoms]), energy_key="text")


def test_nan_labels_and_positions(write):
    forces = FORCES.copy()
    forces[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"frame 1 of frames.xyz: forces of atom 2 is nan"):
        read_frames(write([molecule(energy=1.0, forces=FORCES), molecule(energy=1.0, forces=forces)]))
    with pytest.raises(ValueError, match=r"energy is inf"):
        read_frames(write([molecule(energy=np.inf)]))
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


# -- labels that are missing, or stand under several keys ---------------------------------------------------
def labelled(key: str, value: float, **more) -> Atoms:
    atoms = molecule(**more)
    atoms.info[key] = value
    return atoms


def test_a_label_that_is_nan_is_missing(write):
    frozen = FORCES.copy()
    frozen[1] = np.nan
    frames = read_frames(
        write([molecule(energy=-1.0, forces=FORCES), molecule(energy=np.nan, forces=np.full((4, 3), np.nan)),
               molecule(energy=-2.0, forces=frozen)])
    )  # fmt: skip
    assert ["energy" in frame for frame in frames] == [True, False, True]
    assert ["forces" in frame for frame in frames] == [True, False, True]
    assert frames[2].forces.isnan().any(dim=1).tolist() == [False, True, False, False]
    np.testing.assert_allclose(frames[2].forces[2].numpy(), FORCES[2], atol=1e-8)
    assert label_audit(frames).count("forces") == (2, 3)
    assert label_audit({"x": frames}).notes == ("x: no label in frame 1 of frames.xyz (1 of 3)",)


def test_two_levels_of_theory_are_not_mixed(write):
    mixed = [labelled("REF_energy", -4.0, energy=-1.0), molecule(energy=-1.5)]
    with pytest.raises(
        ValueError, match=r"energy stands under several keys.*'REF_energy' in 1, 'energy' in 2.*energy_key"
    ):
        read_frames(write(mixed))
    assert [f.energy.item() for f in read_frames(write(mixed), energy_key="energy")] == [-1.0, -1.5]
    # The same values where both stand: one level, under the key that all have
    same = read_frames(write([labelled("REF_energy", -1.0, energy=-1.0), molecule(energy=-1.5)]))
    assert [f.energy.item() for f in same] == [-1.0, -1.5] and same.sources["energy"] == ("results['energy']",)
    # No value at all in some frames is no mixture
    partly = read_frames(write([labelled("REF_energy", -4.0), molecule()]))
    assert ["energy" in f for f in partly] == [True, False]


def test_energy_and_forces_are_of_one_family(write):
    path = write([labelled("REF_energy", -4.0, energy=-1.0, forces=FORCES)])
    with pytest.raises(ValueError, match=r"energy of frames.xyz is read from 'REF_energy' and forces from 'forces'"):
        read_frames(path)
    assert read_frames(path, energy_key="energy", forces_key="forces")[0].energy.item() == -1.0
    chosen = read_frames(path, energy_key="REF_energy", forces_key="forces")
    assert chosen[0].energy.item() == -4.0 and float(chosen[0].forces.abs().sum()) > 1
    same = read_frames(write([labelled("REF_energy", -1.0, energy=-1.0, forces=FORCES)]))
    assert "forces" in same[0]
    atoms = labelled("dft_energy", -4.0, energy=-1.0, forces=FORCES)
    atoms.arrays["dft_forces"] = 2 * FORCES
    with pytest.raises(
        ValueError, match=r"forces would be from 'forces', but 'dft_forces' holds others.*give forces_key"
    ):
        read_frames(write([atoms]), energy_key="dft_energy")
    atoms = labelled("REF_energy", -4.0, energy=-1.0)
    atoms.arrays["REF_forces"] = FORCES
    atoms.set_cell(4 * np.eye(3))
    atoms.pbc = True
    atoms.info["stress"] = np.eye(3).reshape(9)
    frames = read_frames(write([atoms]))
    assert "stress" not in frames[0]
    assert any("stress under 'stress'" in note and "stress_key" in note for note in frames.notes)
    assert "stress" in read_frames(write([atoms]), stress_key="stress")[0]


def test_what_was_not_taken_is_told(write):
    frames = read_frames(write([labelled("free_energy", -3.2, energy=-3.0)]))
    assert frames[0].energy.item() == -3.0
    assert frames.notes == (
        "frames.xyz: energy is read from 'energy'; 'free_energy' holds other values, up to 0.05 eV per atom apart; "
        "with smearing, forces are derivatives of the free energy",
    )
    assert "note: frames.xyz: energy is read from 'energy'" in str(label_audit(frames))
    atoms = molecule(energy=-3.0)
    atoms.arrays["forces_dft"] = FORCES
    assert "but the file holds 'forces_dft'; name one with forces_key" in str(label_audit(read_frames(write([atoms]))))


CELL = np.array([[4.0, 0.1, 0.0], [0.0, 5.0, 0.2], [0.3, 0.0, 6.0]])


def crystal(**info) -> Atoms:
    atoms = Atoms("NH3", positions=POS, cell=CELL, pbc=True)
    atoms.info |= info
    return atoms


def test_stress_against_virial(write):
    stress = np.array([[0.1, 0.02, 0.03], [0.02, 0.2, 0.04], [0.03, 0.04, 0.3]])
    virial = -np.linalg.det(CELL) * stress
    good = crystal(stress=stress.reshape(9), virial=virial.reshape(9))
    np.testing.assert_allclose(read_frames(write([good]))[0].stress.numpy(), stress[None], atol=1e-7)
    bad = crystal(stress=stress.reshape(9), virial=-virial.reshape(9))
    with pytest.raises(
        ValueError, match=r"frame 1 of frames.xyz: stress and virial contradict.*choose with stress_key"
    ):
        read_frames(write([good, bad]))
    chosen = read_frames(write([good, bad]), stress_key="virial")
    np.testing.assert_allclose(chosen[1].stress.numpy(), -stress[None], atol=1e-7)
    # In units of their own: kbar here, the virial in eV
    kbar = crystal(stress=1602.176634 * stress.reshape(9), virial=virial.reshape(9))
    frame = read_frames(write([kbar]), units="eV, angstrom, kbar")[0]
    np.testing.assert_allclose(frame.stress.numpy(), stress[None], atol=1e-7)


def test_a_stress_in_kbar_is_told(write):
    path = write([crystal(energy=-1.0, stress=np.array([-251.0, 14, 73, 14, -229, -12, 73, -12, 56]))])
    (note,) = read_frames(path).notes
    assert "reaches 251 eV/A^3" in note and "'eV, angstrom, kbar'" in note
    frames = read_frames(path, units="eV, angstrom, kbar")
    assert not frames.notes
    assert frames[0].stress[0, 0, 0].item() == pytest.approx(-251 / 1602.176634, rel=1e-7)


# -- files as people have them ------------------------------------------------------------------------------
@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_and_windows_lines(write, tmp_path, coding):
    text = write([molecule(energy=-3.0, forces=FORCES), molecule(energy=-4.0, forces=FORCES)]).read_text()
    path = tmp_path / "windows.xyz"
    path.write_bytes(text.replace("\n", "\r\n").encode(coding))
    frames = read_frames(path)
    assert [f.energy.item() for f in frames] == [-3.0, -4.0]
    np.testing.assert_allclose(frames[1].forces.numpy(), FORCES, atol=1e-8)
    with gzip.open(tmp_path / "windows.xyz.gz", "wb") as file:
        file.write(path.read_bytes())
    assert len(read_frames(tmp_path / "windows.xyz.gz")) == 2


@pytest.mark.parametrize("name", ["run@300K.xyz", "run@2.xyz", "a@b@-1.xyz", "run@:.extxyz"])
def test_a_name_with_an_at_sign(write, name):
    systems = [molecule(energy=float(i)) for i in range(3)]
    assert [f.energy.item() for f in read_frames(write(systems, name))] == [0.0, 1.0, 2.0]


def test_a_cut_file_is_refused(write):
    path = write([molecule(energy=-3.0), molecule(energy=-4.0)])
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(ValueError, match="could not be read by ASE"):
        read_frames(path)


def test_labels_of_an_ase_database(tmp_path):
    path = tmp_path / "a.db"
    with connect(path) as database:
        for i in range(3):
            database.write(molecule(), REF_energy=-float(i), data={"energy": [-float(i)], "forces": FORCES * i})
    frames = read_frames(path)
    assert [f.energy.item() for f in frames] == [0.0, -1.0, -2.0]
    np.testing.assert_allclose(frames[2].forces.numpy(), 2 * FORCES, atol=1e-12)
    assert frames.available == ("REF_energy", "energy", "forces")
    assert len(read_frames(path, index="::2")) == 2


def test_a_database_of_schnetpack_names_its_units(tmp_path):
    path = tmp_path / "s.db"
    with connect(path) as database:
        database.metadata = {
            "_property_unit_dict": {"energy": "kcal/mol", "forces": "kcal/mol/Ang"}, "_distance_unit": "Ang",
        }  # fmt: skip
        database.write(molecule(), data={"energy": np.array([-2.0]), "forces": FORCES})
    frame = read_frames(path)[0]
    assert frame.energy.item() == pytest.approx(-2.0 * energy_factor("kcal/mol"), rel=1e-12)
    np.testing.assert_allclose(frame.forces.numpy(), FORCES * energy_factor("kcal/mol"), atol=1e-12)
    assert read_frames(path, units="eV")[0].energy.item() == -2.0
    with connect(path) as database:
        database.metadata = {
            "_property_unit_dict": {"energy": "Hartree", "forces": "Hartree/Bohr"}, "_distance_unit": "Ang",
        }  # fmt: skip
    with pytest.raises(ValueError, match=r"forces of s.db are in Hartree/Bohr, which is not Ha/angstrom"):
        read_frames(path)
    assert read_frames(path, units="eV")[0].energy.item() == -2.0


@pytest.mark.parametrize("suffix", [".traj", ".db", ".xyz"])
def test_whatever_is_raised_about_a_damaged_file_names_it(tmp_path, suffix):
    """Also where a size in it is so large that no memory holds it, or a place in it negative."""
    atoms, said = Atoms("CO2", [[0, 0, 0], [0, 0, 1.2], [0, 0, -1.2]]), []
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((3, 3)))
    ase.io.write(tmp_path / f"good{suffix}", [atoms] * 3)
    for content in damaged_copies((tmp_path / f"good{suffix}").read_bytes(), 60, 10):
        (tmp_path / f"bad{suffix}").write_bytes(content)
        try:
            read_frames(tmp_path / f"bad{suffix}")
        except (ValueError, MemoryError) as error:
            said.append(str(error))
    assert len(said) > 5 and all(f"bad{suffix}" in text for text in said), set(said)
