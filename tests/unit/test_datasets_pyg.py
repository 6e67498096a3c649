"""PyG data sets: the same numbers as from the raw files, units, targets, rounding, errors by message."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.datasets import MD17, QM9
from torch_geometric.loader import DataLoader

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import from_pyg, load_md17, load_qm9
from nbody_pyg.units import energy_factor

KCAL = energy_factor("kcal/mol")


def graph(**extra) -> Data:
    pos = torch.tensor([[0.0, 0.1, 0.2], [0.9, 0.0, -0.3], [-0.4, 0.8, 0.5], [0.2, -0.7, 0.9]])
    return Data(z=torch.tensor([7, 1, 1, 1]), pos=pos, **extra)


@pytest.fixture
def md17_root(tmp_path):
    """Raw files of rMD17 and MD17, in the places and the form in which PyG's loader expects them."""
    rng = np.random.default_rng(5)
    z = np.array([6, 6, 8, 1], dtype=np.uint8)
    energies, forces = rng.normal(size=6) * 4 - 97_080.0, 20 * rng.normal(size=(6, 4, 3))
    pos = rng.normal(size=(6, 4, 3))
    folder = tmp_path / "raw" / "rmd17" / "npz_data"
    folder.mkdir(parents=True)
    np.savez(
        folder / "rmd17_ethanol.npz",
        nuclear_charges=z, coords=pos, energies=energies, forces=forces,
        old_indices=np.arange(6), old_energies=energies - 100, old_forces=forces,
    )  # fmt: skip
    folder = tmp_path / "ethanol" / "raw"
    folder.mkdir(parents=True)
    np.savez(folder / "md17_ethanol.npz", z=z, R=pos, E=energies[:, None], F=forces, theory=np.array(b"PBE+vdW-TS"))
    return tmp_path


@pytest.mark.parametrize("name", ["revised ethanol", "ethanol"])
def test_md17_equals_the_raw_file_up_to_float32(md17_root, name, capsys):
    dataset = MD17(str(md17_root), name)
    with pytest.warns(UserWarning, match="stores its energies in float32, rounded by up to"):
        frames = from_pyg(dataset)
    raw = load_md17(md17_root, name)
    assert len(frames) == len(raw) == 6
    for ours, theirs in zip(raw, frames, strict=True):
        assert ours.z.equal(theirs.z)
        assert theirs.energy.dtype == theirs.forces.dtype == torch.float64
        torch.testing.assert_close(theirs.pos, ours.pos, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(theirs.forces, ours.forces, rtol=1e-6, atol=1e-7)
        assert abs(float(theirs.energy - ours.energy)) <= 0.5 * 2.0**-7 * KCAL * 1.001  # float32 at 97,080
    assert max(float((a.energy - b.energy).abs()) for a, b in zip(raw, frames, strict=True)) > 0
    assert frames.sources == {"energy": ("energy",), "forces": ("force",)}
    assert raw[0].energy.item() / KCAL == pytest.approx(float(dataset[0].energy), abs=0.004)
    capsys.readouterr()  # PyG reports its processing on stderr


@pytest.fixture
def qm9(tmp_path, capsys):
    """PyG's QM9 on its pre-processed raw file, of which it needs the first rows only."""
    pytest.importorskip("torch_geometric")
    try:
        import rdkit  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("with RDKit PyG reads another raw file; test_datasets_qm9 covers that form")
    rng = np.random.default_rng(6)
    rows = []
    for i in range(4):
        y = torch.from_numpy(rng.normal(size=(1, 19)).astype(np.float32))
        y[0, 7], y[0, 12] = -11_000.0 - i, -17.25 - i
        rows.append(
            {
                "x": torch.ones(4, 11),
                "z": torch.tensor([6, 1, 8, 1]),
                "pos": torch.from_numpy(rng.normal(size=(4, 3)).astype(np.float32)),
                "edge_index": torch.tensor([[0, 1], [1, 0]]),
                "y": y,
                "name": f"gdb_{i + 1}",
                "idx": i,
            }
        )
    (tmp_path / "raw").mkdir()
    torch.save(rows, tmp_path / "raw" / "qm9_v3.pt")
    dataset = QM9(str(tmp_path))
    capsys.readouterr()
    return dataset


def test_qm9_targets(qm9):
    frames = from_pyg(qm9, target=12)
    assert [f.energy.item() for f in frames] == [-17.25, -18.25, -19.25, -20.25]
    assert frames.sources["energy"] == ("y[12]",)
    assert isinstance(frames[0], AtomicData)
    assert frames[0].name == "gdb_1"
    other = from_pyg(qm9, target=1, name="alpha")
    assert other[2].alpha.shape == (1,)
    assert other[2].alpha.item() == pytest.approx(float(qm9[2].y[0, 1]))
    with pytest.warns(UserWarning, match="rounded by up to 0.49 meV"):
        from_pyg(qm9, target=7)
    with pytest.raises(ValueError, match="target 1 of QM9 is no energy"):
        from_pyg(qm9, target=1)
    with pytest.raises(ValueError, match=r"target must lie in 0..18 \(columns of y\), got 19"):
        from_pyg(qm9, target=19, name="x")


def test_any_data_with_units_and_keys():
    data = [
        graph(y=torch.tensor([[2.0, 3.0]]), dy=torch.ones(4, 3)),
        graph(y=torch.tensor([[4.0, 5.0]]), dy=torch.ones(4, 3)),
    ]
    frames = from_pyg(data, target=1, forces_key="dy", units="kcal/mol, nm")
    assert [f.energy.item() for f in frames] == pytest.approx([3.0 * KCAL, 5.0 * KCAL])
    assert frames[0].pos[1, 0].item() == pytest.approx(9.0, rel=1e-6)
    assert frames[0].forces[0, 0].item() == pytest.approx(KCAL / 10)
    assert "dy" not in frames[0]
    assert data[0].dy.dtype == torch.float32  # the user's graphs are left alone
    batch = next(iter(DataLoader(frames, batch_size=2)))
    assert batch.energy.shape == (2,)


def test_scalar_energies_and_one_y():
    frames = from_pyg([graph(energy=torch.tensor(-1.5))], units="eV")
    assert frames[0].energy.tolist() == [-1.5]
    frames = from_pyg([graph(y=torch.tensor([-2.5]))], energy_key="y", units="eV")
    assert frames[0].energy.tolist() == [-2.5]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {"units": "eV"}, "dataset list holds no graph"),
        ([graph(energy=torch.tensor(1.0))], {}, "units of list are not known; give units"),
        ([graph(enrgy=torch.tensor(1.0))], {"units": "eV", "energy_key": "energy"}, "did you mean enrgy"),
        ([graph()], {"units": "eV", "target": 0}, "target 0 needs the key 'y'"),
        ([graph(energy=torch.tensor(float("inf")))], {"units": "eV"}, "graph 0 of list: energy is inf"),
        ([graph(forces=torch.ones(3, 3))], {"units": "eV"}, "forces must have shape"),
        ([Data(x=torch.ones(3))], {"units": "eV"}, "data must hold 'z'"),
        ([graph()], {"units": "electronvolts?"}, "unknown energy unit"),
    ],
)
def test_errors(data, options, message):
    with pytest.raises(ValueError, match=message):
        from_pyg(data, **options)


def test_qm9_equals_our_own_reader(qm9, tmp_path):
    """The same molecules as concatenated float64 arrays give the same frames to float32."""
    frames = from_pyg(qm9, target=12)
    arrays = {
        "n": np.array([4] * 4),
        "Z": np.concatenate([d.z.numpy() for d in qm9]).astype(np.uint8),
        "R": np.concatenate([d.pos.numpy().astype(np.float64) for d in qm9]),
        "U0_Ha": np.zeros(4),
        "U0_atomization_eV": np.array([-17.25, -18.25, -19.25, -20.25]),
    }
    np.savez(tmp_path / "qm9_U0.npz", **arrays)
    for ours, theirs in zip(load_qm9(tmp_path), frames, strict=True):
        torch.testing.assert_close(ours.pos, theirs.pos, rtol=0, atol=0)
        assert ours.energy.equal(theirs.energy)


@pytest.mark.parametrize("shape", [(12,), (4, 3, 1), (1, 4, 3)])
def test_flat_and_squeezed_labels_get_their_shape(shape):
    forces = torch.linspace(-1, 1, 12, dtype=torch.float64)
    stress = torch.tensor([0.1, 0.2, 0.3, 0.04, 0.05, 0.06])  # Voigt
    data = graph(energy=torch.tensor([[2]], dtype=torch.int32), forces=forces.reshape(shape), stress=stress)
    frame = from_pyg([data], units="eV")[0]
    assert frame.energy.tolist() == [2.0]
    assert torch.equal(frame.forces, forces.reshape(4, 3))
    assert torch.allclose(frame.stress[0, 0], torch.tensor([0.1, 0.06, 0.05], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"forces must have shape \[4, 3\] for 4 atoms, got \[3, 4\]"):
        from_pyg([graph(forces=forces.reshape(3, 4))], units="eV")
