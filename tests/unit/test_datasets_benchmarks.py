"""Benchmark data beside the project: the readers give the figures of its own description."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbody_pyg.datasets import (
    fit_atomic_energies,
    from_pyg,
    label_audit,
    load_md17,
    load_qm9,
    load_qm9_dipoles,
    load_rmd17,
    qm9_split,
    read_frames,
    read_split,
    require_labels,
)

pytestmark = pytest.mark.data


@pytest.fixture
def folder(data_dir):
    """A function that gives a file or folder of the benchmark data, or skips."""

    def find(name):
        path = data_dir / name
        if not path.exists():
            pytest.skip(f"no benchmark data {path}")
        return path

    return find


@pytest.mark.parametrize("molecule", ["aspirin", "ethanol", "malonaldehyde", "naphthalene"])
def test_rmd17(folder, molecule):
    train, val, test = load_rmd17(folder("rmd17"), molecule)
    assert (len(train), len(val), len(test)) == (950, 50, 1000)
    require_labels({"train": train, "val": val, "test": test}, ["energy", "forces"])
    net = torch.stack([frame.forces.sum(0) for frame in (*train, *test)]).abs().max()
    assert 0 < float(net) < 6e-6 * 0.0433641
    raw = np.load(folder("rmd17") / f"rmd17_{molecule}_train_01.npz")
    assert train[3].energy.item() == pytest.approx(raw["energies"][3] * 0.043364104241800934, rel=1e-14)
    kcal = np.abs(raw["forces"]).mean() * 0.043364104241800934
    ours = torch.stack([frame.forces for frame in (*train, *val)]).abs().mean()
    assert float(ours) == pytest.approx(kcal, rel=1e-12)


@pytest.mark.slow
def test_rmd17_through_pyg(folder, tmp_path, capsys):
    """PyG's class on the same raw file, laid where it looks for it, agrees to float32."""
    from torch_geometric.datasets import MD17

    target = tmp_path / "raw" / "rmd17" / "npz_data" / "rmd17_ethanol.npz"
    target.parent.mkdir(parents=True)
    target.write_bytes((folder("rmd17") / "rmd17_ethanol_train_01.npz").read_bytes())
    with pytest.warns(UserWarning, match="float32"):
        theirs = from_pyg(MD17(str(tmp_path), "revised ethanol"))
    ours = load_md17(tmp_path, "revised ethanol")
    rounding = torch.cat([a.energy - b.energy for a, b in zip(ours, theirs, strict=True)])
    assert 1e-5 < float(rounding.abs().max()) < 2e-4  # eV: what reading in float64 avoids
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.pos, b.pos, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.forces, b.forces, rtol=1e-6, atol=1e-6)
    capsys.readouterr()


def test_acac(folder):
    train = read_frames(folder("acac") / "train_300K.xyz")
    assert label_audit(train).count("forces") == (500, 500)
    assert train.sources["energy"] == ("results['energy']",)
    e0 = fit_atomic_energies([*read_frames(folder("acac") / "isolated_atoms.xyz"), *train], "isolated")
    assert e0 == pytest.approx({1: -13.568422178253735, 6: -1026.8538996116154, 8: -2037.796869412825})
    binding = train[0].energy.item() - sum(e0[z] for z in train[0].z.tolist())
    assert -75 < binding < -55


def test_gnl_has_two_equal_labels(folder):
    frames = read_frames(folder("longrange") / "gnl-v0.2-train.xyz")
    assert label_audit(frames).count("forces") == (200, 200)
    other = read_frames(folder("longrange") / "gnl-v0.2-train.xyz", energy_key="orca_vtscf_energy")
    assert frames[7].energy.item() == pytest.approx(other[7].energy.item(), abs=1e-9)
    assert set(fit_atomic_energies(frames)) == {1, 6}  # several lengths: both elements are determined


def test_periodic_water(folder):
    with pytest.raises(ValueError, match="does not say its units"):
        read_frames(folder("water") / "water64_pbe0.npz")
    frames = read_frames(folder("water") / "water64_pbe0.npz", units="eV", index=":20")
    assert frames[0].pbc.all()
    assert float(torch.linalg.det(frames[0].cell[0])) == pytest.approx(12.444661**3, rel=1e-5)


def test_qm9_numbers(folder):
    frames = load_qm9(folder("qm9"), rows=range(3000))
    assert frames[0].energy.item() == pytest.approx(-17.17218067, abs=1e-7)  # methane
    assert frames[0].z.tolist() == [6, 1, 1, 1, 1]
    total = load_qm9(folder("qm9"), "U0", rows=[0])
    assert total[0].energy.item() == pytest.approx(-40.47893 * 27.211386246, rel=1e-10)
    e0 = fit_atomic_energies(frames)
    left = [f.energy.item() - sum(e0[z] for z in f.z.tolist()) for f in frames]
    assert 0.01 < np.std(left) < 1.5


def test_qm9_splits_are_those_of_the_seeds(folder):
    for family in ("dimenet", "cormorant"):
        rebuilt, stored = qm9_split(family), read_split(folder("qm9") / "qm9_splits.npz", family + "_")
        for name in ("train", "val", "test"):
            assert np.array_equal(getattr(rebuilt, name), getattr(stored, name))


def test_qm9_dipoles(folder):
    frames = load_qm9_dipoles(folder("qm9"), rows=range(500))
    raw = np.load(folder("qm9") / "qm9_10k_rimp2.npz")
    lengths = torch.stack([f.dipole.norm() for f in frames]).numpy()
    np.testing.assert_allclose(lengths, raw["dipole_abs_au"][:500] * 0.529177210544, atol=1e-4)
    assert lengths.max() > 0.5
