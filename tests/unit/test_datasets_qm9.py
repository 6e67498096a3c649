"""QM9 from the package qm9pack, its raw files without RDKit, packed arrays, dipole vectors, errors by message."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from nbody_pyg.datasets import load_qm9, load_qm9_dipoles, qm9_atomref
from nbody_pyg.datasets.qm9 import REGRESSION_TARGETS, TARGETS
from nbody_pyg.units import DEBYE, HARTREE, dipole_factor, energy_factor

MOLECULES = [
    (["C", "H", "H", "H", "H"], [-0.4, 0.3, 0.1, 0.9, -0.7]),
    (["N", "H", "H", "H"], [0.2, 0.8, -0.6, -0.1]),
    (["O", "H", "H"], [0.1, 0.9, -0.8]),
    (["C", "F", "H", "H"], [0.0, 1.3, -0.6, -0.5]),
]
COLUMNS = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv,u0_atom,u298_atom,h298_atom,g298_atom"


def value(molecule: int, column: str) -> float:
    return round(-3.0 * COLUMNS.split(",").index(column) - molecule / 7, 6)


def molblock(number: int, symbols: list[str], xs: list[float]) -> str:
    atoms = "".join(
        f"{x:10.4f}{0.5 * x:10.4f}{i * 0.7:10.4f} {s:<3} 0  0\n"
        for i, (s, x) in enumerate(zip(symbols, xs, strict=True))
    )
    head = f"gdb_{number + 1}\n     RDKit          3D\n\n{len(symbols):3d}  0  0  0  0  0  0  0  0  0999 V2000\n"
    return f"{head}{atoms}M  END\n$$$$\n"


@pytest.fixture
def raw(tmp_path):
    """The three raw files of PyG's QM9 for four molecules, of which the second failed the authors' check."""
    (tmp_path / "gdb9.sdf").write_text("".join(molblock(i, *m) for i, m in enumerate(MOLECULES)))
    names = COLUMNS.split(",")[1:]
    lines = [f"gdb_{i + 1}," + ",".join(repr(value(i, name)) for name in names) for i in range(len(MOLECULES))]
    (tmp_path / "gdb9.sdf.csv").write_text("\n".join([COLUMNS, *lines]) + "\n")
    (tmp_path / "uncharacterized.txt").write_text("heading\n" * 9 + "      2 N CC 0.1\n" + "closing\n")
    return tmp_path


def test_raw_files(raw):
    frames = load_qm9(raw)
    assert [frame.z.tolist() for frame in frames] == [[6, 1, 1, 1, 1], [8, 1, 1], [6, 9, 1, 1]]
    assert frames[2].pos.dtype == torch.float64
    np.testing.assert_array_equal(frames[2].pos[1].numpy(), [1.3, 0.65, 0.7])
    expected = value(3, "u0_atom") * energy_factor("kcal/mol")
    assert frames[2].energy.item() == pytest.approx(expected, rel=1e-15)
    assert load_qm9(raw, "U0", rows=[1])[0].energy.item() == pytest.approx(value(2, "u0") * HARTREE, rel=1e-15)


@pytest.mark.parametrize("name", ["mu", "alpha", "homo", "gap", "r2", "Cv", "C"])
def test_other_targets_have_their_own_name(raw, name):
    frame = load_qm9(raw, name)[0]
    assert frame[name].item() == pytest.approx(value(0, TARGETS[name].column) * TARGETS[name].factor, rel=1e-15)
    assert "energy" not in frame


def test_several_targets_keep_their_names(raw):
    frame = load_qm9(raw, ["mu", "U0"], rows=[2])[0]
    assert "energy" not in frame
    assert frame.mu.item() == value(3, "mu") and frame.U0.item() == pytest.approx(value(3, "u0") * HARTREE, rel=1e-15)


def test_numbers_are_those_of_pyg(raw):
    """Target k is y[:, k] of PyG, by its own order and factors."""
    from torch_geometric.datasets.qm9 import conversion

    names = COLUMNS.split(",")[1:]
    columns = np.array([value(0, name) for name in names])
    y = np.concatenate([columns[3:], columns[:3]]) * conversion.numpy().astype(np.float64)
    for k, name in enumerate(TARGETS):
        frame = load_qm9(raw, k)[0]
        ours = frame.energy if "energy" in frame else frame[name]
        assert ours.item() == pytest.approx(y[k], rel=1e-6), name


# Columns of the package qm9pack and three molecules of it: water is the package's own line, two are made up.
PACKED = """XYZ_file,Index,SMILES,InChi,N_atoms,Stoichiometry,Elements,XYZ_Ang,Mulliken_pop,Harmonic_Freq_cmi,RotA_GHz,\
RotB_GHz,RotC_GHz,Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,HOMO_LUMO_gap_au,R2_bohr2,ZPVE_au,\
InternalEnergy_0K_au,InternalEnergy_298K_au,Enthalphy_298K_au,GibbsFreeEnergy_298K_au,Heatcapacity_Cv_cal_mol_K
"""
WATER = """"dsgdb9nsd_000003.xyz",3,"O","InChI=1S/H2O/h1H2",3,"[2,0,0,1,0]","['O','H','H']",\
"[[-0.0343604951,0.9775395708,0.0076015923],[0.0647664923,0.0205721989,0.0015346341],\
[0.8717903737,1.3007924048,0.0006931336]]","[-0.589706,0.294853,0.294853]","[1671.4222,3803.6305,3907.698]",799.58812,\
437.90386,282.94545,1.8511,6.31,-0.2928,0.0687,0.3615,19.0002,0.021375,-76.404702,-76.401867,-76.400922,-76.422349,6.002
"""
OTHERS = [
    """"{name}",{index},"x","x",4,"[2,1,0,0,1]","['C','F','H','H']","[[0.,0.,1.],[1.3,0.1,0.],[-0.6,1e-05,0.2],[0,1,2]]",\
"[0.1,-0.3,0.1,0.1]","[1.0]",{values}
""".format(name=f"dsgdb9nsd_{index:06d}.xyz", index=index, values=",".join(str(index + k / 4) for k in range(15)))
    for index in (7, 11)
]
TENSORS = ["4.492,0.000,8.049,0.000,0.000,6.398", "1.0,2.0,3.0,4.0,5.0,6.0", "-1.0,-2.0,-3.0,-4.0,-5.0,-6.0"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package qm9pack of three molecules, one in each of its parts; its code must never run."""
    folder = tmp_path / "qm9pack" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    lines = [WATER, *OTHERS]
    for part, line in enumerate(lines, 1):
        (folder / f"qm9_part{part}.csv").write_text(PACKED + line)
    names = [line.split(",")[0] for line in lines]
    rows = [f"{name},{tensor}" for name, tensor in zip(names, TENSORS, strict=True)]
    (folder / "qm9_polarizability.csv").write_text("\n".join(["XYZ_file,A_xx,A_xy,A_yy,A_xz,A_yz,A_zz", *rows]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_the_package_in_our_units(package):
    """Water, with every value converted by hand from the line above."""
    frames = load_qm9(target=[*TARGETS, "mulliken_charges", "polarizability_tensor"])
    assert len(frames) == 3 and frames.sources["homo"] == ("HOMO_au",)
    water = frames[0]
    assert water.z.tolist() == [8, 1, 1] and water.pos.dtype == torch.float64
    assert water.pos[2].tolist() == [0.8717903737, 1.3007924048, 0.0006931336]
    eV = 27.211386245988
    by_hand = {
        "mu": 1.8511, "alpha": 6.31, "homo": -0.2928 * eV, "lumo": 0.0687 * eV, "gap": 0.3615 * eV, "r2": 19.0002,
        "zpve": 0.021375 * eV, "U0": -76.404702 * eV, "U": -76.401867 * eV, "H": -76.400922 * eV, "G": -76.422349 * eV,
        "Cv": 6.002, "A": 799.58812, "B": 437.90386, "C": 282.94545,
        "U0_atomization": (-76.404702 + 75.064579 + 2 * 0.500273) * eV,
        "U_atomization": (-76.401867 + 75.063163 + 2 * 0.498857) * eV,
        "H_atomization": (-76.400922 + 75.062219 + 2 * 0.497912) * eV,
        "G_atomization": (-76.422349 + 75.079532 + 2 * 0.510927) * eV,
    }  # fmt: skip
    assert set(by_hand) == set(TARGETS)
    for name, expected in by_hand.items():
        assert water[name].shape == (1,) and water[name].dtype == torch.float64
        assert water[name].item() == pytest.approx(expected, rel=1e-11), name
    assert water.mulliken_charges.tolist() == [-0.589706, 0.294853, 0.294853]
    assert frames[1].polarizability_tensor.tolist() == [[[1.0, 2.0, 4.0], [2.0, 3.0, 5.0], [4.0, 5.0, 6.0]]]
    trace = water.polarizability_tensor.diagonal(dim1=1, dim2=2).sum() / 3
    assert trace.item() == pytest.approx(water.alpha.item(), abs=0.006)  # as many digits as the package gives


def test_one_target_of_the_package_and_rows(package):
    frames = load_qm9(rows=[2, 0])
    assert [frame.z.tolist() for frame in frames] == [[6, 9, 1, 1], [8, 1, 1]]
    free = qm9_atomref("U0")
    assert frames[1].energy.item() == pytest.approx(-76.404702 * HARTREE - free[8] - 2 * free[1], rel=1e-11)
    assert load_qm9(target="homo", rows=[1])[0].homo.item() == pytest.approx((7 + 5 / 4) * HARTREE, rel=1e-15)
    assert set(load_qm9(target="all")[0].keys()) == {"z", "pos", *REGRESSION_TARGETS}


def test_a_damaged_package_is_named(package, monkeypatch):
    path = package / "qm9_part2.csv"
    text = path.read_text()
    for old, new, message in (
        ("[0,1,2]", "[0,1]", "row 1 of qm9pack must have 12 numbers in XYZ_Ang, got 11"),
        ("[0,1,2]", "[0,1,x]", "column XYZ_Ang of qm9pack must hold numbers"),
        ("HOMO_au", "HOMO", r"qm9_part2.csv of qm9pack has no column 'HOMO_au'; did you mean HOMO"),
        ("'C','F'", "'C','Fu'", r"atomic numbers in 1..118"),
        (",8.25,", ",nan,", "HOMO_au holds NaN or infinity at .1."),
        (",8.25,", ",", r"line 2 of .*qm9_part2.csv must have 25 columns, got 24"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load_qm9(target="homo")
    path.write_text(text.replace("000007", "000008"))
    with pytest.raises(ValueError, match="csv holds other molecules"):
        load_qm9(target=["polarizability_tensor"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package qm9pack: pip install 'nbody_pyg\[qm9\]'"):
        load_qm9()


@pytest.mark.slow
def test_the_whole_package():
    """One molecule in ten: identities between properties, and the geometry behind the rotational constants."""
    if importlib.util.find_spec("qm9pack") is None:
        pytest.skip("qm9pack is not installed: pip install 'nbody_pyg[qm9]'")
    wanted = ["alpha", "homo", "lumo", "gap", "U", "H", "B", "polarizability_tensor"]
    frames = load_qm9(target=wanted, rows=range(0, 130_831, 10))
    with pytest.raises(ValueError, match=r"qm9pack holds 130831 frames"):
        load_qm9(rows=[130_831])

    def every(name):
        return torch.cat([frame[name] for frame in frames])

    assert float((every("H") - every("U") - 8.617333262e-5 * 298.15).abs().max()) < 3e-5  # kT
    assert float((every("gap") - every("lumo") + every("homo")).abs().max()) < 1.1e-4 * HARTREE
    trace = every("polarizability_tensor").diagonal(dim1=1, dim2=2).sum(-1) / 3
    assert float((trace - every("alpha")).abs().max()) < 0.006
    mass = {1: 1.00782503, 6: 12.0, 7: 14.0030740, 8: 15.9949146, 9: 18.9984032}  # of the most abundant isotopes
    for frame in frames[100::500]:
        weight = torch.tensor([[mass[z]] for z in frame.z.tolist()], dtype=torch.float64)
        arm = frame.pos - (weight * frame.pos).sum(0) / weight.sum()
        inertia = (weight * arm.square()).sum() * torch.eye(3).double() - arm.T @ (weight * arm)
        constants = 505.379008 / torch.linalg.eigvalsh(inertia)  # GHz, from amu angstrom^2
        assert frame.B.item() == pytest.approx(float(constants[1]), rel=1e-4)


def test_dipole_vectors_and_units(tmp_path):
    arrays = {
        "n": np.array([4, 4]),
        "Z": np.array([6, 9, 1, 1] * 2, dtype=np.uint8),
        "R": np.random.default_rng(0).normal(size=(8, 3)),
        "dipole_au": np.array([[0.1, -0.2, 0.3], [1.0, 0.0, 0.0]]),
        "binding_Ha": np.array([-0.5, -0.75]),
        "homo_Ha": np.array([-0.4, -0.3]),
    }
    np.savez(tmp_path / "qm9_10k_rimp2.npz", **arrays)
    frames = load_qm9_dipoles(tmp_path, rows=[1, 0])
    assert frames[0].dipole.shape == (1, 3)
    assert frames[0].dipole[0, 0].item() / DEBYE == pytest.approx(2.541746, abs=1e-6)
    np.testing.assert_allclose(frames[1].dipole.numpy(), arrays["dipole_au"][:1] * dipole_factor("e*bohr"), rtol=1e-15)
    assert frames[0].energy.item() == pytest.approx(-0.75 * HARTREE)
    arrays["R"][3, 1] = np.nan
    np.savez(tmp_path / "qm9_10k_rimp2.npz", **arrays)
    with pytest.raises(ValueError, match=r"R holds NaN or infinity at \[3, 1\]"):
        load_qm9_dipoles(tmp_path)


def test_errors(raw, tmp_path):
    with pytest.raises(ValueError, match=r"target 'U0_atomisation' is not in QM9; did you mean U0_atomization\?"):
        load_qm9(raw, "U0_atomisation")
    with pytest.raises(ValueError, match=r"target must lie in 0..18 or be a name, got 19"):
        load_qm9(raw, 19)
    with pytest.raises(ValueError, match=r"rows must lie in 0..2 \(gdb9.sdf holds 3 frames\), got \[3\]"):
        load_qm9(raw, rows=[3])
    with pytest.raises(FileNotFoundError, match=r"holds neither qm9_U0.npz nor gdb9.sdf"):
        load_qm9(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_qm9_dipoles(tmp_path)
    np.savez(tmp_path / "qm9_U0.npz", n=[4], Z=[6, 1, 1], R=np.ones((3, 3)), U0_Ha=[-1.0], U0_atomization_eV=[-1.0])
    with pytest.raises(ValueError, match=r"Z and R must hold sum\(n\) = 4 atoms"):
        load_qm9(tmp_path)
    with pytest.raises(ValueError, match="which has U0 and U0_atomization only"):
        load_qm9(tmp_path, "homo")
    with pytest.raises(ValueError, match="target 'mulliken_charges' is in the package qm9pack only"):
        load_qm9(raw, "mulliken_charges")
    for several in ([], ["mu", 0]):
        with pytest.raises(ValueError, match="target must list different targets of QM9"):
            load_qm9(raw, several)


def test_damaged_raw_files(raw):
    sdf = (raw / "gdb9.sdf").read_text()
    (raw / "gdb9.sdf").write_text(sdf.replace("  4  0", "  x  0"))
    with pytest.raises(ValueError, match="is no V2000 mol block"):
        load_qm9(raw)
    (raw / "gdb9.sdf").write_text(sdf[: sdf.index("$$$$") + 5])
    with pytest.raises(ValueError, match=r"gdb9.sdf holds 1 molecules and gdb9.sdf.csv 4"):
        load_qm9(raw)
    (raw / "uncharacterized.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"uncharacterized.txt is missing beside"):
        load_qm9(raw)
