"""The script that labels frames by density functional theory."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule

from loading import load_script
from nbody_pyg.datasets.units import UnitFiles

REASON = "labels of density functional theory need pyscf, rdkit and h5py"
h5py = pytest.importorskip("h5py", reason=REASON)
pytest.importorskip("rdkit.Chem", reason=REASON)
pyscf = pytest.importorskip("pyscf", reason=REASON)


@pytest.fixture
def script(request):
    return load_script(request.config.rootpath / "datasets" / "label_pbe.py")


@pytest.fixture
def units(tmp_path):
    """A unit of three structures with two frames each: methane, ethanol (left out), hydronium."""
    parts = [("C", molecule("CH4"), 0), ("OCC", molecule("CH3CH2OH"), 0), ("[OH3+]", molecule("NH3"), 1)]
    parts[2][1].numbers[0] = 8
    rng = np.random.default_rng(0)
    frames = [(n, atoms, charge) for n, (_, atoms, charge) in enumerate(parts) for _ in range(2)]
    pos = [atoms.positions + rng.normal(scale=0.03, size=(len(atoms), 3)) for _, atoms, _ in frames]
    folder = tmp_path / "units"
    folder.mkdir()
    with h5py.File(folder / "unit_00007.h5", "w") as file:
        file["z"] = np.concatenate([atoms.numbers for _, atoms, _ in frames]).astype(np.uint8)
        file["pos"] = np.concatenate(pos)
        file["natoms"] = np.array([len(atoms) for _, atoms, _ in frames])
        file["total_charge"] = np.array([charge for *_, charge in frames])
        file["structure"] = np.array([n for n, *_ in frames])
        file["temperature"], file["split"] = np.full(6, 300.0), np.array([0, 0, 0, 0, 1, 1], np.uint8)
        file.create_dataset("smiles", data=[name for name, *_ in parts], dtype=h5py.string_dtype())
        file.attrs["kind"] = "fragment"
    return folder


def test_one_frame_of_each_structure_is_labelled(script, units, tmp_path):
    words = ["--units", str(units), "--out", str(tmp_path / "pbe")]
    assert script.main(words) == 0
    path = tmp_path / "pbe" / "unit_00007.h5"
    first = path.read_bytes()
    assert script.main(words) == 0 and path.read_bytes() == first and not list(tmp_path.rglob("*.part"))
    found = UnitFiles([path])
    methane, ion = found.read(0, np.array([0, 1]))
    assert found.count("train") == 1 and found.count("val") == 1
    assert methane.z.tolist() == [6, 1, 1, 1, 1] and ion.z.tolist() == [8, 1, 1, 1]
    assert float(ion.charge) == 1.0 and float(methane.forces.abs().max()) > 0.5
    # Without density fitting, on a fine grid
    for frame in (methane, ion):
        mol = pyscf.gto.M(
            atom=list(zip(frame.z.tolist(), frame.pos.tolist(), strict=True)), basis="def2-svp", verbose=0,
            charge=int(frame.charge),
        )  # fmt: skip
        exact = pyscf.dft.RKS(mol, xc="pbe")
        exact.grids.level = 5
        assert float(frame.energy) == pytest.approx(script.HARTREE * exact.kernel(), abs=0.01)
        forces = -script.HARTREE / script.BOHR * exact.nuc_grad_method().kernel()
        np.testing.assert_allclose(frame.forces.numpy(), forces, atol=0.03)


def test_basis_functions_are_counted(script):
    for name in ("C6H6", "SO2", "CH3Cl"):
        atoms = molecule(name)
        mol = pyscf.gto.M(
            atom=list(zip(atoms.numbers.tolist(), atoms.positions, strict=True)), basis="def2-svp", verbose=0
        )
        assert script.functions(atoms.numbers) == mol.nao


def test_large_structures_are_left_out(script, units, tmp_path):
    assert script.main(["--units", str(units), "--out", str(tmp_path / "pbe"), "--functions", "10"]) == 0
    assert not list((tmp_path / "pbe").iterdir())
