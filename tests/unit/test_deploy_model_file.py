"""The model file: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nbody_pyg import NestedShells, SmoothSurvivors
from nbody_pyg.deploy import cg_fingerprint, fingerprint, load_model, model_file, read_metadata, save_model
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import AtomicReference, Potential

E0 = {1: -13.605693, 6: -1030.567123456789, 8: -2041.839}


@pytest.fixture
def potential() -> Potential:
    return Potential(NBodyNet([1, 6, 8], NestedShells((4.0,)), channels=4, lmax=1), AtomicReference(E0), 0.7)


@pytest.fixture
def path(potential, tmp_path):
    save_model(potential, tmp_path / "model.nbody", {"note": "for a test", "errors": {"val": {"forces_mae": 1.5}}})
    return tmp_path / "model.nbody"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_potential_comes_back_bit_by_bit(potential, tmp_path, molecules, dtype):
    potential.to(dtype)
    z, pos = molecules["methanol"]
    save_model(potential, tmp_path / "m.nbody")
    again = load_model(tmp_path / "m.nbody")
    assert again.dtype == dtype and not again.training
    assert again.reference.energies == E0
    want, found = potential(z, pos), again(z, pos)
    assert torch.equal(want["energy"], found["energy"]) and torch.equal(want["forces"], found["forces"])
    assert want["forces"].abs().max() > 0
    assert again.model.config() == potential.model.config()


def test_header_tells_everything(path):
    header = read_metadata(path)
    assert header["format_version"] == 3 and header["species"] == [1, 6, 8]
    assert header["units"]["forces"] == "eV/angstrom" and header["scale"] == pytest.approx(0.7)
    assert set(header["versions"]) == {"nbody_pyg", "torch", "torch_geometric", "e3nn", "python"}
    assert header["metadata"]["note"] == "for a test"
    assert header["model"]["config"]["scheme"]["name"] == "NestedShells"
    assert [p.name for p in path.parent.iterdir()] == ["model.nbody"]


def test_failed_write_leaves_the_old_file(path, potential, monkeypatch):
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(model_file, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(potential, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["model.nbody"]


def rewrite(path, change) -> None:
    """Write the file again with a changed header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nbody_pyg"])
    change(header)
    save_file(load_file(path), path, metadata={"nbody_pyg": json.dumps(header)})


def test_newer_format(path):
    rewrite(path, lambda h: h.update(format_version=99))
    with pytest.raises(ValueError, match=r"has format version 99, this nbody_pyg .* reads up to 3; upgrade"):
        load_model(path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="no readable model file, it is truncated or damaged"):
        load_model(path)


def test_changed_weights(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="weights do not match their checksum"):
        load_model(path)


def test_other_coefficients(path, monkeypatch):
    rewrite(path, lambda h: h.update(cg_fingerprint="0" * 64))
    with pytest.raises(ValueError, match=r"Clebsch-Gordan coefficients differ .* install e3nn==0\."):
        load_model(path)


def test_no_model_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file at"):
        load_model(tmp_path / "nothing.nbody")
    save_file({"a": torch.ones(2)}, tmp_path / "other.nbody")
    with pytest.raises(ValueError, match="was not written by nbody_pyg"):
        load_model(tmp_path / "other.nbody")


def test_weights_that_do_not_fit(path):
    rewrite(path, lambda h: h["model"]["config"].update(lmax=2))
    with pytest.raises((ValueError, RuntimeError), match=r"do not fit the network|size mismatch"):
        load_model(path)


def test_survivors_of_the_steeper_thinning_are_refused(tmp_path):
    path = tmp_path / "survivors.nbody"
    save_model(Potential(NBodyNet([1, 6, 8], SmoothSurvivors((2.0,), (4.0, None)), channels=4, lmax=1)), path)
    assert isinstance(load_model(path).model.scheme, SmoothSurvivors)
    rewrite(path, lambda h: h["model"]["config"]["scheme"].pop("width"))
    with pytest.raises(ValueError, match=r"SmoothSurvivors without a width.* train it anew"):
        load_model(path)


def test_network_of_somebody_else(tmp_path):
    class Bonds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, z, pos, batch):
            return (self.k * pos.square().sum()).reshape(1)

    potential = Potential(Bonds(), AtomicReference(E0))
    save_model(potential, tmp_path / "m.nbody")
    fresh = Bonds()
    fresh.k.data.zero_()
    again = load_model(tmp_path / "m.nbody", model=fresh)
    assert float(again.model.k.detach()) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="holds a Bonds, which nbody_pyg cannot build by itself"):
        load_model(tmp_path / "m.nbody")


def test_fingerprint_sees_a_sign(monkeypatch):
    before = cg_fingerprint()
    assert len(before) == 64 and before == cg_fingerprint.__wrapped__()
    true = fingerprint.o3.wigner_3j
    monkeypatch.setattr(
        fingerprint.o3, "wigner_3j", lambda a, b, c, **k: true(a, b, c, **k) * (-1) ** (a == b == c == 1)
    )
    assert cg_fingerprint.__wrapped__() != before
