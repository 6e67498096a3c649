"""npz files: the forms of rMD17, of sGDML and plain ones; units; every error by message."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from damage import assert_error_or_right
from nbody_pyg.datasets import read_frames, read_npz
from nbody_pyg.units import energy_factor

RNG = np.random.default_rng(3)
Z = np.array([8, 6, 1, 1])
POS = RNG.normal(size=(5, 4, 3))
ENERGY = RNG.normal(size=5) - 7e4
FORCES = RNG.normal(size=(5, 4, 3))
KCAL = energy_factor("kcal/mol")


@pytest.fixture
def write(tmp_path):
    def write(**arrays):
        path = tmp_path / "frames.npz"
        np.savez(path, **arrays)
        return path

    return write


def rmd17(**changes):
    arrays = {"nuclear_charges": Z.astype(np.uint8), "coords": POS, "energies": ENERGY, "forces": FORCES}
    return {**arrays, "old_indices": np.arange(5), **changes}


def test_rmd17_form_is_recognised(write):
    frames = read_frames(write(**rmd17()))
    assert len(frames) == 5
    assert frames[2].z.tolist() == [8, 6, 1, 1]
    assert frames[2].energy.dtype == torch.float64
    np.testing.assert_allclose(frames[2].energy.numpy(), ENERGY[2:3] * KCAL, rtol=1e-15)
    np.testing.assert_allclose(frames[2].forces.numpy(), FORCES[2] * KCAL, rtol=1e-14)
    np.testing.assert_array_equal(frames[2].pos.numpy(), POS[2])
    assert frames.sources == {"energy": ("energies",), "forces": ("forces",)}


def test_sgdml_form_and_its_own_units(write):
    arrays = {"z": Z, "R": POS, "E": ENERGY[:, None], "F": FORCES}
    with pytest.raises(ValueError, match="does not say its units; give units"):
        read_npz(write(**arrays))
    stated = read_npz(write(**arrays, e_unit=b"kcal/mol", r_unit=b"Ang"))
    given = read_npz(write(**arrays), units="kcal/mol")
    assert stated[1].energy.equal(given[1].energy)
    assert stated[1].energy.shape == (1,)
    atomic = read_npz(write(**arrays, e_unit="kcal/mol", r_unit="Ang"), units="Ha,bohr")  # the caller wins
    assert atomic[0].energy.item() == pytest.approx(ENERGY[0] * 27.211386245981, rel=1e-14)


def test_other_keys_rows_and_slices(write):
    path = write(**rmd17(old_energies=ENERGY + 1.0))
    assert read_npz(path, energy_key="old_energies")[0].energy.item() == pytest.approx((ENERGY[0] + 1) * KCAL)
    assert [f.pos[0, 0].item() for f in read_npz(path, rows=[4, 1])] == [POS[4, 0, 0], POS[1, 0, 0]]
    assert len(read_frames(path, index="::2")) == 3
    with pytest.raises(ValueError, match=r"rows must lie in 0..4 .*got \[5\]"):
        read_npz(path, rows=[0, 5])


def test_frames_do_not_share_memory(write):
    frames = read_npz(write(**rmd17()))
    frames[0].z[0] = 1
    assert frames[1].z[0] == 8


def test_padding_cells_and_dipoles(write):
    z = np.tile(Z, (5, 1))
    z[3, 3] = 0
    frames = read_npz(
        write(z=z, pos=POS, energy=ENERGY, forces=FORCES, cell=np.eye(3) * 7, dipole=FORCES[:, 0]),
        units="eV, nm, D",
    )
    assert frames[3].num_nodes == 3
    assert frames[3].forces.shape == (3, 3)
    assert frames[0].cell.shape == (1, 3, 3)
    assert frames[0].cell[0, 0, 0] == 70.0
    assert frames[0].pbc.tolist() == [[True, True, True]]
    np.testing.assert_allclose(frames[1].dipole.numpy(), FORCES[1:2, 0] * 0.20819434, rtol=1e-7)


def test_our_own_unit_words(write):
    frames = read_npz(write(z=Z, pos=POS, energy=ENERGY, energy_unit="Hartree", length_unit="bohr"))
    assert frames[0].energy.item() == pytest.approx(ENERGY[0] * 27.211386245981, rel=1e-14)
    with pytest.raises(ValueError, match="unknown energy unit 'hartre'; did you mean 'Ha'"):
        read_npz(write(z=Z, pos=POS, energy=ENERGY, energy_unit="hartre", length_unit="bohr"))
    for odd in (np.zeros(0), np.array(["eV", "eV"]), 3.0):
        with pytest.raises(ValueError, match=r"npz: 'energy_unit' must hold the name of one unit, got an array of"):
            read_npz(write(z=Z, pos=POS, energy=ENERGY, energy_unit=odd, length_unit="bohr"))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"coords": POS[:, :, :2]}, {}, r"positions must have shape \[frames, atoms, 3\], got \[5, 4, 2\]"),
        ({"coords": POS[:0]}, {}, "holds no frame or frames without atoms"),
        ({"coords": POS[:, :0]}, {}, "holds no frame or frames without atoms"),
        ({"forces": FORCES[:4]}, {}, r"forces must have shape \[5, 4, 3\], got \[4, 4, 3\]"),
        ({"energies": ENERGY[:4]}, {}, r"energy must have shape \[5\], got \[4\]"),
        (
            {"nuclear_charges": Z[:3]},
            {},
            r"atomic numbers must have shape \[4\] and \[5, 4\]|atomic numbers must have",
        ),
        ({"nuclear_charges": Z + 0.5}, {}, "atomic numbers must be whole"),
        ({"nuclear_charges": Z - 9}, {}, r"atomic numbers must lie in 1..118"),
        ({"nuclear_charges": np.array(["O", "C", "H", "H"])}, {}, "'nuclear_charges' must hold numbers"),
        ({"energies": np.where(np.arange(5) == 3, np.inf, ENERGY)}, {}, "energy of frame 3 is inf"),
        ({"E": ENERGY + 1.0}, {}, "holds energy under energies and E with other values; choose one with energy_key"),
        ({}, {"stress_key": "nonsense"}, "stress_key 'nonsense' is not in frames.npz"),
        (
            {"coords": np.where(np.arange(5)[:, None, None] == 2, np.inf, POS)},
            {},
            "pos of frame 2, atom 0 is inf",
        ),
        ({}, {"energy_key": "energie"}, "energy_key 'energie' is not in frames.npz; did you mean energies"),
        ({}, {"units": "kcl/mol"}, "unknown energy unit 'kcl/mol'; did you mean 'kcal/mol'"),
    ],
)
def test_errors(write, changes, options, message):
    with pytest.raises(ValueError, match=message):
        read_npz(write(**rmd17(**changes)), **options)


def test_missing_arrays_and_files(write, tmp_path):
    with pytest.raises(ValueError, match=r"has no pos \(tried coords, R, positions, pos\)"):
        read_npz(write(z=Z, energy=ENERGY))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_npz(tmp_path / "no.npz")
    empty = tmp_path / "empty.npz"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no frame: the file is empty"):
        read_npz(empty)
    path = write(**rmd17())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="is no readable npz"):
        read_npz(path)
    with path.open("wb") as file:
        np.save(file, POS)
    with pytest.raises(ValueError, match=r"is no readable npz \(File is not a zip file\)"):
        read_npz(path)
    with pytest.raises(ValueError, match="no pickled objects"):
        read_npz(write(z=Z, pos=POS, energy=np.array([None, 1], dtype=object)), units="eV")


@pytest.mark.parametrize(("flips", "cuts"), [(100, 20), pytest.param(1000, 200, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_or_right(write, flips, cuts):
    assert_error_or_right(write(**rmd17()), lambda path: str([f.to_dict() for f in read_npz(path)]), flips, cuts)


def test_an_array_whose_shape_became_smaller_is_noticed(write):
    """numpy reads the first numbers only, and does not get to the checksum."""
    path = write(z=Z, R=POS[:1], E=ENERGY[:1], weights=np.arange(9000.0))
    content = path.read_bytes()
    assert content.count(b"(9000,)") == 1
    path.write_bytes(content.replace(b"(9000,)", b"(1000,)"))  # one bit
    with np.load(path) as file:
        assert len(file["weights"]) == 1000
    with pytest.raises(ValueError, match=r"frames\.npz' is no readable npz \(weights\.npy does not match its checksum"):
        read_npz(path, units="eV")


def test_labels_that_are_nan_are_missing(write):
    energy, forces = ENERGY.copy(), FORCES.copy()
    energy[1], forces[2], forces[3, 1] = np.nan, np.nan, np.nan
    frames = read_frames(write(**rmd17(energies=energy, forces=forces)))
    assert ["energy" in frame for frame in frames] == [True, False, True, True, True]
    assert ["forces" in frame for frame in frames] == [True, True, False, True, True]
    assert frames[3].forces.isnan().any(dim=1).tolist() == [False, True, False, False]
    forces[4, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"forces of frame 4, atom 0 is nan"):
        read_frames(write(**rmd17(forces=forces)))


@pytest.mark.parametrize("form", ["full", "nine", "voigt"])
def test_stress_and_its_key(write, form):
    half = RNG.normal(size=(5, 3, 3))
    stress = half + half.transpose(0, 2, 1)
    given = {
        "full": stress, "nine": stress.reshape(5, 9), "voigt": stress.reshape(5, 9)[:, [0, 4, 8, 5, 2, 1]],
    }[form]  # fmt: skip
    arrays = rmd17(cell=5 * np.eye(3), my_stress=given)
    assert "stress" not in read_frames(write(**arrays))[0]
    frames = read_frames(write(**arrays), stress_key="my_stress", units="eV, angstrom, GPa")
    assert frames.sources["stress"] == ("my_stress",)
    np.testing.assert_allclose(frames[3].stress.numpy(), stress[3:4] / 160.2176634, rtol=1e-12)
    np.testing.assert_allclose(frames[3].energy.numpy(), ENERGY[3:4], rtol=1e-15)
