"""QM9 from its raw files without RDKit, packed arrays, dipole vectors, errors by message."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbody_pyg.datasets import load_qm9, load_qm9_dipoles
from nbody_pyg.datasets.qm9 import TARGETS
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
