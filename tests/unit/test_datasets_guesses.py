"""What a file does not say is missing or refused: elements, energies, atoms of partly occupied sites."""

from __future__ import annotations

import re

import ase.io
import numpy as np
import pytest
from ase.build import bulk

from nbody_pyg.cli.frames import read_atoms
from nbody_pyg.datasets import read_frames

FORCES = np.linspace(-1.0, 1.2, 12).reshape(4, 3)
POS = np.array([[0.0, 0.1, 0.2], [0.9, 0.0, 1.3], [1.4, 0.8, 0.5], [0.2, 1.7, 0.9]])


def dump(path, columns: str, words: str):
    """Two frames of a LAMMPS dump, with ``words`` between the type of an atom and its position."""
    lines = []
    for step in range(2):
        lines += ["ITEM: TIMESTEP", str(step), "ITEM: NUMBER OF ATOMS", "4", "ITEM: BOX BOUNDS pp pp pp"]
        lines += ["0 5.5"] * 3 + [f"ITEM: ATOMS id type {columns}x y z fx fy fz"]
        for number, (pos, force) in enumerate(zip(POS, FORCES, strict=True), 1):
            values = " ".join(f"{value:.6f}" for value in (*pos, *(force + step)))
            lines.append(f"{number} {1 + number % 2} {words}{values}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_dump_has_forces_but_no_energy(tmp_path):
    frames = read_frames(dump(tmp_path / "a.lammpstrj", "element ", "Si "))
    assert frames[1].z.tolist() == [14] * 4
    np.testing.assert_allclose(frames[1].forces.numpy(), FORCES + 1, atol=1e-6)
    assert "energy" not in frames[0] and "energy" not in frames.sources and "energy" not in frames.available


def test_a_dump_with_masses_has_elements(tmp_path):
    assert read_frames(dump(tmp_path / "a.lammpstrj", "mass ", "28.0855 "))[0].z.tolist() == [14] * 4


def test_types_of_a_dump_are_no_elements(tmp_path):
    path = dump(tmp_path / "a.lammpstrj", "", "")
    for read in (read_frames, read_atoms):
        with pytest.raises(ValueError, match=r"a.lammpstrj' has atom types but no elements; write it with .*specorder"):
            read(str(path))


def test_carbon_for_several_types_is_what_lammps_writes_unasked(tmp_path):
    with pytest.raises(ValueError, match=r"a.lammpstrj' names carbon for all of its types"):
        read_frames(dump(tmp_path / "a.lammpstrj", "element ", "C "))
    text = dump(tmp_path / "b.lammpstrj", "element ", "C ").read_text()
    (tmp_path / "b.lammpstrj").write_text(re.sub(r"(?m)^(\d) \d C", r"\1 1 C", text))
    assert read_frames(tmp_path / "b.lammpstrj")[0].z.tolist() == [6] * 4


def test_types_of_a_data_file_are_no_elements(tmp_path):
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    ase.io.write(tmp_path / "no.lmp", atoms, format="lammps-data")
    ase.io.write(tmp_path / "yes.lmp", atoms, format="lammps-data", masses=True)
    with pytest.raises(ValueError, match=r"no.lmp' has atom types but no elements; add its section Masses"):
        read_frames(tmp_path / "no.lmp", file_format="lammps-data")
    assert sorted(read_frames(tmp_path / "yes.lmp", file_format="lammps-data")[0].z.tolist()) == [11] * 4 + [17] * 4


GRO = "t\n{}\n{}   2.0 2.0 2.0\n"
PDB = "HETATM{:5d} {:<4} {:<3} A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00  0.00          {:>2}\n"
G96 = "TITLE\nt\nEND\nPOSITION\n{}END\nBOX\n 2.0 2.0 2.0\nEND\n"


@pytest.mark.parametrize(
    ("name", "residue", "element"),
    [("CA", "ALA", "C"), ("HW1", "SOL", "H"), ("NA", "NA", None), ("CL1", "LIG", None), ("MW", "SOL", None),
     ("Cl1", "LIG", "Cl"), ("SOD", "SOD", None)],
)  # fmt: skip
def test_elements_from_the_names_of_atoms(tmp_path, name, residue, element):
    """ASE reads CL and a lone NA of a .gro as C and N, and the virtual site MW of water as tungsten."""
    text = GRO.format(1, f"    1{residue:<5}{name:>5}    1{0.1:8.3f}{0.2:8.3f}{0.3:8.3f}\n")
    (tmp_path / "a.gro").write_text(text)
    (tmp_path / "a.g96").write_text(G96.format(f"    1 {residue} {name} 1 0.1 0.2 0.3\n"))
    for path in (tmp_path / "a.gro", tmp_path / "a.g96"):
        if element is None or (path.suffix, element) == (".g96", "Cl"):  # of which ASE makes C
            with pytest.raises(ValueError, match=rf"ASE would take the atom {name} of {residue} for|not in chemical"):
                read_frames(path)
        else:
            assert read_atoms(str(path))[0].get_chemical_symbols() == [element]


@pytest.mark.parametrize(("name", "residue", "element"), [("CA", "ALA", None), ("HG1", "THR", None), ("NA", "NA", "Na"),
                                                    ("CL1", "LIG", "Cl"), ("OW", "SOL", "O")])  # fmt: skip
def test_a_pdb_without_elements(tmp_path, name, residue, element):
    path = tmp_path / "a.pdb"
    path.write_text(PDB.format(1, name, residue, 1, 1.0, 2.0, 3.0, "") + "END\n")
    if element is None:
        with pytest.raises(ValueError, match=rf"ASE would take the atom {name} of {residue} for .*columns 77 and 78"):
            read_frames(path)
    else:
        assert read_atoms(str(path))[0].get_chemical_symbols() == [element]
    path.write_text(PDB.format(1, name, residue, 1, 1.0, 2.0, 3.0, "C") + "END\n")
    assert read_atoms(str(path))[0].get_chemical_symbols() == ["C"]


def test_netcdf_without_elements(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    path, atoms = tmp_path / "a.nc", bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    ase.io.write(path, atoms, format="netcdftrajectory")
    assert read_atoms(str(path))[0].get_chemical_symbols() == atoms.get_chemical_symbols()
    with netcdf.Dataset(path, "a") as data:
        data.program = "LAMMPS"
    with pytest.raises(ValueError, match="names no elements"):
        read_atoms(str(path))


def test_partly_occupied_sites(tmp_path):
    """Of a CIF file, of what is written from it, and of a PDB file."""
    path = tmp_path / "a.cif"
    ase.io.write(path, bulk("NaCl", "rocksalt", a=5.64))
    assert sorted(read_frames(path)[0].z.tolist()) == [11, 17]
    text = path.read_text()
    assert text.count(" 1.0000") == 2
    path.write_text(text.replace(" 1.0000", " 0.5000", 1))
    for read in (read_frames, read_atoms):
        with pytest.raises(ValueError, match=r"a.cif' has partly occupied sites \(Na 0.5\).*give an ordered structure"):
            read(str(path))
    ase.io.write(tmp_path / "a.traj", ase.io.read(path))
    with pytest.raises(ValueError, match="partly occupied sites"):
        read_frames(tmp_path / "a.traj")
    line = PDB.format(1, "C1", "LIG", 1, 1.0, 2.0, 3.0, "C")
    (tmp_path / "a.pdb").write_text(line.replace("  1.00  0.00", "  0.60  0.00") + "END\n")
    with pytest.raises(ValueError, match=r"partly occupied sites \(C 0.6\)"):
        read_frames(tmp_path / "a.pdb")
    (tmp_path / "a.pdb").write_text(line.replace("  1.00  0.00", "  0.00  0.00") + "END\n")
    assert len(read_frames(tmp_path / "a.pdb")[0].z) == 1
