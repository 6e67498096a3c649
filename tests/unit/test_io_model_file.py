"""The model file: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import json
import logging
import random
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nbody_pyg import BondTree, NestedShells, SmoothSurvivors
from nbody_pyg.deploy import (
    FORMAT_VERSION,
    Committee,
    NBodyCalculator,
    cg_fingerprint,
    load_model,
    read_metadata,
    save_model,
)
from nbody_pyg.io import fingerprint, model_file
from nbody_pyg.models import NBodyNet
from nbody_pyg.potential import AtomicReference, Potential

E0 = {1: -13.605693, 6: -1030.567123456789, 8: -2041.839}
E0_TEXT = {str(z): energy for z, energy in E0.items()}


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
    assert header["format_version"] == FORMAT_VERSION and header["species"] == [1, 6, 8]
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


def rewrite(path, change, seal: bool = True, tensors=None) -> None:
    """Write the file again with a changed header (and weights), and a checksum that is right all the same."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nbody_pyg"])
    tensors = load_file(path) if tensors is None else tensors
    change(header)
    if seal:
        header["sha256"] = model_file.checksum(header, tensors)
    save_file(tensors, path, metadata={"nbody_pyg": json.dumps(header)})


def test_newer_format(path):
    rewrite(path, lambda h: h.update(format_version=99))
    with pytest.raises(ValueError, match=r"has format version 99, this nbody_pyg .* reads up to 6; upgrade"):
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
    with pytest.raises(ValueError, match="its content does not match the checksum"):
        load_model(path)


def test_other_coefficients(path, monkeypatch):
    rewrite(path, lambda h: h.update(cg_fingerprint="0" * 64))
    with pytest.raises(ValueError, match=r"Clebsch-Gordan coefficients differ .* install e3nn==0\."):
        load_model(path)


def test_no_model_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file at"):
        load_model(tmp_path / "nothing.nbody")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.nbody").touch()
    with pytest.raises(FileNotFoundError, match=r"no model file at .*run; the model of this run is .*model.nbody"):
        load_model(tmp_path / "run")
    save_file({"a": torch.ones(2)}, tmp_path / "other.nbody")
    with pytest.raises(ValueError, match="was not written by nbody_pyg"):
        load_model(tmp_path / "other.nbody")


def test_weights_that_do_not_fit(path):
    rewrite(path, lambda h: h["model"]["config"].update(lmax=2))
    with pytest.raises(ValueError, match=r"holds no model that can be used: lmax is 2, but .*; get a fresh copy"):
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


# -- files that were damaged, or made to do harm ------------------------------------------------------------
SHOWN = {
    "radius": lambda h: h["model"]["config"]["scheme"].update(radii=[4.5]),
    "one key": lambda h: h["model"]["config"].update(avg_num_neighbors={"Child_1": 4.0}),
    "reach": lambda h: h.update(repulsion={"name": "zbl", "species": [1, 6, 8], "reach": {"C-H": 1.9}}),
    "scale": lambda h: h.update(scale=0.8),
    "element": lambda h: h["e0"].update({"1": -14.0}),
    "note": lambda h: h["metadata"].update(note="another"),
}


@pytest.mark.parametrize("change", SHOWN.values(), ids=SHOWN)
def test_the_checksum_covers_the_settings(path, change):
    rewrite(path, change, seal=False)
    for read in (load_model, read_metadata, NBodyCalculator, lambda p: Committee([p, p])):
        with pytest.raises(ValueError, match=r"model.nbody is damaged: its content does not match the checksum"):
            read(path)


@pytest.mark.parametrize(
    "change", [lambda t: t.to(torch.int32), lambda t: t.flatten(), lambda t: t.double()], ids=["dtype", "shape", "F64"]
)
def test_the_checksum_covers_dtype_and_shape(path, change):
    tensors = load_file(path)
    name = "model.interactions.0.bias"
    tensors[name] = (
        tensors[name].view(torch.int32) if change(tensors[name]).dtype == torch.int32 else change(tensors[name])
    )
    rewrite(path, lambda h: None, seal=False, tensors=tensors)
    with pytest.raises(ValueError, match="its content does not match the checksum"):
        load_model(path)
    rewrite(path, lambda h: None, tensors=tensors)
    with pytest.raises(ValueError, match=r"weights do not fit the network: model.interactions.0.bias has shape"):
        load_model(path)


@pytest.mark.parametrize("version", [-1, 0, 2.5, "3", True, None, [4], 10**300, FORMAT_VERSION + 1, 3])
def test_versions_that_do_not_exist(path, version):
    rewrite(path, lambda h: h.update(format_version=version))
    new = isinstance(version, int) and version is not True and version > FORMAT_VERSION
    match = "upgrade nbody_pyg" if new else r"format version from 1 to 6, got|is damaged: its weights do not match"
    with pytest.raises(ValueError, match=match):
        load_model(path)


CONFIG = {
    "degrees": ({"avg_num_neighbors": {"pair_7": 4.0}}, "avg_num_neighbors must name edge sets .*pair_7"),
    "degree": ({"avg_num_neighbors": {"child_1": -4.0}}, r"avg_num_neighbors\['child_1'\] must be a positive"),
    "option": ({"chanels": 4}, "unexpected keyword argument 'chanels'"),
    "scheme": ({"scheme": {"name": "NestedShells", "raddii": [4]}}, "unexpected keyword argument 'raddii'"),
    "no scheme": ({"scheme": None}, "scheme must hold a name and arguments"),
    "long_range": ({"long_range": {"metod": "direct"}}, "long_range must hold some of"),
    "bool": ({"channels": True}, "channels must be a whole number"),
    "float": ({"lmax": 1.0}, "lmax must be a whole number of at least 0, got 1.0"),
}
HEADER = {
    "repulsion": ({"repulsion": {"name": "zbl", "species": [1], "reach": {}, "x": 1}}, "unknown key repulsion.x"),
    "header": ({"strange": 1}, "unknown key strange"),
    "model": ({"model": {"class": "NBodyNet"}}, "the entry model must hold class and config"),
    "class": ({"model": {"class": "Scheme", "config": {"scheme": {}}}}, "the file holds a Scheme, which nbody"),
    "type": ({"scale": "0.7"}, "the entry scale is '0.7', which is of a wrong type"),
    "scale": ({"scale": True}, "the entry scale is True, which is of a wrong type"),
    "dtype": ({"dtype": "float16"}, "dtype must be one of float32, float64, got 'float16'"),
    "other dtype": ({"dtype": "float64"}, "weights do not fit the network: .* torch.float32, not"),
    "e0": ({"e0": {"1": "x"}}, "e0 must hold numbers"),
    "other e0": ({"e0": E0_TEXT | {"1": -14.0}}, "e0.1 is -14.0, but the network has -13.6"),
    "element": ({"e0": {"H": -13.0}}, "elements must be atomic numbers"),
    "species": ({"species": [1, 6, 9]}, "species is .*1, 6, 9"),
    "parameters": ({"num_parameters": 7}, "num_parameters is 7, but the network has"),
    "escape": ({"versions": {"e3nn": "\x1b[2J"}}, "characters that cannot be printed"),
    "units": ({"units": {"energy": "kcal/mol"}}, "units must be .*'kcal/mol'"),
    "versions": ({"versions": {"e3nn": 3}}, "versions must be texts"),
}
ASSUMED = {
    "text": ("charge", "assumed must hold a charge or spin, got 'charge'"),
    "list": ([1], "assumed must hold"),
    "key": ({"Charge": 1}, "assumed must hold"),
    "value": ({"charge": "1"}, "assumed must hold"),
    "truth": ({"charge": True}, "assumed must hold"),
    "huge": ({"charge": 10**400}, "assumed must hold"),
    "no multiplicity": ({"spin": 1.5}, r"the assumed spin must be a multiplicity 2S \+ 1, got 1.5"),
    "singlet minus one": ({"spin": 0}, "the assumed spin must be a multiplicity"),
    "input too": ({"charge": 1}, "charge cannot be both an input of the network and assumed"),
}


@pytest.mark.parametrize("kind", [*CONFIG, *HEADER])
def test_settings_that_are_no_network(path, kind):
    changed, match = (CONFIG | HEADER)[kind]
    rewrite(path, lambda h: (h["model"]["config"] if kind in CONFIG else h).update(changed))
    with pytest.raises(ValueError, match=rf"(?s)model.nbody (holds no model|does not hold settings).*{match}") as error:
        load_model(path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("kind", ASSUMED)
def test_a_charge_or_spin_that_no_frame_has(path, kind):
    assumed, match = ASSUMED[kind]
    rewrite(path, lambda h: h["model"].update(assumed=assumed))
    if kind == "input too":
        rewrite(path, lambda h: h["model"]["config"].update(inputs=["charge"]))
    for read in (load_model, read_metadata):
        with pytest.raises(ValueError, match=rf"(?s)model.nbody holds no model that can be used: .*{match}"):
            read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.interactions.0.bias", "reference.values"])
def test_weights_that_are_not_finite(path, potential, value, name):
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    rewrite(path, lambda h: None, tensors=tensors)
    for read in (load_model, read_metadata):
        with pytest.raises(ValueError, match=f"weights must be finite, but {name} holds NaN or infinite numbers"):
            read(path)
    potential.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"weights must be finite, but {name} holds NaN"):
        save_model(potential, path)


TEXTS = {
    "deep": '{"format_version": 4, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "less deep": '{"format_version": 4, "a": ' + "[" * 700 + "]" * 700 + "}",
    "twice": '{"format_version": 4, "format_version": 4}',
    "list": "[4]",
    "no JSON": "{",
    "NaN": '{"format_version": 4, "scale": NaN}',
    "Infinity": '{"format_version": 4, "scale": 1e999}',
    "many digits": '{"format_version": 4' + "0" * 5000 + "}",
    "empty": "{}",
    "no header": '{"format_version": 4}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_headers_that_are_none(path, kind):
    save_file(load_file(path), path, metadata={"nbody_pyg": TEXTS[kind]})
    for read in (load_model, read_metadata):
        with pytest.raises(ValueError, match=r"model\.nbody .*(get a fresh copy|damaged)"):
            read(path)


BOMBS = {
    "channels": {"channels": 16_000},
    "more channels": {"channels": 44},
    "lmax": {"lmax": 10**6},
    "some lmax": {"lmax": 11},
    "huge lmax": {"lmax": 10**4000},
    "correlation": {"correlation": 10**9},
    "num_basis": {"num_basis": 10**9},
    "num_basis + 1": {"num_basis": 9},
    "radii": {"scheme": {"name": "NestedShells", "radii": [4.0] * 100_000}},
    "one radius more": {"scheme": {"name": "NestedShells", "radii": [4.0, 4.0]}},
    "rounds": {"scheme": {"name": "SmoothSurvivors", "radii": [2.0], "cutoffs": [4.0, None], "rounds": 10**9}},
    "species": {"species": [1, 6, 8] * 100_000},
    "more species": {"species": list(range(1, 119))},
    "irreps_out": {"irreps_out": "1000000000x0e"},
    "other irreps_out": {"irreps_out": "0e+" * 100_000},
    "long_range": {"long_range": {"channels": 10**9}},
    "both parities": {"parity": "both", "lmax": 1},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_takes_no_large_network(path, kind):
    rewrite(path, lambda h: h["model"]["config"].update(BOMBS[kind]))
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"model\.nbody (holds no model|does not hold settings)"):
        load_model(path)
    assert time.process_time() - begin < 30, "CPU seconds"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB"


@pytest.mark.parametrize(
    "irreps",
    [
        "44x0e + 4x1o", "1000000000x0e", "4x0e + 4x1o + 4x2e", "4x0e + 2x1o", "4x0e + 4x11o", "4x0e + 1x99999999o",
        "4x0e + " * 1000 + "4x1o", 3, {"shell 1": "5x0e + 4x1o"}, {"shell 1": None}, {"atoms": "4x0e + 4x1o"}, {},
    ],
)  # fmt: skip
def test_a_small_file_takes_no_other_types(path, irreps, molecules):
    def change(header):
        config = header["model"]["config"]
        del config["channels"], config["lmax"]
        config["irreps"] = irreps

    expected = load_model(path)(*molecules["methanol"])["energy"]
    begin, good = time.process_time(), path.read_bytes()
    rewrite(path, change)
    with pytest.raises(ValueError, match=r"model\.nbody (holds no model|does not hold settings)"):
        load_model(path)
    assert time.process_time() - begin < 30, "CPU seconds"
    path.write_bytes(good)
    irreps = "4x0e + 4x1o"  # the right one
    rewrite(path, change)
    assert torch.equal(load_model(path)(*molecules["methanol"])["energy"], expected)


def test_a_missing_entry(path):
    rewrite(path, lambda h: h.pop("scale"))
    with pytest.raises(ValueError, match="the entry scale is missing; get a fresh copy"):
        read_metadata(path)


def test_an_unknown_key_beside_the_class(path):
    rewrite(path, lambda h: h["model"].update(strange=1))
    with pytest.raises(
        ValueError, match=r"does not hold settings and weights of one network: unknown key model.strange"
    ):
        load_model(path)


def test_more_layers_than_weights(tmp_path):
    save_model(Potential(NBodyNet([1, 8], BondTree(), channels=2, lmax=1, correlation=2)), tmp_path / "m.nbody")
    rewrite(tmp_path / "m.nbody", lambda h: h["model"]["config"].update(num_layers=10**9))
    with pytest.raises(ValueError, match=r"num_layers is 1000000000, but there are weights of \d+ interactions"):
        load_model(tmp_path / "m.nbody")


def test_tables_out_of_proportion_to_the_weights(path):
    """Weights of the right shapes, of which a network of many degrees needs few."""
    lmax = 14
    tensors = {"model.interactions.0.products.linear.weights.0": torch.zeros(1, 1)}
    tensors |= {f"model.interactions.0.products.products.{k}.mix.weights.0": torch.zeros(1, 1) for k in range(5)}
    tensors |= {f"model.interactions.0.density.weights.{l}": torch.zeros(3, 1) for l in range(lmax + 1)}
    config = {"lmax": lmax, "channels": 1, "correlation": 6, "num_basis": 1, "num_layers": 1}
    rewrite(path, lambda h: h["model"]["config"].update(config), tensors=tensors)
    with pytest.raises(
        ValueError, match=r"lmax 14 and correlation 6 take tables of .* out of proportion to \d+ weights"
    ):
        load_model(path)


ARCHITECTURES = {
    "shells": (NestedShells((3.5, 5.0)), {"lmax": 2, "correlation": 3, "num_basis": 7}),
    "one order": (NestedShells((3.5, 3.0)), {"lmax": 2, "correlation": 1, "parity": "both"}),
    "strict": (NestedShells((3.5,)), {"lmax": 2, "preset": "strict", "num_basis": 6, "parity": "ignored"}),
    "bonds": (BondTree(), {"lmax": 1, "correlation": 2, "long_range": "direct", "num_layers": 3}),
    "no pairs": (BondTree(piece_cutoff=None), {"lmax": 0, "correlation": 2, "sweeps": "up"}),
    "root": (SmoothSurvivors((2.0,), (4.0, None)), {"lmax": 1, "readout": "root", "correlation": 2}),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_networks_of_all_kinds_come_back(tmp_path, kind):
    scheme, options = ARCHITECTURES[kind]
    potential = Potential(NBodyNet([1, 8], scheme, channels=3, **options))
    save_model(potential, tmp_path / "m.nbody")
    again = load_model(tmp_path / "m.nbody")
    assert again.model.config() == potential.model.config()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), potential.parameters(), strict=True))


def test_numbers_that_json_does_not_have_become_null(potential, tmp_path):
    save_model(potential, tmp_path / "m.nbody", {"errors": {"val": {"a": float("nan"), "b": [1.0, float("inf")]}}})
    assert read_metadata(tmp_path / "m.nbody")["metadata"]["errors"]["val"] == {"a": None, "b": [1.0, None]}


def test_an_old_file_loads_with_a_note(tmp_path, caplog):
    golden = Path(__file__).parents[1] / "golden" / "model_format_2.nbody"
    with caplog.at_level(logging.WARNING, "nbody_pyg"):
        load_model(golden)
    assert [r.getMessage() for r in caplog.records if "has format 2" in r.getMessage()]
    caplog.clear()
    save_model(load_model(golden), tmp_path / "new.nbody", read_metadata(golden)["metadata"])
    caplog.clear()
    load_model(tmp_path / "new.nbody")
    assert not caplog.records


def test_an_old_file_with_layers_that_did_nothing(path, molecules):
    """Networks of shells could be given any number of layers, which they did not have."""
    expected = load_model(path)(*molecules["ethanol"])["energy"]
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nbody_pyg"])
    tensors = load_file(path)
    header["model"]["config"]["num_layers"] = 5
    header |= {"format_version": 3, "sha256": model_file._digest_of_tensors(tensors)}
    save_file(tensors, path, metadata={"nbody_pyg": json.dumps(header)})
    again = load_model(path)
    torch.testing.assert_close(again(*molecules["ethanol"])["energy"], expected, rtol=0, atol=1e-10)
    assert expected.abs().min() > 1.0 and again.model.config()["num_layers"] == 2


@pytest.mark.parametrize("centre", ["atom", "mean"])
def test_survivors_of_an_old_file_keep_the_length_of_their_radial_functions(path, molecules, centre):
    """It was the reach of a part before it was an argument."""
    radii, factor = (2.0, 4.0), 1.35 if centre == "atom" else 1.5 * 1.35
    scheme = SmoothSurvivors(radii, (4.0, 12.0, 24.0), centre, lengths=[factor * r for r in radii])
    torch.manual_seed(0)
    network = NBodyNet([1, 6, 8], scheme, channels=2, lmax=1).double()
    save_model(Potential(network), path)
    expected = load_model(path)(*molecules["ethanol"])["energy"]
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nbody_pyg"])
    tensors = load_file(path)
    del header["model"]["config"]["scheme"]["lengths"]
    header["format_version"] = 5
    header["sha256"] = model_file.checksum(header, tensors)
    save_file(tensors, path, metadata={"nbody_pyg": json.dumps(header)})
    again = load_model(path)
    torch.testing.assert_close(again(*molecules["ethanol"])["energy"], expected, rtol=0, atol=1e-12)
    assert expected.abs().min() > 1e-3 and again.model.scheme.lengths == scheme.lengths
    assert SmoothSurvivors(radii, (4.0, 12.0, 24.0), centre).lengths != scheme.lengths


def fuzzed(path, flips: int, truncations: int, z, pos) -> dict[str, int]:
    """Damage a file in many ways and load it; how often it was refused, right and wrong."""
    good, rng = path.read_bytes(), random.Random(3)
    expected = load_model(path)(z, pos)
    header, bad = path.with_name("bad.nbody"), bytearray()
    size = 8 + int.from_bytes(good[:8], "little")
    found = {"refused": 0, "right": 0, "wrong": 0}
    for number in range(flips + truncations):
        bad = bytearray(good)
        if number < flips:
            # Half of them in the header, which is a small part of a large file
            at = rng.randrange(size) if number % 2 else rng.randrange(len(good))
            bad[at] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.randrange(len(good)) :]
        header.write_bytes(bad)
        try:
            result = load_model(header)(z, pos)
        except ValueError as error:
            found["refused" if "bad.nbody" in str(error) and "\x1b" not in str(error) else "wrong"] += 1
        else:
            same = all(torch.equal(result[k], expected[k]) for k in ("energy", "forces"))
            found["right" if same else "wrong"] += 1
    return found


def test_damaged_files_are_refused_or_right(path, molecules):
    found = fuzzed(path, 60, 20, *molecules["methanol"])
    assert found["wrong"] == 0 and found["refused"] > 70, found


@pytest.mark.slow
def test_damaged_files_are_refused_or_right_many(path, molecules):
    found = fuzzed(path, 1000, 200, *molecules["methanol"])
    print(found)
    assert found["wrong"] == 0 and found["refused"] > 1000, found


def test_a_file_that_may_not_be_read_is_not_called_damaged(path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_file, "safe_open", refused)
    with pytest.raises(PermissionError):
        load_model(path)
